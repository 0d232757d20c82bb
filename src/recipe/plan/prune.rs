//! What a pruning will do.

use super::cost::{flops, images, inference_memory, passes, training_memory};
use super::known::{Known, Problem, keeps_weights};
use super::{PlannedStage, Work};
use crate::models::Architecture;
use crate::pruning::{Evolution, Groups, Pick, Score, Start, Update, oracle, uniform};
use crate::recipe::schema::Stage;
use crate::recipe::schema::intervals::{Intervals, Replacements};
use crate::recipe::schema::learned::Learned;
use crate::recipe::schema::prune::{Calibrated, Evolved, Prune, PruneMethod, Scored};
use crate::recipe::schema::source::Source;
use crate::training::Optimisation;
use crate::trunk::Granularity;

/// A pruning, resolved for the model it prunes.
#[derive(Debug, Clone)]
pub struct PrunePlan {
    /// The model.
    pub from: Source,
    /// The method, as the recipe names it.
    pub method: &'static str,
    /// What counts as a layer.
    pub granularity: Granularity,
    /// What the kept layers have for weights.
    pub start: Start,
    /// How the layers are chosen.
    pub choice: Selection,
}

/// How the layers that stay are chosen.
#[derive(Debug, Clone)]
pub enum Selection {
    /// Learned, one decision per group.
    Learned {
        /// Settings.
        learned: Learned,
        /// The groups, over the whole trunk.
        groups: Groups,
    },
    /// The best by a score.
    Scored {
        /// The score.
        score: Score,
        /// Settings.
        scored: Scored,
    },
    /// Searched for among masks.
    Searched {
        /// How.
        search: Search,
        /// What masks are measured on.
        scored: Scored,
    },
    /// Runs of layers, each replaced by one.
    Intervals(Intervals),
    /// None: neighbours run side by side.
    Parallel {
        /// Budget and schedule.
        optimisation: Optimisation,
        /// Probability of replacing a label by the null class.
        label_drop: f64,
    },
    /// Picked by the recipe's seed.
    Random {
        /// Number of layers.
        keep: usize,
        /// Which of the seed's draws.
        draw: u64,
    },
    /// Known before anything runs.
    Fixed {
        /// The layers, in trunk order.
        kept: Vec<usize>,
        /// Groups whose choice they are, where a rule says so.
        groups: Option<Groups>,
    },
}

/// A search among masks.
#[derive(Debug, Clone, Copy)]
pub enum Search {
    /// Among so many drawn at random.
    Random {
        /// Number of masks.
        masks: usize,
        /// Which of them is taken.
        pick: Pick,
    },
    /// By mutation and crossover.
    Evolution(Evolution),
}

