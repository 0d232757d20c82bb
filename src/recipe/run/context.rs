//! What stages have in common.

use std::path::Path;
use std::sync::Arc;

use burn::module::AutodiffModule;
use burn::tensor::backend::AutodiffBackend;
use burn::train::TrainStep;
use sha2::{Digest, Sha256};

use super::directory::RunDirectory;
use super::models::checkpoint;
use crate::data::{Batch, BatchPlan, BatchSource, Batches, Feed, Split, Teacher};
use crate::models::{Architecture, Network};
use crate::ops::TrainingBackend;
use crate::process::{AnyProcess, Process as _, ProcessKind};
use crate::recipe::RecipeError;
use crate::recipe::schema::{Recipe, Stage};
use crate::stop::Stop;
use crate::training::{About, Fit, Fitted, Optimisation, StepReport, Training};
use crate::weights::{Checkpoint, Provenance};
use crate::workers::{Group, Share};

/// What every stage needs.
pub(crate) struct Context<'a, B: AutodiffBackend> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) directory: &'a RunDirectory,
    pub(crate) device: &'a B::Device,
    pub(crate) resume: bool,
    pub(crate) plain: bool,
    pub(crate) stop: &'a Stop,
    pub(crate) workers: &'a Group,
}

impl<B: TrainingBackend> Context<'_, B> {
    pub(crate) fn load(
        &self,
        source: &crate::recipe::schema::source::Source,
    ) -> Result<Checkpoint, RecipeError> {
        checkpoint(self.recipe, self.directory, source)
    }

    /// The network of a checkpoint, to be trained.
    pub(crate) fn network(&self, checkpoint: &Checkpoint) -> Result<Network<B>, RecipeError> {
        let network = checkpoint.network::<B>(self.device)?;
        Ok(self.as_trained(network))
    }

    /// A network that computes as the recipe says.
    pub(crate) fn as_trained(&self, network: Network<B>) -> Network<B> {
        let network = network.computing(self.recipe.compute);
        network.recomputing(self.recipe.recompute)
    }

    /// A training on the recipe's data, under a teacher if there is one.
    pub(crate) fn over<M>(
        &self,
        training: Training,
        (source, process): (BatchSource, AnyProcess),
        teacher: Option<Teacher<B::InnerBackend>>,
    ) -> Fit<B, M>
    where
        M: TrainStep<Input = Batch<B>, Output = StepReport>,
    {
        let Optimisation {
            steps, accumulate, ..
        } = training.optimisation;
        let device = self.device.clone();
        let share = Share::worker(&**self.workers);
        let batches = move |start: usize| -> Arc<dyn Feed<B, Batch<B>>> {
            let batches = Batches::<B>::new(source, start, steps, process, &device)
                .in_parts(accumulate)
                .shared(share);
            match teacher {
                Some(teacher) => Arc::new(batches.with_teacher(teacher)),
                None => Arc::new(batches),
            }
        };
        Fit::new(training, batches)
            .resume(self.resume)
            .plain(self.plain)
            .stop(self.stop.clone())
            .workers(self.workers.clone())
    }

    pub(crate) fn source(
        &self,
        (model, process): (&Architecture, ProcessKind),
        optimisation: &Optimisation,
        label_drop: f64,
        logits: Vec<usize>,
    ) -> Result<BatchSource, RecipeError> {
        let shape = model.shape();
        let plan = BatchPlan {
            batch: optimisation.batch,
            seed: self.recipe.seed,
            channels: shape.channels,
            size: shape.side,
            classes: shape.classes,
            label_drop,
            times: process.process().times(),
            masking: process.masking(model),
            logits,
        };
        Ok(BatchSource::new(plan, self.part(Split::Train)?))
    }

    pub(crate) fn training(
        &self,
        stage: &Stage,
        optimisation: &Optimisation,
        folder: &Path,
        parents: &[Option<&Checkpoint>],
    ) -> Result<Training, RecipeError> {
        let mut hash = Sha256::new();
        hash.update(super::directory::json(stage)?);
        hash.update(self.recipe.seed.to_le_bytes());
        for parent in parents.iter().flatten() {
            hash.update(parent.fingerprint()?);
        }
        Ok(Training {
            name: stage.name.clone(),
            optimisation: optimisation.clone(),
            fingerprint: format!("{:x}", hash.finalize()),
            description: None,
            directory: folder.to_owned(),
            log: self.recipe.log.clone(),
            about: About {
                recipe: self.recipe.name.clone(),
                place: (
                    1 + (self.recipe.stages.iter())
                        .position(|other| other.name == stage.name)
                        .unwrap_or(0),
                    self.recipe.stages.len(),
                ),
                run: self.directory.path().to_owned(),
                gates: Arc::default(),
            },
        })
    }

    pub(crate) fn provenance(
        &self,
        stage: &str,
        method: &str,
        optimisation: Option<&Optimisation>,
        parent: Option<&Checkpoint>,
    ) -> Result<Provenance, RecipeError> {
        let resolved = self.recipe.to_toml();
        let resolved = resolved.map_err(|error| RecipeError::Run(error.to_string()))?;
        // What only takes layers out knows the classes its parent knew.
        let (data, class_names) = match (optimisation, parent) {
            (None, Some(parent)) => {
                let Provenance {
                    data, class_names, ..
                } = parent.provenance.clone();
                (data, class_names)
            }
            (_, parent) => {
                // Latents may say none, and the model that is trained on still has its own.
                let of_parent = parent.map(|parent| parent.provenance.class_names.clone());
                let names = self.class_names()?;
                let names = Some(names).filter(|names| !names.is_empty()).or(of_parent);
                (self.recipe.data.said(), names.unwrap_or_default())
            }
        };
        Ok(Provenance {
            data,
            class_names,
            recipe: self.recipe.name.clone(),
            recipe_sha256: format!("{:x}", Sha256::digest(resolved)),
            stage: format!("{stage} ({method})"),
            seed: self.recipe.seed,
            steps: optimisation.map_or(0, |optimisation| optimisation.steps),
            images: optimisation.map_or(0, |optimisation| optimisation.steps * optimisation.batch),
            parent: parent.map(Checkpoint::fingerprint).transpose()?,
            ..Provenance::default()
        })
    }
}

/// What a training left, unless a person stopped it before its last step.
pub(crate) fn finished<B: TrainingBackend, M: AutodiffModule<B>>(
    fitted: Fitted<B, M>,
    steps: usize,
) -> Result<Fitted<B, M>, RecipeError> {
    if fitted.skipped > 0 {
        crate::say!(
            "{} steps were skipped for a loss that was not finite",
            fitted.skipped
        );
    }
    match fitted.steps < steps {
        true => Err(RecipeError::Interrupted),
        false => Ok(fitted),
    }
}
