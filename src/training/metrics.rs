//! Metrics of a step, for the dashboard and `metrics.jsonl`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Tensor;
use burn::tensor::backend::AutodiffBackend;
use burn::train::ItemLazy;
use burn::train::metric::{
    Adaptor, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes,
    NumericEntry, SerializedEntry,
};

use super::TrainingError;
use crate::process::Terms;

/// Named numbers of one step.
#[derive(Debug, Clone, Default)]
pub struct Scalars(pub Vec<(&'static str, f64)>);

impl Scalars {
    /// The number named `name`.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| *value)
    }
}

/// Batch means of a loss's terms, in one transfer and outside the graph.
pub fn scalars<B: AutodiffBackend>(terms: &Terms<B>) -> Scalars {
    let named = std::iter::once(("loss", &terms.total))
        .chain(terms.named.iter().map(|(name, term)| (*name, term)));
    let (names, means): (Vec<_>, Vec<_>) = named
        .map(|(name, term)| (name, term.clone().inner().mean()))
        .unzip();
    let values = Tensor::cat(means, 0).into_data();
    Scalars(names.into_iter().zip(values.iter::<f64>()).collect())
}

/// Results of a training step besides gradients; `loss` is always among its scalars.
#[derive(Debug, Clone, Default)]
pub struct StepReport {
    /// The numbers.
    pub scalars: Scalars,
    /// Number of images in the step.
    pub images: usize,
}

impl StepReport {
    /// Combines the batches of one step: the mean of each number, the sum of images.
    pub(super) fn mean(reports: &[Self]) -> Self {
        let share = 1.0 / reports.len().max(1) as f64;
        let names = reports.first().map(|report| report.scalars.0.clone());
        let mean = |name: &'static str| {
            let values = reports.iter().filter_map(|report| report.scalars.get(name));
            (name, values.sum::<f64>() * share)
        };
        Self {
            scalars: Scalars(
                names
                    .unwrap_or_default()
                    .into_iter()
                    .map(|(name, _)| mean(name))
                    .collect(),
            ),
            images: reports.iter().map(|report| report.images).sum(),
        }
    }
}

impl StepReport {
    /// The numbers, for other workers.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let numbers = self.scalars.0.iter().map(|(_, value)| *value);
        std::iter::once(self.images as f64)
            .chain(numbers)
            .flat_map(f64::to_le_bytes)
            .collect()
    }

    /// Reports of other workers, which name the same numbers as this one.
    pub(super) fn others(&self, bytes: &[u8]) -> Vec<Self> {
        let names = self.scalars.0.iter().map(|(name, _)| *name);
        bytemuck::pod_collect_to_vec::<u8, f64>(bytes)
            .chunks_exact(1 + self.scalars.0.len())
            .map(|numbers| Self {
                images: numbers[0] as usize,
                scalars: Scalars(names.clone().zip(numbers[1..].iter().copied()).collect()),
            })
            .collect()
    }
}

impl ItemLazy for StepReport {
    type ItemSync = Self;

    fn sync(self) -> Self {
        self
    }
}

impl Adaptor<Scalars> for StepReport {
    fn adapt(&self) -> Scalars {
        self.scalars.clone()
    }
}

/// The displayed name of a number in `metrics.jsonl`.
pub(super) fn shown(name: &str) -> String {
    match name {
        "images_per_second" => "images/s".to_owned(),
        name => name.replace('_', " "),
    }
}

/// One scalar as a metric of burn-train's renderer.
#[derive(Debug, Clone)]
pub(super) struct Curve {
    key: &'static str,
    name: MetricName,
    current: f64,
    sum: f64,
    count: usize,
}

impl Curve {
    pub(super) fn new(key: &'static str) -> Self {
        Self {
            key,
            name: Arc::new(key.to_owned()),
            current: f64::NAN,
            sum: 0.0,
            count: 0,
        }
    }
}

impl Metric for Curve {
    type Input = Scalars;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes {
            unit: None,
            higher_is_better: matches!(self.key, "images_per_second" | "confidence" | "accuracy"),
        }
        .into()
    }

    fn update(&mut self, scalars: &Scalars, _: &MetricMetadata) -> SerializedEntry {
        if let Some(value) = scalars.get(self.key) {
            self.current = value;
            self.sum += value;
            self.count += 1;
        }
        SerializedEntry::new(format!("{:.4}", self.current), self.current.to_string())
    }

    fn clear(&mut self) {
        (self.sum, self.count) = (0.0, 0);
    }
}

impl Numeric for Curve {
    fn value(&self) -> NumericEntry {
        NumericEntry::Value(self.current)
    }

    fn running_value(&self) -> NumericEntry {
        NumericEntry::Aggregated {
            aggregated_value: self.sum / self.count.max(1) as f64,
            count: self.count,
        }
    }
}

/// A log of one JSON object per line, each with its `step`.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
}

impl JsonLines {
    /// Opens the log to continue at step `start`. Lines from that step on are dropped: a run that
    /// was cut off after its last checkpoint left them.
    ///
    /// # Errors
    /// When the file can't be read or written.
    pub fn open(path: &Path, start: usize) -> Result<Self, TrainingError> {
        let io = |source| TrainingError::Io {
            path: path.to_owned(),
            source,
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(io(error)),
        };
        let earlier = text
            .lines()
            .filter(|line| step_of(line).is_some_and(|step| step < start));
        let kept: String = earlier.flat_map(|line| [line, "\n"]).collect();
        crate::files::write_atomic(path, |file| file.write_all(kept.as_bytes())).map_err(io)?;
        let file = OpenOptions::new().append(true).open(path).map_err(io)?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// Step of the last line, if there is one.
    ///
    /// # Errors
    /// When the file can't be read.
    pub fn last_step(&self) -> Result<Option<usize>, TrainingError> {
        let text = std::fs::read_to_string(&self.path).map_err(TrainingError::io(&self.path))?;
        Ok(text.lines().next_back().and_then(step_of))
    }

    /// Appends one object.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write(&mut self, value: &impl serde::Serialize) -> Result<(), TrainingError> {
        let io = |source| TrainingError::Io {
            path: self.path.clone(),
            source,
        };
        let mut line = serde_json::to_string(value).map_err(|error| io(error.into()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(io)
    }
}

fn step_of(line: &str) -> Option<usize> {
    let value: serde_json::Value = serde_json::from_str(line).ok()?;
    usize::try_from(value.get("step")?.as_u64()?).ok()
}
