//! Gaussian diffusion with epsilon prediction: noising, posteriors, and one denoising step.

use burn::tensor::{Tensor, backend::Backend};

use super::losses::of_samples;
use super::schedule::{DiffusionTables, RespacingError, respace};

/// How the variance of a denoising step is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variance {
    /// Interpolated by the network between the posterior's and beta, in log space (arXiv
    /// 2102.09672, section 3.1).
    LearnedRange,
    /// beta (the posterior's at t = 0).
    FixedLarge,
    /// The posterior's.
    FixedSmall,
}

/// A (respaced) diffusion process. Timesteps `t` are indices into it, on the host, one per sample.
#[derive(Debug, Clone)]
pub struct GaussianDiffusion {
    /// Tables by respaced step.
    pub tables: DiffusionTables,
    /// The original step of each respaced one: the network's input.
    pub timestep_map: Vec<usize>,
    /// Variance of a denoising step.
    pub variance: Variance,
}

/// A step's distribution as the network predicts it, `[batch, channels, size, size]` each.
#[derive(Debug, Clone)]
pub struct Prediction<B: Backend> {
    /// Mean of the previous state.
    pub mean: Tensor<B, 4>,
    /// Log variance of the previous state.
    pub log_variance: Tensor<B, 4>,
    /// The predicted clean sample.
    pub x_start: Tensor<B, 4>,
}

impl GaussianDiffusion {
    /// The published process, respaced to `spacing` (see [`respace`]), with learned-range variance.
    ///
    /// # Errors
    /// When the respacing is invalid.
    pub fn new(spacing: &str) -> Result<Self, RespacingError> {
        Ok(Self::over(respace(spacing)?, DiffusionTables::linear))
    }

    /// The same over the cosine schedule.
    ///
    /// # Errors
    /// When the respacing is invalid.
    pub fn cosine(spacing: &str) -> Result<Self, RespacingError> {
        Ok(Self::over(respace(spacing)?, DiffusionTables::cosine))
    }

    /// The full process of 1,000 steps.
    pub fn full() -> Self {
        Self::over((0..1000).collect(), DiffusionTables::linear)
    }

    /// The full process over the cosine schedule.
    pub fn full_cosine() -> Self {
        Self::over((0..1000).collect(), DiffusionTables::cosine)
    }

    fn over(timestep_map: Vec<usize>, tables: fn(&[usize]) -> DiffusionTables) -> Self {
        Self {
            tables: tables(&timestep_map),
            timestep_map,
            variance: Variance::LearnedRange,
        }
    }

    /// The same process with another variance.
    pub fn with_variance(self, variance: Variance) -> Self {
        Self { variance, ..self }
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.timestep_map.len()
    }

    /// The network's time input for steps `t`: `[batch]`.
    pub fn model_timesteps<B: Backend>(&self, t: &[usize], device: &B::Device) -> Tensor<B, 1> {
        let mapped: Vec<f32> = t
            .iter()
            .map(|&step| self.timestep_map[step] as f32)
            .collect();
        of_samples(&mapped, device)
    }

    /// Gathers a table at `t`: `[batch, 1, 1, 1]`.
    pub(super) fn gather<B: Backend>(
        table: &[f64],
        t: &[usize],
        device: &B::Device,
    ) -> Tensor<B, 4> {
        let values: Vec<f32> = t.iter().map(|&step| table[step] as f32).collect();
        of_samples::<B>(&values, device).reshape([t.len(), 1, 1, 1])
    }

    /// Noises `x_start` to step `t`: a draw from q(x_t | x_0), using `noise`.
    pub fn q_sample<B: Backend>(
        &self,
        x_start: Tensor<B, 4>,
        t: &[usize],
        noise: Tensor<B, 4>,
    ) -> Tensor<B, 4> {
        let device = x_start.device();
        x_start * Self::gather(&self.tables.sqrt_alphas_cumprod, t, &device)
            + noise * Self::gather(&self.tables.sqrt_one_minus_alphas_cumprod, t, &device)
    }

