//! The second factor of a product, packed in the order in which tiles read it.

use pulp::{Arch, Simd, WithSimd};

use super::bf16;
use super::memory::{Out, Scratch};
use super::product::{size_of_pairs, words};
use super::simd::{copy, vectorised};
use super::threads;
use super::transpose::{NEAR, turn};
use crate::backend::Compute;

/// Columns of a panel on this machine.
pub(super) fn panel_width() -> usize {
    struct Width;
    impl WithSimd for Width {
        type Output = usize;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            2 * S::F32_LANES
        }
    }
    Arch::new().dispatch(Width)
}

/// B, `[depth, columns]`, in panels `[columns / width][depth][width]`, with zeros beyond the last
/// column. Of bf16, a word of 32 bits holds two values of a column, and panels are half as deep.
pub(super) struct Panels {
    scratch: Scratch,
    view: PanelView,
    width: usize,
}

impl Panels {
    /// Packs B by rows: `row(p, values)` writes row `p` of B.
    pub(super) fn of_rows(
        compute: Compute,
        values: usize,
        columns: usize,
        row: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let mut panels = Self::empty(compute, values, columns);
        let (width, depth) = (panels.width, panels.view.depth);
        let out = Out::of(panels.scratch.values());
        threads::over(depth, 1, 4 * values * columns, |rows| {
            let wide = columns.next_multiple_of(width);
            let (mut line, mut two) = (
                Scratch::new(wide),
                Scratch::new(size_of_pairs(compute, 2 * wide)),
            );
            let (line, two) = (line.values(), two.values());
            line[columns..].fill(0.0);
            two.fill(0.0);
            let (first, second) = two.split_at_mut(two.len() / 2);
            vectorised(
                #[inline(always)]
                || {
                    for p in rows.clone() {
                        match compute {
                            Compute::F32 => row(p, &mut line[..columns]),
                            Compute::Bf16 => {
                                row(2 * p, &mut first[..columns]);
                                let both = 2 * p + 1 < values;
                                if both {
                                    row(2 * p + 1, &mut second[..columns]);
                                }
                                bf16::across(first, both.then_some(&*second), line);
                            }
                        }
                        for (panel, values) in line.chunks_exact(width).enumerate() {
                            // SAFETY: only this thread writes row p of each panel.
                            let target = unsafe { out.part((panel * depth + p) * width, width) };
                            copy(values, target);
                        }
                    }
                },
            );
        });
        panels
    }

    /// Packs B by columns that are rows in memory: `column(j, values)` writes column `j` of B.
    pub(super) fn of_columns(
        compute: Compute,
        values: usize,
        columns: usize,
        column: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let mut panels = Self::empty(compute, values, columns);
        let size = panels.width * panels.view.depth;
        let out = Out::of(panels.scratch.values());
        threads::over(
            columns.div_ceil(panels.width),
            1,
            8 * values * columns,
            |range| {
                let mut packer = Packer::new(compute, values, columns);
                vectorised(
                    #[inline(always)]
                    || {
                        for panel in range.clone() {
                            // SAFETY: only this thread writes this panel.
                            let place = unsafe { out.part(panel * size, size) };
                            packer.pack(
                                panel,
                                // Not `&column`, as in `product::multiply`.
                                #[inline(always)]
                                |j: usize, values: &mut [f32]| column(j, values),
                                place,
                            );
                        }
                    },
                );
            },
        );
        panels
    }

    fn empty(compute: Compute, values: usize, columns: usize) -> Self {
        let width = panel_width();
        let depth = words(compute, values);
        let scratch = Scratch::new(columns.next_multiple_of(width) * depth);
        let view = PanelView {
            start: scratch.pointer(),
            depth,
            values,
            columns,
            compute,
        };
        Self {
            scratch,
            view,
            width,
        }
    }

    pub(super) fn view(&self) -> PanelView {
        self.view
    }
}

/// Packs one panel at a time of a B whose columns are rows in memory.
pub(super) struct Packer {
    compute: Compute,
    values: usize,
    columns: usize,
    width: usize,
    /// Distance between lines.
    stride: usize,
    /// Columns that are copied before they are turned.
    lines: Scratch,
    /// A column of f32, of which the line takes pairs.
    whole: Scratch,
}

impl Packer {
    /// Columns that are turned together.
    const TURNED: usize = 16;

