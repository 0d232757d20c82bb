//! Matrix products with sums of f32.
//!
//! `C = start + A B` in the manner of Goto and van de Geijn ("Anatomy of High-Performance Matrix
//! Multiplication", ACM TOMS 34, 2008): B is packed into panels two vectors wide, blocks of A are
//! copied into a scratch, and a tile of C that fills the registers is summed over the depth of a
//! block.
//!
//! It is our own code because the operators around a product in a transformer then cost nothing
//! extra: the activation is computed as A is copied, low-rank updates are merged as B is packed,
//! and sums start at the bias. A product alone is about as fast as that of the crate `gemm`
//! (`cargo bench --bench parts product` compares them). Two decisions keep it short: blocks of A
//! keep their order in memory, with a row distance known at compile time, so nothing is transposed;
//! and `A^T B` is the same tile reading the same scratch with rows and columns exchanged.
//!
//! In a product of bf16 every word of 32 bits holds a pair of values that meet in the sum
//! ([`bf16`]): to a tile it is a product of half the depth, with another step.

use std::marker::PhantomData;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::bf16;
use super::memory::{Out, Scratch};
use super::panels::PanelView;
use super::simd::prefetch;
use super::threads;
use crate::backend::Compute;

/// Depth of a block, in values, an even number: its slice of a panel and a tile's slice of A stay
/// in the first-level cache.
pub(super) const DEPTH: usize = 256;
/// Row distance in the scratch: a cache line more than the depth, so that rows fall on different
/// cache sets.
pub(super) const STRIDE: usize = DEPTH + 16;
/// Rows of C in a block; a multiple of every tile's height.
pub(super) const BLOCK: usize = 168;
/// Rows of the highest tile.
const HIGHEST: usize = 14;
/// Values of a packed slice of B that fit the second-level cache.
const NEAR: usize = 1 << 17;

/// What the sums start at.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    Zero,
    /// The same row, as wide as C, for every row of C.
    Row(&'a [f32]),
    /// The values of C.
    Sum,
}

/// Height of the largest tile. At two vectors a row it takes 28 of 32 registers (AVX-512), 12 of 16
/// (AVX2), 24 of 32 (NEON); the rest hold operands.
#[inline(always)]
const fn highest<S: Simd>() -> usize {
    match S::F32_LANES {
        16 => HIGHEST,
        8 => 6,
        4 => 12,
        _ => 4,
    }
}

/// C, or a part of it, as an output.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) out: Out,
    /// Distance between rows.
    pub(super) stride: usize,
}

/// `C = start + A B` for the given rows of C.
///
/// `fill(rows, depths, scratch)` writes a block of A: `scratch[i STRIDE + p]` for its row `i` and
/// column `p`, or, if `TURNED`, `scratch[p STRIDE + i]`. `finish(rows)` is called once these rows
/// of C are complete and still in the cache.
struct Multiply<'a, F, G, const TURNED: bool> {
    rows: Range<usize>,
    panels: PanelView,
    target: Target,
    start: Start<'a>,
    fill: F,
    finish: G,
}

impl<'a, F, G, const TURNED: bool> Multiply<'a, F, G, TURNED>
where
    F: Fn(Range<usize>, Range<usize>, &mut [f32]),
    G: Fn(Range<usize>),
{
    fn new(
        rows: Range<usize>,
        panels: PanelView,
        target: Target,
        start: Start<'a>,
        fill: F,
        finish: G,
    ) -> Self {
        Self {
            rows,
            panels,
            target,
            start,
            fill,
            finish,
        }
    }
}

impl<F, G, const TURNED: bool> WithSimd for Multiply<'_, F, G, TURNED>
where
    F: Fn(Range<usize>, Range<usize>, &mut [f32]),
    G: Fn(Range<usize>),
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let size = if TURNED { DEPTH } else { BLOCK } * STRIDE;
        let compute = self.panels.compute;
        let (mut scratch, mut pairs) = (
            Scratch::new(size),
            Scratch::new(size_of_pairs(compute, size)),
        );
        let (scratch, pairs) = (scratch.values(), pairs.values());
        let (depth, columns) = (self.panels.values, self.panels.columns);
        let mut first = self.rows.start;
        while first < self.rows.end {
            let rows = BLOCK.min(self.rows.end - first);
            let mut from = 0;
            // A product of depth 0 still writes its start values.
            while from < depth.max(1) {
                let deep = DEPTH.min(depth - from);
                (self.fill)(first..first + rows, from..from + deep, scratch);
                let start = if from == 0 { self.start } else { Start::Sum };
                let scratch = block_of::<TURNED>(compute, rows, deep, scratch, pairs);
                // SAFETY: the scratch is filled as far as it is read, the panels hold `depth` rows,
                // and only this task writes these rows of the target.
                unsafe {
                    let c = self.target.out.pointer().add(first * self.target.stride);
                    Block::<TURNED> {
                        rows,
                        deep: words(compute, deep),
                        scratch: scratch.as_ptr(),
                        panels: self.panels,
                        from: words(compute, from),
                        columns: 0..columns,
                        c,
                        stride: self.target.stride,
                        start,
                        ahead: None,
                    }
                    .multiply(simd);
                }
                from += DEPTH;
            }
            (self.finish)(first..first + rows);
            first += rows;
        }
    }
}

