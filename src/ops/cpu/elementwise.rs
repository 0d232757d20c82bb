//! Operators that read their inputs once: activations, norms, residuals.

use std::ops::Range;

use burn::tensor::Tensor;
use burn_ndarray::NdArray;

use super::memory::{Out, Rows, Scratch, Values, matrix, tensor};
use super::simd::{
    copy, dot, gelu, gelu_derivative, gelu_tanh, gelu_tanh_derivative, silu, silu_derivative, sum,
    update, vectorised, write,
};
use super::threads;
use crate::ops::{Activation, NormGradients};

/// Writes the activation of a row to the start of `out`.
#[inline(always)]
pub(super) fn activate_row(values: &[f32], out: &mut [f32], activation: Activation) {
    let out = &mut out[..values.len()];
    match activation {
        Activation::Identity => copy(values, out),
        Activation::Gelu => write(
            out,
            [values],
            #[inline(always)]
            |[x]| gelu(x),
        ),
        Activation::GeluTanh => write(
            out,
            [values],
            #[inline(always)]
            |[x]| gelu_tanh(x),
        ),
        Activation::Silu => write(
            out,
            [values],
            #[inline(always)]
            |[x]| silu(x),
        ),
    }
}

/// Multiplies a row of gradients by the activation's derivative at `x`.
#[inline(always)]
pub(super) fn times_derivative(gradient: &mut [f32], x: &[f32], activation: Activation) {
    match activation {
        Activation::Identity => {}
        Activation::Gelu => update(
            gradient,
            [x],
            #[inline(always)]
            |gradient, [x]| gradient * gelu_derivative(x),
        ),
        Activation::GeluTanh => update(
            gradient,
            [x],
            #[inline(always)]
            |gradient, [x]| gradient * gelu_tanh_derivative(x),
        ),
        Activation::Silu => update(
            gradient,
            [x],
            #[inline(always)]
            |gradient, [x]| gradient * silu_derivative(x),
        ),
    }
}

/// A new tensor, written row by row with `row(index, values)`.
fn by_row<const D: usize>(
    shape: [usize; D],
    cost: usize,
    row: impl Fn(usize, &mut [f32]) + Sync,
) -> Tensor<NdArray, D> {
    let width = shape[D - 1];
    let rows = shape[..D - 1].iter().product::<usize>();
    // SAFETY: every row is written, by one task.
    unsafe {
        tensor(shape, |out| {
            threads::over(rows, 1, cost * rows * width, |range| {
                vectorised(
                    #[inline(always)]
                    || {
                        for index in range.clone() {
                            row(index, out.part(index * width, width));
                        }
                    },
                );
            });
        })
    }
}

/// See [`FusedOps::activate`](crate::ops::FusedOps::activate).
pub(super) fn activate(x: &Rows, activation: Activation) -> Tensor<NdArray, 2> {
    by_row(
        [x.count, x.width],
        8,
        #[inline(always)]
        |row, out| activate_row(x.row(row), out, activation),
    )
}

/// See [`FusedOps::activate_backward`](crate::ops::FusedOps::activate_backward).
pub(super) fn activate_backward(
    gradient: &Rows,
    x: &Rows,
    activation: Activation,
) -> Tensor<NdArray, 2> {
    by_row(
        [x.count, x.width],
        16,
        #[inline(always)]
        |row, out| {
            copy(gradient.row(row), out);
            times_derivative(out, x.row(row), activation);
        },
    )
}

/// Mean, and the reciprocal of the standard deviation.
#[inline(always)]
fn moments(x: &[f32], epsilon: f32) -> (f32, f32) {
    let count = x.len() as f32;
    let mean = sum(x, |sum, x| sum + x) / count;
    // The variance is the mean square of the centred values, so a large mean costs no precision.
    let variance = sum(x, |sum, x| (x - mean).mul_add(x - mean, sum)) / count;
    (mean, 1.0 / (variance + epsilon).sqrt())
}

/// See [`FusedOps::modulated_norm`](crate::ops::FusedOps::modulated_norm).
pub(super) fn modulated_norm(
    x: &Rows,
    shift: &Rows,
    scale: &Rows,
    shape: [usize; 3],
    epsilon: f32,
) -> Tensor<NdArray, 3> {
    let tokens = shape[1];
    by_row(
        shape,
        3,
        #[inline(always)]
        |row, out| {
            let x = x.row(row);
            let (shift, scale) = (shift.row(row / tokens), scale.row(row / tokens));
            let (mean, inverse) = moments(x, epsilon);
            write(
                out,
                [x, shift, scale],
                #[inline(always)]
                |[x, shift, scale]| ((x - mean) * inverse).mul_add(1.0 + scale, shift),
            );
        },
    )
}

