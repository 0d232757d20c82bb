//! What layers, masks and models are measured with.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use serde::Serialize;

use super::context::Context;
use super::prune::in_layers;
use crate::analysis::TrunkStates;
use crate::data::{BatchPlan, BatchSource, Split};
use crate::models::{Network, Prunable};
use crate::ops::TrainingBackend;
use crate::process::{AnyProcess, Process as _};
use crate::pruning::{
    Evolution, Mask, Score, ScoreBatch, evolve, kept_by, mask_losses, random_masks, score,
};
use crate::recipe::RecipeError;
use crate::recipe::plan::Search;
use crate::recipe::schema::prune::Scored;
use crate::report::Progress;
use crate::training::TrainingError;
use crate::trunk::Granularity;
use crate::weights::Checkpoint;
use crate::workers::share_out;

/// A network, its process, and batches of pictures.
pub(super) struct Measuring<'a, B: TrainingBackend> {
    pub(super) network: Network<B::InnerBackend>,
    pub(super) process: AnyProcess,
    source: BatchSource,
    device: &'a B::Device,
}

/// What is measured to choose layers.
#[derive(Clone, Copy)]
pub(super) struct Measured<'a> {
    pub(super) parent: &'a Checkpoint,
    pub(super) granularity: Granularity,
    pub(super) scored: &'a Scored,
}

/// Masks with their losses.
pub(super) struct MeasuredMasks {
    /// A line each, below a header.
    pub(super) text: String,
    /// Kept layers and loss.
    pub(super) masks: Vec<(Vec<usize>, f64)>,
}

impl MeasuredMasks {
    pub(super) fn losses(&self) -> Vec<f64> {
        self.masks.iter().map(|(_, loss)| *loss).collect()
    }
}

