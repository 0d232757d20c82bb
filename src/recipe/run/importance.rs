//! The importance of channels by gradients of the loss.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::context::Context;
use super::directory::json;
use super::measuring::score_batch;
use crate::data::Split;
use crate::models::{ChannelGroup, Member};
use crate::ops::TrainingBackend;
use crate::process::{Process, Times};
use crate::pruning::{Descent, LossGradients, Saliency, importance, losses_at, mean_loss};
use crate::recipe::RecipeError;
use crate::recipe::plan::WidthPlan;
use crate::recipe::plan::width::times_in_a_pass;
use crate::recipe::schema::width::Importance;
use crate::report::Progress;
use crate::state::StateDict;
use crate::weights::{Checkpoint, read_safetensors, write_safetensors};
use crate::workers::share_out;

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

impl Measured {
    /// Whether it is on the same way, with so many times in a pass, and not at its end.
    fn leads_to(&self, descent: &Option<Descent>, together: usize) -> bool {
        match (&self.descent, descent) {
            // Of an unfinished way every loss counts.
            (Some(done), Some(descent)) => {
                let losses = done.losses.len();
                done.threshold == descent.threshold
                    && !done.ended
                    && done.counted == losses
                    && self.passes.checked_mul(together) == Some(losses)
            }
            (None, None) => true,
            _ => false,
        }
    }
}

/// The key of [`Measured`] in the file's metadata.
const MEASURED: &str = "tinyfusion.measured";

impl<B: TrainingBackend> Context<'_, B> {
    /// The importance of each group's channels by gradients, from the run's folder if it was
    /// measured before.
    pub(super) fn measured_importance(
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
            .measured()
            .get((workers, self.stop), "importance", &key, read, || {
                let path = (self.directory.measured()).file("importance", &key, "safetensors")?;
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
            let fits =
                |member: &Member| match (taken.get(&member.tensor), weights.get(&member.tensor)) {
                    (Some(sum), Some(weight)) => sum.shape == weight.shape,
                    _ => false,
                };
            // Sums of every weight that is scored, as large as it.
            let mut members = groups.iter().flat_map(|group| &group.members);
            let whole = members.all(|member| !member.scored || fits(member));
            whole && done.passes < all && done.leads_to(&descent, together)
        });
        let resumed = before.is_some();
        let (mut passes, sums) = match before {
            Some((done, sums)) => {
                descent = done.descent;
                (done.passes, sums)
            }
            None => (0, StateDict::new()),
        };
        let mut gradients = LossGradients::resumed(self.workers, &network, &sums);
        drop(sums);
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
        let ended = |passes: usize, descent: &Option<Descent>| {
            passes >= all || descent.as_ref().is_some_and(|descent| descent.ended)
        };
        let workers = &**self.workers;
        let mut saved = Instant::now();
        while !ended(passes, &descent) {
            // A pass for each worker.
            let round = workers.size().min(all - passes);
            let (mut own, mut counted) = (None, vec![0; workers.size()]);
            let (mut stop, mut save) = (false, false);
            let of_pass = |piece: usize| {
                let pass = passes + piece;
                let mut said = Vec::new();
                let losses = match &still {
                    Some(batch) => {
                        let first = pass * together;
                        let times = &times[first..total.min(first + together)];
                        let losses = losses_at(&network, &process, batch, times);
                        said.extend(losses.to_data().iter::<f64>());
                        losses
                    }
                    None => {
                        let batch = score_batch::<B>(&source, pass, self.device)?;
                        mean_loss(&network, &process, &batch)
                    }
                };
                own = Some(losses);
                said.push(f64::from(self.stop.requested()));
                said.push(f64::from(saved.elapsed() > BETWEEN));
                Ok::<_, RecipeError>(said)
            };
            share_out(workers, round, of_pass, |piece, mut said: Vec<f64>| {
                save |= said.pop() == Some(1.0);
                stop |= said.pop() == Some(1.0);
                counted[piece] = match &mut descent {
                    Some(descent) => descent.count(&said),
                    None => 1,
                };
                Ok(())
            })?;
            let losses = descent.iter().flat_map(|descent| &descent.losses);
            if let Some(loss) = losses.copied().find(|loss| !loss.is_finite()) {
                return Err(RecipeError::Stage {
                    stage: stage.to_owned(),
                    problem: format!(
                        "a loss is {loss}: the model's weights are damaged, or overflow"
                    ),
                });
            }
            gradients.add(&network, own, &counted);
            passes += round;
            bar.add(round * together);
            if (stop || save) && !ended(passes, &descent) {
                let done = Measured {
                    passes,
                    descent: descent.clone(),
                };
                let metadata = BTreeMap::from([(MEASURED.to_owned(), json(&done)?)]);
                let sums = gradients.sums::<B>(&network);
                if let Some(folder) = path.parent() {
                    std::fs::create_dir_all(folder).map_err(RecipeError::io(folder))?;
                }
                // Each in its own folder, so that all go on alike.
                write_safetensors(path, &sums.into(), metadata, None)?;
                saved = Instant::now();
                if stop {
                    return Err(RecipeError::Interrupted);
                }
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
