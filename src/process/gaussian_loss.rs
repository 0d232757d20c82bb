//! Losses of Gaussian diffusion: the noise, and the variance by the variational bound (arXiv
//! 2102.09672).

use burn::tensor::{Tensor, backend::Backend};

use super::GaussianDiffusion;
use super::likelihood::{discretized_gaussian_log_likelihood, normal_kl};
use super::losses::{Term, mean, square};
use super::objective::{Noised, Process, Times};

/// Times as steps of the process.
fn steps(t: &[f32]) -> Vec<usize> {
    t.iter().map(|step| *step as usize).collect()
}

impl Process for GaussianDiffusion {
    fn times(&self) -> Times {
        Times::Steps(self.steps())
    }

    fn noised<B: Backend>(
        &self,
        clean: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        t: &[f32],
    ) -> Tensor<B, 4> {
        self.q_sample(clean, &steps(t), noise)
    }

    fn told<B: Backend>(&self, t: &[f32], device: &B::Device) -> Tensor<B, 1> {
        self.model_timesteps(&steps(t), device)
    }

    /// The squared error of the predicted noise.
    fn error<B: Backend>(&self, seen: &Noised<B>, output: Tensor<B, 4>) -> Tensor<B, 1> {
        let channels = seen.state.dims()[1];
        mean(square(output.narrow(1, 0, channels) - seen.noise.clone()))
    }

    /// `mse`, and `vb` where the variance is learned: the bound in bits per dimension, which trains
    /// only the variance.
    fn loss<B: Backend>(&self, seen: &Noised<B>, output: Tensor<B, 4>) -> Vec<Term<B>> {
        let mut terms = vec![("mse", self.error(seen, output.clone()))];
        if output.dims()[1] > seen.state.dims()[1] {
            let t = steps(&seen.t);
            let (mean, log_variance) = self.q_posterior(seen.clean.clone(), seen.state.clone(), &t);
            terms.push(("vb", self.bound(seen, mean, log_variance, output)));
        }
        terms
    }

    /// `kd`, the squared error against the teacher's noise, and `vb_kd`, the KL from the teacher's
    /// step to the student's.
    fn likeness<B: Backend>(
        &self,
        seen: &Noised<B>,
        output: Tensor<B, 4>,
        teacher: Tensor<B, 4>,
    ) -> Vec<Term<B>> {
        let channels = seen.state.dims()[1];
        let taught = teacher.clone().narrow(1, 0, channels);
        let error = mean(square(output.clone().narrow(1, 0, channels) - taught));
        let mut terms = vec![("kd", error)];
        if output.dims()[1] > channels {
            let step = self.predict(teacher, seen.state.clone(), &steps(&seen.t), false);
            let bound = self.bound(seen, step.mean, step.log_variance, output);
            terms.push(("vb_kd", bound));
        }
        terms
    }

    fn names(&self) -> (&'static [&'static str], &'static [&'static str]) {
        (&["mse", "vb"], &["kd", "vb_kd"])
    }
}

impl GaussianDiffusion {
    /// KL from a Gaussian to the network's step, or the network's decoder likelihood at t = 0; in
    /// bits per dimension. The network's mean is detached: the bound trains only the variance.
    fn bound<B: Backend>(
        &self,
        seen: &Noised<B>,
        mean1: Tensor<B, 4>,
        log_variance1: Tensor<B, 4>,
        output: Tensor<B, 4>,
    ) -> Tensor<B, 1> {
        let (channels, t) = (seen.state.dims()[1], steps(&seen.t));
        let epsilon = output.clone().narrow(1, 0, channels).detach();
        let output = Tensor::cat(vec![epsilon, output.narrow(1, channels, channels)], 1);
        let step = self.predict(output, seen.state.clone(), &t, false);
        let kl = mean(normal_kl(
            mean1,
            log_variance1,
            step.mean.clone(),
            step.log_variance.clone(),
        ));
        let bits = 1.0 / std::f64::consts::LN_2;
        let first: Vec<bool> = t.iter().map(|&step| step == 0).collect();
        if !first.contains(&true) {
            return kl.mul_scalar(bits);
        }
        let likelihood = mean(discretized_gaussian_log_likelihood(
            seen.clean.clone(),
            step.mean,
            step.log_variance.mul_scalar(0.5),
        ));
        let first = Tensor::from_bool(first.as_slice().into(), &kl.device());
        kl.mask_where(first, likelihood.neg()).mul_scalar(bits)
    }
}
