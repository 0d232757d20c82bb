//! What a recipe will do: each stage's model before and after, its steps, images and memory. Everything that can be
//! known without training is checked here, before anything is computed.

mod cost;
mod evaluate;
mod known;
pub mod missing;

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use self::cost::{
    FROZEN, TRAINING, flops, images, inference_memory, sampling_flops, training_memory,
};
use self::evaluate::{check_sampling, is_pixels, latents_need_a_vae, plan_evaluate};
use self::known::{Known, Problem, keeps_weights};
use self::missing::{Missing, MissingFile, Role, refuse};
use super::RecipeError;
use super::schema::prune::{Prune, PruneMethod, Scored};
use super::schema::recover::{Recover, RecoverMethod};
use super::schema::sample::Against;
use super::schema::source::Source;
use super::schema::train::{Train, Wanted};
use super::schema::{Recipe, Stage, StageKind};
use crate::data::ImageFolder;
use crate::models::Architecture;
use crate::process::ProcessKind;
use crate::pruning::{Update, oracle};
use crate::report::{scientific, thousands};
use crate::training::Optimisation;
use crate::training::share_of_start;

/// A recipe with every stage's models known.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The recipe.
    pub recipe: Recipe,
    /// One entry per stage.
    pub stages: Vec<PlannedStage>,
    /// Files that must be there before it can run, and are not.
    pub missing: Vec<MissingFile>,
}

/// What a stage will do.
#[derive(Debug, Clone, Serialize)]
pub struct PlannedStage {
    /// Its name.
    pub name: String,
    /// Kind and method.
    pub what: String,
    /// The model it starts from.
    pub before: Option<Architecture>,
    /// The model it leaves.
    pub after: Option<Architecture>,
    /// The process that its models were trained under, as far as there is one and it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<ProcessKind>,
    /// Optimizer steps, or network calls per sample.
    pub steps: usize,
    /// Images seen or made.
    pub images: usize,
    /// Estimated bytes of tensors at the peak.
    pub memory: usize,
    /// Floating-point operations of the networks, two to a multiply-accumulate.
    pub flops: f64,
    /// What a person should know before it runs.
    pub notes: Vec<String>,
}

impl Plan {
    /// Plans a recipe.
    ///
    /// # Errors
    /// All stages that can't be done with their models, in one message.
    pub fn new(recipe: &Recipe) -> Result<Self, RecipeError> {
        let mut known = Known {
            recipe,
            made: BTreeMap::new(),
            missing: Vec::new(),
            looked: [None, None],
        };
        let (mut stages, mut problems) = (Vec::new(), Vec::new());
        for stage in &recipe.stages {
            match plan_stage(stage, &mut known) {
                Ok(planned) => {
                    if let Some(after) = &planned.after {
                        let made = (after.clone(), planned.process);
                        known.made.insert(stage.name.clone(), made);
                    }
                    stages.push(planned);
                }
                // What depends on a stage that can't be done is not reported again.
                Err(Problem::Unknown) => {}
                Err(Problem::Said(problem)) => {
                    problems.push(format!("stage `{}`: {problem}", stage.name))
                }
            }
        }
        if problems.is_empty() {
            Ok(Self {
                recipe: recipe.clone(),
                stages,
                missing: known.missing,
            })
        } else {
            Err(RecipeError::Run(problems.join("\n")))
        }
    }
}

impl Plan {
    /// Refuses to run without the files it needs.
    ///
    /// # Errors
    /// All that are missing, with what each is and where to get it.
    pub fn complete(&self) -> Result<(), RecipeError> {
        refuse(&self.missing)
    }
}

