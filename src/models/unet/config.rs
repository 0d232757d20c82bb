//! Sizes of a [`Unet`](super::Unet), and what follows from them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::graph::{Graph, Kind};
use crate::models::Shape;
use crate::models::channels::{ChannelGroup, Left};
use crate::models::keys::{Demand, Key, Keys};

/// Sizes of a [`Unet`](super::Unet).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnetConfig {
    /// Side of the image.
    pub input_size: usize,
    /// Channels of the image.
    pub channels: usize,
    /// Number of classes, whose labels are embedded beside the time, the null class last; 0 of a
    /// network that knows none.
    pub classes: usize,
    /// Channels of each level, from the whole image on; each halves the side of the one before.
    pub levels: Vec<usize>,
    /// Residual blocks of each level on the way down; one more on the way up.
    pub layers: usize,
    /// Which levels have attention after each residual block.
    pub attention: Vec<bool>,
    /// Groups of the normalisations.
    pub norm_groups: usize,
    /// Whether images are padded on all sides before they are halved, or below and to the right.
    #[serde(default)]
    pub padded: bool,
    /// How many channels are left of groups of which some were taken out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub left: BTreeMap<String, usize>,
}

/// Most places of an image that an attention looks at: a side of 256.
const MOST_PLACES: usize = 1 << 16;
/// Greatest number of channels of a level.
const MOST_CHANNELS: usize = 8192;

impl std::fmt::Display for UnetConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            input_size,
            channels,
            classes,
            levels,
            left,
            ..
        } = self;
        let levels: Vec<String> = levels.iter().map(ToString::to_string).collect();
        write!(f, "UNet, levels {}", levels.join(" "))?;
        if !left.is_empty() {
            write!(f, " ({} groups of channels narrower)", left.len())?;
        }
        write!(f, ", {channels}x{input_size}x{input_size}, ")?;
        match classes {
            0 => write!(f, "without classes"),
            classes => write!(f, "{classes} classes"),
        }
    }
}

impl UnetConfig {
    /// Sizes of its samples. A network without classes has one, which it does not look at.
    pub fn shape(&self) -> Shape {
        Shape {
            channels: self.channels,
            side: self.input_size,
            classes: self.classes.max(1),
        }
    }

