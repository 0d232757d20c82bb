//! What drawing samples will do.

use super::cost::{guided_passes, inference_memory, sampling_flops};
use super::known::{Known, Problem};
use super::{PlannedStage, Work};
use crate::models::{Architecture, Shape};
use crate::process::ProcessKind;
use crate::recipe::schema::Stage;
use crate::recipe::schema::sample::Sample;
use crate::recipe::schema::source::Source;
use crate::sampling::Sampling;

pub(super) fn plan(
    stage: &Stage,
    sample: &Sample,
    known: &mut Known<'_>,
) -> Result<PlannedStage, Problem> {
    let (model, process) = known.denoiser(stage, &sample.from)?;
    let mut sample = sample.clone();
    let notes = unguided(&mut sample.sampling, [&model]);
    let memory = check_sampling(&sample.sampling, &model, &sample.from, process)?;
    if let Some(vae) = &sample.vae {
        known.vae(stage, vae, model.shape())?;
    } else if !is_pixels(model.shape()) {
        return Err(latents_need_a_vae(model.shape()));
    }
    Ok(PlannedStage {
        process,
        steps: sample.sampling.solver.steps_in_all(sample.sampling.steps),
        images: sample.sampling.count,
        memory,
        flops: sampling_flops(&sample.sampling, &model),
        before: Some(model),
        notes: notes.into_iter().collect(),
        ..PlannedStage::new(stage, "sample", Work::Sample(sample))
    })
}

/// Takes guidance away where no model has classes, which it changes nothing of; says so.
pub(super) fn unguided<'a>(
    sampling: &mut Sampling,
    models: impl IntoIterator<Item = &'a Architecture>,
) -> Option<String> {
    let mut models = models.into_iter().peekable();
    let guided = sampling.guidance > 1.0 && models.peek().is_some();
    let alike = guided && models.all(|model| !model.has_classes());
    alike.then(|| {
        sampling.guidance = 1.0;
        "without classes there is nothing to guide to: guidance is 1".into()
    })
}

/// Whether a model's samples are grey or coloured pixels.
pub(crate) fn is_pixels(model: Shape) -> bool {
    matches!(model.channels, 1 | 3)
}

pub(crate) fn latents_need_a_vae(model: Shape) -> Problem {
    Problem::Said(format!(
        "the model draws latents of {} channels; give the autoencoder that makes images of them as `vae`",
        model.channels
    ))
}

/// Refuses classes that a model doesn't have and solvers that are not its process's; estimates the
/// bytes of drawing.
pub(crate) fn check_sampling(
    sampling: &Sampling,
    model: &Architecture,
    source: &Source,
    process: Option<ProcessKind>,
) -> Result<usize, Problem> {
    let process = process.unwrap_or(ProcessKind::ASSUMED);
    if let Some(why) = sampling.solver.misfit(process) {
        return Err(Problem::Said(format!("`{source}`: {why}")));
    }
    let least = process.least_steps();
    if sampling.steps < least {
        let why = format!("an equation needs {least} `steps` at least, the start and the end");
        return Err(Problem::Said(why));
    }
    if let Some(class) = sampling
        .classes
        .iter()
        .flatten()
        .find(|class| **class >= model.shape().classes)
    {
        return Err(Problem::Said(format!(
            "class {class} does not exist; the model has {}, counted from 0",
            model.shape().classes
        )));
    }
    let batch = sampling.batch.min(sampling.count);
    Ok(inference_memory(
        model,
        guided_passes(sampling, model) * batch,
    ))
}
