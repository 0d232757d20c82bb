//! The stage that selects the layers to keep.

use serde::Serialize;

use super::intervals::Intervals;
use super::learned::Learned;
use super::optimisation::{self, label_drop};
use super::source::{Lineage, Source};
use super::width::{self, Width};
use crate::pruning::{Evolution, Pick, Start};
use crate::recipe::document::reader::Section;
use crate::recipe::document::string_in;
use crate::training::Optimisation;
use crate::trunk::Granularity;

/// The deepest trunk in a recipe.
pub(crate) const MAX_DEPTH: usize = 4096;

/// `kind = "prune"`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prune {
    /// The model to prune.
    pub from: Source,
    /// What counts as a layer in `keep`, `kept` and `groups`: each `block`, or each `branch` of
    /// one, its attention and then its MLP; default `block`.
    #[serde(skip_serializing_if = "Granularity::is_block")]
    pub granularity: Granularity,
    /// Weights of the kept layers: those they had (`original`), those trained along with the masks
    /// (`update`, of `learned`), or the mean with the removed layers that follow (`average`);
    /// default `original`.
    #[serde(skip_serializing_if = "Start::is_original")]
    pub start: Start,
    /// How its layers are chosen.
    #[serde(flatten)]
    pub method: PruneMethod,
}

/// Method that selects the layers to keep.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "method", rename_all = "kebab-case")]
pub enum PruneMethod {
    /// `TinyFusion`: masks and recoverability are learned together. The default.
    Learned(Learned),
    /// The fixed pattern of BK-SDM.
    Oracle {
        /// Number of layers to keep; default: half, of oracle alone.
        #[serde(skip_serializing_if = "Option::is_none")]
        keep: Option<usize>,
    },
    /// Keeps layers that are evenly spaced from the first to the last.
    Uniform {
        /// Number of layers to keep.
        keep: usize,
    },
    /// Keeps the first layers.
    First {
        /// Number of layers to keep.
        keep: usize,
    },
    /// Removes the layers whose output is most similar to their input (`ShortGPT`'s BI).
    #[serde(rename = "shortgpt")]
    ShortGpt(Scored),
    /// Removes the layers whose output differs least from their input.
    FluxLite(Scored),
    /// Removes the layers whose absence raises the loss least.
    Sensitivity(Scored),
    /// Measures masks drawn at random, and takes one by its loss before healing.
    Calibration(Calibrated),
    /// Searches for the mask of the lowest loss before healing, by mutation and crossover.
    Evolve(Evolved),
    /// Replaces runs of layers by one each, which is trained on the model's own hidden states to do
    /// their work (after PPCL).
    Intervals(Intervals),
    /// Takes no layer out, but runs every two neighbours side by side on one input, and trains each
    /// pair to do what they did one after the other (Grafting).
    Parallel {
        /// Budget and schedule.
        #[serde(flatten)]
        optimisation: Optimisation,
        /// Probability of replacing a label by the null class; default 0.1.
        label_drop: f64,
    },
    /// Keeps layers picked at random from the recipe's seed: the baseline for every other method.
    Random {
        /// Number of layers to keep.
        keep: usize,
        /// Index of the random choice, from 0; default 0.
        draw: u64,
    },
    /// Keeps the listed layers.
    Kept {
        /// Their indices, strictly increasing.
        kept: Vec<usize>,
    },
    /// Takes no layer out, but channels of all.
    Width(Width),
}

/// Settings of a method that measures layers or masks on some pictures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scored {
    /// Number of layers to keep.
    pub keep: usize,
    /// Batches that the score or loss is averaged over; default 4, of masks 1, of channels 16.
    pub batches: usize,
    /// Images per batch; default 64, of masks and channels 16.
    pub batch: usize,
    /// Timesteps are drawn from 0 up to this number, exclusive; default 250 for `shortgpt` and
    /// `flux-lite`, else 1000. The importance of channels by `diff-pruning` goes through so many of
    /// all, evenly spaced.
    pub timesteps: usize,
}

/// Settings of a choice among masks drawn at random.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Calibrated {
    /// Layers, and the pictures that masks are measured on; by default one batch of 16 at all
    /// timesteps.
    #[serde(flatten)]
    pub scored: Scored,
    /// Number of masks that are measured; default 1000. Of `calibration` they are the draws of
    /// `random` from 0 on; or each mask once, if there are not more, and at most 4096.
    pub masks: usize,
    /// Which mask is taken, by its loss; default: that of the lowest.
    pub pick: Pick,
}

