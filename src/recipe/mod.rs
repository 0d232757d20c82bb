//! Recipes: what a person writes, what is planned from it, and what is run.
//!
//! `recipe.toml` → [`document`] (TOML with positions, overrides applied) → [`schema`] (typed, validated, every
//! mistake reported at once) → [`plan`] (each stage's model and cost) → [`run`] (stages, in a run directory).
//! Parsing is our own over `toml`'s positions rather than serde's derive, which stops at the first mistake.

pub mod document;
pub mod embedded_recipes;
pub mod plan;
pub mod published;
pub mod run;
pub mod schema;

use std::path::PathBuf;

use thiserror::Error;

/// Why a recipe did not come to its end.
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
        /// What the system said.
        source: std::io::Error,
    },
    /// A stage can't be done with the model it was given.
    #[error("stage `{stage}`: {problem}")]
    Stage {
        /// The stage.
        stage: String,
        /// Why.
        problem: String,
    },
    /// A run can't be started or resumed.
    #[error("{0}")]
    Run(String),
    /// Weights.
    #[error(transparent)]
    Weights(#[from] crate::state::WeightsError),
    /// Training.
    #[error(transparent)]
    Training(#[from] crate::training::TrainingError),
    /// Data.
    #[error(transparent)]
    Data(#[from] crate::data::DataError),
    /// Sampling.
    #[error(transparent)]
    Sampling(crate::sampling::SamplingError),
    /// Evaluation.
    #[error(transparent)]
    Evaluation(crate::evaluation::EvaluationError),
    /// Archives and folders of pictures.
    #[error(transparent)]
    Npz(#[from] crate::npz::NpzError),
    /// Figures and grids.
    #[error(transparent)]
    Report(#[from] crate::report::ReportError),
    /// A person interrupted; a training has saved a checkpoint.
    #[error("interrupted")]
    Interrupted,
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
