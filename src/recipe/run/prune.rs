//! The stage that removes layers.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::context::{Context, finished};
use super::directory::{json, write_text};
use super::measuring::Measured;
use super::models::MODEL;
use crate::backend::Compute;
use crate::models::{Network, Prunable};
use crate::ops::{FusedOps, TrainingBackend};
use crate::process::Process;
use crate::pruning::{
    Annealing, Decision, Group, Groups, LearnedPruner, Pick, Score, Start, Update, averaged,
    keep_by_scores,
};
use crate::random::{Stream, permutation};
use crate::recipe::RecipeError;
use crate::recipe::plan::{PrunePlan, Search, Selection};
use crate::recipe::schema::Stage;
use crate::recipe::schema::intervals::{Intervals, Replacements};
use crate::recipe::schema::learned::Learned;
use crate::report::{self, DecisionGroup, DecisionHistory, decision_svg};
use crate::state::names;
use crate::training::{JsonLines, OnStep, ParameterGroup, TrainingError};
use crate::trunk::Granularity;
use crate::weights::Checkpoint;

impl<B: TrainingBackend> Context<'_, B> {
    pub(crate) fn prune(
        &self,
        stage: &Stage,
        plan: &PrunePlan,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let parent = self.load(&plan.from)?;
        let granularity = plan.granularity;
        let depth = parent.denoiser()?.layers(granularity);
        let measured = |scored| Measured {
            parent: &parent,
            granularity,
            scored,
        };
        let (mut trained, mut replaced) = (None, None);
        let (kept, groups, learned) = match &plan.choice {
            Selection::Learned { learned, groups } => {
                let (decision, network) =
                    self.learn(stage, (plan, learned, groups), &parent, folder)?;
                trained = (plan.start == Start::Update).then_some(network);
                (decision.kept, Some(groups), Some(&learned.optimisation))
            }
            Selection::Scored { score, scored } => {
                let kept = self.score(&stage.name, *score, &measured(scored), folder)?;
                (kept, None, None)
            }
            Selection::Searched { search, scored } => {
                let kept = self.search(&stage.name, *search, &measured(scored), folder)?;
                (kept, None, None)
            }
            Selection::Intervals(Intervals { keep, replacements }) => {
                let (left, learned) = match replacements {
                    Replacements::Train {
                        optimisation,
                        label_drop,
                    } => {
                        let how = (*keep, optimisation, *label_drop);
                        let left = self.train_intervals(stage, how, &parent, folder)?;
                        (left, Some(optimisation))
                    }
                    Replacements::Trained { trained } => {
                        let left = self.plug_intervals(&stage.name, (*keep, trained), &parent)?;
                        (left, None)
                    }
                };
                let (kept, network) = left;
                replaced = Some(network);
                (kept, None, learned)
            }
            Selection::Parallel {
                optimisation,
                label_drop,
            } => {
                let how = (optimisation, *label_drop);
                let (firsts, network) = self.train_pairs(stage, how, &parent, folder)?;
                replaced = Some(network);
                (firsts, None, Some(optimisation))
            }
            Selection::Random { keep, draw } => {
                let mut kept = permutation(self.recipe.seed, Stream::Layers, *draw, depth);
                kept.truncate(*keep);
                kept.sort_unstable();
                (kept, None, None)
            }
            Selection::Fixed { kept, groups } => {
                // The plan may have guessed how its layers are divided among trunks.
                let trunk = parent.architecture.trunk(granularity);
                if let (Some(groups), Some(trunk)) = (groups, trunk) {
                    groups.fit(&trunk).map_err(|error| RecipeError::Stage {
                        stage: stage.name.clone(),
                        problem: error.to_string(),
                    })?;
                }
                (kept.clone(), groups.as_ref(), None)
            }
        };
        let joined = replaced.is_some();
        let whole = || in_layers(parent.network(self.device)?, granularity);
        let pruned = match (replaced, trained, plan.start) {
            (Some(replaced), ..) => replaced,
            (_, Some(trained), Start::Update) => trained.keep(&kept),
            (_, _, Start::Average) => averaged(whole()?, &kept)
                .map_err(|problem| RecipeError::Stage {
                    stage: stage.name.clone(),
                    problem,
                })?
                .keep(&kept),
            _ => whole()?.keep(&kept),
        };
        let mut provenance = self.provenance(&stage.name, plan.method, learned, Some(&parent))?;
        provenance.groups = groups.map(|groups| {
            let pair = |group: Group| [group.keep(), group.of()];
            groups.iter().map(pair).collect()
        });
        provenance.parent_depth = Some(depth);
        provenance.granularity = granularity;
        provenance.note = match (plan.start, learned) {
            _ if matches!(plan.choice, Selection::Parallel { .. }) => "no layer was taken out: every two run side by side on one input, trained on the hidden states of the parent",
            _ if joined => "layers that stand for several were trained to do their work, on the hidden states of the parent",
            (Start::Original, Some(_)) => "the kept layers have their original weights; what was learned beside the choice is thrown away",
            (Start::Original, None) => "",
            (Start::Update, _) => "the kept layers have the weights that were trained along with the masks",
            (Start::Average, _) => "each kept layer has the mean weights of itself and the removed layers that follow it",
        }
        .into();
        let weights = match plan.start {
            _ if joined => "weights trained in the place of removed ones",
            Start::Original => "their original weights",
            Start::Update => "the weights trained along with the masks",
            Start::Average => "mean weights",
        };
        match plan.choice {
            Selection::Parallel { .. } => {
                crate::say!(
                    "{}: {depth} layers in {} pairs",
                    stage.name,
                    depth - kept.len()
                );
            }
            _ => crate::say!(
                "{}: keeps {} {kept:?} of {depth}, with {weights}",
                stage.name,
                granularity.layers()
            ),
        }
        provenance.chose = learned.is_some() && !joined && plan.start != Start::Update;
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

    /// Learns which layers to keep; returns the network too, with what was trained along.
    fn learn(
        &self,
        stage: &Stage,
        (plan, learned, groups): (&PrunePlan, &Learned, &Groups),
        parent: &Checkpoint,
        folder: &Path,
    ) -> Result<(Decision, Network<B::InnerBackend>), RecipeError> {
        let architecture = parent.denoiser()?;
        let optimisation = &learned.optimisation;
        let annealing = Annealing {
            tau: learned.tau.into(),
            scaling: learned.scaling.into(),
            steps: optimisation.steps,
        };
        let process = parent.trained_by().process();
        let pruner = LearnedPruner::new(
            in_layers(self.network(parent)?, plan.granularity)?,
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
            (architecture, parent.trained_by()),
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
            let before = log.last_step()?;
            Ok(Box::new(move |step, model: &LearnedPruner<B>, ema| {
                if step % every != 0 && step + 1 != steps {
                    return Ok(());
                }
                use burn::module::AutodiffModule;
                let averaged = ema.apply(model.valid());
                let (tau, scaling) = averaged.annealed(step);
                let decision = averaged.decision(step);
                *gates.lock() = decision.layer_probabilities(&observed);
                if before == Some(step) {
                    return Ok(());
                }
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
        let drawn = (groups, plan.granularity);
        draw_decisions(&log_path, drawn, &folder.join("decisions.svg"))?;
        let decision = fitted.ema.decision(steps.saturating_sub(1));
        for (group, choice) in decision.choices.iter().enumerate() {
            crate::say!(
                "{}: group {group} keeps {:?} with probability {:.2}",
                stage.name,
                choice.layers,
                choice.confidence
            );
        }
        let mut network = fitted.ema.network.computing(Compute::F32);
        for linear in network.linears_mut() {
            linear.merge_lora();
        }
        Ok((decision, network))
    }

    /// Writes what each measured mask loses to `masks.csv`, and returns the layers of the one that
    /// is taken.
    fn search(
        &self,
        stage: &str,
        search: Search,
        measured: &Measured<'_>,
        folder: &Path,
    ) -> Result<Vec<usize>, RecipeError> {
        let pick = match search {
            Search::Random { pick, .. } => pick,
            Search::Evolution(_) => Pick::Lowest,
        };
        let measured = self.measured_masks(stage, search, measured)?;
        let path = folder.join("masks.csv");
        write_text(&path, &measured.text)?;
        let taken = pick.of(&measured.losses());
        let (kept, loss) =
            taken
                .map(|taken| &measured.masks[taken])
                .ok_or_else(|| RecipeError::Stage {
                    stage: stage.to_owned(),
                    problem: "no mask was measured".into(),
                })?;
        crate::say!(
            "{stage}: loss {loss:.4} of {} masks, in {}",
            report::thousands(measured.masks.len()),
            path.display()
        );
        Ok(kept.clone())
    }

    /// Writes the layers' scores to `scores.json`, and returns the layers that are kept by them.
    fn score(
        &self,
        stage: &str,
        method: Score,
        measured: &Measured<'_>,
        folder: &Path,
    ) -> Result<Vec<usize>, RecipeError> {
        let scores = self.measured_scores(stage, method, measured)?;
        let kept = keep_by_scores(method, &scores, measured.scored.keep);
        let path = folder.join("scores.json");
        let text = json(&serde_json::json!({ "method": method, "scores": scores, "kept": kept }))?;
        write_text(&path, &text)?;
        Ok(kept)
    }
}

/// A network with blocks, or their branches, for layers.
pub(super) fn in_layers<B: FusedOps>(
    network: Network<B>,
    granularity: Granularity,
) -> Result<Network<B>, RecipeError> {
    match granularity {
        Granularity::Block => Ok(network),
        Granularity::Branch => network
            .by_branch()
            .ok_or_else(|| RecipeError::Run("its blocks have no branches".into())),
    }
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

fn draw_decisions(
    log: &Path,
    (groups, granularity): (&Groups, Granularity),
    picture: &Path,
) -> Result<(), RecipeError> {
    let text = std::fs::read_to_string(log).map_err(RecipeError::io(log))?;
    let lines: Vec<DecisionLine> = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let history = DecisionHistory {
        names: [granularity.layer(), granularity.layers()],
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
