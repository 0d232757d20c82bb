//! What can go wrong with named arrays and the files they come from.

use std::path::{Path, PathBuf};

use thiserror::Error;

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
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}
