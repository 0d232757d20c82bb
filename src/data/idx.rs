//! Files in MNIST's format, IDX: pictures and labels, plain or compressed with gzip.
//!
//! A file consists of two zero bytes, the type of its numbers (8 for `u8`), the number of
//! dimensions, each dimension as `u32`, and the numbers, the last dimension varying fastest. All
//! are big-endian (<http://yann.lecun.com/exdb/mnist/>, "the IDX file format").

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

use burn_dataset::Dataset;

use crate::files::open_file;

use super::{DataError, Image, Samples, Split, level, plain};

/// The type of `u8`.
const BYTES: u8 = 8;
/// Most decompressed bytes of a file: 20 times MNIST's. More would not fit in memory beside a
/// training.
const MOST_BYTES: u64 = 1 << 30;

/// Labelled pictures of one channel, read from IDX files into memory.
#[derive(Debug)]
pub struct IdxPictures {
    side: usize,
    classes: usize,
    pixels: Vec<u8>,
    labels: Vec<u8>,
}

impl IdxPictures {
    /// Reads a split from a folder with MNIST's file names: `train-images-idx3-ubyte`,
    /// `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`, each with or
    /// without `.gz`.
    ///
    /// # Errors
    /// When a file is missing or unsuitable, pictures are not square, there are none, or not one
    /// label for each; and when a class below the largest label has no training picture.
    pub fn open(folder: &Path, split: Split) -> Result<Self, DataError> {
        let [images, labels] = files(folder, split)?;
        let read = |path: &Path, dimensions| Idx::read(path, dimensions);
        let pictures = Self::new(read(&images, 3)?, read(&labels, 1)?, [&images, &labels])?;
        match pictures.empty_class() {
            // A small test split need not have all classes.
            Some(empty) if split == Split::Train => {
                let expected = format!("pictures of all {} classes", pictures.classes);
                let found = format!("none of class {empty}");
                Err(DataError::unexpected(&labels, expected, found))
            }
            _ => Ok(pictures),
        }
    }

    /// The first class below the largest label without a picture.
    fn empty_class(&self) -> Option<usize> {
        let mut counts = [0; 256];
        (self.labels.iter()).for_each(|label| counts[usize::from(*label)] += 1);
        counts[..self.classes].iter().position(|count| *count == 0)
    }

    /// Whether a folder has the files of a split.
    pub fn is_at(folder: &Path, split: Split) -> bool {
        files(folder, split).is_ok()
    }

    /// Joins pictures and labels; the paths are for messages.
    pub(super) fn new(images: Idx, labels: Idx, paths: [&Path; 2]) -> Result<Self, DataError> {
        let wrong = |path: usize, expected: String, found: String| {
            Err(DataError::unexpected(paths[path], expected, found))
        };
        let (count, side) = match images.shape[..] {
            [count, height, width] if count > 0 && height == width && height > 0 => (count, height),
            _ => return wrong(0, "square pictures".into(), format!("{:?}", images.shape)),
        };
        if labels.bytes.len() != count {
            let found = labels.bytes.len().to_string();
            return wrong(1, format!("{count} labels, one a picture"), found);
        }
        let classes = 1 + labels
            .bytes
            .iter()
            .max()
            .map_or(0, |label| usize::from(*label));
        Ok(Self {
            side,
            classes,
            pixels: images.bytes,
            labels: labels.bytes,
        })
    }

    /// Side of a picture.
    pub fn side(&self) -> usize {
        self.side
    }

    /// CRC-32 of all pixels and then all labels.
    pub fn checksum(&self) -> u32 {
        let mut hash = crc32fast::Hasher::new();
        hash.update(&self.pixels);
        hash.update(&self.labels);
        hash.finalize()
    }

    /// Number of classes: one more than the largest label.
    pub fn classes(&self) -> usize {
        self.classes
    }
}

impl Dataset<Image> for IdxPictures {
    fn len(&self) -> usize {
        self.labels.len()
    }

    fn get(&self, index: usize) -> Option<Image> {
        plain(self, index)
    }
}

impl Samples for IdxPictures {
    fn views(&self) -> usize {
        1
    }

