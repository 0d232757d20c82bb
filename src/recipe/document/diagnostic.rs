//! Mistakes in a recipe, with their places.
//!
//! Reading a recipe does not stop at the first mistake, so that all can be corrected at once: each
//! becomes a [`Diagnostic`] with the place of the wrong value, in the file or on the command line,
//! and all are shown together.

use std::fmt;
use std::path::{Path, PathBuf};

/// Where a key or a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// In the recipe: byte offsets, `end` exclusive.
    Span {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
    },
    /// On the command line, the flag in full: `--set seed=1`.
    Flag(String),
}

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Its place.
    pub origin: Origin,
    /// What is wrong, in one line.
    pub message: String,
    /// What was probably meant.
    pub suggestion: Option<String>,
}

impl Diagnostic {
    /// A mistake without a suggestion.
    pub fn new(origin: &Origin, message: impl Into<String>) -> Self {
        Self {
            origin: origin.clone(),
            message: message.into(),
            suggestion: None,
        }
    }

    /// The same mistake, suggesting the one of `candidates` that is closest to `written`, if any is
    /// close.
    #[must_use]
    pub fn suggesting<'c>(
        mut self,
        written: &str,
        candidates: impl IntoIterator<Item = &'c str>,
    ) -> Self {
        self.suggestion = nearest(written, candidates).map(str::to_owned);
        self
    }
}

/// Longest word that is compared, because the time grows with the product of both lengths; longer
/// words are no typing errors.
const LONGEST: usize = 200;

/// The candidate closest to `written`, if the edits are at most a third of its length, as in cargo.
fn nearest<'c>(written: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    if written.len() > LONGEST {
        return None;
    }
    let limit = written.chars().count().max(3) / 3;
    candidates
        .into_iter()
        .filter(|candidate| candidate.len() <= 2 * LONGEST)
        .map(|candidate| (strsim::damerau_levenshtein(written, candidate), candidate))
        .filter(|&(distance, _)| distance <= limit)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| candidate)
}

/// Most mistakes that are shown one by one.
const SHOWN: usize = 100;

/// All mistakes of a recipe, with its text to show them in place.
///
/// Displayed, each reads
///
/// ```text
/// recipes/quickstart.toml:12:1: unknown key `stpes` in [[stage]] "prune"
///    12 | stpes = 100
///       | ^^^^^
///       = did you mean `steps`?
/// ```
#[derive(Clone, Debug)]
pub struct Diagnostics {
    path: PathBuf,
    source: String,
    items: Vec<Diagnostic>,
}

impl Diagnostics {
    /// Sorts `items` by position; those of the command line come last, in the given order.
    #[must_use]
    pub fn new(path: &Path, source: &str, mut items: Vec<Diagnostic>) -> Self {
        items.sort_by_key(|item| match item.origin {
            Origin::Span { start, .. } => start,
            Origin::Flag(_) => usize::MAX,
        });
        Self {
            path: path.to_owned(),
            source: source.to_owned(),
            items,
        }
    }

    /// The mistakes, in display order.
    #[must_use]
    pub fn items(&self) -> &[Diagnostic] {
        &self.items
    }

    fn write_one(&self, f: &mut fmt::Formatter<'_>, item: &Diagnostic) -> fmt::Result {
        match &item.origin {
            Origin::Flag(flag) => write!(f, "{flag}: {}", item.message)?,
            &Origin::Span { start, end } => {
                let Excerpt {
                    line,
                    column,
                    text,
                    indent,
                    underline,
                } = Excerpt::new(&self.source, start, end);
                let path = self.path.display();
                writeln!(f, "{path}:{line}:{column}: {}", item.message)?;
                writeln!(f, "{line:>5} | {text}")?;
                write!(f, "      | {indent}{underline}")?;
            }
        }
        match &item.suggestion {
            Some(suggestion) => write!(f, "\n      = did you mean `{suggestion}`?"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, item) in self.items.iter().take(SHOWN).enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            self.write_one(f, item)?;
        }
        match self.items.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "\nand {more} more"),
        }
    }
}

