//! Latents to pictures.

use std::path::Path;

use burn::tensor::{Tensor, backend::Backend};

use super::SamplingError;
use crate::backend::Compute;
use crate::images::{Images, truncated};
use crate::models::vae::{Vae, VaeConfig};
use crate::ops::FusedOps;
use crate::weights::{Digested, read_vae};

/// Latents decoded at once: at 256 x 256, each takes some hundred MiB of activations.
const DECODED_AT_ONCE: usize = 4;

/// Decodes latents to images.
pub struct Decoder<B: Backend> {
    vae: Digested<Vae<B>>,
    config: VaeConfig,
}

impl<B: FusedOps> Decoder<B> {
    /// Reads an autoencoder for a model's samples, latents with this many channels; its products
    /// are of type `compute`.
    ///
    /// # Errors
    /// As [`read_vae`]; when its latents have another number of channels.
    pub fn read(
        path: &Path,
        channels: usize,
        compute: Compute,
        device: &B::Device,
    ) -> Result<Self, SamplingError> {
        let (mut vae, config) = read_vae::<B>(path, device)?;
        vae.network = vae.network.computing(compute);
        if config.latent_channels != channels {
            let problem = format!(
                "its latents have {} channels, and the model draws {channels}",
                config.latent_channels
            );
            return Err(SamplingError::place(path, problem));
        }
        Ok(Self { vae, config })
    }

    /// SHA-256 of its weight file.
    pub fn sha256(&self) -> &str {
        &self.vae.sha256
    }

    /// Decodes samples of the model to pictures.
    ///
    /// # Errors
    /// The first sample whose picture is not of finite numbers.
    pub fn decode(&self, latents: Tensor<B, 4>) -> Result<Images, usize> {
        let latents = latents / self.config.scaling_factor;
        let pictures = self.vae.network.decode_in_slices(latents, DECODED_AT_ONCE);
        let [_, channels, height, width] = pictures.dims();
        let values = pictures.to_data();
        let broken = values.iter::<f32>().position(|value| !value.is_finite());
        match broken {
            Some(at) => Err(at / (channels * height * width)),
            None => Ok(truncated(pictures)),
        }
    }

    /// `[height, width, channels]` of a picture decoded from latents of this side.
    pub(crate) fn shape(&self, latent_side: usize) -> [usize; 3] {
        let side = latent_side * self.config.factor();
        [side, side, self.config.out_channels]
    }
}
