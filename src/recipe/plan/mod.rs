//! What a recipe will do: each stage's model before and after, its steps, images and memory.
//! Everything that can be known without training is checked here, before anything is computed.

pub(crate) mod analyse;
mod cost;
mod evaluate;
mod extract;
mod known;
pub mod missing;
pub(crate) mod prune;
pub(crate) mod recover;
mod sample;
pub(crate) mod train;
pub(crate) mod width;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

pub use self::analyse::AnalysePlan;
pub(in crate::recipe) use self::known::following;
use self::known::{Known, Problem};
use self::missing::{Missing, MissingFile, refuse};
pub use self::prune::{PrunePlan, Search, Selection};
pub use self::recover::{RecoverPlan, Taught};
pub use self::train::TrainPlan;
pub use self::width::WidthPlan;
use super::RecipeError;
use super::schema::extract::Extract;
use super::schema::sample::{Evaluate, Sample};
use super::schema::{Recipe, Stage, StageKind};
use crate::models::Architecture;
use crate::process::ProcessKind;
use crate::report::{scientific, thousands};
use crate::training::{Optimisation, share_of_start};

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
    /// What is done, resolved: what a run executes.
    #[serde(skip)]
    pub work: Work,
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

/// What a stage does, with everything resolved that can be before it runs.
#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "a recipe has few stages, and most of them train"
)]
pub enum Work {
    /// Trains a model.
    Train(TrainPlan),
    /// Takes layers out.
    Prune(PrunePlan),
    /// Takes channels out.
    Width(WidthPlan),
    /// Heals what is left.
    Recover(RecoverPlan),
    /// Draws samples.
    Sample(Sample),
    /// Measures samples.
    Evaluate(Evaluate),
    /// Looks into a model.
    Analyse(AnalysePlan),
    /// Encodes images.
    Extract(Extract),
}

impl Plan {
    /// Plans a recipe.
    ///
    /// # Errors
    /// All stages that can't be done with their models, in one message.
    pub fn new(recipe: &Recipe) -> Result<Self, RecipeError> {
        Self::shared(recipe, 1)
    }

    /// Plans a recipe that so many workers share: the memory is one worker's.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn shared(recipe: &Recipe, workers: usize) -> Result<Self, RecipeError> {
        let mut known = Known {
            recipe,
            workers,
            made: BTreeMap::new(),
            by_branch: BTreeSet::new(),
            divided: BTreeSet::new(),
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
    let planned = match &stage.kind {
        StageKind::Train(train) => train::plan(stage, train, known),
        StageKind::Prune(prune) => prune::plan(stage, prune, known),
        StageKind::Recover(recover) => recover::plan(stage, recover, known),
        StageKind::Sample(sample) => sample::plan(stage, sample, known),
        StageKind::Evaluate(evaluate) => evaluate::plan(stage, evaluate, known),
        StageKind::Analyse(analyse) => analyse::plan(stage, analyse, known),
        StageKind::Extract(extract) => extract::plan(stage, extract, known),
    }?;
    let trains = known.recipe.recompute && stage.kind.optimisation().is_some();
    match &planned.after {
        Some(model) if trains && !model.recomputes() => Err(Problem::Said(format!(
            "recompute = true is of DiTs and SiTs, whose blocks have branches to compute again; this is {model}"
        ))),
        _ => Ok(planned),
    }
}

impl PlannedStage {
    /// A stage whose models and cost are filled in by its kind.
    fn new(stage: &Stage, what: &str, work: Work) -> Self {
        Self {
            name: stage.name.clone(),
            what: what.to_owned(),
            work,
            before: None,
            after: None,
            process: None,
            steps: 0,
            images: 0,
            memory: 0,
            flops: 0.0,
            notes: average_note(stage).into_iter().collect(),
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
