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

/// Dormand and Prince's pair of orders 5 and 4, with dense output (Shampine, "Some practical
/// Runge-Kutta formulas").
struct Dopri5 {
    atol: f64,
    rtol: f64,
    goes_past_the_end: bool,
}

/// Times of the stages.
const STAGES: [f64; 6] = [0.2, 0.3, 0.8, 8.0 / 9.0, 1.0, 1.0];
/// Weights of the earlier slopes in each stage.
const WEIGHTS: [&[f64]; 6] = [
    &[0.2],
    &[3.0 / 40.0, 9.0 / 40.0],
    &[44.0 / 45.0, -56.0 / 15.0, 32.0 / 9.0],
    &[
        19_372.0 / 6561.0,
        -25_360.0 / 2187.0,
        64_448.0 / 6561.0,
        -212.0 / 729.0,
    ],
    &[
        9017.0 / 3168.0,
        -355.0 / 33.0,
        46_732.0 / 5247.0,
        49.0 / 176.0,
        -5103.0 / 18_656.0,
    ],
    &[
        35.0 / 384.0,
        0.0,
        500.0 / 1113.0,
        125.0 / 192.0,
        -2187.0 / 6784.0,
        11.0 / 84.0,
    ],
];
/// Weights of the error estimate: the solution of order 5 minus that of order 4.
const ERROR: [f64; 7] = [
    35.0 / 384.0 - 1951.0 / 21_600.0,
    0.0,
    500.0 / 1113.0 - 22_642.0 / 50_085.0,
    125.0 / 192.0 - 451.0 / 720.0,
    -2187.0 / 6784.0 + 12_231.0 / 42_400.0,
    11.0 / 84.0 - 649.0 / 6300.0,
    -1.0 / 60.0,
];
/// Weights of the solution in the middle of a step.
const MIDDLE: [f64; 7] = [
    6_025_192_743.0 / 30_085_553_152.0 / 2.0,
    0.0,
    51_252_292_925.0 / 65_400_821_598.0 / 2.0,
    -2_691_868_925.0 / 45_128_329_728.0 / 2.0,
    187_940_372_067.0 / 1_594_534_317_056.0 / 2.0,
    -1_776_094_331.0 / 19_743_644_256.0 / 2.0,
    11_237_099.0 / 235_043_384.0 / 2.0,
];

/// Safety factor of the step size.
const SAFETY: f64 = 0.9;
/// Smallest and largest factor from one step size to the next.
const GROWTH: (f64, f64) = (0.2, 10.0);

impl Dopri5 {
    fn solve<B: Backend>(
        &self,
        velocity: &mut dyn FnMut(Tensor<B, 4>, f32) -> Tensor<B, 4>,
        x: Tensor<B, 4>,
        times: &[f32],
        mut watch: impl FnMut(usize, &Tensor<B, 4>),
    ) -> Tensor<B, 4> {
        let times: Vec<f64> = times.iter().map(|time| f64::from(*time)).collect();
        let (Some(&start), Some(&end)) = (times.first(), times.last()) else {
            return x;
        };
        // The solver's time runs forwards: backwards, velocities change their sign.
        let direction = if end < start { -1.0 } else { 1.0 };
        let mut rate =
            |x: Tensor<B, 4>, done: f64| velocity(x, (start + direction * done) as f32) * direction;
        let (mut done, mut state) = (0.0, x);
        let mut slope = rate(state.clone(), 0.0);
        let mut step = self.first_step(&mut rate, &state, &slope);
        let most = match self.goes_past_the_end {
            true => f64::INFINITY,
            false => (end - start).abs(),
        };
        let mut next = 1;
        while next < times.len() {
            step = step.min(most - done);
            if done + step <= done {
                // No step is short enough. The solution is marked as NaN, which the caller checks.
                let lost = state * f64::NAN;
                (next..times.len()).for_each(|time| watch(time, &lost));
                return lost;
            }
            let stages = self.stages(&mut rate, &state, &slope, done, step);
            let ratio = self.error_ratio(&state, &stages, step);
            let next_step = grown(step, ratio);
            // A state that is not finite has no error to control and ends the search; the caller
            // checks it.
            if ratio <= 1.0 || !ratio.is_finite() {
                let reached = done + step;
                while let Some(time) = times.get(next) {
                    let share = ((time - start).abs() - done) / step;
                    // With a bounded end, the last step is cut off there.
                    if share > 1.0 && ratio.is_finite() && reached < most {
                        break;
                    }
                    let between = interpolated(&state, &stages, step, share);
                    watch(next, &between);
                    next += 1;
                    if next == times.len() {
                        return between;
                    }
                }
                done = reached;
                state = stages.end;
                slope = stages.slopes.into_iter().next_back().unwrap_or(slope);
            }
            step = next_step;
        }
        state
    }

