//! Sampling and the verdict.

use std::io::Write;
use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::context::{Context, images};
use super::evaluate_reference::ReferenceFiles;
use crate::backend::Compute;
use crate::data::{Samples, Split};
use crate::evaluation::{
    Features, PrecisionRecall, Speed, Statistics, StatisticsAccumulator, bias, frechet_distance,
    inception_score, precision_recall,
};
use crate::images::{Images, byte};
use crate::models::{Classifier, ClassifierConfig, Shape};
use crate::npz::{first_images, read_samples, write_samples};
use crate::ops::{FusedOps, TrainingBackend};
use crate::random::{self, Stream};
use crate::recipe::RecipeError;
use crate::recipe::schema::data::DataShape;
use crate::recipe::schema::sample::{Against, Evaluate, Sample};
use crate::report::{COLUMNS, Table, comparison_png, grid_layout, short, thousands, watch};
use crate::sampling::{Decoder, Draw, PICTURE_FILE, Sampling, Share, speeds};

/// Images a classifier reads at once.
const READ_BATCH: usize = 256;
/// What the classifier says of 8-bit images.
struct Reading {
    features: Features,
    probabilities: Features,
    classes: Vec<usize>,
}

/// `pixels` are `[count, size, size, channels]`.
fn read<B: FusedOps>(
    classifier: &Classifier<B>,
    config: &ClassifierConfig,
    pixels: &[u8],
    device: &B::Device,
) -> Result<Reading, RecipeError> {
    let ClassifierConfig {
        channels,
        input_size: size,
        ..
    } = *config;
    let area = size * size * channels;
    let (mut features, mut probabilities, mut classes, mut width) =
        (Vec::new(), Vec::new(), Vec::new(), 0);
    for chunk in pixels.chunks(READ_BATCH * area) {
        let values = chunk
            .iter()
            .map(|byte| f32::from(*byte) / 127.5 - 1.0)
            .collect();
        let shape = [chunk.len() / area, size, size, channels];
        let pictures = images::<B>(values, shape, device).permute([0, 3, 1, 2]);
        let read = classifier.forward(pictures);
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
        probabilities: Features::new(config.classes, probabilities)?,
        classes,
    })
}

/// Share of samples that a classifier reads right.
pub(crate) fn accuracy<B: FusedOps>(
    classifier: &Classifier<B>,
    config: &ClassifierConfig,
    (samples, shape): (&dyn Samples, &DataShape),
    device: &B::Device,
) -> Result<f64, RecipeError> {
    let all: Vec<usize> = (0..samples.len()).collect();
    let Pictured { pixels, labels } = pictured(samples, &all, shape)?;
    let read = read(classifier, config, &pixels, device)?;
    Ok(share_right(&read.classes, &labels))
}

fn share_right(classes: &[usize], labels: &[usize]) -> f64 {
    let pairs = classes.iter().zip(labels);
    let right = pairs.filter(|(class, label)| class == label).count();
    right as f64 / labels.len() as f64
}

/// Real pictures as bytes, in the same 8 bits that samples are measured in.
struct Pictured {
    /// `[count, size, size, channels]`
    pixels: Vec<u8>,
    labels: Vec<usize>,
}

fn pictured(
    samples: &dyn Samples,
    indices: &[usize],
    shape: &DataShape,
) -> Result<Pictured, RecipeError> {
    let area = shape.side * shape.side;
    let mut pictured = Pictured {
        pixels: Vec::with_capacity(indices.len() * area * shape.channels),
        labels: Vec::with_capacity(indices.len()),
    };
    let mut planes = Vec::new();
    for &index in indices {
        planes.clear();
        let label = samples.read(index, 0, &mut planes)?;
        if planes.len() != area * shape.channels || label >= shape.classes {
            return Err(RecipeError::Run(format!(
                "picture {index}: expected {shape}, found {} numbers and class {label}",
                planes.len()
            )));
        }
        let pixel = |at: usize| planes[at..].iter().step_by(area).copied().map(byte);
        pictured.pixels.extend((0..area).flat_map(pixel));
        pictured.labels.push(label);
    }
    Ok(pictured)
}

/// As many training pictures as there are samples, or all: FID depends on their number. Drawn without regard to the
/// recipe's seed, so that the floor is that of the data.
fn floor(train: &dyn Samples, count: usize) -> Vec<usize> {
    let mut chosen = random::permutation(0, Stream::Split, 1, train.len());
    chosen.truncate(count);
    chosen.sort_unstable();
    chosen
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
    /// Fréchet distance to the held-out pictures in the classifier's features; lower is better.
    pub fid: f64,
    /// Inception Score from the classifier's probabilities; higher is better.
    pub inception_score: f64,
    /// Share of samples on the manifold of the held-out images.
    pub precision: f64,
    /// Share of held-out images on the manifold of the samples.
    pub recall: f64,
    /// Share of samples read as the class that was asked for.
    pub accuracy: f64,
    /// Sampling speed, of one batch by all steps; none for real images.
    pub images_per_second: Option<Speed>,
}

