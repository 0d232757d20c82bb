//! The widths within a MAR that is narrower in places.

use serde::{Deserialize, Serialize};

use super::MarConfig;
use crate::models::blocks::{self, BlockKind, BlockWidths, MOST_WIDTH};

/// How a `MAR` of LTH14/mar is given the blocks and widths of a model that is not as usual.
pub(in crate::models) const BLOCKS_IN_PYTORCH: &str = r#"Some of its layers are not as usual: narrower, without their attention or their MLP, or in pairs on one input. A `MAR` of the
original code, of the sizes in `config.json`, is given such layers. Where that file has `widths`, any number of heads that
divides those of the trunks will do, since each block is told its own:

```python
import copy, json, types, torch
from torch.nn.functional import scaled_dot_product_attention

class Pair(torch.nn.ModuleList):
    def forward(self, x):
        return self[0](x) + self[1](x) - x

def attention_alone(self, x):
    return x + self.attn(self.norm1(x))

def mlp_alone(self, x):
    return x + self.mlp(self.norm2(x))

def attend(self, x):
    q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

def resize(layers, name, rows=None, columns=None):
    old = getattr(layers, name)
    setattr(layers, name, torch.nn.Linear(columns or old.in_features, rows or old.out_features))

config = json.load(open("config.json"))
kinds, widths = iter(config.get("blocks", [])), config.get("widths")
blocks = []
for stack in (model.encoder_blocks, model.decoder_blocks):
    for i, block in enumerate(stack):
        kind = next(kinds, "whole")
        if kind == "pair":
            stack[i] = Pair([block, copy.deepcopy(block)])
            blocks += stack[i]
            continue
        if kind == "attention":
            del block.norm2, block.mlp
            block.forward = types.MethodType(attention_alone, block)
        elif kind == "mlp":
            del block.norm1, block.attn
            block.forward = types.MethodType(mlp_alone, block)
        blocks.append(block)
if widths:
    for block, of in zip(blocks, widths["blocks"]):
        if hasattr(block, "attn"):
            width = of["heads"] * of["head_dim"]
            resize(block.attn, "qkv", rows=3 * width)
            resize(block.attn, "proj", columns=width)
            block.attn.num_heads = of["heads"]
            block.attn.forward = types.MethodType(attend, block.attn)
        if hasattr(block, "mlp"):
            resize(block.mlp, "fc1", rows=of["hidden"])
            resize(block.mlp, "fc2", columns=of["hidden"])
    head, condition, timestep = model.diffloss.net, widths["condition"], widths["timestep"]
    resize(head.time_embed.mlp, "0", rows=timestep)
    resize(head.time_embed.mlp, "2", rows=condition, columns=timestep)
    resize(head, "cond_embed", rows=condition)
    for block in [*head.res_blocks, head.final_layer]:
        resize(block.adaLN_modulation, "1", columns=condition)
    for block, hidden in zip(head.res_blocks, widths["head"]):
        resize(block.mlp, "0", rows=hidden)
        resize(block.mlp, "2", columns=hidden)
```"#;

/// Widths within a network that was pruned in width.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Widths {
    /// Widths of each block of the encoder and then of the decoder in order, those of a pair one
    /// after the other.
    pub blocks: Vec<BlockWidths>,
    /// Width of the condition that modulates the head.
    pub condition: usize,
    /// Hidden width of its timestep embedder.
    pub timestep: usize,
    /// Hidden width of each of its blocks.
    pub head: Vec<usize>,
}

impl MarConfig {
    /// The widths within the network, whether or not they follow from its other sizes.
    pub fn widths(&self) -> Widths {
        self.widths.clone().unwrap_or_else(|| self.usual_widths())
    }

