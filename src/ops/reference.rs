//! The operators of [`FusedOps`](super::FusedOps), composed of Burn's own: exact, differentiable, on any backend.

use burn::tensor::{Tensor, activation, backend::Backend};

/// GELU, tanh approximation: `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
///
/// Written as `x / (1 + exp(-2 u))`, which is the same function: `(1 + tanh u) / 2 = sigmoid(2 u)`. The exponent is
/// bounded, so that the gradient meets no infinity times zero; sigmoid(-80) is 2e-35.
pub fn gelu_tanh<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    const TWICE_ROOT_2_OVER_PI: f64 = 1.595_769_121_605_730_8;
    let square = x.clone() * x.clone();
    let u = (square.mul_scalar(0.044715 * TWICE_ROOT_2_OVER_PI) + TWICE_ROOT_2_OVER_PI) * x.clone();
    x / (u.clamp(-80.0, 80.0).neg().exp() + 1.0)
}

/// Layer normalisation over the last dimension, without affine parameters.
///
/// The variance is the mean of squares of the centred values, so a large mean costs no precision.
pub fn layer_norm<B: Backend, const D: usize>(x: Tensor<B, D>, epsilon: f64) -> Tensor<B, D> {
    let centred = x.clone() - x.mean_dim(D - 1);
    let variance = (centred.clone() * centred.clone()).mean_dim(D - 1);
    centred / (variance + epsilon).sqrt()
}

/// See [`FusedOps::modulated_norm`](super::FusedOps::modulated_norm).
pub fn modulated_norm<B: Backend>(
    x: Tensor<B, 3>,
    shift: Tensor<B, 2>,
    scale: Tensor<B, 2>,
    epsilon: f64,
) -> Tensor<B, 3> {
    let scale = (scale + 1.0).unsqueeze_dim::<3>(1); // [batch, 1, width]
    layer_norm(x, epsilon) * scale + shift.unsqueeze_dim::<3>(1)
}

/// See [`FusedOps::qkv_attention`](super::FusedOps::qkv_attention).
pub fn qkv_attention<B: Backend>(qkv: Tensor<B, 3>, heads: usize) -> Tensor<B, 3> {
    let [batch, tokens, triple] = qkv.dims();
    let width = triple / 3;
    let head_dim = width / heads;
    let qkv = qkv
        .reshape([batch, tokens, 3, heads, head_dim])
        .permute([2, 0, 3, 1, 4]); // [3, batch, heads, tokens, head_dim]
    let part = |index: usize| qkv.clone().narrow(0, index, 1).squeeze_dim::<4>(0);
    let (q, k, v) = (part(0), part(1), part(2));
    let scores = q
        .mul_scalar(1.0 / (head_dim as f64).sqrt())
        .matmul(k.swap_dims(2, 3)); // [batch, heads, tokens, tokens]
    let mixed = activation::softmax(scores, 3).matmul(v); // [batch, heads, tokens, head_dim]
    mixed.swap_dims(1, 2).reshape([batch, tokens, width])
}
