//! A recipe as written: a tree of values with their origins.
//!
//! Overrides from the command line are applied to this tree before it is read into types, so that
//! every value is checked in the same way, and mistakes are reported at their origin.

pub mod diagnostic;
mod overrides;
pub mod reader;
pub mod values;

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};
use toml_parser::Source;
use toml_parser::lexer::TokenKind;

use self::diagnostic::{Diagnostic, Diagnostics, Origin};
use self::overrides::{assign, place};

/// A value and where it was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// The value itself.
    pub value: Value,
    /// Where it was written. That of a `[table]` is its header.
    pub origin: Origin,
}

/// A TOML value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A string in any of the four notations.
    String(String),
    /// An integer in any radix.
    Integer(i64),
    /// A float, which may be infinite or not a number.
    Float(f64),
    /// `true` or `false`.
    Boolean(bool),
    /// A date or a time, whose value is dropped, since no key takes one.
    Datetime,
    /// An array, or an array of tables.
    Array(Vec<Node>),
    /// A table, inline or under a header.
    Table(Table),
}

impl Value {
    /// The type with its article, for messages.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::String(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Boolean(_) => "a boolean",
            Self::Datetime => "a date or time",
            Self::Array(_) => "a list",
            Self::Table(_) => "a table",
        }
    }
}

/// The entries of a table by key.
pub type Table = BTreeMap<String, Entry>;

/// A key and its value.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Where the key was written.
    pub key: Origin,
    /// The value.
    pub node: Node,
}

/// The string under `key`, if there is one.
#[must_use]
pub fn string_in<'t>(table: &'t Table, key: &str) -> Option<&'t str> {
    match &table.get(key)?.node.value {
        Value::String(text) => Some(text),
        _ => None,
    }
}

/// The name of a stage: its `name`, or else its `kind`.
#[must_use]
pub fn title(table: &Table) -> Option<&str> {
    string_in(table, "name").or_else(|| string_in(table, "kind"))
}

/// Most bytes of a recipe; the longest recipe has about a hundredth of that.
pub const MOST_BYTES: usize = 1 << 20;

/// Most brackets that may be open at once; recipes need four.
const MOST_OPEN: usize = 64;

/// Where more brackets are open than [`MOST_OPEN`], if anywhere.
///
/// The parser calls itself for each open bracket. It bounds that by counting brackets of both
/// kinds as one, so that `{ ]` repeated is no depth to it, and overflows the stack.
fn too_deep(source: &str) -> Option<usize> {
    let (mut square, mut curly) = (0usize, 0usize);
    let mut tokens = Source::new(source).lex();
    let token = tokens.find(|token| {
        match token.kind() {
            TokenKind::LeftSquareBracket => square += 1,
            TokenKind::RightSquareBracket => square = square.saturating_sub(1),
            TokenKind::LeftCurlyBracket => curly += 1,
            TokenKind::RightCurlyBracket => curly = curly.saturating_sub(1),
            _ => {}
        }
        square > MOST_OPEN || curly > MOST_OPEN
    });
    token.map(|token| token.span().start())
}

/// A recipe as written, with the overrides of the command line.
#[derive(Clone, Debug)]
pub struct Document {
    path: PathBuf,
    source: String,
    root: Node,
    refused: Vec<Diagnostic>,
}

impl Document {
    /// Parses TOML. `path` is only for messages.
    ///
    /// # Errors
    ///
    /// Every syntax error, with its place; and when the text is far longer than any recipe.
    pub fn parse(path: &Path, source: &str) -> Result<Self, Diagnostics> {
        if source.len() > MOST_BYTES {
            let message =
                format!("expected a recipe, of at most {MOST_BYTES} bytes; found a longer text");
            let start = Origin::Span { start: 0, end: 0 };
            return Err(Diagnostics::new(
                path,
                "",
                vec![Diagnostic::new(&start, message)],
            ));
        }
        let span = |span: Range<usize>| Origin::Span {
            start: span.start,
            end: span.end,
        };
        if let Some(at) = too_deep(source) {
            let message = format!("more than {MOST_OPEN} brackets are open here");
            let fault = Diagnostic::new(&span(at..at + 1), message);
            return Err(Diagnostics::new(path, source, vec![fault]));
        }
        let (table, errors) = DeTable::parse_recoverable(source);
        let (mut faults, mut known) = (Vec::new(), HashSet::new());
        for error in errors {
            let place = error.span().unwrap_or(0..0);
            // An unclosed bracket is reported again for each level of nesting.
            if known.insert((place.start, place.end, error.message().to_owned())) {
                faults.push(Diagnostic::new(&span(place), error.message()));
            }
        }
        let origin = span(table.span());
        let value = own(
            DeValue::Table(table.into_inner()),
            &origin,
            &span,
            &mut faults,
        );
        if !faults.is_empty() {
            return Err(Diagnostics::new(path, source, faults));
        }
        Ok(Self {
            path: path.to_owned(),
            source: source.to_owned(),
            root: Node { value, origin },
            refused: Vec::new(),
        })
    }

