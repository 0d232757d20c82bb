//! The verdict by ADM's protocol: samples against a reference batch, in Inception's features.

use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;

use super::context::Context;
use super::evaluate::{EVALUATION, file_name, not_whole};
use crate::evaluation::{
    AdmEvaluation, AdmProtocol, AdmVerdict, DEFAULT_SPLIT_SIZE, Distances, FileDigest, Reference,
    ReferenceMeasured, Speed, cache_file, compare, measure,
};
use crate::images::Images;
use crate::models::{Architecture, Inception};
use crate::npz::{SampleReader, first_images};
use crate::ops::{FusedOps, TrainingBackend};
use crate::recipe::RecipeError;
use crate::recipe::plan::missing::{Role, note, refuse};
use crate::recipe::schema::sample::Evaluate;
use crate::report::Progress;
use crate::report::{comparison_png, grid_layout, watch};
use crate::sampling::{Draw, SAMPLING, Sampling, Share, speeds};
use crate::weights::{Known, read_inception};

/// Images Inception reads at once.
const READ_BATCH: usize = 16;
/// Columns of the comparison.
const COLUMNS: usize = 8;

/// What an evaluation reads.
pub(crate) struct ReferenceFiles<'a> {
    pub(crate) reference: &'a Path,
    pub(crate) inception: &'a Path,
    pub(crate) vae: Option<&'a Path>,
    pub(crate) samples: &'a [PathBuf],
    /// Arithmetic of the distances of precision and recall.
    pub(crate) distances: Distances,
}

/// Inception, and what is known of the reference.
struct Judge<B: Backend> {
    inception: Known<Inception<B>>,
    reference: ReferenceMeasured,
    protocol: AdmProtocol,
}

impl<B: FusedOps> Judge<B> {
    /// Reads the networks and the reference; what is measured of it is kept in the folder `cache`, if there is one.
    fn new(
        files: &ReferenceFiles<'_>,
        neighbours: usize,
        cache: Option<&Path>,
        device: &B::Device,
    ) -> Result<Self, RecipeError> {
        let inception = read_inception::<B>(files.inception, device)?;
        let digest = FileDigest::of(files.reference)?;
        let inception_digest = FileDigest::known(&inception.path, &inception.sha256);
        let reference = Reference::open(files.reference)?;
        let pictures = reference.pictures();
        told(files.reference, reference.ignored());
        enough(files.reference, pictures.unwrap_or(usize::MAX))?;
        if pictures.is_some_and(|pictures| pictures <= neighbours) {
            return Err(RecipeError::Run(format!(
                "{}: {neighbours} neighbours can't be found among its {} pictures",
                files.reference.display(),
                pictures.unwrap_or(0)
            )));
        }
        let mut progress = Progress::new("reference", "images", pictures.unwrap_or(0));
        let network = &inception.network;
        let mut reached = |done| progress.reach(done);
        let reference = match cache {
            Some(folder) => {
                let cache = cache_file(folder, &digest, &inception_digest);
                reference.measure_cached(network, &cache, READ_BATCH, &mut reached)?
            }
            None => reference.measure(network, READ_BATCH, &mut reached)?,
        };
        let protocol = AdmProtocol {
            samples: 0,
            reference: digest,
            reference_pictures: pictures,
            reference_moments: reference.moments,
            inception: inception_digest,
            neighbours,
            distances: files.distances,
            split_size: DEFAULT_SPLIT_SIZE,
            inception_compute: "f32".into(),
            backend: B::name(device),
            sampling: None,
        };
        Ok(Self {
            inception,
            reference,
            protocol,
        })
    }

    /// Measures the first `count` pictures.
    fn verdict(&self, name: &str, archive: &Path, count: usize) -> Result<AdmVerdict, RecipeError> {
        let reader = SampleReader::open(archive)?.first(count);
        told(archive, reader.ignored());
        let mut progress = Progress::new(name, "images measured", reader.shape()[0]);
        let network = &self.inception.network;
        let measured = measure(network, reader, READ_BATCH, |done| progress.reach(done))?;
        let AdmProtocol {
            neighbours,
            distances,
            ..
        } = self.protocol;
        let scores = compare(&self.reference, &measured, neighbours, distances)?;
        Ok(AdmVerdict::new(name, &measured, scores))
    }

