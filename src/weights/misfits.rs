//! All that is wrong with a file's tensors, said at once.

use std::collections::BTreeMap;
use std::path::Path;

use super::{TensorSource, WeightsError};

/// Tensors that do not fit a model, one line each.
#[derive(Debug, Default)]
pub(crate) struct Misfits(Vec<String>);

impl Misfits {
    /// A tensor that should be there.
    pub(crate) fn missing(&mut self, name: &str, shape: Option<&[usize]>) {
        let shape = shape.map(|shape| format!(" {shape:?}")).unwrap_or_default();
        self.0.push(format!("  missing   {name}{shape}"));
    }

    /// A tensor that should not be there.
    pub(crate) fn surplus(&mut self, name: &str, shape: &[usize]) {
        self.0.push(format!("  surplus   {name} {shape:?}"));
    }

    /// Anything else.
    pub(crate) fn other(&mut self, problem: String) {
        self.0.push(format!("  {problem}"));
    }

    /// Compares names and shapes that are there with those expected.
    pub(crate) fn compare<'a>(
        &mut self,
        found: &impl TensorSource,
        expected: impl Iterator<Item = (&'a str, &'a [usize])>,
    ) {
        let mut left: BTreeMap<&str, &[usize]> = found.shapes().collect();
        for (name, shape) in expected {
            match left.remove(name) {
                None => self.missing(name, Some(shape)),
                Some(found) if found != shape => self.0.push(format!(
                    "  misshapen {name}: expected {shape:?}, found {found:?}"
                )),
                Some(_) => {}
            }
        }
        for (name, shape) in left {
            self.surplus(name, shape);
        }
    }

    /// The error, if anything was wrong; `path` and `model` are for its message.
    pub(crate) fn into_result(self, path: &Path, model: &str) -> Result<(), WeightsError> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(WeightsError::Mismatch {
            path: path.to_owned(),
            model: model.to_owned(),
            problems: self.0.join("\n"),
        })
    }
}
