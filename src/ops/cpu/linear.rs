//! Linear layers.

use std::ops::Range;

use burn::tensor::Tensor;
use burn_ndarray::NdArray;
use pulp::{Arch, Simd, WithSimd};

use super::bf16;
use super::blocks::{columns_of, rows_of};
use super::by_columns::{self, Sizes};
use super::elementwise::activate_row;
use super::low_rank::{self, LoraRows};
use super::memory::{Out, Rows, Scratch, matrix, tensor};
use super::panels::{PanelView, Panels};
use super::product::{
    Block, DEPTH, STRIDE, Start, Target, block_of, multiply, size_of_pairs, words,
};
use super::simd::{copy, dot, update, vectorised};
use super::threads;
use crate::backend::Compute;
use crate::ops::{Activation, LinearGradients, LinearWants, LinearWeights};

/// Up to this many rows, packing a weight costs more than the product. These few are multiplied in
/// f32 whatever the type of products: reading the weight is all that takes time.
const FEW: usize = 8;

/// Largest weight whose gradient is summed in [`PARTS`], each a matrix of its own.
const SMALL: usize = 1 << 16;

/// Parts of such a sum. Not the number of threads, on which no bit may depend; more threads than
/// these idle here.
const PARTS: usize = 8;

/// The parameters as rows.
pub(super) struct Weights {
    weight: Rows,
    bias: Rows,
    lora: Option<LoraRows>,
    compute: Compute,
}

impl Weights {
    /// None if one of them isn't f32.
    pub(super) fn of(weights: LinearWeights<NdArray>) -> Option<Self> {
        let lora = match weights.lora {
            None => None,
            Some(lora) => Some(LoraRows {
                a: Rows::of(lora.a)?,
                b: Rows::of(lora.b)?,
                scale: lora.scale as f32,
            }),
        };
        Some(Self {
            weight: Rows::of(weights.weight)?,
            bias: Rows::of(weights.bias)?,
            lora,
            compute: weights.compute,
        })
    }

    /// [`merged`](Self::merged) as a function.
    #[inline(always)]
    fn rows(&self) -> impl Fn(usize, &mut [f32]) + Sync {
        #[inline(always)]
        |index, row| self.merged(index, row)
    }

    /// Row `index` of `W + scale B A`; the merged matrix is never stored.
    #[inline(always)]
    fn merged(&self, index: usize, row: &mut [f32]) {
        copy(self.weight.row(index), row);
        if let Some(lora) = &self.lora {
            for (factor, a) in lora.b.row(index).iter().zip(0..) {
                let factor = factor * lora.scale;
                update(
                    row,
                    [lora.a.row(a)],
                    #[inline(always)]
                    |value, [a]| factor.mul_add(a, value),
                );
            }
        }
    }
}

/// `act(x) W^T + b`, `[rows, out]`.
pub(super) fn forward(x: &Rows, weights: &Weights, activation: Activation) -> Tensor<NdArray, 2> {
    let outputs = weights.weight.count;
    let shape = [x.count, outputs];
    let inputs = weights.weight.width;
    if x.count <= FEW {
        // SAFETY: `few` writes all of it.
        return unsafe { tensor(shape, |out| few(x, weights, activation, out)) };
    }
    let (bias, column) = (weights.bias.row(0), weights.rows());
    let fill = rows_of(x, activation);
    let target = |out| Target {
        out,
        stride: outputs,
    };
    if by_columns::is_faster(x.count, inputs, outputs) {
        let sizes = Sizes {
            rows: x.count,
            depth: inputs,
            columns: outputs,
            compute: weights.compute,
        };
        // SAFETY: the target is as large as the product, which writes all of it.
        return unsafe {
            tensor(shape, |out| {
                by_columns::multiply(sizes, target(out), bias, fill, column, &weights.weight);
            })
        };
    }
    let panels = Panels::of_columns(weights.compute, inputs, outputs, column);
    // SAFETY: as above.
    unsafe {
        tensor(shape, |out| {
            let (panels, start) = (panels.view(), Start::Row(bias));
            multiply::<false>(x.count, panels, target(out), start, fill, |_| ());
        })
    }
}

