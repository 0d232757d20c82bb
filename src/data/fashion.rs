//! Fashion-MNIST: 60,000 + 10,000 pictures of clothes, 28 x 28, one channel, ten classes.
//!
//! H. Xiao, K. Rasul and R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking
//! Machine Learning Algorithms", arXiv 1708.07747, 2017; MIT licence, copyright Zalando SE. The
//! program embeds the first thousand training pictures of each class, in the order of the file.

use std::path::{Path, PathBuf};

use super::idx::{Idx, IdxPictures};
use super::{DataError, Split};

/// Side of a picture.
pub const SIDE: usize = 28;

/// [`IdxPictures::checksum`] of the two splits.
const CHECKSUMS: [u32; 2] = [0xa8c9_1d78, 0xd12e_98e2];

/// Number of embedded pictures.
pub const EMBEDDED_COUNT: usize = 10_000;

/// The classes.
pub const CLASS_NAMES: [&str; 10] = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
];

/// Where the files are searched: the project's folder, then that of Debian's package
/// `dataset-fashion-mnist`.
pub const FOLDERS: [&str; 2] = [
    "artifacts/data/fashion-mnist",
    "/usr/share/datasets/fashion-mnist",
];

/// What to do if the files are missing.
pub const HOW_TO_GET: &str = "the four .gz files of Fashion-MNIST (30 MB): install Debian's package dataset-fashion-mnist, or \
     download them from https://github.com/zalandoresearch/fashion-mnist";

/// The first folder that holds all four files.
pub fn folder() -> Option<PathBuf> {
    (FOLDERS.into_iter().map(PathBuf::from)).find(|folder| is_complete(folder))
}

/// Whether a folder holds all four files.
pub fn is_complete(folder: &Path) -> bool {
    [Split::Train, Split::Test]
        .into_iter()
        .all(|split| IdxPictures::is_at(folder, split))
}

/// Reads a split from a folder.
///
/// # Errors
/// When a file is missing or has other contents.
pub fn open(folder: &Path, split: Split) -> Result<IdxPictures, DataError> {
    let pictures = IdxPictures::open(folder, split)?;
    // MNIST's files have the same names and sizes.
    let [expected, found] = [CHECKSUMS[split as usize], pictures.checksum()];
    if found != expected {
        return Err(DataError::unexpected(
            folder,
            format!("the pictures of Fashion-MNIST, with the checksum {expected:08x}"),
            format!("others, with {found:08x}; `data = {{ idx = \"folder\" }}` reads any"),
        ));
    }
    Ok(pictures)
}

/// The 10,000 embedded training pictures.
pub fn embedded() -> IdxPictures {
    let [images, labels] = EMBEDDED.map(|(name, _)| Path::new(name));
    let idx = |at: usize, dimensions, path| Idx::parse(EMBEDDED[at].1, dimensions, path);
    idx(0, 3, images)
        .and_then(|pixels| IdxPictures::new(pixels, idx(1, 1, labels)?, [images, labels]))
        .expect("the embedded files can be read, as a test shows")
}

const EMBEDDED: [(&str, &[u8]); 2] = [
    (
        "train-images-idx3-ubyte.gz",
        include_bytes!("../../artifacts/data/fashion-10k/train-images-idx3-ubyte.gz"),
    ),
    (
        "train-labels-idx1-ubyte.gz",
        include_bytes!("../../artifacts/data/fashion-10k/train-labels-idx1-ubyte.gz"),
    ),
];

#[cfg(test)]
mod tests {
    use burn_dataset::Dataset;

    use super::super::{Image, Samples};
    use super::*;

    #[test]
    fn the_embedded_subset_is_balanced() {
        let subset = embedded();
        assert_eq!((subset.side(), subset.classes()), (SIDE, CLASS_NAMES.len()));
        let mut counts = [0; 10];
        for index in 0..subset.len() {
            counts[subset.get(index).unwrap().label] += 1;
        }
        assert_eq!(counts, [1000; 10]);
        assert_eq!(subset.len(), EMBEDDED_COUNT);
    }

    #[test]
    fn pictures_of_other_things_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        for (name, shape) in [
            ("t10k-images-idx3-ubyte", &[10, 28, 28][..]),
            ("t10k-labels-idx1-ubyte", &[10]),
        ] {
            let bytes: Vec<u8> = (0..shape.iter().product())
                .map(|i: usize| (i % 10) as u8)
                .collect();
            let file = super::super::idx::tests::encode(shape, &bytes);
            std::fs::write(folder.path().join(name), file).unwrap();
        }
        let error = open(folder.path(), Split::Test).unwrap_err().to_string();
        assert!(error.contains("the pictures of Fashion-MNIST"), "{error}");
    }

    /// Runs only if the files are present.
    #[test]
    fn the_embedded_subset_is_the_first_thousand_of_each_class() {
        let Some(folder) = folder() else { return };
        let (whole, subset) = (open(&folder, Split::Train).unwrap(), embedded());
        let test = open(&folder, Split::Test).unwrap();
        assert_eq!([whole.len(), test.len()], [60_000, 10_000]);
        let (mut counts, mut next) = ([0; 10], 0);
        for index in 0..whole.len() {
            let Image { pixels, label } = whole.get(index).unwrap();
            counts[label] += 1;
            if counts[label] <= 1000 {
                let mut embedded = Vec::new();
                assert_eq!(subset.read(next, 0, &mut embedded).unwrap(), label);
                assert_eq!(embedded, pixels);
                next += 1;
            }
        }
        assert_eq!(next, subset.len());
    }
}