    /// The widths that follow from the other sizes.
    fn usual_widths(&self) -> Widths {
        let stacks = [self.encoder, self.decoder];
        let stacks = stacks.into_iter();
        let stacks = stacks.flat_map(|stack| std::iter::repeat_n(stack, stack.depth));
        let blocks = self.kinds().zip(stacks).flat_map(|(kind, stack)| {
            let widths = BlockWidths {
                heads: stack.heads,
                head_dim: stack.width / stack.heads.max(1),
                hidden: self.hidden(stack),
            };
            std::iter::repeat_n(widths.of(kind), kind.blocks())
        });
        Widths {
            blocks: blocks.collect(),
            condition: self.head_width,
            timestep: self.head_width,
            head: vec![self.head_width; self.head_depth],
        }
    }

    /// The same with these widths, which are left out where they follow from the other sizes.
    pub(super) fn of_widths(&self, widths: Widths) -> Self {
        // Heads that do not divide a trunk's width do not follow from it.
        let mut stacks = [self.encoder, self.decoder].into_iter();
        let divide = stacks.all(|stack| stack.width.is_multiple_of(stack.heads.max(1)));
        let usual = divide && widths == self.usual_widths();
        Self {
            widths: (!usual).then_some(widths),
            ..self.clone()
        }
    }

    /// Why no network can have its widths, if so.
    pub(super) fn problem_of_widths(&self) -> Option<String> {
        let widths = self.widths.as_ref()?;
        let blocks = self.kinds().map(BlockKind::blocks).sum::<usize>();
        let counts = [
            (widths.blocks.len(), blocks, "blocks"),
            (widths.head.len(), self.head_depth, "blocks of the head"),
        ];
        let wrong = counts.iter().find(|(given, there, _)| given != there);
        if let Some((given, there, what)) = wrong {
            return Some(format!(
                "widths of {given} {what} are given, and there are {there}"
            ));
        }
        let others = [
            ("condition".to_owned(), widths.condition),
            ("timestep".to_owned(), widths.timestep),
        ];
        let head = widths.head.iter().enumerate();
        let head = head.map(|(block, hidden)| (format!("hidden of the head's {block}"), *hidden));
        let mut all = others.into_iter().chain(head);
        let problem = all.find_map(|(name, width)| blocks::problem_of(&name, width, MOST_WIDTH));
        problem.or_else(|| blocks::problem(&self.named_blocks().concat()))
    }
}

