//! Stochastic interpolants: paths from noise at time 0 to data at time 1, and what a network may
//! predict along them (Ma et al., "SiT", arXiv 2401.08740; Albergo et al., arXiv 2303.08797).
//!
//! A state at time `t` is `alpha(t) x_1 + sigma(t) x_0`, with data `x_1` and noise `x_0`. Velocity,
//! noise and score can be computed from each other, so that each can be sampled from by an ordinary
//! or a stochastic differential equation ([`transport`](super::transport)).

use burn::tensor::{Tensor, backend::Backend};
use serde::{Deserialize, Serialize};

use super::losses::{Term, mean, of_samples, square};
use super::objective::{Noised, Process, Times};

/// Beta of the variance-preserving path at its two ends (the reference's `sigma_min`, `sigma_max`).
const VP_BETA: (f64, f64) = (0.1, 20.0);

/// How data and noise are mixed over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Path {
    /// `alpha = t`, `sigma = 1 - t`.
    Linear,
    /// Generalised variance-preserving: `alpha = sin(pi t / 2)`, `sigma = cos(pi t / 2)`.
    Gvp,
    /// Variance-preserving, as in score-based diffusion (arXiv 2011.13456).
    Vp,
}

/// What the network predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Predicts {
    /// The velocity of the path.
    Velocity,
    /// The noise.
    Noise,
    /// The score, the gradient of the log density.
    Score,
}

impl Predicts {
    /// All, by their names.
    pub const NAMES: [(&'static str, Self); 3] = [
        ("velocity", Self::Velocity),
        ("noise", Self::Noise),
        ("score", Self::Score),
    ];
}

/// Weight over time of the noise and score losses; a velocity's is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weighting {
    /// 1.
    None,
    /// The weight that makes it the loss of the equivalent velocity.
    Velocity,
    /// Likelihood weighting (arXiv 2101.09258).
    Likelihood,
}

impl Weighting {
    /// All, by their names.
    pub const NAMES: [(&'static str, Self); 3] = [
        ("none", Self::None),
        ("velocity", Self::Velocity),
        ("likelihood", Self::Likelihood),
    ];
}

/// Coefficients of a path at one time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mix {
    /// Factor of the data.
    pub alpha: f64,
    /// Its derivative.
    pub alpha_rate: f64,
    /// Factor of the noise.
    pub sigma: f64,
    /// Its derivative.
    pub sigma_rate: f64,
    /// `alpha_rate / alpha`.
    pub log_rate: f64,
}

impl Path {
    /// All, by their names.
    pub const NAMES: [(&'static str, Self); 3] = [
        ("linear", Self::Linear),
        ("gvp", Self::Gvp),
        ("vp", Self::Vp),
    ];

    /// The coefficients at time `t`.
    pub fn at(self, t: f64) -> Mix {
        match self {
            Self::Linear => Mix {
                alpha: t,
                alpha_rate: 1.0,
                sigma: 1.0 - t,
                sigma_rate: -1.0,
                log_rate: 1.0 / t,
            },
            Self::Gvp => {
                let quarter = std::f64::consts::FRAC_PI_2;
                let (sine, cosine) = (quarter * t).sin_cos();
                Mix {
                    alpha: sine,
                    alpha_rate: quarter * cosine,
                    sigma: cosine,
                    sigma_rate: -quarter * sine,
                    log_rate: quarter / (quarter * t).tan(),
                }
            }
            Self::Vp => {
                let (low, high) = VP_BETA;
                let left = 1.0 - t;
                let log_alpha = -0.25 * left * left * (high - low) - 0.5 * left * low;
                let log_rate = 0.5 * left * (high - low) + 0.5 * low;
                let alpha = log_alpha.exp();
                // 1 - alpha^2 without cancellation near the data.
                let sigma = (-(2.0 * log_alpha).exp_m1()).sqrt();
                Mix {
                    alpha,
                    alpha_rate: alpha * log_rate,
                    sigma,
                    sigma_rate: -alpha * alpha * log_rate / sigma,
                    log_rate,
                }
            }
        }
    }

    /// The score's weight in the velocity: `log_rate sigma^2 - sigma sigma_rate`.
    pub fn drift_variance(self, t: f64) -> f64 {
        let mix = self.at(t);
        match self {
            // sigma sigma_rate is -alpha^2 log_rate, and alpha^2 + sigma^2 is 1: defined where
            // sigma is 0 too.
            Self::Vp => mix.log_rate,
            Self::Linear | Self::Gvp => {
                mix.log_rate * mix.sigma * mix.sigma - mix.sigma * mix.sigma_rate
            }
        }
    }
}

/// A function of each sample's time, `[batch, 1, 1, 1]`.
fn each<B: Backend>(t: &[f32], device: &B::Device, value: impl Fn(f64) -> f64) -> Tensor<B, 4> {
    let values: Vec<f32> = t.iter().map(|t| value(f64::from(*t)) as f32).collect();
    of_samples::<B>(&values, device).reshape([t.len(), 1, 1, 1])
}

/// A path, and the network's objective along it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interpolant {
    /// The path.
    pub path: Path,
    /// What the network predicts.
    pub predicts: Predicts,
    /// Weight of its loss.
    pub weighting: Weighting,
    /// Distance that training keeps from times where a value is undefined.
    pub train_eps: f64,
    /// Distance that sampling keeps from them.
    pub sample_eps: f64,
}

