//! What stands at the places of a trunk, of any family of transformers: whole blocks, blocks of one
//! branch, and pairs.

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use serde::{Deserialize, Serialize};

use crate::backend::Compute;
use crate::ops::{FusedOps, Linear};
use crate::trunk::Granularity;

/// Greatest width of a trunk, a condition or a head.
pub(super) const MOST_WIDTH: usize = 65_536;
/// Greatest hidden width of an MLP.
const MOST_HIDDEN: usize = 64 * MOST_WIDTH;
/// Most heads of a block.
const MOST_HEADS: usize = 1024;

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

/// Widths within a block; 0 of a branch that it lacks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockWidths {
    /// Attention heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Hidden width of the MLP.
    pub hidden: usize,
}

impl BlockWidths {
    /// Width of all heads together.
    pub fn attention(self) -> usize {
        self.heads * self.head_dim
    }

    /// Those of the branches that a block of this kind has.
    pub(super) fn of(self, kind: BlockKind) -> Self {
        let Self {
            heads,
            head_dim,
            hidden,
        } = self;
        let (heads, head_dim) = match kind.attention() {
            true => (heads, head_dim),
            false => (0, 0),
        };
        let hidden = if kind.mlp() { hidden } else { 0 };
        Self {
            heads,
            head_dim,
            hidden,
        }
    }

    /// Those of a block with these branches.
    pub(super) fn measured<B: Backend>(
        attention: Option<&Attention<B>>,
        mlp: Option<&Mlp<B>>,
    ) -> Self {
        let attention = attention.map(|attn| {
            let width = attn.proj.layout().input;
            (attn.heads, width / attn.heads.max(1))
        });
        let (heads, head_dim) = attention.unwrap_or_default();
        Self {
            heads,
            head_dim,
            hidden: mlp.map_or(0, |mlp| mlp.fc2.layout().input),
        }
    }
}

/// What stands at a place, and how wide it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) kind: BlockKind,
    /// Of each of its blocks.
    pub(super) within: Vec<BlockWidths>,
}

/// What stands at places of these kinds, whose blocks have these widths, in order; what is missing
/// has a width of 0.
pub(super) fn standing(
    kinds: impl IntoIterator<Item = BlockKind>,
    widths: &mut impl Iterator<Item = BlockWidths>,
) -> Vec<Standing> {
    let mut next = || widths.next().unwrap_or_default();
    let kinds = kinds.into_iter();
    let places = kinds.map(|kind| Standing {
        kind,
        within: (0..kind.blocks()).map(|_| next()).collect(),
    });
    places.collect()
}

/// The same kind at all places: none need be listed.
pub(super) fn listed(kinds: Vec<BlockKind>) -> Vec<BlockKind> {
    match kinds.iter().all(|kind| *kind == BlockKind::Whole) {
        true => Vec::new(),
        false => kinds,
    }
}

/// The layers of such a trunk; None by branch where blocks run in pairs, whose branches are not one
/// after another.
pub(super) fn layers(
    kinds: impl IntoIterator<Item = BlockKind>,
    granularity: Granularity,
) -> Option<usize> {
    kinds.into_iter().try_fold(0, |sum, kind| {
        Some(match granularity {
            Granularity::Block => sum + 1,
            Granularity::Branch if kind == BlockKind::Pair => return None,
            Granularity::Branch => sum + kind.branches(),
        })
    })
}

/// What is left of a trunk when of its layers those stay that `stays` says of each in turn.
pub(super) fn keep(
    places: Vec<Standing>,
    mut stays: impl FnMut() -> bool,
    granularity: Granularity,
) -> Vec<Standing> {
    let left = places.into_iter().filter_map(|Standing { kind, within }| {
        let kind = match granularity {
            Granularity::Block => stays().then_some(kind),
            Granularity::Branch => {
                let attention = kind.attention() && stays();
                BlockKind::new(attention, kind.mlp() && stays())
            }
        }?;
        let within = within.into_iter().map(|widths| widths.of(kind)).collect();
        Some(Standing { kind, within })
    });
    left.collect()
}

