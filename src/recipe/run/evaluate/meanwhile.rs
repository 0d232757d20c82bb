//! Measuring a model while it is trained.

use std::path::{Path, PathBuf};

use burn::module::AutodiffModule;
use serde::Serialize;

use super::adm::ReferenceFiles;
use crate::evaluation::{AdmJudge, Assistant, ClassifierJudge, Scores};
use crate::models::Architecture;
use crate::npz::{SampleReader, read_samples};
use crate::ops::{FusedOps, TrainingBackend};
use crate::process::ProcessKind;
use crate::recipe::RecipeError;
use crate::recipe::run::context::Context;
use crate::recipe::schema::Stage;
use crate::recipe::schema::optimisation::Meanwhile;
use crate::recipe::schema::sample::{Against, Evaluate};
use crate::recovery::Student;
use crate::sampling::{Decoder, Draw, SAMPLES, Sampling, SamplingError, Share};
use crate::training::{JsonLines, Observe, OnStep, TrainingError};
use crate::workers::{Workers, values_of};

/// One line of `quality.jsonl`.
#[derive(Serialize)]
struct Quality {
    step: usize,
    images: usize,
    samples: usize,
    #[serde(flatten)]
    scores: Scores,
    /// Share of the samples that a classifier reads as their class.
    #[serde(skip_serializing_if = "Option::is_none")]
    accuracy: Option<f64>,
}

/// What measures the samples.
enum Judge<B: FusedOps> {
    HeldOut(Box<ClassifierJudge<B>>),
    Reference(Box<AdmJudge<B>>),
    /// That of a worker that is not the first: it assists, where there is something to be read.
    Other(Option<Box<Assistant<B>>>),
}

/// How the evaluation that follows measures a model.
struct Measuring<B: FusedOps> {
    judge: Judge<B>,
    /// That of the samples, if they are latents.
    decoder: Option<Decoder<B>>,
}

/// Scores, and the share of the samples that is read as their class.
type Scored = (Scores, Option<f64>);

impl<B: FusedOps> Judge<B> {
    /// The scores of an archive of samples of these classes, on the first worker alone.
    fn scores(
        &self,
        name: &str,
        archive: &Path,
        labels: &[usize],
    ) -> Result<Option<Scored>, RecipeError> {
        match self {
            Self::HeldOut(judge) => {
                let samples = read_samples(archive)?;
                let verdict = judge.verdict(name, &samples.images, labels)?;
                let scores = Scores {
                    fid: verdict.fid,
                    sfid: None,
                    inception_score: verdict.inception_score,
                    precision: Some(verdict.precision),
                    recall: Some(verdict.recall),
                };
                Ok(Some((scores, Some(verdict.accuracy))))
            }
            Self::Reference(judge) => {
                let pictures = SampleReader::open(archive).map_err(RecipeError::from);
                let verdict =
                    pictures.and_then(|pictures| Ok(judge.verdict(name, pictures, |_, _| {})?));
                judge.pause();
                Ok(Some((verdict?.scores, None)))
            }
            Self::Other(assistant) => {
                if let Some(assistant) = assistant {
                    assistant.assist()?;
                }
                Ok(None)
            }
        }
    }
}

/// How a measuring went, as the first worker tells the others.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It is done, or can't be.
    Over,
    Interrupted,
}

/// That of the first worker; the others know nothing of it.
fn agreed(workers: &dyn Workers, outcome: Outcome) -> Outcome {
    let interrupted = u8::from(outcome == Outcome::Interrupted);
    match workers.broadcast(vec![interrupted])[..] {
        [1] => Outcome::Interrupted,
        _ => Outcome::Over,
    }
}

/// File of the scores by step, in the stage's folder.
pub(crate) const QUALITY: &str = "quality.jsonl";

