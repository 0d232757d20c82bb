//! The interface between a network and everything that is done to its layers.
//!
//! A diffusion transformer is an embedding, a *trunk* of residual blocks, and a head. Learned
//! gates, layer scores, feature taps and skipping all happen *around a block*, so networks don't
//! depend on them: they call [`run`] with the [`BlockHook`] they are given.
//!
//! ```
//! # #[cfg(feature = "ndarray")] fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use burn::tensor::Tensor;
//! use burn_ndarray::NdArray;
//! use tinyfusion::trunk::{self, Block, BlockHook, Site, Skip};
//!
//! /// Notes the layers that are run.
//! struct Passed(Vec<usize>);
//!
//! impl BlockHook<NdArray> for Passed {
//!     fn around(
//!         &mut self,
//!         site: Site,
//!         x: Tensor<NdArray, 3>,
//!         block: Block<'_, NdArray>,
//!     ) -> Tensor<NdArray, 3> {
//!         self.0.push(site.layer);
//!         block(x)
//!     }
//! }
//!
//! // A trunk of three blocks, each of which doubles its input.
//! let double = |_layer, x: Tensor<NdArray, 3>| x * 2;
//! let x = Tensor::<NdArray, 3>::ones([1, 1, 1], &Default::default());
//! let mut passed = Passed(Vec::new());
//! let out = trunk::run(3, x.clone(), &mut passed, double);
//! assert_eq!((out.into_scalar(), passed.0), (8.0, vec![0, 1, 2]));
//! let out = trunk::run(3, x, &mut Skip { layer: 1 }, double);
//! assert_eq!(out.into_scalar(), 4.0);
//! # Ok(()) }
//! # #[cfg(not(feature = "ndarray"))] fn main() {}
//! ```

use std::ops::Range;

use burn::tensor::{Tensor, backend::Backend};
use serde::{Deserialize, Serialize};

use crate::ops::FusedOps;

/// The position of a hook in the trunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// Index of the block, from 0.
    pub layer: usize,
    /// Number of blocks in the trunk.
    pub depth: usize,
}

/// What counts as a layer of a trunk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Granularity {
    /// A block.
    #[default]
    Block,
    /// Each residual branch of a block: its attention, then its MLP.
    Branch,
}

impl Granularity {
    /// All, by their names.
    pub const NAMES: [(&'static str, Self); 2] = [("block", Self::Block), ("branch", Self::Branch)];

    /// What a layer is called.
    pub fn layer(self) -> &'static str {
        match self {
            Self::Block => "layer",
            Self::Branch => "branch",
        }
    }

    /// What its layers are called, more than one of them.
    pub fn layers(self) -> &'static str {
        match self {
            Self::Block => "layers",
            Self::Branch => "branches",
        }
    }

    /// Whether a block is a layer.
    pub fn is_block(&self) -> bool {
        *self == Self::Block
    }
}

/// The removable layers of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trunk {
    /// Number of blocks.
    pub depth: usize,
    /// Layers before which a group must end, such as the first layer of a decoder. Increasing, each
    /// above 0 and below the depth.
    pub borders: Vec<usize>,
}

impl Trunk {
    /// A trunk without borders.
    pub fn plain(depth: usize) -> Self {
        Self {
            depth,
            borders: Vec::new(),
        }
    }

    /// The layers between one border and the next, in order.
    pub fn stacks(&self) -> impl Iterator<Item = Range<usize>> {
        let firsts = [0].into_iter().chain(self.borders.iter().copied());
        let ends = self.borders.iter().copied().chain([self.depth]);
        firsts.zip(ends).map(|(first, end)| first..end)
    }
}

/// Runs a block on its input, `[batch, tokens, width]` both.
pub type Block<'a, B> = &'a dyn Fn(Tensor<B, 3>) -> Tensor<B, 3>;

/// Computation around each block of a trunk.
pub trait BlockHook<B: Backend> {
    /// `block` runs the block on its input; tensors are `[batch, tokens, width]`. Returns the next
    /// block's input.
    fn around(&mut self, site: Site, x: Tensor<B, 3>, block: Block<'_, B>) -> Tensor<B, 3>;
}

/// Runs `depth` blocks on `x`, each wrapped by `hook`.
pub fn run<B: Backend>(
    depth: usize,
    mut x: Tensor<B, 3>,
    hook: &mut dyn BlockHook<B>,
    block: impl Fn(usize, Tensor<B, 3>) -> Tensor<B, 3>,
) -> Tensor<B, 3> {
    for layer in 0..depth {
        x = hook.around(Site { layer, depth }, x, &|x| block(layer, x));
    }
    x
}

/// Runs every block without changes.
#[derive(Debug, Default)]
pub struct Plain;

impl<B: Backend> BlockHook<B> for Plain {
    fn around(&mut self, _: Site, x: Tensor<B, 3>, block: Block<'_, B>) -> Tensor<B, 3> {
        block(x)
    }
}

/// Skips one layer.
#[derive(Debug)]
pub struct Skip {
    /// The skipped layer.
    pub layer: usize,
}

impl<B: Backend> BlockHook<B> for Skip {
    fn around(&mut self, site: Site, x: Tensor<B, 3>, block: Block<'_, B>) -> Tensor<B, 3> {
        if site.layer == self.layer {
            x
        } else {
            block(x)
        }
    }
}

/// Scales each block's contribution per sample: `x <- m block(x) + (1 - m) x` (TinyFusion, equation
/// 1).
///
/// A masked block still runs, because the gate's gradient needs its output.
#[derive(Debug)]
pub struct Gated<B: Backend> {
    /// One gate per sample and layer, `[batch, depth]`.
    pub mask: Tensor<B, 2>,
}

impl<B: FusedOps> BlockHook<B> for Gated<B> {
    fn around(&mut self, site: Site, x: Tensor<B, 3>, block: Block<'_, B>) -> Tensor<B, 3> {
        let gate = self
            .mask
            .clone()
            .narrow(1, site.layer, 1)
            .squeeze_dim::<1>(1); // [batch]
        B::blend(x.clone(), block(x), gate)
    }
}

/// Keeps the outputs of the chosen layers, in trunk order.
#[derive(Debug)]
pub struct Tap<B: Backend> {
    layers: Vec<usize>,
    /// Outputs `[batch, tokens, width]` of the tapped blocks seen so far, in trunk order.
    pub outputs: Vec<Tensor<B, 3>>,
}

impl<B: Backend> Tap<B> {
    /// Taps the given layers.
    pub fn new(layers: impl IntoIterator<Item = usize>) -> Self {
        Self {
            layers: layers.into_iter().collect(),
            outputs: Vec::new(),
        }
    }
}

impl<B: Backend> BlockHook<B> for Tap<B> {
    fn around(&mut self, site: Site, x: Tensor<B, 3>, block: Block<'_, B>) -> Tensor<B, 3> {
        let x = block(x);
        if self.layers.contains(&site.layer) {
            self.outputs.push(x.clone());
        }
        x
    }
}
