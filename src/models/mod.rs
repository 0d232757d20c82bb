//! Networks and the embeddings they share.
//!
//! [`Denoiser`] and [`Prunable`] are the interface: pruning, recovery and sampling use a network
//! only through these two traits, and work with any implementation. [`Network`] implements both for
//! the networks in this program's checkpoints. It is an enum, because the variant is chosen at run
//! time: code behind it is compiled once per backend.
//!
//! Two networks implement neither, because they are not trained or pruned here: [`Vae`] converts
//! between images and a model's latents, [`Inception`] measures images for FID.

mod architecture;
mod blocks;
mod channels;
mod classifier;
mod convolutional;
pub mod dit;
mod embeddings;
mod family;
pub mod inception;
mod initial;
mod keys;
pub mod mar;
mod shown;
#[cfg(test)]
mod tests;
mod unet;
pub mod vae;

use burn::module::Module;
use burn::tensor::{Int, Tensor, backend::Backend};

use crate::backend::Compute;
use crate::ops::{FusedOps, Linear};
use crate::trunk::{BlockHook, Trunk};

pub use architecture::Architecture;
pub(crate) use architecture::Heads;
pub use blocks::{Attention, BlockKind, BlockWidths, Mlp};
pub use channels::{ChannelGroup, Left, Member, Part};
pub use classifier::{Classifier, ClassifierConfig, Reading};
pub(crate) use dit::diffusers::{DIFFUSERS_ALONE, is_diffusers};
pub use dit::presets;
pub use dit::{Dit, DitConfig, Widths};
pub use embeddings::{position_table, timestep_features};
pub use family::{Denoiser, FillsIn, Prunable, Shape};
pub use inception::Inception;
pub use initial::{initialise, initialise_lora};
pub use keys::{Demand, Key, Keys};
pub use mar::{Mar, MarConfig};
pub(crate) use unet::diffusers::{UNET_ALONE, is_unet};
pub use unet::{Unet, UnetConfig};
pub use vae::{Posterior, Vae, VaeConfig};

/// A prunable diffusion network.
#[derive(Module, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "there are few networks, and their tensors are elsewhere"
)]
pub enum Network<B: Backend> {
    /// DiT (Peebles and Xie, arXiv 2212.09748).
    Dit(Dit<B>),
    /// UNet (Ho et al., arXiv 2006.11239), which has no trunk.
    Unet(Unet<B>),
    /// MAR (Li et al., arXiv 2406.11838), which fills in images.
    Mar(Mar<B>),
}

/// Asks whichever it is.
macro_rules! ask {
    ($network:expr, $model:ident => $answer:expr) => {
        match $network {
            Network::Dit($model) => $answer,
            Network::Unet($model) => $answer,
            Network::Mar($model) => $answer,
        }
    };
}

impl<B: Backend> Network<B> {
    /// A network of zeros, to be filled from a checkpoint or an initialisation; None of an
    /// architecture that is no diffusion network.
    pub fn zeros(architecture: &Architecture, device: &B::Device) -> Option<Self> {
        match architecture {
            Architecture::Dit(config) => Some(Self::Dit(Dit::zeros(config, device))),
            Architecture::Unet(config) => Some(Self::Unet(Unet::zeros(config, device))),
            Architecture::Mar(config) => Some(Self::Mar(Mar::zeros(config, device))),
            Architecture::Classifier(_) => None,
        }
    }

    /// What rebuilds this network, kept layers counted.
    pub fn architecture(&self) -> Architecture {
        match self {
            Self::Dit(model) => Architecture::Dit(model.config()),
            Self::Unet(model) => Architecture::Unet(model.config()),
            Self::Mar(model) => Architecture::Mar(model.config()),
        }
    }
}

impl<B: FusedOps> Network<B> {
    /// The same network with matrix products of type `compute`, which the backend must
    /// [support](crate::ops::supports); a new network's are of f32.
    pub fn computing(self, compute: Compute) -> Self {
        match self {
            Self::Dit(model) => Self::Dit(model.computing(compute)),
            Self::Unet(model) => Self::Unet(model.computing(compute)),
            Self::Mar(model) => Self::Mar(model.computing(compute)),
        }
    }

    /// The same network, whose backward pass keeps the input of each branch of its blocks and
    /// computes the rest again: a third more arithmetic, and a fraction of the memory, for the same
    /// gradients. UNets and MARs have no such pass; [`Architecture::recomputes`] says so.
    pub fn recomputing(self, recompute: bool) -> Self {
        match self {
            Self::Dit(model) => Self::Dit(model.recomputing(recompute)),
            other => other,
        }
    }
}

impl<B: FusedOps> Denoiser<B> for Network<B> {
    fn shape(&self) -> Shape {
        ask!(self, model => model.shape())
    }

    fn forward(
        &self,
        x: Tensor<B, 4>,
        t: Tensor<B, 1>,
        y: Tensor<B, 1, Int>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 4> {
        ask!(self, model => model.forward(x, t, y, hook))
    }

    fn fills_in(&self) -> Option<&dyn FillsIn<B>> {
        ask!(self, model => model.fills_in())
    }
}

impl<B: FusedOps> Prunable<B> for Network<B> {
    fn trunk(&self) -> Trunk {
        match self {
            Self::Dit(model) => model.trunk(),
            Self::Mar(model) => model.trunk(),
            // Plans refuse what needs one.
            Self::Unet(_) => Trunk::plain(0),
        }
    }

    fn by_branch(self) -> Option<Self> {
        match self {
            Self::Dit(model) => model.by_branch().map(Self::Dit),
            Self::Mar(model) => model.by_branch().map(Self::Mar),
            Self::Unet(_) => None,
        }
    }

    fn in_pairs(self) -> Option<Self> {
        match self {
            Self::Dit(model) => model.in_pairs().map(Self::Dit),
            Self::Mar(model) => model.in_pairs().map(Self::Mar),
            Self::Unet(_) => None,
        }
    }

    fn keep(self, kept: &[usize]) -> Self {
        match self {
            Self::Dit(model) => Self::Dit(model.keep(kept)),
            Self::Mar(model) => Self::Mar(model.keep(kept)),
            Self::Unet(model) => {
                assert!(kept.is_empty(), "a UNet has no layers to keep");
                Self::Unet(model)
            }
        }
    }

    fn linears_mut(&mut self) -> Vec<&mut Linear<B>> {
        ask!(self, model => model.linears_mut())
    }
}
