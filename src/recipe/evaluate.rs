//! Sampling and the verdict.

use std::io::Write;
use std::path::Path;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::RecipeError;
use super::draw::{COLUMNS, Decoder, Draw, Share, byte, first_images};
use super::evaluate_reference::ReferenceFiles;
use super::sampling::{Against, Evaluate, Sample, Sampling};
use super::speed::speeds;
use super::stages::{Context, images};
use crate::backend::Compute;
use crate::data::{Digits, Image, Split};
use crate::evaluation::{
    Features, PrecisionRecall, Speed, Statistics, StatisticsAccumulator, bias, frechet_distance,
    inception_score, precision_recall, read_samples,
};
use crate::images::Images;
use crate::models::{DigitsClassifier, DitConfig, digits};
use crate::ops::{FusedOps, TrainingBackend};
use crate::report::{Table, comparison_png, short, thousands};

/// Images a classifier reads at once.
const READ_BATCH: usize = 256;
/// Pixels of a digit's pixel in a picture.
const SCALE: u32 = 5;

/// What the classifier says of 8-bit images.
struct Reading {
    features: Features,
    probabilities: Features,
    classes: Vec<usize>,
}

fn read<B: FusedOps>(
    classifier: &DigitsClassifier<B>,
    pixels: &[u8],
    device: &B::Device,
) -> Result<Reading, RecipeError> {
    let area = digits::SIDE * digits::SIDE;
    let (mut features, mut probabilities, mut classes, mut width) =
        (Vec::new(), Vec::new(), Vec::new(), 0);
    for chunk in pixels.chunks(READ_BATCH * area) {
        let values = chunk
            .iter()
            .map(|byte| f32::from(*byte) / 127.5 - 1.0)
            .collect();
        let read = classifier.forward(images::<B>(
            values,
            [chunk.len() / area, 1, digits::SIDE, digits::SIDE],
            device,
        ));
        width = read.features.dims()[1];
        features.extend(read.features.into_data().iter::<f32>());
        classes.extend(
            read.logits
                .clone()
                .argmax(1)
                .into_data()
                .iter::<i64>()
                .map(|class| class as usize),
        );
        probabilities.extend(
            burn::tensor::activation::softmax(read.logits, 1)
                .into_data()
                .iter::<f32>(),
        );
    }
    Ok(Reading {
        features: Features::new(width, features)?,
        probabilities: Features::new(digits::CLASSES, probabilities)?,
        classes,
    })
}

/// Share of a split that a classifier reads right.
pub(super) fn accuracy<B: FusedOps>(
    classifier: &DigitsClassifier<B>,
    split: &Digits,
    device: &B::Device,
) -> f64 {
    let pixels: Vec<f32> = split
        .images()
        .iter()
        .flat_map(|image| image.pixels.iter().copied())
        .collect();
    let logits: Tensor<B, 2> = classifier
        .forward(images::<B>(
            pixels,
            [split.count(), 1, digits::SIDE, digits::SIDE],
            device,
        ))
        .logits;
    let read: Vec<i64> = logits.argmax(1).into_data().iter::<i64>().collect();
    let right = read
        .iter()
        .zip(split.images())
        .filter(|(class, image)| **class == image.label as i64)
        .count();
    right as f64 / split.count() as f64
}

/// Real images as bytes, in the same 8 bits that samples are measured in.
fn bytes(images: &[Image]) -> Vec<u8> {
    images
        .iter()
        .flat_map(|image| image.pixels.iter().copied().map(byte))
        .collect()
}

/// One line of the verdict.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verdict {
    /// The model, as the recipe names it.
    pub model: String,
    /// Parameters, the fixed position table counted; none for real images.
    pub parameters: Option<usize>,
    /// Layers.
    pub depth: Option<usize>,
    /// Multiply-accumulates of one pass of one image.
    pub macs: Option<usize>,
    /// Fréchet distance to the test split in the classifier's features; lower is better.
    pub fid: f64,
    /// Inception Score from the classifier's probabilities; higher is better.
    pub inception_score: f64,
    /// Share of samples on the manifold of the test images.
    pub precision: f64,
    /// Share of test images on the manifold of the samples.
    pub recall: f64,
    /// Share of samples read as the digit that was asked for.
    pub accuracy: f64,
    /// Sampling speed, of one batch by all steps; none for real images.
    pub images_per_second: Option<Speed>,
}

