//! The run directory: `artifacts/runs/<recipe>/<run>/`, one folder per stage. Runs are numbered and never reused.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::RecipeError;
use crate::atomic::write_atomic;

/// How a run stands, in `status.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// `running`, `finished`, `interrupted` or `failed`.
    pub state: String,
    /// The stage it is or was at.
    pub stage: String,
    /// Seconds since this process took the run up.
    pub seconds: f64,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A run's folder.
#[derive(Debug, Clone)]
pub struct RunDirectory {
    path: PathBuf,
}

impl RunDirectory {
    /// Makes the next numbered run of a recipe.
    ///
    /// # Errors
    /// When the folder can't be made.
    pub fn create(runs: &Path, recipe: &str) -> Result<Self, RecipeError> {
        let folder = runs.join(recipe);
        std::fs::create_dir_all(&folder).map_err(RecipeError::io(&folder))?;
        let mut number = numbers(&folder).last().map_or(1, |last| last + 1);
        loop {
            let path = folder.join(format!("{number:03}"));
            // Taken by the file system's own rule: two processes never get one folder.
            match std::fs::create_dir(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(RecipeError::io(&path)(error)),
            }
        }
    }

    /// The newest run of a recipe that has not finished.
    ///
    /// # Errors
    /// When there is none.
    pub fn unfinished(runs: &Path, recipe: &str) -> Result<Self, RecipeError> {
        let folder = runs.join(recipe);
        let run = numbers(&folder)
            .into_iter()
            .rev()
            .map(|number| Self {
                path: folder.join(format!("{number:03}")),
            })
            .find(|run| run.status().is_none_or(|status| status.state != "finished"));
        run.ok_or_else(|| {
            RecipeError::Run(format!(
                "{}: no unfinished run to resume; leave out `--resume` to start one",
                folder.display()
            ))
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of a stage, by its place in the recipe.
    pub fn stage(&self, index: usize, name: &str) -> PathBuf {
        self.path.join(format!("{:02}-{name}", index + 1))
    }

    /// Writes a file of the run, atomically.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write(&self, name: &str, text: &str) -> Result<(), RecipeError> {
        let path = self.path.join(name);
        write_atomic(&path, |file| file.write_all(text.as_bytes())).map_err(RecipeError::io(&path))
    }

    /// Reads a file of the run.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn read(&self, name: &str) -> Result<String, RecipeError> {
        let path = self.path.join(name);
        std::fs::read_to_string(&path).map_err(RecipeError::io(&path))
    }

    /// Writes the status.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn set_status(&self, status: &Status) -> Result<(), RecipeError> {
        self.write("status.json", &json(status)?)
    }

    /// The status, if there is one.
    pub fn status(&self) -> Option<Status> {
        serde_json::from_str(&self.read("status.json").ok()?).ok()
    }
}

/// Numbers of a recipe's runs, ascending.
fn numbers(folder: &Path) -> Vec<usize> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut numbers: Vec<usize> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers
}

/// Readable JSON.
pub(super) fn json(value: &impl Serialize) -> Result<String, RecipeError> {
    serde_json::to_string_pretty(value)
        .map(|text| text + "\n")
        .map_err(|error| RecipeError::Run(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_numbered_and_only_unfinished_ones_resume() {
        let folder = tempfile::tempdir().unwrap();
        let first = RunDirectory::create(folder.path(), "a").unwrap();
        let second = RunDirectory::create(folder.path(), "a").unwrap();
        assert!(first.path().ends_with("a/001") && second.path().ends_with("a/002"));
        let finished = Status {
            state: "finished".into(),
            stage: String::new(),
            seconds: 1.0,
            error: None,
        };
        second.set_status(&finished).unwrap();
        assert_eq!(
            RunDirectory::unfinished(folder.path(), "a").unwrap().path(),
            first.path()
        );
        first.set_status(&finished).unwrap();
        assert!(RunDirectory::unfinished(folder.path(), "a").is_err());
    }
}
