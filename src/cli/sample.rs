//! `sample`: draws samples of a checkpoint.

use std::path::{Path, PathBuf};

use super::error::CliError;
use super::stage::{OneStage, RunArguments, SamplingArguments, source_value};
use super::weights::{StatedArguments, open, stated_source};
use super::{how_to_go_on, listen, supports};
use crate::recipe::plan::Work;
use crate::report::watch;
use crate::sampling::{DrawInto, SAMPLES, Share, refuse_existing, write_pictures};
use crate::stop::Stop;
use crate::workers::Group;

#[derive(Debug, clap::Args)]
pub(super) struct SampleArguments {
    /// A .safetensors, .safetensors.index.json, .pt, .pth, .bin or .ckpt file, a folder, or an
    /// embedded checkpoint
    checkpoint: String,
    #[command(flatten)]
    stated: StatedArguments,
    /// The autoencoder that makes images of latents
    #[arg(long)]
    vae: Option<PathBuf>,
    /// The classes and the guidance of the reference's demonstration
    #[arg(long, conflicts_with_all = ["classes", "guidance", "count"])]
    demo: bool,
    /// Draw every N-th part from the I-th (from 0) into --into; the process that ends last puts all
    /// together
    #[arg(long, value_name = "I/N", requires = "into", value_parser = share)]
    share: Option<Share>,
    /// Write each sample as a PNG into this folder too, which must not exist
    #[arg(long, value_name = "FOLDER")]
    images: Option<PathBuf>,
    /// Draw into this folder, not a numbered run; go on with what is there
    #[arg(long, value_name = "FOLDER", conflicts_with = "runs")]
    into: Option<PathBuf>,
    #[command(flatten)]
    sampling: SamplingArguments,
    #[command(flatten)]
    run: RunArguments,
}

/// Parses `--share`'s `I/N`.
fn share(text: &str) -> Result<Share, String> {
    let (index, of) = text.split_once('/').ok_or("expected I/N, such as 0/8")?;
    let number = |text: &str| text.parse::<usize>().map_err(|error| error.to_string());
    let (index, of) = (number(index)?, number(of)?);
    if index < of && of <= 65_536 {
        Ok(Share { index, of })
    } else {
        Err(format!(
            "share {index} of {of} does not exist; they count from 0"
        ))
    }
}

/// Draws the samples.
pub(super) fn sample(arguments: &SampleArguments, workers: &Group) -> Result<(), CliError> {
    let from = stated_source(&arguments.checkpoint, &arguments.stated)?;
    if let Some(folder) = &arguments.images {
        refuse_existing(folder)?;
        if arguments.into.as_ref() == Some(folder) {
            return Err(CliError::Usage(format!(
                "{}: --into and --images are folders of their own; name another for the pictures",
                folder.display()
            )));
        }
    }
    let mut stage = OneStage::new("sample")?;
    stage.set("", "from", source_value(&from)?);
    if let Some(vae) = &arguments.vae {
        stage.set_path("--vae", "vae", vae)?;
    }
    if arguments.demo {
        stage.set("--demo", "preset", "demo");
    }
    arguments.run.put(&mut stage)?;
    arguments.sampling.put(&mut stage, Some(&from))?;
    let images = arguments.images.as_deref();
    let Some(folder) = &arguments.into else {
        let stop = listen()?;
        let directory = arguments.run.run(&stage, stop.clone(), workers)?;
        if !workers.leads() {
            return Ok(());
        }
        return pictures(&directory.join("01-sample").join(SAMPLES), images, &stop);
    };
    let run = &arguments.run;
    let plan = stage.plan()?;
    plan.complete()?;
    let Some(Work::Sample(sample)) = plan.stages.first().map(|stage| &stage.work) else {
        return Err(CliError::Usage(
            "--set makes another stage of the command's; run a recipe instead".into(),
        ));
    };
    if let Some(problem) = run.backend.missing() {
        return Err(CliError::Usage(problem));
    }
    let stop = listen()?;
    let checkpoint = open(&sample.from)?;
    let archive = crate::with_backend!(run.backend, B, device => {
        type Inner = <B as burn::tensor::backend::AutodiffBackend>::InnerBackend;
        supports::<Inner>(run.compute, device)?;
        let draw = DrawInto {
            vae: sample.vae.as_deref(),
            sampling: &sample.sampling,
            seed: plan.recipe.seed,
            compute: run.compute,
            folder,
            share: arguments.share.unwrap_or(Share::WHOLE),
            workers,
            stop: &stop,
        };
        draw.run::<Inner>(&checkpoint, device, watch("sample", "steps"))
    }, else Ok(None));
    let archive = how_to_go_on(archive.map_err(CliError::from), "the same command")?;
    match archive {
        Some(archive) => {
            crate::tell!("{}", archive.display());
            pictures(&archive, images, &stop)?;
        }
        None if !workers.leads() => {}
        None => crate::say!("sample: this share is drawn; others have still to draw theirs"),
    }
    Ok(())
}

/// Writes samples as pictures, if requested.
fn pictures(archive: &Path, folder: Option<&Path>, stop: &Stop) -> Result<(), CliError> {
    if let Some(folder) = folder {
        write_pictures(archive, folder, stop, watch("pictures", "images"))?;
        crate::tell!("{}", folder.display());
    }
    Ok(())
}
