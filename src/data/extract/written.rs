//! The folder of latents that is being written, and what is noted in it so that another process can
//! go on with it.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Encoded, Extracted, Extraction, Form};
use crate::backend::Compute;
use crate::data::latents::{Layout, ShardWriter, npy_written, write_npy};
use crate::data::{DataError, ImageFolder};
use crate::files::write_atomic;
use crate::models::vae::VaeConfig;

/// File with the settings of a folder of latents, so that it is continued only with the same ones.
const JOB: &str = "extraction.json";
/// List of the images that could not be read, one line each with the reason.
pub(super) const SKIPPED: &str = "skipped.txt";

/// Everything that determines a folder of latents.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Job {
    images: usize,
    /// SHA-256 of the images' names and labels.
    list_sha256: String,
    size: usize,
    mirror: bool,
    form: Form,
    /// In batches of another size, sums may be rounded differently.
    batch: usize,
    seed: u64,
    vae_sha256: String,
    vae: VaeConfig,
    /// Another backend may round differently.
    backend: String,
    compute: Compute,
}

impl Job {
    pub(super) fn new(
        folder: &ImageFolder,
        config: &VaeConfig,
        how: &Extraction<'_>,
        (backend, compute): (String, Compute),
    ) -> Self {
        let mut hash = Sha256::new();
        for (path, label) in folder.images() {
            let name = path.file_name().unwrap_or_default();
            hash.update(name.as_encoded_bytes());
            hash.update([0]);
            hash.update(label.to_le_bytes());
        }
        Self {
            images: folder.images().len(),
            list_sha256: format!("{:x}", hash.finalize()),
            size: how.size,
            mirror: how.mirror,
            form: how.form,
            batch: how.batch,
            seed: how.seed,
            vae_sha256: how.vae_sha256.clone(),
            vae: config.clone(),
            backend,
            compute,
        }
    }
}

/// Destination of the latents.
enum Sink {
    Packed(ShardWriter),
    Npy { shape: [usize; 3], next: usize },
}

impl Sink {
    fn next(&self) -> usize {
        match self {
            Self::Packed(writer) => writer.next(),
            Self::Npy { next, .. } => *next,
        }
    }

    /// Whether the set is marked as finished, which `.npy` folders can't be.
    fn finished(&self) -> bool {
        matches!(self, Self::Packed(writer) if writer.finished())
    }

    fn push(&mut self, to: &Path, latents: &[f32], label: usize) -> Result<(), DataError> {
        match self {
            Self::Packed(writer) => writer.push(latents, label),
            Self::Npy { shape, next } => {
                write_npy(to, *next, *shape, latents, label)?;
                *next += 1;
                Ok(())
            }
        }
    }
}

/// A folder of latents that is being written, from image `start` on.
pub(super) struct Written<'a> {
    folder: &'a ImageFolder,
    to: &'a Path,
    sink: Sink,
    pub(super) skipped: BTreeMap<usize, String>,
    pub(super) start: usize,
    /// Locked for this process.
    _lock: File,
}

impl<'a> Written<'a> {
    pub(super) fn open(
        folder: &'a ImageFolder,
        config: &VaeConfig,
        how: &Extraction<'_>,
        (job, shape): (&Job, [usize; 3]),
        to: &'a Path,
    ) -> Result<Self, DataError> {
        let lock = begin(job, to)?;
        let images = folder.images().len();
        let sink = open(folder, config, how, shape, to)?;
        let skipped = read_skipped(to, images)?;
        if sink.finished() && sink.next() + skipped.len() != images {
            return Err(DataError::unexpected(
                &to.join(SKIPPED),
                format!(
                    "{} images that were left out ({images} images, {} latents)",
                    images.saturating_sub(sink.next()),
                    sink.next()
                ),
                format!("{}; extract into a new folder", skipped.len()),
            ));
        }
        Ok(Self {
            start: resume_at(sink.next(), images, &skipped),
            folder,
            to,
            sink,
            skipped,
            _lock: lock,
        })
    }

    pub(super) fn push(&mut self, encoded: Encoded) -> Result<(), DataError> {
        // Written before the batch's latents, because the numbering of later records depends on it.
        if !encoded.skipped.is_empty() {
            self.skipped.extend(encoded.skipped);
            write_skipped(self.to, self.folder, &self.skipped)?;
        }
        let record = encoded.latents.len() / encoded.good.len().max(1);
        let latents = encoded.latents.chunks_exact(record.max(1));
        for (index, latent) in encoded.good.iter().zip(latents) {
            let index = *index as usize;
            // An interrupted batch is encoded again, but its existing records stay.
            if index >= self.start {
                let (picture, label) = &self.folder.images()[index];
                let written = self.sink.push(self.to, latent, *label);
                // The sink knows records alone.
                written.map_err(|error| match error {
                    DataError::Sample {
                        expected, found, ..
                    } => DataError::unexpected(
                        picture,
                        format!("a latent of {expected}"),
                        format!("{found}, by this autoencoder"),
                    ),
                    error => error,
                })?;
            }
        }
        Ok(())
    }

