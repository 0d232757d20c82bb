//! The stage that draws samples, and the drawing that evaluations do.

use std::path::{Path, PathBuf};

use super::context::Context;
use crate::ops::TrainingBackend;
use crate::recipe::RecipeError;
use crate::recipe::schema::sample::Sample;
use crate::recipe::schema::source::Source;
use crate::report::{thousands, watch};
use crate::sampling::{Decoder, Draw, PICTURE_FILE, Sampling, Share};
use crate::weights::Checkpoint;

/// Samples of a model.
pub(super) struct Sampled {
    /// The model.
    pub(super) checkpoint: Checkpoint,
    /// The class of each sample.
    pub(super) labels: Vec<usize>,
    /// Their archive.
    pub(super) archive: PathBuf,
    /// SHA-256 of the autoencoder that decoded them.
    pub(super) vae_sha256: Option<String>,
}

impl<B: TrainingBackend> Context<'_, B> {
    pub(crate) fn sample(
        &self,
        stage: &str,
        sample: &Sample,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let vae = sample.vae.as_deref();
        let drawn = self.draw(
            (stage, stage),
            (&sample.from, vae),
            &sample.sampling,
            folder,
        )?;
        let Some(drawn) = drawn else { return Ok(()) };
        crate::say!(
            "{stage}: {} samples in {}, the first of them to look at in {}",
            thousands(sample.sampling.count),
            drawn.archive.display(),
            drawn.archive.with_file_name(PICTURE_FILE).display()
        );
        Ok(())
    }

    /// Draws samples for a stage of a model, called `name` in messages, through an autoencoder if
    /// it draws latents; or goes on with those in the folder. All workers draw; the first one has
    /// the samples.
    pub(super) fn draw(
        &self,
        (stage, name): (&str, &str),
        (source, vae): (&Source, Option<&Path>),
        sampling: &Sampling,
        folder: &Path,
    ) -> Result<Option<Sampled>, RecipeError> {
        let checkpoint = self.load(source)?;
        let network = checkpoint.network::<B::InnerBackend>(self.device)?;
        let (channels, compute) = (
            checkpoint.architecture.shape().channels,
            self.recipe.compute,
        );
        let read = |path| Decoder::<B::InnerBackend>::read(path, channels, compute, self.device);
        let decoder = vae.map(read).transpose()?;
        let drawn = Draw {
            name,
            network: &network.computing(compute),
            process: checkpoint.trained_by(),
            decoder: decoder.as_ref(),
            sampling,
            seed: self.recipe.seed,
            folder,
            share: Share::WHOLE,
            workers: self.workers,
            stop: self.stop,
        }
        .run(self.device, watch(name, "steps"))?;
        if !self.workers.leads() {
            return Ok(None);
        }
        // The whole share leaves an archive, unless another process works in this folder.
        let archive = drawn.archive.ok_or_else(|| RecipeError::Stage {
            stage: stage.to_owned(),
            problem: "its samples are not all drawn".into(),
        })?;
        Ok(Some(Sampled {
            checkpoint,
            labels: drawn.labels,
            archive,
            vae_sha256: decoder.map(|decoder| decoder.sha256().to_owned()),
        }))
    }
}
