//! The blocks of a DiT's trunk, and the two branches of each.

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};

use super::NORM_EPSILON;
use crate::models::blocks::{Attention, BlockKind, BlockWidths, Mlp, places, side_by_side};
use crate::ops::branch::composed;
use crate::ops::{Activation, Between, BranchWeights, FusedOps, Linear, split};
use crate::trunk::Granularity;

/// How a `DiT` of facebookresearch/DiT is given the blocks of a model that has not one whole block
/// after another.
pub(in crate::models) const BLOCKS_IN_PYTORCH: &str = r#"Some of its blocks lack their attention or their MLP, or run in pairs on one input. A `DiT` of the original code, of the
sizes in `config.json`, is given such blocks:

```python
import copy, json, types, torch

class Pair(torch.nn.ModuleList):
    def forward(self, x, c):
        return self[0](x, c) + self[1](x, c) - x

def alone(self, x, c):
    run, norm = (self.attn, self.norm1) if hasattr(self, "attn") else (self.mlp, self.norm2)
    shift, scale, gate = self.adaLN_modulation(c).unsqueeze(1).chunk(3, dim=-1)
    return x + gate * run(norm(x) * (1 + scale) + shift)

for i, (block, kind) in enumerate(zip(model.blocks, json.load(open("config.json"))["blocks"])):
    if kind == "pair":
        model.blocks[i] = Pair([block, copy.deepcopy(block)])
    elif kind != "whole":
        delattr(block, "mlp" if kind == "attention" else "attn")
        width = block.adaLN_modulation[1].in_features
        block.adaLN_modulation[1] = torch.nn.Linear(width, 3 * width)
        block.forward = types.MethodType(alone, block)
```"#;

/// Sizes of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockSizes {
    pub(super) width: usize,
    pub(super) condition: usize,
    pub(super) within: BlockWidths,
}

/// What stands at a place of the trunk: a block, or two.
#[derive(Module, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all places have one block"
)]
pub enum Place<B: Backend> {
    /// A block.
    One(DitBlock<B>),
    /// Two blocks on one input.
    Pair(Vec<DitBlock<B>>),
}

places!(Place of DitBlock);

impl<B: FusedOps> Place<B> {
    /// `x` is `[batch, tokens, width]`, `condition` (after its SiLU) `[batch, width]`.
    pub fn forward(&self, x: Tensor<B, 3>, condition: Tensor<B, 2>) -> Tensor<B, 3> {
        match self {
            Self::One(block) => block.forward(x, condition),
            Self::Pair(blocks) => {
                let output = |block: &DitBlock<B>| block.forward(x.clone(), condition.clone());
                side_by_side(x.clone(), blocks.iter().map(output))
            }
        }
    }
}

/// A transformer block with adaptive layer norm.
///
/// Where a branch was taken out, so was its part of the modulation.
#[derive(Module, Debug)]
pub struct DitBlock<B: Backend> {
    /// Self-attention.
    pub attn: Option<Attention<B>>,
    /// The MLP.
    pub mlp: Option<Mlp<B>>,
    /// Condition to shift, scale, gate of the attention, then of the MLP.
    pub modulation: Linear<B>,
    /// Whether a backward pass computes its branches again.
    #[module(skip)]
    pub(super) recompute: bool,
}

impl<B: Backend> DitBlock<B> {
    pub(super) fn zeros(sizes: BlockSizes, kind: BlockKind, device: &B::Device) -> Self {
        let BlockSizes {
            width,
            condition,
            within,
        } = sizes;
        Self {
            attn: (kind.attention()).then(|| Attention::zeros(width, within, device)),
            mlp: kind.mlp().then(|| Mlp::zeros(width, within.hidden, device)),
            modulation: Linear::zeros(condition, 3 * kind.branches() * width, device),
            recompute: false,
        }
    }

    pub(super) fn widths(&self) -> BlockWidths {
        BlockWidths::measured(self.attn.as_ref(), self.mlp.as_ref())
    }

    pub(super) fn kind(&self) -> BlockKind {
        // A block with neither is taken out whole.
        BlockKind::new(self.attn.is_some(), self.mlp.is_some()).unwrap_or(BlockKind::Whole)
    }

    /// The same block with only those of its branches that are kept, in their order; None with
    /// neither.
    pub(super) fn keep(mut self, kept: &[bool]) -> Option<Self> {
        let mut kept = kept.iter().copied();
        let attention = self.attn.is_some() && kept.next().unwrap_or(false);
        let mlp = self.mlp.is_some() && kept.next().unwrap_or(false);
        let left = BlockKind::new(attention, mlp)?;
        if left == self.kind() {
            return Some(self);
        }
        // One of two is left, hence half of the rows.
        let rows = self.modulation.layout().output / 2;
        let first = if attention { 0 } else { rows };
        self.modulation = self.modulation.keep_outputs(first..first + rows);
        self.attn = self.attn.filter(|_| attention);
        self.mlp = self.mlp.filter(|_| mlp);
        Some(self)
    }

    /// The linear layers.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<B>> {
        let attn = self.attn.iter_mut();
        let mlp = self.mlp.iter_mut();
        attn.flat_map(|attn| [&mut attn.qkv, &mut attn.proj])
            .chain(mlp.flat_map(|mlp| [&mut mlp.fc1, &mut mlp.fc2]))
            .chain([&mut self.modulation])
    }
}

impl<B: FusedOps> DitBlock<B> {
    /// `x` is `[batch, tokens, width]`, `condition` (after its SiLU) `[batch, width]`.
    pub fn forward(&self, x: Tensor<B, 3>, condition: Tensor<B, 2>) -> Tensor<B, 3> {
        let branches = self.modulated(condition).into_iter().flatten();
        branches.fold(x, |x, branch| branch.forward(x))
    }