fn plan_stage(stage: &Stage, known: &mut Known<'_>) -> Result<PlannedStage, Problem> {
    let planned = |what: &str,
                   before: Option<Architecture>,
                   after: Option<Architecture>,
                   steps,
                   images,
                   memory,
                   flops| PlannedStage {
        name: stage.name.clone(),
        what: what.to_owned(),
        before,
        after,
        process: None,
        steps,
        images,
        memory,
        flops,
        notes: average_note(stage).into_iter().collect(),
    };
    match &stage.kind {
        StageKind::Train(train) => {
            let (before, after, process) = train_architecture(stage, train, known)?;
            if let Some(from) = &train.from {
                known.same_classes(from)?;
            }
            let seen = images(&train.optimisation);
            match after.is_denoiser() {
                true => known.fits_data(stage, after.shape())?,
                false => known.classifies(stage, &after)?,
            }
            let memory = training_memory(&after, after.parameters(), &train.optimisation);
            let flops = TRAINING * flops(&after, seen);
            let planned = planned(
                "train",
                before,
                Some(after),
                train.optimisation.steps,
                seen,
                memory,
                flops,
            );
            Ok(PlannedStage { process, ..planned })
        }
        StageKind::Prune(prune) => {
            let (before, process) = known.denoiser(stage, &prune.from)?;
            if !keeps_weights(&stage.kind) {
                known.same_classes(&prune.from)?;
            }
            let kept = kept_depth(prune, &before)?;
            let after = before.with_depth(kept);
            let (steps, seen, memory, flops) = match &prune.method {
                PruneMethod::Learned(learned) => {
                    known.fits_data(stage, before.shape())?;
                    let learning = match learned.update {
                        Update::Full => before.parameters(),
                        Update::Lora { rank, .. } => before.lora_parameters(rank),
                        Update::Frozen => 0,
                    };
                    let seen = images(&learned.optimisation);
                    let passes = match learned.update {
                        Update::Full => TRAINING,
                        Update::Lora { .. } | Update::Frozen => FROZEN,
                    };
                    (
                        learned.optimisation.steps,
                        seen,
                        training_memory(&before, learning, &learned.optimisation),
                        passes * flops(&before, seen),
                    )
                }
                PruneMethod::ShortGpt(scored)
                | PruneMethod::FluxLite(scored)
                | PruneMethod::Sensitivity(scored) => {
                    known.fits_data(stage, before.shape())?;
                    let seen = scored.batches * scored.batch;
                    let passes = match &prune.method {
                        PruneMethod::Sensitivity(_) => 1.0 + before.depth() as f64,
                        _ => 1.0,
                    };
                    (
                        scored.batches,
                        seen,
                        inference_memory(&before, scored.batch),
                        passes * flops(&before, seen),
                    )
                }
                PruneMethod::Oracle { .. }
                | PruneMethod::Random { .. }
                | PruneMethod::Kept { .. } => (0, 0, before.parameters() * 4, 0.0),
            };
            let planned = planned(
                &format!("prune, {}", prune_method(&prune.method)),
                Some(before),
                Some(after),
                steps,
                seen,
                memory,
                flops,
            );
            Ok(PlannedStage { process, ..planned })
        }
        StageKind::Recover(recover) => {
            let (config, process) = known.denoiser(stage, &recover.from)?;
            let process = process.unwrap_or(ProcessKind::ASSUMED);
            known.same_classes(&recover.from)?;
            known.fits_data(stage, config.shape())?;
            let seen = images(&recover.optimisation);
            let mut flops_ = TRAINING * flops(&config, seen);
            let mut memory = training_memory(&config, config.parameters(), &recover.optimisation);
            if let Some(teacher) = teacher(recover) {
                let (teacher, other) = known.denoiser(stage, teacher)?;
                let other = other.unwrap_or(ProcessKind::ASSUMED);
                if other != process {
                    return Err(Problem::Said(format!(
                        "the student was trained by {process}, the teacher by {other}"
                    )));
                }
                if teacher.with_depth(config.depth()) != config {
                    return Err(Problem::Said(format!(
                        "student and teacher differ in more than depth: {config}; {teacher}"
                    )));
                }
                let representation = match &recover.method {
                    RecoverMethod::RepKd { representation, .. }
                    | RecoverMethod::MaskedKd { representation, .. } => Some(representation),
                    RecoverMethod::FineTune | RecoverMethod::Kd { .. } => None,
                };
                if let Some(taps) =
                    representation.and_then(|representation| representation.taps.as_ref())
                {
                    let taps: Vec<(usize, usize)> = taps
                        .iter()
                        .map(|[student, teacher]| (*student, *teacher))
                        .collect();
                    check_taps(&taps, config.depth(), teacher.depth()).map_err(Problem::Said)?;
                }
                let part = recover.optimisation.batch / recover.optimisation.accumulate;
                memory += inference_memory(&teacher, part);
                flops_ += flops(&teacher, seen);
            }
            let before = config;
            let planned = planned(
                &format!("recover, {}", recover_method(&recover.method)),
                Some(before.clone()),
                Some(before),
                recover.optimisation.steps,
                seen,
                memory,
                flops_,
            );
            let process = Some(process);
            Ok(PlannedStage { process, ..planned })
        }
        StageKind::Sample(sample) => {
            let (config, process) = known.denoiser(stage, &sample.from)?;
            let memory = check_sampling(&sample.sampling, &config, &sample.from, process)?;
            let flops = sampling_flops(&sample.sampling, &config);
            if let Some(vae) = &sample.vae {
                known.vae(stage, vae, config.shape())?;
            } else if !is_pixels(config.shape()) {
                return Err(latents_need_a_vae(config.shape()));
            }
            let planned = planned(
                "sample",
                Some(config),
                None,
                sample.sampling.steps,
                sample.sampling.count,
                memory,
                flops,
            );
            Ok(PlannedStage { process, ..planned })
        }
        StageKind::Evaluate(evaluate) => {
            let (memory, flops) = plan_evaluate(stage, evaluate, known)?;
            let models = evaluate.compare.len();
            let archives = match &evaluate.against {
                Against::Reference { samples, .. } => samples.len(),
                Against::HeldOut { .. } => 0,
            };
            let what = match (models, archives) {
                (models, 0) => format!("evaluate {models} models"),
                (0, archives) => format!("evaluate {archives} archives"),
                (models, archives) => format!("evaluate {models} models and {archives} archives"),
            };
            Ok(planned(
                &what,
                None,
                None,
                evaluate.sampling.steps,
                models * evaluate.sampling.count,
                memory,
                flops,
            ))
        }
        StageKind::Extract(extract) => {
            let there = known.need(stage, &extract.images, Role::Images);
            known.need(stage, &extract.vae, Role::Vae);
            let images = if there {
                ImageFolder::open(&extract.images)?.images().len()
            } else {
                0
            };
            let views = if extract.mirror { 2 } else { 1 };
            Ok(planned(
                "extract latents",
                None,
                None,
                0,
                views * images,
                0,
                0.0,
            ))
        }
    }
}

