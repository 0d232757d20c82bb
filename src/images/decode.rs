//! PNG and JPEG files as 8-bit RGB.

use std::fs::File;
use std::io::{self, Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};

use image::codecs::png::PngDecoder;
use image::error::DecodingError;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, Limits, RgbImage};
use thiserror::Error;

use super::jpeg;
use crate::files::open_file;

/// Most pixels of a picture. The largest of ImageNet has 61 million; a larger file is no
/// photograph.
const MOST_PIXELS: u64 = 1 << 26;
/// Most bytes of a file: [`MOST_PIXELS`] of four bytes, uncompressed.
const MOST_BYTES: u64 = 1 << 28;
/// Most bytes the PNG decoder may hold beside the picture, in rows and in what comes before it: a
/// profile may inflate to a thousand times its size.
const MOST_HELD: u64 = 1 << 25;
/// Most bytes of the picture that it makes: [`MOST_PIXELS`] of eight bytes, and as much again for
/// the conversion. The JPEG decoder holds less: all coefficients of a progressive file, 2 bytes
/// for each of 4 channels, and the picture.
const MOST_MEMORY: u64 = 1 << 30;

/// Why a picture can't be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PictureError {
    /// The file can't be opened or read.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Error of the file system.
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// The expected content.
        expected: String,
        /// The content found.
        found: String,
    },
    /// The file is damaged, or of a kind that can't be decoded.
    #[error("{}: expected a whole PNG or JPEG", path.display())]
    Decode {
        /// The file.
        path: PathBuf,
        /// Error of the decoder.
        source: ImageError,
    },
}

/// Reads a PNG or JPEG as `[height, width, 3]` bytes. The format is detected by the first bytes,
/// not the name (ImageNet holds a PNG called `.JPEG`).
///
/// Other pixel types become RGB as by Pillow's `convert("RGB")`: grey is replicated, a palette
/// looked up, alpha dropped without compositing, and 16-bit colours reduced to their high byte.
/// 16-bit grey without alpha is *clipped* at 255, not scaled. Four channels of a JPEG are read as
/// inverted CMYK. An orientation in the metadata is not applied.
///
/// PNG is exact. The standard does not define JPEG's pixels to the last bit, and decoders differ by
/// a few levels in some. Here they are libjpeg-turbo's with its default settings, which Pillow
/// keeps: the accurate integer inverse cosine transform, interpolated chroma, and smoothed blocks
/// where a progressive file ends before its last scan. Every byte equals Pillow's, from 9.5 to
/// 13.0; but versions before 10.4 smooth such unfinished files differently.
///
/// # Errors
/// When the file can't be read, is neither PNG nor JPEG, is damaged or cut short, or states more
/// than 2^26 pixels; the message names the file. A JPEG is damaged when libjpeg-turbo fails on it
/// or warns that compressed data are missing or wrong, which Pillow ignores and fills with grey.
/// One without an end marker is refused, as by Pillow. Warnings about harmless oddities, such as
/// extra bytes before a marker, are ignored. No decoder can detect damage that leaves valid codes,
/// since JPEG has no checksums. Memory stays below about 1.5 GB whatever the file states.
pub fn read_rgb(path: &Path) -> Result<RgbImage, PictureError> {
    read_then(path, |picture| picture)
}

