//! Self-attention on the fused projection, written back in its layout: nothing is permuted.
//!
//! One head of one sample is a task. A block of queries meets all keys at once, so its scores are
//! whole rows and the softmax needs no running maximum. The scratch of a task grows with block size
//! times tokens, not with tokens squared. The backward pass recomputes the scores: only the
//! projection, which the graph holds anyway, is kept.

use burn::tensor::Tensor;
use burn_ndarray::NdArray;
use pulp::{Arch, Simd, WithSimd};

use super::memory::{Out, Rows, Scratch, tensor};
use super::panels::{PanelView, pack_columns, pack_rows, room};
use super::product::{Block, DEPTH, STRIDE, Start, block_of, size_of_pairs, words};
use super::simd::{LINE, dot, exp, fold, update, write};
use super::threads;
use crate::backend::Compute;

/// Most queries of a block.
const QUERIES: usize = 84;
/// Most queries of a block when rows of scores are long (more than 2 [`DEPTH`] tokens).
const QUERIES_OF_LONG: usize = 42;

/// Sizes of an attention operator.
#[derive(Clone, Copy)]
struct Sizes {
    tokens: usize,
    heads: usize,
    /// Head dimension.
    dim: usize,
    /// Type of the products; the softmax between them is of f32.
    compute: Compute,
}

impl Sizes {
    fn of(qkv: &Rows, heads: usize, tokens: usize, compute: Compute) -> Self {
        let dim = qkv.width / 3 / heads;
        Self {
            tokens,
            heads,
            dim,
            compute,
        }
    }

    fn queries(self) -> usize {
        let most = if self.tokens <= 2 * DEPTH {
            QUERIES
        } else {
            QUERIES_OF_LONG
        };
        // Blocks of equal size, instead of full ones and a short last one.
        self.tokens.div_ceil(self.tokens.div_ceil(most))
    }

    /// Number of key groups, of at most [`DEPTH`] keys each.
    fn groups(self) -> usize {
        self.tokens.div_ceil(DEPTH)
    }

    /// Size of a block's scores, `[groups][queries][STRIDE]`.
    fn scores(self) -> usize {
        self.groups() * self.queries() * STRIDE
    }

    fn task(self, index: usize) -> Task {
        Task {
            sizes: self,
            sample: index / self.heads,
            head: index % self.heads,
        }
    }

    /// Basic operations of `tasks` heads, with `products` matrix products each.
    fn cost(self, tasks: usize, products: usize) -> usize {
        tasks * self.tokens * self.tokens * (products * self.dim / 8 + 16)
    }
}

/// One head of one sample.
#[derive(Clone, Copy)]
struct Task {
    sizes: Sizes,
    sample: usize,
    head: usize,
}

impl Task {
    /// Row `token` of the queries (0), keys (1) or values (2).
    #[inline(always)]
    fn row<'a>(&self, qkv: &'a Rows, part: usize, token: usize) -> &'a [f32] {
        let Sizes {
            tokens, heads, dim, ..
        } = self.sizes;
        let row = qkv.row(self.sample * tokens + token);
        &row[(part * heads + self.head) * dim..][..dim]
    }
}

/// `scores[group][query][key] = row(query) . panels`, for the queries of a block.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the sizes of three matrices")]
fn dot_all<'a, S: Simd>(
    simd: S,
    queries: usize,
    row: impl Fn(usize) -> &'a [f32],
    factor: f32,
    panels: PanelView,
    block: &mut [f32],
    pairs: &mut [f32],
    scores: &mut [f32],
    most: usize,
) {
    let compute = panels.compute;
    for from in (0..panels.values).step_by(DEPTH) {
        let deep = DEPTH.min(panels.values - from);
        for (query, place) in block.chunks_exact_mut(STRIDE).take(queries).enumerate() {
            write(
                &mut place[..deep],
                [&row(query)[from..from + deep]],
                #[inline(always)]
                |[value]| factor * value,
            );
        }
        let block = block_of::<false>(compute, queries, deep, block, pairs);
        for (group, scores) in scores.chunks_exact_mut(most * STRIDE).enumerate() {
            let keys = group * DEPTH..panels.columns.min((group + 1) * DEPTH);
            let start = if from == 0 { Start::Zero } else { Start::Sum };
            // SAFETY: the block was filled, and a group's scores are `most` >= `queries` rows.
            unsafe {
                Block::<false> {
                    rows: queries,
                    deep: words(compute, deep),
                    scratch: block.as_ptr(),
                    panels,
                    from: words(compute, from),
                    columns: keys,
                    c: scores.as_mut_ptr(),
                    stride: STRIDE,
                    start,
                    ahead: None,
                }
                .multiply(simd);
            }
        }
    }
}

