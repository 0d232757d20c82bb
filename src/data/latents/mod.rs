//! Latents on disk: a data set encoded once by an autoencoder, for any number of trainings.
//!
//! [`Latents::open`] reads two formats.
//!
//! # `.npy` folders
//! The reference's format: `imagenet256_features/I.npy`, `f32` `[views, channels, side, side]`, and
//! `imagenet256_labels/I.npy`, `i64` `[1]`. Both folders are listed in the byte order of the names
//! (`10.npy` before `2.npy`) and matched by position. [`write_npy`] writes one sample. Reading a
//! sample opens two files, which is slow.
//!
//! # Packed shards
//! This crate's format: `latents.json` and files of records of equal size, written by
//! [`ShardWriter`].
//!
//! `latents.json` is written last, so a folder without it is unfinished:
//!
//! ```json
//! {
//!   "format": "tinyfusion latents",
//!   "version": 1,
//!   "count": 5000,
//!   "layout": {
//!     "views": 2, "channels": 4, "side": 32, "dtype": "f16",
//!     "classes": 1000, "records_per_shard": 2048, "scaling_factor": 0.18215
//!   },
//!   "class_names": ["tench", "..."],
//!   "shards": [{ "file": "shard-00000.bin", "records": 2048, "checksum": "8c1f03aa" }]
//! }
//! ```
//!
//! `class_names` is optional. Every shard but the last holds `records_per_shard` records. The
//! layout of a shard, with all numbers little-endian:
//!
//! | Bytes | Contents |
//! |---|---|
//! | 0..8 | `TFLATENT` |
//! | 8..12 | `u32`, version: 1 |
//! | 12..16 | `u32`, bytes of a number: 1 (`u8`), 2 (`f16`) or 4 (`f32`) |
//! | 16..20 | `u32`, views: 1 (image) or 2 (image, mirror image) |
//! | 20..24 | `u32`, channels |
//! | 24..28 | `u32`, side |
//! | 28..32 | `u32`, classes |
//! | 32..40 | `f64`, factor applied to the autoencoder's latents |
//! | 40..44 | `u32`, records of a full shard |
//! | 44..48 | `u32`, records of this shard |
//! | 48..56 | `u64`, number of its first record |
//! | 56..64 | zero |
//! | 64.. | records |
//! | last 4 | `u32`, CRC-32 (IEEE) of all bytes before; `checksum` in hexadecimal |
//!
//! A record is the latents `[views, channels, side, side]`, the label as `u32`, and zeros up to a
//! multiple of 64 bytes, so records are aligned to cache lines.
//!
//! Pictures for training in pixel space are packed in the same format, as `u8`: a byte `b`
//! represents the number `b / 127.5 - 1`.
//!
//! CRC-32, because it only has to detect accidental damage; processors compute it at several
//! gigabytes per second, and `crc32fast`, which does so, is already a dependency of `zip`.

use std::path::Path;

use burn_dataset::Dataset;

use super::{DataError, Image, Samples, plain};

mod form;
mod npy;
mod packed;
mod writer;

pub use form::{Dtype, Layout, RECORDS_PER_SHARD};
pub use npy::write_npy;
pub(super) use npy::written as npy_written;
pub use writer::ShardWriter;

pub(super) use form::INDEX;
use form::shard_name;
use npy::{FEATURES, LABELS, NpyFolders};
use packed::Packed;

/// Latents of either format, opened for reading.
pub struct Latents(Format);

enum Format {
    Npy(NpyFolders),
    Packed(Packed),
}

