//! Measuring a model while it is trained.

use std::path::Path;

use burn::module::AutodiffModule;
use serde::Serialize;

use crate::npz::read_samples;
use crate::ops::TrainingBackend;
use crate::process::ProcessKind;
use crate::recipe::RecipeError;
use crate::recipe::run::context::Context;
use crate::recipe::schema::Stage;
use crate::recipe::schema::optimisation::Meanwhile;
use crate::recovery::Student;
use crate::sampling::{Draw, SAMPLES, Sampling, SamplingError, Share};
use crate::training::{JsonLines, Observe, OnStep, TrainingError};

/// One line of `quality.jsonl`.
#[derive(Serialize)]
struct Quality {
    step: usize,
    images: usize,
    samples: usize,
    fid: f64,
    inception_score: f64,
    precision: f64,
    recall: f64,
    accuracy: f64,
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
        kind: ProcessKind,
        folder: &Path,
    ) -> Result<Observe<B, Student<B>>, RecipeError> {
        let wrong = || RecipeError::Stage {
            stage: stage.name.clone(),
            problem: "no evaluation of models of pixels follows".into(),
        };
        let (evaluate, features) =
            crate::recipe::plan::following(self.recipe, stage).ok_or_else(wrong)?;
        let judge = self.judge(&self.load(features)?, evaluate.neighbours)?;
        let sampling = Sampling {
            count: meanwhile.evaluate_count.min(evaluate.sampling.count),
            ..evaluate.sampling.clone()
        };
        let (steps, batch) = (stage.kind.optimisation()).map_or((0, 0), |optimisation| {
            (optimisation.steps, optimisation.batch)
        });
        let (every, seed, name) = (
            meanwhile.evaluate_every,
            self.recipe.seed,
            stage.name.clone(),
        );
        let (device, stop, folder) = (self.device.clone(), self.stop.clone(), folder.to_owned());
        let observe = move |start: usize| -> Result<OnStep<B, Student<B>>, TrainingError> {
            let mut log = JsonLines::open(&folder.join(QUALITY), start)?;
            Ok(Box::new(move |step, model: &Student<B>, ema| {
                let done = step + 1;
                if done % every != 0 && done != steps {
                    return Ok(());
                }
                let network = ema.apply(model.valid()).network;
                let draw = Draw {
                    name: &name,
                    network: &network,
                    process: kind,
                    decoder: None,
                    sampling: &sampling,
                    seed,
                    folder: &folder.join("quality").join(format!("step-{done:06}")),
                    share: Share::WHOLE,
                    stop: &stop,
                };
                let drawn = match draw.run(&device, |_, _| {}) {
                    Ok(drawn) => drawn,
                    // The training ends after this step, and goes on with it.
                    Err(SamplingError::Interrupted) => return Ok(()),
                    Err(error) => return Err(TrainingError::Observed(Box::new(error))),
                };
                let archive = draw.folder.join(SAMPLES);
                let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
                    TrainingError::Observed(error)
                };
                let samples = read_samples(&archive).map_err(|error| failed(error.into()))?;
                let verdict = judge.verdict(&name, &samples.images, &drawn.labels);
                let verdict = verdict.map_err(|error| failed(error.into()))?;
                // The picture of the first of them stays.
                std::fs::remove_file(&archive).map_err(TrainingError::io(&archive))?;
                log.write(&Quality {
                    step,
                    images: done * batch,
                    samples: sampling.count,
                    fid: verdict.fid,
                    inception_score: verdict.inception_score,
                    precision: verdict.precision,
                    recall: verdict.recall,
                    accuracy: verdict.accuracy,
                })
            }))
        };
        Ok(Box::new(observe))
    }
}
