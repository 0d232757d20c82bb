//! Mean and covariance of activations.

use nalgebra::{DMatrix, DMatrixViewMut, DVector};
use rayon::prelude::*;

use super::{EvaluationError, Features};

/// Rows that enter the covariance in one matrix product. Bounds the extra memory to
/// `2 * CHUNK_ROWS * dim` doubles (16 MiB for Inception).
const CHUNK_ROWS: usize = 512;

/// Columns of the covariance that one thread updates at a time.
const PANEL_COLUMNS: usize = 128;

/// First and second moments of a set of activations.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    mean: DVector<f64>,
    covariance: DMatrix<f64>,
}

impl Statistics {
    /// Takes precomputed moments: `mean` `[dim]` and the unbiased `covariance` `[dim, dim]`.
    ///
    /// # Errors
    ///
    /// [`EvaluationError::Shape`] when the sizes do not fit, [`EvaluationError::Value`] when an
    /// entry is not finite or the covariance is not symmetric.
    pub fn from_moments(mean: Vec<f64>, covariance: Vec<f64>) -> Result<Self, EvaluationError> {
        let dim = mean.len();
        if dim == 0 || dim.checked_mul(dim) != Some(covariance.len()) {
            return Err(EvaluationError::Shape {
                what: "covariance",
                expected: format!("{dim} x {dim} values, as the mean has {dim}"),
                found: format!("{} values", covariance.len()),
            });
        }
        let mean = DVector::from_vec(mean);
        let covariance = DMatrix::from_vec(dim, dim, covariance);
        if !mean
            .iter()
            .chain(&covariance)
            .all(|value| value.is_finite())
        {
            return Err(invalid("statistics", "an entry is not finite"));
        }
        // The eigensolver reads one triangle only, so it would not detect this.
        if (&covariance - covariance.transpose()).amax() > 1e-4 * covariance.amax() {
            return Err(invalid("covariance", "the matrix is not symmetric"));
        }
        Ok(Self { mean, covariance })
    }

    /// The mean, `[dim]`.
    pub fn mean(&self) -> &DVector<f64> {
        &self.mean
    }

    /// The unbiased covariance, divided by `rows - 1`: `[dim, dim]`.
    pub fn covariance(&self) -> &DMatrix<f64> {
        &self.covariance
    }
}

/// Builds [`Statistics`] from batches, so that the activations need not be kept.
///
/// Batches are merged by the update of Chan, Golub and LeVeque (1979, "Updating formulae and a
/// pairwise algorithm for computing sample variances", eq. 2.1): each is centred on its own mean
/// before it is squared, so nothing cancels, however far the mean is from zero.
///
/// Rows are always merged in chunks of the same 512: a batch may end anywhere without changing a
/// bit of the result, and the products are large enough to use all cores.
///
/// # Examples
///
/// ```
/// use tinyfusion::evaluation::{Features, StatisticsAccumulator};
/// let mut accumulator = StatisticsAccumulator::new(1);
/// accumulator.push(&Features::new(1, vec![1.0, 2.0])?)?;
/// accumulator.push(&Features::new(1, vec![6.0])?)?;
/// let statistics = accumulator.finish()?;
/// assert_eq!((statistics.mean()[0], statistics.covariance()[0]), (3.0, 7.0));
/// # Ok::<(), tinyfusion::evaluation::EvaluationError>(())
/// ```
#[derive(Clone, Debug)]
pub struct StatisticsAccumulator {
    count: usize,
    mean: DVector<f64>,
    /// Sum of the outer products of the deviations from the mean so far, `[dim, dim]`.
    scatter: DMatrix<f64>,
    /// Rows of an incomplete chunk, `[rows, dim]`.
    waiting: Vec<f32>,
}

impl StatisticsAccumulator {
    /// An empty accumulator for rows of `dim` values. Uses `8 * dim * dim` bytes, plus 512 rows.
    pub fn new(dim: usize) -> Self {
        Self {
            count: 0,
            mean: DVector::zeros(dim),
            scatter: DMatrix::zeros(dim, dim),
            waiting: Vec::new(),
        }
    }

    /// Adds the rows of `features`, `[rows, dim]`.
    ///
    /// # Errors
    ///
    /// [`EvaluationError::Shape`] when the rows have another dimension.
    pub fn push(&mut self, features: &Features) -> Result<(), EvaluationError> {
        check_dim(self.mean.len(), features.dim())?;
        let chunk = CHUNK_ROWS * features.dim();
        let mut rows = features.data();
        if !self.waiting.is_empty() {
            let (first, rest) = rows.split_at(rows.len().min(chunk - self.waiting.len()));
            self.waiting.extend_from_slice(first);
            rows = rest;
            if self.waiting.len() < chunk {
                return Ok(());
            }
            let full = std::mem::take(&mut self.waiting);
            self.push_chunk(&full);
        }
        let chunks = rows.chunks_exact(chunk);
        self.waiting.extend_from_slice(chunks.remainder());
        for rows in chunks {
            self.push_chunk(rows);
        }
        Ok(())
    }

