//! Quality of samples: the measures of the ADM evaluation suite.
//!
//! FID and sFID ([`frechet_distance`]), the Inception Score ([`inception_score`]) and precision and
//! recall ([`precision_recall`]) are computed from activations, in `f64`, on the CPU. Pictures and
//! precomputed reference statistics are exchanged as `.npz` archives
//! ([`SampleReader`](crate::npz::SampleReader), [`SampleWriter`](crate::npz::SampleWriter),
//! [`read_reference_statistics`]); pictures are also read from folders of PNG and JPEG.
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
//! arXiv:2105.05233). There is one choice: that code computes the distances of precision and recall
//! in `float16` where it can, which raises published numbers by some thousandths.
//! [`Distances::F16`] follows its arithmetic; the default is `f64`.
//!
//! The numbers depend on the protocol. FID is biased upwards for few samples, roughly by `c / N`
//! (Chong and Forsyth 2020, arXiv:1911.07023), so only sets of the same size can be compared. The
//! pictures must also have been prepared for Inception in the same way. A file does not state its
//! protocol: statistics of another one can be read, but samples measured here can't be compared
//! with them. (pytorch-fid resizes and scales pictures differently, so its FID is off by some per
//! cent; torch-fidelity follows the same protocol.)

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::data::DataError;
use crate::models::inception::UnreadablePictures;
use crate::npz::NpzError;
use crate::state::WeightsError;

mod adm;
mod classified;
mod features;
mod frechet;
mod half_distances;
mod inception_score;
mod judge;
mod moments;
mod precision_recall;
mod rank;
mod reading;
mod reference;
mod speed;
mod ssim;
mod statistics;
mod verdict;

pub use adm::{Measured, Scores, compare, measure};
pub use classified::{ClassifiedVerdict, ClassifierJudge, Pictured, accuracy, classified_table};
pub use features::Features;
pub use frechet::frechet_distance;
pub use inception_score::{DEFAULT_SPLIT_SIZE, InceptionScore, inception_score};
pub use judge::{AdmJudge, AdmSettings, Assistant, common_count};
pub use moments::{ReferenceStatistics, read_reference_statistics};
pub use precision_recall::{
    DEFAULT_NEIGHBOURS, Distances, PrecisionRecall, neighbour_radii, precision_recall,
    precision_recall_with,
};
pub use rank::RankCorrelation;
pub use reading::Reading;
pub use reference::{MomentsFrom, Reference, ReferenceMeasured, cache_file};
#[cfg(feature = "cli")]
pub(crate) use speed::median_and_spread;
pub use speed::{Speed, median};
pub use ssim::ssim;
pub use statistics::{Statistics, StatisticsAccumulator};
pub(crate) use verdict::bias;
pub use verdict::{AdmEvaluation, AdmProtocol, AdmVerdict, FileDigest};

/// Why an evaluation could not be carried out.
#[derive(Debug, Error)]
pub enum EvaluationError {
    /// Two arrays do not match, or the size of one is impossible.
    #[error("{what}: expected {expected}, found {found}")]
    Shape {
        /// The quantity with the wrong size.
        what: &'static str,
        /// The size it should have.
        expected: String,
        /// The size it has.
        found: String,
    },
    /// Too few rows for the measure.
    #[error("{what} needs at least {needed} rows, found {found}")]
    TooFew {
        /// The measure.
        what: &'static str,
        /// The least number of rows it is defined for.
        needed: usize,
        /// The number of rows given.
        found: usize,
    },
    /// A value for which the measure is not defined, such as NaN among activations.
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
        /// Error of the file system or the archive reader.
        source: io::Error,
    },
    /// Pictures that Inception can't read.
    #[error("{}", .path.display())]
    Pictures {
        /// The archive.
        path: PathBuf,
        /// The expected and the actual pictures.
        source: UnreadablePictures,
    },
    /// An archive or a folder of pictures that can't be read or written.
    #[error(transparent)]
    Npz(#[from] NpzError),
    /// A sample of the data can't be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Weights that can't be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Sets of pictures that can't be compared with each other.
    #[error("{0}")]
    Unlike(String),
    /// The workers differ in what they should have in common.
    #[error("{0}")]
    Workers(String),
    /// An archive or folder that can't be measured as asked.
    #[error("{}: {problem}", .path.display())]
    Unfit {
        /// The archive or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A [`Stop`](crate::stop::Stop) was requested.
    #[error("interrupted")]
    Interrupted,
}

impl EvaluationError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}
