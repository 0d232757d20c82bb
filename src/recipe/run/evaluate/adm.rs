//! The verdict by ADM's protocol: samples against a reference batch, in Inception's features.

use std::path::{Path, PathBuf};

use super::model_folder;
#[cfg(feature = "cli")]
use crate::evaluation::Assistant;
use crate::evaluation::{AdmEvaluation, AdmJudge, AdmSettings, AdmVerdict, Distances};
use crate::images::Images;
use crate::models::Architecture;
use crate::npz::{SampleReader, first_images};
use crate::ops::{FusedOps, TrainingBackend};
use crate::recipe::RecipeError;
use crate::recipe::run::context::Context;
use crate::recipe::run::directory::EVALUATION;
use crate::recipe::schema::sample::{Against, Evaluate};
use crate::report::{comparison_png, grid_layout, watch};
#[cfg(feature = "cli")]
use crate::sampling::SAMPLING;
use crate::stop::Stop;
use crate::workers::Group;

/// Columns of the comparison.
const COLUMNS: usize = 8;

/// What an evaluation reads.
pub(super) struct ReferenceFiles<'a> {
    reference: &'a Path,
    inception: &'a Path,
    pub(super) vae: Option<&'a Path>,
    samples: &'a [PathBuf],
    /// Who reads pictures.
    workers: &'a Group,
    /// Arithmetic of the distances of precision and recall.
    distances: Distances,
    /// Ends the measuring.
    stop: &'a Stop,
}

impl<'a> ReferenceFiles<'a> {
    /// The files of an evaluation in Inception's features; `held_out` is the archive that is the
    /// reference where none is named.
    pub(super) fn of(
        against: &'a Against,
        held_out: Option<&'a Path>,
        workers: &'a Group,
        stop: &'a Stop,
    ) -> Option<Self> {
        match against {
            Against::HeldOut { .. } => None,
            Against::Reference {
                reference,
                inception,
                vae,
                samples,
                distances,
            } => Some(Self {
                reference: reference.as_deref().or(held_out)?,
                inception,
                vae: vae.as_deref(),
                samples,
                workers,
                distances: *distances,
                stop,
            }),
        }
    }
}

/// Reads Inception and measures the reference, with a bar.
fn judge<B: FusedOps>(
    files: &ReferenceFiles<'_>,
    neighbours: usize,
    cache: Option<&Path>,
    device: &B::Device,
) -> Result<AdmJudge<B>, RecipeError> {
    let against = AdmSettings {
        reference: files.reference,
        inception: files.inception,
        neighbours,
        distances: files.distances,
        cache,
        workers: files.workers,
        stop: files.stop,
    };
    let judge = AdmJudge::<B>::new(against, device, watch("reference", "images"))?;
    passed_over(files.reference, judge.ignored);
    Ok(judge)
}

/// Measures the first `count` pictures of an archive, with a bar.
fn verdict<B: FusedOps>(
    judge: &AdmJudge<B>,
    name: &str,
    archive: &Path,
    count: usize,
) -> Result<AdmVerdict, RecipeError> {
    let reader = SampleReader::open(archive)?.first(count);
    passed_over(archive, reader.ignored());
    Ok(judge.verdict(name, reader, watch(name, "images measured"))?)
}

/// Prints the result, and writes it to `path`.
fn finish(evaluation: &AdmEvaluation, stage: &str, path: Option<&Path>) -> Result<(), RecipeError> {
    // A result that can't be written was reached all the same.
    crate::tell!(
        "\n{stage}: against {} in Inception's features\n\n{evaluation}",
        evaluation.protocol.reference.file
    );
    if let Some(path) = path {
        evaluation.write(path)?;
    }
    Ok(())
}

impl<B: TrainingBackend> Context<'_, B> {
    /// A judge of a reference, which is measured once in a run or sweep.
    pub(super) fn adm_judge(
        &self,
        files: &ReferenceFiles<'_>,
        neighbours: usize,
    ) -> Result<AdmJudge<B::InnerBackend>, RecipeError> {
        let cache = self.directory.measured().folder();
        std::fs::create_dir_all(cache).map_err(RecipeError::io(cache))?;
        judge(files, neighbours, Some(cache), self.device)
    }

    /// Draws samples of each model, and measures them and existing ones against a reference.
    pub(super) fn evaluate_adm(
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
        // All samples first: a mistake in a model shows before the long measuring.
        for (index, source) in evaluate.compare.iter().enumerate() {
            let name = source.to_string();
            let folder = folder.join(model_folder(index, &name));
            let (model, sampling) = ((source, files.vae), &evaluate.sampling);
            let drawn = self.draw((stage, &name), model, sampling, &folder)?;
            vae_sha256 = drawn.vae_sha256;
            let model = drawn.checkpoint.architecture.clone();
            archives.push((name, drawn.archive, Some(model)));
            checkpoints.push(drawn.checkpoint);
        }
        archives.extend(
            (files.samples.iter()).map(|path| (path.display().to_string(), path.clone(), None)),
        );
        let mut judge = self.adm_judge(files, evaluate.neighbours)?;
        for (name, archive, model) in &archives {
            let mut verdict = verdict(&judge, name, archive, count)?;
            if let Some(model) = model {
                verdict.parameters = Some(model.parameters());
                verdict.depth = model.depth_of_trunk();
                verdict.macs = Some(model.macs());
            }
            verdicts.push(verdict);
        }
        let speeds = self.speeds(&checkpoints, &evaluate.sampling)?;
        for (verdict, speed) in verdicts.iter_mut().zip(speeds) {
            verdict.images_per_second = speed;
        }
        picture(&folder.join("comparison.png"), &archives)?;
        judge.protocol.sampling = (!evaluate.compare.is_empty()).then(|| {
            serde_json::json!({
                "vae": vae_sha256,
                "seed": self.recipe.seed,
                "backend": judge.protocol.backend,
                "compute": self.recipe.compute,
                "how": evaluate.sampling,
            })
        });
        finish(
            &judge.finish(verdicts),
            stage,
            Some(&folder.join(EVALUATION)),
        )
    }
}

/// Says what was passed over in a folder of pictures.
fn passed_over(folder: &Path, ignored: usize) {
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

/// Measures the archives or folders of an evaluation without models, prints the scores, and writes
/// them with their protocol to `to`. What is measured of the reference is kept in the folder
/// `cache`, if there is one.
///
/// # Errors
/// When a file can't be read, or holds something else.
#[cfg(feature = "cli")]
pub(crate) fn archives<B: FusedOps>(
    evaluate: &Evaluate,
    (cache, to): (Option<&Path>, Option<&Path>),
    (workers, stop): (&Group, &Stop),
    device: &B::Device,
) -> Result<(), RecipeError> {
    let files = ReferenceFiles::of(&evaluate.against, None, workers, stop)
        .ok_or_else(|| RecipeError::Run("archives are measured against a reference".into()))?;
    if !workers.leads() {
        return Ok(Assistant::<B>::new(files.inception, workers, device)?.assist()?);
    }
    let count = evaluate.sampling.count;
    let mut judge = judge::<B>(&files, evaluate.neighbours, cache, device)?;
    judge.protocol.sampling = said_of(files.samples);
    let verdicts = (files.samples.iter())
        .map(|archive| verdict(&judge, &archive.display().to_string(), archive, count))
        .collect::<Result<_, _>>()?;
    finish(&judge.finish(verdicts), "evaluate", to)
}

/// What lies beside archives of how they were drawn, by archive; nothing of those that other
/// programs made.
#[cfg(feature = "cli")]
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