/// Settings of a search among masks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evolved {
    /// Layers, and the pictures that masks are measured on; by default one batch of 16 at all
    /// timesteps.
    #[serde(flatten)]
    pub scored: Scored,
    /// How many masks are measured, in all and in a generation.
    #[serde(flatten)]
    pub evolution: Evolution,
}

#[derive(Clone, Copy)]
enum Method {
    Learned,
    Oracle,
    Uniform,
    First,
    ShortGpt,
    FluxLite,
    Sensitivity,
    Calibration,
    Evolve,
    Intervals,
    Parallel,
    Random,
    Kept,
    Width,
}

const METHODS: [(&str, Method); 14] = [
    ("learned", Method::Learned),
    ("oracle", Method::Oracle),
    ("uniform", Method::Uniform),
    ("first", Method::First),
    ("shortgpt", Method::ShortGpt),
    ("flux-lite", Method::FluxLite),
    ("sensitivity", Method::Sensitivity),
    ("calibration", Method::Calibration),
    ("evolve", Method::Evolve),
    ("intervals", Method::Intervals),
    ("parallel", Method::Parallel),
    ("random", Method::Random),
    ("kept", Method::Kept),
    ("width", Method::Width),
];

/// The largest index of a random choice.
const MOST_DRAWS: u64 = 1_000_000;

/// Keys that some method reads, besides [`optimisation::KEYS`].
const KEYS: &[&str] = &[
    "granularity",
    "start",
    "groups",
    "keep",
    "kept",
    "draw",
    "masks",
    "pick",
    "population",
    "batches",
    "timesteps",
    "trained",
    "update",
    "rank",
    "alpha",
    "gate_lr",
    "gate_init",
    "tau",
    "scaling",
    "label_drop",
];

