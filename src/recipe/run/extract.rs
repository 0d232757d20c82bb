//! The stage that turns images into latents.

use std::path::{Path, PathBuf};

use super::context::Context;
use crate::backend::Compute;
use crate::data::latents::{Dtype, RECORDS_PER_SHARD};
use crate::data::{self, Extraction, ImageFolder, extract};
use crate::ops::{FusedOps, TrainingBackend};
use crate::recipe::RecipeError;
use crate::recipe::schema::extract::{Extract, LatentForm};
use crate::report::Progress;
use crate::stop::Stop;
use crate::weights::read_vae;
use crate::workers::Workers;

/// Folder of the latents, in the stage's folder.
pub(crate) const LATENTS: &str = "latents";

/// Pictures an autoencoder encodes at once: at 256 x 256 each takes some hundred MiB on the way.
const ENCODED_AT_ONCE: usize = 4;

/// Most numbers of a shard, 2 GiB of them at full precision: of very large pictures a shard holds
/// fewer.
const MOST_VALUES: usize = 1 << 29;

/// How many images that can't be read are named one by one.
const NAMED: usize = 10;

/// Records of a shard of latents of that side.
fn records_per_shard(side: usize) -> usize {
    RECORDS_PER_SHARD.min((MOST_VALUES / (2 * 4 * side * side).max(1)).max(1))
}

impl<B: TrainingBackend> Context<'_, B> {
    pub(crate) fn extract(
        &self,
        stage: &str,
        job: &Extract,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let to = folder.join(LATENTS);
        let settings = (self.recipe.seed, self.recipe.compute);
        let who = (&**self.workers, self.stop);
        run::<B::InnerBackend>(stage, job, settings, who, &to, self.device)?;
        Ok(())
    }
}

/// Extracts with a progress bar, and says what became of it. Returns the folder.
pub(crate) fn run<B: FusedOps>(
    name: &str,
    job: &Extract,
    (seed, compute): (u64, Compute),
    (workers, stop): (&dyn Workers, &Stop),
    to: &Path,
    device: &B::Device,
) -> Result<PathBuf, RecipeError> {
    let images = ImageFolder::open(&job.images)?;
    let (mut vae, config) = read_vae::<B>(&job.vae, device)?;
    vae.network = vae.network.computing(compute);
    let wrong = |problem: String| RecipeError::Stage {
        stage: name.to_owned(),
        problem,
    };
    if !job.size.is_multiple_of(config.factor()) || config.in_channels != 3 {
        return Err(wrong(format!(
            "{}: encodes {} channels of sides that are multiples of {}, not 3 of {}",
            job.vae.display(),
            config.in_channels,
            config.factor(),
            job.size
        )));
    }
    if images.ignored() > 0 {
        crate::say!(
            "{name}: {} entries of {} are no images of a class, and passed over",
            images.ignored(),
            job.images.display()
        );
    }
    let side = job.size / config.factor();
    let how = Extraction {
        size: job.size,
        mirror: job.mirror,
        form: match job.form {
            LatentForm::Packed { half: true } => data::Form::Packed(Dtype::F16),
            LatentForm::Packed { half: false } => data::Form::Packed(Dtype::F32),
            LatentForm::Npy => data::Form::Npy,
        },
        records_per_shard: records_per_shard(side),
        batch: job.batch,
        slice: ENCODED_AT_ONCE,
        readers: match job.workers {
            0 => rayon::current_num_threads(),
            readers => readers,
        },
        workers,
        seed,
        vae_sha256: vae.sha256,
        stop: stop.clone(),
    };
    let mut progress = Progress::new(name, "images", images.images().len());
    let extracted = extract(
        &images,
        &vae.network,
        &config,
        &how,
        to,
        device,
        |count, before| {
            if before {
                progress.skip(count);
            } else {
                progress.add(count);
            }
        },
    )?;
    drop(progress);
    if !extracted.finished {
        return Err(RecipeError::Interrupted);
    }
    for (index, why) in extracted.skipped.iter().take(NAMED) {
        crate::say!("{name}: image {index} is left out: {why}");
    }
    if extracted.skipped.len() > NAMED {
        let more = extracted.skipped.len() - NAMED;
        crate::say!(
            "{name}: and {more} more, all in {}",
            to.join("skipped.txt").display()
        );
    }
    crate::say!(
        "{name}: latents of {} images in {}",
        extracted.images,
        to.display()
    );
    Ok(to.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::latents::{Layout, ShardWriter};

    #[test]
    fn latents_of_every_size_that_is_offered_can_be_packed() {
        for (side, expected) in [(1, 2048), (32, 2048), (64, 2048), (512, 256)] {
            let records_per_shard = records_per_shard(side);
            assert_eq!(records_per_shard, expected, "{side}");
            let layout = Layout {
                views: 2,
                channels: 4,
                side,
                dtype: Dtype::F32,
                classes: 1000,
                records_per_shard,
                scaling_factor: 0.18215,
            };
            let folder = tempfile::tempdir().unwrap();
            assert!(ShardWriter::open(folder.path(), layout, Vec::new()).is_ok());
        }
    }
}