    fn read(&self, index: usize, view: usize, out: &mut Vec<f32>) -> Result<usize, DataError> {
        let area = self.side * self.side;
        match self.labels.get(index) {
            Some(label) if view == 0 => {
                let pixels = &self.pixels[index * area..(index + 1) * area];
                out.extend(pixels.iter().copied().map(level));
                Ok(usize::from(*label))
            }
            _ => Err(DataError::Sample {
                index,
                expected: format!("one of {} pictures of one view", self.labels.len()),
                found: format!("a request for view {view}"),
            }),
        }
    }
}

/// Bytes, with the size of each dimension.
#[derive(Debug)]
pub(super) struct Idx {
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Vec<u8>,
}

impl Idx {
    /// Reads a file of bytes in `dimensions` dimensions; its first bytes show whether it is
    /// compressed.
    ///
    /// # Errors
    /// When it can't be read, is no IDX file of bytes, has other dimensions, or holds fewer or more
    /// bytes than it states.
    pub(super) fn read(path: &Path, dimensions: usize) -> Result<Self, DataError> {
        let file = open_file(path).map_err(DataError::io(path))?;
        Self::parse(file, dimensions, path)
    }

    /// Reads from `file`; `path` is for messages.
    pub(super) fn parse(
        mut file: impl Read,
        dimensions: usize,
        path: &Path,
    ) -> Result<Self, DataError> {
        let mut start = Vec::new();
        (file.by_ref().take(2).read_to_end(&mut start)).map_err(DataError::io(path))?;
        let is_gzip = start == [0x1f, 0x8b];
        let whole = io::Cursor::new(start).chain(file);
        let mut content = Vec::new();
        match is_gzip {
            true => MultiGzDecoder::new(whole)
                .take(MOST_BYTES + 1)
                .read_to_end(&mut content),
            false => whole.take(MOST_BYTES + 1).read_to_end(&mut content),
        }
        .map_err(DataError::io(path))?;
        let unexpected =
            |expected: String, found: String| Err(DataError::unexpected(path, expected, found));
        if content.len() as u64 > MOST_BYTES {
            return unexpected(format!("at most {MOST_BYTES} bytes"), "more".to_owned());
        }
        let sizes = match content.first_chunk::<4>() {
            Some([0, 0, BYTES, count]) if usize::from(*count) == dimensions => {
                content.get(4..4 + 4 * dimensions)
            }
            _ => None,
        };
        let Some(sizes) = sizes else {
            let found = content[..content.len().min(8)].escape_ascii();
            return unexpected(
                format!("an IDX file of bytes in {dimensions} dimensions"),
                format!("one that begins with \"{found}\""),
            );
        };
        let (sizes, _) = sizes.as_chunks::<4>();
        let shape: Vec<usize> = (sizes.iter())
            .map(|size| u32::from_be_bytes(*size) as usize)
            .collect();
        let bytes = content.split_off(4 + 4 * dimensions);
        let stated = (shape.iter()).try_fold(1usize, |n, &size| n.checked_mul(size));
        if stated != Some(bytes.len()) {
            return unexpected(
                format!("the bytes of {shape:?}, as its header states"),
                bytes.len().to_string(),
            );
        }
        Ok(Self { shape, bytes })
    }
}

/// The files of a split: pictures, then labels.
///
/// # Errors
/// Names the folder and the first missing file.
fn files(folder: &Path, split: Split) -> Result<[PathBuf; 2], DataError> {
    let [images, labels] = names(split).map(|name| find(folder, &name));
    Ok([images?, labels?])
}

fn names(split: Split) -> [String; 2] {
    let part = match split {
        Split::Train => "train",
        Split::Test => "t10k",
    };
    [
        format!("{part}-images-idx3-ubyte"),
        format!("{part}-labels-idx1-ubyte"),
    ]
}

