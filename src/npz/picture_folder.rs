//! Folders of PNG and JPEG pictures, read like an archive: `u8` RGB, a block at a time.

use std::path::{Path, PathBuf};
use std::{fs, io};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::NpzError;
use crate::files::sha256;
use crate::images::{Images, picture_size, read_rgb};

/// The pictures of a folder and, if it has one for each class, of its sub-folders.
///
/// They are ordered by the bytes of their names relative to the folder, with `/` as separator.
/// Their endings say which files are pictures.
pub(crate) struct PictureFolder {
    /// Name relative to the folder, and path.
    pictures: Vec<(Vec<u8>, PathBuf)>,
    /// Number of entries that are no pictures, without names that begin with a dot.
    ignored: usize,
}

impl PictureFolder {
    /// Lists a folder without opening its pictures.
    ///
    /// # Errors
    ///
    /// [`NpzError::Io`] when it can't be read, [`NpzError::Folder`] when it has no picture.
    pub(crate) fn list(path: &Path) -> Result<Self, NpzError> {
        let mut folder = Self {
            pictures: Vec::new(),
            ignored: 0,
        };
        folder.enter(path, None)?;
        if folder.pictures.is_empty() {
            return Err(NpzError::Folder {
                path: path.to_owned(),
                expected: "pictures (.png, .jpg, .jpeg), or sub-folders of them".to_owned(),
                found: format!("none, and {} other entries", folder.ignored),
            });
        }
        folder.pictures.sort_unstable();
        Ok(folder)
    }

    /// Adds the entries of the folder, or of its sub-folder `class`.
    fn enter(&mut self, path: &Path, class: Option<&[u8]>) -> Result<(), NpzError> {
        for entry in fs::read_dir(path).map_err(NpzError::io(path))? {
            let entry = entry.map_err(NpzError::io(path))?;
            let (name, path) = (entry.file_name(), entry.path());
            let name = name.as_encoded_bytes();
            if name.starts_with(b".") {
                continue;
            }
            match class {
                // Links are followed.
                None if path.is_dir() => self.enter(&path, Some(name))?,
                // Opening a pipe with the name of a picture would block forever.
                _ if !is_picture(&path) || !path.is_file() => self.ignored += 1,
                None => self.pictures.push((name.to_vec(), path)),
                Some(class) => self.pictures.push(([class, b"/", name].concat(), path)),
            }
        }
        Ok(())
    }

    /// Number of pictures, at least one.
    pub(crate) fn count(&self) -> usize {
        self.pictures.len()
    }

    /// Number of ignored entries.
    pub(crate) fn ignored(&self) -> usize {
        self.ignored
    }

    /// `[height, width]` of all pictures; only the beginning of each is read.
    ///
    /// # Errors
    ///
    /// [`NpzError::Picture`] for the first file that is no PNG or JPEG, [`NpzError::Sizes`] for the
    /// first whose size differs from those before it.
    pub(crate) fn size(&self, folder: &Path) -> Result<[usize; 2], NpzError> {
        let size = |(_, path): &(_, PathBuf)| -> Result<[usize; 2], NpzError> {
            let [width, height] = picture_size(path)?;
            Ok([height as usize, width as usize])
        };
        let sizes: Vec<_> = self.pictures.par_iter().map(size).collect();
        let mut first = None;
        for (size, (_, path)) in sizes.into_iter().zip(&self.pictures) {
            let size = size?;
            match first {
                None => first = Some((size, path)),
                Some((expected, _)) if expected == size => {}
                Some((expected, before)) => {
                    return Err(unlike(folder, (before, expected), (path, size)));
                }
            }
        }
        Ok(first.map_or([0, 0], |(size, _)| size))
    }