/// `out = scores panels`, for the queries of a block.
///
/// # Safety
///
/// `out` points at `queries` rows, `stride` apart, each with as many columns as the panels.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the sizes of three matrices")]
unsafe fn mix<S: Simd>(
    simd: S,
    queries: usize,
    scores: &[f32],
    pairs: &mut [f32],
    panels: PanelView,
    most: usize,
    out: *mut f32,
    stride: usize,
) {
    let compute = panels.compute;
    for (group, scores) in scores.chunks_exact(most * STRIDE).enumerate() {
        let from = group * DEPTH;
        let deep = DEPTH.min(panels.values - from);
        let scores = block_of::<false>(compute, queries, deep, scores, pairs);
        let start = if group == 0 { Start::Zero } else { Start::Sum };
        // SAFETY: a group's scores are `most` >= `queries` rows; the caller guarantees the rest.
        unsafe {
            Block::<false> {
                rows: queries,
                deep: words(compute, deep),
                scratch: scores.as_ptr(),
                panels,
                from: words(compute, from),
                columns: 0..panels.columns,
                c: out,
                stride,
                start,
                ahead: None,
            }
            .multiply(simd);
        }
    }
}

/// `out += scores^T panels`: the contribution of a block of queries to the keys of all groups.
///
/// # Safety
///
/// `out` points at one row per key, `stride` apart, each with as many columns as the panels.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the sizes of three matrices")]
unsafe fn mix_turned<S: Simd>(
    simd: S,
    tokens: usize,
    scores: &[f32],
    pairs: &mut [f32],
    panels: PanelView,
    most: usize,
    out: *mut f32,
    stride: usize,
    start: Start<'_>,
) {
    let compute = panels.compute;
    for (group, scores) in scores.chunks_exact(most * STRIDE).enumerate() {
        let first = group * DEPTH;
        let keys = DEPTH.min(tokens - first);
        let scores = block_of::<true>(compute, keys, panels.values, scores, pairs);
        // SAFETY: a group's scores are panels.values rows of `keys` columns; the caller guarantees
        // the rest.
        unsafe {
            Block::<true> {
                rows: keys,
                deep: panels.depth,
                scratch: scores.as_ptr(),
                panels,
                from: 0,
                columns: 0..panels.columns,
                c: out.add(first * stride),
                stride,
                start,
                ahead: None,
            }
            .multiply(simd);
        }
    }
}

/// The parts of a row of scores, one for each group: start and length.
#[inline(always)]
fn parts(query: usize, most: usize, tokens: usize) -> impl Iterator<Item = (usize, usize)> + Clone {
    (0..tokens.div_ceil(DEPTH)).map(move |group| {
        let start = (group * most + query) * STRIDE;
        (start, DEPTH.min(tokens - group * DEPTH))
    })
}

