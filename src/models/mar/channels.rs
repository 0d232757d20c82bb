//! The channels that can be taken out of a MAR.

use super::{MarConfig, Stack};
use crate::models::blocks::Named;
use crate::models::channels::{ChannelGroup, Left, Members, Part};

/// Channels that leave together.
#[derive(Debug, Clone, Copy)]
enum Channels {
    /// The encoder's residual stream.
    Encoder,
    /// The decoder's.
    Decoder,
    /// The head's.
    Head,
    /// What modulates the head.
    Condition,
    Timestep,
    /// Hidden units of a block of the head.
    HeadMlp {
        block: usize,
    },
    /// Those of a block of a trunk, counted over both.
    Mlp {
        block: usize,
    },
    Attention {
        block: usize,
    },
}

const HEAD: &str = "diffloss.net";

impl MarConfig {
    /// All channels that can be taken out.
    fn channels(&self) -> Vec<Channels> {
        let mut channels = vec![Channels::Encoder, Channels::Decoder];
        let blocks = self.named_blocks();
        for (block, Named { kind, .. }) in blocks.concat().iter().enumerate() {
            channels.extend(kind.attention().then_some(Channels::Attention { block }));
            channels.extend(kind.mlp().then_some(Channels::Mlp { block }));
        }
        channels.extend([Channels::Head, Channels::Condition, Channels::Timestep]);
        channels.extend((0..self.head_depth).map(|block| Channels::HeadMlp { block }));
        channels
    }

    /// The groups of channels that can be taken out.
    pub fn channel_groups(&self) -> Vec<ChannelGroup> {
        let (widths, blocks) = (self.widths(), self.named_blocks());
        let all = blocks.concat();
        let group = |channels: &Channels| match *channels {
            Channels::Encoder => {
                let mut members = Members::default();
                members.rows("z_proj", &[0]);
                members.norm("z_proj_ln");
                members.other("class_emb.weight", 1);
                members.other("fake_latent", 1);
                members.other("encoder_pos_embed_learned", 2);
                of_stream(&mut members, &blocks[0]);
                members.norm("encoder_norm");
                members.columns("decoder_embed");
                members.group("z_proj", Part::Stream, self.encoder.width)
            }
            Channels::Decoder => {
                let mut members = Members::default();
                members.rows("decoder_embed", &[0]);
                members.other("mask_token", 2);
                members.other("decoder_pos_embed_learned", 2);
                of_stream(&mut members, &blocks[1]);
                members.norm("decoder_norm");
                members.other("diffusion_pos_embed_learned", 2);
                members.columns(&format!("{HEAD}.cond_embed"));
                members.group("decoder_embed", Part::Stream, self.decoder.width)
            }
            Channels::Head => self.stream_of_head(),
            Channels::Condition => {
                let mut members = Members::default();
                let time = format!("{HEAD}.time_embed.mlp.2");
                members.rows(&time, &[0]);
                members.rows(&format!("{HEAD}.cond_embed"), &[0]);
                for modulated in self.modulated() {
                    members.columns(&format!("{modulated}.adaLN_modulation.1"));
                }
                members.group(&time, Part::Condition, widths.condition)
            }
            Channels::Timestep => {
                let [from, to] = ["0", "2"].map(|layer| format!("{HEAD}.time_embed.mlp.{layer}"));
                Members::between(&from, &to, Part::Condition, widths.timestep)
            }
            Channels::HeadMlp { block } => {
                let layer = |layer| format!("{HEAD}.res_blocks.{block}.mlp.{layer}");
                Members::between(&layer("0"), &layer("2"), Part::Mlp, widths.head[block])
            }
            Channels::Mlp { block } => Members::of_mlp(&all[block]),
            Channels::Attention { block } => Members::of_attention(&all[block]),
        };
        self.channels().iter().map(group).collect()
    }

    /// What has a modulation in the head.
    fn modulated(&self) -> impl Iterator<Item = String> {
        let blocks = (0..self.head_depth).map(|block| format!("{HEAD}.res_blocks.{block}"));
        blocks.chain([format!("{HEAD}.final_layer")])
    }

    /// The channels of the head's residual stream.
    fn stream_of_head(&self) -> ChannelGroup {
        let width = self.head_width;
        let mut members = Members::default();
        let first = format!("{HEAD}.input_proj");
        members.rows(&first, &[0]);
        for block in 0..self.head_depth {
            let name = format!("{HEAD}.res_blocks.{block}");
            members.norm(&format!("{name}.in_ln"));
            members.columns(&format!("{name}.mlp.0"));
            members.rows(&format!("{name}.mlp.2"), &[0]);
            let modulation = format!("{name}.adaLN_modulation.1");
            members.rows(&modulation, &[0, width, 2 * width]);
        }
        let last = format!("{HEAD}.final_layer");
        members.rows(&format!("{last}.adaLN_modulation.1"), &[0, width]);
        members.columns(&format!("{last}.linear"));
        members.group(&first, Part::Stream, width)
    }

    /// The same with so many channels left of each of its [`channel_groups`](Self::channel_groups).
    ///
    /// # Panics
    /// When there are not as many numbers as groups.
    pub fn narrowed(&self, left: &[Left]) -> Self {
        let channels = self.channels();
        assert_eq!(channels.len(), left.len(), "each group has its number");
        let mut widths = self.widths();
        let mut sizes = [self.encoder.width, self.decoder.width, self.head_width];
        for (channels, left) in channels.iter().zip(left) {
            match *channels {
                Channels::Encoder => sizes[0] = left.channels,
                Channels::Decoder => sizes[1] = left.channels,
                Channels::Head => sizes[2] = left.channels,
                Channels::Condition => widths.condition = left.channels,
                Channels::Timestep => widths.timestep = left.channels,
                Channels::HeadMlp { block } => widths.head[block] = left.channels,
                Channels::Mlp { block } => widths.blocks[block].hidden = left.channels,
                Channels::Attention { block } => left.of_attention(&mut widths.blocks[block]),
            }
        }
        // The heads that a trunk's blocks have, where they have equally many.
        let mut next = 0;
        let mut with = |stack: Stack, blocks: &[Named], width| {
            let within = &widths.blocks[next..next + blocks.len()];
            next += blocks.len();
            let mut heads = within.iter().map(|block| block.heads);
            let mut heads = heads.by_ref().filter(|heads| *heads > 0);
            let first = heads.next();
            let alike = heads.all(|heads| Some(heads) == first);
            Stack {
                width,
                heads: first.filter(|_| alike).unwrap_or(stack.heads),
                ..stack
            }
        };
        let blocks = self.named_blocks();
        let narrowed = Self {
            encoder: with(self.encoder, &blocks[0], sizes[0]),
            decoder: with(self.decoder, &blocks[1], sizes[1]),
            head_width: sizes[2],
            ..self.clone()
        };
        narrowed.of_widths(widths)
    }
}

/// The places of a trunk's residual stream in its blocks.
fn of_stream(members: &mut Members, blocks: &[Named]) {
    for Named { name, kind, .. } in blocks {
        if kind.attention() {
            members.norm(&format!("{name}.norm1"));
            members.columns(&format!("{name}.attn.qkv"));
            members.rows(&format!("{name}.attn.proj"), &[0]);
        }
        if kind.mlp() {
            members.norm(&format!("{name}.norm2"));
            members.columns(&format!("{name}.mlp.fc1"));
            members.rows(&format!("{name}.mlp.fc2"), &[0]);
        }
    }
}
