//! What a training will do.

use super::cost::{flops, images, passes, training_memory};
use super::known::{Known, Problem};
use super::{PlannedStage, Work};
use crate::models::Architecture;
use crate::process::ProcessKind;
use crate::recipe::schema::Stage;
use crate::recipe::schema::train::{Train, Wanted};

/// A training, resolved.
#[derive(Debug, Clone)]
pub struct TrainPlan {
    /// The stage's settings.
    pub train: Train,
    /// What is trained.
    pub architecture: Architecture,
    /// What it is trained under; None of a classifier.
    pub process: Option<ProcessKind>,
}

pub(super) fn plan(
    stage: &Stage,
    train: &Train,
    known: &mut Known<'_>,
) -> Result<PlannedStage, Problem> {
    let (before, after, process) = train_architecture(stage, train, known)?;
    if let Some(from) = &train.from {
        known.same_classes(from)?;
    }
    if let Some(meanwhile) = &train.meanwhile {
        if !after.is_denoiser() {
            return Err(Problem::Said(
                "`evaluate_every` is of models that draw".into(),
            ));
        }
        known.measured_meanwhile(stage, (&after, process), meanwhile)?;
    }
    match after.is_denoiser() {
        true => known.fits_data(stage, after.shape())?,
        false => known.classifies(stage, &after)?,
    }
    let seen = images(&train.optimisation);
    let work = Work::Train(TrainPlan {
        train: train.clone(),
        architecture: after.clone(),
        process,
    });
    Ok(PlannedStage {
        before,
        process,
        steps: train.optimisation.steps,
        images: seen,
        memory: training_memory(&after, after.parameters(), &train.optimisation, known),
        flops: passes(&after, known, false) * flops(&after, seen),
        after: Some(after),
        ..PlannedStage::new(stage, "train", work)
    })
}

fn train_architecture(
    stage: &Stage,
    train: &Train,
    known: &mut Known<'_>,
) -> Result<(Option<Architecture>, Architecture, Option<ProcessKind>), Problem> {
    let wanted = match &train.architecture {
        None => None,
        Some(wanted) => Some(
            (wanted.architecture())
                .ok_or_else(|| Problem::Said(format!("no model is called `{:?}`", wanted.model)))?,
        ),
    };
    let process = (train.architecture.as_ref()).and_then(|wanted: &Wanted| wanted.process);
    if let Some(wanted) = wanted.as_ref().filter(|wanted| wanted.is_denoiser())
        && let Some(why) = wanted.problem()
    {
        return Err(Problem::Said(format!("the {wanted} can't be built: {why}")));
    }
    let Some(from) = &train.from else {
        let wanted = wanted
            .ok_or_else(|| Problem::Said("neither a checkpoint nor an architecture".into()))?;
        return Ok((None, wanted, process));
    };
    let (before, known_process) = known.model(stage, from)?;
    let known_process = known_process.unwrap_or(ProcessKind::ASSUMED);
    let trained_by = before.is_denoiser().then_some(known_process);
    match wanted {
        Some(wanted) if before != wanted => Err(Problem::Said(format!(
            "the architecture asked for is {wanted}, but the checkpoint holds {before}"
        ))),
        Some(_) if process != trained_by => Err(Problem::Said(format!(
            "`{from}` was trained by another process than that of the family asked for"
        ))),
        _ => Ok((Some(before.clone()), before, trained_by)),
    }
}
