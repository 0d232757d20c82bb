//! The classifier of small pictures: its penultimate features measure FID, precision and recall of
//! models of such pictures; its logits give the Inception Score and the accuracy of samples, the
//! share that show the requested class.

use burn::module::Module;
use burn::tensor::{Tensor, activation, backend::Backend};
use serde::{Deserialize, Serialize};

use super::keys::Check;
use super::{Demand, Key, Keys, Shape};
use crate::ops::{Convolution, FusedOps, Linear, Window};

/// Sides are halved until they are at most this.
const LAST_SIDE: usize = 7;

/// Sizes of a [`Classifier`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassifierConfig {
    /// Width of the penultimate features; the convolutions have a quarter and a half of it.
    pub width: usize,
    /// Channels of a picture.
    #[serde(default = "one")]
    pub channels: usize,
    /// Side of a picture.
    #[serde(default = "eight")]
    pub input_size: usize,
    /// Number of classes.
    #[serde(default = "ten")]
    pub classes: usize,
}

// Defaults for older files, which only have the width: all classifiers were of digits then.
fn one() -> usize {
    1
}
fn eight() -> usize {
    8
}
fn ten() -> usize {
    10
}

impl ClassifierConfig {
    /// Sizes of the pictures it reads.
    pub fn shape(&self) -> Shape {
        Shape {
            channels: self.channels,
            side: self.input_size,
            classes: self.classes,
        }
    }

    /// Reads the sizes from whoever gives them; those of the pictures are `samples` where none are
    /// given.
    #[rustfmt::skip]
    pub fn read(keys: &mut dyn Keys, samples: Shape) -> Self {
        let width = keys.integer(
            Key { name: "width", least: 4, most: 4096, default: 64 },
            Some(Demand {
                holds: &|width| width.is_multiple_of(4),
                must: "be a multiple of 4".to_owned(),
            }),
        );
        let Shape { channels, side: input_size, classes } = Shape::read(keys, samples);
        Self { width, channels, input_size, classes }
    }

    /// Sides after each convolution but the first.
    fn sides(&self) -> Vec<usize> {
        let mut sides = vec![self.input_size.div_ceil(2)];
        while let Some(&side) = sides.last()
            && side > LAST_SIDE
        {
            sides.push(side.div_ceil(2));
        }
        sides
    }

    /// Name and shape of each tensor.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (first, width) = (self.width / 4, self.width / 2);
        let sides = self.sides();
        let area = sides.last().map_or(0, |side| side * side);
        let mut layers = vec![
            ("conv1".to_owned(), vec![first, self.channels, 3, 3]),
            ("conv2".to_owned(), vec![width, first, 3, 3]),
        ];
        let more = (0..sides.len() - 1)
            .map(|index| (format!("conv_more.{index}"), vec![width, width, 3, 3]));
        layers.extend(more);
        layers.push(("features".to_owned(), vec![self.width, width * area]));
        layers.push(("head".to_owned(), vec![self.classes, self.width]));
        (layers.into_iter())
            .flat_map(|(name, shape)| {
                [
                    (format!("{name}.bias"), vec![shape[0]]),
                    (format!("{name}.weight"), shape),
                ]
            })
            .collect()
    }

    /// Why no classifier can have these sizes, if so.
    pub fn problem(&self) -> Option<String> {
        if self.classes < 2 {
            return Some(format!(
                "{} {} to tell apart; without classes, pictures are measured with `inception`",
                self.classes,
                if self.classes == 1 {
                    "class is nothing"
                } else {
                    "classes are nothing"
                }
            ));
        }
        let mut check = Check::new(|name| {
            let value = match name {
                "width" => self.width,
                "channels" => self.channels,
                "input_size" => self.input_size,
                _ => self.classes,
            };
            value as f64
        });
        Self::read(&mut check, self.shape());
        check.problem
    }

    /// Number of activations for one picture.
    pub fn activations(&self) -> usize {
        let sides = self
            .sides()
            .into_iter()
            .map(|side| self.width / 2 * side * side);
        self.width / 4 * self.input_size.pow(2) + sides.sum::<usize>() + self.width + self.classes
    }

    /// Multiply-accumulates of one picture.
    pub fn macs(&self) -> usize {
        let (first, width) = (self.width / 4, self.width / 2);
        let sides = self.sides();
        let last = sides.last().map_or(0, |side| side * side);
        let mut macs = 9 * self.channels * first * self.input_size.pow(2);
        let mut from = first;
        for side in &sides {
            macs += 9 * from * width * side * side;
            from = width;
        }
        macs + last * width * self.width + self.width * self.classes
    }
}

