//! Errors of named arrays and the files they come from.

use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why a weight file can't be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The file can't be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Error of the file system.
        source: std::io::Error,
    },
    /// The file is not of the format its name states.
    #[error("{path}: not a readable {expected} file: {found}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The format expected.
        expected: &'static str,
        /// The problem.
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
    /// The file describes no model, or not in a usable way.
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
