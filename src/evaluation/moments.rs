//! Precomputed statistics from an `.npz`, the exchange format of the ADM evaluation suite.
//!
//! Beside or instead of the pictures in `arr_0`, reference batches hold the statistics of their
//! activations: `mu` `[2048]`, `sigma` `[2048, 2048]` for FID and `mu_s`, `sigma_s` (2023) for
//! sFID. Many files (those of pytorch-fid, `adm_in256_stats.npz` of MAR) hold only the first two.

use std::path::Path;

use super::{EvaluationError, Statistics};
use crate::npz::archive::Archive;

/// Precomputed statistics of a reference batch.
#[derive(Clone, Debug, PartialEq)]
pub struct ReferenceStatistics {
    /// `mu` and `sigma`: the pooled activations, for FID.
    pub pooled: Statistics,
    /// `mu_s` and `sigma_s`: the spatial activations, for sFID; none when the archive has neither.
    pub spatial: Option<Statistics>,
}

/// Reads `mu`, `sigma`, `mu_s` and `sigma_s` (`f32` or `f64`), or `None` when the archive has none
/// of them and the statistics must be computed from `arr_0`.
///
/// # Errors
///
/// [`EvaluationError::Npz`] when the file is not a readable archive, when a mean or covariance is
/// present without the other or `mu_s` without `mu`, or when one has the wrong type or shape; and
/// the errors of [`Statistics::from_moments`].
pub fn read_reference_statistics(
    path: &Path,
) -> Result<Option<ReferenceStatistics>, EvaluationError> {
    let mut archive = Archive::open(path)?;
    let holds = |archive: &Archive<'_>, names: [&str; 2]| {
        names.into_iter().any(|name| archive.contains(name))
    };
    let has_spatial = holds(&archive, ["mu_s", "sigma_s"]);
    if !has_spatial && !holds(&archive, ["mu", "sigma"]) {
        return Ok(None);
    }
    let mut moments = |mean: &str, covariance: &str| -> Result<_, EvaluationError> {
        let mean = archive.required(mean)?;
        let &[dim] = mean.shape.as_slice() else {
            return Err(mean.mismatch("the shape [dim]").into());
        };
        let covariance = archive.required(covariance)?;
        if covariance.shape != [dim, dim] {
            let expected = format!("the shape [{dim}, {dim}], as its mean has");
            return Err(covariance.mismatch(&expected).into());
        }
        Statistics::from_moments(mean.floats()?, covariance.floats()?)
    };
    let pooled = moments("mu", "sigma")?;
    let spatial = has_spatial.then(|| moments("mu_s", "sigma_s"));
    let spatial = spatial.transpose()?;
    Ok(Some(ReferenceStatistics { pooled, spatial }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::npz::archive::testing::{archive, npy};

    #[test]
    fn a_mean_and_its_covariance_come_together() {
        let mean = npy("<f8", &[1], &1.5f64.to_le_bytes());
        let covariance = npy("<f4", &[1, 1], &2.5f32.to_le_bytes());
        let read = |names: &[&str]| {
            let member = |name: &&str| {
                let array = if name.starts_with("mu") {
                    &mean
                } else {
                    &covariance
                };
                (format!("{name}.npy"), array.clone())
            };
            let members: Vec<(String, Vec<u8>)> = names.iter().map(member).collect();
            let members: Vec<(&str, Vec<u8>)> = (members.iter())
                .map(|(name, array)| (name.as_str(), array.clone()))
                .collect();
            let (_folder, path) = archive(&members);
            read_reference_statistics(&path)
        };
        for (names, missing) in [
            (&["mu"][..], "sigma"),
            (&["sigma"], "mu"),
            (&["mu", "sigma", "mu_s"], "sigma_s"),
            (&["mu", "sigma", "sigma_s"], "mu_s"),
            (&["mu_s", "sigma_s"], "mu"),
        ] {
            let message = read(names).unwrap_err().to_string();
            let expected = format!("array `{missing}`: expected a member {missing}.npy");
            assert!(message.contains(&expected), "{message}");
        }
        assert_eq!(read(&["arr_0"]).unwrap(), None);

        let alone = read(&["mu", "sigma"]).unwrap().unwrap();
        assert_eq!(
            (alone.pooled.mean()[0], alone.pooled.covariance()[0]),
            (1.5, 2.5)
        );
        assert_eq!(alone.spatial, None);
        let both = read(&["mu", "sigma", "mu_s", "sigma_s"]).unwrap().unwrap();
        assert_eq!(both.pooled, alone.pooled);
        assert_eq!(both.spatial, Some(both.pooled));
    }
}
