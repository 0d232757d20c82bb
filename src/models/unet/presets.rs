//! The published UNets of DDPM, as one table.

use std::collections::BTreeMap;

use super::UnetConfig;
use crate::models::Shape;

/// A published UNet.
#[derive(Debug, Clone, Copy)]
pub(in crate::models) struct Preset {
    /// Name.
    pub(in crate::models) name: &'static str,
    /// Sizes of the pictures it is published for.
    pub(in crate::models) shape: Shape,
    levels: &'static [usize],
    /// The level with attention.
    attention: usize,
}

const fn pictures(side: usize) -> Shape {
    Shape {
        channels: 3,
        side,
        classes: 1,
    }
}

/// DDPM's of CIFAR-10, and of CelebA-HQ and LSUN (Ho et al., arXiv 2006.11239, appendix B).
pub(in crate::models) const PRESETS: [Preset; 2] = [
    Preset {
        name: "UNet-CIFAR10",
        shape: pictures(32),
        levels: &[128, 256, 256, 256],
        attention: 1,
    },
    Preset {
        name: "UNet-256",
        shape: pictures(256),
        levels: &[128, 128, 256, 256, 512, 512],
        attention: 4,
    },
];

/// The published UNet of that name.
pub(in crate::models) fn preset(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name)
}

impl Preset {
    /// Its configuration, for pictures of another shape; it knows no classes.
    pub(in crate::models) fn config(&self, shape: Shape) -> UnetConfig {
        UnetConfig {
            input_size: shape.side,
            channels: shape.channels,
            classes: 0,
            levels: self.levels.to_vec(),
            layers: 2,
            attention: (0..self.levels.len())
                .map(|level| level == self.attention)
                .collect(),
            norm_groups: 32,
            padded: false,
            left: BTreeMap::new(),
        }
    }
}
