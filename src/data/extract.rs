//! Encodes images to latents, on which training on ImageNet runs.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};

use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::latents::{Dtype, Layout, ShardWriter, npy_written, write_npy};
use super::{DataError, ImageFolder, with_cause};
use crate::backend::Compute;
use crate::files::write_atomic;
use crate::images::{PictureError, center_crop, read_then, to_chw};
use crate::models::vae::{Vae, VaeConfig};
use crate::ops::FusedOps;
use crate::random::{self, Stream};
use crate::state::floats;
use crate::stop::Stop;
use crate::workers::{Workers, agree, share_out, values_of};

/// File with the settings of a folder of latents, so that it is continued only with the same ones.
const JOB: &str = "extraction.json";
/// List of the images that could not be read, one line each with the reason.
const SKIPPED: &str = "skipped.txt";
/// Most pictures that a thread reads ahead of the autoencoder.
const AHEAD: usize = 4;

/// Form of latents on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Packed shards of this number type.
    Packed(Dtype),
    /// The reference's folders of `.npy` files.
    Npy,
}

/// Settings of an extraction.
#[derive(Debug, Clone)]
pub struct Extraction<'a> {
    /// Side of the centre crop, in pixels.
    pub size: usize,
    /// Whether each image's mirror image is encoded too.
    pub mirror: bool,
    /// Form of the latents on disk.
    pub form: Form,
    /// Records per packed shard; see [`RECORDS_PER_SHARD`](super::latents::RECORDS_PER_SHARD).
    pub records_per_shard: usize,
    /// Number of images encoded together.
    pub batch: usize,
    /// Pictures in the autoencoder at once: fewer need less memory and give the same latents.
    pub slice: usize,
    /// Number of threads that read pictures; at least 1.
    pub readers: usize,
    /// Seed of the draws from the posterior, which are keyed by image.
    pub seed: u64,
    /// SHA-256 of the autoencoder's weights.
    pub vae_sha256: String,
    /// Who encodes, a batch each. The first one alone has the folder of latents.
    pub workers: &'a dyn Workers,
    /// Ends the extraction between two batches.
    pub stop: Stop,
}

/// Result of an extraction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extracted {
    /// Number of images whose latents are on disk.
    pub images: usize,
    /// Images that could not be read, by their index in the folder, with the reason.
    pub skipped: BTreeMap<usize, String>,
    /// Whether the whole folder is done; false after an interrupt.
    pub finished: bool,
}