fn find(folder: &Path, name: &str) -> Result<PathBuf, DataError> {
    let candidates = [folder.join(name), folder.join(format!("{name}.gz"))];
    let found = candidates.into_iter().find(|path| path.is_file());
    found.ok_or_else(|| {
        let expected = format!("the file {name} or {name}.gz");
        let found = if folder.is_dir() {
            "neither"
        } else {
            "no such folder"
        };
        DataError::unexpected(folder, expected, found)
    })
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use super::*;

    /// Encodes an IDX file.
    pub(in crate::data) fn encode(shape: &[usize], bytes: &[u8]) -> Vec<u8> {
        let mut file = vec![0, 0, BYTES, shape.len() as u8];
        file.extend(shape.iter().flat_map(|&size| (size as u32).to_be_bytes()));
        file.extend(bytes);
        file
    }

    #[test]
    fn plain_and_compressed_files_hold_the_same() {
        let bytes: Vec<u8> = (0..24).collect();
        let plain = encode(&[2, 3, 4], &bytes);
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        packed.write_all(&plain).unwrap();
        for file in [plain, packed.finish().unwrap()] {
            let idx = Idx::parse(&file[..], 3, Path::new("x")).unwrap();
            assert_eq!((idx.shape, idx.bytes), (vec![2, 3, 4], bytes.clone()));
        }
    }

    #[test]
    fn other_files_are_refused_by_name() {
        let whole = encode(&[2, 2], &[1; 4]);
        let mut longer = whole.clone();
        longer.push(0);
        let mut floats = whole.clone();
        floats[2] = 0x0d;
        for (file, words) in [
            (&b""[..], "an IDX file of bytes in 2 dimensions"),
            (b"\0", "begins with \"\\x00\""),
            (b"PNG....", "begins with \"PNG....\""),
            (&encode(&[4], &[1; 4]), "in 2 dimensions"),
            (&floats, "begins with \"\\x00\\x00\\r\\x02"),
            (&whole[..7], "in 2 dimensions"),
            (
                &whole[..15],
                "the bytes of [2, 2], as its header states, found 3",
            ),
            (&longer, "found 5"),
            (&encode(&[1 << 31, 1 << 31], &[]), "found 0"),
        ] {
            let error = Idx::parse(file, 2, Path::new("a/b")).unwrap_err();
            let error = error.to_string();
            assert!(
                error.starts_with("a/b: ") && error.contains(words),
                "{error}"
            );
        }
        let cut = Idx::parse(&[0x1f, 0x8b, 8][..], 2, Path::new("a/b")).unwrap_err();
        assert!(cut.to_string().contains("a/b"), "{cut}");
    }

    #[test]
    fn pictures_are_read_with_their_labels() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: Vec<u8>| {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        };
        let pixels: Vec<u8> = (0..12).map(|index| index * 20).collect();
        write("train-images-idx3-ubyte", encode(&[3, 2, 2], &pixels));
        write("train-labels-idx1-ubyte", encode(&[3], &[1, 0, 1]));
        let pictures = IdxPictures::open(folder.path(), Split::Train).unwrap();
        assert_eq!(
            (pictures.len(), pictures.side(), pictures.classes()),
            (3, 2, 2)
        );
        let image = pictures.get(1).unwrap();
        let levels = [80, 100, 120, 140].map(|byte: u8| f32::from(byte) / 127.5 - 1.0);
        assert_eq!((image.label, &image.pixels[..]), (0, &levels[..]));
        assert!(pictures.get(3).is_none());
        for (images, labels, words) in [
            (
                vec![3, 2, 2],
                vec![0, 1],
                "3 labels, one a picture, found 2",
            ),
            (
                vec![3, 2, 2],
                vec![0, 2, 0],
                "all 3 classes, found none of class 1",
            ),
            (
                vec![3, 1, 4],
                vec![0; 3],
                "square pictures, found [3, 1, 4]",
            ),
            (vec![0, 4, 4], vec![], "square pictures, found [0, 4, 4]"),
        ] {
            let bytes = vec![0; images.iter().product()];
            write("train-images-idx3-ubyte", encode(&images, &bytes));
            write("train-labels-idx1-ubyte", encode(&[labels.len()], &labels));
            let error = IdxPictures::open(folder.path(), Split::Train).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn a_missing_file_is_named_with_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("t10k-images-idx3-ubyte.gz"), "").unwrap();
        for (split, name) in [
            (Split::Train, "train-images-idx3-ubyte or"),
            (Split::Test, "t10k-labels-idx1-ubyte or"),
        ] {
            let error = files(folder.path(), split).unwrap_err().to_string();
            let folder = folder.path().display().to_string();
            assert!(error.contains(name) && error.contains(&folder), "{error}");
        }
        let missing = files(Path::new("no/such"), Split::Test).unwrap_err();
        assert!(missing.to_string().contains("no such folder"), "{missing}");
    }
}
