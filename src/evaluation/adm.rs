//! The ADM evaluation suite, from archives to its five numbers.
//!
//! [`measure`] runs Inception on the samples and [`Reference`] holds what they are compared with.
//! [`compare`] gives FID, sFID, the Inception Score, precision and recall, as `evaluator.py` prints
//! them.

use serde::{Deserialize, Serialize};

use super::reading::{Reading, WIDTHS};
use super::{
    DEFAULT_SPLIT_SIZE, Distances, EvaluationError, Features, InceptionScore, ReferenceMeasured,
    Statistics, StatisticsAccumulator, frechet_distance, precision_recall_with,
};
use crate::models::inception::{POOLED, SPATIAL};
use crate::npz::SampleReader;
use crate::ops::FusedOps;

/// Inception's results for a set of pictures.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Number of pictures.
    pub count: usize,
    /// Moments of the pooled activations, `[2048]`, for FID.
    pub pooled: Statistics,
    /// Moments of the spatial activations, `[2023]`, for sFID.
    pub spatial: Statistics,
    /// The Inception Score over splits of [`DEFAULT_SPLIT_SIZE`] pictures in the order of the
    /// archive.
    pub inception_score: f64,
    /// The pooled activations `[count, 2048]`, for precision and recall: 8 KiB a picture.
    pub features: Features,
}

/// Runs the network on the pictures left in `reader`.
///
/// Only one batch of pictures for each worker is in memory. `progress` is called after each with
/// the number read so far.
///
/// # Errors
///
/// Those of the reader; [`EvaluationError::Pictures`] for pictures that the network can't read,
/// [`EvaluationError::Value`] when its activations aren't finite, [`EvaluationError::TooFew`] for
/// fewer than two pictures, and [`EvaluationError::Interrupted`] when a stop is requested.
pub fn measure<B: FusedOps>(
    reading: &Reading<'_, B>,
    mut reader: SampleReader,
    mut progress: impl FnMut(usize),
) -> Result<Measured, EvaluationError> {
    let path = reader.path().to_owned();
    let mut pooled = StatisticsAccumulator::new(POOLED);
    let mut spatial = StatisticsAccumulator::new(SPATIAL);
    let mut score = InceptionScore::new(DEFAULT_SPLIT_SIZE);
    let (mut features, mut count) = (Vec::new(), 0);
    loop {
        let batches = reading.next(&mut reader)?;
        if batches.is_empty() {
            break;
        }
        if reading.stop.requested() {
            return Err(EvaluationError::Interrupted);
        }
        let unreadable = |source| EvaluationError::Pictures {
            path: path.clone(),
            source,
        };
        let read = reading.read(&batches).map_err(unreadable)?;
        for (images, values) in batches.iter().zip(read) {
            let mut widths = WIDTHS.into_iter();
            let [pool, spaces, probabilities] = values.map(|values| {
                let width = widths.next().unwrap_or_default();
                Features::new(width, values).map_err(|error| EvaluationError::Value {
                    what: "activations",
                    problem: format!("{}: pictures from {count} on: {error}", path.display()),
                })
            });
            let pool = pool?;
            pooled.push(&pool)?;
            spatial.push(&spaces?)?;
            score.push(&probabilities?)?;
            features.extend_from_slice(pool.data());
            count += images.shape()[0];
            progress(count);
        }
    }
    Ok(Measured {
        count,
        pooled: pooled.finish()?,
        spatial: spatial.finish()?,
        inception_score: score.finish()?,
        features: Features::new(POOLED, features)?,
    })
}

/// The scores of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Fréchet distance of the pooled activations; lower is better.
    pub fid: f64,
    /// Fréchet distance of the spatial activations; lower is better. None when the reference lacks
    /// their statistics.
    pub sfid: Option<f64>,
    /// At least 1; higher is better.
    pub inception_score: f64,
    /// Share of the samples on the reference's manifold; none when the reference has only
    /// statistics.
    pub precision: Option<f64>,
    /// Share of the reference on the samples' manifold; none when the reference has only
    /// statistics.
    pub recall: Option<f64>,
}

