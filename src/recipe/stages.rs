//! Stages that make a model: train, prune, recover.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{Tensor, TensorData};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::RecipeError;
use super::directory::RunDirectory;
use super::models::{MODEL, checkpoint};
use super::optimisation::Optimisation;
use super::plan::{PlannedStage, check_taps, prune_method, recover_method};
use super::prune::{Learned, Prune, PruneMethod, Scored};
use super::recover::{Recover, RecoverMethod, Representation};
use super::schema::{Recipe, Stage};
use super::train::Train;
use crate::data::{BatchPlan, BatchSource, Batches, Digits, Split, Teacher};
use crate::models::{Architecture, DigitsClassifier, DitConfig, Network, digits, initialise};
use crate::ops::TrainingBackend;
use crate::process::{Distillation, GaussianDiffusion, MaskedFeatures};
use crate::pruning::{
    self, Annealing, Decision, Groups, LearnedPruner, Score, ScoreBatch, keep_by_scores, oracle,
    score,
};
use crate::recovery::Student;
use crate::report::{self, DecisionGroup, DecisionHistory, decision_svg};
use crate::training::{
    ClassifierTrainee, Fit, Fitted, JsonLines, Observe, OnStep, ParameterGroup, Plan,
    TrainingError, fit,
};
use crate::weights::{Checkpoint, Provenance, assign, collect, names};

/// What every stage needs.
pub(super) struct Context<'a, B: AutodiffBackend> {
    pub(super) recipe: &'a Recipe,
    pub(super) directory: &'a RunDirectory,
    pub(super) device: &'a B::Device,
    pub(super) resume: bool,
    pub(super) plain: bool,
}

