//! What a pruning will do.

use super::cost::{FROZEN, TRAINING, flops, images, inference_memory, training_memory};
use super::known::{Known, Problem, keeps_weights};
use super::{PlannedStage, Work};
use crate::models::Architecture;
use crate::pruning::{Evolution, Groups, Pick, Score, Update, oracle, uniform};
use crate::recipe::schema::Stage;
use crate::recipe::schema::prune::{Calibrated, Evolved, Learned, Prune, PruneMethod, Scored};
use crate::recipe::schema::source::Source;

/// A pruning, resolved for the model it prunes.
#[derive(Debug, Clone)]
pub struct PrunePlan {
    /// The model.
    pub from: Source,
    /// The method, as the recipe names it.
    pub method: &'static str,
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
    fn new(method: &PruneMethod, model: &Architecture) -> Result<Self, Problem> {
        let trunk = model.trunk().ok_or_else(|| {
            Problem::Said(format!(
                "{model} has no trunk that layers can be taken out of"
            ))
        })?;
        let depth = trunk.depth;
        let within = |keep: usize| match keep > 0 && keep < depth {
            true => Ok(()),
            false => Err(Problem::Said(format!(
                "`keep` is {keep}, which must lie between 1 and {} for {depth} layers",
                depth - 1
            ))),
        };
        let scored = |score, scored: &Scored| {
            within(scored.keep)?;
            let scored = scored.clone();
            Ok(Self::Scored { score, scored })
        };
        match method {
            PruneMethod::Learned(learned) => {
                let groups = learned.groups.resolve(depth)?;
                groups.fit(&trunk)?;
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
                let groups = Some(Groups::parse_ratio("1:2", depth)?);
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
            PruneMethod::Random { keep, draw } => {
                within(*keep)?;
                Ok(Self::Random {
                    keep: *keep,
                    draw: *draw,
                })
            }
            PruneMethod::Kept { kept } => {
                let mut kept = kept.clone();
                kept.sort_unstable();
                if let Some(layer) = kept.iter().find(|layer| **layer >= depth) {
                    return Err(Problem::Said(format!(
                        "`kept` names layer {layer}; there are {depth}, counted from 0"
                    )));
                }
                Ok(Self::Fixed { kept, groups: None })
            }
        }
    }

    /// Number of layers that stay.
    fn kept_depth(&self) -> usize {
        match self {
            Self::Learned { groups, .. } => groups.kept_depth(),
            Self::Scored { scored, .. } | Self::Searched { scored, .. } => scored.keep,
            Self::Random { keep, .. } => *keep,
            Self::Fixed { kept, .. } => kept.len(),
        }
    }

    /// Whether the model is run to choose: then it matters how it was trained.
    pub(crate) fn runs_the_model(&self) -> bool {
        match self {
            Self::Learned { .. } | Self::Scored { .. } | Self::Searched { .. } => true,
            Self::Random { .. } | Self::Fixed { .. } => false,
        }
    }
}

pub(super) fn plan(
    stage: &Stage,
    prune: &Prune,
    known: &mut Known<'_>,
) -> Result<PlannedStage, Problem> {
    let (before, process) = known.denoiser(stage, &prune.from)?;
    if !keeps_weights(&stage.kind) {
        known.same_classes(&prune.from)?;
    }
    let choice = Selection::new(&prune.method, &before)?;
    let after = before.with_depth(choice.kept_depth());
    if choice.runs_the_model() {
        known.fits_data(stage, before.shape())?;
    }
    let (steps, seen, memory, flops) = match &choice {
        Selection::Learned { learned, .. } => {
            let (learning, passes) = match learned.update {
                Update::Full => (before.parameters(), TRAINING),
                Update::Lora { rank, .. } => (before.lora_parameters(rank), FROZEN),
                Update::Frozen => (0, FROZEN),
            };
            let seen = images(&learned.optimisation);
            let memory = training_memory(&before, learning, &learned.optimisation);
            let flops = passes * flops(&before, seen);
            (learned.optimisation.steps, seen, memory, flops)
        }
        Selection::Scored { score, scored } => {
            let seen = scored.batches * scored.batch;
            let passes = match score {
                Score::Sensitivity => 1.0 + before.depth() as f64,
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
            let passes = masks as f64 * scored.keep as f64 / before.depth() as f64;
            let memory = inference_memory(&before, scored.batch);
            (masks, seen, memory, passes * flops(&before, seen))
        }
        Selection::Random { .. } | Selection::Fixed { .. } => (0, 0, before.parameters() * 4, 0.0),
    };
    let method = prune_method(&prune.method);
    let work = Work::Prune(PrunePlan {
        from: prune.from.clone(),
        method,
        choice,
    });
    Ok(PlannedStage {
        before: Some(before),
        after: Some(after),
        process,
        steps,
        images: seen,
        memory,
        flops,
        ..PlannedStage::new(stage, &format!("prune, {method}"), work)
    })
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
        PruneMethod::Random { .. } => "random",
        PruneMethod::Kept { .. } => "kept",
    }
}
