//! UNet of DDPM: residual convolutions on several sizes of the image, with skip connections (Ho et
//! al., arXiv 2006.11239), in the form of diffusers' `UNet2DModel`.

mod config;
pub(in crate::models) mod diffusers;
mod graph;
pub(super) mod presets;

use std::collections::HashMap;

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor, backend::Backend};

pub use self::config::UnetConfig;
use self::graph::Graph;
use super::convolutional::{AttentionBlock, GroupNorm, Resampler, convolution, doubled, halving};
use super::embeddings::ddpm_features;
use super::{Denoiser, Shape};
use crate::backend::Compute;
use crate::ops::{Activation, Convolution, FusedOps, Linear, Window};
use crate::trunk::BlockHook;

/// A UNet. Its blocks are no trunk: each level has an image of another size.
#[derive(Module, Debug)]
pub struct Unet<B: Backend> {
    conv_in: Convolution<B>,
    time_embedding: TimeEmbedding<B>,
    class_embedding: Option<ClassEmbedding<B>>,
    down_blocks: Vec<DownLevel<B>>,
    mid_block: MidLevel<B>,
    up_blocks: Vec<UpLevel<B>>,
    conv_norm_out: GroupNorm<B>,
    conv_out: Convolution<B>,
    #[module(skip)]
    config: UnetConfig,
}

/// Timesteps to conditions.
#[derive(Module, Debug)]
struct TimeEmbedding<B: Backend> {
    linear_1: Linear<B>,
    linear_2: Linear<B>,
}

/// Labels to conditions.
#[derive(Module, Debug)]
struct ClassEmbedding<B: Backend> {
    weight: Param<Tensor<B, 2>>,
}

/// A level on the way down.
#[derive(Module, Debug)]
struct DownLevel<B: Backend> {
    resnets: Vec<TimedResnet<B>>,
    attentions: Vec<AttentionBlock<B>>,
    /// One, except on the last level.
    downsamplers: Vec<Resampler<B>>,
}

/// The smallest images, with one attention.
#[derive(Module, Debug)]
struct MidLevel<B: Backend> {
    resnets: Vec<TimedResnet<B>>,
    attentions: Vec<AttentionBlock<B>>,
}

/// A level on the way up.
#[derive(Module, Debug)]
struct UpLevel<B: Backend> {
    resnets: Vec<TimedResnet<B>>,
    attentions: Vec<AttentionBlock<B>>,
    /// One, except on the last level.
    upsamplers: Vec<Resampler<B>>,
}

/// Two convolutions beside a shortcut, moved by the time between them.
#[derive(Module, Debug)]
struct TimedResnet<B: Backend> {
    norm1: GroupNorm<B>,
    conv1: Convolution<B>,
    time_emb_proj: Linear<B>,
    norm2: GroupNorm<B>,
    conv2: Convolution<B>,
    /// 1 x 1, where the width changes.
    conv_shortcut: Option<Convolution<B>>,
}

impl<B: FusedOps> TimedResnet<B> {
    /// `[batch, in, height, width]` to `[batch, out, height, width]`; `time` (after its SiLU) is
    /// `[batch, width]`.
    fn forward(&self, x: Tensor<B, 4>, time: Tensor<B, 2>) -> Tensor<B, 4> {
        let h = self.conv1.forward(self.norm1.silu(x.clone()));
        let moved = self.time_emb_proj.forward(time);
        let [batch, width] = moved.dims();
        let h = h + moved.reshape([batch, width, 1, 1]);
        let h = self.conv2.forward(self.norm2.silu(h));
        match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(x) + h,
            None => x + h,
        }
    }
}

/// Makes layers of the sizes that a graph has for their names.
struct Builder<'a, B: Backend> {
    sizes: HashMap<String, [usize; 2]>,
    groups: usize,
    device: &'a B::Device,
}