impl<B: TrainingBackend> Context<'_, B> {
    /// Draws samples of a training's moving average every so many steps, and measures them as the
    /// recipe's next evaluation measures models.
    pub(in crate::recipe::run) fn measured_meanwhile(
        &self,
        stage: &Stage,
        meanwhile: &Meanwhile,
        (model, kind): (&Architecture, ProcessKind),
        folder: &Path,
    ) -> Result<Observe<B, Student<B>>, RecipeError> {
        let evaluate = crate::recipe::plan::following(self.recipe, stage);
        let evaluate = evaluate.ok_or_else(|| RecipeError::Stage {
            stage: stage.name.clone(),
            problem: "no evaluation follows".into(),
        })?;
        let (steps, batch) = (stage.kind.optimisation()).map_or((0, 0), |optimisation| {
            (optimisation.steps, optimisation.batch)
        });
        let every = meanwhile.evaluate_every;
        let due = move |step: usize| (step + 1).is_multiple_of(every) || step + 1 == steps;
        let quality = folder.join("quality");
        let Measuring { judge, decoder } = self.measuring_as(evaluate, model, &quality)?;
        let sampling = Sampling {
            count: meanwhile.evaluate_count.min(evaluate.sampling.count),
            ..evaluate.sampling.clone()
        };
        let (seed, name) = (self.recipe.seed, stage.name.clone());
        let (device, stop, folder) = (self.device.clone(), self.stop.clone(), folder.to_owned());
        let workers = self.workers.clone();
        let observe = move |start: usize| -> Result<OnStep<B, Student<B>>, TrainingError> {
            // The first worker's log says what was measured before.
            let path = folder.join(QUALITY);
            let mut log = match workers.leads() {
                true => Some(JsonLines::open(&path, start)?),
                false => None,
            };
            let last = log
                .as_mut()
                .map(|log| log.last_step())
                .transpose()?
                .flatten();
            let last: Vec<u64> = last.into_iter().map(|step| step as u64).collect();
            let last = workers.broadcast(bytemuck::cast_slice(&last).to_vec());
            let mut last = values_of::<u64>(&last).first().map(|step| *step as usize);
            Ok(Box::new(move |step, model: &Student<B>, ema| {
                if !due(step) || last == Some(step) {
                    return Ok(());
                }
                let done = step + 1;
                let network = ema.apply(model.valid()).network;
                let draw = Draw {
                    name: &name,
                    network: &network,
                    process: kind,
                    decoder: decoder.as_ref(),
                    sampling: &sampling,
                    seed,
                    folder: &quality.join(format!("step-{done:06}")),
                    share: Share::WHOLE,
                    workers: &workers,
                    stop: &stop,
                };
                // A training that can't be measured is a training still.
                let unmeasured = |error: &dyn std::error::Error| {
                    crate::say!("{name}: step {done} was not measured: {error}");
                    Ok(())
                };
                let drawn = match draw.run(&device, |_, _| {}) {
                    Ok(drawn) => drawn,
                    // The training stops after this step. When it goes on, it begins with what is
                    // missing here, unless this step was its last.
                    Err(SamplingError::Interrupted) => return Err(TrainingError::Interrupted),
                    Err(error) => return unmeasured(&error),
                };
                let archive = draw.folder.join(SAMPLES);
                let scored = judge.scores(&name, &archive, &drawn.labels);
                let outcome = match scored {
                    Err(RecipeError::Interrupted) => Outcome::Interrupted,
                    _ => Outcome::Over,
                };
                let outcome = agreed(&*workers, outcome);
                last = Some(step);
                let Some(log) = &mut log else {
                    return match outcome {
                        Outcome::Over => Ok(()),
                        Outcome::Interrupted => Err(TrainingError::Interrupted),
                    };
                };
                // The picture of the first of them stays.
                let remove = || std::fs::remove_file(&archive).map_err(TrainingError::io(&archive));
                let (scores, accuracy) = match scored {
                    Ok(Some(scored)) => scored,
                    Ok(None) => return Ok(()),
                    Err(RecipeError::Interrupted) => {
                        remove()?;
                        return Err(TrainingError::Interrupted);
                    }
                    Err(error) => return unmeasured(&error),
                };
                remove()?;
                log.write(&Quality {
                    step,
                    images: done * batch,
                    samples: sampling.count,
                    scores,
                    accuracy,
                })
            }))
        };
        Ok(Box::new(observe))
    }

    /// How an evaluation would measure a model; held-out pictures that Inception is to see are
    /// written into the folder `quality`. All workers call it.
    fn measuring_as(
        &self,
        evaluate: &Evaluate,
        model: &Architecture,
        quality: &Path,
    ) -> Result<Measuring<B::InnerBackend>, RecipeError> {
        let (against, neighbours) = (&evaluate.against, evaluate.neighbours);
        let (workers, leads) = (self.workers, self.workers.leads());
        let (vae, inception) = match against {
            Against::HeldOut { features } => {
                let judge = match leads {
                    true => {
                        let judge = self.judge(&self.load(features)?, neighbours)?;
                        Judge::HeldOut(Box::new(judge))
                    }
                    false => Judge::Other(None),
                };
                let decoder = None;
                return Ok(Measuring { judge, decoder });
            }
            Against::Reference { vae, inception, .. } => (vae, inception),
        };
        let judge = match leads {
            true => {
                let held_out = self.held_out_reference(against, quality)?;
                let files = ReferenceFiles::of(against, held_out.as_deref(), workers, self.stop);
                let files = files.unwrap_or_else(|| unreachable!("there is a reference"));
                let judge = self.adm_judge(&files, neighbours)?;
                judge.pause();
                Judge::Reference(Box::new(judge))
            }
            false => {
                let assistant = Assistant::new(inception, workers, self.device)?;
                assistant.assist()?;
                Judge::Other(Some(Box::new(assistant)))
            }
        };
        let (channels, compute) = (model.shape().channels, self.recipe.compute);
        let read = |path: &PathBuf| Decoder::read(path, channels, compute, self.device);
        let decoder = vae.as_ref().map(read).transpose()?;
        Ok(Measuring { judge, decoder })
    }
}
