//! Layers that are trained to do the work of several: one in the place of an interval, or two side
//! by side.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::analyse::draw_similarity;
use super::context::{Context, finished};
use super::directory::{json, write_text};
use super::measuring::Measuring;
use super::models::{MODEL, stage_folder};
use crate::analysis::similarity;
use crate::data::{Split, teacher};
use crate::models::{Network, Prunable};
use crate::ops::TrainingBackend;
use crate::pruning::{Interval, Regression, Replaced, intervals, left, pairs, plug, plugged};
use crate::recipe::RecipeError;
use crate::recipe::schema::Stage;
use crate::recipe::schema::source::Source;
use crate::training::Optimisation;
use crate::trunk::{Granularity, Tap};
use crate::weights::Checkpoint;

/// File of the replaced intervals, in the folder of the stage that trained them.
const INTERVALS: &str = "intervals.json";

/// What [`INTERVALS`] holds.
#[derive(Serialize, Deserialize)]
struct Trained {
    intervals: Vec<Replaced>,
}

/// A pruned network, and the layers of its parent that its layers begin at.
pub(super) type Left<B> = (Vec<usize>, Network<B>);

impl<B: TrainingBackend> Context<'_, B> {
    /// Finds intervals, and trains a layer in the place of each.
    pub(super) fn train_intervals(
        &self,
        stage: &Stage,
        (keep, optimisation, label_drop): (usize, &Optimisation, f64),
        parent: &Checkpoint,
        folder: &Path,
    ) -> Result<Left<B::InnerBackend>, RecipeError> {
        let seed = self.recipe.seed;
        // As much at once as a step has.
        let batch = optimisation.batch / optimisation.accumulate;
        let measuring = self.measuring(parent, Split::Train, seed, batch, None)?;
        let similarity = self.measured_similarity(stage, (parent, batch), &measuring)?;
        // The plan may have guessed how the layers are divided among trunks.
        if keep < similarity.len() {
            return Err(RecipeError::Stage {
                stage: stage.name.clone(),
                problem: format!(
                    "`keep` is {keep}, and of each of its {} trunks an interval is left",
                    similarity.len()
                ),
            });
        }
        let intervals = intervals(&similarity, keep);
        draw_similarity(similarity, folder)?;
        for Interval { first, last } in intervals.iter().filter(|interval| interval.saved() > 0) {
            crate::say!("{}: one layer for {first} to {last}", stage.name);
        }

        let whole = self.network(parent)?;
        let regression = Regression::of_intervals(whole, &intervals, measuring.process.clone());
        let ends = intervals.iter().map(|interval| interval.last).collect();
        let how = (optimisation, label_drop);
        let learns = (regression, ends);
        let (network, errors) = self.regress(stage, how, (parent, &measuring), learns, folder)?;
        note(folder, &intervals, errors)?;
        let kept = intervals.iter().map(|interval| interval.first).collect();
        Ok((kept, network))
    }

    /// Similarity of the states between layers of each trunk, from the run's folder if it was
    /// measured before: a training that is resumed has the intervals that it began with, though a
    /// GPU may give other last bits.
    fn measured_similarity(
        &self,
        stage: &Stage,
        (parent, batch): (&Checkpoint, usize),
        measuring: &Measuring<'_, B>,
    ) -> Result<Vec<Vec<Vec<f64>>>, RecipeError> {
        let key = self.measured_on((parent, Granularity::Block), batch)?;
        let places: Vec<usize> = (measuring.network.trunk().stacks())
            .map(|stack| stack.len() + 1)
            .collect();
        // The lines of one trunk after those of another.
        let read = |text: String| {
            let line = |line: &str| line.split(',').map(|value| value.parse().ok()).collect();
            let all: Option<Vec<Vec<f64>>> = text.lines().map(line).collect();
            let mut lines = all?.into_iter();
            let mut stack = |places: &usize| {
                let lines: Vec<Vec<f64>> = lines.by_ref().take(*places).collect();
                let whole = lines.len() == *places;
                let square = whole && lines.iter().all(|line| line.len() == *places);
                square.then_some(lines)
            };
            let stacks: Option<Vec<_>> = places.iter().map(&mut stack).collect();
            stacks.filter(|_| lines.next().is_none())
        };
        let workers = &**self.workers;
        (self.directory.measured()).get((workers, self.stop), "similarity", &key, read, || {
            let states = measuring.trunk_states(&stage.name)?;
            let line = |line: Vec<f64>| {
                let line: Vec<String> = line.iter().map(ToString::to_string).collect();
                line.join(",") + "\n"
            };
            let lines: Vec<Vec<f64>> = (states.iter())
                .flat_map(|states| similarity(states))
                .collect();
            if !lines.iter().flatten().all(|value| value.is_finite()) {
                return Err(RecipeError::Stage {
                    stage: stage.name.clone(),
                    problem: "the similarity of its hidden states is no number: the model's weights are damaged, or overflow".into(),
                });
            }
            Ok(lines.into_iter().map(line).collect())
        })
    }

    /// Puts neighbouring layers side by side on one input, and trains each pair to do what they did
    /// one after the other.
    pub(super) fn train_pairs(
        &self,
        stage: &Stage,
        (optimisation, label_drop): (&Optimisation, f64),
        parent: &Checkpoint,
        folder: &Path,
    ) -> Result<Left<B::InnerBackend>, RecipeError> {
        let (seed, batch) = (
            self.recipe.seed,
            optimisation.batch / optimisation.accumulate,
        );
        let measuring = self.measuring(parent, Split::Train, seed, batch, None)?;
        let paired = self.network(parent)?.in_pairs().ok_or_else(|| {
            RecipeError::Run("blocks that are not whole can't be put in pairs".into())
        })?;
        let pairs = pairs(&measuring.network.trunk());
        let trained = pairs.iter().map(|pair| pair.saved() > 0).collect();
        let ends = pairs.iter().map(|pair| pair.last).collect();
        let regression = Regression::new(paired, trained, measuring.process.clone());
        let how = (optimisation, label_drop);
        let learns = (regression, ends);
        let (network, errors) = self.regress(stage, how, (parent, &measuring), learns, folder)?;
        note(folder, &pairs, errors)?;
        Ok((pairs.iter().map(|pair| pair.first).collect(), network))
    }

    /// Trains layers on the parent's own hidden states; `ends` are the parent's layers whose output
    /// each is to give. Returns the network, and the error of each of its layers.
    fn regress(
        &self,
        stage: &Stage,
        (optimisation, label_drop): (&Optimisation, f64),
        (parent, measuring): (&Checkpoint, &Measuring<'_, B>),
        (regression, ends): (Regression<B>, Vec<usize>),
        folder: &Path,
    ) -> Result<(Network<B::InnerBackend>, Vec<f64>), RecipeError> {
        let architecture = parent.denoiser()?;
        let process = measuring.process.clone();
        let sees = teacher(measuring.network.clone(), process.clone(), ends.clone());
        let training = self.training(stage, optimisation, folder, &[Some(parent)])?;
        let of = (architecture, parent.trained_by());
        let source = self.source(of, optimisation, label_drop, Vec::new())?;
        let fit = self.over(training, (source, process), Some(sees));
        let fitted = finished(
            fit.curves(vec!["error"]).run(regression)?,
            optimisation.steps,
        )?;

        // Part of a batch, with noise that training has not seen.
        let seen = measuring
            .batch(optimisation.steps)?
            .noised(&measuring.process);
        let mut errors = vec![0.0; ends.len()];
        let mut tap = Tap::new(ends);
        seen.run(&measuring.process, &measuring.network, &mut tap);
        let found = fitted.ema.errors(&seen, &tap.outputs);
        for (layer, error) in fitted.ema.trained().into_iter().zip(found) {
            let mean = error.mean().into_data().iter::<f64>().next();
            errors[layer] = mean.unwrap_or(f64::NAN);
            if !errors[layer].is_finite() {
                return Err(RecipeError::Stage {
                    stage: stage.name.clone(),
                    problem: format!("the error of layer {layer} is {}", errors[layer]),
                });
            }
        }
        Ok((fitted.ema.network, errors))
    }

    /// Takes what an earlier stage trained, for as many layers as are asked for.
    pub(super) fn plug_intervals(
        &self,
        stage: &str,
        (keep, trained): (usize, &Source),
        parent: &Checkpoint,
    ) -> Result<Left<B::InnerBackend>, RecipeError> {
        let wrong = |problem: String| RecipeError::Stage {
            stage: stage.to_owned(),
            problem,
        };
        let Source::Stage(name) = trained else {
            return Err(wrong(format!("`{trained}` is no stage")));
        };
        let folder = stage_folder(self.recipe, self.directory, name)?;
        let path = folder.join(INTERVALS);
        let text = std::fs::read_to_string(&path).map_err(RecipeError::io(&path))?;
        let Trained {
            intervals: replaced,
        } = serde_json::from_str(&text)
            .map_err(|error| wrong(format!("{}: {error}", path.display())))?;
        let replacements = Checkpoint::read(&folder.join(MODEL))?;
        if replacements.provenance.parent != Some(parent.fingerprint()?) {
            return Err(wrong(format!(
                "`{name}` trained layers of another model than `from`"
            )));
        }
        let choice = plugged(&replaced, keep).ok_or_else(|| {
            wrong(format!(
                "no choice of the intervals of `{name}` leaves {keep} layers; they are {}",
                listed(&replaced)
            ))
        })?;
        let layers = left(&replaced, &choice);
        let whole = parent.network::<B::InnerBackend>(self.device)?;
        let network = plug(whole, &replacements.network(self.device)?, &layers)?;
        Ok((
            layers.into_iter().map(|(layer, _)| layer).collect(),
            network,
        ))
    }
}

/// Writes what each layer stands for, and its error.
fn note(folder: &Path, intervals: &[Interval], errors: Vec<f64>) -> Result<(), RecipeError> {
    let replaced = intervals.iter().zip(errors);
    let text = json(&Trained {
        intervals: replaced
            .map(|(&interval, error)| Replaced { interval, error })
            .collect(),
    })?;
    write_text(&folder.join(INTERVALS), &text)
}

/// Intervals of more than one layer, for a message.
fn listed(replaced: &[Replaced]) -> String {
    let long = replaced
        .iter()
        .filter(|replaced| replaced.interval.saved() > 0);
    let named: Vec<String> = long
        .map(|Replaced { interval, .. }| format!("{} to {}", interval.first, interval.last))
        .collect();
    named.join(", ")
}
