//! The command that encodes images to latents.

use std::path::PathBuf;

use super::{how_to_go_on, listen};
use crate::backend::{BackendKind, Compute};
use crate::recipe::RecipeError;
use crate::recipe::run::extract;
use crate::recipe::schema::extract::{Extract, LatentForm};

#[derive(Debug, clap::Args)]
pub(super) struct ExtractArguments {
    /// A folder with one folder of images for each class, or a flat one
    images: PathBuf,
    /// The folder to write, new or begun by this command
    to: PathBuf,
    /// The autoencoder: a folder with config.json and weights, or a weight file
    #[arg(long)]
    vae: PathBuf,
    /// Side of the centre crop, in pixels
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(8..=4096))]
    size: u32,
    /// Encode the images alone, without their mirror images
    #[arg(long)]
    no_mirror: bool,
    /// Packed shards of f16 or f32, or the reference's .npy folders
    #[arg(long, default_value = "f16", value_parser = ["f16", "f32", "npy"])]
    form: String,
    /// Images encoded together
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: u32,
    /// Threads that read images [default: one a core]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    workers: Option<u32>,
    /// Seed of the draws from the posterior
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where to compute
    #[arg(long, default_value = "ndarray")]
    backend: BackendKind,
    /// Type of matrix products
    #[arg(long, default_value = "f32")]
    compute: Compute,
}

/// Runs an extraction, or continues one.
pub(super) fn extract(arguments: &ExtractArguments) -> Result<(), RecipeError> {
    if let Some(problem) = arguments.backend.missing() {
        return Err(RecipeError::Run(problem));
    }
    let job = Extract {
        images: arguments.images.clone(),
        vae: arguments.vae.clone(),
        size: arguments.size as usize,
        mirror: !arguments.no_mirror,
        form: match arguments.form.as_str() {
            "npy" => LatentForm::Npy,
            form => LatentForm::Packed {
                half: form == "f16",
            },
        },
        batch: arguments.batch as usize,
        workers: arguments.workers.unwrap_or(0) as usize,
    };
    let stop = listen()?;
    let to = crate::with_backend!(arguments.backend, B, device => {
        type Inner = <B as burn::tensor::backend::AutodiffBackend>::InnerBackend;
        crate::ops::supports::<Inner>(arguments.compute, device).map_err(RecipeError::Run)?;
        let settings = (arguments.seed, arguments.compute, &stop);
        extract::run::<Inner>("extract", &job, settings, &arguments.to, device)
    }, else Err(RecipeError::Run("no backend".into())));
    let to = how_to_go_on(to, "the same command")?;
    crate::tell!("{}", to.display());
    Ok(())
}
