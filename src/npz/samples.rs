//! Pictures as `.npz` archives, the exchange format of the ADM evaluation suite, or as folders of
//! files.
//!
//! A batch holds `arr_0`, `u8` `[count, height, width, 3]`, and with class labels `arr_1`, `i64`
//! `[count]`. 50 000 pictures of 256 x 256 are 10 GB, so [`SampleReader`] and [`SampleWriter`] hold
//! no more of them than a block.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use zip::ZipWriter;

use super::NpzError;
use super::archive::{Archive, Array, start_array, write_array};
use super::picture_folder::PictureFolder;
use crate::files::AtomicFile;
use crate::images::Images;

/// A batch of pictures and, where the archive has them, their classes.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples {
    /// `arr_0`, `[count, height, width, channels]`.
    pub images: Images,
    /// `arr_1`, `[count]`.
    pub labels: Option<Vec<i64>>,
}

/// Reads `arr_0` and, if present, `arr_1`.
///
/// Members may be stored or deflated, in C or Fortran order. The pictures are held in memory: 2 GB
/// for the usual 10 000 reference pictures of 256 x 256, twice that in Fortran order.
/// [`SampleReader`] needs less.
///
/// # Errors
///
/// [`NpzError::Io`] when the file is not a readable archive, [`NpzError::Array`] when `arr_0` is
/// missing or not `u8` `[count, height, width, channels]`, or when `arr_1` is present and not `i64`
/// `[count]`.
pub fn read_samples(path: &Path) -> Result<Samples, NpzError> {
    let mut archive = Archive::open(path)?;
    let (pixels, shape) = pixels(&mut archive)?;
    let images = images(path, pixels.values("|u1", |[byte]| byte)?, shape)?;
    let labels = labels(&mut archive, shape[0])?;
    Ok(Samples { images, labels })
}

/// `arr_0`, unread, and its shape `[count, height, width, channels]`.
fn pixels(archive: &mut Archive) -> Result<(Array, [usize; 4]), NpzError> {
    let pixels = archive.required("arr_0")?;
    let Ok(shape) = pixels.shape.as_slice().try_into() else {
        return Err(pixels.mismatch("the shape [count, height, width, channels]"));
    };
    pixels.expect("|u1")?;
    Ok((pixels, shape))
}

/// `arr_1`, a label for each of `count` pictures.
fn labels(archive: &mut Archive, count: usize) -> Result<Option<Vec<i64>>, NpzError> {
    let Some(labels) = archive.array("arr_1")? else {
        return Ok(None);
    };
    if labels.shape != [count] {
        return Err(labels.mismatch(&format!("the shape [{count}], one label per picture")));
    }
    labels.values("<i8", i64::from_le_bytes).map(Some)
}

fn images(path: &Path, pixels: Vec<u8>, shape: [usize; 4]) -> Result<Images, NpzError> {
    Images::new(pixels, shape).map_err(|error| NpzError::Io {
        path: path.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidData, error),
    })
}

/// Reads the pictures of an archive or a folder in order, a block at a time.
///
/// # Examples
///
/// ```
/// use tinyfusion::npz::{SampleReader, write_samples};
/// use tinyfusion::images::Images;
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("samples.npz");
/// write_samples(&path, &Images::new(vec![1, 2, 3], [3, 1, 1, 1])?, None)?;
/// let mut reader = SampleReader::open(&path)?;
/// let mut blocks = Vec::new();
/// while let Some(images) = reader.next_block(2)? {
///     blocks.push(images.pixels().to_vec());
/// }
/// assert_eq!(blocks, [vec![1, 2], vec![3]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct SampleReader {
    path: PathBuf,
    shape: [usize; 4],
    /// Number of pictures in the file or folder, including those beyond `first`.
    whole: usize,
    /// Number of pictures returned so far.
    given: usize,
    source: Source,
}

enum Source {
    /// In the file, picture after picture.
    File(Box<Array>),
    /// In memory: in Fortran order, the first pixels of all pictures come first.
    Memory(Images),
    /// Each in a file of its own.
    Folder(PictureFolder),
}

