//! The reference of an evaluation.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zip::ZipWriter;

use super::{
    EvaluationError, Features, FileDigest, Reading, ReferenceStatistics, Statistics, measure,
    read_reference_statistics,
};
use crate::files::AtomicFile;
use crate::models::inception::{POOLED, SPATIAL};
use crate::npz::archive::{Archive, write_array};
use crate::npz::{NpzError, SampleReader};
use crate::ops::FusedOps;

/// An open reference batch of the ADM suite, such as `VIRTUAL_imagenet256_labeled.npz`.
///
/// As in `evaluator.py`, FID and sFID use the moments in the archive (`mu`, `sigma`, `mu_s`,
/// `sigma_s`) if it has them, else those of its pictures (`arr_0`); precision and recall need the
/// pictures. A folder of pictures is a reference too, and so is an archive of `mu` and `sigma`
/// alone, which gives only FID.
///
/// Moments in an archive are comparable with samples only if they were measured by the protocol
/// used here; nothing in the file says so.
pub struct Reference {
    moments: Option<ReferenceStatistics>,
    pictures: Option<SampleReader>,
}

/// Where a reference's moments come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MomentsFrom {
    /// Stored in the archive; how they were measured is not known here.
    Stated,
    /// Measured on its pictures by this program's Inception.
    Measured,
}

/// A reference, ready for comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct ReferenceMeasured {
    /// Moments of the pooled activations, `[2048]`, for FID.
    pub pooled: Statistics,
    /// Moments of the spatial activations, `[2023]`, for sFID; none when the archive has only `mu`
    /// and `sigma`.
    pub spatial: Option<Statistics>,
    /// The pooled activations `[pictures, 2048]`, for precision and recall; none when the archive
    /// has only moments.
    pub features: Option<Features>,
    /// Where the moments come from.
    pub moments: MomentsFrom,
}

impl Reference {
    /// Opens a reference; its pictures are not read yet.
    ///
    /// # Errors
    ///
    /// Those of [`read_reference_statistics`] and [`SampleReader::open`]; [`EvaluationError::Npz`]
    /// when the archive has neither moments nor pictures, moments of another network's activations,
    /// or pictures beside moments for FID alone: the result would not show whether its sFID comes
    /// from the pictures.
    pub fn open(path: &Path) -> Result<Self, EvaluationError> {
        if path.is_dir() {
            let pictures = Some(SampleReader::open(path)?);
            return Ok(Self {
                moments: None,
                pictures,
            });
        }
        let moments = read_reference_statistics(path)?;
        if let Some(moments) = &moments {
            for (array, moments, dim) in [
                ("mu", Some(&moments.pooled), POOLED),
                ("mu_s", moments.spatial.as_ref(), SPATIAL),
            ] {
                if let Some(moments) = moments
                    && moments.mean().len() != dim
                {
                    return Err(NpzError::Array {
                        path: path.to_owned(),
                        array: array.to_owned(),
                        expected: format!("the shape [{dim}], as Inception's activations have"),
                        found: format!("the shape [{}]", moments.mean().len()),
                    }
                    .into());
                }
            }
        }
        let mut archive = Archive::open(path)?;
        let alone = moments.is_some() && !archive.contains("arr_0");
        if moments
            .as_ref()
            .is_some_and(|moments| moments.spatial.is_none())
            && !alone
        {
            archive.required("mu_s")?;
        }
        let pictures = (!alone).then(|| SampleReader::open(path)).transpose()?;
        Ok(Self { moments, pictures })
    }

    /// Number of pictures; none when it has only moments.
    pub fn pictures(&self) -> Option<usize> {
        self.pictures.as_ref().map(|pictures| pictures.shape()[0])
    }

    /// Entries of a folder that were ignored because they are no pictures.
    pub fn ignored(&self) -> usize {
        self.pictures.as_ref().map_or(0, SampleReader::ignored)
    }

    /// Runs the network on the pictures, if there are any; arguments and `progress` as in
    /// [`measure`].
    ///
    /// # Errors
    ///
    /// As [`measure`].
    pub fn measure<B: FusedOps>(
        self,
        reading: &Reading<'_, B>,
        progress: impl FnMut(usize),
    ) -> Result<ReferenceMeasured, EvaluationError> {
        let measured = self
            .pictures
            .map(|pictures| measure(reading, pictures, progress))
            .transpose()?;
        let (features, measured) = match measured {
            Some(measured) => {
                let (pooled, spatial) = (measured.pooled, Some(measured.spatial));
                let moments = ReferenceStatistics { pooled, spatial };
                (Some(measured.features), Some(moments))
            }
            None => (None, None),
        };
        let (source, moments) = match (self.moments, measured) {
            (Some(stated), _) => (MomentsFrom::Stated, stated),
            (None, Some(measured)) => (MomentsFrom::Measured, measured),
            // `open` refuses an archive with neither.
            (None, None) => {
                return Err(EvaluationError::TooFew {
                    what: "a reference",
                    needed: 2,
                    found: 0,
                });
            }
        };
        Ok(ReferenceMeasured {
            pooled: moments.pooled,
            spatial: moments.spatial,
            features,
            moments: source,
        })
    }