/// File of the verdicts, in the stage's folder.
pub(super) const EVALUATION: &str = "eval.json";

/// `eval.json`.
#[derive(Debug, Serialize)]
struct Evaluation<'a> {
    protocol: Protocol<'a>,
    verdicts: Vec<Verdict>,
}

/// What is read back of `eval.json`.
#[derive(Debug, Deserialize)]
pub(super) struct Evaluated {
    pub(super) verdicts: Vec<Verdict>,
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
    pub(super) fn sample(
        &self,
        stage: &str,
        sample: &Sample,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let checkpoint = self.load(&sample.from)?;
        let network = checkpoint.network::<B::InnerBackend>(self.device)?;
        let decoder = self.decoder(sample.vae.as_deref(), &network.config())?;
        let drawn = Draw {
            name: stage,
            network: &network,
            decoder: decoder.as_ref(),
            sampling: &sample.sampling,
            seed: self.recipe.seed,
            folder,
            share: Share::WHOLE,
        }
        .run(self.device)?;
        let archive = drawn.archive.ok_or_else(|| not_whole(stage))?;
        crate::say!(
            "{stage}: {} samples in {}",
            sample.sampling.count,
            archive.display()
        );
        Ok(())
    }

    /// The autoencoder of a stage whose model draws latents.
    pub(super) fn decoder(
        &self,
        vae: Option<&Path>,
        model: &DitConfig,
    ) -> Result<Option<Decoder<B::InnerBackend>>, RecipeError> {
        vae.map(|path| Decoder::read(path, model, self.device))
            .transpose()
    }

    pub(super) fn evaluate(
        &self,
        stage: &str,
        evaluate: &Evaluate,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let features = match &evaluate.against {
            Against::Digits { features } => features,
            Against::Reference {
                reference,
                inception,
                vae,
                samples,
                distances,
            } => {
                let files = ReferenceFiles {
                    reference,
                    inception,
                    vae: vae.as_deref(),
                    samples,
                    distances: *distances,
                };
                return self.evaluate_reference(stage, evaluate, &files, folder);
            }
        };
        let classifier_checkpoint = self.load(features)?;
        let classifier = classifier_checkpoint.digits_classifier::<B::InnerBackend>(self.device)?;
        let (train, test) = (Digits::new(Split::Train), Digits::new(Split::Test));
        let reference = read(&classifier, &bytes(test.images()), self.device)?;
        let judge = Judge {
            reference_statistics: statistics(&reference.features)?,
            reference: reference.features,
            neighbours: evaluate.neighbours,
        };
        let real = read(&classifier, &bytes(train.images()), self.device)?;
        let real_labels: Vec<usize> = train.images().iter().map(|image| image.label).collect();
        // The floor: even real images are this far from other real images.
        let floor = format!("{} training images", thousands(train.count()));
        let mut verdicts = vec![judge.verdict(&floor, &real, &real_labels)?];
        let (mut rows, mut checkpoints) = (Vec::new(), Vec::new());
        for (index, source) in evaluate.compare.iter().enumerate() {
            let (name, checkpoint) = (source.to_string(), self.load(source)?);
            let network = checkpoint.network::<B::InnerBackend>(self.device)?;
            let drawn = Draw {
                name: &name,
                network: &network,
                decoder: None,
                sampling: &evaluate.sampling,
                seed: self.recipe.seed,
                folder: &folder.join(format!("{}-{}", index + 1, file_name(&name))),
                share: Share::WHOLE,
            }
            .run(self.device)?;
            let archive = drawn.archive.ok_or_else(|| not_whole(stage))?;
            let samples = read_samples(&archive)?.images;
            let read = read(&classifier, samples.pixels(), self.device)?;
            let mut verdict = judge.verdict(&name, &read, &drawn.labels)?;
            verdict.parameters = Some(network.config().parameters());
            verdict.depth = Some(network.depth());
            verdict.macs = Some(network.config().macs());
            verdicts.push(verdict);
            checkpoints.push(checkpoint);
            rows.push((name, first_images(&archive, 2 * COLUMNS)?));
        }
        let speeds = speeds::<B::InnerBackend>(&checkpoints, &evaluate.sampling, self.device)?;
        for (verdict, speed) in verdicts[1..].iter_mut().zip(speeds) {
            verdict.images_per_second = speed;
        }
        let rows: Vec<(&str, &Images)> = rows
            .iter()
            .map(|(name, images)| (name.as_str(), images))
            .collect();
        comparison_png(&folder.join("comparison.png"), &rows, COLUMNS, SCALE)?;
        let protocol = Protocol {
            sampling: &evaluate.sampling,
            seed: self.recipe.seed,
            floor: train.count(),
            reference: format!("{} test digits, 8 bits", test.count()),
            features: features.to_string(),
            features_fingerprint: classifier_checkpoint.fingerprint()?,
            neighbours: evaluate.neighbours,
            backend: <B::InnerBackend as Backend>::name(self.device),
            compute: crate::ops::compute(),
        };
        let table = table(&verdicts);
        let text = super::directory::json(&Evaluation { protocol, verdicts })?;
        let path = folder.join(EVALUATION);
        crate::atomic::write_atomic(&path, |file| file.write_all(text.as_bytes()))
            .map_err(RecipeError::io(&path))?;
        let sampling = &evaluate.sampling;
        crate::tell!(
            "\n{stage}: {} samples, {} steps, guidance {}, against {} test images (FID in the digit classifier's features)\n\n{table}\n{}",
            thousands(sampling.count),
            sampling.steps,
            sampling.guidance,
            test.count(),
            bias(sampling.count)
        );
        Ok(())
    }
}

