//! Converts a value of a document to a Rust type, or reports why it can't.
//!
//! The messages complete a sentence that starts with the key, which
//! [`Section`](super::reader::Section) prepends.

use std::fmt::{self, Display};
use std::ops::{Bound, RangeBounds, RangeInclusive};

use super::diagnostic::Diagnostic;
use super::{Node, Value};

impl Display for Value {
    /// As in TOML, but text without quotes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = |f: &mut fmt::Formatter<'_>, ends: [&str; 2], items: Vec<String>| {
            write!(f, "{}{}{}", ends[0], items.join(", "), ends[1])
        };
        match self {
            Self::String(text) => f.write_str(text),
            Self::Integer(number) => number.fmt(f),
            Self::Float(number) => number.fmt(f),
            Self::Boolean(truth) => truth.fmt(f),
            Self::Datetime => f.write_str("a date or time"),
            Self::Array(items) => {
                let items = items.iter().map(|item| item.value.to_string()).collect();
                all(f, ["[", "]"], items)
            }
            Self::Table(table) => {
                let items = table
                    .iter()
                    .map(|(key, entry)| format!("{key} = {}", entry.node.value))
                    .collect();
                all(f, ["{ ", " }"], items)
            }
        }
    }
}

/// An integer type of a field.
pub trait Number: Copy + PartialOrd + Display + TryFrom<i64> {}

impl<T: Copy + PartialOrd + Display + TryFrom<i64>> Number for T {}

impl Node {
    /// A mistake about this value.
    #[must_use]
    pub fn fault(&self, message: impl Into<String>) -> Diagnostic {
        Diagnostic::new(&self.origin, message)
    }

    /// The mistake that the value is not what was `expected`.
    #[must_use]
    pub fn mismatch(&self, expected: &str) -> Diagnostic {
        self.fault(format!("expected {expected}, found {}", self.value.kind()))
    }

    /// The value as a string.
    ///
    /// # Errors
    ///
    /// If it is something else.
    pub fn string(&self) -> Result<&str, Diagnostic> {
        match &self.value {
            Value::String(text) => Ok(text),
            _ => Err(self.mismatch("a string")),
        }
    }

    /// The value as `true` or `false`.
    ///
    /// # Errors
    ///
    /// If it is something else.
    pub fn boolean(&self) -> Result<bool, Diagnostic> {
        match self.value {
            Value::Boolean(truth) => Ok(truth),
            _ => Err(self.mismatch("a boolean")),
        }
    }

    /// The value as an integer within `range`.
    ///
    /// # Errors
    ///
    /// If it is something else or lies outside.
    pub fn integer<T: Number>(&self, range: &RangeInclusive<T>) -> Result<T, Diagnostic> {
        let Value::Integer(found) = self.value else {
            return Err(self.mismatch("an integer"));
        };
        T::try_from(found)
            .ok()
            .filter(|number| range.contains(number))
            .ok_or_else(|| {
                let (low, high) = (range.start(), range.end());
                self.fault(format!("must be between {low} and {high}, found {found}"))
            })
    }

    /// The value as a finite number within `range`.
    ///
    /// # Errors
    ///
    /// If it is something else or lies outside.
    pub fn float(&self, range: &impl RangeBounds<f64>) -> Result<f64, Diagnostic> {
        let found = match self.value {
            Value::Float(number) => number,
            Value::Integer(number) => number as f64,
            _ => return Err(self.mismatch("a number")),
        };
        if found.is_finite() && range.contains(&found) {
            return Ok(found);
        }
        Err(self.fault(format!("must be {}, found {found}", describe(range))))
    }

    /// The value as one of the listed names.
    ///
    /// # Errors
    ///
    /// If it is something else.
    pub fn choice<T: Copy>(&self, choices: &[(&str, T)]) -> Result<T, Diagnostic> {
        let found = self.string()?;
        let chosen = choices.iter().find(|(name, _)| *name == found);
        chosen.map(|&(_, value)| value).ok_or_else(|| {
            let names = choices.iter().map(|(name, _)| *name);
            let listed: Vec<_> = names.clone().map(|name| format!("{name:?}")).collect();
            self.fault(format!(
                "expected one of {}, found {found:?}",
                listed.join(", ")
            ))
            .suggesting(found, names)
        })
    }

    /// The value as a list of exactly two items, each read by `parse`.
    ///
    /// # Errors
    ///
    /// If it is something else. `expected` names the list, as in "two numbers".
    pub fn pair<T>(
        &self,
        expected: &str,
        parse: impl Fn(&Node) -> Result<T, Diagnostic>,
    ) -> Result<[T; 2], Diagnostic> {
        match &self.value {
            Value::Array(items) => match items.as_slice() {
                [first, second] => Ok([parse(first)?, parse(second)?]),
                _ => Err(self.fault(format!(
                    "expected a list of {expected}, found a list of {}",
                    items.len()
                ))),
            },
            _ => Err(self.mismatch(&format!("a list of {expected}"))),
        }
    }
}

pub(super) fn describe(range: &impl RangeBounds<f64>) -> String {
    let low = match range.start_bound() {
        Bound::Included(low) => Some(format!("at least {low}")),
        Bound::Excluded(low) => Some(format!("above {low}")),
        Bound::Unbounded => None,
    };
    let high = match range.end_bound() {
        Bound::Included(high) => Some(format!("at most {high}")),
        Bound::Excluded(high) => Some(format!("below {high}")),
        Bound::Unbounded => None,
    };
    match (low, high) {
        (Some(low), Some(high)) => format!("{low} and {high}"),
        (Some(only), None) | (None, Some(only)) => format!("{only} and finite"),
        (None, None) => "finite".to_owned(),
    }
}