impl std::error::Error for Diagnostics {}

/// The first line of a span, ready to print.
struct Excerpt {
    line: usize,
    column: usize,
    text: String,
    indent: String,
    underline: String,
}

impl Excerpt {
    fn new(source: &str, start: usize, end: usize) -> Self {
        let start = source.floor_char_boundary(start);
        let (before, after) = source.split_at(start);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = after
            .find('\n')
            .map_or(source.len(), |newline| start + newline);
        // A span may cover several lines; only its first is shown.
        let end = source.floor_char_boundary(end).clamp(start, line_end);
        let marked = source[start..end].trim_end_matches('\r').chars().count();
        let lead = &source[line_start..start];
        Self {
            line: before.matches('\n').count() + 1,
            column: lead.chars().count() + 1,
            // The terminal would interpret control characters. Tabs are kept, and repeated in the
            // indent so that the underline is aligned.
            text: source[line_start..line_end]
                .trim_end_matches('\r')
                .replace(|c: char| c.is_control() && c != '\t', "\u{fffd}"),
            indent: lead
                .chars()
                .map(|c| if c == '\t' { c } else { ' ' })
                .collect(),
            underline: "^".repeat(marked.max(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(source: &str, items: Vec<Diagnostic>) -> String {
        Diagnostics::new(Path::new("x.toml"), source, items).to_string()
    }

    fn at(start: usize, end: usize) -> Diagnostic {
        Diagnostic::new(&Origin::Span { start, end }, "wrong")
    }

    #[test]
    fn long_words_are_not_compared() {
        let long = "steps".repeat(LONGEST);
        assert_eq!(nearest("stpes", ["seed", &long, "steps"]), Some("steps"));
        assert_eq!(nearest(&long, [&*long]), None);
    }

    #[test]
    fn points_at_line_and_column() {
        let shown = show("a = 1\n  bé = two\n", vec![at(14, 17)]);
        assert_eq!(
            shown,
            "x.toml:2:8: wrong\n    2 |   bé = two\n      |        ^^^"
        );
    }

    #[test]
    fn sorted_by_position_with_flags_last() {
        let flag = Diagnostic::new(&Origin::Flag("--set b=1".to_owned()), "bad")
            .suggesting("stpes", ["seed", "steps"]);
        let shown = show("a = 1\nb = 2", vec![flag, at(6, 7), at(0, 1)]);
        assert_eq!(
            shown,
            "x.toml:1:1: wrong\n    1 | a = 1\n      | ^\n\
             x.toml:2:1: wrong\n    2 | b = 2\n      | ^\n\
             --set b=1: bad\n      = did you mean `steps`?"
        );
    }

    #[test]
    fn odd_spans_do_no_harm() {
        for (source, start, end) in [
            ("", 0, 0),
            ("", 9, 20),
            ("é", 1, 1),
            ("a\r\n", 1, 3),
            ("a\n", 2, 2),
            ("a", 1, 0),
        ] {
            let shown = show(source, vec![at(start, end)]);
            assert!(shown.ends_with('^'), "{shown}");
        }
    }

    #[test]
    fn a_span_over_several_lines_shows_its_first() {
        assert!(show("a = {\r\n b = 1 }\r\n", vec![at(4, 14)]).ends_with("a = {\n      |     ^"));
    }

    #[test]
    fn control_characters_are_not_printed() {
        assert!(!show("a = \"\u{1b}[31m\"", vec![at(0, 1)]).contains('\u{1b}'));
    }

    #[test]
    fn suggestions_are_close_or_absent() {
        assert_eq!(nearest("stpes", ["seed", "steps"]), Some("steps"));
        assert_eq!(nearest("kepe", ["kept", "keep"]), Some("kept"));
        assert_eq!(nearest("zzz", ["steps"]), None);
    }
}
