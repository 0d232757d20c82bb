//! The interface between the loader and a data set.

use std::sync::Arc;

use burn_dataset::Dataset;

use super::{DataError, Image};

/// Labelled samples, read by index, from memory or from disk.
///
/// A data set may hold two views of each sample: the image and its mirror image. For latents, each
/// view was encoded separately, so one can't be computed from the other; for pictures, see
/// [`Mirrored`]. As Burn's `Dataset` it holds the plain views ([`plain`]).
pub trait Samples: Dataset<Image> {
    /// Views per sample, at least 1.
    fn views(&self) -> usize;

    /// Appends view `view` of sample `index`, `[channels, side, side]` row-major, to `out`, and
    /// returns its label.
    ///
    /// # Errors
    /// When there is no such sample or view, or it can't be read; the contents of `out` are then
    /// undefined.
    fn read(&self, index: usize, view: usize, out: &mut Vec<f32>) -> Result<usize, DataError>;
}

/// A sample's plain view, as for a [`Dataset`]: None if there is no such sample, or it can't be
/// read.
pub fn plain(samples: &impl Samples, index: usize) -> Option<Image> {
    let mut pixels = Vec::new();
    let label = (index < samples.len()).then(|| samples.read(index, 0, &mut pixels))?;
    let label = label.ok()?;
    Some(Image { pixels, label })
}

/// The view that a uniform number in [0, 1) chooses: the mirrored one below a half if there are
/// two, as in the reference's trainers.
pub fn view(views: usize, u: f32) -> usize {
    usize::from(views == 2 && u < 0.5)
}

/// The number in [−1, 1] that a picture's byte represents.
pub(super) fn level(byte: u8) -> f32 {
    f32::from(byte) / 127.5 - 1.0
}

/// Pictures and their mirror images as two views; mirroring happens on reading.
pub struct Mirrored {
    plain: Arc<dyn Samples>,
    side: usize,
}

impl Mirrored {
    /// Adds mirror images, left to right, to samples `[channels, side, side]` of one view.
    pub fn new(plain: Arc<dyn Samples>, side: usize) -> Self {
        Self { plain, side }
    }
}

impl Dataset<Image> for Mirrored {
    fn len(&self) -> usize {
        self.plain.len()
    }

    fn get(&self, index: usize) -> Option<Image> {
        self.plain.get(index)
    }
}

impl Samples for Mirrored {
    fn views(&self) -> usize {
        2
    }

    fn read(&self, index: usize, view: usize, out: &mut Vec<f32>) -> Result<usize, DataError> {
        let start = out.len();
        let label = self.plain.read(index, 0, out)?;
        if view == 1 {
            (out[start..].chunks_exact_mut(self.side)).for_each(<[f32]>::reverse);
        }
        Ok(label)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Digits, Split};
    use super::*;

    #[test]
    fn the_mirror_image_is_that_of_each_row() {
        let plain = Arc::new(Digits::new(Split::Test));
        let both = Mirrored::new(plain.clone(), 8);
        assert_eq!((both.views(), both.len()), (2, plain.len()));
        // Existing values stay.
        let mut values = vec![7.0];
        let label = both.read(3, 0, &mut values).unwrap();
        assert_eq!(both.read(3, 1, &mut values).unwrap(), label);
        assert_eq!(values[0], 7.0);
        let (first, second) = values[1..].split_at(64);
        assert_eq!(first, plain.images()[3].pixels);
        assert_ne!(first, second);
        for (row, mirrored) in first.chunks(8).zip(second.chunks(8)) {
            assert!(row.iter().eq(mirrored.iter().rev()));
        }
    }
}