    /// As [`measure`](Self::measure), but caches the result in the file `cache` ([`cache_file`])
    /// and reads it from there the next time. A reference of moments alone needs no cache and
    /// writes none.
    ///
    /// # Errors
    ///
    /// As [`measure`]; also when the cache can't be written or holds something else. Delete it
    /// then.
    pub fn measure_cached<B: FusedOps>(
        self,
        reading: &Reading<'_, B>,
        cache: &Path,
        progress: impl FnMut(usize),
    ) -> Result<ReferenceMeasured, EvaluationError> {
        let Some(pictures) = self.pictures() else {
            return self.measure(reading, progress);
        };
        if cache.is_file() {
            let moments = match self.moments {
                Some(_) => MomentsFrom::Stated,
                None => MomentsFrom::Measured,
            };
            return ReferenceMeasured::read(cache, pictures, moments);
        }
        let measured = self.measure(reading, progress)?;
        measured.write(cache)?;
        Ok(measured)
    }
}

/// To be raised whenever the contents of a cache file, or their computation, change.
const CACHE_VERSION: u32 = 1;

/// The cache file in `folder` for this reference, measured with these weights.
pub fn cache_file(folder: &Path, reference: &FileDigest, inception: &FileDigest) -> PathBuf {
    let short = |digest: &FileDigest| digest.sha256.chars().take(16).collect::<String>();
    folder.join(format!(
        "reference-v{CACHE_VERSION}-{}-{}.npz",
        short(reference),
        short(inception)
    ))
}

impl ReferenceMeasured {
    /// Writes the moments, and the features if there are any.
    pub(super) fn write(&self, path: &Path) -> Result<(), EvaluationError> {
        let write = || -> io::Result<()> {
            let mut archive = ZipWriter::new(AtomicFile::create(path)?);
            let moments = [
                ("mu", "sigma", Some(&self.pooled)),
                ("mu_s", "sigma_s", self.spatial.as_ref()),
            ];
            let moments =
                moments.map(|(mean, covariance, moments)| Some((mean, covariance, moments?)));
            for (mean, covariance, moments) in moments.into_iter().flatten() {
                let doubles = |values: &[f64]| -> Vec<u8> {
                    values
                        .iter()
                        .flat_map(|value| value.to_le_bytes())
                        .collect()
                };
                let dim = moments.mean().len();
                let values = doubles(moments.mean().as_slice());
                write_array(&mut archive, mean, "<f8", &[dim], &values)?;
                // Column-major, and read back so: the matrix is symmetric up to rounding, and the
                // rounding is kept.
                let values = doubles(moments.covariance().as_slice());
                write_array(&mut archive, covariance, "<f8", &[dim, dim], &values)?;
            }
            if let Some(features) = &self.features {
                let bytes = features.data().iter();
                let bytes: Vec<u8> = bytes.flat_map(|value| value.to_le_bytes()).collect();
                let shape = [features.rows(), features.dim()];
                write_array(&mut archive, "pool", "<f4", &shape, &bytes)?;
            }
            archive.finish()?.commit()
        };
        write().map_err(EvaluationError::io(path))
    }

    fn read(path: &Path, pictures: usize, moments: MomentsFrom) -> Result<Self, EvaluationError> {
        let mut archive = Archive::open(path)?;
        let pool = archive.required("pool")?;
        if pool.shape != [pictures, POOLED] {
            let expected = format!("the shape [{pictures}, {POOLED}] of the reference's features");
            return Err(pool.mismatch(&expected).into());
        }
        let features = Features::new(POOLED, pool.values("<f4", f32::from_le_bytes)?)?;
        for array in ["mu", "mu_s"] {
            archive.required(array)?;
        }
        let Some(statistics) = read_reference_statistics(path)? else {
            return Err(archive
                .required("mu")?
                .mismatch("the measured moments")
                .into());
        };
        Ok(Self {
            pooled: statistics.pooled,
            spatial: statistics.spatial,
            features: Some(features),
            moments,
        })
    }
}
