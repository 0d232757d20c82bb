//! Sampling loops.

use burn::tensor::{Int, Tensor, backend::Backend};
use serde::Serialize;

use super::gaussian::{GaussianDiffusion, Prediction, Variance};
use super::interpolant::own;
use super::masked::{MaskedSampler, Rounds};
use super::transport::{LastStep, Ode, Sde, SdeMethod};
use super::{AnyProcess, ProcessKind};
use crate::models::{Denoiser, Shape};
use crate::random::{self, Stream};
use crate::trunk::Plain;

/// The rule of a denoising step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "solver", rename_all = "lowercase")]
pub enum Solver {
    /// Ancestral sampling (arXiv 2006.11239).
    Ddpm {
        /// Whether each prediction of a clean sample or token is bounded to -1 to 1, where pixels
        /// lie; latents are not bounded. The first steps multiply an error of the network by some
        /// hundred, the more the fewer steps there are: a small model of pixels drifts away
        /// without it.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        clip: bool,
    },
    /// Denoising diffusion implicit model; `eta` 0 is deterministic.
    Ddim {
        /// Factor of the ancestral noise that is added.
        eta: f64,
        /// Whether each prediction of a clean sample or token is bounded to -1 to 1, where pixels
        /// lie; latents are not bounded. The first steps multiply an error of the network by some
        /// hundred, the more the fewer steps there are: a small model of pixels drifts away
        /// without it.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        clip: bool,
    },
    /// Ordinary differential equation of an interpolant: the probability flow.
    Ode(Ode),
    /// Stochastic differential equation of an interpolant.
    Sde(Sde),
    /// Rounds in which the tokens of an image become known.
    Masked(Rounds),
}

impl Solver {
    /// Network calls per sample, without those of guidance. Dormand and Prince's method takes a
    /// number that depends on the network; one per time is a guess.
    pub fn calls(self, steps: usize) -> usize {
        let between = steps.saturating_sub(1);
        match self {
            Self::Ddpm { .. } | Self::Ddim { .. } | Self::Ode(Ode::Dopri5 { .. }) => steps,
            Self::Ode(Ode::Euler) => between,
            Self::Ode(Ode::Heun) => 2 * between,
            Self::Sde(sde) => {
                let step = match sde.method {
                    SdeMethod::Euler => 1,
                    SdeMethod::Heun => 2,
                };
                step * between + usize::from(sde.last_step != LastStep::None)
            }
            Self::Masked(rounds) => rounds.rounds,
        }
    }

    /// Whether each prediction of a clean sample is bounded to -1 to 1.
    fn clips(self) -> bool {
        match self {
            Self::Ddpm { clip } | Self::Ddim { clip, .. } => clip,
            Self::Masked(rounds) => rounds.clip,
            Self::Ode(_) | Self::Sde(_) => false,
        }
    }

    /// Steps of a drawing: of masked autoregression those of all rounds.
    pub fn steps_in_all(self, steps: usize) -> usize {
        match self {
            Self::Masked(rounds) => rounds.rounds * steps,
            _ => steps,
        }
    }

    /// How often a drawing in so many steps tells of its progress.
    pub fn tells(self, steps: usize) -> usize {
        match self {
            Self::Masked(rounds) => rounds.rounds,
            _ => steps,
        }
    }

    /// Whether its steps are the same work, so that a few of them tell the time of all.
    pub fn has_equal_steps(self) -> bool {
        !matches!(self, Self::Ode(Ode::Dopri5 { .. }) | Self::Masked(_))
    }

    /// Why it can't sample a model of a process, if so.
    pub fn misfit(self, process: ProcessKind) -> Option<String> {
        if !self.samples(process) {
            let solvers = process.solvers();
            return Some(format!(
                "the model was trained by {process}, which is sampled by the solvers {solvers}"
            ));
        }
        match (self, process.process()) {
            (Self::Sde(sde), AnyProcess::Interpolant(interpolant)) => {
                sde.problem(&interpolant).map(str::to_owned)
            }
            _ => None,
        }
    }

    /// Whether it samples models of a process.
    pub fn samples(self, process: ProcessKind) -> bool {
        match self {
            Self::Ddpm { .. } | Self::Ddim { .. } => process == ProcessKind::Gaussian,
            Self::Ode(_) | Self::Sde(_) => matches!(process, ProcessKind::Interpolant(_)),
            Self::Masked(_) => process == ProcessKind::Masked,
        }
    }
}

/// Classifier-free guidance (arXiv 2207.12598).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Guidance {
    /// 1 is no guidance.
    pub scale: f64,
    /// Number of leading channels that are guided; published DiT numbers guide 3 of 4.
    pub channels: usize,
}

/// A sampling protocol.
#[derive(Debug, Clone)]
pub struct Sampler {
    /// The process; a discrete one is respaced to the steps to take.
    pub process: AnyProcess,
    /// Number of times of an interpolant's equation, both ends included; unused for a discrete
    /// process.
    pub steps: usize,
    /// Rule of a step.
    pub solver: Solver,
    /// Guidance.
    pub guidance: Guidance,
}

