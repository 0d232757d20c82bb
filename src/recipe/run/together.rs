//! A run of several workers: who has which directory.
//!
//! The first worker has the run's own. The others work on the same stages in a folder of the
//! system's temporary ones, where they leave the same models, and which is removed at the end; of a
//! run that goes on they get a copy of what is there. So no disk need be shared.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::DONE;
use super::Options;
use super::directory::{Continued, Resume, RunDirectory};
use crate::files::{lock_file, write_atomic};
use crate::recipe::RecipeError;
use crate::recipe::plan::Plan;
use crate::recipe::schema::StageKind;
use crate::training::CHECKPOINTS;
use crate::workers::{Group, Workers, agree, fits};

/// Bytes of a file that are sent at once.
const CHUNK: usize = 64 << 20;

/// Beginning of the names of the folders in which the others work.
const SCRATCH: &str = "tinyfusion-worker-";

/// Whether so many workers can share a plan.
///
/// # Errors
/// Names the stage that they can't, and the numbers of workers that can.
pub(crate) fn can_share(plan: &Plan, workers: &Group) -> Result<(), RecipeError> {
    let size = workers.size();
    if size == 1 {
        return Ok(());
    }
    for stage in &plan.recipe.stages {
        let problem = match &stage.kind {
            StageKind::Extract(_) => Err(
                "its latents would be on one worker's disk; run `tinyfusion extract` first, and give its folder as `data`"
                    .to_owned(),
            ),
            kind => match kind.optimisation() {
                Some(optimisation) => fits(size, optimisation.accumulate),
                None => Ok(()),
            },
        };
        problem.map_err(|problem| RecipeError::Stage {
            stage: stage.name.clone(),
            problem,
        })?;
    }
    Ok(())
}

/// The directory in which this worker runs, and what removes it where it is no run's own.
///
/// # Errors
/// When it can't be made or found, or the workers were started with unlike recipes.
pub(super) fn take(
    options: &Options,
    recipe: &str,
    resolved: &str,
    continued: Continued<'_>,
) -> Result<(RunDirectory, Option<Scratch>), RecipeError> {
    let workers = &*options.workers;
    if options.resume == Resume::Join && workers.size() > 1 {
        let problem = "workers that share every run can't join a sweep";
        return Err(RecipeError::Run(problem.into()));
    }
    let version = format!(
        "{} {}",
        env!("CARGO_PKG_VERSION"),
        env!("TINYFUSION_COMMIT")
    );
    for (what, text) in [
        ("the program's version", &*version),
        ("the recipe", resolved),
    ] {
        agree(workers, what, text.as_bytes()).map_err(RecipeError::Run)?;
    }
    if workers.leads() {
        let directory =
            RunDirectory::take(&options.runs, recipe, resolved, continued, options.resume)?;
        let resumed = directory.resumed();
        workers.broadcast(vec![u8::from(resumed)]);
        if resumed && workers.size() > 1 {
            send(workers, directory.path())?;
        }
        return Ok((directory, None));
    }
    let scratch = Scratch::new(&std::env::temp_dir())?;
    let resume = match workers.broadcast(Vec::new())[..] {
        [1] => Resume::Yes,
        _ => Resume::No,
    };
    if resume == Resume::Yes {
        receive(workers, &scratch.path.join(recipe).join("001"))?;
    }
    let directory = RunDirectory::take(&scratch.path, recipe, resolved, continued, resume)?;
    Ok((directory, Some(scratch)))
}

/// A file that follows.
#[derive(Serialize, Deserialize)]
struct Header {
    path: PathBuf,
    bytes: u64,
}

/// Sends what a run needs to go on: not its locks, pages and samples, nor what is left of the
/// checkpoints of finished stages. No link is followed.
fn send(workers: &dyn Workers, run: &Path) -> Result<(), RecipeError> {
    let mut folders = vec![run.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder).map_err(RecipeError::io(&folder))?;
        for entry in entries {
            let entry = entry.map_err(RecipeError::io(&folder))?;
            let (path, name) = (entry.path(), entry.file_name());
            let kind = entry.file_type().map_err(RecipeError::io(&path))?;
            let unneeded = match name.to_str().unwrap_or_default() {
                "run.lock" | "report" | "parts" | "quality" | "samples.npz" => true,
                CHECKPOINTS => folder.join(DONE).exists(),
                _ => false,
            };
            if kind.is_dir() && !unneeded {
                folders.push(path);
                continue;
            }
            if !kind.is_file() || unneeded {
                continue;
            }
            let mut file = File::open(&path).map_err(RecipeError::io(&path))?;
            let bytes = file.metadata().map_err(RecipeError::io(&path))?.len();
            let inner = path.strip_prefix(run).unwrap_or(&path).to_owned();
            let header = serde_json::to_vec(&Header { path: inner, bytes });
            workers.broadcast(header.map_err(|error| RecipeError::Run(error.to_string()))?);
            let mut left = bytes as usize;
            while left > 0 {
                let mut chunk = vec![0; left.min(CHUNK)];
                file.read_exact(&mut chunk)
                    .map_err(RecipeError::io(&path))?;
                left -= chunk.len();
                workers.broadcast(chunk);
            }
        }
    }
    workers.broadcast(Vec::new());
    Ok(())
}

