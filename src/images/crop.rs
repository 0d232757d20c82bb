//! Square pictures by the centre crop of ADM's preprocessing (`center_crop_arr` of
//! guided-diffusion, which DiT, SiT and MAR share), bit for bit.
//!
//! While the shorter side is at least twice the target, the picture is halved with a box filter.
//! Then a bicubic filter resizes the shorter side to the target, and the centre is cut out. Each
//! step resamples 8-bit pictures as Pillow 9.5 to 12.1 does: rows first, then columns, with
//! fixed-point weights of 22 fractional bits, rounded to a byte after *every* pass. Real arithmetic
//! gives different values in every second pixel.
//!
//! Pillow 13.0.0 gives the same result for pictures at most twice as high as wide. For taller ones
//! it resamples the columns first, and since every pass rounds, its pixels differ there by up to 31
//! levels. Here they stay those of the older versions.
//!
//! Only the pixels that the crop needs are computed: working backwards from the crop, each pass
//! knows the range it must deliver. So an extremely long picture costs no more memory than a square
//! one.

use std::ops::Range;

use image::RgbImage;

/// Fractional bits of a weight.
const PRECISION: u32 = 22;
const CHANNELS: usize = 3;

/// The filters: a weight by distance from the centre, up to a reach.
#[derive(Clone, Copy)]
enum Filter {
    Box,
    Cubic,
}

impl Filter {
    fn reach(self) -> f64 {
        match self {
            Self::Box => 0.5,
            Self::Cubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Self::Cubic => {
                // Keys' kernel with a = -1/2, in Pillow's order of operations.
                const A: f64 = -0.5;
                let x = x.abs();
                if x < 1.0 {
                    ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
                } else if x < 2.0 {
                    (((x - 5.0) * x + 8.0) * x - 4.0) * A
                } else {
                    0.0
                }
            }
        }
    }
}

/// One resampling along one side: a range of outputs, each a weighted sum of neighbouring inputs.
struct Pass {
    /// Range of the inputs that are read.
    inputs: Range<usize>,
    /// For each output: its first input, relative to the start of `inputs`, and its weights.
    taps: Vec<(usize, Vec<i32>)>,
}

impl Pass {
    fn new(filter: Filter, from: usize, to: usize, outputs: Range<usize>) -> Self {
        let scale = from as f64 / to as f64;
        // A shrinking filter is widened, so that it covers every input.
        let stretch = scale.max(1.0);
        let reach = filter.reach() * stretch;
        let narrow = 1.0 / stretch;
        let mut taps: Vec<(usize, Vec<i32>)> = outputs
            .map(|output| {
                let center = (output as f64 + 0.5) * scale;
                // Casts truncate, and saturate to zero before the first input.
                let first = (center - reach + 0.5) as usize;
                let end = ((center + reach + 0.5) as usize).min(from);
                let weights: Vec<f64> = (first..end)
                    .map(|input| filter.weight((input as f64 - center + 0.5) * narrow))
                    .collect();
                let total: f64 = weights.iter().sum();
                // `round` rounds halves away from zero, as Pillow does.
                let fixed =
                    |weight: f64| (weight / total * f64::from(1 << PRECISION)).round() as i32;
                (first, weights.into_iter().map(fixed).collect())
            })
            .collect();
        let start = taps.iter().map(|(first, _)| *first).min().unwrap_or(0);
        let ends = taps.iter().map(|(first, weights)| first + weights.len());
        let inputs = start..ends.max().unwrap_or(start);
        taps.iter_mut().for_each(|(first, _)| *first -= start);
        Self { inputs, taps }
    }

    /// Resamples every row of `pixels`, `[rows, inputs, 3]` to `[rows, outputs, 3]`.
    fn along_rows(&self, pixels: &[u8]) -> Vec<u8> {
        let mut resampled =
            Vec::with_capacity(pixels.len() / self.inputs.len().max(1) * self.taps.len());
        for row in pixels.chunks_exact(self.inputs.len() * CHANNELS) {
            let (row, _) = row.as_chunks::<CHANNELS>();
            for (first, weights) in &self.taps {
                let mut sums = [HALF; CHANNELS];
                for (weight, pixel) in weights.iter().zip(&row[*first..]) {
                    for (sum, byte) in sums.iter_mut().zip(pixel) {
                        *sum += weight * i32::from(*byte);
                    }
                }
                resampled.extend(sums.map(to_byte));
            }
        }
        resampled
    }

