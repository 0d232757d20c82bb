//! The blocks of both trunks: those of a plain vision transformer.

use burn::module::{Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use super::config::Stack;
use crate::backend::Compute;
use crate::models::dit::Attention;
use crate::ops::{Activation, FusedOps, Linear};

/// Layer norm of the trunks and of the head; the reference's value, not Burn's default.
pub(super) const NORM_EPSILON: f64 = 1e-6;

/// Layer normalisation with a scale and a shift for each column.
#[derive(Module, Debug)]
pub struct LayerNorm<B: Backend> {
    weight: Param<Tensor<B, 1>>,
    bias: Param<Tensor<B, 1>>,
}

impl<B: Backend> LayerNorm<B> {
    pub(super) fn ones(width: usize, device: &B::Device) -> Self {
        Self {
            weight: Param::from_tensor(Tensor::ones([width], device)),
            bias: Param::from_tensor(Tensor::zeros([width], device)),
        }
    }

    pub(super) fn width(&self) -> usize {
        self.weight.lazy_shape()[0]
    }
}

impl<B: FusedOps> LayerNorm<B> {
    /// `[batch, tokens, width]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let [batch, ..] = x.dims();
        let rows = |of: Tensor<B, 1>| of.unsqueeze_dim::<2>(0).repeat_dim(0, batch);
        let (shift, scale) = (self.bias.val(), self.weight.val() - 1.0);
        B::modulated_norm(x, rows(shift), rows(scale), NORM_EPSILON)
    }

    /// The same with a scale and a shift for each sample, `[batch, width]`, after those of the
    /// columns: `(1 + scale) (w norm(x) + b) + shift`.
    pub fn modulated(
        &self,
        x: Tensor<B, 3>,
        shift: Tensor<B, 2>,
        scale: Tensor<B, 2>,
    ) -> Tensor<B, 3> {
        let row = |of: &Param<Tensor<B, 1>>| of.val().unsqueeze_dim::<2>(0);
        let scale = scale + 1.0;
        let shift = scale.clone() * row(&self.bias) + shift;
        B::modulated_norm(x, shift, scale * row(&self.weight) - 1.0, NORM_EPSILON)
    }
}

/// A transformer block: attention and MLP, each after a norm and beside a residual.
#[derive(Module, Debug)]
pub struct MarBlock<B: Backend> {
    norm1: LayerNorm<B>,
    attn: Attention<B>,
    norm2: LayerNorm<B>,
    mlp: Mlp<B>,
}

/// Two linear layers with a GELU between.
#[derive(Module, Debug)]
pub struct Mlp<B: Backend> {
    fc1: Linear<B>,
    fc2: Linear<B>,
}

impl<B: Backend> MarBlock<B> {
    pub(super) fn zeros(stack: Stack, hidden: usize, device: &B::Device) -> Self {
        let Stack { width, heads, .. } = stack;
        Self {
            norm1: LayerNorm::ones(width, device),
            attn: Attention::zeros([width; 2], heads, device),
            norm2: LayerNorm::ones(width, device),
            mlp: Mlp {
                fc1: Linear::zeros(width, hidden, device),
                fc2: Linear::zeros(hidden, width, device),
            },
        }
    }

    pub(super) fn linears_mut(&mut self) -> [&mut Linear<B>; 4] {
        let Self { attn, mlp, .. } = self;
        [&mut attn.qkv, &mut attn.proj, &mut mlp.fc1, &mut mlp.fc2]
    }

    pub(super) fn set_compute(&mut self, compute: Compute) {
        self.attn.compute = compute;
    }
}

impl<B: FusedOps> MarBlock<B> {
    /// `[batch, tokens, width]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let Self { attn, mlp, .. } = self;
        let x = x.clone() + attn.forward(self.norm1.forward(x));
        let hidden = mlp.fc1.forward(self.norm2.forward(x.clone()));
        x + mlp.fc2.forward_activated(hidden, Activation::Gelu)
    }
}
