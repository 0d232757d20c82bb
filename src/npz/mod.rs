//! Pictures as files for other programs: NumPy's `.npy` and `.npz`, and folders of PNG and JPEG.
//!
//! ADM's evaluation exchanges pictures as archives with `arr_0`, `u8`
//! `[count, height, width, channels]`, and labels as `arr_1`, `i64` `[count]`. [`SampleReader`] and
//! [`SampleWriter`] work a block at a time, [`read_samples`] and [`write_samples`] on the whole. A
//! folder of pictures is read in the same way.

pub(crate) mod archive;
pub(crate) mod npy;
pub(crate) mod picture_folder;
mod samples;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use samples::{SampleReader, SampleWriter, Samples, first_images, read_samples, write_samples};

use crate::images::PictureError;

/// Why an archive or a folder of pictures can't be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NpzError {
    /// The file could not be opened, read or written.
    #[error("{}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Error of the file system or the archive reader.
        source: io::Error,
    },
    /// The number of pictures, labels or bytes is wrong.
    #[error("{what}: expected {expected}, found {found}")]
    Shape {
        /// The quantity with the wrong size.
        what: &'static str,
        /// The size it should have.
        expected: String,
        /// The size it has.
        found: String,
    },
    /// A picture of a folder that can't be read.
    #[error(transparent)]
    Picture(#[from] PictureError),
    /// The pictures of a folder differ in size.
    #[error(
        "{}: {} is {} x {} pixels and {} {} x {}; crop them to one size, as `tinyfusion extract` crops its images",
        .path.display(), .first.display(), .size[1], .size[0], .other.display(), .other_size[1], .other_size[0]
    )]
    Sizes {
        /// The folder.
        path: PathBuf,
        /// The first picture, relative to the folder.
        first: PathBuf,
        /// Its `[height, width]`.
        size: [usize; 2],
        /// The first picture of another size, relative to the folder.
        other: PathBuf,
        /// Its `[height, width]`.
        other_size: [usize; 2],
    },
    /// A folder is unsuitable.
    #[error("{}: expected {expected}, found {found}", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The expected content.
        expected: String,
        /// The content found.
        found: String,
    },
    /// An array of an archive is missing or unsuitable.
    #[error("{}: array `{array}`: expected {expected}, found {found}", .path.display())]
    Array {
        /// The archive.
        path: PathBuf,
        /// The array's name in the archive, without `.npy`.
        array: String,
        /// The expected array.
        expected: String,
        /// The array found.
        found: String,
    },
}

impl NpzError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}
