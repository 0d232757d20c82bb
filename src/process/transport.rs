//! Sampling along an interpolant: ordinary and stochastic differential equations, solved from noise
//! to data.
//!
//! The solvers only need a network's output at a state and a time, so that guidance, a test's
//! formula or a user's own network work alike. The rules are those of SiT's `transport`;
//! [`Ode::Dopri5`] controls its steps as torchdiffeq does: the last one goes past the end, and the
//! state at the end is interpolated. Where the path is undefined past the end, the last step stops
//! there.

use burn::tensor::{Tensor, backend::Backend};
use serde::{Deserialize, Serialize};

use super::StepNoise;
use super::dopri5::Dopri5;
use super::interpolant::{Interpolant, Path, Predicts};

/// A network's output at a state `[batch, channels, size, size]` and a time.
pub type Model<'a, B> = &'a mut dyn FnMut(Tensor<B, 4>, f32) -> Tensor<B, 4>;

/// Solver of the probability flow.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "lowercase")]
pub enum Ode {
    /// First order, one network call per step.
    Euler,
    /// Second order, two network calls per step.
    Heun,
    /// Dormand and Prince's fifth order with adaptive steps: the same for the whole batch, as in
    /// torchdiffeq, so that a sample depends a little on the others in its batch.
    Dopri5 {
        /// Absolute tolerance.
        atol: f64,
        /// Relative tolerance.
        rtol: f64,
    },
}

/// Solver of the stochastic equation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SdeMethod {
    /// Euler-Maruyama, one network call per step.
    Euler,
    /// Heun's method on the drift, two network calls per step.
    Heun,
}

/// Strength of the noise over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiffusionForm {
    /// Constant.
    Constant,
    /// The score's weight in the velocity, as in score-based diffusion.
    Sbdm,
    /// `sigma`.
    Sigma,
    /// `1 - t`.
    Linear,
    /// `(cos(pi t) + 1)^2 / 4`.
    Decreasing,
    /// `sin(pi t)^2`.
    IncreasingDecreasing,
}

/// The last step, over a stretch before the data where drift and noise may be undefined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LastStep {
    /// No last step, and no stretch left out.
    None,
    /// A step along the drift.
    Mean,
    /// The mean of the data, by Tweedie's formula.
    Tweedie,
    /// A step along the probability flow.
    Euler,
}

/// Settings of a stochastic equation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sde {
    /// The solver.
    pub method: SdeMethod,
    /// Strength of the noise over time.
    #[serde(rename = "diffusion_form")]
    pub form: DiffusionForm,
    /// Factor of that strength.
    #[serde(rename = "diffusion_norm")]
    pub norm: f64,
    /// The last step.
    pub last_step: LastStep,
    /// Length in time of the stretch for the last step.
    pub last_step_size: f64,
}

impl Ode {
    /// SiT's absolute tolerance.
    pub const ATOL: f64 = 1e-6;
    /// SiT's relative tolerance.
    pub const RTOL: f64 = 1e-3;
    /// Dormand and Prince's method with these tolerances.
    pub const DOPRI5: Self = Self::Dopri5 {
        atol: Self::ATOL,
        rtol: Self::RTOL,
    };
}

