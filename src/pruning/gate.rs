//! The differentiable choice of one candidate mask per group and sample.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use serde::{Deserialize, Serialize};

use super::groups::{Group, Groups};
use crate::ops::FusedOps;

/// Temperature and scaling of the gate, linear over the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Annealing {
    /// Softmax temperature at the first and last step.
    pub tau: (f64, f64),
    /// Factor of the logits at the first and last step (MaskLLM, arXiv 2409.17481).
    pub scaling: (f64, f64),
    /// Number of steps in the run.
    pub steps: usize,
}

impl Annealing {
    /// (tau, scaling) at a step.
    pub fn at(&self, step: usize) -> (f64, f64) {
        let done = step as f64 / self.steps.saturating_sub(1).max(1) as f64;
        let line = |(first, last): (f64, f64)| first + (last - first) * done.min(1.0);
        (line(self.tau), line(self.scaling))
    }
}

/// One group's sampled masks.
#[derive(Debug, Clone)]
pub struct GateDraw<B: Backend> {
    /// Probabilities `softmax((logits scaling + gumbel) / tau)`, `[batch, candidates]`.
    pub soft: Tensor<B, 2>,
    /// One-hot argmax of `soft`, the first on ties, `[batch, candidates]`.
    pub hard: Tensor<B, 2>,
    /// The chosen mask, `[batch, layers of the group]`; its gradient is that of `soft`
    /// (straight-through).
    pub mask: Tensor<B, 2>,
}

/// Draws a mask per sample (TinyFusion, equations 4 and 5). `logits` is `[1, candidates]`, `gumbel`
/// `[batch, candidates]`.
///
/// ```
/// # #[cfg(feature = "ndarray")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use burn::tensor::Tensor;
/// use burn_ndarray::NdArray;
/// use tinyfusion::pruning::{Group, draw};
///
/// // One layer of two stays: the candidates are [1, 0] and [0, 1].
/// let group = Group::new(1, 2)?;
/// let logits = Tensor::<NdArray, 2>::from_floats([[0.0, 0.5]], &Default::default());
/// // The noise of the second sample turns the choice.
/// let gumbel = Tensor::from_floats([[0.0, 0.0], [2.0, 0.0]], &Default::default());
/// let drawn = draw(group, logits, gumbel, 1.0, 1.0);
/// let masks: Vec<f32> = drawn.mask.into_data().to_vec()?;
/// assert_eq!(masks, [0.0, 1.0, 1.0, 0.0]);
/// # Ok(()) }
/// # #[cfg(not(feature = "ndarray"))] fn main() {}
/// ```
pub fn draw<B: FusedOps>(
    group: Group,
    logits: Tensor<B, 2>,
    gumbel: Tensor<B, 2>,
    tau: f64,
    scaling: f64,
) -> GateDraw<B> {
    let device = gumbel.device();
    let [batch, candidates] = gumbel.dims();
    let soft = B::row_softmax((logits.mul_scalar(scaling) + gumbel).div_scalar(tau));
    // The argmax is computed on the host, so that ties go to the first candidate on every backend;
    // the tensor is small.
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
    // Exactly zero in the forward pass, so that the mask is exactly the hard one.
    let straight_through = soft.clone() - soft.clone().detach();
    let mask = hard.clone().matmul(masks.clone()) + straight_through.matmul(masks);
    GateDraw { soft, hard, mask }
}

/// Index of the largest value, the first on ties.
fn argmax(values: &[f32]) -> usize {
    values.iter().enumerate().fold(
        0,
        |best, (index, value)| if *value > values[best] { index } else { best },
    )
}

/// The decision of one group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// Index of the most probable candidate.
    pub candidate: usize,
    /// Layers of the trunk that it keeps.
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
    /// Probability that each layer of the trunk is kept: the sum over the candidates that keep it.
    pub fn layer_probabilities(&self, groups: &Groups) -> Vec<f64> {
        let mut layers = vec![0.0; groups.depth()];
        let parts = groups.iter().zip(groups.offsets()).zip(&self.choices);
        for ((group, offset), choice) in parts {
            for (candidate, probability) in group.candidates().iter().zip(&choice.probabilities) {
                candidate
                    .iter()
                    .for_each(|layer| layers[offset + layer] += probability);
            }
        }
        layers
    }

    /// Mean confidence of the groups with a choice; a group that keeps all its layers has none.
    pub fn confidence(&self) -> f64 {
        let choosing: Vec<f64> = (self.choices.iter())
            .filter(|choice| choice.probabilities.len() > 1)
            .map(|choice| choice.confidence)
            .collect();
        choosing.iter().sum::<f64>() / choosing.len().max(1) as f64
    }
}

