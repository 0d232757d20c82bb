//! Weights in and out.
//!
//! A file is opened as [`Tensors`]: names, shapes and places, under the names the PyTorch reference gives them, so that
//! files move between the two worlds without a conversion step; values are read one tensor at a time. [`assign`] fills a
//! module from them and refuses anything missing, surplus or misshapen, all at once. [`collect`] reads a module into a
//! [`StateDict`], which is tensors in memory. [`convert`] writes what was opened in any of the forms.

mod card;
mod checkpoint;
mod convert;
pub mod embedded;
mod legacy;
mod networks;
mod opened;
mod pickle;
mod safetensors;
mod shards;
mod snapshot;
mod torch;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use checkpoint::{Checkpoint, Description, Provenance, Stated};
pub use convert::{Conversion, convert};
pub use embedded::EmbeddedName;
pub use networks::{Known, read_inception, read_vae, vae_config};
use opened::Opened;
pub use safetensors::{open_safetensors, read_safetensors, write_safetensors};
pub(crate) use snapshot::{EMA, FIXED, MODEL, MOMENTS, TRAINING};
pub use torch::{open_torch, write_torch};

pub use crate::state::{
    Array, ParameterName, StateDict, Stored, TensorSource, Tensors, WeightsError, assign, collect,
    names, reference_name,
};

/// A kind of file that weights are read from, known by its ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightFile {
    /// `.safetensors`
    Safetensors,
    /// `.safetensors.index.json`, which says which tensors lie in which safetensors file beside it.
    Shards,
    /// `.pt`, `.pth`, `.bin` or `.ckpt`: what `torch.save` writes.
    Torch,
}

impl WeightFile {
    /// All endings, as messages name them.
    pub const ENDINGS: [&str; 6] = [
        ".safetensors",
        ".safetensors.index.json",
        ".pt",
        ".pth",
        ".bin",
        ".ckpt",
    ];

    /// The kind of a file; letters may be large or small.
    pub fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let ending = Self::ENDINGS
            .into_iter()
            .find(|ending| name.ends_with(ending))?;
        Some(match ending {
            ".safetensors" => Self::Safetensors,
            ".safetensors.index.json" => Self::Shards,
            _ => Self::Torch,
        })
    }

    /// The kind and path of the weights that a path names: a file, or the one model of a folder.
    ///
    /// # Errors
    /// When it is neither.
    pub fn locate(path: &Path) -> Result<(Self, PathBuf), WeightsError> {
        let problem = |problem: String| WeightsError::Model {
            path: path.to_owned(),
            problem,
        };
        if path.is_dir() {
            let there = |names: &[&str]| -> Vec<PathBuf> {
                let paths = names.iter().map(|name| path.join(name));
                paths.filter(|path| path.is_file()).collect()
            };
            let mut found = there(&FOLDER_NAMES);
            if found.is_empty() {
                // Diffusers keeps the same weights in several forms side by side: the first is enough.
                found = there(&OTHER_FOLDER_NAMES);
                found.truncate(1);
            }
            return match found.as_slice() {
                [file] => Self::of(file)
                    .map(|kind| (kind, file.clone()))
                    .ok_or_else(|| problem("holds no weights".into())),
                [] => Err(problem(format!(
                    "is a folder without weights: expected one of {}, {}",
                    FOLDER_NAMES.join(", "),
                    OTHER_FOLDER_NAMES.join(", ")
                ))),
                _ => Err(problem(
                    "is a folder with more than one model; name the file".into(),
                )),
            };
        }
        Self::of(path)
            .map(|kind| (kind, path.to_owned()))
            .ok_or_else(|| {
                problem(format!(
                    "expected a folder with a model or a file ending in {}",
                    Self::ENDINGS.join(", ")
                ))
            })
    }
}

/// Opens weights of any kind that [`WeightFile`] knows, whatever model they are of, and says which file they are in.
/// [`Checkpoint`] opens those that can be pruned.
///
/// # Errors
/// When it is none, can't be read, or is damaged.
pub fn open_weights(path: &Path) -> Result<(Tensors, PathBuf), WeightsError> {
    let (kind, file) = WeightFile::locate(path)?;
    Ok((Opened::open(kind, &file, None)?.tensors, file))
}

/// What the weights in a folder are called: ours, then diffusers'.
pub(crate) const FOLDER_NAMES: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
];

/// What else diffusers calls them, best first: pickles of the same precision, then variants of half of it.
pub(crate) const OTHER_FOLDER_NAMES: [&str; 3] = [
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.safetensors.index.json",
];
