//! The training loop.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use crate::ops::TrainingBackend;
use burn::data::dataloader::{DataLoaderIterator, Progress};
use burn::module::AutodiffModule;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::train::{
    EventProcessorTraining, InferenceStep, Learner, LearnerEvent, LearningComponentsMarker,
    SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader, TrainStep,
    TrainingComponents, TrainingItem, ValidLoader,
};

use super::checkpoint::{CHECKPOINTS, Position, Store};
use super::ema::{Ema, warmed_up};
use super::fit::OnStep;
use super::metrics::{JsonLines, StepReport};
use super::optimizer::AdamW;
use super::panics::panicked;
use super::renderer::Lines;
use super::schedule::Schedule;
use super::together::{Gathered, same_weights, share};
use super::trackers::Trackers;
use super::{Training, TrainingError};
use crate::stop::Stop;
use crate::workers::{Group, Share, Tree, devices, fits};

/// Result of the loop; shared with [`fit`](super::fit).
pub(super) struct Ended<B: TrainingBackend> {
    pub(super) ema: Ema<B::InnerBackend>,
    pub(super) position: Position,
    pub(super) error: Option<TrainingError>,
}

/// Runs steps until the budget is spent, a stop is requested, or losses stay non-finite.
pub(super) struct Steps<B: TrainingBackend, M> {
    pub(super) training: Training,
    pub(super) optimizer: AdamW<B>,
    pub(super) start: Position,
    pub(super) ema: Mutex<Option<Ema<B::InnerBackend>>>,
    pub(super) observer: Mutex<OnStep<B, M>>,
    pub(super) store: Mutex<Store>,
    pub(super) plain: bool,
    pub(super) stop: Stop,
    pub(super) workers: Group,
    pub(super) ended: Arc<Mutex<Option<Ended<B>>>>,
}

type Components<B, M> = LearningComponentsMarker<B, Schedule, M, AdamW<B>>;

impl<B, M> SupervisedLearningStrategy<Components<B, M>> for Steps<B, M>
where
    B: TrainingBackend,
    M: TrainStep<Output = StepReport> + AutodiffModule<B> + core::fmt::Display + 'static,
    M::InnerModule: InferenceStep,
{
    fn fit(
        &self,
        components: TrainingComponents<Components<B, M>>,
        mut learner: Learner<Components<B, M>>,
        train: TrainLoader<Components<B, M>>,
        _: ValidLoader<Components<B, M>>,
        _: usize,
    ) -> (M, SupervisedTrainingEventProcessor<Components<B, M>>) {
        let mut processor = components.event_processor;
        let mut position = self.start.clone();
        let mut ema = self.ema.lock().take().expect("a strategy is run once");
        let stop = || self.stop.requested() || components.interrupter.should_stop();
        let run = self.run(
            &mut learner,
            &mut ema,
            &mut position,
            &train,
            &mut processor,
            &stop,
        );
        let written = self.store.lock().finish();
        let error = run.and(written).err();
        processor.process_train(LearnerEvent::EndEpoch(1));
        *self.ended.lock() = Some(Ended {
            ema,
            position,
            error,
        });
        (learner.model(), processor)
    }
}

