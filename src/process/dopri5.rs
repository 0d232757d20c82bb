//! Dormand and Prince's method, which chooses its steps as torchdiffeq does.

use burn::tensor::{Tensor, backend::Backend};

/// Dormand and Prince's pair of orders 5 and 4, with dense output (Shampine, "Some practical
/// Runge-Kutta formulas").
pub(super) struct Dopri5 {
    /// Absolute tolerance.
    pub(super) atol: f64,
    /// Relative tolerance.
    pub(super) rtol: f64,
    /// Whether the last step may end beyond the last time.
    pub(super) goes_past_the_end: bool,
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
    /// The state at the last of `times`; `watch(k, state)` is called with that at each time after
    /// the first.
    pub(super) fn solve<B: Backend>(
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
