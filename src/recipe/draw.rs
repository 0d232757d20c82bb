//! Drawing samples, few or fifty thousand: in parts on disk, so that what is drawn survives a kill and can be shared out.
//!
//! A part is one batch of samples, always the same ones: which process draws it, and when, changes nothing. The parts of
//! a finished set become one archive and are deleted.

use std::fs::TryLockError;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, backend::Backend};

use super::RecipeError;
use super::progress::Progress;
use super::schema::sample::{Labels, Sample, Sampling};
use crate::files::{lock_file, write_atomic};
use crate::images::Images;
use crate::models::vae::{Vae, VaeConfig, pixels};
use crate::models::{DitConfig, Network};
use crate::npz::{SampleReader, SampleWriter};
use crate::ops::FusedOps;
use crate::process::{GaussianDiffusion, Guidance, Sampler, Variance};
use crate::random::{self, Stream};
use crate::report::grid_png;
use crate::weights::{Checkpoint, Known, read_vae};

/// Columns of a picture of samples.
pub(super) const COLUMNS: usize = 20;
/// Pixels along a side of a picture of samples, at most.
const PICTURE: usize = 4096;
/// Latents an autoencoder decodes at once: at 256 x 256 each takes some hundred MiB on the way.
const DECODED_AT_ONCE: usize = 4;

/// File of the first samples as a picture.
pub(super) const PICTURE_FILE: &str = "samples.png";

/// File that says how samples were drawn, beside them.
pub(super) const SAMPLING: &str = "sampling.json";

/// File of the samples, in their folder.
pub const SAMPLES: &str = "samples.npz";

/// Makes images of latents.
pub(super) struct Decoder<B: Backend> {
    vae: Known<Vae<B>>,
    config: VaeConfig,
}

impl<B: FusedOps> Decoder<B> {
    /// Reads an autoencoder that decodes what a model draws.
    pub(super) fn read(
        path: &Path,
        model: &DitConfig,
        device: &B::Device,
    ) -> Result<Self, RecipeError> {
        let (vae, config) = read_vae(path, device)?;
        if config.latent_channels != model.channels {
            return Err(RecipeError::Run(format!(
                "{}: its latents have {} channels, and the model draws {}",
                path.display(),
                config.latent_channels,
                model.channels
            )));
        }
        Ok(Self { vae, config })
    }

    /// SHA-256 of its weight file.
    pub(super) fn sha256(&self) -> &str {
        &self.vae.sha256
    }

    fn decode(&self, latents: Tensor<B, 4>) -> Images {
        let latents = latents / self.config.scaling_factor;
        pixels(self.vae.network.decode_in_slices(latents, DECODED_AT_ONCE))
    }
}

/// A share of the work: every `of`-th part from the `index`-th.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// From 0.
    pub index: usize,
    /// Number of shares.
    pub of: usize,
}

impl Share {
    /// All of it.
    pub const WHOLE: Self = Self { index: 0, of: 1 };
}

/// What is drawn, from what, into where.
pub(super) struct Draw<'a, B: Backend> {
    pub(super) name: &'a str,
    pub(super) network: &'a Network<B>,
    pub(super) decoder: Option<&'a Decoder<B>>,
    pub(super) sampling: &'a Sampling,
    pub(super) seed: u64,
    pub(super) folder: &'a Path,
    pub(super) share: Share,
}

/// Samples that were drawn.
pub(super) struct Drawn {
    pub(super) labels: Vec<usize>,
    /// The archive; None where other shares have still to draw theirs.
    pub(super) archive: Option<PathBuf>,
}

