//! DiT: a diffusion transformer with adaptive layer norm, zero-initialised (Peebles and Xie, arXiv
//! 2212.09748).

mod block;
mod channels;
mod config;
pub(super) mod diffusers;
pub(super) mod infer;
pub mod presets;
mod widths;

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor, backend::Backend};

pub(super) use self::block::BLOCKS_IN_PYTORCH;
use self::block::BlockSizes;
pub use self::block::{DitBlock, Place};
pub use self::config::DitConfig;
pub(super) use self::widths::WIDTHS_IN_PYTORCH;
pub use self::widths::Widths;
use super::blocks::Standing;
use super::embeddings::{position_table, timestep_features};
use super::{Denoiser, Prunable, Shape};
use crate::backend::Compute;
use crate::ops::{Activation, FusedOps, Linear, LinearWeights, split};
use crate::trunk::{self, BlockHook, Granularity, Site, Trunk};

/// Layer norm of every block and of the head; the reference's value, not Burn's default.
const NORM_EPSILON: f64 = 1e-6;
/// Number of sinusoidal features, the timestep embedder's input.
pub(super) const TIMESTEP_FEATURES: usize = 256;

/// A diffusion transformer.
#[derive(Module, Debug)]
pub struct Dit<B: Backend> {
    /// Patches to tokens.
    pub x_embedder: PatchEmbedder<B>,
    /// Timesteps to conditions.
    pub t_embedder: TimestepEmbedder<B>,
    /// Labels to conditions.
    pub y_embedder: LabelEmbedder<B>,
    /// Fixed positions, `[1, tokens, width]`.
    pub pos_embed: Param<Tensor<B, 3>>,
    /// The trunk.
    pub blocks: Vec<Place<B>>,
    /// Tokens to patches.
    pub final_layer: FinalLayer<B>,
    patch_size: usize,
    heads: usize,
    mlp_ratio: f64,
    learn_sigma: bool,
    #[module(skip)]
    granularity: Granularity,
}

impl<B: Backend> Dit<B> {
    /// A network of zeros (and the position table), to be filled from a checkpoint or an
    /// initialisation.
    pub fn zeros(config: &DitConfig, device: &B::Device) -> Self {
        let (width, widths) = (config.width, config.widths());
        let Widths {
            condition,
            timestep,
            ..
        } = widths;
        let side = config.input_size / config.patch_size;
        let table = match config.widths {
            None => Tensor::<B, 1>::from_floats(position_table(width, side).as_slice(), device)
                .reshape([1, side * side, width]),
            // Of a narrower trunk some columns are left, which a checkpoint says.
            Some(_) => Tensor::zeros([1, side * side, width], device),
        };
        let place = |Standing { kind, within }: Standing| {
            Place::new(kind, |block| {
                let within = within[block];
                let sizes = BlockSizes {
                    width,
                    condition,
                    within,
                };
                DitBlock::zeros(sizes, kind, device)
            })
        };
        Self {
            x_embedder: PatchEmbedder {
                proj: Patches::zeros(config.channels, config.patch_size, width, device),
            },
            t_embedder: TimestepEmbedder::zeros(timestep, condition, device),
            y_embedder: LabelEmbedder {
                table: Param::from_tensor(Tensor::zeros([config.classes + 1, condition], device)),
            },
            pos_embed: Param::from_tensor(table).set_require_grad(false),
            blocks: config.places().into_iter().map(place).collect(),
            final_layer: FinalLayer {
                linear: Linear::zeros(
                    width,
                    config.patch_size.pow(2) * config.out_channels(),
                    device,
                ),
                modulation: Linear::zeros(condition, 2 * width, device),
            },
            patch_size: config.patch_size,
            heads: config.heads,
            mlp_ratio: config.mlp_ratio,
            learn_sigma: config.learn_sigma,
            granularity: Granularity::Block,
        }
    }

    pub(crate) fn config(&self) -> DitConfig {
        let [width, channels, ..] = self.x_embedder.proj.weight.lazy_shape().dims::<4>();
        let [_, tokens, _] = self.pos_embed.lazy_shape().dims::<3>();
        let [rows, _] = self.y_embedder.table.lazy_shape().dims::<2>();
        let config = DitConfig {
            input_size: tokens.isqrt() * self.patch_size,
            patch_size: self.patch_size,
            channels,
            width,
            depth: 0,
            heads: self.heads,
            mlp_ratio: self.mlp_ratio,
            classes: rows - 1,
            learn_sigma: self.learn_sigma,
            blocks: Vec::new(),
            widths: None,
        };
        let blocks = self.blocks.iter().flat_map(Place::blocks);
        let widths = Widths {
            condition: self.final_layer.modulation.layout().input,
            timestep: self.t_embedder.hidden(),
            blocks: blocks.map(DitBlock::widths).collect(),
        };
        let kinds = self.blocks.iter().map(Place::kind).collect();
        config.of_blocks(kinds).of_widths(widths)
    }
}