/// The forward pass for few rows: each weight is read once, unpacked.
fn few(x: &Rows, weights: &Weights, activation: Activation, out: Out) {
    let (inputs, outputs) = (weights.weight.width, weights.weight.count);
    let mut activated = Scratch::new(x.count * inputs);
    let activated = activated.values();
    vectorised(
        #[inline(always)]
        || {
            for (place, row) in activated.chunks_exact_mut(inputs).zip(0..) {
                activate_row(x.row(row), place, activation);
            }
        },
    );
    let activated = &*activated;
    // x A^T, scaled.
    let rank = weights.lora.as_ref().map_or(0, |lora| lora.a.count);
    let mut narrow = vec![0.0; x.count * rank];
    if let Some(lora) = &weights.lora {
        vectorised(
            #[inline(always)]
            || {
                for (place, x) in narrow
                    .chunks_exact_mut(rank)
                    .zip(activated.chunks_exact(inputs))
                {
                    for (q, value) in place.iter_mut().enumerate() {
                        *value = lora.scale * dot(x, lora.a.row(q));
                    }
                }
            },
        );
    }
    threads::over(outputs, 16, x.count * inputs * outputs, |range| {
        vectorised(
            #[inline(always)]
            || {
                for j in range.clone() {
                    let (weight, bias) = (weights.weight.row(j), weights.bias.row(0)[j]);
                    for (row, x) in activated.chunks_exact(inputs).enumerate() {
                        let mut y = bias + dot(x, weight);
                        if let Some(lora) = &weights.lora {
                            y += dot(&narrow[row * rank..][..rank], lora.b.row(j));
                        }
                        // SAFETY: only this task writes column j.
                        unsafe { out.part(row * outputs + j, 1)[0] = y };
                    }
                }
            },
        );
    });
}

/// The requested gradients.
pub(super) fn backward(
    gradient: &Rows,
    x: &Rows,
    weights: &Weights,
    activation: Activation,
    wants: LinearWants,
) -> LinearGradients<NdArray> {
    let lora = weights.lora.as_ref().filter(|_| wants.lora);
    // Products with the factors are 8 times less efficient than products with the weight.
    let (inputs, outputs) = (x.width, gradient.width);
    let narrow = inputs * outputs < 8 * lora.map_or(0, |lora| lora.a.count) * (inputs + outputs);
    let (weight, bias) = if wants.weight || (lora.is_some() && narrow) {
        let (weight, bias) = of_weight(gradient, x, activation, weights.compute);
        (Some(weight), Some(bias))
    } else {
        (None, wants.bias.then(|| column_sums(gradient)))
    };
    let lora = lora.map(|lora| match weight.clone().and_then(Rows::of) {
        Some(dw) => low_rank::of_weight(lora, &dw),
        None => low_rank::gradients(gradient, x, lora, activation),
    });
    let weight = weight.filter(|_| wants.weight);
    let bias = bias.filter(|_| wants.bias);
    LinearGradients {
        x: wants.x.then(|| of_input(gradient, x, weights, activation)),
        weight,
        bias,
        lora,
    }
}

/// `(dy W) act'(x)`
fn of_input(
    gradient: &Rows,
    x: &Rows,
    weights: &Weights,
    activation: Activation,
) -> Tensor<NdArray, 2> {
    let (rows, inputs, outputs) = (x.count, x.width, gradient.width);
    let finish = |out: Out| {
        #[inline(always)]
        move |rows: Range<usize>| {
            if activation == Activation::Identity {
                return;
            }
            for row in rows {
                // SAFETY: these rows belong to the calling task.
                let values = unsafe { out.part(row * inputs, inputs) };
                super::elementwise::times_derivative(values, x.row(row), activation);
            }
        }
    };
    if rows <= FEW {
        // SAFETY: all columns of all rows are written.
        return unsafe {
            tensor([rows, inputs], |out| {
                few_backward(gradient, weights, out);
                vectorised(
                    #[inline(always)]
                    || finish(out)(0..rows),
                );
            })
        };
    }
    let panels = Panels::of_rows(weights.compute, outputs, inputs, weights.rows());
    // SAFETY: the target is as large as the product, which writes all of it.
    unsafe {
        tensor([rows, inputs], |out| {
            multiply::<false>(
                rows,
                panels.view(),
                Target {
                    out,
                    stride: inputs,
                },
                Start::Zero,
                rows_of(gradient, Activation::Identity),
                finish(out),
            );
        })
    }
}

