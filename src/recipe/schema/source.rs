//! Sources of a stage's checkpoint.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::{Serialize, Serializer};

use crate::models::Architecture;
use crate::process::ProcessKind;
use crate::recipe::document::diagnostic::Diagnostic;
use crate::recipe::document::reader::Section;
use crate::recipe::document::{Node, Table, Value};
use crate::recipe::published::public_file;
use crate::weights::{EmbeddedName, Stated, WeightFile};

/// Attention heads that a recipe can state.
pub(crate) const HEADS: RangeInclusive<usize> = 1..=1024;

const EMBEDDED: &str = "embedded:";

/// A checkpoint that a stage reads: a string, or a table for a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The checkpoint of an earlier stage, by the stage's name.
    Stage(String),
    /// An embedded checkpoint: `embedded:` and its name.
    Embedded(EmbeddedName),
    /// A file, or a folder with a model.
    File(FileSource),
}

/// A checkpoint file of any kind in [`WeightFile`], or a folder; a relative path starts at the
/// working directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSource {
    /// Its path.
    pub path: PathBuf,
    /// The recipe's statements about it.
    pub stated: Stated,
}

impl From<PathBuf> for FileSource {
    fn from(path: PathBuf) -> Self {
        Self {
            path,
            stated: Stated::default(),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stage(name) => f.write_str(name),
            Self::Embedded(name) => f.write_str(name.as_str()),
            Self::File(file) => file.path.display().fmt(f),
        }
    }
}

impl Serialize for Source {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Table<'a> {
            path: String,
            #[serde(flatten)]
            stated: &'a Stated,
        }
        match self {
            Self::File(file) if file.stated != Stated::default() => Table {
                path: self.to_string(),
                stated: &file.stated,
            }
            .serialize(serializer),
            _ => serializer.collect_str(self),
        }
    }
}

/// A stage as the other stages see it.
#[derive(Clone, Debug)]
pub struct Listing {
    /// The stage's name.
    pub name: String,
    /// Whether it makes a checkpoint.
    pub makes_checkpoint: bool,
}

/// A stage's place in the recipe, which determines its possible sources.
#[derive(Clone, Copy, Debug)]
pub struct Lineage<'a> {
    earlier: &'a [Listing],
    rest: &'a [Listing],
}

impl<'a> Lineage<'a> {
    /// The place of the stage at `index` in `stages`.
    #[must_use]
    pub fn new(stages: &'a [Listing], index: usize) -> Self {
        let (earlier, rest) = stages.split_at(index.min(stages.len()));
        Self { earlier, rest }
    }

    /// The nearest earlier stage that makes a checkpoint.
    #[must_use]
    pub fn nearest(self) -> Option<Source> {
        self.checkpoints()
            .next_back()
            .map(|name| Source::Stage(name.to_owned()))
    }

    /// The key `from`; default: the nearest earlier checkpoint.
    #[must_use]
    pub fn from(self, section: &Section<'_>) -> Option<Source> {
        let field = section.value("from", |node| self.source(node));
        match self.nearest() {
            Some(nearest) => Some(field.or(nearest)),
            None => field.required_since("no earlier stage makes a checkpoint"),
        }
    }

    /// Reads a source: an earlier stage, an embedded checkpoint or a file.
    ///
    /// # Errors
    ///
    /// If the string names none of these, a stage that cannot be used, or a file that does not
    /// exist.
    pub fn source(self, node: &Node) -> Result<Source, Diagnostic> {
        if let Value::Table(table) = &node.value {
            return file(node, table).map(Source::File);
        }
        let Value::String(text) = &node.value else {
            return Err(node.mismatch("a string or a table with `path`"));
        };
        let text = text.as_str();
        let embedded = EmbeddedName::ALL.map(EmbeddedName::as_str);
        if let Some(name) = EmbeddedName::ALL
            .into_iter()
            .find(|name| name.as_str() == text)
        {
            return Ok(Source::Embedded(name));
        }
        if text.starts_with(EMBEDDED) {
            let fault = node.fault(format!("there is no embedded checkpoint {text:?}"));
            return Err(fault.suggesting(text, embedded));
        }
        if let Some(stage) = self.earlier.iter().find(|stage| stage.name == text) {
            return if stage.makes_checkpoint {
                Ok(Source::Stage(text.to_owned()))
            } else {
                Err(node.fault(format!("stage {text:?} makes no checkpoint")))
            };
        }
        if self.rest.iter().any(|stage| stage.name == text) {
            let message = format!("stage {text:?} does not run before this one");
            return Err(node.fault(message));
        }
        let path = PathBuf::from(text);
        if path.is_dir() || WeightFile::of(&path).is_some() || public_file(&path).is_some() {
            return there(node, FileSource::from(path)).map(Source::File);
        }
        let message = format!(
            "{text:?} is not an earlier stage, an embedded checkpoint, or a path ending in {}",
            WeightFile::ENDINGS.join(", ")
        );
        Err(node
            .fault(message)
            .suggesting(text, self.checkpoints().chain(embedded)))
    }

    fn checkpoints(self) -> impl DoubleEndedIterator<Item = &'a str> {
        let makers = self.earlier.iter().filter(|stage| stage.makes_checkpoint);
        makers.map(|stage| stage.name.as_str())
    }
}

