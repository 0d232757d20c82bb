//! The entry point of training.

#[cfg(feature = "tui")]
use std::io::IsTerminal;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::data::Feed;
use crate::ops::TrainingBackend;
use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::lr_scheduler::LrScheduler;
use burn::module::AutodiffModule;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::train::{InferenceStep, Learner, SupervisedTraining, TrainStep, TrainingStrategy};

use super::checkpoint::{Losses, Position, Store};
#[cfg(feature = "tui")]
use super::dashboard::Dashboard;
use super::metrics::{Curve, StepReport};
use super::optimizer::{AdamW, ParameterGroup};
use super::renderer::Quiet;
use super::shards::Shards;
use super::strategy::{Ended, Steps};
use super::{Ema, Training, TrainingError};
use crate::stop::Stop;
use crate::workers::{Group, alone};

/// Called after every step with its number, the model and the moving average, and by a training
/// that is resumed with its last step once more, before the first. [`TrainingError::Interrupted`]
/// stops the training after this step, for what is done once more then; of several workers all give
/// it or none. Where they divide the average (`shard_optimizer`), it is asked for by all of them or
/// by none.
pub type OnStep<B, M> = Box<
    dyn FnMut(usize, &M, &Ema<<B as AutodiffBackend>::InnerBackend>) -> Result<(), TrainingError>
        + Send,
>;

/// Makes an observer, given the first step.
pub type Observe<B, M> = Box<dyn FnOnce(usize) -> Result<OnStep<B, M>, TrainingError>>;

/// Makes the loader of a training's batches, given the first step.
pub type BatchesFrom<B, I> = Box<dyn FnOnce(usize) -> Arc<dyn Feed<B, I>>>;

/// A training that is about to run.
///
/// See `examples/own_network.rs` for a whole one.
pub struct Fit<B: TrainingBackend, M: TrainStep> {
    training: Training,
    resume: bool,
    groups: Vec<ParameterGroup>,
    batches: BatchesFrom<B, <M as TrainStep>::Input>,
    curves: Vec<&'static str>,
    observe: Option<Observe<B, M>>,
    plain: bool,
    stop: Stop,
    workers: Group,
}

impl<B: TrainingBackend, M: TrainStep> Fit<B, M> {
    /// A training on the batches that `batches` gives from a step on.
    pub fn new(
        training: Training,
        batches: impl FnOnce(usize) -> Arc<dyn Feed<B, <M as TrainStep>::Input>> + 'static,
    ) -> Self {
        Self {
            training,
            resume: false,
            groups: Vec::new(),
            batches: Box::new(batches),
            curves: Vec::new(),
            observe: None,
            plain: false,
            stop: Stop::default(),
            workers: alone(),
        }
    }

    /// Whether to go on from the last checkpoint in the training's folder, if there is one.
    /// Without, a folder that has any is refused.
    pub fn resume(self, resume: bool) -> Self {
        Self { resume, ..self }
    }

    /// Gives parameters a learning rate of their own.
    pub fn groups(self, groups: Vec<ParameterGroup>) -> Self {
        Self { groups, ..self }
    }

    /// Plots scalars that the steps report, by their names, on the dashboard.
    pub fn curves(self, curves: Vec<&'static str>) -> Self {
        Self { curves, ..self }
    }

    /// Calls an observer after every step; it is made once the first step is known.
    pub fn observe(self, observe: Observe<B, M>) -> Self {
        Self {
            observe: Some(observe),
            ..self
        }
    }

    /// Whether to print plain lines even on a terminal.
    pub fn plain(self, plain: bool) -> Self {
        Self { plain, ..self }
    }

    /// Ends the training after the step in which `stop` is requested, with a checkpoint. The keys
    /// of the dashboard request it too.
    pub fn stop(self, stop: Stop) -> Self {
        Self { stop, ..self }
    }

    /// Shares out the groups of each step, `accumulate` of them, among these workers; each must be
    /// given its own part of the batches ([`Batches::shared`](crate::data::Batches::shared)). The
    /// first one alone writes checkpoints.
    pub fn workers(self, workers: Group) -> Self {
        Self { workers, ..self }
    }
}

/// A finished training.
pub struct Fitted<B: TrainingBackend, M: AutodiffModule<B>> {
    /// The model after the last step.
    pub model: M::InnerModule,
    /// Its moving average.
    pub ema: M::InnerModule,
    /// Steps that were skipped for a non-finite loss.
    pub skipped: usize,
    /// Steps done; fewer than planned after an interrupt.
    pub steps: usize,
}

