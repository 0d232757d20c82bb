//! Pictures and statistics as `.npz` archives, the exchange format of the ADM evaluation suite.
//!
//! An `.npz` is a zip of `.npy` members (NumPy Enhancement Proposal 1). Sample batches hold `arr_0`,
//! `u8` `[count, height, width, 3]`, and with class labels `arr_1`, `i64` `[count]`. Reference batches
//! hold `arr_0` and the statistics of the activations: `mu` `[2048]`, `sigma` `[2048, 2048]` for FID
//! and `mu_s`, `sigma_s` (2023) for sFID.

use std::io::{self, Write};
use std::path::Path;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::archive::{Archive, member_name};
use super::{EvaluationError, Statistics};
use crate::atomic::write_atomic;
use crate::images::Images;
use crate::npy;

/// A batch of pictures and, where the archive has them, their classes.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples {
    /// `arr_0`, `[count, height, width, channels]`.
    pub images: Images,
    /// `arr_1`, `[count]`.
    pub labels: Option<Vec<i64>>,
}

/// Precomputed statistics of a reference batch.
#[derive(Clone, Debug, PartialEq)]
pub struct ReferenceStatistics {
    /// `mu` and `sigma`: the pooled activations, for FID.
    pub pooled: Statistics,
    /// `mu_s` and `sigma_s`: the spatial activations, for sFID.
    pub spatial: Statistics,
}

