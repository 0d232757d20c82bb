//! The interface between a process and training: a process defines the noised samples and the loss
//! of a network's output on them.

use std::fmt::Debug;
use std::sync::Arc;

use burn::tensor::{Int, Tensor, backend::Backend};

use super::losses::{Distillation, TeacherOutput, Term, Terms, masked_feature_loss, sum};
use super::{GaussianDiffusion, Interpolant};
use crate::models::Denoiser;
use crate::random::{self, Stream};
use crate::trunk::{BlockHook, Tap};

/// A generative process that a network learns.
///
/// Times are numbers on the host, one per sample, drawn from [`times`](Self::times): steps of a
/// discrete process, or numbers from the interval of a continuous one.
pub trait Process: Debug + Clone + Send + Sync + 'static {
    /// Distribution of the training times.
    fn times(&self) -> Times;

    /// Noised samples at times `t`, shaped like `clean`, `[batch, channels, size, size]`.
    fn noised<B: Backend>(
        &self,
        clean: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        t: &[f32],
    ) -> Tensor<B, 4>;

    /// The network's input for times `t`, `[batch]`.
    fn told<B: Backend>(&self, t: &[f32], device: &B::Device) -> Tensor<B, 1>;

    /// The error of a network's prediction, `[batch]`: the first term of [`loss`](Self::loss).
    fn error<B: Backend>(&self, seen: &Noised<B>, output: Tensor<B, 4>) -> Tensor<B, 1>;

    /// The terms of plain training, whose sum is its loss.
    fn loss<B: Backend>(&self, seen: &Noised<B>, output: Tensor<B, 4>) -> Vec<Term<B>>;

    /// The terms of likeness to a teacher, given the teacher's output.
    fn likeness<B: Backend>(
        &self,
        seen: &Noised<B>,
        output: Tensor<B, 4>,
        teacher: Tensor<B, 4>,
    ) -> Vec<Term<B>>;

    /// Names of the terms for the dashboard: those of plain training and those of likeness.
    fn names(&self) -> (&'static [&'static str], &'static [&'static str]);
}

/// Distribution of the training times.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Times {
    /// Uniform over this many steps, from 0.
    Steps(usize),
    /// Uniform over an interval.
    Between(f64, f64),
}

impl Times {
    /// The first so many steps, of a process that has steps.
    pub fn within(self, steps: usize) -> Self {
        match self {
            Self::Steps(all) => Self::Steps(steps.min(all)),
            any => any,
        }
    }

    /// The time of a sample, keyed by seed, step and sample.
    pub fn draw(self, seed: u64, step: u64, sample: u64) -> f32 {
        match self {
            Self::Steps(steps) => random::below(seed, Stream::Timestep, step, sample, steps) as f32,
            Self::Between(first, last) => {
                let unit = random::uniform(seed, Stream::Timestep, step, sample, 1, (0.0, 1.0))[0];
                (f64::from(unit) * (last - first) + first) as f32
            }
        }
    }
}

/// A batch of noised samples, with what they were made from.
#[derive(Debug, Clone)]
pub struct Noised<B: Backend> {
    /// Clean samples.
    pub clean: Tensor<B, 4>,
    /// The noise.
    pub noise: Tensor<B, 4>,
    /// The time of each sample.
    pub t: Vec<f32>,
    /// Labels; dropped ones are already replaced by the null class.
    pub y: Tensor<B, 1, Int>,
    /// The noised samples, the network's input.
    pub state: Tensor<B, 4>,
}

impl<B: Backend> Noised<B> {
    /// Noises clean samples to times `t`.
    pub fn new(
        process: &impl Process,
        clean: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        t: Vec<f32>,
        y: Tensor<B, 1, Int>,
    ) -> Self {
        let state = process.noised(clean.clone(), noise.clone(), &t);
        Self {
            clean,
            noise,
            t,
            y,
            state,
        }
    }

    /// The terms of plain training (fine-tuning) for a network's output.
    pub fn terms(&self, process: &impl Process, output: Tensor<B, 4>) -> Terms<B> {
        let named = process.loss(self, output);
        Terms {
            total: sum(&named),
            named,
        }
    }

