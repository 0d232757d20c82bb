//! Pictures measured against a reference in Inception's features, by ADM's protocol.

use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;

use super::{
    AdmEvaluation, AdmProtocol, AdmVerdict, DEFAULT_SPLIT_SIZE, Distances, EvaluationError,
    FileDigest, Reading, Reference, ReferenceMeasured, cache_file, compare, measure,
};
use crate::models::Inception;
use crate::npz::SampleReader;
use crate::ops::FusedOps;
use crate::stop::Stop;
use crate::weights::{Digested, read_inception};
use crate::workers::{Group, Workers, agree};

/// Images Inception reads at once.
const READ_BATCH: usize = 16;

/// What pictures are measured against, and how.
#[derive(Debug, Clone, Copy)]
pub struct AdmSettings<'a> {
    /// An archive or a folder of pictures, or an archive of moments.
    pub reference: &'a Path,
    /// Inception's weights.
    pub inception: &'a Path,
    /// The nearest neighbour to which the balls of precision and recall reach.
    pub neighbours: usize,
    /// Arithmetic of their distances.
    pub distances: Distances,
    /// Folder that keeps what is measured of the reference, if any.
    pub cache: Option<&'a Path>,
    /// Who reads pictures. The first one judges, and the others [assist](super::Assistant).
    pub workers: &'a Group,
    /// Ends the measuring between two batches of pictures.
    pub stop: &'a Stop,
}

/// Inception, and what is known of the reference.
pub struct AdmJudge<B: Backend> {
    inception: Digested<Inception<B>>,
    reference: ReferenceMeasured,
    workers: Group,
    stop: Stop,
    /// What the numbers can only be compared under.
    pub protocol: AdmProtocol,
    /// Entries of a reference's folder that were passed over because they are no pictures.
    pub ignored: usize,
}

impl<B: FusedOps> AdmJudge<B> {
    /// Reads the network, and measures the reference. `progress` is called with the pictures that
    /// are done and those that there are.
    ///
    /// # Errors
    /// When a file can't be read or holds something else, or there are too few pictures.
    pub fn new(
        against: AdmSettings<'_>,
        device: &B::Device,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, EvaluationError> {
        let AdmSettings {
            reference: path,
            neighbours,
            ..
        } = against;
        let inception = agreed::<B>(against.inception, &**against.workers, device)?;
        let digest = FileDigest::of(path)?;
        let inception_digest = FileDigest::known(&inception.path, &inception.sha256);
        let reference = Reference::open(path)?;
        let (pictures, ignored) = (reference.pictures(), reference.ignored());
        enough(path, pictures.unwrap_or(usize::MAX))?;
        if let Some(pictures) = pictures.filter(|pictures| *pictures <= neighbours) {
            return Err(EvaluationError::Unfit {
                path: path.to_owned(),
                problem: format!(
                    "{neighbours} neighbours can't be found among its {pictures} pictures"
                ),
            });
        }
        let reading = reading(&inception, &**against.workers, against.stop);
        let mut reached = |done| progress(done, pictures.unwrap_or(0));
        let reference = match against.cache {
            Some(folder) => {
                let cache = cache_file(folder, &digest, &inception_digest);
                reference.measure_cached(&reading, &cache, &mut reached)?
            }
            None => reference.measure(&reading, &mut reached)?,
        };
        let protocol = AdmProtocol {
            samples: 0,
            reference: digest,
            reference_pictures: pictures,
            reference_moments: reference.moments,
            inception: inception_digest,
            neighbours,
            distances: against.distances,
            split_size: DEFAULT_SPLIT_SIZE,
            inception_compute: "f32".into(),
            backend: B::name(device),
            sampling: None,
        };
        Ok(Self {
            inception,
            reference,
            workers: against.workers.clone(),
            stop: against.stop.clone(),
            protocol,
            ignored,
        })
    }

    /// Measures pictures. `progress` is called with those that are done and those that there are.
    ///
    /// # Errors
    /// When a picture can't be read, or there are too few for a measure.
    pub fn verdict(
        &self,
        name: &str,
        pictures: SampleReader,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<AdmVerdict, EvaluationError> {
        let [count, ..] = pictures.shape();
        let reading = reading(&self.inception, &*self.workers, &self.stop);
        let measured = measure(&reading, pictures, |done| progress(done, count))?;
        let AdmProtocol {
            neighbours,
            distances,
            ..
        } = self.protocol;
        let scores = compare(&self.reference, &measured, neighbours, distances)?;
        Ok(AdmVerdict::new(name, &measured, scores))
    }

    /// Lets those go who assist.
    pub fn pause(&self) {
        reading(&self.inception, &*self.workers, &self.stop).end();
    }

    /// The verdicts with the protocol they were reached under; lets those go who assist.
    pub fn finish(self, verdicts: Vec<AdmVerdict>) -> AdmEvaluation {
        self.pause();
        let mut protocol = self.protocol;
        let counts = verdicts.iter().map(|verdict| verdict.count);
        protocol.samples = counts.min().unwrap_or(0);
        AdmEvaluation { protocol, verdicts }
    }
}

/// The network, of which all workers have the same weights.
fn agreed<B: FusedOps>(
    weights: &Path,
    workers: &dyn Workers,
    device: &B::Device,
) -> Result<Digested<Inception<B>>, EvaluationError> {
    let inception = read_inception::<B>(weights, device)?;
    let what = format!("the weights in {}", weights.display());
    agree(workers, &what, inception.sha256.as_bytes()).map_err(EvaluationError::Workers)?;
    Ok(inception)
}

fn reading<'a, B: Backend>(
    inception: &'a Digested<Inception<B>>,
    workers: &'a dyn Workers,
    stop: &'a Stop,
) -> Reading<'a, B> {
    Reading {
        inception: &inception.network,
        batch: READ_BATCH,
        workers,
        stop,
    }
}