    /// The pictures `from..from + count` as `[count, height, width, 3]`, read on all cores.
    ///
    /// # Errors
    ///
    /// [`NpzError::Picture`] when one can't be read, [`NpzError::Sizes`] when the size of one has
    /// changed.
    pub(crate) fn read(
        &self,
        folder: &Path,
        from: usize,
        count: usize,
        [height, width]: [usize; 2],
    ) -> Result<Images, NpzError> {
        let pictures = &self.pictures[from..from + count];
        let read: Vec<_> = (pictures.par_iter())
            .map(|(_, path)| read_rgb(path))
            .collect();
        let mut pixels = Vec::with_capacity(count * height * width * 3);
        for (picture, (_, path)) in read.into_iter().zip(pictures) {
            let picture = picture?;
            let size = [picture.height() as usize, picture.width() as usize];
            if size != [height, width] {
                let first = (&self.pictures[0].1, [height, width]);
                return Err(unlike(folder, first, (path, size)));
            }
            pixels.extend_from_slice(&picture);
        }
        Images::new(pixels, [count, height, width, 3]).map_err(|error| {
            NpzError::io(folder)(io::Error::new(io::ErrorKind::InvalidData, error))
        })
    }

    /// SHA-256 over names and contents, in hexadecimal. It is taken over the lines
    /// `SHA-256 of the file, two spaces, name`, which is what `sha256sum` prints for the names in
    /// this order.
    ///
    /// # Errors
    ///
    /// When a file can't be read.
    pub(crate) fn sha256(&self) -> Result<String, NpzError> {
        let hashes: Result<Vec<String>, _> = (self.pictures.par_iter())
            .map(|(_, path)| sha256(path).map_err(NpzError::io(path)))
            .collect();
        let mut whole = Sha256::new();
        for (hash, (name, _)) in hashes?.iter().zip(&self.pictures) {
            whole.update(hash);
            whole.update("  ");
            whole.update(name);
            whole.update("\n");
        }
        Ok(format!("{:x}", whole.finalize()))
    }
}

fn is_picture(path: &Path) -> bool {
    path.extension().is_some_and(|ending| {
        ["png", "jpg", "jpeg"]
            .iter()
            .any(|known| ending.eq_ignore_ascii_case(known))
    })
}

type WithSize<'a> = (&'a PathBuf, [usize; 2]);