/// Words that hold `values` values one after the other in a sum.
#[inline(always)]
pub(super) const fn words(compute: Compute, values: usize) -> usize {
    match compute {
        Compute::F32 => values,
        Compute::Bf16 => values.div_ceil(2),
    }
}

/// Size of the scratch into which [`block_of`] may copy one of `size`.
pub(super) const fn size_of_pairs(compute: Compute, size: usize) -> usize {
    match compute {
        Compute::F32 => 0,
        Compute::Bf16 => size,
    }
}

/// A block of A as tiles read it, from a scratch of f32: that itself, or its pairs, in `pairs`.
#[inline(always)]
pub(super) fn block_of<'a, const TURNED: bool>(
    compute: Compute,
    rows: usize,
    deep: usize,
    scratch: &'a [f32],
    pairs: &'a mut [f32],
) -> &'a [f32] {
    if compute == Compute::F32 {
        return scratch;
    }
    let places = pairs.chunks_exact_mut(STRIDE);
    if TURNED {
        let lines = scratch[..deep * STRIDE].chunks(2 * STRIDE);
        for (lines, place) in lines.zip(places) {
            let second = (lines.len() > STRIDE).then(|| &lines[STRIDE..][..rows]);
            bf16::across(&lines[..rows], second, &mut place[..rows]);
        }
    } else {
        for (line, place) in scratch.chunks_exact(STRIDE).zip(places).take(rows) {
            bf16::along(&line[..deep], place);
        }
    }
    pairs
}

/// The product of one block: a filled scratch times panels, added to C.
pub(super) struct Block<'a, const TURNED: bool> {
    /// Rows of the block.
    pub(super) rows: usize,
    /// Its depth, in words, at most [`DEPTH`].
    pub(super) deep: usize,
    /// The block of A, laid out as in [`Multiply`], in words of the panels' type ([`block_of`]).
    pub(super) scratch: *const f32,
    pub(super) panels: PanelView,
    /// The first row of words of B.
    pub(super) from: usize,
    pub(super) columns: Range<usize>,
    /// The first of `columns` in the block's first row of C.
    pub(super) c: *mut f32,
    /// Distance between the rows of C.
    pub(super) stride: usize,
    pub(super) start: Start<'a>,
    pub(super) ahead: Option<Ahead>,
}

/// Memory that a block asks for as it is summed, so that it is in the cache when it is needed.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// What the first step of the block's first sums asks for.
    pub(super) start: *const f32,
    /// Values from a step to the next.
    pub(super) step: usize,
}

/// Steps of the sums of a block of one panel, so many rows high and so many words deep; some more
/// where its last tiles are low.
pub(super) fn steps<S: Simd>(rows: usize, deep: usize) -> usize {
    rows.div_ceil(highest::<S>()) * deep
}

impl<const TURNED: bool> Block<'_, TURNED> {
    /// Computes the block. One function for all callers, because tiles are a lot of code.
    ///
    /// # Safety
    ///
    /// The scratch holds `rows` x `deep` words, the panels hold rows `from .. from + deep`, and
    /// `c` points at `rows` rows that are not aliased.
    #[inline(always)]
    pub(super) unsafe fn multiply<S: Simd>(self, simd: S) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            match self.panels.compute {
                Compute::F32 => simd.vectorize(Tiles::<Single, TURNED>::of(self)),
                Compute::Bf16 => {
                    #[cfg(target_arch = "x86_64")]
                    if S::F32_LANES == 16
                        && let Some(simd) = bf16::native::vectors()
                    {
                        return bf16::native::multiply(simd, self);
                    }
                    simd.vectorize(Tiles::<bf16::Pairs, TURNED>::of(self));
                }
            }
        }
    }
}

/// How a word of A meets a row of words of B.
pub(super) trait Step: Copy {
    /// `sum` and the products of `x`, the same word many times, with each word of `row`.
    fn add<S: Simd>(simd: S, x: S::f32s, row: S::f32s, sum: S::f32s) -> S::f32s;
}

/// Words are values of f32.
#[derive(Clone, Copy)]
pub(super) struct Single;

