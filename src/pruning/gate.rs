//! The differentiable choice of one candidate mask per group and sample.

use burn::tensor::{Tensor, TensorData, activation, backend::Backend};
use serde::{Deserialize, Serialize};

use super::groups::{Group, Groups};

/// Temperature and scaling of the gate, linear over the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Annealing {
    /// Softmax temperature at the first and last step.
    pub tau: (f64, f64),
    /// What logits are multiplied with at the first and last step (MaskLLM, arXiv 2409.17481).
    pub scaling: (f64, f64),
    /// Steps of the run.
    pub steps: usize,
}

impl Annealing {
    /// (tau, scaling) of a step.
    pub fn at(&self, step: usize) -> (f64, f64) {
        let done = step as f64 / self.steps.saturating_sub(1).max(1) as f64;
        let line = |(first, last): (f64, f64)| first + (last - first) * done.min(1.0);
        (line(self.tau), line(self.scaling))
    }
}

/// One group's sampled masks.
#[derive(Debug, Clone)]
pub struct Draw<B: Backend> {
    /// Probabilities `softmax((logits scaling + gumbel) / tau)`, `[batch, candidates]`.
    pub soft: Tensor<B, 2>,
    /// One-hot argmax of `soft`, the first on ties, `[batch, candidates]`.
    pub hard: Tensor<B, 2>,
    /// The chosen mask, `[batch, layers of the group]`; its gradient is that of `soft` (straight-through).
    pub mask: Tensor<B, 2>,
}

/// Samples a mask per sample (TinyFusion, equations 4 and 5). `logits` is `[1, candidates]`, `gumbel`
/// `[batch, candidates]`.
pub fn draw<B: Backend>(
    group: Group,
    logits: Tensor<B, 2>,
    gumbel: Tensor<B, 2>,
    tau: f64,
    scaling: f64,
) -> Draw<B> {
    let device = gumbel.device();
    let [batch, candidates] = gumbel.dims();
    let soft = activation::softmax((logits.mul_scalar(scaling) + gumbel).div_scalar(tau), 1);
    // The choice is read on the host: ties go to the first candidate on every backend, and it is small.
    let values: Vec<f32> = soft.clone().into_data().iter().collect();
    let hard: Vec<f32> = values
        .chunks(candidates)
        .flat_map(|row| {
            let choice = argmax(row);
            (0..candidates).map(move |candidate| f32::from(u8::from(candidate == choice)))
        })
        .collect();
    let hard = Tensor::<B, 2>::from_data(TensorData::new(hard, [batch, candidates]), &device);
    let masks: Vec<f32> = group.masks().concat();
    let masks =
        Tensor::<B, 2>::from_data(TensorData::new(masks, [candidates, group.of()]), &device);
    // Exactly the hard mask forward: what is added is exactly zero.
    let straight_through = soft.clone() - soft.clone().detach();
    let mask = hard.clone().matmul(masks.clone()) + straight_through.matmul(masks);
    Draw { soft, hard, mask }
}

/// Index of the largest value, the first on ties.
fn argmax(values: &[f32]) -> usize {
    values.iter().enumerate().fold(
        0,
        |best, (index, value)| if *value > values[best] { index } else { best },
    )
}

/// What one group has come to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// Index of the most probable candidate.
    pub candidate: usize,
    /// Layers of the trunk it keeps.
    pub layers: Vec<usize>,
    /// Its probability `max softmax(logits scaling)`.
    pub confidence: f64,
    /// Probability of every candidate.
    pub probabilities: Vec<f64>,
}

/// The decision of all groups.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// One choice per group.
    pub choices: Vec<Choice>,
    /// Kept layers of the trunk.
    pub kept: Vec<usize>,
}

impl Decision {
    /// Mean confidence of the groups.
    pub fn confidence(&self) -> f64 {
        self.choices
            .iter()
            .map(|choice| choice.confidence)
            .sum::<f64>()
            / self.choices.len().max(1) as f64
    }
}

/// Reads the most probable candidate of each group off its logits (the EMA's, in training).
pub fn decide(groups: &Groups, logits: &[Vec<f32>], scaling: f64) -> Decision {
    let choices: Vec<Choice> = groups
        .iter()
        .zip(groups.offsets())
        .zip(logits)
        .map(|((group, offset), logits)| {
            let candidate = argmax(logits);
            let highest = f64::from(logits[candidate]) * scaling;
            let weights: Vec<f64> = logits
                .iter()
                .map(|logit| (f64::from(*logit) * scaling - highest).exp())
                .collect();
            let total: f64 = weights.iter().sum();
            let probabilities: Vec<f64> =
                weights.into_iter().map(|weight| weight / total).collect();
            let layers = group.candidates()[candidate]
                .iter()
                .map(|layer| offset + layer)
                .collect();
            Choice {
                candidate,
                layers,
                confidence: probabilities[candidate],
                probabilities,
            }
        })
        .collect();
    let kept = choices
        .iter()
        .flat_map(|choice| choice.layers.iter().copied())
        .collect();
    Decision { choices, kept }
}