/// As [`read_rgb`], then calls `then` with the picture. Threads that read at the same time share a
/// budget of 2^26 pixels, and each waits for its part. `then` must not read pictures itself, nor
/// wait for threads that do.
///
/// # Errors
/// As [`read_rgb`].
pub fn read_then<T>(path: &Path, then: impl FnOnce(RgbImage) -> T) -> Result<T, PictureError> {
    let mut file = PictureFile::open(path)?;
    let [width, height] = file.size()?;
    // The file is held as well; four of its bytes count as one pixel.
    let _room = MEMORY.take((u64::from(width) * u64::from(height)).max(file.length / 4));
    file.read(MOST_BYTES + 1)?;
    if file.bytes.len() as u64 > MOST_BYTES {
        return Err(file.unexpected("at most 256 MiB", "more"));
    }
    let bytes = &file.bytes;
    let broken = |source| PictureError::Decode {
        path: path.to_owned(),
        source,
    };
    if let Some(ImageFormat::Jpeg) = file.format {
        return match jpeg::decode(bytes, MOST_PIXELS) {
            Ok(image) => Ok(then(image)),
            Err(failure) => Err(file.failed(failure)),
        };
    }
    let mut decoder =
        PngDecoder::with_limits(Cursor::new(bytes), limits(MOST_HELD)).map_err(broken)?;
    decoder.set_limits(limits(MOST_MEMORY)).map_err(broken)?;
    let image = DynamicImage::from_decoder(decoder).map_err(broken)?;
    // Byte 25 of a PNG is its colour type; 0 is grey, to which the decoder adds alpha for a
    // transparent level.
    let grey = bytes.get(25) == Some(&0);
    Ok(then(to_rgb(image, grey)))
}

/// `[width, height]` of a PNG or JPEG; only the beginning of the file is read.
///
/// # Errors
/// When the file can't be read, is neither PNG nor JPEG, does not state its size, or states more
/// than 2^26 pixels.
pub fn picture_size(path: &Path) -> Result<[u32; 2], PictureError> {
    PictureFile::open(path)?.size()
}

/// Lengths to read in search of the size: it is mostly in the first few bytes, sometimes behind a
/// profile or a thumbnail.
const HEADS: [u64; 3] = [1 << 13, 1 << 17, MOST_BYTES];

/// An open file and the bytes read so far.
struct PictureFile<'a> {
    path: &'a Path,
    file: File,
    length: u64,
    bytes: Vec<u8>,
    format: Option<ImageFormat>,
}

