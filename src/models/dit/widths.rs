//! The widths within a diffusion transformer that is narrower in places.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{BlockKind, DitConfig};

/// How a `DiT` of facebookresearch/DiT is given the widths of a model that was pruned in width.
pub(in crate::models) const WIDTHS_IN_PYTORCH: &str = r#"Some of its layers are narrower than usual. A `DiT` of the original code, of the sizes in `config.json`, is given such layers;
its `hidden_size` is `width`, and any `num_heads` that divides it will do, since each block is told its own:

```python
import json, types, torch
from torch.nn.functional import scaled_dot_product_attention

def attend(self, x):
    q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

def resize(layers, name, rows=None, columns=None):
    old = getattr(layers, name)
    setattr(layers, name, torch.nn.Linear(columns or old.in_features, rows or old.out_features))

widths = json.load(open("config.json"))["widths"]
condition, timestep = widths["condition"], widths["timestep"]
resize(model.t_embedder.mlp, "0", rows=timestep)
resize(model.t_embedder.mlp, "2", rows=condition, columns=timestep)
labels = model.y_embedder.embedding_table.num_embeddings
model.y_embedder.embedding_table = torch.nn.Embedding(labels, condition)
modulated = [module for module in model.modules() if hasattr(module, "adaLN_modulation")]
for module in modulated:
    resize(module.adaLN_modulation, "1", columns=condition)
for block, of in zip(modulated, widths["blocks"]):
    if hasattr(block, "attn"):
        width = of["heads"] * of["head_dim"]
        resize(block.attn, "qkv", rows=3 * width)
        resize(block.attn, "proj", columns=width)
        block.attn.num_heads = of["heads"]
        block.attn.forward = types.MethodType(attend, block.attn)
    if hasattr(block, "mlp"):
        resize(block.mlp, "fc1", rows=of["hidden"])
        resize(block.mlp, "fc2", columns=of["hidden"])
```"#;

/// Greatest width of the trunk, a condition or a head.
const MOST_WIDTH: usize = 65_536;
/// Greatest hidden width of an MLP.
const MOST_HIDDEN: usize = 64 * MOST_WIDTH;
/// Most heads of a block.
const MOST_HEADS: usize = 1024;

/// Widths within a network that was pruned in width.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Widths {
    /// Width of the condition.
    pub condition: usize,
    /// Hidden width of the timestep embedder.
    pub timestep: usize,
    /// Widths of each block in order, those of a pair one after the other.
    pub blocks: Vec<BlockWidths>,
}

impl fmt::Display for Widths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let range = |of: &dyn Fn(&BlockWidths) -> usize| {
            let all = || self.blocks.iter().map(of).filter(|width| *width > 0);
            match (all().min(), all().max()) {
                (Some(least), Some(most)) if least < most => format!("{least} to {most}"),
                (Some(width), _) => width.to_string(),
                _ => "no".into(),
            }
        };
        write!(
            f,
            "{} heads of {}, MLP {}, condition {}",
            range(&|block| block.heads),
            range(&|block| block.head_dim),
            range(&|block| block.hidden),
            self.condition
        )
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
}

impl DitConfig {
    /// The widths within the network, whether or not they follow from its other sizes.
    pub fn widths(&self) -> Widths {
        self.widths.clone().unwrap_or_else(|| self.usual_widths())
    }

    /// The widths that follow from the other sizes.
    fn usual_widths(&self) -> Widths {
        let usual = BlockWidths {
            heads: self.heads,
            head_dim: self.width / self.heads.max(1),
            hidden: self.hidden(),
        };
        let blocks = self.kinds().flat_map(|kind| {
            let widths = usual.of(kind);
            std::iter::repeat_n(widths, kind.blocks())
        });
        Widths {
            condition: self.width,
            timestep: self.width,
            blocks: blocks.collect(),
        }
    }

