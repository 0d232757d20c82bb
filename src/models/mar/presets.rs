//! The published models, as one table.

use super::{MarConfig, Stack};
use crate::models::Shape;

/// Latents of ImageNet's pictures of 256 x 256, whose sides an autoencoder has reduced sixteen
/// times.
pub(in crate::models) const IMAGENET_256: Shape = Shape {
    channels: 16,
    side: 16,
    classes: 1000,
};

/// A published model: its name, and its sizes except the image's.
#[derive(Debug, Clone, Copy)]
pub(in crate::models) struct Preset {
    /// Name.
    pub(in crate::models) name: &'static str,
    /// Encoder and decoder, alike.
    stack: Stack,
    head_width: usize,
    head_depth: usize,
}

const fn preset(
    name: &'static str,
    depth: usize,
    (width, heads): (usize, usize),
    (head_depth, head_width): (usize, usize),
) -> Preset {
    Preset {
        name,
        stack: Stack {
            width,
            depth,
            heads,
        },
        head_width,
        head_depth,
    }
}

/// Those of the paper (Li et al., arXiv 2406.11838), section 5.
pub(in crate::models) const PRESETS: [Preset; 3] = [
    preset("MAR-B", 12, (768, 12), (6, 1024)),
    preset("MAR-L", 16, (1024, 16), (8, 1280)),
    preset("MAR-H", 20, (1280, 16), (12, 1536)),
];

/// The published model of that name.
pub(in crate::models) fn preset_of(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name)
}

/// Heads of the published models by width; checkpoints do not store them.
pub(super) fn heads_of_width(width: usize) -> Option<usize> {
    let mut presets = PRESETS.iter();
    presets
        .find(|preset| preset.stack.width == width)
        .map(|preset| preset.stack.heads)
}

impl Preset {
    /// Its configuration, for samples of another shape.
    pub(in crate::models) fn config(&self, shape: Shape) -> MarConfig {
        MarConfig {
            input_size: shape.side,
            patch_size: 1,
            channels: shape.channels,
            classes: shape.classes,
            buffer: 64,
            mlp_ratio: 4.0,
            encoder: self.stack,
            decoder: self.stack,
            head_width: self.head_width,
            head_depth: self.head_depth,
            blocks: Vec::new(),
            widths: None,
        }
    }
}