/// The most probable candidate of each group, from its logits (in training, the EMA's).
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

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn_ndarray::NdArray;

    use super::*;

    type B = Autodiff<NdArray>;

    /// d sum(mask upstream) / d logits in f64, directly by `y_i sum_j y_j (g_i - g_j)`.
    fn exact(
        group: Group,
        [logits, gumbel, upstream]: [&[f64]; 3],
        tau: f64,
        scaling: f64,
    ) -> Vec<f64> {
        let masks = group.masks();
        let (candidates, layers) = (masks.len(), group.of());
        let mut gradient = vec![0.0; candidates];
        for (gumbel, upstream) in gumbel.chunks(candidates).zip(upstream.chunks(layers)) {
            let z: Vec<f64> = (logits.iter().zip(gumbel))
                .map(|(logit, gumbel)| (logit * scaling + gumbel) / tau)
                .collect();
            let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let e: Vec<f64> = z.iter().map(|z| (z - most).exp()).collect();
            let y: Vec<f64> = e.iter().map(|e_i| e_i / e.iter().sum::<f64>()).collect();
            let g: Vec<f64> = (masks.iter())
                .map(|mask| {
                    mask.iter()
                        .zip(upstream)
                        .map(|(m, u)| f64::from(*m) * u)
                        .sum()
                })
                .collect();
            for i in 0..candidates {
                let sum: f64 = (0..candidates).map(|j| y[j] * (g[i] - g[j])).sum();
                gradient[i] += y[i] * sum * scaling / tau;
            }
        }
        gradient
    }

    /// Gates late in a run: tau 0.2, scaling 100, one candidate far ahead. Burn's composed backward
    /// was off by 1.6e-3 of the largest gradient here, PyTorch's f32 by 9e-5.
    #[test]
    fn a_saturated_gate_has_the_gradient_of_f64() {
        let (tau, scaling, batch) = (0.2, 100.0, 5);
        for (keep, of) in [(1, 2), (2, 4), (3, 4)] {
            let group = Group::new(keep, of).unwrap();
            let candidates = group.num_candidates();
            // The first leads by 2 nats before division by tau; values are f32, so that both sides
            // start from the same numbers.
            let wave = |i: usize, scale: f64| f64::from((scale * (i as f64 * 2.399).sin()) as f32);
            let logits: Vec<f64> = (0..candidates)
                .map(|i| f64::from(if i == 0 { 0.04f32 } else { 0.02 }) + wave(i, 1e-3))
                .map(|logit| f64::from(logit as f32))
                .collect();
            let gumbel: Vec<f64> = (0..batch * candidates).map(|i| wave(i + 7, 0.3)).collect();
            let upstream: Vec<f64> = (0..batch * of).map(|i| 1.0 + wave(i + 3, 0.9)).collect();
            let expected = exact(group, [&logits, &gumbel, &upstream], tau, scaling);

            let device = Default::default();
            let tensor = |values: &[f64], shape: [usize; 2]| {
                let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
                Tensor::<B, 2>::from_data(TensorData::new(values, shape), &device)
            };
            let logits = tensor(&logits, [1, candidates]).require_grad();
            let gumbel = tensor(&gumbel, [batch, candidates]);
            let drawn = draw(group, logits.clone(), gumbel, tau, scaling);
            let loss = (drawn.mask * tensor(&upstream, [batch, of])).sum();
            let gradient: Vec<f64> = logits
                .grad(&loss.backward())
                .unwrap()
                .into_data()
                .iter::<f64>()
                .collect();
            let largest = expected.iter().fold(0.0, |most: f64, g| most.max(g.abs()));
            for (actual, expected) in gradient.iter().zip(&expected) {
                let error = (actual - expected).abs() / largest;
                // Logits of about 20 after division by tau have an ulp of 2e-6, which is the error
                // of e^z.
                assert!(error < 5e-6, "{group}: {gradient:?}, expected {expected:?}");
            }
        }
    }
}