/// `dy W` for few rows: each weight is read once, unpacked.
fn few_backward(gradient: &Rows, weights: &Weights, out: Out) {
    let (rows, inputs, outputs) = (gradient.count, weights.weight.width, gradient.width);
    threads::over(inputs, 16, rows * inputs * outputs, |columns| {
        vectorised(
            #[inline(always)]
            || {
                let (start, width) = (columns.start, columns.len());
                let mut merged = Scratch::new(inputs);
                let merged = merged.values();
                for row in 0..rows {
                    // SAFETY: only this task writes these columns.
                    unsafe { out.part(row * inputs + start, width) }.fill(0.0);
                }
                for p in 0..outputs {
                    let weight = match &weights.lora {
                        None => &weights.weight.row(p)[columns.clone()],
                        Some(_) => {
                            weights.merged(p, merged);
                            &merged[columns.clone()]
                        }
                    };
                    for row in 0..rows {
                        let factor = gradient.row(row)[p];
                        // SAFETY: as above.
                        let sums = unsafe { out.part(row * inputs + start, width) };
                        for (sum, value) in sums.iter_mut().zip(weight) {
                            *sum = factor.mul_add(*value, *sum);
                        }
                    }
                }
            },
        );
    });
}

/// `dy^T act(x)`, and the column sums of `dy`.
fn of_weight(
    gradient: &Rows,
    x: &Rows,
    activation: Activation,
    compute: Compute,
) -> (Tensor<NdArray, 2>, Tensor<NdArray, 1>) {
    let (rows, inputs, outputs) = (x.count, x.width, gradient.width);
    if inputs * outputs <= SMALL && rows > DEPTH {
        return of_small_weight(gradient, x, activation, compute);
    }
    let panels = Panels::of_rows(
        compute,
        rows,
        inputs,
        #[inline(always)]
        |p, line| activate_row(x.row(p), line, activation),
    );
    let mut bias = None;
    // SAFETY: the targets are as large as the product, which writes all of them.
    let weight = unsafe {
        tensor([outputs, inputs], |out| {
            bias = Some(tensor([outputs], |sums| {
                let columns = columns_of(gradient, Activation::Identity);
                multiply::<true>(
                    outputs,
                    panels.view(),
                    Target {
                        out,
                        stride: inputs,
                    },
                    Start::Zero,
                    #[inline(always)]
                    |block: Range<usize>, depths: Range<usize>, scratch: &mut [f32]| {
                        columns(block.clone(), depths.clone(), scratch);
                        // This task has just copied these columns: they are summed while in the
                        // cache.
                        let sums = sums.part(block.start, block.len());
                        add_rows(scratch, depths.len(), sums, depths.start == 0);
                    },
                    |_| (),
                );
            }));
        })
    };
    (weight, bias.unwrap_or_else(|| column_sums(gradient)))
}

/// Adds the first `rows` rows of a scratch to `sums`, which are zeroed first if `anew`.
#[inline(always)]
fn add_rows(scratch: &[f32], rows: usize, sums: &mut [f32], anew: bool) {
    if anew {
        sums.fill(0.0);
    }
    for row in scratch.chunks_exact(STRIDE).take(rows) {
        update(
            sums,
            [&row[..sums.len()]],
            #[inline(always)]
            |sum, [value]| sum + value,
        );
    }
}

/// One part of the sum over rows: the product of these rows, and the sums of their columns.
struct PartOfWeight<'a> {
    gradient: &'a Rows,
    x: &'a Rows,
    activation: Activation,
    compute: Compute,
    rows: Range<usize>,
    /// `[out, in]`, then `[out]`
    place: &'a mut [f32],
}