impl<B: TrainingBackend> Context<'_, B> {
    pub(super) fn load(&self, source: &super::source::Source) -> Result<Checkpoint, RecipeError> {
        checkpoint(self.recipe, self.directory, source)
    }

    pub(super) fn train(
        &self,
        stage: &Stage,
        planned: &PlannedStage,
        train: &Train,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let parent = train
            .from
            .as_ref()
            .map(|source| self.load(source))
            .transpose()?;
        let seed = self.recipe.seed;
        let plan = self.plan(stage, &train.optimisation, folder, &[parent.as_ref()])?;
        let provenance = self.provenance(
            &stage.name,
            "train",
            Some(&train.optimisation),
            parent.as_ref(),
        );
        let at = folder.join(MODEL);
        match planned.after.as_ref() {
            Some(Architecture::Dit(config)) => {
                let network = match &parent {
                    Some(parent) => parent.network::<B>(self.device)?,
                    None => {
                        let network = Network::<B>::zeros(config, self.device);
                        let mut state = collect::<B, _>(&network);
                        initialise(&mut state, seed);
                        assign(network, &state, &at, "a fresh network")?
                    }
                };
                let student = Student::new(
                    network,
                    None,
                    Arc::new(GaussianDiffusion::full()),
                    plan.steps,
                );
                let source = self.source(config, &train.optimisation, train.label_drop, Vec::new());
                let fitted = self.fit(
                    student,
                    plan,
                    Vec::new(),
                    source,
                    None,
                    vec!["mse", "vb"],
                    None,
                )?;
                Checkpoint::of(&fitted.ema.network, provenance, &at).write()?;
            }
            Some(architecture @ Architecture::DigitsClassifier(config)) => {
                let classifier = match &parent {
                    Some(parent) => parent.digits_classifier::<B>(self.device)?,
                    None => {
                        let classifier = DigitsClassifier::<B>::zeros(config, self.device);
                        let mut state = collect::<B, _>(&classifier);
                        initialise(&mut state, seed);
                        assign(classifier, &state, &at, "a fresh classifier")?
                    }
                };
                let shape = DitConfig {
                    input_size: digits::SIDE,
                    patch_size: 1,
                    channels: 1,
                    width: 0,
                    depth: 0,
                    heads: 1,
                    mlp_ratio: 1.0,
                    classes: digits::CLASSES,
                    learn_sigma: false,
                };
                let source = self.source(&shape, &train.optimisation, 0.0, Vec::new());
                let fitted = self.fit(
                    ClassifierTrainee { classifier },
                    plan,
                    Vec::new(),
                    source,
                    None,
                    vec!["accuracy"],
                    None,
                )?;
                let (model, mut provenance) = (fitted.ema.classifier, provenance);
                let accuracy =
                    super::evaluate::accuracy(&model, &Digits::new(Split::Test), self.device);
                provenance.note = format!(
                    "test accuracy {accuracy:.4} on {} images",
                    Digits::new(Split::Test).count()
                );
                crate::say!("{}: {}", stage.name, provenance.note);
                let state = collect::<B::InnerBackend, _>(&model);
                Checkpoint {
                    architecture: architecture.clone(),
                    state,
                    provenance,
                    path: at,
                }
                .write()?;
            }
            None => {}
        }
        Ok(())
    }

    pub(super) fn prune(
        &self,
        stage: &Stage,
        prune: &Prune,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let parent = self.load(&prune.from)?;
        let config = parent.dit()?.clone();
        let problem = |problem: String| RecipeError::Stage {
            stage: stage.name.clone(),
            problem,
        };
        let mut groups = None;
        let kept = match &prune.method {
            PruneMethod::Learned(learned) => {
                let resolved = learned
                    .groups
                    .resolve(config.depth)
                    .map_err(|error| problem(error.to_string()))?;
                let decision = self.learn(stage, learned, &parent, &config, &resolved, folder)?;
                groups = Some(resolved);
                decision.kept
            }
            PruneMethod::Oracle { .. } => oracle(config.depth)
                .ok_or_else(|| problem(format!("{} layers are no pairs", config.depth)))?,
            PruneMethod::ShortGpt(scored) => {
                self.score(Score::Shortgpt, scored, &parent, &config, folder)?
            }
            PruneMethod::FluxLite(scored) => {
                self.score(Score::FluxLite, scored, &parent, &config, folder)?
            }
            PruneMethod::Sensitivity(scored) => {
                self.score(Score::Sensitivity, scored, &parent, &config, folder)?
            }
            PruneMethod::Kept { kept } => {
                let mut kept = kept.clone();
                kept.sort_unstable();
                kept
            }
        };
        // The oracle keeps one layer of each pair, so its taps are those of 1:2 groups.
        if matches!(prune.method, PruneMethod::Oracle { .. }) {
            groups = Some(
                Groups::parse_ratio("1:2", config.depth)
                    .map_err(|error| problem(error.to_string()))?,
            );
        }
        let pruned = parent.network::<B::InnerBackend>(self.device)?.keep(&kept);
        let learned = match &prune.method {
            PruneMethod::Learned(learned) => Some(&learned.optimisation),
            _ => None,
        };
        let mut provenance = self.provenance(
            &stage.name,
            prune_method(&prune.method),
            learned,
            Some(&parent),
        );
        provenance.groups = groups.map(|groups| {
            groups
                .iter()
                .map(|group| [group.keep(), group.of()])
                .collect()
        });
        provenance.parent_depth = Some(config.depth);
        if learned.is_some() {
            provenance.note = "the kept layers have their original weights; what was learned beside the choice is thrown away".into();
        }
        crate::say!(
            "{}: keeps layers {kept:?} of {}, with their original weights",
            stage.name,
            config.depth
        );
        provenance.kept = Some(kept);
        Ok(Checkpoint::of(&pruned, provenance, &folder.join(MODEL)).write()?)
    }

    /// Learns which layers to keep.
    fn learn(
        &self,
        stage: &Stage,
        learned: &Learned,
        parent: &Checkpoint,
        config: &DitConfig,
        groups: &Groups,
        folder: &Path,
    ) -> Result<Decision, RecipeError> {
        let optimisation = &learned.optimisation;
        let annealing = Annealing {
            tau: learned.tau.into(),
            scaling: learned.scaling.into(),
            steps: optimisation.steps,
        };
        let diffusion = Arc::new(GaussianDiffusion::full());
        let pruner = LearnedPruner::new(
            parent.network::<B>(self.device)?,
            groups.clone(),
            learned.update,
            learned.gate_init,
            annealing,
            diffusion,
            self.recipe.seed,
        );
        let gates = names::<B, _>(&pruner)
            .into_iter()
            .filter(|parameter| parameter.name.starts_with("gumbel_gates."))
            .map(|parameter| parameter.id)
            .collect();
        let group = ParameterGroup {
            parameters: gates,
            lr_factor: learned.gate_lr / optimisation.lr,
        };
        let candidates = groups.iter().map(|group| group.num_candidates()).collect();
        let source = self.source(config, optimisation, learned.label_drop, candidates);
        let plan = self.plan(stage, optimisation, folder, &[Some(parent)])?;
        let (every, steps) = (plan.log_every, plan.steps);
        let log_path = folder.join("decisions.jsonl");
        let observe_path = log_path.clone();
        let observe = move |start: usize| -> Result<OnStep<B, LearnedPruner<B>>, TrainingError> {
            let mut log = JsonLines::open(&observe_path, start)?;
            Ok(Box::new(move |step, model: &LearnedPruner<B>, ema| {
                if step % every != 0 && step + 1 != steps {
                    return Ok(());
                }
                use burn::module::AutodiffModule;
                let averaged = ema.apply(model.valid());
                let (tau, scaling) = averaged.annealed(step);
                log.write(&DecisionLine {
                    step,
                    tau,
                    scaling,
                    decision: averaged.decision(step),
                })
            }))
        };
        let fitted = self.fit(
            pruner,
            plan,
            vec![group],
            source,
            None,
            vec!["mse", "vb", "tau", "confidence"],
            Some(Box::new(observe)),
        )?;
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

    fn score(
        &self,
        method: Score,
        scored: &Scored,
        parent: &Checkpoint,
        config: &DitConfig,
        folder: &Path,
    ) -> Result<Vec<usize>, RecipeError> {
        let network = parent.network::<B::InnerBackend>(self.device)?;
        // Feature scores read timesteps of a process respaced to 250 steps, not mapped back, as the reference does.
        let steps = if method == Score::Sensitivity {
            1000
        } else {
            250
        };
        let plan = BatchPlan {
            batch: scored.batch,
            seed: self.recipe.seed,
            channels: config.channels,
            size: config.input_size,
            classes: config.classes,
            label_drop: 0.0,
            diffusion_steps: steps,
            candidates: Vec::new(),
        };
        let source = BatchSource::new(plan, Arc::new(Digits::new(Split::Train)));
        let mut scores = vec![0.0; config.depth];
        for step in 0..scored.batches {
            if crate::interrupt::requested() {
                return Err(RecipeError::Interrupted);
            }
            let batch = source.draw::<B::InnerBackend>(step, self.device);
            let batch = ScoreBatch {
                x: batch.x,
                noise: batch.noise,
                y: batch.y,
                t: batch.t,
            };
            let measured = score(&network, method, &batch).scores;
            scores
                .iter_mut()
                .zip(measured)
                .for_each(|(sum, score)| *sum += score / scored.batches as f64);
        }
        let kept = keep_by_scores(method, &scores, scored.keep);
        let path = folder.join("scores.json");
        let text = super::directory::json(
            &serde_json::json!({ "method": method, "scores": scores, "kept": kept }),
        )?;
        crate::atomic::write_atomic(&path, |file| {
            std::io::Write::write_all(file, text.as_bytes())
        })
        .map_err(RecipeError::io(&path))?;
        Ok(kept)
    }

    pub(super) fn recover(
        &self,
        stage: &Stage,
        recover: &Recover,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let parent = self.load(&recover.from)?;
        let config = parent.dit()?.clone();
        let teacher_checkpoint = super::plan::teacher(recover)
            .map(|source| self.load(source))
            .transpose()?;
        let features = |representation: &Representation,
                        k: Option<f64>|
         -> Result<Option<MaskedFeatures>, RecipeError> {
            let depth = teacher_checkpoint
                .as_ref()
                .map_or(Ok(0), |teacher| teacher.dit().map(|config| config.depth))?;
            let taps = taps(representation, &parent, config.depth, depth).map_err(|problem| {
                RecipeError::Stage {
                    stage: stage.name.clone(),
                    problem,
                }
            })?;
            Ok(Some(MaskedFeatures {
                taps,
                k,
                beta: representation.beta.into(),
            }))
        };
        let distillation = match &recover.method {
            RecoverMethod::FineTune => None,
            RecoverMethod::Kd { distillation } => Some(Distillation {
                alpha: distillation.alpha,
                features: None,
            }),
            RecoverMethod::RepKd {
                distillation,
                representation,
            } => Some(Distillation {
                alpha: distillation.alpha,
                features: features(representation, None)?,
            }),
            RecoverMethod::MaskedKd {
                distillation,
                representation,
                k,
            } => Some(Distillation {
                alpha: distillation.alpha,
                features: features(representation, Some(*k))?,
            }),
        };
        let layers = distillation
            .iter()
            .flat_map(|distillation| &distillation.features)
            .flat_map(|features| features.taps.iter().map(|tap| tap.1))
            .collect();
        let teacher = match &teacher_checkpoint {
            Some(teacher) => Some((
                Arc::new(teacher.network::<B::InnerBackend>(self.device)?),
                layers,
            )),
            None => None,
        };
        let plan = self.plan(
            stage,
            &recover.optimisation,
            folder,
            &[Some(&parent), teacher_checkpoint.as_ref()],
        )?;
        let student = Student::new(
            parent.network::<B>(self.device)?,
            distillation,
            Arc::new(GaussianDiffusion::full()),
            plan.steps,
        );
        let source = self.source(
            &config,
            &recover.optimisation,
            recover.label_drop,
            Vec::new(),
        );
        let fitted = self.fit(
            student,
            plan,
            Vec::new(),
            source,
            teacher,
            vec!["mse", "vb", "kd", "vb kd", "features"],
            None,
        )?;
        let mut provenance = self.provenance(
            &stage.name,
            recover_method(&recover.method),
            Some(&recover.optimisation),
            Some(&parent),
        );
        // A healed model still is the one whose layers were kept.
        let Provenance {
            kept,
            parent_depth,
            groups,
            ..
        } = parent.provenance;
        provenance.teacher = teacher_checkpoint.as_ref().map(Checkpoint::fingerprint);
        (provenance.kept, provenance.parent_depth, provenance.groups) =
            (kept, parent_depth, groups);
        Ok(Checkpoint::of(&fitted.ema.network, provenance, &folder.join(MODEL)).write()?)
    }

    #[allow(clippy::too_many_arguments)] // The one place where all of a training's parts meet.
    fn fit<M>(
        &self,
        model: M,
        plan: Plan,
        groups: Vec<ParameterGroup>,
        source: BatchSource,
        teacher: Option<Teacher<B>>,
        curves: Vec<&'static str>,
        observe: Option<Observe<B, M>>,
    ) -> Result<Fitted<B, M>, RecipeError>
    where
        M: burn::train::TrainStep<
                Input = crate::data::Batch<B>,
                Output = crate::training::StepReport,
            > + burn::module::AutodiffModule<B>
            + std::fmt::Display
            + 'static,
        M::InnerModule: burn::train::InferenceStep<Input = (), Output = ()>,
    {
        let (steps, device) = (plan.steps, self.device.clone());
        let batches = move |start: usize| -> Arc<
            dyn burn::data::dataloader::DataLoader<B, crate::data::Batch<B>>,
        > {
            let batches = Batches::<B>::new(
                source,
                start,
                steps,
                Arc::new(GaussianDiffusion::full()),
                &device,
            );
            match teacher {
                Some((network, layers)) => Arc::new(batches.with_teacher(network, layers)),
                None => Arc::new(batches),
            }
        };
        let fitted = fit(
            model,
            Fit {
                plan,
                resume: self.resume,
                groups,
                batches: Box::new(batches),
                curves,
                observe,
                plain: self.plain,
            },
        )?;
        if fitted.skipped > 0 {
            crate::say!(
                "{} steps were skipped for a loss that was not finite",
                fitted.skipped
            );
        }
        if fitted.steps < steps {
            Err(RecipeError::Interrupted)
        } else {
            Ok(fitted)
        }
    }

    fn source(
        &self,
        config: &DitConfig,
        optimisation: &Optimisation,
        label_drop: f64,
        candidates: Vec<usize>,
    ) -> BatchSource {
        let plan = BatchPlan {
            batch: optimisation.batch,
            seed: self.recipe.seed,
            channels: config.channels,
            size: config.input_size,
            classes: config.classes,
            label_drop,
            diffusion_steps: GaussianDiffusion::full().steps(),
            candidates,
        };
        BatchSource::new(plan, Arc::new(Digits::new(Split::Train)))
    }

    fn plan(
        &self,
        stage: &Stage,
        optimisation: &Optimisation,
        folder: &Path,
        parents: &[Option<&Checkpoint>],
    ) -> Result<Plan, RecipeError> {
        let mut hash = Sha256::new();
        hash.update(super::directory::json(stage)?);
        hash.update(self.recipe.seed.to_le_bytes());
        for parent in parents.iter().flatten() {
            hash.update(parent.fingerprint());
        }
        let o = optimisation.clone();
        Ok(Plan {
            name: stage.name.clone(),
            steps: o.steps,
            batch: o.batch,
            lr: o.lr,
            final_lr: o.final_lr,
            warmup: o.warmup,
            weight_decay: o.weight_decay,
            clip: o.clip,
            ema: o.ema,
            checkpoint_every: o.checkpoint_every,
            keep_last: o.keep_last,
            log_every: o.log_every,
            max_bad_steps: o.max_bad_steps,
            fingerprint: hash
                .finalize()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
            directory: folder.to_owned(),
        })
    }

    fn provenance(
        &self,
        stage: &str,
        method: &str,
        optimisation: Option<&Optimisation>,
        parent: Option<&Checkpoint>,
    ) -> Provenance {
        Provenance {
            recipe: self.recipe.name.clone(),
            stage: format!("{stage} ({method})"),
            seed: self.recipe.seed,
            steps: optimisation.map_or(0, |optimisation| optimisation.steps),
            images: optimisation.map_or(0, |optimisation| optimisation.steps * optimisation.batch),
            parent: parent.map(Checkpoint::fingerprint),
            ..Provenance::default()
        }
    }
}