impl std::fmt::Display for ClassifierConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            width,
            channels,
            input_size: size,
            classes,
        } = self;
        write!(
            f,
            "classifier of {channels}x{size}x{size}, {classes} classes, width {width}"
        )
    }
}

/// A small convolutional classifier of `[batch, channels, size, size]` pictures in [−1, 1].
#[derive(Module, Debug)]
pub struct Classifier<B: Backend> {
    conv1: Convolution<B>,
    conv2: Convolution<B>,
    /// As many more convolutions as it takes to halve the side to `LAST_SIDE`.
    conv_more: Vec<Convolution<B>>,
    features: Linear<B>,
    head: Linear<B>,
}

/// A classifier's output for a batch.
#[derive(Debug)]
pub struct Reading<B: Backend> {
    /// Penultimate features, `[batch, width]`.
    pub features: Tensor<B, 2>,
    /// `[batch, classes]`
    pub logits: Tensor<B, 2>,
}

impl<B: Backend> Classifier<B> {
    /// A classifier of zeros.
    pub fn zeros(config: &ClassifierConfig, device: &B::Device) -> Self {
        let (first, width) = (config.width / 4, config.width / 2);
        let window = Window::padded([1; 2]);
        let halving = |from| Convolution::zeros(from, width, [3; 2], window.every(2), device);
        let sides = config.sides();
        let area = sides.last().map_or(0, |side| side * side);
        Self {
            conv1: Convolution::zeros(config.channels, first, [3; 2], window, device),
            conv2: halving(first),
            conv_more: sides[1..].iter().map(|_| halving(width)).collect(),
            features: Linear::zeros(width * area, config.width, device),
            head: Linear::zeros(config.width, config.classes, device),
        }
    }
}

impl<B: FusedOps> Classifier<B> {
    /// Runs the classifier on a batch of pictures.
    pub fn forward(&self, x: Tensor<B, 4>) -> Reading<B> {
        let mut x = activation::relu(self.conv1.forward(x)); // [batch, width/4, size, size]
        for conv in std::iter::once(&self.conv2).chain(&self.conv_more) {
            x = activation::relu(conv.forward(x)); // [batch, width/2, half the side, half the side]
        }
        // [batch, width]
        let features = activation::relu(self.features.forward(x.flatten::<2>(1, 3)));
        let logits = self.head.forward(features.clone());
        Reading { features, logits }
    }
}

#[cfg(all(test, feature = "ndarray"))]
mod tests {
    use super::*;

    #[test]
    fn any_side_is_halved_until_it_is_small() {
        type B = burn_ndarray::NdArray;
        for (size, sides) in [
            (1, vec![1]),
            (8, vec![4]),
            (28, vec![14, 7]),
            (32, vec![16, 8, 4]),
            (33, vec![17, 9, 5]),
        ] {
            let config = ClassifierConfig {
                width: 8,
                channels: 3,
                input_size: size,
                classes: 5,
            };
            assert_eq!(config.sides(), sides);
            assert_eq!(config.problem(), None);
            let classifier = Classifier::<B>::zeros(&config, &Default::default());
            let mut tensors = config.tensors();
            tensors.sort();
            let state = crate::state::collect::<B, _>(&classifier);
            let there: Vec<_> = (state.iter())
                .map(|(name, array)| (name.clone(), array.shape.clone()))
                .collect();
            assert_eq!(tensors, there);
            let x = Tensor::zeros([2, 3, size, size], &Default::default());
            let Reading { features, logits } = classifier.forward(x);
            assert_eq!((features.dims(), logits.dims()), ([2, 8], [2, 5]));
        }
    }

    #[test]
    fn a_file_that_says_its_width_alone_is_a_digit_classifiers() {
        let config: ClassifierConfig = serde_json::from_str(r#"{"width": 64}"#).unwrap();
        assert_eq!(
            (config.channels, config.input_size, config.classes),
            (1, 8, 10)
        );
        for (config, words) in [
            (
                ClassifierConfig {
                    width: 6,
                    ..config.clone()
                },
                "multiple of 4",
            ),
            (
                ClassifierConfig {
                    classes: 1,
                    ..config.clone()
                },
                "1 class is nothing",
            ),
            (
                ClassifierConfig {
                    input_size: 0,
                    ..config.clone()
                },
                "input_size is 0, which must lie in 1..=4096",
            ),
            (
                ClassifierConfig {
                    input_size: 1 << 13,
                    ..config
                },
                "input_size is 8192, which must",
            ),
        ] {
            let problem = config.problem().unwrap();
            assert!(problem.contains(words), "{problem}");
        }
    }
}