impl Selection {
    /// The choice of a method for a model.
    /// Where it isn't known how the model's layers are divided among trunks, groups may fit those
    /// that it will have.
    fn new(prune: &Prune, model: &Architecture, divided: bool) -> Result<Self, Problem> {
        let layers = prune.granularity.layers();
        let trunk = model.trunk(prune.granularity).ok_or_else(|| {
            Problem::Said(match prune.granularity {
                Granularity::Block => {
                    format!("{model} has no trunk that layers can be taken out of")
                }
                Granularity::Branch => format!("{model} can't be taken apart by branch"),
            })
        })?;
        let depth = trunk.depth;
        let within = |keep: usize| match keep > 0 && keep < depth {
            true => Ok(()),
            false => Err(Problem::Said(format!(
                "`keep` is {keep}, which must lie between 1 and {} for {depth} {layers}",
                depth.saturating_sub(1)
            ))),
        };
        let scored = |score, scored: &Scored| {
            within(scored.keep)?;
            let scored = scored.clone();
            Ok(Self::Scored { score, scored })
        };
        match &prune.method {
            PruneMethod::Learned(learned) => {
                let groups = learned.groups.resolve(depth)?;
                if !divided {
                    groups.fit(&trunk)?;
                }
                let learned = learned.clone();
                Ok(Self::Learned { learned, groups })
            }
            PruneMethod::Oracle { keep } => {
                let kept = oracle(depth).ok_or_else(|| {
                    Problem::Said(format!(
                        "the oracle rule keeps one layer of each pair, and {depth} layers are no pairs"
                    ))
                })?;
                if let Some(keep) = keep.filter(|keep| *keep != kept.len()) {
                    return Err(Problem::Said(format!(
                        "the oracle rule keeps {} of {depth} layers, not {keep}",
                        kept.len()
                    )));
                }
                // It keeps one layer of each pair, so its taps are those of 1:2 groups.
                let groups = Groups::parse_ratio("1:2", depth)?;
                if !divided {
                    groups.fit(&trunk)?;
                }
                let groups = Some(groups);
                Ok(Self::Fixed { kept, groups })
            }
            PruneMethod::Uniform { keep } => {
                within(*keep)?;
                let kept = uniform(depth, *keep);
                Ok(Self::Fixed { kept, groups: None })
            }
            PruneMethod::First { keep } => {
                within(*keep)?;
                let kept = (0..*keep).collect();
                Ok(Self::Fixed { kept, groups: None })
            }
            PruneMethod::ShortGpt(settings) => scored(Score::Shortgpt, settings),
            PruneMethod::FluxLite(settings) => scored(Score::FluxLite, settings),
            PruneMethod::Sensitivity(settings) => scored(Score::Sensitivity, settings),
            PruneMethod::Calibration(Calibrated {
                scored,
                masks,
                pick,
            }) => {
                within(scored.keep)?;
                let (masks, pick) = (*masks, *pick);
                Ok(Self::Searched {
                    search: Search::Random { masks, pick },
                    scored: scored.clone(),
                })
            }
            PruneMethod::Evolve(Evolved { scored, evolution }) => {
                within(scored.keep)?;
                Ok(Self::Searched {
                    search: Search::Evolution(*evolution),
                    scored: scored.clone(),
                })
            }
            PruneMethod::Intervals(intervals) => {
                within(intervals.keep)?;
                // None is across a border.
                let least = trunk.stacks().count();
                if intervals.keep < least {
                    return Err(Problem::Said(format!(
                        "`keep` is {}, and {model} has {least} trunks, of each of which an interval is left",
                        intervals.keep
                    )));
                }
                Ok(Self::Intervals(intervals.clone()))
            }
            PruneMethod::Parallel {
                optimisation,
                label_drop,
            } => {
                let neighbours = trunk.stacks().any(|stack| stack.len() > 1);
                if !neighbours || model.in_pairs().is_none() {
                    return Err(Problem::Said(format!(
                        "pairs are of whole blocks one after another, and {model} has not two of them"
                    )));
                }
                Ok(Self::Parallel {
                    optimisation: optimisation.clone(),
                    label_drop: *label_drop,
                })
            }
            PruneMethod::Random { keep, draw } => {
                within(*keep)?;
                Ok(Self::Random {
                    keep: *keep,
                    draw: *draw,
                })
            }
            // It is planned apart.
            PruneMethod::Width(_) => Err(Problem::Unknown),
            PruneMethod::Kept { kept } => {
                let mut kept = kept.clone();
                kept.sort_unstable();
                if let Some(layer) = kept.iter().find(|layer| **layer >= depth) {
                    return Err(Problem::Said(format!(
                        "`kept` names {} {layer}; there are {depth} {layers}, counted from 0",
                        prune.granularity.layer()
                    )));
                }
                Ok(Self::Fixed { kept, groups: None })
            }
        }
    }

