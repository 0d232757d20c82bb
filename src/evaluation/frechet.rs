//! The Fréchet distance between two sets of activations.
//!
//! With the 2048 pooled Inception activations the distance is FID (Heusel et al. 2017,
//! arXiv:1706.08500, section 3); with the 2023 spatial ones it is sFID (Nash et al. 2021,
//! arXiv:2103.03841, section 4).

use std::sync::atomic::{AtomicUsize, Ordering};

use nalgebra::{DMatrix, DMatrixViewMut, DVector, SymmetricEigen, SymmetricTridiagonal};
use rayon::prelude::*;

use super::statistics::{check_dim, invalid};
use super::{EvaluationError, Statistics};

/// A matrix whose most negative eigenvalue exceeds this fraction of the largest is no covariance.
/// Generous, because it should reject wrong matrices but not the rounding of real covariances.
const NEGATIVE_TOLERANCE: f64 = 1e-4;

/// Columns of a matrix product that one thread computes at a time.
const PANEL_COLUMNS: usize = 128;

/// The squared 2-Wasserstein distance between the Gaussians with these moments:
///
/// `|mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr sqrt(S_a S_b)`
///
/// (Dowson and Landau 1982; FID and sFID, see the module). Zero for equal statistics up to
/// rounding, which may leave it slightly negative.
///
/// The general square root is avoided. With `S_a = F F^T`, the nonzero eigenvalues of `S_a S_b` are
/// those of the symmetric positive semidefinite matrix `F^T S_b F`, and the trace is the sum of
/// their square roots. This also covers singular covariances (fewer rows than dimensions), for
/// which the reference's iteration may fail and add `1e-6` to the diagonals. The covariance of
/// lower rank is the one that is factored: `F^T S_b F` then has as many rows as that rank, and no
/// eigenvalues that are zero up to rounding, whose square roots would add up (1e-8 each, relative
/// to the largest). Takes some three seconds for `dim = 2048` in a release build.
///
/// # Errors
///
/// [`EvaluationError::Shape`] when the dimensions differ, [`EvaluationError::Value`] when a
/// covariance has a negative eigenvalue beyond rounding or the eigensolver does not converge.
pub fn frechet_distance(a: &Statistics, b: &Statistics) -> Result<f64, EvaluationError> {
    check_dim(a.mean().len(), b.mean().len())?;
    let means = (a.mean() - b.mean()).norm_squared();
    let traces = a.covariance().trace() + b.covariance().trace();
    Ok(means + traces - 2.0 * trace_of_product_root(a.covariance(), b.covariance())?)
}

/// `tr sqrt(a b)` of two covariances, `[dim, dim]` each.
fn trace_of_product_root(a: &DMatrix<f64>, b: &DMatrix<f64>) -> Result<f64, EvaluationError> {
    let least = AtomicUsize::new(usize::MAX);
    let factors = rayon::join(|| cholesky(a, &least), || cholesky(b, &least));
    let rank = |factor: &Option<DMatrix<f64>>| factor.as_ref().map_or(usize::MAX, DMatrix::ncols);
    let (factor, lower, other) = if rank(&factors.1) < rank(&factors.0) {
        (factors.1, b, a)
    } else {
        (factors.0, a, b)
    };
    let factor = match factor.filter(|factor| is_factor(factor, lower)) {
        Some(factor) => factor,
        None => eigen_factor(lower)?,
    };
    let inner = product(&factor.transpose(), &product(other, &factor));
    let roots = eigenvalues(inner)?;
    Ok(roots.iter().map(|value| value.max(0.0).sqrt()).sum())
}

/// `a b`, on all cores.
fn product(a: &DMatrix<f64>, b: &DMatrix<f64>) -> DMatrix<f64> {
    let (rows, columns) = (a.nrows(), b.ncols());
    let mut product = DMatrix::zeros(rows, columns);
    if rows == 0 {
        return product;
    }
    let panels = product.as_mut_slice().par_chunks_mut(rows * PANEL_COLUMNS);
    panels.enumerate().for_each(|(panel, values)| {
        let columns = values.len() / rows;
        let mut view = DMatrixViewMut::from_slice(values, rows, columns);
        view.gemm(1.0, a, &b.columns(panel * PANEL_COLUMNS, columns), 0.0);
    });
    product
}

