//! Precision and recall with distances in half precision; [`Distances::F16`](super::Distances::F16)
//! describes the arithmetic and its purpose.
//!
//! The names in `evaluator.py` are `_batch_pairwise_distances` for the distance and
//! `ManifoldEstimator` for the radii and the blocks. A half-precision value is held as the `f32` it
//! equals, and a half-precision operation is that of `f32`, rounded once more: `f32` has more than
//! twice the digits, so this is the correctly rounded result (Figueroa 1995, "When is double
//! rounding innocuous?").

use std::sync::{Mutex, PoisonError};

use half::f16;
use nalgebra::DMatrix;
use rayon::prelude::*;

use super::precision_recall::{
    BLOCK, Nearest, Radii, check_neighbours, coverage, each, locked, pairs,
};
use super::{EvaluationError, Features, PrecisionRecall};

/// Points per side of a block of one precision: `evaluator.py`'s `row_batch_size` and
/// `col_batch_size`.
const BATCH: usize = 10_000;

/// Distances with a bound below this are finite in half precision, whose largest number is 65 504:
/// nine per cent are left for the rounding of the operands, 2^-11 each time.
const SAFE: f32 = 60_000.0;

/// With squared lengths up to this, every distance and its intermediate results are finite in
/// `f32`: `|u - v|^2` is at most `2 (|u|^2 + |v|^2)`.
const LARGEST: f32 = f32::MAX / 8.0;

/// Points per side of the smallest piece of a matrix product. Its sums fill the 16 four-lane vector
/// registers that every 64-bit processor has, minus those for the operands.
const ROWS: usize = 4;
const COLUMNS: usize = 8;
/// Pieces of rows multiplied by one piece of columns while both are in the cache, some 0.5 MiB for
/// Inception.
const GROUP: usize = 16;

/// Distances in half precision where finite, in blocks of `batch` points a side.
pub(super) struct Half {
    batch: usize,
}

impl Default for Half {
    fn default() -> Self {
        Self { batch: BATCH }
    }
}

/// Activations with their squared lengths in both precisions.
struct Points<'a> {
    features: &'a Features,
    half_norms: Vec<f32>,
    norms: Vec<f32>,
}

impl<'a> Points<'a> {
    fn new(features: &'a Features) -> Result<Self, EvaluationError> {
        let rows = features.data().par_chunks(features.dim());
        let (half_norms, norms): (Vec<f32>, Vec<f32>) = rows
            .map(|row| {
                let squares = row.iter().map(|&value| rounded(rounded(value).powi(2)));
                let half = rounded(squares.sum());
                (half, row.iter().map(|value| value * value).sum::<f32>())
            })
            .unzip();
        if let Some(row) = norms.iter().position(|&norm| norm > LARGEST) {
            return Err(EvaluationError::Value {
                what: "features",
                problem: format!("row {row} is too large for distances in 32 bits"),
            });
        }
        Ok(Self {
            features,
            half_norms,
            norms,
        })
    }

    fn rows(&self) -> usize {
        self.norms.len()
    }

    fn norms(&self, half: bool) -> &[f32] {
        if half { &self.half_norms } else { &self.norms }
    }

    /// The `rows` rows from `first` on, in pieces of `W` rows, each stored column after column. The
    /// last piece is padded with zeros.
    fn pieces<const W: usize>(&self, first: usize, rows: usize, half: bool) -> Vec<[f32; W]> {
        let dim = self.features.dim();
        let data = &self.features.data()[first * dim..][..rows * dim];
        let mut pieces = vec![[0.0; W]; rows.div_ceil(W) * dim];
        for (piece, rows) in pieces.chunks_mut(dim).zip(data.chunks(W * dim)) {
            for (place, row) in rows.chunks(dim).enumerate() {
                for (values, &value) in piece.iter_mut().zip(row) {
                    values[place] = if half { rounded(value) } else { value };
                }
            }
        }
        pieces
    }
}

/// The blocks of two sets of points, and which of them are computed in half precision.
struct Blocks<'a> {
    of: &'a Half,
    first: &'a Points<'a>,
    second: &'a Points<'a>,
    /// For each pair of blocks, the second set's varying fastest.
    half: Vec<bool>,
}

