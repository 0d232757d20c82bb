//! Training data: the embedded digits, image folders, latents on disk, and the deterministic loader.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

mod batches;
mod digits;
mod extract;
mod folder;
pub mod latents;
mod loader;
mod samples;

pub use batches::{Batches, Feed, Teacher};
pub use digits::{Digits, Image, Split};
pub use extract::{Extracted, Extraction, Form, extract};
pub use folder::ImageFolder;
pub use latents::Latents;
pub use loader::{Batch, BatchPlan, BatchSource, HostBatch};
pub use samples::{Samples, plain, view};

/// Why data can't be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file or folder can't be opened, read or written.
    #[error("{}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file or folder is not what it should be.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Unexpected {
        /// The file or folder.
        path: PathBuf,
        /// What was asked for.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A sample does not fit what it is asked or given for.
    #[error("sample {index}: expected {expected}, found {found}")]
    Sample {
        /// Its number.
        index: usize,
        /// What was asked for.
        expected: String,
        /// What is there.
        found: String,
    },
}

impl DataError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn unexpected(
        path: &Path,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Unexpected {
            path: path.to_owned(),
            expected: expected.into(),
            found: found.into(),
        }
    }
}