impl<B: Backend> Builder<'_, B> {
    fn sizes(&self, name: &str) -> [usize; 2] {
        // The graph has every layer that is asked for.
        self.sizes.get(name).copied().unwrap_or([1, 1])
    }

    fn convolution(&self, name: &str) -> Convolution<B> {
        let [input, output] = self.sizes(name);
        convolution(input, output, self.device)
    }

    fn linear(&self, name: &str) -> Linear<B> {
        let [input, output] = self.sizes(name);
        Linear::zeros(input, output, self.device)
    }

    fn norm(&self, name: &str) -> GroupNorm<B> {
        GroupNorm::ones(self.sizes(name)[0], self.groups, self.device)
    }

    /// All blocks of a level, by their numbers.
    fn resnets(&self, level: &str) -> Vec<TimedResnet<B>> {
        let named = (0..).map(|index| format!("{level}.resnets.{index}"));
        let named = named.take_while(|name| self.sizes.contains_key(&format!("{name}.conv1")));
        let block = |name: String| {
            let shortcut = self.sizes.get(&format!("{name}.conv_shortcut"));
            TimedResnet {
                norm1: self.norm(&format!("{name}.norm1")),
                conv1: self.convolution(&format!("{name}.conv1")),
                time_emb_proj: self.linear(&format!("{name}.time_emb_proj")),
                norm2: self.norm(&format!("{name}.norm2")),
                conv2: self.convolution(&format!("{name}.conv2")),
                conv_shortcut: shortcut.map(|[input, output]| {
                    Convolution::zeros(*input, *output, [1; 2], Window::padded([0; 2]), self.device)
                }),
            }
        };
        named.map(block).collect()
    }

    fn attentions(&self, level: &str) -> Vec<AttentionBlock<B>> {
        let named = (0..).map(|index| format!("{level}.attentions.{index}.to_q"));
        let sizes = named.map_while(|name| self.sizes.get(&name));
        let block = |[channels, width]: &[usize; 2]| {
            AttentionBlock::zeros(*channels, *width, self.groups, self.device)
        };
        sizes.map(block).collect()
    }

    /// The convolution of a level that changes the side, if it has one.
    fn resampler(&self, name: &str, window: Window) -> Vec<Resampler<B>> {
        let sizes = self.sizes.get(&format!("{name}.0.conv"));
        let one = |[input, output]: &[usize; 2]| Resampler {
            conv: Convolution::zeros(*input, *output, [3; 2], window, self.device),
        };
        sizes.map(one).into_iter().collect()
    }
}

impl<B: Backend> Unet<B> {
    /// A network of zeros, to be filled from a checkpoint or an initialisation.
    pub fn zeros(config: &UnetConfig, device: &B::Device) -> Self {
        let graph = Graph::new(config);
        let sizes = graph.layers.iter();
        let build = Builder::<B> {
            sizes: sizes
                .map(|layer| (layer.name.clone(), graph.sizes(layer)))
                .collect(),
            groups: config.norm_groups,
            device,
        };
        let halves = match config.padded {
            true => Window::padded([1; 2]).every(2),
            false => halving(),
        };
        let levels = 0..config.levels.len();
        let down = |level: usize| {
            let name = format!("down_blocks.{level}");
            DownLevel {
                resnets: build.resnets(&name),
                attentions: build.attentions(&name),
                downsamplers: build.resampler(&format!("{name}.downsamplers"), halves),
            }
        };
        let up = |level: usize| {
            let name = format!("up_blocks.{level}");
            UpLevel {
                resnets: build.resnets(&name),
                attentions: build.attentions(&name),
                upsamplers: build.resampler(&format!("{name}.upsamplers"), Window::padded([1; 2])),
            }
        };
        Self {
            conv_in: build.convolution("conv_in"),
            time_embedding: TimeEmbedding {
                linear_1: build.linear("time_embedding.linear_1"),
                linear_2: build.linear("time_embedding.linear_2"),
            },
            class_embedding: build
                .sizes
                .get("class_embedding")
                .map(|shape| ClassEmbedding {
                    weight: Param::from_tensor(Tensor::zeros(*shape, device)),
                }),
            down_blocks: levels.clone().map(down).collect(),
            mid_block: MidLevel {
                resnets: build.resnets("mid_block"),
                attentions: build.attentions("mid_block"),
            },
            up_blocks: levels.map(up).collect(),
            conv_norm_out: build.norm("conv_norm_out"),
            conv_out: build.convolution("conv_out"),
            config: config.clone(),
        }
    }

    pub(crate) fn config(&self) -> UnetConfig {
        self.config.clone()
    }

    fn attentions_mut(&mut self) -> impl Iterator<Item = &mut AttentionBlock<B>> {
        let down = self
            .down_blocks
            .iter_mut()
            .flat_map(|level| &mut level.attentions);
        let up = self
            .up_blocks
            .iter_mut()
            .flat_map(|level| &mut level.attentions);
        down.chain(&mut self.mid_block.attentions).chain(up)
    }

