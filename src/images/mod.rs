//! 8-bit pictures.
//!
//! [`Images`] is a batch of one size, as samplers make it and the evaluation and the report read
//! it. [`read_rgb`] reads a picture from a file; [`center_crop`], [`pad`] and [`to_chw`] prepare it
//! for a network. The result equals the reference's preprocessing bit for bit, if that runs with
//! Pillow 9.5 to 12.1. Pillow 13.0.0 crops pictures more than twice as high as wide differently.

use thiserror::Error;

mod crop;
mod decode;
mod jpeg;
mod tensor;

pub use crop::{CenterCrop, center_crop, pad, to_chw};
pub use decode::{PictureError, picture_size, read_rgb, read_then};
pub(crate) use tensor::byte;
pub use tensor::{rounded, truncated};

/// Pictures of one size: `u8` in `[count, height, width, channels]` order (NHWC), rows top to
/// bottom, 0 black and 255 white.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    shape: [usize; 4],
    pixels: Vec<u8>,
}

/// The number of pixels does not match the shape.
#[derive(Debug, Error)]
#[error("images of shape [count, height, width, channels] = {shape:?} need {}, found {found} bytes",
    .expected.map_or("more bytes than can be addressed".to_owned(), |n| format!("{n} bytes")))]
pub struct ImagesError {
    shape: [usize; 4],
    expected: Option<usize>,
    found: usize,
}

impl Images {
    /// Takes `pixels` as `[count, height, width, channels]`.
    ///
    /// # Errors
    ///
    /// [`ImagesError`] when the number of bytes is not the product of `shape`.
    ///
    /// # Examples
    ///
    /// ```
    /// use tinyfusion::images::Images;
    /// let two = Images::new(vec![0, 255], [2, 1, 1, 1])?;
    /// assert_eq!(two.image(1), [255]);
    /// assert!(Images::new(vec![0, 255], [2, 8, 8, 3]).is_err());
    /// # Ok::<(), tinyfusion::images::ImagesError>(())
    /// ```
    pub fn new(pixels: Vec<u8>, shape: [usize; 4]) -> Result<Self, ImagesError> {
        let expected = shape
            .iter()
            .try_fold(1usize, |n, &side| n.checked_mul(side));
        if expected == Some(pixels.len()) {
            Ok(Self { shape, pixels })
        } else {
            let found = pixels.len();
            Err(ImagesError {
                shape,
                expected,
                found,
            })
        }
    }

    /// `[count, height, width, channels]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// All pixels, `[count, height, width, channels]`.
    pub fn into_pixels(self) -> Vec<u8> {
        self.pixels
    }

    /// All bytes, `[count, height, width, channels]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Picture `index`, `[height, width, channels]`; empty when there is no such picture.
    pub fn image(&self, index: usize) -> &[u8] {
        let size = self.shape[1] * self.shape[2] * self.shape[3];
        let start = index.saturating_mul(size);
        self.pixels
            .get(start..start.saturating_add(size))
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_slices_of_the_batch() {
        let images = Images::new((0..24).collect(), [2, 2, 2, 3]).unwrap();
        assert_eq!(images.image(0), (0..12).collect::<Vec<u8>>());
        assert_eq!(images.image(1), (12..24).collect::<Vec<u8>>());
        assert!(images.image(2).is_empty());
        assert!(images.image(usize::MAX).is_empty());
    }

    #[test]
    fn a_wrong_size_names_both_numbers() {
        let error = Images::new(vec![0; 5], [1, 2, 3, 1])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("[1, 2, 3, 1] need 6 bytes, found 5 bytes"),
            "{error}"
        );
        let huge = Images::new(vec![], [usize::MAX, 2, 1, 1])
            .unwrap_err()
            .to_string();
        assert!(huge.contains("more bytes than can be addressed"), "{huge}");
    }
}
