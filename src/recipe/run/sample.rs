//! The stage that draws samples, and the drawing that evaluations do.

use std::path::{Path, PathBuf};

use super::context::Context;
use crate::ops::TrainingBackend;
use crate::recipe::RecipeError;
use crate::recipe::schema::sample::Sample;
use crate::recipe::schema::source::Source;
use crate::report::{thousands, watch};
use crate::sampling::{
    Decoder, Draw, Drawn, PICTURE_FILE, Place, Sampling, SamplingError, Share, claim, settings,
};
use crate::weights::Checkpoint;
use crate::workers::agree;

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
        let (model, sampling) = ((&sample.from, sample.vae.as_deref()), &sample.sampling);
        if !self.workers.leads() {
            return self.drawn(stage, model, sampling, folder).map(|_| ());
        }
        let drawn = self.draw((stage, stage), model, sampling, folder)?;
        crate::say!(
            "{stage}: {} samples in {}, the first of them to look at in {}",
            thousands(sample.sampling.count),
            drawn.archive.display(),
            drawn.archive.with_file_name(PICTURE_FILE).display()
        );
        Ok(())
    }

    /// Draws samples for a stage of a model, called `name` in messages, through an autoencoder if
    /// it draws latents; or goes on with those in the folder. For the first worker, while the
    /// others call [`drawn`](Self::drawn).
    pub(super) fn draw(
        &self,
        (stage, name): (&str, &str),
        model: (&Source, Option<&Path>),
        sampling: &Sampling,
        folder: &Path,
    ) -> Result<Sampled, RecipeError> {
        let (checkpoint, drawn, vae_sha256) = self.drawn(name, model, sampling, folder)?;
        // The whole share leaves an archive, unless another process works in this folder.
        let archive = drawn.archive.ok_or_else(|| RecipeError::Stage {
            stage: stage.to_owned(),
            problem: "its samples are not all drawn".into(),
        })?;
        Ok(Sampled {
            checkpoint,
            labels: drawn.labels,
            archive,
            vae_sha256,
        })
    }

    /// Draws with the other workers. Returns the model, what this one has of the samples, and the
    /// SHA-256 of the autoencoder.
    pub(super) fn drawn(
        &self,
        name: &str,
        (source, vae): (&Source, Option<&Path>),
        sampling: &Sampling,
        folder: &Path,
    ) -> Result<(Checkpoint, Drawn, Option<String>), RecipeError> {
        let checkpoint = self.load(source)?;
        let network = checkpoint.network::<B::InnerBackend>(self.device)?;
        let (channels, compute) = (
            checkpoint.architecture.shape().channels,
            self.recipe.compute,
        );
        let read = |path| Decoder::<B::InnerBackend>::read(path, channels, compute, self.device);
        let decoder = vae.map(read).transpose()?;
        let vae_sha256 = decoder.as_ref().map(|decoder| decoder.sha256().to_owned());
        let how = (vae_sha256.as_deref(), sampling);
        let with = (self.recipe.seed, compute);
        let settings = settings::<B::InnerBackend>(&checkpoint, how, with, self.device)?;
        agree(
            &**self.workers,
            "what they draw",
            settings.to_string().as_bytes(),
        )
        .map_err(SamplingError::Workers)?;
        if self.workers.leads() {
            // What a resumed run finds there may be of a file that has changed since.
            claim(folder, &settings, Place::Run)?;
        }
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
        Ok((checkpoint, drawn, vae_sha256))
    }
}