/// Neighbouring blocks in pairs; a last one without a neighbour stays alone.
pub(super) fn in_pairs(depth: usize) -> Vec<BlockKind> {
    let pairs = vec![BlockKind::Pair; depth / 2];
    let alone = vec![BlockKind::Whole; depth % 2];
    [pairs, alone].concat()
}

/// A block, with the beginning of its tensors' names.
#[derive(Clone)]
pub(super) struct Named {
    pub(super) name: String,
    pub(super) kind: BlockKind,
    pub(super) widths: BlockWidths,
}

/// The blocks of a trunk that is called `trunk`, in order.
pub(super) fn named(trunk: &str, places: &[Standing]) -> Vec<Named> {
    let blocks = places.iter().enumerate().flat_map(|(place, standing)| {
        let kind = standing.kind;
        (standing.within.iter().enumerate()).map(move |(block, &widths)| Named {
            name: match kind {
                BlockKind::Pair => format!("{trunk}.{place}.{block}"),
                _ => format!("{trunk}.{place}"),
            },
            kind,
            widths,
        })
    });
    blocks.collect()
}

/// Why no block can have its widths, if so.
pub(super) fn problem(blocks: &[Named]) -> Option<String> {
    let all = blocks.iter().flat_map(|Named { name, kind, widths }| {
        let BlockWidths {
            heads,
            head_dim,
            hidden,
        } = *widths;
        let attention = heads.saturating_mul(head_dim);
        let (has_attention, has_mlp) = (kind.attention(), kind.mlp());
        [
            (format!("heads of {name}"), heads, MOST_HEADS, has_attention),
            (
                format!("head_dim of {name}"),
                head_dim,
                MOST_WIDTH,
                has_attention,
            ),
            (
                format!("the attention of {name}"),
                attention,
                MOST_WIDTH,
                has_attention,
            ),
            (format!("hidden of {name}"), hidden, MOST_HIDDEN, has_mlp),
        ]
    });
    let mut problems = all.filter_map(|(name, width, most, there)| match there {
        true => problem_of(&name, width, most),
        false => (width != 0).then(|| format!("{name} is {width}, and the block has none")),
    });
    problems.next()
}

/// Why nothing can be so wide, if so.
pub(super) fn problem_of(name: &str, width: usize, most: usize) -> Option<String> {
    (width == 0 || width > most).then(|| format!("{name} is {width}, which must lie in 1..={most}"))
}

/// How many places of a trunk are pairs, and how many branches it lacks, where it is not one of
/// whole blocks: with a space before.
pub(super) fn described(kinds: impl IntoIterator<Item = BlockKind>) -> String {
    let kinds: Vec<BlockKind> = kinds.into_iter().collect();
    let (depth, mut said) = (kinds.len(), String::new());
    let pairs = kinds.iter().filter(|kind| **kind == BlockKind::Pair);
    let pairs = pairs.count();
    if pairs > 0 {
        said += &format!(" ({pairs} of them pairs)");
    }
    let branches: usize = kinds.iter().map(|kind| kind.branches()).sum();
    if branches < 2 * depth {
        said += &format!(" ({branches} of {} branches)", 2 * depth);
    }
    said
}

/// The widths of blocks in words.
pub(super) fn in_words(blocks: &[BlockWidths]) -> String {
    format!(
        "{} heads of {}, MLP {}",
        range(blocks.iter().map(|block| block.heads)),
        range(blocks.iter().map(|block| block.head_dim)),
        range(blocks.iter().map(|block| block.hidden))
    )
}

/// From the least to the most of some widths, but for those of 0.
pub(super) fn range(widths: impl Iterator<Item = usize> + Clone) -> String {
    let there = widths.filter(|width| *width > 0);
    match (there.clone().min(), there.max()) {
        (Some(least), Some(most)) if least < most => format!("{least} to {most}"),
        (Some(width), _) => width.to_string(),
        _ => "no".into(),
    }
}

