//! The command that measures samples.

use std::path::{Path, PathBuf};

use toml::Value;

use super::error::CliError;
use super::listen;
use super::stage::{OneStage, RunArguments, SamplingArguments, refuse_file, source_value, toml};
use super::weights::{StatedArguments, open, source, stated_sources};
use crate::backend::Compute;
use crate::evaluation::Distances;
use crate::recipe::plan::Work;
use crate::recipe::run::evaluate::archives;
use crate::recipe::schema::data::Data;
use crate::weights::WeightFile;
use crate::workers::Group;

/// Where the weights of Inception lie if nobody says.
const INCEPTION: &str = "artifacts/pretrained/pt_inception-2015-12-05-6726825d.pth";

#[derive(Debug, clap::Args)]
pub(super) struct EvaluateArguments {
    /// Samples and last the reference, each an .npz archive or a folder of pictures; or checkpoints
    /// of models of pixels
    #[arg(required = true)]
    inputs: Vec<String>,
    /// Weights of the Inception network that archives and folders are measured in [default:
    /// artifacts/pretrained/pt_inception-2015-12-05-6726825d.pth]
    #[arg(long, value_name = "FILE")]
    inception: Option<PathBuf>,
    /// Where to write the result of archives and folders, and its protocol, as JSON; that of
    /// models is in their run's directory
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Folder that keeps what was measured of a reference archive for the next time
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// Arithmetic of the distances of precision and recall; f16 as ADM's evaluator, for comparison
    /// with published numbers [default: f64]
    #[arg(long, value_enum)]
    distances: Option<Distances>,
    /// What models are measured against: digits, fashion, or a table as a recipe has it [default:
    /// what the first model says it learned from, else digits]
    #[arg(long, value_name = "DATA")]
    data: Option<String>,
    /// The classifier whose features models are compared in [default: the embedded one of such
    /// pictures]
    #[arg(long, value_name = "CHECKPOINT")]
    features: Option<String>,
    #[command(flatten)]
    stated: StatedArguments,
    #[command(flatten)]
    sampling: SamplingArguments,
    #[command(flatten)]
    run: RunArguments,
}

/// Measures archives and folders of pictures, or models.
pub(super) fn evaluate(arguments: &EvaluateArguments, workers: &Group) -> Result<(), CliError> {
    let inputs = arguments.inputs.iter();
    let (pictures, others): (Vec<_>, Vec<_>) =
        inputs.partition(|input| is_pictures(Path::new(input)));
    let (Some(pictures), Some(other)) = (pictures.first(), others.first()) else {
        return match others.is_empty() {
            true => measure_archives(arguments, workers),
            false => models(arguments, workers),
        };
    };
    // An input that does not exist is reported as missing.
    source(other)?;
    Err(CliError::Usage(format!(
        "{pictures} is taken for samples and {other} for a checkpoint; they can't be measured together"
    )))
}

/// Whether a path names an archive, or a folder that holds no model.
fn is_pictures(path: &Path) -> bool {
    let is_archive = path
        .extension()
        .is_some_and(|ending| ending.eq_ignore_ascii_case("npz"));
    if !path.is_dir() {
        return is_archive;
    }
    let of_a_model = |path: PathBuf| {
        WeightFile::of(&path).is_some()
            || path.file_name().is_some_and(|name| name == "config.json")
    };
    !path.read_dir().is_ok_and(|entries| {
        let mut entries = entries.flatten();
        entries.any(|entry| of_a_model(entry.path()))
    })
}

