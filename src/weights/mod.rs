//! Weight files: reading, writing and conversion.
//!
//! A file is opened as [`Tensors`]: names, shapes and places, under the PyTorch reference's names,
//! so that files are exchanged with PyTorch without conversion; values are read one tensor at a
//! time. [`assign`] fills a module from them and refuses missing, surplus and misshapen tensors,
//! all in one error. [`collect`] reads a module into a [`StateDict`], which holds tensors in
//! memory. [`convert`] writes opened weights in any of the formats.
//!
//! ```
//! # #[cfg(feature = "ndarray")] fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use burn_ndarray::NdArray;
//! use tinyfusion::models::Prunable;
//! use tinyfusion::weights::{Checkpoint, EmbeddedName, Provenance, embedded};
//!
//! let teacher = embedded::checkpoint(EmbeddedName::DigitsTeacher)?;
//! let half = teacher.network::<NdArray>(&Default::default())?.keep(&[0, 2, 4, 6, 8, 10]);
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("half.safetensors");
//! let written = Checkpoint::of(&half, Provenance::default(), &path);
//! written.of_process(teacher.process).write()?;
//! let read = Checkpoint::read(&path)?;
//! assert_eq!(read.architecture.depth(), 6);
//! assert_eq!(read.process, teacher.process);
//! # Ok(()) }
//! # #[cfg(not(feature = "ndarray"))] fn main() {}
//! ```

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
pub use convert::{Conversion, Evaluated, convert};
pub use embedded::EmbeddedName;
pub use networks::{Digested, read_inception, read_vae, vae_config};
use opened::Opened;
pub use safetensors::{open_safetensors, read_safetensors, write_safetensors};
pub(crate) use snapshot::{EMA, FIXED, MODEL, MOMENTS, TRAINING};
pub use torch::{open_torch, write_torch};

pub use crate::state::{
    Array, ParameterName, StateDict, Stored, TensorSource, Tensors, WeightsError, assign, collect,
    names,
};

/// A kind of weight file, known by its ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightFile {
    /// `.safetensors`
    Safetensors,
    /// `.safetensors.index.json`, which names the safetensors file of each tensor.
    Shards,
    /// `.pt`, `.pth`, `.bin` or `.ckpt`: written by `torch.save`.
    Torch,
}

impl WeightFile {
    /// All endings, for messages.
    pub const ENDINGS: [&str; 6] = [
        ".safetensors",
        ".safetensors.index.json",
        ".pt",
        ".pth",
        ".bin",
        ".ckpt",
    ];

    /// The kind of a file, by its ending in any case.
    pub fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_string_lossy().to_ascii_lowercase();
        let ending = Self::ENDINGS
            .into_iter()
            .find(|ending| name.ends_with(ending))?;
        Some(match ending {
            ".safetensors" => Self::Safetensors,
            ".safetensors.index.json" => Self::Shards,
            _ => Self::Torch,
        })
    }

    /// The ending that a name without a known one was probably meant to have: `.safetensors` of
    /// `model.safetensor`.
    pub fn meant(path: &Path) -> Option<&'static str> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        let near = |ending: &&str| strsim::damerau_levenshtein(&extension, &ending[1..]) == 1;
        let known = Self::of(path).is_some() || extension.len() < 2;
        Self::ENDINGS
            .into_iter()
            .find(|ending| !known && near(ending))
    }

    /// The kind and path of the weights that a path names: a file, or the only model in a folder.
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
                // Diffusers keeps the same weights in several formats side by side: the first is
                // enough.
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

/// Opens weights of any kind in [`WeightFile`], whatever their model; also returns the path of the
/// file. [`Checkpoint`] opens models that can be pruned.
///
/// # Errors
/// When there is no weight file, or it can't be read or is damaged.
pub fn open_weights(path: &Path) -> Result<(Tensors, PathBuf), WeightsError> {
    let (kind, file) = WeightFile::locate(path)?;
    Ok((Opened::open(kind, &file, None)?.tensors, file))
}

/// File names of weights in a folder: this crate's, then diffusers'.
pub(crate) const FOLDER_NAMES: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
];

/// diffusers' other names, best first: a pickle of the same precision, then half precision.
pub(crate) const OTHER_FOLDER_NAMES: [&str; 3] = [
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.safetensors.index.json",
];
