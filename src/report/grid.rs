//! Sample grids as PNG: nearest-neighbour enlargement, so that a pixel stays a pixel.

use std::io;
use std::path::Path;

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder, Rgb, RgbImage};

use super::ReportError;
use super::glyphs::{draw_text, text_height, text_width};
use crate::files::write_atomic;
use crate::images::Images;

/// White space around the picture and between its parts, in pixels.
const MARGIN: u32 = 12;

/// Enlargement of the 8x8 label font.
const LABEL_SCALE: u32 = 2;

/// Most pixels of a picture: viewers fail on larger ones.
const MOST_PIXELS: u64 = 1 << 28;

/// Most columns of a picture of samples.
pub(crate) const COLUMNS: usize = 20;
/// Most pixels along a side of a picture of samples.
const PICTURE: usize = 4096;

/// Number of columns for `count` square images, and the scale: small images are enlarged to be
/// visible.
pub(crate) fn grid_layout(side: usize, count: usize) -> (usize, u32) {
    let scale = (64 / side.max(1)).clamp(1, 5);
    let columns = (PICTURE / (side * scale).max(1)).clamp(1, COLUMNS);
    (columns.min(count.max(1)), scale as u32)
}

/// Writes all of `images` as one grid of `columns` columns, row by row, on white.
///
/// Grey and RGB pictures (`channels` 1 or 3) are drawn, each pixel `scale x scale` large. The file
/// appears whole or not at all.
///
/// # Errors
///
/// [`ReportError::Invalid`] for no images, zero columns or scale, another number of channels or a
/// picture of more than 2^28 pixels; [`ReportError::Io`] when the file cannot be written.
///
/// # Examples
///
/// ```
/// use tinyfusion::{images::Images, report::grid_png};
/// let folder = tempfile::tempdir()?;
/// let images = Images::new(vec![128; 6 * 8 * 8], [6, 8, 8, 1])?;
/// grid_png(&folder.path().join("samples.png"), &images, 3, 5)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn grid_png(
    path: &Path,
    images: &Images,
    columns: usize,
    scale: u32,
) -> Result<(), ReportError> {
    let sections = [Section {
        label: None,
        layout: layout(path, images, columns, scale)?,
        images,
    }];
    write_png(path, &draw(path, &sections, scale)?)
}

/// Writes labelled grids below each other, for example teacher, pruned and recovered model.
///
/// Each of `rows` is a label, drawn above its grid, and the pictures of that grid; the grids may
/// differ in number and size of the pictures. Otherwise as [`grid_png`].
///
/// # Errors
///
/// As [`grid_png`], also for no rows at all.
pub fn comparison_png(
    path: &Path,
    rows: &[(&str, &Images)],
    columns: usize,
    scale: u32,
) -> Result<(), ReportError> {
    let sections: Vec<Section> = rows
        .iter()
        .map(|&(label, images)| {
            let layout = layout(path, images, columns, scale)?;
            Ok(Section {
                label: Some(label),
                layout,
                images,
            })
        })
        .collect::<Result<_, ReportError>>()?;
    write_png(path, &draw(path, &sections, scale)?)
}

/// A grid and its label.
struct Section<'a> {
    label: Option<&'a str>,
    layout: Layout,
    images: &'a Images,
}

impl Section<'_> {
    /// Height of the label and the space below it, in pixels.
    fn head(&self) -> u32 {
        self.label
            .map_or(0, |_| text_height(LABEL_SCALE) + MARGIN / 2)
    }

    fn width(&self) -> u64 {
        let label = self.label.map_or(0, |label| text_width(label, LABEL_SCALE));
        self.layout.width.max(u64::from(label))
    }

    fn height(&self) -> u64 {
        u64::from(self.head()) + self.layout.height
    }
}

/// Sizes in pixels, checked against the limit.
struct Layout {
    columns: usize,
    /// Distance from one picture to the next, to the right and down.
    step: [u32; 2],
    width: u64,
    height: u64,
}

