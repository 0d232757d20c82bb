//! The layers of a UNet in the order in which they run, and which channels each of them shares with
//! others: names, shapes, cost and dependency groups all follow from it.

use super::UnetConfig;
use crate::models::channels::{ChannelGroup, Member, Part};

/// Channels of one origin. What is added to each other has one origin.
type Channels = usize;

/// What a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A square kernel of this side, giving images of that side.
    Convolution { kernel: usize, side: usize },
    /// A matrix, at so many places.
    Linear { places: usize },
    /// A scale and a shift for each channel.
    Norm,
    /// A row for each of so many labels.
    Table { rows: usize },
}

/// A layer.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    /// Its name in diffusers, without `.weight`.
    pub(super) name: String,
    pub(super) kind: Kind,
    /// What comes in, several origins one after the other where they are put together.
    input: Vec<Channels>,
    /// What comes out; of a norm, nothing new.
    output: Option<Channels>,
}

/// All layers of a UNet.
#[derive(Debug)]
pub(super) struct Graph {
    pub(super) layers: Vec<Layer>,
    /// The origin that each has become one with, or itself.
    origins: Vec<Channels>,
    sizes: Vec<usize>,
    /// Whether an origin's channels can be taken out.
    prunable: Vec<bool>,
    /// Attentions: the origin of their values, and the places they look at.
    attentions: Vec<(Channels, usize)>,
    norm_groups: usize,
}

impl Graph {
    pub(super) fn new(config: &UnetConfig) -> Self {
        let mut graph = Self {
            layers: Vec::new(),
            origins: Vec::new(),
            sizes: Vec::new(),
            prunable: Vec::new(),
            attentions: Vec::new(),
            norm_groups: config.norm_groups,
        };
        graph.walk(config);
        let named = graph.groups();
        for (name, origin) in named {
            if let Some(left) = config.left.get(&name) {
                graph.sizes[origin] = *left;
            }
        }
        graph
    }

    /// Walks through the network as a pass does.
    fn walk(&mut self, config: &UnetConfig) {
        let UnetConfig {
            levels, attention, ..
        } = config;
        let first = levels[0];
        let image = self.origin(config.channels, false);
        let features = self.origin(first, false);
        let once = Kind::Linear { places: 1 };
        let hidden = self.layer("time_embedding.linear_1", once, &[features], 4 * first);
        let time = self.layer("time_embedding.linear_2", once, &[hidden], 4 * first);
        if config.classes > 0 {
            let rows = config.classes + 1;
            self.layers.push(Layer {
                name: "class_embedding".to_owned(),
                kind: Kind::Table { rows },
                input: Vec::new(),
                output: Some(time),
            });
        }
        let mut side = config.input_size;
        let mut x = self.convolution("conv_in", &[image], first, 3, side);
        let mut skips = vec![x];
        for (level, width) in levels.iter().enumerate() {
            let block = format!("down_blocks.{level}");
            for layer in 0..config.layers {
                x = self.resnet(
                    &format!("{block}.resnets.{layer}"),
                    &[x],
                    *width,
                    time,
                    side,
                );
                if attention[level] {
                    self.attention(&format!("{block}.attentions.{layer}"), x, side);
                }
                skips.push(x);
            }
            if level + 1 < levels.len() {
                side /= 2;
                x = self.convolution(
                    &format!("{block}.downsamplers.0.conv"),
                    &[x],
                    *width,
                    3,
                    side,
                );
                skips.push(x);
            }
        }
        let width = self.sizes[x];
        x = self.resnet("mid_block.resnets.0", &[x], width, time, side);
        self.attention("mid_block.attentions.0", x, side);
        x = self.resnet("mid_block.resnets.1", &[x], width, time, side);
        for (index, (level, width)) in levels.iter().enumerate().rev().enumerate() {
            let block = format!("up_blocks.{index}");
            for layer in 0..=config.layers {
                // As many were kept on the way down.
                let skip = skips.pop().unwrap_or(x);
                let name = format!("{block}.resnets.{layer}");
                x = self.resnet(&name, &[x, skip], *width, time, side);
                if attention[level] {
                    self.attention(&format!("{block}.attentions.{layer}"), x, side);
                }
            }
            if level > 0 {
                side *= 2;
                x = self.convolution(&format!("{block}.upsamplers.0.conv"), &[x], *width, 3, side);
            }
        }
        self.norm("conv_norm_out", &[x]);
        let image = self.origin(config.channels, false);
        self.layers.push(Layer {
            name: "conv_out".to_owned(),
            kind: Kind::Convolution { kernel: 3, side },
            input: vec![x],
            output: Some(image),
        });
    }

