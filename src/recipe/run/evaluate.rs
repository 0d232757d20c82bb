//! Sampling and the verdict.

use std::io::Write;
use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::context::Context;
use super::directory::EVALUATION;
use super::evaluate_reference::ReferenceFiles;
use crate::backend::Compute;
use crate::data::{Samples, Split};
use crate::evaluation::{
    ClassifiedVerdict, ClassifierJudge, Pictured, Speed, bias, classified_table,
};
use crate::images::Images;
use crate::models::Shape;
use crate::npz::{first_images, read_samples, write_samples};
use crate::ops::TrainingBackend;
use crate::random::{self, Stream};
use crate::recipe::RecipeError;
use crate::recipe::schema::sample::{Against, Evaluate, Sample};
use crate::report::{COLUMNS, comparison_png, grid_layout, thousands, watch};
use crate::sampling::{Decoder, Draw, PICTURE_FILE, Sampling, Share, speeds};

/// As many training pictures as there are samples, or all: FID depends on their number. Drawn
/// without regard to the recipe's seed, so that the floor is that of the data.
fn floor(train: &dyn Samples, count: usize) -> Vec<usize> {
    let mut chosen = random::permutation(0, Stream::Split, 1, train.len());
    chosen.truncate(count);
    chosen.sort_unstable();
    chosen
}

/// `eval.json`.
#[derive(Debug, Serialize)]
struct Evaluation<'a> {
    protocol: Protocol<'a>,
    verdicts: Vec<ClassifiedVerdict>,
}

/// What is read back of `eval.json`.
#[derive(Debug, Deserialize)]
pub(crate) struct Evaluated {
    pub(crate) verdicts: Vec<ClassifiedVerdict>,
}

/// What a number can only be compared under.
#[derive(Debug, Serialize)]
struct Protocol<'a> {
    #[serde(flatten)]
    sampling: &'a Sampling,
    seed: u64,
    /// How many real images the first row is computed from.
    floor: usize,
    reference: String,
    features: String,
    features_fingerprint: String,
    neighbours: usize,
    backend: String,
    compute: Compute,
}