impl<'a> PictureFile<'a> {
    fn open(path: &'a Path) -> Result<Self, PictureError> {
        let io = |source| PictureError::Io {
            path: path.to_owned(),
            source,
        };
        let file = open_file(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let mut opened = Self {
            path,
            file,
            length,
            bytes: Vec::new(),
            format: None,
        };
        opened.read(HEADS[0])?;
        opened.format = image::guess_format(&opened.bytes).ok();
        Ok(opened)
    }

    fn unexpected(&self, expected: impl Into<String>, found: impl Into<String>) -> PictureError {
        PictureError::Unexpected {
            path: self.path.to_owned(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    fn failed(&self, failure: jpeg::Failure) -> PictureError {
        match failure {
            jpeg::Failure::Large(width, height) => self.large([width, height]),
            jpeg::Failure::Decoder(message) => PictureError::Decode {
                path: self.path.to_owned(),
                source: ImageError::Decoding(DecodingError::new(ImageFormat::Jpeg.into(), message)),
            },
        }
    }

    fn large(&self, [width, height]: [u32; 2]) -> PictureError {
        let found = format!("{width} x {height}");
        self.unexpected(format!("at most {MOST_PIXELS} pixels"), found)
    }

    /// Reads on until `most` bytes, or all of the file, are read.
    fn read(&mut self, most: u64) -> Result<(), PictureError> {
        let left = most.saturating_sub(self.bytes.len() as u64);
        let read = (&self.file).take(left).read_to_end(&mut self.bytes);
        read.map(drop).map_err(|source| PictureError::Io {
            path: self.path.to_owned(),
            source,
        })
    }

    /// `[width, height]`.
    fn size(&mut self) -> Result<[u32; 2], PictureError> {
        let mut size = self.stated_size();
        for most in &HEADS[1..] {
            if size.is_ok() || self.bytes.len() as u64 == self.length {
                break;
            }
            self.read(*most)?;
            size = self.stated_size();
        }
        match size? {
            size if u64::from(size[0]) * u64::from(size[1]) > MOST_PIXELS => Err(self.large(size)),
            size => Ok(size),
        }
    }

    /// The size, if the bytes read so far state it.
    fn stated_size(&self) -> Result<[u32; 2], PictureError> {
        match self.format {
            Some(ImageFormat::Png) => {
                PngDecoder::with_limits(Cursor::new(&self.bytes), limits(MOST_HELD))
                    .map(|decoder| decoder.dimensions().into())
                    .map_err(|source| PictureError::Decode {
                        path: self.path.to_owned(),
                        source,
                    })
            }
            Some(ImageFormat::Jpeg) => {
                jpeg::size(&self.bytes).map_err(|failure| self.failed(failure))
            }
            // The message does not quote the first bytes: a link may lead to a file whose content
            // is private.
            _ => Err(self.unexpected("a PNG or JPEG", "a file of another kind")),
        }
    }
}

/// Budget of pixels being read.
static MEMORY: Room = Room {
    taken: Mutex::new(0),
    freed: Condvar::new(),
    most: MOST_PIXELS,
};

/// A budget that threads share; each takes a part, waiting until it is free.
struct Room {
    taken: Mutex<u64>,
    freed: Condvar,
    most: u64,
}

impl Room {
    /// Takes `part` of the budget once that much is free, and gives it back when the result is
    /// dropped. A part larger than the budget takes all of it.
    fn take(&self, part: u64) -> Taken<'_> {
        let part = part.min(self.most);
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |taken: &mut u64| *taken + part > self.most;
        let taken = self.freed.wait_while(taken, full);
        *taken.unwrap_or_else(PoisonError::into_inner) += part;
        Taken { room: self, part }
    }
}

struct Taken<'a> {
    room: &'a Room,
    part: u64,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        *(self.room.taken.lock()).unwrap_or_else(PoisonError::into_inner) -= self.part;
        self.room.freed.notify_all();
    }
}

fn limits(most: u64) -> Limits {
    let mut limits = Limits::default();
    limits.max_alloc = Some(most);
    limits
}

/// Pillow's `convert("RGB")`. `grey`: the file has one channel and no alpha channel.
fn to_rgb(image: DynamicImage, grey: bool) -> RgbImage {
    let (width, height) = (image.width(), image.height());
    let clipped = |level: u16| [level.min(255) as u8; 3];
    let high = |level: u16| (level >> 8) as u8;
    let pixels: Vec<u8> = match image {
        DynamicImage::ImageLuma16(image) => image.iter().flat_map(|&l| clipped(l)).collect(),
        DynamicImage::ImageLumaA16(image) => image
            .pixels()
            .flat_map(|pixel| {
                let level = pixel.0[0];
                if grey {
                    clipped(level)
                } else {
                    [high(level); 3]
                }
            })
            .collect(),
        DynamicImage::ImageRgb16(image) => image.iter().map(|&level| high(level)).collect(),
        DynamicImage::ImageRgba16(image) => image
            .pixels()
            .flat_map(|pixel| [0, 1, 2].map(|channel| high(pixel.0[channel])))
            .collect(),
        other => return other.into_rgb8(),
    };
    RgbImage::from_raw(width, height, pixels).expect("three bytes were made of every pixel")
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ExtendedColorType, ImageEncoder};

