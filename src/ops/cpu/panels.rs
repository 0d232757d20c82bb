//! The second factor of a product, packed in the order in which tiles read it.

use pulp::{Arch, Simd, WithSimd};

use super::memory::{Out, Scratch};
use super::simd::{copy, vectorised};
use super::threads;

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
/// column.
pub(super) struct Panels {
    scratch: Scratch,
    depth: usize,
    columns: usize,
    width: usize,
}

impl Panels {
    /// Packs B by rows: `row(p, values)` writes row `p` of B.
    pub(super) fn of_rows(
        depth: usize,
        columns: usize,
        row: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let mut panels = Self::empty(depth, columns);
        let (width, out) = (panels.width, Out::of(panels.scratch.values()));
        threads::over(depth, 1, 4 * depth * columns, |rows| {
            let mut line = Scratch::new(columns.next_multiple_of(width));
            let line = line.values();
            line[columns..].fill(0.0);
            vectorised(
                #[inline(always)]
                || {
                    for p in rows.clone() {
                        row(p, &mut line[..columns]);
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
        depth: usize,
        columns: usize,
        column: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        /// Number of columns transposed at a time.
        const TURNED: usize = 16;
        let mut panels = Self::empty(depth, columns);
        let (width, out) = (panels.width, Out::of(panels.scratch.values()));
        threads::over(columns.div_ceil(width), 1, 8 * depth * columns, |range| {
            let mut lines = Scratch::new(TURNED * depth);
            let lines = lines.values();
            vectorised(
                #[inline(always)]
                || {
                    for panel in range.clone() {
                        // SAFETY: only this thread writes this panel.
                        let target = unsafe { out.part(panel * depth * width, depth * width) };
                        for first in (0..width).step_by(TURNED) {
                            let turned = TURNED.min(width - first);
                            for (index, line) in
                                lines.chunks_exact_mut(depth).take(turned).enumerate()
                            {
                                let j = panel * width + first + index;
                                if j < columns {
                                    column(j, line);
                                } else {
                                    line.fill(0.0);
                                }
                            }
                            for p in 0..depth {
                                let place = &mut target[p * width + first..][..turned];
                                for (index, value) in place.iter_mut().enumerate() {
                                    *value = lines[index * depth + p];
                                }
                            }
                        }
                    }
                },
            );
        });
        panels
    }

    fn empty(depth: usize, columns: usize) -> Self {
        let width = panel_width();
        Self {
            scratch: Scratch::new(columns.next_multiple_of(width) * depth),
            depth,
            columns,
            width,
        }
    }

    pub(super) fn view(&self) -> PanelView {
        PanelView {
            start: self.scratch.pointer(),
            depth: self.depth,
            columns: self.columns,
        }
    }
}

/// A view of panels stored elsewhere.
#[derive(Clone, Copy)]
pub(super) struct PanelView {
    pub(super) start: *const f32,
    pub(super) depth: usize,
    pub(super) columns: usize,
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
    depth: usize,
    columns: usize,
    row: impl Fn(usize) -> &'a [f32],
    panels: &mut [f32],
) -> PanelView {
    let width = 2 * S::F32_LANES;
    for p in 0..depth {
        let row = row(p);
        for first in (0..columns).step_by(width) {
            let values = &row[first..columns.min(first + width)];
            copy(values, &mut panels[first * depth + p * width..]);
        }
    }
    PanelView {
        start: panels.as_ptr(),
        depth,
        columns,
    }
}

/// Panels of a matrix whose columns are `column(j)`.
#[inline(always)]
pub(super) fn pack_columns<'a, S: Simd>(
    _: S,
    depth: usize,
    columns: usize,
    column: impl Fn(usize) -> &'a [f32],
    panels: &mut [f32],
) -> PanelView {
    let width = 2 * S::F32_LANES;
    for j in 0..columns {
        let first = j / width * width;
        let place = panels[first * depth + j - first..]
            .iter_mut()
            .step_by(width);
        for (place, value) in place.zip(column(j)) {
            *place = *value;
        }
    }
    PanelView {
        start: panels.as_ptr(),
        depth,
        columns,
    }
}

/// Values that panels of `depth` x `columns` take, for any width up to 32.
pub(super) fn room(depth: usize, columns: usize) -> usize {
    depth * columns.next_multiple_of(32)
}
