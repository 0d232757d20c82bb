//! Pictures as `.npz` archives, the exchange format of the ADM evaluation suite, or as folders of files.
//!
//! A batch holds `arr_0`, `u8` `[count, height, width, 3]`, and with class labels `arr_1`, `i64` `[count]`. 50 000
//! pictures of 256 x 256 are 10 GB, so [`SampleReader`] and [`SampleWriter`] hold no more of them than a block.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use zip::ZipWriter;

use super::EvaluationError;
use super::archive::{Archive, Array, start_array, write_array};
use super::picture_folder::PictureFolder;
use crate::atomic::AtomicFile;
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
/// for the usual 10 000 reference pictures of 256 x 256, twice that in Fortran order. [`SampleReader`] needs less.
///
/// # Errors
///
/// [`EvaluationError::Io`] when the file is not a readable archive, [`EvaluationError::Array`] when
/// `arr_0` is missing or not `u8` `[count, height, width, channels]`, or when `arr_1` is there and not
/// `i64` `[count]`.
pub fn read_samples(path: &Path) -> Result<Samples, EvaluationError> {
    let mut archive = Archive::open(path)?;
    let (pixels, shape) = pixels(&mut archive)?;
    let images = images(path, pixels.values("|u1", |[byte]| byte)?, shape)?;
    let labels = labels(&mut archive, shape[0])?;
    Ok(Samples { images, labels })
}

/// `arr_0`, unread, and its shape `[count, height, width, channels]`.
fn pixels(archive: &mut Archive) -> Result<(Array, [usize; 4]), EvaluationError> {
    let pixels = archive.required("arr_0")?;
    let Ok(shape) = pixels.shape.as_slice().try_into() else {
        return Err(pixels.mismatch("the shape [count, height, width, channels]"));
    };
    pixels.expect("|u1")?;
    Ok((pixels, shape))
}

/// `arr_1`, one for each of `count` pictures.
fn labels(archive: &mut Archive, count: usize) -> Result<Option<Vec<i64>>, EvaluationError> {
    let Some(labels) = archive.array("arr_1")? else {
        return Ok(None);
    };
    if labels.shape != [count] {
        return Err(labels.mismatch(&format!("the shape [{count}], one label per picture")));
    }
    labels.values("<i8", i64::from_le_bytes).map(Some)
}

fn images(path: &Path, pixels: Vec<u8>, shape: [usize; 4]) -> Result<Images, EvaluationError> {
    Images::new(pixels, shape).map_err(|error| EvaluationError::Io {
        path: path.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidData, error),
    })
}

/// Reads the pictures of an archive or a folder in order, a block at a time.
///
/// # Examples
///
/// ```
/// use tinyfusion::evaluation::{SampleReader, write_samples};
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
    /// Pictures in the archive, those after the first few that are asked for among them.
    whole: usize,
    /// Pictures that have been given out.
    given: usize,
    source: Source,
}

enum Source {
    /// In the file, picture after picture.
    File(Box<Array>),
    /// In memory: in Fortran order the first pixels of all pictures come first.
    Memory(Images),
    /// Each in a file of its own.
    Folder(PictureFolder),
}

