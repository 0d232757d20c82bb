//! Losses: the terms of a process, alone or with a teacher's, and masked features.

use burn::tensor::{Tensor, backend::Backend};
use serde::Serialize;

/// Terms of a loss, each per sample, `[batch]`. Training minimises the mean of `total`.
#[derive(Debug, Clone)]
pub struct Terms<B: Backend> {
    /// Weighted sum of the terms.
    pub total: Tensor<B, 1>,
    /// The terms by name.
    pub named: Vec<Term<B>>,
}

/// One term of a loss, `[batch]`, with its name in logs and on the dashboard.
pub type Term<B> = (&'static str, Tensor<B, 1>);

impl<B: Backend> Terms<B> {
    /// A term by its name.
    pub fn get(&self, name: &str) -> Option<&Tensor<B, 1>> {
        let mut terms = self.named.iter();
        terms
            .find(|(known, _)| *known == name)
            .map(|(_, term)| term)
    }
}

/// The sum of at least one term.
pub(super) fn sum<B: Backend>(terms: &[Term<B>]) -> Tensor<B, 1> {
    let ((_, first), rest) = terms.split_first().expect("every process has a term");
    (rest.iter()).fold(first.clone(), |sum, (_, term)| sum + term.clone())
}

/// Weights of a distillation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Distillation {
    /// Weight of the teacher's terms; those of the ground truth have `1 - alpha`.
    pub alpha: f64,
    /// Distillation of features, if any.
    pub features: Option<MaskedFeatures>,
}

/// Distillation of tapped features.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MaskedFeatures {
    /// Pairs of (student layer, teacher layer).
    pub taps: Vec<(usize, usize)>,
    /// Activations `k` standard deviations or further from their mean are left out (TinyFusion,
    /// section 4.4); without `k`, all count (RepKD).
    pub k: Option<f64>,
    /// Weight at the first and at the last step, linear in between.
    pub beta: (f64, f64),
}

impl MaskedFeatures {
    /// The weight at `step` of `steps`.
    pub fn weight(&self, step: usize, steps: usize) -> f64 {
        let done = step as f64 / steps.saturating_sub(1).max(1) as f64;
        self.beta.0 + (self.beta.1 - self.beta.0) * done.min(1.0)
    }
}

/// A teacher's output on a noised batch.
#[derive(Debug, Clone)]
pub struct TeacherOutput<B: Backend> {
    /// The network's output.
    pub output: Tensor<B, 4>,
    /// Its tapped features, `[batch, tokens, width]` each.
    pub features: Vec<Tensor<B, 3>>,
}

/// Mean squared difference of masked features, averaged over taps: `[batch]`.
///
/// Per sample, activations at `k` (unbiased) standard deviations from their mean or further become
/// 0. Student and teacher are masked by their own statistics, and the mean includes masked entries
/// (as in the reference).
pub fn masked_feature_loss<B: Backend>(
    student: &[Tensor<B, 3>],
    teacher: &[Tensor<B, 3>],
    k: Option<f64>,
) -> Tensor<B, 1> {
    let mask = |x: &Tensor<B, 3>| match k {
        Some(k) => x.clone() * typical(x, k),
        None => x.clone(),
    };
    let losses: Vec<Tensor<B, 2>> = student
        .iter()
        .zip(teacher)
        .map(|(student, teacher)| mean(square(mask(student) - mask(teacher))).unsqueeze_dim(1))
        .collect();
    Tensor::cat(losses, 1).mean_dim(1).squeeze_dim(1)
}

/// The mask of typical activations: 1 where `|x - mean| < k std` over a sample's tokens and
/// channels, else 0. Not differentiated.
pub fn typical<B: Backend>(x: &Tensor<B, 3>, k: f64) -> Tensor<B, 3> {
    let [batch, tokens, width] = x.dims();
    let flat: Tensor<B, 2> = x.clone().detach().reshape([batch, tokens * width]);
    let centred = flat.clone() - flat.mean_dim(1);
    let variance = (centred.clone() * centred.clone()).sum_dim(1)
        / (tokens * width).saturating_sub(1).max(1) as f64;
    let bound = variance
        .sqrt()
        .mul_scalar(k)
        .expand([batch, tokens * width]);
    centred
        .abs()
        .lower(bound)
        .float()
        .reshape([batch, tokens, width])
}

/// A value for each sample, `[batch]`. Equal ones, such as the times of a step of sampling, are
/// made on the device: to copy them there would wait for it.
pub(super) fn of_samples<B: Backend>(values: &[f32], device: &B::Device) -> Tensor<B, 1> {
    match values.split_first() {
        Some((first, rest)) if rest.iter().all(|value| value == first) => {
            Tensor::full([values.len()], *first, device)
        }
        _ => Tensor::from_floats(values, device),
    }
}

/// Mean over all dimensions but the batch.
pub(super) fn mean<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, 1> {
    let batch = x.dims()[0];
    let rest = x.shape().num_elements() / batch;
    let flat: Tensor<B, 2> = x.reshape([batch, rest]);
    flat.mean_dim(1).squeeze_dim(1)
}

pub(super) fn square<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    x.clone() * x
}
