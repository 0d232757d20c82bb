//! Drawing samples, and continuing with existing ones.

use std::fs::TryLockError;
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;

use super::parts::Parts;
use super::{Decoder, Sampling, SamplingError, Share};
use crate::backend::Compute;
use crate::files::{lock_file, write_atomic};
use crate::images;
use crate::models::{Architecture, Denoiser, Network};
use crate::npz::{SampleReader, first_images};
use crate::ops::FusedOps;
use crate::process::{Guidance, ProcessKind, Sampler};
use crate::report::{grid_layout, grid_png};
use crate::stop::Stop;
use crate::weights::Checkpoint;
use crate::workers::{Group, agree, share_out};

/// File name of the picture of the first samples.
pub const PICTURE_FILE: &str = "samples.png";

/// File name of the sampling's settings, beside the samples.
pub const SAMPLING: &str = "sampling.json";

/// File name of the samples' archive.
pub const SAMPLES: &str = "samples.npz";

/// The settings of a drawing.
pub struct Draw<'a, B: Backend> {
    /// The model's name in messages.
    pub name: &'a str,
    /// The model.
    pub network: &'a Network<B>,
    /// The process it was trained under.
    pub process: ProcessKind,
    /// Decodes latents to pictures; none for a model of pixels.
    pub decoder: Option<&'a Decoder<B>>,
    /// Settings of the sampling.
    pub sampling: &'a Sampling,
    /// Seed of all noise and labels.
    pub seed: u64,
    /// Folder of archive, picture and parts.
    pub folder: &'a Path,
    /// This job's share of the work: every `of`-th part, from the `index`-th on.
    pub share: Share,
    /// Who draws the share's parts. The first one alone has the folder.
    pub workers: &'a Group,
    /// Ends the drawing between two parts.
    pub stop: &'a Stop,
}

/// Samples that were drawn.
pub struct Drawn {
    /// The class of each sample.
    pub labels: Vec<usize>,
    /// The archive; None while other shares are unfinished, and for all workers but the first.
    pub archive: Option<PathBuf>,
}

