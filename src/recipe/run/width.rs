//! The stage that takes channels out of all layers.

use std::path::Path;
use std::time::Instant;

use burn::tensor::Tensor;

use super::context::Context;
use super::directory::write_text;
use super::models::MODEL;
use crate::evaluation::median;
use crate::models::{Architecture, Denoiser, Network};
use crate::ops::TrainingBackend;
use crate::pruning::{
    Saliency, ScoreBatch, importance, kept_channels, random_importance, ranked, without,
};
use crate::recipe::RecipeError;
use crate::recipe::plan::WidthPlan;
use crate::recipe::plan::width::{Narrowed, narrow};
use crate::recipe::schema::width::{Amount, Importance};
use crate::report::{csv_cell, thousands};
use crate::state::StateDict;
use crate::trunk::Plain;
use crate::weights::Checkpoint;

/// Passes that are timed, and images of each.
const TIMED: (usize, usize) = (5, 16);

impl<B: TrainingBackend> Context<'_, B> {
    pub(crate) fn width(
        &self,
        stage: &str,
        plan: &WidthPlan,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let parent = self.load(&plan.from)?;
        let problem = |problem: String| RecipeError::Stage {
            stage: stage.to_owned(),
            problem,
        };
        let architecture = parent.denoiser()?;
        let groups = architecture.channel_groups();
        let groups = groups.ok_or_else(|| problem("no channels can be taken out of it".into()))?;
        // Which blocks an earlier stage left was not known to the plan, and so not their widths.
        let settings = &plan.width;
        let time = |model: &Architecture| self.pass_time(model);
        let narrowed = narrow(architecture, &groups, settings, Some(&time));
        if self.stop.requested() {
            return Err(RecipeError::Interrupted);
        }
        let Narrowed { keep, after } = narrowed.map_err(problem)?;
        if let Amount::Latency(share) = settings.amount {
            let left = time(&after) / time(architecture);
            crate::say!("{stage}: a pass takes {left:.3} of the time, and `latency` is {share}");
        }
        let weights = parent.tensors.read_all()?;
        let importance = match settings.importance {
            Importance::Random => (groups.iter().enumerate())
                .map(|(index, group)| random_importance(group, self.recipe.seed, index))
                .collect(),
            Importance::Magnitude => {
                let none = StateDict::new();
                let measure = |group| importance(group, &weights, &none, Saliency::Magnitude);
                groups.iter().map(measure).collect()
            }
            Importance::DiffPruning { .. } | Importance::Taylor { .. } => {
                self.measured_importance(stage, plan, (&parent, &weights), &groups)?
            }
        };
        let unusable = |values: &Vec<f64>| values.iter().any(|value| !value.is_finite());
        if let Some(group) = importance.iter().position(unusable) {
            return Err(problem(format!(
                "channels of {} have no finite importance: the model's weights are damaged, or overflow",
                groups[group].root
            )));
        }
        let mut kept = Vec::with_capacity(groups.len());
        let mut text = String::from("layer,part,channels,left,importance left\n");
        for ((group, importance), keep) in groups.iter().zip(&importance).zip(&keep) {
            let ranked = ranked(group, importance, settings.leaves);
            let stays = kept_channels(group, &ranked, *keep, settings.leaves);
            let all: f64 = importance.iter().sum();
            let left: f64 = stays.iter().map(|channel| importance[*channel]).sum();
            let root = csv_cell(&group.root);
            let part = group.part.name();
            let (channels, stay) = (group.channels, stays.len());
            // Of a group of which nothing matters no share is left.
            let share = if all > 0.0 { left / all } else { 0.0 };
            text += &format!("{root},{part},{channels},{stay},{share:.4}\n");
            kept.push(stays);
        }
        write_text(&folder.join("widths.csv"), &text)?;
        let mut provenance = self.provenance(stage, plan.method, None, Some(&parent))?;
        // All layers that were there still are.
        provenance.granularity = parent.provenance.granularity;
        provenance.kept.clone_from(&parent.provenance.kept);
        provenance.parent_depth = parent.provenance.parent_depth;
        provenance.groups.clone_from(&parent.provenance.groups);
        provenance.note = "channels were taken out of all layers; those that are left have their original weights".into();
        crate::say!(
            "{stage}: {} of {} parameters are left: {}",
            thousands(after.parameters()),
            thousands(parent.architecture.parameters()),
            after
        );
        let pruned = without(weights, &groups, &kept);
        let path = folder.join(MODEL);
        let pruned = Checkpoint::new(after, pruned.into(), provenance, &path);
        let process = match settings.importance {
            Importance::DiffPruning { .. } | Importance::Taylor { .. } => Some(parent.trained_by()),
            Importance::Magnitude | Importance::Random => parent.process,
        };
        Ok(pruned.of_process(process).write()?)
    }

    /// Seconds of a pass of a model with weights of 0: the median of some, after one; no number
    /// once the run is to stop.
    fn pass_time(&self, model: &Architecture) -> f64 {
        let Some(network) = Network::<B::InnerBackend>::zeros(model, self.device) else {
            return f64::NAN;
        };
        let network = network.computing(self.recipe.compute);
        let batch = ScoreBatch::<B::InnerBackend>::noise(model.shape(), TIMED.1, 0, self.device);
        let pass = || {
            if self.stop.requested() {
                return f64::NAN;
            }
            let begun = Instant::now();
            let t = Tensor::zeros([TIMED.1], self.device);
            let output = network.forward(batch.x.clone(), t, batch.y.clone(), &mut Plain);
            // Reading the result waits for an asynchronous device.
            let _ = output.sum().into_data();
            begun.elapsed().as_secs_f64()
        };
        pass();
        let times: Vec<f64> = (0..TIMED.0).map(|_| pass()).collect();
        // Several workers go by the first one's clock, and stop with it.
        let first = self
            .workers
            .broadcast(median(&times).to_le_bytes().to_vec());
        let first = first.try_into().map_or(f64::NAN, f64::from_le_bytes);
        if first.is_nan() && !self.workers.leads() {
            self.stop.request();
        }
        first
    }
}