    fn convolutions_mut(&mut self) -> Vec<&mut Convolution<B>> {
        let down = self.down_blocks.iter_mut();
        let down = down.map(|level| (&mut level.resnets, &mut level.downsamplers[..]));
        let up = self.up_blocks.iter_mut();
        let up = up.map(|level| (&mut level.resnets, &mut level.upsamplers[..]));
        let middle = (&mut self.mid_block.resnets, [].as_mut_slice());
        let mut convolutions = vec![&mut self.conv_in, &mut self.conv_out];
        for (resnets, resamplers) in down.chain([middle]).chain(up) {
            for resnet in resnets {
                convolutions.extend([&mut resnet.conv1, &mut resnet.conv2]);
                convolutions.extend(&mut resnet.conv_shortcut);
            }
            convolutions.extend(resamplers.iter_mut().map(|resampler| &mut resampler.conv));
        }
        convolutions
    }

    /// The linear layers.
    pub(crate) fn linears_mut(&mut self) -> Vec<&mut Linear<B>> {
        let Self {
            time_embedding,
            down_blocks,
            mid_block,
            up_blocks,
            ..
        } = self;
        let mut linears = vec![&mut time_embedding.linear_1, &mut time_embedding.linear_2];
        let levels = (down_blocks.iter_mut())
            .map(|level| (&mut level.resnets, &mut level.attentions))
            .chain([(&mut mid_block.resnets, &mut mid_block.attentions)])
            .chain((up_blocks.iter_mut()).map(|level| (&mut level.resnets, &mut level.attentions)));
        for (resnets, attentions) in levels {
            linears.extend(resnets.iter_mut().map(|resnet| &mut resnet.time_emb_proj));
            linears.extend(attentions.iter_mut().flat_map(AttentionBlock::linears_mut));
        }
        linears
    }
}

impl<B: FusedOps> Unet<B> {
    /// The same network with matrix products, those of convolutions too, of type `compute`.
    pub fn computing(mut self, compute: Compute) -> Self {
        for convolution in self.convolutions_mut() {
            convolution.compute = compute;
        }
        for attention in self.attentions_mut() {
            attention.compute = compute;
        }
        for linear in self.linears_mut() {
            linear.compute = compute;
        }
        self
    }
}

impl<B: FusedOps> Denoiser<B> for Unet<B> {
    fn shape(&self) -> Shape {
        self.config.shape()
    }

    /// A UNet calls no hook.
    fn forward(
        &self,
        x: Tensor<B, 4>,
        t: Tensor<B, 1>,
        y: Tensor<B, 1, Int>,
        _: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 4> {
        let features = ddpm_features(t, self.config.levels[0]);
        let hidden = self.time_embedding.linear_1.forward(features);
        let linear_2 = &self.time_embedding.linear_2;
        let mut time = linear_2.forward_activated(hidden, Activation::Silu);
        if let Some(table) = &self.class_embedding {
            time = time + table.weight.val().select(0, y);
        }
        // Every block uses the same SiLU of it: computed once.
        let time = B::activate(time, Activation::Silu);
        let mut x = self.conv_in.forward(x);
        let mut skips = vec![x.clone()];
        for level in &self.down_blocks {
            for (index, resnet) in level.resnets.iter().enumerate() {
                x = resnet.forward(x, time.clone());
                if let Some(attention) = level.attentions.get(index) {
                    x = attention.forward(x);
                }
                skips.push(x.clone());
            }
            for downsampler in &level.downsamplers {
                x = downsampler.conv.forward(x);
                skips.push(x.clone());
            }
        }
        for (index, resnet) in self.mid_block.resnets.iter().enumerate() {
            x = resnet.forward(x, time.clone());
            if let Some(attention) = self.mid_block.attentions.get(index) {
                x = attention.forward(x);
            }
        }
        for level in &self.up_blocks {
            for (index, resnet) in level.resnets.iter().enumerate() {
                // As many were kept on the way down.
                let skip = skips.pop().unwrap_or_else(|| x.clone());
                x = resnet.forward(Tensor::cat(vec![x, skip], 1), time.clone());
                if let Some(attention) = level.attentions.get(index) {
                    x = attention.forward(x);
                }
            }
            for upsampler in &level.upsamplers {
                x = upsampler.conv.forward(doubled(x));
            }
        }
        self.conv_out.forward(self.conv_norm_out.silu(x))
    }
}
