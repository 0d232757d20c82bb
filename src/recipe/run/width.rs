//! The stage that takes channels out of all layers.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use burn::tensor::{Tensor, backend::Backend};
use serde::{Deserialize, Serialize};

use super::context::Context;
use super::directory::{json, write_text};
use super::measuring::score_batch;
use super::models::MODEL;
use crate::data::Split;
use crate::evaluation::median_and_spread;
use crate::models::{Architecture, ChannelGroup, Denoiser, Network};
use crate::ops::TrainingBackend;
use crate::process::{Process, Times};
use crate::pruning::{
    Descent, LossGradients, Saliency, ScoreBatch, importance, kept_channels, random_importance,
    ranked, without,
};
use crate::recipe::RecipeError;
use crate::recipe::plan::WidthPlan;
use crate::recipe::plan::width::{Narrowed, narrow, times_in_a_pass};
use crate::recipe::schema::width::{Amount, Importance};
use crate::report::{Progress, csv_cell, thousands};
use crate::state::StateDict;
use crate::trunk::Plain;
use crate::weights::{Checkpoint, read_safetensors, write_safetensors};

/// Passes that are timed, and images of each.
const TIMED: (usize, usize) = (5, 16);

/// Time between two savings of what is measured.
const BETWEEN: Duration = Duration::from_secs(300);

/// How far the measuring has come, in the file of gradients summed so far.
#[derive(Debug, Serialize, Deserialize)]
struct Measured {
    /// Passes done.
    passes: usize,
    /// The way through the times, where one is gone through after the other.
    descent: Option<Descent>,
}