/// Reads `arr_0` and, if present, `arr_1`.
///
/// Members may be stored or deflated, in C or Fortran order. The pictures are held in memory: 2 GB
/// for the usual 10 000 reference pictures of 256 x 256, twice that in Fortran order.
///
/// # Errors
///
/// [`EvaluationError::Io`] when the file is not a readable archive, [`EvaluationError::Array`] when
/// `arr_0` is missing or not `u8` `[count, height, width, channels]`, or when `arr_1` is there and not
/// `i64` `[count]`.
pub fn read_samples(path: &Path) -> Result<Samples, EvaluationError> {
    let mut archive = Archive::open(path)?;
    let pixels = archive.required("arr_0")?;
    let &[count, height, width, channels] = pixels.shape.as_slice() else {
        return Err(pixels.mismatch("the shape [count, height, width, channels]"));
    };
    let pixels = pixels.values("|u1", |[byte]| byte)?;
    let images = Images::new(pixels, [count, height, width, channels])
        .map_err(|error| archive.io(io::Error::new(io::ErrorKind::InvalidData, error)))?;

    let labels = match archive.array("arr_1")? {
        Some(labels) if labels.shape != [count] => {
            return Err(labels.mismatch(&format!("the shape [{count}], one label per picture")));
        }
        Some(labels) => Some(labels.values("<i8", i64::from_le_bytes)?),
        None => None,
    };
    Ok(Samples { images, labels })
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

/// Writes `images` as `arr_0` and `labels` as `arr_1`, stored without compression as `numpy.savez`
/// does. The file appears whole or not at all.
///
/// # Errors
///
/// [`EvaluationError::Shape`] unless there is one label per picture, [`EvaluationError::Io`] when the
/// file cannot be written.
pub fn write_samples(
    path: &Path,
    images: &Images,
    labels: Option<&[i64]>,
) -> Result<(), EvaluationError> {
    let count = images.shape()[0];
    if let Some(labels) = labels
        && labels.len() != count
    {
        return Err(EvaluationError::Shape {
            what: "labels",
            expected: format!("{count}, one per picture"),
            found: labels.len().to_string(),
        });
    }
    write_atomic(path, |file| {
        let mut archive = ZipWriter::new(file);
        write_array(
            &mut archive,
            "arr_0",
            "|u1",
            &images.shape(),
            images.pixels(),
        )?;
        if let Some(labels) = labels {
            let bytes: Vec<u8> = labels
                .iter()
                .flat_map(|label| label.to_le_bytes())
                .collect();
            write_array(&mut archive, "arr_1", "<i8", &[count], &bytes)?;
        }
        archive.finish()?;
        Ok(())
    })
    .map_err(|source| EvaluationError::Io {
        path: path.to_owned(),
        source,
    })
}

fn write_array<W: Write + io::Seek>(
    archive: &mut ZipWriter<W>,
    name: &str,
    descr: &str,
    shape: &[usize],
    data: &[u8],
) -> io::Result<()> {
    let header = npy::header(descr, shape);
    let size = header.len() as u64 + data.len() as u64;
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .large_file(size > u64::from(u32::MAX));
    archive.start_file(member_name(name), options)?;
    archive.write_all(&header)?;
    archive.write_all(data)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::PathBuf;

    use super::*;
    use crate::npy::header;

    /// An archive with these members, and its path.
    fn archive(members: &[(&str, Vec<u8>)]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("batch.npz");
        let mut zip = ZipWriter::new(File::create(&path).unwrap());
        for (name, bytes) in members {
            zip.start_file(*name, SimpleFileOptions::default()).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
        (folder, path)
    }

    fn npy(descr: &str, shape: &[usize], data: &[u8]) -> Vec<u8> {
        [header(descr, shape), data.to_vec()].concat()
    }

    fn read_error(members: &[(&str, Vec<u8>)]) -> String {
        let (_folder, path) = archive(members);
        let message = read_samples(&path).unwrap_err().to_string();
        assert!(message.contains("batch.npz"), "{message}");
        message
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/samples.npz");
        let images = Images::new((0..24).collect(), [2, 2, 2, 3]).unwrap();
        let labels = vec![-1, i64::MAX];
        for labels in [None, Some(labels)] {
            write_samples(&path, &images, labels.as_deref()).unwrap();
            let samples = read_samples(&path).unwrap();
            assert_eq!(
                samples,
                Samples {
                    images: images.clone(),
                    labels
                }
            );
        }
        assert_eq!(read_reference_statistics(&path).unwrap(), None);
        assert!(write_samples(&path, &images, Some(&[1])).is_err());
    }

    #[test]
    fn errors_say_what_was_expected_and_found() {
        let pixels = || npy("|u1", &[1, 1, 2, 3], &[0; 6]);
        let cases = [
            (
                vec![("mu.npy", pixels())],
                "expected a member arr_0.npy, found only [\"mu.npy\"]",
            ),
            (
                vec![("arr_0.npy", npy("|u1", &[6], &[0; 6]))],
                "found '|u1' of shape [6]",
            ),
            (
                vec![("arr_0.npy", npy("<f4", &[1, 1, 1, 1], &[0; 4]))],
                "expected the type '|u1'",
            ),
            (
                vec![("arr_0.npy", npy("|u1", &[1, 1, 2, 3], &[0; 5]))],
                "found 5 bytes",
            ),
            (
                vec![("arr_0.npy", b"not an array".to_vec())],
                "expected a NumPy array",
            ),
            (vec![("arr_0.npy", vec![])], "expected a NumPy array"),
            (
                vec![
                    ("arr_0.npy", pixels()),
                    ("arr_1.npy", npy("<i8", &[2], &[0; 16])),
                ],
                "array `arr_1`: expected the shape [1]",
            ),
            (
                vec![("arr_0.npy", npy("|u1", &[1 << 44, 1 << 10, 1, 1], &[]))],
                "expected a size that fits the memory",
            ),
            (
                vec![("arr_0.npy", npy("|u1", &[1 << 60, 1 << 10, 1, 1], &[]))],
                "expected a size that can be addressed",
            ),
        ];
        for (members, expected) in cases {
            let message = read_error(&members);
            assert!(message.contains(expected), "{message}\nlacks {expected}");
        }
    }

    #[test]
    fn files_that_are_no_archives_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.npz");
        std::fs::write(&path, "hello").unwrap();
        assert!(matches!(
            read_samples(&path),
            Err(EvaluationError::Io { .. })
        ));
        assert!(read_samples(&folder.path().join("missing.npz")).is_err());
    }

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