impl WithSimd for PartOfWeight<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (inputs, outputs) = (self.x.width, self.gradient.width);
        let width = 2 * S::F32_LANES;
        let (product, sums) = self.place.split_at_mut(outputs * inputs);
        let compute = self.compute;
        let mut panels = Scratch::new(DEPTH * inputs.next_multiple_of(width));
        let mut scratch = Scratch::new(DEPTH * STRIDE);
        let mut pairs = Scratch::new(size_of_pairs(compute, DEPTH * STRIDE));
        let mut lines = Scratch::new(2 * inputs);
        let (panels, scratch, pairs) = (panels.values(), scratch.values(), pairs.values());
        let (line, other) = lines.values().split_at_mut(inputs);
        for from in self.rows.clone().step_by(DEPTH) {
            let deep = DEPTH.min(self.rows.end - from);
            let anew = from == self.rows.start;
            let depth = words(compute, deep);
            let each = deep.div_ceil(depth); // rows in a row of words
            for p in 0..depth {
                let row = each * p;
                activate_row(self.x.row(from + row), line, self.activation);
                let second = each == 2 && row + 1 < deep;
                if second {
                    activate_row(self.x.row(from + row + 1), other, self.activation);
                }
                for first in (0..inputs).step_by(width) {
                    let part = first..inputs.min(first + width);
                    let place = &mut panels[first * depth + p * width..][..part.len()];
                    match compute {
                        Compute::F32 => copy(&line[part], place),
                        Compute::Bf16 => {
                            let second = second.then(|| &other[part.clone()]);
                            bf16::across(&line[part], second, place);
                        }
                    }
                }
            }
            let view = PanelView {
                start: panels.as_ptr(),
                depth,
                values: deep,
                columns: inputs,
                compute,
            };
            for first in (0..outputs).step_by(DEPTH) {
                let columns = first..outputs.min(first + DEPTH);
                columns_of(self.gradient, Activation::Identity)(
                    columns.clone(),
                    from..from + deep,
                    scratch,
                );
                add_rows(scratch, deep, &mut sums[columns.clone()], anew);
                let scratch = block_of::<true>(compute, columns.len(), deep, scratch, pairs);
                // SAFETY: scratch and panels were filled as far as they are read; the product has
                // `outputs` rows.
                unsafe {
                    Block::<true> {
                        rows: columns.len(),
                        deep: depth,
                        scratch: scratch.as_ptr(),
                        panels: view,
                        from: 0,
                        columns: 0..inputs,
                        c: product.as_mut_ptr().add(first * inputs),
                        stride: inputs,
                        start: if anew { Start::Zero } else { Start::Sum },
                        ahead: None,
                    }
                    .multiply(simd);
                }
            }
        }
    }
}

/// [`of_weight`] for many rows and a small weight: the rows are divided into parts, whose products
/// are added in their order.
fn of_small_weight(
    gradient: &Rows,
    x: &Rows,
    activation: Activation,
    compute: Compute,
) -> (Tensor<NdArray, 2>, Tensor<NdArray, 1>) {
    let (rows, inputs, outputs) = (x.count, x.width, gradient.width);
    let parts = PARTS.min(rows.div_ceil(DEPTH));
    let size = outputs * inputs + outputs;
    let mut places = Scratch::new(parts * size);
    let places = places.values();
    let out = Out::of(places);
    threads::over(parts, 1, rows * inputs * outputs / 8, |range| {
        for part in range {
            let bound = |part: usize| part * rows / parts;
            Arch::new().dispatch(PartOfWeight {
                gradient,
                x,
                activation,
                compute,
                rows: bound(part)..bound(part + 1),
                // SAFETY: only this task writes this part.
                place: unsafe { out.part(part * size, size) },
            });
        }
    });
    let (first, others) = places.split_at_mut(size);
    for other in others.chunks_exact(size) {
        for (sum, value) in first.iter_mut().zip(other) {
            *sum += value;
        }
    }
    let (product, sums) = first.split_at(outputs * inputs);
    (
        matrix(product.to_vec(), [outputs, inputs]),
        matrix(sums.to_vec(), [outputs]),
    )
}

fn column_sums(gradient: &Rows) -> Tensor<NdArray, 1> {
    // SAFETY: all sums are written.
    unsafe {
        tensor([gradient.width], |out| {
            let sums = out.part(0, gradient.width);
            sums.fill(0.0);
            for row in 0..gradient.count {
                for (sum, value) in sums.iter_mut().zip(gradient.row(row)) {
                    *sum += value;
                }
            }
        })
    }
}