/// Reads pictures for the first worker's [`AdmJudge`].
pub struct Assistant<B: Backend> {
    inception: Digested<Inception<B>>,
    workers: Group,
}

impl<B: FusedOps> Assistant<B> {
    /// With the weights that the first worker has.
    ///
    /// # Errors
    /// When they can't be read, or are others.
    pub fn new(
        weights: &Path,
        workers: &Group,
        device: &B::Device,
    ) -> Result<Self, EvaluationError> {
        Ok(Self {
            inception: agreed::<B>(weights, &**workers, device)?,
            workers: workers.clone(),
        })
    }

    /// Reads until the verdicts are reached, or the judge [pauses](AdmJudge::pause).
    ///
    /// # Errors
    /// When the pictures are neither grey nor RGB.
    pub fn assist(&self) -> Result<(), EvaluationError> {
        let stop = Stop::default();
        let assisted = reading(&self.inception, &*self.workers, &stop).assist();
        assisted.map_err(|source| EvaluationError::Pictures {
            path: "the first worker's pictures".into(),
            source,
        })
    }
}

/// How many pictures of each are measured: the first `count`, or all, of which there must be as
/// many in each. Zero of none.
///
/// FID falls with the number of samples, so that sets of unlike sizes have nothing to say of each
/// other.
///
/// # Errors
/// When an archive can't be read, or has fewer pictures than `count`, or without it another number.
pub fn common_count(archives: &[PathBuf], count: Option<usize>) -> Result<usize, EvaluationError> {
    let mut first: Option<(&Path, usize)> = None;
    for archive in archives {
        let found = SampleReader::open(archive)?.shape()[0];
        enough(archive, count.map_or(found, |count| count.min(found)))?;
        match (count, first) {
            (Some(count), _) if found < count => {
                return Err(EvaluationError::Unfit {
                    path: archive.clone(),
                    problem: format!(
                        "expected at least the {count} pictures of `count`, found {found}; a `count` of {found} takes the first of each"
                    ),
                });
            }
            (None, Some((other, others))) if others != found => {
                return Err(EvaluationError::Unlike(format!(
                    "{} has {others} pictures and {} has {found}; FID depends on their number, so give a count \
                     (`--count N`, in a recipe `count = N`), and the first N of each are measured",
                    other.display(),
                    archive.display()
                )));
            }
            (_, None) => first = Some((archive, found)),
            _ => {}
        }
    }
    Ok(first.map_or(0, |(_, found)| count.unwrap_or(found)))
}

/// Refuses archives of which there is nothing to measure.
fn enough(archive: &Path, pictures: usize) -> Result<(), EvaluationError> {
    match pictures {
        0 | 1 => Err(EvaluationError::Unfit {
            path: archive.to_owned(),
            problem: format!("expected at least 2 pictures, found {pictures}"),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::Images;
    use crate::npz::write_samples;

    #[test]
    fn unlike_counts_are_refused_and_a_count_takes_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let archive = |name: &str, count: usize| {
            let path = folder.path().join(name);
            let images = Images::new(vec![7; count * 3], [count, 1, 1, 3]).unwrap();
            write_samples(&path, &images, None).unwrap();
            path
        };
        let (five, also, three) = (
            archive("5.npz", 5),
            archive("x.npz", 5),
            archive("3.npz", 3),
        );
        let count = |archives: &[&PathBuf], count| {
            let archives: Vec<PathBuf> = archives.iter().map(|path| (*path).clone()).collect();
            common_count(&archives, count).map_err(|error| error.to_string())
        };
        assert_eq!(count(&[&five, &also], None), Ok(5));
        assert_eq!(count(&[&three], None), Ok(3));
        assert_eq!(count(&[&five, &three], Some(3)), Ok(3));
        assert_eq!(count(&[], Some(3)), Ok(0));
        let error = count(&[&five, &also, &three], None).unwrap_err();
        for words in [
            "5.npz has 5 pictures",
            "3.npz has 3;",
            "--count N",
            "count = N",
        ] {
            assert!(error.contains(words), "{error}");
        }
        let error = count(&[&five, &three], Some(4)).unwrap_err();
        for words in ["3.npz: expected at least the 4", "found 3"] {
            assert!(error.contains(words), "{error}");
        }
        let error = count(&[&five], Some(1)).unwrap_err();
        assert!(error.contains("at least 2"), "{error}");
    }
}
