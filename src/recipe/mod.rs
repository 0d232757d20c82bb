//! Recipes: written by a user, planned, and run.
//!
//! `recipe.toml` → [`document`] (TOML with positions, overrides applied) → [`schema`] (typed,
//! validated, every mistake reported at once) → [`plan`] (each stage's model and cost) → [`run`]
//! (stages, in a run directory). The reader is this crate's own, based on `toml`'s positions:
//! serde's derive stops at the first mistake.

pub mod document;
pub mod embedded_recipes;
pub mod plan;
pub mod published;
pub mod results;
pub mod run;
pub mod schema;

use std::path::PathBuf;

use thiserror::Error;

/// Why a recipe was not completed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RecipeError {
    /// The recipe's mistakes.
    #[error(transparent)]
    Invalid(#[from] document::diagnostic::Diagnostics),
    /// A file of the run can't be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A stage can't run with the model it was given.
    #[error("stage `{stage}`: {problem}")]
    Stage {
        /// The stage.
        stage: String,
        /// The reason.
        problem: String,
    },
    /// A run can't be started or resumed.
    #[error("{0}")]
    Run(String),
    /// The run that this folder is of is another process's.
    #[error("{}: another process is running it", .0.display())]
    Busy(PathBuf),
    /// An error of weights.
    #[error(transparent)]
    Weights(#[from] crate::state::WeightsError),
    /// An error of training.
    #[error(transparent)]
    Training(#[from] crate::training::TrainingError),
    /// An error of data.
    #[error(transparent)]
    Data(#[from] crate::data::DataError),
    /// An error of sampling.
    #[error(transparent)]
    Sampling(crate::sampling::SamplingError),
    /// An error of evaluation.
    #[error(transparent)]
    Evaluation(crate::evaluation::EvaluationError),
    /// An error of an archive or a folder of pictures.
    #[error(transparent)]
    Npz(#[from] crate::npz::NpzError),
    /// An error of a figure or grid.
    #[error(transparent)]
    Report(#[from] crate::report::ReportError),
    /// Interrupted by the user; a training has saved a checkpoint.
    #[error("interrupted")]
    Interrupted,
}

impl crate::workers::EndsAll for RecipeError {
    fn told(&self) -> Option<String> {
        (!matches!(self, Self::Interrupted)).then(|| crate::data::with_cause(self))
    }

    fn heard(told: Option<String>) -> Self {
        told.map_or(Self::Interrupted, Self::Run)
    }
}

impl From<crate::evaluation::EvaluationError> for RecipeError {
    fn from(error: crate::evaluation::EvaluationError) -> Self {
        match error {
            crate::evaluation::EvaluationError::Interrupted => Self::Interrupted,
            error => Self::Evaluation(error),
        }
    }
}

impl From<crate::sampling::SamplingError> for RecipeError {
    fn from(error: crate::sampling::SamplingError) -> Self {
        match error {
            crate::sampling::SamplingError::Interrupted => Self::Interrupted,
            error => Self::Sampling(error),
        }
    }
}

impl RecipeError {
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}