impl Prune {
    pub(crate) fn read(section: &Section<'_>, lineage: Lineage<'_>) -> Option<Self> {
        let from = lineage.from(section);
        let method = section.choice("method", &METHODS);
        let method = if method.is_absent() {
            Some(Method::Learned)
        } else {
            method.optional()
        };
        let Some(method) = method else {
            section.accept(KEYS);
            section.accept(&width::KEYS);
            section.accept(&optimisation::KEYS);
            return None;
        };

        let name = string_in(section.table(), "method").unwrap_or("learned");
        let granularity = match method {
            Method::Oracle | Method::Intervals | Method::Parallel | Method::Width => {
                section.refuse(&["granularity"], &format!("method {name:?}"));
                Granularity::Block
            }
            _ => {
                let granularity = section.choice("granularity", &Granularity::NAMES);
                granularity.or(Granularity::Block)
            }
        };
        let learned = matches!(method, Method::Learned);
        let start = match method {
            // They train their own, or keep all layers.
            Method::Intervals | Method::Parallel | Method::Width => {
                section.refuse(&["start"], &format!("method {name:?}"));
                Start::Original
            }
            _ => {
                let start = section.choice("start", &Start::NAMES).check(
                    |start| *start != Start::Update || learned,
                    "\"update\" is what was trained along with the masks, of method \"learned\"",
                );
                let start = start.check(
                    |start| *start != Start::Average || granularity.is_block(),
                    "\"average\" is of whole blocks, and the granularity is \"branch\"",
                );
                start.or(Start::Original)
            }
        };
        let read = match method {
            Method::Learned => Learned::read(section).map(PruneMethod::Learned),
            Method::Oracle => {
                let keep = section.integer("keep", 1..=MAX_DEPTH).optional();
                Some(PruneMethod::Oracle { keep })
            }
            Method::Uniform => {
                let keep = section.integer("keep", 1..=MAX_DEPTH).required();
                keep.map(|keep| PruneMethod::Uniform { keep })
            }
            Method::First => {
                let keep = section.integer("keep", 1..=MAX_DEPTH).required();
                keep.map(|keep| PruneMethod::First { keep })
            }
            Method::ShortGpt => Scored::read(section, SCORES, FEATURES).map(PruneMethod::ShortGpt),
            Method::FluxLite => Scored::read(section, SCORES, FEATURES).map(PruneMethod::FluxLite),
            Method::Sensitivity => {
                Scored::read(section, SCORES, TIMES).map(PruneMethod::Sensitivity)
            }
            Method::Calibration => {
                let scored = Scored::read(section, MASKS, TIMES);
                let masks = section.integer("masks", 1..=MOST_MASKS).or(1000);
                let pick = section.choice("pick", &Pick::NAMES).or(Pick::Lowest);
                scored.map(|scored| {
                    PruneMethod::Calibration(Calibrated {
                        scored,
                        masks,
                        pick,
                    })
                })
            }
            Method::Evolve => {
                let scored = Scored::read(section, MASKS, TIMES);
                let masks = section.integer("masks", 1..=MOST_MASKS).or(1000);
                let population = section.integer("population", 2..=65_536).or(64);
                let evolution = Evolution { masks, population };
                scored.map(|scored| PruneMethod::Evolve(Evolved { scored, evolution }))
            }
            Method::Intervals => Intervals::read(section, lineage).map(PruneMethod::Intervals),
            Method::Parallel => {
                let optimisation = optimisation::optimisation(section, 1e-4, 1.0);
                let label_drop = label_drop(section);
                optimisation.map(|optimisation| PruneMethod::Parallel {
                    optimisation,
                    label_drop,
                })
            }
            Method::Random => {
                let keep = section.integer("keep", 1..=MAX_DEPTH).required();
                let draw = section.integer("draw", 0..=MOST_DRAWS).or(0);
                keep.map(|keep| PruneMethod::Random { keep, draw })
            }
            Method::Kept => {
                let kept = section.integers("kept", 0..=MAX_DEPTH - 1).check(
                    |kept| kept.is_sorted_by(|a, b| a < b),
                    "must be strictly increasing",
                );
                kept.required().map(|kept| PruneMethod::Kept { kept })
            }
            Method::Width => Width::read(section).map(PruneMethod::Width),
        };
        let by = format!("method {name:?}");
        section.refuse(KEYS, &by);
        section.refuse(&width::KEYS, &by);
        section.refuse(&optimisation::KEYS, &by);
        Some(Self {
            from: from?,
            granularity,
            start,
            method: read?,
        })
    }
}

/// Batches that layers are scored on, and images of each.
pub(crate) const SCORES: (usize, usize) = (4, 64);
/// Those that masks are measured on.
pub(crate) const MASKS: (usize, usize) = (1, 16);
/// Most masks of a search; a million take an hour where a thousand take seconds.
pub(crate) const MOST_MASKS: usize = 1_000_000;

/// Number of training timesteps.
pub(crate) const TIMES: usize = 1000;
/// Default of `timesteps` for scores of features: the reference's 250 sampling steps, not mapped
/// back to the 1000 of training.
pub(crate) const FEATURES: usize = 250;

