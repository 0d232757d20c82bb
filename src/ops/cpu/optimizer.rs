//! Passes over parameters: the optimizer's step, the moving average, the gradient norm.

use burn::tensor::Tensor;
use burn_ndarray::NdArray;

use super::memory::{Out, Scratch, Values, matrix};
use super::simd::{copy, sum2, update, vectorised};
use super::threads;
use crate::ops::AdamWStep;

/// Runs `work(start, length)` over parts of `0..count`.
fn over_values(count: usize, cost: usize, work: impl Fn(usize, usize) + Sync) {
    threads::over(count, 1024, cost * count, |range| {
        vectorised(
            #[inline(always)]
            || work(range.start, range.len()),
        );
    });
}

/// See [`FusedOps::adamw`](crate::ops::FusedOps::adamw). Updates in place, or into new memory if
/// the values are shared.
pub(super) fn adamw(
    value: &mut Values,
    [first, second]: [&mut [f32]; 2],
    gradient: &[f32],
    step: AdamWStep,
) {
    /// Number of values copied at a time, to be updated while in the cache.
    const NEAR: usize = 1024;
    let (beta1, beta2) = (step.betas.0 as f32, step.betas.1 as f32);
    let (rest1, rest2) = ((1.0 - step.betas.0) as f32, (1.0 - step.betas.1) as f32);
    let root = (1.0 - step.betas.1.powi(step.time)).sqrt();
    let root = (1.0 / root) as f32;
    let rate = (step.lr / (1.0 - step.betas.0.powi(step.time))) as f32;
    let kept = (1.0 - step.lr * step.weight_decay) as f32;
    let epsilon = step.epsilon as f32;
    let gradient_scale = step.gradient_scale as f32;
    // SAFETY: every value is copied below before it is read.
    let shared = unsafe { value.renew() };
    let places = [value.write(), first, second].map(Out::of);
    let before = shared.as_ref().map(Values::read);
    over_values(
        gradient.len(),
        6,
        #[inline(always)]
        |from, length| {
            for start in (from..from + length).step_by(NEAR) {
                let length = NEAR.min(from + length - start);
                // SAFETY: only this task writes this part.
                let [values, firsts, seconds] =
                    places.map(|place| unsafe { place.part(start, length) });
                if let Some(before) = before {
                    copy(&before[start..][..length], values);
                }
                let gradient = &gradient[start..][..length];
                for (((value, first), second), gradient) in
                    values.iter_mut().zip(firsts).zip(seconds).zip(gradient)
                {
                    let gradient = gradient_scale * gradient;
                    *first = beta1 * *first + rest1 * gradient;
                    *second = beta2 * *second + rest2 * (gradient * gradient);
                    let scale = second.sqrt() * root + epsilon;
                    *value = kept * *value - rate * (*first / scale);
                }
            }
        },
    );
}

/// See [`FusedOps::moving_average`](crate::ops::FusedOps::moving_average).
pub(super) fn moving_average(average: &mut [f32], value: &[f32], decay: f64) {
    let (kept, rest) = (decay as f32, (1.0 - decay) as f32);
    let place = Out::of(average);
    over_values(
        value.len(),
        3,
        #[inline(always)]
        |start, length| {
            // SAFETY: only this task writes this part.
            let averages = unsafe { place.part(start, length) };
            update(
                averages,
                [&value[start..][..length]],
                #[inline(always)]
                |average, [value]| kept * average + rest * value,
            );
        },
    );
}

/// See [`FusedOps::sum_of_squares`](crate::ops::FusedOps::sum_of_squares).
pub(super) fn sum_of_squares(x: &[f32]) -> Tensor<NdArray, 1> {
    /// Values in a partial sum. It is f32; the total is f64.
    const PART: usize = 1 << 14;
    let mut parts = Scratch::new(x.len().div_ceil(PART));
    let parts = parts.values();
    let out = Out::of(parts);
    threads::over(parts.len(), 1, x.len(), |range| {
        vectorised(
            #[inline(always)]
            || {
                for index in range.clone() {
                    let part = &x[index * PART..x.len().min((index + 1) * PART)];
                    // SAFETY: only this task writes this sum.
                    unsafe {
                        out.part(index, 1)[0] = sum2(part, part, |sum, a, b| a.mul_add(b, sum))
                    };
                }
            },
        );
    });
    let total: f64 = parts.iter().map(|part| f64::from(*part)).sum();
    matrix(vec![total as f32], [1])
}