/// Everything that determines a folder of latents.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Job {
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
    fn new(
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

/// A picture for the autoencoder, `[views, 3, size, size]`, or why it can't be read.
type Picture = Result<Vec<f32>, PictureError>;

/// What images have come to.
#[derive(Debug, Default, PartialEq)]
struct Encoded {
    /// Those that have latents, by their index in the folder.
    good: Vec<u64>,
    /// Those that can't be read, with the reason.
    skipped: BTreeMap<usize, String>,
    /// `[good, views, channels, side, side]`
    latents: Vec<f32>,
}

impl Encoded {
    /// As bytes that another worker can [read](Self::received).
    fn sent(&self) -> Vec<u8> {
        let skipped = lines(&self.skipped);
        let counts = [self.good.len() as u64, skipped.len() as u64];
        let mut bytes = bytemuck::cast_slice(&counts).to_vec();
        bytes.extend(bytemuck::cast_slice(&self.good));
        bytes.extend(skipped.as_bytes());
        bytes.extend(bytemuck::cast_slice(&self.latents));
        bytes
    }

    fn received(bytes: &[u8]) -> Result<Self, DataError> {
        let unread = || DataError::Workers("what a worker sent is not understood".into());
        Self::parsed(bytes).ok_or_else(unread)
    }

    fn parsed(mut bytes: &[u8]) -> Option<Self> {
        let counts = values_of::<u64>(bytes.split_off(..16)?);
        let good = values_of(bytes.split_off(..8 * counts[0] as usize)?);
        let skipped = std::str::from_utf8(bytes.split_off(..counts[1] as usize)?).ok()?;
        Some(Self {
            good,
            skipped: read_lines(skipped, usize::MAX).ok()?,
            latents: values_of(bytes),
        })
    }
}

/// Why an extraction ends before its last batch.
enum Ended {
    Stopped,
    Failed(DataError),
}

impl From<DataError> for Ended {
    fn from(error: DataError) -> Self {
        Self::Failed(error)
    }
}

/// Encodes all images of a folder, in order, into `to`, or continues an interrupted extraction: the
/// result is the same bytes, whatever the number of workers. Each latent is a draw from the
/// posterior times the autoencoder's scaling factor, with noise that depends only on the seed, the
/// image's index and the view. Damaged files and other files are left out and listed in
/// `skipped.txt`. `progress` is called with the number of images done since the last call, and
/// whether an earlier process did them, which is so in the first call. Stops early, between
/// batches, when a stop is requested.
///
/// # Errors
/// When the folder can't be written, or holds latents made with other settings; when an image can't
/// be read because of the system; when a latent is not finite; when workers have other images or
/// another autoencoder than the first.
pub fn extract<B: FusedOps>(
    folder: &ImageFolder,
    vae: &Vae<B>,
    config: &VaeConfig,
    how: &Extraction<'_>,
    to: &Path,
    device: &B::Device,
    mut progress: impl FnMut(usize, bool),
) -> Result<Extracted, DataError> {
    let (images, workers) = (folder.images(), how.workers);
    let job = Job::new(folder, config, how, (B::name(device), vae.compute()));
    agree(workers, "what they extract", format!("{job:?}").as_bytes())
        .map_err(DataError::Workers)?;
    let shape = [
        if how.mirror { 2 } else { 1 },
        config.latent_channels,
        how.size / config.factor(),
    ];
    // The others have no folder, and are told what is in it.
    let mut written = match workers.leads() {
        true => Some(Written::open(folder, config, how, (&job, shape), to)?),
        false => None,
    };
    let mut begun = Encoded::default();
    if let Some(written) = &written {
        begun.good.push(written.start as u64);
        begun.skipped = written.skipped.clone();
    }
    let begun = Encoded::received(&workers.broadcast(begun.sent()))?;
    let start = begun.good.first().map_or(0, |start| *start as usize);
    progress(start, true);
    // Batches begin at the same images, however often the extraction was interrupted.
    let first = start / how.batch * how.batch;
    let batches = (first..images.len()).step_by(how.batch);
    let range = |batch: usize| {
        let from = first + batch * how.batch;
        from..images.len().min(from + how.batch)
    };
    let own = |batch: &usize| batch % workers.size() == workers.rank();
    let ended = std::thread::scope(|scope| -> Result<(), Ended> {
        let readers = how.readers.max(1);
        let mut queues: Vec<Receiver<Picture>> = Vec::with_capacity(readers);
        for reader in 0..readers {
            let (sender, receiver) = sync_channel(AHEAD);
            let indices = (0..batches.len()).filter(own).flat_map(range);
            let read = move || {
                for index in indices.skip(reader).step_by(readers) {
                    // Sending fails after an interrupt, when the receiver is gone.
                    if sender.send(picture(&images[index].0, how)).is_err() {
                        return;
                    }
                }
            };
            std::thread::Builder::new()
                .name(format!("pictures-{reader}"))
                .spawn_scoped(scope, read)
                .map_err(|source| DataError::Threads {
                    count: readers,
                    source,
                })?;
            queues.push(receiver);
        }
        // Each thread sends one result per image, in order.
        let mut queues = queues.iter().cycle();
        let of_batch = |batch: usize| {
            if workers.leads() && how.stop.requested() {
                return Err(Ended::Stopped);
            }
            let (mut encoded, mut pixels) = (Encoded::default(), Vec::new());
            for index in range(batch) {
                let picture = queues.next().and_then(|queue| queue.recv().ok());
                let picture = picture.ok_or_else(|| {
                    let found = "that the thread which reads it ended";
                    DataError::unexpected(&images[index].0, "a picture, or why it is none", found)
                })?;
                // Skipped images stay skipped, and images with latents keep them, even if the file
                // has changed since: the numbering of later records depends on it.
                if begun.skipped.contains_key(&index) {
                    continue;
                }
                match picture {
                    Ok(picture) => {
                        encoded.good.push(index as u64);
                        pixels.extend(picture);
                    }
                    Err(_) if index < start => {}
                    // A system error, not a damaged picture: the next run may read it.
                    Err(PictureError::Io { path, source }) => {
                        return Err(DataError::Io { path, source }.into());
                    }
                    Err(why) => {
                        encoded.skipped.insert(index, with_cause(&why));
                    }
                }
            }
            encoded.latents = encode(vae, config, how, shape, &encoded.good, pixels, device);
            Ok(encoded.sent())
        };
        share_out(workers, batches.len(), of_batch, |batch, bytes| {
            if let Some(written) = &mut written {
                written.push(Encoded::received(&bytes)?)?;
            }
            progress(range(batch).end - range(batch).start.max(start), false);
            Ok(())
        })
    });
    let finished = match ended {
        Ok(()) => true,
        Err(Ended::Stopped) => false,
        Err(Ended::Failed(error)) => return Err(error),
    };
    match written {
        Some(written) => written.finish(finished),
        None => Ok(Extracted {
            images: 0,
            skipped: BTreeMap::new(),
            finished,
        }),
    }
}

/// A folder of latents that is being written, from image `start` on.
struct Written<'a> {
    folder: &'a ImageFolder,
    to: &'a Path,
    sink: Sink,
    skipped: BTreeMap<usize, String>,
    start: usize,
    /// Locked for this process.
    _lock: File,
}

