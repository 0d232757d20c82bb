//! What looking into a model will do.

use super::cost::{flops, inference_memory};
use super::known::{Known, Problem};
use super::{PlannedStage, Work};
use crate::recipe::schema::Stage;
use crate::recipe::schema::analyse::{Analyse, View};
use crate::recipe::schema::prune::MASKS;
use crate::recipe::schema::source::Source;
use crate::trunk::Granularity;

/// Rounds in each of which a model of every size is timed once, after one that is not counted.
pub(crate) const ROUNDS: usize = 5;
/// Sizes that are timed: so many parts of the model, evenly spaced, in depth and in width.
pub(crate) const SIZES: usize = 8;

/// An analysis, resolved for the model it looks into.
#[derive(Debug, Clone)]
pub struct AnalysePlan {
    /// The model.
    pub from: Source,
    /// What is looked at.
    pub show: Vec<View>,
    /// Images that go through the model together.
    pub batch: usize,
    /// Deviations beyond which masked distillation leaves hidden states out.
    pub k: f64,
    /// Layers that random masks keep.
    pub keep: usize,
    /// Number of random masks.
    pub masks: usize,
    /// Pruned models whose loss is marked; None for all earlier stages that fit.
    pub mark: Option<Vec<Source>>,
}

pub(super) fn plan(
    stage: &Stage,
    analyse: &Analyse,
    known: &mut Known<'_>,
) -> Result<PlannedStage, Problem> {
    let (model, process) = known.denoiser(stage, &analyse.from)?;
    if model.trunk(Granularity::Block).is_none() {
        return Err(Problem::Said(format!(
            "{model} has no trunk whose layers could be looked into"
        )));
    }
    known.fits_data(stage, model.shape())?;
    known.same_classes(&analyse.from)?;
    let losses = analyse.show.contains(&View::Losses);
    if losses && known.is_by_branch(&analyse.from) {
        return Err(Problem::Said(format!(
            "\"losses\" takes whole blocks out, and `{}` is pruned by branch",
            analyse.from
        )));
    }
    let depth = model.layers(Granularity::Block);
    let keep = analyse.keep.unwrap_or((depth / 2).max(1));
    if losses && !(1..depth).contains(&keep) {
        return Err(Problem::Said(format!(
            "`keep` is {keep}, which must lie between 1 and {} for {depth} layers",
            depth.saturating_sub(1)
        )));
    }
    for source in analyse.mark.iter().flatten() {
        let (marked, _) = known.denoiser(stage, source)?;
        if marked.depth() != keep {
            return Err(Problem::Said(format!(
                "`mark` names `{source}`, which has {} layers, and `keep` is {keep}",
                marked.depth()
            )));
        }
    }
    let masks = if losses { analyse.masks } else { 0 };
    let seen = masks * MASKS.1.min(analyse.batch);
    // Of some thirty tensors that a block leaves for training one is kept: its output.
    let mut memory = inference_memory(&model, analyse.batch) + model.kept_bytes(analyse.batch) / 30;
    let mut spent = flops(&model, seen) * keep as f64 / depth as f64 + flops(&model, analyse.batch);
    if analyse.show.contains(&View::Speed) {
        // From one part of the model's size to all of them; shallower ones share its weights.
        let wholes = (SIZES + 1) as f64 / 2.0;
        let narrowed = model.channel_groups().is_some();
        let ways = if narrowed { 2.0 } else { 1.0 };
        spent += flops(&model, (1 + ROUNDS) * analyse.batch) * wholes * ways;
        if narrowed {
            memory += (4.0 * model.parameters() as f64 * wholes) as usize;
        }
    }
    let work = Work::Analyse(AnalysePlan {
        from: analyse.from.clone(),
        show: analyse.show.clone(),
        batch: analyse.batch,
        k: analyse.k,
        keep,
        masks,
        mark: analyse.mark.clone(),
    });
    let shown: Vec<&str> = (View::NAMES.iter())
        .filter(|(_, view)| analyse.show.contains(view))
        .map(|(name, _)| *name)
        .collect();
    Ok(PlannedStage {
        process,
        steps: masks,
        images: seen + analyse.batch,
        memory,
        flops: spent,
        before: Some(model),
        ..PlannedStage::new(stage, &format!("analyse {}", shown.join(", ")), work)
    })
}