/// What any family's `enum` of places can do: `One` block or a `Pair` of them, which have a `kind`,
/// and of which `keep` leaves only some branches. Burn's modules can't be generic over the type of
/// their blocks where these are an enum's variants.
macro_rules! places {
    ($places:ident of $block:ident) => {
        impl<B: Backend> $places<B> {
            /// The place of a block, or of a pair of them.
            pub(super) fn new(kind: BlockKind, mut block: impl FnMut(usize) -> $block<B>) -> Self {
                match kind {
                    BlockKind::Pair => Self::Pair(vec![block(0), block(1)]),
                    _ => Self::One(block(0)),
                }
            }

            pub(super) fn kind(&self) -> BlockKind {
                match self {
                    Self::One(block) => block.kind(),
                    Self::Pair(_) => BlockKind::Pair,
                }
            }

            /// The block, or the blocks.
            pub fn blocks(&self) -> &[$block<B>] {
                match self {
                    Self::One(block) => std::slice::from_ref(block),
                    Self::Pair(blocks) => blocks,
                }
            }

            pub(super) fn blocks_mut(&mut self) -> &mut [$block<B>] {
                match self {
                    Self::One(block) => std::slice::from_mut(block),
                    Self::Pair(blocks) => blocks,
                }
            }

            /// Those of the layers that stay, of which `stays` says it in turn.
            pub(super) fn keep(
                places: Vec<Self>,
                mut stays: impl FnMut() -> bool,
                granularity: Granularity,
            ) -> Vec<Self> {
                let left = places
                    .into_iter()
                    .filter_map(|place| match (granularity, place) {
                        (Granularity::Branch, Self::One(block)) => {
                            let branches = block.kind().branches();
                            let kept: Vec<bool> = (0..branches).map(|_| stays()).collect();
                            block.keep(&kept).map(Self::One)
                        }
                        (_, place) => stays().then_some(place),
                    });
                left.collect()
            }

            /// The blocks in pairs; a last one without a neighbour stays alone.
            pub(super) fn in_pairs(places: Vec<Self>) -> Vec<Self> {
                let mut blocks = places.into_iter().flat_map(|place| match place {
                    Self::One(block) => vec![block],
                    Self::Pair(blocks) => blocks,
                });
                let mut paired = Vec::new();
                while let Some(block) = blocks.next() {
                    paired.push(match blocks.next() {
                        Some(next) => Self::Pair(vec![block, next]),
                        None => Self::One(block),
                    });
                }
                paired
            }
        }
    };
}
pub(super) use places;

/// What all blocks of a place add to one input: `outputs` are those of each on `x`.
pub(super) fn side_by_side<B: Backend>(
    x: Tensor<B, 3>,
    outputs: impl Iterator<Item = Tensor<B, 3>>,
) -> Tensor<B, 3> {
    let said = outputs.map(|output| output - x.clone());
    said.fold(x.clone(), |sum, said| sum + said)
}

/// Multi-head self-attention with one fused projection.
#[derive(Module, Debug)]
pub struct Attention<B: Backend> {
    /// Queries, keys and values, in that order.
    pub qkv: Linear<B>,
    /// Output projection.
    pub proj: Linear<B>,
    pub(super) heads: usize,
    #[module(skip)]
    pub(super) compute: Compute,
}

impl<B: Backend> Attention<B> {
    /// For states of `width`.
    pub(super) fn zeros(width: usize, within: BlockWidths, device: &B::Device) -> Self {
        let attention = within.attention();
        Self {
            qkv: Linear::zeros(width, 3 * attention, device),
            proj: Linear::zeros(attention, width, device),
            heads: within.heads,
            compute: Compute::F32,
        }
    }
}

impl<B: FusedOps> Attention<B> {
    /// `[batch, tokens, width]`
    pub(super) fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
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

impl<B: Backend> Mlp<B> {
    pub(super) fn zeros(width: usize, hidden: usize, device: &B::Device) -> Self {
        Self {
            fc1: Linear::zeros(width, hidden, device),
            fc2: Linear::zeros(hidden, width, device),
        }
    }
}
