//! Learning rate by step.

use burn::lr_scheduler::LrScheduler;
use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

/// Linear warm-up, then a cosine from `lr` to `final_lr` at `steps` that does not restart.
///
/// Equal rates give a constant. With warm-up 0 it is PyTorch's `CosineAnnealingLR(T_max = steps)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Highest rate.
    pub lr: f64,
    /// Rate after the last step.
    pub final_lr: f64,
    /// Steps over which the rate rises to `lr`.
    pub warmup: usize,
    /// Steps of the whole run.
    pub steps: usize,
    /// The step whose rate is returned next.
    pub next: usize,
}

impl Schedule {
    /// A schedule at its start.
    pub fn new(lr: f64, final_lr: f64, warmup: usize, steps: usize) -> Self {
        Self {
            lr,
            final_lr,
            warmup,
            steps,
            next: 0,
        }
    }

    /// The rate of step `step`.
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.lr * (step + 1) as f64 / self.warmup as f64;
        }
        let done =
            (step - self.warmup) as f64 / (self.steps.saturating_sub(self.warmup)).max(1) as f64;
        self.final_lr
            + (self.lr - self.final_lr) * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos()) / 2.0
    }
}

impl LrScheduler for Schedule {
    type Record<B: Backend> = usize;

    fn step(&mut self) -> f64 {
        self.next += 1;
        self.at(self.next - 1)
    }

    fn to_record<B: Backend>(&self) -> usize {
        self.next
    }

    fn load_record<B: Backend>(self, next: usize) -> Self {
        Self { next, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_then_falls_to_the_floor_and_stays() {
        let schedule = Schedule::new(1.0, 0.5, 2, 6);
        let rates: Vec<f64> = (0..8).map(|step| schedule.at(step)).collect();
        let middle = 0.5 + 0.5 * (1.0 + (std::f64::consts::PI / 4.0).cos()) / 2.0;
        assert_eq!(rates[..3], [0.5, 1.0, 1.0]);
        assert!((rates[3] - middle).abs() < 1e-15);
        assert!((rates[4] - 0.75).abs() < 1e-15);
        assert_eq!(rates[6..], [0.5, 0.5]);
    }

    #[test]
    fn equal_rates_are_a_constant() {
        let schedule = Schedule::new(0.3, 0.3, 0, 10);
        assert!((0..10).all(|step| schedule.at(step) == 0.3));
    }
}
