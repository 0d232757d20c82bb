//! The blocks of a DiT's trunk.

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};

use super::NORM_EPSILON;
use crate::backend::Compute;
use crate::ops::{Activation, FusedOps, Linear, split};

/// A transformer block with adaptive layer norm.
#[derive(Module, Debug)]
pub struct DitBlock<B: Backend> {
    /// Self-attention.
    pub attn: Attention<B>,
    /// The MLP.
    pub mlp: Mlp<B>,
    /// Condition to shift, scale, gate of the attention, then of the MLP.
    pub modulation: Linear<B>,
}

impl<B: Backend> DitBlock<B> {
    pub(super) fn zeros(width: usize, heads: usize, hidden: usize, device: &B::Device) -> Self {
        Self {
            attn: Attention {
                qkv: Linear::zeros(width, 3 * width, device),
                proj: Linear::zeros(width, width, device),
                heads,
                compute: Compute::F32,
            },
            mlp: Mlp {
                fc1: Linear::zeros(width, hidden, device),
                fc2: Linear::zeros(hidden, width, device),
            },
            modulation: Linear::zeros(width, 6 * width, device),
        }
    }
}

impl<B: FusedOps> DitBlock<B> {
    /// `x` is `[batch, tokens, width]`, `condition` (after its SiLU) `[batch, width]`.
    pub fn forward(&self, x: Tensor<B, 3>, condition: Tensor<B, 2>) -> Tensor<B, 3> {
        let [
            shift_attn,
            scale_attn,
            gate_attn,
            shift_mlp,
            scale_mlp,
            gate_mlp,
        ] = split(self.modulation.forward(condition));
        let attended = self.attn.forward(B::modulated_norm(
            x.clone(),
            shift_attn,
            scale_attn,
            NORM_EPSILON,
        ));
        let x = B::gated_residual(x, gate_attn, attended);
        let transformed = self.mlp.forward(B::modulated_norm(
            x.clone(),
            shift_mlp,
            scale_mlp,
            NORM_EPSILON,
        ));
        B::gated_residual(x, gate_mlp, transformed)
    }
}

/// Multi-head self-attention with one fused projection.
#[derive(Module, Debug)]
pub struct Attention<B: Backend> {
    /// Queries, keys and values, in that order.
    pub qkv: Linear<B>,
    /// Output projection.
    pub proj: Linear<B>,
    pub(super) heads: usize,
    #[module(skip)]
    pub(super) compute: Compute,
}

impl<B: FusedOps> Attention<B> {
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let mixed = B::qkv_attention(self.qkv.forward(x), self.heads, self.compute);
        self.proj.forward(mixed)
    }
}

/// Two linear layers with a GELU between.
#[derive(Module, Debug)]
pub struct Mlp<B: Backend> {
    /// Width to hidden.
    pub fc1: Linear<B>,
    /// Hidden to width.
    pub fc2: Linear<B>,
}

impl<B: FusedOps> Mlp<B> {
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        self.fc2
            .forward_activated(self.fc1.forward(x), Activation::GeluTanh)
    }
}
