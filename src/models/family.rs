//! The interface between a network and the code that trains, prunes or samples it.

use burn::module::Module;
use burn::tensor::{Int, Tensor, backend::Backend};

use super::mar::Known;
use crate::ops::Linear;
use crate::trunk::{BlockHook, Trunk};

/// Sizes of a network's samples.
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
/// Its blocks may call a hook, or it may have none: training and sampling need nothing more.
pub trait Denoiser<B: Backend>: Module<B> {
    /// Sizes of its samples.
    fn shape(&self) -> Shape;

    /// Predicts from `x` `[batch, channels, side, side]` at times `t` `[batch]` with labels `y`
    /// `[batch]`.
    ///
    /// Returns `[batch, channels, side, side]`, or twice the channels where the variance is
    /// predicted too. Each block of the trunk is run by [`trunk::run`](crate::trunk::run) or calls
    /// `hook` in the same way, from the first layer on.
    fn forward(
        &self,
        x: Tensor<B, 4>,
        t: Tensor<B, 1>,
        y: Tensor<B, 1, Int>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 4>;

    /// The network as one that fills in images, if it is; by default it is not.
    fn fills_in(&self) -> Option<&dyn FillsIn<B>> {
        None
    }
}

/// A network that is shown some tokens of an image, and denoises the others one by one, under what
/// it says of their places.
pub trait FillsIn<B: Backend> {
    /// Side of the patch of an image that is a token.
    fn patch(&self) -> usize;

    /// What the trunk says of each place, `[batch, tokens, width]`, by the `known` ones of the
    /// tokens `[batch, tokens, token width]` and the labels `y` `[batch]`. Blocks call `hook`, as
    /// of [`Denoiser::forward`].
    fn condition(
        &self,
        tokens: Tensor<B, 3>,
        known: &Known,
        y: Tensor<B, 1, Int>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 3>;

    /// What [`denoise`](Self::denoise) takes of the trunk's vectors `z` `[rows, width]`, the same
    /// at all times: `[rows, any width]`.
    fn project(&self, z: Tensor<B, 2>) -> Tensor<B, 2>;

    /// Predicts noise and variance, `[rows, 2 token width]`, of noised tokens `x`
    /// `[rows, token width]` at times `t`, `[rows]` or `[1]` for all, under
    /// [projected](Self::project) vectors.
    fn denoise(&self, x: Tensor<B, 2>, t: Tensor<B, 1>, projected: Tensor<B, 2>) -> Tensor<B, 2>;
}

/// A denoiser whose blocks form a trunk, from which layers can be removed.
///
/// A network without a trunk implements [`Denoiser`] only and can't be depth-pruned.
pub trait Prunable<B: Backend>: Denoiser<B> {
    /// Its layers, and the borders that no group may cross.
    fn trunk(&self) -> Trunk;

    /// The same network with the residual branches of its blocks for layers:
    /// [`trunk`](Self::trunk), [`keep`](Self::keep) and the sites of hooks count them. None of a
    /// network that can't be taken apart so, as by default.
    fn by_branch(self) -> Option<Self> {
        None
    }

    /// The same network with neighbouring blocks in pairs on one input, each pair a layer. None of
    /// a network that can't be arranged so, as by default.
    fn in_pairs(self) -> Option<Self> {
        None
    }

    /// The same network with only the given layers, in trunk order whatever the order of `kept`.
    ///
    /// # Panics
    /// When a layer is not below the depth of the trunk.
    fn keep(self, kept: &[usize]) -> Self;

    /// Every linear layer, including those of embedders and head: a low-rank update is attached to
    /// each.
    fn linears_mut(&mut self) -> Vec<&mut Linear<B>>;
}
