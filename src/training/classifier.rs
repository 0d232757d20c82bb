//! Training of a classifier.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use burn::train::{InferenceStep, TrainOutput, TrainStep};

use super::{Scalars, StepReport};
use crate::data::Batch;
use crate::models::Classifier;
use crate::ops::{self, TrainingBackend};

/// Standard deviation of the noise added to training images, because generated pictures are not as
/// clean as real ones.
const NOISE: f64 = 0.2;

/// A classifier in training.
#[derive(Module, Debug)]
pub struct ClassifierTrainee<B: Backend> {
    /// The classifier.
    pub classifier: Classifier<B>,
}

impl<B: TrainingBackend> TrainStep for ClassifierTrainee<B> {
    type Input = Batch<B>;
    type Output = StepReport;

    fn step(&self, batch: Batch<B>) -> TrainOutput<StepReport> {
        let images = batch.t.len();
        let logits = self
            .classifier
            .forward(batch.x + batch.noise.mul_scalar(NOISE))
            .logits;
        let right = logits
            .clone()
            .argmax(1)
            .squeeze_dim::<1>(1)
            .equal(batch.y.clone())
            .float()
            .mean();
        // Burn's own softmax has a logarithm's gradient by an estimated reciprocal.
        let shifted = logits.clone() - logits.max_dim(1).detach();
        let likelihood = shifted.clone() - ops::log(shifted.exp().sum_dim(1));
        let likelihood = likelihood.gather(1, batch.y.unsqueeze_dim(1));
        let loss = likelihood.mean().neg();
        let values = Tensor::cat(vec![loss.clone().inner(), right.inner()], 0).into_data();
        let scalars = ["loss", "accuracy"]
            .into_iter()
            .zip(values.iter::<f64>())
            .collect();
        let gradients = GradientsParams::from_grads(loss.backward(), self);
        TrainOutput {
            grads: gradients,
            item: StepReport {
                scalars: Scalars(scalars),
                images,
            },
        }
    }
}

impl<B: Backend> InferenceStep for ClassifierTrainee<B> {
    type Input = ();
    type Output = ();

    fn step(&self, (): ()) {}
}