impl<B: FusedOps> Draw<'_, B> {
    /// Draws the missing parts of this share; with the last part, assembles the archive. `progress`
    /// is called with the number of steps done and of all steps: a batch may take minutes.
    ///
    /// # Errors
    /// When the model's samples are not finite; when the folder holds something else, or can't be
    /// written.
    pub fn run(
        &self,
        device: &B::Device,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Drawn, SamplingError> {
        let sampling = self.sampling;
        let labels = sampling.label_of_each(self.network.shape().classes, self.seed);
        let archive = self.folder.join(SAMPLES);
        let sampler = sampler(
            self.name,
            sampling,
            &self.network.architecture(),
            self.process,
        )?;
        let parts = Parts {
            folder: self.folder.join("parts"),
            sampling,
            shape: self.shape(),
        };
        let workers = &**self.workers;
        let leads = workers.leads();
        // The first worker's folder says what is missing, in one piece of work that it does.
        let mut missing = Vec::new();
        share_out(
            workers,
            1,
            |_| self.missing(&archive, &parts),
            |_, found| {
                missing = found;
                Ok::<_, SamplingError>(())
            },
        )?;
        let tells = sampling.solver.tells(sampling.steps);
        let steps = missing.len() * tells;
        let draw = |piece: usize| -> Result<Vec<u8>, SamplingError> {
            if self.stop.requested() {
                return Err(SamplingError::Interrupted);
            }
            // The others are as far with their parts, as far as there are any.
            let at = |done: usize| steps.min(piece * tells + done * workers.size());
            let (mut done, part) = (0, missing[piece]);
            let indices: Vec<usize> = parts.range(part).collect();
            let samples = sampler.generate(
                self.network,
                self.seed,
                &indices,
                &labels[parts.range(part)],
                device,
                || {
                    done += 1;
                    progress(at(done), steps);
                },
            );
            // An interpolant's equation has one step fewer than times.
            progress(at(tells), steps);
            let broken = |what: &str, sample: usize, why: &str| SamplingError::Model {
                model: self.name.to_owned(),
                problem: format!("{what} {} is not of finite numbers: {why}", indices[sample]),
            };
            let values = samples.to_data();
            if let Some(at) = values.iter::<f32>().position(|value| !value.is_finite()) {
                let sample = at / (values.num_elements() / indices.len());
                let why = "the model's weights are damaged, or the guidance is too strong";
                return Err(broken("sample", sample, why));
            }
            let images = match self.decoder {
                Some(decoder) => decoder.decode(samples).map_err(|sample| {
                    let why = "the autoencoder's weights are damaged, or its products overflow";
                    broken("the picture of sample", sample, why)
                })?,
                None => images::rounded(samples),
            };
            Ok(images.into_pixels())
        };
        share_out(workers, missing.len(), draw, |piece, pixels| match leads {
            true => parts.write(missing[piece], &pixels),
            false => Ok(()),
        })?;
        // The first worker has the parts.
        let put_together = |_| {
            self.put_together(&archive, &parts, &labels)?;
            Ok::<_, SamplingError>(Vec::<u8>::new())
        };
        share_out(workers, 1, put_together, |_, _| Ok(()))?;
        // Another process may have assembled the parts and deleted them meanwhile.
        let archive = (leads && archive.exists()).then_some(archive);
        Ok(Drawn { labels, archive })
    }

    /// Assembles the archive, if all parts are there.
    fn put_together(
        &self,
        archive: &Path,
        parts: &Parts<'_>,
        labels: &[usize],
    ) -> Result<(), SamplingError> {
        if archive.exists() {
            return Ok(());
        }
        let whole = (0..parts.count()).all(|part| parts.has(part));
        // Of several processes that find all parts, one assembles them.
        let lock = self.folder.join("parts.lock");
        let lock_file = lock_file(&lock).map_err(SamplingError::io(&lock))?;
        // Without locks in the file system, several may assemble: the archive is written
        // atomically.
        let whole = whole && !matches!(lock_file.try_lock(), Err(TryLockError::WouldBlock));
        if whole && !archive.exists() {
            parts.assemble(archive, labels)?;
            self.picture(archive)?;
            parts.delete();
        }
        Ok(())
    }

    /// This share's parts that are not in the folder.
    fn missing(&self, archive: &Path, parts: &Parts<'_>) -> Result<Vec<usize>, SamplingError> {
        if archive.exists() {
            self.check(archive)?;
            // Another process may have been stopped before it wrote the picture and deleted the
            // parts.
            if !self.folder.join(PICTURE_FILE).exists() {
                self.picture(archive)?;
            }
            parts.delete();
            return Ok(Vec::new());
        }
        let ours = (0..parts.count()).filter(|part| part % self.share.of == self.share.index);
        Ok(ours.filter(|part| !parts.has(*part)).collect())
    }

    /// Refuses an archive with another shape than these samples: it may come from elsewhere.
    fn check(&self, archive: &Path) -> Result<(), SamplingError> {
        let [height, width, channels] = self.shape();
        let expected = [self.sampling.count, height, width, channels];
        let found = match archive.is_file() {
            true => SampleReader::open(archive)?.shape(),
            false => [0; 4],
        };
        if found == expected {
            return Ok(());
        }
        let found = match archive.is_file() {
            true => format!("{found:?}"),
            false => "a folder".to_owned(),
        };
        let problem = format!(
            "expected samples of shape {expected:?}, found {found}; take it away, and they are drawn again"
        );
        Err(SamplingError::place(archive, problem))
    }

    /// `[height, width, channels]` of an image.
    fn shape(&self) -> [usize; 3] {
        let model = self.network.shape();
        match self.decoder {
            Some(decoder) => decoder.shape(model.side),
            None => [model.side, model.side, model.channels],
        }
    }

    /// The first samples as a picture.
    fn picture(&self, archive: &Path) -> Result<(), SamplingError> {
        let [side, ..] = self.shape();
        let (columns, scale) = grid_layout(side, self.sampling.count);
        let images = first_images(archive, columns * 10)?;
        let path = self.folder.join(PICTURE_FILE);
        Ok(grid_png(&path, &images, columns, scale)?)
    }
}

/// The sampler of a protocol for a model, named `name` in messages.
///
/// # Errors
/// When the process can't be sampled so.
pub fn sampler(
    name: &str,
    sampling: &Sampling,
    model: &Architecture,
    process: ProcessKind,
) -> Result<Sampler, SamplingError> {
    let guidance = Guidance {
        // A network without classes says the same of the null class.
        scale: match model.has_classes() {
            true => sampling.guidance,
            false => 1.0,
        },
        channels: sampling.guidance_channels,
    };
    let (steps, solver) = (sampling.steps, sampling.solver);
    Sampler::new(process, model.predicts_variance(), steps, solver, guidance).map_err(|problem| {
        SamplingError::Model {
            model: name.to_owned(),
            problem,
        }
    })
}

/// A drawing of a checkpoint's samples into a folder, or what is left of one there; perhaps only a
/// share, so that several processes can draw into one folder.
pub struct DrawInto<'a> {
    /// The autoencoder; none for a model of pixels.
    pub vae: Option<&'a Path>,
    /// Settings of the sampling.
    pub sampling: &'a Sampling,
    /// Seed of all noise and labels.
    pub seed: u64,
    /// Type of matrix products.
    pub compute: Compute,
    /// The folder.
    pub folder: &'a Path,
    /// This job's share of the work: every `of`-th part, from the `index`-th on.
    pub share: Share,
    /// Who draws the share's parts. The first one alone has the folder.
    pub workers: &'a Group,
    /// Ends the drawing between two parts.
    pub stop: &'a Stop,
}

