//! Where a stage's model comes from.

use std::collections::BTreeSet;
use std::path::PathBuf;

use parking_lot::Mutex;

use super::directory::RunDirectory;
use crate::process::ProcessKind;
use crate::recipe::RecipeError;
use crate::recipe::published::public_file;
use crate::recipe::schema::Recipe;
use crate::recipe::schema::source::{FileSource, Source};
use crate::state::WeightsError;
use crate::weights::{Checkpoint, Stated, embedded};

/// File of a stage's model, in the stage's folder.
pub(crate) const MODEL: &str = "model.safetensors";

/// The folder of a stage.
pub(crate) fn stage_folder(
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
pub(crate) fn checkpoint(
    recipe: &Recipe,
    directory: &RunDirectory,
    source: &Source,
) -> Result<Checkpoint, RecipeError> {
    Ok(match source {
        Source::Stage(stage) => {
            Checkpoint::read(&stage_folder(recipe, directory, stage)?.join(MODEL))?
        }
        Source::Embedded(name) => embedded::checkpoint(*name)?,
        Source::File(file) => read_file(file, recipe.heads)?,
    })
}

/// Reads a checkpoint from a file; `heads` are those of a file that neither says them nor has a
/// published model's width. A diffusion network of which nothing says how it was trained is taken
/// for a DiT, and that is told once.
///
/// # Errors
/// As [`Checkpoint::read_stated`].
pub(crate) fn read_file(
    file: &FileSource,
    heads: Option<usize>,
) -> Result<Checkpoint, WeightsError> {
    let stated = Stated {
        heads_otherwise: heads,
        ..file.stated.clone()
    };
    let mut checkpoint = Checkpoint::read_stated(&file.path, &stated)?;
    if checkpoint.is_unmarked() {
        match public_file(&file.path).and_then(|file| file.process()) {
            Some(process) => checkpoint = checkpoint.of_process(Some(process)),
            None => tell_unmarked(&file.path),
        }
    }
    Ok(checkpoint)
}

/// Says once of a file that nothing tells how its model was trained.
fn tell_unmarked(path: &std::path::Path) {
    static TOLD: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    let mut told = TOLD.lock();
    if told.insert(path.to_owned()) {
        crate::say!(
            "note: {}: nothing in it says whether it is {}, whose tensors are alike; taken for a {}. To state it: {} on the command line, {} beside `path` in a recipe",
            path.display(),
            ProcessKind::ALIKE
                .map(|(_, kind)| format!("a {}", kind.family()))
                .join(" or "),
            ProcessKind::ASSUMED.family(),
            ProcessKind::stated("--process ", ""),
            ProcessKind::stated("process = \"", "\"")
        );
    }
}