    /// Mean and log variance of q(x_t | x_0); the log variance is `[batch, 1, 1, 1]`.
    pub fn q_mean_log_variance<B: Backend>(
        &self,
        x_start: Tensor<B, 4>,
        t: &[usize],
    ) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let device = x_start.device();
        let mean = x_start * Self::gather(&self.tables.sqrt_alphas_cumprod, t, &device);
        (
            mean,
            Self::gather(&self.tables.log_one_minus_alphas_cumprod, t, &device),
        )
    }

    /// Mean and (clipped) log variance of q(x_{t-1} | x_t, x_0); the log variance is `[batch, 1, 1,
    /// 1]`.
    pub fn q_posterior<B: Backend>(
        &self,
        x_start: Tensor<B, 4>,
        x_t: Tensor<B, 4>,
        t: &[usize],
    ) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let device = x_start.device();
        let mean = x_start * Self::gather(&self.tables.posterior_mean_coef1, t, &device)
            + x_t * Self::gather(&self.tables.posterior_mean_coef2, t, &device);
        (
            mean,
            Self::gather(&self.tables.posterior_log_variance_clipped, t, &device),
        )
    }

    /// p(x_{t-1} | x_t) from the network's `output` `[batch, channels or 2 channels, size, size]`;
    /// `clip` bounds the predicted clean sample to [−1, 1].
    pub fn predict<B: Backend>(
        &self,
        output: Tensor<B, 4>,
        x_t: Tensor<B, 4>,
        t: &[usize],
        clip: bool,
    ) -> Prediction<B> {
        let device = x_t.device();
        let channels = x_t.dims()[1];
        let [batch, _, height, width] = x_t.dims();
        let low = Self::gather(&self.tables.posterior_log_variance_clipped, t, &device);
        let log_variance = match self.variance {
            Variance::LearnedRange => {
                let high = Self::gather(&self.tables.log_betas, t, &device);
                let fraction = (output.clone().narrow(1, channels, channels) + 1.0) / 2.0;
                fraction.clone() * high + (fraction.neg() + 1.0) * low
            }
            Variance::FixedSmall => low.expand([batch, channels, height, width]),
            Variance::FixedLarge => {
                let first = self.tables.posterior_log_variance_clipped.iter().take(1);
                let table: Vec<f64> = first
                    .chain(self.tables.log_betas.iter().skip(1))
                    .copied()
                    .collect();
                Self::gather::<B>(&table, t, &device).expand([batch, channels, height, width])
            }
        };
        let epsilon = output.narrow(1, 0, channels);
        let x_start = x_t.clone()
            * Self::gather(&self.tables.sqrt_recip_alphas_cumprod, t, &device)
            - epsilon * Self::gather(&self.tables.sqrt_recipm1_alphas_cumprod, t, &device);
        let x_start = if clip {
            x_start.clamp(-1.0, 1.0)
        } else {
            x_start
        };
        let (mean, _) = self.q_posterior(x_start.clone(), x_t, t);
        Prediction {
            mean,
            log_variance,
            x_start,
        }
    }

    /// One ancestral step from a [`predict`](Self::predict)ion: the mean plus noise, without noise
    /// at t = 0.
    pub fn ddpm_step<B: Backend>(
        &self,
        prediction: Prediction<B>,
        t: &[usize],
        noise: Tensor<B, 4>,
    ) -> Tensor<B, 4> {
        let device = noise.device();
        let is_not_last: Vec<f32> = t
            .iter()
            .map(|&step| f32::from(u8::from(step != 0)))
            .collect();
        let is_not_last = of_samples::<B>(&is_not_last, &device).reshape([t.len(), 1, 1, 1]);
        prediction.mean + prediction.log_variance.mul_scalar(0.5).exp() * noise * is_not_last
    }

    /// One DDIM step (arXiv 2010.02502, equation 12) from a prediction.
    pub fn ddim_step<B: Backend>(
        &self,
        prediction: Prediction<B>,
        x_t: Tensor<B, 4>,
        t: &[usize],
        eta: f64,
        noise: Tensor<B, 4>,
    ) -> Tensor<B, 4> {
        let device = x_t.device();
        let tables = &self.tables;
        let x_start = prediction.x_start;
        let epsilon = (x_t * Self::gather(&tables.sqrt_recip_alphas_cumprod, t, &device)
            - x_start.clone())
            / Self::gather(&tables.sqrt_recipm1_alphas_cumprod, t, &device);
        let per_sample = |f: &dyn Fn(f64, f64, usize) -> f64| -> Tensor<B, 4> {
            let table: Vec<f64> = (0..self.steps())
                .map(|i| f(tables.alphas_cumprod[i], tables.alphas_cumprod_prev[i], i))
                .collect();
            Self::gather(&table, t, &device)
        };
        let sigma =
            |a: f64, prev: f64| eta * ((1.0 - prev) / (1.0 - a)).sqrt() * (1.0 - a / prev).sqrt();
        let direction =
            per_sample(&|a, prev, _| (1.0 - prev - sigma(a, prev).powi(2)).max(0.0).sqrt());
        let spread = per_sample(&|a, prev, step| if step == 0 { 0.0 } else { sigma(a, prev) });
        x_start * per_sample(&|_, prev, _| prev.sqrt()) + direction * epsilon + spread * noise
    }
}