impl Half {
    pub(super) fn precision_recall(
        &self,
        reference: &Features,
        samples: &Features,
        neighbours: usize,
    ) -> Result<PrecisionRecall, EvaluationError> {
        for side in [reference, samples] {
            check_neighbours(side, neighbours)?;
        }
        let (reference, samples) = (Points::new(reference)?, Points::new(samples)?);
        let radii = Radii {
            reference: &self.radii(&reference, neighbours),
            samples: &self.radii(&samples, neighbours),
        };
        let blocks = Blocks::new(self, &reference, &samples);
        let pairs = pairs(&self.starts(reference.rows()), &self.starts(samples.rows()));
        Ok(coverage(&pairs, &radii, |first, second| {
            let half = blocks.half(first, second);
            let products = self.products(&reference, first, &samples, second, half);
            let (norms, others) = (reference.norms(half), samples.norms(half));
            DMatrix::from_fn(products.nrows(), products.ncols(), |row, column| {
                let (norm, other) = (norms[first + row], others[second + column]);
                f64::from(distance(norm, products[(row, column)], other, half))
            })
        }))
    }

    /// For each point, its distances to all points, itself included, are sorted in ascending order;
    /// the result is the one at index `neighbours`, counted from 0.
    fn radii(&self, points: &Points<'_>, neighbours: usize) -> Vec<f64> {
        let starts = self.starts(points.rows());
        let blocks = Blocks::new(self, points, points);
        let nearest: Vec<_> = starts
            .iter()
            .map(|&start| {
                let rows = self.rows(start, points.rows());
                Mutex::new(vec![Nearest::new(neighbours + 1); rows])
            })
            .collect();
        let pairs: Vec<_> = (0..starts.len())
            .flat_map(|first| (first..starts.len()).map(move |second| (first, second)))
            .collect();
        // The products are symmetric, but the distances made of them are rounded in another order.
        each(&pairs, |&(first, second)| {
            let (a, b) = (starts[first], starts[second]);
            let half = blocks.half(a, b);
            let products = self.products(points, a, points, b, half);
            let norms = points.norms(half);
            for (row, point) in locked(&nearest[first]).iter_mut().enumerate() {
                for (column, &product) in products.row(row).iter().enumerate() {
                    let distance = distance(norms[a + row], product, norms[b + column], half);
                    point.insert(distance.into());
                }
            }
            if first == second {
                return;
            }
            let half_back = blocks.half(b, a);
            let products = match half_back == half {
                true => products,
                false => self.products(points, a, points, b, half_back),
            };
            let norms = points.norms(half_back);
            let columns = products.column_iter().enumerate();
            for (point, (column, products)) in locked(&nearest[second]).iter_mut().zip(columns) {
                for (row, &product) in products.iter().enumerate() {
                    let distance = distance(norms[b + column], product, norms[a + row], half_back);
                    point.insert(distance.into());
                }
            }
        });
        let nearest = nearest
            .into_iter()
            .flat_map(|block| block.into_inner().unwrap_or_else(PoisonError::into_inner));
        nearest.map(|nearest| nearest.farthest()).collect()
    }

    /// First rows of the tiles that are multiplied at once; no tile spans two blocks.
    fn starts(&self, rows: usize) -> Vec<usize> {
        let blocks = (0..rows).step_by(self.batch);
        blocks
            .flat_map(|first| (first..rows.min(first + self.batch)).step_by(BLOCK))
            .collect()
    }

    /// Number of rows of the tile that begins at `start`, of `all` rows.
    fn rows(&self, start: usize, all: usize) -> usize {
        let block_end = (start / self.batch + 1) * self.batch;
        all.min(block_end).min(start + BLOCK) - start
    }

    /// `u.v` of two tiles, `[u rows, v rows]`, accumulated in `f32` from the first column to the
    /// last. With `half`, the operands are rounded and the result is not.
    fn products(
        &self,
        u: &Points<'_>,
        first: usize,
        v: &Points<'_>,
        second: usize,
        half: bool,
    ) -> DMatrix<f32> {
        let dim = u.features.dim();
        let rows = self.rows(first, u.rows());
        let columns = self.rows(second, v.rows());
        let (u, v) = (
            u.pieces::<ROWS>(first, rows, half),
            v.pieces::<COLUMNS>(second, columns, half),
        );
        let mut products = DMatrix::zeros(rows, columns);
        for (group, us) in u.chunks(GROUP * dim).enumerate() {
            for (right, v) in v.chunks(dim).enumerate() {
                for (piece, u) in us.chunks(dim).enumerate() {
                    let (top, left) = ((group * GROUP + piece) * ROWS, right * COLUMNS);
                    for (row, sums) in (top..rows).zip(sums(u, v)) {
                        for (column, sum) in (left..columns).zip(sums) {
                            products[(row, column)] = sum;
                        }
                    }
                }
            }
        }
        products
    }
}