impl Step for Single {
    #[inline(always)]
    fn add<S: Simd>(simd: S, x: S::f32s, row: S::f32s, sum: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(x, row, sum)
    }
}

/// A block whose tiles take steps of this kind.
pub(super) struct Tiles<'a, K, const TURNED: bool>(Block<'a, TURNED>, PhantomData<K>);

impl<'a, K, const TURNED: bool> Tiles<'a, K, TURNED> {
    /// # Safety
    ///
    /// As for [`Block::multiply`].
    pub(super) unsafe fn of(block: Block<'a, TURNED>) -> Self {
        Self(block, PhantomData)
    }
}

impl<K: Step, const TURNED: bool> WithSimd for Tiles<'_, K, TURNED> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Block {
            rows,
            deep,
            scratch,
            panels,
            from,
            columns,
            c,
            stride,
            start,
            ahead,
        } = self.0;
        // Nothing to ask for is what the cache has anyway.
        let mut ahead = ahead.unwrap_or(Ahead {
            start: panels.start,
            step: 0,
        });
        let width = 2 * S::F32_LANES;
        let near = (NEAR / deep.max(1) / width).max(1) * width;
        let mut slice = columns.start;
        while slice < columns.end {
            let end = columns.end.min(slice + near);
            let mut row = 0;
            while row < rows {
                let high = height::<S>(rows - row);
                let mut column = slice;
                while column < end {
                    // SAFETY: guaranteed by the caller of `multiply`; panels are `width` wide and
                    // padded.
                    unsafe {
                        let a = scratch.add(if TURNED { row } else { row * STRIDE });
                        let b = panels.start.add(column * panels.depth + from * width);
                        let c = c.add(row * stride + column - columns.start);
                        let broad = width.min(columns.end - column);
                        tile_of::<S, K, TURNED>(
                            simd, high, broad, deep, a, b, c, stride, start, column, ahead,
                        );
                    }
                    ahead.start = ahead.start.wrapping_add(ahead.step * deep);
                    column += width;
                }
                row += high;
            }
            slice = end;
        }
    }
}

/// Height of the next tile when `left` rows remain. Tiles of equal height, because the few sums of
/// a short last tile would wait for one another.
#[inline(always)]
fn height<S: Simd>(left: usize) -> usize {
    let most = highest::<S>();
    let even = left
        .div_ceil(left.div_ceil(most))
        .next_multiple_of(2)
        .min(most);
    if even <= left {
        even
    } else if left > 1 {
        left / 2 * 2
    } else {
        1
    }
}

/// A tile, complete or cut off at the last column of C.
///
/// # Safety
///
/// As for [`tile`], but only `broad` columns of C need exist.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the sizes of three matrices")]
unsafe fn tile_of<S: Simd, K: Step, const TURNED: bool>(
    simd: S,
    high: usize,
    broad: usize,
    deep: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    stride: usize,
    start: Start<'_>,
    column: usize,
    ahead: Ahead,
) {
    let lanes = S::F32_LANES;
    let begin = match start {
        Start::Zero => Begin::Zero,
        // SAFETY: the row is as long as C is wide.
        Start::Row(row) => Begin::Row(unsafe { row.as_ptr().add(column) }),
        Start::Sum => Begin::Sum,
    };
    macro_rules! tiles {
        ($vectors:literal, $c:expr, $stride:expr, $begin:expr) => {
            match high {
                14 => {
                    tile::<S, K, 14, $vectors, TURNED>(simd, deep, a, b, $c, $stride, $begin, ahead)
                }
                12 => {
                    tile::<S, K, 12, $vectors, TURNED>(simd, deep, a, b, $c, $stride, $begin, ahead)
                }
                10 => {
                    tile::<S, K, 10, $vectors, TURNED>(simd, deep, a, b, $c, $stride, $begin, ahead)
                }
                8 => {
                    tile::<S, K, 8, $vectors, TURNED>(simd, deep, a, b, $c, $stride, $begin, ahead)
                }
                6 => {
                    tile::<S, K, 6, $vectors, TURNED>(simd, deep, a, b, $c, $stride, $begin, ahead)
                }
                4 => {
                    tile::<S, K, 4, $vectors, TURNED>(simd, deep, a, b, $c, $stride, $begin, ahead)
                }
                2 => {
                    tile::<S, K, 2, $vectors, TURNED>(simd, deep, a, b, $c, $stride, $begin, ahead)
                }
                _ => {
                    tile::<S, K, 1, $vectors, TURNED>(simd, deep, a, b, $c, $stride, $begin, ahead)
                }
            }
        };
    }
    // SAFETY: guaranteed by the caller; a cut-off tile is first summed in a buffer of its own.
    unsafe {
        if broad == 2 * lanes {
            tiles!(2, c, stride, begin);
        } else if broad == lanes {
            tiles!(1, c, stride, begin);
        } else {
            let mut place = [0.0f32; HIGHEST * 32];
            if broad < lanes {
                tiles!(1, place.as_mut_ptr(), 32, Begin::Zero);
            } else {
                tiles!(2, place.as_mut_ptr(), 32, Begin::Zero);
            }
            for row in 0..high {
                for j in 0..broad {
                    let c = c.add(row * stride + j);
                    let before = match begin {
                        Begin::Zero => 0.0,
                        Begin::Row(row) => *row.add(j),
                        Begin::Sum => *c,
                    };
                    *c = before + place[row * 32 + j];
                }
            }
        }
    }
}