impl DrawInto<'_> {
    /// Draws what is missing of this share. Returns the archive, once all shares are drawn;
    /// `progress` is that of [`Draw::run`].
    ///
    /// # Errors
    /// When the folder holds samples of another model or with other settings; when the model can't
    /// be sampled.
    pub fn run<B: FusedOps>(
        &self,
        checkpoint: &Checkpoint,
        device: &B::Device,
        progress: impl FnMut(usize, usize),
    ) -> Result<Option<PathBuf>, SamplingError> {
        let network = checkpoint.network::<B>(device)?.computing(self.compute);
        let channels = network.shape().channels;
        let read = |path| Decoder::<B>::read(path, channels, self.compute, device);
        let decoder = self.vae.map(read).transpose()?;
        let vae = decoder.as_ref().map(Decoder::sha256);
        let (how, with) = ((vae, self.sampling), (self.seed, self.compute));
        let settings = settings::<B>(checkpoint, how, with, device)?;
        let workers = &**self.workers;
        agree(workers, "what they draw", settings.to_string().as_bytes())
            .map_err(SamplingError::Workers)?;
        if workers.leads() {
            claim(self.folder, &settings, Place::Named)?;
        }
        let drawn = Draw {
            name: "sample",
            network: &network,
            process: checkpoint.trained_by(),
            decoder: decoder.as_ref(),
            sampling: self.sampling,
            seed: self.seed,
            folder: self.folder,
            share: self.share,
            workers: self.workers,
            stop: self.stop,
        }
        .run(device, progress)?;
        Ok(drawn.archive)
    }
}

/// What a drawing depends on, as [`SAMPLING`] holds it.
pub(crate) fn settings<B: Backend>(
    checkpoint: &Checkpoint,
    (vae_sha256, sampling): (Option<&str>, &Sampling),
    (seed, compute): (u64, Compute),
    device: &B::Device,
) -> Result<serde_json::Value, SamplingError> {
    Ok(serde_json::json!({
        "model": checkpoint.fingerprint()?,
        "vae": vae_sha256,
        "seed": seed,
        "backend": B::name(device),
        "compute": compute,
        "how": sampling,
    }))
}

/// Whose a folder of samples is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// A person named it: anything may be there.
    Named,
    /// A run's own.
    Run,
}

/// Writes the settings into the folder, or compares them with those there.
pub(crate) fn claim(
    folder: &Path,
    settings: &serde_json::Value,
    place: Place,
) -> Result<(), SamplingError> {
    let path = folder.join(SAMPLING);
    match std::fs::read(&path) {
        Ok(bytes) => {
            let there: Option<serde_json::Value> = serde_json::from_slice(&bytes).ok();
            if there.as_ref() != Some(settings) {
                let todo = match place {
                    Place::Named => "name another folder",
                    Place::Run => "take this folder away, and they are drawn again",
                };
                let problem = format!(
                    "the samples there are drawn from another model or in another way; {todo}"
                );
                return Err(SamplingError::place(&path, problem));
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // The origin of the existing files is unknown. (A temporary file belongs to another
            // share that is just starting.)
            let foreign = std::fs::read_dir(folder).is_ok_and(|entries| {
                let mut names = entries.flatten().map(|entry| entry.file_name());
                names.any(|name| !name.as_encoded_bytes().starts_with(b"."))
            });
            // Unless another share has started meanwhile.
            if place == Place::Named && foreign && !path.exists() {
                let problem =
                    "is not empty, and nothing says how its files were made; name another folder";
                return Err(SamplingError::place(folder, problem));
            }
            let text = format!("{settings:#}\n");
            write_atomic(&path, |file| file.write_all(text.as_bytes()))
                .map_err(SamplingError::io(&path))?;
        }
        Err(error) => return Err(SamplingError::io(&path)(error)),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_that_of_one_drawing() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        // A number that a careless parser reads one bit off.
        let settings = |scale: f64| serde_json::json!({ "how": { "guidance": scale } });
        let claim = |name: &str, scale, place| {
            super::claim(&at(name), &settings(scale), place).map_err(|error| error.to_string())
        };
        for (name, place, todo) in [
            ("named", Place::Named, "name another folder"),
            ("run", Place::Run, "take this folder away"),
        ] {
            std::fs::create_dir(at(name)).unwrap();
            assert_eq!(claim(name, 1.066_666_666_666_666_7, place), Ok(()));
            assert_eq!(claim(name, 1.066_666_666_666_666_7, place), Ok(()));
            let error = claim(name, 1.5, place).unwrap_err();
            assert!(error.contains(todo), "{error}");
        }
        // What lies in a run's folder is the run's.
        for name in ["foreign", "begun"] {
            std::fs::create_dir(at(name)).unwrap();
            std::fs::write(at(name).join("parts"), "").unwrap();
        }
        assert!(claim("foreign", 1.5, Place::Named).is_err());
        assert_eq!(claim("begun", 1.5, Place::Run), Ok(()));
    }
}