fn layout(path: &Path, images: &Images, columns: usize, scale: u32) -> Result<Layout, ReportError> {
    let [count, height, width, channels] = images.shape();
    if count == 0 || height == 0 || width == 0 || !matches!(channels, 1 | 3) {
        let shape = images.shape();
        return Err(invalid(
            path,
            format!("a grid needs grey or RGB images, found {shape:?} (NHWC)"),
        ));
    }
    if columns == 0 || scale == 0 {
        return Err(invalid(
            path,
            format!("a grid of {columns} columns at scale {scale} is empty"),
        ));
    }
    let columns = columns.min(count);
    let cell = |side: usize| (side as u64).checked_mul(u64::from(scale));
    let extent = |side: u64, gap: u64, count: usize| {
        (side + gap)
            .checked_mul(count as u64)
            .map(|extent| extent - gap)
    };
    let sizes = || {
        let (width, height) = (cell(width)?, cell(height)?);
        if width.max(height) > MOST_PIXELS {
            return None;
        }
        let gap = (width.min(height) / 16).clamp(1, 8);
        Some(Layout {
            columns,
            // Below 2^28 + 8 by the check above.
            step: [(width + gap) as u32, (height + gap) as u32],
            width: extent(width, gap, columns)?,
            height: extent(height, gap, count.div_ceil(columns))?,
        })
    };
    sizes().ok_or_else(|| too_large(path))
}

fn draw(path: &Path, sections: &[Section], scale: u32) -> Result<RgbImage, ReportError> {
    let margin = u64::from(MARGIN);
    let width = sections.iter().map(Section::width).max();
    let width = width.ok_or_else(|| invalid(path, "there are no images to compare".to_owned()))?;
    let height = sections.iter().try_fold(margin, |sum, section| {
        sum.checked_add(section.height())?.checked_add(margin)
    });
    let sides = width.checked_add(2 * margin).zip(height);
    let (width, height) = sides
        .filter(|&(width, height)| width.checked_mul(height).is_some_and(|n| n <= MOST_PIXELS))
        .ok_or_else(|| too_large(path))?;

    // Both fit 28 bits by the check above.
    let mut canvas = RgbImage::from_pixel(width as u32, height as u32, Rgb([255; 3]));
    let mut top = MARGIN;
    for section in sections {
        if let Some(label) = section.label {
            draw_text(&mut canvas, label, MARGIN, top, LABEL_SCALE);
        }
        for index in 0..section.images.shape()[0] {
            let (row, column) = (
                index / section.layout.columns,
                index % section.layout.columns,
            );
            let [right, down] = section.layout.step;
            let left = MARGIN + column as u32 * right;
            let upper = top + section.head() + row as u32 * down;
            draw_image(&mut canvas, section.images, index, [left, upper], scale);
        }
        top += section.height() as u32 + MARGIN;
    }
    Ok(canvas)
}

fn draw_image(canvas: &mut RgbImage, images: &Images, index: usize, at: [u32; 2], scale: u32) {
    let [_, height, width, channels] = images.shape();
    let pixels = images.image(index);
    for y in 0..height as u32 * scale {
        for x in 0..width as u32 * scale {
            let pixel = (y / scale) as usize * width + (x / scale) as usize;
            let colour = match &pixels[pixel * channels..(pixel + 1) * channels] {
                &[red, green, blue] => Rgb([red, green, blue]),
                grey => Rgb([grey[0]; 3]),
            };
            canvas.put_pixel(at[0] + x, at[1] + y, colour);
        }
    }
}

fn write_png(path: &Path, picture: &RgbImage) -> Result<(), ReportError> {
    let (width, height) = picture.dimensions();
    write_atomic(path, |file| {
        PngEncoder::new(file)
            .write_image(picture, width, height, ExtendedColorType::Rgb8)
            .map_err(io::Error::other)
    })
    .map_err(|source| ReportError::Io {
        path: path.to_owned(),
        source,
    })
}

fn invalid(path: &Path, problem: String) -> ReportError {
    ReportError::Invalid {
        path: path.to_owned(),
        problem,
    }
}

