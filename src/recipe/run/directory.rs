//! The run directory: `artifacts/runs/<recipe>/<run>/`, one folder per stage. Runs are numbered and
//! never reused.

use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::changes::changes;
use super::measured::Measurements;
use crate::files::{lock_file, write_atomic};
use crate::recipe::RecipeError;
#[cfg(feature = "cli")]
use crate::weights::Evaluated;

/// How a run stands, in `status.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// `running`, `finished`, `interrupted` or `failed`; read back, also `killed`.
    pub state: String,
    /// The stage it is or was at.
    pub stage: String,
    /// Seconds since this process took the run up.
    pub seconds: f64,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// File of the recipe a run was started with, nothing left implicit.
pub(crate) const RESOLVED: &str = "resolved.toml";

/// File of the verdicts, in the stage's folder.
pub(crate) const EVALUATION: &str = "eval.json";

/// File that is locked while a process works on the run.
const LOCK: &str = "run.lock";

/// A run's folder.
#[derive(Debug)]
pub struct RunDirectory {
    path: PathBuf,
    /// The sweep's, of a run in one.
    measured: Measurements,
    /// Whether an earlier process began the run.
    resumed: bool,
    /// Locked as long as this process works in the folder; the system lets go of it however the
    /// process ends. None of a sweep that is another process's, in which this one takes runs.
    lock: Option<File>,
}

/// The resolved recipe of a run that goes on, from the one it was started with: the same, or one
/// with more to do; none where they are unlike.
pub type Continued<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Whether to go on with the newest unfinished run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// Begin a new one.
    No,
    /// There must be one.
    Yes,
    /// Begin a new one where there is none.
    IfAny,
    /// Of a sweep: go on with the newest, unfinished or not and whoever runs it, or begin one.
    Join,
}

impl RunDirectory {
    /// The directory of a new run with this resolved recipe, or of one to resume: the newest
    /// unfinished one, or, where a person asks for it, the newest that this recipe adds to.
    ///
    /// # Errors
    /// When it can't be made, or there is none to resume.
    pub fn take(
        runs: &Path,
        recipe: &str,
        resolved: &str,
        continued: Continued<'_>,
        resume: Resume,
    ) -> Result<Self, RecipeError> {
        let known = match resume {
            Resume::No => None,
            Resume::Yes => Some(Self::unfinished(runs, recipe, resolved, continued)?),
            Resume::IfAny => Self::newest(runs, recipe, continued)?.0,
            Resume::Join => return Self::join(runs, recipe, resolved, continued),
        };
        if let Some(directory) = known {
            return directory.resume();
        }
        Self::begin(runs, recipe, resolved)
    }

    fn begin(runs: &Path, recipe: &str, resolved: &str) -> Result<Self, RecipeError> {
        let directory = Self::create(runs, recipe)?;
        directory.write(RESOLVED, resolved)?;
        Ok(directory)
    }

    /// The directory of the newest sweep that has noted this recipe, or of a new one. Where another
    /// process has it, this one is a guest there.
    fn join(
        runs: &Path,
        recipe: &str,
        resolved: &str,
        continued: Continued<'_>,
    ) -> Result<Self, RecipeError> {
        let folder = runs.join(recipe);
        std::fs::create_dir_all(&folder).map_err(RecipeError::io(&folder))?;
        // One after the other: of those that come at once, one begins the sweep.
        let turn = folder.join("join.lock");
        let turn_taken = lock_file(&turn).and_then(|lock| lock.lock().map(|()| lock));
        let _turn = turn_taken.map_err(RecipeError::io(&turn))?;
        let paths = numbers(&folder).into_iter().rev();
        let newest = paths
            .map(|number| folder.join(format!("{number:03}")))
            .find(|path| {
                let noted = std::fs::read_to_string(path.join(RESOLVED)).ok();
                noted.is_some_and(|noted| continued(&noted).is_some_and(|whole| whole == noted))
            });
        let Some(path) = newest else {
            return match Self::grown(runs, recipe, continued)? {
                Some(directory) => directory.resume(),
                None => Self::begin(runs, recipe, resolved),
            };
        };
        match Self::open_at_once(path) {
            Ok(directory) => directory.resume(),
            Err(RecipeError::Busy(path)) => Ok(Self {
                measured: Measurements::of(&path),
                path,
                resumed: true,
                lock: None,
            }),
            Err(error) => Err(error),
        }
    }