    /// The terms of distillation: those of fine-tuning, of the teacher, and of the features with
    /// weight `beta`.
    ///
    /// `alpha (kd + vb_kd) + (1 - alpha) (mse + vb) + beta features` (TinyFusion, section 4.4).
    pub fn distillation_terms(
        &self,
        process: &impl Process,
        output: Tensor<B, 4>,
        features: &[Tensor<B, 3>],
        teacher: &TeacherOutput<B>,
        distillation: &Distillation,
        beta: f64,
    ) -> Terms<B> {
        let truth = self.terms(process, output.clone());
        let taught = process.likeness(self, output, teacher.output.clone());
        let mut total = sum(&taught).mul_scalar(distillation.alpha)
            + truth.total.mul_scalar(1.0 - distillation.alpha);
        let mut named = truth.named;
        named.extend(taught);
        if let Some(wanted) = &distillation.features {
            let loss = masked_feature_loss(features, &teacher.features, wanted.k);
            total = total + loss.clone().mul_scalar(beta);
            named.push(("features", loss));
        }
        Terms { total, named }
    }
}

impl<B: Backend> Noised<B> {
    /// Runs a network on the samples.
    pub fn run(
        &self,
        process: &impl Process,
        network: &impl Denoiser<B>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 4> {
        let t = process.told(&self.t, &self.state.device());
        network.forward(self.state.clone(), t, self.y.clone(), hook)
    }

    /// A teacher's output on the samples, with the features of `layers`.
    pub fn teach(
        &self,
        process: &impl Process,
        teacher: &impl Denoiser<B>,
        layers: &[usize],
    ) -> TeacherOutput<B> {
        let mut tap = Tap::new(layers.iter().copied());
        let output = self.run(process, teacher, &mut tap);
        TeacherOutput {
            output,
            features: tap.outputs,
        }
    }
}

/// Any of the processes that a checkpoint can name.
#[derive(Debug, Clone)]
pub enum AnyProcess {
    /// Gaussian diffusion, as in DiT.
    Gaussian(Arc<GaussianDiffusion>),
    /// A stochastic interpolant, as in SiT.
    Interpolant(Interpolant),
}

impl From<GaussianDiffusion> for AnyProcess {
    fn from(diffusion: GaussianDiffusion) -> Self {
        Self::Gaussian(Arc::new(diffusion))
    }
}

impl From<Interpolant> for AnyProcess {
    fn from(interpolant: Interpolant) -> Self {
        Self::Interpolant(interpolant)
    }
}

/// Calls a method of either variant.
macro_rules! ask {
    ($process:expr, $known:ident => $answer:expr) => {
        match $process {
            AnyProcess::Gaussian($known) => $answer,
            AnyProcess::Interpolant($known) => $answer,
        }
    };
}

impl Process for AnyProcess {
    fn times(&self) -> Times {
        ask!(self, process => process.times())
    }

    fn noised<B: Backend>(
        &self,
        clean: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        t: &[f32],
    ) -> Tensor<B, 4> {
        ask!(self, process => process.noised(clean, noise, t))
    }

    fn told<B: Backend>(&self, t: &[f32], device: &B::Device) -> Tensor<B, 1> {
        ask!(self, process => process.told(t, device))
    }

    fn error<B: Backend>(&self, seen: &Noised<B>, output: Tensor<B, 4>) -> Tensor<B, 1> {
        ask!(self, process => process.error(seen, output))
    }

    fn loss<B: Backend>(&self, seen: &Noised<B>, output: Tensor<B, 4>) -> Vec<Term<B>> {
        ask!(self, process => process.loss(seen, output))
    }

    fn likeness<B: Backend>(
        &self,
        seen: &Noised<B>,
        output: Tensor<B, 4>,
        teacher: Tensor<B, 4>,
    ) -> Vec<Term<B>> {
        ask!(self, process => process.likeness(seen, output, teacher))
    }

    fn names(&self) -> (&'static [&'static str], &'static [&'static str]) {
        ask!(self, process => process.names())
    }
}
