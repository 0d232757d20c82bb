//! The embedded handwritten digits.
//!
//! "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning
//! Repository, 1998, <https://doi.org/10.24432/C50P49>, CC BY 4.0; the 1,797 images of its test
//! part, as distributed by scikit-learn.

use std::io::Read;
use std::sync::OnceLock;

use burn_dataset::Dataset;

use super::{DataError, Samples, plain};
use crate::random::{self, Stream};

/// Number of digits.
pub const CLASSES: usize = 10;
/// Side of a digit's image.
pub const SIDE: usize = 8;

/// Largest pixel value.
const WHITE: f32 = 16.0;
/// Images in the test split: a fifth.
const TEST: usize = 360;
/// Independent of a recipe's seed, because scores of different runs must be comparable.
const SPLIT_SEED: u64 = 0;

/// A labelled image.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// `[channels, size, size]` in [−1, 1], row-major.
    pub pixels: Vec<f32>,
    /// The class.
    pub label: usize,
}

/// Part of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// For training.
    Train,
    /// For evaluation.
    Test,
}

/// A split of the digits, 8 x 8, one channel.
#[derive(Debug, Clone)]
pub struct Digits {
    images: Vec<Image>,
}

impl Digits {
    /// Decodes a split.
    pub fn new(split: Split) -> Self {
        static ALL: OnceLock<Vec<Image>> = OnceLock::new();
        let all = ALL.get_or_init(|| {
            decode(include_bytes!("digits.csv.gz"))
                .expect("the embedded file decodes, as a test shows")
        });
        let order = random::permutation(SPLIT_SEED, Stream::Split, 0, all.len());
        let (test, train) = order.split_at(TEST);
        let chosen = if split == Split::Test { test } else { train };
        Self {
            images: chosen.iter().map(|&index| all[index].clone()).collect(),
        }
    }

    /// Number of images.
    pub fn count(&self) -> usize {
        self.images.len()
    }

    /// All images.
    pub fn images(&self) -> &[Image] {
        &self.images
    }
}

impl Dataset<Image> for Digits {
    fn len(&self) -> usize {
        self.count()
    }

    fn get(&self, index: usize) -> Option<Image> {
        plain(self, index)
    }
}

impl Samples for Digits {
    fn views(&self) -> usize {
        1
    }

    fn read(&self, index: usize, view: usize, out: &mut Vec<f32>) -> Result<usize, DataError> {
        match self.images.get(index) {
            Some(image) if view == 0 => {
                out.extend_from_slice(&image.pixels);
                Ok(image.label)
            }
            _ => Err(DataError::Sample {
                index,
                expected: format!("one of {} digits of one view", self.count()),
                found: format!("a request for view {view}"),
            }),
        }
    }
}

/// Decodes rows of 64 pixel values 0..=16 and a label.
fn decode(compressed: &[u8]) -> Option<Vec<Image>> {
    let mut text = String::new();
    flate2::read::GzDecoder::new(compressed)
        .read_to_string(&mut text)
        .ok()?;
    text.lines()
        .map(|line| {
            let row: Vec<f32> = line
                .split(',')
                .map(|value| value.trim().parse().ok())
                .collect::<Option<_>>()?;
            let (label, pixels) = row.split_last()?;
            let valid = pixels.len() == SIDE * SIDE && (0.0..CLASSES as f32).contains(label);
            valid.then(|| Image {
                pixels: pixels.iter().map(|ink| ink / WHITE * 2.0 - 1.0).collect(),
                label: *label as usize,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_file_is_the_published_one() {
        let all = decode(include_bytes!("digits.csv.gz")).unwrap();
        assert_eq!(all.len(), 1797);
        let ink: f32 = all
            .iter()
            .flat_map(|image| &image.pixels)
            .map(|pixel| (pixel + 1.0) * WHITE / 2.0)
            .sum();
        assert_eq!(ink.round() as usize, 561_718);
        let counts: Vec<usize> = (0..10)
            .map(|digit| all.iter().filter(|image| image.label == digit).count())
            .collect();
        assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
    }

    #[test]
    fn the_splits_are_disjoint_and_whole() {
        let (train, test) = (Digits::new(Split::Train), Digits::new(Split::Test));
        assert_eq!((train.count(), test.count()), (1437, 360));
        let shared = test
            .images()
            .iter()
            .filter(|image| train.images().contains(image))
            .count();
        assert_eq!(shared, 0);
    }
}
