//! What stages cost: images, floating-point operations, memory.

use super::known::Known;
use crate::models::Architecture;
use crate::process::Solver;
use crate::sampling::Sampling;
use crate::training::Optimisation;

pub(crate) fn images(optimisation: &Optimisation) -> usize {
    optimisation.steps * optimisation.batch
}

/// Passes' worth of arithmetic in a training step: forward, and twice that backward; once where
/// weights are frozen, and backward needs the inputs' gradients alone. Forward again if it
/// recomputes.
pub(crate) fn passes(model: &Architecture, known: &Known<'_>, frozen: bool) -> f64 {
    let again = known.recipe.recompute && model.recomputes();
    let backward = if frozen { 1.0 } else { 2.0 };
    1.0 + backward + f64::from(u8::from(again))
}

/// Operations of one forward pass over a number of images.
pub(crate) fn flops(model: &Architecture, images: usize) -> f64 {
    2.0 * model.pass_macs() as f64 * images as f64
}

/// Passes of each sample in a step: two where it is guided.
pub(crate) fn guided_passes(sampling: &Sampling, model: &Architecture) -> usize {
    match sampling.guidance > 1.0 && model.has_classes() {
        true => 2,
        false => 1,
    }
}

pub(crate) fn sampling_flops(sampling: &Sampling, model: &Architecture) -> f64 {
    let passes = guided_passes(sampling, model);
    if let (Solver::Masked(rounds), Some(patch)) = (sampling.solver, model.patch_filled_in()) {
        let known = rounds.known((model.shape().side / patch).pow(2));
        let macs = model.drawing_macs(&known, sampling.steps) as f64;
        return 2.0 * macs * passes as f64 * sampling.count as f64;
    }
    flops(model, passes * sampling.count) * sampling.solver.calls(sampling.steps) as f64
}

/// Of one of so many workers: weights, gradients, two moments and an average of what learns, and
/// what a pass leaves for its backward pass.
pub(crate) fn training_memory(
    model: &Architecture,
    learning: usize,
    optimisation: &Optimisation,
    known: &Known<'_>,
) -> usize {
    let workers = known.workers;
    let batch = optimisation.batch / optimisation.accumulate;
    // The gradients of the branches of the tree that sums those of a worker's groups.
    let groups = (optimisation.accumulate / workers).max(1);
    let gradients = 4 * (1 + groups.ilog2() as usize) * learning;
    let kept = match optimisation.shard_optimizer {
        true => learning.div_ceil(workers),
        false => learning,
    };
    4 * model.parameters() + gradients + 12 * kept + kept_bytes(model, batch, known)
}

/// Weights, their gradients, and what a pass of so many images leaves for its backward pass.
pub(crate) fn gradient_memory(model: &Architecture, batch: usize, known: &Known<'_>) -> usize {
    8 * model.parameters() + kept_bytes(model, batch, known)
}

/// What a pass of so many images leaves for its backward pass.
fn kept_bytes(model: &Architecture, batch: usize, known: &Known<'_>) -> usize {
    match known.recipe.recompute {
        true => model.recomputed_bytes(batch),
        false => model.kept_bytes(batch),
    }
}

/// Weights, and what a pass needs at once.
pub(crate) fn inference_memory(model: &Architecture, batch: usize) -> usize {
    4 * model.parameters() + model.pass_bytes(batch)
}
