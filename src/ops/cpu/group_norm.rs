//! Group normalisation.

use burn::tensor::Tensor;
use burn_ndarray::NdArray;

use super::memory::{Out, Values, matrix, tensor};
use super::simd::{
    copy, gelu, gelu_derivative, gelu_tanh, gelu_tanh_derivative, silu, silu_derivative, sum2,
    update, vectorised, write,
};
use super::threads;
use crate::ops::{Activation, GroupNormGradients, GroupNormOptions};

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
    let (x, scale, shift) = (x.read(), scale.read(), shift.read());
    assert!(
        channels.is_multiple_of(norm.groups),
        "{channels} channels in {} groups",
        norm.groups
    );
    assert_eq!([scale.len(), shift.len()], [channels; 2]);
    let (plane, channels) = (height * width, channels / norm.groups);
    let group = channels * plane;
    let groups = batch * norm.groups;
    // SAFETY: the groups, which divide the channels evenly, cover the tensor.
    unsafe {
        tensor(shape, |out| {
            threads::over(groups, 1, groups * group * 8, |range| {
                vectorised(
                    #[inline(always)]
                    || {
                        for index in range.clone() {
                            let values = &x[index * group..][..group];
                            let (mean, deviation) = moments(values, norm.epsilon);
                            let first = index % norm.groups * channels;
                            for channel in 0..channels {
                                let at = channel * plane;
                                let factor = f64::from(scale[first + channel]) / deviation;
                                // SAFETY: only this task writes this group.
                                let out = out.part(index * group + at, plane);
                                let shift = shift[first + channel];
                                apply(
                                    &values[at..][..plane],
                                    out,
                                    [mean, factor as f32, shift],
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

/// See [`FusedOps::group_norm_backward`](crate::ops::FusedOps::group_norm_backward). A group is a
/// task, whose gradients by channel are summed over the batch in its order: any number of threads
/// gives the same bits.
pub(super) fn backward(
    gradient: &Values,
    x: &Values,
    [scale, shift]: [&Values; 2],
    shape: [usize; 4],
    norm: GroupNormOptions,
) -> GroupNormGradients<NdArray> {
    let [batch, all, height, width] = shape;
    let (gradient, x) = (gradient.read(), x.read());
    let (scale, shift) = (scale.read(), shift.read());
    assert!(
        all.is_multiple_of(norm.groups),
        "{all} channels in {} groups",
        norm.groups
    );
    assert_eq!([scale.len(), shift.len()], [all; 2]);
    assert_eq!(gradient.len(), x.len());
    let (plane, channels) = (height * width, all / norm.groups);
    let group = channels * plane;
    let groups = batch * norm.groups;
    // For each image and channel, the gradients of shift and scale.
    let mut sums = vec![0.0; 2 * batch * all];
    let of_groups = Out::of(&mut sums);
    // SAFETY: the groups, which divide the channels evenly, cover the tensor.
    let dx = unsafe {
        tensor(shape, |out| {
            threads::over(groups, 1, groups * group * 24, |range| {
                vectorised(
                    #[inline(always)]
                    || {
                        for index in range.clone() {
                            let (from, first) = (index * group, index % norm.groups * channels);
                            let (gradient, x) = (&gradient[from..][..group], &x[from..][..group]);
                            // SAFETY: only this task writes this group and its sums.
                            let (dx, sums) = (
                                out.part(from, group),
                                of_groups.part(index * 2 * channels, 2 * channels),
                            );
                            of_group(
                                gradient,
                                x,
                                [&scale[first..][..channels], &shift[first..][..channels]],
                                norm,
                                dx,
                                sums,
                            );
                        }
                    },
                );
            });
        })
    };
    let over_batch = |which: usize| {
        let of = |channel: usize| {
            let images = sums.chunks_exact(2 * all);
            images
                .map(|image| f64::from(image[2 * channel + which]))
                .sum::<f64>() as f32
        };
        matrix((0..all).map(of).collect(), [all])
    };
    GroupNormGradients {
        x: dx,
        scale: over_batch(1),
        shift: over_batch(0),
    }
}

/// The gradients of a group: of its values, and of each channel's shift and scale, in turn.
#[inline(always)]
fn of_group(
    gradient: &[f32],
    x: &[f32],
    [scale, shift]: [&[f32]; 2],
    norm: GroupNormOptions,
    dx: &mut [f32],
    sums: &mut [f32],
) {
    let plane = x.len() / scale.len();
    let (mean, deviation) = moments(x, norm.epsilon);
    let (mut total, mut projected) = (0.0, 0.0);
    for (channel, of_channel) in scale.iter().enumerate() {
        let at = channel * plane..(channel + 1) * plane;
        let (x, before) = (&x[at.clone()], &mut dx[at.clone()]);
        let factor = (f64::from(*of_channel) / deviation) as f32;
        // The gradient before the activation; it waits where the group's is written.
        apply_derivative(
            &gradient[at],
            x,
            before,
            [mean, factor, shift[channel]],
            norm.activation,
        );
        let of_shift = total2(
            before,
            before,
            #[inline(always)]
            |sum, before, _| sum + before,
        );
        let of_scale = total2(
            before,
            x,
            #[inline(always)]
            |sum, before, x| before.mul_add(x - mean, sum),
        ) / deviation;
        sums[2 * channel] = of_shift as f32;
        sums[2 * channel + 1] = of_scale as f32;
        total += f64::from(*of_channel) * of_shift;
        projected += f64::from(*of_channel) * of_scale;
    }
    // dx = (scale g - total - normal projected) / deviation, normal = (x - mean) / deviation
    let count = x.len() as f64;
    let total = (total / count / deviation) as f32;
    let projected = (projected / count / (deviation * deviation)) as f32;
    for (channel, of_channel) in scale.iter().enumerate() {
        let at = channel * plane..(channel + 1) * plane;
        let factor = (f64::from(*of_channel) / deviation) as f32;
        update(
            &mut dx[at.clone()],
            [&x[at]],
            #[inline(always)]
            |before, [x]| factor.mul_add(before, -total) - (x - mean) * projected,
        );
    }
}

/// Mean and standard deviation of a group. The variance is the mean square of the centred values,
/// so that a large mean costs no precision.
#[inline(always)]
fn moments(values: &[f32], epsilon: f64) -> (f32, f64) {
    let count = values.len() as f64;
    let mean = total2(
        values,
        values,
        #[inline(always)]
        |sum, value, _| sum + value,
    ) / count;
    let mean = mean as f32;
    let squares = total2(
        values,
        values,
        #[inline(always)]
        |sum, value, _| (value - mean).mul_add(value - mean, sum),
    );
    (mean, (squares / count + epsilon).sqrt())
}

/// The sum of `f` over two rows of any length.
#[inline(always)]
fn total2(a: &[f32], b: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f64 {
    let mut total = 0.0;
    for (a, b) in a.chunks(RUN).zip(b.chunks(RUN)) {
        total += f64::from(sum2(a, b, &f));
    }
    total
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
        Activation::Gelu => each!(gelu),
        Activation::GeluTanh => each!(gelu_tanh),
        Activation::Silu => each!(silu),
    }
}

/// The gradient before the activation of [`apply`].
#[inline(always)]
fn apply_derivative(
    gradient: &[f32],
    x: &[f32],
    out: &mut [f32],
    [mean, factor, shift]: [f32; 3],
    activation: Activation,
) {
    macro_rules! each {
        ($derivative:expr) => {
            write(
                out,
                [gradient, x],
                #[inline(always)]
                |[gradient, x]| gradient * $derivative((x - mean).mul_add(factor, shift)),
            )
        };
    }
    match activation {
        Activation::Identity => copy(gradient, out),
        Activation::Gelu => each!(gelu_derivative),
        Activation::GeluTanh => each!(gelu_tanh_derivative),
        Activation::Silu => each!(silu_derivative),
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn::tensor::backend::Backend;
    use burn_flex::Flex;

    use super::super::tests::{ACTIVATIONS, agree, noise};
    use super::*;
    use crate::ops::{FusedOps, reference};

    /// Shapes, each with groups and every activation.
    fn cases() -> impl Iterator<Item = ([usize; 4], GroupNormOptions)> {
        let shapes = [
            ([1, 1, 1, 1], 1),
            ([2, 6, 3, 5], 3),
            ([3, 8, 7, 7], 2),
            ([1, 4, 70, 61], 1), // more than one run of a sum
        ];
        let norm = |groups, activation| GroupNormOptions {
            groups,
            epsilon: 1e-6,
            activation,
        };
        shapes.into_iter().flat_map(move |(shape, groups)| {
            ACTIVATIONS.map(|activation| (shape, norm(groups, activation)))
        })
    }

    #[test]
    fn group_norms_agree_with_the_reference() {
        for (shape, norm) in cases() {
            // A large mean, at which `E[x^2] - E[x]^2` would lose its digits.
            let x = noise::<NdArray, 4>(0, shape) + 30.0;
            let [scale, shift] = [1, 2].map(|index| noise(index, [shape[1]]));
            let fast = NdArray::group_norm(x.clone(), scale.clone(), shift.clone(), norm);
            let exact = reference::group_norm(x, scale, shift, norm);
            // Either side rounds the mean at 30: 2e-6 for a value near one, which is the
            // tolerance of sixteen terms.
            let what = format!("{shape:?}, {norm:?}");
            agree(&what, 16, fast, exact);
        }
    }

    #[test]
    fn gradients_are_those_that_burn_gives_for_the_reference() {
        // A single value has no gradient but what rounding leaves.
        for (shape, norm) in cases().filter(|(shape, _)| shape[2] > 1) {
            let fast = gradients::<NdArray>(shape, norm, Autodiff::group_norm);
            // On burn-flex: ndarray's own `recip`, in the gradient of a division, is the
            // processor's estimate.
            let exact = gradients::<Flex>(shape, norm, reference::group_norm);
            let composed = reference::group_norm_backward(
                noise::<Flex, 4>(3, shape),
                noise::<Flex, 4>(0, shape) + 3.0,
                noise(1, [shape[1]]),
                noise(2, [shape[1]]),
                norm,
            );
            let composed = [flat(composed.x), flat(composed.scale), flat(composed.shift)];
            // Those of scale and shift are sums over the batch and the plane.
            let terms = shape[0] * shape[2] * shape[3];
            for index in 0..3 {
                let what = format!("{shape:?}, {norm:?}, gradient {index}");
                let exact = &exact[index];
                agree(&what, terms, fast[index].clone(), exact.clone());
                agree(&what, terms, composed[index].clone(), exact.clone());
            }
        }
    }

    fn flat<B: Backend, const D: usize>(values: Tensor<B, D>) -> Tensor<NdArray, 1> {
        let values = values.into_data().to_vec::<f32>().unwrap();
        Tensor::from_floats(values.as_slice(), &Default::default())
    }

    /// Of x, scale and shift.
    fn gradients<B: FusedOps>(
        shape: [usize; 4],
        norm: GroupNormOptions,
        group_norm: GroupNorm<Autodiff<B>>,
    ) -> [Tensor<NdArray, 1>; 3] {
        let x = (noise::<Autodiff<B>, 4>(0, shape) + 3.0).require_grad();
        let [scale, shift] = [1, 2].map(|index| noise(index, [shape[1]]).require_grad());
        let y = group_norm(x.clone(), scale.clone(), shift.clone(), norm);
        let gradients = (y * noise(3, shape)).sum().backward();
        let of_channel = |of: &Tensor<Autodiff<B>, 1>| flat(of.grad(&gradients).unwrap());
        let of_x = flat(x.grad(&gradients).unwrap());
        [of_x, of_channel(&scale), of_channel(&shift)]
    }

    type GroupNorm<B> =
        fn(Tensor<B, 4>, Tensor<B, 1>, Tensor<B, 1>, GroupNormOptions) -> Tensor<B, 4>;
}