    /// Its branches, each under its part of the condition.
    pub(super) fn modulated(&self, condition: Tensor<B, 2>) -> [Option<Branch<'_, B>>; 2] {
        let modulation = self.modulation.forward(condition);
        let recompute = self.recompute;
        match (&self.attn, &self.mlp) {
            (Some(attn), Some(mlp)) => {
                let [shift, scale, gate, shift_mlp, scale_mlp, gate_mlp] = split(modulation);
                [
                    Some(Branch {
                        layer: Layer::Attention(attn),
                        modulation: [shift, scale, gate],
                        recompute,
                    }),
                    Some(Branch {
                        layer: Layer::Mlp(mlp),
                        modulation: [shift_mlp, scale_mlp, gate_mlp],
                        recompute,
                    }),
                ]
            }
            (attn, mlp) => {
                let attn = attn.as_ref().map(Layer::Attention);
                let alone = attn.or(mlp.as_ref().map(Layer::Mlp));
                let modulation = split(modulation);
                let alone = alone.map(|layer| Branch {
                    layer,
                    modulation,
                    recompute,
                });
                [alone, None]
            }
        }
    }
}

/// A branch of a block under a condition.
pub(super) struct Branch<'a, B: Backend> {
    layer: Layer<'a, B>,
    /// Shift, scale and gate, each `[batch, width]`.
    modulation: [Tensor<B, 2>; 3],
    recompute: bool,
}

enum Layer<'a, B: Backend> {
    Attention(&'a Attention<B>),
    Mlp(&'a Mlp<B>),
}

impl<B: FusedOps> Branch<'_, B> {
    /// `x` and what the branch adds to it.
    pub(super) fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let run = match self.recompute {
            true => B::branch,
            false => composed::<B>,
        };
        let (modulation, weights) = (self.modulation.clone(), self.layer.weights());
        run(x, modulation, weights, NORM_EPSILON)
    }
}

impl<B: FusedOps> Layer<'_, B> {
    fn weights(&self) -> BranchWeights<B> {
        match self {
            Layer::Attention(attn) => BranchWeights {
                first: attn.qkv.weights(),
                between: Between::Attention {
                    heads: attn.heads,
                    compute: attn.compute,
                },
                second: attn.proj.weights(),
            },
            Layer::Mlp(mlp) => BranchWeights {
                first: mlp.fc1.weights(),
                between: Between::Activation(Activation::GeluTanh),
                second: mlp.fc2.weights(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use burn_ndarray::NdArray;

    use crate::models::tests::{branches_left, shown};
    use crate::models::{Network, Prunable};
    use crate::trunk::Granularity;
    use crate::weights::{EmbeddedName, embedded};
    use burn::tensor::{Distribution, Tensor};

    #[test]
    fn a_model_without_branches_does_what_the_whole_does_when_they_are_skipped() {
        let device = Default::default();
        let checkpoint = embedded::checkpoint(EmbeddedName::DigitsTeacher).unwrap();
        let whole = checkpoint.network::<NdArray>(&device).unwrap();
        let kept = [0, 3, 6, 7, 9, 12, 22];
        let left = branches_left(whole.clone(), &kept);

        // Sizes, tensors and what a file shows agree.
        let architecture = left.architecture();
        let planned = checkpoint.architecture.keep(&kept, Granularity::Branch);
        assert_eq!(architecture, planned);
        assert_eq!(architecture.depth(), 6);
        assert_eq!(shown(&left), architecture);

        // Branches are taken out of what has lost some already, until a block is gone.
        let fewer = left.keep(&[1, 2, 3, 6]);
        assert_eq!(
            fewer.architecture(),
            planned.keep(&[1, 2, 3, 6], Granularity::Branch)
        );
        assert_eq!(fewer.architecture().depth(), 3);

        let attention = whole.by_branch().unwrap().keep(&[0, 2]);
        assert_eq!(shown(&attention), attention.architecture());
    }

    #[test]
    fn a_pair_adds_what_both_say_to_one_input() {
        let device = Default::default();
        let checkpoint = embedded::checkpoint(EmbeddedName::DigitsTeacher).unwrap();
        let whole = checkpoint.network::<NdArray>(&device).unwrap();
        let x = Tensor::<NdArray, 3>::random([2, 16, 64], Distribution::Default, &device);
        let condition = Tensor::random([2, 64], Distribution::Default, &device);
        let Network::Dit(model) = whole.clone().keep(&[3, 4, 7]) else {
            panic!("it is a DiT");
        };
        let single = |layer: usize| model.blocks[layer].forward(x.clone(), condition.clone());
        let expected = single(0) + single(1) - x.clone();
        let paired = whole.keep(&[3, 4, 7]).in_pairs().unwrap();
        let Network::Dit(model) = paired.clone() else {
            panic!("it is a DiT");
        };
        let found = model.blocks[0].forward(x.clone(), condition.clone());
        // Three sums in another order.
        assert!((found - expected).abs().max().into_scalar() < 1e-5);
        let last = model.blocks[1].forward(x.clone(), condition.clone());
        assert_eq!(last.into_data(), single(2).into_data());

        let architecture = paired.architecture();
        let planned = checkpoint.architecture.with_depth(3).in_pairs().unwrap();
        assert_eq!(architecture, planned);
        assert_eq!((architecture.depth(), paired.trunk().depth), (2, 2));
        let three = checkpoint.architecture.with_depth(3);
        assert_eq!(architecture.parameters(), three.parameters());
        assert_eq!(architecture.macs(), three.macs());
        assert_eq!(shown(&paired), architecture);
        assert!(paired.clone().by_branch().is_none());
        assert!(architecture.in_pairs().is_none());
        assert_eq!(paired.keep(&[0]).architecture().depth(), 1);
    }
}
