//! Measuring a model while it is trained.

use std::path::Path;

use burn::module::AutodiffModule;
use serde::Serialize;

use super::adm::ReferenceFiles;
use crate::evaluation::{AdmJudge, ClassifierJudge, Scores};
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
use crate::workers::alone;

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
}

/// How the evaluation that follows measures a model.
struct Measuring<B: FusedOps> {
    judge: Judge<B>,
    /// That of the samples, if they are latents.
    decoder: Option<Decoder<B>>,
}

impl<B: FusedOps> Judge<B> {
    /// The scores of an archive of samples of these classes, and the share that is read as their
    /// class.
    fn scores(
        &self,
        name: &str,
        archive: &Path,
        labels: &[usize],
    ) -> Result<(Scores, Option<f64>), RecipeError> {
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
                Ok((scores, Some(verdict.accuracy)))
            }
            Self::Reference(judge) => {
                let verdict = judge.verdict(name, SampleReader::open(archive)?, |_, _| {})?;
                Ok((verdict.scores, None))
            }
        }
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
        if !self.workers.leads() {
            // Of averages that are divided, the first worker has these from the others.
            return Ok(Box::new(move |_| {
                Ok(Box::new(move |step, model: &Student<B>, ema| {
                    if due(step) {
                        ema.apply(model.valid());
                    }
                    Ok(())
                }))
            }));
        }
        let quality = folder.join("quality");
        let Measuring { judge, decoder } = self.measuring_as(evaluate, model, &quality)?;
        let sampling = Sampling {
            count: meanwhile.evaluate_count.min(evaluate.sampling.count),
            ..evaluate.sampling.clone()
        };
        let (seed, name) = (self.recipe.seed, stage.name.clone());
        let (device, stop, folder) = (self.device.clone(), self.stop.clone(), folder.to_owned());
        let observe = move |start: usize| -> Result<OnStep<B, Student<B>>, TrainingError> {
            let path = folder.join(QUALITY);
            let mut log = JsonLines::open(&path, start)?;
            let mut last = log.last_step()?;
            Ok(Box::new(move |step, model: &Student<B>, ema| {
                if !due(step) {
                    return Ok(());
                }
                let done = step + 1;
                let network = ema.apply(model.valid()).network;
                if last == Some(step) {
                    return Ok(());
                }
                let draw = Draw {
                    name: &name,
                    network: &network,
                    process: kind,
                    decoder: decoder.as_ref(),
                    sampling: &sampling,
                    seed,
                    folder: &quality.join(format!("step-{done:06}")),
                    share: Share::WHOLE,
                    // The first worker measures, and the others wait.
                    workers: &alone(),
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
                    Err(SamplingError::Interrupted) => return Ok(()),
                    Err(error) => return unmeasured(&error),
                };
                let archive = draw.folder.join(SAMPLES);
                let (scores, accuracy) = match judge.scores(&name, &archive, &drawn.labels) {
                    Ok(scores) => scores,
                    Err(RecipeError::Interrupted) => {
                        return std::fs::remove_file(&archive).map_err(TrainingError::io(&archive));
                    }
                    Err(error) => return unmeasured(&error),
                };
                // The picture of the first of them stays.
                std::fs::remove_file(&archive).map_err(TrainingError::io(&archive))?;
                last = Some(step);
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
    /// written into the folder `quality`.
    fn measuring_as(
        &self,
        evaluate: &Evaluate,
        model: &Architecture,
        quality: &Path,
    ) -> Result<Measuring<B::InnerBackend>, RecipeError> {
        let (against, neighbours) = (&evaluate.against, evaluate.neighbours);
        if let Against::HeldOut { features } = against {
            let judge = self.judge(&self.load(features)?, neighbours)?;
            return Ok(Measuring {
                judge: Judge::HeldOut(Box::new(judge)),
                decoder: None,
            });
        }
        let held_out = self.held_out_reference(against, quality)?;
        // The first worker measures, and the others wait.
        let alone = alone();
        let files = ReferenceFiles::of(against, held_out.as_deref(), &alone, self.stop);
        let files = files.unwrap_or_else(|| unreachable!("there is a reference"));
        let judge = self.adm_judge(&files, neighbours)?;
        let (channels, compute) = (model.shape().channels, self.recipe.compute);
        let read = |path| Decoder::read(path, channels, compute, self.device);
        let decoder = files.vae.map(read).transpose()?;
        Ok(Measuring {
            judge: Judge::Reference(Box::new(judge)),
            decoder,
        })
    }
}