/// [`Start`] of one tile.
#[derive(Clone, Copy)]
enum Begin {
    Zero,
    Row(*const f32),
    Sum,
}

/// `HIGH` rows of C, `VECTORS` vectors wide, summed in registers.
///
/// # Safety
///
/// `a` points at `HIGH` x `deep` words of the scratch, `b` at `deep` rows of a panel, `c` at
/// `HIGH` rows.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the sizes of three matrices")]
unsafe fn tile<S: Simd, K: Step, const HIGH: usize, const VECTORS: usize, const TURNED: bool>(
    simd: S,
    deep: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    stride: usize,
    begin: Begin,
    mut ahead: Ahead,
) {
    let lanes = S::F32_LANES;
    let (row, depth) = if TURNED { (1, STRIDE) } else { (STRIDE, 1) };
    // SAFETY: guaranteed by the caller, for every pointer below.
    unsafe {
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; HIGH];
        match begin {
            Begin::Zero => {}
            Begin::Row(values) => {
                for sums in &mut sums {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        *sum = values.add(v * lanes).cast::<S::f32s>().read_unaligned();
                    }
                }
            }
            Begin::Sum => {
                for (i, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        let values = c.add(i * stride + v * lanes);
                        *sum = values.cast::<S::f32s>().read_unaligned();
                    }
                }
            }
        }
        let (mut a, mut b) = (a, b);
        for _ in 0..deep {
            prefetch(ahead.start);
            ahead.start = ahead.start.wrapping_add(ahead.step);
            let mut row_of_b = [simd.splat_f32s(0.0); VECTORS];
            for (v, values) in row_of_b.iter_mut().enumerate() {
                *values = b.add(v * lanes).cast::<S::f32s>().read_unaligned();
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = simd.splat_f32s(*a.add(i * row));
                for (sum, values) in sums.iter_mut().zip(row_of_b) {
                    *sum = K::add(simd, x, values, *sum);
                }
            }
            a = a.add(depth);
            b = b.add(2 * lanes);
        }
        for (i, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let values = c.add(i * stride + v * lanes);
                values.cast::<S::f32s>().write_unaligned(*sum);
            }
        }
    }
}

/// The multiple of rows by which a product with `weights` weights is divided among cores. Each part
/// reads all weights. With many weights and few rows, parts are therefore as large as a block, of
/// equal size, and as many for each core.
fn unit_of(rows: usize, weights: usize) -> usize {
    let threads = threads::count();
    let blocks = rows.div_ceil(BLOCK).next_multiple_of(threads);
    if weights < NEAR || blocks > threads::PARTS * threads {
        return HIGHEST;
    }
    rows.div_ceil(blocks.max(1)).next_multiple_of(2)
}

/// `C = start + A B` over all cores; `fill` and `finish` are called as in [`Multiply`].
///
/// # Safety
///
/// The target has `rows` rows, not aliased, each with as many columns as the panels. `fill` writes
/// the whole block it is asked for.
pub(super) unsafe fn multiply<const TURNED: bool>(
    rows: usize,
    panels: PanelView,
    target: Target,
    start: Start<'_>,
    fill: impl Fn(Range<usize>, Range<usize>, &mut [f32]) + Sync,
    finish: impl Fn(Range<usize>) + Sync,
) {
    let cost = rows * panels.values * panels.columns / 8;
    threads::over(
        rows,
        unit_of(rows, panels.values * panels.columns),
        cost,
        |rows| {
            // Not `&fill`: calling through a reference goes through a function compiled for the
            // baseline instruction set.
            Arch::new().dispatch(Multiply::<_, _, TURNED>::new(
                rows,
                panels,
                target,
                start,
                #[inline(always)]
                |rows: Range<usize>, depths: Range<usize>, scratch: &mut [f32]| {
                    fill(rows, depths, scratch);
                },
                #[inline(always)]
                |rows: Range<usize>| finish(rows),
            ));
        },
    );
}