/// The softmax of a block's scores.
///
/// Rows are processed in whole lines of sixteen, because short rows would otherwise be done value
/// by value. Columns beyond the last key are never read by a product.
#[inline(always)]
fn softmax(queries: usize, most: usize, tokens: usize, scores: &mut [f32]) {
    for query in 0..queries {
        let parts = parts(query, most, tokens);
        let mut highest = [f32::MIN; LINE];
        for (start, length) in parts.clone() {
            let padded = length.next_multiple_of(LINE);
            scores[start + length..start + padded].fill(f32::MIN);
            for line in scores[start..start + padded].as_chunks::<LINE>().0 {
                for (highest, score) in highest.iter_mut().zip(line) {
                    *highest = if *score > *highest { *score } else { *highest };
                }
            }
        }
        let highest = fold(highest, |a, b| if b > a { b } else { a });
        let mut total = [0.0f32; LINE];
        for (start, length) in parts.clone() {
            let padded = length.next_multiple_of(LINE);
            for line in scores[start..start + padded].as_chunks_mut::<LINE>().0 {
                for (score, total) in line.iter_mut().zip(&mut total) {
                    *score = exp(*score - highest);
                    *total += *score;
                }
            }
        }
        let inverse = 1.0 / fold(total, |a, b| a + b);
        for (start, length) in parts {
            let padded = length.next_multiple_of(LINE);
            for line in scores[start..start + padded].as_chunks_mut::<LINE>().0 {
                for score in line {
                    *score *= inverse;
                }
            }
        }
    }
}

struct Forward<'a> {
    qkv: &'a Rows,
    sizes: Sizes,
    tasks: std::ops::Range<usize>,
    out: Out,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { qkv, sizes, .. } = self;
        let Sizes {
            tokens,
            heads,
            dim,
            compute,
        } = sizes;
        let most = sizes.queries();
        let width = heads * dim;
        let mut pairs = Scratch::new(size_of_pairs(compute, most * STRIDE));
        let pairs = pairs.values();
        let mut keys = Scratch::new(room(dim, tokens));
        let mut values = Scratch::new(room(tokens, dim));
        let mut block = Scratch::new(most * STRIDE);
        let mut scores = Scratch::new(sizes.scores());
        let scores = scores.values();
        let factor = 1.0 / (dim as f32).sqrt();
        for index in self.tasks {
            let task = sizes.task(index);
            let key = |j| task.row(qkv, 1, j);
            let keys = pack_columns(simd, compute, dim, tokens, key, keys.values());
            let value = |p| task.row(qkv, 2, p);
            let values = pack_rows(simd, compute, tokens, dim, value, values.values());
            for first in (0..tokens).step_by(most) {
                let queries = most.min(tokens - first);
                let row = |query| task.row(qkv, 0, first + query);
                dot_all(
                    simd,
                    queries,
                    row,
                    factor,
                    keys,
                    block.values(),
                    pairs,
                    scores,
                    most,
                );
                softmax(queries, most, tokens, scores);
                let start = (task.sample * tokens + first) * width + task.head * dim;
                // SAFETY: only this task writes these rows of this head.
                unsafe {
                    let out = self.out.pointer().add(start);
                    mix(simd, queries, scores, pairs, values, most, out, width);
                }
            }
        }
    }
}

/// See [`FusedOps::qkv_attention`](crate::ops::FusedOps::qkv_attention).
pub(super) fn forward(
    qkv: &Rows,
    heads: usize,
    [batch, tokens]: [usize; 2],
    compute: Compute,
) -> Tensor<NdArray, 3> {
    let sizes = Sizes::of(qkv, heads, tokens, compute);
    let tasks = batch * heads;
    // SAFETY: each task writes its head of its sample; together the tasks write everything.
    unsafe {
        tensor([batch, tokens, heads * sizes.dim], |out| {
            threads::over(tasks, 1, sizes.cost(tasks, 2), |tasks| {
                Arch::new().dispatch(Forward {
                    qkv,
                    sizes,
                    tasks,
                    out,
                });
            });
        })
    }
}

