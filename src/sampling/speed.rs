//! Sampling speed of models, measured in turns, because a machine's speed changes over time.

use std::time::Instant;

use super::{Sampling, SamplingError, sampler};
use crate::backend::Compute;
use crate::ops::FusedOps;
use crate::stop::Stop;
use crate::weights::Checkpoint;

/// Rounds, in each of which every model is timed once.
const ROUNDS: usize = 5;
/// Steps timed in a round: every step is the same work, so a few are enough.
const STEPS: usize = 5;

/// Images per second of each model, one number per round: a batch, with all steps of the protocol
/// and matrix products of type `compute`, without the autoencoder's time. One network is in memory
/// at a time.
///
/// # Errors
/// When a model can't be read, or on an interrupt.
pub fn speeds<B: FusedOps>(
    checkpoints: &[Checkpoint],
    sampling: &Sampling,
    compute: Compute,
    stop: &Stop,
    device: &B::Device,
) -> Result<Vec<Vec<f64>>, SamplingError> {
    let steps = match sampling.solver.has_equal_steps() {
        true => sampling.steps.min(STEPS),
        false => sampling.steps,
    };
    let batch = sampling.batch.min(sampling.count);
    let indices: Vec<usize> = (0..batch).collect();
    let mut measured = vec![Vec::with_capacity(ROUNDS); checkpoints.len()];
    for _ in 0..ROUNDS {
        for (checkpoint, rates) in checkpoints.iter().zip(&mut measured) {
            if stop.requested() {
                return Err(SamplingError::Interrupted);
            }
            let network = checkpoint.network::<B>(device)?.computing(compute);
            let model = network.architecture();
            let labels = sampling.label_of_each(model.shape().classes, 0);
            let timed = |steps: usize| -> Result<f64, SamplingError> {
                let sampler = sampler(
                    "speed",
                    &Sampling {
                        steps,
                        ..sampling.clone()
                    },
                    &model,
                    checkpoint.trained_by(),
                )?;
                let begun = Instant::now();
                let samples =
                    sampler.generate(&network, 0, &indices, &labels[..batch], device, || {});
                // Reading the result waits for an asynchronous device.
                let _ = samples.into_data();
                Ok(begun.elapsed().as_secs_f64())
            };
            // Warm-up: the first pass has cold caches and untuned kernels.
            timed(steps.min(2))?;
            let calls = |steps| sampling.solver.calls(steps) as f64;
            let seconds = timed(steps)? * calls(sampling.steps) / calls(steps);
            rates.push(batch as f64 / seconds);
        }
    }
    Ok(measured)
}
