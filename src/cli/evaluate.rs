//! The command that measures samples.

use std::path::{Path, PathBuf};

use super::weights::{StatedArguments, stated_sources};
use super::{RunArguments, listen, source};
use crate::evaluation::DEFAULT_NEIGHBOURS;
use crate::recipe::RecipeError;
use crate::recipe::evaluate_reference::{ReferenceFiles, archives};
use crate::recipe::sampling::{Against, Evaluate};
use crate::recipe::schema::StageKind;

#[derive(Debug, clap::Args)]
pub(super) struct EvaluateArguments {
    /// Archives of samples and last the reference batch, all .npz; or checkpoints of digit models
    #[arg(required = true)]
    inputs: Vec<String>,
    /// Weights of the Inception network that archives are measured in
    #[arg(
        long,
        default_value = "artifacts/pretrained/pt_inception-2015-12-05-6726825d.pth"
    )]
    inception: PathBuf,
    /// Where to write the result and its protocol as JSON
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Folder that keeps what was measured of a reference for the next time
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// The classifier whose features digit models are compared in
    #[arg(long, default_value = "embedded:digits-features")]
    features: String,
    #[command(flatten)]
    stated: StatedArguments,
    #[command(flatten)]
    run: RunArguments,
}

/// Measures archives, or digit models.
pub(super) fn evaluate(arguments: &EvaluateArguments) -> Result<(), RecipeError> {
    let is_archive = |name: &&String| Path::new(name).extension().is_some_and(|end| end == "npz");
    match arguments.inputs.iter().filter(is_archive).count() {
        0 => models(arguments),
        count if count == arguments.inputs.len() => measure_archives(arguments),
        _ => Err(RecipeError::Run(
            "archives (.npz) and checkpoints can't be measured together".into(),
        )),
    }
}

fn measure_archives(arguments: &EvaluateArguments) -> Result<(), RecipeError> {
    arguments.stated.refuse(&arguments.inputs.join(" "))?;
    let inputs: Vec<PathBuf> = arguments.inputs.iter().map(PathBuf::from).collect();
    let (reference, samples) = match inputs.split_last() {
        Some((reference, samples)) if !samples.is_empty() => (reference, samples),
        _ => {
            return Err(RecipeError::Run(format!(
                "{}: a reference batch must follow: evaluate SAMPLES.npz REFERENCE.npz",
                arguments.inputs.join(" ")
            )));
        }
    };
    if let Some(problem) = arguments.run.backend.missing() {
        return Err(RecipeError::Run(problem));
    }
    if let Some(out) = arguments.out.as_ref().filter(|out| out.exists()) {
        return Err(RecipeError::Run(format!(
            "{}: exists; nothing is overwritten, name another",
            out.display()
        )));
    }
    let files = ReferenceFiles {
        reference,
        inception: &arguments.inception,
        vae: None,
        samples,
    };
    listen()?;
    crate::with_backend!(arguments.run.backend, B, device => {
        type Inner = <B as burn::tensor::backend::AutodiffBackend>::InnerBackend;
        let (cache, out) = (arguments.cache.as_deref(), arguments.out.as_deref());
        archives::<Inner>(&files, DEFAULT_NEIGHBOURS, cache, out, device)
    }, else Ok(()))
}

fn models(arguments: &EvaluateArguments) -> Result<(), RecipeError> {
    let compare = stated_sources(&arguments.inputs, &arguments.stated)?;
    let kind = StageKind::Evaluate(Evaluate {
        compare,
        against: Against::Digits {
            features: source(&arguments.features)?,
        },
        neighbours: DEFAULT_NEIGHBOURS,
        sampling: arguments.run.sampling(2000)?,
    });
    arguments.run.run("evaluate", kind).map(|_| ())
}
