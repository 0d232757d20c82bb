//! The published models, as one table.

use super::DitConfig;
use crate::models::Shape;

/// Latents of ImageNet's pictures of 256 x 256, whose sides an autoencoder has reduced eight times.
pub const IMAGENET_256: Shape = Shape {
    channels: 4,
    side: 32,
    classes: 1000,
};

/// A published model: its name, and its sizes except the image's.
#[derive(Debug, Clone, Copy)]
pub struct Preset {
    /// Name, with the patch size after the slash.
    pub name: &'static str,
    /// Number of blocks.
    pub depth: usize,
    /// Width of the trunk.
    pub width: usize,
    /// Side of a patch.
    pub patch_size: usize,
    /// Attention heads.
    pub heads: usize,
}

const fn preset(
    name: &'static str,
    depth: usize,
    width: usize,
    patch_size: usize,
    heads: usize,
) -> Preset {
    Preset {
        name,
        depth,
        width,
        patch_size,
        heads,
    }
}

/// Every published DiT and SiT, and the pruned sizes of the paper.
#[rustfmt::skip]
pub const PRESETS: &[Preset] = &[
    //      name        depth  width  patch  heads
    preset("DiT-XL/2",    28,  1152,     2,   16),
    preset("DiT-XL/4",    28,  1152,     4,   16),
    preset("DiT-XL/8",    28,  1152,     8,   16),
    preset("DiT-L/2",     24,  1024,     2,   16),
    preset("DiT-L/4",     24,  1024,     4,   16),
    preset("DiT-L/8",     24,  1024,     8,   16),
    preset("DiT-B/2",     12,   768,     2,   12),
    preset("DiT-B/4",     12,   768,     4,   12),
    preset("DiT-B/8",     12,   768,     8,   12),
    preset("DiT-S/2",     12,   384,     2,    6),
    preset("DiT-S/4",     12,   384,     4,    6),
    preset("DiT-S/8",     12,   384,     8,    6),
    preset("DiT-H/2",     32,  2304,     2,   32),
    preset("DiT-D19/2",   19,  1152,     2,   16),
    preset("DiT-D14/2",   14,  1152,     2,   16),
    preset("DiT-D7/2",     7,  1152,     2,   16),
    preset("SiT-XL/2",       28,  1152,     2,   16),
    preset("SiT-XL/4",       28,  1152,     4,   16),
    preset("SiT-XL/8",       28,  1152,     8,   16),
    preset("SiT-L/2",        24,  1024,     2,   16),
    preset("SiT-L/4",        24,  1024,     4,   16),
    preset("SiT-L/8",        24,  1024,     8,   16),
    preset("SiT-B/2",        12,   768,     2,   12),
    preset("SiT-B/4",        12,   768,     4,   12),
    preset("SiT-B/8",        12,   768,     8,   12),
    preset("SiT-S/2",        12,   384,     2,    6),
    preset("SiT-S/4",        12,   384,     4,    6),
    preset("SiT-S/8",        12,   384,     8,    6),
];

/// The configuration of the published model of that name, if there is one, for `channels` x
/// `input_size` x `input_size` latents.
pub fn config(name: &str, input_size: usize, channels: usize, classes: usize) -> Option<DitConfig> {
    let preset = PRESETS.iter().find(|preset| preset.name == name)?;
    Some(DitConfig {
        input_size,
        patch_size: preset.patch_size,
        channels,
        width: preset.width,
        depth: preset.depth,
        heads: preset.heads,
        mlp_ratio: 4.0,
        classes,
        learn_sigma: true,
        blocks: Vec::new(),
        widths: None,
    })
}

/// Heads of the published models by width; checkpoints do not store them.
pub fn heads_of_width(width: usize) -> Option<usize> {
    PRESETS
        .iter()
        .find(|preset| preset.width == width)
        .map(|preset| preset.heads)
}