/// Refuses a missing file, unless its content is known: such a recipe can still be planned.
fn there(node: &Node, file: FileSource) -> Result<FileSource, Diagnostic> {
    if file.path.exists() || file.stated.model.is_some() || public_file(&file.path).is_some() {
        Ok(file)
    } else {
        let path = file.path.display().to_string();
        Err(node.fault(format!("file not found: {path:?}")))
    }
}

/// A file with the recipe's statements about it: `{ path = "x.pt", weights_key = "model" }`.
fn file(node: &Node, table: &Table) -> Result<FileSource, Diagnostic> {
    const KEYS: [&str; 5] = ["path", "weights_key", "heads", "model", "process"];
    if let Some((key, entry)) = table.iter().find(|(key, _)| !KEYS.contains(&key.as_str())) {
        let fault = Diagnostic::new(&entry.key, format!("unknown key `{}`", key.escape_debug()));
        return Err(fault.suggesting(key, KEYS));
    }
    let entry = |key: &str| table.get(key).map(|entry| &entry.node);
    let text = |key: &str| entry(key).map(Node::string).transpose();
    let path = text("path")?.ok_or_else(|| node.fault("missing key `path`"))?;
    let models: Vec<(&str, &str)> = Architecture::presets().map(|name| (name, name)).collect();
    let model = entry("model")
        .map(|node| node.choice(&models))
        .transpose()?;
    let heads = entry("heads")
        .map(|node| node.integer(&HEADS))
        .transpose()?;
    let process = entry("process")
        .map(|node| {
            let word = node.string()?;
            word.parse::<ProcessKind>().map_err(|why| node.fault(why))
        })
        .transpose()?;
    let stated = Stated {
        weights_key: text("weights_key")?.map(str::to_owned),
        heads,
        heads_otherwise: None,
        process,
        model: model.map(str::to_owned),
    };
    let path = PathBuf::from(path);
    there(node, FileSource { path, stated })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::schema::StageKind;
    use crate::recipe::schema::tests::{errors, messages, second, stage};

    #[test]
    fn sources_must_be_earlier_checkpoints() {
        let sample = "kind = 'sample'\ncount = 1\nfrom = ";
        for (from, message) in [
            (
                "'base2'",
                "`from`: \"base2\" is not an earlier stage, an embedded checkpoint, or a path ending in .safetensors, .safetensors.index.json, .pt, .pth, .bin, .ckpt",
            ),
            (
                "'sample'",
                "`from`: stage \"sample\" does not run before this one",
            ),
            (
                "'late'",
                "`from`: stage \"late\" does not run before this one",
            ),
            (
                "'embedded:x'",
                "`from`: there is no embedded checkpoint \"embedded:x\"",
            ),
            ("'no/such.pt'", "`from`: file not found: \"no/such.pt\""),
            ("{}", "`from`: missing key `path`"),
            (
                "{ path = 'x.pt', key = 'ema' }",
                "`from`: unknown key `key`",
            ),
            (
                "{ path = 'x.pt', heads = 3 }",
                "`from`: file not found: \"x.pt\"",
            ),
            (
                "{ path = 'x.pt', process = 'gauss' }",
                "`from`: expected one of \"gaussian\", \"interpolant\", \"masked\", found \"gauss\"; other interpolants are \
                 interpolant:PATH:PREDICTS:WEIGHTING, of linear, gvp, vp; velocity, noise, score; none, velocity, likelihood",
            ),
            (
                "1",
                "`from`: expected a string or a table with `path`, found an integer",
            ),
        ] {
            let late = "[[stage]]\nkind = 'sample'\nname = 'late'\ncount = 1";
            assert_eq!(
                messages(&stage(&format!("{sample}{from}\n{late}"))),
                [message]
            );
        }
        let after = "kind = 'sample'\ncount = 1\n[[stage]]\nkind = 'evaluate'\ncompare = ['sample', 'bsae']";
        let errors = errors(&stage(after));
        assert_eq!(
            errors.items()[0].message,
            "`compare`: stage \"sample\" makes no checkpoint"
        );
        assert_eq!(errors.items()[1].suggestion.as_deref(), Some("base"));
    }

    #[test]
    fn the_nearest_checkpoint_is_the_default_source() {
        let StageKind::Sample(sample) = second("kind = 'sample'\ncount = 1") else {
            panic!()
        };
        assert_eq!(sample.from, Source::Stage("base".to_owned()));
        let listing = |name: &str, makes_checkpoint| Listing {
            name: name.to_owned(),
            makes_checkpoint,
        };
        let stages = [("a", true), ("b", true), ("c", false), ("d", true)]
            .map(|(name, makes_checkpoint)| listing(name, makes_checkpoint));
        let nearest = |index| Lineage::new(&stages, index).nearest();
        assert_eq!(nearest(0), None);
        assert_eq!(nearest(3), Some(Source::Stage("b".to_owned())));
        assert_eq!(
            messages("[[stage]]\nkind = 'sample'\ncount = 1"),
            ["missing key `from` in [[stage]] \"sample\": no earlier stage makes a checkpoint"]
        );
    }

    #[test]
    fn a_source_can_be_a_file() {
        let path =
            std::env::temp_dir().join(format!("tinyfusion-schema-{}.PT", std::process::id()));
        std::fs::write(&path, []).unwrap();
        let text = format!(
            "kind = 'sample'\ncount = 1\nfrom = {:?}",
            path.to_str().unwrap()
        );
        let StageKind::Sample(sample) = second(&text) else {
            panic!()
        };
        std::fs::remove_file(&path).unwrap();
        assert_eq!(sample.from, Source::File(path.into()));
    }
}