    /// Whether the folder is this process's. A guest takes what the other has left, where that has
    /// ended, and the sweep asks for the runs that the guest has `noted`.
    pub fn leads(&mut self, noted: &str) -> bool {
        if self.lock.is_none() {
            let taken = Self::open_at_once(self.path.clone()).ok();
            let same = |_: &Self| self.read(RESOLVED).is_ok_and(|now| now == noted);
            self.lock = taken.filter(same).and_then(|taken| taken.lock);
        }
        self.lock.is_some()
    }

    /// The directory of a run in this one's, begun or not. Both share what they measure. `patient`
    /// waits for who only looks at it; else that is as if another process had it.
    ///
    /// # Errors
    /// When it can't be made, another process has it, or it was begun with another recipe.
    pub fn inner(&self, name: &str, resolved: &str, patient: bool) -> Result<Self, RecipeError> {
        let path = self.path.join(name);
        std::fs::create_dir_all(&path).map_err(RecipeError::io(&path))?;
        let mut directory = match patient {
            true => Self::open(path)?,
            false => Self::open_at_once(path)?,
        };
        directory.measured.clone_from(&self.measured);
        match std::fs::read_to_string(directory.path.join(RESOLVED)) {
            Ok(noted) if noted == resolved => directory.resume(),
            Ok(_) => Err(RecipeError::Run(format!(
                "{}: this run was started with another recipe, which is in {RESOLVED} there",
                directory.path.display()
            ))),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                directory.write(RESOLVED, resolved)?;
                Ok(directory)
            }
            Err(error) => Err(RecipeError::io(&directory.path.join(RESOLVED))(error)),
        }
    }

    fn resume(mut self) -> Result<Self, RecipeError> {
        self.tidy();
        self.resumed = true;
        Ok(self)
    }

    /// Whether an earlier process began the run.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

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
                Ok(()) => return Self::open(path),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(RecipeError::io(&path)(error)),
            }
        }
    }

    /// The newest run of a recipe that has not finished and was started with this recipe, or the
    /// newest of all if this recipe adds to it. One that was stopped before it had noted its recipe
    /// has nothing to go on with, and is passed over.
    ///
    /// # Errors
    /// When there is none.
    pub fn unfinished(
        runs: &Path,
        recipe: &str,
        resolved: &str,
        continued: Continued<'_>,
    ) -> Result<Self, RecipeError> {
        let (unfinished, other) = Self::newest(runs, recipe, continued)?;
        let known = match unfinished {
            Some(directory) => Some(directory),
            None => Self::grown(runs, recipe, continued)?,
        };
        match (known, other) {
            (Some(directory), _) => Ok(directory),
            (None, Some(other)) => {
                let noted = std::fs::read_to_string(other.join(RESOLVED)).unwrap_or_default();
                let changes = changes(&noted, resolved);
                let colon = if changes.is_empty() { "" } else { ": " };
                Err(RecipeError::Run(format!(
                    "{}: the recipe has changed since this run was started, so it can't be resumed{colon}{}; its own \
                     recipe is in {RESOLVED} there",
                    other.display(),
                    changes.join(", ")
                )))
            }
            (None, None) => Err(RecipeError::Run(format!(
                "{}: no unfinished run to resume; leave out `--resume` to start one",
                runs.join(recipe).display()
            ))),
        }
    }

    /// The newest run that has noted its recipe, if this one adds to it, with what it adds noted;
    /// finished or not.
    fn grown(
        runs: &Path,
        recipe: &str,
        continued: Continued<'_>,
    ) -> Result<Option<Self>, RecipeError> {
        let folder = runs.join(recipe);
        let paths = numbers(&folder).into_iter().rev();
        let noted = paths
            .map(|number| folder.join(format!("{number:03}")))
            .find_map(|path| Some((std::fs::read_to_string(path.join(RESOLVED)).ok()?, path)));
        let grown = noted.and_then(|(noted, path)| {
            let grown = continued(&noted).filter(|grown| *grown != noted)?;
            Some((grown, path))
        });
        let Some((grown, path)) = grown else {
            return Ok(None);
        };
        let directory = Self::open(path)?;
        // In this order: a run that has ended is not gone on with.
        directory.set_status(&Status {
            state: "interrupted".into(),
            stage: String::new(),
            seconds: 0.0,
            error: None,
        })?;
        directory.write(RESOLVED, &grown)?;
        Ok(Some(directory))
    }

    /// The newest unfinished run with this recipe; where there is none, the folder of the newest
    /// with another.
    fn newest(
        runs: &Path,
        recipe: &str,
        continued: Continued<'_>,
    ) -> Result<(Option<Self>, Option<PathBuf>), RecipeError> {
        let folder = runs.join(recipe);
        let unfinished =
            |path: &PathBuf| read_status(path).is_none_or(|status| status.state != "finished");
        let mut other = None;
        let paths = numbers(&folder).into_iter().rev();
        for path in paths
            .map(|number| folder.join(format!("{number:03}")))
            .filter(unfinished)
        {
            let noted = match std::fs::read_to_string(path.join(RESOLVED)) {
                Ok(noted) => noted,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(RecipeError::io(&path.join(RESOLVED))(error)),
            };
            if continued(&noted).is_some_and(|whole| whole == noted) {
                return Ok((Some(Self::open(path)?), None));
            }
            other = other.or(Some(path));
        }
        Ok((None, other))
    }

    /// Takes a run's folder for this process.
    fn open(path: PathBuf) -> Result<Self, RecipeError> {
        for _ in 0..25 {
            // Who only looks whether a run is held lets go of it at once, on a busy machine too.
            match Self::open_at_once(path.clone()) {
                Err(RecipeError::Busy(_)) => std::thread::sleep(Duration::from_millis(20)),
                taken => return taken,
            }
        }
        Self::open_at_once(path)
    }

    /// Takes a run's folder for this process, if no other has it or looks at it just now.
    fn open_at_once(path: PathBuf) -> Result<Self, RecipeError> {
        let lock_path = path.join(LOCK);
        let lock = lock_file(&lock_path).map_err(RecipeError::io(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                measured: Measurements::of(&path),
                path,
                resumed: false,
                lock: Some(lock),
            }),
            Err(TryLockError::WouldBlock) => Err(RecipeError::Busy(path)),
            Err(TryLockError::Error(error)) => Err(RecipeError::io(&lock_path)(error)),
        }
    }

    /// What is measured once for the run, or for its sweep.
    pub fn measured(&self) -> &Measurements {
        &self.measured
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of a stage, by its place in the recipe.
    pub fn stage(&self, index: usize, name: &str) -> PathBuf {
        self.path.join(format!("{:02}-{name}", index + 1))
    }

    /// Removes what a killed process left half written. The run is this process's; the runs of a
    /// sweep may be others', which tidy them when they take them, and measure for them meanwhile.
    pub fn tidy(&self) {
        let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten();
        let is_run = |folder: &Path| folder.join(LOCK).exists();
        let shared = entries(&self.path).any(|entry| is_run(&entry.path()));
        let mut folders = vec![self.path.clone()];
        while let Some(folder) = folders.pop() {
            if folder != self.path && is_run(&folder) {
                continue;
            }
            let may_be_at_work = shared && folder == self.measured.folder();
            for entry in entries(&folder) {
                let name = entry.file_name();
                let name = name.as_encoded_bytes();
                // The type of the entry itself: no link is followed.
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                    Ok(kind)
                        if kind.is_file()
                            && name.starts_with(b".")
                            && name.ends_with(b".tmp")
                            && !(may_be_at_work && is_fresh(&entry)) =>
                    {
                        // What can't be removed does no harm.
                        let _ = std::fs::remove_file(entry.path());
                    }
                    _ => {}
                }
            }
        }
    }

    /// Writes a file of the run, atomically.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write(&self, name: &str, text: &str) -> Result<(), RecipeError> {
        write_text(&self.path.join(name), text)
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
        read_status(&self.path)
    }

    /// Whether this process has the folder, and is no guest there.
    pub fn is_held(&self) -> bool {
        self.lock.is_some()
    }
}