impl MarConfig {
    /// Whether all blocks have as many heads, those that the network says.
    pub(in crate::models) fn has_heads_alike(&self) -> bool {
        let [encoder, decoder] = [self.encoder, self.decoder].map(|stack| stack.heads);
        let widths = self.widths();
        let mut heads = widths.blocks.iter().map(|block| block.heads);
        encoder == decoder && heads.all(|heads| heads == 0 || heads == encoder)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Stack;
    use super::*;
    use crate::models::tests::{drawn, leave_without_a_trace, narrowed, shown};
    use crate::models::{Architecture, ChannelGroup, Part, Prunable};
    use crate::pruning::Leaves;
    use crate::trunk::Granularity;

    fn small() -> MarConfig {
        let stack = |depth| Stack {
            width: 16,
            depth,
            heads: 4,
        };
        MarConfig {
            input_size: 4,
            patch_size: 1,
            channels: 2,
            classes: 3,
            buffer: 2,
            mlp_ratio: 2.0,
            encoder: stack(2),
            decoder: stack(3),
            head_width: 12,
            head_depth: 2,
            blocks: Vec::new(),
            widths: None,
        }
    }

    #[test]
    fn channels_without_weights_leave_without_a_trace() {
        let whole = Architecture::Mar(small());
        leave_without_a_trace(&whole, drawn(&whole));
    }

    #[test]
    fn a_narrower_network_is_known_by_its_tensors() {
        let architecture = Architecture::Mar(small());
        let weights = drawn(&architecture);
        // Each group counts its own channels, and no two share a place.
        let groups = architecture.channel_groups().unwrap();
        let mut places = std::collections::BTreeSet::new();
        for group in &groups {
            for member in &group.members {
                let tensor = &weights[&member.tensor];
                let most = member.offsets.iter().max().unwrap() + group.channels;
                assert_eq!(most, tensor.shape[member.dim], "{}", member.tensor);
                assert!(places.insert((&member.tensor, member.dim)));
            }
        }
        let keep = |group: &ChannelGroup, units: usize| match group.part {
            // The encoder becomes narrower than the decoder, and the head than it was.
            Part::Stream if group.root == "z_proj" => units / 2,
            _ => units * 3 / 4,
        };
        let all = narrowed((&architecture, &weights), keep, Leaves::Dims);
        let text = all.architecture().to_string();
        for part in [
            "2 layers of width 8 with 4 heads of 3, MLP 24",
            "3 layers of width 12 with 4 heads of 3, MLP 24",
            "head of 2 blocks of width 9, MLP 9, condition 9",
        ] {
            assert!(text.contains(part), "{text}");
        }
        // As many hidden units in all blocks are a ratio, which no tensor tells from another.
        assert_eq!(shown(&all).tensors(), all.architecture().tensors());
        assert_eq!(all.architecture().states(), None);
        // Blocks and branches leave, and blocks run in pairs.
        let fewer = all.clone().keep(&[1, 4]);
        let planned = all.architecture().keep(&[1, 4], Granularity::Block);
        assert_eq!(fewer.architecture(), planned);
        let branches = all.clone().by_branch().unwrap().keep(&[1, 2, 3, 7]);
        let planned = all.architecture().keep(&[1, 2, 3, 7], Granularity::Branch);
        assert_eq!(branches.architecture(), planned);
        assert_eq!(shown(&branches).tensors(), planned.tensors());
        let pairs = all.clone().in_pairs().unwrap();
        assert_eq!(pairs.architecture(), all.architecture().in_pairs().unwrap());
        assert_eq!(shown(&pairs).tensors(), pairs.architecture().tensors());
        let written = serde_json::to_string(&branches.architecture()).unwrap();
        let read: Architecture = serde_json::from_str(&written).unwrap();
        assert_eq!(read, branches.architecture());
    }

    #[test]
    fn whole_heads_leave_and_each_block_says_how_many() {
        let architecture = Architecture::Mar(small());
        let weights = drawn(&architecture);
        let keep = |group: &ChannelGroup, units: usize| match group.part {
            Part::Attention if group.root.starts_with("encoder") => 2,
            Part::Attention if group.root.starts_with("decoder_blocks.0.") => 1,
            _ => units,
        };
        let fewer = narrowed((&architecture, &weights), keep, Leaves::Heads);
        let text = fewer.architecture().to_string();
        assert!(
            text.contains("2 layers of width 16 with 2 heads of 4"),
            "{text}"
        );
        assert!(text.contains("with 1 to 4 heads of 4"), "{text}");
        assert!(!fewer.architecture().is_shown_with_heads());
    }

    #[test]
    fn widths_that_can_not_be_are_refused() {
        let config = small();
        let problem = |change: &dyn Fn(&mut Widths)| {
            let mut widths = config.widths();
            change(&mut widths);
            let config = MarConfig {
                widths: Some(widths),
                ..config.clone()
            };
            config.problem().unwrap()
        };
        assert_eq!(
            problem(&|widths| widths.blocks.truncate(3)),
            "widths of 3 blocks are given, and there are 5"
        );
        assert_eq!(
            problem(&|widths| widths.head.truncate(1)),
            "widths of 1 blocks of the head are given, and there are 2"
        );
        assert_eq!(
            problem(&|widths| widths.head[1] = 0),
            "hidden of the head's 1 is 0, which must lie in 1..=65536"
        );
        assert_eq!(
            problem(&|widths| widths.blocks[2].hidden = 0),
            "hidden of decoder_blocks.0 is 0, which must lie in 1..=4194304"
        );
    }
}