impl Interpolant {
    /// An interpolant with the reference's distances from the ends (`create_transport`). Where
    /// nothing is undefined, both are 0, whatever is asked for.
    pub fn new(
        path: Path,
        predicts: Predicts,
        weighting: Weighting,
        train_eps: Option<f64>,
        sample_eps: Option<f64>,
    ) -> Self {
        let (train, sample) = match (path, predicts) {
            (Path::Vp, _) => (1e-5, 1e-3),
            (_, Predicts::Velocity) => (0.0, 0.0),
            _ => (1e-3, 1e-3),
        };
        let fixed = path != Path::Vp && predicts == Predicts::Velocity;
        Self {
            path,
            predicts,
            weighting,
            train_eps: train_eps.filter(|_| !fixed).unwrap_or(train),
            sample_eps: sample_eps.filter(|_| !fixed).unwrap_or(sample),
        }
    }

    /// SiT's published interpolant: the velocity of the linear path.
    pub fn published() -> Self {
        Self::new(
            Path::Linear,
            Predicts::Velocity,
            Weighting::None,
            None,
            None,
        )
    }

    /// The interval of the training times.
    pub fn train_interval(&self) -> (f64, f64) {
        self.interval(self.train_eps)
    }

    /// The interval on which the ordinary differential equation is solved.
    pub fn ode_interval(&self) -> (f64, f64) {
        self.interval(self.sample_eps)
    }

    /// Whether a solver may evaluate times past the last: not where sigma is the root of a negative
    /// number.
    pub(super) fn goes_past_the_end(&self) -> bool {
        (self.path, self.predicts) != (Path::Vp, Predicts::Noise)
    }

    fn interval(&self, eps: f64) -> (f64, f64) {
        match (self.path, self.predicts) {
            (Path::Vp, _) => (0.0, 1.0 - eps),
            (_, Predicts::Velocity) => (0.0, 1.0),
            _ => (eps, 1.0 - eps),
        }
    }

    /// A coefficient of the path at each sample's time, `[batch, 1, 1, 1]`.
    fn at_each<B: Backend>(
        &self,
        t: &[f32],
        device: &B::Device,
        value: impl Fn(Mix) -> f64,
    ) -> Tensor<B, 4> {
        each(t, device, |t| value(self.path.at(t)))
    }

    /// The states at each sample's time, shaped like `data`, `[batch, channels, size, size]`.
    pub fn state<B: Backend>(
        &self,
        data: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        t: &[f32],
    ) -> Tensor<B, 4> {
        let device = data.device();
        data * self.at_each(t, &device, |mix| mix.alpha)
            + noise * self.at_each(t, &device, |mix| mix.sigma)
    }

    /// The velocities of the path at these states.
    pub fn path_velocity<B: Backend>(
        &self,
        data: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        t: &[f32],
    ) -> Tensor<B, 4> {
        let device = data.device();
        data * self.at_each(t, &device, |mix| mix.alpha_rate)
            + noise * self.at_each(t, &device, |mix| mix.sigma_rate)
    }

    /// The weighted squared error per sample, `[batch]`, of the network's `output` at
    /// [`state`](Self::state).
    pub fn mse<B: Backend>(
        &self,
        output: Tensor<B, 4>,
        data: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        t: &[f32],
    ) -> Tensor<B, 1> {
        let device = data.device();
        let error = match self.predicts {
            Predicts::Velocity => output - self.path_velocity(data, noise, t),
            Predicts::Noise => output - noise,
            Predicts::Score => output * self.at_each(t, &device, |mix| mix.sigma) + noise,
        };
        self.weighted(error, t)
    }

    /// The distance of two outputs per sample, `[batch]`, in the units of [`mse`](Self::mse).
    pub fn distance<B: Backend>(
        &self,
        output: Tensor<B, 4>,
        other: Tensor<B, 4>,
        t: &[f32],
    ) -> Tensor<B, 1> {
        let difference = output - other;
        let device = difference.device();
        let error = match self.predicts {
            Predicts::Velocity | Predicts::Noise => difference,
            Predicts::Score => difference * self.at_each(t, &device, |mix| mix.sigma),
        };
        self.weighted(error, t)
    }

    /// The mean of the squares, weighted by time.
    fn weighted<B: Backend>(&self, error: Tensor<B, 4>, t: &[f32]) -> Tensor<B, 1> {
        if self.predicts == Predicts::Velocity || self.weighting == Weighting::None {
            return mean(square(error));
        }
        let weight = |t: f64| {
            let (variance, sigma) = (self.path.drift_variance(t), self.path.at(t).sigma);
            match self.weighting {
                Weighting::None => 1.0,
                Weighting::Velocity => (variance / sigma).powi(2),
                Weighting::Likelihood => variance / (sigma * sigma),
            }
        };
        let weights = each(t, &error.device(), weight).reshape([t.len()]);
        mean(square(error)) * weights
    }

