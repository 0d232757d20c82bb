//! Weights in and out.
//!
//! On the host a model is a [`StateDict`]: arrays under the names the PyTorch reference gives them, so files
//! move between the two worlds without a conversion step. [`collect`] reads a module into one, [`assign`] fills a
//! module from one and refuses anything missing, surplus or misshapen, all at once.

mod checkpoint;
mod module;
mod pickle;
mod shards;
mod state;
mod torch;

use std::path::PathBuf;

use thiserror::Error;

pub use checkpoint::{Checkpoint, Provenance};
pub use module::{ParameterName, assign, collect, names, reference_name};
pub(crate) use module::{fit, floats, overlay};
pub use state::{Array, StateDict, read_safetensors, write_safetensors};
pub use torch::read_pickle;

/// A kind of file that weights are read from, known by its ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightFile {
    /// `.safetensors`
    Safetensors,
    /// `.safetensors.index.json`, which says which tensors lie in which safetensors file beside it.
    Shards,
    /// `.pt` or `.pth`
    Torch,
}

impl WeightFile {
    /// All endings, as messages name them.
    pub const ENDINGS: [&str; 4] = [".safetensors", ".safetensors.index.json", ".pt", ".pth"];

    /// The kind of a file; letters may be large or small.
    pub fn of(path: &std::path::Path) -> Option<Self> {
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
}

/// What can go wrong with a weight file.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The file can't be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not what its name says.
    #[error("{path}: not a readable {expected} file: {found}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The format expected.
        expected: &'static str,
        /// What was wrong.
        found: String,
    },
    /// The file's weights do not fit the model.
    #[error("{path}: the weights do not fit {model}:\n{problems}", path = path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// The model the weights were meant for.
        model: String,
        /// One line for each parameter that is missing, surplus or misshapen.
        problems: String,
    },
    /// The file says nothing, or nothing usable, of the model it holds.
    #[error("{path}: {problem}", path = path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// What is missing or wrong.
        problem: String,
    },
}

impl WeightsError {
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}