fn too_large(path: &Path) -> ReportError {
    invalid(
        path,
        format!("the picture would have more than {MOST_PIXELS} pixels"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &Path) -> RgbImage {
        image::open(path).unwrap().to_rgb8()
    }

    #[test]
    fn pixels_are_where_they_belong() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("grid.png");
        // Three grey pictures of 1 x 2 in two columns; scale 32 makes 32 x 64 cells with a gap of
        // 2.
        let images = Images::new(vec![0, 10, 20, 30, 40, 50], [3, 1, 2, 1]).unwrap();
        grid_png(&path, &images, 2, 32).unwrap();
        let grid = read(&path);
        assert_eq!(
            grid.dimensions(),
            (12 + 64 + 2 + 64 + 12, 12 + 32 + 2 + 32 + 12)
        );
        let grey = |x, y| grid.get_pixel(x, y).0[0];
        assert_eq!(
            [grey(12, 12), grey(43, 43), grey(44, 12), grey(75, 43)],
            [0, 0, 10, 10]
        );
        assert_eq!(
            [grey(76, 12), grey(77, 12), grey(78, 12), grey(141, 12)],
            [255, 255, 20, 30]
        );
        assert_eq!(
            [grey(142, 12), grey(12, 45), grey(12, 46), grey(44, 77)],
            [255, 255, 40, 50]
        );
        assert_eq!(grey(78, 46), 255);
    }

    #[test]
    fn colours_keep_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("grid.png");
        grid_png(
            &path,
            &Images::new(vec![1, 2, 3], [1, 1, 1, 3]).unwrap(),
            9,
            4,
        )
        .unwrap();
        let grid = read(&path);
        assert_eq!(
            (grid.dimensions(), grid.get_pixel(12, 15).0),
            ((28, 28), [1, 2, 3])
        );
    }

    #[test]
    fn grids_lie_below_their_labels() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("comparison.png");
        let (black, grey) = (vec![0; 64], vec![9; 4 * 64]);
        let black = Images::new(black, [1, 8, 8, 1]).unwrap();
        let grey = Images::new(grey, [4, 8, 8, 1]).unwrap();
        comparison_png(&path, &[("", &black), ("a", &grey)], 2, 2).unwrap();
        let picture = read(&path);
        // Label 16 + 6, one row of 16; label 16 + 6, two rows of 16 with a gap of 1; margins of 12.
        assert_eq!(picture.dimensions(), (12 + 33 + 12, 12 + 38 + 12 + 55 + 12));
        assert_eq!(picture.get_pixel(12, 34).0, [0; 3]);
        assert_eq!(picture.get_pixel(12, 33).0, [255; 3]);
        assert_eq!(picture.get_pixel(12, 12 + 38 + 12 + 22).0, [9; 3]);
        let ink = (12..28).flat_map(|x| (62..78).map(move |y| (x, y)));
        assert!(
            ink.into_iter()
                .any(|(x, y)| picture.get_pixel(x, y).0 == [40; 3])
        );
    }

    #[test]
    fn what_cannot_be_drawn_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("grid.png");
        let one = Images::new(vec![0; 64], [1, 8, 8, 1]).unwrap();
        let none = Images::new(vec![], [0, 8, 8, 1]).unwrap();
        let alpha = Images::new(vec![0; 64], [1, 4, 4, 4]).unwrap();
        assert!(grid_png(&path, &none, 1, 1).is_err());
        assert!(grid_png(&path, &alpha, 1, 1).is_err());
        assert!(grid_png(&path, &one, 0, 1).is_err());
        assert!(grid_png(&path, &one, 1, 0).is_err());
        assert!(grid_png(&path, &one, 1, u32::MAX).is_err());
        assert!(grid_png(&path, &one, 1, 1 << 20).is_err());
        assert!(comparison_png(&path, &[], 1, 1).is_err());
        assert!(!path.exists());
        assert!(grid_png(folder.path(), &one, usize::MAX, 1).is_err());
    }
}
