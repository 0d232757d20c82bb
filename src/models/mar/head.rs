//! The head: a small network that denoises one token, under the vector that the trunks found for
//! its place.

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};

use super::block::{LayerNorm, NORM_EPSILON};
use super::{MarConfig, Widths};
use crate::models::blocks::BlockWidths;
use crate::models::dit::TimestepEmbedder;
use crate::ops::{Activation, FusedOps, Linear, split};

/// What the reference keeps the head in.
#[derive(Module, Debug)]
pub struct DiffLoss<B: Backend> {
    /// The head.
    pub net: Head<B>,
}

/// An MLP with adaptive layer norm. It predicts the noise of a token, and its variance.
#[derive(Module, Debug)]
pub struct Head<B: Backend> {
    time_embed: TimestepEmbedder<B>,
    cond_embed: Linear<B>,
    input_proj: Linear<B>,
    res_blocks: Vec<HeadBlock<B>>,
    final_layer: HeadLast<B>,
}

/// A residual block.
#[derive(Module, Debug)]
pub struct HeadBlock<B: Backend> {
    in_ln: LayerNorm<B>,
    hidden: Linear<B>,
    out: Linear<B>,
    modulation: Linear<B>,
}

/// The last layer.
#[derive(Module, Debug)]
pub struct HeadLast<B: Backend> {
    linear: Linear<B>,
    modulation: Linear<B>,
}

impl<B: Backend> Head<B> {
    pub(super) fn zeros(config: &MarConfig, device: &B::Device) -> Self {
        let (width, token) = (config.head_width, config.token_width());
        let Widths {
            condition,
            timestep,
            head,
            ..
        } = config.widths();
        let linear = |input, output| Linear::zeros(input, output, device);
        let block = |hidden| HeadBlock {
            in_ln: LayerNorm::ones(width, device),
            hidden: linear(width, hidden),
            out: linear(hidden, width),
            modulation: linear(condition, 3 * width),
        };
        Self {
            time_embed: TimestepEmbedder::zeros(timestep, condition, device),
            cond_embed: linear(config.decoder.width, condition),
            input_proj: linear(token, width),
            res_blocks: head.into_iter().map(block).collect(),
            final_layer: HeadLast {
                linear: linear(width, 2 * token),
                modulation: linear(condition, 2 * width),
            },
        }
    }

    /// Numbers of a token.
    pub(super) fn token(&self) -> usize {
        self.input_proj.layout().input
    }

    /// Width of the residual stream.
    pub(super) fn width(&self) -> usize {
        self.input_proj.layout().output
    }

    /// The widths within it, beside those of the given blocks of the trunks.
    pub(super) fn widths(&self, blocks: Vec<BlockWidths>) -> Widths {
        let hidden = |block: &HeadBlock<B>| block.out.layout().input;
        Widths {
            blocks,
            condition: self.cond_embed.layout().output,
            timestep: self.time_embed.hidden(),
            head: self.res_blocks.iter().map(hidden).collect(),
        }
    }

    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<B>> {
        let Self {
            time_embed,
            cond_embed,
            input_proj,
            res_blocks,
            final_layer: HeadLast { linear, modulation },
        } = self;
        let blocks = res_blocks
            .iter_mut()
            .flat_map(|block| [&mut block.hidden, &mut block.out, &mut block.modulation]);
        (time_embed.linears_mut().into_iter())
            .chain([cond_embed, input_proj])
            .chain(blocks)
            .chain([linear, modulation])
    }
}

impl<B: FusedOps> Head<B> {
    /// What [`forward`](Self::forward) takes of the trunks' vectors `z` `[rows, width]`, the same
    /// at all times: `[rows, head width]`.
    pub fn project(&self, z: Tensor<B, 2>) -> Tensor<B, 2> {
        self.cond_embed.forward(z)
    }

    /// Predicts noise and variance, `[rows, 2 token width]`, of noised tokens `x`
    /// `[rows, token width]` at times `t`, `[rows]` or `[1]` for all, under
    /// [projected](Self::project) vectors.
    pub fn forward(
        &self,
        x: Tensor<B, 2>,
        t: Tensor<B, 1>,
        projected: Tensor<B, 2>,
    ) -> Tensor<B, 2> {
        let condition = projected + self.time_embed.forward(t);
        // Every modulation uses the same SiLU of the condition.
        let condition = B::activate(condition, Activation::Silu);
        // A row is a sample of one token: each has a modulation of its own.
        let mut x = self.input_proj.forward(x).unsqueeze_dim::<3>(1);
        for block in &self.res_blocks {
            let [shift, scale, gate] = split(block.modulation.forward(condition.clone()));
            let seen = block.in_ln.modulated(x.clone(), shift, scale);
            let said = block
                .out
                .forward_activated(block.hidden.forward(seen), Activation::Silu);
            x = B::gated_residual(x, gate, said);
        }
        let HeadLast { linear, modulation } = &self.final_layer;
        let [shift, scale] = split(modulation.forward(condition));
        let seen = B::modulated_norm(x, shift, scale, NORM_EPSILON);
        linear.forward(seen).squeeze_dim::<2>(1)
    }
}
