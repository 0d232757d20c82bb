//! The command that encodes images to latents.

use std::path::PathBuf;

use super::error::CliError;
use super::stage::{OneStage, toml};
use super::{how_to_go_on, listen, supports};
use crate::backend::{BackendKind, Compute};
use crate::recipe::plan::Work;
use crate::recipe::run::extract;
use crate::workers::Group;

#[derive(Debug, clap::Args)]
pub(super) struct ExtractArguments {
    /// A folder with one folder of images for each class, or a flat one
    images: PathBuf,
    /// The folder to write, new or begun by this command
    to: PathBuf,
    /// The autoencoder: a folder with config.json and weights, or a weight file
    #[arg(long)]
    vae: PathBuf,
    /// Side of the centre crop, in pixels [default: 256]
    #[arg(long, allow_negative_numbers = true)]
    size: Option<i64>,
    /// Encode the images alone, without their mirror images
    #[arg(long)]
    no_mirror: bool,
    /// Packed shards of f16 or f32, or the reference's .npy folders [default: f16]
    #[arg(long, value_parser = ["f16", "f32", "npy"], hide_possible_values = true)]
    form: Option<String>,
    /// Images encoded together [default: 16]
    #[arg(long, allow_negative_numbers = true)]
    batch: Option<i64>,
    /// Threads that read images [default: one a core]
    #[arg(long, allow_negative_numbers = true)]
    workers: Option<i64>,
    /// Seed of the draws from the posterior [default: 0]
    #[arg(long, allow_negative_numbers = true)]
    seed: Option<i64>,
    /// Where to compute
    #[arg(long, default_value = "ndarray")]
    backend: BackendKind,
    /// Type of matrix products
    #[arg(long, default_value = "f32")]
    compute: Compute,
}

/// Runs an extraction, or continues one.
pub(super) fn extract(arguments: &ExtractArguments, workers: &Group) -> Result<(), CliError> {
    let mut stage = OneStage::new("extract")?;
    stage.set_path("", "images", &arguments.images)?;
    stage.set_path("--vae", "vae", &arguments.vae)?;
    let numbers = [
        ("--size", "size", arguments.size),
        ("--batch", "batch", arguments.batch),
        ("--workers", "workers", arguments.workers),
    ];
    stage.set_numbers(numbers);
    if arguments.no_mirror {
        stage.set("--no-mirror", "mirror", false);
    }
    match arguments.form.as_deref() {
        Some("npy") => stage.set("--form", "form", "npy"),
        Some(form) => stage.set("--form", "half", form == "f16"),
        None => {}
    }
    stage.set_above("--compute", "compute", toml(&arguments.compute)?);
    if let Some(seed) = arguments.seed {
        stage.set_above("--seed", "seed", seed);
    }
    let plan = stage.plan()?;
    plan.complete()?;
    let Some(Work::Extract(job)) = plan.stages.first().map(|stage| &stage.work) else {
        unreachable!("the recipe has this stage")
    };
    if let Some(problem) = arguments.backend.missing() {
        return Err(CliError::Usage(problem));
    }
    let stop = listen()?;
    let to = crate::with_backend!(arguments.backend, B, device => {
        type Inner = <B as burn::tensor::backend::AutodiffBackend>::InnerBackend;
        supports::<Inner>(arguments.compute, device)?;
        let settings = (plan.recipe.seed, arguments.compute);
        let who = (&**workers, &stop);
        extract::run::<Inner>("extract", job, settings, who, &arguments.to, device).map_err(CliError::from)
    }, else Err(CliError::Usage("no backend".into())));
    let to = how_to_go_on(to, "the same command")?;
    crate::tell!("{}", to.display());
    Ok(())
}