    /// The same with these widths, which are left out where they follow from the other sizes.
    pub(super) fn of_widths(&self, widths: Widths) -> Self {
        let usual = widths == self.usual_widths();
        Self {
            widths: (!usual).then_some(widths),
            ..self.clone()
        }
    }

    /// Why no network can have its widths, if so.
    pub(super) fn problem_of_widths(&self) -> Option<String> {
        let widths = self.widths.as_ref()?;
        let blocks = self.kinds().map(BlockKind::blocks).sum::<usize>();
        if widths.blocks.len() != blocks {
            return Some(format!(
                "widths of {} blocks are given, and there are {blocks}",
                widths.blocks.len()
            ));
        }
        let named = self.named_blocks();
        let of_blocks = named.iter().flat_map(|(name, kind, widths)| {
            let BlockWidths {
                heads,
                head_dim,
                hidden,
            } = *widths;
            let (attention, mlp) = (kind.attention(), kind.mlp());
            [
                (format!("heads of {name}"), heads, MOST_HEADS, attention),
                (
                    format!("head_dim of {name}"),
                    head_dim,
                    MOST_WIDTH,
                    attention,
                ),
                (
                    format!("the attention of {name}"),
                    heads.saturating_mul(head_dim),
                    MOST_WIDTH,
                    attention,
                ),
                (format!("hidden of {name}"), hidden, MOST_HIDDEN, mlp),
            ]
        });
        let all = [
            ("width".to_owned(), self.width, MOST_WIDTH, true),
            ("condition".to_owned(), widths.condition, MOST_WIDTH, true),
            ("timestep".to_owned(), widths.timestep, MOST_WIDTH, true),
        ];
        let mut all = all.into_iter().chain(of_blocks);
        let wrong = all.find(|(_, width, most, there)| match there {
            true => *width == 0 || width > most,
            false => *width != 0,
        });
        wrong.map(|(name, width, most, there)| match there {
            true => format!("{name} is {width}, which must lie in 1..={most}"),
            false => format!("{name} is {width}, and the block has none"),
        })
    }

    /// The blocks in order, with the beginning of their tensors' names.
    pub(super) fn named_blocks(&self) -> Vec<(String, BlockKind, BlockWidths)> {
        let mut widths = self.widths().blocks.into_iter();
        let mut named = Vec::new();
        for (place, kind) in self.kinds().enumerate() {
            for block in 0..kind.blocks() {
                let name = match kind {
                    BlockKind::Pair => format!("blocks.{place}.{block}"),
                    _ => format!("blocks.{place}"),
                };
                named.push((name, kind, widths.next().unwrap_or_default()));
            }
        }
        named
    }

    /// Whether all blocks have as many heads as the network says.
    pub(in crate::models) fn has_heads_alike(&self) -> bool {
        let widths = self.widths();
        let mut heads = widths.blocks.iter().map(|block| block.heads);
        heads.all(|heads| heads == 0 || heads == self.heads)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, Tensor};
    use burn_ndarray::NdArray;

    use super::*;
    use crate::models::{
        Architecture, ChannelGroup, Denoiser, Heads, Left, Network, Part, Prunable,
    };
    use crate::pruning::{Leaves, kept_channels, left_of, units, without};
    use crate::state::{StateDict, assign, collect, floats};
    use crate::trunk::{Granularity, Plain};
    use crate::weights::{Checkpoint, EmbeddedName, Provenance, embedded};

    /// The digits teacher with so many units of each group, the last of each.
    fn narrowed(keep: impl Fn(&ChannelGroup, usize) -> usize, leaves: Leaves) -> Network<NdArray> {
        let checkpoint = embedded::checkpoint(EmbeddedName::DigitsTeacher).unwrap();
        let groups = checkpoint.architecture.channel_groups().unwrap();
        let (mut kept, mut left) = (Vec::new(), Vec::new());
        for group in &groups {
            let (units, _) = units(group, leaves);
            let keep = keep(group, units);
            let ranked: Vec<f64> = (0..units).map(|unit| unit as f64).collect();
            kept.push(kept_channels(group, &ranked, keep, leaves));
            left.push(left_of(group, keep, leaves));
        }
        let weights = without(checkpoint.tensors.read_all().unwrap(), &groups, &kept);
        filled(&checkpoint.architecture.narrowed(&left), &weights)
    }