    /// Resamples every column of `pixels`, `[inputs, columns, 3]` to `[outputs, columns, 3]`.
    fn along_columns(&self, pixels: &[u8]) -> Vec<u8> {
        let width = pixels.len() / self.inputs.len().max(1);
        let mut resampled = Vec::with_capacity(width * self.taps.len());
        let mut sums = vec![HALF; width];
        for (first, weights) in &self.taps {
            sums.fill(HALF);
            let rows = pixels[first * width..].chunks_exact(width);
            for (weight, row) in weights.iter().zip(rows) {
                for (sum, byte) in sums.iter_mut().zip(row) {
                    *sum += weight * i32::from(*byte);
                }
            }
            resampled.extend(sums.iter().copied().map(to_byte));
        }
        resampled
    }
}

/// Added to a sum before its fraction is cut off, to round it.
const HALF: i32 = 1 << (PRECISION - 1);

fn to_byte(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// The passes along one side; `None` if the length stays, where Pillow does nothing.
struct Side {
    /// Range of the picture's pixels that are read.
    inputs: Range<usize>,
    passes: Vec<Option<Pass>>,
}

impl Side {
    fn new(length: usize, halvings: usize, resized: usize, size: usize) -> Self {
        // Halvings could bring a long picture's short side to zero.
        let halved = |times: usize| (length >> times).max(1);
        let mut lengths: Vec<usize> = (0..=halvings).map(halved).collect();
        lengths.push(resized);
        let start = (resized - size) / 2;
        let mut inputs = start..start + size;
        let mut passes = Vec::new();
        for (index, pair) in lengths.windows(2).enumerate().rev() {
            let filter = if index < halvings {
                Filter::Box
            } else {
                Filter::Cubic
            };
            let pass =
                (pair[0] != pair[1]).then(|| Pass::new(filter, pair[0], pair[1], inputs.clone()));
            inputs = pass.as_ref().map_or(inputs, |pass| pass.inputs.clone());
            passes.push(pass);
        }
        passes.reverse();
        Self { inputs, passes }
    }
}

/// The centre crop for pictures of one size, with all weights computed once.
pub struct CenterCrop {
    dimensions: (u32, u32),
    size: usize,
    /// Horizontal and vertical; `None` for a picture or a crop without pixels.
    sides: Option<[Side; 2]>,
}

impl CenterCrop {
    /// The crop `[size, size]` of pictures with `dimensions` = (width, height).
    pub fn new(dimensions: (u32, u32), size: usize) -> Self {
        let (width, height) = (dimensions.0 as usize, dimensions.1 as usize);
        let shorter = width.min(height);
        let sides = (shorter > 0 && size > 0).then(|| {
            let mut halvings = 0;
            while shorter >> halvings >= size.saturating_mul(2) {
                halvings += 1;
            }
            let scale = size as f64 / (shorter >> halvings) as f64;
            [width, height].map(|length| {
                let resized = ((length >> halvings) as f64 * scale).round_ties_even() as usize;
                Side::new(length, halvings, resized, size)
            })
        });
        Self {
            dimensions,
            size,
            sides,
        }
    }

    /// Crops a picture to `[size, size, 3]`, rows top to bottom; empty if the picture or the crop
    /// has no pixels. For a picture of another size than `dimensions`, weights are recomputed.
    pub fn apply(&self, picture: &RgbImage) -> Vec<u8> {
        if picture.dimensions() != self.dimensions {
            return center_crop(picture, self.size);
        }
        let Some([horizontal, vertical]) = &self.sides else {
            return Vec::new();
        };
        resample(picture, horizontal, vertical)
    }
}

/// The part of a picture that the passes deliver, rows top to bottom.
fn resample(picture: &RgbImage, horizontal: &Side, vertical: &Side) -> Vec<u8> {
    let mut pixels = Vec::new();
    let rows = picture
        .as_raw()
        .chunks_exact(picture.width() as usize * CHANNELS);
    for row in rows.skip(vertical.inputs.start).take(vertical.inputs.len()) {
        let Range { start, end } = horizontal.inputs;
        pixels.extend_from_slice(&row[start * CHANNELS..end * CHANNELS]);
    }
    // Every pass delivers exactly the inputs of the next.
    for (across, down) in horizontal.passes.iter().zip(&vertical.passes) {
        if let Some(pass) = across {
            pixels = pass.along_rows(&pixels);
        }
        if let Some(pass) = down {
            pixels = pass.along_columns(&pixels);
        }
    }
    pixels
}

/// A whole picture in `[size, size, 3]`, with `fill` around it. If its longer side exceeds `size`,
/// it is reduced to that as [`center_crop`] reduces the shorter one; a smaller picture is not
/// enlarged. It is centred; if the margins can't be equal, the left and upper ones are a pixel
/// smaller. All `fill` if the picture has no pixels.
pub fn pad(picture: &RgbImage, size: usize, fill: u8) -> Vec<u8> {
    let lengths = [picture.width() as usize, picture.height() as usize];
    let mut padded = vec![fill; size * size * CHANNELS];
    let longer = lengths[0].max(lengths[1]);
    if lengths.contains(&0) || size == 0 {
        return padded;
    }
    let mut halvings = 0;
    while longer >> halvings >= size.saturating_mul(2) {
        halvings += 1;
    }
    let scale = (size as f64 / (longer >> halvings) as f64).min(1.0);
    let resized = lengths.map(|length| {
        let resized = ((length >> halvings) as f64 * scale).round_ties_even() as usize;
        resized.clamp(1, size)
    });
    let [horizontal, vertical] =
        [0, 1].map(|side| Side::new(lengths[side], halvings, resized[side], resized[side]));
    let pixels = resample(picture, &horizontal, &vertical);
    let [left, top] = resized.map(|length| (size - length) / 2);
    let width = resized[0] * CHANNELS;
    for (row, pixels) in pixels.chunks_exact(width).enumerate() {
        let start = ((top + row) * size + left) * CHANNELS;
        padded[start..start + width].copy_from_slice(pixels);
    }
    padded
}

/// The centre crop `[size, size, 3]` of a picture, as ADM, DiT, SiT and MAR prepare ImageNet; the
/// algorithm is described at the top of the module. Empty if `size` is 0 or the picture has no
/// pixels. For many pictures of one size, see [`CenterCrop`].
///
/// # Examples
///
/// ```
/// use tinyfusion::images::{center_crop, to_chw};
/// let grey = image::RgbImage::from_pixel(300, 200, image::Rgb([51, 51, 51]));
/// let crop = center_crop(&grey, 64);
/// assert_eq!(crop, vec![51; 64 * 64 * 3]);
/// // 51 of 255 is a fifth of the way from -1 to 1.
/// assert!((to_chw(&crop, 64, false)[0] + 0.6).abs() < 1e-6);
/// ```
pub fn center_crop(picture: &RgbImage, size: usize) -> Vec<u8> {
    CenterCrop::new(picture.dimensions(), size).apply(picture)
}

/// A square picture `[size, size, 3]` as network input: `[3, size, size]` in [−1, 1], mirrored left
/// to right if `mirrored`. Excess `pixels` are ignored, missing ones are black.
pub fn to_chw(pixels: &[u8], size: usize, mirrored: bool) -> Vec<f32> {
    (0..CHANNELS)
        .flat_map(|channel| {
            (0..size * size).map(move |at| {
                let (row, column) = (at / size, at % size);
                let column = if mirrored { size - 1 - column } else { column };
                let byte = pixels.get((row * size + column) * CHANNELS + channel);
                // The order of torchvision's ToTensor and Normalize(0.5, 0.5), for bitwise
                // equality.
                (f32::from(byte.copied().unwrap_or(0)) / 255.0 - 0.5) / 0.5
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    fn pattern(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let mix = x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(40_503).wrapping_add(x * y);
            Rgb([mix as u8, (mix >> 8) as u8, (mix >> 16) as u8])
        })
    }

    #[test]
    fn a_padded_picture_is_whole_and_in_the_middle() {
        // Not enlarged: 3 x 2 in 6 x 6 has margins of 1 and 2 across, 2 and 2 down.
        let picture = pattern(3, 2);
        let padded = pad(&picture, 6, 9);
        for y in 0..6 {
            for x in 0..6 {
                let pixel = &padded[(y * 6 + x) * 3..][..3];
                match (x.checked_sub(1), y.checked_sub(2)) {
                    (Some(x), Some(y)) if x < 3 && y < 2 => {
                        assert_eq!(pixel, picture.get_pixel(x as u32, y as u32).0);
                    }
                    _ => assert_eq!(pixel, [9; 3]),
                }
            }
        }
        // A square picture is resampled as the crop resamples it.
        for side in [8, 17, 40] {
            let picture = pattern(side, side);
            assert_eq!(pad(&picture, 8, 0), center_crop(&picture, 8), "{side}");
        }
        // 40 x 20 in 8 x 8 is 8 x 4: two rows above and below.
        let padded = pad(&RgbImage::from_pixel(40, 20, Rgb([51; 3])), 8, 255);
        let rows: Vec<u8> = padded.chunks_exact(24).map(|row| row[12]).collect();
        assert_eq!(rows, [255, 255, 51, 51, 51, 51, 255, 255]);
        // An extremely long picture becomes a line.
        let padded = pad(&RgbImage::from_pixel(1, 5000, Rgb([0; 3])), 4, 255);
        assert_eq!(padded.iter().filter(|byte| **byte == 0).count(), 4 * 3);
        assert_eq!(pad(&RgbImage::new(0, 7), 2, 3), [3; 12]);
    }

    #[test]
    fn halving_even_sides_is_the_rounded_mean_of_pairs() {
        // Rows first: (10 + 21 + 1) / 2 = 16, (0 + 2 + 1) / 2 = 1; then (16 + 1 + 1) / 2 = 9.
        let picture = RgbImage::from_raw(2, 2, [[10; 3], [21; 3], [0; 3], [2; 3]].concat());
        assert_eq!(center_crop(&picture.unwrap(), 1), [9; 3]);
    }

    #[test]
    fn a_square_of_the_target_size_is_left_alone() {
        let picture = pattern(16, 16);
        assert_eq!(center_crop(&picture, 16), *picture.as_raw());
    }

    #[test]
    fn the_middle_is_cut_out() {
        let picture = pattern(21, 16);
        let crop = center_crop(&picture, 16);
        assert_eq!(crop[..3], picture.get_pixel(2, 0).0);
        assert_eq!(crop[crop.len() - 3..], picture.get_pixel(17, 15).0);
    }

    #[test]
    fn weights_serve_pictures_of_any_size() {
        let crop = CenterCrop::new((40, 33), 16);
        for (width, height) in [(40, 33), (33, 40), (100, 90)] {
            let picture = pattern(width, height);
            assert_eq!(crop.apply(&picture), center_crop(&picture, 16));
        }
    }

    #[test]
    fn extreme_pictures_are_cropped_without_their_whole_enlargement() {
        for (width, height) in [(1, 1), (1, 65_535), (65_535, 1), (3, 20_000)] {
            assert_eq!(center_crop(&pattern(width, height), 64).len(), 64 * 64 * 3);
        }
        assert!(center_crop(&pattern(3, 3), 0).is_empty());
        assert!(center_crop(&RgbImage::new(0, 5), 8).is_empty());
    }

    #[test]
    fn planes_are_mirrored_left_to_right() {
        let pixels: Vec<u8> = (0..12).collect();
        let plain = to_chw(&pixels, 2, false);
        let mirrored = to_chw(&pixels, 2, true);
        for channel in 0..3 {
            for (row, column) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let at = |column: usize| channel * 4 + row * 2 + column;
                let byte = (row * 2 + column) * 3 + channel;
                assert!((plain[at(column)] - (byte as f32 / 127.5 - 1.0)).abs() < 1e-6);
                assert_eq!(mirrored[at(1 - column)], plain[at(column)]);
            }
        }
        assert_eq!(to_chw(&[255], 1, false), [1.0, -1.0, -1.0]);
    }
}
