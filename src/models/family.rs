//! The seam between a network and every room that trains, prunes or samples one.

use burn::module::Module;
use burn::tensor::{Int, Tensor, backend::Backend};

use crate::ops::Linear;
use crate::trunk::{BlockHook, Trunk};

/// Sizes of the samples a network sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Channels of a sample.
    pub channels: usize,
    /// Side of a sample, which is square.
    pub side: usize,
    /// Number of classes; the label of this value is the null class.
    pub classes: usize,
}

/// A network that a [`Process`](crate::process::Process) trains and samples.
///
/// It may have blocks that a hook sees, or none: what only trains or samples asks no more of it than this.
pub trait Denoiser<B: Backend>: Module<B> {
    /// Sizes of its samples.
    fn shape(&self) -> Shape;

    /// Predicts from `x` `[batch, channels, side, side]` at times `t` `[batch]` under labels `y` `[batch]`.
    ///
    /// Gives `[batch, channels, side, side]`, or twice the channels where the variance is predicted too. Each block of
    /// the trunk is run by [`trunk::run`](crate::trunk::run) or calls `hook` in the same way, from the first layer on.
    fn forward(
        &self,
        x: Tensor<B, 4>,
        t: Tensor<B, 1>,
        y: Tensor<B, 1, Int>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 4>;
}

/// A denoiser whose blocks form a trunk, from which layers can be taken out.
///
/// A network without such a trunk implements [`Denoiser`] alone; depth pruning does not take it.
pub trait Prunable<B: Backend>: Denoiser<B> {
    /// Its layers, and the borders between them that no group may cross.
    fn trunk(&self) -> Trunk;

    /// The same network with only the given layers, in trunk order whatever the order of `kept`.
    ///
    /// # Panics
    /// When a layer is not below the depth of the trunk.
    fn keep(self, kept: &[usize]) -> Self;

    /// Every linear layer, of embedders and head too: those that a low-rank update is attached to.
    fn linears_mut(&mut self) -> Vec<&mut Linear<B>>;
}
