//! How fast models draw, measured in turns, because machines are noisy and a model measured after another meets another
//! machine.

use std::time::Instant;

use super::{Sampling, SamplingError, sampler};
use crate::ops::FusedOps;
use crate::process::Solver;
use crate::process::transport::Ode;
use crate::weights::Checkpoint;

/// Rounds, in each of which every model is timed once.
const ROUNDS: usize = 5;
/// Steps that are timed in a round: every step is the same work, so that a few tell what all take.
const STEPS: usize = 5;

/// Images a second that each model draws, a number for each round: one batch of them, by all steps of the protocol. What
/// an autoencoder takes is not counted. One network is in memory at a time.
///
/// # Errors
/// When a model can't be read, or a person interrupts.
pub fn speeds<B: FusedOps>(
    checkpoints: &[Checkpoint],
    sampling: &Sampling,
    device: &B::Device,
) -> Result<Vec<Vec<f64>>, SamplingError> {
    let steps = match sampling.solver {
        // Its steps are of its own choice.
        Solver::Ode(Ode::Dopri5 { .. }) => sampling.steps,
        _ => sampling.steps.min(STEPS),
    };
    let batch = sampling.batch.min(sampling.count);
    let indices: Vec<usize> = (0..batch).collect();
    let mut measured = vec![Vec::with_capacity(ROUNDS); checkpoints.len()];
    for _ in 0..ROUNDS {
        for (checkpoint, rates) in checkpoints.iter().zip(&mut measured) {
            if crate::interrupt::requested() {
                return Err(SamplingError::Interrupted);
            }
            let network = checkpoint.network::<B>(device)?;
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
                // Reading the result waits for a device that works behind our back.
                let _ = samples.into_data();
                Ok(begun.elapsed().as_secs_f64())
            };
            // The first pass finds cold caches and untuned kernels.
            timed(steps.min(2))?;
            let calls = |steps| sampling.solver.calls(steps) as f64;
            let seconds = timed(steps)? * calls(sampling.steps) / calls(steps);
            rates.push(batch as f64 / seconds);
        }
    }
    Ok(measured)
}
