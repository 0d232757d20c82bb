//! Tensor operators the models share.
//!
//! [`FusedOps`] is the place for kernels: each method's default is composed of Burn's operators (the slow, exact
//! reference, in [`mod@reference`]), and a backend may override it. Models call the trait and never know.

mod linear;
pub mod reference;

use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};

pub use linear::{Linear, LinearLayout, Lora};

/// Operators a diffusion transformer spends its time on.
///
/// The defaults are the reference; an override must agree with [`mod@reference`] to the last few bits, forward and
/// backward.
pub trait FusedOps: Backend {
    /// How many independent batches are best computed at once, each on a host thread of its own.
    fn workers() -> usize {
        1
    }

    /// GELU by its tanh approximation, elementwise.
    fn gelu_tanh<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        reference::gelu_tanh(x)
    }

    /// `(1 + scale) norm(x) + shift`, where norm is layer normalisation over the last dimension without affine
    /// parameters. `x` is `[batch, tokens, width]`, `shift` and `scale` are `[batch, width]`.
    fn modulated_norm(
        x: Tensor<Self, 3>,
        shift: Tensor<Self, 2>,
        scale: Tensor<Self, 2>,
        epsilon: f64,
    ) -> Tensor<Self, 3> {
        reference::modulated_norm(x, shift, scale, epsilon)
    }

    /// What the head dimension is padded to a multiple of; 1 is no padding.
    fn head_multiple() -> usize {
        1
    }

    /// Self-attention of all heads from the fused projection `[batch, tokens, 3 width]` (queries, keys, values in
    /// that order, each split into `heads`), giving `[batch, tokens, width]`.
    fn qkv_attention(qkv: Tensor<Self, 3>, heads: usize) -> Tensor<Self, 3> {
        reference::padded_qkv_attention(qkv, heads, Self::head_multiple())
    }
}

/// A backend that trains: both it and the one it differentiates have the operators.
pub trait TrainingBackend: AutodiffBackend<InnerBackend: FusedOps> + FusedOps {}

impl<B: AutodiffBackend<InnerBackend: FusedOps> + FusedOps> TrainingBackend for B {}

impl<B: FusedOps> FusedOps for burn::backend::Autodiff<B> {
    fn workers() -> usize {
        B::workers()
    }

    fn head_multiple() -> usize {
        B::head_multiple()
    }
}

#[cfg(feature = "ndarray")]
impl FusedOps for burn_ndarray::NdArray {
    // Most of its operators use one core; whole batches in parallel use all.
    fn workers() -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }
}

/// Head dimensions that CubeCL's matrix products are safe with.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
const CUBE_HEAD_MULTIPLE: usize = 64;

#[cfg(feature = "wgpu")]
impl FusedOps for burn_wgpu::Wgpu {
    fn head_multiple() -> usize {
        CUBE_HEAD_MULTIPLE
    }
}

#[cfg(feature = "cuda")]
impl FusedOps for burn_cuda::Cuda {
    fn head_multiple() -> usize {
        CUBE_HEAD_MULTIPLE
    }
}
