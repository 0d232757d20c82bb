//! Progress off the dashboard: plain lines, and a renderer for burn-train that draws nothing.

use std::time::{Duration, Instant};

use burn::train::logger::MetricLogger;
use burn::train::metric::{
    MetricDefinition, MetricId, NumericEntry,
    store::{EpochSummary, MetricsUpdate, Split},
};
use burn::train::renderer::{
    EvaluationName, EvaluationProgress, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining, ProgressType, TrainingProgress,
};

use super::metrics::Scalars;

/// Draws and logs nothing: lines and `metrics.jsonl` are the strategy's, in step with the training.
pub(super) struct Quiet;

impl MetricsRendererTraining for Quiet {
    fn update_train(&mut self, _: MetricState) {}
    fn update_valid(&mut self, _: MetricState) {}
    fn render_train(&mut self, _: TrainingProgress, _: Vec<ProgressType>) {}
    fn render_valid(&mut self, _: TrainingProgress, _: Vec<ProgressType>) {}
}

impl MetricsRendererEvaluation for Quiet {
    fn update_test(&mut self, _: EvaluationName, _: MetricState) {}
    fn render_test(&mut self, _: EvaluationProgress, _: Vec<ProgressType>) {}
}

impl MetricsRenderer for Quiet {
    fn manual_close(&mut self) {}
    fn register_metric(&mut self, _: MetricDefinition) {}
}

impl MetricLogger for Quiet {
    fn log(&mut self, _: MetricsUpdate, _: usize, _: &Split) {}
    fn read_numeric(&mut self, _: &str, _: usize, _: &Split) -> Result<Vec<NumericEntry>, String> {
        Ok(Vec::new())
    }
    fn log_metric_definition(&mut self, definition: MetricDefinition) {
        let MetricDefinition { metric_id, .. } = definition;
        let _: MetricId = metric_id;
    }
    fn log_epoch_summary(&mut self, _: EpochSummary) {}
}

/// Steps, speed and time left of a training, as lines on standard error.
pub(super) struct Lines {
    name: String,
    started: Instant,
    first: usize,
    steps: usize,
}

impl Lines {
    pub(super) fn new(name: &str, first: usize, steps: usize) -> Self {
        Self {
            name: name.to_owned(),
            started: Instant::now(),
            first,
            steps,
        }
    }

    /// The line for a finished step (counted from 1).
    pub(super) fn line(&self, done: usize, images: usize, scalars: &Scalars) -> String {
        use std::fmt::Write;
        let elapsed = self.started.elapsed();
        let left = elapsed.mul_f64((self.steps - done) as f64 / (done - self.first).max(1) as f64);
        let mut line = format!(
            "{:<12} step {done:>6}/{} ({images} images)",
            self.name, self.steps
        );
        for (name, value) in &scalars.0 {
            let value = if *value != 0.0 && value.abs() < 0.001 {
                format!("{value:.1e}")
            } else {
                format!("{value:.4}")
            };
            // Writing to a String can't fail.
            let _ = write!(line, "  {name} {value}");
        }
        line + &format!("  {} left", brief(left))
    }
}

/// `1h02m`, `3m20s` or `12s`.
pub(crate) fn brief(duration: Duration) -> String {
    let seconds = duration.as_secs_f64().round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m{seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h{minutes:02}m"),
    }
}