/// Noise for the `k`-th step of a loop (from 0): a tensor like the state.
pub type StepNoise<'a, B> = &'a mut dyn FnMut(usize) -> Tensor<B, 4>;

/// The network's output under guidance: `[batch, out channels, size, size]` for the conditional
/// samples.
///
/// Runs conditional and unconditional samples as one batch. The first `guidance.channels` channels
/// are extrapolated; the rest is the unchanged conditional output (the reference's
/// `forward_with_cfg`).
pub fn guided<B: Backend>(
    network: &impl Denoiser<B>,
    x: Tensor<B, 4>,
    t: Tensor<B, 1>,
    y: Tensor<B, 1, Int>,
    guidance: Guidance,
) -> Tensor<B, 4> {
    if guidance.scale == 1.0 {
        return network.forward(x, t, y, &mut Plain);
    }
    let [batch, channels, ..] = x.dims();
    let null = y
        .clone()
        .zeros_like()
        .add_scalar(network.shape().classes as i64);
    let twice = |x: Tensor<B, 4>| Tensor::cat(vec![x.clone(), x], 0);
    let output = network.forward(
        twice(x),
        Tensor::cat(vec![t.clone(), t], 0),
        Tensor::cat(vec![y, null], 0),
        &mut Plain,
    );
    let (conditional, unconditional) = (
        output.clone().narrow(0, 0, batch),
        output.narrow(0, batch, batch),
    );
    let guided_channels = guidance.channels.min(channels);
    let (with, without) = (
        conditional.clone().narrow(1, 0, guided_channels),
        unconditional.narrow(1, 0, guided_channels),
    );
    let epsilon = without.clone() + (with - without).mul_scalar(guidance.scale);
    let rest = conditional.dims()[1] - guided_channels;
    if rest == 0 {
        epsilon
    } else {
        Tensor::cat(
            vec![epsilon, conditional.narrow(1, guided_channels, rest)],
            1,
        )
    }
}

impl Sampler {
    /// The sampler of a model that was trained under a process, in so many steps.
    ///
    /// # Errors
    /// When the solver is not one of the process's, or the process can't be respaced to so many
    /// steps.
    pub fn new(
        process: ProcessKind,
        predicts_variance: bool,
        steps: usize,
        solver: Solver,
        guidance: Guidance,
    ) -> Result<Self, String> {
        if let Some(problem) = solver.misfit(process) {
            return Err(problem);
        }
        let process = match process.process() {
            AnyProcess::Gaussian(_) if process == ProcessKind::Masked => {
                let diffusion = GaussianDiffusion::cosine(&steps.to_string());
                diffusion.map_err(|error| error.to_string())?.into()
            }
            AnyProcess::Gaussian(full) => {
                let spacing = match steps == full.steps() {
                    true => String::new(),
                    false => steps.to_string(),
                };
                let diffusion = GaussianDiffusion::new(&spacing);
                let diffusion = diffusion.map_err(|error| error.to_string())?;
                match predicts_variance {
                    true => diffusion.into(),
                    // What the reference samples such models with.
                    false => diffusion.with_variance(Variance::FixedLarge).into(),
                }
            }
            continuous @ AnyProcess::Interpolant(_) => continuous,
        };
        Ok(Self {
            process,
            steps,
            solver,
            guidance,
        })
    }

    /// Denoises `x`, calling `watch(k, state, prediction)` after each step, where the prediction is
    /// that of the clean sample or, of an interpolant, the state itself; returns the final state.
    ///
    /// # Panics
    /// When the solver does not belong to the process.
    pub fn denoise<B: Backend>(
        &self,
        network: &impl Denoiser<B>,
        x: Tensor<B, 4>,
        y: Tensor<B, 1, Int>,
        noise: StepNoise<'_, B>,
        mut watch: impl FnMut(usize, &Tensor<B, 4>, &Tensor<B, 4>),
    ) -> Tensor<B, 4> {
        let interpolant = match &self.process {
            AnyProcess::Gaussian(diffusion) => {
                return self.diffuse(diffusion, network, x, y, noise, watch);
            }
            AnyProcess::Interpolant(interpolant) => interpolant,
        };
        let batch = x.dims()[0];
        let mut model = |x: Tensor<B, 4>, t: f32| {
            let told = Tensor::full([batch], t, &x.device());
            own(
                guided(network, x.clone(), told, y.clone(), self.guidance),
                &x,
            )
        };
        let watch = |k: usize, state: &Tensor<B, 4>| watch(k, state, state);
        match self.solver {
            Solver::Ode(ode) => ode.solve(interpolant, &mut model, x, self.steps, false, watch),
            Solver::Sde(sde) => sde.solve(interpolant, &mut model, x, self.steps, noise, watch),
            Solver::Ddpm { .. } | Solver::Ddim { .. } | Solver::Masked(_) => {
                panic!("an interpolant has no step of diffusion to take")
            }
        }
    }

