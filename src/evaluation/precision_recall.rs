//! Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, section 2).
//!
//! Each set of activations defines a manifold: the union of balls around its points, each reaching
//! to the `k`-th nearest other point of the same set. Precision is the fraction of samples on the
//! reference manifold (plausibility), recall the fraction of reference points on the sample
//! manifold (coverage).

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nalgebra::DMatrix;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::half_distances::Half;
use super::{EvaluationError, Features};

/// The `k` of the published numbers (the paper, and `evaluator.py`'s `nhood_sizes`).
pub const DEFAULT_NEIGHBOURS: usize = 3;

/// Points per side of a tile of pairwise distances. A thread holds two blocks of points and one
/// tile: about 40 MiB for `dim = 2048`.
pub(super) const BLOCK: usize = 1024;

/// Squared distances below this fraction of the squared lengths are rounding errors, see
/// [`squared_distances`].
const ROUNDING: f64 = 1e-13;

/// Arithmetic of the distances between activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Distances {
    /// Double precision, as the measures are defined.
    #[default]
    F64,
    /// Half precision, as `guided-diffusion/evaluations/evaluator.py` computes them, for comparison
    /// with published numbers, which this arithmetic raises.
    ///
    /// For activations `u` and `v`, rounded to 16 bits, it takes `max((|u|^2 - 2 u.v) + |v|^2, 0)`,
    /// where each square, each of the two sums of squares, `u.v`, `2 u.v`, the difference and the
    /// sum are rounded to 16 bits. Inception's activations have squared lengths of some hundreds,
    /// where 16 bits resolve steps of a half: distances coincide, and a distance equal to a radius
    /// is inside. On such samples both precision and recall come out 0.0005 to 0.004 higher. The
    /// distance of a point to itself, which may then be nonzero, counts among the neighbours.
    ///
    /// Sums of products are accumulated in 32 bits from the first term to the last and rounded
    /// once, as GPUs multiply half-precision matrices. Other devices and libraries add in another
    /// order or round in between, and get other last bits; so the numbers may differ from that
    /// program's by single samples.
    ///
    /// As there, distances are computed in blocks of 10 000 x 10 000, and a block with a distance
    /// that is not finite in 16 bits (squared distances above 65 504, far above Inception's) is
    /// computed in 32 bits.
    F16,
}

impl Distances {
    /// Name in recipes, on the command line and in results.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F16 => "f16",
        }
    }
}

impl fmt::Display for Distances {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Precision and recall, fractions between 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrecisionRecall {
    /// Fraction of the samples in at least one ball of the reference.
    pub precision: f64,
    /// Fraction of the reference in at least one ball of the samples.
    pub recall: f64,
}

/// Precision and recall of `samples` `[n, dim]` against `reference` `[m, dim]`, with balls that
/// reach to the `neighbours`-th nearest point. A point on the surface of a ball is inside.
///
/// The time grows with `(n + m)^2 * dim`; all cores are used.
///
/// # Errors
///
/// [`EvaluationError::Shape`] when the dimensions differ, and the errors of [`neighbour_radii`].
///
/// # Examples
///
/// ```
/// use tinyfusion::evaluation::{Features, precision_recall};
/// let reference = Features::new(1, vec![0.0, 1.0, 10.0, 11.0])?;
/// let samples = Features::new(1, vec![0.5, 0.75])?; // plausible, but one mode is missing
/// let score = precision_recall(&reference, &samples, 1)?;
/// assert_eq!((score.precision, score.recall), (1.0, 0.25));
/// # Ok::<(), tinyfusion::evaluation::EvaluationError>(())
/// ```
pub fn precision_recall(
    reference: &Features,
    samples: &Features,
    neighbours: usize,
) -> Result<PrecisionRecall, EvaluationError> {
    precision_recall_with(reference, samples, neighbours, Distances::F64)
}

/// As [`precision_recall`], with a choice of arithmetic for the distances.
///
/// # Errors
///
/// As [`precision_recall`]; with [`Distances::F16`] also [`EvaluationError::Value`] when
/// activations are so large that distances would not be finite in 32 bits.
///
/// # Examples
///
/// ```
/// use tinyfusion::evaluation::{Distances, Features, precision_recall_with};
/// let reference = Features::new(1, vec![32.0, 33.0])?;
/// let samples = Features::new(1, vec![34.03125, 50.0])?;
/// // The ball around 33 reaches to 34. In half precision, whose numbers above 1024 (the square of
/// // 32) are integers, the distance of 34.03125 comes out as 1 too.
/// let exact = precision_recall_with(&reference, &samples, 1, Distances::F64)?;
/// let half = precision_recall_with(&reference, &samples, 1, Distances::F16)?;
/// assert_eq!((exact.precision, half.precision), (0.0, 0.5));
/// # Ok::<(), tinyfusion::evaluation::EvaluationError>(())
/// ```
pub fn precision_recall_with(
    reference: &Features,
    samples: &Features,
    neighbours: usize,
    distances: Distances,
) -> Result<PrecisionRecall, EvaluationError> {
    if reference.dim() != samples.dim() {
        return Err(EvaluationError::Shape {
            what: "feature dimension of the samples",
            expected: format!("{}, as the reference has", reference.dim()),
            found: samples.dim().to_string(),
        });
    }
    match distances {
        Distances::F64 => {
            let radii = Radii {
                reference: &neighbour_radii(reference, neighbours)?,
                samples: &neighbour_radii(samples, neighbours)?,
            };
            let pairs = pairs(&starts(reference), &starts(samples));
            Ok(coverage(&pairs, &radii, |first, second| {
                squared_distances(&Block::new(reference, first), &Block::new(samples, second))
            }))
        }
        Distances::F16 => Half::default().precision_recall(reference, samples, neighbours),
    }
}

/// Squared radii of the balls of both sides.
pub(super) struct Radii<'a> {
    pub(super) reference: &'a [f64],
    pub(super) samples: &'a [f64],
}