impl SampleReader {
    /// Opens an archive as [`read_samples`] reads it. Pictures in Fortran order, which nobody's sampler writes, are
    /// read now and held whole.
    ///
    /// A folder is opened as an archive of the pictures in it and in its sub-folders (one for each class, say), PNG and
    /// JPEG by their endings, in the byte order of their names below the folder. They are read as 8-bit RGB
    /// ([`read_rgb`](crate::images::read_rgb)) and must be of one size, which is looked at now.
    ///
    /// # Errors
    ///
    /// As [`read_samples`]; also when the archive holds less data than the shape asks for. `arr_1` is not looked at. Of
    /// a folder [`EvaluationError::Folder`] when it has no pictures, [`EvaluationError::Picture`] when one of them is
    /// none, and [`EvaluationError::Sizes`] when two differ in size.
    pub fn open(path: &Path) -> Result<Self, EvaluationError> {
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

    /// The first `count` pictures alone; all, if there are no more. What comes after them is not read, so that the
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

    /// `[count, height, width, channels]` of all pictures, those already read among them.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Entries of a folder that were passed over because they are no pictures; hidden files don't count.
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
    /// [`EvaluationError::Array`] when `arr_1` is not `i64` `[count]`.
    pub fn labels(&self) -> Result<Option<Vec<i64>>, EvaluationError> {
        if let Source::Folder(_) = self.source {
            return Ok(None);
        }
        let mut labels = labels(&mut Archive::open(&self.path)?, self.whole)?;
        if let Some(labels) = &mut labels {
            labels.truncate(self.shape[0]);
        }
        Ok(labels)
    }

    /// The next pictures, at most `most` and at least one, `[pictures, height, width, channels]`; `None` when all
    /// were read. With the last block the checksum of the archive is compared.
    ///
    /// # Errors
    ///
    /// [`EvaluationError::Array`] when the data are damaged, end early or don't fit the memory,
    /// [`EvaluationError::Picture`] when a picture of a folder can't be read. The reader is of no use then.
    pub fn next_block(&mut self, most: usize) -> Result<Option<Images>, EvaluationError> {
        let [count, height, width, channels] = self.shape;
        let pictures = most.max(1).min(count.saturating_sub(self.given));
        if pictures == 0 {
            return Ok(None);
        }
        // Their product with the number of pictures, which isn't zero here, was checked as the header was read.
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

/// Writes pictures as `arr_0` and labels as `arr_1`, stored without compression as `numpy.savez` does, a block at a
/// time. The file appears whole, when [`finish`](Self::finish) returns, or not at all.
///
/// # Examples
///
/// ```
/// use tinyfusion::evaluation::{SampleWriter, read_samples};
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
    /// None after a write that failed in the middle of a block.
    archive: Option<ZipWriter<AtomicFile>>,
}

impl SampleWriter {
    /// Begins an archive of pictures `[count, height, width, channels]`; missing folders are created.
    ///
    /// # Errors
    ///
    /// [`EvaluationError::Shape`] when so many pixels can't be addressed, [`EvaluationError::Io`] when the file can't
    /// be written.
    pub fn create(path: &Path, shape: [usize; 4]) -> Result<Self, EvaluationError> {
        let size = shape
            .iter()
            .try_fold(1usize, |n, &side| n.checked_mul(side));
        let size = size.ok_or_else(|| EvaluationError::Shape {
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
            archive: Some(begin().map_err(EvaluationError::io(path))?),
        })
    }

    /// Appends pictures.
    ///
    /// # Errors
    ///
    /// [`EvaluationError::Shape`] when they are of another size or more than there should be, [`EvaluationError::Io`]
    /// when they can't be written; after that nothing more can be.
    pub fn push(&mut self, images: &Images) -> Result<(), EvaluationError> {
        let [count, size @ ..] = images.shape();
        let [most, expected @ ..] = self.shape;
        let left = most - self.written;
        if size != expected || count > left {
            return Err(EvaluationError::Shape {
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
            .map_err(EvaluationError::io(&self.path))?;
        self.archive = Some(archive);
        self.written += count;
        Ok(())
    }

    /// Appends the labels, if there are any, and gives the file its name.
    ///
    /// # Errors
    ///
    /// [`EvaluationError::Shape`] unless all pictures were written and there is one label for each,
    /// [`EvaluationError::Io`] when the file can't be written.
    pub fn finish(mut self, labels: Option<&[i64]>) -> Result<(), EvaluationError> {
        let count = self.shape[0];
        let found = [
            ("images", Some(self.written)),
            ("labels", labels.map(<[i64]>::len)),
        ];
        for (what, found) in found {
            if let Some(found) = found
                && found != count
            {
                return Err(EvaluationError::Shape {
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
        finish().map_err(EvaluationError::io(&self.path))
    }

    fn torn(&self) -> EvaluationError {
        let problem = "an earlier block could not be written";
        EvaluationError::io(&self.path)(io::Error::other(problem))
    }
}

/// Writes `images` as `arr_0` and `labels` as `arr_1`, as [`SampleWriter`] does.
///
/// # Errors
///
/// [`EvaluationError::Shape`] unless there is one label per picture, [`EvaluationError::Io`] when the
/// file cannot be written.
pub fn write_samples(
    path: &Path,
    images: &Images,
    labels: Option<&[i64]>,
) -> Result<(), EvaluationError> {
    let mut writer = SampleWriter::create(path, images.shape())?;
    writer.push(images)?;
    writer.finish(labels)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::archive::testing::{archive, npy};
    use super::*;

    fn read_error(members: &[(&str, Vec<u8>)]) -> String {
        let (_folder, path) = archive(members);
        let message = read_samples(&path).unwrap_err().to_string();
        assert!(message.contains("batch.npz"), "{message}");
        message
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/samples.npz");
        let images = Images::new((0..24).collect(), [2, 2, 2, 3]).unwrap();
        let labels = vec![-1, i64::MAX];
        for labels in [None, Some(labels)] {
            write_samples(&path, &images, labels.as_deref()).unwrap();
            let samples = read_samples(&path).unwrap();
            assert_eq!(
                samples,
                Samples {
                    images: images.clone(),
                    labels
                }
            );
        }
        assert!(write_samples(&path, &images, Some(&[1])).is_err());
    }

    #[test]
    fn errors_say_what_was_expected_and_found() {
        let pixels = || npy("|u1", &[1, 1, 2, 3], &[0; 6]);
        let cases = [
            (
                vec![("mu.npy", pixels())],
                "expected a member arr_0.npy, found only [\"mu.npy\"]",
            ),
            (
                vec![("arr_0.npy", npy("|u1", &[6], &[0; 6]))],
                "found '|u1' of shape [6]",
            ),
            (
                vec![("arr_0.npy", npy("<f4", &[1, 1, 1, 1], &[0; 4]))],
                "expected the type '|u1'",
            ),
            (
                vec![("arr_0.npy", npy("|u1", &[1, 1, 2, 3], &[0; 5]))],
                "found 5 bytes",
            ),
            (
                vec![("arr_0.npy", b"not an array".to_vec())],
                "expected a NumPy array",
            ),
            (vec![("arr_0.npy", vec![])], "expected a NumPy array"),
            (
                vec![
                    ("arr_0.npy", pixels()),
                    ("arr_1.npy", npy("<i8", &[2], &[0; 16])),
                ],
                "array `arr_1`: expected the shape [1]",
            ),
            (
                vec![("arr_0.npy", npy("|u1", &[1 << 44, 1 << 10, 1, 1], &[]))],
                "expected 18014398509481984 bytes for the shape",
            ),
            (
                vec![("arr_0.npy", npy("|u1", &[1 << 60, 1 << 10, 1, 1], &[]))],
                "expected a size that can be addressed",
            ),
        ];
        for (members, expected) in cases {
            let message = read_error(&members);
            assert!(message.contains(expected), "{message}\nlacks {expected}");
        }
    }

    #[test]
    fn files_that_are_no_archives_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.npz");
        std::fs::write(&path, "hello").unwrap();
        assert!(matches!(
            read_samples(&path),
            Err(EvaluationError::Io { .. })
        ));
        assert!(read_samples(&folder.path().join("missing.npz")).is_err());
    }

    /// All pictures of a reader, in blocks of at most `most`.
    fn blocks(path: &Path, most: usize) -> Result<Vec<Images>, EvaluationError> {
        let mut reader = SampleReader::open(path)?;
        std::iter::from_fn(|| reader.next_block(most).transpose()).collect()
    }

    #[test]
    fn blocks_are_the_archive_whatever_their_size() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/npz");
        let mut archives = 0;
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|ending| ending != "npz") {
                continue;
            }
            archives += 1;
            let whole = read_samples(&path).unwrap();
            let [count, size @ ..] = whole.images.shape();
            let reader = SampleReader::open(&path).unwrap();
            assert_eq!(reader.shape(), whole.images.shape());
            assert_eq!(reader.path(), path);
            assert_eq!(reader.labels().unwrap(), whole.labels);
            for most in [1, 2, 3, count, count + 1, usize::MAX] {
                let blocks = blocks(&path, most).unwrap();
                assert_eq!(blocks.len(), count.div_ceil(most), "{path:?} {most}");
                let pixels: Vec<&[u8]> = blocks.iter().map(Images::pixels).collect();
                assert_eq!(pixels.concat(), whole.images.pixels(), "{path:?} {most}");
                assert!(blocks.iter().all(|block| block.shape()[1..] == size));
            }
            assert_eq!(blocks(&path, 0).unwrap().len(), count);
            // The first few alone, and no more than there are.
            for few in [0, 1, 3, count + 1] {
                let mut reader = SampleReader::open(&path).unwrap().first(few);
                let few = few.min(count);
                assert_eq!(reader.shape()[0], few);
                let labels = whole.labels.as_ref().map(|labels| labels[..few].to_vec());
                assert_eq!(reader.labels().unwrap(), labels);
                let block = reader.next_block(usize::MAX).unwrap();
                let read = block.as_ref().map_or(&[][..], Images::pixels);
                assert_eq!(
                    read,
                    &whole.images.pixels()[..few * whole.images.image(0).len()]
                );
                assert!(reader.next_block(1).unwrap().is_none());
            }
        }
        assert_eq!(archives, 6);
    }

    #[test]
    fn damaged_data_are_found() {
        // Stored, so that a bit that flips is still a picture's; found by the checksum alone.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("batch.npz");
        let images = Images::new((0..24).collect(), [2, 2, 2, 3]).unwrap();
        write_samples(&path, &images, Some(&[1, 2])).unwrap();
        let whole = fs::read(&path).unwrap();
        let place = whole.windows(3).position(|bytes| bytes == [21, 22, 23]);
        let mut bytes = whole.clone();
        bytes[place.unwrap()] ^= 1;
        fs::write(&path, &bytes).unwrap();
        for error in [
            blocks(&path, 1).unwrap_err(),
            blocks(&path, 2).unwrap_err(),
            read_samples(&path).unwrap_err(),
        ] {
            let message = error.to_string();
            assert!(
                message.contains("`arr_0`") && message.contains("checksum"),
                "{message}"
            );
        }
        // Cut anywhere, it is no archive any more.
        for length in (0..whole.len()).step_by(7) {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(SampleReader::open(&path).is_err() && read_samples(&path).is_err());
        }
        // Whatever byte is wrong, nothing but an error or pictures of the stated size comes of it.
        for place in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[place] ^= 0xFF;
            fs::write(&path, &bytes).unwrap();
            for images in blocks(&path, 1).into_iter().flatten() {
                assert_eq!(images.shape()[0], 1);
            }
        }
    }

    #[test]
    fn a_reader_refuses_what_the_archive_can_not_hold_at_once() {
        for shape in [
            [1 << 44, 1 << 10, 1, 1],
            [1 << 60, 1 << 10, 1, 1],
            [usize::MAX, 1, 1, 1],
            [2, 1, 2, 3],
        ] {
            let (_folder, path) = archive(&[("arr_0.npy", npy("|u1", &shape, &[0; 11]))]);
            let error = SampleReader::open(&path).err().unwrap().to_string();
            assert!(error.contains("batch.npz: array `arr_0`"), "{error}");
        }
        // Without pixels nothing is missing.
        let (_folder, path) = archive(&[("arr_0.npy", npy("|u1", &[0, 1 << 40, 1 << 40, 3], &[]))]);
        assert!(blocks(&path, 8).unwrap().is_empty());
        let (_folder, path) = archive(&[("arr_0.npy", npy("|u1", &[3, 0, 1 << 40, 3], &[]))]);
        assert_eq!(blocks(&path, 2).unwrap().len(), 2);
        // More data than an array needs are not taken for the end of it, where the checksum is compared.
        let (_folder, path) = archive(&[("arr_0.npy", npy("|u1", &[1, 1, 2, 3], &[7; 8]))]);
        let error = blocks(&path, 8).unwrap_err().to_string();
        assert!(error.contains("found more bytes"), "{error}");
    }

    #[test]
    fn a_writer_takes_what_it_was_told_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("samples.npz");
        let some = |count: usize| Images::new(vec![1; count * 6], [count, 1, 2, 3]).unwrap();
        let turned = Images::new(vec![1; 6], [1, 2, 1, 3]).unwrap();
        let fresh = || SampleWriter::create(&path, [3, 1, 2, 3]).unwrap();
        let files = || fs::read_dir(folder.path()).unwrap().count();

        let mut writer = fresh();
        assert!(writer.push(&turned).is_err());
        writer.push(&some(2)).unwrap();
        let error = writer.push(&some(2)).unwrap_err().to_string();
        assert!(error.contains("at most 1"), "{error}");
        writer.push(&some(0)).unwrap();
        writer.push(&some(1)).unwrap();
        writer.finish(Some(&[1, 2, 3])).unwrap();
        let whole = read_samples(&path).unwrap();
        assert_eq!(whole.images, some(3));
        assert_eq!(whole.labels, Some(vec![1, 2, 3]));

        // Pictures or labels that are missing: the file before stays, and nothing is left of the new one.
        let mut writer = fresh();
        writer.push(&turned).unwrap_err();
        writer.push(&some(1)).unwrap();
        assert_eq!(files(), 2);
        assert!(writer.finish(None).is_err());
        let mut writer = fresh();
        writer.push(&some(3)).unwrap();
        assert!(writer.finish(Some(&[1])).is_err());
        drop(fresh());
        assert_eq!(read_samples(&path).unwrap(), whole);
        assert_eq!(files(), 1);
        assert!(SampleWriter::create(&path, [usize::MAX, 2, 1, 1]).is_err());
    }
}