/// Writes what [`send`] sends into a folder.
fn receive(workers: &dyn Workers, run: &Path) -> Result<(), RecipeError> {
    std::fs::create_dir_all(run).map_err(RecipeError::io(run))?;
    loop {
        let header = workers.broadcast(Vec::new());
        if header.is_empty() {
            return Ok(());
        }
        let header: Header = serde_json::from_slice(&header).map_err(|error| {
            RecipeError::Run(format!("a file's name was not understood: {error}"))
        })?;
        let plain = |part| matches!(part, Component::Normal(_));
        if !header.path.components().all(plain) {
            let path = header.path.display();
            return Err(RecipeError::Run(format!("{path}: is no path within a run")));
        }
        let path = run.join(&header.path);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(RecipeError::io(folder))?;
        }
        let write = |file: &mut BufWriter<File>| {
            let mut left = header.bytes as usize;
            while left > 0 {
                let chunk = workers.broadcast(Vec::new());
                file.write_all(&chunk)?;
                left = left.saturating_sub(chunk.len());
            }
            Ok(())
        };
        write_atomic(&path, write).map_err(RecipeError::io(&path))?;
    }
}

/// A number that no other folder of this process has.
fn nonce() -> u128 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_nanos()
}

/// A folder of this process's own, removed when it is dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    path: PathBuf,
    /// Locked as long as the folder is used; the system lets go of it however the process ends.
    _lock: File,
}

impl Scratch {
    /// Makes one among these temporary folders, and removes those that killed processes left.
    fn new(folders: &Path) -> Result<Self, RecipeError> {
        const LOCK: &str = "scratch.lock";
        for entry in std::fs::read_dir(folders).into_iter().flatten().flatten() {
            let left = entry.path();
            let ours = entry.file_name().to_string_lossy().starts_with(SCRATCH);
            let unused = || lock_file(&left.join(LOCK)).is_ok_and(|lock| lock.try_lock().is_ok());
            if ours && left.join(LOCK).is_file() && unused() {
                // What can't be removed does no harm.
                let _ = std::fs::remove_dir_all(&left);
            }
        }
        // Under another name until it is locked: others look for folders that nobody has locked.
        let process = std::process::id();
        let unnamed = folders.join(format!(".{SCRATCH}{process}-{}", nonce()));
        std::fs::create_dir(&unnamed).map_err(RecipeError::io(&unnamed))?;
        let lock = lock_file(&unnamed.join(LOCK)).map_err(RecipeError::io(&unnamed))?;
        let path = folders.join(format!("{SCRATCH}{process}-{}", nonce()));
        let locked = lock.try_lock().map_err(std::io::Error::from);
        locked
            .and_then(|()| std::fs::rename(&unnamed, &path))
            .map_err(RecipeError::io(&path))?;
        Ok(Self { path, _lock: lock })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::fake;

    #[test]
    fn a_run_that_goes_on_is_copied_without_its_locks_and_pages() {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        let large = vec![7; 1000];
        for (path, bytes) in [
            ("0/status.json", &b"{}"[..]),
            ("0/01-train/model.safetensors", &large),
            ("0/01-train/empty", b""),
            ("0/run.lock", b""),
            ("0/report/table.csv", b"1"),
            ("0/01-train/done.json", b"{}"),
            ("0/01-train/checkpoints/step-1", b"1"),
            ("0/02-recover/checkpoints/step-1", b"2"),
        ] {
            std::fs::create_dir_all(at(path).parent().unwrap()).unwrap();
            std::fs::write(at(path), bytes).unwrap();
        }
        fake::group(3, |workers| match workers.rank() {
            0 => send(workers, &at("0")).unwrap(),
            rank => receive(workers, &at(&rank.to_string())).unwrap(),
        });
        for rank in ["1", "2"] {
            let read = |path: &str| std::fs::read(at(rank).join(path));
            assert_eq!(read("01-train/model.safetensors").unwrap(), large);
            assert_eq!(read("01-train/empty").unwrap(), b"");
            assert_eq!(read("02-recover/checkpoints/step-1").unwrap(), b"2");
            assert!(read("01-train/checkpoints/step-1").is_err());
            assert!(read("run.lock").is_err() && read("report/table.csv").is_err());
        }
    }

    #[test]
    fn folders_that_killed_workers_left_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let left = folder.path().join("tinyfusion-worker-1");
        let others = folder.path().join("tinyfusion-worker-of-others");
        for path in [&left, &others] {
            std::fs::create_dir(path).unwrap();
        }
        std::fs::write(left.join("scratch.lock"), "").unwrap();
        let scratch = Scratch::new(folder.path()).unwrap();
        assert!(!left.exists() && others.exists() && scratch.path.exists());
        let path = scratch.path.clone();
        drop(scratch);
        assert!(!path.exists());
    }
}