/// All pairs of a block of one side and a block of the other.
pub(super) fn pairs(reference: &[usize], samples: &[usize]) -> Vec<(usize, usize)> {
    let with = |&first: &usize| samples.iter().map(move |&second| (first, second));
    reference.iter().flat_map(with).collect()
}

/// Which points lie in a ball of the other side. `distances(r, s)` gives the squared distances
/// between the reference block that begins at `r` and the sample block that begins at `s`.
pub(super) fn coverage(
    pairs: &[(usize, usize)],
    radii: &Radii<'_>,
    distances: impl Fn(usize, usize) -> DMatrix<f64> + Send + Sync,
) -> PrecisionRecall {
    let outside = |points: &[f64]| -> Vec<AtomicBool> {
        points.iter().map(|_| AtomicBool::new(false)).collect()
    };
    let covered_reference = outside(radii.reference);
    let covered_samples = outside(radii.samples);
    // Each distance is computed once and used in both directions.
    each(pairs, |&(first, second)| {
        let distances = distances(first, second);
        let covered = &covered_reference[first..][..distances.nrows()];
        let reaches = &radii.reference[first..][..distances.nrows()];
        for (index, column) in distances.column_iter().enumerate() {
            let radius = radii.samples[second + index];
            let mut inside = false;
            for ((&distance, covered), &reach) in column.iter().zip(covered).zip(reaches) {
                if distance <= radius {
                    covered.store(true, Ordering::Relaxed);
                }
                inside |= distance <= reach;
            }
            if inside {
                covered_samples[second + index].store(true, Ordering::Relaxed);
            }
        }
    });
    PrecisionRecall {
        precision: fraction(covered_samples),
        recall: fraction(covered_reference),
    }
}

/// The fraction of flags that are set.
fn fraction(flags: Vec<AtomicBool>) -> f64 {
    let (count, mut all) = (flags.len() as f64, flags);
    all.retain_mut(|flag| *flag.get_mut());
    all.len() as f64 / count
}

/// The *squared* distance of each row to its `neighbours`-th nearest other row, `[rows]`.
///
/// # Errors
///
/// [`EvaluationError::TooFew`] unless there are more rows than neighbours,
/// [`EvaluationError::Shape`] when `neighbours` is zero.
pub fn neighbour_radii(
    features: &Features,
    neighbours: usize,
) -> Result<Vec<f64>, EvaluationError> {
    check_neighbours(features, neighbours)?;
    let starts = starts(features);
    let nearest: Vec<_> = starts
        .iter()
        .map(|start| {
            let rows = BLOCK.min(features.rows() - start);
            Mutex::new(vec![Nearest::new(neighbours); rows])
        })
        .collect();
    let pairs: Vec<_> = (0..starts.len())
        .flat_map(|first| (first..starts.len()).map(move |second| (first, second)))
        .collect();
    // Distances are symmetric, so only half of them are computed. The order in which a point
    // receives them does not change the smallest ones.
    each(&pairs, |&(first, second)| {
        let points = Block::new(features, starts[first]);
        if first == second {
            let distances = squared_distances(&points, &points);
            let mut nearest = locked(&nearest[first]);
            for (index, column) in distances.column_iter().enumerate() {
                let others = column
                    .iter()
                    .enumerate()
                    .filter(|(other, _)| *other != index);
                others.for_each(|(_, &distance)| nearest[index].insert(distance));
            }
            return;
        }
        let distances = squared_distances(&points, &Block::new(features, starts[second]));
        for (point, column) in locked(&nearest[second])
            .iter_mut()
            .zip(distances.column_iter())
        {
            column.iter().for_each(|&distance| point.insert(distance));
        }
        let mut nearest = locked(&nearest[first]);
        for column in distances.column_iter() {
            for (point, &distance) in nearest.iter_mut().zip(column.iter()) {
                point.insert(distance);
            }
        }
    });
    let nearest = nearest
        .into_iter()
        .flat_map(|block| block.into_inner().unwrap_or_else(PoisonError::into_inner));
    Ok(nearest.map(|nearest| nearest.farthest()).collect())
}

