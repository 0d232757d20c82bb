//! The widths within a diffusion transformer that is narrower in places.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::DitConfig;
use crate::models::blocks::{self, BlockKind, BlockWidths, MOST_WIDTH};

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
        let blocks = blocks::in_words(&self.blocks);
        write!(f, "{blocks}, condition {}", self.condition)
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
        // Heads that do not divide the width do not follow from it.
        let divides = self.width.is_multiple_of(self.heads.max(1));
        let usual = divides && widths == self.usual_widths();
        Self {
            widths: (!usual).then_some(widths),
            ..self.clone()
        }
    }

    /// Why no network can have its widths, if so.
    pub(super) fn problem_of_widths(&self) -> Option<String> {
        let widths = self.widths.as_ref()?;
        let count = self.kinds().map(BlockKind::blocks).sum::<usize>();
        if widths.blocks.len() != count {
            return Some(format!(
                "widths of {} blocks are given, and there are {count}",
                widths.blocks.len()
            ));
        }
        let others = [
            ("width", self.width),
            ("condition", widths.condition),
            ("timestep", widths.timestep),
        ];
        let mut others = others.into_iter();
        let problem = others.find_map(|(name, width)| blocks::problem_of(name, width, MOST_WIDTH));
        problem.or_else(|| blocks::problem(&self.named_blocks()))
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
    use burn_ndarray::NdArray;

    use super::*;
    use crate::models::tests::{leave_without_a_trace, narrowed, shown};
    use crate::models::{Architecture, ChannelGroup, Heads, Left, Network, Part, Prunable};
    use crate::pruning::{Leaves, left_of, units};
    use crate::trunk::Granularity;
    use crate::weights::{Checkpoint, EmbeddedName, Provenance, embedded};

    /// The digits teacher with so many units of each group, the last of each.
    fn of_teacher(
        keep: impl Fn(&ChannelGroup, usize) -> usize,
        leaves: Leaves,
    ) -> Network<NdArray> {
        let checkpoint = embedded::checkpoint(EmbeddedName::DigitsTeacher).unwrap();
        let weights = checkpoint.tensors.read_all().unwrap();
        narrowed((&checkpoint.architecture, &weights), keep, leaves)
    }

    #[test]
    fn a_narrower_network_is_known_by_its_tensors() {
        let half = of_teacher(
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
        let all = of_teacher(|_, units| units * 3 / 4, Leaves::Dims);
        assert_eq!(all.architecture().states(), Some([16, 48]));
        assert_eq!(shown(&all).tensors(), all.architecture().tensors());
        // A stream of half the condition's width, whose modulation a single branch has half of.
        let stream = of_teacher(
            |group, units| match group.part {
                Part::Stream => units / 2,
                _ => units,
            },
            Leaves::Dims,
        );
        assert_eq!(shown(&stream).tensors(), stream.architecture().tensors());
        let branches = stream.by_branch().unwrap().keep(&[1, 2, 3, 6]);
        assert_eq!(
            shown(&branches).tensors(),
            branches.architecture().tensors()
        );
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
        let fewer = of_teacher(
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
        let checkpoint = embedded::checkpoint(EmbeddedName::DigitsTeacher).unwrap();
        let weights = checkpoint.tensors.read_all().unwrap();
        leave_without_a_trace(&checkpoint.architecture, weights);
    }

    #[test]
    fn heads_need_not_divide_what_is_left_of_the_stream() {
        let config = DitConfig {
            width: 40,
            heads: 6,
            ..digits()
        };
        // As wide as they would be if six heads of 6 were 40.
        let narrow = config.of_widths(config.usual_widths());
        assert_eq!(narrow.problem(), None);
        assert!(narrow.to_string().contains("6 heads of 6"));
        assert!(config.problem().is_some());
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