/// Size below which a remainder of a covariance counts as rounding.
fn rounding(a: &DMatrix<f64>) -> f64 {
    a.nrows() as f64 * f64::EPSILON * a.amax()
}

/// `F` with `F F^T = a`, `[dim, rank]`, by Cholesky's decomposition with pivots (Higham, "Accuracy
/// and Stability of Numerical Algorithms", section 10.3). The caller must check it by
/// [`is_factor`]: if `a` is not positive semidefinite to the precision of `f64`, such as a
/// covariance that was stored as `f32`, the result is meaningless.
///
/// `least` is the lowest rank found so far, shared with other threads. None if this rank is higher.
fn cholesky(a: &DMatrix<f64>, least: &AtomicUsize) -> Option<DMatrix<f64>> {
    let dim = a.nrows();
    let rounding = rounding(a);
    // Row `i` of the factor belongs to row `order[i]` of `a`; `rest` is the diagonal minus the
    // factor's part.
    let mut order: Vec<usize> = (0..dim).collect();
    let mut rest: Vec<f64> = a.diagonal().iter().copied().collect();
    let mut factor = DMatrix::zeros(dim, dim);
    let mut rank = 0;
    while let Some(pivot) = (rank..dim).max_by(|&i, &j| rest[i].total_cmp(&rest[j])) {
        if rest[pivot].is_nan() || rest[pivot] <= rounding {
            break;
        }
        // A factor of equal rank is still returned: the choice must not depend on which is faster.
        if rank >= least.load(Ordering::Relaxed) {
            return None;
        }
        order.swap(rank, pivot);
        rest.swap(rank, pivot);
        factor.swap_rows(rank, pivot);
        let of_pivot = a.column(order[rank]);
        let values = order[rank..].iter().map(|&row| of_pivot[row]);
        let mut column = DVector::from_iterator(dim - rank, values);
        let done = factor.view((rank, 0), (dim - rank, rank));
        column.gemv(-1.0, &done, &done.row(0).transpose(), 1.0);
        column /= rest[rank].sqrt();
        column[0] = rest[rank].sqrt();
        for (rest, value) in rest[rank..].iter_mut().zip(&column) {
            *rest -= value * value;
        }
        factor
            .view_mut((rank, rank), (dim - rank, 1))
            .copy_from(&column);
        rank += 1;
    }
    least.fetch_min(rank, Ordering::Relaxed);
    let mut sorted = DMatrix::zeros(dim, rank);
    for (row, &place) in order.iter().enumerate() {
        sorted
            .row_mut(place)
            .copy_from(&factor.view((row, 0), (1, rank)));
    }
    Some(sorted)
}

/// Whether `factor factor^T` is `a` up to ten times the rounding of [`rounding`].
fn is_factor(factor: &DMatrix<f64>, a: &DMatrix<f64>) -> bool {
    let most = 10.0 * rounding(a);
    let left = a - product(factor, &factor.transpose());
    left.iter().all(|value| value.abs() <= most)
}

/// `F` with `F F^T = a`, `[dim, rank]`, by eigenvectors, which also work for a matrix that is off
/// by more than rounding. Those with eigenvalues that are zero to the precision of `f64` are left
/// out.
fn eigen_factor(a: &DMatrix<f64>) -> Result<DMatrix<f64>, EvaluationError> {
    let SymmetricEigen {
        eigenvalues,
        eigenvectors,
    } = eigen(a.clone())?;
    let rounding = a.nrows() as f64 * f64::EPSILON * eigenvalues.max();
    let columns: Vec<DVector<f64>> = (eigenvectors.column_iter().zip(&eigenvalues))
        .filter(|(_, value)| **value > rounding)
        .map(|(column, value)| column * value.sqrt())
        .collect();
    if columns.is_empty() {
        return Ok(DMatrix::zeros(a.nrows(), 0));
    }
    Ok(DMatrix::from_columns(&columns))
}