impl<'a> Written<'a> {
    fn open(
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

    fn push(&mut self, encoded: Encoded) -> Result<(), DataError> {
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
                self.sink
                    .push(self.to, latent, self.folder.images()[index].1)?;
            }
        }
        Ok(())
    }

    fn finish(self, finished: bool) -> Result<Extracted, DataError> {
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

/// Reads, crops and scales a picture.
fn picture(path: &Path, how: &Extraction<'_>) -> Picture {
    let pixels = read_then(path, |picture| center_crop(&picture, how.size))?;
    let mut views = to_chw(&pixels, how.size, false);
    if how.mirror {
        views.extend(to_chw(&pixels, how.size, true));
    }
    Ok(views)
}

/// Latents `[images, views, channels, side, side]` of pictures `[images, views, 3, size, size]`.
fn encode<B: FusedOps>(
    vae: &Vae<B>,
    config: &VaeConfig,
    how: &Extraction<'_>,
    [views, channels, side]: [usize; 3],
    images: &[u64],
    pixels: Vec<f32>,
    device: &B::Device,
) -> Vec<f32> {
    if images.is_empty() {
        return Vec::new();
    }
    let count = images.len() * views;
    let pixels = TensorData::new(pixels, [count, 3, how.size, how.size]);
    let posterior = vae.encode_in_slices(Tensor::from_data(pixels, device), how.slice);
    let noise: Vec<f32> = images
        .iter()
        .flat_map(|&index| (0..views).map(move |view| (index, view as u64)))
        .flat_map(|(index, view)| {
            random::normal(
                how.seed,
                Stream::Posterior,
                view,
                index,
                channels * side * side,
            )
        })
        .collect();
    let noise = Tensor::from_data(
        TensorData::new(noise, [count, channels, side, side]),
        device,
    );
    floats((posterior.sample(noise) * config.scaling_factor).into_data())
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
fn read_lines(text: &str, images: usize) -> Result<BTreeMap<usize, String>, usize> {
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
fn lines(skipped: &BTreeMap<usize, String>) -> String {
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

#[cfg(test)]
mod tests;
