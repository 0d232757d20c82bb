//! The stage that measures samples.

mod adm;
mod held_out;
mod meanwhile;

use std::path::{Path, PathBuf};

#[cfg(feature = "cli")]
pub(crate) use adm::archives;

use self::adm::ReferenceFiles;
pub(crate) use self::meanwhile::QUALITY;
use super::context::Context;
use crate::data::Split;
use crate::evaluation::{Assistant, Pictured, Speed};
use crate::npz::write_samples;
use crate::ops::TrainingBackend;
use crate::recipe::RecipeError;
use crate::recipe::schema::sample::{Against, Evaluate};
use crate::sampling::{Sampling, speeds};
use crate::weights::Checkpoint;

impl<B: TrainingBackend> Context<'_, B> {
    pub(crate) fn evaluate(
        &self,
        stage: &str,
        evaluate: &Evaluate,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        if !self.workers.leads() {
            return self.assist(evaluate, folder);
        }
        if let Against::HeldOut { features } = &evaluate.against {
            return self.evaluate_held_out(stage, evaluate, features, folder);
        }
        let held_out = self.held_out_reference(&evaluate.against, folder)?;
        match ReferenceFiles::of(
            &evaluate.against,
            held_out.as_deref(),
            self.workers,
            self.stop,
        ) {
            Some(files) => self.evaluate_adm(stage, evaluate, &files, folder),
            None => unreachable!("there is a reference"),
        }
    }

    /// What the others do of the first worker's evaluation: they draw samples, and read pictures.
    fn assist(&self, evaluate: &Evaluate, folder: &Path) -> Result<(), RecipeError> {
        let (vae, inception) = match &evaluate.against {
            Against::HeldOut { .. } => (None, None),
            Against::Reference { vae, inception, .. } => (vae.as_deref(), Some(inception)),
        };
        for source in &evaluate.compare {
            let (name, sampling) = (source.to_string(), &evaluate.sampling);
            self.drawn(&name, (source, vae), sampling, folder)?;
        }
        if let Some(inception) = inception {
            Assistant::<B::InnerBackend>::new(inception, self.workers, self.device)?.assist()?;
        }
        Ok(())
    }

    /// The sampling speed of each model.
    fn speeds(
        &self,
        models: &[Checkpoint],
        sampling: &Sampling,
    ) -> Result<Vec<Option<Speed>>, RecipeError> {
        let compute = self.recipe.compute;
        let rates = speeds::<B::InnerBackend>(models, sampling, compute, self.stop, self.device)?;
        Ok(rates.iter().map(|rates| Speed::of(rates)).collect())
    }

    /// The held-out pictures as an archive in a folder, where they are the reference.
    fn held_out_reference(
        &self,
        against: &Against,
        folder: &Path,
    ) -> Result<Option<PathBuf>, RecipeError> {
        match against {
            Against::Reference {
                reference: None, ..
            } => self.held_out_archive(folder).map(Some),
            Against::Reference { .. } | Against::HeldOut { .. } => Ok(None),
        }
    }

    fn held_out_archive(&self, folder: &Path) -> Result<PathBuf, RecipeError> {
        std::fs::create_dir_all(folder).map_err(RecipeError::io(folder))?;
        let path = folder.join("held-out.npz");
        if path.exists() {
            return Ok(path);
        }
        let test = self.part(Split::Test)?;
        let shape = self.shape()?.sizes();
        let all: Vec<usize> = (0..test.len()).collect();
        let Pictured { images, labels } = Pictured::read(&*test, &all, shape)?;
        let labels: Vec<i64> = labels.into_iter().map(|label| label as i64).collect();
        write_samples(&path, &images, Some(&labels))?;
        Ok(path)
    }
}

/// The folder of the samples of the model at `index`: its number and the last part of its name,
/// without what file systems dislike.
fn model_folder(index: usize, name: &str) -> String {
    let last = name.rsplit(['/', '\\']).next().unwrap_or(name);
    format!("{}-{}", index + 1, last.replace(':', "-"))
}