impl<'a> Blocks<'a> {
    fn new(of: &'a Half, first: &'a Points<'a>, second: &'a Points<'a>) -> Self {
        let batches = |points: &Points<'_>| (0..points.rows()).step_by(of.batch);
        let mut blocks = Self {
            of,
            first,
            second,
            half: Vec::new(),
        };
        let half = batches(first).flat_map(|a| batches(second).map(move |b| (a, b)));
        blocks.half = half.map(|(a, b)| blocks.is_finite(a, b)).collect();
        blocks
    }

    fn half(&self, a: usize, b: usize) -> bool {
        let across = self.second.rows().div_ceil(self.of.batch);
        self.half[a / self.of.batch * across + b / self.of.batch]
    }

    /// Whether all distances of the block beginning at `a` and `b` are finite in half precision.
    fn is_finite(&self, a: usize, b: usize) -> bool {
        let end = |points: &Points<'_>, start: usize| points.rows().min(start + self.of.batch);
        let (a_end, b_end) = (end(self.first, a), end(self.second, b));
        let longest = |norms: &[f32]| {
            norms
                .iter()
                .fold(0.0f32, |most, &norm| most.max(norm))
                .sqrt()
        };
        let most =
            longest(&self.first.half_norms[a..a_end]) + longest(&self.second.half_norms[b..b_end]);
        // The distance of two points is at most the sum of their lengths.
        if most * most < SAFE {
            return true;
        }
        let starts = |from: usize, to: usize| (from..to).step_by(BLOCK).collect::<Vec<_>>();
        pairs(&starts(a, a_end), &starts(b, b_end))
            .par_iter()
            .with_max_len(1)
            .all(|&(a, b)| {
                let products = self.of.products(self.first, a, self.second, b, true);
                products
                    .column_iter()
                    .enumerate()
                    .all(|(column, products)| {
                        let norm = self.second.half_norms[b + column];
                        let others = &self.first.half_norms[a..];
                        let mut both = products.iter().zip(others);
                        both.all(|(&product, &other)| {
                            distance(other, product, norm, true).is_finite()
                        })
                    })
            })
    }
}

/// `max((|u|^2 - 2 u.v) + |v|^2, 0)` from `|u|^2`, `u.v` and `|v|^2`; NaN if one of them is NaN.
fn distance(norm: f32, product: f32, other: f32, half: bool) -> f32 {
    let distance = if half {
        let twice = rounded(2.0 * rounded(product));
        rounded(rounded(norm - twice) + other)
    } else {
        (norm - 2.0 * product) + other
    };
    if distance < 0.0 { 0.0 } else { distance }
}

