//! How long to train, how, and what to keep.

use serde::Serialize;

use super::Schedule;

/// The budget, the schedule and the safeguards of one training run, which uses `AdamW`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Optimisation {
    /// Optimiser steps.
    pub steps: usize,
    /// Images per step.
    pub batch: usize,
    /// Parts a step's images are divided into, whose gradients are averaged: memory for one part is
    /// enough.
    pub accumulate: usize,
    /// Learning rate after the warm-up.
    pub lr: f64,
    /// Learning rate that a cosine falls towards; the step after the last would have it.
    pub final_lr: f64,
    /// Steps over which the learning rate rises linearly to `lr`.
    pub warmup: usize,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; what is longer is scaled down to it.
    pub clip: f64,
    /// Decay of the exponential moving average of the weights, per step.
    pub ema: f64,
    /// Whether that decay grows with the steps, `min(ema, (1 + step) / (10 + step))`; if not, it is
    /// constant, as the reference has it.
    pub ema_warmup: bool,
    /// Steps between checkpoints.
    pub checkpoint_every: usize,
    /// How many of the latest checkpoints stay on disk.
    pub keep_last: usize,
    /// Whether they stay when the stage is finished. What a stage leaves is its model; they are
    /// several times as large.
    ///
    /// Left out of the resolved recipe where they don't, so that runs of versions without the key
    /// go on.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub keep_checkpoints: bool,
    /// Whether several workers divide the moments and the averages among them (stage 1 of ZeRO), so
    /// that each needs the memory of its share alone; the result is the same.
    ///
    /// Left out of the resolved recipe where they don't, as above.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub shard_optimizer: bool,
    /// Steps between lines of metrics.
    pub log_every: usize,
    /// Consecutive steps with a loss that is not finite after which the run is given up.
    pub max_bad_steps: usize,
}

impl Optimisation {
    /// So many steps in batches of 64 at a learning rate of 1e-3 that falls to 0; the average's
    /// decay is 0.999.
    pub fn new(steps: usize) -> Self {
        Self {
            steps,
            batch: 64,
            accumulate: 1,
            lr: 1e-3,
            final_lr: 0.0,
            warmup: 0,
            weight_decay: 0.0,
            clip: 1.0,
            ema: 0.999,
            ema_warmup: true,
            checkpoint_every: (steps / 5).max(1),
            keep_last: 2,
            keep_checkpoints: false,
            shard_optimizer: false,
            log_every: (steps / 50).max(1),
            max_bad_steps: 20,
        }
    }

    /// The learning rate of each step.
    pub fn schedule(&self) -> Schedule {
        Schedule::new(self.lr, self.final_lr, self.warmup, self.steps)
    }
}
