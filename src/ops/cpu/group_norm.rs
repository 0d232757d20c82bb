//! Group normalisation.

use burn::tensor::Tensor;
use burn_ndarray::NdArray;

use super::memory::{Values, tensor};
use super::simd::{gelu_tanh, silu, sum, vectorised, write};
use super::threads;
use crate::ops::{Activation, GroupNormOptions};

/// Number of values summed in f32. Sums of runs are added in f64, because a group may have millions
/// of values.
const RUN: usize = 4096;

/// See [`FusedOps::group_norm`](crate::ops::FusedOps::group_norm). A group is a task; it is read
/// three times and written once.
pub(super) fn forward(
    x: &Values,
    [scale, shift]: [&Values; 2],
    shape: [usize; 4],
    norm: GroupNormOptions,
) -> Tensor<NdArray, 4> {
    let [batch, channels, height, width] = shape;
    let (plane, channels) = (height * width, channels / norm.groups);
    let group = channels * plane;
    let (x, scale, shift) = (x.read(), scale.read(), shift.read());
    let groups = batch * norm.groups;
    // SAFETY: the groups cover the tensor.
    unsafe {
        tensor(shape, |out| {
            threads::over(groups, 1, groups * group * 8, |range| {
                vectorised(
                    #[inline(always)]
                    || {
                        for index in range.clone() {
                            let values = &x[index * group..][..group];
                            let mean = mean(
                                values,
                                #[inline(always)]
                                |value| value,
                            ) as f32;
                            let variance = mean_square(values, mean);
                            let deviation = (variance + norm.epsilon).sqrt();
                            let first = index % norm.groups * channels;
                            for channel in 0..channels {
                                let (at, factor) = (
                                    channel * plane,
                                    (f64::from(scale[first + channel]) / deviation) as f32,
                                );
                                // SAFETY: only this task writes this group.
                                let out = out.part(index * group + at, plane);
                                let shift = shift[first + channel];
                                apply(
                                    &values[at..][..plane],
                                    out,
                                    [mean, factor, shift],
                                    norm.activation,
                                );
                            }
                        }
                    },
                );
            });
        })
    }
}

/// The mean of `f` over a group.
#[inline(always)]
fn mean(values: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let mut total = 0.0;
    for run in values.chunks(RUN) {
        total += f64::from(sum(
            run,
            #[inline(always)]
            |sum, value| sum + f(value),
        ));
    }
    total / values.len() as f64
}

/// The mean square of the centred values, so that a large mean costs no precision.
#[inline(always)]
fn mean_square(values: &[f32], middle: f32) -> f64 {
    mean(
        values,
        #[inline(always)]
        |value| (value - middle) * (value - middle),
    )
}

/// `act((x - mean) factor + shift)` for a plane.
#[inline(always)]
fn apply(x: &[f32], out: &mut [f32], [mean, factor, shift]: [f32; 3], activation: Activation) {
    macro_rules! each {
        ($act:expr) => {
            write(
                out,
                [x],
                #[inline(always)]
                |[x]| $act((x - mean).mul_add(factor, shift)),
            )
        };
    }
    match activation {
        Activation::Identity => each!(std::convert::identity),
        Activation::GeluTanh => each!(gelu_tanh),
        Activation::Silu => each!(silu),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ACTIVATIONS, agree, noise};
    use super::*;
    use crate::ops::{FusedOps, reference};

    #[test]
    fn group_norms_agree_with_the_reference() {
        for (shape, groups) in [
            ([1, 1, 1, 1], 1),
            ([2, 6, 3, 5], 3),
            ([3, 8, 7, 7], 2),
            ([1, 4, 70, 61], 1), // more than one run of a sum
        ] {
            for activation in ACTIVATIONS {
                let norm = GroupNormOptions {
                    groups,
                    epsilon: 1e-6,
                    activation,
                };
                // A large mean, at which `E[x^2] - E[x]^2` would lose its digits.
                let x = noise::<NdArray, 4>(0, shape) + 30.0;
                let [scale, shift] = [1, 2].map(|index| noise(index, [shape[1]]));
                let fast = NdArray::group_norm(x.clone(), scale.clone(), shift.clone(), norm);
                let exact = reference::group_norm(x, scale, shift, norm);
                // Either side rounds the mean at 30: 2e-6 for a value near one, which is the
                // tolerance of sixteen terms.
                agree(&format!("{shape:?}, {norm:?}"), 16, fast, exact);
            }
        }
    }
}