    fn push_chunk(&mut self, rows: &[f32]) {
        let dim = self.mean.len();
        let count = rows.len() / dim;
        // Row-major rows are column-major columns: one column per picture, `[dim, count]`.
        let mut centred =
            DMatrix::from_iterator(dim, count, rows.iter().map(|&value| f64::from(value)));
        let mean = centred.column_mean();
        centred
            .column_iter_mut()
            .for_each(|mut column| column -= &mean);
        let transposed = centred.transpose(); // [count, dim]

        let (before, added) = (self.count as f64, count as f64);
        let delta = mean - &self.mean;
        let weight = before * added / (before + added);
        self.scatter
            .as_mut_slice()
            .par_chunks_mut(dim * PANEL_COLUMNS)
            .enumerate()
            .for_each(|(panel, values)| {
                let (first, columns) = (panel * PANEL_COLUMNS, values.len() / dim);
                let mut view = DMatrixViewMut::from_slice(values, dim, columns);
                view.gemm(1.0, &centred, &transposed.columns(first, columns), 1.0);
                view.ger(weight, &delta, &delta.rows(first, columns), 1.0);
            });
        self.mean.axpy(added / (before + added), &delta, 1.0);
        self.count += count;
    }

    /// The statistics of all rows pushed.
    ///
    /// # Errors
    ///
    /// [`EvaluationError::TooFew`] for fewer than two rows, which have no covariance.
    pub fn finish(mut self) -> Result<Statistics, EvaluationError> {
        let rest = std::mem::take(&mut self.waiting);
        if !rest.is_empty() {
            self.push_chunk(&rest);
        }
        if self.count < 2 {
            return Err(EvaluationError::TooFew {
                what: "a covariance",
                needed: 2,
                found: self.count,
            });
        }
        let covariance = self.scatter / (self.count - 1) as f64;
        Ok(Statistics {
            mean: self.mean,
            covariance,
        })
    }
}

pub(super) fn check_dim(expected: usize, found: usize) -> Result<(), EvaluationError> {
    if expected == found {
        return Ok(());
    }
    Err(EvaluationError::Shape {
        what: "feature dimension",
        expected: expected.to_string(),
        found: found.to_string(),
    })
}

pub(super) fn invalid(what: &'static str, problem: &str) -> EvaluationError {
    EvaluationError::Value {
        what,
        problem: problem.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accumulate(dim: usize, batches: &[&[f32]]) -> Statistics {
        let mut accumulator = StatisticsAccumulator::new(dim);
        for batch in batches {
            accumulator
                .push(&Features::new(dim, batch.to_vec()).unwrap())
                .unwrap();
        }
        accumulator.finish().unwrap()
    }

    #[test]
    fn batches_give_the_moments_of_the_whole() {
        // Columns 1 2 6 and 0 3 3: means 3 and 2, deviations (-2 -1 3) and (-2 1 1).
        let whole: &[f32] = &[1.0, 0.0, 2.0, 3.0, 6.0, 3.0];
        for statistics in [
            accumulate(2, &[whole]),
            accumulate(2, &[&whole[..2], &[], &whole[2..]]),
        ] {
            assert!((statistics.mean() - DVector::from_vec(vec![3.0, 2.0])).amax() < 1e-15);
            let expected = DMatrix::from_vec(2, 2, vec![7.0, 3.0, 3.0, 3.0]);
            assert!((statistics.covariance() - expected).amax() < 1e-14);
        }
    }

    #[test]
    fn batches_may_end_anywhere() {
        let (rows, dim) = (2 * CHUNK_ROWS + 100, 5);
        let data: Vec<f32> = (0..rows * dim).map(|i| (i as f32).sin() + 3.0).collect();
        let whole = accumulate(dim, &[&data]);
        for batch in [
            1,
            7,
            CHUNK_ROWS - 1,
            CHUNK_ROWS,
            CHUNK_ROWS + 1,
            2 * CHUNK_ROWS,
        ] {
            let batches: Vec<&[f32]> = data.chunks(batch * dim).collect();
            // Bitwise equal: the sums are taken over the same rows in the same order.
            assert_eq!(accumulate(dim, &batches), whole, "{batch}");
        }
    }

    #[test]
    fn a_large_offset_does_not_cancel() {
        // The variance of 0, 1 repeated is n / (4 (n - 1)); the squared offset is 1e14 times
        // larger. There are more rows and columns than in a chunk and a panel, so both boundaries
        // are crossed.
        let (rows, dim) = (2 * CHUNK_ROWS + 2, PANEL_COLUMNS + 3);
        let data: Vec<f32> = (0..rows * dim)
            .map(|i| 8_388_600.0 + (i / dim % 2) as f32)
            .collect();
        let statistics = accumulate(dim, &[&data]);
        let expected = 0.25 * rows as f64 / (rows as f64 - 1.0);
        let worst = statistics.covariance().add_scalar(-expected).amax();
        assert!(worst < 1e-9, "{worst:e}");
    }

    #[test]
    fn bad_input_is_an_error() {
        assert!(matches!(
            StatisticsAccumulator::new(3).finish(),
            Err(EvaluationError::TooFew {
                needed: 2,
                found: 0,
                ..
            })
        ));
        assert!(Statistics::from_moments(vec![0.0; 2], vec![0.0; 3]).is_err());
        assert!(Statistics::from_moments(vec![], vec![]).is_err());
        assert!(Statistics::from_moments(vec![f64::NAN], vec![1.0]).is_err());
        assert!(Statistics::from_moments(vec![0.0; 2], vec![1.0, 0.5, 0.0, 1.0]).is_err());
    }
}