impl<B: FusedOps> Draw<'_, B> {
    /// Draws what is not there yet of this share; with the last part, puts all together.
    pub(super) fn run(&self, device: &B::Device) -> Result<Drawn, RecipeError> {
        let sampling = self.sampling;
        let labels = labels(sampling, self.network.config().classes, self.seed);
        let archive = self.folder.join(SAMPLES);
        let sampler = sampler(self.name, sampling, &self.network.config())?;
        let parts = Parts {
            folder: self.folder.join("parts"),
            sampling,
            shape: self.shape(),
        };
        if archive.exists() {
            self.check(&archive)?;
            // Another process may have been stopped before it had tidied up.
            if !self.folder.join(PICTURE_FILE).exists() {
                self.picture(&archive)?;
            }
            parts.delete();
            let archive = Some(archive);
            return Ok(Drawn { labels, archive });
        }
        let ours = (0..parts.count()).filter(|part| part % self.share.of == self.share.index);
        let missing: Vec<usize> = ours.filter(|part| !parts.has(*part)).collect();
        // By steps: a batch may take minutes, in which a bar of images would stand still.
        let steps = missing.len() * sampling.steps;
        let mut progress = Progress::new(self.name, "steps", steps);
        for &part in &missing {
            if crate::interrupt::requested() {
                return Err(RecipeError::Interrupted);
            }
            let indices: Vec<usize> = parts.range(part).collect();
            let samples = sampler.generate(
                self.network,
                self.seed,
                &indices,
                &labels[parts.range(part)],
                device,
                || progress.add(1),
            );
            let values = samples.to_data();
            if let Some(at) = values.iter::<f32>().position(|value| !value.is_finite()) {
                let values_a_sample = values.num_elements() / indices.len();
                return Err(RecipeError::Stage {
                    stage: self.name.to_owned(),
                    problem: format!(
                        "sample {} is not of finite numbers: the model's weights are damaged, or the guidance is too strong",
                        indices[at / values_a_sample]
                    ),
                });
            }
            let images = match self.decoder {
                Some(decoder) => decoder.decode(samples),
                None => plain(samples),
            };
            parts.write(part, &images)?;
        }
        progress.finish();
        let whole = (0..parts.count()).all(|part| parts.has(part));
        // Of several processes that see the last part, one puts them together.
        let lock = self.folder.join("parts.lock");
        let lock_file = lock_file(&lock).map_err(RecipeError::io(&lock))?;
        // A file system without locks is no reason not to: the archive appears whole or not at all.
        let whole = whole && !matches!(lock_file.try_lock(), Err(TryLockError::WouldBlock));
        if whole && !archive.exists() {
            parts.assemble(&archive, &labels)?;
            self.picture(&archive)?;
            parts.delete();
        }
        Ok(Drawn {
            labels,
            // Another process may have put them together, and deleted the parts, by now.
            archive: archive.exists().then_some(archive),
        })
    }

    /// Refuses an archive that is not that of these samples: somebody else may have put it there.
    fn check(&self, archive: &Path) -> Result<(), RecipeError> {
        let [height, width, channels] = self.shape();
        let expected = [self.sampling.count, height, width, channels];
        let found = match archive.is_file() {
            true => SampleReader::open(archive)?.shape(),
            false => [0; 4],
        };
        if found == expected {
            return Ok(());
        }
        Err(RecipeError::Run(format!(
            "{}: expected samples of shape {expected:?}, found {}; take it away, and they are drawn again",
            archive.display(),
            match archive.is_file() {
                true => format!("{found:?}"),
                false => "a folder".to_owned(),
            }
        )))
    }

    /// `[height, width, channels]` of an image.
    fn shape(&self) -> [usize; 3] {
        let model = self.network.config();
        match self.decoder {
            Some(Decoder { config, .. }) => {
                let side = model.input_size * config.factor();
                [side, side, config.out_channels]
            }
            None => [model.input_size, model.input_size, model.channels],
        }
    }

    /// The first samples as a picture.
    fn picture(&self, archive: &Path) -> Result<(), RecipeError> {
        let [side, ..] = self.shape();
        let (columns, scale) = grid(side, self.sampling.count);
        let images = first_images(archive, columns * 10)?;
        let path = self.folder.join(PICTURE_FILE);
        Ok(grid_png(&path, &images, columns, scale)?)
    }
}

/// The sampler of a protocol for a model; `stage` is for messages.
pub(super) fn sampler(
    stage: &str,
    sampling: &Sampling,
    model: &DitConfig,
) -> Result<Sampler, RecipeError> {
    let steps = sampling.steps;
    let spacing = if steps == GaussianDiffusion::full().steps() {
        String::new()
    } else {
        steps.to_string()
    };
    let mut diffusion = GaussianDiffusion::new(&spacing).map_err(|error| RecipeError::Stage {
        stage: stage.to_owned(),
        problem: error.to_string(),
    })?;
    if !model.learn_sigma {
        // What the reference samples such models with.
        diffusion = diffusion.with_variance(Variance::FixedLarge);
    }
    Ok(Sampler {
        diffusion,
        solver: sampling.solver,
        guidance: Guidance {
            scale: sampling.guidance,
            channels: sampling.guidance_channels,
        },
    })
}

