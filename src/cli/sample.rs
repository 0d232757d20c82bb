//! `sample`: draws samples of a checkpoint.

use std::path::{Path, PathBuf};

use super::weights::{StatedArguments, stated_source};
use super::{RunArguments, how_to_go_on, listen, open, plan_one};
use crate::recipe::RecipeError;
use crate::recipe::schema::StageKind;
use crate::recipe::schema::data::Data;
use crate::recipe::schema::sample::Sample;
use crate::report::watch;
use crate::sampling::{
    DEMO, DEMO_GUIDANCE, DrawInto, SAMPLES, Share, refuse_existing, write_pictures,
};
use crate::stop::Stop;

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
    #[arg(long, value_name = "FOLDER")]
    into: Option<PathBuf>,
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
pub(super) fn sample(arguments: &SampleArguments) -> Result<(), RecipeError> {
    let from = stated_source(&arguments.checkpoint, &arguments.stated)?;
    let mut sampling = arguments.run.sampling(100, Some(&from))?;
    if let Some(folder) = &arguments.images {
        refuse_existing(folder)?;
    }
    if arguments.demo {
        sampling.steps = arguments.run.steps.unwrap_or(250) as usize;
        sampling.count = DEMO.len();
        sampling.classes = Some(DEMO.to_vec());
        sampling.guidance = DEMO_GUIDANCE;
    }
    let sample = Sample {
        from,
        vae: arguments.vae.clone(),
        sampling,
    };
    let Some(folder) = &arguments.into else {
        let (stop, kind) = (listen()?, StageKind::Sample(sample));
        let directory = (arguments.run).run("sample", kind, Data::Digits, stop.clone())?;
        let archive = directory.join("01-sample").join(SAMPLES);
        return pictures(&archive, arguments.images.as_deref(), &stop);
    };
    let run = &arguments.run;
    // Planned like a recipe, so that mistakes are found before anything is drawn.
    plan_one(
        "sample",
        run,
        StageKind::Sample(sample.clone()),
        Data::Digits,
    )?
    .complete()?;
    if let Some(problem) = run.backend.missing() {
        return Err(RecipeError::Run(problem));
    }
    let stop = listen()?;
    let checkpoint = open(&sample.from)?;
    let share = arguments.share.unwrap_or(Share::WHOLE);
    let archive = crate::with_backend!(run.backend, B, device => {
        type Inner = <B as burn::tensor::backend::AutodiffBackend>::InnerBackend;
        crate::ops::supports::<Inner>(run.compute, device).map_err(RecipeError::Run)?;
        let draw = DrawInto {
            vae: sample.vae.as_deref(),
            sampling: &sample.sampling,
            seed: run.seed,
            compute: run.compute,
            folder,
            share,
            stop: &stop,
        };
        draw.run::<Inner>(&checkpoint, device, watch("sample", "steps"))
    }, else Ok(None));
    let archive = how_to_go_on(archive.map_err(RecipeError::from), "the same command")?;
    match archive {
        Some(archive) => {
            crate::tell!("{}", archive.display());
            pictures(&archive, arguments.images.as_deref(), &stop)?;
        }
        None => crate::say!("sample: this share is drawn; others have still to draw theirs"),
    }
    Ok(())
}

/// Writes samples as pictures, if requested.
fn pictures(archive: &Path, folder: Option<&Path>, stop: &Stop) -> Result<(), RecipeError> {
    if let Some(folder) = folder {
        write_pictures(archive, folder, stop, watch("pictures", "images"))?;
        crate::tell!("{}", folder.display());
    }
    Ok(())
}