impl SdeMethod {
    /// Both, by name.
    pub const NAMES: [(&'static str, Self); 2] = [("euler", Self::Euler), ("heun", Self::Heun)];
}

impl LastStep {
    /// All, by name.
    pub const NAMES: [(&'static str, Self); 4] = [
        ("none", Self::None),
        ("mean", Self::Mean),
        ("tweedie", Self::Tweedie),
        ("euler", Self::Euler),
    ];
}

impl Default for Sde {
    /// The settings of SiT's `sample.py`.
    fn default() -> Self {
        Self {
            method: SdeMethod::Euler,
            form: DiffusionForm::Sigma,
            norm: 1.0,
            last_step: LastStep::Mean,
            last_step_size: 0.04,
        }
    }
}

impl DiffusionForm {
    /// All, by name; one also in the reference library's spelling.
    pub const NAMES: [(&'static str, Self); 7] = [
        ("constant", Self::Constant),
        ("sbdm", Self::Sbdm),
        ("sigma", Self::Sigma),
        ("linear", Self::Linear),
        ("decreasing", Self::Decreasing),
        ("increasing-decreasing", Self::IncreasingDecreasing),
        ("inccreasing-decreasing", Self::IncreasingDecreasing),
    ];

    /// Strength at a time.
    pub fn at(self, interpolant: &Interpolant, norm: f64, t: f64) -> f64 {
        let turn = std::f64::consts::PI * t;
        match self {
            Self::Constant => norm,
            Self::Sbdm => norm * interpolant.path.drift_variance(t),
            Self::Sigma => norm * interpolant.path.at(t).sigma,
            Self::Linear => norm * (1.0 - t),
            Self::Decreasing => 0.25 * (norm * turn.cos() + 1.0).powi(2),
            Self::IncreasingDecreasing => norm * turn.sin().powi(2),
        }
    }
}

impl Sde {
    /// Length of the last stretch; 0 without a last step.
    pub fn last_stretch(&self) -> f64 {
        match self.last_step {
            LastStep::None => 0.0,
            _ => self.last_step_size,
        }
    }

    /// Why it can't be solved for an interpolant, if so: a value is undefined at noise or at data.
    pub fn problem(&self, interpolant: &Interpolant) -> Option<&'static str> {
        let (start, end) = self.interval(interpolant);
        let at_noise = self.form == DiffusionForm::Sbdm && interpolant.path != Path::Vp;
        if at_noise && start <= 0.0 {
            return Some(
                "`diffusion_form` \"sbdm\" has no bound at noise, where a model of velocities starts; take another",
            );
        }
        let looks_at_the_end = self.last_step != LastStep::None || self.method == SdeMethod::Heun;
        (looks_at_the_end && end >= 1.0).then_some(
            "the score is not defined at the data; take a `last_step` with a `last_step_size` above 0",
        )
    }

    /// The interval on which it is solved.
    pub fn interval(&self, interpolant: &Interpolant) -> (f64, f64) {
        let eps = interpolant.sample_eps;
        let end = match self.last_stretch() {
            0.0 => 1.0 - eps,
            stretch => 1.0 - stretch,
        };
        let undefined_at_noise =
            self.form == DiffusionForm::Sbdm || interpolant.predicts != Predicts::Velocity;
        let start = match interpolant.path {
            Path::Linear | Path::Gvp if undefined_at_noise => eps,
            _ => 0.0,
        };
        (start, end)
    }

    /// Solves it from noise `x` at `steps` times, the last of which is reached by the last step.
    /// `watch(k, state)` is called with the start and after each step. Returns the final state.
    pub fn solve<B: Backend>(
        &self,
        interpolant: &Interpolant,
        model: Model<'_, B>,
        mut x: Tensor<B, 4>,
        steps: usize,
        noise: StepNoise<'_, B>,
        mut watch: impl FnMut(usize, &Tensor<B, 4>),
    ) -> Tensor<B, 4> {
        let batch = x.dims()[0];
        let (first, last) = self.interval(interpolant);
        let times = linspace(first, last, steps);
        let dt = times.get(1).map_or(0.0, |second| second - times[0]);
        let strength = |t: f32| self.form.at(interpolant, self.norm, f64::from(t));
        let mut drift = |x: Tensor<B, 4>, t: f32| {
            let each = vec![t; batch];
            let output = model(x.clone(), t);
            let score = interpolant.score(output.clone(), x.clone(), &each);
            interpolant.velocity(output, x, &each) + score * strength(t)
        };
        for (k, &t) in times.iter().take(steps.saturating_sub(1)).enumerate() {
            let spread = (2.0 * strength(t)).sqrt() * f64::from(dt).sqrt();
            let moved = noise(k) * spread;
            x = match self.method {
                SdeMethod::Euler => x.clone() + drift(x, t) * dt + moved,
                SdeMethod::Heun => {
                    let x = x + moved;
                    let first = drift(x.clone(), t);
                    let second = drift(x.clone() + first.clone() * dt, t + dt);
                    x + (first + second) * (0.5 * dt)
                }
            };
            watch(k, &x);
        }
        let (end, stretch) = (last as f32, self.last_stretch());
        let each = vec![end; batch];
        x = match self.last_step {
            LastStep::None => x,
            LastStep::Mean => x.clone() + drift(x, end) * stretch,
            LastStep::Euler => {
                let output = model(x.clone(), end);
                x.clone() + interpolant.velocity(output, x, &each) * stretch
            }
            LastStep::Tweedie => {
                let output = model(x.clone(), end);
                let score = interpolant.score(output, x.clone(), &each);
                interpolant.denoised(score, x, &each)
            }
        };
        watch(steps.saturating_sub(1), &x);
        x
    }
}

impl Ode {
    /// Solves the probability flow at `steps` times from noise `x` to data, or back from data.
    /// `watch(k, state)` is called with the state at each time after the first. Returns the final
    /// state.
    pub fn solve<B: Backend>(
        self,
        interpolant: &Interpolant,
        model: Model<'_, B>,
        x: Tensor<B, 4>,
        steps: usize,
        backwards: bool,
        mut watch: impl FnMut(usize, &Tensor<B, 4>),
    ) -> Tensor<B, 4> {
        let batch = x.dims()[0];
        let (mut first, mut last) = interpolant.ode_interval();
        if backwards {
            (first, last) = (1.0 - first, 1.0 - last);
        }
        let times = linspace(first, last, steps);
        let mut velocity = |x: Tensor<B, 4>, t: f32| {
            let output = model(x.clone(), t);
            interpolant.velocity(output, x, &vec![t; batch])
        };
        if let Self::Dopri5 { atol, rtol } = self {
            let solver = Dopri5 {
                atol,
                rtol,
                goes_past_the_end: backwards || interpolant.goes_past_the_end(),
            };
            return solver.solve(&mut velocity, x, &times, watch);
        }
        let mut x = x;
        for (k, pair) in times.windows(2).enumerate() {
            let [t, dt] = [pair[0], pair[1] - pair[0]];
            let rate = velocity(x.clone(), t);
            x = match self {
                Self::Heun => {
                    let ahead = velocity(x.clone() + rate.clone() * dt, pair[1]);
                    x + (rate + ahead) * (0.5 * dt)
                }
                Self::Euler | Self::Dopri5 { .. } => x + rate * dt,
            };
            watch(k + 1, &x);
        }
        x
    }
}

/// `count` evenly spaced times, rounded as `torch.linspace` of f32.
fn linspace(first: f64, last: f64, count: usize) -> Vec<f32> {
    let (first, last) = (first as f32, last as f32);
    let step = (last - first) / (count.max(2) - 1) as f32;
    (0..count)
        .map(|index| match index < count / 2 {
            true => first + step * index as f32,
            false => last - step * (count - 1 - index) as f32,
        })
        .collect()
}

#[cfg(all(test, feature = "ndarray"))]
mod tests {
    use burn_ndarray::NdArray;

    use super::super::interpolant::Weighting;
    use super::*;

    #[test]
    fn times_are_those_of_torch() {
        // torch.linspace(0.001, 0.999, 7)
        let expected = [
            0.001,
            0.167_333_34,
            0.333_666_65,
            0.5,
            0.666_333_3,
            0.832_666_6,
            0.999,
        ];
        let times = linspace(0.001, 0.999, 7);
        for (time, expected) in times.iter().zip(expected) {
            assert!((time - expected).abs() <= f32::EPSILON, "{times:?}");
        }
        assert_eq!(linspace(0.0, 1.0, 1), [1.0]);
    }

    /// torchdiffeq steps past the end here, where sigma is not a number, and fails.
    #[test]
    fn the_variance_preserving_path_is_solved_to_its_end() {
        let interpolant = Interpolant::new(Path::Vp, Predicts::Noise, Weighting::None, None, None);
        let x = Tensor::<NdArray, 4>::ones([2, 1, 2, 2], &Default::default());
        // For normally distributed data, the expected noise is the state times sigma.
        let mut model = |x: Tensor<NdArray, 4>, t: f32| x * interpolant.path.at(f64::from(t)).sigma;
        let mut seen = 0;
        let end = Ode::DOPRI5.solve(&interpolant, &mut model, x, 5, false, |_, _| seen += 1);
        assert_eq!(seen, 4);
        // The exact flow is constant: the path's distribution is the same at all times. A few
        // steps, each within the relative tolerance of 1e-3.
        for value in end.into_data().iter::<f32>() {
            assert!((value - 1.0).abs() < 1e-2, "{value}");
        }
    }

    #[test]
    fn equations_that_begin_or_end_where_nothing_is_defined_are_told() {
        let problem = |form, method, last_step, last_step_size, interpolant: Interpolant| {
            let sde = Sde {
                method,
                form,
                last_step,
                last_step_size,
                ..Sde::default()
            };
            let x = Tensor::<NdArray, 4>::ones([1, 1, 2, 2], &Default::default());
            let mut model = |x: Tensor<NdArray, 4>, _: f32| x * 0.5;
            let mut noise = |_: usize| Tensor::zeros([1, 1, 2, 2], &Default::default());
            let end = sde.solve(&interpolant, &mut model, x, 5, &mut noise, |_, _| ());
            let finite = end.into_data().iter::<f32>().all(f32::is_finite);
            // `problem` agrees with the outcome.
            assert_eq!(sde.problem(&interpolant).is_none(), finite, "{sde:?}");
            sde.problem(&interpolant)
        };
        let velocity = Interpolant::published;
        let of = |path, predicts| Interpolant::new(path, predicts, Weighting::None, None, None);
        let (sigma, sbdm) = (DiffusionForm::Sigma, DiffusionForm::Sbdm);
        let (euler, heun) = (SdeMethod::Euler, SdeMethod::Heun);
        assert!(problem(sigma, euler, LastStep::Mean, 0.04, velocity()).is_none());
        assert!(problem(sigma, euler, LastStep::None, 0.04, velocity()).is_none());
        assert!(problem(sigma, heun, LastStep::Tweedie, 0.04, velocity()).is_none());
        assert!(problem(sbdm, euler, LastStep::Mean, 0.04, velocity()).is_some());
        assert!(problem(sigma, heun, LastStep::None, 0.04, velocity()).is_some());
        assert!(problem(sigma, euler, LastStep::Mean, 0.0, velocity()).is_some());
        for path in [Path::Linear, Path::Gvp, Path::Vp] {
            let noise = of(path, Predicts::Noise);
            assert!(problem(sbdm, heun, LastStep::Euler, 0.04, noise).is_none());
            assert!(problem(sbdm, euler, LastStep::None, 0.0, noise).is_none());
        }
    }

    #[test]
    fn a_flow_that_no_step_follows_has_no_end() {
        let interpolant = Interpolant::published();
        let x = Tensor::<NdArray, 4>::ones([1, 1, 2, 2], &Default::default());
        // Has a pole at half of the time.
        let mut model = |x: Tensor<NdArray, 4>, t: f32| match t > 0.5 {
            true => x * (1e30 / f64::from(t - 0.5)),
            false => x,
        };
        let mut seen = 0;
        let end = Ode::DOPRI5.solve(&interpolant, &mut model, x, 5, false, |_, _| seen += 1);
        assert_eq!(seen, 4);
        assert!(end.into_data().iter::<f32>().all(f32::is_nan));
    }

    #[test]
    fn a_network_of_nan_ends_the_search_for_a_step() {
        let interpolant = Interpolant::published();
        let x = Tensor::<NdArray, 4>::ones([1, 1, 2, 2], &Default::default());
        let mut model = |x: Tensor<NdArray, 4>, _: f32| x * f32::NAN;
        let end = Ode::DOPRI5.solve(&interpolant, &mut model, x, 5, false, |_, _| ());
        assert!(end.into_data().iter::<f32>().all(f32::is_nan));
    }
}
