//! The differentiable choice of one candidate mask per group and sample.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use serde::{Deserialize, Serialize};

use super::groups::{Group, Groups};
use crate::ops::{self, FusedOps};

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
    /// Probabilities `softmax((logits scaling + gumbel) / tau)`, `[batch, candidates]`. Of a group
    /// by layer, soft numbers of times that each layer is taken, `[batch, layers of the group]`.
    pub soft: Tensor<B, 2>,
    /// One-hot argmax of `soft`, the first on ties, `[batch, candidates]`. Of a group by layer, the
    /// mask itself.
    pub hard: Tensor<B, 2>,
    /// The chosen mask, `[batch, layers of the group]`; its gradient is that of `soft`
    /// (straight-through).
    pub mask: Tensor<B, 2>,
}

/// Draws a mask per sample (TinyFusion, equations 4 and 5). `logits` is `[1, logits of the group]`,
/// `gumbel` `[batch, logits of the group]`.
///
/// In a group [by layer](Group::by_layer) the N layers stay that have the largest `logits scaling +
/// gumbel`: so N of M are drawn one after the other without replacement (Kool et al., "Stochastic
/// Beams and Where to Find Them", arXiv 1903.06059). The gradient is that of N soft choices, each
/// without what those before it took (Xie and Ermon, "Reparameterizable Subset Sampling via
/// Continuous Relaxations", arXiv 1901.10517).
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
    if group.by_layer() {
        return draw_layers(group.keep(), logits, gumbel, tau, scaling);
    }
    let device = gumbel.device();
    let candidates = gumbel.dims()[1];
    let soft = B::row_softmax((logits.mul_scalar(scaling) + gumbel).div_scalar(tau));
    let hard = picked(&soft, |row| vec![argmax(row)]);
    let masks: Vec<f32> = group.masks().concat();
    let masks =
        Tensor::<B, 2>::from_data(TensorData::new(masks, [candidates, group.of()]), &device);
    // Exactly zero in the forward pass, so that the mask is exactly the hard one.
    let straight_through = soft.clone() - soft.clone().detach();
    let mask = hard.clone().matmul(masks.clone()) + straight_through.matmul(masks);
    GateDraw { soft, hard, mask }
}

/// Ones where `pick` says, of each row, and zeros elsewhere. It is computed on the host, so that
/// ties go to the first on every backend; the tensor is small.
fn picked<B: Backend>(values: &Tensor<B, 2>, pick: impl Fn(&[f32]) -> Vec<usize>) -> Tensor<B, 2> {
    let shape = values.dims();
    let read: Vec<f32> = values.clone().into_data().iter().collect();
    let mut ones = vec![0.0f32; read.len()];
    for (row, ones) in read.chunks(shape[1]).zip(ones.chunks_mut(shape[1])) {
        pick(row).into_iter().for_each(|index| ones[index] = 1.0);
    }
    Tensor::from_data(TensorData::new(ones, shape), &values.device())
}

/// Draws `keep` layers per sample, by their logits.
fn draw_layers<B: FusedOps>(
    keep: usize,
    logits: Tensor<B, 2>,
    gumbel: Tensor<B, 2>,
    tau: f64,
    scaling: f64,
) -> GateDraw<B> {
    let device = gumbel.device();
    let [batch, layers] = gumbel.dims();
    let mut scores = logits.mul_scalar(scaling) + gumbel;
    let hard = picked(&scores, |row| largest(row, keep));
    let mut soft = Tensor::zeros([batch, layers], &device);
    for _ in 0..keep {
        let (share, left) = share_and_left(scores.clone().div_scalar(tau));
        scores = scores + left;
        soft = soft + share;
    }
    let straight_through = soft.clone() - soft.clone().detach();
    GateDraw {
        mask: hard.clone() + straight_through,
        soft,
        hard,
    }
}

/// Far below every score.
const NEVER: f32 = -1e30;

