//! The stage that looks into a model.

use serde::{Deserialize, Serialize};

use super::optimisation::POSITIVE;
use super::prune::{MAX_DEPTH, MOST_MASKS};
use super::source::{Lineage, Source};
use crate::recipe::document::reader::Section;

/// `kind = "analyse"`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Analyse {
    /// The model.
    pub from: Source,
    /// What is looked at; default all: `states` (distributions of hidden states, and what masked
    /// distillation leaves out), `similarity` (of every two layers, by CKA), `scores` (of each
    /// layer, by the three methods that score), `losses` (of models with layers taken out at
    /// random, before training), `speed` (of models of fewer layers and of fewer channels, against
    /// the ideal).
    pub show: Vec<View>,
    /// Images that hidden states and scores are of, and that are timed together; default 64.
    pub batch: usize,
    /// Distance from the mean, in standard deviations, beyond which masked distillation leaves
    /// hidden states out; default 2.
    pub k: f64,
    /// Layers that `losses` keeps; default half.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<usize>,
    /// Number of random choices of `losses`; default 1000.
    pub masks: usize,
    /// Pruned models whose loss is marked among those of `losses`; default: those of all earlier
    /// stages that prune `from`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mark: Option<Vec<Source>>,
}

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum View {
    /// Distributions of hidden states.
    States,
    /// Similarity of layers.
    Similarity,
    /// Scores of layers.
    Scores,
    /// Losses of random masks.
    Losses,
    /// Speed of shallower and of narrower models.
    Speed,
}

impl View {
    /// All, by their names.
    pub const NAMES: [(&'static str, Self); 5] = [
        ("states", Self::States),
        ("similarity", Self::Similarity),
        ("scores", Self::Scores),
        ("losses", Self::Losses),
        ("speed", Self::Speed),
    ];
}

impl Analyse {
    pub(crate) fn read(section: &Section<'_>, lineage: Lineage<'_>) -> Option<Self> {
        let from = lineage.from(section);
        let show = section.choices("show", &View::NAMES).check(
            |all| (1..all.len()).all(|i| !all[..i].contains(&all[i])),
            "names a view twice",
        );
        let show = show.or(View::NAMES.map(|(_, view)| view).to_vec());
        let batch = section.integer("batch", 1..=65_536).or(64);
        let k = section.float("k", POSITIVE).or(2.0);
        let losses = show.contains(&View::Losses);
        if !losses {
            section.refuse(&["keep", "masks", "mark"], "a `show` without \"losses\"");
        }
        let keep = section.integer("keep", 1..=MAX_DEPTH).optional();
        let masks = section.integer("masks", 2..=MOST_MASKS).or(1000);
        let mark = section.list("mark", |node| lineage.source(node)).optional();
        Some(Self {
            from: from?,
            show,
            batch,
            k,
            keep,
            masks,
            mark,
        })
    }
}
