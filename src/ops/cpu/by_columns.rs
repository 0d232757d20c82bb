//! A product whose columns are divided among cores.
//!
//! [`multiply`](super::product::multiply) packs all of B, then divides the rows of C. With few rows
//! and many weights, as in the head of a MAR or a modulation, writing the packed weights and
//! reading them again takes longer than a core needs to multiply them. Here the rows of A are
//! copied once, and a core multiplies all of them by a panel that it has just packed and that is
//! still in its cache.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::memory::{Out, Rows, Scratch};
use super::panels::{Packer, PanelView, panel_width};
use super::product::{
    Ahead, Block, DEPTH, STRIDE, Start, Target, block_of, size_of_pairs, steps, words,
};
use super::simd::vectorised;
use super::threads;
use crate::backend::Compute;

/// Rows of A are copied this many at a time.
const ROWS: usize = 16;

/// Sizes of a product.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) rows: usize,
    pub(super) depth: usize,
    pub(super) columns: usize,
    pub(super) compute: Compute,
}

/// Values that fit the second-level cache beside a panel.
const NEAR: usize = 1 << 18;

/// Most rows: of more, packing is a small part, and each panel would read more of A.
const MOST: usize = 256;

/// Whether a product is faster when its columns are divided: A's copy stays in the cache, and B
/// does not.
pub(super) fn is_faster(rows: usize, depth: usize, columns: usize) -> bool {
    rows <= MOST && rows * depth <= NEAR && depth * columns >= NEAR
}

/// `C = bias + A B`; `fill` writes blocks of A's rows as in
/// [`multiply`](super::product::multiply), `column(j, values)` writes column `j` of B, which it
/// reads from row `j` of `source`.
///
/// # Safety
///
/// The depth isn't 0, the target has as many rows and columns as the product, not aliased, and
/// `fill` writes the whole block it is asked for.
pub(super) unsafe fn multiply(
    sizes: Sizes,
    target: Target,
    bias: &[f32],
    fill: impl Fn(Range<usize>, Range<usize>, &mut [f32]) + Sync,
    column: impl Fn(usize, &mut [f32]) + Sync,
    source: &Rows,
) {
    let Sizes {
        rows,
        depth,
        columns,
        compute,
    } = sizes;
    let blocks = depth.div_ceil(DEPTH);
    let mut a = Scratch::new(blocks * rows * STRIDE);
    let out = Out::of(a.values());
    threads::over(rows, ROWS, 4 * rows * depth, |range| {
        let mut values = Scratch::new(size_of_pairs(compute, ROWS * STRIDE));
        let values = values.values();
        vectorised(
            #[inline(always)]
            || {
                for first in range.clone().step_by(ROWS) {
                    let high = ROWS.min(range.end - first);
                    for block in 0..blocks {
                        let depths = block * DEPTH..depth.min((block + 1) * DEPTH);
                        let (start, deep) = ((block * rows + first) * STRIDE, depths.len());
                        // SAFETY: only this task writes these rows.
                        let place = unsafe { out.part(start, high * STRIDE) };
                        match compute {
                            Compute::F32 => fill(first..first + high, depths, place),
                            Compute::Bf16 => {
                                fill(first..first + high, depths, values);
                                block_of::<false>(compute, high, deep, values, place);
                            }
                        }
                    }
                }
            },
        );
    });
    let a = &*a.values();
    threads::over(
        columns.div_ceil(panel_width()),
        1,
        rows * depth * columns / 8 + 8 * depth * columns,
        |panels| {
            Arch::new().dispatch(Columns::new(
                sizes,
                panels,
                a,
                target,
                bias,
                // Not `&column`, as in `product::multiply`.
                #[inline(always)]
                |j: usize, values: &mut [f32]| column(j, values),
                source,
            ));
        },
    );
}

/// The columns of some panels.
struct Columns<'a, F> {
    sizes: Sizes,
    panels: Range<usize>,
    /// The copy of A: blocks of [`DEPTH`] columns, each of all rows.
    a: &'a [f32],
    target: Target,
    bias: &'a [f32],
    column: F,
    source: &'a Rows,
}