/// What samples are measured against.
struct Judge {
    reference: Features,
    reference_statistics: Statistics,
    neighbours: usize,
}

impl Judge {
    fn verdict(
        &self,
        model: &str,
        read: &Reading,
        labels: &[usize],
    ) -> Result<Verdict, RecipeError> {
        let PrecisionRecall { precision, recall } =
            precision_recall(&self.reference, &read.features, self.neighbours)?;
        let right = read
            .classes
            .iter()
            .zip(labels)
            .filter(|(class, label)| class == label)
            .count();
        Ok(Verdict {
            model: model.to_owned(),
            parameters: None,
            depth: None,
            macs: None,
            fid: frechet_distance(&self.reference_statistics, &statistics(&read.features)?)?,
            inception_score: inception_score(&read.probabilities, labels.len())?,
            precision,
            recall,
            accuracy: right as f64 / labels.len() as f64,
            images_per_second: None,
        })
    }
}

fn statistics(features: &Features) -> Result<Statistics, RecipeError> {
    let mut accumulator = StatisticsAccumulator::new(features.dim());
    accumulator.push(features)?;
    Ok(accumulator.finish()?)
}

/// Every sample of an evaluation is drawn by itself.
pub(super) fn not_whole(stage: &str) -> RecipeError {
    RecipeError::Stage {
        stage: stage.to_owned(),
        problem: "its samples are not all drawn".into(),
    }
}

/// A model's name as a folder: the last part of a path, without what file systems dislike.
pub(super) fn file_name(name: &str) -> String {
    let last = name.rsplit(['/', '\\']).next().unwrap_or(name);
    last.replace(':', "-")
}

/// The verdicts as a person reads them. Accuracy is the share of samples that the classifier reads as their class;
/// images/s the median of rounds in turns, with half the distance between quartiles.
pub fn table(verdicts: &[Verdict]) -> Table<10> {
    let mut table = Table::new([
        "model",
        "depth",
        "params",
        "MACs",
        "images/s",
        "FID",
        "IS",
        "precision",
        "recall",
        "accuracy",
    ]);
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    for verdict in verdicts {
        table.row([
            verdict.model.clone(),
            or_dash(verdict.depth.map(|depth| depth.to_string())),
            or_dash(verdict.parameters.map(short)),
            or_dash(verdict.macs.map(short)),
            or_dash(verdict.images_per_second.map(|speed| speed.to_string())),
            format!("{:.2}", verdict.fid),
            format!("{:.2}", verdict.inception_score),
            format!("{:.3}", verdict.precision),
            format!("{:.3}", verdict.recall),
            format!("{:.1}%", 100.0 * verdict.accuracy),
        ]);
    }
    table
}
