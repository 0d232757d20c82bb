//! What stages cost: images, floating-point operations, memory.

use crate::models::DitConfig;
use crate::sampling::Sampling;
use crate::training::Optimisation;

pub(crate) fn images(optimisation: &Optimisation) -> usize {
    optimisation.steps * optimisation.batch
}

/// Passes' worth of arithmetic in a training step: forward, and twice that backward.
pub(crate) const TRAINING: f64 = 3.0;
/// The same where weights stay as they are: backward needs the inputs' gradients alone.
pub(crate) const FROZEN: f64 = 2.0;

/// Operations of one forward pass over a number of images.
pub(crate) fn flops(config: &DitConfig, images: usize) -> f64 {
    2.0 * config.macs() as f64 * images as f64
}

pub(crate) fn sampling_flops(sampling: &Sampling, config: &DitConfig) -> f64 {
    let passes = if sampling.guidance > 1.0 { 2 } else { 1 };
    flops(config, passes * sampling.count) * sampling.solver.calls(sampling.steps) as f64
}

/// Parameters of a low-rank update of every linear layer.
pub(crate) fn lora_parameters(config: &DitConfig, rank: usize) -> usize {
    let width = config.width;
    let hidden = config.hidden();
    let block = (width + 3 * width) + (width + width) + 2 * (width + hidden) + (width + 6 * width);
    let ends = (256 + width)
        + (width + width)
        + (width + 2 * width)
        + (width + config.patch_size.pow(2) * config.out_channels());
    rank * (config.depth * block + ends)
}

/// Bytes of f32 activations that one block leaves for its backward pass: composed of Burn's operators, each of which
/// keeps its inputs, about 30 tensors of the trunk's width, 9 of the MLP's and 5 of the attention weights. Gives 213 MiB
/// for the 12-layer digit model at batch 64, whose fine-tuning `tinyfusion bench` measures at 264 MiB in all.
fn block_activations(config: &DitConfig, batch: usize) -> usize {
    let tokens = config.tokens();
    4 * batch * tokens * (30 * config.width + 9 * config.hidden() + 5 * config.heads * tokens)
}

/// Weights, gradients, two moments and an average of what learns, and all blocks' activations.
pub(crate) fn training_memory(
    config: &DitConfig,
    learning: usize,
    optimisation: &Optimisation,
) -> usize {
    let batch = optimisation.batch / optimisation.accumulate;
    4 * config.parameters() + 16 * learning + config.depth * block_activations(config, batch)
}

/// Weights, and one block's activations.
pub(crate) fn inference_memory(config: &DitConfig, batch: usize) -> usize {
    4 * config.parameters() + block_activations(config, batch)
}