/// Compares samples with a reference. The balls of the manifolds reach to the `neighbours`-th
/// nearest point ([`DEFAULT_NEIGHBOURS`](super::DEFAULT_NEIGHBOURS) in published numbers);
/// `distances` is their arithmetic. All activations of both sides are used.
///
/// # Errors
///
/// Those of [`frechet_distance`] and [`precision_recall_with`].
pub fn compare(
    reference: &ReferenceMeasured,
    samples: &Measured,
    neighbours: usize,
    distances: Distances,
) -> Result<Scores, EvaluationError> {
    let features = reference.features.as_ref();
    let manifolds = features
        .map(|features| precision_recall_with(features, &samples.features, neighbours, distances))
        .transpose()?;
    let spatial = reference.spatial.as_ref();
    let sfid = spatial.map(|spatial| frechet_distance(spatial, &samples.spatial));
    Ok(Scores {
        fid: frechet_distance(&reference.pooled, &samples.pooled)?,
        sfid: sfid.transpose()?,
        inception_score: samples.inception_score,
        precision: manifolds.map(|manifolds| manifolds.precision),
        recall: manifolds.map(|manifolds| manifolds.recall),
    })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::path::{Path, PathBuf};
    use std::sync::LazyLock;

    use burn_ndarray::NdArray;

    use super::*;
    use crate::evaluation::{
        FileDigest, MomentsFrom, Reference, cache_file, read_reference_statistics,
    };
    use crate::images::Images;
    use crate::models::Inception;
    use crate::models::inception::formula_weights;
    use crate::npz::write_samples;
    use crate::state::{Tensors, WeightsError};
    use crate::stop::Stop;
    use crate::weights::{read_inception, write_torch};
    use crate::workers::{Alone, fake};

    /// The network with the formula's weights, read from a file.
    static INCEPTION: LazyLock<Inception<NdArray>> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("inception.pth");
        write_torch(&path, &Tensors::from(formula_weights(0)), None).unwrap();
        read_inception(&path, &Default::default()).unwrap().network
    });

    /// An archive of pictures of 20 x 24, each with waves of another length.
    fn archive(folder: &Path, name: &str, count: usize, channels: usize, salt: usize) -> PathBuf {
        let path = folder.join(name);
        let values = (0..count * 20 * 24 * channels).map(|index| {
            let (place, picture) = (index / channels % (20 * 24), index / channels / (20 * 24));
            let wave = (3 + picture + salt) as f32 * (place / 24 + 2 * (place % 24)) as f32;
            (127.5 + 127.0 * (wave / 25.0 + (index % channels) as f32).sin()) as u8
        });
        let images = Images::new(values.collect(), [count, 20, 24, channels]).unwrap();
        write_samples(&path, &images, None).unwrap();
        path
    }

    fn reading(batch: usize, stop: &Stop) -> Reading<'_, NdArray> {
        Reading {
            inception: &INCEPTION,
            batch,
            workers: &Alone,
            stop,
        }
    }

    fn measured(path: &Path, batch: usize) -> (Measured, Vec<usize>) {
        let steps = RefCell::new(Vec::new());
        let reader = SampleReader::open(path).unwrap();
        let measured = measure(&reading(batch, &Stop::default()), reader, |done| {
            steps.borrow_mut().push(done);
        });
        (measured.unwrap(), steps.into_inner())
    }

    #[test]
    fn from_archives_to_scores() {
        let folder = tempfile::tempdir().unwrap();
        let path = archive(folder.path(), "a.npz", 4, 3, 0);
        let (samples, steps) = measured(&path, 3);
        assert_eq!(steps, [3, 4]);
        assert_eq!(samples.count, 4);
        assert_eq!(samples.features.rows(), 4);
        assert!(samples.inception_score >= 1.0 && samples.inception_score < 4.0);

        // The same pictures as a reference, in other batches; the second time, the cache replaces
        // the network.
        let digest = FileDigest::of(&path).unwrap();
        let cache = cache_file(&folder.path().join("cache"), &digest, &digest);
        let open = || Reference::open(&path).unwrap();
        assert_eq!(open().pictures(), Some(4));
        let reference = open()
            .measure_cached(&reading(1, &Stop::default()), &cache, |_| ())
            .unwrap();
        let kept = open().measure_cached(&reading(1, &Stop::default()), &cache, |_| {
            panic!("it is kept")
        });
        assert_eq!(kept.unwrap(), reference);
        assert_eq!(reference.moments, MomentsFrom::Measured);
        // The statistics take the same rows in the same order, whatever the batches. But in another
        // batch the network may round differently, by 1e-6 for activations of size one.
        let spatial = reference.spatial.as_ref().unwrap();
        for (one, other) in [
            (&samples.pooled, &reference.pooled),
            (&samples.spatial, spatial),
        ] {
            assert!((one.mean() - other.mean()).amax() < 1e-5);
            assert!((one.covariance() - other.covariance()).amax() < 1e-5);
        }
        // A set against itself: zero up to that rounding, in traces of some hundreds.
        let scores = compare(&reference, &samples, 3, Distances::F64).unwrap();
        assert!(scores.fid.abs() < 1e-3, "{scores:?}");
        assert!(scores.sfid.unwrap().abs() < 1e-3, "{scores:?}");
        assert_eq!((scores.precision, scores.recall), (Some(1.0), Some(1.0)));
        assert_eq!(scores.inception_score, samples.inception_score);

        // Against other pictures.
        let other = archive(folder.path(), "b.npz", 4, 3, 40);
        let (other, _) = measured(&other, 4);
        let far = compare(&reference, &other, 3, Distances::F64).unwrap();
        let expected = frechet_distance(&samples.pooled, &other.pooled).unwrap();
        assert!(
            far.fid > 1.0 && (far.fid / expected - 1.0).abs() < 1e-9,
            "{far:?}"
        );
        assert!(far.sfid > Some(1.0) && far.sfid != Some(far.fid));
        // The arithmetic is passed on: the result is that of the formula on the same activations.
        let half = compare(&reference, &other, 3, Distances::F16).unwrap();
        let features = reference.features.as_ref().unwrap();
        let expected = precision_recall_with(features, &other.features, 3, Distances::F16).unwrap();
        assert_eq!(
            half.precision.zip(half.recall),
            Some((expected.precision, expected.recall))
        );

        // Against the moments alone, without running the network.
        let moments = ReferenceMeasured {
            features: None,
            ..reference.clone()
        };
        let path = folder.path().join("moments.npz");
        moments.write(&path).unwrap();
        assert!(read_reference_statistics(&path).unwrap().is_some());
        let alone = Reference::open(&path).unwrap();
        assert_eq!(alone.pictures(), None);
        let nothing = folder.path().join("no-cache.npz");
        let alone = alone.measure_cached(&reading(1, &Stop::default()), &nothing, |_| {
            panic!("no pictures")
        });
        let alone = alone.unwrap();
        assert!(!nothing.exists());
        assert_eq!(alone.moments, MomentsFrom::Stated);
        let scores = compare(&alone, &other, 3, Distances::F64).unwrap();
        assert_eq!((scores.precision, scores.recall), (None, None));
        assert_eq!((scores.fid, scores.sfid), (far.fid, far.sfid));

        // Against the moments of the pooled activations alone, which most files hold: no sFID
        // either.
        let pooled = ReferenceMeasured {
            spatial: None,
            ..alone
        };
        pooled.write(&path).unwrap();
        let pooled = Reference::open(&path).unwrap();
        assert_eq!(pooled.pictures(), None);
        let pooled = pooled.measure(&reading(1, &Stop::default()), |_| panic!("no pictures"));
        let scores = compare(&pooled.unwrap(), &other, 3, Distances::F64).unwrap();
        assert_eq!(
            (scores.fid, scores.sfid, scores.precision),
            (far.fid, None, None)
        );
        assert_eq!(scores.inception_score, other.inception_score);
    }

    #[test]
    fn a_folder_of_pictures_is_measured_as_their_archive() {
        let folder = tempfile::tempdir().unwrap();
        let path = archive(folder.path(), "a.npz", 3, 3, 0);
        let images = crate::npz::read_samples(&path).unwrap().images;
        let pictures = folder.path().join("pictures");
        std::fs::create_dir(&pictures).unwrap();
        for index in 0..3 {
            let pixels = images.image(index).to_vec();
            let picture = image::RgbImage::from_raw(24, 20, pixels).unwrap();
            picture.save(pictures.join(format!("{index}.png"))).unwrap();
        }
        assert_eq!(measured(&pictures, 2).0, measured(&path, 2).0);
        let reference = Reference::open(&pictures).unwrap();
        assert_eq!((reference.pictures(), reference.ignored()), (Some(3), 0));
        let reference = reference
            .measure(&reading(2, &Stop::default()), |_| ())
            .unwrap();
        let of_archive = Reference::open(&path).unwrap();
        assert_eq!(
            reference,
            of_archive
                .measure(&reading(2, &Stop::default()), |_| ())
                .unwrap()
        );
    }

    #[test]
    fn several_workers_measure_what_one_does() {
        let folder = tempfile::tempdir().unwrap();
        let paths = [(5, "five.npz"), (2, "two.npz")]
            .map(|(count, name)| archive(folder.path(), name, count, 3, count));
        let alone = paths.each_ref().map(|path| measured(path, 1).0);
        for size in [2, 4] {
            let found = fake::group(size, |workers| {
                let stop = Stop::default();
                let reading = Reading {
                    workers,
                    ..reading(1, &stop)
                };
                if workers.rank() > 0 {
                    reading.assist().unwrap();
                    return None;
                }
                let measured = paths.each_ref().map(|path| {
                    let reader = SampleReader::open(path).unwrap();
                    measure(&reading, reader, |_| ()).unwrap()
                });
                reading.end();
                Some(measured)
            });
            assert!(found[0].as_ref() == Some(&alone), "{size}");
        }
    }

    #[test]
    fn what_can_not_be_measured_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let measure = |path: &Path, stopped: bool| {
            let reader = SampleReader::open(path).unwrap();
            let stop = Stop::default();
            if stopped {
                stop.request();
            }
            measure(&reading(2, &stop), reader, |_| ()).unwrap_err()
        };
        let path = archive(folder.path(), "grey.npz", 2, 1, 0);
        assert!(matches!(measure(&path, true), EvaluationError::Interrupted));
        let path = archive(folder.path(), "two.npz", 2, 2, 0);
        let error = measure(&path, false);
        assert!(matches!(error, EvaluationError::Pictures { .. }), "{error}");
        assert!(error.to_string().contains("two.npz"));
        let path = archive(folder.path(), "none.npz", 0, 3, 0);
        let error = measure(&path, false);
        assert!(matches!(error, EvaluationError::TooFew { .. }), "{error}");

        // Moments of another network than Inception.
        let npz = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/npz");
        let error = Reference::open(&npz.join("reference.npz")).err().unwrap();
        let message = error.to_string();
        assert!(
            message.contains("`mu`: expected the shape [2048]"),
            "{message}"
        );
        assert!(Reference::open(&folder.path().join("missing.npz")).is_err());

        // A file of other weights.
        let path = folder.path().join("vae.pth");
        let mut state = formula_weights(0);
        state.retain(|name, _| name.starts_with("fc."));
        write_torch(&path, &Tensors::from(state), None).unwrap();
        let error = read_inception::<NdArray>(&path, &Default::default()).unwrap_err();
        assert!(matches!(error, WeightsError::Mismatch { .. }), "{error}");

        // A cache file with other contents.
        let cache = archive(folder.path(), "cache.npz", 2, 3, 0);
        let reference = Reference::open(&cache).unwrap();
        let error = reference
            .measure_cached(&reading(2, &Stop::default()), &cache, |_| ())
            .unwrap_err();
        assert!(error.to_string().contains("a member pool.npy"), "{error}");
    }
}