/// The nearest half-precision number.
fn rounded(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

/// Sums of products of the columns of two pieces, each from the first column to the last.
fn sums(u: &[[f32; ROWS]], v: &[[f32; COLUMNS]]) -> [[f32; COLUMNS]; ROWS] {
    let mut sums = [[0.0; COLUMNS]; ROWS];
    for (u, v) in u.iter().zip(v) {
        for (sums, u) in sums.iter_mut().zip(u) {
            for (sum, v) in sums.iter_mut().zip(v) {
                // A multiplication and an addition: fused, they would be rounded differently from
                // the formula.
                *sum += u * v;
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::super::{Distances, precision_recall, precision_recall_with};
    use super::*;

    fn features(dim: usize, data: &[f32]) -> Features {
        Features::new(dim, data.to_vec()).unwrap()
    }

    /// Pseudorandom values in [0, 1) (a linear congruential generator).
    fn noise(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        (0..count).map(next).collect()
    }

    /// The formula as written, on all pairs of a block at once, in a half-precision type.
    fn slow_block(u: &[&[f32]], v: &[&[f32]]) -> Vec<Vec<f32>> {
        let cast = |rows: &[&[f32]]| -> Vec<Vec<f16>> {
            let row = |row: &&[f32]| row.iter().map(|&value| f16::from_f32(value)).collect();
            rows.iter().map(row).collect()
        };
        let sum = |values: Vec<f16>| -> f16 {
            f16::from_f32(
                values
                    .into_iter()
                    .map(f32::from)
                    .fold(0.0, |sum, x| sum + x),
            )
        };
        let norm = |row: &[f16]| sum(row.iter().map(|&x| x * x).collect());
        let half = |u: &[f16], v: &[f16]| -> f16 {
            let terms = u.iter().zip(v).map(|(&u, &v)| f32::from(u) * f32::from(v));
            let product = f16::from_f32(terms.fold(0.0, |sum, x| sum + x));
            let distance = norm(u) - f16::from_f32(2.0) * product + norm(v);
            if distance < f16::ZERO {
                f16::ZERO
            } else {
                distance
            }
        };
        let (half_u, half_v) = (cast(u), cast(v));
        let halves: Vec<Vec<f16>> = half_u
            .iter()
            .map(|u| half_v.iter().map(|v| half(u, v)).collect())
            .collect();
        if halves.iter().flatten().all(|distance| distance.is_finite()) {
            let wide = |row: Vec<f16>| row.into_iter().map(f32::from).collect();
            return halves.into_iter().map(wide).collect();
        }
        let dot = |u: &[f32], v: &[f32]| u.iter().zip(v).fold(0.0, |sum, (u, v)| sum + u * v);
        let single = |u: &[f32], v: &[f32]| (dot(u, u) - 2.0 * dot(u, v) + dot(v, v)).max(0.0);
        u.iter()
            .map(|u| v.iter().map(|v| single(u, v)).collect())
            .collect()
    }

    /// All distances, `[u rows][v rows]`, computed block by block.
    fn slow_distances(u: &Features, v: &Features, batch: usize) -> Vec<Vec<f32>> {
        let rows = |of: &'_ Features| -> Vec<Vec<f32>> {
            (0..of.rows()).map(|row| of.row(row).to_vec()).collect()
        };
        let (u, v) = (rows(u), rows(v));
        let slices = |rows: &'_ [Vec<f32>]| -> Vec<Vec<f32>> { rows.to_vec() };
        let mut all = vec![Vec::new(); u.len()];
        for (block, u) in u.chunks(batch).enumerate() {
            for v in v.chunks(batch) {
                let (u, v) = (slices(u), slices(v));
                let u: Vec<&[f32]> = u.iter().map(Vec::as_slice).collect();
                let v: Vec<&[f32]> = v.iter().map(Vec::as_slice).collect();
                for (row, distances) in slow_block(&u, &v).into_iter().enumerate() {
                    all[block * batch + row].extend(distances);
                }
            }
        }
        all
    }

    fn slow_radii(points: &Features, neighbours: usize, batch: usize) -> Vec<f32> {
        let mut all = slow_distances(points, points, batch);
        all.iter_mut()
            .map(|row| {
                row.sort_by(f32::total_cmp);
                row[neighbours]
            })
            .collect()
    }

    fn slow(reference: &Features, samples: &Features, k: usize, batch: usize) -> PrecisionRecall {
        let distances = slow_distances(reference, samples, batch);
        let reference_radii = slow_radii(reference, k, batch);
        let sample_radii = slow_radii(samples, k, batch);
        let covered_samples = (0..samples.rows())
            .filter(|&j| (0..reference.rows()).any(|i| distances[i][j] <= reference_radii[i]));
        let covered_reference = (0..reference.rows())
            .filter(|&i| (0..samples.rows()).any(|j| distances[i][j] <= sample_radii[j]));
        PrecisionRecall {
            precision: covered_samples.count() as f64 / samples.rows() as f64,
            recall: covered_reference.count() as f64 / reference.rows() as f64,
        }
    }

    #[test]
    fn by_hand() {
        // Squares of the reference: 1024, 1089. The product is 1056, so the distance is 1024 - 2112
        // + 1089 = 1, exactly.
        let reference = features(1, &[32.0, 33.0]);
        // 34.03125^2 = 1158.13 -> 1158; times 33: 1123.03 -> 1123; 1089 - 2246 = -1157; + 1158 = 1:
        // on the surface. The true value is 1.063. 50 is far from both.
        let samples = features(1, &[34.03125, 50.0]);
        let half = precision_recall_with(&reference, &samples, 1, Distances::F16).unwrap();
        let expected = PrecisionRecall {
            precision: 0.5,
            recall: 1.0,
        };
        assert_eq!(half, expected);
        assert_eq!(
            precision_recall(&reference, &samples, 1).unwrap().precision,
            0.0
        );

        // If all steps are exact, there is no difference.
        let (a, b) = (features(1, &[0.0, 1.0, 3.0]), features(1, &[2.0, 7.0, 9.0]));
        let half = precision_recall_with(&a, &b, 1, Distances::F16).unwrap();
        assert_eq!(half, precision_recall(&a, &b, 1).unwrap());
    }

    #[test]
    fn a_point_that_is_not_at_distance_zero_of_itself_is_no_exception() {
        // 33 squares of 8.0625, 65.00390625 -> 65: 2145 -> 2144 (steps of 2). The product isn't
        // rounded in between: 33 x 65.00390625 = 2145.13 -> 2146. 2144 - 4292 = -2148; + 2144 = -4
        // -> 0. In the other direction with 7.9375, 63.00390625 -> 63: 2079 -> 2080, product
        // 2079.13 -> 2080: 0.
        let row = |value: f32| vec![value; 33];
        let points = features(33, &[row(8.0625), row(7.9375), row(8.0)].concat());
        let distances = slow_distances(&points, &points, BATCH);
        let radii = Half::default().radii(&Points::new(&points).unwrap(), 1);
        for (radius, mut row) in radii.into_iter().zip(distances) {
            row.sort_by(f32::total_cmp);
            assert_eq!(radius, f64::from(row[1]));
        }
    }

    /// Rows with a mean and spread for which distances are small relative to the squared lengths,
    /// as for Inception.
    fn like_inception(rows: usize, dim: usize, seed: u32) -> Features {
        let mut data = noise(rows * dim, seed);
        for (index, value) in data.iter_mut().enumerate() {
            *value = 0.3 + 0.2 * *value * (1.0 + (index / dim % 5) as f32 / 5.0);
        }
        features(dim, &data)
    }

    #[test]
    fn the_fast_path_is_the_formula() {
        // More than a tile; sizes that are no multiples of a piece; a last block that is not full.
        for (rows, others, dim, batch) in [
            (BLOCK + 9, 61, 5, BATCH),
            (150, 203, 97, BATCH),
            (70, 90, 300, 32),
            (5, 5, 1, 2),
        ] {
            let (a, b) = (like_inception(rows, dim, 1), like_inception(others, dim, 2));
            let half = Half { batch };
            let found = half.precision_recall(&a, &b, 3).unwrap();
            assert_eq!(found, slow(&a, &b, 3, batch), "{rows} {others} {dim}");
            let radii = half.radii(&Points::new(&a).unwrap(), 3);
            let expected = slow_radii(&a, 3, batch).into_iter().map(f64::from);
            assert_eq!(radii, expected.collect::<Vec<_>>());
        }
        // The arithmetic matters, and it raises both numbers.
        let (a, b) = (like_inception(150, 97, 1), like_inception(203, 97, 2));
        let half = precision_recall_with(&a, &b, 3, Distances::F16).unwrap();
        let exact = precision_recall(&a, &b, 3).unwrap();
        assert!(half.precision > exact.precision, "{half:?} {exact:?}");
        assert!(half.recall > exact.recall, "{half:?} {exact:?}");
    }

    #[test]
    fn blocks_that_are_not_finite_are_computed_in_single_precision() {
        // The last rows are scaled until their squared lengths, and in the end the values
        // themselves, exceed 65504. Some of the blocks of four are then computed in half and some
        // in single precision. In between, distances may be finite although their bound is not;
        // only computing them shows it.
        let (dim, batch) = (6, 4);
        for scale in [1.0f32, 100.0, 120.0, 300.0, 7e4] {
            let mut data = noise(14 * dim, 5);
            for (index, value) in data.iter_mut().enumerate() {
                *value = (*value + 0.1) * if index / dim > 8 { scale } else { 1.0 };
            }
            let (a, b) = (features(dim, &data), like_inception(11, dim, 7));
            let half = Half { batch };
            let points = Points::new(&a).unwrap();
            let blocks = Blocks::new(&half, &points, &points);
            assert!(blocks.half(0, 0));
            assert_eq!(blocks.half(0, 13), scale < 300.0, "{scale}");
            let radii = half.radii(&points, 2);
            let expected: Vec<f64> = slow_radii(&a, 2, batch)
                .into_iter()
                .map(f64::from)
                .collect();
            assert_eq!(radii, expected, "{scale}");
            let found = half.precision_recall(&a, &b, 2).unwrap();
            assert_eq!(found, slow(&a, &b, 2, batch), "{scale}");
        }
        // With blocks of the default size, everything is computed in single precision.
        let one = features(1, &[1.0, 1.03125, 2.0, 400.0]);
        let radii = Half::default().radii(&Points::new(&one).unwrap(), 1);
        assert_eq!(radii[0], f64::from(0.03125f32.powi(2)));
    }

    #[test]
    fn bad_input_is_an_error() {
        let (one, two) = (features(1, &[0.0; 5]), features(2, &[0.0; 10]));
        let measure = |a: &Features, b: &Features, neighbours| {
            precision_recall_with(a, b, neighbours, Distances::F16)
        };
        assert!(measure(&one, &two, 3).is_err());
        assert!(measure(&one, &one, 0).is_err());
        assert!(matches!(
            measure(&one, &one, 5),
            Err(EvaluationError::TooFew { needed: 6, .. })
        ));
        let huge = features(1, &[0.0, 1.0, 2.0, 3.0, 3e38]);
        let error = measure(&one, &huge, 3).unwrap_err().to_string();
        assert!(error.contains("row 4 is too large"), "{error}");
    }
}