    /// Applies one override from the command line, `path.to.key=value`.
    ///
    /// The value is TOML; text that is not valid TOML is a string, so that quotes need not survive
    /// the shell. In a list, a segment of the path is an index or, in a list of tables, the `name`
    /// of one (or else its `kind`): `stage.1.steps=10`, `stage.prune.steps=10`.
    ///
    /// An override that cannot be applied is kept, and reported with the other mistakes of the
    /// recipe by [`Recipe::from_document`](super::schema::Recipe::from_document).
    pub fn set(&mut self, assignment: &str) {
        self.set_by(&format!("--set {assignment}"), assignment);
    }

    /// As [`set`](Self::set), for an override that was given as `flag`.
    pub fn set_by(&mut self, flag: &str, assignment: &str) {
        let origin = Origin::Flag(flag.to_owned());
        if let Err(fault) = assign(&mut self.root, assignment, &origin) {
            self.refused.push(fault);
        }
    }

    /// Replaces the value of a key, which is written as for [`set`](Self::set).
    ///
    /// # Errors
    ///
    /// When there is no such place, at the value's own.
    pub fn put(&mut self, key: &str, node: &Node) -> Result<(), Diagnostic> {
        place(&mut self.root, key, node.clone())
    }

    /// Removes a key of the top level, if it is there.
    pub fn remove(&mut self, key: &str) {
        if let Value::Table(table) = &mut self.root.value {
            table.remove(key);
        }
    }

    /// Keeps the stages of these names. A list of them is at `origin`.
    ///
    /// # Errors
    ///
    /// When there is no stage of one of the names.
    pub fn keep_stages(&mut self, names: &[String], origin: &Origin) -> Result<(), Diagnostic> {
        let Value::Table(table) = &mut self.root.value else {
            return Ok(());
        };
        let Some(Value::Array(stages)) = table.get_mut("stage").map(|entry| &mut entry.node.value)
        else {
            return Ok(());
        };
        let titles: Vec<&str> = stages
            .iter()
            .filter_map(table_of)
            .filter_map(title)
            .collect();
        if let Some(name) = names.iter().find(|name| !titles.contains(&name.as_str())) {
            let message = format!("no stage is called `{name}`");
            return Err(Diagnostic::new(origin, message).suggesting(name, titles));
        }
        stages.retain(|stage| {
            let title = table_of(stage).and_then(title);
            title.is_some_and(|title| names.iter().any(|name| name == title))
        });
        Ok(())
    }

    /// The path of the recipe.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The top-level table.
    #[must_use]
    pub fn root(&self) -> &Node {
        &self.root
    }

    /// The overrides that could not be applied.
    #[must_use]
    pub fn refused(&self) -> &[Diagnostic] {
        &self.refused
    }

    /// Mistakes of this document, ready to show.
    #[must_use]
    pub fn diagnostics(&self, items: Vec<Diagnostic>) -> Diagnostics {
        Diagnostics::new(&self.path, &self.source, items)
    }
}