    /// Reads `bytes` as a file.
    fn read(bytes: &[u8]) -> Result<RgbImage, PictureError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        std::fs::write(&path, bytes).unwrap();
        read_rgb(&path)
    }

    /// A PNG of one row of pixels.
    fn png(width: u32, color: ExtendedColorType, row: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        image::codecs::png::PngEncoder::new(&mut bytes)
            .write_image(row, width, 1, color)
            .unwrap();
        bytes
    }

    fn levels(values: &[u16]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_ne_bytes()).collect()
    }

    #[test]
    fn sixteen_bits_become_eight_as_pillow_does_it() {
        // Expected values are Pillow 13's.
        let cases: [(u32, _, &[u16], &[u8]); 4] = [
            (
                3,
                ExtendedColorType::L16,
                &[100, 256, 0x7f80],
                &[100, 100, 100, 255, 255, 255, 255, 255, 255],
            ),
            (
                2,
                ExtendedColorType::La16,
                &[0x12ff, 0x8000, 0xff80, 0],
                &[18, 18, 18, 255, 255, 255],
            ),
            (
                1,
                ExtendedColorType::Rgb16,
                &[0x12ff, 0x80ff, 0xfeff],
                &[18, 128, 254],
            ),
            (
                1,
                ExtendedColorType::Rgba16,
                &[0x12ff, 0x80ff, 0xfeff, 1],
                &[18, 128, 254],
            ),
        ];
        for (width, color, values, expected) in cases {
            let image = read(&png(width, color, &levels(values))).unwrap();
            assert_eq!(image.as_raw(), expected, "{color:?}");
        }
    }

    #[test]
    fn a_transparent_level_does_not_make_grey_another_kind() {
        // Grey, 16 bits, 3 x 1, with a tRNS chunk for level 100, made by hand with zlib; Pillow
        // reads 0, 100, 255.
        let mut bytes = png(3, ExtendedColorType::L16, &levels(&[0, 100, 300]));
        let data = bytes.windows(4).position(|name| name == b"IDAT").unwrap() - 4;
        let chunk = [&b"tRNS"[..], &[0, 100]].concat();
        let crc = crc32fast::hash(&chunk).to_be_bytes();
        let inserted = [&[0, 0, 0, 2], &chunk[..], &crc].concat();
        bytes.splice(data..data, inserted);
        let image = read(&bytes).unwrap();
        assert_eq!(image.as_raw(), &[0, 0, 0, 100, 100, 100, 255, 255, 255]);
    }

    fn jpeg(width: u32, height: u32) -> Vec<u8> {
        let pixels: Vec<u8> = (0..height)
            .flat_map(|y| (0..width).flat_map(move |x| [x as u8 * 3, y as u8 * 4, 90]))
            .collect();
        let mut bytes = Vec::new();
        jpeg_encoder::Encoder::new(&mut bytes, 98)
            .encode(
                &pixels,
                width as u16,
                height as u16,
                jpeg_encoder::ColorType::Rgb,
            )
            .unwrap();
        bytes
    }

    #[test]
    fn threads_share_the_room_there_is() {
        let room = Room {
            taken: Mutex::new(0),
            freed: Condvar::new(),
            most: 10,
        };
        let most_seen = Mutex::new(0);
        std::thread::scope(|scope| {
            for part in [1, 4, 10, 25, 7, 3, 3, 10] {
                let (room, most_seen) = (&room, &most_seen);
                scope.spawn(move || {
                    for _ in 0..50 {
                        let _taken = room.take(part);
                        let now = *room.taken.lock().unwrap();
                        let mut most = most_seen.lock().unwrap();
                        *most = now.max(*most);
                    }
                });
            }
        });
        assert_eq!(
            (*room.taken.lock().unwrap(), *most_seen.lock().unwrap()),
            (0, 10)
        );
    }

    #[test]
    fn the_size_is_that_of_the_picture() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let size = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            picture_size(&path)
        };
        assert_eq!(
            size(&png(3, ExtendedColorType::L8, &[1, 2, 3])).unwrap(),
            [3, 1]
        );
        let mut whole = jpeg(40, 24);
        assert_eq!(size(&whole).unwrap(), [40, 24]);
        // A profile before the size, longer than the first read.
        let segment = [&[0xff, 0xe2, 0xff, 0xff][..], &[7; 0xfffd]].concat();
        whole.splice(2..2, [&segment[..], &segment].concat());
        assert_eq!(size(&whole).unwrap(), [40, 24]);
        assert_eq!(read_rgb(&path).unwrap().dimensions(), (40, 24));
        let mut whole = png(3, ExtendedColorType::L8, &[1, 2, 3]);
        let text = [&b"tEXt"[..], &[b'x'; 200_000]].concat();
        let crc = crc32fast::hash(&text).to_be_bytes();
        let chunk = [&200_000u32.to_be_bytes()[..], &text, &crc].concat();
        whole.splice(33..33, chunk);
        assert_eq!(size(&whole).unwrap(), [3, 1]);
        assert_eq!(read_rgb(&path).unwrap().dimensions(), (3, 1));
        assert!(
            size(b"GIF89a")
                .unwrap_err()
                .to_string()
                .contains("a PNG or JPEG")
        );
        assert!(size(&whole[..100]).is_err());
    }

    #[test]
    fn a_jpeg_is_read_whatever_its_name() {
        let image = read(&jpeg(40, 24)).unwrap();
        assert_eq!(image.dimensions(), (40, 24));
        for (x, y, pixel) in image.enumerate_pixels() {
            let expected = [x as i32 * 3, y as i32 * 4, 90];
            for (found, expected) in pixel.0.iter().zip(expected) {
                // Quality 98 quantises by at most a few levels, and the chroma of 2 x 2 pixels may
                // be shared.
                assert!(
                    (i32::from(*found) - expected).abs() <= 8,
                    "{x} {y} {pixel:?}"
                );
            }
        }
    }

    #[test]
    fn damaged_files_are_errors_that_name_them() {
        let whole = jpeg(64, 64);
        let (half, tail) = (whole.len() / 2, whole.len() - 2);
        let png = png(3, ExtendedColorType::L8, &[1, 2, 3]);
        let cases = [
            (
                vec![],
                "expected a PNG or JPEG, found a file of another kind",
            ),
            (b"GIF89a..".to_vec(), "found a file of another kind"),
            (whole[..half].to_vec(), "Premature end of JPEG file"),
            (whole[..tail].to_vec(), "Premature end of JPEG file"),
            (
                [&whole[..half], &whole[tail..]].concat(),
                "premature end of data segment",
            ),
            (
                png[..png.len() - 30].to_vec(),
                "expected a whole PNG or JPEG",
            ),
        ];
        for (bytes, expected) in cases {
            let error = read(&bytes).unwrap_err();
            let source = std::error::Error::source(&error);
            let message = format!("{error}: {source:?}");
            assert!(
                message.contains("a.png") && message.contains(expected),
                "{message}"
            );
        }
        let missing = read_rgb(Path::new("/no/such.png")).unwrap_err();
        assert!(missing.to_string().contains("/no/such.png"));
    }

    #[test]
    fn a_file_that_states_a_huge_picture_is_refused_before_it_is_decoded() {
        let mut bytes = png(3, ExtendedColorType::L8, &[1, 2, 3]);
        bytes[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
        let crc = crc32fast::hash(&bytes[12..29]).to_be_bytes();
        bytes[29..33].copy_from_slice(&crc);
        let message = read(&bytes).unwrap_err().to_string();
        assert!(message.contains("found 65536 x 65536"), "{message}");

        let mut bytes = jpeg(24, 16);
        let frame = bytes.windows(2).position(|pair| pair == [0xff, 0xc0]);
        let size = frame.unwrap() + 5;
        bytes[size..size + 4].copy_from_slice(&[0xff, 0, 0xff, 0]);
        let message = read(&bytes).unwrap_err().to_string();
        assert!(message.contains("found 65280 x 65280"), "{message}");
    }

    #[test]
    fn no_damage_panics() {
        let files = [jpeg(24, 16), png(3, ExtendedColorType::Rgb8, &[7; 9])];
        for file in files {
            for at in 0..file.len() {
                for value in [0, 0xff, file[at] ^ 0x10] {
                    let mut damaged = file.clone();
                    damaged[at] = value;
                    let _ = read(&damaged);
                }
            }
        }
    }
}