    fn filled(architecture: &Architecture, weights: &StateDict) -> Network<NdArray> {
        let zeros = Network::zeros(architecture, &Default::default()).unwrap();
        let network = assign(zeros, weights, "x".as_ref(), "it").unwrap();
        assert_eq!(network.architecture(), *architecture);
        assert_eq!(architecture.problem(), None);
        network
    }

    /// What its tensors show, with its heads.
    fn shown(network: &Network<NdArray>) -> Architecture {
        let heads = Heads {
            known: network.architecture().heads(),
            otherwise: None,
        };
        let state = collect::<NdArray, _>(network).into();
        Architecture::of_tensors(&state, heads, "x".as_ref()).unwrap()
    }

    #[test]
    fn a_narrower_network_is_known_by_its_tensors() {
        let half = narrowed(
            |group, units| match group.part {
                Part::Stream => units,
                _ => units / 2,
            },
            Leaves::Dims,
        );
        let shown_half = shown(&half);
        // As many hidden units in all blocks are a ratio, which no tensor tells from another.
        assert_eq!(shown_half.tensors(), half.architecture().tensors());
        assert_eq!(shown_half.macs(), half.architecture().macs());
        let text = half.architecture().to_string();
        assert!(
            text.contains("width 64, 4 heads of 8, MLP 128, condition 32"),
            "{text}"
        );
        // The stream too; blocks and branches leave, and blocks run in pairs.
        let all = narrowed(|_, units| units * 3 / 4, Leaves::Dims);
        assert_eq!(all.architecture().states(), Some([16, 48]));
        assert_eq!(shown(&all).tensors(), all.architecture().tensors());
        let fewer = all.clone().keep(&[1, 5]);
        let planned = all.architecture().keep(&[1, 5], Granularity::Block);
        assert_eq!(fewer.architecture(), planned);
        let branches = all.clone().by_branch().unwrap().keep(&[1, 2, 3, 6]);
        let planned = all.architecture().keep(&[1, 2, 3, 6], Granularity::Branch);
        assert_eq!(branches.architecture(), planned);
        assert_eq!(shown(&branches).tensors(), planned.tensors());
        let pairs = all.clone().in_pairs().unwrap();
        assert_eq!(pairs.architecture(), all.architecture().in_pairs().unwrap());
        assert_eq!(shown(&pairs).tensors(), pairs.architecture().tensors());
    }

    #[test]
    fn whole_heads_leave_and_each_block_says_how_many() {
        // One head of the first block, two of the others.
        let fewer = narrowed(
            |group, units| match group.part {
                Part::Attention if group.root.starts_with("blocks.0.") => 1,
                Part::Attention => 2,
                _ => units,
            },
            Leaves::Heads,
        );
        let text = fewer.architecture().to_string();
        assert!(text.contains("1 to 2 heads of 16, MLP 256"), "{text}");
        let written = serde_json::to_string(&fewer.architecture()).unwrap();
        let read: Architecture = serde_json::from_str(&written).unwrap();
        assert_eq!(read, fewer.architecture());
    }

