//! The channels that can be taken out of a diffusion transformer.

use super::DitConfig;
use crate::models::blocks::Named;
use crate::models::channels::{ChannelGroup, Left, Members, Part};

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
        for (block, Named { kind, .. }) in self.named_blocks().iter().enumerate().rev() {
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
                members.other("y_embedder.embedding_table.weight", 1);
                for Named { name, .. } in &blocks {
                    members.columns(&format!("{name}.adaLN_modulation.1"));
                }
                members.columns("final_layer.adaLN_modulation.1");
                members.group("t_embedder.mlp.2", Part::Condition, widths.condition)
            }
            Channels::Timestep => Members::between(
                "t_embedder.mlp.0",
                "t_embedder.mlp.2",
                Part::Condition,
                widths.timestep,
            ),
            Channels::Mlp { block } => Members::of_mlp(&blocks[block]),
            Channels::Attention { block } => Members::of_attention(&blocks[block]),
        };
        self.channels().iter().map(group).collect()
    }

    /// The channels of the residual stream. Torch-Pruning counts rows of the head's modulation in
    /// their place, twice as many, of which it can take out none or fails; here they are the
    /// channels themselves.
    fn stream(&self, blocks: &[Named]) -> ChannelGroup {
        let width = self.width;
        let parts = |count: usize| (0..count).map(|part| part * width).collect::<Vec<_>>();
        let mut members = Members::default();
        members.rows("final_layer.adaLN_modulation.1", &parts(2));
        members.columns("final_layer.linear");
        for Named {
            name: block, kind, ..
        } in blocks.iter().rev()
        {
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
        members.other("pos_embed", 2);
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
                    left.of_attention(&mut widths.blocks[block]);
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