/// The largest share of the initial weights that an average may end with unmentioned.
const SHARE_OF_START: f64 = 0.05;

/// A warning where a budget is too short for its moving average, which is what a stage leaves.
fn average_note(stage: &Stage) -> Option<String> {
    let optimisation = stage.kind.optimisation()?;
    let Optimisation { ema, steps, .. } = *optimisation;
    let share = share_of_start(ema, steps);
    (!optimisation.ema_warmup && share > SHARE_OF_START).then(|| {
        format!(
            "after {} steps, {:.0}% of the average (ema = {ema}) are still the weights it began with; \
             take more steps, a smaller `ema`, or ema_warmup = true",
            thousands(steps),
            100.0 * share
        )
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
    let process = (train.architecture.as_ref()).and_then(|wanted: &Wanted| wanted.family.process);
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

fn kept_depth(prune: &Prune, before: &Architecture) -> Result<usize, Problem> {
    let depth = before.depth();
    Ok(match &prune.method {
        PruneMethod::Learned(learned) => {
            let groups = learned.groups.resolve(depth)?;
            if let Some(trunk) = before.trunk() {
                groups.fit(&trunk)?;
            }
            groups.kept_depth()
        }
        PruneMethod::Oracle { keep } => {
            let kept = oracle(depth).ok_or_else(|| Problem::Said(format!("the oracle rule keeps one layer of each pair, and {depth} layers are no pairs")))?.len();
            match keep {
                Some(keep) if *keep != kept => {
                    return Err(Problem::Said(format!(
                        "the oracle rule keeps {kept} of {depth} layers, not {keep}"
                    )));
                }
                _ => kept,
            }
        }
        PruneMethod::ShortGpt(Scored { keep, .. })
        | PruneMethod::FluxLite(Scored { keep, .. })
        | PruneMethod::Sensitivity(Scored { keep, .. })
        | PruneMethod::Random { keep, .. } => {
            if *keep == 0 || *keep >= depth {
                return Err(Problem::Said(format!(
                    "`keep` is {keep}, which must lie between 1 and {} for {depth} layers",
                    depth - 1
                )));
            }
            *keep
        }
        PruneMethod::Kept { kept } => {
            let distinct: std::collections::BTreeSet<&usize> = kept.iter().collect();
            if let Some(layer) = kept.iter().find(|layer| **layer >= depth) {
                return Err(Problem::Said(format!(
                    "`kept` names layer {layer}; there are {depth}, counted from 0"
                )));
            }
            if kept.is_empty() || distinct.len() != kept.len() {
                return Err(Problem::Said(
                    "`kept` must name at least one layer, and none twice".into(),
                ));
            }
            kept.len()
        }
    })
}

pub(super) fn teacher(recover: &Recover) -> Option<&Source> {
    match &recover.method {
        RecoverMethod::FineTune => None,
        RecoverMethod::Kd { distillation }
        | RecoverMethod::RepKd { distillation, .. }
        | RecoverMethod::MaskedKd { distillation, .. } => Some(&distillation.teacher),
    }
}

pub(super) fn prune_method(method: &PruneMethod) -> &'static str {
    match method {
        PruneMethod::Learned(_) => "learned",
        PruneMethod::Oracle { .. } => "oracle",
        PruneMethod::ShortGpt(_) => "shortgpt",
        PruneMethod::FluxLite(_) => "flux-lite",
        PruneMethod::Sensitivity(_) => "sensitivity",
        PruneMethod::Random { .. } => "random",
        PruneMethod::Kept { .. } => "kept",
    }
}

pub(super) fn recover_method(method: &RecoverMethod) -> &'static str {
    match method {
        RecoverMethod::FineTune => "fine-tune",
        RecoverMethod::Kd { .. } => "kd",
        RecoverMethod::RepKd { .. } => "rep-kd",
        RecoverMethod::MaskedKd { .. } => "masked-kd",
    }
}

/// Refuses (student, teacher) taps outside the models or out of order; features are compared in the order of the
/// trunk.
pub(super) fn check_taps(
    taps: &[(usize, usize)],
    depth: usize,
    teacher_depth: usize,
) -> Result<(), String> {
    if let Some((student, teacher)) = taps
        .iter()
        .find(|(student, teacher)| *student >= depth || *teacher >= teacher_depth)
    {
        return Err(format!(
            "tap [{student}, {teacher}] lies outside a student of {depth} and a teacher of {teacher_depth} layers"
        ));
    }
    let rising = taps
        .windows(2)
        .all(|pair| pair[0].0 < pair[1].0 && pair[0].1 < pair[1].1);
    if taps.is_empty() || !rising {
        return Err("there must be at least one tap, and taps must rise on both sides".into());
    }
    Ok(())
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "recipe {}, seed {}", self.recipe.name, self.recipe.seed)?;
        for (index, stage) in self.stages.iter().enumerate() {
            writeln!(f, "{}. {}: {}", index + 1, stage.name, stage.what)?;
            let model = |label: &str, architecture: &Architecture| -> String {
                match architecture.is_denoiser() {
                    true => format!(
                        "   {label} {}, {} parameters, {} MACs an image",
                        ProcessKind::called(stage.process, architecture),
                        thousands(architecture.parameters()),
                        thousands(architecture.macs())
                    ),
                    false => format!("   {label} {architecture}"),
                }
            };
            match (&stage.before, &stage.after) {
                (Some(before), Some(after)) if before == after => {
                    writeln!(f, "{}", model("model", before))?
                }
                (before, after) => {
                    for (label, architecture) in [("before", before), ("after ", after)] {
                        if let Some(architecture) = architecture {
                            writeln!(f, "{}", model(label, architecture))?;
                        }
                    }
                }
            }
            write!(
                f,
                "   {} steps, {} images, about {} MiB",
                thousands(stage.steps),
                thousands(stage.images),
                thousands((stage.memory >> 20).max(1))
            )?;
            if stage.flops > 0.0 {
                write!(f, ", {} FLOPs", scientific(stage.flops))?;
            }
            writeln!(f)?;
            for note in &stage.notes {
                writeln!(f, "   note: {note}")?;
            }
        }
        if !self.missing.is_empty() {
            write!(f, "\n{}", Missing(&self.missing))?;
        }
        Ok(())
    }
}
