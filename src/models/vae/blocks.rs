//! Building blocks of the encoder and the decoder.

use burn::module::{Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use crate::backend::Compute;
use crate::ops::{Activation, Convolution, FusedOps, GroupNormOptions, Linear, Window};

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

/// Two convolutions beside a shortcut.
#[derive(Module, Debug)]
pub struct ResnetBlock<B: Backend> {
    norm1: GroupNorm<B>,
    conv1: Convolution<B>,
    norm2: GroupNorm<B>,
    conv2: Convolution<B>,
    /// 1 x 1, where the width changes.
    conv_shortcut: Option<Convolution<B>>,
}

impl<B: Backend> ResnetBlock<B> {
    fn zeros(input: usize, output: usize, groups: usize, device: &B::Device) -> Self {
        let shortcut = || Convolution::zeros(input, output, [1; 2], Window::padded([0; 2]), device);
        Self {
            norm1: GroupNorm::ones(input, groups, device),
            conv1: convolution(input, output, device),
            norm2: GroupNorm::ones(output, groups, device),
            conv2: convolution(output, output, device),
            conv_shortcut: (input != output).then(shortcut),
        }
    }

    /// Consecutive blocks, the first of which changes the width.
    fn several(
        input: usize,
        output: usize,
        layers: usize,
        groups: usize,
        device: &B::Device,
    ) -> Vec<Self> {
        (0..layers)
            .map(|layer| {
                Self::zeros(
                    if layer == 0 { input } else { output },
                    output,
                    groups,
                    device,
                )
            })
            .collect()
    }
}

impl<B: FusedOps> ResnetBlock<B> {
    /// `[batch, in, height, width]` to `[batch, out, height, width]`.
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let h = self.conv1.forward(self.norm1.silu(x.clone()));
        let h = self.conv2.forward(self.norm2.silu(h));
        match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(x) + h,
            None => x + h,
        }
    }
}

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
    compute: Compute,
}

impl<B: Backend> AttentionBlock<B> {
    fn zeros(channels: usize, groups: usize, device: &B::Device) -> Self {
        let linear = || Linear::zeros(channels, channels, device);
        Self {
            group_norm: GroupNorm::ones(channels, groups, device),
            to_q: linear(),
            to_k: linear(),
            to_v: linear(),
            to_out: vec![linear()],
            compute: Compute::F32,
        }
    }

    fn set_compute(&mut self, compute: Compute) {
        self.compute = compute;
        for linear in [&mut self.to_q, &mut self.to_k, &mut self.to_v]
            .into_iter()
            .chain(&mut self.to_out)
        {
            linear.compute = compute;
        }
    }
}

impl<B: FusedOps> AttentionBlock<B> {
    /// `[batch, channels, height, width]`, with the input added.
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let shape = x.dims();
        let tokens = self
            .group_norm
            .forward(x.clone())
            .flatten::<3>(2, 3)
            .swap_dims(1, 2); // [batch, tokens, channels]
        let qkv = [&self.to_q, &self.to_k, &self.to_v]
            .map(|linear| linear.forward(tokens.clone()))
            .into();
        let mut mixed = B::qkv_attention(Tensor::cat(qkv, 2), 1, self.compute);
        for linear in &self.to_out {
            mixed = linear.forward(mixed);
        }
        x + mixed.swap_dims(1, 2).reshape(shape)
    }
}

/// The middle of encoder and decoder: the smallest size, and the only block with attention.
#[derive(Module, Debug)]
pub struct MidBlock<B: Backend> {
    /// One before each attention, and one after the last.
    pub resnets: Vec<ResnetBlock<B>>,
    /// A single attention.
    pub attentions: Vec<AttentionBlock<B>>,
}

impl<B: Backend> MidBlock<B> {
    pub(super) fn zeros(channels: usize, groups: usize, device: &B::Device) -> Self {
        Self {
            resnets: ResnetBlock::several(channels, channels, 2, groups, device),
            attentions: vec![AttentionBlock::zeros(channels, groups, device)],
        }
    }

    pub(super) fn set_compute(&mut self, compute: Compute) {
        for attention in &mut self.attentions {
            attention.set_compute(compute);
        }
    }
}

impl<B: FusedOps> MidBlock<B> {
    /// `[batch, channels, height, width]`
    pub fn forward(&self, mut x: Tensor<B, 4>) -> Tensor<B, 4> {
        for (index, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(x);
            if let Some(attention) = self.attentions.get(index) {
                x = attention.forward(x);
            }
        }
        x
    }
}

/// A level of the encoder.
#[derive(Module, Debug)]
pub struct DownBlock<B: Backend> {
    resnets: Vec<ResnetBlock<B>>,
    /// One, except on the last level.
    downsamplers: Vec<Downsampler<B>>,
}

impl<B: Backend> DownBlock<B> {
    pub(super) fn zeros(
        input: usize,
        output: usize,
        layers: usize,
        groups: usize,
        halves: bool,
        device: &B::Device,
    ) -> Self {
        // The reference pads a row below and a column to the right by hand.
        let window = Window {
            stride: [2; 2],
            before: [0; 2],
            after: [1; 2],
        };
        let downsampler = || Downsampler {
            conv: Convolution::zeros(output, output, [3; 2], window, device),
        };
        Self {
            resnets: ResnetBlock::several(input, output, layers, groups, device),
            downsamplers: halves.then(downsampler).into_iter().collect(),
        }
    }
}

impl<B: FusedOps> DownBlock<B> {
    /// `[batch, in, height, width]` to `[batch, out, height / 2, width / 2]`; the last level keeps
    /// the sides.
    pub fn forward(&self, mut x: Tensor<B, 4>) -> Tensor<B, 4> {
        for resnet in &self.resnets {
            x = resnet.forward(x);
        }
        for downsampler in &self.downsamplers {
            x = downsampler.conv.forward(x);
        }
        x
    }
}

/// Halves the sides.
#[derive(Module, Debug)]
pub struct Downsampler<B: Backend> {
    conv: Convolution<B>,
}

/// A level of the decoder.
#[derive(Module, Debug)]
pub struct UpBlock<B: Backend> {
    resnets: Vec<ResnetBlock<B>>,
    /// One, except on the last level.
    upsamplers: Vec<Upsampler<B>>,
}

impl<B: Backend> UpBlock<B> {
    pub(super) fn zeros(
        input: usize,
        output: usize,
        layers: usize,
        groups: usize,
        doubles: bool,
        device: &B::Device,
    ) -> Self {
        let upsampler = || Upsampler {
            conv: convolution(output, output, device),
        };
        Self {
            resnets: ResnetBlock::several(input, output, layers, groups, device),
            upsamplers: doubles.then(upsampler).into_iter().collect(),
        }
    }
}

impl<B: FusedOps> UpBlock<B> {
    /// `[batch, in, height, width]` to `[batch, out, 2 height, 2 width]`; the last level keeps the
    /// sides.
    pub fn forward(&self, mut x: Tensor<B, 4>) -> Tensor<B, 4> {
        for resnet in &self.resnets {
            x = resnet.forward(x);
        }
        for upsampler in &self.upsamplers {
            x = upsampler.conv.forward(doubled(x));
        }
        x
    }
}

/// Doubles the sides.
#[derive(Module, Debug)]
pub struct Upsampler<B: Backend> {
    conv: Convolution<B>,
}

/// Repeats every value in a 2 x 2 square.
fn doubled<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    let [batch, channels, height, width] = x.dims();
    x.reshape([batch * channels, height, 1, width, 1])
        .expand([batch * channels, height, 2, width, 2])
        .reshape([batch, channels, 2 * height, 2 * width])
}