    /// The velocity of the probability flow at states `x`, from the network's output.
    pub fn velocity<B: Backend>(
        &self,
        output: Tensor<B, 4>,
        x: Tensor<B, 4>,
        t: &[f32],
    ) -> Tensor<B, 4> {
        if self.predicts == Predicts::Velocity {
            return output;
        }
        let score = self.score(output, x.clone(), t);
        self.velocity_of_score(score, x, t)
    }

    /// The velocity equivalent to a score.
    pub fn velocity_of_score<B: Backend>(
        &self,
        score: Tensor<B, 4>,
        x: Tensor<B, 4>,
        t: &[f32],
    ) -> Tensor<B, 4> {
        let device = x.device();
        x * self.at_each(t, &device, |mix| mix.log_rate)
            + score * each(t, &device, |t| self.path.drift_variance(t))
    }

    /// The score at states `x`, from the network's output.
    pub fn score<B: Backend>(
        &self,
        output: Tensor<B, 4>,
        x: Tensor<B, 4>,
        t: &[f32],
    ) -> Tensor<B, 4> {
        let device = x.device();
        match self.predicts {
            Predicts::Score => output,
            Predicts::Noise => output / self.at_each(t, &device, |mix| -mix.sigma),
            Predicts::Velocity => self.score_of_velocity(output, x, t),
        }
    }

    /// The score equivalent to a velocity.
    pub fn score_of_velocity<B: Backend>(
        &self,
        velocity: Tensor<B, 4>,
        x: Tensor<B, 4>,
        t: &[f32],
    ) -> Tensor<B, 4> {
        let device = x.device();
        let ratio = |mix: Mix| mix.alpha / mix.alpha_rate;
        let variance = |mix: Mix| mix.sigma * (mix.sigma - ratio(mix) * mix.sigma_rate);
        (velocity * self.at_each(t, &device, ratio) - x) / self.at_each(t, &device, variance)
    }

    /// The noise equivalent to a velocity.
    pub fn noise_of_velocity<B: Backend>(
        &self,
        velocity: Tensor<B, 4>,
        x: Tensor<B, 4>,
        t: &[f32],
    ) -> Tensor<B, 4> {
        let device = x.device();
        let ratio = |mix: Mix| mix.alpha / mix.alpha_rate;
        let scale = |mix: Mix| ratio(mix) * mix.sigma_rate - mix.sigma;
        (velocity * self.at_each(t, &device, ratio) - x) / self.at_each(t, &device, scale)
    }

    /// The mean of the data given `x` and its score (Tweedie's formula).
    pub fn denoised<B: Backend>(
        &self,
        score: Tensor<B, 4>,
        x: Tensor<B, 4>,
        t: &[f32],
    ) -> Tensor<B, 4> {
        let device = x.device();
        x / self.at_each(t, &device, |mix| mix.alpha)
            + score * self.at_each(t, &device, |mix| mix.sigma * mix.sigma / mix.alpha)
    }
}

/// The channels of an output that belong to the interpolant: a SiT's network may have twice as
/// many, the rest for a variance.
pub(super) fn own<B: Backend>(output: Tensor<B, 4>, state: &Tensor<B, 4>) -> Tensor<B, 4> {
    output.narrow(1, 0, state.dims()[1])
}

impl Process for Interpolant {
    fn times(&self) -> Times {
        let (first, last) = self.train_interval();
        Times::Between(first, last)
    }

    fn noised<B: Backend>(
        &self,
        clean: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        t: &[f32],
    ) -> Tensor<B, 4> {
        self.state(clean, noise, t)
    }

    /// The times themselves.
    fn told<B: Backend>(&self, t: &[f32], device: &B::Device) -> Tensor<B, 1> {
        of_samples(t, device)
    }

    fn error<B: Backend>(&self, seen: &Noised<B>, output: Tensor<B, 4>) -> Tensor<B, 1> {
        let output = own(output, &seen.state);
        self.mse(output, seen.clean.clone(), seen.noise.clone(), &seen.t)
    }

    /// `mse`.
    fn loss<B: Backend>(&self, seen: &Noised<B>, output: Tensor<B, 4>) -> Vec<Term<B>> {
        vec![("mse", self.error(seen, output))]
    }

    /// `kd`.
    fn likeness<B: Backend>(
        &self,
        seen: &Noised<B>,
        output: Tensor<B, 4>,
        teacher: Tensor<B, 4>,
    ) -> Vec<Term<B>> {
        let (output, teacher) = (own(output, &seen.state), own(teacher, &seen.state));
        vec![("kd", self.distance(output, teacher, &seen.t))]
    }

    fn names(&self) -> (&'static [&'static str], &'static [&'static str]) {
        (&["mse"], &["kd"])
    }
}