    fn origin(&mut self, size: usize, prunable: bool) -> Channels {
        self.origins.push(self.sizes.len());
        self.sizes.push(size);
        self.prunable.push(prunable);
        self.sizes.len() - 1
    }

    fn layer(&mut self, name: &str, kind: Kind, input: &[Channels], size: usize) -> Channels {
        let output = self.origin(size, true);
        self.layers.push(Layer {
            name: name.to_owned(),
            kind,
            input: input.to_vec(),
            output: Some(output),
        });
        output
    }

    fn convolution(
        &mut self,
        name: &str,
        input: &[Channels],
        size: usize,
        kernel: usize,
        side: usize,
    ) -> Channels {
        self.layer(name, Kind::Convolution { kernel, side }, input, size)
    }

    fn norm(&mut self, name: &str, input: &[Channels]) {
        self.layers.push(Layer {
            name: name.to_owned(),
            kind: Kind::Norm,
            input: input.to_vec(),
            output: None,
        });
    }

    /// What is added becomes one origin.
    fn join(&mut self, one: Channels, other: Channels) {
        let (one, other) = (self.found(one), self.found(other));
        let (earlier, later) = (one.min(other), one.max(other));
        self.origins[later] = earlier;
    }

    fn found(&self, mut channels: Channels) -> Channels {
        while self.origins[channels] != channels {
            channels = self.origins[channels];
        }
        channels
    }

    fn resnet(
        &mut self,
        name: &str,
        input: &[Channels],
        width: usize,
        time: Channels,
        side: usize,
    ) -> Channels {
        let comes: usize = input.iter().map(|channels| self.sizes[*channels]).sum();
        self.norm(&format!("{name}.norm1"), input);
        let hidden = self.convolution(&format!("{name}.conv1"), input, width, 3, side);
        let once = Kind::Linear { places: 1 };
        let moved = self.layer(&format!("{name}.time_emb_proj"), once, &[time], width);
        self.join(hidden, moved);
        self.norm(&format!("{name}.norm2"), &[hidden]);
        let output = self.convolution(&format!("{name}.conv2"), &[hidden], width, 3, side);
        if comes == width {
            // On the way up what comes from two sides is always wider than what becomes of it.
            self.join(input[0], output);
        } else {
            let name = format!("{name}.conv_shortcut");
            let shortcut = self.convolution(&name, input, width, 1, side);
            self.join(shortcut, output);
        }
        output
    }

    fn attention(&mut self, name: &str, x: Channels, side: usize) {
        let (places, width) = (side * side, self.sizes[x]);
        self.norm(&format!("{name}.group_norm"), &[x]);
        let all = Kind::Linear { places };
        let [queries, keys, values] = ["to_q", "to_k", "to_v"]
            .map(|part| self.layer(&format!("{name}.{part}"), all, &[x], width));
        // The values are as wide as queries and keys, since all three are computed at once.
        self.join(queries, keys);
        self.join(queries, values);
        let output = self.layer(&format!("{name}.to_out.0"), all, &[values], width);
        self.join(x, output);
        self.attentions.push((values, places));
    }

    /// Channels of one origin that are left.
    pub(super) fn size(&self, channels: Channels) -> usize {
        self.sizes[self.found(channels)]
    }

    /// Channels that come into a layer, and those that come out; of a table, its rows come in.
    pub(super) fn sizes(&self, layer: &Layer) -> [usize; 2] {
        let input = match layer.kind {
            Kind::Table { rows } => rows,
            _ => layer
                .input
                .iter()
                .map(|channels| self.size(*channels))
                .sum(),
        };
        let output = layer.output.map_or(input, |output| self.size(output));
        [input, output]
    }