/// Runs `work(rows, sums)` over rows `[batch tokens]` and returns the sums over each sample's
/// tokens, `[batch, width]`.
///
/// Of few samples, a sample's tokens are summed in parts, so that all threads have work. How many
/// depends on the shape alone: any number of threads gives the same bits.
fn over_tokens(
    [batch, tokens]: [usize; 2],
    width: usize,
    cost: usize,
    work: impl Fn(Range<usize>, &mut [f32]) + Sync,
) -> Vec<f32> {
    /// Tasks that there should be.
    const TASKS: usize = 32;
    let parts = TASKS.div_ceil(batch.max(1)).min(tokens.div_ceil(16)).max(1);
    let mut sums = vec![0.0; batch * parts * width];
    let out = Out::of(&mut sums);
    threads::over(batch * parts, 1, cost, |range| {
        vectorised(
            #[inline(always)]
            || {
                for index in range.clone() {
                    let (sample, part) = (index / parts, index % parts);
                    let bound = |part: usize| sample * tokens + part * tokens / parts;
                    // SAFETY: only this task writes the sums of this part.
                    let sums = unsafe { out.part(index * width, width) };
                    work(bound(part)..bound(part + 1), sums);
                }
            },
        );
    });
    for sample in 0..batch {
        let from = sample * parts * width;
        for part in 0..parts {
            for column in 0..width {
                let value = sums[from + part * width + column];
                match part {
                    0 => sums[sample * width + column] = value,
                    _ => sums[sample * width + column] += value,
                }
            }
        }
    }
    sums.truncate(batch * width);
    sums
}

/// See [`FusedOps::modulated_norm_backward`](crate::ops::FusedOps::modulated_norm_backward).
pub(super) fn modulated_norm_backward(
    gradient: &Rows,
    x: &Rows,
    scale: &Rows,
    shape: [usize; 3],
    epsilon: f32,
    before: Option<Values>,
) -> NormGradients<NdArray> {
    let [batch, tokens, width] = shape;
    let (mut before, adds) = match before {
        Some(before) => (before, true),
        // SAFETY: every row is written below and none is read, since there is no earlier gradient
        // to add to.
        None => (unsafe { Values::unwritten(shape) }, false),
    };
    let out = Out::of(before.write());
    let sums = over_tokens(
        [batch, tokens],
        2 * width,
        8 * batch * tokens * width,
        #[inline(always)]
        |rows, sums| {
            let (shifts, scales) = sums.split_at_mut(width);
            let mut lines = Scratch::new(2 * width);
            let (normal, inner) = lines.values().split_at_mut(width);
            let count = width as f32;
            for row in rows {
                let (x, gradient, scale) = (x.row(row), gradient.row(row), scale.row(row / tokens));
                let (mean, inverse) = moments(x, epsilon);
                write(
                    normal,
                    [x],
                    #[inline(always)]
                    |[x]| (x - mean) * inverse,
                );
                write(
                    inner,
                    [gradient, scale],
                    #[inline(always)]
                    |[gradient, scale]| gradient * (1.0 + scale),
                );
                update(
                    shifts,
                    [gradient],
                    #[inline(always)]
                    |sum, [gradient]| sum + gradient,
                );
                update(
                    scales,
                    [gradient, normal],
                    #[inline(always)]
                    |sum, [gradient, normal]| gradient.mul_add(normal, sum),
                );
                let total = sum(inner, |sum, inner| sum + inner) / count;
                let projected = dot(inner, normal) / count;
                // SAFETY: only this task writes this row.
                let out = unsafe { out.part(row * width, width) };
                if adds {
                    update(
                        out,
                        [inner, normal],
                        #[inline(always)]
                        |before, [inner, normal]| {
                            before + (inner - total - normal * projected) * inverse
                        },
                    );
                } else {
                    write(
                        out,
                        [inner, normal],
                        #[inline(always)]
                        |[inner, normal]| (inner - total - normal * projected) * inverse,
                    );
                }
            }
        },
    );
    let (mut shift, mut scale) = (
        Vec::with_capacity(batch * width),
        Vec::with_capacity(batch * width),
    );
    for sums in sums.chunks_exact(2 * width) {
        shift.extend_from_slice(&sums[..width]);
        scale.extend_from_slice(&sums[width..]);
    }
    NormGradients {
        x: before.into_tensor(),
        shift: matrix(shift, [batch, width]),
        scale: matrix(scale, [batch, width]),
    }
}

