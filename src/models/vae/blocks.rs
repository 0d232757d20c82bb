//! Building blocks of the encoder and the decoder.

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};

use crate::backend::Compute;
use crate::models::convolutional::{
    AttentionBlock, GroupNorm, Resampler, convolution, doubled, halving,
};
use crate::ops::{Convolution, FusedOps, Window};

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

/// The middle of encoder and decoder: the smallest size, with attention.
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
            attentions: vec![AttentionBlock::zeros(channels, channels, groups, device)],
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
    /// Residual blocks.
    pub resnets: Vec<ResnetBlock<B>>,
    /// One after each residual block, or none.
    pub attentions: Vec<AttentionBlock<B>>,
    /// One, except on the last level.
    downsamplers: Vec<Resampler<B>>,
}

impl<B: Backend> DownBlock<B> {
    pub(super) fn zeros(
        [input, output, layers, groups]: [usize; 4],
        halves: bool,
        attends: bool,
        device: &B::Device,
    ) -> Self {
        let downsampler = || Resampler {
            conv: Convolution::zeros(output, output, [3; 2], halving(), device),
        };
        let attentions = if attends { layers } else { 0 };
        Self {
            resnets: ResnetBlock::several(input, output, layers, groups, device),
            attentions: (0..attentions)
                .map(|_| AttentionBlock::zeros(output, output, groups, device))
                .collect(),
            downsamplers: halves.then(downsampler).into_iter().collect(),
        }
    }

    pub(super) fn set_compute(&mut self, compute: Compute) {
        for attention in &mut self.attentions {
            attention.set_compute(compute);
        }
    }
}

impl<B: FusedOps> DownBlock<B> {
    /// `[batch, in, height, width]` to `[batch, out, height / 2, width / 2]`; the last level keeps
    /// the sides.
    pub fn forward(&self, mut x: Tensor<B, 4>) -> Tensor<B, 4> {
        for (index, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(x);
            if let Some(attention) = self.attentions.get(index) {
                x = attention.forward(x);
            }
        }
        for downsampler in &self.downsamplers {
            x = downsampler.conv.forward(x);
        }
        x
    }
}

/// A level of the decoder.
#[derive(Module, Debug)]
pub struct UpBlock<B: Backend> {
    resnets: Vec<ResnetBlock<B>>,
    /// One, except on the last level.
    upsamplers: Vec<Resampler<B>>,
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
        let upsampler = || Resampler {
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
