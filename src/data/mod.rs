//! Training data: the embedded digits, Fashion-MNIST and other IDX files, folders of pictures,
//! latents on disk, and the deterministic loader.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

mod batches;
pub mod digits;
mod extract;
pub mod fashion;
mod folder;
mod idx;
pub mod latents;
mod loader;
mod pictures;
mod samples;

pub use batches::{Batches, Feed, Teacher, teacher};
pub use digits::{Digits, Image, Split};
pub use extract::{Extracted, Extraction, Form, extract};
pub use folder::ImageFolder;
pub use idx::IdxPictures;
pub use latents::Latents;
pub use loader::{Batch, BatchPlan, BatchSource, HostBatch};
pub use pictures::{Fit, HeldOut, PictureSet, Rule, is_packed, open_records};
pub use samples::{Mirrored, Samples, plain, view};

use samples::level;

/// Why data can't be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file or folder can't be opened, read or written.
    #[error("{}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Error of the file system.
        source: io::Error,
    },
    /// A file or folder is unsuitable.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Unexpected {
        /// The file or folder.
        path: PathBuf,
        /// The expected contents.
        expected: String,
        /// The actual contents.
        found: String,
    },
    /// The system refuses to start threads.
    #[error("{count} threads can't be had; ask for fewer, or free some of this user's processes")]
    Threads {
        /// Number of threads requested.
        count: usize,
        /// Error of the system.
        source: io::Error,
    },
    /// Pictures that can't be read.
    #[error("{} can't be read; mend them or take them away:{}", count(.pictures.len()), list(.pictures))]
    Broken {
        /// Path and reason of each.
        pictures: Vec<String>,
    },
    /// The workers differ in what they should have in common.
    #[error("{0}")]
    Workers(String),
    /// A sample is unsuitable for its use.
    #[error("sample {index}: expected {expected}, found {found}")]
    Sample {
        /// Index of the sample.
        index: usize,
        /// The expected property.
        expected: String,
        /// The actual property.
        found: String,
    },
}

/// An error with its cause, in one line.
pub(crate) fn with_cause(error: &dyn std::error::Error) -> String {
    match error.source().map(ToString::to_string) {
        Some(cause) if !error.to_string().contains(&cause) => format!("{error}: {cause}"),
        _ => error.to_string(),
    }
}

/// Most broken pictures named individually.
const NAMED: usize = 20;

fn count(pictures: usize) -> String {
    let noun = if pictures == 1 { "picture" } else { "pictures" };
    format!("{pictures} {noun}")
}

fn list(pictures: &[String]) -> String {
    let named = pictures.iter().take(NAMED);
    let mut text: String = named.map(|picture| format!("\n  {picture}")).collect();
    if pictures.len() > NAMED {
        text += &format!("\n  and {} more", pictures.len() - NAMED);
    }
    text
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