impl SampleReader {
    /// Opens an archive as [`read_samples`] does. Pictures in Fortran order, which no sampler
    /// writes, are read now and held in memory.
    ///
    /// A folder is read as an archive of the pictures in it and in its sub-folders (such as one for
    /// each class). Files that end as PNG or JPEG count as pictures, in the byte order of their
    /// names relative to the folder. They are read as 8-bit RGB
    /// ([`read_rgb`](crate::images::read_rgb)) and must be of one size, which is checked now.
    ///
    /// # Errors
    ///
    /// As [`read_samples`]; also when the archive holds less data than the shape requires. `arr_1`
    /// is not read. For a folder, [`NpzError::Folder`] when it has no pictures,
    /// [`NpzError::Picture`] when a file is no PNG or JPEG, and [`NpzError::Sizes`] when two
    /// pictures differ in size.
    pub fn open(path: &Path) -> Result<Self, NpzError> {
        if path.is_dir() {
            let folder = PictureFolder::list(path)?;
            let [height, width] = folder.size(path)?;
            return Ok(Self {
                path: path.to_owned(),
                shape: [folder.count(), height, width, 3],
                whole: folder.count(),
                given: 0,
                source: Source::Folder(folder),
            });
        }
        let (pixels, shape) = pixels(&mut Archive::open(path)?)?;
        pixels.expect_whole()?;
        let source = if pixels.is_fortran() {
            Source::Memory(images(path, pixels.values("|u1", |[byte]| byte)?, shape)?)
        } else {
            Source::File(Box::new(pixels))
        };
        Ok(Self {
            path: path.to_owned(),
            shape,
            whole: shape[0],
            given: 0,
            source,
        })
    }

    /// Only the first `count` pictures, or all if there are fewer. The rest is not read, so the
    /// checksum of the archive is not compared.
    #[must_use]
    pub fn first(mut self, count: usize) -> Self {
        self.shape[0] = self.shape[0].min(count);
        self
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `[count, height, width, channels]` of all pictures, including those already read.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Entries of a folder that were ignored because they are no pictures; hidden files don't
    /// count.
    pub fn ignored(&self) -> usize {
        match &self.source {
            Source::Folder(folder) => folder.ignored(),
            Source::File(_) | Source::Memory(_) => 0,
        }
    }

    /// The classes, `arr_1`, `[count]`, if the archive has them. A folder has none.
    ///
    /// # Errors
    ///
    /// [`NpzError::Array`] when `arr_1` is not `i64` `[count]`.
    pub fn labels(&self) -> Result<Option<Vec<i64>>, NpzError> {
        if let Source::Folder(_) = self.source {
            return Ok(None);
        }
        let mut labels = labels(&mut Archive::open(&self.path)?, self.whole)?;
        if let Some(labels) = &mut labels {
            labels.truncate(self.shape[0]);
        }
        Ok(labels)
    }

    /// The next pictures, `[pictures, height, width, channels]`, at least one and at most `most`;
    /// `None` when all were read. The checksum of the archive is compared after the last block.
    ///
    /// # Errors
    ///
    /// [`NpzError::Array`] when the data are damaged, end early or don't fit the memory,
    /// [`NpzError::Picture`] when a picture of a folder can't be read. After an error the reader
    /// can't be used.
    pub fn next_block(&mut self, most: usize) -> Result<Option<Images>, NpzError> {
        let [count, height, width, channels] = self.shape;
        let pictures = most.max(1).min(count.saturating_sub(self.given));
        if pictures == 0 {
            return Ok(None);
        }
        // Reading the header checked the product with the number of pictures, which isn't zero
        // here.
        let size = height * width * channels;
        let pixels = match &mut self.source {
            Source::File(pixels) => pixels.read(pictures * size)?,
            Source::Memory(images) => {
                images.pixels()[self.given * size..(self.given + pictures) * size].to_vec()
            }
            Source::Folder(folder) => {
                let block = folder.read(&self.path, self.given, pictures, [height, width])?;
                self.given += pictures;
                return Ok(Some(block));
            }
        };
        self.given += pictures;
        images(&self.path, pixels, [pictures, height, width, channels]).map(Some)
    }
}

/// The first pictures of an archive or a folder, at most `count`.
///
/// # Errors
///
/// As [`SampleReader::open`] and [`SampleReader::next_block`]; [`NpzError::Shape`] when there are
/// none.
pub fn first_images(path: &Path, count: usize) -> Result<Images, NpzError> {
    let images = SampleReader::open(path)?.next_block(count)?;
    images.ok_or_else(|| NpzError::Shape {
        what: "pictures of an archive",
        expected: "one at least".to_owned(),
        found: format!("none in {}", path.display()),
    })
}

/// Writes pictures as `arr_0` and labels as `arr_1`, stored without compression as by
/// `numpy.savez`, a block at a time. The file appears whole, when [`finish`](Self::finish) returns,
/// or not at all.
///
/// # Examples
///
/// ```
/// use tinyfusion::npz::{SampleWriter, read_samples};
/// use tinyfusion::images::Images;
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("samples.npz");
/// let mut writer = SampleWriter::create(&path, [3, 1, 1, 1])?;
/// writer.push(&Images::new(vec![1, 2], [2, 1, 1, 1])?)?;
/// writer.push(&Images::new(vec![3], [1, 1, 1, 1])?)?;
/// writer.finish(Some(&[7, 8, 9]))?;
/// assert_eq!(read_samples(&path)?.images.pixels(), [1, 2, 3]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct SampleWriter {
    path: PathBuf,
    shape: [usize; 4],
    written: usize,
    /// None after a write that failed within a block.
    archive: Option<ZipWriter<AtomicFile>>,
}