/// File of the verdicts, in the stage's folder.
pub(crate) const EVALUATION: &str = "eval.json";

/// `eval.json`.
#[derive(Debug, Serialize)]
struct Evaluation<'a> {
    protocol: Protocol<'a>,
    verdicts: Vec<Verdict>,
}

/// What is read back of `eval.json`.
#[derive(Debug, Deserialize)]
pub(crate) struct Evaluated {
    pub(crate) verdicts: Vec<Verdict>,
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
        let decoder = vae.map(|path| Decoder::read(path, model.channels, self.device));
        Ok(decoder.transpose()?)
    }

    /// The held-out pictures as an archive in a stage's folder.
    fn held_out_archive(&self, folder: &Path) -> Result<PathBuf, RecipeError> {
        let path = folder.join("held-out.npz");
        if path.exists() {
            return Ok(path);
        }
        let test = self.part(Split::Test)?;
        let shape = self.shape()?;
        let all: Vec<usize> = (0..test.len()).collect();
        let Pictured { pixels, labels } = pictured(&*test, &all, &shape)?;
        let labels: Vec<i64> = labels.into_iter().map(|label| label as i64).collect();
        let images = Images::new(pixels, [test.len(), shape.side, shape.side, shape.channels])
            .map_err(|error| RecipeError::Run(error.to_string()))?;
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
                };
                return self.evaluate_reference(stage, evaluate, &files, folder);
            }
        };
        let classifier_checkpoint = self.load(features)?;
        let classifier = classifier_checkpoint.classifier::<B::InnerBackend>(self.device)?;
        let config = classifier_checkpoint.classifier_config()?;
        let shape = self.shape()?;
        let read_all = |samples: &dyn Samples, indices: &[usize]| {
            let Pictured { pixels, labels } = pictured(samples, indices, &shape)?;
            Ok::<_, RecipeError>((read(&classifier, config, &pixels, self.device)?, labels))
        };
        let (train, test) = (self.part(Split::Train)?, self.part(Split::Test)?);
        let all: Vec<usize> = (0..test.len()).collect();
        let (reference, _) = read_all(&*test, &all)?;
        let judge = Judge {
            reference_statistics: statistics(&reference.features)?,
            reference: reference.features,
            neighbours: evaluate.neighbours,
        };
        // The floor: even real images are this far from other real images.
        let floor = floor(&*train, evaluate.sampling.count);
        let floor_count = floor.len();
        let (real, real_labels) = read_all(&*train, &floor)?;
        let floor = format!("{} training images", thousands(floor_count));
        let mut verdicts = vec![judge.verdict(&floor, &real, &real_labels)?];
        let (mut rows, mut checkpoints) = (Vec::new(), Vec::new());
        for (index, source) in evaluate.compare.iter().enumerate() {
            let (name, checkpoint) = (source.to_string(), self.load(source)?);
            let network = checkpoint.network::<B::InnerBackend>(self.device)?;
            let drawn = Draw {
                name: &name,
                network: &network,
                process: checkpoint.trained_by(),
                decoder: None,
                sampling: &evaluate.sampling,
                seed: self.recipe.seed,
                folder: &folder.join(format!("{}-{}", index + 1, file_name(&name))),
                share: Share::WHOLE,
            }
            .run(self.device, watch(&name, "steps"))?;
            let archive = drawn.archive.ok_or_else(|| not_whole(stage))?;
            let samples = read_samples(&archive)?.images;
            let read = read(&classifier, config, samples.pixels(), self.device)?;
            let mut verdict = judge.verdict(&name, &read, &drawn.labels)?;
            verdict.parameters = Some(checkpoint.architecture.parameters());
            verdict.depth = Some(checkpoint.architecture.depth());
            verdict.macs = Some(checkpoint.architecture.macs());
            verdicts.push(verdict);
            checkpoints.push(checkpoint);
            rows.push((name, first_images(&archive, 2 * COLUMNS)?));
        }
        let rates = speeds::<B::InnerBackend>(&checkpoints, &evaluate.sampling, self.device)?;
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
            neighbours: evaluate.neighbours,
            backend: <B::InnerBackend as Backend>::name(self.device),
            compute: crate::ops::compute(),
        };
        let table = table(&verdicts);
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
        Ok(Verdict {
            model: model.to_owned(),
            parameters: None,
            depth: None,
            macs: None,
            fid: frechet_distance(&self.reference_statistics, &statistics(&read.features)?)?,
            inception_score: inception_score(&read.probabilities, labels.len())?,
            precision,
            recall,
            accuracy: share_right(&read.classes, labels),
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
