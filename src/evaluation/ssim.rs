//! Structural similarity of pictures (Wang et al., "Image quality assessment: from error visibility
//! to structural similarity", IEEE TIP 2004): how much of a model's samples is left in those of
//! another from the same noise.

use rayon::prelude::*;

use crate::images::Images;

/// Side of the Gaussian window, where pictures are not smaller.
const WINDOW: usize = 11;
/// Standard deviation of the window, in pixels.
const SIGMA: f64 = 1.5;
/// (0.01 L)^2 and (0.03 L)^2 of 8 bits, which keep the ratios finite.
const C1: f64 = (0.01 * 255.0) * (0.01 * 255.0);
const C2: f64 = (0.03 * 255.0) * (0.03 * 255.0);

/// Mean structural similarity of pictures, pair by pair and channel by channel: 1 of equal ones.
/// None of pictures of other sizes, or of none.
///
/// The window goes over the places where it lies within the picture; of pictures smaller than 11
/// pixels it is their largest odd side.
pub fn ssim(a: &Images, b: &Images) -> Option<f64> {
    let [count, height, width, channels] = a.shape();
    if a.shape() != b.shape() || count * height * width * channels == 0 {
        return None;
    }
    let side = WINDOW.min(height).min(width);
    let window = window(side - usize::from(side.is_multiple_of(2)));
    let of = |index: usize| {
        let (picture, channel) = (index / channels, index % channels);
        let plane = |images: &Images| -> Vec<f64> {
            let pixels = images.image(picture).iter().skip(channel);
            let pixels = pixels.step_by(channels);
            pixels.map(|pixel| f64::from(*pixel)).collect()
        };
        similarity(&plane(a), &plane(b), width, &window)
    };
    // Summed in their order, whatever the number of threads.
    let all: Vec<f64> = (0..count * channels).into_par_iter().map(of).collect();
    Some(all.iter().sum::<f64>() / all.len() as f64)
}

/// Of one channel of one picture.
fn similarity(a: &[f64], b: &[f64], width: usize, window: &[f64]) -> f64 {
    let products =
        |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a * b).collect() };
    let means = [
        a.to_vec(),
        b.to_vec(),
        products(a, a),
        products(b, b),
        products(a, b),
    ];
    let [a, b, aa, bb, ab] = means.map(|plane| blurred(&plane, width, window));
    let count = a.len();
    let of = |at: usize| {
        let (a, b) = (a[at], b[at]);
        let (aa, bb, ab) = (aa[at] - a * a, bb[at] - b * b, ab[at] - a * b);
        (2.0 * a * b + C1) * (2.0 * ab + C2) / ((a * a + b * b + C1) * (aa + bb + C2))
    };
    (0..count).map(of).sum::<f64>() / count as f64
}

/// Weighted means over the window, wherever it lies within the plane.
fn blurred(plane: &[f64], width: usize, window: &[f64]) -> Vec<f64> {
    let rows = plane.chunks_exact(width).flat_map(|row| {
        let places = row.windows(window.len());
        places.map(|place| place.iter().zip(window).map(|(a, b)| a * b).sum::<f64>())
    });
    let rows: Vec<f64> = rows.collect();
    let width = width + 1 - window.len();
    let height = rows.len() / width;
    let place = |row: usize, column: usize| {
        let of = |(at, weight): (usize, &f64)| weight * rows[(row + at) * width + column];
        window.iter().enumerate().map(of).sum::<f64>()
    };
    let places =
        (0..=height - window.len()).flat_map(|row| (0..width).map(move |column| (row, column)));
    places.map(|(row, column)| place(row, column)).collect()
}

/// Weights of a Gaussian, whose sum is 1.
fn window(side: usize) -> Vec<f64> {
    let middle = (side - 1) as f64 / 2.0;
    let weight = |at: usize| (-((at as f64 - middle) / SIGMA).powi(2) / 2.0).exp();
    let weights: Vec<f64> = (0..side).map(weight).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(side: usize, value: impl Fn(usize) -> usize) -> Images {
        let pixels = (0..side * side).map(|at| (value(at) % 256) as u8);
        Images::new(pixels.collect(), [1, side, side, 1]).unwrap()
    }

    #[test]
    fn similarity_is_that_of_scikit_image() {
        // `structural_similarity(a, b, gaussian_weights=True, sigma=1.5,
        // use_sample_covariance=False, data_range=255)` of scikit-image.
        for (side, expected) in [(16, 0.699_290_033_404_320_7), (28, 0.538_124_445_323_415_3)] {
            let a = picture(side, |at| at * 37 + 11);
            let b = picture(side, |at| at * 37 + 11 + at * at % 50);
            let found = ssim(&a, &b).unwrap();
            assert!((found - expected).abs() < 1e-9, "{found}");
            assert!((ssim(&a, &a).unwrap() - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn small_pictures_have_a_smaller_window_and_unlike_shapes_no_similarity() {
        // Of even pictures: (2ab + C1) / (a^2 + b^2 + C1), whatever the window.
        let (a, b) = (picture(8, |_| 100), picture(8, |_| 200));
        let expected = (2.0 * 100.0 * 200.0 + C1) / (100.0 * 100.0 + 200.0 * 200.0 + C1);
        assert!((ssim(&a, &b).unwrap() - expected).abs() < 1e-9);
        assert_eq!(ssim(&a, &picture(9, |_| 100)), None);
        let none = Images::new(Vec::new(), [0, 8, 8, 1]).unwrap();
        assert_eq!(ssim(&none, &none), None);
    }
}
