//! Networks and the embeddings they share.
//!
//! [`Network`] is the family of diffusion transformers that can be pruned, healed and sampled. Pruning, recovery
//! and evaluation know of it only what its methods say: depth, forward through a trunk with a hook, keeping
//! chosen layers, configuration. It is an enum rather than a trait because the set is closed and the variant is
//! chosen at run time by a checkpoint: everything behind it is compiled once per backend.
//!
//! Two networks are not of the family, as nothing here trains or prunes them: [`Vae`] stands between images and the
//! latents a model sees, [`Inception`] measures images for FID.

mod classifier;
pub mod dit;
mod embeddings;
pub mod inception;
mod initial;
pub mod vae;
pub mod zoo;

use burn::module::Module;
use burn::tensor::{Int, Tensor, backend::Backend};
use serde::{Deserialize, Serialize};

use crate::ops::{FusedOps, Linear};
use crate::trunk::BlockHook;

pub use classifier::{Classifier, ClassifierConfig, Reading};
pub use dit::{Dit, DitConfig};
pub use embeddings::{position_table, timestep_features};
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

    /// Number of blocks in the trunk.
    pub fn depth(&self) -> usize {
        match self {
            Self::Dit(model) => model.blocks.len(),
        }
    }

    /// The configuration that rebuilds this network, kept layers counted.
    pub fn config(&self) -> DitConfig {
        match self {
            Self::Dit(model) => model.config(),
        }
    }

    /// The same network with only the given blocks, in trunk order, whatever the order of `kept`.
    ///
    /// # Panics
    /// When an index is not below [`depth`](Self::depth).
    pub fn keep(self, kept: &[usize]) -> Self {
        match self {
            Self::Dit(model) => Self::Dit(model.keep(kept)),
        }
    }

    /// Every linear layer, embedders and final layer included: the layers a low-rank update is attached to.
    pub fn linears_mut(&mut self) -> Vec<&mut Linear<B>> {
        match self {
            Self::Dit(model) => model.linears_mut(),
        }
    }
}

impl<B: FusedOps> Network<B> {
    /// Predicts from `x` `[batch, channels, size, size]` at timesteps `t` `[batch]` under labels `y` `[batch]`
    /// (the number of classes being the null label), giving `[batch, channels or 2 channels, size, size]`.
    pub fn forward(
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