    pub(super) fn new(compute: Compute, values: usize, columns: usize) -> Self {
        // An odd number of cache lines, so that lines fall on different sets.
        let stride = (words(compute, values).div_ceil(16) | 1) * 16;
        Self {
            compute,
            values,
            columns,
            width: panel_width(),
            stride,
            lines: Scratch::new(Self::TURNED * stride),
            whole: Scratch::new(size_of_pairs(compute, values)),
        }
    }

    /// Writes panel `panel`, `[depth, width]`; `column(j, values)` writes column `j` of B.
    #[inline(always)]
    pub(super) fn pack(
        &mut self,
        panel: usize,
        column: impl Fn(usize, &mut [f32]),
        place: &mut [f32],
    ) {
        let (width, stride) = (self.width, self.stride);
        let depth = words(self.compute, self.values);
        let (lines, whole) = (self.lines.values(), self.whole.values());
        for first in (0..width).step_by(Self::TURNED) {
            let turned = Self::TURNED.min(width - first);
            let places = lines.chunks_exact_mut(stride).take(turned);
            for (index, line) in places.enumerate() {
                let j = panel * width + first + index;
                let line = &mut line[..depth];
                match self.compute {
                    _ if j >= self.columns => line.fill(0.0),
                    Compute::F32 => column(j, line),
                    Compute::Bf16 => {
                        column(j, whole);
                        bf16::along(whole, line);
                    }
                }
            }
            let line = |index| &lines[index * stride..][..depth];
            turn(turned, depth, line, &mut place[first..], width);
        }
    }
}

/// A view of panels stored elsewhere.
#[derive(Clone, Copy)]
pub(super) struct PanelView {
    pub(super) start: *const f32,
    /// Rows of words.
    pub(super) depth: usize,
    /// Rows of B: as many, or about twice as many where a word is a pair.
    pub(super) values: usize,
    pub(super) columns: usize,
    /// Type of the product.
    pub(super) compute: Compute,
}

// SAFETY: panels are only read through a view.
unsafe impl Send for PanelView {}
// SAFETY: as above.
unsafe impl Sync for PanelView {}

/// Panels of a matrix whose rows are `row(p)`. Columns beyond the last are left as they are; no
/// result depends on them.
#[inline(always)]
pub(super) fn pack_rows<'a, S: Simd>(
    _: S,
    compute: Compute,
    values: usize,
    columns: usize,
    row: impl Fn(usize) -> &'a [f32],
    panels: &mut [f32],
) -> PanelView {
    let width = 2 * S::F32_LANES;
    let depth = words(compute, values);
    for p in 0..depth {
        for first in (0..columns).step_by(width) {
            let part = first..columns.min(first + width);
            let place = &mut panels[first * depth + p * width..][..part.len()];
            match compute {
                Compute::F32 => copy(&row(p)[part], place),
                Compute::Bf16 => {
                    let second = (2 * p + 1 < values).then(|| &row(2 * p + 1)[part.clone()]);
                    bf16::across(&row(2 * p)[part], second, place);
                }
            }
        }
    }
    PanelView {
        start: panels.as_ptr(),
        depth,
        values,
        columns,
        compute,
    }
}

/// Panels of a matrix whose columns are `column(j)`. `panels` has room for the last one whole, in
/// which columns beyond the last are left as they are.
#[inline(always)]
pub(super) fn pack_columns<'a, S: Simd>(
    _: S,
    compute: Compute,
    values: usize,
    columns: usize,
    column: impl Fn(usize) -> &'a [f32],
    panels: &mut [f32],
) -> PanelView {
    let width = 2 * S::F32_LANES;
    let depth = words(compute, values);
    let mut lines = [[0.0; NEAR]; 32];
    for first in (0..columns).step_by(width) {
        let wide = width.min(columns - first);
        let place = &mut panels[first * depth..][..width * depth];
        match compute {
            Compute::F32 => turn(wide, depth, |j| column(first + j), place, width),
            Compute::Bf16 => {
                for from in (0..depth).step_by(NEAR) {
                    let deep = NEAR.min(depth - from);
                    let part = 2 * from..values.min(2 * (from + deep));
                    for (j, line) in lines[..wide].iter_mut().enumerate() {
                        bf16::along(&column(first + j)[part.clone()], line);
                    }
                    let place = &mut place[from * width..];
                    turn(wide, deep, |j| &lines[j], place, width);
                }
            }
        }
    }
    PanelView {
        start: panels.as_ptr(),
        depth,
        values,
        columns,
        compute,
    }
}

/// Values that panels of `depth` x `columns` take, for any width up to 32.
pub(super) fn room(depth: usize, columns: usize) -> usize {
    depth * columns.next_multiple_of(32)
}