    fn diffuse<B: Backend>(
        &self,
        diffusion: &GaussianDiffusion,
        network: &impl Denoiser<B>,
        mut x: Tensor<B, 4>,
        y: Tensor<B, 1, Int>,
        noise: StepNoise<'_, B>,
        mut watch: impl FnMut(usize, &Tensor<B, 4>, &Tensor<B, 4>),
    ) -> Tensor<B, 4> {
        let device = x.device();
        let batch = x.dims()[0];
        for (k, step) in (0..diffusion.steps()).rev().enumerate() {
            let t = vec![step; batch];
            let output = guided(
                network,
                x.clone(),
                diffusion.model_timesteps(&t, &device),
                y.clone(),
                self.guidance,
            );
            let clip = self.solver.clips();
            let prediction: Prediction<B> = diffusion.predict(output, x.clone(), &t, clip);
            let x_start = prediction.x_start.clone();
            x = match self.solver {
                Solver::Ddpm { .. } => diffusion.ddpm_step(prediction, &t, noise(k)),
                Solver::Ddim { eta, .. } => diffusion.ddim_step(prediction, x, &t, eta, noise(k)),
                Solver::Ode(_) | Solver::Sde(_) | Solver::Masked(_) => {
                    panic!("Gaussian diffusion is sampled by its own steps")
                }
            };
            watch(k, &x, &x_start);
        }
        x
    }

    /// Generates samples `indices` with `labels`. All noise is keyed by (seed, sample index), so
    /// that a sample does not depend on its batch. `progress` is called after every step,
    /// of masked autoregression after every round in which tokens are drawn.
    ///
    /// # Panics
    /// When the solver does not belong to the process or to the network.
    pub fn generate<B: Backend>(
        &self,
        network: &impl Denoiser<B>,
        seed: u64,
        indices: &[usize],
        labels: &[usize],
        device: &B::Device,
        mut progress: impl FnMut(),
    ) -> Tensor<B, 4> {
        if let (Solver::Masked(rounds), AnyProcess::Gaussian(diffusion)) =
            (self.solver, &self.process)
        {
            let fills_in = network
                .fills_in()
                .expect("rounds are for a network that fills in");
            let sampler = MaskedSampler {
                diffusion: diffusion.clone(),
                rounds,
                scale: self.guidance.scale,
            };
            let (of, what) = ((fills_in, network.shape()), (indices, labels));
            return sampler.draw(of, seed, what, device, progress);
        }
        let Shape {
            channels,
            side: size,
            ..
        } = network.shape();
        let draw = |stream: Stream, step: usize| -> Tensor<B, 4> {
            let count = channels * size * size;
            let values: Vec<f32> = indices
                .iter()
                .flat_map(|&index| random::normal(seed, stream, step as u64, index as u64, count))
                .collect();
            Tensor::<B, 1>::from_floats(values.as_slice(), device).reshape([
                indices.len(),
                channels,
                size,
                size,
            ])
        };
        let labels: Vec<i64> = labels.iter().map(|&label| label as i64).collect();
        let y = Tensor::<B, 1, Int>::from_data(
            burn::tensor::TensorData::from(labels.as_slice()),
            device,
        );
        // DDIM with eta 0 multiplies the noise by zero, so it is not drawn.
        let quiet = match self.solver {
            Solver::Ddim { eta, .. } => eta == 0.0,
            Solver::Ode(_) => true,
            Solver::Ddpm { .. } | Solver::Sde(_) | Solver::Masked(_) => false,
        };
        let start = draw(Stream::SampleStart, 0);
        let zeros = start.zeros_like();
        let mut noise = |k: usize| {
            if quiet {
                zeros.clone()
            } else {
                draw(Stream::SampleStep, k)
            }
        };
        self.denoise(network, start, y, &mut noise, |_, _, _| progress())
    }
}

#[cfg(test)]
mod tests {
    use burn_ndarray::NdArray;

    use super::*;
    use crate::models::{Architecture, Network};

    #[test]
    fn predictions_of_pixels_are_bounded_where_it_is_asked() {
        let shape = Shape {
            channels: 1,
            side: 8,
            classes: 2,
        };
        let (architecture, device) = (
            Architecture::preset_of("DiT-S/8", shape).unwrap(),
            Default::default(),
        );
        // It sees no noise in anything, so that the first steps make of what they are given some
        // hundred times as much.
        let network = Network::<NdArray>::zeros(&architecture, &device).unwrap();
        for solver in [
            |clip| Solver::Ddpm { clip },
            |clip| Solver::Ddim { eta: 0.0, clip },
        ] {
            let furthest = |clip| {
                let sampler = Sampler {
                    process: GaussianDiffusion::new("5").unwrap().into(),
                    steps: 5,
                    solver: solver(clip),
                    guidance: Guidance {
                        scale: 1.0,
                        channels: 3,
                    },
                };
                let drawn = sampler.generate(&network, 0, &[0, 1], &[0, 1], &device, || ());
                drawn.abs().max().into_scalar()
            };
            assert!(furthest(true) <= 1.0, "{}", furthest(true));
            assert!(furthest(false) > 10.0, "{}", furthest(false));
        }
    }
}
