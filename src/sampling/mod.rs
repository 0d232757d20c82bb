//! Samples of a model, from a few to fifty thousand: drawn in parts on disk, which survive a kill
//! and can be shared among processes; then as an archive, and as pictures.

mod decoder;
mod draw;
mod parts;
mod pictures;
mod speed;

use std::path::PathBuf;

use serde::Serialize;
use thiserror::Error;

pub use crate::workers::Share;
pub use decoder::Decoder;
pub use draw::{Draw, DrawInto, Drawn, PICTURE_FILE, SAMPLES, SAMPLING, sampler};
pub(crate) use draw::{Place, claim, settings};
pub use pictures::{refuse_existing, write_pictures};
pub use speed::speeds;

use crate::npz::NpzError;
use crate::process::Solver;
use crate::random::{self, Stream};
use crate::report::ReportError;
use crate::state::WeightsError;
use crate::workers::EndsAll;

/// Why samples can't be drawn.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// A file or folder can't be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file or folder belongs to something else, or is unsuitable.
    #[error("{}: {problem}", path.display())]
    Place {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// The workers differ in what they should have in common.
    #[error("{0}")]
    Workers(String),
    /// The model can't be sampled in this way.
    #[error("`{model}`: {problem}")]
    Model {
        /// The model's name.
        model: String,
        /// The reason.
        problem: String,
    },
    /// An error of an archive or a folder of pictures.
    #[error(transparent)]
    Npz(#[from] NpzError),
    /// An error of a picture of samples.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// An error of weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Interrupted by the user; the drawn samples are kept.
    #[error("interrupted")]
    Interrupted,
}

impl EndsAll for SamplingError {
    fn told(&self) -> Option<String> {
        (!matches!(self, Self::Interrupted)).then(|| self.to_string())
    }

    fn heard(told: Option<String>) -> Self {
        told.map_or(Self::Interrupted, Self::Workers)
    }
}

impl SamplingError {
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn place(path: &std::path::Path, problem: impl Into<String>) -> Self {
        Self::Place {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }
}

/// Settings of a sampling.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sampling {
    /// Number of images; where none are drawn, default all that there are.
    #[serde(skip_serializing_if = "is_all")]
    pub count: usize,
    /// Images drawn together.
    pub batch: usize,
    /// Classes to draw; default: all of the model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<Vec<usize>>,
    /// How the samples' classes are chosen.
    pub labels: Labels,
    /// Scale of classifier-free guidance; 1 is none.
    pub guidance: f64,
    /// Number of guided channels, from the first; 3 of 4 in the published numbers. Of a MAR all
    /// are.
    pub guidance_channels: usize,
    /// Rule of a sampling step.
    #[serde(flatten)]
    pub solver: Solver,
    /// Number of steps, respaced over the 1000 of training, of a MAR of each token; of times for an
    /// interpolant.
    pub steps: usize,
}

/// Which class each sample is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Labels {
    /// The classes in turn, so that all are drawn equally often.
    Balanced,
    /// Drawn at random, as the reference's `sample_ddp.py` has it.
    Drawn,
}

impl Labels {
    /// Their names.
    pub const NAMES: [(&'static str, Self); 2] =
        [("balanced", Self::Balanced), ("drawn", Self::Drawn)];
}

/// ImageNet classes of the reference's demonstration.
pub const DEMO: [usize; 8] = [207, 360, 387, 974, 88, 979, 417, 279];
/// Guidance scale of the reference's demonstration.
pub const DEMO_GUIDANCE: f64 = 4.0;

fn is_all(count: &usize) -> bool {
    *count == Sampling::ALL
}

impl Sampling {
    /// The count of an evaluation that draws no images and states no count: all existing images.
    pub const ALL: usize = usize::MAX;

    /// The label of each sample, independent of the number of samples.
    pub fn label_of_each(&self, classes: usize, seed: u64) -> Vec<usize> {
        let all: Vec<usize> = (self.classes.clone()).unwrap_or_else(|| (0..classes).collect());
        (0..self.count)
            .map(|index| match self.labels {
                Labels::Balanced => all[index % all.len()],
                Labels::Drawn => {
                    all[random::below(seed, Stream::Class, 0, index as u64, all.len())]
                }
            })
            .collect()
    }
}
