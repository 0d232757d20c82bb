//! What the loader asks of a data set.

use super::DataError;

/// Labelled samples, read by number, from memory or from disk.
///
/// A data set may hold two views of each sample: the image, and its mirror image. Views are what an encoder made of
/// each, so that one can't be computed from the other.
pub trait Samples: Send + Sync {
    /// How many there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Views of each sample, at least 1.
    fn views(&self) -> usize;

    /// Reads view `view` of sample `index` into `out`, `[channels, side, side]` row-major, and returns its label.
    ///
    /// # Errors
    /// When there is no such sample or view, `out` has another length, or the sample can't be read.
    fn read(&self, index: usize, view: usize, out: &mut [f32]) -> Result<usize, DataError>;
}

/// Which of `views` a uniform number in [0, 1) chooses: with two, the mirrored one below a half, as the reference's
/// trainers do.
pub fn view(views: usize, u: f32) -> usize {
    usize::from(views == 2 && u < 0.5)
}