/// The softmax of each row, and the logarithm of what it leaves of one, `log(1 - softmax)`: the
/// other values' part of the sum. Of a value that leads by more than a hundred nothing is left in
/// f32, but its logarithm, minus that lead, takes exactly so much off it that the next one leads.
fn share_and_left<B: FusedOps>(values: Tensor<B, 2>) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let [batch, count] = values.dims();
    let device = values.device();
    let most = values.clone().detach().max_dim(1);
    let values = values - most;
    let all = ops::log(values.clone().exp().sum_dim(1)); // [batch, 1]
    // Row i of a sample holds all values but the i-th.
    let mut own = vec![0.0; count * count];
    own.iter_mut()
        .step_by(count + 1)
        .for_each(|own| *own = NEVER);
    let own = Tensor::<B, 3>::from_data(TensorData::new(own, [1, count, count]), &device);
    let others = values
        .clone()
        .reshape([batch, 1, count])
        .expand([batch, count, count])
        + own;
    let most = others.clone().detach().max_dim(2);
    let rest = ops::log((others - most.clone()).exp().sum_dim(2)) + most; // [batch, count, 1]
    let left = rest.reshape([batch, count]) - all.clone();
    ((values - all).exp(), left)
}

/// Indices of the largest values, ascending; of equal values the first.
fn largest(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// The probability of each layer to be among `keep` that are drawn one after the other without
/// replacement, with probabilities in the ratio of `exp(weights)`.
///
/// A layer is drawn when its exponential clock of rate `exp(weight)` rings, and the drawing ends at
/// the `keep`-th ring. This takes the time of the end as fixed, which it is in the limit of many
/// layers (Rosén, "Asymptotic Theory for Successive Sampling", 1972).
fn inclusion(weights: &[f64], keep: usize) -> Vec<f64> {
    if keep >= weights.len() {
        return vec![1.0; weights.len()];
    }
    let at = |log_time: f64| {
        let rung = |weight: &f64| -(-(weight + log_time).exp()).exp_m1();
        weights.iter().map(rung).collect::<Vec<f64>>()
    };
    // At the ends nearly none or nearly all have rung: e^-50 is nothing, and e^5 certain.
    let most = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let least = weights.iter().copied().fold(f64::INFINITY, f64::min);
    let (mut low, mut high) = (-most - 50.0, -least + 5.0);
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        match at(middle).iter().sum::<f64>() < keep as f64 {
            true => low = middle,
            false => high = middle,
        }
    }
    at(0.5 * (low + high))
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
    /// Index of the most probable candidate; none of a group by layer.
    pub candidate: Option<usize>,
    /// Layers of the trunk that it keeps.
    pub layers: Vec<usize>,
    /// Its probability `max softmax(logits scaling)`; of a group by layer, the mean probability of
    /// the kept layers to be kept.
    pub confidence: f64,
    /// Probability of every candidate; of a group by layer, that each layer is kept.
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
            if group.by_layer() {
                layers[offset..offset + group.of()].copy_from_slice(&choice.probabilities);
                continue;
            }
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
            if group.by_layer() {
                return decide_layers(group.keep(), offset, logits, scaling);
            }
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
                candidate: Some(candidate),
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

/// The most probable layers of a group by layer.
fn decide_layers(keep: usize, offset: usize, logits: &[f32], scaling: f64) -> Choice {
    let kept = largest(logits, keep);
    let weights: Vec<f64> = logits
        .iter()
        .map(|logit| f64::from(*logit) * scaling)
        .collect();
    let probabilities = inclusion(&weights, keep);
    let sum: f64 = kept.iter().map(|layer| probabilities[*layer]).sum();
    Choice {
        candidate: None,
        layers: kept.into_iter().map(|layer| offset + layer).collect(),
        confidence: sum / keep as f64,
        probabilities,
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn_ndarray::NdArray;

    use super::*;
    use crate::random::{self, Stream};

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

    /// Numbers that look random, the same everywhere.
    fn wave(i: usize, scale: f64) -> f64 {
        scale * ((i as f64 * 12.9898).sin() * 43758.5453).fract()
    }

    fn noise(step: u64, count: usize) -> Vec<f64> {
        let drawn = random::gumbel(0, Stream::Gumbel, step, 0, count);
        drawn.into_iter().map(f64::from).collect()
    }

    /// Soft choices of layers in f64, as `draw_layers` defines them.
    fn soft_layers(scores: &[f64], keep: usize, tau: f64) -> Vec<f64> {
        let mut scores = scores.to_vec();
        let mut soft = vec![0.0; scores.len()];
        for _ in 0..keep {
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let e: Vec<f64> = scores.iter().map(|s| ((s - most) / tau).exp()).collect();
            let sum: f64 = e.iter().sum();
            let left = |own: usize| -> f64 {
                let others = |of: &[f64]| -> Vec<f64> {
                    let others = of.iter().enumerate().filter(|(other, _)| *other != own);
                    others.map(|(_, value)| *value).collect()
                };
                let second = others(&scores)
                    .into_iter()
                    .fold(f64::NEG_INFINITY, f64::max);
                let rest: f64 = others(&scores)
                    .iter()
                    .map(|s| ((s - second) / tau).exp())
                    .sum();
                (second - most) / tau + rest.ln() - sum.ln()
            };
            let left: Vec<f64> = (0..scores.len()).map(left).collect();
            for (layer, e) in e.iter().enumerate() {
                soft[layer] += e / sum;
                scores[layer] += left[layer];
            }
        }
        soft
    }

    fn rows(values: &[f64], width: usize) -> Tensor<B, 2> {
        let count = values.len() / width;
        let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
        Tensor::from_data(TensorData::new(values, [count, width]), &Default::default())
    }

    #[test]
    fn choices_of_layers_have_the_gradient_of_their_definition() {
        let (layers, keep, tau, scaling) = (16, 8, 0.7, 10.0);
        let logits: Vec<f64> = (0..layers).map(|i| wave(i, 0.1)).collect();
        let gumbel: Vec<f64> = (0..3 * layers).map(|i| wave(i + 50, 1.5)).collect();
        let upstream: Vec<f64> = (0..3 * layers).map(|i| wave(i + 200, 1.0)).collect();
        let loss = |logits: &[f64]| -> f64 {
            (gumbel.chunks(layers).zip(upstream.chunks(layers)))
                .map(|(gumbel, upstream)| {
                    let scores = logits.iter().zip(gumbel);
                    let scores: Vec<f64> = scores.map(|(l, g)| l * scaling + g).collect();
                    let soft = soft_layers(&scores, keep, tau);
                    soft.iter().zip(upstream).map(|(s, u)| s * u).sum::<f64>()
                })
                .sum()
        };
        let parameter = rows(&logits, layers).require_grad();
        let group = Group::new(keep, layers).unwrap();
        let drawn = draw(
            group,
            parameter.clone(),
            rows(&gumbel, layers),
            tau,
            scaling,
        );
        let sums: Vec<f32> = drawn.soft.clone().sum_dim(1).into_data().to_vec().unwrap();
        // A sum of 8 shares that each add up to one.
        assert!(sums.iter().all(|sum| (sum - 8.0).abs() < 1e-4), "{sums:?}");
        let total = (drawn.mask * rows(&upstream, layers)).sum();
        let gradient = parameter.grad(&total.backward()).unwrap();
        let gradient: Vec<f64> = gradient.into_data().iter().collect();
        let largest = gradient.iter().fold(0.0, |most: f64, g| most.max(g.abs()));
        for (layer, actual) in gradient.iter().enumerate() {
            // The error of a central difference is some 1e-10 of its value here; that of eight
            // softmaxes in f32, one after the other, decides.
            let step = 1e-5;
            let moved = |by: f64| {
                let mut logits = logits.clone();
                logits[layer] += by;
                loss(&logits)
            };
            let expected = (moved(step) - moved(-step)) / (2.0 * step);
            let error = (actual - expected).abs() / largest;
            assert!(error < 1e-4, "{layer}: {actual}, expected {expected}");
        }
    }

    #[test]
    fn a_layer_that_leads_by_far_is_taken_once() {
        let group = Group::new(8, 16).unwrap();
        // Two lead, by more than f32 leaves of one; of the next, near each other, six stay.
        let logits: Vec<f64> = (0..16)
            .map(|layer| match layer {
                0 => 3.0,
                1 => 1.0,
                _ => 0.5 + wave(layer, 5e-4),
            })
            .collect();
        let drawn = draw(group, rows(&logits, 16), rows(&[0.0; 16], 16), 0.1, 100.0);
        let soft: Vec<f64> = drawn.soft.into_data().iter().collect();
        let scores: Vec<f64> = logits.iter().map(|logit| 100.0 * logit).collect();
        let expected = soft_layers(&scores, 8, 0.1);
        assert!((expected[0] - 1.0).abs() < 1e-9 && (expected[1] - 1.0).abs() < 1e-9);
        assert!(expected[2..].iter().any(|share| (0.1..0.9).contains(share)));
        for (soft, expected) in soft.iter().zip(&expected) {
            // Scores of about 50 have an ulp of 4e-6, which tau makes the error of the exponent of
            // eight softmaxes, one after the other.
            assert!(
                (soft - expected).abs() < 2e-3,
                "{soft}, expected {expected}"
            );
        }
    }

    #[test]
    fn layers_are_drawn_without_replacement() {
        let (layers, keep) = (16, 8);
        let group = Group::new(keep, layers).unwrap();
        let logits: Vec<f64> = (0..layers).map(|i| 0.2 * i as f64).collect();
        let draws = 4000;
        let gumbel = noise(0, draws * layers);
        let drawn = draw(
            group,
            rows(&logits, layers),
            rows(&gumbel, layers),
            1.0,
            1.0,
        );
        let masks: Vec<f32> = drawn.mask.into_data().to_vec().unwrap();
        let mut share = vec![0.0; layers];
        for mask in masks.chunks(layers) {
            assert_eq!(mask.iter().sum::<f32>(), 8.0);
            for (layer, kept) in mask.iter().enumerate() {
                share[layer] += f64::from(*kept) / draws as f64;
            }
        }
        let expected = inclusion(&logits, keep);
        assert!((expected.iter().sum::<f64>() - 8.0).abs() < 1e-9);
        for (found, expected) in share.iter().zip(&expected) {
            // The standard error of a share is 0.008; the rest is the limit of many layers.
            assert!((found - expected).abs() < 0.04, "{found}, {expected}");
        }
        // Of far apart logits the first ones are certain, and so is what is left out.
        let certain = inclusion(&[500.0, 400.0, -300.0, -300.0], 2);
        assert!(certain[1] > 0.999 && certain[2] < 1e-9, "{certain:?}");
        assert_eq!(inclusion(&[1.0, 2.0], 2), [1.0, 1.0]);
    }

    #[test]
    fn gates_of_layers_learn_which_are_cheap() {
        let (layers, keep) = (16, 8);
        let group = Group::new(keep, layers).unwrap();
        let groups = Groups::new(vec![group], layers).unwrap();
        let cost: Vec<f64> = (0..layers).map(|i| (i * 7 % layers) as f64).collect();
        let mut logits = vec![0.02f32; layers];
        for step in 0..150 {
            let gumbel = noise(step, 8 * layers);
            let at: Vec<f64> = logits.iter().map(|logit| f64::from(*logit)).collect();
            let parameter = rows(&at, layers).require_grad();
            let drawn = draw(group, parameter.clone(), rows(&gumbel, layers), 2.0, 10.0);
            let loss = (drawn.mask * rows(&cost, layers)).sum();
            let gradient = parameter.grad(&loss.backward()).unwrap().into_data();
            for (logit, gradient) in logits.iter_mut().zip(gradient.iter::<f32>()) {
                *logit -= 1e-4 * gradient;
            }
        }
        let decision = decide(&groups, &[logits], 10.0);
        let cheap: Vec<usize> = (0..layers).filter(|layer| cost[*layer] < 8.0).collect();
        assert_eq!(decision.kept, cheap);
        assert_eq!(decision.choices[0].candidate, None);
        let mut layers = decision.layer_probabilities(&groups);
        layers.sort_by(f64::total_cmp);
        assert!(layers[0] < 0.1 && layers[15] > 0.99, "{layers:?}");
    }
}