    /// The origins whose channels can be taken out, each with the first layer that gives it.
    pub(super) fn groups(&self) -> Vec<(String, Channels)> {
        let mut groups: Vec<(String, Channels)> = Vec::new();
        for layer in &self.layers {
            let Some(output) = layer.output.map(|output| self.found(output)) else {
                continue;
            };
            if self.prunable[output] && groups.iter().all(|(_, known)| *known != output) {
                groups.push((layer.name.clone(), output));
            }
        }
        groups
    }

    /// The groups of channels that can be taken out.
    pub(super) fn channel_groups(&self) -> Vec<ChannelGroup> {
        let group = |(name, origin): (String, Channels)| {
            let mut members = Vec::new();
            let mut slices = 1;
            for layer in &self.layers {
                let mut put = |part: &str, dim: usize, offsets: &[usize], scored: bool| {
                    members.push(Member {
                        tensor: format!("{}.{part}", layer.name),
                        dim,
                        offsets: offsets.to_vec(),
                        scored,
                    });
                };
                let mut first = 0;
                let offsets: Vec<usize> = (layer.input.iter())
                    .filter_map(|channels| {
                        let offset = first;
                        first += self.size(*channels);
                        (self.found(*channels) == origin).then_some(offset)
                    })
                    .collect();
                let gives = (layer.output).is_some_and(|output| self.found(output) == origin);
                match layer.kind {
                    Kind::Norm if !offsets.is_empty() => {
                        slices = self.norm_groups;
                        put("weight", 0, &offsets, false);
                        put("bias", 0, &offsets, false);
                    }
                    Kind::Norm => {}
                    Kind::Table { .. } if gives => put("weight", 1, &[0], false),
                    _ => {
                        if !offsets.is_empty() {
                            put("weight", 1, &offsets, true);
                        }
                        if gives {
                            put("weight", 0, &[0], true);
                            put("bias", 0, &[0], false);
                        }
                    }
                }
            }
            let part = match name.as_str() {
                name if name.starts_with("time_embedding") => Part::Condition,
                name if name.contains(".attentions.") => Part::Attention,
                _ => Part::Convolution,
            };
            ChannelGroup {
                root: name,
                part,
                channels: self.sizes[origin],
                heads: 1,
                slices,
                members,
            }
        };
        self.groups().into_iter().map(group).collect()
    }

    /// Names and shapes of all parameters.
    pub(super) fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = Vec::new();
        for layer in &self.layers {
            let [input, output] = self.sizes(layer);
            let weight = match layer.kind {
                Kind::Convolution { kernel, .. } => vec![output, input, kernel, kernel],
                Kind::Linear { .. } => vec![output, input],
                Kind::Norm => vec![output],
                Kind::Table { rows } => vec![rows, output],
            };
            tensors.push((format!("{}.weight", layer.name), weight));
            if !matches!(layer.kind, Kind::Table { .. }) {
                tensors.push((format!("{}.bias", layer.name), vec![output]));
            }
        }
        tensors
    }

    /// Multiply-accumulates of one pass of one image.
    pub(super) fn macs(&self) -> usize {
        let layers = self.layers.iter().map(|layer| {
            let [input, output] = self.sizes(layer);
            match layer.kind {
                Kind::Convolution { kernel, side } => input * output * (kernel * side).pow(2),
                Kind::Linear { places } => places * input * output,
                Kind::Norm | Kind::Table { .. } => 0,
            }
        });
        let attentions = self.attentions.iter();
        let products = attentions.map(|(values, places)| 2 * places * places * self.size(*values));
        layers.sum::<usize>() + products.sum::<usize>()
    }

    /// Values that convolutions give for one image.
    pub(super) fn values(&self) -> usize {
        let layers = self.layers.iter().map(|layer| match layer.kind {
            Kind::Convolution { side, .. } => self.sizes(layer)[1] * side * side,
            _ => 0,
        });
        layers.sum()
    }
}