/// Whether something was written to a file within a day.
fn is_fresh(entry: &std::fs::DirEntry) -> bool {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    let modified = entry.metadata().and_then(|data| data.modified());
    let age = modified.map(|time| time.elapsed().unwrap_or_default());
    age.is_ok_and(|age| age < DAY)
}

/// A run's status. A run that says it is running, while no process holds its lock, was killed.
pub(crate) fn read_status(run: &Path) -> Option<Status> {
    let text = std::fs::read_to_string(run.join("status.json")).ok()?;
    let mut status: Status = serde_json::from_str(&text).ok()?;
    // Copies of a run may come without this file, and some file systems have no locks.
    let free = || File::open(run.join(LOCK)).is_ok_and(|lock| lock.try_lock_shared().is_ok());
    if status.state == "running" && free() {
        status.state = "killed".into();
    }
    Some(status)
}

/// Numbers of a recipe's runs, ascending.
fn numbers(folder: &Path) -> Vec<usize> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut numbers: Vec<usize> = entries
        .flatten()
        // A larger number would be nobody's run.
        .filter_map(|entry| entry.file_name().into_string().ok()?.parse::<u32>().ok())
        .map(|number| number as usize)
        .collect();
    numbers.sort_unstable();
    numbers
}

/// Writes a text, atomically.
pub(crate) fn write_text(path: &Path, text: &str) -> Result<(), RecipeError> {
    write_atomic(path, |file| file.write_all(text.as_bytes())).map_err(RecipeError::io(path))
}

