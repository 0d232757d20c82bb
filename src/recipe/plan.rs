//! What a recipe will do: each stage's model before and after, its steps, images and memory. Everything that can be
//! known without training is checked here, before anything is computed.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::RecipeError;
use super::embedded;
use super::optimisation::Optimisation;
use super::prune::{Prune, PruneMethod};
use super::recover::{Recover, RecoverMethod};
use super::sampling::Sampling;
use super::schema::{Recipe, Stage, StageKind};
use super::source::Source;
use super::train::{Architecture as Wanted, Dit, Train};
use crate::data::{Digits, Split};
use crate::models::{Architecture, DigitsClassifierConfig, DitConfig, digits, zoo};
use crate::pruning::{Update, oracle};
use crate::weights::Checkpoint;

/// A recipe with every stage's models known.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The recipe.
    pub recipe: Recipe,
    /// One entry per stage.
    pub stages: Vec<PlannedStage>,
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
    /// Optimizer steps, or network calls per sample.
    pub steps: usize,
    /// Images seen or made.
    pub images: usize,
    /// Estimated bytes of tensors at the peak.
    pub memory: usize,
}

impl Plan {
    /// Plans a recipe.
    ///
    /// # Errors
    /// All stages that can't be done with their models, in one message.
    pub fn new(recipe: &Recipe) -> Result<Self, RecipeError> {
        let mut made = BTreeMap::new();
        let (mut stages, mut problems) = (Vec::new(), Vec::new());
        for stage in &recipe.stages {
            match plan_stage(stage, &made) {
                Ok(planned) => {
                    if let Some(after) = &planned.after {
                        made.insert(stage.name.clone(), after.clone());
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
            })
        } else {
            Err(RecipeError::Run(problems.join("\n")))
        }
    }
}

enum Problem {
    /// The model comes from a stage that failed.
    Unknown,
    Said(String),
}

impl<E: std::error::Error> From<E> for Problem {
    fn from(error: E) -> Self {
        Self::Said(error.to_string())
    }
}

type Made = BTreeMap<String, Architecture>;

fn architecture(source: &Source, made: &Made) -> Result<Architecture, Problem> {
    match source {
        Source::Stage(name) => made.get(name).cloned().ok_or(Problem::Unknown),
        Source::Embedded(name) => Ok(embedded::checkpoint(*name)?.architecture),
        Source::Path(path) => Ok(Checkpoint::read(path)?.architecture),
    }
}

fn dit(source: &Source, made: &Made) -> Result<DitConfig, Problem> {
    match architecture(source, made)? {
        Architecture::Dit(config) => Ok(config),
        other => Err(Problem::Said(format!(
            "`{source}` is a {other}; a diffusion network is needed"
        ))),
    }
}

fn plan_stage(stage: &Stage, made: &Made) -> Result<PlannedStage, Problem> {
    let planned = |what: &str,
                   before: Option<Architecture>,
                   after: Option<Architecture>,
                   steps,
                   images,
                   memory| PlannedStage {
        name: stage.name.clone(),
        what: what.to_owned(),
        before,
        after,
        steps,
        images,
        memory,
    };
    match &stage.kind {
        StageKind::Train(train) => {
            let (before, after) = train_architecture(train, made)?;
            let memory = match &after {
                Architecture::Dit(config) => {
                    fits_digits(config)?;
                    training_memory(config, config.parameters(), train.optimisation.batch)
                }
                Architecture::DigitsClassifier(_) => 64 << 20,
            };
            Ok(planned(
                "train",
                before,
                Some(after),
                train.optimisation.steps,
                images(&train.optimisation),
                memory,
            ))
        }
        StageKind::Prune(prune) => {
            let before = dit(&prune.from, made)?;
            let kept = kept_depth(prune, &before)?;
            let after = DitConfig {
                depth: kept,
                ..before.clone()
            };
            let (steps, seen, memory) = match &prune.method {
                PruneMethod::Learned(learned) => {
                    fits_digits(&before)?;
                    let learning = match learned.update {
                        Update::Full => before.parameters(),
                        Update::Lora { rank, .. } => lora_parameters(&before, rank),
                        Update::Frozen => 0,
                    };
                    (
                        learned.optimisation.steps,
                        images(&learned.optimisation),
                        training_memory(&before, learning, learned.optimisation.batch),
                    )
                }
                PruneMethod::ShortGpt(scored)
                | PruneMethod::FluxLite(scored)
                | PruneMethod::Sensitivity(scored) => {
                    fits_digits(&before)?;
                    (
                        scored.batches,
                        scored.batches * scored.batch,
                        inference_memory(&before, scored.batch),
                    )
                }
                PruneMethod::Oracle { .. } | PruneMethod::Kept { .. } => {
                    (0, 0, before.parameters() * 4)
                }
            };
            Ok(planned(
                &format!("prune, {}", prune_method(&prune.method)),
                Some(Architecture::Dit(before)),
                Some(Architecture::Dit(after)),
                steps,
                seen,
                memory,
            ))
        }
        StageKind::Recover(recover) => {
            let config = dit(&recover.from, made)?;
            fits_digits(&config)?;
            let mut memory =
                training_memory(&config, config.parameters(), recover.optimisation.batch);
            if let Some(teacher) = teacher(recover) {
                let teacher = dit(teacher, made)?;
                if (DitConfig {
                    depth: config.depth,
                    ..teacher.clone()
                }) != config
                {
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
                    check_taps(&taps, config.depth, teacher.depth).map_err(Problem::Said)?;
                }
                memory += inference_memory(&teacher, recover.optimisation.batch);
            }
            let before = Architecture::Dit(config);
            Ok(planned(
                &format!("recover, {}", recover_method(&recover.method)),
                Some(before.clone()),
                Some(before),
                recover.optimisation.steps,
                images(&recover.optimisation),
                memory,
            ))
        }
        StageKind::Sample(sample) => {
            let config = dit(&sample.from, made)?;
            let memory = check_sampling(&sample.sampling, &config)?;
            Ok(planned(
                "sample",
                Some(Architecture::Dit(config)),
                None,
                sample.sampling.steps,
                sample.sampling.count,
                memory,
            ))
        }
        StageKind::Evaluate(evaluate) => {
            let most = evaluate
                .sampling
                .count
                .min(Digits::new(Split::Test).count());
            if evaluate.neighbours >= most {
                return Err(Problem::Said(format!(
                    "{} neighbours can't be found among {most} images",
                    evaluate.neighbours
                )));
            }
            let mut memory = 0;
            for source in &evaluate.compare {
                let config = dit(source, made)?;
                fits_digits(&config)?;
                memory = memory.max(check_sampling(&evaluate.sampling, &config)?);
            }
            if !matches!(
                architecture(&evaluate.features, made)?,
                Architecture::DigitsClassifier(_)
            ) {
                return Err(Problem::Said(format!(
                    "`{}` is no digit classifier",
                    evaluate.features
                )));
            }
            let models = evaluate.compare.len();
            Ok(planned(
                &format!("evaluate {models} models"),
                None,
                None,
                evaluate.sampling.steps,
                models * evaluate.sampling.count,
                memory,
            ))
        }
    }
}

fn images(optimisation: &Optimisation) -> usize {
    optimisation.steps * optimisation.batch
}

fn train_architecture(
    train: &Train,
    made: &Made,
) -> Result<(Option<Architecture>, Architecture), Problem> {
    let wanted = match &train.architecture {
        None => None,
        Some(Wanted::DigitsClassifier { width }) => {
            Some(Architecture::DigitsClassifier(DigitsClassifierConfig {
                width: *width,
            }))
        }
        Some(Wanted::Dit(Dit::Sizes(config))) => Some(Architecture::Dit(config.clone())),
        Some(Wanted::Dit(Dit::Preset { preset })) => {
            let config = zoo::config(preset, 32, 4, 1000)
                .ok_or_else(|| Problem::Said(format!("no model is called `{preset}`")))?;
            Some(Architecture::Dit(config))
        }
    };
    let before = train
        .from
        .as_ref()
        .map(|source| architecture(source, made))
        .transpose()?;
    match (before, wanted) {
        (Some(before), Some(wanted)) if before != wanted => Err(Problem::Said(format!(
            "the architecture asked for is {wanted}, but the checkpoint holds {before}"
        ))),
        (Some(before), _) => Ok((Some(before.clone()), before)),
        (None, Some(wanted)) => Ok((None, wanted)),
        (None, None) => Err(Problem::Said(
            "neither a checkpoint nor an architecture".into(),
        )),
    }
}

/// The embedded data are 8 x 8 with one channel and ten classes; a model must be of that kind to learn from them.
fn fits_digits(config: &DitConfig) -> Result<(), Problem> {
    let (size, classes) = (digits::SIDE, digits::CLASSES);
    if (config.input_size, config.channels, config.classes) == (size, 1, classes) {
        return Ok(());
    }
    Err(Problem::Said(format!(
        "the data are digits, 1x{size}x{size} in {classes} classes, but the model is for {}x{}x{} in {}",
        config.channels, config.input_size, config.input_size, config.classes
    )))
}

fn kept_depth(prune: &Prune, before: &DitConfig) -> Result<usize, Problem> {
    let depth = before.depth;
    Ok(match &prune.method {
        PruneMethod::Learned(learned) => learned.groups.resolve(depth)?.kept_depth(),
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
        PruneMethod::ShortGpt(scored)
        | PruneMethod::FluxLite(scored)
        | PruneMethod::Sensitivity(scored) => {
            if scored.keep == 0 || scored.keep >= depth {
                return Err(Problem::Said(format!(
                    "`keep` is {}, which must lie between 1 and {} for {depth} layers",
                    scored.keep,
                    depth - 1
                )));
            }
            scored.keep
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

fn check_sampling(sampling: &Sampling, config: &DitConfig) -> Result<usize, Problem> {
    if let Some(class) = sampling
        .classes
        .iter()
        .flatten()
        .find(|class| **class >= config.classes)
    {
        return Err(Problem::Said(format!(
            "class {class} does not exist; the model has {}, counted from 0",
            config.classes
        )));
    }
    Ok(inference_memory(
        config,
        2 * sampling.batch.min(sampling.count),
    ))
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

/// Parameters of a low-rank update of every linear layer.
fn lora_parameters(config: &DitConfig, rank: usize) -> usize {
    let width = config.width;
    let hidden = config.hidden();
    let block = (width + 3 * width) + (width + width) + 2 * (width + hidden) + (width + 6 * width);
    let ends = (256 + width)
        + (width + width)
        + (width + 2 * width)
        + (width + config.patch_size.pow(2) * config.out_channels());
    rank * (config.depth * block + ends)
}

/// Bytes of f32 activations that one block leaves for its backward pass: composed of Burn's operators, each of which
/// keeps its inputs, about 30 tensors of the trunk's width, 9 of the MLP's and 5 of the attention weights. Gives 213 MiB
/// for the 12-layer digit model at batch 64, whose fine-tuning `tinyfusion bench` measures at 264 MiB in all.
fn block_activations(config: &DitConfig, batch: usize) -> usize {
    let tokens = config.tokens();
    4 * batch * tokens * (30 * config.width + 9 * config.hidden() + 5 * config.heads * tokens)
}

/// Weights, gradients, two moments and an average of what learns, and all blocks' activations.
fn training_memory(config: &DitConfig, learning: usize, batch: usize) -> usize {
    4 * config.parameters() + 16 * learning + config.depth * block_activations(config, batch)
}

/// Weights, and one block's activations.
fn inference_memory(config: &DitConfig, batch: usize) -> usize {
    4 * config.parameters() + block_activations(config, batch)
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "recipe {}, seed {}", self.recipe.name, self.recipe.seed)?;
        for (index, stage) in self.stages.iter().enumerate() {
            writeln!(f, "{}. {}: {}", index + 1, stage.name, stage.what)?;
            let model = |label: &str, architecture: &Architecture| -> String {
                match architecture {
                    Architecture::Dit(config) => format!(
                        "   {label} {config}, {} parameters, {} MACs an image",
                        thousands(config.parameters()),
                        thousands(config.macs())
                    ),
                    other => format!("   {label} {other}"),
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
            writeln!(
                f,
                "   {} steps, {} images, about {} MiB",
                thousands(stage.steps),
                thousands(stage.images),
                (stage.memory >> 20).max(1)
            )?;
        }
        Ok(())
    }
}

/// 1234567 as `1,234,567`.
pub(crate) fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .filter_map(|group| std::str::from_utf8(group).ok())
        .collect();
    groups.join(",")
}