    /// Writes the result to `path` and prints it.
    fn finish(
        self,
        verdicts: Vec<AdmVerdict>,
        stage: &str,
        path: Option<&Path>,
    ) -> Result<(), RecipeError> {
        let mut protocol = self.protocol;
        protocol.samples = verdicts
            .iter()
            .map(|verdict| verdict.count)
            .min()
            .unwrap_or(0);
        let evaluation = AdmEvaluation { protocol, verdicts };
        if let Some(path) = path {
            evaluation.write(path)?;
        }
        crate::tell!(
            "\n{stage}: against {} in Inception's features\n\n{evaluation}",
            evaluation.protocol.reference.file
        );
        Ok(())
    }
}

impl<B: TrainingBackend> Context<'_, B> {
    pub(crate) fn evaluate_reference(
        &self,
        stage: &str,
        evaluate: &Evaluate,
        files: &ReferenceFiles<'_>,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let mut verdicts = Vec::new();
        let (mut archives, mut vae_sha256) = (Vec::new(), None);
        let mut checkpoints = Vec::new();
        let count = evaluate.sampling.count;
        let count = (count != Sampling::ALL).then_some(count);
        // What is there is counted before anything is drawn.
        let mut count = common_count(files.samples, count)?;
        // All samples first: a mistake in a model shows before the long measuring.
        for (index, source) in evaluate.compare.iter().enumerate() {
            let (name, checkpoint) = (source.to_string(), self.load(source)?);
            let network = checkpoint.network::<B::InnerBackend>(self.device)?;
            let model = checkpoint.architecture.clone();
            let decoder = self.decoder(files.vae, model.shape())?;
            let drawn = Draw {
                name: &name,
                network: &network,
                process: checkpoint.trained_by(),
                decoder: decoder.as_ref(),
                sampling: &evaluate.sampling,
                seed: self.recipe.seed,
                folder: &folder.join(format!("{}-{}", index + 1, file_name(&name))),
                share: Share::WHOLE,
            }
            .run(self.device, watch(&name, "steps"))?;
            vae_sha256 = decoder.map(|decoder| decoder.sha256().to_owned());
            let archive = drawn.archive.ok_or_else(|| not_whole(stage))?;
            count = evaluate.sampling.count;
            archives.push((name, archive, Some(model)));
            checkpoints.push(checkpoint);
        }
        archives.extend(
            (files.samples.iter()).map(|path| (path.display().to_string(), path.clone(), None)),
        );
        let (neighbours, cache) = (evaluate.neighbours, Some(folder));
        let mut judge = Judge::<B::InnerBackend>::new(files, neighbours, cache, self.device)?;
        for (name, archive, model) in &archives {
            let mut verdict = judge.verdict(name, archive, count)?;
            if let Some(model) = model {
                verdict.parameters = Some(model.parameters());
                verdict.depth = Some(model.depth());
                verdict.macs = Some(model.macs());
            }
            verdicts.push(verdict);
        }
        let rates = speeds::<B::InnerBackend>(&checkpoints, &evaluate.sampling, self.device)?;
        for (verdict, rates) in verdicts.iter_mut().zip(rates) {
            verdict.images_per_second = Speed::of(&rates);
        }
        picture(&folder.join("comparison.png"), &archives)?;
        judge.protocol.sampling = (!evaluate.compare.is_empty()).then(|| {
            serde_json::json!({
                "vae": vae_sha256,
                "seed": self.recipe.seed,
                "backend": judge.protocol.backend,
                "compute": crate::ops::compute(),
                "how": evaluate.sampling,
            })
        });
        judge.finish(verdicts, stage, Some(&folder.join(EVALUATION)))
    }
}