impl Scored {
    /// Reads the settings; `batches` and `batch` by default as given.
    fn read(
        section: &Section<'_>,
        (batches, batch): (usize, usize),
        timesteps: usize,
    ) -> Option<Self> {
        let keep = section.integer("keep", 1..=MAX_DEPTH).required();
        let batches = section.integer("batches", 1..=1_000_000).or(batches);
        let batch = section.integer("batch", 1..=65_536).or(batch);
        let timesteps = section.integer("timesteps", 1..=TIMES).or(timesteps);
        Some(Self {
            keep: keep?,
            batches,
            batch,
            timesteps,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pruning::{GroupError, Update};
    use crate::recipe::schema::StageKind;
    use crate::recipe::schema::tests::{errors, messages, second, stage};

    fn prune(lines: &str) -> PruneMethod {
        match second(&format!("kind = \"prune\"\n{lines}")) {
            StageKind::Prune(prune) => prune.method,
            other => panic!("not a prune stage: {other:?}"),
        }
    }

    #[test]
    fn learned_pruning_defaults() {
        let PruneMethod::Learned(learned) = prune("groups = '1:2'\nsteps = 10\nlr = 0.01") else {
            panic!()
        };
        assert_eq!(
            learned.update,
            Update::Lora {
                rank: 8,
                alpha: 16.0
            }
        );
        assert_eq!((learned.gate_lr, learned.gate_init), (0.1, 0.02));
        assert_eq!((learned.tau, learned.scaling), ([4.0, 0.1], [100.0, 100.0]));
        assert_eq!(learned.optimisation.final_lr, 0.01);
        let PruneMethod::Learned(learned) = prune("groups = '1:2'\nsteps = 1\nrank = 4") else {
            panic!()
        };
        assert_eq!(
            learned.update,
            Update::Lora {
                rank: 4,
                alpha: 8.0
            }
        );
    }

    #[test]
    fn groups_are_checked_for_form_here_and_for_depth_later() {
        let PruneMethod::Learned(learned) = prune("steps = 1\ngroups = [[2, 4], [1, 2]]") else {
            panic!()
        };
        assert_eq!(learned.groups.resolve(6).unwrap().to_string(), "2:4, 1:2");
        let mismatch = GroupError::DepthMismatch {
            groups: 2,
            sum: 6,
            depth: 12,
        };
        assert_eq!(learned.groups.resolve(12), Err(mismatch));

        for (groups, message) in [
            ("'1-2'", "expected a group such as \"1:2\", found \"1-2\""),
            (
                "'2:2'",
                "the groups remove no layer; in one of them N of N:M must be below M",
            ),
            (
                "[[4, 4], [2, 2]]",
                "the groups remove no layer; in one of them N of N:M must be below M",
            ),
            (
                "[[3, 2], [1, 2]]",
                "group 3:2 keeps more layers than it has; N of N:M must be at most M",
            ),
            (
                "[[1, 2], [0, 2]]",
                "group 0:2 keeps no layer; N of N:M must be at least 1",
            ),
            ("\"1:4097\"", "group 1:4097 spans more than 4096 layers"),
            (
                "[[1, 2, 3]]",
                "expected a list of two integers, found a list of 3",
            ),
            ("[]", "must not be empty"),
            (
                "3",
                "expected \"N:M\" or a list of [N, M], found an integer",
            ),
            ("[[-1, 2]]", "must be between 0 and 4096, found -1"),
        ] {
            let text = stage(&format!("kind = 'prune'\nsteps = 1\ngroups = {groups}"));
            assert_eq!(messages(&text), [format!("`groups`: {message}")]);
        }
    }

    #[test]
    fn scores_and_fixed_patterns() {
        let scored = Scored {
            keep: 6,
            batches: 4,
            batch: 64,
            timesteps: 250,
        };
        assert_eq!(
            prune("method = 'shortgpt'\nkeep = 6"),
            PruneMethod::ShortGpt(scored.clone())
        );
        assert_eq!(
            prune("method = 'flux-lite'\nkeep = 6"),
            PruneMethod::FluxLite(scored.clone())
        );
        assert_eq!(
            prune("method = 'sensitivity'\nkeep = 6\ntimesteps = 400"),
            PruneMethod::Sensitivity(Scored {
                timesteps: 400,
                ..scored.clone()
            })
        );
        assert_eq!(
            prune("method = 'sensitivity'\nkeep = 6"),
            PruneMethod::Sensitivity(Scored {
                timesteps: 1000,
                ..scored
            })
        );
        assert_eq!(
            prune("method = 'random'\nkeep = 6"),
            PruneMethod::Random { keep: 6, draw: 0 }
        );
        assert_eq!(
            prune("method = 'oracle'\nkeep = 3"),
            PruneMethod::Oracle { keep: Some(3) }
        );
        assert_eq!(
            prune("method = 'kept'\nkept = [0, 4]"),
            PruneMethod::Kept { kept: vec![0, 4] }
        );
        assert_eq!(
            messages(&stage("kind = 'prune'\nmethod = 'kept'\nkept = [4, 4]")),
            ["`kept`: must be strictly increasing"]
        );
    }

    #[test]
    fn an_unknown_method_is_one_mistake() {
        let text = stage("kind = 'prune'\nmethod = 'oracel'\nsteps = 1\nkeep = 6\nstpes = 1");
        let errors = errors(&text);
        let suggestions: Vec<_> = errors
            .items()
            .iter()
            .map(|item| item.suggestion.clone())
            .collect();
        assert_eq!(
            suggestions,
            [Some("oracle".to_owned()), Some("steps".to_owned())]
        );
    }
}
