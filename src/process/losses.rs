//! Training losses: fine-tuning, distillation, and masked distillation of features.

use burn::tensor::{Int, Tensor, backend::Backend};
use serde::Serialize;

use super::gaussian::GaussianDiffusion;
use super::likelihood::{discretized_gaussian_log_likelihood, normal_kl};
use crate::models::Network;
use crate::ops::FusedOps;
use crate::trunk::{BlockHook, Tap};

/// Terms of a loss, each per sample `[batch]`. `total` is what training minimises the mean of.
#[derive(Debug, Clone)]
pub struct Terms<B: Backend> {
    /// Weighted sum of the others.
    pub total: Tensor<B, 1>,
    /// Squared error of the predicted noise.
    pub mse: Tensor<B, 1>,
    /// Variational bound, in bits per dimension; it trains the variance alone.
    pub vb: Option<Tensor<B, 1>>,
    /// Squared error against the teacher's predicted noise.
    pub kd: Option<Tensor<B, 1>>,
    /// KL from the teacher's denoising step to the student's, in bits per dimension.
    pub vb_kd: Option<Tensor<B, 1>>,
    /// Squared error of (masked) tapped features.
    pub features: Option<Tensor<B, 1>>,
}

/// Weights of a distillation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Distillation {
    /// Weight of the teacher's terms; the ground truth has `1 - alpha`.
    pub alpha: f64,
    /// What is done about features, if anything.
    pub features: Option<MaskedFeatures>,
}

/// Distillation of tapped features.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MaskedFeatures {
    /// Pairs of (student layer, teacher layer).
    pub taps: Vec<(usize, usize)>,
    /// Activations `k` standard deviations from their mean, or further, are left out (TinyFusion, section 4.4);
    /// without, all count (RepKD).
    pub k: Option<f64>,
    /// Weight at the first and at the last step, linear between.
    pub beta: (f64, f64),
}

impl MaskedFeatures {
    /// The weight at `step` of `steps`.
    pub fn weight(&self, step: usize, steps: usize) -> f64 {
        let done = step as f64 / steps.saturating_sub(1).max(1) as f64;
        self.beta.0 + (self.beta.1 - self.beta.0) * done.min(1.0)
    }
}

/// What a teacher says of a noised batch.
#[derive(Debug, Clone)]
pub struct TeacherOutput<B: Backend> {
    /// The network's output.
    pub output: Tensor<B, 4>,
    /// Its tapped features, `[batch, tokens, width]` each.
    pub features: Vec<Tensor<B, 3>>,
}

/// A noised batch, ready for a network: everything a loss needs besides the network.
#[derive(Debug, Clone)]
pub struct Objective<'a, B: Backend> {
    /// The process.
    pub diffusion: &'a GaussianDiffusion,
    /// Clean samples.
    pub x_start: Tensor<B, 4>,
    /// The noise that is added.
    pub noise: Tensor<B, 4>,
    /// Step of each sample.
    pub t: &'a [usize],
    /// Labels, dropped ones already replaced by the null class.
    pub y: Tensor<B, 1, Int>,
}

