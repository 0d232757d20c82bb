//! The typed recipe: every key with its meaning, default and range.
//!
//! A [`Recipe`] is complete: defaults are filled in and each stage's source is resolved, so that a
//! run never reads the document again. [`Recipe::to_toml`] writes an equivalent recipe with every
//! default written out.

pub mod analyse;
pub mod data;
pub mod extract;
pub mod intervals;
#[cfg(test)]
mod keys;
pub mod learned;
pub mod optimisation;
pub mod prune;
pub mod recover;
pub mod sample;
pub mod source;
pub mod sweep;
pub mod train;
pub mod width;

use std::path::Path;

use serde::Serialize;

use self::analyse::Analyse;
use self::data::{Data, DataShape};
use self::extract::Extract;
use self::intervals::Replacements;
use self::prune::{Prune, PruneMethod};
use self::recover::Recover;
use self::sample::{Evaluate, Sample};
use self::source::{HEADS, Lineage, Listing};
use self::sweep::Sweep;
use self::train::Train;
use super::document::diagnostic::Diagnostics;
use super::document::reader::{Section, Sink};
use super::document::{Document, string_in, title};
use crate::backend::{BackendKind, Compute};
use crate::training::{Optimisation, Tracker};

/// A validated recipe.
///
/// ```
/// use std::path::Path;
/// use tinyfusion::recipe::{document::Document, schema::Recipe};
///
/// let text = r#"
/// [[stage]]
/// kind = "prune"
/// from = "embedded:digits-teacher"
/// groups = "1:2"
/// steps = 100
/// "#;
/// let mut document = Document::parse(Path::new("recipes/tiny.toml"), text)?;
/// document.set("stage.prune.steps=200");
/// let recipe = Recipe::from_document(&document)?;
/// assert_eq!(recipe.name, "tiny");
/// # Ok::<(), tinyfusion::recipe::document::diagnostic::Diagnostics>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recipe {
    /// Name under which runs are filed; default: the stem of the recipe's file name.
    pub name: String,
    /// Seed of all randomness, below 2^63 because TOML has no larger integers; default 0.
    pub seed: u64,
    /// Compute backend; default: the command line's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<BackendKind>,
    /// Number type of the factors of the products of linear layers, attention and UNets'
    /// convolutions; default `f32`.
    pub compute: Compute,
    /// Whether a training's backward pass computes the branches of blocks again rather than keeping
    /// what they computed: much less memory, a third more arithmetic; default `false`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub recompute: bool,
    /// Attention heads of every file that doesn't state them and doesn't have the width of a
    /// published model; `heads` beside a file's `path` takes precedence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<usize>,
    /// Forms of each training's log beside `metrics.jsonl`: `tensorboard` (an event file), `csv`;
    /// default none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<Tracker>,
    /// Data set for training and comparison; default: the digits.
    pub data: Data,
    /// The stages, in order.
    #[serde(rename = "stage")]
    pub stages: Vec<Stage>,
    /// Settings that the recipe is run with, one after the other.
    #[serde(skip)]
    pub sweep: Option<Sweep>,
}

/// One step of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stage {
    /// Its name, unique within the recipe; default: its kind.
    pub name: String,
    /// Its kind, with the settings.
    #[serde(flatten)]
    pub kind: StageKind,
}

/// Kind of a stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum StageKind {
    /// Trains a model.
    Train(Train),
    /// Removes layers.
    Prune(Prune),
    /// Trains a pruned model back to quality.
    Recover(Recover),
    /// Samples images.
    Sample(Sample),
    /// Compares models.
    Evaluate(Evaluate),
    /// Looks into a model.
    Analyse(Analyse),
    /// Turns images into latents.
    Extract(Extract),
}