/// Refuses a zero number of neighbours, or more than there are other rows.
pub(super) fn check_neighbours(
    features: &Features,
    neighbours: usize,
) -> Result<(), EvaluationError> {
    if neighbours == 0 {
        let (expected, found) = ("at least 1".to_owned(), "0".to_owned());
        return Err(EvaluationError::Shape {
            what: "number of neighbours",
            expected,
            found,
        });
    }
    if features.rows() <= neighbours {
        let needed = neighbours.saturating_add(1);
        let what = "a neighbourhood of that size";
        return Err(EvaluationError::TooFew {
            what,
            needed,
            found: features.rows(),
        });
    }
    Ok(())
}

/// Runs `work` on every pair, on all cores. A pair takes a good part of a second and is scheduled
/// singly.
pub(super) fn each<T: Sync>(pairs: &[T], work: impl Fn(&T) + Send + Sync) {
    pairs.par_iter().with_max_len(1).for_each(work);
}

pub(super) fn locked(nearest: &Mutex<Vec<Nearest>>) -> MutexGuard<'_, Vec<Nearest>> {
    nearest.lock().unwrap_or_else(PoisonError::into_inner)
}

/// First rows of the blocks.
fn starts(features: &Features) -> Vec<usize> {
    (0..features.rows()).step_by(BLOCK).collect()
}

/// Up to [`BLOCK`] points in double precision.
struct Block {
    /// One column per point, `[dim, points]`.
    points: DMatrix<f64>,
    /// Squared lengths, `[points]`.
    squares: Vec<f64>,
}

impl Block {
    fn new(features: &Features, start: usize) -> Self {
        let rows = BLOCK.min(features.rows() - start);
        let dim = features.dim();
        let values = &features.data()[start * dim..(start + rows) * dim];
        let values = values.iter().map(|&value| f64::from(value)).collect();
        let points = DMatrix::from_vec(dim, rows, values);
        let squares = points
            .column_iter()
            .map(|point| point.norm_squared())
            .collect();
        Self { points, squares }
    }
}

/// `max(|u|^2 - 2 u.v + |v|^2, 0)` for all pairs, `[a points, b points]`.
///
/// The expansion turns the work into a matrix product. It leaves a rounding error between equal
/// points, which would decide whether a point is inside a ball of radius zero (such balls occur as
/// soon as a sampler repeats itself); distances that small are therefore set to zero.
fn squared_distances(a: &Block, b: &Block) -> DMatrix<f64> {
    let mut distances = a.points.transpose() * &b.points;
    for (mut column, &b_square) in distances.column_iter_mut().zip(&b.squares) {
        for (value, &a_square) in column.iter_mut().zip(&a.squares) {
            let lengths = a_square + b_square;
            let distance = lengths - 2.0 * *value;
            *value = if distance > ROUNDING * lengths {
                distance
            } else {
                0.0
            };
        }
    }
    distances
}

/// The smallest distances seen so far, in ascending order.
#[derive(Clone)]
pub(super) struct Nearest(Vec<f64>);

impl Nearest {
    pub(super) fn new(count: usize) -> Self {
        Self(vec![f64::INFINITY; count])
    }

    pub(super) fn insert(&mut self, distance: f64) {
        if distance < self.farthest() {
            let place = self.0.partition_point(|&kept| kept <= distance);
            self.0[place..].rotate_right(1);
            self.0[place] = distance;
        }
    }

