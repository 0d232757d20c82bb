//! What an evaluation will do.

use super::cost::sampling_flops;
use super::known::{Known, Problem};
use super::missing::Role;
use super::sample::{check_sampling, is_pixels, latents_need_a_vae, unguided};
use super::{PlannedStage, Work};
use crate::data::Split;
use crate::evaluation::common_count;
use crate::recipe::schema::Stage;
use crate::recipe::schema::sample::{Against, Evaluate};
use crate::sampling::Sampling;

pub(super) fn plan(
    stage: &Stage,
    evaluate: &Evaluate,
    known: &mut Known<'_>,
) -> Result<PlannedStage, Problem> {
    let mut evaluate = evaluate.clone();
    let (memory, flops, note) = check(stage, &mut evaluate, known)?;
    let models = evaluate.compare.len();
    let archives = match &evaluate.against {
        Against::Reference { samples, .. } => samples.len(),
        Against::HeldOut { .. } => 0,
    };
    let what = match (models, archives) {
        (models, 0) => format!("evaluate {models} models"),
        (0, archives) => format!("evaluate {archives} archives"),
        (models, archives) => format!("evaluate {models} models and {archives} archives"),
    };
    Ok(PlannedStage {
        steps: evaluate
            .sampling
            .solver
            .steps_in_all(evaluate.sampling.steps),
        images: models * evaluate.sampling.count,
        memory,
        flops,
        notes: note.into_iter().collect(),
        ..PlannedStage::new(stage, &what, Work::Evaluate(evaluate.clone()))
    })
}

/// Checks an evaluation, and estimates its bytes and operations; with what a person should know.
/// Without a count, that of existing samples is found.
fn check(
    stage: &Stage,
    evaluate: &mut Evaluate,
    known: &mut Known<'_>,
) -> Result<(usize, f64, Option<String>), Problem> {
    let held_out = match &evaluate.against {
        Against::HeldOut { .. }
        | Against::Reference {
            reference: None, ..
        } => true,
        Against::Reference { .. } => false,
    };
    let data = &known.recipe.data;
    if held_out && data.shape().is_none() {
        return Err(Problem::Said(format!(
            "without `reference` it would measure against held-out pictures, and this recipe's data, {data}, are latents; \
             give `reference` (an npz archive of pictures or their statistics), `inception` (FID's weights) and `vae`"
        )));
    }
    let (pictures, most) = match held_out {
        false => (None, usize::MAX),
        // The floor is measured too: of training pictures.
        true => match (
            known.pictures(stage, Split::Test)?,
            known.pictures(stage, Split::Train)?,
        ) {
            (Some((_, 0)), _) => {
                return Err(Problem::Said(format!(
                    "no pictures of the data, {}, are held out to measure against",
                    known.recipe.data
                )));
            }
            (Some((shape, test)), train) => {
                let train = train.map_or(usize::MAX, |(_, train)| train);
                (Some(shape), test.min(train))
            }
            (None, _) => (None, usize::MAX),
        },
    };
    let most = evaluate.sampling.count.min(most);
    if evaluate.neighbours >= most {
        return Err(Problem::Said(format!(
            "{} neighbours can't be found among {most} images",
            evaluate.neighbours
        )));
    }
    let (mut memory, mut flops) = (0, 0.0);
    let models: Vec<_> = (evaluate.compare.iter())
        .map(|source| known.denoiser(stage, source))
        .collect::<Result<_, _>>()?;
    let note = unguided(
        &mut evaluate.sampling,
        models.iter().map(|(model, _)| model),
    );
    for (source, (model, process)) in evaluate.compare.iter().zip(models) {
        let samples = model.shape();
        let vae = match &evaluate.against {
            Against::Reference { vae, .. } => vae.as_deref(),
            Against::HeldOut { .. } => None,
        };
        if let Some(vae) = vae {
            known.vae(stage, vae, samples)?;
        }
        // Held-out pictures of other things than the model draws say nothing of it.
        match (&pictures, vae) {
            (Some(pictures), None) => known.draws(source, samples, pictures)?,
            (Some(pictures), Some(_)) => known.decodes(source, samples, pictures)?,
            (None, None) if !is_pixels(samples) => return Err(latents_need_a_vae(samples)),
            (None, _) => {}
        }
        memory = memory.max(check_sampling(&evaluate.sampling, &model, source, process)?);
        flops += sampling_flops(&evaluate.sampling, &model);
    }
    match &evaluate.against {
        Against::HeldOut { features } => {
            let (classifier, _) = known.model(stage, features)?;
            if classifier.classifier().is_none() {
                return Err(Problem::Said(format!("`{features}` is no classifier")));
            }
            if let Some(pictures) = &pictures {
                known.reads(features, &classifier, pictures)?;
            }
        }
        Against::Reference {
            reference,
            inception,
            vae,
            samples,
            ..
        } => {
            let mut there = true;
            for archive in samples {
                there &= known.need(stage, archive, Role::Samples);
            }
            if there && !samples.is_empty() {
                let count = evaluate.sampling.count;
                let stated = (count != Sampling::ALL).then_some(count);
                let count = common_count(samples, stated)?;
                evaluate.sampling.count = count;
                if evaluate.neighbours >= count {
                    return Err(Problem::Said(format!(
                        "{} neighbours can't be found among the {count} pictures of {}",
                        evaluate.neighbours,
                        samples[0].display()
                    )));
                }
            }
            if let Some(reference) = reference {
                known.need(stage, reference, Role::Reference);
            }
            known.need(stage, inception, Role::Inception);
            if let Some(vae) = vae {
                known.need(stage, vae, Role::Vae);
            }
        }
    }
    Ok((memory, flops, note))
}
