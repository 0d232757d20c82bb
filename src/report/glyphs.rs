//! Labels on pictures, in the 8x8 bitmap font of the public domain `font8x8`.

use font8x8::{BASIC_FONTS, LATIN_FONTS, UnicodeFonts};
use image::{Rgb, RgbImage};

/// Width and height of a character at scale one, in pixels.
const GLYPH: u32 = 8;

/// Width of `text` in pixels when each font pixel covers `scale x scale`.
pub(super) fn text_width(text: &str, scale: u32) -> u32 {
    let characters = u32::try_from(text.chars().count()).unwrap_or(u32::MAX);
    characters.saturating_mul(GLYPH).saturating_mul(scale)
}

/// Height of a line in pixels.
pub(super) fn text_height(scale: u32) -> u32 {
    GLYPH * scale
}

/// Draws `text` in dark grey with its upper left corner at `(left, top)`. Characters outside
/// Latin-1 become question marks; text outside the picture is cut off.
pub(super) fn draw_text(picture: &mut RgbImage, text: &str, left: u32, top: u32, scale: u32) {
    for (index, character) in text.chars().enumerate() {
        let glyph = BASIC_FONTS
            .get(character)
            .or_else(|| LATIN_FONTS.get(character))
            .or_else(|| BASIC_FONTS.get('?'))
            .unwrap_or_default();
        let start = left + index as u32 * GLYPH * scale;
        for y in 0..GLYPH * scale {
            for x in 0..GLYPH * scale {
                // A row is a byte whose lowest bit is the leftmost pixel.
                let ink = glyph[(y / scale) as usize] >> (x / scale) & 1 == 1;
                if ink && let Some(pixel) = picture.get_pixel_mut_checked(start + x, top + y) {
                    *pixel = Rgb([40, 40, 40]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_upright_and_scaled() {
        // "L" has its stem on the left and its foot at the bottom.
        let mut picture = RgbImage::from_pixel(20, 20, Rgb([255; 3]));
        draw_text(&mut picture, "L", 2, 2, 2);
        let ink = |x: u32, y: u32| picture.get_pixel(2 + 2 * x, 2 + 2 * y).0 == [40; 3];
        let rows: Vec<u32> = (0..8)
            .map(|y| (0..8).filter(|&x| ink(x, y)).count() as u32)
            .collect();
        assert!(rows[6] > rows[2], "{rows:?}");
        assert!((0..4).any(|x| ink(x, 2)) && !(4..8).any(|x| ink(x, 2)));
        assert_eq!(text_width("LL", 2), 32);
    }

    #[test]
    fn text_beyond_the_edge_or_the_font_is_no_error() {
        let mut picture = RgbImage::from_pixel(4, 4, Rgb([255; 3]));
        draw_text(&mut picture, "\u{1F600} é and more", 3, 3, 1);
    }
}