impl<B: TrainingBackend> Context<'_, B> {
    /// For a model, and pictures drawn from a part of the data; at times below `timesteps`, or at
    /// all.
    pub(super) fn measuring(
        &self,
        model: &Checkpoint,
        part: Split,
        seed: u64,
        batch: usize,
        timesteps: Option<usize>,
    ) -> Result<Measuring<'_, B>, RecipeError> {
        let network = model.network::<B::InnerBackend>(self.device)?;
        Ok(Measuring {
            network: network.computing(self.recipe.compute),
            process: model.trained_by().process(),
            source: self.pictures_to_measure(model, part, seed, batch, timesteps)?,
            device: self.device,
        })
    }

    /// The pictures that a model is measured with.
    pub(super) fn pictures_to_measure(
        &self,
        model: &Checkpoint,
        part: Split,
        seed: u64,
        batch: usize,
        timesteps: Option<usize>,
    ) -> Result<BatchSource, RecipeError> {
        let (shape, process) = (model.denoiser()?.shape(), model.trained_by());
        let times = process.process().times();
        let plan = BatchPlan {
            batch,
            seed,
            channels: shape.channels,
            size: shape.side,
            classes: shape.classes,
            label_drop: 0.0,
            times: match timesteps {
                Some(timesteps) => times.within(timesteps),
                None => times,
            },
            masking: process.masking(&model.architecture),
            logits: Vec::new(),
        };
        Ok(BatchSource::new(plan, self.part(part)?))
    }

    /// What layers or masks are measured with.
    pub(super) fn calibration(
        &self,
        measured: &Measured<'_>,
    ) -> Result<Measuring<'_, B>, RecipeError> {
        let Measured {
            parent,
            granularity,
            scored,
        } = *measured;
        let seed = self.recipe.seed;
        let timesteps = Some(scored.timesteps);
        let mut measuring = self.measuring(parent, Split::Train, seed, scored.batch, timesteps)?;
        measuring.network = in_layers(measuring.network, granularity)?;
        Ok(measuring)
    }

    /// The loss of each mask, from the run's folder if it was measured before.
    pub(super) fn measured_masks(
        &self,
        stage: &str,
        search: Search,
        measured: &Measured<'_>,
    ) -> Result<MeasuredMasks, RecipeError> {
        let (what, key) = match search {
            Search::Random { masks, .. } => ("random", [masks, 0]),
            Search::Evolution(Evolution { masks, population }) => {
                ("evolution", [masks, population])
            }
        };
        let key = (self.measured_by(measured)?, measured.scored.keep, what, key);
        let read = |text: String| {
            let masks: Option<Vec<_>> = text.lines().skip(1).map(mask_line).collect();
            masks.map(|masks| MeasuredMasks { text, masks })
        };
        let measure = || self.mask_losses(stage, search, measured);
        let workers = &**self.workers;
        let measured =
            (self.directory.measured()).get((workers, self.stop), "masks", &key, read, measure)?;
        let mut masks = measured.masks.iter();
        if let Some((kept, loss)) = masks.find(|(_, loss)| !loss.is_finite()) {
            return Err(RecipeError::Stage {
                stage: stage.to_owned(),
                problem: format!(
                    "layers {kept:?} have the loss {loss}: the model's weights are damaged, or overflow"
                ),
            });
        }
        Ok(measured)
    }

    /// Measures masks; a line each, as `mask_line` reads it.
    fn mask_losses(
        &self,
        stage: &str,
        search: Search,
        measured: &Measured<'_>,
    ) -> Result<String, RecipeError> {
        let scored = measured.scored;
        let measuring = self.calibration(measured)?;
        let (network, process) = (&measuring.network, &measuring.process);
        let (depth, seed) = (network.trunk().depth, self.recipe.seed);
        let all = match search {
            Search::Random { masks, .. } => masks,
            Search::Evolution(evolution) => evolution.masks,
        };
        let (total, mut reached) = (all * scored.batches, 0);
        let mut bar = Progress::new(stage, "masks", total);
        let workers = &**self.workers;
        // Why the measuring ended early, if nobody stopped it.
        let mut failed = None;
        let mut measure = |masks: &[Mask]| -> Option<Vec<f64>> {
            let mut sums = vec![0.0; masks.len()];
            // A piece is a worker's masks on a batch: neighbours, which have their first layers in
            // common.
            let mut order: Vec<usize> = (0..masks.len()).collect();
            order.sort_by(|a, b| masks[*a].cmp(&masks[*b]));
            let runs: Vec<&[usize]> = order
                .chunks(order.len().div_ceil(workers.size()).max(1))
                .collect();
            let of_run = |piece: usize| {
                let (step, run) = (piece / runs.len(), runs[piece % runs.len()]);
                let masks: Vec<Mask> = run.iter().map(|&index| masks[index].clone()).collect();
                let batch = measuring.batch(step)?;
                // The others are as far, as far as there are any.
                let done = |_| {
                    reached += workers.size();
                    bar.reach(reached.min(total));
                };
                mask_losses(network, process, &batch, &masks, self.stop, done)
                    .ok_or(RecipeError::Interrupted)
            };
            let add = |piece: usize, losses: Vec<f64>| {
                for (&index, loss) in runs[piece % runs.len()].iter().zip(losses) {
                    sums[index] += loss / scored.batches as f64;
                }
                Ok(())
            };
            match share_out(workers, scored.batches * runs.len(), of_run, add) {
                Ok(()) => Some(sums),
                Err(error) => {
                    failed = Some(error);
                    None
                }
            }
        };
        let measured = match search {
            Search::Random { masks, .. } => {
                let masks = random_masks(seed, depth, scored.keep, masks);
                let losses = measure(&masks);
                losses.map(|losses| masks.into_iter().zip(losses).collect())
            }
            Search::Evolution(evolution) => {
                evolve(seed, depth, scored.keep, evolution, &mut measure)
            }
        };
        drop(bar);
        let measured: Vec<(Mask, f64)> =
            measured.ok_or_else(|| failed.unwrap_or(RecipeError::Interrupted))?;
        let mut text = String::from("kept,loss\n");
        for (mask, loss) in &measured {
            let kept: Vec<String> = kept_by(mask).iter().map(ToString::to_string).collect();
            text += &format!("{},{loss}\n", kept.join(" "));
        }
        Ok(text)
    }

    /// What scores and losses depend on, besides the method.
    fn measured_by(&self, measured: &Measured<'_>) -> Result<String, RecipeError> {
        let Measured {
            parent,
            granularity,
            scored,
        } = *measured;
        let batches = (scored.batches, scored.batch, scored.timesteps);
        self.measured_on((parent, granularity), batches)
    }

    /// What is measured of a model depends on, for batches of the recipe's data.
    pub(super) fn measured_on(
        &self,
        (parent, granularity): (&Checkpoint, Granularity),
        batches: impl Serialize,
    ) -> Result<String, RecipeError> {
        super::directory::json(&(
            (parent.fingerprint()?, granularity),
            // The same weights may be read with other heads.
            (&parent.architecture, parent.trained_by()),
            &self.recipe.data,
            batches,
            (self.recipe.seed, self.recipe.compute),
            <B::InnerBackend as Backend>::name(self.device),
        ))
    }

    /// The score of each layer, from the run's folder if it was measured before.
    pub(super) fn measured_scores(
        &self,
        stage: &str,
        method: Score,
        measured: &Measured<'_>,
    ) -> Result<Vec<f64>, RecipeError> {
        let Measured {
            parent,
            granularity,
            scored,
        } = *measured;
        let key = (self.measured_by(measured)?, method);
        let depth = parent.denoiser()?.layers(granularity);
        let read = |text: String| {
            let scores: Option<Vec<f64>> = text.lines().map(|line| line.parse().ok()).collect();
            scores.filter(|scores| scores.len() == depth)
        };
        let workers = &**self.workers;
        let scores =
            (self.directory.measured()).get((workers, self.stop), "scores", &key, read, || {
                let measuring = self.calibration(measured)?;
                let (network, process) = (&measuring.network, &measuring.process);
                let mut scores = vec![0.0; depth];
                let of_batch = |step| {
                    if self.stop.requested() {
                        return Err(RecipeError::Interrupted);
                    }
                    let batch = measuring.batch(step)?;
                    Ok(score(network, process, method, &batch).scores)
                };
                share_out(workers, scored.batches, of_batch, |_, measured| {
                    let sums = scores.iter_mut().zip(measured);
                    sums.for_each(|(sum, score)| *sum += score / scored.batches as f64);
                    Ok(())
                })?;
                Ok(scores.iter().map(|score| format!("{score}\n")).collect())
            })?;
        if let Some(layer) = scores.iter().position(|score| !score.is_finite()) {
            return Err(RecipeError::Stage {
                stage: stage.to_owned(),
                problem: format!(
                    "layer {layer} has the score {}: the model's weights are damaged, or overflow",
                    scores[layer]
                ),
            });
        }
        Ok(scores)
    }
}

