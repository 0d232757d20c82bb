//! Encodes images to latents, on which training on ImageNet runs.

mod written;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};

use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use self::written::{Job, Written, lines, read_lines};
use super::latents::Dtype;
use super::{DataError, ImageFolder, with_cause};
use crate::images::{PictureError, center_crop, read_then, to_chw};
use crate::models::vae::{Vae, VaeConfig};
use crate::ops::FusedOps;
use crate::random::{self, Stream};
use crate::state::floats;
use crate::stop::Stop;
use crate::workers::{EndsAll, Workers, agree, share_out, values_of};

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

impl EndsAll for Ended {
    fn told(&self) -> Option<String> {
        match self {
            Self::Stopped => None,
            Self::Failed(error) => Some(with_cause(error)),
        }
    }

    fn heard(told: Option<String>) -> Self {
        match told {
            Some(told) => Self::Failed(DataError::Workers(told)),
            None => Self::Stopped,
        }
    }
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

#[cfg(test)]
mod tests;