/// The key of [`Measured`] in the file's metadata.
const MEASURED: &str = "tinyfusion.measured";

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
        let median = median_and_spread(&times).map_or(f64::NAN, |(median, _)| median);
        // Several workers go by the first one's clock, and stop with it.
        let first = self.workers.broadcast(median.to_le_bytes().to_vec());
        let first = first.try_into().map_or(f64::NAN, f64::from_le_bytes);
        if first.is_nan() && !self.workers.leads() {
            self.stop.request();
        }
        first
    }

    /// The importance of each group's channels by gradients, from the run's folder if it was
    /// measured before.
    fn measured_importance(
        &self,
        stage: &str,
        plan: &WidthPlan,
        (parent, weights): (&Checkpoint, &StateDict),
        groups: &[ChannelGroup],
    ) -> Result<Vec<Vec<f64>>, RecipeError> {
        let key = json(&(
            parent.fingerprint()?,
            // The same weights may be read with other heads.
            (&parent.architecture, parent.trained_by()),
            &self.recipe.data,
            &plan.width.importance,
            (self.recipe.seed, self.recipe.compute),
            <B::InnerBackend as Backend>::name(self.device),
        ))?;
        let read = |text: String| {
            let line = |line: &str| -> Option<Vec<f64>> {
                line.split(' ').map(|value| value.parse().ok()).collect()
            };
            let all: Option<Vec<Vec<f64>>> = text.lines().map(line).collect();
            let fits = |all: &Vec<Vec<f64>>| {
                let pairs = all.iter().zip(groups);
                all.len() == groups.len()
                    && pairs
                        .into_iter()
                        .all(|(of, group)| of.len() == group.channels)
            };
            all.filter(fits)
        };
        let workers = &**self.workers;
        self.directory
            .measured(workers, "importance", &key, read, || {
                let path = (self.directory).measured_path("importance", &key, "safetensors")?;
                let gradients =
                    self.loss_gradients(stage, plan, (parent, weights), groups, &path)?;
                let line = |group: &ChannelGroup| {
                    let found = importance(group, weights, &gradients, Saliency::Taylor);
                    let found: Vec<String> = found.iter().map(ToString::to_string).collect();
                    found.join(" ") + "\n"
                };
                let text = groups.iter().map(line).collect();
                // Only an interrupted measuring needs them.
                let _ = std::fs::remove_file(&path);
                Ok(text)
            })
    }

    /// The gradients of the loss, summed; those so far are in `path` when it is interrupted.
    fn loss_gradients(
        &self,
        stage: &str,
        plan: &WidthPlan,
        (parent, weights): (&Checkpoint, &StateDict),
        groups: &[ChannelGroup],
        path: &Path,
    ) -> Result<StateDict, RecipeError> {
        let network = self.network(parent)?;
        let process = parent.trained_by().process();
        let (batch, timesteps, mut descent, total, together) = match plan.width.importance {
            Importance::DiffPruning {
                threshold,
                timesteps,
                batch,
            } => {
                let descent = Descent::new(threshold, true);
                let together = times_in_a_pass(&parent.architecture, batch);
                (batch, timesteps, Some(descent), timesteps, together)
            }
            Importance::Taylor {
                batches,
                timesteps,
                batch,
            } => (batch, timesteps, None, batches, 1),
            Importance::Magnitude | Importance::Random => return Ok(StateDict::new()),
        };
        let seed = self.recipe.seed;
        let within = descent.is_none().then_some(timesteps);
        let source = self.pictures_to_measure(parent, Split::Train, seed, batch, within)?;
        let times = times_from_data(process.times(), timesteps);

        let all = total.div_ceil(together);
        let before = measured_before(path).filter(|(done, taken)| {
            let through = match (&done.descent, &descent) {
                // Of an unfinished way every loss counts.
                (Some(done_so_far), Some(descent)) => {
                    let losses = done_so_far.losses.len();
                    done_so_far.threshold == descent.threshold
                        && !done_so_far.ended
                        && done_so_far.counted == losses
                        && done.passes.checked_mul(together) == Some(losses)
                }
                (None, None) => true,
                _ => false,
            };
            let sound = done.passes < all && through;
            // Sums of every weight that is scored, as large as it.
            let scored = groups.iter().flat_map(|group| &group.members);
            let mut scored = scored.filter(|member| member.scored);
            let fits = |tensor: &String| match (taken.get(tensor), weights.get(tensor)) {
                (Some(sum), Some(weight)) => sum.shape == weight.shape,
                _ => false,
            };
            sound && scored.all(|member| fits(&member.tensor))
        });
        let resumed = before.is_some();
        let (mut passes, mut gradients) = match before {
            Some((done, sums)) => {
                descent = done.descent;
                (done.passes, LossGradients::resumed(&network, &sums))
            }
            None => (0, LossGradients::default()),
        };
        let what = if descent.is_some() {
            "times"
        } else {
            "batches"
        };
        let mut bar = Progress::new(stage, what, total);
        if resumed {
            crate::say!("{stage}: goes on after {} {what}", passes * together);
            bar.skip(passes * together);
        }
        // The same images and noise at all times.
        let still = match &descent {
            Some(_) => Some(score_batch::<B>(&source, 0, self.device)?),
            None => None,
        };
        let mut saved = Instant::now();
        while passes < all && descent.as_ref().is_none_or(|descent| !descent.ended) {
            match (&mut descent, &still) {
                (Some(descent), Some(batch)) => {
                    let first = passes * together;
                    let times = &times[first..total.min(first + together)];
                    gradients.add_times(&network, &process, batch, times, descent);
                    if let Some(loss) = descent.losses.iter().find(|loss| !loss.is_finite()) {
                        return Err(RecipeError::Stage {
                            stage: stage.to_owned(),
                            problem: format!(
                                "a loss is {loss}: the model's weights are damaged, or overflow"
                            ),
                        });
                    }
                }
                _ => {
                    let batch = score_batch::<B>(&source, passes, self.device)?;
                    gradients.add(&network, &process, &batch);
                }
            }
            passes += 1;
            bar.add(together);
            let left = passes < all && descent.as_ref().is_none_or(|descent| !descent.ended);
            let stopped = left && self.stop.requested();
            if stopped || (left && saved.elapsed() > BETWEEN) {
                let done = Measured {
                    passes,
                    descent: descent.clone(),
                };
                let metadata = BTreeMap::from([(MEASURED.to_owned(), json(&done)?)]);
                let sums = gradients.sums::<B>(&network);
                if let Some(folder) = path.parent() {
                    std::fs::create_dir_all(folder).map_err(RecipeError::io(folder))?;
                }
                write_safetensors(path, &sums.into(), metadata, None)?;
                saved = Instant::now();
            }
            if stopped {
                return Err(RecipeError::Interrupted);
            }
        }
        drop(bar);
        if let Some(Descent {
            losses, counted, ..
        }) = &descent
        {
            let largest = losses.iter().copied().fold(0.0, f64::max);
            crate::say!(
                "{stage}: {counted} of {total} times count; the loss falls from {largest:.4} to {:.4}",
                losses.last().copied().unwrap_or(0.0)
            );
        }
        Ok(gradients.sums::<B>(&network))
    }
}

/// What an interrupted measuring left; None where nothing of use is there.
fn measured_before(path: &Path) -> Option<(Measured, StateDict)> {
    let (sums, metadata) = read_safetensors(path).ok()?;
    let done = serde_json::from_str(metadata.get(MEASURED)?).ok()?;
    Some((done, sums))
}

/// So many times of a process, evenly spaced, from the least noise on.
fn times_from_data(times: Times, count: usize) -> Vec<f32> {
    let at = |index: usize| match times {
        Times::Steps(steps) => (index * steps / count) as f32,
        // An interpolant's data are at the end of its interval.
        Times::Between(first, last) => {
            (last - (last - first) * (index as f64 + 0.5) / count as f64) as f32
        }
    };
    (0..count).map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_begin_where_there_is_the_least_noise() {
        assert_eq!(
            times_from_data(Times::Steps(1000), 4),
            [0.0, 250.0, 500.0, 750.0]
        );
        assert_eq!(times_from_data(Times::Between(0.0, 1.0), 2), [0.75, 0.25]);
    }
}