/// Eigenvalues of a positive semidefinite matrix, ascending; some may be below zero by rounding.
///
/// The matrix is reduced to tridiagonal form, whose eigenvalues are found one by one by bisection
/// (Givens 1954; Golub and Van Loan, "Matrix Computations", section 8.4.1). That is a third of the
/// work of a decomposition with eigenvectors, runs on all cores, and always converges.
fn eigenvalues(matrix: DMatrix<f64>) -> Result<Vec<f64>, EvaluationError> {
    let most = check_finite(&matrix)?;
    let dim = matrix.nrows();
    if dim == 0 || most == 0.0 {
        return Ok(vec![0.0; dim]);
    }
    // Scaled to size one, nothing below can overflow.
    let (diagonal, beside) = match dim {
        1 => (vec![matrix[0] / most], vec![]),
        _ => {
            let tridiagonal = SymmetricTridiagonal::new(matrix / most);
            let (diagonal, beside) = (tridiagonal.diagonal(), tridiagonal.off_diagonal());
            (diagonal.as_slice().to_vec(), beside.as_slice().to_vec())
        }
    };
    let squares: Vec<f64> = beside.iter().map(|value| value * value).collect();
    // Sylvester's law of inertia: the number of eigenvalues below `x` is the number of negative
    // pivots of `T - x`.
    let below = |x: f64| {
        let mut pivot = 1.0;
        let mut count = 0;
        for (index, value) in diagonal.iter().enumerate() {
            let before = index.checked_sub(1).map_or(0.0, |before| squares[before]);
            pivot = value - x - before / pivot;
            if pivot == 0.0 {
                pivot = f64::MIN_POSITIVE;
            }
            count += usize::from(pivot < 0.0);
        }
        count
    };
    // Gershgorin: the magnitude of an eigenvalue is at most the largest row sum.
    let largest = |values: &[f64]| {
        values
            .iter()
            .fold(0.0f64, |most, value| most.max(value.abs()))
    };
    let bound = largest(&diagonal) + 2.0 * largest(&beside);
    let found = (0..dim).into_par_iter().map(|index| {
        let (mut low, mut high) = (-bound, bound);
        while high - low > f64::EPSILON * bound {
            let middle = low + (high - low) / 2.0;
            if below(middle) > index {
                high = middle;
            } else {
                low = middle;
            }
        }
        most * (low + high) / 2.0
    });
    let found: Vec<f64> = found.collect();
    check_positive(found[0], found[dim - 1])?;
    Ok(found)
}

/// The largest entry. Refuses NaN and infinities, with which an iteration would never end.
fn check_finite(matrix: &DMatrix<f64>) -> Result<f64, EvaluationError> {
    if matrix.iter().all(|value| value.is_finite()) {
        return Ok(matrix.amax());
    }
    let problem = "the entries are too large to be multiplied";
    Err(invalid("covariance", problem))
}

/// Refuses a smallest eigenvalue that is negative by more than rounding.
fn check_positive(least: f64, most: f64) -> Result<(), EvaluationError> {
    if least >= -NEGATIVE_TOLERANCE * most.abs() {
        return Ok(());
    }
    let problem = format!("eigenvalue {least:e} is negative (the largest is {most:e})");
    Err(invalid("covariance", &problem))
}

