//! Precomputed statistics out of an `.npz`, the exchange format of the ADM evaluation suite.
//!
//! Reference batches hold, beside or instead of the pictures in `arr_0`, the statistics of their activations: `mu`
//! `[2048]`, `sigma` `[2048, 2048]` for FID and `mu_s`, `sigma_s` (2023) for sFID.

use std::path::Path;

use super::archive::Archive;
use super::{EvaluationError, Statistics};

/// Precomputed statistics of a reference batch.
#[derive(Clone, Debug, PartialEq)]
pub struct ReferenceStatistics {
    /// `mu` and `sigma`: the pooled activations, for FID.
    pub pooled: Statistics,
    /// `mu_s` and `sigma_s`: the spatial activations, for sFID.
    pub spatial: Statistics,
}

/// Reads `mu`, `sigma`, `mu_s` and `sigma_s` (`f32` or `f64`), or `None` when the archive has neither
/// `mu` nor `sigma` and the statistics must be computed from `arr_0`.
///
/// # Errors
///
/// [`EvaluationError::Io`] when the file is not a readable archive, [`EvaluationError::Array`] when
/// only some of the four are there or have the wrong type or shape, and the errors of
/// [`Statistics::from_moments`].
pub fn read_reference_statistics(
    path: &Path,
) -> Result<Option<ReferenceStatistics>, EvaluationError> {
    let mut archive = Archive::open(path)?;
    if !archive.contains("mu") && !archive.contains("sigma") {
        return Ok(None);
    }
    let mut moments = |mean: &str, covariance: &str| {
        let mean = archive.required(mean)?;
        let &[dim] = mean.shape.as_slice() else {
            return Err(mean.mismatch("the shape [dim]"));
        };
        let covariance = archive.required(covariance)?;
        if covariance.shape != [dim, dim] {
            return Err(covariance.mismatch(&format!("the shape [{dim}, {dim}], as its mean has")));
        }
        Statistics::from_moments(mean.floats()?, covariance.floats()?)
    };
    let pooled = moments("mu", "sigma")?;
    let spatial = moments("mu_s", "sigma_s")?;
    Ok(Some(ReferenceStatistics { pooled, spatial }))
}

#[cfg(test)]
mod tests {
    use super::super::archive::testing::{archive, npy};
    use super::*;

    #[test]
    fn statistics_come_whole_or_not_at_all() {
        let mean = npy("<f8", &[1], &1.5f64.to_le_bytes());
        let covariance = npy("<f4", &[1, 1], &2.5f32.to_le_bytes());
        let (_folder, path) =
            archive(&[("mu.npy", mean.clone()), ("sigma.npy", covariance.clone())]);
        let message = read_reference_statistics(&path).unwrap_err().to_string();
        assert!(message.contains("expected a member mu_s.npy"), "{message}");

        let (_folder, path) = archive(&[
            ("mu.npy", mean.clone()),
            ("sigma.npy", covariance.clone()),
            ("mu_s.npy", mean),
            ("sigma_s.npy", covariance),
        ]);
        let statistics = read_reference_statistics(&path).unwrap().unwrap();
        assert_eq!(statistics.pooled, statistics.spatial);
        assert_eq!(
            (
                statistics.pooled.mean()[0],
                statistics.pooled.covariance()[0]
            ),
            (1.5, 2.5)
        );
    }
}