impl<B: FusedOps> Denoiser<B> for Dit<B> {
    fn shape(&self) -> Shape {
        self.config().shape()
    }

    fn forward(
        &self,
        x: Tensor<B, 4>,
        t: Tensor<B, 1>,
        y: Tensor<B, 1, Int>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 4> {
        // [batch, tokens, width]
        let x = self.x_embedder.proj.forward(x, self.patch_size) + self.pos_embed.val();
        let condition = self.t_embedder.forward(t) + self.y_embedder.forward(y); // [batch, width]
        // Every modulation uses the same SiLU of the condition: computed once.
        let condition = B::activate(condition, Activation::Silu);
        let x = match self.granularity {
            Granularity::Block => trunk::run(self.blocks.len(), x, hook, |layer, x| {
                self.blocks[layer].forward(x, condition.clone())
            }),
            Granularity::Branch => self.run_branches(x, condition.clone(), hook),
        };
        self.unpatchify(self.final_layer.forward(x, condition))
    }
}

impl<B: FusedOps> Prunable<B> for Dit<B> {
    fn trunk(&self) -> Trunk {
        let trunk = self.config().trunk(self.granularity);
        // The branches of pairs are refused by `by_branch`.
        trunk.unwrap_or_else(|| Trunk::plain(self.blocks.len()))
    }

    fn by_branch(mut self) -> Option<Self> {
        self.granularity = Granularity::Branch;
        self.config().trunk(self.granularity).map(|_| self)
    }

    fn in_pairs(mut self) -> Option<Self> {
        self.config().in_pairs()?;
        self.blocks = Place::in_pairs(self.blocks);
        Some(self)
    }

    fn keep(mut self, kept: &[usize]) -> Self {
        let depth = self.trunk().depth;
        assert!(
            kept.iter().all(|layer| *layer < depth),
            "kept layers {kept:?} must lie below the depth {depth}"
        );
        let mut layers = (0..).map(|layer| kept.contains(&layer));
        let stays = || layers.next().unwrap_or(false);
        self.blocks = Place::keep(self.blocks, stays, self.granularity);
        self
    }

    fn linears_mut(&mut self) -> Vec<&mut Linear<B>> {
        let mut linears = vec![&mut self.t_embedder.hidden, &mut self.t_embedder.out];
        for block in self.blocks.iter_mut().flat_map(Place::blocks_mut) {
            linears.extend(block.linears_mut());
        }
        linears.extend([
            &mut self.final_layer.linear,
            &mut self.final_layer.modulation,
        ]);
        linears
    }
}

impl<B: FusedOps> Dit<B> {
    /// The same network with matrix products of type `compute`.
    pub fn computing(mut self, compute: Compute) -> Self {
        self.x_embedder.proj.compute = compute;
        for block in self.blocks.iter_mut().flat_map(Place::blocks_mut) {
            if let Some(attn) = &mut block.attn {
                attn.compute = compute;
            }
        }
        for linear in self.linears_mut() {
            linear.compute = compute;
        }
        self
    }

    /// The same network, whose backward pass computes the branches of its blocks again rather than
    /// keeping what they computed. Pairs keep it: the terms of their input's gradient would be
    /// summed in another order.
    pub fn recomputing(mut self, recompute: bool) -> Self {
        for place in &mut self.blocks {
            if let Place::One(block) = place {
                block.recompute = recompute;
            }
        }
        self
    }

