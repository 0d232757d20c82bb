//! The channels that can be taken out of a diffusion transformer.

use super::{BlockKind, BlockWidths, DitConfig};
use crate::models::channels::{ChannelGroup, Left, Member, Part};

/// Channels that leave together.
#[derive(Debug, Clone, Copy)]
enum Channels {
    Stream,
    Condition,
    Timestep,
    Mlp { block: usize },
    Attention { block: usize },
}

impl DitConfig {
    /// All channels that can be taken out, in the order in which Torch-Pruning scores their groups.
    fn channels(&self) -> Vec<Channels> {
        let mut channels = vec![Channels::Stream, Channels::Condition, Channels::Timestep];
        for (block, (_, kind, _)) in self.named_blocks().iter().enumerate().rev() {
            channels.extend(kind.mlp().then_some(Channels::Mlp { block }));
            channels.extend(kind.attention().then_some(Channels::Attention { block }));
        }
        channels
    }

    /// The groups of channels that can be taken out.
    pub fn channel_groups(&self) -> Vec<ChannelGroup> {
        let (widths, blocks) = (self.widths(), self.named_blocks());
        let group = |channels: &Channels| match *channels {
            Channels::Stream => self.stream(&blocks),
            Channels::Condition => {
                let mut members = Members::default();
                members.rows("t_embedder.mlp.2", &[0]);
                members.other("y_embedder.embedding_table.weight", 1, &[0]);
                for (block, ..) in &blocks {
                    members.columns(&format!("{block}.adaLN_modulation.1"));
                }
                members.columns("final_layer.adaLN_modulation.1");
                members.group("t_embedder.mlp.2", Part::Condition, widths.condition)
            }
            Channels::Timestep => {
                let mut members = Members::default();
                members.rows("t_embedder.mlp.0", &[0]);
                members.columns("t_embedder.mlp.2");
                members.group("t_embedder.mlp.0", Part::Condition, widths.timestep)
            }
            Channels::Mlp { block } => {
                let (block, _, widths) = &blocks[block];
                let (fc1, fc2) = (format!("{block}.mlp.fc1"), format!("{block}.mlp.fc2"));
                let mut members = Members::default();
                members.rows(&fc1, &[0]);
                members.columns(&fc2);
                members.group(&fc1, Part::Mlp, widths.hidden)
            }
            Channels::Attention { block } => {
                let (block, _, widths) = &blocks[block];
                let (qkv, proj) = (format!("{block}.attn.qkv"), format!("{block}.attn.proj"));
                let width = widths.attention();
                let mut members = Members::default();
                members.columns(&proj);
                members.rows(&qkv, &[0, width, 2 * width]);
                ChannelGroup {
                    heads: widths.heads,
                    ..members.group(&proj, Part::Attention, width)
                }
            }
        };
        self.channels().iter().map(group).collect()
    }

    /// The channels of the residual stream. Torch-Pruning counts rows of the head's modulation in
    /// their place, twice as many, of which it can take out none or fails; here they are the
    /// channels themselves.
    fn stream(&self, blocks: &[(String, BlockKind, BlockWidths)]) -> ChannelGroup {
        let width = self.width;
        let parts = |count: usize| (0..count).map(|part| part * width).collect::<Vec<_>>();
        let mut members = Members::default();
        members.rows("final_layer.adaLN_modulation.1", &parts(2));
        members.columns("final_layer.linear");
        for (block, kind, _) in blocks.iter().rev() {
            if kind.mlp() {
                members.rows(&format!("{block}.mlp.fc2"), &[0]);
            }
            members.rows(
                &format!("{block}.adaLN_modulation.1"),
                &parts(3 * kind.branches()),
            );
            if kind.mlp() {
                members.columns(&format!("{block}.mlp.fc1"));
            }
            if kind.attention() {
                members.rows(&format!("{block}.attn.proj"), &[0]);
                members.columns(&format!("{block}.attn.qkv"));
            }
        }
        members.rows("x_embedder.proj", &[0]);
        members.other("pos_embed", 2, &[0]);
        members.group("x_embedder.proj", Part::Stream, width)
    }

    /// The same with so many channels left of each of its [`channel_groups`](Self::channel_groups).
    ///
    /// # Panics
    /// When there are not as many numbers as groups.
    pub fn narrowed(&self, left: &[Left]) -> Self {
        let channels = self.channels();
        assert_eq!(channels.len(), left.len(), "each group has its number");
        let mut widths = self.widths();
        let mut width = self.width;
        for (channels, left) in channels.iter().zip(left) {
            match *channels {
                Channels::Stream => width = left.channels,
                Channels::Condition => widths.condition = left.channels,
                Channels::Timestep => widths.timestep = left.channels,
                Channels::Mlp { block } => widths.blocks[block].hidden = left.channels,
                Channels::Attention { block } => {
                    let block = &mut widths.blocks[block];
                    block.heads = left.heads;
                    block.head_dim = left.channels / left.heads.max(1);
                }
            }
        }
        let heads = widths.blocks.iter().map(|block| block.heads);
        let heads = heads.filter(|heads| *heads > 0).collect::<Vec<_>>();
        let alike = heads.windows(2).all(|pair| pair[0] == pair[1]);
        let narrowed = Self {
            width,
            heads: heads
                .first()
                .copied()
                .filter(|_| alike)
                .unwrap_or(self.heads),
            ..self.clone()
        };
        narrowed.of_widths(widths)
    }
}

/// Collects the members of a group.
#[derive(Default)]
struct Members(Vec<Member>);

impl Members {
    /// The outputs of a layer, with their biases.
    fn rows(&mut self, layer: &str, offsets: &[usize]) {
        self.put(format!("{layer}.weight"), 0, offsets, true);
        self.put(format!("{layer}.bias"), 0, offsets, false);
    }

    /// The inputs of a layer.
    fn columns(&mut self, layer: &str) {
        self.put(format!("{layer}.weight"), 1, &[0], true);
    }

    /// A dimension of a tensor that is no layer's weight.
    fn other(&mut self, tensor: &str, dim: usize, offsets: &[usize]) {
        self.put(tensor.to_owned(), dim, offsets, false);
    }

    fn put(&mut self, tensor: String, dim: usize, offsets: &[usize], scored: bool) {
        self.0.push(Member {
            tensor,
            dim,
            offsets: offsets.to_vec(),
            scored,
        });
    }

    fn group(self, root: &str, part: Part, channels: usize) -> ChannelGroup {
        ChannelGroup {
            root: root.to_owned(),
            part,
            channels,
            slices: 1,
            heads: 1,
            members: self.0,
        }
    }
}
