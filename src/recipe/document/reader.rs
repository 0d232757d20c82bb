//! Reads typed fields out of a table without stopping at the first mistake.
//!
//! Each method of [`Section`] names a key and its type and returns a [`Field`], which is then
//! [required](Field::required), [optional](Field::optional) or [defaulted](Field::or). Mistakes go
//! to the [`Sink`]; the caller gets `None` or the default and reads on. After the last field,
//! [`Section::finish`] reports the keys that were not read.

use std::cell::RefCell;
use std::fmt::Display;
use std::ops::{Bound, RangeBounds, RangeInclusive};

use super::diagnostic::{Diagnostic, Origin};
use super::values::{Number, describe};
use super::{Node, Table, Value, title};

/// What a key may be.
#[derive(Debug, Clone, PartialEq)]
pub enum ValueForm {
    /// A whole number within a range, both ends counted.
    Integer(String, String),
    /// A number within a range, in words and by its ends; `true` where an end itself is left out.
    Float(String, [Option<(f64, bool)>; 2]),
    /// `true` or `false`.
    Boolean,
    /// Text.
    Text,
    /// One of these words.
    Choice(Vec<String>),
    /// A list with at least one item.
    List(Box<ValueForm>),
    /// Two of the same.
    Pair(Box<ValueForm>),
    /// A table.
    Table,
    /// Something that its meaning describes.
    Other,
}

/// A key that was asked for in a table.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// The table, as messages call it.
    pub table: String,
    /// The key.
    pub key: &'static str,
    /// What it may be.
    pub form: ValueForm,
}

/// Collects mistakes and, where somebody wants to list them, the keys that are asked for.
#[derive(Debug, Default)]
pub struct Sink {
    faults: RefCell<Vec<Diagnostic>>,
    asked: Option<RefCell<Vec<Asked>>>,
}

impl Sink {
    /// A sink that already holds `faults`.
    #[must_use]
    pub fn new(faults: Vec<Diagnostic>) -> Self {
        Self {
            faults: RefCell::new(faults),
            asked: None,
        }
    }

    /// A sink that notes the keys asked for.
    #[must_use]
    pub fn listing() -> Self {
        Self {
            faults: RefCell::default(),
            asked: Some(RefCell::default()),
        }
    }

    /// Adds a mistake.
    pub fn push(&self, fault: Diagnostic) {
        self.faults.borrow_mut().push(fault);
    }

    /// All mistakes.
    #[must_use]
    pub fn into_faults(self) -> Vec<Diagnostic> {
        self.faults.into_inner()
    }

    /// The keys that were asked for, in order; none unless it was made for
    /// [listing](Self::listing).
    #[must_use]
    pub fn into_asked(self) -> Vec<Asked> {
        self.asked.map(RefCell::into_inner).unwrap_or_default()
    }
}

/// A table being read.
#[derive(Debug)]
pub struct Section<'a> {
    label: String,
    header: &'a Origin,
    table: &'a Table,
    sink: &'a Sink,
    accepted: RefCell<Vec<&'static str>>,
    refused: RefCell<Vec<&'static str>>,
}

impl<'a> Section<'a> {
    /// Reads `node`, named `label` in messages.
    ///
    /// # Errors
    ///
    /// If it is not a table.
    pub fn new(label: String, node: &'a Node, sink: &'a Sink) -> Result<Self, Diagnostic> {
        let Value::Table(table) = &node.value else {
            return Err(node.mismatch("a table"));
        };
        Ok(Self {
            label,
            header: &node.origin,
            table,
            sink,
            accepted: RefCell::default(),
            refused: RefCell::default(),
        })
    }

    /// Where the table was written.
    pub fn header(&self) -> &Origin {
        self.header
    }

    /// Reports a mistake of something in the table.
    pub fn push(&self, fault: Diagnostic) {
        self.sink.push(fault);
    }