/// Copies a parsed value out of the source, keeping its place. `place` turns a span into an origin.
fn own(
    value: DeValue<'_>,
    origin: &Origin,
    place: &impl Fn(Range<usize>) -> Origin,
    faults: &mut Vec<Diagnostic>,
) -> Value {
    let node = |item: Spanned<DeValue<'_>>, faults: &mut Vec<Diagnostic>| {
        let origin = place(item.span());
        Node {
            value: own(item.into_inner(), &origin, place, faults),
            origin,
        }
    };
    match value {
        DeValue::String(text) => Value::String(text.into_owned()),
        DeValue::Integer(digits) => {
            let number = i64::from_str_radix(digits.as_str(), digits.radix());
            Value::Integer(number.unwrap_or_else(|_| {
                faults.push(Diagnostic::new(origin, "this integer does not fit 64 bits"));
                0
            }))
        }
        // Rust parses all of TOML's floats; every range refuses the fallback.
        DeValue::Float(digits) => Value::Float(digits.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(truth) => Value::Boolean(truth),
        DeValue::Datetime(_) => Value::Datetime,
        DeValue::Array(items) => {
            Value::Array(items.into_iter().map(|item| node(item, faults)).collect())
        }
        DeValue::Table(entries) => {
            let entry = |(key, item): (Spanned<_>, _)| {
                let place = place(key.span());
                let key: std::borrow::Cow<'_, str> = key.into_inner();
                (
                    key.into_owned(),
                    Entry {
                        key: place,
                        node: node(item, faults),
                    },
                )
            };
            Value::Table(entries.into_iter().map(entry).collect())
        }
    }
}