/// Eigendecomposition of a positive semidefinite matrix; eigenvalues that are negative by rounding
/// are set to zero.
fn eigen(matrix: DMatrix<f64>) -> Result<SymmetricEigen<f64, nalgebra::Dyn>, EvaluationError> {
    check_finite(&matrix)?;
    let sweeps = 100 * matrix.nrows().max(1);
    let mut eigen = SymmetricEigen::try_new(matrix, f64::EPSILON, sweeps)
        .ok_or_else(|| invalid("covariance", "the eigenvalues do not converge"))?;
    check_positive(eigen.eigenvalues.min(), eigen.eigenvalues.max())?;
    eigen.eigenvalues.apply(|value| *value = value.max(0.0));
    Ok(eigen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statistics(mean: &[f64], covariance: &[f64]) -> Statistics {
        Statistics::from_moments(mean.to_vec(), covariance.to_vec()).unwrap()
    }

    /// `x x^T / columns` with pseudorandom entries: a covariance of that rank.
    fn covariance(dim: usize, rank: usize) -> DMatrix<f64> {
        let x = DMatrix::from_fn(dim, rank, |i, j| {
            ((1 + i * 31 + j * 17 + i * j) as f64).sin()
        });
        &x * x.transpose() / rank as f64
    }

    #[test]
    fn diagonal_covariances_by_hand() {
        let a = statistics(&[0.0, 0.0], &[4.0, 0.0, 0.0, 9.0]);
        let b = statistics(&[1.0, 2.0], &[1.0, 0.0, 0.0, 16.0]);
        // (1 + 4) + (2 - 1)^2 + (3 - 4)^2, where only the square roots round.
        assert!((frechet_distance(&a, &b).unwrap() - 7.0).abs() < 1e-12);
        assert!(frechet_distance(&a, &a).unwrap().abs() < 1e-12);
    }

    #[test]
    fn singular_covariances_by_hand() {
        // Rank one each: x x^T and y y^T with x = (1, 1), y = (2, 0); tr sqrt = |x . y| = 2.
        let a = statistics(&[0.0, 0.0], &[1.0, 1.0, 1.0, 1.0]);
        let b = statistics(&[0.0, 0.0], &[4.0, 0.0, 0.0, 0.0]);
        let zero = statistics(&[0.0, 0.0], &[0.0; 4]);
        assert!((frechet_distance(&a, &b).unwrap() - 2.0).abs() < 1e-7);
        assert_eq!(frechet_distance(&b, &zero).unwrap(), 4.0);
        assert_eq!(frechet_distance(&zero, &zero).unwrap(), 0.0);
    }

    /// Cholesky's factor, with no bound on the rank.
    fn alone(a: &DMatrix<f64>) -> DMatrix<f64> {
        cholesky(a, &AtomicUsize::new(usize::MAX)).unwrap()
    }

    #[test]
    fn factors_and_eigenvalues_are_the_eigensolvers() {
        for (dim, rank) in [(1, 1), (2, 1), (7, 7), (40, 60), (40, 12), (90, 3)] {
            let a = covariance(dim, rank);
            let factor = alone(&a);
            assert!(is_factor(&factor, &a));
            assert_eq!(
                factor.shape(),
                (dim, rank.min(dim)),
                "one column for each rank"
            );
            let rounding = 1e-13 * a.amax(); // dim eps, with some room
            assert!((&factor * factor.transpose() - &a).amax() < rounding);
            let slow = eigen_factor(&a).unwrap();
            assert!((&slow * slow.transpose() - &a).amax() < 10.0 * rounding);

            let mut expected: Vec<f64> = eigen(a.clone()).unwrap().eigenvalues.data.into();
            expected.sort_by(f64::total_cmp);
            let found = eigenvalues(1e200 * &a).unwrap();
            for (found, expected) in found.iter().zip(&expected) {
                assert!((1e-200 * found - expected).abs() < 1e-13 * expected.max(dim as f64));
            }
        }
        assert!(alone(&DMatrix::zeros(3, 3)).is_empty());
        // The search goes on at a rank equal to the lowest found so far, and stops above it.
        let a = covariance(40, 12);
        assert!(cholesky(&a, &AtomicUsize::new(12)).is_some());
        assert!(cholesky(&a, &AtomicUsize::new(11)).is_none());
    }

    /// `a` reflected at a hyperplane (Householder), so that its axes are not the coordinate axes;
    /// traces stay the same.
    fn mirrored(a: &DMatrix<f64>) -> DMatrix<f64> {
        let dim = a.nrows();
        let normal = DVector::from_fn(dim, |i, _| ((1 + 7 * i) as f64).sin()).normalize();
        let mirror = DMatrix::identity(dim, dim) - 2.0 * &normal * normal.transpose();
        let turned = &mirror * a * &mirror;
        (&turned + turned.transpose()) / 2.0
    }

    #[test]
    fn directions_that_one_side_lacks_add_no_rounding() {
        // One covariance of full rank and one of rank 12, diagonal in the same basis: the trace is
        // a sum of known square roots.
        let (dim, rank) = (300, 12);
        let full = DVector::from_fn(dim, |i, _| 1.0 + (i as f64).cos() / 2.0);
        let low = DVector::from_fn(dim, |i, _| if i < rank { 1.0 + i as f64 } else { 0.0 });
        let expected: f64 = full.iter().zip(&low).map(|(a, b)| (a * b).sqrt()).sum();
        let [full, low] = [full, low].map(|values| mirrored(&DMatrix::from_diagonal(&values)));
        for (a, b) in [(&full, &low), (&low, &full)] {
            let error = trace_of_product_root(a, b).unwrap() / expected - 1.0;
            // If the full side were factored, 288 square roots of about 1e-16 would add up to 1e-7.
            assert!(error.abs() < 1e-12, "{error:e}");
        }
    }

    #[test]
    fn few_samples_against_full_statistics_are_exact() {
        // By another formula: with `S_a = L L^T` and `S_b = X X^T` the trace is the sum of the
        // singular values of `L^T X` (the nuclear norm). They are computed without squaring, so the
        // zero ones are zero to 1e-16.
        let (dim, rows) = (96, 20);
        let data: Vec<f32> = (0..rows * dim)
            .map(|i| ((i * i % 977) as f32).sin() + (i % dim) as f32 / 50.0)
            .collect();
        let full = covariance(dim, 3 * dim) + DMatrix::identity(dim, dim) * 0.01;
        let mean = DVector::from_fn(dim, |i, _| (i as f64).sin());
        let mut samples = super::super::StatisticsAccumulator::new(dim);
        samples
            .push(&super::super::Features::new(dim, data.clone()).unwrap())
            .unwrap();
        let samples = samples.finish().unwrap();

        let values = data.iter().map(|&value| f64::from(value));
        let mut centred = DMatrix::from_iterator(dim, rows, values);
        let middle = centred.column_mean();
        centred
            .column_iter_mut()
            .for_each(|mut column| column -= &middle);
        centred /= ((rows - 1) as f64).sqrt();
        let lower = full.clone().cholesky().unwrap().l();
        let trace = (lower.transpose() * &centred).singular_values().sum();
        let expected =
            (&mean - middle).norm_squared() + full.trace() + centred.norm_squared() - 2.0 * trace;

        let full = statistics(mean.as_slice(), full.as_slice());
        for (a, b) in [(&full, &samples), (&samples, &full)] {
            let distance = frechet_distance(a, b).unwrap();
            // Sums of 96 squares in another order; factoring the full side would be off by 1e-9 and
            // more.
            assert!(
                (distance / expected - 1.0).abs() < 1e-12,
                "{distance} {expected}"
            );
        }
    }

    #[test]
    fn covariances_that_were_rounded_are_still_compared() {
        // Rank 12 of 40, stored as f32: it has negative eigenvalues of 1e-8, at which Cholesky's
        // decomposition fails.
        let exact = covariance(40, 12);
        let rounded = exact.map(|value| f64::from(value as f32));
        assert!(!is_factor(&alone(&rounded), &rounded));
        let of = |covariance: DMatrix<f64>| statistics(&[0.0; 40], covariance.as_slice());
        // The square root turns 1e-8 into 1e-4, in each of 28 directions.
        for (a, b) in [(&exact, &rounded), (&rounded, &exact), (&rounded, &rounded)] {
            let distance = frechet_distance(&of(a.clone()), &of(b.clone())).unwrap();
            assert!(distance.abs() < 28e-4, "{distance}");
        }
    }

    #[test]
    fn bad_input_is_an_error() {
        let one = statistics(&[0.5], &[0.5]);
        let two = statistics(&[1.0, 2.0], &[2.0, 2.0, 2.0, 2.0]);
        assert!(matches!(
            frechet_distance(&one, &two),
            Err(EvaluationError::Shape { .. })
        ));
        let negative = statistics(&[0.0, 0.0], &[1.0, 0.0, 0.0, -1.0]);
        assert!(frechet_distance(&negative, &two).is_err());
        let huge = statistics(&[0.0], &[1e300]);
        assert!(frechet_distance(&huge, &huge).is_err());
    }
}