    /// The entries as written.
    #[must_use]
    pub fn table(&self) -> &'a Table {
        self.table
    }

    /// A value read by `parse`. Its errors are reported under the key's name.
    pub fn value<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&'a Node) -> Result<T, Diagnostic>,
    ) -> Field<'_, T> {
        self.formed(key, || ValueForm::Other, parse)
    }

    /// As [`value`](Self::value), of a form that can be described.
    fn formed<T>(
        &self,
        key: &'static str,
        form: impl FnOnce() -> ValueForm,
        parse: impl FnOnce(&'a Node) -> Result<T, Diagnostic>,
    ) -> Field<'_, T> {
        self.accepted.borrow_mut().push(key);
        if let Some(asked) = &self.sink.asked {
            asked.borrow_mut().push(Asked {
                table: self.label.clone(),
                key,
                form: form(),
            });
        }
        let reading = match self.table.get(key) {
            None => Reading::Absent,
            Some(entry) => match parse(&entry.node) {
                Ok(value) => Reading::Read(value, &entry.node.origin),
                Err(fault) => {
                    self.report(key, fault);
                    Reading::Wrong
                }
            },
        };
        Field {
            section: self,
            key,
            reading,
        }
    }

    /// A list with at least one item, each read by `parse`.
    pub fn list<T>(
        &self,
        key: &'static str,
        parse: impl Fn(&'a Node) -> Result<T, Diagnostic>,
    ) -> Field<'_, Vec<T>> {
        self.list_of(key, || ValueForm::Other, parse)
    }

    fn list_of<T>(
        &self,
        key: &'static str,
        form: impl FnOnce() -> ValueForm,
        parse: impl Fn(&'a Node) -> Result<T, Diagnostic>,
    ) -> Field<'_, Vec<T>> {
        let form = || ValueForm::List(Box::new(form()));
        let items = self.formed(key, form, |node| match &node.value {
            Value::Array(items) if items.is_empty() => Err(node.fault("must not be empty")),
            Value::Array(items) => Ok(items),
            _ => Err(node.mismatch("a list")),
        });
        let reading = match items.reading {
            Reading::Absent => Reading::Absent,
            Reading::Wrong => Reading::Wrong,
            Reading::Read(items, origin) => {
                let parsed = items.iter().map(parse).collect::<Vec<_>>();
                let mut values = Vec::with_capacity(parsed.len());
                for item in parsed {
                    match item {
                        Ok(value) => values.push(value),
                        Err(fault) => self.report(key, fault),
                    }
                }
                if values.len() == items.len() {
                    Reading::Read(values, origin)
                } else {
                    Reading::Wrong
                }
            }
        };
        Field {
            section: self,
            key,
            reading,
        }
    }

    /// A string.
    pub fn string(&self, key: &'static str) -> Field<'_, &'a str> {
        self.formed(key, || ValueForm::Text, Node::string)
    }

    /// An integer within `range`.
    pub fn integer<T: Number>(&self, key: &'static str, range: RangeInclusive<T>) -> Field<'_, T> {
        let form = || ValueForm::Integer(range.start().to_string(), range.end().to_string());
        self.formed(key, form, |node| node.integer(&range))
    }

    /// A finite number within `range`; integers are accepted.
    pub fn float(&self, key: &'static str, range: impl RangeBounds<f64>) -> Field<'_, f64> {
        self.formed(key, || float(&range), |node| node.float(&range))
    }

    /// `true` or `false`.
    pub fn boolean(&self, key: &'static str) -> Field<'_, bool> {
        self.formed(key, || ValueForm::Boolean, Node::boolean)
    }

    /// One of the listed names, as the value next to it.
    pub fn choice<T: Copy>(&self, key: &'static str, choices: &[(&str, T)]) -> Field<'_, T> {
        let names = || choices.iter().map(|(name, _)| (*name).to_owned()).collect();
        self.formed(
            key,
            || ValueForm::Choice(names()),
            |node| node.choice(choices),
        )
    }

    /// A list of words, each one of `choices`.
    pub fn choices<T: Copy>(&self, key: &'static str, choices: &[(&str, T)]) -> Field<'_, Vec<T>> {
        let names = || choices.iter().map(|(name, _)| (*name).to_owned()).collect();
        let form = || ValueForm::Choice(names());
        self.list_of(key, form, |node| node.choice(choices))
    }

    /// Two numbers within `range`, such as the start and end of a schedule.
    pub fn float_pair(
        &self,
        key: &'static str,
        range: impl RangeBounds<f64>,
    ) -> Field<'_, [f64; 2]> {
        let form = || ValueForm::Pair(Box::new(float(&range)));
        self.formed(key, form, |node| {
            node.pair("two numbers", |item| item.float(&range))
        })
    }

    /// A list of integers, each within `range`.
    pub fn integers<T: Number>(
        &self,
        key: &'static str,
        range: RangeInclusive<T>,
    ) -> Field<'_, Vec<T>> {
        let form = || ValueForm::Integer(range.start().to_string(), range.end().to_string());
        self.list_of(key, form, |node| node.integer(&range))
    }

    /// A table inside this one.
    pub fn section(&self, key: &'static str) -> Field<'_, Section<'a>> {
        self.formed(
            key,
            || ValueForm::Table,
            |node| Section::new(format!("`{key}` of {}", self.label), node, self.sink),
        )
    }

    /// An array of tables, `[[key]]`, each named by its [`title`].
    pub fn sections(&self, key: &'static str) -> Field<'_, Vec<Section<'a>>> {
        self.list(key, |node| {
            let title = match &node.value {
                Value::Table(table) => title(table),
                _ => None,
            };
            let title = title.map(|title| format!(" {title:?}")).unwrap_or_default();
            Section::new(format!("[[{key}]]{title}"), node, self.sink)
        })
    }

    /// Marks `keys` as known without reading them.
    pub fn accept(&self, keys: &[&'static str]) {
        self.accepted.borrow_mut().extend(keys);
    }

    /// Reports those of `keys` that are present and were not read, because `by` (such as `method
    /// "oracle"`) does not use them.
    pub fn refuse(&self, keys: &[&'static str], by: &str) {
        let accepted = self.accepted.borrow();
        let mut refused = self.refused.borrow_mut();
        for key in keys.iter().filter(|key| !accepted.contains(key)) {
            if let Some(entry) = self.table.get(*key)
                && !refused.contains(key)
            {
                self.sink.push(Diagnostic::new(
                    &entry.key,
                    format!("`{key}` is not used by {by}"),
                ));
            }
            refused.push(key);
        }
    }

    /// Reports a mistake of the table as a whole.
    pub fn fault(&self, message: impl Into<String>) {
        self.sink.push(Diagnostic::new(self.header, message));
    }

    /// Reports every key that was neither read nor refused.
    pub fn finish(self) {
        let accepted = self.accepted.into_inner();
        let refused = self.refused.into_inner();
        let known = |key: &str| accepted.iter().chain(&refused).any(|known| *known == key);
        for (key, entry) in self.table.iter().filter(|(key, _)| !known(key)) {
            let message = format!("unknown key `{}` in {}", key.escape_debug(), self.label);
            let mut fault = Diagnostic::new(&entry.key, message);
            fault = fault.suggesting(key, accepted.iter().copied());
            if fault.suggestion.is_none() {
                let mut keys = accepted.clone();
                keys.sort_unstable();
                fault.message += &format!("; there are {}", keys.join(", "));
            }
            self.sink.push(fault);
        }
    }

    fn report(&self, key: &str, mut fault: Diagnostic) {
        fault.message = format!("`{key}`: {}", fault.message);
        self.sink.push(fault);
    }
}

fn float(range: &impl RangeBounds<f64>) -> ValueForm {
    let end = |bound: Bound<&f64>| match bound {
        Bound::Included(end) => Some((*end, false)),
        Bound::Excluded(end) => Some((*end, true)),
        Bound::Unbounded => None,
    };
    let ends = [end(range.start_bound()), end(range.end_bound())];
    ValueForm::Float(describe(range), ends)
}

/// The result of reading a key.
#[derive(Debug)]
#[must_use = "a field says nothing until it is required, optional or defaulted"]
pub struct Field<'s, T> {
    section: &'s Section<'s>,
    key: &'static str,
    reading: Reading<'s, T>,
}

#[derive(Debug)]
enum Reading<'s, T> {
    Absent,
    /// Present, and reported as wrong.
    Wrong,
    Read(T, &'s Origin),
}

impl<T> Field<'_, T> {
    /// The value; if it is missing, a mistake at the table's header.
    pub fn required(self) -> Option<T> {
        self.demand("")
    }

    /// As [`required`](Self::required), with the reason why it is needed.
    pub fn required_since(self, reason: &str) -> Option<T> {
        self.demand(&format!(": {reason}"))
    }

    fn demand(self, reason: &str) -> Option<T> {
        if self.is_absent() {
            let Section { label, .. } = self.section;
            self.section
                .fault(format!("missing key `{}` in {label}{reason}", self.key));
        }
        self.optional()
    }

    /// The value, if there is one.
    pub fn optional(self) -> Option<T> {
        match self.reading {
            Reading::Read(value, _) => Some(value),
            Reading::Absent | Reading::Wrong => None,
        }
    }

    /// The value, or `default`.
    pub fn or(self, default: T) -> T {
        self.optional().unwrap_or(default)
    }

    /// The value, or `default`; either must satisfy `holds`.
    ///
    /// A default can conflict with the other keys, which is a mistake at the table's header.
    pub fn or_checked(self, default: T, holds: impl Fn(&T) -> bool, message: &str) -> T
    where
        T: Display,
    {
        if self.is_absent() && !holds(&default) {
            let message = format!("`{}`, by default {default}, {message}", self.key);
            self.section.fault(message);
        }
        self.check(holds, message).or(default)
    }

    /// Whether the key is missing, rather than present and wrong.
    pub fn is_absent(&self) -> bool {
        matches!(self.reading, Reading::Absent)
    }

    /// Adds a condition on the value. `message` completes "`key`: ...".
    pub fn check(mut self, holds: impl FnOnce(&T) -> bool, message: &str) -> Self {
        if let Reading::Read(value, origin) = &self.reading
            && !holds(value)
        {
            self.section
                .report(self.key, Diagnostic::new(origin, message));
            self.reading = Reading::Wrong;
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Bound;
    use std::path::Path;

    use super::*;
    use crate::recipe::document::Document;

    /// The mistakes that `read` reports about a table.
    fn faults(text: &str, read: impl FnOnce(&Section<'_>)) -> Vec<String> {
        let document = Document::parse(Path::new("x.toml"), text).unwrap();
        let sink = Sink::default();
        let section = Section::new("the table".to_owned(), document.root(), &sink).unwrap();
        read(&section);
        section.finish();
        sink.into_faults()
            .into_iter()
            .map(|fault| fault.message)
            .collect()
    }

    #[test]
    fn wrong_types_say_what_was_expected_and_found() {
        let text = "a = 'x'\nb = 1\nc = 1\nd = 'x'\ne = [1]\nf = [1, 'x']\ng = 1\nh = 1.5\ni = [1]";
        let faults = faults(text, |s| {
            assert_eq!(s.integer("a", 0..=9).or(3), 3);
            assert_eq!(s.string("b").optional(), None);
            assert_eq!(s.boolean("c").required(), None);
            assert_eq!(s.float("d", ..).required(), None);
            assert_eq!(s.float_pair("e", ..).required(), None);
            assert_eq!(s.integers("f", 0..=9).required(), None);
            assert!(s.section("g").required().is_none());
            assert_eq!(s.integer("h", 0..=9).required(), None);
            assert!(s.sections("i").required().is_none());
        });
        let expected = [
            "`a`: expected an integer, found a string",
            "`b`: expected a string, found an integer",
            "`c`: expected a boolean, found an integer",
            "`d`: expected a number, found a string",
            "`e`: expected a list of two numbers, found a list of 1",
            "`f`: expected an integer, found a string",
            "`g`: expected a table, found an integer",
            "`h`: expected an integer, found a float",
            "`i`: expected a table, found an integer",
        ];
        assert_eq!(faults, expected);
    }

    #[test]
    fn values_out_of_range_say_the_range() {
        let text = "a = 10\nb = -1\nc = 0\nd = 1.0\ne = inf\nf = nan\ng = [1, -1]";
        let faults = faults(text, |s| {
            assert_eq!(s.integer::<usize>("a", 1..=9).required(), None);
            assert_eq!(s.integer::<usize>("b", 0..=9).required(), None);
            s.float("c", (Bound::Excluded(0.0), Bound::Included(1.0)))
                .required();
            s.float("d", 0.0..1.0).required();
            s.float("e", 1.0..).required();
            s.float("f", ..).required();
            s.float_pair("g", 0.0..).required();
        });
        let expected = [
            "`a`: must be between 1 and 9, found 10",
            "`b`: must be between 0 and 9, found -1",
            "`c`: must be above 0 and at most 1, found 0",
            "`d`: must be at least 0 and below 1, found 1",
            "`e`: must be at least 1 and finite, found inf",
            "`f`: must be finite, found NaN",
            "`g`: must be at least 0 and finite, found -1",
        ];
        assert_eq!(faults, expected);
    }

    #[test]
    fn missing_unknown_refused_and_checked_keys() {
        let faults = faults("bacth = 1\nkeep = 2\nwarmup = 9\nlist = []", |s| {
            assert_eq!(s.integer("batch", 1..=9).required(), None);
            assert_eq!(s.integer("rank", 1..=9).required_since("it is"), None);
            assert_eq!(
                s.integer("warmup", 0..=9)
                    .check(|&w| w < 5, "too long")
                    .optional(),
                None
            );
            assert_eq!(s.integers("list", 0..=9).optional(), None);
            s.refuse(&["batch", "keep"], "method \"learned\"");
            s.refuse(&["keep"], "anything else");
        });
        let expected = [
            "missing key `batch` in the table",
            "missing key `rank` in the table: it is",
            "`warmup`: too long",
            "`list`: must not be empty",
            "`keep` is not used by method \"learned\"",
            "unknown key `bacth` in the table",
        ];
        assert_eq!(faults, expected);
    }

    #[test]
    fn choices_list_the_alternatives() {
        let faults = faults("method = 'lerned'", |s| {
            assert_eq!(
                s.choice("method", &[("learned", 1), ("oracle", 2)])
                    .required(),
                None
            );
        });
        let expected = "`method`: expected one of \"learned\", \"oracle\", found \"lerned\"";
        assert_eq!(faults, [expected]);
    }
}