impl<B, M> Steps<B, M>
where
    B: TrainingBackend,
    M: TrainStep<Output = StepReport> + AutodiffModule<B> + core::fmt::Display + 'static,
    M::InnerModule: InferenceStep,
{
    fn run(
        &self,
        learner: &mut Learner<Components<B, M>>,
        ema: &mut Ema<B::InnerBackend>,
        position: &mut Position,
        train: &TrainLoader<Components<B, M>>,
        processor: &mut SupervisedTrainingEventProcessor<Components<B, M>>,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), TrainingError> {
        let training = &self.training;
        let optimisation = &training.optimisation;
        let workers = &*self.workers;
        fits(workers.size(), optimisation.accumulate).map_err(TrainingError::Workers)?;
        same_weights::<B, M>(workers, &learner.model(), position.step)?;
        let device = learner.model().devices().pop().unwrap_or_default();
        let devices = devices::<B::InnerBackend>(&self.workers, &device);
        let devices = devices.map_err(TrainingError::Workers)?;
        let path = training.directory.join("metrics.jsonl");
        let mut log = JsonLines::open(&path, position.step)?;
        let mut trackers = Trackers::open(&training.directory, &training.log, &path)?;
        let mut lines = Lines::new(&training.name, position.step, optimisation.steps);
        let mut observer = self.observer.lock();
        let mut store = self.store.lock();
        if position.step > 0 {
            // Whoever interrupted the last step interrupted what was observed after it.
            if observed(observer(position.step - 1, &learner.model(), ema))? {
                return Ok(());
            }
        }
        let mut batches = train.iter();
        let mut since = Instant::now();
        let mut logged = position.step;
        while position.step < optimisation.steps {
            workers.at(format!("{}, step {}", training.name, position.step + 1));
            let groups = Share::worker(workers).range(optimisation.accumulate).len();
            let Some((reports, gradients)) = gather(learner, &mut *batches, groups)? else {
                // The data can't be read further; what was trained so far is kept.
                if workers.size() == 1 && position.step > self.start.step {
                    let model = learner.model();
                    store.save(workers, position, &model, ema, &self.optimizer, training)?;
                }
                break;
            };
            let model = learner.model();
            let Gathered {
                mut report,
                gradients,
                stopping: agreed,
            } = share::<B, M>(
                (workers, devices.as_deref()),
                &model,
                reports,
                gradients,
                stop(),
            )?;
            drop(model);
            if gradients.is_empty() {
                return Err(TrainingError::Frozen);
            }
            learner.lr_step();
            let loss = report.scalars.get("loss").unwrap_or(f64::NAN);
            let norm = self.optimizer.clip_next(
                &learner.model(),
                &gradients,
                optimisation.accumulate,
                optimisation.clip,
            );
            if loss.is_finite() && norm.is_finite() {
                learner.optimizer_step(gradients);
                position.losses.add(loss);
                position.bad = 0;
            } else {
                position.skipped += 1;
                position.bad += 1;
            }
            // As the reference does, after a skipped step too.
            let decay = match optimisation.ema_warmup {
                true => warmed_up(optimisation.ema, position.step),
                false => optimisation.ema,
            };
            ema.update_by(&learner.model(), decay);
            position.step += 1;
            let images = position.step * optimisation.batch;
            let done = position.step == optimisation.steps;
            let log_now =
                position.step.is_multiple_of(optimisation.log_every) || done || position.step == 1;
            report
                .scalars
                .0
                .extend([("lr", learner.lr_current()), ("grad_norm", norm)]);
            if log_now {
                let seconds = since.elapsed().as_secs_f64();
                let rate =
                    ((position.step - logged) * optimisation.batch) as f64 / seconds.max(1e-9);
                report.scalars.0.push(("images_per_second", rate));
                (since, logged) = (Instant::now(), position.step);
                let mut record = serde_json::Map::from_iter([
                    ("step".to_owned(), (position.step - 1).into()),
                    ("images".to_owned(), images.into()),
                    ("skipped".to_owned(), position.skipped.into()),
                    ("time".to_owned(), unix_time().into()),
                ]);
                record.extend(
                    report
                        .scalars
                        .0
                        .iter()
                        .map(|(name, value)| ((*name).to_owned(), (*value).into())),
                );
                log.write(&record)?;
                trackers.write(&record)?;
                if self.plain && lines.due(position.step) {
                    crate::say!("{}", lines.line(position.step, &report.scalars));
                }
            }
            let begun = Instant::now();
            let interrupted = observed(observer(position.step - 1, &learner.model(), ema))?;
            // What it took is no part of the training's speed.
            since += begun.elapsed();
            let progress = Progress::new(position.step, optimisation.steps);
            let item = TrainingItem::new(
                report,
                progress,
                Progress::new(1, 1),
                Some(position.step),
                Some(learner.lr_current()),
            );
            processor.process_train(LearnerEvent::ProcessedItem(item));
            if position.bad >= optimisation.max_bad_steps {
                return Err(TrainingError::Diverged {
                    count: position.bad,
                    step: position.step - 1,
                    directory: training.directory.join(CHECKPOINTS),
                });
            }
            // Several stop together, at what they agreed on in this step.
            let asked = match workers.size() {
                1 => stop(),
                _ => agreed,
            };
            let stopping = asked || interrupted;
            store.look()?;
            let saves = stopping || position.step.is_multiple_of(optimisation.checkpoint_every);
            if saves {
                same_weights::<B, M>(workers, &learner.model(), position.step)?;
            }
            if !done && saves {
                // Spans of equal length are compared, wherever a training was interrupted.
                if position.step.is_multiple_of(optimisation.checkpoint_every) {
                    let mean = std::mem::take(&mut position.losses).mean();
                    if let Some(mean) = mean
                        && position.best.is_none_or(|(_, best)| mean < best)
                    {
                        position.best = Some((position.step, mean));
                    }
                }
                let model = learner.model();
                store.save(workers, position, &model, ema, &self.optimizer, training)?;
            }
            if stopping {
                break;
            }
        }
        Ok(())
    }
}

/// Whether what is done after a step was interrupted.
fn observed(result: Result<(), TrainingError>) -> Result<bool, TrainingError> {
    match result {
        Ok(()) => Ok(false),
        Err(TrainingError::Interrupted) => Ok(true),
        Err(error) => Err(error),
    }
}

/// The reports of this worker's batches of one step, and the sum of their gradients; None at the
/// end of the data.
fn gather<B, M>(
    learner: &Learner<Components<B, M>>,
    batches: &mut dyn DataLoaderIterator<M::Input>,
    groups: usize,
) -> Result<Option<(Vec<StepReport>, GradientsParams)>, TrainingError>
where
    B: TrainingBackend,
    M: TrainStep<Output = StepReport> + AutodiffModule<B> + core::fmt::Display + 'static,
    M::InnerModule: InferenceStep,
{
    let model = learner.model();
    let mut tree = Tree::new(|earlier, later| {
        let mut sum = GradientsAccumulator::new();
        sum.accumulate::<B>(&model, earlier);
        sum.accumulate::<B>(&model, later);
        sum.grads()
    });
    let mut reports = Vec::with_capacity(groups);
    for _ in 0..groups {
        let Some(batch) = batches.next() else {
            return match panicked() {
                true => Err(TrainingError::Device),
                false => Ok(None),
            };
        };
        let output = learner.train_step(batch);
        if panicked() {
            return Err(TrainingError::Device);
        }
        reports.push(output.item);
        tree.push(output.grads);
    }
    Ok(tree.finish().map(|gradients| (reports, gradients)))
}

/// Seconds since 1970, to the millisecond, for matching lines with the logs of other programs.
pub(super) fn unix_time() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_millis() as f64 / 1000.0
}
