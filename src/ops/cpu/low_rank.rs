//! Low-rank updates of linear layers (LoRA, arXiv 2106.09685).

use burn::tensor::Tensor;
use burn_ndarray::NdArray;

use super::blocks::{columns_of, rows_of};
use super::memory::{Out, Rows, Scratch, matrix, tensor};
use super::panels::Panels;
use super::product::{Start, Target, multiply};
use super::simd::{dot, vectorised};
use crate::backend::Compute;
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

/// Gradients of A, `s (dy B)^T act(x)`, and of B, `s dy^T (act(x) A^T)`, in f32: the factors are so
/// thin that the products take no less time in another type.
pub(super) fn gradients(
    gradient: &Rows,
    x: &Rows,
    lora: &LoraRows,
    activation: Activation,
) -> (Tensor<NdArray, 2>, Tensor<NdArray, 2>) {
    let (rows, inputs, outputs, rank) = (x.count, x.width, gradient.width, lora.a.count);
    let target = |out| Target { out, stride: rank };
    let scaled = |values: &[f32], line: &mut [f32]| {
        for (place, value) in line.iter_mut().zip(values) {
            *place = lora.scale * value;
        }
    };
    let compute = Compute::F32;
    let b = Panels::of_rows(
        compute,
        outputs,
        rank,
        #[inline(always)]
        |p, line| scaled(lora.b.row(p), line),
    );
    let a = Panels::of_columns(
        compute,
        inputs,
        rank,
        #[inline(always)]
        |q, line| scaled(lora.a.row(q), line),
    );
    let (mut narrow, mut seen) = (Scratch::new(rows * rank), Scratch::new(rows * rank));
    let (narrow, seen) = (narrow.values(), seen.values());
    // SAFETY: each target is as large as its product, which writes all of it.
    unsafe {
        let identity = Activation::Identity;
        let out = Out::of(narrow);
        // s dy B
        multiply::<false>(
            rows,
            b.view(),
            target(out),
            Start::Zero,
            rows_of(gradient, identity),
            |_| (),
        );
        let out = Out::of(seen);
        // s act(x) A^T
        multiply::<false>(
            rows,
            a.view(),
            target(out),
            Start::Zero,
            rows_of(x, activation),
            |_| (),
        );
        let (narrow, seen) = (&*narrow, &*seen);
        let narrow = Panels::of_rows(compute, rows, rank, |p, line| {
            line.copy_from_slice(&narrow[p * rank..][..rank])
        });
        let seen = Panels::of_rows(compute, rows, rank, |p, line| {
            line.copy_from_slice(&seen[p * rank..][..rank])
        });
        // A's gradient is computed transposed, because only then are there enough rows for all
        // cores.
        let a = tensor([inputs, rank], |out| {
            multiply::<true>(
                inputs,
                narrow.view(),
                target(out),
                Start::Zero,
                columns_of(x, activation),
                |_| (),
            );
        });
        let b = tensor([outputs, rank], |out| {
            multiply::<true>(
                outputs,
                seen.view(),
                target(out),
                Start::Zero,
                columns_of(gradient, identity),
                |_| (),
            );
        });
        (a.transpose(), b)
    }
}
