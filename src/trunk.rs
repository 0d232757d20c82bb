//! The seam between a network and everything that is done to its layers.
//!
//! A diffusion transformer is an embedding, a *trunk* of residual blocks, and a head. Learned gates, layer
//! scores, feature taps and skipping are all something that happens *around a block*, so networks know nothing
//! of them: they call [`run`] with whatever [`BlockHook`] they were handed.

use burn::tensor::{Tensor, backend::Backend};

use crate::ops::FusedOps;

/// Where in the trunk a hook stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// Index of the block, from 0.
    pub layer: usize,
    /// Number of blocks in the trunk.
    pub depth: usize,
}

/// The layers of a network that can be taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trunk {
    /// Number of blocks.
    pub depth: usize,
    /// Layers before which no group of layers may reach over: the first of a decoder, say. Increasing, each above 0
    /// and below the depth.
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
}

/// Runs a block on its input, `[batch, tokens, width]` both.
pub type Block<'a, B> = &'a dyn Fn(Tensor<B, 3>) -> Tensor<B, 3>;

/// What happens around each block of a trunk.
pub trait BlockHook<B: Backend> {
    /// `block` runs the block on its input; tensors are `[batch, tokens, width]`. Returns what the next block sees.
    fn around(&mut self, site: Site, x: Tensor<B, 3>, block: Block<'_, B>) -> Tensor<B, 3>;
}

/// Sends `x` through `depth` blocks, each wrapped by `hook`.
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

/// Runs every block and nothing else.
#[derive(Debug, Default)]
pub struct Plain;

impl<B: Backend> BlockHook<B> for Plain {
    fn around(&mut self, _: Site, x: Tensor<B, 3>, block: Block<'_, B>) -> Tensor<B, 3> {
        block(x)
    }
}

/// Leaves one layer out.
#[derive(Debug)]
pub struct Skip {
    /// The layer that is left out.
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

/// Scales each block's contribution per sample: `x <- m block(x) + (1 - m) x` (TinyFusion, equation 1).
///
/// A masked block still runs: its output is what the gate's gradient is made of.
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

/// Keeps the outputs of chosen blocks, in the order of `layers`' positions in the trunk.
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