/// See [`FusedOps::gated_residual`](crate::ops::FusedOps::gated_residual).
pub(super) fn gated_residual(
    x: &Rows,
    gate: &Rows,
    y: &Rows,
    shape: [usize; 3],
) -> Tensor<NdArray, 3> {
    let tokens = shape[1];
    by_row(
        shape,
        1,
        #[inline(always)]
        |row, out| {
            let (x, y, gate) = (x.row(row), y.row(row), gate.row(row / tokens));
            write(
                out,
                [x, y, gate],
                #[inline(always)]
                |[x, y, gate]| gate.mul_add(y, x),
            );
        },
    )
}

/// See [`FusedOps::gated_residual_backward`](crate::ops::FusedOps::gated_residual_backward).
pub(super) fn gated_residual_backward(
    gradient: &Rows,
    gate: &Rows,
    y: &Rows,
    shape: [usize; 3],
) -> (Tensor<NdArray, 2>, Tensor<NdArray, 3>) {
    let [batch, tokens, width] = shape;
    let mut sums = Vec::new();
    // SAFETY: every row is written, by one task.
    let dy = unsafe {
        tensor(shape, |out| {
            sums = over_tokens(
                [batch, tokens],
                width,
                2 * batch * tokens * width,
                #[inline(always)]
                |rows, sums| {
                    for row in rows {
                        let (gradient, y) = (gradient.row(row), y.row(row));
                        let gate = gate.row(row / tokens);
                        let out = out.part(row * width, width);
                        update(
                            sums,
                            [gradient, y],
                            #[inline(always)]
                            |sum, [gradient, y]| gradient.mul_add(y, sum),
                        );
                        write(
                            out,
                            [gradient, gate],
                            #[inline(always)]
                            |[gradient, gate]| gradient * gate,
                        );
                    }
                },
            );
        })
    };
    (matrix(sums, [batch, width]), dy)
}

/// See [`FusedOps::blend`](crate::ops::FusedOps::blend).
pub(super) fn blend(x: &Rows, y: &Rows, share: &Rows, shape: [usize; 3]) -> Tensor<NdArray, 3> {
    let (tokens, share) = (shape[1], share.row(0));
    by_row(
        shape,
        1,
        #[inline(always)]
        |row, out| {
            let share = share[row / tokens];
            write(
                out,
                [x.row(row), y.row(row)],
                #[inline(always)]
                |[x, y]| share.mul_add(y, (1.0 - share) * x),
            );
        },
    )
}

/// See [`FusedOps::blend_backward`](crate::ops::FusedOps::blend_backward).
pub(super) fn blend_backward(
    gradient: &Rows,
    x: &Rows,
    y: &Rows,
    share: &Rows,
    shape: [usize; 3],
) -> (Tensor<NdArray, 3>, Tensor<NdArray, 3>, Tensor<NdArray, 1>) {
    let [batch, tokens, width] = shape;
    let share = share.row(0);
    let (mut sums, mut dy) = (Vec::new(), None);
    // SAFETY: every row of both is written, by one task.
    let dx = unsafe {
        tensor(shape, |dx| {
            dy = Some(tensor(shape, |dy| {
                sums = over_tokens(
                    [batch, tokens],
                    1,
                    4 * batch * tokens * width,
                    #[inline(always)]
                    |rows, sums| {
                        for row in rows {
                            let (gradient, x, y) = (gradient.row(row), x.row(row), y.row(row));
                            let share = share[row / tokens];
                            let dx = dx.part(row * width, width);
                            let dy = dy.part(row * width, width);
                            write(
                                dx,
                                [gradient],
                                #[inline(always)]
                                |[gradient]| gradient * (1.0 - share),
                            );
                            write(
                                dy,
                                [gradient],
                                #[inline(always)]
                                |[gradient]| gradient * share,
                            );
                            sums[0] += dot(gradient, y) - dot(gradient, x);
                        }
                    },
                );
            }));
        })
    };
    let dy = dy.unwrap_or_else(|| dx.clone());
    (dx, dy, matrix(sums, [batch]))
}
