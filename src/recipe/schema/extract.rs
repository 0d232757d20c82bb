//! The stage that turns a folder of images into latents.

use std::path::PathBuf;

use serde::Serialize;

use crate::recipe::document::reader::Section;

/// `kind = "extract"`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Extract {
    /// A folder with one folder of images per class, in sorted order, or a flat one, which is one
    /// class.
    pub images: PathBuf,
    /// The autoencoder: a folder with `config.json` and weights, or a weight file.
    pub vae: PathBuf,
    /// Side of the images after the centre crop, in pixels, a multiple of 8; default 256.
    pub size: usize,
    /// Whether each image's mirror image is encoded too; default true.
    pub mirror: bool,
    /// Format of the latents on disk; default `packed`.
    #[serde(flatten)]
    pub form: LatentForm,
    /// Images encoded at once; default 16.
    pub batch: usize,
    /// Threads that read images; 0, the default, is one per core.
    pub workers: usize,
}

/// Format of latents on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "form", rename_all = "lowercase")]
pub enum LatentForm {
    /// This project's shards of fixed-size records.
    Packed {
        /// Whether values are stored as f16, half the size, rather than f32; default true.
        half: bool,
    },
    /// The reference's folders of `.npy` files, f32.
    Npy,
}

impl Extract {
    pub(crate) fn read(section: &Section<'_>) -> Option<Self> {
        let images = section.string("images").required();
        let vae = section.string("vae").required();
        let size = section
            .integer("size", 8..=4096)
            .check(|size| size % 8 == 0, "must be a multiple of 8")
            .or(256);
        let mirror = section.boolean("mirror").or(true);
        let npy = section
            .choice("form", &[("packed", false), ("npy", true)])
            .or(false);
        let form = if npy {
            section.refuse(&["half"], "form \"npy\"");
            LatentForm::Npy
        } else {
            let half = section.boolean("half").or(true);
            LatentForm::Packed { half }
        };
        let batch = section.integer("batch", 1..=65_536).or(16);
        let workers = section.integer("workers", 0..=1024).or(0);
        section.refuse(&["from"], "kind \"extract\", which starts from `images`");
        Some(Self {
            images: images?.into(),
            vae: vae?.into(),
            size,
            mirror,
            form,
            batch,
            workers,
        })
    }
}
