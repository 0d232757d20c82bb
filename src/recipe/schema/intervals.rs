//! Settings of interval distillation.

use serde::Serialize;

use super::optimisation::{self, label_drop};
use super::prune::MAX_DEPTH;
use super::source::{Lineage, Source};
use crate::recipe::document::reader::Section;
use crate::training::Optimisation;

/// Settings of interval distillation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Intervals {
    /// Number of layers that are left.
    pub keep: usize,
    /// Where the replacements come from.
    #[serde(flatten)]
    pub replacements: Replacements,
}

/// Where replacements of intervals come from.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Replacements {
    /// An earlier stage that trained them for fewer layers: those of the least errors are taken.
    Trained {
        /// An earlier stage of this method, whose trained layers are used: a model of another depth
        /// without training.
        trained: Source,
    },
    /// A training.
    Train {
        /// Budget and schedule.
        #[serde(flatten)]
        optimisation: Optimisation,
        /// Probability of replacing a label by the null class; default 0.1.
        label_drop: f64,
    },
}

impl Intervals {
    pub(super) fn read(section: &Section<'_>, lineage: Lineage<'_>) -> Option<Self> {
        let keep = section.integer("keep", 1..=MAX_DEPTH).required();
        let trained = section.value("trained", |node| match lineage.source(node)? {
            stage @ Source::Stage(_) => Ok(stage),
            _ => Err(node.fault("must name an earlier stage of method \"intervals\"")),
        });
        let replacements = if trained.is_absent() {
            let optimisation = optimisation::optimisation(section, 1e-4, 1.0);
            let label_drop = label_drop(section);
            optimisation.map(|optimisation| Replacements::Train {
                optimisation,
                label_drop,
            })
        } else {
            section.refuse(&optimisation::KEYS, "a stage with `trained`");
            section.refuse(&["label_drop"], "a stage with `trained`");
            trained
                .optional()
                .map(|trained| Replacements::Trained { trained })
        };
        Some(Self {
            keep: keep?,
            replacements: replacements?,
        })
    }
}
