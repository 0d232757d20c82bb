//! Layers that are trained to do the work of several: one in the place of an interval, or two side
//! by side.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::context::{Context, finished};
use super::models::{MODEL, stage_folder};
use crate::analysis::{TrunkStates, similarity};
use crate::data::{Split, teacher};
use crate::models::{Network, Prunable};
use crate::ops::TrainingBackend;
use crate::process::Process as _;
use crate::pruning::{Interval, Regression, Replaced, intervals, left, plug, plugged};
use crate::recipe::RecipeError;
use crate::recipe::schema::Stage;
use crate::recipe::schema::source::Source;
use crate::report::Heatmap;
use crate::training::Optimisation;
use crate::trunk::Tap;
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
        let measuring = self.measuring(parent, Split::Train, seed, optimisation.batch, None)?;
        let seen = measuring.batch(0)?.noised(&measuring.process);
        let mut states = TrunkStates::default();
        seen.run(&measuring.process, &measuring.network, &mut states);
        let alike = similarity(&states.states);
        let intervals = intervals(&alike, keep);
        let map = Heatmap {
            title: "Similarity of the states between layers (linear CKA)".into(),
            label: "before layer".into(),
            values: alike,
        };
        map.write(&folder.join("similarity.svg"))?;
        for Interval { first, last } in intervals.iter().filter(|interval| interval.saved() > 0) {
            crate::say!("{}: one layer for {first} to {last}", stage.name);
        }

        let process = parent.trained_by().process();
        let whole = self.network(parent)?;
        let regression = Regression::of_intervals(whole, &intervals, process);
        let ends = intervals.iter().map(|interval| interval.last).collect();
        let how = (optimisation, label_drop);
        let (network, errors) = self.regress(stage, how, parent, (regression, ends), folder)?;
        let replaced = intervals.iter().zip(errors);
        let text = super::directory::json(&Trained {
            intervals: replaced
                .map(|(&interval, error)| Replaced { interval, error })
                .collect(),
        })?;
        write(folder, &text)?;
        let kept = intervals.iter().map(|interval| interval.first).collect();
        Ok((kept, network))
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
        let depth = parent.denoiser()?.depth();
        let process = parent.trained_by().process();
        let paired = self.network(parent)?.in_pairs().ok_or_else(|| {
            RecipeError::Run("blocks that are not whole can't be put in pairs".into())
        })?;
        let firsts: Vec<usize> = (0..depth).step_by(2).collect();
        let last = |first: &usize| (first + 1).min(depth - 1);
        let trained = firsts.iter().map(|first| last(first) > *first).collect();
        let ends: Vec<usize> = firsts.iter().map(last).collect();
        let regression = Regression::new(paired, trained, process);
        let how = (optimisation, label_drop);
        let (network, errors) =
            self.regress(stage, how, parent, (regression, ends.clone()), folder)?;
        let pairs = firsts.iter().zip(ends).zip(errors);
        let text = super::directory::json(&Trained {
            intervals: pairs
                .map(|((&first, last), error)| Replaced {
                    interval: Interval { first, last },
                    error,
                })
                .collect(),
        })?;
        write(folder, &text)?;
        Ok((firsts, network))
    }

    /// Trains layers on the parent's own hidden states; `ends` are the parent's layers whose output
    /// each is to give. Returns the network, and the error of each of its layers.
    fn regress(
        &self,
        stage: &Stage,
        (optimisation, label_drop): (&Optimisation, f64),
        parent: &Checkpoint,
        (regression, ends): (Regression<B>, Vec<usize>),
        folder: &Path,
    ) -> Result<(Network<B::InnerBackend>, Vec<f64>), RecipeError> {
        let architecture = parent.denoiser()?;
        let process = parent.trained_by().process();
        let whole = parent.network::<B::InnerBackend>(self.device)?;
        let sees = teacher(
            whole.computing(self.recipe.compute),
            process.clone(),
            ends.clone(),
        );
        let training = self.training(stage, optimisation, folder, &[Some(parent)])?;
        let (shape, times) = (architecture.shape(), process.times());
        let source = self.source(shape, times, optimisation, label_drop, Vec::new())?;
        let fit = self.over(training, (source, process.clone()), Some(sees));
        let fitted = finished(
            fit.curves(vec!["error"]).run(regression)?,
            optimisation.steps,
        )?;

        let seed = self.recipe.seed;
        let measuring = self.measuring(parent, Split::Train, seed, optimisation.batch, None)?;
        let seen = measuring.batch(0)?.noised(&measuring.process);
        let mut errors = vec![0.0; ends.len()];
        let mut tap = Tap::new(ends);
        seen.run(&measuring.process, &measuring.network, &mut tap);
        let found = fitted.ema.errors(&seen, &tap.outputs);
        for (layer, error) in fitted.ema.trained().into_iter().zip(found) {
            let mean = error.mean().into_data().iter::<f64>().next();
            errors[layer] = mean.unwrap_or(f64::NAN);
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

fn write(folder: &Path, text: &str) -> Result<(), RecipeError> {
    let path = folder.join(INTERVALS);
    crate::files::write_atomic(&path, |file| {
        std::io::Write::write_all(file, text.as_bytes())
    })
    .map_err(RecipeError::io(&path))
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