/// Draws samples of a checkpoint into a folder, or goes on with what is there; of a `share` alone, so that several
/// processes can draw into one folder. Returns the archive, once all shares are drawn.
///
/// # Errors
/// When the folder holds samples of another model or drawn in another way; when the model can't be drawn from.
pub fn draw_into<B: FusedOps>(
    checkpoint: &Checkpoint,
    sample: &Sample,
    seed: u64,
    folder: &Path,
    share: Share,
    device: &B::Device,
) -> Result<Option<PathBuf>, RecipeError> {
    let network = checkpoint.network::<B>(device)?;
    let model = network.config();
    let decoder = sample
        .vae
        .as_deref()
        .map(|path| Decoder::read(path, &model, device));
    let decoder = decoder.transpose()?;
    let settings = serde_json::json!({
        "model": checkpoint.fingerprint()?,
        "vae": decoder.as_ref().map(Decoder::sha256),
        "seed": seed,
        "backend": B::name(device),
        "compute": crate::ops::compute(),
        "how": sample.sampling,
    });
    let path = folder.join(SAMPLING);
    match std::fs::read(&path) {
        Ok(bytes) => {
            let there: Option<serde_json::Value> = serde_json::from_slice(&bytes).ok();
            if there.as_ref() != Some(&settings) {
                return Err(RecipeError::Run(format!(
                    "{}: the samples there are drawn from another model or in another way; name another folder",
                    path.display()
                )));
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // What lies there was drawn from who knows what. (A temporary file is another share's, just begun.)
            let foreign = std::fs::read_dir(folder).is_ok_and(|entries| {
                let mut names = entries.flatten().map(|entry| entry.file_name());
                names.any(|name| !name.as_encoded_bytes().starts_with(b"."))
            });
            // Unless another share has begun in the meantime.
            if foreign && !path.exists() {
                return Err(RecipeError::Run(format!(
                    "{}: is not empty, and nothing says how its files were made; name another folder",
                    folder.display()
                )));
            }
            let text = super::run::directory::json(&settings)?;
            write_atomic(&path, |file| file.write_all(text.as_bytes()))
                .map_err(RecipeError::io(&path))?;
        }
        Err(error) => return Err(RecipeError::io(&path)(error)),
    }
    let drawn = Draw {
        name: "sample",
        network: &network,
        decoder: decoder.as_ref(),
        sampling: &sample.sampling,
        seed,
        folder,
        share,
    }
    .run(device)?;
    Ok(drawn.archive)
}

/// Columns of a picture of images of a size, and how much each is enlarged: small ones are, for people's eyes.
pub(super) fn grid(side: usize, count: usize) -> (usize, u32) {
    let scale = (64 / side.max(1)).clamp(1, 5);
    let columns = (PICTURE / (side * scale).max(1)).clamp(1, COLUMNS);
    (columns.min(count.max(1)), scale as u32)
}

/// At most `count` images of an archive, from the first.
pub(super) fn first_images(archive: &Path, count: usize) -> Result<Images, RecipeError> {
    let mut reader = crate::npz::SampleReader::open(archive)?;
    reader
        .next_block(count)?
        .ok_or_else(|| RecipeError::Run(format!("{}: holds no images", archive.display())))
}

/// The label of each sample. A sample's does not depend on how many there are.
pub(super) fn labels(sampling: &Sampling, classes: usize, seed: u64) -> Vec<usize> {
    let all: Vec<usize> = sampling
        .classes
        .clone()
        .unwrap_or_else(|| (0..classes).collect());
    (0..sampling.count)
        .map(|index| match sampling.labels {
            Labels::Balanced => all[index % all.len()],
            Labels::Drawn => all[random::below(seed, Stream::Class, 0, index as u64, all.len())],
        })
        .collect()
}

/// Samples of a model of pixels, `[count, channels, size, size]` in [−1, 1], as bytes.
fn plain<B: Backend>(samples: Tensor<B, 4>) -> Images {
    let [count, channels, height, width] = samples.dims();
    let values = samples.permute([0, 2, 3, 1]).into_data();
    let bytes = values.iter::<f32>().map(byte).collect();
    Images::new(bytes, [count, height, width, channels]).expect("a permutation keeps the count")
}

/// A value in [−1, 1] as a byte.
pub(super) fn byte(value: f32) -> u8 {
    // The cast saturates, and takes NaN to 0.
    ((value + 1.0) * 127.5).round() as u8
}

/// Samples on disk, one file a batch.
struct Parts<'a> {
    folder: PathBuf,
    sampling: &'a Sampling,
    /// `[height, width, channels]`
    shape: [usize; 3],
}

impl Parts<'_> {
    fn count(&self) -> usize {
        self.sampling.count.div_ceil(self.sampling.batch)
    }

    /// Samples of a part.
    fn range(&self, part: usize) -> Range<usize> {
        let first = part * self.sampling.batch;
        first..self.sampling.count.min(first + self.sampling.batch)
    }

    fn path(&self, part: usize) -> PathBuf {
        self.folder.join(format!("part-{part:06}.u8"))
    }

    /// Whether a part was drawn; one that was cut off while it was written has another name.
    fn has(&self, part: usize) -> bool {
        let bytes = self.range(part).len() * self.shape.iter().product::<usize>();
        std::fs::metadata(self.path(part)).is_ok_and(|found| found.len() == bytes as u64)
    }

    fn write(&self, part: usize, images: &Images) -> Result<(), RecipeError> {
        let path = self.path(part);
        write_atomic(&path, |file| file.write_all(images.pixels())).map_err(RecipeError::io(&path))
    }

    fn assemble(&self, archive: &Path, labels: &[usize]) -> Result<(), RecipeError> {
        let [height, width, channels] = self.shape;
        let labels: Vec<i64> = labels.iter().map(|label| *label as i64).collect();
        let shape = [self.sampling.count, height, width, channels];
        let mut writer = SampleWriter::create(archive, shape)?;
        for part in 0..self.count() {
            let path = self.path(part);
            let pixels = std::fs::read(&path).map_err(RecipeError::io(&path))?;
            let images = Images::new(pixels, [self.range(part).len(), height, width, channels]);
            let broken = |error| RecipeError::Run(format!("{}: {error}", path.display()));
            writer.push(&images.map_err(broken)?)?;
        }
        Ok(writer.finish(Some(&labels))?)
    }

    fn delete(&self) {
        // They were only there to go on from: what can't be deleted does no harm.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