impl<'a, F: Fn(usize, &mut [f32])> Columns<'a, F> {
    fn new(
        sizes: Sizes,
        panels: Range<usize>,
        a: &'a [f32],
        target: Target,
        bias: &'a [f32],
        column: F,
        source: &'a Rows,
    ) -> Self {
        Self {
            sizes,
            panels,
            a,
            target,
            bias,
            column,
            source,
        }
    }
}

impl<F: Fn(usize, &mut [f32])> WithSimd for Columns<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Sizes {
            rows,
            depth,
            columns,
            compute,
        } = self.sizes;
        let width = 2 * S::F32_LANES;
        let mut packer = Packer::new(compute, depth, columns);
        let mut panel = Scratch::new(words(compute, depth) * width);
        // While a panel is multiplied, the weights of the next one come from memory, where their
        // rows are adjacent; elsewhere, and beyond the last one, it asks in vain.
        let step = (width * depth).div_ceil(steps::<S>(rows, words(compute, depth)));
        for index in self.panels.clone() {
            packer.pack(
                index,
                // Not `&self.column`, as in `product::multiply`.
                #[inline(always)]
                |j: usize, values: &mut [f32]| (self.column)(j, values),
                panel.values(),
            );
            let first = index * width;
            let broad = width.min(columns - first);
            let view = PanelView {
                start: panel.pointer(),
                depth: words(compute, depth),
                values: depth,
                columns: broad,
                compute,
            };
            let next = (index + 1 < self.panels.end).then(|| self.source.row(first + width));
            for (block, from) in (0..depth).step_by(DEPTH).enumerate() {
                let start = match from {
                    0 => Start::Row(&self.bias[first..][..broad]),
                    _ => Start::Sum,
                };
                let ahead = next.map(|row| Ahead {
                    start: row
                        .as_ptr()
                        .wrapping_add(step * steps::<S>(rows, words(compute, from))),
                    step,
                });
                // SAFETY: A and the panel are filled as far as they are read, and only this task
                // writes these columns of C.
                unsafe {
                    Block::<false> {
                        rows,
                        deep: words(compute, DEPTH.min(depth - from)),
                        scratch: self.a[block * rows * STRIDE..].as_ptr(),
                        panels: view,
                        from: words(compute, from),
                        columns: 0..broad,
                        c: self.target.out.pointer().add(first),
                        stride: self.target.stride,
                        start,
                        ahead,
                    }
                    .multiply(simd);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::blocks::rows_of;
    use super::super::panels::Panels;
    use super::super::product;
    use super::super::tests::noise;
    use super::*;
    use crate::ops::Activation;

    #[test]
    fn a_product_has_the_same_bits_however_it_is_divided() {
        for compute in [Compute::F32, Compute::Bf16] {
            for (rows, depth, columns) in [(1, 1, 1), (9, 256, 32), (47, 515, 161), (100, 40, 70)] {
                let [a, b] = [(1, rows), (2, columns)]
                    .map(|(index, count)| Rows::of(noise::<_, 2>(index, [count, depth])).unwrap());
                let bias = Rows::of(noise::<_, 2>(3, [1, columns])).unwrap();
                let column = |j: usize, values: &mut [f32]| values.copy_from_slice(b.row(j));
                let fill = || rows_of(&a, Activation::Silu);
                let [mut one, mut other] = [0, 1].map(|_| vec![0.0; rows * columns]);
                let target = |values: &mut [f32]| Target {
                    out: Out::of(values),
                    stride: columns,
                };
                let sizes = Sizes {
                    rows,
                    depth,
                    columns,
                    compute,
                };
                let panels = Panels::of_columns(compute, depth, columns, column);
                // SAFETY: the targets are as large as the product.
                unsafe {
                    multiply(sizes, target(&mut one), bias.row(0), fill(), column, &b);
                    let start = Start::Row(bias.row(0));
                    let target = target(&mut other);
                    product::multiply::<false>(rows, panels.view(), target, start, fill(), |_| ());
                }
                assert_eq!(one, other, "{compute:?}, {rows} x {depth} x {columns}");
            }
        }
    }
}
