//! Tensors in [−1, 1] as 8-bit pictures, by truncating or by rounding.

use burn::tensor::{Tensor, backend::Backend};

use super::Images;

/// Images in [−1, 1], `[batch, channels, height, width]`, as 8-bit pictures: `127.5 x + 128`,
/// clamped to 0..=255 and truncated, as DiT's samplers write decoded latents.
pub fn truncated<B: Backend>(images: Tensor<B, 4>) -> Images {
    // `as` saturates and truncates; NaN becomes black.
    bytes(images * 127.5 + 128.0, |value| value as u8)
}

/// Images in [−1, 1], `[batch, channels, height, width]`, as 8-bit pictures: `127.5 (x + 1)`,
/// rounded, so that the training pictures of a pixel model are reproduced exactly.
pub fn rounded<B: Backend>(images: Tensor<B, 4>) -> Images {
    bytes(images, byte)
}

/// A value in [−1, 1] as a byte, rounded.
pub(crate) fn byte(value: f32) -> u8 {
    // The cast saturates, and takes NaN to 0.
    ((value + 1.0) * 127.5).round() as u8
}

fn bytes<B: Backend>(images: Tensor<B, 4>, byte: impl Fn(f32) -> u8) -> Images {
    let [count, channels, height, width] = images.dims();
    let values = images.permute([0, 2, 3, 1]).into_data();
    let bytes = values.iter::<f32>().map(byte).collect();
    Images::new(bytes, [count, height, width, channels]).expect("a permutation keeps the count")
}
