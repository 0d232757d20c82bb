//! The stage that removes layers.

use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::context::{Context, finished};
use super::measuring::Measuring;
use super::models::MODEL;
use crate::data::Split;
use crate::models::Prunable;
use crate::ops::TrainingBackend;
use crate::process::Process;
use crate::pruning::{
    Annealing, Decision, Evolution, Group, Groups, LearnedPruner, Mask, Pick, Score, Update,
    evolve, keep_by_scores, kept_by, mask_losses, random_masks, score,
};
use crate::random::{Stream, permutation};
use crate::recipe::RecipeError;
use crate::recipe::plan::{PrunePlan, Search, Selection};
use crate::recipe::schema::Stage;
use crate::recipe::schema::prune::{Learned, Scored};
use crate::report::{self, DecisionGroup, DecisionHistory, Progress, decision_svg};
use crate::state::names;
use crate::training::{JsonLines, OnStep, ParameterGroup, TrainingError};
use crate::weights::Checkpoint;

impl<B: TrainingBackend> Context<'_, B> {
    pub(crate) fn prune(
        &self,
        stage: &Stage,
        plan: &PrunePlan,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let parent = self.load(&plan.from)?;
        let depth = parent.denoiser()?.depth();
        let (kept, groups, learned) = match &plan.choice {
            Selection::Learned { learned, groups } => {
                let decision = self.learn(stage, (plan, learned, groups), &parent, folder)?;
                (decision.kept, Some(groups), Some(&learned.optimisation))
            }
            Selection::Scored { score, scored } => {
                let kept = self.score(&stage.name, *score, scored, &parent, folder)?;
                (kept, None, None)
            }
            Selection::Searched { search, scored } => {
                let kept = self.search(&stage.name, *search, scored, &parent, folder)?;
                (kept, None, None)
            }
            Selection::Random { keep, draw } => {
                let mut kept = permutation(self.recipe.seed, Stream::Layers, *draw, depth);
                kept.truncate(*keep);
                kept.sort_unstable();
                (kept, None, None)
            }
            Selection::Fixed { kept, groups } => (kept.clone(), groups.as_ref(), None),
        };
        let pruned = parent.network::<B::InnerBackend>(self.device)?.keep(&kept);
        let mut provenance = self.provenance(&stage.name, plan.method, learned, Some(&parent))?;
        provenance.groups = groups.map(|groups| {
            let pair = |group: Group| [group.keep(), group.of()];
            groups.iter().map(pair).collect()
        });
        provenance.parent_depth = Some(depth);
        if learned.is_some() {
            provenance.note = "the kept layers have their original weights; what was learned beside the choice is thrown away".into();
        }
        crate::say!(
            "{}: keeps layers {kept:?} of {depth}, with their original weights",
            stage.name
        );
        provenance.kept = Some(kept);
        let pruned = Checkpoint::of(&pruned, provenance, &folder.join(MODEL));
        // Where layers were only taken out, nobody has asked how the model was trained: what isn't
        // known stays so.
        let process = match plan.choice.runs_the_model() {
            true => Some(parent.trained_by()),
            false => parent.process,
        };
        Ok(pruned.of_process(process).write()?)
    }

    /// Learns which layers to keep.
    fn learn(
        &self,
        stage: &Stage,
        (plan, learned, groups): (&PrunePlan, &Learned, &Groups),
        parent: &Checkpoint,
        folder: &Path,
    ) -> Result<Decision, RecipeError> {
        let architecture = parent.denoiser()?;
        let optimisation = &learned.optimisation;
        let annealing = Annealing {
            tau: learned.tau.into(),
            scaling: learned.scaling.into(),
            steps: optimisation.steps,
        };
        let process = parent.trained_by().process();
        let pruner = LearnedPruner::new(
            self.network(parent)?,
            groups.clone(),
            learned.update,
            learned.gate_init,
            annealing,
            process.clone(),
            self.recipe.seed,
        )
        .map_err(|error| RecipeError::Stage {
            stage: stage.name.clone(),
            problem: error.to_string(),
        })?;
        let gates = names::<B, _>(&pruner)
            .into_iter()
            .filter(|parameter| parameter.name.starts_with("gumbel_gates."))
            .map(|parameter| parameter.id)
            .collect();
        let group = ParameterGroup {
            parameters: gates,
            lr_factor: learned.gate_lr / optimisation.lr,
        };
        let logits = groups.iter().map(|group| group.num_logits()).collect();
        let source = self.source(
            architecture.shape(),
            process.times(),
            optimisation,
            learned.label_drop,
            logits,
        )?;
        let mut training = self.training(stage, optimisation, folder, &[Some(parent)])?;
        // A low-rank update, or gates alone, are no model.
        if learned.update == Update::Full {
            let mut provenance =
                self.provenance(&stage.name, plan.method, Some(optimisation), Some(parent))?;
            provenance.note = "all layers, as a pruning that is under way has changed them".into();
            training.describe(architecture.clone(), Some(parent.trained_by()), provenance);
        }
        let (every, steps) = (optimisation.log_every, optimisation.steps);
        let log_path = folder.join("decisions.jsonl");
        let observe_path = log_path.clone();
        let gates = training.about.gates.clone();
        let observed = groups.clone();
        let observe = move |start: usize| -> Result<OnStep<B, LearnedPruner<B>>, TrainingError> {
            let mut log = JsonLines::open(&observe_path, start)?;
            Ok(Box::new(move |step, model: &LearnedPruner<B>, ema| {
                if step % every != 0 && step + 1 != steps {
                    return Ok(());
                }
                use burn::module::AutodiffModule;
                let averaged = ema.apply(model.valid());
                let (tau, scaling) = averaged.annealed(step);
                let decision = averaged.decision(step);
                *gates.lock() = decision.layer_probabilities(&observed);
                log.write(&DecisionLine {
                    step,
                    tau,
                    scaling,
                    decision,
                })
            }))
        };
        let curves = [process.names().0, &["tau", "confidence"]].concat();
        let fit = self
            .over(training, (source, process), None)
            .groups(vec![group])
            .curves(curves)
            .observe(Box::new(observe));
        let fitted = finished(fit.run(pruner)?, steps)?;
        draw_decisions(&log_path, groups, &folder.join("decisions.svg"))?;
        let decision = fitted.ema.decision(steps.saturating_sub(1));
        for (group, choice) in decision.choices.iter().enumerate() {
            crate::say!(
                "{}: group {group} keeps {:?} with probability {:.2}",
                stage.name,
                choice.layers,
                choice.confidence
            );
        }
        Ok(decision)
    }

    /// What layers or masks are measured with.
    fn calibration(
        &self,
        scored: &Scored,
        parent: &Checkpoint,
    ) -> Result<Measuring<'_, B>, RecipeError> {
        let timesteps = Some(scored.timesteps);
        self.measuring(
            parent,
            Split::Train,
            self.recipe.seed,
            scored.batch,
            timesteps,
        )
    }

    /// Measures masks, writes what each loses to `masks.csv`, and returns the layers of the one
    /// that is taken.
    fn search(
        &self,
        stage: &str,
        search: Search,
        scored: &Scored,
        parent: &Checkpoint,
        folder: &Path,
    ) -> Result<Vec<usize>, RecipeError> {
        let (what, key, pick) = match search {
            Search::Random { masks, pick } => ("random", [masks, 0], pick),
            Search::Evolution(Evolution { masks, population }) => {
                ("evolution", [masks, population], Pick::Lowest)
            }
        };
        let key = (self.measured_by(scored, parent)?, scored.keep, what, key);
        let read = |text: String| {
            let lines: Option<Vec<_>> = text.lines().skip(1).map(mask_line).collect();
            lines.map(|lines| (text, lines))
        };
        let measure = || self.mask_losses(stage, search, scored, parent);
        let (text, measured) = self.directory.measured("masks", &key, read, measure)?;
        let path = folder.join("masks.csv");
        crate::files::write_atomic(&path, |file| {
            std::io::Write::write_all(file, text.as_bytes())
        })
        .map_err(RecipeError::io(&path))?;
        let wrong = |problem: String| RecipeError::Stage {
            stage: stage.to_owned(),
            problem,
        };
        let losses: Vec<f64> = measured.iter().map(|(_, loss)| *loss).collect();
        if let Some((kept, loss)) = measured.iter().find(|(_, loss)| !loss.is_finite()) {
            return Err(wrong(format!(
                "layers {kept:?} have the loss {loss}: the model's weights are damaged, or overflow"
            )));
        }
        let taken = pick.of(&losses);
        let (kept, loss) = taken
            .map(|taken| &measured[taken])
            .ok_or_else(|| wrong("no mask was measured".into()))?;
        crate::say!(
            "{stage}: loss {loss:.4} of {} masks, in {}",
            report::thousands(measured.len()),
            path.display()
        );
        Ok(kept.clone())
    }

    /// Measures masks; a line each, as `mask_line` reads it.
    fn mask_losses(
        &self,
        stage: &str,
        search: Search,
        scored: &Scored,
        parent: &Checkpoint,
    ) -> Result<String, RecipeError> {
        let measuring = self.calibration(scored, parent)?;
        let (network, process) = (&measuring.network, &measuring.process);
        let (depth, seed) = (network.trunk().depth, self.recipe.seed);
        let all = match search {
            Search::Random { masks, .. } => masks,
            Search::Evolution(evolution) => evolution.masks,
        };
        let mut bar = Progress::new(stage, "masks", all * scored.batches);
        // Why the measuring ended early, if nobody stopped it.
        let mut failed = None;
        let mut measure = |masks: &[Mask]| -> Option<Vec<f64>> {
            let mut sums = vec![0.0; masks.len()];
            for step in 0..scored.batches {
                let batch = match measuring.batch(step) {
                    Ok(batch) => batch,
                    Err(error) => {
                        failed = Some(error);
                        return None;
                    }
                };
                let losses =
                    mask_losses(network, process, &batch, masks, self.stop, |_| bar.add(1))?;
                sums.iter_mut()
                    .zip(losses)
                    .for_each(|(sum, loss)| *sum += loss / scored.batches as f64);
            }
            Some(sums)
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
    fn measured_by(&self, scored: &Scored, parent: &Checkpoint) -> Result<String, RecipeError> {
        super::directory::json(&(
            parent.fingerprint()?,
            // The same weights may be read with other heads.
            (&parent.architecture, parent.trained_by()),
            &self.recipe.data,
            (scored.batches, scored.batch, scored.timesteps),
            (self.recipe.seed, self.recipe.compute),
            <B::InnerBackend as Backend>::name(self.device),
        ))
    }

    fn score(
        &self,
        stage: &str,
        method: Score,
        scored: &Scored,
        parent: &Checkpoint,
        folder: &Path,
    ) -> Result<Vec<usize>, RecipeError> {
        let key = (self.measured_by(scored, parent)?, method);
        let depth = parent.denoiser()?.depth();
        let read = |text: String| {
            let scores: Option<Vec<f64>> = text.lines().map(|line| line.parse().ok()).collect();
            scores.filter(|scores| scores.len() == depth)
        };
        let scores = self.directory.measured("scores", &key, read, || {
            let measuring = self.calibration(scored, parent)?;
            let (network, process) = (&measuring.network, &measuring.process);
            let mut scores = vec![0.0; depth];
            for step in 0..scored.batches {
                if self.stop.requested() {
                    return Err(RecipeError::Interrupted);
                }
                let batch = measuring.batch(step)?;
                let measured = score(network, process, method, &batch).scores;
                scores
                    .iter_mut()
                    .zip(measured)
                    .for_each(|(sum, score)| *sum += score / scored.batches as f64);
            }
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
        let kept = keep_by_scores(method, &scores, scored.keep);
        let path = folder.join("scores.json");
        let text = super::directory::json(
            &serde_json::json!({ "method": method, "scores": scores, "kept": kept }),
        )?;
        crate::files::write_atomic(&path, |file| {
            std::io::Write::write_all(file, text.as_bytes())
        })
        .map_err(RecipeError::io(&path))?;
        Ok(kept)
    }
}

/// The layers and the loss of a line such as `0 1 3,0.25`.
fn mask_line(line: &str) -> Option<(Vec<usize>, f64)> {
    let (kept, loss) = line.split_once(',')?;
    let kept: Result<Vec<usize>, _> = kept.split(' ').map(str::parse).collect();
    Some((kept.ok()?, loss.parse().ok()?))
}

/// One line of `decisions.jsonl`.
#[derive(Serialize, Deserialize)]
struct DecisionLine {
    step: usize,
    tau: f64,
    scaling: f64,
    #[serde(flatten)]
    decision: Decision,
}

fn draw_decisions(log: &PathBuf, groups: &Groups, picture: &Path) -> Result<(), RecipeError> {
    let text = std::fs::read_to_string(log).map_err(RecipeError::io(log))?;
    let lines: Vec<DecisionLine> = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let history = DecisionHistory {
        depth: groups.depth(),
        groups: groups
            .iter()
            .map(|group| DecisionGroup {
                keep: group.keep(),
                of: group.of(),
            })
            .collect(),
        steps: lines.iter().map(|line| line.step).collect(),
        choices: lines
            .iter()
            .map(|line| {
                line.decision
                    .choices
                    .iter()
                    .map(|choice| report::KeptLayers {
                        kept: choice.layers.clone(),
                        probability: choice.confidence,
                    })
                    .collect()
            })
            .collect(),
    };
    Ok(decision_svg(picture, &history)?)
}
