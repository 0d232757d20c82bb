//! The blocks of a DiT's trunk, and the two branches of each.

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use serde::{Deserialize, Serialize};

use super::{BlockWidths, NORM_EPSILON};
use crate::backend::Compute;
use crate::ops::branch::composed;
use crate::ops::{Activation, Between, BranchWeights, FusedOps, Linear, split};

/// What stands at a place of the trunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockKind {
    /// A block: its attention, and then its MLP.
    Whole,
    /// A block of an attention alone.
    Attention,
    /// A block of an MLP alone.
    Mlp,
    /// Two whole blocks side by side on one input, to which both add what they say (Grafting, arXiv
    /// 2506.05340).
    Pair,
}

impl BlockKind {
    /// A block with the given branches; None with neither.
    pub fn new(attention: bool, mlp: bool) -> Option<Self> {
        match (attention, mlp) {
            (true, true) => Some(Self::Whole),
            (true, false) => Some(Self::Attention),
            (false, true) => Some(Self::Mlp),
            (false, false) => None,
        }
    }

    /// Whether its blocks have an attention.
    pub fn attention(self) -> bool {
        self != Self::Mlp
    }

    /// Whether its blocks have an MLP.
    pub fn mlp(self) -> bool {
        self != Self::Attention
    }

    /// Branches of each of its blocks.
    pub fn branches(self) -> usize {
        usize::from(self.attention()) + usize::from(self.mlp())
    }

    /// How many blocks there are.
    pub fn blocks(self) -> usize {
        if self == Self::Pair { 2 } else { 1 }
    }
}

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

impl<B: Backend> Place<B> {
    pub(super) fn new(kind: BlockKind, block: &mut impl FnMut(BlockKind) -> DitBlock<B>) -> Self {
        match kind {
            BlockKind::Pair => Self::Pair(vec![block(kind), block(kind)]),
            _ => Self::One(block(kind)),
        }
    }

    pub(super) fn kind(&self) -> BlockKind {
        match self {
            Self::One(block) => block.kind(),
            Self::Pair(_) => BlockKind::Pair,
        }
    }

    /// The block, or the blocks.
    pub fn blocks(&self) -> &[DitBlock<B>] {
        match self {
            Self::One(block) => std::slice::from_ref(block),
            Self::Pair(blocks) => blocks,
        }
    }

    pub(super) fn blocks_mut(&mut self) -> &mut [DitBlock<B>] {
        match self {
            Self::One(block) => std::slice::from_mut(block),
            Self::Pair(blocks) => blocks,
        }
    }
}