impl<B, M> Fit<B, M>
where
    B: TrainingBackend,
    M: TrainStep<Output = StepReport> + AutodiffModule<B> + core::fmt::Display + 'static,
    M::InnerModule: InferenceStep<Input = (), Output = ()>,
{
    /// Trains `model`.
    ///
    /// # Errors
    /// When training diverges, a batch can't be read, or a checkpoint or log can't be read or
    /// written.
    pub fn run(self, model: M) -> Result<Fitted<B, M>, TrainingError> {
        let Self {
            training,
            resume,
            groups,
            batches,
            curves,
            observe,
            plain,
            stop,
            workers,
        } = self;
        let optimisation = &training.optimisation;
        let divided = optimisation.shard_optimizer && workers.size() > 1;
        let shards = divided.then(|| Arc::new(Shards::new::<B, M>(workers.clone(), &model)));
        let optimizer = AdamW::new(optimisation.weight_decay, groups).sharded(shards.clone());
        let mut ema = Ema::new(&model, optimisation.ema).sharded(shards);
        let fresh = Position {
            step: 0,
            skipped: 0,
            bad: 0,
            losses: Losses::default(),
            best: None,
            moments: 0,
            fingerprint: training.fingerprint.clone(),
        };
        let store = Store::new(&training.directory);
        let (model, start) = match resume {
            true => store.restore(&training, model, &mut ema, &optimizer)?,
            false => {
                store.refuse_any()?;
                (model, None)
            }
        };
        let start = start.unwrap_or(fresh);
        let step: OnStep<B, M> = match observe {
            Some(observe) => observe(start.step)?,
            None => Box::new(|_, _: &M, _: &_| Ok(())),
        };
        let schedule = optimisation.schedule().load_record::<B>(start.step);
        let feed = batches(start.step);
        let loader: Arc<dyn DataLoader<B, _>> = feed.clone();
        let dashboard = match plain {
            true => None,
            false => dashboard(&training, start.step, &stop),
        };
        let ended = Arc::new(Mutex::new(None));
        let directory = training.directory.clone();
        let strategy = Steps {
            training,
            optimizer: optimizer.clone(),
            start,
            ema: Mutex::new(Some(ema)),
            observer: Mutex::new(step),
            store: Mutex::new(store),
            plain: dashboard.is_none(),
            stop,
            workers,
            ended: ended.clone(),
        };
        let mut learning = SupervisedTraining::new(&directory, loader, Arc::new(Nothing))
            .with_training_strategy(TrainingStrategy::Custom(Arc::new(strategy)))
            .with_application_logger(None)
            .with_metric_logger(Quiet)
            .num_epochs(1);
        for key in ["loss", "lr", "grad_norm", "images_per_second"]
            .into_iter()
            .chain(curves)
        {
            learning = learning.metric_train_numeric(Curve::new(key));
        }
        learning = match dashboard {
            Some(dashboard) => learning.renderer(dashboard),
            None => learning.renderer(Quiet),
        };
        let result = learning.launch(Learner::new(model, optimizer, schedule));
        drop(result.renderer);
        let Ended {
            ema,
            position,
            error,
        } = ended.lock().take().expect("the strategy says how it ended");
        match error.or_else(|| feed.failure().map(TrainingError::Data)) {
            Some(error) => Err(error),
            None => Ok(Fitted {
                ema: ema.apply(result.model.clone()),
                model: result.model,
                skipped: position.skipped,
                steps: position.step,
            }),
        }
    }
}

/// The dashboard, if standard output is a terminal that can show it.
#[cfg(feature = "tui")]
fn dashboard(training: &Training, first: usize, stop: &Stop) -> Option<Dashboard> {
    let dumb =
        std::env::var_os("TERM").is_none_or(|terminal| terminal.is_empty() || terminal == "dumb");
    if dumb || !std::io::stdout().is_terminal() {
        return None;
    }
    let log = training.directory.join("metrics.jsonl");
    Dashboard::start(
        &training.about,
        &training.name,
        &log,
        [first, training.optimisation.steps],
        stop,
    )
    .ok()
}

#[cfg(not(feature = "tui"))]
fn dashboard(_: &Training, _: usize, _: &Stop) -> Option<Quiet> {
    None
}

/// burn-train requires a validation split; here evaluation is a stage of its own.
struct Nothing;

impl Iterator for Nothing {
    type Item = ();

    fn next(&mut self) -> Option<()> {
        None
    }
}

impl DataLoaderIterator<()> for Nothing {
    fn progress(&self) -> Progress {
        Progress::new(0, 0)
    }
}

impl<B: Backend> DataLoader<B, ()> for Nothing {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<()> + 'a> {
        Box::new(Nothing)
    }

    fn num_items(&self) -> usize {
        0
    }

    fn to_device(&self, _: &B::Device) -> Arc<dyn DataLoader<B, ()>> {
        Arc::new(Nothing)
    }

    fn slice(&self, _: usize, _: usize) -> Arc<dyn DataLoader<B, ()>> {
        Arc::new(Nothing)
    }
}
