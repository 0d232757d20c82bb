//! What the loader asks of a data set.

use burn_dataset::Dataset;

use super::{DataError, Image};

/// Labelled samples, read by number, from memory or from disk.
///
/// A data set may hold two views of each sample: the image, and its mirror image. Views are what an encoder made of
/// each, so that one can't be computed from the other. As Burn's data set it is that of the plain views ([`plain`]).
pub trait Samples: Dataset<Image> {
    /// Views of each sample, at least 1.
    fn views(&self) -> usize;

    /// Appends view `view` of sample `index`, `[channels, side, side]` row-major, to `out`, and returns its label.
    ///
    /// # Errors
    /// When there is no such sample or view, or it can't be read; `out` is then of no use.
    fn read(&self, index: usize, view: usize, out: &mut Vec<f32>) -> Result<usize, DataError>;
}

/// A sample's plain view, as a [`Dataset`] gives it: None if there is no such sample, or it can't be read.
pub fn plain(samples: &impl Samples, index: usize) -> Option<Image> {
    let mut pixels = Vec::new();
    let label = (index < samples.len()).then(|| samples.read(index, 0, &mut pixels))?;
    let label = label.ok()?;
    Some(Image { pixels, label })
}

/// Which of `views` a uniform number in [0, 1) chooses: with two, the mirrored one below a half, as the reference's
/// trainers do.
pub fn view(views: usize, u: f32) -> usize {
    usize::from(views == 2 && u < 0.5)
}