impl<B: TrainingBackend> Context<'_, B> {
    pub(crate) fn sample(
        &self,
        stage: &str,
        sample: &Sample,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let checkpoint = self.load(&sample.from)?;
        let network = checkpoint.network::<B::InnerBackend>(self.device)?;
        let network = network.computing(self.recipe.compute);
        let decoder = self.decoder(sample.vae.as_deref(), checkpoint.architecture.shape())?;
        let drawn = Draw {
            name: stage,
            network: &network,
            process: checkpoint.trained_by(),
            decoder: decoder.as_ref(),
            sampling: &sample.sampling,
            seed: self.recipe.seed,
            folder,
            share: Share::WHOLE,
            stop: self.stop,
        }
        .run(self.device, watch(stage, "steps"))?;
        let archive = drawn.archive.ok_or_else(|| not_whole(stage))?;
        crate::say!(
            "{stage}: {} samples in {}, the first of them to look at in {}",
            thousands(sample.sampling.count),
            archive.display(),
            archive.with_file_name(PICTURE_FILE).display()
        );
        Ok(())
    }

    /// The autoencoder of a stage whose model draws latents.
    pub(crate) fn decoder(
        &self,
        vae: Option<&Path>,
        model: Shape,
    ) -> Result<Option<Decoder<B::InnerBackend>>, RecipeError> {
        let decoder =
            vae.map(|path| Decoder::read(path, model.channels, self.recipe.compute, self.device));
        Ok(decoder.transpose()?)
    }

    /// The held-out pictures as an archive in a stage's folder.
    fn held_out_archive(&self, folder: &Path) -> Result<PathBuf, RecipeError> {
        let path = folder.join("held-out.npz");
        if path.exists() {
            return Ok(path);
        }
        let test = self.part(Split::Test)?;
        let shape = self.shape()?.sizes();
        let all: Vec<usize> = (0..test.len()).collect();
        let Pictured { images, labels } = Pictured::read(&*test, &all, shape)?;
        let labels: Vec<i64> = labels.into_iter().map(|label| label as i64).collect();
        write_samples(&path, &images, Some(&labels))?;
        Ok(path)
    }

    pub(crate) fn evaluate(
        &self,
        stage: &str,
        evaluate: &Evaluate,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let features = match &evaluate.against {
            Against::HeldOut { features } => features,
            Against::Reference {
                reference,
                inception,
                vae,
                samples,
                distances,
            } => {
                let held_out;
                let reference = match reference {
                    Some(reference) => reference,
                    None => {
                        held_out = self.held_out_archive(folder)?;
                        &held_out
                    }
                };
                let files = ReferenceFiles {
                    reference,
                    inception,
                    vae: vae.as_deref(),
                    samples,
                    distances: *distances,
                    stop: self.stop,
                };
                return self.evaluate_reference(stage, evaluate, &files, folder);
            }
        };
        let classifier_checkpoint = self.load(features)?;
        let classifier = classifier_checkpoint.classifier::<B::InnerBackend>(self.device)?;
        let config = classifier_checkpoint.classifier_config()?;
        let shape = self.shape()?.sizes();
        let (train, test) = (self.part(Split::Train)?, self.part(Split::Test)?);
        let all: Vec<usize> = (0..test.len()).collect();
        let reference = Pictured::read(&*test, &all, shape)?;
        let neighbours = evaluate.neighbours;
        let judge = ClassifierJudge::new(&classifier, config, &reference, neighbours, self.device)?;
        // The floor: even real images are this far from other real images.
        let floor = floor(&*train, evaluate.sampling.count);
        let floor_count = floor.len();
        let real = Pictured::read(&*train, &floor, shape)?;
        let floor = format!("{} training images", thousands(floor_count));
        let mut verdicts = vec![judge.verdict(&floor, &real.images, &real.labels)?];
        let (mut rows, mut checkpoints) = (Vec::new(), Vec::new());
        for (index, source) in evaluate.compare.iter().enumerate() {
            let (name, checkpoint) = (source.to_string(), self.load(source)?);
            let network = checkpoint.network::<B::InnerBackend>(self.device)?;
            let network = network.computing(self.recipe.compute);
            let drawn = Draw {
                name: &name,
                network: &network,
                process: checkpoint.trained_by(),
                decoder: None,
                sampling: &evaluate.sampling,
                seed: self.recipe.seed,
                folder: &folder.join(format!("{}-{}", index + 1, file_name(&name))),
                share: Share::WHOLE,
                stop: self.stop,
            }
            .run(self.device, watch(&name, "steps"))?;
            let archive = drawn.archive.ok_or_else(|| not_whole(stage))?;
            let samples = read_samples(&archive)?.images;
            let mut verdict = judge.verdict(&name, &samples, &drawn.labels)?;
            verdict.parameters = Some(checkpoint.architecture.parameters());
            verdict.depth = Some(checkpoint.architecture.depth());
            verdict.macs = Some(checkpoint.architecture.macs());
            verdicts.push(verdict);
            checkpoints.push(checkpoint);
            rows.push((name, first_images(&archive, 2 * COLUMNS)?));
        }
        let rates = speeds::<B::InnerBackend>(
            &checkpoints,
            &evaluate.sampling,
            self.recipe.compute,
            self.stop,
            self.device,
        )?;
        for (verdict, rates) in verdicts[1..].iter_mut().zip(rates) {
            verdict.images_per_second = Speed::of(&rates);
        }
        let rows: Vec<(&str, &Images)> = rows
            .iter()
            .map(|(name, images)| (name.as_str(), images))
            .collect();
        let (columns, scale) = grid_layout(config.input_size, COLUMNS);
        comparison_png(&folder.join("comparison.png"), &rows, columns, scale)?;
        let protocol = Protocol {
            sampling: &evaluate.sampling,
            seed: self.recipe.seed,
            floor: floor_count,
            reference: format!(
                "{} held-out pictures of {}, 8 bits",
                test.len(),
                self.recipe.data
            ),
            features: features.to_string(),
            features_fingerprint: classifier_checkpoint.fingerprint()?,
            neighbours,
            backend: <B::InnerBackend as Backend>::name(self.device),
            compute: self.recipe.compute,
        };
        let table = classified_table(&verdicts);
        let text = super::directory::json(&Evaluation { protocol, verdicts })?;
        let path = folder.join(EVALUATION);
        crate::files::write_atomic(&path, |file| file.write_all(text.as_bytes()))
            .map_err(RecipeError::io(&path))?;
        let sampling = &evaluate.sampling;
        crate::tell!(
            "\n{stage}: {} samples, {} steps, guidance {}, against {} held-out images of {} (FID in the features of {features})\n\n{table}\n{}",
            thousands(sampling.count),
            sampling.steps,
            sampling.guidance,
            thousands(test.len()),
            self.recipe.data,
            bias(sampling.count)
        );
        Ok(())
    }
}

/// Every sample of an evaluation is drawn by itself.
pub(crate) fn not_whole(stage: &str) -> RecipeError {
    RecipeError::Stage {
        stage: stage.to_owned(),
        problem: "its samples are not all drawn".into(),
    }
}

/// A model's name as a folder: the last part of a path, without what file systems dislike.
pub(crate) fn file_name(name: &str) -> String {
    let last = name.rsplit(['/', '\\']).next().unwrap_or(name);
    last.replace(':', "-")
}
