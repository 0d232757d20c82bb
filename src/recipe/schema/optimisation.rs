//! Settings of an optimisation: the keys shared by `train`, `prune` and `recover`.

use std::ops::Bound;

use serde::Serialize;

use crate::recipe::document::reader::Section;
use crate::training::Optimisation;

/// Above zero, up to and including `high`.
pub(crate) fn positive(high: f64) -> (Bound<f64>, Bound<f64>) {
    (Bound::Excluded(0.0), Bound::Included(high))
}

/// Above zero.
pub(crate) const POSITIVE: (Bound<f64>, Bound<f64>) = (Bound::Excluded(0.0), Bound::Unbounded);

/// The largest number of steps in a recipe.
const MAX_STEPS: usize = 100_000_000;

/// How a model is measured while it is trained.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Meanwhile {
    /// Steps after each of which samples are drawn and measured, as the recipe's next evaluation
    /// measures them; default never.
    pub evaluate_every: usize,
    /// Number of those samples, at most as many as that evaluation draws; default 500.
    pub evaluate_count: usize,
}

impl Meanwhile {
    pub(super) fn read(section: &Section<'_>) -> Option<Self> {
        let every = section.integer("evaluate_every", 1..=MAX_STEPS);
        if every.is_absent() {
            section.refuse(&["evaluate_count"], "a stage without `evaluate_every`");
        }
        let evaluate_every = every.optional();
        let evaluate_count = section.integer("evaluate_count", 4..=1_000_000).or(500);
        evaluate_every.map(|evaluate_every| Self {
            evaluate_every,
            evaluate_count,
        })
    }
}

/// The keys that [`optimisation`] reads.
pub(crate) const KEYS: [&str; 16] = [
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
    "shard_optimizer",
    "log_every",
    "max_bad_steps",
];

/// Reads the optimisation of a stage. The learning rate's default is `lr`; its default at the end
/// is `final_share` of that at the start.
pub(crate) fn optimisation(
    section: &Section<'_>,
    lr: f64,
    final_share: f64,
) -> Option<Optimisation> {
    let steps = section.integer("steps", 1..=MAX_STEPS).required();
    // Without `steps`, the other keys are still checked.
    let default = Optimisation::new(steps.unwrap_or(1));
    let batch: usize = section.integer("batch", 1..=65_536).or(default.batch);
    let accumulate = section
        .integer("accumulate", 1..=65_536)
        .check(|parts| batch.is_multiple_of(*parts), "must divide `batch`")
        .or(default.accumulate);
    let lr = section.float("lr", positive(1.0)).or(lr);
    let final_lr = section.float("final_lr", 0.0..=1.0).or(lr * final_share);
    let warmup = section
        .integer("warmup", 0..=MAX_STEPS)
        .check(
            |&warmup| steps.is_none_or(|steps| warmup < steps),
            "must be below `steps`",
        )
        .or(default.warmup);
    let read = Optimisation {
        steps: default.steps,
        batch,
        accumulate,
        lr,
        final_lr,
        warmup,
        weight_decay: section
            .float("weight_decay", 0.0..=1.0)
            .or(default.weight_decay),
        clip: section.float("clip", POSITIVE).or(default.clip),
        ema: section.float("ema", 0.0..1.0).or(default.ema),
        ema_warmup: section.boolean("ema_warmup").or(default.ema_warmup),
        checkpoint_every: section
            .integer("checkpoint_every", 1..=MAX_STEPS)
            .or(default.checkpoint_every),
        keep_last: section
            .integer("keep_last", 1..=1_000_000)
            .or(default.keep_last),
        keep_checkpoints: section
            .boolean("keep_checkpoints")
            .or(default.keep_checkpoints),
        shard_optimizer: section
            .boolean("shard_optimizer")
            .or(default.shard_optimizer),
        log_every: section
            .integer("log_every", 1..=MAX_STEPS)
            .or(default.log_every),
        max_bad_steps: section
            .integer("max_bad_steps", 1..=MAX_STEPS)
            .or(default.max_bad_steps),
    };
    steps.map(|_| read)
}

/// The key `label_drop`: probability of replacing a label by the null class in training.
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
            shard_optimizer: false,
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
        let document = document("steps = 10\nkeep_checkpoints = true\nshard_optimizer = true");
        let sink = Sink::default();
        let section = Section::new("a stage".to_owned(), document.root(), &sink).unwrap();
        let read = optimisation(&section, 1e-3, 0.0).unwrap();
        let toml::Value::Table(written) = toml::Value::try_from(read).unwrap() else {
            panic!()
        };
        assert_eq!(written.len(), KEYS.len());
        assert!(KEYS.iter().all(|key| written.contains_key(*key)));
    }
}
