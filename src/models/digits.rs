//! The digit classifier: its penultimate features measure digit-FID, precision and recall, its logits the
//! Inception Score and whether a sample shows the digit that was asked for.

use burn::module::Module;
use burn::tensor::{Tensor, activation, backend::Backend};
use serde::{Deserialize, Serialize};

use crate::ops::{Convolution, FusedOps, Linear, Window};

/// Number of digits.
pub const CLASSES: usize = 10;
/// Side of a digit's image.
pub const SIDE: usize = 8;

/// Sizes of a [`DigitsClassifier`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DigitsClassifierConfig {
    /// Width of the penultimate features; the convolutions have a quarter and a half of it.
    pub width: usize,
}

/// A small convolutional classifier of `[batch, 1, 8, 8]` images in [−1, 1].
#[derive(Module, Debug)]
pub struct DigitsClassifier<B: Backend> {
    conv1: Convolution<B>,
    conv2: Convolution<B>,
    features: Linear<B>,
    head: Linear<B>,
}

/// What a classifier says of a batch.
#[derive(Debug)]
pub struct Reading<B: Backend> {
    /// Penultimate features, `[batch, width]`.
    pub features: Tensor<B, 2>,
    /// `[batch, 10]`
    pub logits: Tensor<B, 2>,
}

impl<B: Backend> DigitsClassifier<B> {
    /// A classifier of zeros.
    pub fn zeros(config: &DigitsClassifierConfig, device: &B::Device) -> Self {
        let width = config.width;
        let window = Window::padded([1; 2]);
        Self {
            conv1: Convolution::zeros(1, width / 4, [3; 2], window, device),
            conv2: Convolution::zeros(width / 4, width / 2, [3; 2], window.every(2), device),
            features: Linear::zeros(width / 2 * (SIDE / 2).pow(2), width, device),
            head: Linear::zeros(width, CLASSES, device),
        }
    }
}

impl<B: FusedOps> DigitsClassifier<B> {
    /// Reads a batch of images.
    pub fn forward(&self, x: Tensor<B, 4>) -> Reading<B> {
        let x = activation::relu(self.conv1.forward(x)); // [batch, width/4, 8, 8]
        let x = activation::relu(self.conv2.forward(x)); // [batch, width/2, 4, 4]
        let features = activation::relu(self.features.forward(x.flatten::<2>(1, 3))); // [batch, width]
        let logits = self.head.forward(features.clone());
        Reading { features, logits }
    }
}