    /// What is left of a model; where it isn't known which layers stay, as many of the first, or
    /// evenly spaced ones where they are of several trunks.
    fn of(&self, model: &Architecture, granularity: Granularity) -> Architecture {
        let count = match self {
            // As many of the first of each group.
            Self::Learned { groups, .. } => {
                let firsts = groups.iter().zip(groups.offsets());
                let kept = firsts.flat_map(|(group, first)| first..first + group.keep());
                return model.keep(&kept.collect::<Vec<_>>(), granularity);
            }
            Self::Scored { scored, .. } | Self::Searched { scored, .. } => scored.keep,
            Self::Intervals(Intervals { keep, .. }) | Self::Random { keep, .. } => *keep,
            Self::Fixed { kept, .. } => return model.keep(kept, granularity),
            Self::Parallel { .. } => return model.in_pairs().unwrap_or_else(|| model.clone()),
        };
        let trunk = model.trunk(granularity);
        let bordered = trunk.is_some_and(|trunk| !trunk.borders.is_empty());
        let kept = match bordered && count <= model.layers(granularity) {
            true => uniform(model.layers(granularity), count),
            false => (0..count).collect(),
        };
        model.keep(&kept, granularity)
    }

    /// Whether the model is run to choose: then it matters how it was trained.
    pub(crate) fn runs_the_model(&self) -> bool {
        match self {
            Self::Learned { .. }
            | Self::Scored { .. }
            | Self::Searched { .. }
            | Self::Intervals(_)
            | Self::Parallel { .. } => true,
            Self::Random { .. } | Self::Fixed { .. } => false,
        }
    }
}