    pub(super) fn finish(self, finished: bool) -> Result<Extracted, DataError> {
        let images = self.sink.next();
        if finished && let Sink::Packed(writer) = self.sink {
            writer.finish()?;
        }
        Ok(Extracted {
            images,
            skipped: self.skipped,
            finished,
        })
    }
}

/// Writes the settings, or refuses to continue with others. While the returned file is open, the
/// folder is locked for this process.
fn begin(job: &Job, to: &Path) -> Result<File, DataError> {
    let path = to.join(JOB);
    match std::fs::read(&path) {
        Ok(bytes) => {
            let there: Job = serde_json::from_slice(&bytes).map_err(|error| {
                DataError::unexpected(&path, "the description of an extraction", error.to_string())
            })?;
            if there != *job {
                return Err(DataError::unexpected(
                    &path,
                    "latents of the same images, made in the same way",
                    format!("others ({}); name another folder", differences(job, &there)),
                ));
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let taken = std::fs::read_dir(to).is_ok_and(|mut entries| entries.next().is_some());
            if taken {
                let found = "one with other files in it";
                return Err(DataError::unexpected(to, "a new or empty folder", found));
            }
            write_atomic(&path, |file| Ok(serde_json::to_writer_pretty(file, job)?))
                .map_err(DataError::io(&path))?;
        }
        Err(error) => return Err(DataError::io(&path)(error)),
    }
    let file = File::open(&path).map_err(DataError::io(&path))?;
    // File systems without locks are accepted.
    if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
        let found = "one that another process extracts into";
        return Err(DataError::unexpected(to, "a folder of its own", found));
    }
    Ok(file)
}

/// Settings in which another extraction differs, as `key there, not here`.
fn differences(job: &Job, there: &Job) -> String {
    let entries = |job: &Job| match serde_json::to_value(job) {
        Ok(serde_json::Value::Object(entries)) => entries,
        _ => serde_json::Map::new(),
    };
    let (ours, theirs) = (entries(job), entries(there));
    let unlike = ours
        .iter()
        .filter(|(key, value)| theirs.get(*key) != Some(*value));
    let told = unlike.map(|(key, value)| {
        let there = theirs
            .get(key)
            .map_or_else(|| "nothing".to_owned(), ToString::to_string);
        match key.ends_with("sha256") {
            true => key.replace("_sha256", ""),
            false => format!("{key} {there}, not {value}"),
        }
    });
    told.collect::<Vec<_>>().join("; ")
}

fn open(
    folder: &ImageFolder,
    config: &VaeConfig,
    how: &Extraction<'_>,
    shape: [usize; 3],
    to: &Path,
) -> Result<Sink, DataError> {
    let [views, channels, side] = shape;
    Ok(match how.form {
        Form::Packed(dtype) => {
            let layout = Layout {
                views,
                channels,
                side,
                dtype,
                classes: folder.classes().len(),
                records_per_shard: how.records_per_shard,
                scaling_factor: config.scaling_factor,
            };
            Sink::Packed(ShardWriter::open(to, layout, folder.classes().to_vec())?)
        }
        Form::Npy => {
            let next = npy_written(to, shape)?;
            Sink::Npy { shape, next }
        }
    })
}

/// The first image to process, given the number of records on disk and the images known as
/// unreadable.
fn resume_at(records: usize, images: usize, skipped: &BTreeMap<usize, String>) -> usize {
    let mut readable = (0..images).filter(|index| !skipped.contains_key(index));
    match records.checked_sub(1) {
        None => 0,
        Some(last) => readable.nth(last).map_or(images, |index| index + 1),
    }
}

fn read_skipped(to: &Path, images: usize) -> Result<BTreeMap<usize, String>, DataError> {
    let path = to.join(SKIPPED);
    match std::fs::read_to_string(&path) {
        Ok(text) => read_lines(&text, images).map_err(|number| {
            let expected = format!("a number below {images}, a tab and a reason in each line");
            DataError::unexpected(&path, expected, format!("line {number} otherwise"))
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) => Err(DataError::io(&path)(error)),
    }
}

/// Each line has an index below `images`, a tab and the reason.
///
/// # Errors
/// The number of the first line that has not.
pub(super) fn read_lines(text: &str, images: usize) -> Result<BTreeMap<usize, String>, usize> {
    let read = |line: &str| {
        let (index, why) = line.split_once('\t')?;
        let index = index.parse().ok().filter(|index| *index < images)?;
        Some((index, why.to_owned()))
    };
    (1..)
        .zip(text.lines())
        .map(|(number, line)| read(line).ok_or(number))
        .collect()
}

/// What [`read_lines`] reads.
pub(super) fn lines(skipped: &BTreeMap<usize, String>) -> String {
    let line =
        |(index, why): (&usize, &String)| format!("{index}\t{}\n", why.replace(['\n', '\t'], " "));
    skipped.iter().map(line).collect()
}

fn write_skipped(
    to: &Path,
    folder: &ImageFolder,
    skipped: &BTreeMap<usize, String>,
) -> Result<(), DataError> {
    debug_assert!(skipped.keys().all(|index| *index < folder.images().len()));
    let path = to.join(SKIPPED);
    write_atomic(&path, |file| {
        std::io::Write::write_all(file, lines(skipped).as_bytes())
    })
    .map_err(DataError::io(&path))
}
