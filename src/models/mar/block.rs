//! The blocks of both trunks: those of a plain vision transformer.

use burn::module::{Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use crate::backend::Compute;
use crate::models::blocks::{Attention, BlockKind, BlockWidths, Mlp, places, side_by_side};
use crate::ops::{Activation, FusedOps, Linear};
use crate::trunk::Granularity;

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

/// What stands at a place of a trunk: a block, or two.
#[derive(Module, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all places have one block"
)]
pub enum MarPlace<B: Backend> {
    /// A block.
    One(MarBlock<B>),
    /// Two blocks on one input.
    Pair(Vec<MarBlock<B>>),
}

places!(MarPlace of MarBlock);

impl<B: FusedOps> MarPlace<B> {
    /// `[batch, tokens, width]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        match self {
            Self::One(block) => block.forward(x),
            Self::Pair(blocks) => {
                let outputs = blocks.iter().map(|block| block.forward(x.clone()));
                side_by_side(x.clone(), outputs)
            }
        }
    }
}

/// A transformer block: attention and MLP, each after a norm and beside a residual.
#[derive(Module, Debug)]
pub struct MarBlock<B: Backend> {
    attention: Option<AttentionBranch<B>>,
    hidden: Option<MlpBranch<B>>,
}

/// The attention of a block.
#[derive(Module, Debug)]
pub struct AttentionBranch<B: Backend> {
    norm1: LayerNorm<B>,
    attn: Attention<B>,
}

/// The MLP of a block.
#[derive(Module, Debug)]
pub struct MlpBranch<B: Backend> {
    norm2: LayerNorm<B>,
    mlp: Mlp<B>,
}

impl<B: Backend> MarBlock<B> {
    pub(super) fn zeros(
        width: usize,
        (kind, within): (BlockKind, BlockWidths),
        device: &B::Device,
    ) -> Self {
        Self {
            attention: kind.attention().then(|| AttentionBranch {
                norm1: LayerNorm::ones(width, device),
                attn: Attention::zeros(width, within, device),
            }),
            hidden: kind.mlp().then(|| MlpBranch {
                norm2: LayerNorm::ones(width, device),
                mlp: Mlp::zeros(width, within.hidden, device),
            }),
        }
    }

    pub(super) fn widths(&self) -> BlockWidths {
        let attention = self.attention.as_ref().map(|branch| &branch.attn);
        BlockWidths::measured(attention, self.hidden.as_ref().map(|branch| &branch.mlp))
    }

    pub(super) fn kind(&self) -> BlockKind {
        // A block with neither is taken out whole.
        BlockKind::new(self.attention.is_some(), self.hidden.is_some()).unwrap_or(BlockKind::Whole)
    }

    /// The same block with only those of its branches that are kept, in their order; None with
    /// neither.
    pub(super) fn keep(self, kept: &[bool]) -> Option<Self> {
        let mut kept = kept.iter().copied();
        let mut stays = || kept.next().unwrap_or(false);
        let left = Self {
            attention: self.attention.filter(|_| stays()),
            hidden: self.hidden.filter(|_| stays()),
        };
        (left.attention.is_some() || left.hidden.is_some()).then_some(left)
    }

    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<B>> {
        let Self { attention, hidden } = self;
        let attention = attention.iter_mut().map(|branch| &mut branch.attn);
        let hidden = hidden.iter_mut().map(|branch| &mut branch.mlp);
        (attention.flat_map(|attn| [&mut attn.qkv, &mut attn.proj]))
            .chain(hidden.flat_map(|mlp| [&mut mlp.fc1, &mut mlp.fc2]))
    }

    pub(super) fn set_compute(&mut self, compute: Compute) {
        if let Some(branch) = &mut self.attention {
            branch.attn.compute = compute;
        }
    }
}

impl<B: FusedOps> MarBlock<B> {
    /// `[batch, tokens, width]`
    pub fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        (self.branches().into_iter().flatten()).fold(x, |x, branch| branch.forward(x))
    }

    /// Its branches, in order.
    pub(super) fn branches(&self) -> [Option<Branch<'_, B>>; 2] {
        [
            self.attention.as_ref().map(Branch::Attention),
            self.hidden.as_ref().map(Branch::Mlp),
        ]
    }
}

/// A branch of a block.
pub(super) enum Branch<'a, B: Backend> {
    Attention(&'a AttentionBranch<B>),
    Mlp(&'a MlpBranch<B>),
}

impl<B: FusedOps> Branch<'_, B> {
    /// `x` and what the branch adds to it.
    pub(super) fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let said = match self {
            Self::Attention(AttentionBranch { norm1, attn }) => {
                attn.forward(norm1.forward(x.clone()))
            }
            Self::Mlp(MlpBranch { norm2, mlp }) => {
                let hidden = mlp.fc1.forward(norm2.forward(x.clone()));
                mlp.fc2.forward_activated(hidden, Activation::Gelu)
            }
        };
        x + said
    }
}
