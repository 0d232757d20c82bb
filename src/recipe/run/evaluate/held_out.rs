//! The verdict against held-out pictures, in a classifier's features.

use std::path::Path;

use burn::tensor::backend::Backend;
use serde::Serialize;

use super::model_folder;
use crate::backend::Compute;
use crate::data::{Samples, Split};
use crate::evaluation::{
    ClassifiedVerdict, ClassifierJudge, Pictured, bias, classified_table, ssim,
};
use crate::images::Images;
use crate::npz::{first_images, read_samples};
use crate::ops::TrainingBackend;
use crate::pruning::prediction_loss;
use crate::random::{self, Stream};
use crate::recipe::RecipeError;
use crate::recipe::run::context::Context;
use crate::recipe::run::directory::{EVALUATION, json, write_text};
use crate::recipe::run::sample::Sampled;
use crate::recipe::schema::sample::Evaluate;
use crate::recipe::schema::source::Source;
use crate::report::{COLUMNS, comparison_png, grid_layout, thousands};
use crate::sampling::Sampling;
use crate::weights::{Checkpoint, Provenance};

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

/// Held-out pictures that the loss is measured on: batches, and pictures of each.
const LOSS: (usize, usize) = (4, 64);

impl<B: TrainingBackend> Context<'_, B> {
    /// A model's mean squared error on held-out pictures, the same for every seed; at most `most`
    /// of them go through it at once, since no more may fit its memory.
    fn loss(&self, model: &Checkpoint, most: usize) -> Result<f64, RecipeError> {
        let (batches, batch) = LOSS;
        let measuring = self.measuring(model, Split::Test, 0, batch, None)?;
        let mut sum = 0.0;
        for step in 0..batches {
            for part in measuring.batch(step)?.parts(most) {
                let loss = prediction_loss(&measuring.network, &measuring.process, &part);
                sum += loss * part.samples() as f64;
            }
        }
        Ok(sum / (batches * batch) as f64)
    }

    /// A judge with the held-out pictures, in a classifier's features.
    pub(super) fn judge(
        &self,
        features: &Checkpoint,
        neighbours: usize,
    ) -> Result<ClassifierJudge<B::InnerBackend>, RecipeError> {
        let classifier = features.classifier::<B::InnerBackend>(self.device)?;
        let config = features.classifier_config()?.clone();
        let test = self.part(Split::Test)?;
        let all: Vec<usize> = (0..test.len()).collect();
        let reference = Pictured::read(&*test, &all, self.shape()?.sizes())?;
        Ok(ClassifierJudge::new(
            classifier,
            config,
            &reference,
            neighbours,
            self.device,
        )?)
    }

    /// Draws samples of each model, and measures them against the held-out pictures in the features
    /// of a classifier.
    pub(super) fn evaluate_held_out(
        &self,
        stage: &str,
        evaluate: &Evaluate,
        features: &Source,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let classifier_checkpoint = self.load(features)?;
        let config = classifier_checkpoint.classifier_config()?;
        let shape = self.shape()?.sizes();
        let (train, test) = (self.part(Split::Train)?, self.part(Split::Test)?);
        let neighbours = evaluate.neighbours;
        let judge = self.judge(&classifier_checkpoint, neighbours)?;
        // The floor: even real images are this far from other real images.
        let floor = floor(&*train, evaluate.sampling.count);
        let floor_count = floor.len();
        let real = Pictured::read(&*train, &floor, shape)?;
        let floor = format!("{} training images", thousands(floor_count));
        let mut verdicts = vec![judge.verdict(&floor, &real.images, &real.labels)?];
        let (mut rows, mut checkpoints) = (Vec::new(), Vec::new());
        let mut first: Option<Images> = None;
        for (index, source) in evaluate.compare.iter().enumerate() {
            let name = source.to_string();
            let folder = folder.join(model_folder(index, &name));
            let Sampled {
                checkpoint,
                labels,
                archive,
                ..
            } = self.draw((stage, &name), (source, None), &evaluate.sampling, &folder)?;
            let samples = read_samples(&archive)?.images;
            let mut verdict = judge.verdict(&name, &samples, &labels)?;
            verdict.parameters = Some(checkpoint.architecture.parameters());
            verdict.depth = checkpoint.architecture.depth_of_trunk();
            verdict.macs = Some(checkpoint.architecture.macs());
            let Provenance { images, chose, .. } = checkpoint.provenance;
            verdict.images = Some(images).filter(|images| *images > 0 && !chose);
            verdict.kept.clone_from(&checkpoint.provenance.kept);
            verdict.kept_of = checkpoint.provenance.parent_depth;
            // Sample by sample all begin with the same noise and class.
            verdict.ssim = first.as_ref().and_then(|first| ssim(first, &samples));
            first.get_or_insert(samples);
            verdict.loss = Some(self.loss(&checkpoint, evaluate.sampling.batch)?);
            verdicts.push(verdict);
            checkpoints.push(checkpoint);
            rows.push((name, first_images(&archive, 2 * COLUMNS)?));
        }
        let speeds = self.speeds(&checkpoints, &evaluate.sampling)?;
        for (verdict, speed) in verdicts[1..].iter_mut().zip(speeds) {
            verdict.images_per_second = speed;
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
        let text = json(&Evaluation { protocol, verdicts })?;
        write_text(&folder.join(EVALUATION), &text)?;
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
