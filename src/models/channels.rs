//! Channels of a network that can only be taken out together.
//!
//! A hidden unit of an MLP is a row of one matrix and a column of the next; a channel of the
//! residual stream is a row or a column of nearly every matrix. Such a set of places is a
//! *dependency group* (Fang et al., arXiv 2301.12900). A network names its groups, and pruning in
//! width needs to know nothing else of it.

use super::blocks::{BlockWidths, Named};

/// Channels that can only be taken out together with every place that one of them has in other
/// tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelGroup {
    /// The layer whose channels are counted, by its name in a checkpoint.
    pub root: String,
    /// The part of the network that they belong to.
    pub part: Part,
    /// Number of channels.
    pub channels: usize,
    /// Equal runs of the channels from which equally many leave, since a norm is over groups of
    /// them; 1 where there is none.
    pub slices: usize,
    /// Attention heads that the channels are divided into, in order; 1 of other channels.
    pub heads: usize,
    /// Their places.
    pub members: Vec<Member>,
}

/// Parts of a network whose width can be chosen apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// Queries, keys and values of attention.
    Attention,
    /// Hidden units of the MLPs.
    Mlp,
    /// The embedding of time and label that modulates the blocks, and the hidden units that it is
    /// computed with.
    Condition,
    /// The residual stream.
    Stream,
    /// Channels of convolutions.
    Convolution,
}

impl Part {
    /// All, by their names.
    pub const NAMES: [(&'static str, Self); 5] = [
        ("attention", Self::Attention),
        ("mlp", Self::Mlp),
        ("condition", Self::Condition),
        ("stream", Self::Stream),
        ("convolution", Self::Convolution),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        let mut names = Self::NAMES.iter();
        names
            .find(|(_, part)| *part == self)
            .map_or("", |(name, _)| name)
    }
}

/// The place of a group's channels in a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The tensor, by its name in a checkpoint.
    pub tensor: String,
    /// The dimension that counts the channels.
    pub dim: usize,
    /// Indices of the first channel: several where the tensor holds the channels several times.
    pub offsets: Vec<usize>,
    /// Whether the tensor is a layer's weight, by which the channels' importance is measured.
    /// Biases and tables are cut along.
    pub scored: bool,
}

/// What is left of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    /// Number of channels.
    pub channels: usize,
    /// Number of heads; 1 of channels that are no attention's.
    pub heads: usize,
}

impl Left {
    /// Notes what is left of a block's attention.
    pub(super) fn of_attention(self, widths: &mut BlockWidths) {
        widths.heads = self.heads;
        widths.head_dim = self.channels / self.heads.max(1);
    }
}

/// Collects the members of a group.
#[derive(Default)]
pub(super) struct Members(Vec<Member>);

impl Members {
    /// The outputs of a layer, with their biases.
    pub(super) fn rows(&mut self, layer: &str, offsets: &[usize]) {
        self.put(format!("{layer}.weight"), 0, offsets, true);
        self.put(format!("{layer}.bias"), 0, offsets, false);
    }

    /// The inputs of a layer.
    pub(super) fn columns(&mut self, layer: &str) {
        self.put(format!("{layer}.weight"), 1, &[0], true);
    }

    /// The scales and shifts of a norm.
    pub(super) fn norm(&mut self, norm: &str) {
        self.other(&format!("{norm}.weight"), 0);
        self.other(&format!("{norm}.bias"), 0);
    }

    /// A dimension of a tensor that is no layer's weight.
    pub(super) fn other(&mut self, tensor: &str, dim: usize) {
        self.put(tensor.to_owned(), dim, &[0], false);
    }

    fn put(&mut self, tensor: String, dim: usize, offsets: &[usize], scored: bool) {
        self.0.push(Member {
            tensor,
            dim,
            offsets: offsets.to_vec(),
            scored,
        });
    }

    pub(super) fn group(self, root: &str, part: Part, channels: usize) -> ChannelGroup {
        ChannelGroup {
            root: root.to_owned(),
            part,
            channels,
            slices: 1,
            heads: 1,
            members: self.0,
        }
    }

    /// The hidden units of two layers, one after the other.
    pub(super) fn between(from: &str, to: &str, part: Part, channels: usize) -> ChannelGroup {
        let mut members = Self::default();
        members.rows(from, &[0]);
        members.columns(to);
        members.group(from, part, channels)
    }

    /// The hidden units of a block's MLP.
    pub(super) fn of_mlp(Named { name, widths, .. }: &Named) -> ChannelGroup {
        let [fc1, fc2] = ["fc1", "fc2"].map(|layer| format!("{name}.mlp.{layer}"));
        Self::between(&fc1, &fc2, Part::Mlp, widths.hidden)
    }

    /// What the heads of a block's attention are of.
    pub(super) fn of_attention(Named { name, widths, .. }: &Named) -> ChannelGroup {
        let [qkv, proj] = ["qkv", "proj"].map(|layer| format!("{name}.attn.{layer}"));
        let width = widths.attention();
        let mut members = Self::default();
        members.columns(&proj);
        members.rows(&qkv, &[0, width, 2 * width]);
        ChannelGroup {
            heads: widths.heads,
            ..members.group(&proj, Part::Attention, width)
        }
    }
}
