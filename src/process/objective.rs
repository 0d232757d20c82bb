//! The interface between a process and training: a process defines the noised samples and the loss
//! of a network's output on them.

use std::fmt::Debug;
use std::sync::Arc;

use burn::tensor::{Int, Tensor, backend::Backend};

use super::losses::{Distillation, TeacherOutput, Term, Terms, masked_feature_loss, sum};
use super::{GaussianDiffusion, Interpolant};
use crate::models::mar::{Known, tokens};
use crate::models::{Denoiser, FillsIn};
use crate::ops::indices;
use crate::random::{self, Stream};
use crate::trunk::{BlockHook, Tap};

/// A generative process that a network learns.
///
/// Times are numbers on the host, one per sample, drawn from [`times`](Self::times): steps of a
/// discrete process, or numbers from the interval of a continuous one. Where images are
/// [masked](Noised::masked), a token is a sample to the process.
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

    /// So many times of a sample, keyed by seed, step and sample.
    pub fn draw_many(self, seed: u64, step: u64, sample: u64, count: usize) -> Vec<f32> {
        let unit = (0.0, 1.0);
        let units = random::uniform(seed, Stream::Timestep, step, sample, count, unit);
        let time = |unit: f32| match self {
            Self::Steps(steps) => (f64::from(unit) * steps as f64).floor() as f32,
            Self::Between(first, last) => (f64::from(unit) * (last - first) + first) as f32,
        };
        units.into_iter().map(time).collect()
    }

    /// The time of a sample, keyed by seed, step and sample.
    pub fn draw(self, seed: u64, step: u64, sample: u64) -> f32 {
        match self {
            Self::Steps(steps) => random::below(seed, Stream::Timestep, step, sample, steps) as f32,
            Self::Between(..) => self.draw_many(seed, step, sample, 1)[0],
        }
    }
}

/// A batch of noised samples, with what they were made from.
///
/// Where images are [masked](Self::masked), what is noised are their unknown tokens: a row
/// `[token width, 1, 1]` is a noised copy of a token, with a time of its own; the rows of a sample
/// follow one another, copy by copy.
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
    /// What the network is shown beside noised tokens; None where whole samples are noised.
    pub masked: Option<Masked<B>>,
}

/// Images of which some tokens are known.
#[derive(Debug, Clone)]
pub struct Masked<B: Backend> {
    /// The clean images, `[batch, channels, side, side]`.
    pub images: Tensor<B, 4>,
    /// The known tokens.
    pub known: Known,
    /// Noised copies of each unknown token, which share the trunk's pass.
    pub copies: usize,
}

impl<B: Backend> Masked<B> {
    fn tokens(&self) -> Tensor<B, 3> {
        let [.., side] = self.images.dims();
        tokens(self.images.clone(), side / self.known.tokens().isqrt())
    }

    /// The rows of the unknown tokens among those of all, `[batch tokens, width]`, each in so many
    /// copies.
    fn unknown(&self, rows: Tensor<B, 2>) -> Tensor<B, 2> {
        let [_, width] = rows.dims();
        let (unknown, batch) = (self.known.unknown_rows(), self.images.dims()[0]);
        let rows = rows.select(0, indices(&unknown, &self.images.device()));
        rows.reshape([batch, unknown.len() / batch * width])
            .unsqueeze_dim::<3>(1)
            .repeat_dim(1, self.copies)
            .reshape([self.copies * unknown.len(), width])
    }

    /// Runs a network on noised tokens.
    fn run(
        &self,
        network: &dyn FillsIn<B>,
        (state, t): (Tensor<B, 4>, Tensor<B, 1>),
        y: Tensor<B, 1, Int>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 4> {
        let said = network.condition(self.tokens(), &self.known, y, hook);
        let projected = network.project(said.flatten(0, 1));
        as_images(network.denoise(as_rows(state), t, self.unknown(projected)))
    }
}

/// Rows as images of one pixel, which processes are written for.
pub(super) fn as_images<B: Backend>(rows: Tensor<B, 2>) -> Tensor<B, 4> {
    let [count, width] = rows.dims();
    rows.reshape([count, width, 1, 1])
}

pub(super) fn as_rows<B: Backend>(images: Tensor<B, 4>) -> Tensor<B, 2> {
    let [count, width, ..] = images.dims();
    images.reshape([count, width])
}

impl<B: Backend> Noised<B> {
    /// Noises clean samples `[batch, channels, side, side]` to times `t`: whole ones, with noise
    /// like them and a time each, or the tokens that are not `known`, with noise
    /// `[batch, copies, unknown tokens, token width]` and a time for each of these tokens.
    pub fn new(
        process: &impl Process,
        clean: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        t: Vec<f32>,
        y: Tensor<B, 1, Int>,
        known: Option<Known>,
    ) -> Self {
        let (clean, noise, masked) = match known {
            None => (clean, noise, None),
            Some(known) => {
                let [batch, copies, unknown, width] = noise.dims();
                let masked = Masked {
                    images: clean,
                    known,
                    copies,
                };
                let clean = as_images(masked.unknown(masked.tokens().flatten(0, 1)));
                let noise = noise.reshape([batch * copies * unknown, width]);
                (clean, as_images(noise), Some(masked))
            }
        };
        let state = process.noised(clean.clone(), noise.clone(), &t);
        Self {
            clean,
            noise,
            t,
            y,
            state,
            masked,
        }
    }

    /// The same with clean samples for noised ones.
    pub fn without_noise(self) -> Self {
        Self {
            state: self.clean.clone(),
            ..self
        }
    }

    /// The means over each sample's rows: `[batch]`.
    fn by_sample(&self, rows: Tensor<B, 1>) -> Tensor<B, 1> {
        let batch = match &self.masked {
            None => return rows,
            Some(masked) => masked.images.dims()[0],
        };
        let [count] = rows.dims();
        let rows = rows.reshape([batch, count / batch]);
        rows.mean_dim(1).squeeze_dim(1)
    }

    fn all_by_sample(&self, terms: Vec<Term<B>>) -> Vec<Term<B>> {
        let terms = terms.into_iter();
        terms
            .map(|(name, rows)| (name, self.by_sample(rows)))
            .collect()
    }

    /// The error of a network's prediction, `[batch]`.
    pub fn error(&self, process: &impl Process, output: Tensor<B, 4>) -> Tensor<B, 1> {
        self.by_sample(process.error(self, output))
    }

    /// The terms of plain training (fine-tuning) for a network's output.
    pub fn terms(&self, process: &impl Process, output: Tensor<B, 4>) -> Terms<B> {
        let named = self.all_by_sample(process.loss(self, output));
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
        let taught = self.all_by_sample(process.likeness(self, output, teacher.output.clone()));
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
    ///
    /// # Panics
    /// When they are masked and the network does not fill in images.
    pub fn run(
        &self,
        process: &impl Process,
        network: &impl Denoiser<B>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 4> {
        let t = process.told(&self.t, &self.state.device());
        let (state, y) = (self.state.clone(), self.y.clone());
        match &self.masked {
            None => network.forward(state, t, y, hook),
            Some(masked) => {
                let network = network.fills_in();
                let network = network.expect("masked images are for a network that fills in");
                masked.run(network, (state, t), y, hook)
            }
        }
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