fn unlike(
    folder: &Path,
    (first, size): WithSize<'_>,
    (other, other_size): WithSize<'_>,
) -> NpzError {
    let below = |path: &Path| path.strip_prefix(folder).unwrap_or(path).to_owned();
    NpzError::Sizes {
        path: folder.to_owned(),
        first: below(first),
        size,
        other: below(other),
        other_size,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluation::FileDigest;
    use crate::npz::SampleReader;

    fn write(folder: &Path, name: &str, width: u32, height: u32, salt: u8) -> Vec<u8> {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let picture = image::RgbImage::from_fn(width, height, |x, y| {
            image::Rgb([salt, (10 * x % 256) as u8, (20 * y % 256) as u8])
        });
        picture.save(&path).unwrap();
        picture.into_raw()
    }

    #[cfg(unix)]
    #[test]
    fn a_pipe_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "a.png", 3, 2, 0);
        let pipe = folder.path().join("b.png");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        let reader = SampleReader::open(folder.path()).unwrap();
        assert_eq!((reader.shape()[0], reader.ignored()), (1, 1));
    }

    #[test]
    fn a_folder_is_read_as_an_archive_in_the_order_of_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        // Byte order: digits before capitals before small letters, and `b.png` before `b/a.png`,
        // since `.` precedes `/`.
        let names = ["10.png", "9.PNG", "B/2.png", "b.png", "b/a.png"];
        let mut expected = Vec::new();
        for (index, name) in names.iter().enumerate() {
            expected.extend(write(path, name, 3, 2, index as u8));
        }
        for other in [
            "notes.txt",
            "b/list.csv",
            "b/deep/x.png",
            ".hidden.png",
            "B/.DS_Store",
        ] {
            fs::create_dir_all(path.join(other).parent().unwrap()).unwrap();
            fs::write(path.join(other), "no picture").unwrap();
        }
        for most in [1, 2, 5, usize::MAX] {
            let mut reader = SampleReader::open(path).unwrap();
            assert_eq!(reader.shape(), [5, 2, 3, 3]);
            // Names with a dot are not counted; a folder within a class counts as one.
            assert_eq!(reader.ignored(), 3);
            assert_eq!(reader.labels().unwrap(), None);
            let mut pixels = Vec::new();
            while let Some(block) = reader.next_block(most).unwrap() {
                assert!(block.shape()[0] <= most);
                pixels.extend_from_slice(block.pixels());
            }
            assert_eq!(pixels, expected, "{most}");
        }
        let mut first = SampleReader::open(path).unwrap().first(2);
        assert_eq!(first.shape()[0], 2);
        let block = first.next_block(9).unwrap().unwrap();
        assert_eq!(block.pixels(), &expected[..36]);
        assert!(first.next_block(9).unwrap().is_none());
    }

    #[test]
    fn the_digest_is_of_names_and_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pictures");
        fs::create_dir_all(path.join("z")).unwrap();
        fs::write(path.join("z/a.png"), "a").unwrap();
        fs::write(path.join("y.jpg"), "b").unwrap();
        // sha256sum y.jpg z/a.png | sha256sum
        let lines = [("b", "y.jpg"), ("a", "z/a.png")].map(|(content, name)| {
            let hash = Sha256::digest(content);
            let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{hash}  {name}\n")
        });
        let expected = Sha256::digest(lines.concat());
        let expected: String = expected.iter().map(|byte| format!("{byte:02x}")).collect();
        let digest = FileDigest::of(&path).unwrap();
        assert_eq!(
            (digest.file.as_str(), &digest.sha256),
            ("pictures", &expected)
        );
        // Another kind of file doesn't change the digest; a byte or a name of a picture does.
        fs::write(path.join("notes.txt"), "c").unwrap();
        assert_eq!(FileDigest::of(&path).unwrap(), digest);
        fs::write(path.join("y.jpg"), "c").unwrap();
        let other = FileDigest::of(&path).unwrap();
        assert_ne!(other, digest);
        fs::rename(path.join("y.jpg"), path.join("x.jpg")).unwrap();
        assert_ne!(FileDigest::of(&path).unwrap(), other);
    }

    #[test]
    fn pictures_of_unlike_sizes_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        for (name, width) in [("a.png", 3), ("b/c.png", 4), ("d.png", 5)] {
            write(path, name, width, 2, 0);
        }
        let error = SampleReader::open(path).err().unwrap().to_string();
        for words in ["a.png is 3 x 2", "b/c.png 4 x 2", "crop"] {
            assert!(error.contains(words), "{error}");
        }
        assert!(error.contains(&path.display().to_string()), "{error}");
        // A picture whose size changes after the reader was opened.
        fs::remove_file(path.join("d.png")).unwrap();
        write(path, "b/c.png", 3, 2, 0);
        let mut reader = SampleReader::open(path).unwrap();
        write(path, "b/c.png", 3, 3, 0);
        let error = reader.next_block(2).unwrap_err().to_string();
        assert!(error.contains("b/c.png 3 x 3"), "{error}");
    }

    #[test]
    fn folders_without_pictures_and_damaged_pictures_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::write(path.join("a.txt"), "").unwrap();
        let error = SampleReader::open(path).err().unwrap().to_string();
        assert!(error.contains("found none, and 1 other entries"), "{error}");
        assert!(FileDigest::of(path).is_err());
        fs::write(path.join("b.png"), "no picture").unwrap();
        let error = SampleReader::open(path).err().unwrap().to_string();
        assert!(error.contains("b.png"), "{error}");
        // The size can be read, the pixels can't.
        write(path, "b.png", 30, 20, 0);
        let whole = fs::read(path.join("b.png")).unwrap();
        fs::write(path.join("b.png"), &whole[..whole.len() - 20]).unwrap();
        let mut reader = SampleReader::open(path).unwrap();
        let error = reader.next_block(1).unwrap_err().to_string();
        assert!(error.contains("b.png"), "{error}");
    }
}
