//! Training checkpoints, from which a training is resumed, opened as models.
//!
//! Such a file has the trained weights, their moving average, the optimizer's moments and the fixed
//! tensors; each name begins with its part. The training module writes the file and resumes from
//! it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::checkpoint::ARCHITECTURE;
use crate::state::{Tensors, WeightsError, some};

/// Metadata key of a training's position, which only training checkpoints have.
pub(crate) const TRAINING: &str = "tinyfusion.training";

/// The moving average of the trained weights.
pub(crate) const EMA: &str = "ema";
/// The trained weights.
pub(crate) const MODEL: &str = "model";
/// Fixed tensors, such as the position table; only where the whole model is written.
pub(crate) const FIXED: &str = "fixed";
/// The optimizer's state.
pub(crate) const MOMENTS: &str = "moments";

/// Prefix of the names of a classifier in training.
const CLASSIFIER: &str = "classifier.";
/// Prefix of the gates that a pruning learns, which are not part of a model.
const GATES: &str = "gumbel_gates.";
/// Prefix of the maps that features are compared through, which are not part of a model either.
const FEATURE_MAPS: &str = "feature_maps.";

/// Whether a file with this metadata is a training checkpoint.
pub(super) fn is_snapshot(metadata: &BTreeMap<String, String>) -> bool {
    metadata.contains_key(TRAINING)
}

/// The model in a training checkpoint, with the weights of the part `key`; by default the moving
/// average.
///
/// # Errors
/// When there is no such part, when the file holds only a part of a model, or when it doesn't say
/// which model it holds.
pub(super) fn model(
    tensors: &Tensors,
    metadata: &BTreeMap<String, String>,
    key: Option<&str>,
    path: &Path,
) -> Result<Tensors, WeightsError> {
    let problem = |problem: String| WeightsError::Model {
        path: path.to_owned(),
        problem,
    };
    let key = key.unwrap_or(EMA);
    if ![EMA, MODEL].contains(&key) {
        return Err(problem(format!(
            "it has no `{key}`; it is a checkpoint of a training, which has {EMA}, {MODEL}"
        )));
    }
    let part = |part: &str| {
        let prefix = format!("{part}.");
        tensors.renamed(|name| name.strip_prefix(&prefix))
    };
    let mut chosen = part(key);
    let gates = chosen.iter().filter(|(name, _)| name.starts_with(GATES));
    let gates = gates.count();
    let updates = chosen.iter().filter(|(name, _)| name.contains(".lora_a."));
    let updates = updates.count();
    if updates > 0 || (gates > 0 && gates == chosen.len()) {
        return Err(problem(format!(
            "it is a checkpoint of a pruning that is under way, and holds no whole model: the gates of {gates} groups{} are of use only beside the model that is pruned. Go on with its run by `--resume`; the pruned model is the stage's model.safetensors",
            match updates {
                0 => String::new(),
                updates => format!(" and low-rank updates of {updates} linear layers"),
            }
        )));
    }
    if !metadata.contains_key(ARCHITECTURE) {
        let parts: BTreeSet<&str> = (tensors.iter())
            .filter_map(|(name, _)| name.split('.').next())
            .collect();
        return Err(problem(format!(
            "it is a checkpoint of a training, but does not say of which model: it was written before checkpoints said so (it holds {}). Go on with its run by `--resume`; later checkpoints say it",
            some(parts.iter(), parts.len())
        )));
    }
    for (name, tensor) in part(FIXED) {
        chosen.insert(name, tensor);
    }
    Ok(chosen.renamed(|name| {
        let name = name.strip_prefix(CLASSIFIER).unwrap_or(name);
        let own = !name.starts_with(GATES) && !name.starts_with(FEATURE_MAPS);
        own.then_some(name)
    }))
}
