//! What a run measures once: scores of layers, losses of masks, importance of channels, statistics
//! of pictures. The runs of a sweep share it.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::directory::json;
use crate::files::{lock_file, write_atomic};
use crate::recipe::RecipeError;
use crate::stop::Stop;
use crate::workers::Workers;

/// How often a process looks whether another has measured what it waits for.
const LOOK: Duration = Duration::from_millis(100);

/// The folder of what is measured once, a file each, named by a hash of what it depends on.
#[derive(Debug, Clone)]
pub struct Measurements {
    folder: PathBuf,
}

impl Measurements {
    /// Those of a run or sweep.
    pub fn of(run: &Path) -> Self {
        let folder = run.join("measured");
        Self { folder }
    }

    /// What is measured for a key, as `read` has it from the text that `measure` gives: from a
    /// file, if it has been before, else measured and kept. What `read` can't read is measured
    /// anew. Of several workers the first one's file counts; of several processes that share a
    /// sweep one measures, and the others wait for it.
    ///
    /// # Errors
    /// When it can't be measured, written, or read.
    pub fn get<T>(
        &self,
        (workers, stop): (&dyn Workers, &Stop),
        what: &str,
        key: &impl Serialize,
        read: impl Fn(String) -> Option<T>,
        measure: impl FnOnce() -> Result<String, RecipeError>,
    ) -> Result<T, RecipeError> {
        let path = self.file(what, key, "csv")?;
        std::fs::create_dir_all(&self.folder).map_err(RecipeError::io(&self.folder))?;
        let _turn = match workers.leads() {
            true => turn(&path, what, stop)?,
            false => None,
        };
        let readable = |text: &String| read(text.clone()).is_some();
        let kept = std::fs::read_to_string(&path).ok().filter(readable);
        let kept = workers.broadcast(kept.unwrap_or_default().into_bytes());
        let kept = String::from_utf8(kept).ok().filter(|kept| !kept.is_empty());
        if let Some(kept) = kept.and_then(&read) {
            crate::say!("{what} from {}", path.display());
            return Ok(kept);
        }
        // On devices whose last bits differ each would have another.
        let text = workers.broadcast(measure()?.into_bytes());
        let text = String::from_utf8(text).unwrap_or_default();
        write_atomic(&path, |file| file.write_all(text.as_bytes()))
            .map_err(RecipeError::io(&path))?;
        read(text).ok_or_else(|| {
            RecipeError::Run(format!(
                "{}: expected {what}, found something else",
                path.display()
            ))
        })
    }

    /// The file of what is measured for a key.
    ///
    /// # Errors
    /// When the key can't be written as JSON.
    pub fn file(
        &self,
        what: &str,
        key: &impl Serialize,
        extension: &str,
    ) -> Result<PathBuf, RecipeError> {
        let name = format!("{what}-{:x}.{extension}", Sha256::digest(json(key)?));
        Ok(self.folder.join(name))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// A file's lock, once no other process that works on this measurement has it; none where the file
/// system has no locks. Who has measured puts another file in the place of the one that it locked.
fn turn(path: &Path, what: &str, stop: &Stop) -> Result<Option<File>, RecipeError> {
    let lock = lock_file(path).map_err(RecipeError::io(path))?;
    let mut told = false;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(Some(lock)),
            Err(TryLockError::Error(_)) => return Ok(None),
            Err(TryLockError::WouldBlock) => {}
        }
        if stop.requested() {
            return Err(RecipeError::Interrupted);
        }
        if !std::mem::replace(&mut told, true) {
            let path = path.display();
            crate::say!("waits for {what} that another process measures: {path}");
        }
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::workers::Alone;

    #[test]
    fn one_measures_and_the_others_wait_for_it() {
        let run = tempfile::tempdir().unwrap();
        let (times, stop) = (AtomicUsize::new(0), Stop::default());
        let get = || {
            let measured = Measurements::of(run.path());
            let read = |text: String| text.parse::<u32>().ok();
            measured.get((&Alone, &stop), "scores", &1, read, || {
                times.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(2 * LOOK);
                Ok("7".into())
            })
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (0..3).map(|_| scope.spawn(get)).collect();
            for other in others {
                assert_eq!(other.join().unwrap().unwrap(), 7);
            }
        });
        assert_eq!(times.load(Ordering::SeqCst), 1);
        // Who waits can be stopped.
        let measured = Measurements::of(run.path());
        let path = measured.file("scores", &1, "csv").unwrap();
        let held = lock_file(&path).unwrap();
        held.lock().unwrap();
        stop.request();
        assert!(matches!(get(), Err(RecipeError::Interrupted)));
    }

    #[test]
    fn what_was_measured_is_not_measured_again() {
        let run = tempfile::tempdir().unwrap();
        let measured = Measurements::of(run.path());
        let read = |text: String| text.parse::<u32>().ok();
        let get = |key: u32, gives: &str| {
            let measure = || Ok(gives.to_owned());
            measured.get(
                (&Alone, &Stop::default()),
                "scores",
                &("a", key),
                read,
                measure,
            )
        };
        assert_eq!(get(1, "1").unwrap(), 1);
        let again = || -> Result<String, RecipeError> { panic!("measured again") };
        let alone = (&Alone as &dyn Workers, &Stop::default());
        let found = Measurements::of(run.path()).get(alone, "scores", &("a", 1), read, again);
        assert_eq!(found.unwrap(), 1);
        assert_eq!(get(2, "2").unwrap(), 2);
        // A damaged file is as good as none.
        for entry in std::fs::read_dir(measured.folder()).unwrap() {
            std::fs::write(entry.unwrap().path(), "1;").unwrap();
        }
        assert_eq!(get(2, "3").unwrap(), 3);
        let wrong = get(4, "x").unwrap_err().to_string();
        assert!(wrong.contains("expected scores"), "{wrong}");
    }
}
