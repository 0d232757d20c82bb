//! The fixtures' comparison rule.

use burn::tensor::{Tensor, backend::Backend};
use serde_json::Value;

use crate::fixture::Values;

/// Tolerances of a group, by key.
pub struct Rule<'a> {
    tolerance: &'a Value,
    slack: f64,
}

impl<'a> Rule<'a> {
    /// The rule of a `case.json`, widened by `slack` on backends with looser arithmetic.
    pub fn new(case: &'a Value, slack: f64) -> Self {
        Self {
            tolerance: &case["tolerance"],
            slack,
        }
    }

    /// (rel, floor) for a key of a file; `(0, 0)` demands equality.
    fn of(&self, file: &str, key: &str) -> (f64, f64) {
        let numbers = |value: &Value| {
            (
                value["rel"].as_f64().unwrap() * self.slack,
                value["floor"].as_f64().unwrap() * self.slack,
            )
        };
        let overrides = self.tolerance["overrides"].as_object();
        for (glob, value) in overrides.into_iter().flatten() {
            let name = if glob.contains('/') {
                format!("{file}/{key}")
            } else {
                key.to_owned()
            };
            if matches(glob, &name) {
                return if value == "exact" {
                    (0.0, 0.0)
                } else {
                    numbers(value)
                };
            }
        }
        numbers(self.tolerance)
    }

    /// `|actual - expected| <= rel (|expected| + rms(expected)) + floor`, element by element.
    pub fn check(&self, file: &str, key: &str, actual: &[f64], expected: &Values) {
        let (rel, floor) = self.of(file, key);
        assert_eq!(
            actual.len(),
            expected.data.len(),
            "{file}/{key}: number of values"
        );
        let rms = (expected.data.iter().map(|value| value * value).sum::<f64>()
            / expected.data.len().max(1) as f64)
            .sqrt();
        for (index, (actual, expected)) in actual.iter().zip(&expected.data).enumerate() {
            let allowed = rel * (expected.abs() + rms) + floor;
            // Written so that a NaN fails.
            assert!(
                (actual - expected).abs() <= allowed,
                "{file}/{key}[{index}]: {actual} is not {expected} (allowed difference {allowed:e})"
            );
        }
    }

    /// The same for a tensor, shape included.
    pub fn tensor<B: Backend, const D: usize>(
        &self,
        file: &str,
        key: &str,
        actual: Tensor<B, D>,
        expected: &Values,
    ) {
        assert_eq!(
            actual.dims().to_vec(),
            expected.shape,
            "{file}/{key}: shape"
        );
        self.check(file, key, &values(actual), expected);
    }
}

/// The rule of groups with a single tolerance: the largest error, relative to the largest value.
pub struct Largest {
    pub tolerance: f64,
}

impl Largest {
    /// `max |actual - expected| <= tolerance max |expected|`, shape included.
    pub fn tensor<B: Backend, const D: usize>(
        &self,
        key: &str,
        actual: Tensor<B, D>,
        expected: &Values,
    ) {
        assert_eq!(actual.dims().to_vec(), expected.shape, "{key}: shape");
        let largest = expected.data.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let allowed = self.tolerance * largest;
        for (index, (actual, expected)) in values(actual).iter().zip(&expected.data).enumerate() {
            // Written so that a NaN fails.
            assert!(
                (actual - expected).abs() <= allowed,
                "{key}[{index}]: {actual} is not {expected} (allowed difference {allowed:e})"
            );
        }
    }
}

pub fn values<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// `*` matches any run, `?` any character.
fn matches(glob: &str, name: &str) -> bool {
    let (mut glob, mut name) = (glob.chars(), name.chars());
    match (glob.next(), name.clone().next()) {
        (None, end) => end.is_none(),
        (Some('*'), _) => {
            let rest = glob.as_str();
            let name = name.as_str();
            name.char_indices()
                .map(|(at, _)| at)
                .chain([name.len()])
                .any(|at| matches(rest, &name[at..]))
        }
        (Some(wanted), Some(found)) if wanted == '?' || wanted == found => {
            name.next();
            matches(glob.as_str(), name.as_str())
        }
        _ => false,
    }
}

#[test]
fn globs() {
    assert!(matches("*.ddim_sample.*", "0.noclip.ddim_sample.1"));
    assert!(matches(
        "?_grads.safetensors/*",
        "a_grads.safetensors/blocks.0"
    ));
    assert!(!matches("?_grads.safetensors/*", "a_io.safetensors/x"));
    assert!(!matches("lr", "lrs"));
}