    pub(super) fn farthest(&self) -> f64 {
        self.0[self.0.len() - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(dim: usize, data: &[f32]) -> Features {
        Features::new(dim, data.to_vec()).unwrap()
    }

    /// Pseudorandom values in [0, 1) (a linear congruential generator).
    fn noise(count: usize) -> Vec<f32> {
        let mut state = 1u32;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        (0..count).map(next).collect()
    }

    #[test]
    fn radii_by_hand() {
        // On a line at 0, 1, 3, 7: the second nearest other points are 3, 2, 3 and 6 away.
        let radii = neighbour_radii(&features(1, &[0.0, 1.0, 3.0, 7.0]), 2).unwrap();
        assert_eq!(radii, [9.0, 4.0, 9.0, 36.0]);
    }

    #[test]
    fn the_surface_of_a_ball_is_inside() {
        // Reference balls: [-1, 1], [0, 2]; sample balls: [-2, 6] and [-2, 6] around 2.
        let reference = features(1, &[0.0, 1.0]);
        let samples = features(1, &[2.0, 6.0]);
        let score = precision_recall(&reference, &samples, 1).unwrap();
        assert_eq!(
            score,
            PrecisionRecall {
                precision: 0.5,
                recall: 1.0
            }
        );
    }

    #[test]
    fn blocks_agree_with_all_pairs() {
        let (rows, dim, k) = (BLOCK + 7, 6, 3);
        let points = features(dim, &noise(rows * dim));
        let radii = neighbour_radii(&points, k).unwrap();
        for index in (0..rows).step_by(41).chain([BLOCK - 1, BLOCK, rows - 1]) {
            let mut all: Vec<f64> = (0..rows)
                .filter(|&other| other != index)
                .map(|other| {
                    let pairs = points.row(index).iter().zip(points.row(other));
                    pairs.map(|(&u, &v)| f64::from(u - v).powi(2)).sum()
                })
                .collect();
            all.sort_by(f64::total_cmp);
            // The slow path rounds the differences u - v to f32: 6e-8 each, relative.
            assert!((radii[index] / all[k - 1] - 1.0).abs() < 1e-5, "{index}");
        }
    }

    #[test]
    fn coverage_agrees_with_all_pairs() {
        // Sets of more than one block and of varying density, so that neighbouring points have
        // different radii.
        let dim = 4;
        let spread = |rows: usize, by: f32| {
            let mut data = noise(rows * dim);
            for (index, value) in data.iter_mut().enumerate() {
                *value = by * (*value + (index / dim % 7) as f32);
            }
            features(dim, &data)
        };
        let (reference, samples) = (spread(BLOCK + 40, 1.0), spread(2 * BLOCK + 3, 0.9));
        let score = precision_recall(&reference, &samples, 3).unwrap();
        let covered = |points: &Features, centres: &Features| {
            let radii = neighbour_radii(centres, 3).unwrap();
            let inside = |row: &[f32]| {
                (0..centres.rows()).any(|centre| {
                    let pairs = row.iter().zip(centres.row(centre));
                    let distance = pairs.map(|(&u, &v)| (f64::from(u) - f64::from(v)).powi(2));
                    distance.sum::<f64>() <= radii[centre]
                })
            };
            let count = (0..points.rows())
                .filter(|&row| inside(points.row(row)))
                .count();
            count as f64 / points.rows() as f64
        };
        assert_eq!(score.precision, covered(&samples, &reference));
        assert_eq!(score.recall, covered(&reference, &samples));
        assert!(score.precision < 1.0 && score.recall < 1.0, "{score:?}");
    }

    #[test]
    fn equal_points_are_at_distance_zero() {
        let (rows, dim) = (100, 37);
        // Squares of f32 values of similar size add up exactly in f64; those of columns of
        // different size do not.
        let mut data = noise(rows * dim);
        for (index, value) in data.iter_mut().enumerate() {
            *value *= 7f32.powi((index % dim % 8) as i32);
        }
        let block = Block::new(&features(dim, &data), 0);
        let distances = squared_distances(&block, &block);
        for (index, row) in distances.row_iter().enumerate() {
            assert_eq!(row.iter().position(|&d| d == 0.0), Some(index));
            assert_eq!(row.iter().filter(|&&d| d == 0.0).count(), 1);
        }
    }

    #[test]
    fn a_collapsed_sampler_covers_only_itself() {
        // All samples equal one reference point: balls of radius zero, hit exactly, in blocks of
        // every size.
        let dim = 37;
        let reference = features(dim, &noise(50 * dim));
        for copies in [4, 9, BLOCK + 1] {
            let samples = features(dim, &reference.row(17).repeat(copies));
            let score = precision_recall(&reference, &samples, 3).unwrap();
            assert_eq!(
                score,
                PrecisionRecall {
                    precision: 1.0,
                    recall: 0.02
                }
            );
        }
    }

    #[test]
    fn bad_input_is_an_error() {
        let three = features(1, &[0.0, 1.0, 2.0]);
        let four = features(2, &[0.0; 8]);
        assert!(matches!(
            neighbour_radii(&three, 3),
            Err(EvaluationError::TooFew {
                needed: 4,
                found: 3,
                ..
            })
        ));
        assert!(neighbour_radii(&three, 0).is_err());
        assert!(neighbour_radii(&three, usize::MAX).is_err());
        assert!(precision_recall(&three, &four, 1).is_err());
    }
}