struct Backward<'a> {
    gradient: &'a Rows,
    qkv: &'a Rows,
    sizes: Sizes,
    tasks: std::ops::Range<usize>,
    out: Out,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            gradient,
            qkv,
            sizes,
            ..
        } = self;
        let Sizes {
            tokens,
            heads,
            dim,
            compute,
        } = sizes;
        let most = sizes.queries();
        let width = heads * dim;
        let mut pairs = Scratch::new(size_of_pairs(compute, most * STRIDE));
        let pairs = pairs.values();
        let mut keys = Scratch::new(room(dim, tokens));
        let mut values = Scratch::new(room(dim, tokens));
        let mut key_rows = Scratch::new(room(tokens, dim));
        let mut some_gradients = Scratch::new(room(most, dim));
        let mut some_queries = Scratch::new(room(most, dim));
        let mut block = Scratch::new(most * STRIDE);
        let block = block.values();
        let (mut scores, mut changes) =
            (Scratch::new(sizes.scores()), Scratch::new(sizes.scores()));
        let (scores, changes) = (scores.values(), changes.values());
        let factor = 1.0 / (dim as f32).sqrt();
        for index in self.tasks {
            let task = sizes.task(index);
            let part = |part: usize, token: usize| {
                (task.sample * tokens + token) * 3 * width + (part * heads + task.head) * dim
            };
            let key = |j| task.row(qkv, 1, j);
            let keys = pack_columns(simd, compute, dim, tokens, key, keys.values());
            let value = |j| task.row(qkv, 2, j);
            let values = pack_columns(simd, compute, dim, tokens, value, values.values());
            let key_rows = pack_rows(simd, compute, tokens, dim, key, key_rows.values());
            for first in (0..tokens).step_by(most) {
                let queries = most.min(tokens - first);
                let query = |query| task.row(qkv, 0, first + query);
                let gradient = |query: usize| {
                    &gradient.row(task.sample * tokens + first + query)[task.head * dim..][..dim]
                };
                // P = softmax(s Q K^T), dP = dO V^T
                dot_all(
                    simd, queries, query, factor, keys, block, pairs, scores, most,
                );
                softmax(queries, most, tokens, scores);
                dot_all(
                    simd, queries, gradient, 1.0, values, block, pairs, changes, most,
                );
                let some_gradients = some_gradients.values();
                let some_gradients =
                    pack_rows(simd, compute, queries, dim, gradient, some_gradients);
                let some_queries = some_queries.values();
                let some_queries = pack_rows(simd, compute, queries, dim, query, some_queries);
                let start = if first == 0 { Start::Zero } else { Start::Sum };
                // SAFETY: only this task writes these parts of this sample's rows.
                unsafe {
                    let out = self.out.pointer();
                    // dV = P^T dO
                    let dv = out.add(part(2, 0));
                    mix_turned(
                        simd,
                        tokens,
                        scores,
                        pairs,
                        some_gradients,
                        most,
                        dv,
                        3 * width,
                        start,
                    );
                    // dS = s P (dP - sum P dP)
                    for query in 0..queries {
                        let parts = parts(query, most, tokens);
                        let mut mean = 0.0;
                        for (start, length) in parts.clone() {
                            mean += dot(&scores[start..][..length], &changes[start..][..length]);
                        }
                        for (start, length) in parts {
                            update(
                                &mut changes[start..][..length],
                                [&scores[start..][..length]],
                                #[inline(always)]
                                |change, [share]| factor * share * (change - mean),
                            );
                        }
                    }
                    // dQ = dS K, dK = dS^T Q
                    mix(
                        simd,
                        queries,
                        changes,
                        pairs,
                        key_rows,
                        most,
                        out.add(part(0, first)),
                        3 * width,
                    );
                    let dk = out.add(part(1, 0));
                    mix_turned(
                        simd,
                        tokens,
                        changes,
                        pairs,
                        some_queries,
                        most,
                        dk,
                        3 * width,
                        start,
                    );
                }
            }
        }
    }
}

/// See [`FusedOps::qkv_attention_backward`](crate::ops::FusedOps::qkv_attention_backward).
pub(super) fn backward(
    gradient: &Rows,
    qkv: &Rows,
    heads: usize,
    [batch, tokens]: [usize; 2],
    compute: Compute,
) -> Tensor<NdArray, 3> {
    let sizes = Sizes::of(qkv, heads, tokens, compute);
    let tasks = batch * heads;
    // SAFETY: each task writes its head's three parts of its sample's rows; together the tasks
    // write everything.
    unsafe {
        tensor([batch, tokens, qkv.width], |out| {
            threads::over(tasks, 1, sizes.cost(tasks, 5), |tasks| {
                Arch::new().dispatch(Backward {
                    gradient,
                    qkv,
                    sizes,
                    tasks,
                    out,
                });
            });
        })
    }
}
