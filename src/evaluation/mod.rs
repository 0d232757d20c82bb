//! How good are the samples? The measures of the ADM evaluation suite.
//!
//! FID and sFID ([`frechet_distance`]), the Inception Score ([`inception_score`]) and precision and
//! recall ([`precision_recall`]) are computed from activations, in `f64`, on the CPU. Pictures and
//! precomputed reference statistics are exchanged as `.npz` archives ([`SampleReader`],
//! [`SampleWriter`], [`read_reference_statistics`]).
//!
//! The suite as a whole, on Inception's activations:
//!
//! ```text
//! samples.npz ── SampleReader ── measure ── Measured ──┐
//!                                                      ├── compare ── Scores ── AdmEvaluation
//! reference.npz ── Reference ── ReferenceMeasured ─────┘
//! ```
//!
//! The definitions follow `guided-diffusion/evaluations/evaluator.py` (Dhariwal and Nichol 2021,
//! arXiv:2105.05233), with one deliberate difference: that code computes precision and recall in
//! `float16` where it can, and its published numbers carry the noise; here they are exact.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::models::inception::UnreadablePictures;

mod adm;
mod archive;
mod features;
mod frechet;
mod inception_score;
mod moments;
mod precision_recall;
mod reference;
mod samples;
mod speed;
mod statistics;
mod verdict;

pub use adm::{Measured, Scores, compare, measure};
pub use features::Features;
pub use frechet::frechet_distance;
pub use inception_score::{DEFAULT_SPLIT_SIZE, InceptionScore, inception_score};
pub use moments::{ReferenceStatistics, read_reference_statistics};
pub use precision_recall::{
    DEFAULT_NEIGHBOURS, PrecisionRecall, neighbour_radii, precision_recall,
};
pub use reference::{Moments, Reference, ReferenceMeasured, cache_file};
pub use samples::{SampleReader, SampleWriter, Samples, read_samples, write_samples};
pub use speed::Speed;
pub use statistics::{Statistics, StatisticsAccumulator};
pub use verdict::{AdmEvaluation, AdmProtocol, AdmVerdict, FileDigest};

/// Why an evaluation could not be carried out.
#[derive(Debug, Error)]
pub enum EvaluationError {
    /// Two arrays that belong together do not fit, or one has an impossible size.
    #[error("{what}: expected {expected}, found {found}")]
    Shape {
        /// The quantity with the wrong size.
        what: &'static str,
        /// The size it should have.
        expected: String,
        /// The size it has.
        found: String,
    },
    /// The measure is not defined for so few rows.
    #[error("{what} needs at least {needed} rows, found {found}")]
    TooFew {
        /// The measure.
        what: &'static str,
        /// The least number of rows it is defined for.
        needed: usize,
        /// The number of rows given.
        found: usize,
    },
    /// A value that the measure is not defined for, such as NaN among activations.
    #[error("{what}: {problem}")]
    Value {
        /// The quantity with the bad value.
        what: &'static str,
        /// Where it is and what is wrong with it.
        problem: String,
    },
    /// The file could not be opened, read or written.
    #[error("{}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the file system or the archive reader said.
        source: io::Error,
    },
    /// Pictures that Inception can't read.
    #[error("{}", .path.display())]
    Pictures {
        /// The archive.
        path: PathBuf,
        /// What it reads, and what they are.
        source: UnreadablePictures,
    },
    /// A stop was requested, see [`crate::interrupt`].
    #[error("interrupted")]
    Interrupted,
    /// An array of an archive is missing or is not what it should be.
    #[error("{}: array `{array}`: expected {expected}, found {found}", .path.display())]
    Array {
        /// The archive.
        path: PathBuf,
        /// The array's name in the archive, without `.npy`.
        array: String,
        /// What was asked for.
        expected: String,
        /// What the archive holds.
        found: String,
    },
}

impl EvaluationError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}
