//! How weights are optimised: the keys that `train`, `prune` and `recover` share.

use std::ops::Bound;

use serde::Serialize;

use crate::recipe::document::reader::Section;

/// Above zero, up to and including `high`.
pub(crate) fn positive(high: f64) -> (Bound<f64>, Bound<f64>) {
    (Bound::Excluded(0.0), Bound::Included(high))
}

/// Above zero.
pub(crate) const POSITIVE: (Bound<f64>, Bound<f64>) = (Bound::Excluded(0.0), Bound::Unbounded);

/// The largest count of steps a recipe can ask for.
const MAX_STEPS: usize = 100_000_000;

/// The budget, the schedule and the safeguards of one training run, which uses `AdamW`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Optimisation {
    /// Optimiser steps.
    pub steps: usize,
    /// Images per step.
    pub batch: usize,
    /// Parts a step's images are divided into, whose gradients are averaged: memory for one part is enough.
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
    /// Whether that decay grows with the steps, `min(ema, (1 + step) / (10 + step))`; if not, it is constant, as the
    /// reference has it.
    pub ema_warmup: bool,
    /// Steps between checkpoints.
    pub checkpoint_every: usize,
    /// How many of the latest checkpoints stay on disk.
    pub keep_last: usize,
    /// Whether they stay when the stage is finished. What a stage leaves is its model; they are several times as large.
    ///
    /// Left out of the resolved recipe where they don't, so that runs of versions without the key go on.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub keep_checkpoints: bool,
    /// Steps between lines of metrics.
    pub log_every: usize,
    /// Consecutive steps with a loss that is not finite after which the run is given up.
    pub max_bad_steps: usize,
}

impl Optimisation {
    /// The keys that [`read`](Self::read) asks for.
    pub const KEYS: [&'static str; 15] = [
        "steps",
        "batch",
        "accumulate",
        "lr",
        "final_lr",
        "warmup",
        "weight_decay",
        "clip",
        "ema",
        "ema_warmup",
        "checkpoint_every",
        "keep_last",
        "keep_checkpoints",
        "log_every",
        "max_bad_steps",
    ];

    /// Reads the keys of a stage whose learning rate is `lr` by default and by default ends at
    /// `final_share` of where it started.
    #[must_use]
    pub fn read(section: &Section<'_>, lr: f64, final_share: f64) -> Option<Self> {
        let steps = section.integer("steps", 1..=MAX_STEPS).required();
        let batch: usize = section.integer("batch", 1..=65_536).or(64);
        let accumulate = section
            .integer("accumulate", 1..=65_536)
            .check(|parts| batch.is_multiple_of(*parts), "must divide `batch`")
            .or(1);
        let lr = section.float("lr", positive(1.0)).or(lr);
        let final_lr = section.float("final_lr", 0.0..=1.0).or(lr * final_share);
        let warmup = section
            .integer("warmup", 0..=MAX_STEPS)
            .check(
                |&warmup| steps.is_none_or(|steps| warmup < steps),
                "must be below `steps`",
            )
            .or(0);
        let weight_decay = section.float("weight_decay", 0.0..=1.0).or(0.0);
        let clip = section.float("clip", POSITIVE).or(1.0);
        let ema = section.float("ema", 0.0..1.0).or(0.999);
        let ema_warmup = section.boolean("ema_warmup").or(true);
        let checkpoint_every = section
            .integer("checkpoint_every", 1..=MAX_STEPS)
            .optional();
        let keep_last = section.integer("keep_last", 1..=1_000_000).or(2);
        let keep_checkpoints = section.boolean("keep_checkpoints").or(false);
        let log_every = section.integer("log_every", 1..=MAX_STEPS).optional();
        let max_bad_steps = section.integer("max_bad_steps", 1..=MAX_STEPS).or(20);

        let steps = steps?;
        Some(Self {
            steps,
            batch,
            accumulate,
            lr,
            final_lr,
            warmup,
            weight_decay,
            clip,
            ema,
            ema_warmup,
            checkpoint_every: checkpoint_every.unwrap_or_else(|| (steps / 5).max(1)),
            keep_last,
            keep_checkpoints,
            log_every: log_every.unwrap_or_else(|| (steps / 50).max(1)),
            max_bad_steps,
        })
    }
}

/// The key `label_drop`: how often training replaces a label by the null class.
pub(crate) fn label_drop(section: &Section<'_>) -> f64 {
    section.float("label_drop", 0.0..=1.0).or(0.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::document::reader::Sink;
    use crate::recipe::schema::StageKind;
    use crate::recipe::schema::recover::RecoverMethod;
    use crate::recipe::schema::tests::{document, messages, second, stage};

    #[test]
    fn optimisation_defaults_follow_the_kind() {
        let train = "kind = 'train'\nsteps = 1000\narchitecture = { family = 'dit' }";
        let StageKind::Train(train) = second(train) else {
            panic!()
        };
        let expected = Optimisation {
            accumulate: 1,
            steps: 1000,
            batch: 64,
            lr: 1e-3,
            final_lr: 0.0,
            warmup: 0,
            weight_decay: 0.0,
            clip: 1.0,
            ema: 0.999,
            ema_warmup: true,
            checkpoint_every: 200,
            keep_last: 2,
            keep_checkpoints: false,
            log_every: 20,
            max_bad_steps: 20,
        };
        assert_eq!(train.optimisation, expected);

        let recover = "kind = 'recover'\nmethod = 'fine-tune'\nsteps = 3\nlr = 0.01";
        let StageKind::Recover(recover) = second(recover) else {
            panic!()
        };
        let Optimisation {
            lr,
            final_lr,
            checkpoint_every,
            log_every,
            ..
        } = recover.optimisation;
        assert_eq!(
            (lr, final_lr, checkpoint_every, log_every),
            (0.01, 0.005, 1, 1)
        );
        assert_eq!(recover.method, RecoverMethod::FineTune);
    }

    #[test]
    fn optimisation_ranges() {
        let text = "kind = 'recover'\nmethod = 'fine-tune'\nsteps = 10\nlr = 0\nwarmup = 10\nclip = inf\n\
                ema = 1\nkeep_last = 0\nweight_decay = -0.1";
        let expected = [
            "`lr`: must be above 0 and at most 1, found 0",
            "`warmup`: must be below `steps`",
            "`clip`: must be above 0 and finite, found inf",
            "`ema`: must be at least 0 and below 1, found 1",
            "`keep_last`: must be between 1 and 1000000, found 0",
            "`weight_decay`: must be at least 0 and at most 1, found -0.1",
        ];
        assert_eq!(messages(&stage(text)), expected);
    }

    #[test]
    fn the_list_of_optimisation_keys_is_complete() {
        let document = document("steps = 10\nkeep_checkpoints = true");
        let sink = Sink::default();
        let section = Section::new("a stage".to_owned(), document.root(), &sink).unwrap();
        let read = Optimisation::read(&section, 1e-3, 0.0).unwrap();
        let toml::Value::Table(written) = toml::Value::try_from(read).unwrap() else {
            panic!()
        };
        assert_eq!(written.len(), Optimisation::KEYS.len());
        assert!(
            Optimisation::KEYS
                .iter()
                .all(|key| written.contains_key(*key))
        );
    }
}
