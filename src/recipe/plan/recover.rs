//! What a recovery will do.

use super::cost::{flops, images, inference_memory, passes, training_memory};
use super::known::{Known, Problem};
use super::{PlannedStage, Work};
use crate::models::Architecture;
use crate::process::ProcessKind;
use crate::recipe::schema::Stage;
use crate::recipe::schema::optimisation::Meanwhile;
use crate::recipe::schema::recover::{Recover, RecoverMethod, Representation};
use crate::recipe::schema::source::Source;
use crate::training::Optimisation;
use crate::trunk::Granularity;

/// A recovery, resolved.
#[derive(Debug, Clone)]
pub struct RecoverPlan {
    /// The student.
    pub from: Source,
    /// The method, as the recipe names it.
    pub method: &'static str,
    /// What is learned from a teacher, if anything.
    pub taught: Option<Taught>,
    /// Budget and schedule.
    pub optimisation: Optimisation,
    /// Probability of replacing a label by the null class.
    pub label_drop: f64,
    /// How it is measured while it is trained, if it is.
    pub meanwhile: Option<Meanwhile>,
}

/// What a student learns from a teacher.
#[derive(Debug, Clone)]
pub struct Taught {
    /// The teacher.
    pub teacher: Source,
    /// Weight of its output.
    pub alpha: f64,
    /// Its hidden states that count too, and beyond how many standard deviations they do not.
    pub features: Option<(Representation, Option<f64>)>,
}

impl Taught {
    fn new(method: &RecoverMethod) -> Option<Self> {
        let (distillation, features) = match method {
            RecoverMethod::FineTune => return None,
            RecoverMethod::Kd { distillation } => (distillation, None),
            RecoverMethod::RepKd {
                distillation,
                representation,
            } => (distillation, Some((representation.clone(), None))),
            RecoverMethod::MaskedKd {
                distillation,
                representation,
                k,
            } => (distillation, Some((representation.clone(), Some(*k)))),
        };
        Some(Self {
            teacher: distillation.teacher.clone(),
            alpha: distillation.alpha,
            features,
        })
    }
}