/// How many pictures of each are measured: the first `count`, or all, of which there must be as many in each. Zero of
/// none.
///
/// FID falls with the number of samples, so that sets of unlike sizes have nothing to say of each other.
fn common_count(archives: &[PathBuf], count: Option<usize>) -> Result<usize, RecipeError> {
    let mut first: Option<(&Path, usize)> = None;
    for archive in archives {
        let found = SampleReader::open(archive)?.shape()[0];
        enough(archive, count.map_or(found, |count| count.min(found)))?;
        match (count, first) {
            (Some(count), _) if found < count => {
                return Err(RecipeError::Run(format!(
                    "{}: expected at least the {count} pictures of the count asked for, found {found}",
                    archive.display()
                )));
            }
            (None, Some((other, others))) if others != found => {
                return Err(RecipeError::Run(format!(
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

/// Says what was passed over in a folder of pictures.
fn told(folder: &Path, ignored: usize) {
    if ignored > 0 {
        crate::say!(
            "{}: {ignored} other {} passed over; pictures are .png, .jpg and .jpeg, in the folder or one below",
            folder.display(),
            if ignored == 1 {
                "entry is"
            } else {
                "entries are"
            }
        );
    }
}

/// Refuses archives of which there is nothing to measure.
fn enough(archive: &Path, pictures: usize) -> Result<(), RecipeError> {
    match pictures {
        0 | 1 => Err(RecipeError::Run(format!(
            "{}: expected at least 2 pictures, found {pictures}",
            archive.display()
        ))),
        _ => Ok(()),
    }
}

type Measurable = (String, PathBuf, Option<Architecture>);

/// The first samples of each, where all are of one size.
fn picture(path: &Path, archives: &[Measurable]) -> Result<(), RecipeError> {
    let mut rows = Vec::with_capacity(archives.len());
    for (name, archive, _) in archives {
        rows.push((name.as_str(), first_images(archive, 2 * COLUMNS)?));
    }
    let sides = |images: &Images| images.shape()[1..].to_vec();
    let Some(first) = rows.first().map(|(_, images)| sides(images)) else {
        return Ok(());
    };
    if rows.iter().any(|(_, images)| sides(images) != first) {
        return Ok(());
    }
    let (columns, scale) = grid_layout(first[0], COLUMNS);
    let rows: Vec<(&str, &Images)> = rows.iter().map(|(name, images)| (*name, images)).collect();
    Ok(comparison_png(path, &rows, columns, scale)?)
}

/// Measures archives or folders of samples, prints the scores, and writes them with their protocol to `to`. Of each the
/// first `count` pictures are measured; without it all, of which there must be as many in each. What is measured of the
/// reference is kept in the folder `cache`, if there is one.
///
/// # Errors
/// When a file can't be read, or holds something else; when there are fewer pictures than `count`, or unlike numbers.
pub(crate) fn archives<B: FusedOps>(
    files: &ReferenceFiles<'_>,
    count: Option<usize>,
    neighbours: usize,
    cache: Option<&Path>,
    to: Option<&Path>,
    device: &B::Device,
) -> Result<(), RecipeError> {
    let count = common_count(files.samples, count)?;
    let mut missing = Vec::new();
    note(&mut missing, "evaluate", files.inception, Role::Inception);
    refuse(&missing)?;
    let mut judge = Judge::<B>::new(files, neighbours, cache, device)?;
    judge.protocol.sampling = said_of(files.samples);
    let verdicts = (files.samples.iter())
        .map(|archive| judge.verdict(&archive.display().to_string(), archive, count))
        .collect::<Result<_, _>>()?;
    judge.finish(verdicts, "evaluate", to)
}

/// What lies beside archives of how they were drawn, by archive; nothing of those that other programs made.
fn said_of(archives: &[PathBuf]) -> Option<serde_json::Value> {
    let said: serde_json::Map<String, serde_json::Value> = (archives.iter())
        .filter_map(|archive| {
            let beside = match archive.is_dir() {
                true => archive.join(SAMPLING),
                false => archive.with_file_name(SAMPLING),
            };
            let text = std::fs::read_to_string(beside).ok()?;
            Some((
                archive.display().to_string(),
                serde_json::from_str(&text).ok()?,
            ))
        })
        .collect();
    (!said.is_empty()).then(|| said.into())
}

#[cfg(test)]
mod tests {
    use super::*;
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
