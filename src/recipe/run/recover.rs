//! The stage that heals what is left.

use std::path::Path;

use super::context::{Context, finished};
use super::models::MODEL;
use super::prune::in_layers;
use crate::data::teacher;
use crate::models::Architecture;
use crate::ops::TrainingBackend;
use crate::process::{Distillation, MaskedFeatures, Process};
use crate::pruning::{self, Groups};
use crate::recipe::RecipeError;
use crate::recipe::plan::RecoverPlan;
use crate::recipe::plan::recover::{check_stacks, check_taps};
use crate::recipe::schema::Stage;
use crate::recipe::schema::recover::Representation;
use crate::recovery::Student;
use crate::trunk::Trunk;
use crate::weights::{Checkpoint, Provenance};

impl<B: TrainingBackend> Context<'_, B> {
    pub(crate) fn recover(
        &self,
        stage: &Stage,
        plan: &RecoverPlan,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let parent = self.load(&plan.from)?;
        let architecture = parent.denoiser()?.clone();
        // Features are compared after the layers that were chosen among.
        let granularity = parent.provenance.granularity;
        let taught = plan.taught.as_ref();
        let teacher_checkpoint = taught
            .map(|taught| self.load(&taught.teacher))
            .transpose()?;
        let distillation = match (taught, &teacher_checkpoint) {
            (Some(taught), Some(teacher)) => {
                let features = taught.features.as_ref().map(|(representation, k)| {
                    let teacher = teacher.denoiser()?;
                    let depth = architecture.layers(granularity);
                    // Plans refuse features of a network without a trunk.
                    let trunk = teacher.trunk(granularity).unwrap_or(Trunk::plain(0));
                    let taps = taps(representation, &parent, (depth, &trunk))
                        .and_then(|taps| {
                            let models = (&architecture, teacher);
                            check_stacks(&taps, models, granularity).map(|()| taps)
                        })
                        .map_err(|problem| RecipeError::Stage {
                            stage: stage.name.clone(),
                            problem,
                        })?;
                    Ok::<_, RecipeError>(MaskedFeatures {
                        taps,
                        k: *k,
                        beta: representation.beta.into(),
                    })
                });
                Some(Distillation {
                    alpha: taught.alpha,
                    features: features.transpose()?,
                })
            }
            _ => None,
        };
        let layers = distillation
            .iter()
            .flat_map(|distillation| &distillation.features)
            .flat_map(|features| features.taps.iter().map(|tap| tap.1))
            .collect();
        let sees = match &teacher_checkpoint {
            Some(checkpoint) => {
                let network = checkpoint.network::<B::InnerBackend>(self.device)?;
                let network = in_layers(network.computing(self.recipe.compute), granularity)?;
                let process = parent.trained_by().process();
                Some(teacher(network, process, layers))
            }
            None => None,
        };
        let mut provenance = self.provenance(
            &stage.name,
            plan.method,
            Some(&plan.optimisation),
            Some(&parent),
        )?;
        // A healed model still is the one whose layers were kept.
        provenance.granularity = granularity;
        provenance.kept.clone_from(&parent.provenance.kept);
        provenance.parent_depth = parent.provenance.parent_depth;
        provenance.groups.clone_from(&parent.provenance.groups);
        provenance.teacher = teacher_checkpoint
            .as_ref()
            .map(Checkpoint::fingerprint)
            .transpose()?;
        let mut training = self.training(
            stage,
            &plan.optimisation,
            folder,
            &[Some(&parent), teacher_checkpoint.as_ref()],
        )?;
        let steps = plan.optimisation.steps;
        let kind = parent.trained_by();
        let process = kind.process();
        training.describe(architecture.clone(), Some(kind), provenance.clone());
        let network = in_layers(self.network(&parent)?, granularity)?;
        let width = |model: &Architecture| model.states().map_or(0, |[_, width]| width);
        let widths = teacher_checkpoint
            .as_ref()
            .filter(|_| distillation.iter().any(|with| with.features.is_some()))
            .map(|teacher| (width(&architecture), width(&teacher.architecture)))
            .filter(|(narrow, wide)| narrow != wide);
        let mut student = Student::new(network, distillation, process.clone(), steps);
        if let Some((narrow, wide)) = widths {
            student = student.mapped(narrow, wide, self.recipe.seed, self.device);
        }
        let source = self.source(
            (&architecture, kind),
            &plan.optimisation,
            plan.label_drop,
            Vec::new(),
        )?;
        let (loss, likeness) = process.names();
        let curves = [loss, likeness, &["features"]].concat();
        let mut fit = self.over(training, (source, process), sees);
        if let Some(meanwhile) = &plan.meanwhile {
            fit = fit.observe(self.measured_meanwhile(
                stage,
                meanwhile,
                (&architecture, kind),
                folder,
            )?);
        }
        let fitted = finished(fit.curves(curves).run(student)?, steps)?;
        let healed = Checkpoint::of(&fitted.ema.network, provenance, &folder.join(MODEL));
        Ok(healed.of_process(Some(kind)).write()?)
    }
}

/// (student, teacher) layers whose features are compared: as the recipe says, else by the groups
/// the student was pruned in, else by its kept layers.
fn taps(
    representation: &Representation,
    student: &Checkpoint,
    (depth, teacher): (usize, &Trunk),
) -> Result<Vec<(usize, usize)>, String> {
    let Provenance {
        kept,
        granularity,
        parent_depth,
        groups,
        ..
    } = &student.provenance;
    let teacher_depth = teacher.depth;
    let taps: Vec<(usize, usize)> = if let Some(taps) = &representation.taps {
        taps.iter()
            .map(|[student, teacher]| (*student, *teacher))
            .collect()
    } else {
        if depth == teacher_depth {
            // One that lost width has all layers.
            return Ok((0..depth).map(|layer| (layer, layer)).collect());
        }
        let Some(kept) = kept else {
            return Err("the checkpoint does not say which layers were kept; give `taps`".into());
        };
        if *parent_depth != Some(teacher_depth) || kept.len() != depth {
            return Err(format!(
                "the student has {depth} of {} {}, the teacher {teacher_depth}; give `taps`",
                parent_depth.unwrap_or(0),
                granularity.layers()
            ));
        }
        match groups {
            Some(groups) => Groups::from_pairs(groups, teacher_depth)
                .map(|groups| groups.taps(kept))
                .map_err(|error| error.to_string())?,
            None => pruning::taps_from_kept(kept, teacher).map_err(|error| error.to_string())?,
        }
    };
    check_taps(&taps, depth, teacher_depth).map(|()| taps)
}
