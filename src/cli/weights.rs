//! Commands about weights: the content of a file, and conversion.

use std::path::PathBuf;

use safetensors::Dtype;

use super::error::CliError;
use crate::models::{Architecture, Heads};
use crate::process::ProcessKind;
use crate::recipe::run::directory::evaluation_of;
use crate::recipe::run::models::read_file;
use crate::recipe::schema::source::{FileSource, Source};
use crate::report::thousands;
use crate::weights::{
    self, Checkpoint, Conversion, EmbeddedName, Provenance, Stated, WeightFile, embedded,
};

/// Most classes that are listed.
const NAMED: usize = 20;

#[derive(Debug, clap::Args)]
pub(super) struct StatedArguments {
    /// Which state dict of a training checkpoint to read [default: ema, else model]
    #[arg(long, value_name = "KEY")]
    weights_key: Option<String>,
    /// Attention heads, if the file doesn't say and no published model has its width
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    heads: Option<u32>,
    /// The process it was trained under, if the file doesn't say: gaussian as DiT, interpolant as
    /// SiT, interpolant:PATH:PREDICTS:WEIGHTING as other interpolants
    #[arg(long, value_name = "PROCESS")]
    process: Option<ProcessKind>,
}

#[derive(Debug, clap::Args)]
pub(super) struct InspectArguments {
    /// A .safetensors, .safetensors.index.json, .pt, .pth, .bin or .ckpt file, a folder, or an
    /// embedded checkpoint
    checkpoint: String,
    #[command(flatten)]
    stated: StatedArguments,
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct ConvertArguments {
    /// A .safetensors, .safetensors.index.json, .pt, .pth, .bin or .ckpt file, a folder, or an
    /// embedded checkpoint
    from: String,
    /// The file or folder to write, which must not exist
    to: PathBuf,
    #[command(flatten)]
    stated: StatedArguments,
    /// Write a folder in the layout of diffusers (DiTTransformer2DModel or UNet2DModel)
    #[arg(long)]
    diffusers: bool,
    /// Type of the values [default: as they are]
    #[arg(long, value_parser = ["f32", "f16", "bf16"])]
    dtype: Option<String>,
    /// Largest size of a safetensors file in MB; more becomes several files with an index
    #[arg(long, value_name = "MB", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    shard: Option<u64>,
    /// Licence of the weights, for the model card
    #[arg(long)]
    licence: Option<String>,
}

impl StatedArguments {
    fn stated(&self) -> Stated {
        Stated {
            weights_key: self.weights_key.clone(),
            heads: self.heads.map(|heads| heads as usize),
            process: self.process,
            ..Stated::default()
        }
    }