impl<B: TrainingBackend> Measuring<'_, B> {
    /// The states between the layers of each of the network's trunks, `[batch, tokens, width]`, on
    /// the first batch.
    pub(super) fn trunk_states(
        &self,
        stage: &str,
    ) -> Result<Vec<Vec<Tensor<B::InnerBackend, 3>>>, RecipeError> {
        let seen = self.batch(0)?.noised(&self.process);
        let mut hook = TrunkStates::new(self.network.trunk());
        seen.run(&self.process, &self.network, &mut hook);
        // What is no number goes through to the last.
        let last = (hook.states.last())
            .and_then(|states| states.last())
            .map(|state| state.clone().sum().into_data());
        let sum = last.and_then(|sum| sum.iter::<f64>().next());
        match sum.is_some_and(f64::is_finite) {
            true => Ok(hook.states),
            false => Err(RecipeError::Stage {
                stage: stage.to_owned(),
                problem:
                    "hidden states are not finite: the model's weights are damaged, or overflow"
                        .into(),
            }),
        }
    }

    pub(super) fn batch(&self, step: usize) -> Result<ScoreBatch<B::InnerBackend>, RecipeError> {
        score_batch(&self.source, step, self.device)
    }
}

/// The batch of a step.
pub(super) fn score_batch<B: Backend>(
    source: &BatchSource,
    step: usize,
    device: &B::Device,
) -> Result<ScoreBatch<B>, RecipeError> {
    let batch = source
        .draw::<B>(step, device)
        .map_err(TrainingError::from)?;
    Ok(batch.into())
}

/// The layers and the loss of a line such as `0 1 3,0.25`.
fn mask_line(line: &str) -> Option<(Vec<usize>, f64)> {
    let (kept, loss) = line.split_once(',')?;
    let kept: Result<Vec<usize>, _> = kept.split(' ').map(str::parse).collect();
    Some((kept.ok()?, loss.parse().ok()?))
}
