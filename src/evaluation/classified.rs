//! Samples measured in the features of a classifier of such pictures, where there is one: FID,
//! Inception Score, precision and recall, and the share of samples that show the class asked for.

use burn::tensor::activation::softmax;
use burn::tensor::{Tensor, TensorData, backend::Backend};
use serde::{Deserialize, Serialize};

use super::{
    EvaluationError, Features, PrecisionRecall, Speed, Statistics, StatisticsAccumulator,
    frechet_distance, inception_score, precision_recall,
};
use crate::data::Samples;
use crate::images::{Images, byte};
use crate::models::{Classifier, ClassifierConfig, Shape};
use crate::ops::FusedOps;
use crate::report::{Table, short};

/// Images a classifier reads at once.
const READ_BATCH: usize = 256;

/// Pictures in the 8 bits that samples are measured in, and their classes.
pub struct Pictured {
    /// `[count, side, side, channels]`
    pub images: Images,
    /// The class of each.
    pub labels: Vec<usize>,
}

impl Pictured {
    /// Reads samples of a data set.
    ///
    /// # Errors
    /// When one can't be read, or is not of the given shape.
    pub fn read(
        samples: &dyn Samples,
        indices: &[usize],
        shape: Shape,
    ) -> Result<Self, EvaluationError> {
        let Shape {
            channels,
            side,
            classes,
        } = shape;
        let area = side * side;
        let mut pixels = Vec::with_capacity(indices.len() * area * channels);
        let mut labels = Vec::with_capacity(indices.len());
        let mut planes = Vec::new();
        for &index in indices {
            planes.clear();
            let label = samples.read(index, 0, &mut planes)?;
            if planes.len() != area * channels || label >= classes {
                return Err(EvaluationError::Value {
                    what: "a picture of the data",
                    problem: format!(
                        "picture {index}: expected {channels}x{side}x{side} in {classes} classes, found {} numbers and class {label}",
                        planes.len()
                    ),
                });
            }
            let pixel = |at: usize| planes[at..].iter().step_by(area).copied().map(byte);
            pixels.extend((0..area).flat_map(pixel));
            labels.push(label);
        }
        let images = Images::new(pixels, [labels.len(), side, side, channels]);
        let images = images.map_err(|error| EvaluationError::Value {
            what: "the pictures of the data",
            problem: error.to_string(),
        })?;
        Ok(Self { images, labels })
    }
}

/// What a classifier says of 8-bit pictures.
struct Reading {
    features: Features,
    probabilities: Features,
    classes: Vec<usize>,
}

fn read<B: FusedOps>(
    classifier: &Classifier<B>,
    config: &ClassifierConfig,
    images: &Images,
    device: &B::Device,
) -> Result<Reading, EvaluationError> {
    let ClassifierConfig {
        channels,
        input_size: size,
        ..
    } = *config;
    let area = size * size * channels;
    let (mut features, mut probabilities, mut classes, mut width) =
        (Vec::new(), Vec::new(), Vec::new(), 0);
    for chunk in images.pixels().chunks(READ_BATCH * area) {
        let values: Vec<f32> = (chunk.iter())
            .map(|byte| f32::from(*byte) / 127.5 - 1.0)
            .collect();
        let data = TensorData::new(values, [chunk.len() / area, size, size, channels]);
        let pictures = Tensor::<B, 4>::from_data(data, device).permute([0, 3, 1, 2]);
        let read = classifier.forward(pictures);
        width = read.features.dims()[1];
        features.extend(read.features.into_data().iter::<f32>());
        let found = read.logits.clone().argmax(1).into_data();
        classes.extend(found.iter::<i64>().map(|class| class as usize));
        probabilities.extend(softmax(read.logits, 1).into_data().iter::<f32>());
    }
    Ok(Reading {
        features: Features::new(width, features)?,
        probabilities: Features::new(config.classes, probabilities)?,
        classes,
    })
}

