//! Low-rank updates of linear layers (LoRA, arXiv 2106.09685).

use burn::tensor::Tensor;
use burn_ndarray::NdArray;

use super::elementwise::activate_row;
use super::memory::{Out, Rows, Scratch, matrix};
use super::simd::{dot, dots, update, vectorised};
use super::threads;
use super::transpose::turn;
use crate::ops::Activation;

/// A low-rank update.
pub(super) struct LoraRows {
    pub(super) a: Rows,
    pub(super) b: Rows,
    pub(super) scale: f32,
}

/// [`gradients`] from the whole weight's gradient, `dA = s B^T dW` and `dB = s dW A^T`: for weights
/// so narrow that products with them cost no more than products with the factors.
pub(super) fn of_weight(lora: &LoraRows, dw: &Rows) -> (Tensor<NdArray, 2>, Tensor<NdArray, 2>) {
    let (outputs, inputs, rank) = (dw.count, dw.width, lora.a.count);
    let (mut da, mut db) = (vec![0.0; rank * inputs], vec![0.0; outputs * rank]);
    vectorised(
        #[inline(always)]
        || {
            for j in 0..outputs {
                let dw = dw.row(j);
                for (q, b) in lora.b.row(j).iter().enumerate() {
                    let factor = b * lora.scale;
                    for (sum, value) in da[q * inputs..][..inputs].iter_mut().zip(dw) {
                        *sum += factor * value;
                    }
                    db[j * rank + q] = lora.scale * dot(dw, lora.a.row(q));
                }
            }
        },
    );
    (matrix(da, [rank, inputs]), matrix(db, [outputs, rank]))
}

/// Most parts of the sums over rows, each with sums of its own. Not the number of threads, on which
/// no bit may depend; more threads than these idle here.
const PARTS: usize = 8;

/// Fewest rows of a part.
const LEAST: usize = 16;

/// Rows that are added to the sums together.
const ROWS: usize = 4;

/// Gradients of A, `s (dy B)^T act(x)`, and of B, `s dy^T (act(x) A^T)`, in f32: the factors are so
/// thin that the products take no less time in another type.
///
/// Tiles of a product would be mostly empty at a rank of 8, and a product would copy `x` and `dy`
/// each time. Here each row is read once: its products with the factors' rows, then what it adds to
/// the gradients.
pub(super) fn gradients(
    gradient: &Rows,
    x: &Rows,
    lora: &LoraRows,
    activation: Activation,
) -> (Tensor<NdArray, 2>, Tensor<NdArray, 2>) {
    let (rows, inputs, outputs, rank) = (x.count, x.width, gradient.width, lora.a.count);
    let mut b = Scratch::new(rank * outputs);
    let b = b.values();
    turn(outputs, rank, |j| lora.b.row(j), b, outputs); // B^T
    let b = &*b;
    let parts = rows.div_ceil(LEAST).clamp(1, PARTS);
    let size = rank * (inputs + outputs);
    let mut sums = Scratch::new(parts * size);
    let sums = sums.values();
    let out = Out::of(sums);
    threads::over(parts, 1, 4 * rows * size, |range| {
        let mut lines = Scratch::new(ROWS * inputs);
        let mut factors = Scratch::new(2 * ROWS * rank);
        let (lines, factors) = (lines.values(), factors.values());
        for part in range {
            let bound = |part: usize| part * rows / parts;
            // SAFETY: only this task writes this part.
            let place = unsafe { out.part(part * size, size) };
            let (da, db) = place.split_at_mut(rank * inputs);
            vectorised(
                #[inline(always)]
                || {
                    da.fill(0.0);
                    db.fill(0.0);
                    let end = bound(part + 1);
                    for first in (bound(part)..end).step_by(ROWS) {
                        let count = ROWS.min(end - first);
                        let as_it_is = activation == Activation::Identity;
                        if !as_it_is {
                            for (line, row) in lines.chunks_exact_mut(inputs).zip(first..end) {
                                activate_row(x.row(row), line, activation);
                            }
                        }
                        let seen = |n: usize| match as_it_is {
                            true => x.row(first + n),
                            false => &lines[n * inputs..][..inputs],
                        };
                        let dy = |n: usize| gradient.row(first + n);
                        let (narrow, wide) = factors.split_at_mut(ROWS * rank);
                        products(
                            dy,
                            count,
                            lora.scale,
                            |q| &b[q * outputs..][..outputs],
                            narrow,
                        );
                        products(seen, count, lora.scale, |q| lora.a.row(q), wide);
                        add(da, count, seen, narrow);
                        add(db, count, dy, wide);
                    }
                },
            );
        }
    });
    let (first, others) = sums.split_at_mut(size);
    for other in others.chunks_exact(size) {
        for (sum, value) in first.iter_mut().zip(other) {
            *sum += value;
        }
    }
    let (da, db) = first.split_at(rank * inputs);
    let mut of_b = vec![0.0; outputs * rank];
    turn(
        rank,
        outputs,
        |q| &db[q * outputs..][..outputs],
        &mut of_b,
        rank,
    );
    (
        matrix(da.to_vec(), [rank, inputs]),
        matrix(of_b, [outputs, rank]),
    )
}

/// `factors[q ROWS + n]` is the product of `row(n)` and `other(q)`, scaled, for the first `count`
/// rows.
#[inline(always)]
fn products<'a>(
    row: impl Fn(usize) -> &'a [f32],
    count: usize,
    scale: f32,
    other: impl Fn(usize) -> &'a [f32],
    factors: &mut [f32],
) {
    for (q, places) in factors.chunks_exact_mut(ROWS).enumerate() {
        let found = match count {
            ROWS => dots([row(0), row(1), row(2), row(3)], other(q)),
            _ => std::array::from_fn(|n| {
                if n < count {
                    dot(row(n), other(q))
                } else {
                    0.0
                }
            }),
        };
        for (place, value) in places.iter_mut().zip(found) {
            *place = scale * value;
        }
    }
}

/// Adds to each row `q` of `sums` the rows `row(n)` times `factors[q ROWS + n]`, for the first
/// `count`.
#[inline(always)]
fn add<'a>(sums: &mut [f32], count: usize, row: impl Fn(usize) -> &'a [f32], factors: &[f32]) {
    let factors = factors.chunks_exact(ROWS);
    let width = row(0).len();
    for (sums, f) in sums.chunks_exact_mut(width).zip(factors) {
        if count == ROWS {
            update(
                sums,
                [row(0), row(1), row(2), row(3)],
                #[inline(always)]
                |sum, [a, b, c, d]| {
                    let sum = f[1].mul_add(b, f[0].mul_add(a, sum));
                    f[3].mul_add(d, f[2].mul_add(c, sum))
                },
            );
            continue;
        }
        for (n, factor) in f.iter().enumerate().take(count) {
            update(
                sums,
                [row(n)],
                #[inline(always)]
                |sum, [a]| factor.mul_add(a, sum),
            );
        }
    }
}