pub(super) fn plan(
    stage: &Stage,
    prune: &Prune,
    known: &mut Known<'_>,
) -> Result<PlannedStage, Problem> {
    if let PruneMethod::Width(width) = &prune.method {
        return super::width::plan(stage, (&prune.from, width), known);
    }
    let (before, process) = known.denoiser(stage, &prune.from)?;
    if !keeps_weights(&stage.kind) {
        known.same_classes(&prune.from)?;
    }
    let granularity = prune.granularity;
    match granularity {
        Granularity::Block if known.is_by_branch(&prune.from) => {
            return Err(Problem::Said(format!(
                "how many blocks are left of `{}`, which is pruned by branch, is known once that has run; prune it further by branch too",
                prune.from
            )));
        }
        Granularity::Block => {}
        Granularity::Branch => {
            known.by_branch.insert(stage.name.clone());
        }
    }
    let divided = known.is_divided(&prune.from);
    let choice = Selection::new(prune, &before, divided)?;
    match (&choice, prune.start) {
        (Selection::Learned { learned, .. }, Start::Update) if learned.update == Update::Frozen => {
            return Err(Problem::Said(
                "start = \"update\" needs weights that are trained along; `update` is \"frozen\""
                    .into(),
            ));
        }
        (_, Start::Average) if !before.is_alike() => {
            return Err(Problem::Said(format!(
                "start = \"average\" needs blocks that are alike, and {before} has not"
            )));
        }
        _ => {}
    }
    let after = choice.of(&before, granularity);
    let layers = before.layers(granularity);
    if choice.runs_the_model() {
        known.fits_data(stage, before.shape())?;
    }
    let (steps, seen, memory, flops) = match &choice {
        Selection::Learned { learned, .. } => {
            let (learning, frozen) = match learned.update {
                Update::Full => (before.parameters(), false),
                Update::Lora { rank, .. } => (before.lora_parameters(rank), true),
                Update::Frozen => (0, true),
            };
            let seen = images(&learned.optimisation);
            let memory = training_memory(&before, learning, &learned.optimisation, known);
            let flops = passes(&before, known, frozen) * flops(&before, seen);
            (learned.optimisation.steps, seen, memory, flops)
        }
        Selection::Scored { score, scored } => {
            let seen = scored.batches * scored.batch;
            let passes = match score {
                Score::Sensitivity => 1.0 + layers as f64,
                Score::Shortgpt | Score::FluxLite => 1.0,
            };
            let memory = inference_memory(&before, scored.batch);
            (scored.batches, seen, memory, passes * flops(&before, seen))
        }
        Selection::Searched { search, scored } => {
            let masks = match search {
                Search::Random { masks, .. } => *masks,
                Search::Evolution(evolution) => evolution.masks,
            };
            let seen = scored.batches * scored.batch;
            // Without what masks of the same beginning share.
            let passes = masks as f64 * scored.keep as f64 / layers as f64;
            let memory = inference_memory(&before, scored.batch);
            (masks, seen, memory, passes * flops(&before, seen))
        }
        Selection::Parallel { optimisation, .. }
        | Selection::Intervals(Intervals {
            replacements: Replacements::Train { optimisation, .. },
            ..
        }) => {
            let seen = images(optimisation);
            let part = optimisation.batch / optimisation.accumulate;
            // The model's states between all its layers, and what they are compared with.
            let states = before
                .states()
                .map_or(0, |[tokens, width]| 4 * tokens * width);
            let memory = (training_memory(&after, after.parameters(), optimisation, known)
                + inference_memory(&before, part))
            .max(inference_memory(&before, part) + 2 * (layers + 1) * part * states);
            let flops = flops(&before, seen) + passes(&after, known, false) * flops(&after, seen);
            (optimisation.steps, seen, memory, flops)
        }
        Selection::Intervals(Intervals {
            replacements: Replacements::Trained { trained },
            ..
        }) => {
            known.trained_intervals(trained, &before)?;
            (0, 0, before.parameters() * 8, 0.0)
        }
        Selection::Random { .. } | Selection::Fixed { .. } => (0, 0, before.parameters() * 4, 0.0),
    };
    let method = prune_method(&prune.method);
    let known_before = matches!(choice, Selection::Fixed { .. });
    let guessed = !granularity.is_block() && !known_before;
    let bordered = (before.trunk(granularity)).is_some_and(|trunk| !trunk.borders.is_empty());
    let divides = divided
        || bordered
            && !known_before
            && !matches!(
                choice,
                Selection::Learned { .. } | Selection::Parallel { .. }
            );
    if divides {
        known.divided.insert(stage.name.clone());
    }
    let work = Work::Prune(PrunePlan {
        from: prune.from.clone(),
        method,
        granularity,
        start: prune.start,
        choice,
    });
    let what = match granularity {
        Granularity::Block => format!("prune, {method}"),
        Granularity::Branch => format!("prune, {method}, by branch"),
    };
    let mut planned = PlannedStage {
        before: Some(before),
        after: Some(after),
        process,
        steps,
        images: seen,
        memory,
        flops,
        ..PlannedStage::new(stage, &what, work)
    };
    if guessed {
        planned.notes.push(
            "which branches stay is known once it has run; the model after it is one of as many"
                .into(),
        );
    }
    if divides {
        planned.notes.push(
            "how many layers of each trunk stay is known once it has run; the model after it is one of as many in all"
                .into(),
        );
    }
    Ok(planned)
}

fn prune_method(method: &PruneMethod) -> &'static str {
    match method {
        PruneMethod::Learned(_) => "learned",
        PruneMethod::Oracle { .. } => "oracle",
        PruneMethod::Uniform { .. } => "uniform",
        PruneMethod::First { .. } => "first",
        PruneMethod::ShortGpt(_) => "shortgpt",
        PruneMethod::FluxLite(_) => "flux-lite",
        PruneMethod::Sensitivity(_) => "sensitivity",
        PruneMethod::Calibration(_) => "calibration",
        PruneMethod::Evolve(_) => "evolve",
        PruneMethod::Intervals(_) => "intervals",
        PruneMethod::Parallel { .. } => "parallel",
        PruneMethod::Random { .. } => "random",
        PruneMethod::Kept { .. } => "kept",
        PruneMethod::Width(_) => "width",
    }
}