pub(super) fn plan(
    stage: &Stage,
    recover: &Recover,
    known: &mut Known<'_>,
) -> Result<PlannedStage, Problem> {
    let (student, process) = known.denoiser(stage, &recover.from)?;
    let process = process.unwrap_or(ProcessKind::ASSUMED);
    known.same_classes(&recover.from)?;
    if let Some(meanwhile) = &recover.meanwhile {
        known.measured_meanwhile(stage, (&student, Some(process)), meanwhile)?;
    }
    if known.is_by_branch(&recover.from) {
        known.by_branch.insert(stage.name.clone());
    }
    if known.is_divided(&recover.from) {
        known.divided.insert(stage.name.clone());
    }
    known.fits_data(stage, student.shape())?;
    let optimisation = &recover.optimisation;
    let seen = images(optimisation);
    let mut arithmetic = passes(&student, known, false) * flops(&student, seen);
    let mut memory = training_memory(&student, student.parameters(), optimisation, known);
    let taught = Taught::new(&recover.method);
    let mut notes = Vec::new();
    if let Some(taught) = &taught {
        let (teacher, other) = known.denoiser(stage, &taught.teacher)?;
        let other = other.unwrap_or(ProcessKind::ASSUMED);
        if other != process {
            return Err(Problem::Said(format!(
                "the student was trained by {process}, the teacher by {other}"
            )));
        }
        let says = |model: &Architecture| {
            let patch = model.patch_filled_in();
            (model.shape(), model.predicts_variance(), patch)
        };
        if says(&teacher) != says(&student) {
            return Err(Problem::Said(format!(
                "student and teacher predict different things: {student}; {teacher}"
            )));
        }
        let states = (student.states(), teacher.states());
        if taught.features.is_some() && (states.0.is_none() || states.1.is_none()) {
            return Err(Problem::Said(format!(
                "hidden states are compared along a trunk, or two of one width, which one of these has not: {student}; {teacher}"
            )));
        }
        if let (Some(_), (Some([tokens, width]), Some([others, wider]))) =
            (&taught.features, states)
        {
            if tokens != others {
                return Err(Problem::Said(format!(
                    "hidden states of {tokens} and of {others} places can't be compared: {student}; {teacher}"
                )));
            }
            if width != wider {
                notes.push(format!(
                    "the student's hidden states, {width} wide, are compared after linear maps to {wider}, which are learned along and dropped"
                ));
            }
        }
        let representation = taught.features.as_ref().map(|(features, _)| features);
        if let Some(taps) = representation.and_then(|features| features.taps.as_ref()) {
            let taps: Vec<_> = taps
                .iter()
                .map(|[student, teacher]| (*student, *teacher))
                .collect();
            // Of pairs there are no branches to be counted.
            let lacks = !student.is_whole() && student.trunk(Granularity::Branch).is_some();
            let granularity = match known.is_by_branch(&recover.from) || lacks {
                true => Granularity::Branch,
                false => Granularity::Block,
            };
            let depths = (student.layers(granularity), teacher.layers(granularity));
            check_taps(&taps, depths.0, depths.1).map_err(Problem::Said)?;
            if !known.is_divided(&recover.from) {
                check_stacks(&taps, (&student, &teacher), granularity).map_err(Problem::Said)?;
            }
        }
        memory += inference_memory(&teacher, optimisation.batch / optimisation.accumulate);
        arithmetic += flops(&teacher, seen);
    }
    let method = recover_method(&recover.method);
    let work = Work::Recover(RecoverPlan {
        from: recover.from.clone(),
        method,
        taught,
        optimisation: optimisation.clone(),
        label_drop: recover.label_drop,
        meanwhile: recover.meanwhile.clone(),
    });
    let mut planned = PlannedStage {
        before: Some(student.clone()),
        after: Some(student),
        process: Some(process),
        steps: optimisation.steps,
        images: seen,
        memory,
        flops: arithmetic,
        ..PlannedStage::new(stage, &format!("recover, {method}"), work)
    };
    planned.notes.extend(notes);
    Ok(planned)
}

/// Refuses (student, teacher) taps outside the models or out of order; features are compared in the
/// order of the trunk.
pub(in crate::recipe) fn check_taps(
    taps: &[(usize, usize)],
    depth: usize,
    teacher_depth: usize,
) -> Result<(), String> {
    if let Some((student, teacher)) = taps
        .iter()
        .find(|(student, teacher)| *student >= depth || *teacher >= teacher_depth)
    {
        return Err(format!(
            "tap [{student}, {teacher}] lies outside a student of {depth} and a teacher of {teacher_depth} layers"
        ));
    }
    let rising = taps
        .windows(2)
        .all(|pair| pair[0].0 < pair[1].0 && pair[0].1 < pair[1].1);
    if taps.is_empty() || !rising {
        return Err("there must be at least one tap, and taps must rise on both sides".into());
    }
    Ok(())
}

/// Refuses taps between a layer of a MAR's encoder and one of a decoder, whose states are of other
/// places.
pub(in crate::recipe) fn check_stacks(
    taps: &[(usize, usize)],
    (student, teacher): (&Architecture, &Architecture),
    granularity: Granularity,
) -> Result<(), String> {
    let stack = |model: &Architecture, layer| model.stack_of_layer(layer, granularity);
    let across = (taps.iter()).find(|(layer, of)| stack(student, *layer) != stack(teacher, *of));
    match across {
        Some((layer, of)) => Err(format!(
            "tap [{layer}, {of}] is between an encoder and a decoder, whose hidden states can't be compared: {student}; {teacher}"
        )),
        None => Ok(()),
    }
}

fn recover_method(method: &RecoverMethod) -> &'static str {
    match method {
        RecoverMethod::FineTune => "fine-tune",
        RecoverMethod::Kd { .. } => "kd",
        RecoverMethod::RepKd { .. } => "rep-kd",
        RecoverMethod::MaskedKd { .. } => "masked-kd",
    }
}