    /// Runs the blocks branch by branch, each wrapped by `hook`.
    fn run_branches(
        &self,
        mut x: Tensor<B, 3>,
        condition: Tensor<B, 2>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 3> {
        let depth = self.trunk().depth;
        let mut layers = 0..depth;
        for block in self.blocks.iter().flat_map(Place::blocks) {
            let branches = block.modulated(condition.clone()).into_iter().flatten();
            for (branch, layer) in branches.zip(&mut layers) {
                x = hook.around(Site { layer, depth }, x, &|x| branch.forward(x));
            }
        }
        x
    }

    /// `[batch, h w, p p channels]` to `[batch, channels, h p, w p]`.
    fn unpatchify(&self, x: Tensor<B, 3>) -> Tensor<B, 4> {
        let [batch, tokens, features] = x.dims();
        let (side, patch) = (tokens.isqrt(), self.patch_size);
        let channels = features / (patch * patch);
        x.reshape([batch, side, side, patch, patch, channels])
            .permute([0, 5, 1, 3, 2, 4]) // [batch, channels, h, p, w, p]
            .reshape([batch, channels, side * patch, side * patch])
    }
}

/// A strided convolution, computed as a linear layer over non-overlapping patches.
#[derive(Module, Debug)]
pub struct Patches<B: Backend> {
    /// `[width, channels, p, p]`
    pub weight: Param<Tensor<B, 4>>,
    /// `[width]`
    pub bias: Param<Tensor<B, 1>>,
    #[module(skip)]
    compute: Compute,
}

impl<B: Backend> Patches<B> {
    fn zeros(channels: usize, patch: usize, width: usize, device: &B::Device) -> Self {
        Self {
            weight: Param::from_tensor(Tensor::zeros([width, channels, patch, patch], device)),
            bias: Param::from_tensor(Tensor::zeros([width], device)),
            compute: Compute::F32,
        }
    }
}

impl<B: FusedOps> Patches<B> {
    /// `[batch, channels, size, size]` to `[batch, tokens, width]`.
    fn forward(&self, x: Tensor<B, 4>, patch: usize) -> Tensor<B, 3> {
        let [batch, channels, size, _] = x.dims();
        let [width, ..] = self.weight.dims();
        let side = size / patch;
        let x = x
            .reshape([batch, channels, side, patch, side, patch])
            .permute([0, 2, 4, 1, 3, 5]) // [batch, h, w, channels, p, p]
            .reshape([batch, side * side, channels * patch * patch]);
        let weights = LinearWeights {
            weight: self.weight.val().reshape([width, channels * patch * patch]),
            bias: self.bias.val(),
            lora: None,
            compute: self.compute,
        };
        B::linear_layer(x, weights, Activation::Identity)
    }
}

/// Patches to tokens.
#[derive(Module, Debug)]
pub struct PatchEmbedder<B: Backend> {
    /// The patch convolution.
    pub proj: Patches<B>,
}

/// Timesteps to conditions.
#[derive(Module, Debug)]
pub struct TimestepEmbedder<B: Backend> {
    hidden: Linear<B>,
    out: Linear<B>,
}

impl<B: Backend> TimestepEmbedder<B> {
    pub(super) fn zeros(hidden: usize, width: usize, device: &B::Device) -> Self {
        Self {
            hidden: Linear::zeros(TIMESTEP_FEATURES, hidden, device),
            out: Linear::zeros(hidden, width, device),
        }
    }

    /// Hidden width.
    pub(super) fn hidden(&self) -> usize {
        self.out.layout().input
    }

    pub(super) fn linears_mut(&mut self) -> [&mut Linear<B>; 2] {
        [&mut self.hidden, &mut self.out]
    }
}

impl<B: FusedOps> TimestepEmbedder<B> {
    /// `[batch]` to `[batch, width]`.
    pub fn forward(&self, t: Tensor<B, 1>) -> Tensor<B, 2> {
        let features = timestep_features(t, TIMESTEP_FEATURES);
        self.out
            .forward_activated(self.hidden.forward(features), Activation::Silu)
    }
}

/// Labels to conditions.
#[derive(Module, Debug)]
pub struct LabelEmbedder<B: Backend> {
    /// `[classes + 1, width]`; the last row is the null class.
    table: Param<Tensor<B, 2>>,
}

impl<B: FusedOps> LabelEmbedder<B> {
    /// `[batch]` to `[batch, width]`.
    pub fn forward(&self, y: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        self.table.val().select(0, y)
    }
}

/// Tokens to patches, with its own modulation.
#[derive(Module, Debug)]
pub struct FinalLayer<B: Backend> {
    linear: Linear<B>,
    modulation: Linear<B>,
}

impl<B: FusedOps> FinalLayer<B> {
    fn forward(&self, x: Tensor<B, 3>, condition: Tensor<B, 2>) -> Tensor<B, 3> {
        let [shift, scale] = split(self.modulation.forward(condition));
        self.linear
            .forward(B::modulated_norm(x, shift, scale, NORM_EPSILON))
    }
}
