//! Progress without the dashboard: plain lines, and a renderer for burn-train that draws nothing.

use std::time::Instant;

use burn::train::logger::MetricLogger;
use burn::train::metric::{
    MetricDefinition, MetricId, NumericEntry,
    store::{EpochSummary, MetricsUpdate, Split},
};
use burn::train::renderer::{
    EvaluationName, EvaluationProgress, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining, ProgressType, TrainingProgress,
};

use super::metrics::{Scalars, shown};
use crate::report::{brief, rounded, thousands};

/// A renderer that draws and logs nothing: the strategy writes lines and `metrics.jsonl`, in step
/// with the training.
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

/// Approximate number of lines between the first and the last step.
const LINES: usize = 20;
/// Length of the longest line, in characters.
const COLUMNS: usize = 100;

/// Lines on standard error with the step, the numbers, the speed and the time left.
pub(super) struct Lines {
    name: String,
    started: Instant,
    first: usize,
    steps: usize,
    /// The step of the last line, if there was one.
    told: Option<usize>,
}

impl Lines {
    pub(super) fn new(name: &str, first: usize, steps: usize) -> Self {
        Self {
            name: name.to_owned(),
            started: Instant::now(),
            first,
            steps,
            told: None,
        }
    }

    /// Whether to print a line for a finished step (counted from 1): the first, the last, and some
    /// twenty between.
    pub(super) fn due(&mut self, done: usize) -> bool {
        let due = done == self.steps
            || self
                .told
                .is_none_or(|told| (done - told) * LINES >= self.steps);
        if due {
            self.told = Some(done);
        }
        due
    }

    /// The line for a finished step, with as many numbers as fit.
    pub(super) fn line(&self, done: usize, scalars: &Scalars) -> String {
        let elapsed = self.started.elapsed();
        let left = elapsed.mul_f64((self.steps - done) as f64 / (done - self.first).max(1) as f64);
        let [step, steps] = [done, self.steps].map(thousands);
        let mut line = format!("{:<12} step {step:>w$}/{steps}", self.name, w = steps.len());
        let rate = scalars
            .get("images_per_second")
            .map(|rate| format!("  {} images/s", rounded(rate)));
        let end = rate.unwrap_or_default() + &format!("  {} left", brief(left));
        let others = scalars.0.iter();
        for (name, value) in others.filter(|(name, _)| *name != "images_per_second") {
            let number = format!("  {} {}", shown(name), rounded(*value));
            if line.chars().count() + number.len() + end.len() <= COLUMNS {
                line += &number;
            }
        }
        line + &end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_few_and_fit_a_terminal() {
        let mut lines = Lines::new("a-stage-of-a-rather-long-name", 0, 24_000);
        let logged = (1..=24_000).filter(|step| *step == 1 || step % 100 == 0);
        let told: Vec<usize> = logged.filter(|step| lines.due(*step)).collect();
        assert!(told.len() <= LINES + 2, "{told:?}");
        assert_eq!((told[0], told.last()), (1, Some(&24_000)));
        let names = [
            "loss",
            "mse",
            "vb",
            "kd",
            "vb_kd",
            "features",
            "lr",
            "grad_norm",
            "images_per_second",
        ];
        let scalars = Scalars(names.map(|name| (name, 0.033_712_345)).to_vec());
        let line = lines.line(11_200, &scalars);
        assert!(line.chars().count() <= COLUMNS, "{line}");
        for words in [
            "step 11,200/24,000",
            "loss 0.0337",
            "0.0337 images/s",
            "left",
        ] {
            assert!(line.contains(words), "{words}: {line}");
        }
        // Short trainings print every step.
        let mut lines = Lines::new("x", 3, 8);
        assert!((4..=8).all(|step| lines.due(step)));
    }
}