    /// Names and shapes of all parameters in a checkpoint.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        Graph::new(self).tensors()
    }

    /// Multiply-accumulates of one forward pass of one image.
    pub fn macs(&self) -> usize {
        Graph::new(self).macs()
    }

    /// Bytes of f32 activations that a batch leaves for its backward pass: of each convolution its
    /// input and output, and what lies between them.
    pub fn kept_bytes(&self, batch: usize) -> u128 {
        4 * 6 * batch as u128 * Graph::new(self).values() as u128
    }

    /// Bytes that a batch's pass needs at once, at most what the widest level gives.
    pub fn pass_bytes(&self, batch: usize) -> u128 {
        let graph = Graph::new(self);
        let widest = graph.layers.iter().map(|layer| match layer.kind {
            Kind::Convolution { side, .. } => {
                graph.sizes(layer).iter().sum::<usize>() * side * side
            }
            _ => 0,
        });
        4 * 4 * batch as u128 * widest.max().unwrap_or(0) as u128
    }

    /// The groups of channels that can be taken out.
    pub fn channel_groups(&self) -> Vec<ChannelGroup> {
        Graph::new(self).channel_groups()
    }

    /// The same with so many channels left of each of its [`channel_groups`](Self::channel_groups).
    ///
    /// # Panics
    /// When there are not as many numbers as groups.
    pub fn narrowed(&self, left: &[Left]) -> Self {
        let groups = self.channel_groups();
        assert_eq!(groups.len(), left.len(), "each group has its number");
        let mut narrowed = self.clone();
        for (group, left) in groups.into_iter().zip(left) {
            if group.channels != left.channels {
                narrowed.left.insert(group.root, left.channels);
            }
        }
        narrowed
    }

    /// Reads the sizes from whoever gives them; those of the samples are `samples` where none are
    /// given. Levels after the first have twice its channels, as in DDPM for CIFAR-10.
    #[rustfmt::skip]
    pub fn read(keys: &mut dyn Keys, samples: Shape) -> Self {
        let Shape { channels, side: input_size, classes } = Shape::read(keys, samples);
        let count = keys.integer(
            Key { name: "levels", least: 1, most: 8, default: 3 },
            Some(Demand {
                holds: &|levels| input_size.is_multiple_of(1 << (levels - 1)),
                must: format!("halve `input_size`, which is {input_size}, evenly"),
            }),
        );
        let norm_groups = keys.integer(Key { name: "norm_groups", least: 1, most: 1024, default: 8 }, None);
        let width = keys.integer(
            Key { name: "width", least: 2, most: MOST_CHANNELS / 2, default: 32 },
            Some(Demand {
                holds: &|width| width.is_multiple_of(norm_groups) && width.is_multiple_of(2),
                must: format!("be even, and a multiple of `norm_groups`, which is {norm_groups}"),
            }),
        );
        let layers = keys.integer(Key { name: "layers", least: 1, most: 16, default: 2 }, None);
        let attention = keys.integer(Key { name: "attention_level", least: 1, most: 8, default: 2 }, None);
        Self {
            input_size, channels, classes, layers, norm_groups,
            levels: (0..count).map(|level| if level == 0 { width } else { 2 * width }).collect(),
            attention: (0..count).map(|level| level + 1 == attention).collect(),
            padded: true,
            left: BTreeMap::new(),
        }
    }

    /// The sizes under the names of [`read`](Self::read)'s keys, for a network of its form.
    pub(in crate::models) fn keys(&self) -> impl Serialize {
        #[derive(Serialize)]
        struct AsKeys {
            input_size: usize,
            channels: usize,
            classes: usize,
            levels: usize,
            width: usize,
            layers: usize,
            attention_level: usize,
            norm_groups: usize,
        }
        let levels = self.levels.len();
        let attention = self.attention.iter().position(|attention| *attention);
        AsKeys {
            input_size: self.input_size,
            channels: self.channels,
            classes: self.classes,
            levels,
            width: self.levels[0],
            layers: self.layers,
            attention_level: attention.unwrap_or(levels) + 1,
            norm_groups: self.norm_groups,
        }
    }

    /// Why no model can have these sizes, if so.
    pub fn problem(&self) -> Option<String> {
        let Self {
            input_size,
            channels,
            classes,
            levels,
            layers,
            attention,
            norm_groups,
            left,
            ..
        } = self;
        let within = [
            ("input_size", *input_size, 1, 4096),
            ("channels", *channels, 1, 1024),
            ("classes", *classes, 0, 1_000_000),
            ("levels", levels.len(), 1, 8),
            ("layers", *layers, 1, 16),
            ("norm_groups", *norm_groups, 1, 1024),
        ];
        if let Some((name, value, least, most)) = within
            .into_iter()
            .find(|(_, value, least, most)| value < least || value > most)
        {
            return Some(format!(
                "{name} is {value}, which must lie in {least}..={most}"
            ));
        }
        if attention.len() != levels.len() {
            return Some(format!(
                "attention is said of {} levels, and there are {}",
                attention.len(),
                levels.len()
            ));
        }
        let fits = |width: &usize| {
            (2..=MOST_CHANNELS).contains(width) && width.is_multiple_of(*norm_groups)
        };
        if let Some(width) = levels.iter().find(|width| !fits(width)) {
            return Some(format!(
                "a level has {width} channels, which must lie in 2..={MOST_CHANNELS} and be a multiple of {norm_groups} groups"
            ));
        }
        if !levels[0].is_multiple_of(2) {
            return Some(format!(
                "the first level has {} channels, which must be even",
                levels[0]
            ));
        }
        if !input_size.is_multiple_of(1 << (levels.len() - 1)) {
            return Some(format!(
                "input_size {input_size} can't be halved {} times",
                levels.len() - 1
            ));
        }
        // The smallest images have attention too.
        let smallest = levels.len() - 1;
        let looks = |level: usize| attention[level] || level == smallest;
        let places = |level: usize| (input_size >> level).pow(2);
        if let Some(level) =
            (0..levels.len()).find(|level| looks(*level) && places(*level) > MOST_PLACES)
        {
            return Some(format!(
                "attention would look at {} places, more than {MOST_PLACES}",
                places(level)
            ));
        }
        let groups = self.whole().channel_groups();
        for (name, left) in left {
            let Some(group) = groups.iter().find(|group| group.root == *name) else {
                return Some(format!(
                    "channels of `{name}` are said to be left, and there are none"
                ));
            };
            if *left == 0 || *left > group.channels || !left.is_multiple_of(group.slices) {
                return Some(format!(
                    "{left} channels of `{name}` are said to be left, of {} in {} groups",
                    group.channels, group.slices
                ));
            }
        }
        None
    }

    /// The same with all channels.
    pub fn whole(&self) -> Self {
        Self {
            left: BTreeMap::new(),
            ..self.clone()
        }
    }
}