fn measure_archives(arguments: &EvaluateArguments, workers: &Group) -> Result<(), CliError> {
    arguments.stated.refuse(&arguments.inputs.join(" "))?;
    if arguments.data.is_some() || arguments.features.is_some() {
        return Err(CliError::Usage(
            "--data and --features are for models; archives and folders are measured against the last of them".into(),
        ));
    }
    if arguments.run.compute != Compute::F32 {
        return Err(CliError::Usage(
            "--compute is for models; archives and folders are measured in f32".into(),
        ));
    }
    let inputs: Vec<PathBuf> = arguments.inputs.iter().map(PathBuf::from).collect();
    let (reference, samples) = match inputs.split_last() {
        Some((reference, samples)) if !samples.is_empty() => (reference, samples),
        _ => {
            return Err(CliError::Usage(format!(
                "{}: a reference must follow, an archive or a folder of pictures: evaluate SAMPLES.npz REFERENCE.npz",
                arguments.inputs.join(" ")
            )));
        }
    };
    if let Some(out) = &arguments.out {
        refuse_file(out)?;
    }
    if let Some(cache) = arguments.cache.as_ref().filter(|cache| cache.is_file()) {
        return Err(CliError::Usage(format!(
            "{}: is a file; --cache is a folder",
            cache.display()
        )));
    }
    arguments.sampling.refuse_drawing()?;
    if arguments.run.seed.is_some() {
        return Err(CliError::Usage(
            "--seed is for models; archives and folders are measured without a draw".into(),
        ));
    }
    let mut stage = OneStage::new("evaluate")?;
    stage.set_paths("samples", samples)?;
    stage.set_path("", "reference", reference)?;
    let inception = arguments.inception.as_deref().unwrap_or(INCEPTION.as_ref());
    stage.set_path("--inception", "inception", inception)?;
    if let Some(distances) = &arguments.distances {
        stage.set("--distances", "distances", toml(distances)?);
    }
    arguments.run.put(&mut stage)?;
    arguments.sampling.put(&mut stage, None)?;
    let plan = stage.plan()?;
    plan.complete()?;
    let Some(Work::Evaluate(evaluate)) = plan.stages.first().map(|stage| &stage.work) else {
        return Err(CliError::Usage(
            "--set makes another stage of the command's; run a recipe instead".into(),
        ));
    };
    if let Some(problem) = arguments.run.backend.missing() {
        return Err(CliError::Usage(problem));
    }
    let stop = listen()?;
    crate::with_backend!(arguments.run.backend, B, device => {
        type Inner = <B as burn::tensor::backend::AutodiffBackend>::InnerBackend;
        let (cache, out) = (arguments.cache.as_deref(), arguments.out.as_deref());
        Ok(archives::<Inner>(evaluate, (cache, out), (workers, &stop), device)?)
    }, else Ok(()))
}

fn models(arguments: &EvaluateArguments, workers: &Group) -> Result<(), CliError> {
    if arguments.distances.is_some() {
        return Err(CliError::Usage(
            "--distances is for archives and folders; models are measured in f64".into(),
        ));
    }
    let of_archives = [&arguments.out, &arguments.cache, &arguments.inception];
    if of_archives.iter().any(|given| given.is_some()) {
        return Err(CliError::Usage(
            "--out, --cache and --inception are for archives and folders; of models, the run's directory has eval.json, and \
             --features names the classifier".into(),
        ));
    }
    let compare = stated_sources(&arguments.inputs, &arguments.stated)?;
    let mut stage = OneStage::new("evaluate")?;
    let named: Result<Vec<Value>, CliError> = compare.iter().map(source_value).collect();
    stage.set("", "compare", named?);
    match (&arguments.data, compare.first()) {
        (Some(data), _) => stage.set_data(data),
        (None, Some(first)) => {
            let data = of_model(&open(first)?.provenance.data)?;
            stage.set_above("", "data", toml(&data)?);
        }
        (None, None) => {}
    }
    if let Some(features) = &arguments.features {
        stage.set("--features", "features", source_value(&source(features)?)?);
    }
    arguments.run.put(&mut stage)?;
    arguments.sampling.put(&mut stage, compare.first())?;
    arguments.run.run(&stage, listen()?, workers).map(|_| ())
}

/// The data that a model's provenance names, to compare with; digits if it names none.
fn of_model(said: &str) -> Result<Data, CliError> {
    match Data::of_model(said) {
        Some(data) => Ok(data),
        None if said.is_empty() => Ok(Data::Digits),
        None => Err(CliError::Usage(format!(
            "the model learned from {said}; --data says which pictures it is measured against, such as \
             --data '{{ images = \"folder\", size = 32 }}'"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives_and_folders_of_pictures_are_told_from_models() {
        let folder = tempfile::tempdir().unwrap();
        let with = |name: &str, file: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join(file), "").unwrap();
            path
        };
        assert!(is_pictures(Path::new("missing.npz")));
        assert!(is_pictures(Path::new("missing.NPZ")));
        assert!(!is_pictures(Path::new("missing")));
        assert!(!is_pictures(Path::new("model.safetensors")));
        assert!(is_pictures(&with("flat", "a.png")));
        assert!(is_pictures(&with("odd.npz", "a.png")));
        assert!(is_pictures(&with("mixed", "notes.txt")));
        assert!(!is_pictures(&with("diffusers", "config.json")));
        assert!(!is_pictures(&with("run", "model.safetensors")));
        assert!(!is_pictures(&with("torch", "DiT.pt")));
    }
}