/// Readable JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<String, RecipeError> {
    serde_json::to_string_pretty(value)
        .map(|text| text + "\n")
        .map_err(|error| RecipeError::Run(error.to_string()))
}

/// The evaluation in the run that made a checkpoint, and the model's name in it.
#[cfg(feature = "cli")]
pub(crate) fn evaluation_of(checkpoint: &Path) -> Option<Evaluated> {
    let stage = checkpoint.parent()?;
    let (_, name) = stage.file_name()?.to_str()?.split_once('-')?;
    let stages = std::fs::read_dir(stage.parent()?).ok()?;
    let mut folders: Vec<_> = stages.flatten().map(|folder| folder.path()).collect();
    // A folder lists its entries in any order; of several evaluations the first stage's is used.
    folders.sort();
    folders.iter().find_map(|folder| {
        let text = std::fs::read_to_string(folder.join(EVALUATION)).ok()?;
        let json: serde_json::Value = serde_json::from_str(&text).ok()?;
        let verdicts = json.get("verdicts")?.as_array()?;
        let ours = verdicts.iter().any(|verdict| verdict["model"] == name);
        ours.then(|| Evaluated {
            model: name.to_owned(),
            evaluation: json,
        })
    })
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
        // One that has noted nothing is passed over.
        let unfinished = |resolved: &str| {
            let same = |noted: &str| (noted == resolved).then(|| resolved.to_owned());
            RunDirectory::unfinished(folder.path(), "a", resolved, &same)
        };
        let none = unfinished("x = 1").unwrap_err().to_string();
        assert!(none.contains("no unfinished run"), "{none}");
        first.write(RESOLVED, "x = 1").unwrap();
        let third = RunDirectory::create(folder.path(), "a").unwrap();
        third.write(RESOLVED, "x = 3").unwrap();
        let changed = unfinished("x = 2").unwrap_err().to_string();
        assert!(changed.contains("003: the recipe has changed"), "{changed}");
        assert!(
            changed.contains("resumed: `x` was 3 and is 2; "),
            "{changed}"
        );
        drop(third);
        assert!(unfinished("x = 3").unwrap().path().ends_with("003"));
        let taken = unfinished("x = 1").unwrap_err();
        assert!(taken.to_string().contains("another process"), "{taken}");
        let path = first.path().to_owned();
        drop(first);
        let first = unfinished("x = 1").unwrap();
        assert_eq!(first.path(), path);
        first.set_status(&finished).unwrap();
        assert!(unfinished("x = 1").is_err());
    }

    #[test]
    fn a_run_is_begun_where_none_of_its_recipe_is_unfinished() {
        let folder = tempfile::tempdir().unwrap();
        let take = |resolved: &str, resume| {
            let same = |noted: &str| (noted == resolved).then(|| resolved.to_owned());
            let taken = RunDirectory::take(folder.path(), "a", resolved, &same, resume).unwrap();
            let name = taken.path().file_name().unwrap().to_str().unwrap();
            (name.to_owned(), taken.resumed())
        };
        for (resolved, resume, number, resumed) in [
            ("x = 1", Resume::IfAny, "001", false),
            ("x = 1", Resume::IfAny, "001", true),
            ("x = 2", Resume::IfAny, "002", false),
            ("x = 1", Resume::Yes, "001", true),
            ("x = 1", Resume::No, "003", false),
            ("x = 1", Resume::IfAny, "003", true),
        ] {
            assert_eq!(take(resolved, resume), (number.to_owned(), resumed));
        }
    }

    #[test]
    fn a_run_that_nobody_runs_was_killed() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDirectory::create(folder.path(), "a").unwrap();
        let path = run.path().to_owned();
        let state = || read_status(&path).unwrap().state;
        let running = Status {
            state: "running".into(),
            stage: "teacher".into(),
            seconds: 1.0,
            error: None,
        };
        run.set_status(&running).unwrap();
        assert_eq!(state(), "running");
        drop(run);
        assert_eq!(state(), "killed");
        // Who looks does not keep others out.
        let looks = File::open(path.join(LOCK)).unwrap();
        looks.lock_shared().unwrap();
        let gone = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(30));
            drop(looks);
        });
        drop(RunDirectory::open(path.clone()).unwrap());
        gone.join().unwrap();
        std::fs::remove_file(path.join(LOCK)).unwrap();
        assert_eq!(state(), "running");
    }

    #[test]
    fn runs_of_a_sweep_share_what_they_measure() {
        let folder = tempfile::tempdir().unwrap();
        let sweep = RunDirectory::create(folder.path(), "a").unwrap();
        let first = sweep.inner("001", "x = 1", false).unwrap();
        let second = sweep.inner("002", "x = 2", false).unwrap();
        for run in [&first, &second] {
            let measured = run.measured().folder();
            assert_eq!(measured, sweep.path().join("measured"));
        }
        drop(first);
        assert!(!sweep.inner("003", "x = 3", false).unwrap().resumed());
        assert!(sweep.inner("001", "x = 1", false).unwrap().resumed());
        let other = sweep.inner("001", "x = 9", false).unwrap_err().to_string();
        assert!(other.contains("another recipe"), "{other}");
    }

    #[cfg(feature = "cli")]
    #[test]
    fn an_evaluation_is_found_by_the_stages_name() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            path
        };
        let json = serde_json::json!({ "verdicts": [{ "model": "learned" }] });
        std::fs::write(at("14-evaluate/eval.json"), json.to_string()).unwrap();
        let found = evaluation_of(&at("02-learned/model.safetensors")).unwrap();
        assert_eq!((&*found.model, &found.evaluation), ("learned", &json));
        assert_eq!(evaluation_of(&at("03-other/model.safetensors")), None);
    }
}