    /// The first step size (Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations
    /// I", II.4).
    fn first_step<B: Backend>(
        &self,
        rate: &mut dyn FnMut(Tensor<B, 4>, f64) -> Tensor<B, 4>,
        x: &Tensor<B, 4>,
        slope: &Tensor<B, 4>,
    ) -> f64 {
        let scale = x.clone().abs() * self.rtol + self.atol;
        let size = |x: Tensor<B, 4>| root_mean_square(x / scale.clone());
        let (of_state, of_slope) = (size(x.clone()), size(slope.clone()));
        let guess = match of_state < 1e-5 || of_slope < 1e-5 {
            true => 1e-6,
            false => 0.01 * of_state / of_slope,
        };
        let ahead = rate(x.clone() + slope.clone() * guess, guess);
        let of_change = size(ahead - slope.clone()) / guess;
        let better = match of_slope <= 1e-15 && of_change <= 1e-15 {
            true => (guess * 1e-3).max(1e-6),
            false => (0.01 / of_slope.max(of_change)).powf(0.2),
        };
        (100.0 * guess).min(better)
    }

    fn stages<B: Backend>(
        &self,
        rate: &mut dyn FnMut(Tensor<B, 4>, f64) -> Tensor<B, 4>,
        x: &Tensor<B, 4>,
        slope: &Tensor<B, 4>,
        done: f64,
        step: f64,
    ) -> Stages<B> {
        let mut slopes = vec![slope.clone()];
        let mut end = x.clone();
        for (weights, at) in WEIGHTS.iter().zip(STAGES) {
            end = x.clone() + combined(&slopes, weights) * step;
            slopes.push(rate(end.clone(), done + at * step));
        }
        Stages { slopes, end }
    }

    fn error_ratio<B: Backend>(&self, x: &Tensor<B, 4>, stages: &Stages<B>, step: f64) -> f64 {
        let error = combined(&stages.slopes, &ERROR) * step;
        let larger = x.clone().abs().max_pair(stages.end.clone().abs());
        root_mean_square(error / (larger * self.rtol + self.atol))
    }
}

/// The slopes of a step's stages, and the state at its end.
struct Stages<B: Backend> {
    slopes: Vec<Tensor<B, 4>>,
    end: Tensor<B, 4>,
}

fn combined<B: Backend>(slopes: &[Tensor<B, 4>], weights: &[f64]) -> Tensor<B, 4> {
    let mut terms = slopes
        .iter()
        .zip(weights)
        .filter(|(_, weight)| **weight != 0.0)
        .map(|(slope, weight)| slope.clone() * *weight);
    let first = terms.next().expect("the first weight is never zero");
    terms.fold(first, |sum, term| sum + term)
}

/// A state at `share` of a step: the polynomial of degree 4 through both ends, their slopes and the
/// middle.
fn interpolated<B: Backend>(
    start: &Tensor<B, 4>,
    stages: &Stages<B>,
    step: f64,
    share: f64,
) -> Tensor<B, 4> {
    let (first, last) = (&stages.slopes[0], &stages.slopes[6]);
    let middle = start.clone() + combined(&stages.slopes, &MIDDLE) * step;
    let mix = |of_slopes: (f64, f64), of_states: (f64, f64, f64)| {
        (first.clone() * of_slopes.0 + last.clone() * of_slopes.1) * step
            + start.clone() * of_states.0
            + stages.end.clone() * of_states.1
            + middle.clone() * of_states.2
    };
    let fourth = mix((-2.0, 2.0), (-8.0, -8.0, 16.0));
    let third = mix((5.0, -3.0), (18.0, 14.0, -32.0));
    let second = mix((-4.0, 1.0), (-11.0, -5.0, 16.0));
    let first = first.clone() * step;
    start.clone() + (first + (second + (third + fourth * share) * share) * share) * share
}

fn grown(step: f64, ratio: f64) -> f64 {
    let (least, most) = GROWTH;
    if ratio == 0.0 {
        return step * most;
    }
    let least = if ratio < 1.0 { 1.0 } else { least };
    step * (SAFETY / ratio.powf(0.2)).max(least).min(most)
}

fn root_mean_square<B: Backend>(x: Tensor<B, 4>) -> f64 {
    let mean = (x.clone() * x).mean().into_data();
    mean.iter::<f64>().next().unwrap_or(f64::NAN).sqrt()
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