impl SampleWriter {
    /// Begins an archive of pictures `[count, height, width, channels]`; missing folders are
    /// created.
    ///
    /// # Errors
    ///
    /// [`NpzError::Shape`] when the number of pixels overflows, [`NpzError::Io`] when the file
    /// can't be written.
    pub fn create(path: &Path, shape: [usize; 4]) -> Result<Self, NpzError> {
        let size = shape
            .iter()
            .try_fold(1usize, |n, &side| n.checked_mul(side));
        let size = size.ok_or_else(|| NpzError::Shape {
            what: "images",
            expected: "a size that can be addressed".to_owned(),
            found: format!("{shape:?}"),
        })?;
        let begin = || {
            let mut archive = ZipWriter::new(AtomicFile::create(path)?);
            start_array(&mut archive, "arr_0", "|u1", &shape, size)?;
            Ok(archive)
        };
        Ok(Self {
            path: path.to_owned(),
            shape,
            written: 0,
            archive: Some(begin().map_err(NpzError::io(path))?),
        })
    }

    /// Appends pictures.
    ///
    /// # Errors
    ///
    /// [`NpzError::Shape`] when they are of another size or too many, [`NpzError::Io`] when they
    /// can't be written; after that the writer can't be used.
    pub fn push(&mut self, images: &Images) -> Result<(), NpzError> {
        let [count, size @ ..] = images.shape();
        let [most, expected @ ..] = self.shape;
        let left = most - self.written;
        if size != expected || count > left {
            return Err(NpzError::Shape {
                what: "images",
                expected: format!("at most {left} of [height, width, channels] = {expected:?}"),
                found: format!("{count} of {size:?}"),
            });
        }
        let Some(mut archive) = self.archive.take() else {
            return Err(self.torn());
        };
        archive
            .write_all(images.pixels())
            .map_err(NpzError::io(&self.path))?;
        self.archive = Some(archive);
        self.written += count;
        Ok(())
    }

    /// Appends the labels, if given, and gives the file its name.
    ///
    /// # Errors
    ///
    /// [`NpzError::Shape`] unless all pictures were written and there is one label for each,
    /// [`NpzError::Io`] when the file can't be written.
    pub fn finish(mut self, labels: Option<&[i64]>) -> Result<(), NpzError> {
        let count = self.shape[0];
        let found = [
            ("images", Some(self.written)),
            ("labels", labels.map(<[i64]>::len)),
        ];
        for (what, found) in found {
            if let Some(found) = found
                && found != count
            {
                return Err(NpzError::Shape {
                    what,
                    expected: format!("{count}, one per picture"),
                    found: found.to_string(),
                });
            }
        }
        let Some(mut archive) = self.archive.take() else {
            return Err(self.torn());
        };
        let finish = move || {
            if let Some(labels) = labels {
                let bytes: Vec<u8> = labels
                    .iter()
                    .flat_map(|label| label.to_le_bytes())
                    .collect();
                write_array(&mut archive, "arr_1", "<i8", &[count], &bytes)?;
            }
            archive.finish()?.commit()
        };
        finish().map_err(NpzError::io(&self.path))
    }

    fn torn(&self) -> NpzError {
        let problem = "an earlier block could not be written";
        NpzError::io(&self.path)(io::Error::other(problem))
    }
}

/// Writes `images` as `arr_0` and `labels` as `arr_1`, as [`SampleWriter`] does.
///
/// # Errors
///
/// [`NpzError::Shape`] unless there is one label per picture, [`NpzError::Io`] when the
/// file cannot be written.
pub fn write_samples(path: &Path, images: &Images, labels: Option<&[i64]>) -> Result<(), NpzError> {
    let mut writer = SampleWriter::create(path, images.shape())?;
    writer.push(images)?;
    writer.finish(labels)
}

#[cfg(test)]
mod tests;
