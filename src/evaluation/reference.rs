//! What samples are held against.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zip::ZipWriter;

use super::archive::{Archive, write_array};
use super::{
    EvaluationError, Features, FileDigest, ReferenceStatistics, SampleReader, Statistics, measure,
    read_reference_statistics,
};
use crate::atomic::AtomicFile;
use crate::models::inception::{Inception, POOLED, SPATIAL};
use crate::ops::FusedOps;

/// An open reference batch of the ADM suite, such as `VIRTUAL_imagenet256_labeled.npz`.
///
/// As `evaluator.py` has it, FID and sFID take the moments that the archive states (`mu`, `sigma`, `mu_s`, `sigma_s`)
/// if it does, else those of its pictures (`arr_0`); precision and recall need the pictures.
pub struct Reference {
    moments: Option<ReferenceStatistics>,
    pictures: Option<SampleReader>,
}

/// Where a reference's moments come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Moments {
    /// The archive states them.
    Stated,
    /// They are those of its pictures, as this program's Inception sees them.
    Measured,
}

/// A reference as samples are compared with it.
#[derive(Clone, Debug, PartialEq)]
pub struct ReferenceMeasured {
    /// Moments of the pooled activations, `[2048]`: FID's.
    pub pooled: Statistics,
    /// Moments of the spatial activations, `[2023]`: sFID's.
    pub spatial: Statistics,
    /// The pooled activations `[pictures, 2048]`; none when the archive has moments alone. Without them there are no
    /// precision and recall.
    pub features: Option<Features>,
    /// Where the moments come from.
    pub moments: Moments,
}

impl Reference {
    /// Opens a reference; its pictures are not read yet.
    ///
    /// # Errors
    ///
    /// Those of [`read_reference_statistics`] and [`SampleReader::open`], and [`EvaluationError::Array`] when the
    /// archive has neither moments nor pictures, or moments of another network's activations.
    pub fn open(path: &Path) -> Result<Self, EvaluationError> {
        let moments = read_reference_statistics(path)?;
        if let Some(moments) = &moments {
            for (array, moments, dim) in [
                ("mu", &moments.pooled, POOLED),
                ("mu_s", &moments.spatial, SPATIAL),
            ] {
                if moments.mean().len() != dim {
                    return Err(EvaluationError::Array {
                        path: path.to_owned(),
                        array: array.to_owned(),
                        expected: format!("the shape [{dim}], as Inception's activations have"),
                        found: format!("the shape [{}]", moments.mean().len()),
                    });
                }
            }
        }
        let alone = moments.is_some() && !Archive::open(path)?.contains("arr_0");
        let pictures = (!alone).then(|| SampleReader::open(path)).transpose()?;
        Ok(Self { moments, pictures })
    }

    /// How many pictures it has; none when it has moments alone.
    pub fn pictures(&self) -> Option<usize> {
        self.pictures.as_ref().map(|pictures| pictures.shape()[0])
    }

    /// Reads the pictures, if there are any, through the network; arguments and `progress` as [`measure`]'s.
    ///
    /// # Errors
    ///
    /// As [`measure`].
    pub fn measure<B: FusedOps>(
        self,
        inception: &Inception<B>,
        batch: usize,
        progress: impl FnMut(usize),
    ) -> Result<ReferenceMeasured, EvaluationError> {
        let measured = self
            .pictures
            .map(|pictures| measure(inception, pictures, batch, progress))
            .transpose()?;
        let (features, measured) = match measured {
            Some(measured) => {
                let (pooled, spatial) = (measured.pooled, measured.spatial);
                let moments = ReferenceStatistics { pooled, spatial };
                (Some(measured.features), Some(moments))
            }
            None => (None, None),
        };
        let (source, moments) = match (self.moments, measured) {
            (Some(stated), _) => (Moments::Stated, stated),
            (None, Some(measured)) => (Moments::Measured, measured),
            // `open` refuses an archive with neither; there is nothing to measure in none.
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

    /// As [`measure`](Self::measure), but what was measured is kept in the file `cache` ([`cache_file`]) and read from
    /// there the next time. A reference of moments alone needs no cache and makes none.
    ///
    /// # Errors
    ///
    /// As [`measure`], and when the file can't be written or holds something else; delete it then.
    pub fn measure_cached<B: FusedOps>(
        self,
        inception: &Inception<B>,
        cache: &Path,
        batch: usize,
        progress: impl FnMut(usize),
    ) -> Result<ReferenceMeasured, EvaluationError> {
        let Some(pictures) = self.pictures() else {
            return self.measure(inception, batch, progress);
        };
        if cache.is_file() {
            let moments = match self.moments {
                Some(_) => Moments::Stated,
                None => Moments::Measured,
            };
            return ReferenceMeasured::read(cache, pictures, moments);
        }
        let measured = self.measure(inception, batch, progress)?;
        measured.write(cache)?;
        Ok(measured)
    }
}

/// Changes when what is kept, or how it is computed, changes.
const CACHE_VERSION: u32 = 1;

/// The file in `folder` that keeps what was measured of that reference with these weights.
pub fn cache_file(folder: &Path, reference: &FileDigest, inception: &FileDigest) -> PathBuf {
    let short = |digest: &FileDigest| digest.sha256.chars().take(16).collect::<String>();
    folder.join(format!(
        "reference-v{CACHE_VERSION}-{}-{}.npz",
        short(reference),
        short(inception)
    ))
}

impl ReferenceMeasured {
    /// Keeps the moments, and the features if there are any.
    pub(super) fn write(&self, path: &Path) -> Result<(), EvaluationError> {
        let write = || -> io::Result<()> {
            let mut archive = ZipWriter::new(AtomicFile::create(path)?);
            let moments = [
                ("mu", "sigma", &self.pooled),
                ("mu_s", "sigma_s", &self.spatial),
            ];
            for (mean, covariance, moments) in moments {
                let doubles = |values: &[f64]| -> Vec<u8> {
                    values
                        .iter()
                        .flat_map(|value| value.to_le_bytes())
                        .collect()
                };
                let dim = moments.mean().len();
                let values = doubles(moments.mean().as_slice());
                write_array(&mut archive, mean, "<f8", &[dim], &values)?;
                // Column by column, and read back so: symmetric but for rounding, which is kept.
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

    fn read(path: &Path, pictures: usize, moments: Moments) -> Result<Self, EvaluationError> {
        let mut archive = Archive::open(path)?;
        let pool = archive.required("pool")?;
        if pool.shape != [pictures, POOLED] {
            let expected = format!("the shape [{pictures}, {POOLED}] of the reference's features");
            return Err(pool.mismatch(&expected));
        }
        let features = Features::new(POOLED, pool.values("<f4", f32::from_le_bytes)?)?;
        let Some(statistics) = read_reference_statistics(path)? else {
            return Err(archive.required("mu")?.mismatch("the measured moments"));
        };
        Ok(Self {
            pooled: statistics.pooled,
            spatial: statistics.spatial,
            features: Some(features),
            moments,
        })
    }
}