    #[test]
    fn heads_that_do_not_divide_what_is_left_are_read_back() {
        // 4 of 6 heads of 64: their 256 channels are no six heads.
        let config = DitConfig {
            width: 384,
            heads: 6,
            depth: 1,
            ..digits()
        };
        let whole = Architecture::Dit(config);
        let groups = whole.channel_groups().unwrap();
        let keep = |group: &ChannelGroup| match group.part {
            Part::Attention => 4,
            _ => units(group, Leaves::Heads).0,
        };
        let left: Vec<Left> = (groups.iter())
            .map(|group| left_of(group, keep(group), Leaves::Heads))
            .collect();
        let narrow = whole.narrowed(&left);
        assert_eq!(narrow.heads(), Some(4));
        assert!(narrow.is_shown_with_heads());
        let zeros = Network::<NdArray>::zeros(&narrow, &Default::default()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("narrow.safetensors");
        let written = Checkpoint::of(&zeros, Provenance::default(), &path);
        written.write().unwrap();
        assert_eq!(Checkpoint::read(&path).unwrap().architecture, narrow);
        // Without its metadata the published model of the width does not say its heads.
        let bare = Architecture::of_tensors(&written.tensors, Heads::default(), &path);
        assert!(bare.unwrap_err().to_string().contains("number of heads"));
    }

    fn digits() -> DitConfig {
        let checkpoint = embedded::checkpoint(EmbeddedName::DigitsTeacher).unwrap();
        match checkpoint.architecture {
            Architecture::Dit(config) => config,
            other => panic!("it is a {other}"),
        }
    }

    #[test]
    fn channels_without_weights_leave_without_a_trace() {
        // What leaves had no part in anything: half of each group is set to 0 before.
        let checkpoint = embedded::checkpoint(EmbeddedName::DigitsTeacher).unwrap();
        let groups = checkpoint.architecture.channel_groups().unwrap();
        let mut weights = checkpoint.tensors.read_all().unwrap();
        let inner = |group: &ChannelGroup| matches!(group.part, Part::Mlp | Part::Attention);
        let (mut kept, mut left) = (Vec::new(), Vec::new());
        for group in &groups {
            let (units, _) = units(group, Leaves::Heads);
            let keep = if inner(group) { units / 2 } else { units };
            let ranked: Vec<f64> = (0..units).map(|unit| unit as f64).collect();
            let stays = kept_channels(group, &ranked, keep, Leaves::Heads);
            // Where the channels are inputs, the first member of attention and the last of an MLP.
            let columns = group.members.iter().filter(|member| member.dim == 1);
            for member in columns.filter(|_| inner(group)) {
                let array = weights.get_mut(&member.tensor).unwrap();
                let width = array.shape[1];
                for (at, value) in array.data.iter_mut().enumerate() {
                    if !stays.contains(&(at % width)) {
                        *value = 0.0;
                    }
                }
            }
            kept.push(stays);
            left.push(left_of(group, keep, Leaves::Heads));
        }
        let whole = filled(&checkpoint.architecture, &weights);
        let narrow = filled(
            &checkpoint.architecture.narrowed(&left),
            &without(weights, &groups, &kept),
        );
        let device = Default::default();
        let x = Tensor::random([2, 1, 8, 8], Distribution::Normal(0.0, 1.0), &device);
        let run = |network: &Network<NdArray>| {
            let t = Tensor::from_floats([20.0, 900.0], &device);
            let y = Tensor::from_ints([1, 10], &device);
            floats(network.forward(x.clone(), t, y, &mut Plain).into_data())
        };
        let (whole, narrow) = (run(&whole), run(&narrow));
        // Sums without their zeros, in another order.
        assert!(whole.iter().zip(&narrow).all(|(a, b)| (a - b).abs() < 1e-4));
    }

    #[test]
    fn widths_that_can_not_be_are_refused() {
        let config = digits();
        let problem = |change: &dyn Fn(&mut Widths)| {
            let mut widths = config.widths();
            change(&mut widths);
            let config = DitConfig {
                widths: Some(widths),
                ..config.clone()
            };
            config.problem().unwrap()
        };
        assert_eq!(
            problem(&|widths| widths.blocks.truncate(3)),
            "widths of 3 blocks are given, and there are 12"
        );
        assert_eq!(
            problem(&|widths| widths.condition = 0),
            "condition is 0, which must lie in 1..=65536"
        );
        assert_eq!(
            problem(&|widths| widths.blocks[2].head_dim = usize::MAX),
            format!(
                "head_dim of blocks.2 is {}, which must lie in 1..=65536",
                usize::MAX
            )
        );
    }
}
