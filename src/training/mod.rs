//! Training by burn-train's `Learner` under a strategy of our own.
//!
//! The stock strategies count epochs, checkpoint per epoch and not on interrupt, and clip per
//! tensor. Ours counts optimizer steps, clips by the global norm, keeps an EMA, and atomically
//! saves everything a bit-identical continuation needs. [`Fit`] is the entry point.

mod checkpoint;
mod classifier;
#[cfg(feature = "tui")]
mod dashboard;
mod ema;
mod fit;
mod metrics;
mod optimisation;
mod optimizer;
mod panics;
pub(crate) mod renderer;
mod schedule;
mod shards;
mod strategy;
mod together;
mod trackers;
#[expect(
    clippy::module_inception,
    reason = "the room is named for what it does"
)]
mod training;

use std::path::PathBuf;

use thiserror::Error;

pub(crate) use checkpoint::CHECKPOINTS;
pub use classifier::ClassifierTrainee;
pub use ema::{Ema, share_of_start, warmed_up};
pub use fit::{BatchesFrom, Fit, Fitted, Observe, OnStep};
pub use metrics::{JsonLines, Scalars, StepReport, scalars};
pub use optimisation::Optimisation;
pub use optimizer::{AdamW, ParameterGroup};
pub use panics::watch_panics;
pub use schedule::Schedule;
pub use trackers::Tracker;
pub use training::{About, Training};

use crate::data::DataError;
use crate::state::WeightsError;

/// Path of the last checkpoint for a message, if there is one.
fn last_checkpoint(directory: &std::path::Path) -> String {
    match directory.is_dir() {
        true => format!(". The last checkpoint is in {}", directory.display()),
        false => String::new(),
    }
}

/// Why a training failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TrainingError {
    /// Losses stayed non-finite.
    #[error(
        "{count} losses in a row were not finite (the last at step {step}); lower `lr`, or look at the data{}",
        last_checkpoint(directory)
    )]
    Diverged {
        /// Number of non-finite losses in a row.
        count: usize,
        /// The step at which training gave up.
        step: usize,
        /// Folder of the checkpoints.
        directory: PathBuf,
    },
    /// No parameter of the model requires a gradient.
    #[error(
        "no parameter of the model learns: all of them are frozen (a module that comes from an inner backend is; give its values to a fresh one)"
    )]
    Frozen,
    /// A thread panicked.
    #[error(
        "a computing thread failed (its message stands above); nothing computed since is kept. Continue from the last checkpoint with `--resume`"
    )]
    Device,
    /// Several workers can't share this training, or have come apart.
    #[error("{0}")]
    Workers(String),
    /// A sample can't be read, or does not match the plan.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A checkpoint can't be written or read, or does not belong to this run.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A training checkpoint belongs to another run.
    #[error("{}: {problem}", path.display())]
    Resume {
        /// The checkpoint.
        path: PathBuf,
        /// Why it can't be continued from.
        problem: String,
    },
    /// What is done after a step was interrupted, and is done again when the training goes on: it
    /// stops after this step.
    #[error("interrupted")]
    Interrupted,
    /// What is done after a step failed.
    #[error(transparent)]
    Observed(Box<dyn std::error::Error + Send + Sync>),
    /// A log can't be written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Error of the file system.
        source: std::io::Error,
    },
}

impl TrainingError {
    /// Error of a file.
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}