impl<B: Backend> Objective<'_, B> {
    /// The noised samples.
    pub fn x_t(&self) -> Tensor<B, 4> {
        self.diffusion
            .q_sample(self.x_start.clone(), self.t, self.noise.clone())
    }

    /// The terms of plain training (fine-tuning) for a network's output at `x_t`.
    pub fn terms(&self, x_t: Tensor<B, 4>, output: Tensor<B, 4>) -> Terms<B> {
        let channels = x_t.dims()[1];
        let mse = mean(square(
            output.clone().narrow(1, 0, channels) - self.noise.clone(),
        ));
        let vb = (output.dims()[1] > channels).then(|| {
            let (true_mean, true_log_variance) =
                self.diffusion
                    .q_posterior(self.x_start.clone(), x_t.clone(), self.t);
            self.bound(true_mean, true_log_variance, x_t, output)
        });
        let total = vb.iter().fold(mse.clone(), |sum, vb| sum + vb.clone());
        Terms {
            total,
            mse,
            vb,
            kd: None,
            vb_kd: None,
            features: None,
        }
    }

    /// KL from a Gaussian to the network's step, the network's decoder likelihood at t = 0; in bits per dimension.
    /// The network's mean is detached: the bound trains the variance only.
    fn bound(
        &self,
        mean1: Tensor<B, 4>,
        log_variance1: Tensor<B, 4>,
        x_t: Tensor<B, 4>,
        output: Tensor<B, 4>,
    ) -> Tensor<B, 1> {
        let channels = x_t.dims()[1];
        let epsilon = output.clone().narrow(1, 0, channels).detach();
        let output = Tensor::cat(vec![epsilon, output.narrow(1, channels, channels)], 1);
        let step = self.diffusion.predict(output, x_t, self.t, false);
        let kl = mean(normal_kl(
            mean1,
            log_variance1,
            step.mean.clone(),
            step.log_variance.clone(),
        ));
        let bits = 1.0 / std::f64::consts::LN_2;
        let first: Vec<bool> = self.t.iter().map(|&step| step == 0).collect();
        if !first.contains(&true) {
            return kl.mul_scalar(bits);
        }
        let likelihood = mean(discretized_gaussian_log_likelihood(
            self.x_start.clone(),
            step.mean,
            step.log_variance.mul_scalar(0.5),
        ));
        let first = Tensor::from_bool(first.as_slice().into(), &kl.device());
        kl.mask_where(first, likelihood.neg()).mul_scalar(bits)
    }

    /// The terms of distillation: fine-tuning's, the teacher's, and the features' with weight `beta`.
    ///
    /// `alpha (kd + vb_kd) + (1 - alpha) (mse + vb) + beta features` (TinyFusion, section 4.4).
    pub fn distillation_terms(
        &self,
        x_t: Tensor<B, 4>,
        output: Tensor<B, 4>,
        features: &[Tensor<B, 3>],
        teacher: &TeacherOutput<B>,
        distillation: &Distillation,
        beta: f64,
    ) -> Terms<B> {
        let channels = x_t.dims()[1];
        let truth = self.terms(x_t.clone(), output.clone());
        let taught = teacher.output.clone().narrow(1, 0, channels);
        let kd = mean(square(output.clone().narrow(1, 0, channels) - taught));
        let vb_kd = (output.dims()[1] > channels).then(|| {
            let step = self
                .diffusion
                .predict(teacher.output.clone(), x_t.clone(), self.t, false);
            self.bound(step.mean, step.log_variance, x_t, output)
        });
        let taught = vb_kd.iter().fold(kd.clone(), |sum, vb| sum + vb.clone());
        let mut total = taught.mul_scalar(distillation.alpha)
            + truth.total.mul_scalar(1.0 - distillation.alpha);
        let features = distillation.features.as_ref().map(|wanted| {
            let loss = masked_feature_loss(features, &teacher.features, wanted.k);
            total = total.clone() + loss.clone().mul_scalar(beta);
            loss
        });
        Terms {
            total,
            kd: Some(kd),
            vb_kd,
            features,
            ..truth
        }
    }
}

impl<B: FusedOps> Objective<'_, B> {
    /// Runs `network` on the noised samples.
    pub fn run(
        &self,
        network: &Network<B>,
        x_t: Tensor<B, 4>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 4> {
        let t = self.diffusion.model_timesteps(self.t, &x_t.device());
        network.forward(x_t, t, self.y.clone(), hook)
    }

    /// What `teacher` says of the noised samples, features of `layers` tapped.
    pub fn teach(&self, teacher: &Network<B>, layers: &[usize]) -> TeacherOutput<B> {
        let mut tap = Tap::new(layers.iter().copied());
        let output = self.run(teacher, self.x_t(), &mut tap);
        TeacherOutput {
            output,
            features: tap.outputs,
        }
    }
}

/// Mean squared difference of masked features, averaged over taps: `[batch]`.
///
/// Per sample, activations at `k` (unbiased) standard deviations from their mean or further become 0, each side by
/// its own statistics, and the mean runs over all entries, masked ones counted (as the reference does).
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

/// The mask of typical activations: 1 where `|x - mean| < k std` of a sample's tokens and channels, else 0. Not differentiated.
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

/// Mean over all but the batch.
pub(super) fn mean<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, 1> {
    let batch = x.dims()[0];
    let rest = x.shape().num_elements() / batch;
    let flat: Tensor<B, 2> = x.reshape([batch, rest]);
    flat.mean_dim(1).squeeze_dim(1)
}

pub(super) fn square<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    x.clone() * x
}