impl StageKind {
    /// Settings of its training, if it trains.
    pub fn optimisation(&self) -> Option<&Optimisation> {
        match self {
            Self::Train(train) => Some(&train.optimisation),
            Self::Recover(recover) => Some(&recover.optimisation),
            Self::Prune(Prune {
                method: PruneMethod::Learned(learned),
                ..
            }) => Some(&learned.optimisation),
            Self::Prune(Prune {
                method: PruneMethod::Parallel { optimisation, .. },
                ..
            }) => Some(optimisation),
            Self::Prune(Prune {
                method: PruneMethod::Intervals(intervals),
                ..
            }) => match &intervals.replacements {
                Replacements::Train { optimisation, .. } => Some(optimisation),
                Replacements::Trained { .. } => None,
            },
            _ => None,
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Extract,
    Train,
    Prune,
    Recover,
    Sample,
    Evaluate,
    Analyse,
}

const KINDS: [(&str, Kind); 7] = [
    ("extract", Kind::Extract),
    ("train", Kind::Train),
    ("prune", Kind::Prune),
    ("recover", Kind::Recover),
    ("sample", Kind::Sample),
    ("evaluate", Kind::Evaluate),
    ("analyse", Kind::Analyse),
];

const NAME_RULE: &str = "must be 1 to 64 of the characters a-z, 0-9, `_` and `-`";

impl Recipe {
    /// Reads and validates a recipe. Checkpoint files are looked for, but not opened.
    ///
    /// # Errors
    ///
    /// Every mistake of the recipe and of the overrides applied to it, all at once.
    pub fn from_document(document: &Document) -> Result<Self, Diagnostics> {
        let sink = Sink::new(document.refused().to_vec());
        let recipe = Self::read(document, &sink);
        let faults = sink.into_faults();
        match recipe {
            Some(recipe) if faults.is_empty() => Ok(recipe),
            _ => Err(document.diagnostics(faults)),
        }
    }

    /// The recipe with all defaults written out, as TOML.
    ///
    /// # Errors
    ///
    /// None for a recipe that was read from a document.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string_pretty(self)
    }

    pub(super) fn read(document: &Document, sink: &Sink) -> Option<Self> {
        let section = match Section::new("the recipe".to_owned(), document.root(), sink) {
            Ok(section) => section,
            Err(fault) => {
                sink.push(fault);
                return None;
            }
        };
        let name = section
            .string("name")
            .check(|name| is_name(name), NAME_RULE)
            .optional();
        let seed = section.integer("seed", 0..=i64::MAX as u64).or(0);
        let backends = [
            ("ndarray", BackendKind::Ndarray),
            ("wgpu", BackendKind::Wgpu),
            ("cuda", BackendKind::Cuda),
            ("torch", BackendKind::Torch),
        ];
        let backend = section.choice("backend", &backends).optional();
        let computes = [("f32", Compute::F32), ("bf16", Compute::Bf16)];
        let compute = section.choice("compute", &computes).or(Compute::F32);
        let recompute = section.boolean("recompute").or(false);
        let heads = section.integer("heads", HEADS).optional();
        let log = section.choices("log", &Tracker::NAMES).or(Vec::new());
        let stages = section.sections("stage").required();
        let extracts: Vec<String> = (stages.iter().flatten())
            .filter(|stage| string_in(stage.table(), "kind") == Some("extract"))
            .filter_map(|stage| title(stage.table()).map(str::to_owned))
            .collect();
        let data = Data::read(&section, &extracts);
        let shape = data.as_ref().and_then(Data::shape);
        let stages = stages.map(|stages| read_stages(stages, shape.as_ref()));
        let sweep = section.section("sweep").optional().map(|section| {
            let sweep = Sweep::read(&section);
            section.finish();
            sweep
        });
        section.finish();
        Some(Self {
            name: name.map_or_else(|| name_of(document.path()), str::to_owned),
            seed,
            backend,
            compute,
            recompute,
            heads,
            log,
            data: data?,
            stages: stages??,
            sweep: match sweep {
                Some(sweep) => Some(sweep?),
                None => None,
            },
        })
    }
}

/// Reads all stages, even after one that is wrong.
fn read_stages(sections: Vec<Section<'_>>, data: Option<&DataShape>) -> Option<Vec<Stage>> {
    let listings: Vec<Listing> = sections.iter().map(list).collect();
    let read = sections.into_iter().enumerate();
    let stages: Vec<_> = read
        .map(|(index, section)| Stage::read(section, &listings, index, data))
        .collect();
    stages.into_iter().collect()
}

/// A stage as the other stages see it, before it is read.
fn list(section: &Section<'_>) -> Listing {
    let kind = string_in(section.table(), "kind");
    Listing {
        name: title(section.table()).unwrap_or_default().to_owned(),
        // A stage with an unknown kind counts as one with a checkpoint, to avoid a second mistake.
        makes_checkpoint: !matches!(kind, Some("sample" | "evaluate" | "analyse" | "extract")),
    }
}

impl Stage {
    fn read(
        section: Section<'_>,
        listings: &[Listing],
        index: usize,
        data: Option<&DataShape>,
    ) -> Option<Self> {
        let lineage = Lineage::new(listings, index);
        let kind = section.choice("kind", &KINDS).required();
        let called = &listings[index].name;
        let taken = listings[..index]
            .iter()
            .any(|stage| stage.name == *called && !called.is_empty());
        let message = format!("an earlier stage is called {called:?} as well");
        let name = section
            .string("name")
            .check(|name| is_name(name), NAME_RULE)
            .check(|_| !taken, &message);
        if taken && name.is_absent() {
            section.fault(format!("{message}; give this one a `name`"));
        }
        let kind = match kind? {
            Kind::Extract => Extract::read(&section).map(StageKind::Extract),
            Kind::Train => Train::read(&section, lineage, data).map(StageKind::Train),
            Kind::Prune => Prune::read(&section, lineage).map(StageKind::Prune),
            Kind::Recover => Recover::read(&section, lineage).map(StageKind::Recover),
            Kind::Sample => Sample::read(&section, lineage).map(StageKind::Sample),
            Kind::Analyse => Analyse::read(&section, lineage).map(StageKind::Analyse),
            Kind::Evaluate => Evaluate::read(&section, lineage, data).map(StageKind::Evaluate),
        };
        section.finish();
        Some(Self {
            name: called.clone(),
            kind: kind?,
        })
    }
}

fn is_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-';
    (1..=64).contains(&text.len()) && text.chars().all(allowed)
}

/// The file stem, converted to a valid name.
fn name_of(path: &Path) -> String {
    let stem = path
        .file_stem()
        .map(|stem| stem.to_string_lossy().to_ascii_lowercase());
    let letter = |c: char| {
        if is_name(c.encode_utf8(&mut [0; 4])) {
            c
        } else {
            '-'
        }
    };
    let name: String = stem
        .unwrap_or_default()
        .chars()
        .take(64)
        .map(letter)
        .collect();
    if name.is_empty() {
        "recipe".to_owned()
    } else {
        name
    }
}

#[cfg(test)]
pub(super) mod tests;
