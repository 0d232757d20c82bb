//! Collects everything that is wrong with a file's tensors for one error.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use super::{TensorSource, WeightsError};

/// Most lines of each kind in the message; a file of another model may have hundreds.
const SHOWN: usize = 8;

/// Tensors that do not fit a model, one line for each.
#[derive(Debug, Default)]
pub(crate) struct Misfits {
    missing: Lines,
    misshapen: Lines,
    surplus: Lines,
    others: Lines,
}

/// Lines of one kind: the first few, and the total number.
#[derive(Debug, Default)]
struct Lines {
    shown: Vec<String>,
    count: usize,
}

impl Lines {
    fn push(&mut self, line: String) {
        if self.count < SHOWN {
            self.shown.push(line);
        }
        self.count += 1;
    }
}

impl Misfits {
    /// Adds a tensor that should be present.
    pub(crate) fn missing(&mut self, name: &str, shape: Option<&[usize]>) {
        let shape = shape.map(|shape| format!(" {shape:?}")).unwrap_or_default();
        self.missing.push(format!("missing   {name}{shape}"));
    }

    /// Adds a tensor that should not be present.
    pub(crate) fn surplus(&mut self, name: &str, shape: &[usize]) {
        self.surplus.push(format!("surplus   {name} {shape:?}"));
    }

    /// Adds any other problem.
    pub(crate) fn other(&mut self, problem: String) {
        self.others.push(problem);
    }

    /// Compares names and shapes with those expected.
    pub(crate) fn compare<'a>(
        &mut self,
        found: &impl TensorSource,
        expected: impl Iterator<Item = (&'a str, &'a [usize])>,
    ) {
        let mut left: BTreeMap<&str, &[usize]> = found.shapes().collect();
        for (name, shape) in expected {
            match left.remove(name) {
                None => self.missing(name, Some(shape)),
                Some(found) if found != shape => self.misshapen.push(format!(
                    "misshapen {name}: expected {shape:?}, found {found:?}"
                )),
                Some(_) => {}
            }
        }
        for (name, shape) in left {
            self.surplus(name, shape);
        }
    }

    /// The error, if there are problems; `path` and `model` are for its message.
    pub(crate) fn into_result(self, path: &Path, model: &str) -> Result<(), WeightsError> {
        let kinds = [
            (self.missing, " missing"),
            (self.misshapen, " misshapen"),
            (self.surplus, " surplus"),
            (self.others, ""),
        ];
        let mut problems = String::new();
        for (lines, kind) in kinds {
            for line in &lines.shown {
                // Writing to a string does not fail.
                let _ = writeln!(problems, "  {line}");
            }
            let more = lines.count - lines.shown.len();
            if more > 0 {
                let _ = writeln!(problems, "  and {more} more{kind}");
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(WeightsError::Mismatch {
            path: path.to_owned(),
            model: model.to_owned(),
            problems: problems.trim_end().to_owned(),
        })
    }
}

/// At most eight items, separated by commas, and the number of further ones.
pub(crate) fn some<T: std::fmt::Display>(items: impl Iterator<Item = T>, count: usize) -> String {
    let shown: Vec<String> = items.take(SHOWN).map(|item| item.to_string()).collect();
    let more = count.saturating_sub(shown.len());
    let rest = match more {
        0 => String::new(),
        more => format!(", and {more} more"),
    };
    format!("{}{rest}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Array, StateDict};

    #[test]
    fn long_lists_are_cut_off_kind_by_kind() {
        let names: Vec<String> = (0..10).map(|i| format!("a{i}")).collect();
        let found: StateDict = (0..93)
            .map(|i| (format!("b{i:02}"), Array::new([1], vec![0.0])))
            .collect();
        let mut misfits = Misfits::default();
        misfits.compare(&found, names.iter().map(|name| (name.as_str(), &[2][..])));
        let error = misfits.into_result(Path::new("x.pt"), "a model");
        let error = error.unwrap_err().to_string();
        assert!(error.contains("missing   a7 [2]\n  and 2 more missing\n"));
        assert!(error.ends_with("surplus   b07 [1]\n  and 85 more surplus"));
        assert_eq!(error.lines().count(), 1 + 9 + 9);
        assert_eq!(some([1, 2].iter(), 2), "1, 2");
        assert_eq!(some(0..9, 9), "0, 1, 2, 3, 4, 5, 6, 7, and 1 more");
    }
}
