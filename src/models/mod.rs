//! Networks and the embeddings they share.
//!
//! [`Denoiser`] and [`Prunable`] are the seam: pruning, recovery and sampling know no more of a network than these two
//! traits say, and take anybody's. [`Network`] implements both for the networks that a checkpoint of this program can
//! hold. It is an enum, as the variant is chosen at run time: everything behind it is compiled once per backend.
//!
//! Two networks are neither, as nothing here trains or prunes them: [`Vae`] stands between images and the latents a
//! model sees, [`Inception`] measures images for FID.

mod classifier;
pub mod dit;
mod embeddings;
mod family;
pub mod inception;
mod initial;
pub mod vae;
pub mod zoo;

use burn::module::Module;
use burn::tensor::{Int, Tensor, backend::Backend};
use serde::{Deserialize, Serialize};

use crate::ops::{FusedOps, Linear};
use crate::trunk::{BlockHook, Trunk};

pub use classifier::{Classifier, ClassifierConfig, Reading};
pub use dit::{Dit, DitConfig};
pub use embeddings::{position_table, timestep_features};
pub use family::{Denoiser, Prunable, Shape};
pub use inception::Inception;
pub use initial::{initialise, initialise_lora};
pub use vae::{Posterior, Vae, VaeConfig};

/// What a checkpoint holds: enough to rebuild the module without code.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "family", rename_all = "kebab-case")]
pub enum Architecture {
    /// A diffusion transformer.
    Dit(DitConfig),
    /// The classifier whose features evaluation uses.
    #[serde(alias = "digits-classifier")]
    Classifier(ClassifierConfig),
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Dit(config) => config.fmt(f),
            Self::Classifier(config) => config.fmt(f),
        }
    }
}

/// A prunable diffusion network.
#[derive(Module, Debug)]
pub enum Network<B: Backend> {
    /// DiT (Peebles and Xie, arXiv 2212.09748).
    Dit(Dit<B>),
}

impl<B: Backend> Network<B> {
    /// A network of zeros.
    pub fn zeros(config: &DitConfig, device: &B::Device) -> Self {
        Self::Dit(Dit::zeros(config, device))
    }

    /// The configuration that rebuilds this network, kept layers counted.
    pub fn config(&self) -> DitConfig {
        match self {
            Self::Dit(model) => model.config(),
        }
    }
}

impl<B: FusedOps> Denoiser<B> for Network<B> {
    fn shape(&self) -> Shape {
        match self {
            Self::Dit(model) => model.shape(),
        }
    }

    fn forward(
        &self,
        x: Tensor<B, 4>,
        t: Tensor<B, 1>,
        y: Tensor<B, 1, Int>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 4> {
        match self {
            Self::Dit(model) => model.forward(x, t, y, hook),
        }
    }
}

impl<B: FusedOps> Prunable<B> for Network<B> {
    fn trunk(&self) -> Trunk {
        match self {
            Self::Dit(model) => model.trunk(),
        }
    }

    fn keep(self, kept: &[usize]) -> Self {
        match self {
            Self::Dit(model) => Self::Dit(model.keep(kept)),
        }
    }

    fn linears_mut(&mut self) -> Vec<&mut Linear<B>> {
        match self {
            Self::Dit(model) => model.linears_mut(),
        }
    }
}
