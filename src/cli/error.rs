//! Errors of commands.

use thiserror::Error;

use crate::data::DataError;
use crate::npz::NpzError;
use crate::recipe::RecipeError;
use crate::recipe::document::diagnostic::Diagnostics;
use crate::sampling::SamplingError;
#[cfg(feature = "ndarray")]
use crate::standin::StandinError;
use crate::state::WeightsError;

/// Why a command failed.
#[derive(Debug, Error)]
pub(super) enum CliError {
    /// The arguments do not fit each other, what they name, or the system.
    #[error("{0}")]
    Usage(String),
    /// An error of the recipe that the command is, or of what it does.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// An error of `standin`.
    #[cfg(feature = "ndarray")]
    #[error(transparent)]
    Standin(#[from] StandinError),
}

impl CliError {
    /// Whether a person interrupted the command.
    pub(super) fn is_interrupted(&self) -> bool {
        matches!(self, Self::Recipe(RecipeError::Interrupted))
    }
}

/// Errors of what a recipe does are those of a recipe.
macro_rules! of_recipe {
    ($($error:ty),*) => {$(
        impl From<$error> for CliError {
            fn from(error: $error) -> Self {
                Self::Recipe(error.into())
            }
        }
    )*};
}

of_recipe!(
    DataError,
    Diagnostics,
    NpzError,
    SamplingError,
    WeightsError
);