/// Share of pictures that a classifier reads as their class.
///
/// # Errors
/// When its features are not finite numbers.
pub fn accuracy<B: FusedOps>(
    classifier: &Classifier<B>,
    config: &ClassifierConfig,
    pictured: &Pictured,
    device: &B::Device,
) -> Result<f64, EvaluationError> {
    let read = read(classifier, config, &pictured.images, device)?;
    Ok(share_right(&read.classes, &pictured.labels))
}

fn share_right(classes: &[usize], labels: &[usize]) -> f64 {
    let pairs = classes.iter().zip(labels);
    let right = pairs.filter(|(class, label)| class == label).count();
    right as f64 / labels.len() as f64
}

/// Scores of one model's samples, or of real pictures.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClassifiedVerdict {
    /// The model, as the recipe names it.
    pub model: String,
    /// Parameters, the fixed position table counted; none for real images.
    pub parameters: Option<usize>,
    /// Layers.
    pub depth: Option<usize>,
    /// Multiply-accumulates of one pass of one image.
    pub macs: Option<usize>,
    /// Images seen in the stage that trained it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<usize>,
    /// Layers of the unpruned model that it has, of one that was pruned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Vec<usize>>,
    /// How many layers the unpruned model has; branches of layers, if it was pruned in those.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_of: Option<usize>,
    /// Mean squared error of its predictions on held-out pictures, of a model that was only pruned
    /// too: not the calibration loss, which is of training pictures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Mean structural similarity of its samples and the first model's from the same noise; none of
    /// the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssim: Option<f64>,
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

/// A classifier, and the pictures that samples are measured against.
pub struct ClassifierJudge<B: Backend> {
    classifier: Classifier<B>,
    config: ClassifierConfig,
    device: B::Device,
    reference: Features,
    statistics: Statistics,
    neighbours: usize,
}

impl<B: FusedOps> ClassifierJudge<B> {
    /// A judge that holds samples against `reference`, with manifolds of balls that reach to the
    /// `neighbours`-th nearest point.
    ///
    /// # Errors
    /// When the features are not finite numbers.
    pub fn new(
        classifier: Classifier<B>,
        config: ClassifierConfig,
        reference: &Pictured,
        neighbours: usize,
        device: &B::Device,
    ) -> Result<Self, EvaluationError> {
        let reference = read(&classifier, &config, &reference.images, device)?.features;
        Ok(Self {
            classifier,
            config,
            device: device.clone(),
            statistics: statistics(&reference)?,
            reference,
            neighbours,
        })
    }

    /// Measures pictures; `labels` are the classes that were asked for.
    ///
    /// # Errors
    /// When there are too few for a measure, or features are not finite numbers.
    pub fn verdict(
        &self,
        model: &str,
        images: &Images,
        labels: &[usize],
    ) -> Result<ClassifiedVerdict, EvaluationError> {
        let read = read(&self.classifier, &self.config, images, &self.device)?;
        let PrecisionRecall { precision, recall } =
            precision_recall(&self.reference, &read.features, self.neighbours)?;
        Ok(ClassifiedVerdict {
            model: model.to_owned(),
            parameters: None,
            depth: None,
            macs: None,
            images: None,
            kept: None,
            kept_of: None,
            loss: None,
            ssim: None,
            fid: frechet_distance(&self.statistics, &statistics(&read.features)?)?,
            inception_score: inception_score(&read.probabilities, labels.len())?,
            precision,
            recall,
            accuracy: share_right(&read.classes, labels),
            images_per_second: None,
        })
    }
}

fn statistics(features: &Features) -> Result<Statistics, EvaluationError> {
    let mut accumulator = StatisticsAccumulator::new(features.dim());
    accumulator.push(features)?;
    accumulator.finish()
}

/// The verdicts as a person reads them. Accuracy is the share of samples that the classifier reads
/// as their class; images/s the median of rounds in turns, with half the distance between
/// quartiles.
pub fn classified_table(verdicts: &[ClassifiedVerdict]) -> Table<10> {
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