fn table_of(node: &Node) -> Option<&Table> {
    match &node.value {
        Value::Table(table) => Some(table),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::overrides::descend;
    use super::*;

    const RECIPE: &str = "seed = 1\n\
        [[stage]]\nkind = \"prune\"\ntau = [4.0, 0.1]\n\
        [[stage]]\nkind = \"prune\"\nname = \"oracle\"\n\
        [[stage]]\nkind = \"train\"\nname = \"teacher\"\n[stage.architecture]\nwidth = 64\n";

    fn document() -> Document {
        Document::parse(Path::new("x.toml"), RECIPE).unwrap()
    }

    /// The value at a path, in `Debug` form, and whether it came from a flag.
    fn look(document: &Document, path: &str) -> String {
        let mut node = document.root().clone();
        let path: Vec<&str> = path.split('.').collect();
        for depth in 1..=path.len() {
            let none = Origin::Flag(String::new());
            node = descend(&mut node, &path[..depth], &none).unwrap().clone();
        }
        format!(
            "{:?} {}",
            node.value,
            matches!(node.origin, Origin::Flag(_))
        )
    }

    fn refusal(assignment: &str) -> Diagnostic {
        let mut document = document();
        document.set(assignment);
        assert_eq!(document.refused().len(), 1, "{assignment} was accepted");
        document.refused()[0].clone()
    }

    #[test]
    fn spans_lead_back_to_the_source() {
        let document = document();
        let Value::Table(table) = &document.root().value else {
            panic!("not a table")
        };
        let text = |origin: &Origin| match origin {
            &Origin::Span { start, end } => &RECIPE[start..end],
            Origin::Flag(_) => panic!("not a span"),
        };
        assert_eq!(
            (text(&table["seed"].key), text(&table["seed"].node.origin)),
            ("seed", "1")
        );
        let Value::Array(stages) = &table["stage"].node.value else {
            panic!("not an array")
        };
        assert_eq!(text(&stages[2].origin), "[[stage]]");
    }

    #[test]
    fn every_syntax_error_is_reported_with_its_place() {
        let broken = "a = \nb = 1\nb = 2\n";
        let shown = Document::parse(Path::new("x.toml"), broken)
            .unwrap_err()
            .to_string();
        assert!(shown.contains("x.toml:1:5: "), "{shown}");
        assert!(shown.contains("x.toml:3:1: duplicate key"), "{shown}");
    }

    #[test]
    fn hostile_syntax_does_not_overflow() {
        for text in [
            "a = ".to_owned() + &"[".repeat(20_000),
            "a = 99999999999999999999".to_owned(),
        ] {
            assert!(Document::parse(Path::new("x.toml"), &text).is_err());
        }
    }

    #[test]
    fn overrides_take_indices_names_and_kinds() {
        let mut document = document();
        for (assignment, path, expected) in [
            ("seed=7", "seed", "Integer(7) true"),
            ("stage.0.steps=10", "stage.0.steps", "Integer(10) true"),
            ("stage.prune.lr = 1e-3", "stage.0.lr", "Float(0.001) true"),
            ("stage.oracle.keep=6", "stage.1.keep", "Integer(6) true"),
            ("stage.train.batch=2", "stage.2.batch", "Integer(2) true"),
            (
                "stage.teacher.architecture.width=8",
                "stage.2.architecture.width",
                "Integer(8) true",
            ),
            ("stage.prune.tau.1=0.5", "stage.0.tau.1", "Float(0.5) true"),
        ] {
            document.set(assignment);
            assert_eq!(look(&document, path), expected);
        }
        assert!(document.refused().is_empty());
        assert_eq!(look(&document, "stage.0.tau.0"), "Float(4.0) false");
    }

    #[test]
    fn brackets_may_not_be_open_without_end() {
        let parse = |text: &str| {
            Document::parse(Path::new("x.toml"), text).map_err(|error| error.to_string())
        };
        // The parser's own bound counts the closed square bracket for the open curly one.
        for part in [
            "architecture = { [[stage]]\nkind = 'train'\n",
            "a = { ]\n",
            "a = [ }\n",
        ] {
            let error = parse(&part.repeat(20_000)).unwrap_err();
            assert!(error.contains("brackets are open here"), "{error}");
        }
        let mut document = document();
        document.set(&format!("seed={}", "{a=[}".repeat(20_000)));
        assert!(look(&document, "seed").starts_with("String"));
        // Brackets in strings and comments are none, and closed ones are closed.
        let brackets = "[{".repeat(100);
        let texts = [
            format!("a = \"{brackets}\\\"{brackets}\"\nb = '{brackets}'\n# {brackets}\n"),
            format!("a = \"\"\"{brackets}\n\\\"\"\"\"\nb = '''{brackets}\n'''\n"),
            format!("a = \"\"\"x\"\"\"\"\"\nb = \"{brackets}\"\n"),
            (0..100).map(|i| format!("a{i} = [{{}}]\n")).collect(),
        ];
        for text in texts {
            assert!(parse(&text).is_ok(), "{text}");
        }
    }

    #[test]
    fn an_override_that_is_not_toml_is_a_string() {
        let mut document = document();
        for (assignment, expected) in [
            ("seed=1:2", "String(\"1:2\") true"),
            ("seed=kd", "String(\"kd\") true"),
            ("seed='kd'", "String(\"kd\") true"),
            ("seed=a=b", "String(\"a=b\") true"),
            ("seed=", "String(\"\") true"),
            ("seed=true", "Boolean(true) true"),
        ] {
            document.set(assignment);
            assert_eq!(look(&document, "seed"), expected);
        }
    }

    #[test]
    fn overrides_need_a_parent() {
        let fault = refusal("stage.orcale.keep=1");
        assert_eq!(fault.message, "there is no `stage.orcale` in the recipe");
        assert_eq!(fault.suggestion.as_deref(), Some("oracle"));
        assert_eq!(
            fault.origin,
            Origin::Flag("--set stage.orcale.keep=1".to_owned())
        );

        assert_eq!(
            refusal("stgae.0.keep=1").suggestion.as_deref(),
            Some("stage")
        );
        assert_eq!(
            refusal("stage.9.keep=1").message,
            "there is no `stage.9` in the recipe"
        );
        assert_eq!(
            refusal("stage.9={}").message,
            "there is no `stage.9` in the recipe"
        );
        assert_eq!(
            refusal("seed.x=1").message,
            "`seed` is an integer, which has no `x`"
        );
        assert_eq!(refusal("seed").message, "expected `key=value`");
        assert_eq!(refusal("stage..x=1").message, "a part of the key is empty");
        assert_eq!(
            refusal("seed=99999999999999999999").message,
            "this integer does not fit 64 bits"
        );
    }

    #[test]
    fn a_kind_that_occurs_twice_names_no_stage() {
        let text = "[[stage]]\nkind = 'prune'\nname = 'a'\n[[stage]]\nkind = 'prune'\nname = 'b'";
        let mut document = Document::parse(Path::new("x.toml"), text).unwrap();
        document.set("stage.prune.steps=1");
        let fault = &document.refused()[0];
        assert_eq!(fault.message, "there is no `stage.prune` in the recipe");
    }
}