    /// Refuses statements about checkpoints when none is in a file.
    pub(super) fn refuse(&self, names: &str) -> Result<(), CliError> {
        if self.stated() == Stated::default() {
            return Ok(());
        }
        Err(CliError::Usage(format!(
            "{names}: --weights-key, --heads and --process are for checkpoints in files"
        )))
    }
}

/// A checkpoint named on the command line.
pub(super) fn source(name: &str) -> Result<Source, CliError> {
    if let Some(embedded) = EmbeddedName::ALL
        .into_iter()
        .find(|embedded| embedded.as_str() == name)
    {
        return Ok(Source::Embedded(embedded));
    }
    let path = PathBuf::from(name);
    if path.exists() {
        return Ok(Source::File(path.into()));
    }
    let embedded: Vec<&str> = EmbeddedName::ALL
        .into_iter()
        .map(EmbeddedName::as_str)
        .collect();
    Err(CliError::Usage(format!(
        "{name}: no such file; embedded are {}",
        embedded.join(", ")
    )))
}

/// Opens a checkpoint that is not a stage's.
pub(super) fn open(source: &Source) -> Result<Checkpoint, CliError> {
    match source {
        Source::Embedded(name) => Ok(embedded::checkpoint(*name)?),
        Source::File(file) => Ok(read_file(file, None)?),
        Source::Stage(name) => Err(CliError::Usage(format!("{name}: not a file"))),
    }
}

/// A checkpoint named on the command line, with the statements about it.
pub(super) fn stated_source(name: &str, stated: &StatedArguments) -> Result<Source, CliError> {
    match source(name)? {
        Source::File(file) => Ok(Source::File(FileSource {
            stated: stated.stated(),
            ..file
        })),
        other => stated.refuse(name).map(|()| other),
    }
}

/// Checkpoints named on the command line, with the statements about those in files.
pub(super) fn stated_sources(
    names: &[String],
    stated: &StatedArguments,
) -> Result<Vec<Source>, CliError> {
    let sources = names.iter().map(|name| source(name));
    let mut sources = sources.collect::<Result<Vec<_>, _>>()?;
    let mut files = sources.iter_mut().filter_map(|source| match source {
        Source::File(file) => Some(file),
        _ => None,
    });
    let Some(first) = files.next() else {
        return stated.refuse(&names.join(" ")).map(|()| sources);
    };
    first.stated = stated.stated();
    files.for_each(|file| file.stated = stated.stated());
    Ok(sources)
}

/// What has to be stated of a checkpoint where tensors alone are read, as flags.
fn unsaid(checkpoint: &Checkpoint) -> Vec<String> {
    let architecture = &checkpoint.architecture;
    let shown = Architecture::of_tensors(&checkpoint.tensors, Heads::default(), &checkpoint.path);
    let heads = architecture.heads();
    let heads = heads.filter(|_| shown.as_ref().ok() != Some(architecture));
    let process = checkpoint
        .process
        .filter(|process| process.must_be_stated());
    let heads = heads.map(|heads| format!("--heads {heads}"));
    let process = process.map(|process| format!("--process {}", process.mark()));
    heads.into_iter().chain(process).collect()
}

/// Writes a checkpoint in another format.
pub(super) fn convert(arguments: &ConvertArguments) -> Result<(), CliError> {
    if let Some(meant) = WeightFile::meant(&arguments.to) {
        return Err(CliError::Usage(format!(
            "{}: no ending of weights (it would be a folder); did you mean `{meant}`?",
            arguments.to.display()
        )));
    }
    let checkpoint = open(&stated_source(&arguments.from, &arguments.stated)?)?;
    let conversion = Conversion {
        diffusers: arguments.diffusers,
        dtype: arguments.dtype.as_deref().map(|dtype| match dtype {
            "f16" => Dtype::F16,
            "bf16" => Dtype::BF16,
            _ => Dtype::F32,
        }),
        shard: arguments.shard.map(|megabytes| megabytes * 1_000_000),
        licence: arguments.licence.clone(),
        evaluation: evaluation_of(&checkpoint.path),
    };
    for path in weights::convert(&checkpoint, &arguments.to, &conversion)? {
        crate::tell!("{}", path.display());
    }
    if WeightFile::of(&arguments.to) == Some(WeightFile::Torch) {
        let states = unsaid(&checkpoint);
        let state = match states.is_empty() {
            true => String::new(),
            false => format!("; state `{}` where it is read", states.join(" ")),
        };
        crate::say!(
            "note: {}: a PyTorch state dict holds tensors alone, and not how they came about{state}",
            arguments.to.display()
        );
    }
    Ok(())
}

/// Prints the content of a checkpoint.
pub(super) fn inspect(arguments: &InspectArguments) -> Result<(), CliError> {
    let name = &arguments.checkpoint;
    let checkpoint = open(&stated_source(name, &arguments.stated)?)?;
    let parameters = checkpoint.tensors.parameters();
    let Checkpoint {
        architecture,
        process,
        provenance,
        ..
    } = &checkpoint;
    if arguments.json {
        let value = serde_json::json!({ "file": name, "architecture": architecture, "process": process, "parameters": parameters, "weights_sha256": checkpoint.fingerprint()?, "provenance": provenance });
        crate::tell!("{value:#}");
        return Ok(());
    }
    crate::tell!(
        "{name}\n  model       {}\n  parameters  {} in {} tensors\n  sha-256     {}",
        checkpoint.model(),
        thousands(parameters),
        checkpoint.tensors.len(),
        checkpoint.fingerprint()?
    );
    match process {
        Some(process) => crate::tell!("  process     {process}"),
        None if checkpoint.is_unmarked() => crate::tell!("  process     not stated"),
        None => {}
    }
    if *provenance == Provenance::default() {
        crate::tell!("  provenance  not stated (a file of another program)");
        return Ok(());
    }
    crate::tell!(
        "  made by     recipe {}, stage {}, seed {}, {} steps, {} images",
        provenance.recipe,
        provenance.stage,
        provenance.seed,
        thousands(provenance.steps),
        thousands(provenance.images)
    );
    if let (Some(kept), Some(depth)) = (&provenance.kept, provenance.parent_depth) {
        match checkpoint.architecture.pairs_of(kept, depth) {
            Some(pairs) => crate::tell!("  kept        all {depth} layers, in {pairs} pairs"),
            None => crate::tell!(
                "  kept        {kept:?} of {depth} {}",
                provenance.granularity.layers()
            ),
        }
    }
    if let Some(parent) = &provenance.parent {
        crate::tell!("  parent      {parent}");
    }
    if !provenance.data.is_empty() {
        crate::tell!("  data        {}", provenance.data);
    }
    if !provenance.class_names.is_empty() {
        let named = provenance.class_names.len().min(NAMED);
        let more = provenance.class_names.len() - named;
        let names = provenance.class_names[..named].join(", ");
        match more {
            0 => crate::tell!("  classes     {names}"),
            more => crate::tell!("  classes     {names} and {more} more"),
        }
    }
    if !provenance.note.is_empty() {
        crate::tell!("  note        {}", provenance.note);
    }
    Ok(())
}