impl Latents {
    /// Opens a folder of packed shards, one that holds `imagenet256_features` and
    /// `imagenet256_labels`, or a folder `NAME_features` beside `NAME_labels`.
    ///
    /// Checks the sizes and headers of all shards, or the first pair of `.npy` files; the contents
    /// are checked when they are read, or by [`verify`](Self::verify). The files must not be
    /// changed while they are open.
    ///
    /// # Errors
    /// When the folder is none of these, is unfinished or empty, or a file is not as expected.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        if path.join(INDEX).is_file() {
            return Packed::open(path).map(|packed| Self(Format::Packed(packed)));
        }
        let npy = |features: &Path, labels: &Path| {
            NpyFolders::open(features, labels).map(|folders| Self(Format::Npy(folders)))
        };
        if path.join(FEATURES).is_dir() {
            return npy(&path.join(FEATURES), &path.join(LABELS));
        }
        let name = path.file_name().and_then(|name| name.to_str());
        if let Some(name) = name.and_then(|name| name.strip_suffix("_features"))
            && path.is_dir()
        {
            return npy(path, &path.with_file_name(format!("{name}_labels")));
        }
        let found = if path.join(shard_name(0)).exists() {
            format!("shards without {INDEX}: they were not finished, and their writer can go on")
        } else if path.is_dir() {
            "neither".to_owned()
        } else {
            "no folder".to_owned()
        };
        let expected =
            format!("a folder with {INDEX}, or with the folders {FEATURES} and {LABELS}");
        Err(DataError::unexpected(path, expected, found))
    }

    /// Whether a folder has the files or folders that [`open`](Self::open) looks for.
    pub fn is_at(path: &Path) -> bool {
        let named = path
            .to_str()
            .is_some_and(|name| name.ends_with("_features"));
        named
            || path.join(INDEX).exists()
            || path.join(FEATURES).exists()
            || path.join(shard_name(0)).exists()
    }

    /// Number of samples, at least 1.
    pub fn count(&self) -> usize {
        match &self.0 {
            Format::Npy(folders) => folders.count(),
            Format::Packed(packed) => packed.count(),
        }
    }

    /// Views per sample: 1, or 2 with the mirror image.
    pub fn views(&self) -> usize {
        self.shape()[0]
    }

    /// Channels of a latent.
    pub fn channels(&self) -> usize {
        self.shape()[1]
    }

    /// Side of a latent.
    pub fn side(&self) -> usize {
        self.shape()[2]
    }

    fn shape(&self) -> [usize; 3] {
        match &self.0 {
            Format::Npy(folders) => folders.shape(),
            Format::Packed(packed) => packed.layout().shape(),
        }
    }

    /// Number of classes. Shards state it; for `.npy` folders it is one more than the largest
    /// label, and the first call reads all labels.
    ///
    /// # Errors
    /// When a label can't be read.
    pub fn classes(&self) -> Result<usize, DataError> {
        match &self.0 {
            Format::Npy(folders) => folders.classes(),
            Format::Packed(packed) => Ok(packed.layout().classes),
        }
    }

    /// The number of classes if the format states it: reading the labels of a million `.npy` files
    /// takes minutes.
    pub fn stated_classes(&self) -> Option<usize> {
        match &self.0 {
            Format::Npy(_) => None,
            Format::Packed(packed) => Some(packed.layout().classes),
        }
    }

    /// Names of the classes; empty if unknown.
    pub fn class_names(&self) -> &[String] {
        match &self.0 {
            Format::Npy(_) => &[],
            Format::Packed(packed) => packed.class_names(),
        }
    }

    /// Factor applied to the autoencoder's latents, if the format states it.
    pub fn scaling_factor(&self) -> Option<f64> {
        match &self.0 {
            Format::Npy(_) => None,
            Format::Packed(packed) => Some(packed.layout().scaling_factor),
        }
    }

    /// The label of a sample.
    ///
    /// # Errors
    /// When there is no such sample, or its label can't be read or is no class.
    pub fn label(&self, index: usize) -> Result<usize, DataError> {
        self.check(index, 0)?;
        match &self.0 {
            Format::Npy(folders) => folders.label(index),
            Format::Packed(packed) => packed.label(index),
        }
    }

    /// Reads everything, and compares shards with their checksums.
    ///
    /// # Errors
    /// Names the first damaged file.
    pub fn verify(&self) -> Result<(), DataError> {
        match &self.0 {
            Format::Npy(folders) => folders.verify(),
            Format::Packed(packed) => packed.verify(),
        }
    }

    fn check(&self, index: usize, view: usize) -> Result<(), DataError> {
        let (count, views) = (self.count(), self.views());
        if index < count && view < views {
            return Ok(());
        }
        Err(DataError::Sample {
            index,
            expected: format!("one of {count} samples of {views} views"),
            found: format!("a request for view {view}"),
        })
    }
}

impl Dataset<Image> for Latents {
    fn len(&self) -> usize {
        self.count()
    }

    fn get(&self, index: usize) -> Option<Image> {
        plain(self, index)
    }
}

impl Samples for Latents {
    fn views(&self) -> usize {
        self.views()
    }

    fn read(&self, index: usize, view: usize, out: &mut Vec<f32>) -> Result<usize, DataError> {
        self.check(index, view)?;
        match &self.0 {
            Format::Npy(folders) => folders.read(index, view, out),
            Format::Packed(packed) => packed.read(index, view, out),
        }
    }
}

#[cfg(test)]
mod tests;