impl<B: FusedOps> Place<B> {
    /// `x` is `[batch, tokens, width]`, `condition` (after its SiLU) `[batch, width]`.
    pub fn forward(&self, x: Tensor<B, 3>, condition: Tensor<B, 2>) -> Tensor<B, 3> {
        match self {
            Self::One(block) => block.forward(x, condition),
            Self::Pair(blocks) => {
                let outputs = blocks
                    .iter()
                    .map(|block| block.forward(x.clone(), condition.clone()));
                let said = outputs.map(|output| output - x.clone());
                said.fold(x.clone(), |sum, said| sum + said)
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
        let (attention, hidden) = (within.attention(), within.hidden);
        Self {
            attn: (kind.attention())
                .then(|| Attention::zeros([width, attention], within.heads, device)),
            mlp: kind.mlp().then(|| Mlp {
                fc1: Linear::zeros(width, hidden, device),
                fc2: Linear::zeros(hidden, width, device),
            }),
            modulation: Linear::zeros(condition, 3 * kind.branches() * width, device),
            recompute: false,
        }
    }

    pub(super) fn widths(&self) -> BlockWidths {
        let attention = self.attn.as_ref().map(|attn| {
            let width = attn.proj.layout().input;
            (attn.heads, width / attn.heads.max(1))
        });
        let (heads, head_dim) = attention.unwrap_or_default();
        let mlp = self.mlp.as_ref();
        let hidden = mlp.map_or(0, |mlp| mlp.fc2.layout().input);
        BlockWidths {
            heads,
            head_dim,
            hidden,
        }
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

/// Multi-head self-attention with one fused projection.
#[derive(Module, Debug)]
pub struct Attention<B: Backend> {
    /// Queries, keys and values, in that order.
    pub qkv: Linear<B>,
    /// Output projection.
    pub proj: Linear<B>,
    heads: usize,
    #[module(skip)]
    pub(in crate::models) compute: Compute,
}

impl<B: Backend> Attention<B> {
    /// For states of `width`, with heads that are `attention` wide together.
    pub(in crate::models) fn zeros(
        [width, attention]: [usize; 2],
        heads: usize,
        device: &B::Device,
    ) -> Self {
        Self {
            qkv: Linear::zeros(width, 3 * attention, device),
            proj: Linear::zeros(attention, width, device),
            heads,
            compute: Compute::F32,
        }
    }
}

impl<B: FusedOps> Attention<B> {
    /// `[batch, tokens, width]`
    pub(in crate::models) fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let mixed = B::qkv_attention(self.qkv.forward(x), self.heads, self.compute);
        self.proj.forward(mixed)
    }
}

/// Two linear layers with a GELU between.
#[derive(Module, Debug)]
pub struct Mlp<B: Backend> {
    /// Width to hidden.
    pub fc1: Linear<B>,
    /// Hidden to width.
    pub fc2: Linear<B>,
}

#[cfg(test)]
mod tests {
    use burn_ndarray::NdArray;

    use crate::models::{Architecture, Denoiser, Heads, Network, Prunable};
    use crate::state::{collect, floats};
    use crate::trunk::{Block, BlockHook, Granularity, Plain, Site};
    use crate::weights::{EmbeddedName, embedded};
    use burn::tensor::{Distribution, Tensor};

    /// Runs the layers of a list and no others.
    struct Only(Vec<usize>);

    impl BlockHook<NdArray> for Only {
        fn around(
            &mut self,
            site: Site,
            x: Tensor<NdArray, 3>,
            block: Block<'_, NdArray>,
        ) -> Tensor<NdArray, 3> {
            match self.0.contains(&site.layer) {
                true => block(x),
                false => x,
            }
        }
    }

    /// What a file shows of a network; its tensors are those that its architecture names.
    fn read_back(network: &Network<NdArray>) -> Architecture {
        let architecture = network.architecture();
        let state = collect::<NdArray, _>(network);
        let mut named: Vec<_> = architecture.tensors();
        named.sort();
        let found = state
            .iter()
            .map(|(name, array)| (name.clone(), array.shape.clone()));
        assert_eq!(named, found.collect::<Vec<_>>());
        let heads = Heads {
            known: architecture.heads(),
            otherwise: None,
        };
        Architecture::of_tensors(&state.into(), heads, "x".as_ref()).unwrap()
    }

    #[test]
    fn a_model_without_branches_does_what_the_whole_does_when_they_are_skipped() {
        let device = Default::default();
        let checkpoint = embedded::checkpoint(EmbeddedName::DigitsTeacher).unwrap();
        let whole = checkpoint.network::<NdArray>(&device).unwrap();
        let x = Tensor::random([3, 1, 8, 8], Distribution::Normal(0.0, 1.0), &device);
        let t = Tensor::from_floats([3.0, 200.0, 999.0], &device);
        let y = Tensor::from_ints([0, 3, 10], &device);
        let run = |network: &Network<NdArray>, hook: &mut dyn BlockHook<NdArray>| {
            floats(
                network
                    .forward(x.clone(), t.clone(), y.clone(), hook)
                    .into_data(),
            )
        };
        let by_branch = whole.clone().by_branch().unwrap();
        assert_eq!(by_branch.trunk().depth, 24);
        // The same operations in the same order.
        assert_eq!(run(&whole, &mut Plain), run(&by_branch, &mut Plain));

        let kept = [0, 3, 6, 7, 9, 12, 22];
        let expected = run(&by_branch, &mut Only(kept.to_vec()));
        let left = by_branch.keep(&kept);
        assert_eq!(left.trunk().depth, kept.len());
        // Products of three rows of the modulation in place of six may be summed in another order.
        let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(near(&run(&left, &mut Plain), &expected));

        // Sizes, tensors and what a file shows agree.
        let architecture = left.architecture();
        let planned = checkpoint.architecture.keep(&kept, Granularity::Branch);
        assert_eq!(architecture, planned);
        assert_eq!(architecture.depth(), 6);
        assert_eq!(read_back(&left), architecture);

        // Branches are taken out of what has lost some already, until a block is gone.
        let fewer = left.keep(&[1, 2, 3, 6]);
        assert_eq!(
            fewer.architecture(),
            planned.keep(&[1, 2, 3, 6], Granularity::Branch)
        );
        assert_eq!(fewer.architecture().depth(), 3);

        let attention = whole.by_branch().unwrap().keep(&[0, 2]);
        assert_eq!(read_back(&attention), attention.architecture());
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
        assert_eq!(read_back(&paired), architecture);
        assert!(paired.clone().by_branch().is_none());
        assert!(architecture.in_pairs().is_none());
        assert_eq!(paired.keep(&[0]).architecture().depth(), 1);
    }
}