/// One line of `decisions.jsonl`.
#[derive(Serialize, serde::Deserialize)]
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
                    .map(|choice| report::Decision {
                        kept: choice.layers.clone(),
                        probability: choice.confidence,
                    })
                    .collect()
            })
            .collect(),
    };
    Ok(decision_svg(picture, &history)?)
}

/// (student, teacher) layers whose features are compared: as the recipe says, else by the groups the student was
/// pruned in, else by its kept layers.
fn taps(
    representation: &Representation,
    student: &Checkpoint,
    depth: usize,
    teacher_depth: usize,
) -> Result<Vec<(usize, usize)>, String> {
    let Provenance {
        kept,
        parent_depth,
        groups,
        ..
    } = &student.provenance;
    let taps: Vec<(usize, usize)> = if let Some(taps) = &representation.taps {
        taps.iter()
            .map(|[student, teacher]| (*student, *teacher))
            .collect()
    } else {
        let Some(kept) = kept else {
            return Err("the checkpoint does not say which layers were kept; give `taps`".into());
        };
        if *parent_depth != Some(teacher_depth) || kept.len() != depth {
            return Err(format!(
                "the student has {depth} of {} layers, the teacher {teacher_depth}; give `taps`",
                parent_depth.unwrap_or(0)
            ));
        }
        match groups {
            Some(groups) => Groups::from_pairs(groups, teacher_depth)
                .map(|groups| groups.taps(kept))
                .map_err(|error| error.to_string())?,
            None => {
                pruning::taps_from_kept(kept, teacher_depth).map_err(|error| error.to_string())?
            }
        }
    };
    check_taps(&taps, depth, teacher_depth).map(|()| taps)
}

/// A tensor of images.
pub(super) fn images<B: burn::tensor::backend::Backend>(
    pixels: Vec<f32>,
    shape: [usize; 4],
    device: &B::Device,
) -> Tensor<B, 4> {
    Tensor::from_data(TensorData::new(pixels, shape), device)
}
