//! Layers of convolutional networks: those of the autoencoder and of UNets, which diffusers calls
//! alike.

use burn::module::{Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use crate::backend::Compute;
use crate::ops::{
    Activation, Convolution, FusedOps, GroupNormOptions, Linear, LinearWeights, Window,
};

/// Added to the variance of every group; the reference's value, not Burn's default.
const NORM_EPSILON: f64 = 1e-6;

/// A 3 x 3 convolution that keeps the sides.
pub(super) fn convolution<B: Backend>(
    input: usize,
    output: usize,
    device: &B::Device,
) -> Convolution<B> {
    Convolution::zeros(input, output, [3; 2], Window::padded([1; 2]), device)
}

/// The window of a 3 x 3 convolution that halves the sides: the reference pads a row below and a
/// column to the right by hand.
pub(super) const fn halving() -> Window {
    Window {
        stride: [2; 2],
        before: [0; 2],
        after: [1; 2],
    }
}

/// Group normalisation with a scale and a shift for each channel.
#[derive(Module, Debug)]
pub struct GroupNorm<B: Backend> {
    weight: Param<Tensor<B, 1>>,
    bias: Param<Tensor<B, 1>>,
    groups: usize,
}

impl<B: Backend> GroupNorm<B> {
    pub(super) fn ones(channels: usize, groups: usize, device: &B::Device) -> Self {
        Self {
            weight: Param::from_tensor(Tensor::ones([channels], device)),
            bias: Param::from_tensor(Tensor::zeros([channels], device)),
            groups,
        }
    }
}

impl<B: FusedOps> GroupNorm<B> {
    /// Normalises `[batch, channels, height, width]`.
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        self.activated(x, Activation::Identity)
    }

    /// Normalises, then applies SiLU.
    pub fn silu(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        self.activated(x, Activation::Silu)
    }

    fn activated(&self, x: Tensor<B, 4>, activation: Activation) -> Tensor<B, 4> {
        let options = GroupNormOptions {
            groups: self.groups,
            epsilon: NORM_EPSILON,
            activation,
        };
        B::group_norm(x, self.weight.val(), self.bias.val(), options)
    }
}

/// The layers of an attention, as older files of diffusers call them and as newer ones do.
pub(super) const ATTENTION_NAMES: [(&str, &str); 4] = [
    ("query", "to_q"),
    ("key", "to_k"),
    ("value", "to_v"),
    ("proj_attn", "to_out.0"),
];

/// Single-head self-attention over all positions of an image.
#[derive(Module, Debug)]
pub struct AttentionBlock<B: Backend> {
    group_norm: GroupNorm<B>,
    to_q: Linear<B>,
    to_k: Linear<B>,
    to_v: Linear<B>,
    /// One layer; diffusers keeps it in a list.
    to_out: Vec<Linear<B>>,
    #[module(skip)]
    pub(super) compute: Compute,
}

impl<B: Backend> AttentionBlock<B> {
    /// Attention over `channels`, with a head of `width`.
    pub(super) fn zeros(channels: usize, width: usize, groups: usize, device: &B::Device) -> Self {
        let linear = || Linear::zeros(channels, width, device);
        Self {
            group_norm: GroupNorm::ones(channels, groups, device),
            to_q: linear(),
            to_k: linear(),
            to_v: linear(),
            to_out: vec![Linear::zeros(width, channels, device)],
            compute: Compute::F32,
        }
    }

    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<B>> {
        let inner = [&mut self.to_q, &mut self.to_k, &mut self.to_v];
        inner.into_iter().chain(&mut self.to_out)
    }

    pub(super) fn set_compute(&mut self, compute: Compute) {
        self.compute = compute;
        for linear in self.linears_mut() {
            linear.compute = compute;
        }
    }
}

impl<B: FusedOps> AttentionBlock<B> {
    /// The three layers as one: putting weights side by side takes less time than putting results.
    fn to_qkv(&self) -> LinearWeights<B> {
        let layers = [&self.to_q, &self.to_k, &self.to_v];
        LinearWeights {
            weight: Tensor::cat(layers.map(|layer| layer.weight.val()).into(), 0),
            bias: Tensor::cat(layers.map(|layer| layer.bias.val()).into(), 0),
            lora: None,
            compute: self.to_q.compute,
        }
    }

    /// `[batch, channels, height, width]`, with the input added.
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let shape = x.dims();
        let normed = self.group_norm.forward(x.clone()).flatten(2, 3);
        let tokens = B::transposed(normed); // [batch, tokens, channels]
        let qkv = B::linear_layer(tokens, self.to_qkv(), Activation::Identity);
        let mut mixed = B::qkv_attention(qkv, 1, self.compute);
        for linear in &self.to_out {
            mixed = linear.forward(mixed);
        }
        x + B::transposed(mixed).reshape(shape)
    }
}

/// The convolution of a level that changes the sides.
#[derive(Module, Debug)]
pub struct Resampler<B: Backend> {
    pub(super) conv: Convolution<B>,
}

/// Repeats every value in a 2 x 2 square.
pub(super) fn doubled<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    let [batch, channels, height, width] = x.dims();
    x.reshape([batch * channels, height, 1, width, 1])
        .expand([batch * channels, height, 2, width, 2])
        .reshape([batch, channels, 2 * height, 2 * width])
}
