//! Where a stage's model comes from.

use std::path::PathBuf;

use super::RecipeError;
use super::directory::RunDirectory;
use super::embedded;
use super::schema::Recipe;
use super::source::Source;
use crate::weights::Checkpoint;

/// File of a stage's model, in the stage's folder.
pub(super) const MODEL: &str = "model.safetensors";

/// The folder of a stage.
pub(super) fn stage_folder(
    recipe: &Recipe,
    directory: &RunDirectory,
    stage: &str,
) -> Result<PathBuf, RecipeError> {
    let index = recipe.stages.iter().position(|other| other.name == stage);
    let index =
        index.ok_or_else(|| RecipeError::Run(format!("the recipe has no stage `{stage}`")))?;
    Ok(directory.stage(index, stage))
}

/// Reads the checkpoint a source names.
pub(super) fn checkpoint(
    recipe: &Recipe,
    directory: &RunDirectory,
    source: &Source,
) -> Result<Checkpoint, RecipeError> {
    Ok(match source {
        Source::Stage(stage) => {
            Checkpoint::read(&stage_folder(recipe, directory, stage)?.join(MODEL))?
        }
        Source::Embedded(name) => embedded::checkpoint(*name)?,
        Source::File(file) => Checkpoint::read_stated(&file.path, &file.stated)?,
    })
}
