//! Labelled images on disk, in one sub-folder per class.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::DataError;

/// A folder of images whose sub-folders are the classes; like torchvision's `ImageFolder`, but one
/// level deep and for PNG and JPEG only. A folder without sub-folders is a single class with the
/// folder's name.
///
/// Classes are numbered in the byte order of their names, and images listed class by class in the
/// byte order of theirs: the same list on every system. A sub-folder without images is still a
/// class, so the numbering depends on the names alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFolder {
    classes: Vec<String>,
    images: Vec<(PathBuf, usize)>,
    ignored: usize,
}

impl ImageFolder {
    /// Lists a folder without opening its images. Names that begin with a dot are ignored.
    ///
    /// # Errors
    /// When the folder can't be read, when neither it nor a sub-folder has an image, or when the
    /// name of a class is not UTF-8.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let unexpected = |expected: &str, found: String| DataError::Unexpected {
            path: path.to_owned(),
            expected: expected.to_owned(),
            found,
        };
        let (folders, files): (Vec<_>, Vec<_>) =
            (entries(path)?.into_iter()).partition(|(_, is_folder)| *is_folder);
        if folders.is_empty() {
            return Self::flat(path, files.into_iter().map(|(name, _)| path.join(name)));
        }
        let mut ignored = files.len();
        let names = folders.into_iter().map(|(name, _)| name);
        let (mut classes, mut images) = (Vec::new(), Vec::new());
        for (label, name) in names.enumerate() {
            let folder = path.join(&name);
            for (file, is_folder) in entries(&folder)? {
                let file = folder.join(file);
                if is_folder || !is_image(&file) {
                    ignored += 1;
                } else {
                    images.push((file, label));
                }
            }
            classes.push(utf8(path, name)?);
        }
        if images.is_empty() {
            return Err(unexpected(
                "images (.jpg, .jpeg, .png) in the sub-folders",
                format!("none in {}, and {ignored} other files", classes.len()),
            ));
        }
        Ok(Self {
            classes,
            images,
            ignored,
        })
    }

    /// The classes of a folder, without reading the sub-folders; see [`open`](Self::open).
    ///
    /// # Errors
    /// When the folder can't be read, or when the name of a class is not UTF-8.
    pub fn list_classes(path: &Path) -> Result<Vec<String>, DataError> {
        let entries = entries(path)?.into_iter();
        let folders: Vec<OsString> = (entries.filter(|(_, is_folder)| *is_folder))
            .map(|(name, _)| name)
            .collect();
        match folders.is_empty() {
            true => Ok(vec![name_of(path)?]),
            false => folders.into_iter().map(|name| utf8(path, name)).collect(),
        }
    }

    /// A folder without sub-folders.
    fn flat(path: &Path, files: impl Iterator<Item = PathBuf>) -> Result<Self, DataError> {
        let (images, others): (Vec<_>, Vec<_>) = files.partition(|file| is_image(file));
        if images.is_empty() {
            return Err(DataError::unexpected(
                path,
                "images (.jpg, .jpeg, .png), or a sub-folder of them for each class",
                format!("neither, and {} other files", others.len()),
            ));
        }
        Ok(Self {
            classes: vec![name_of(path)?],
            images: images.into_iter().map(|image| (image, 0)).collect(),
            ignored: others.len(),
        })
    }

    /// Names of the classes; a label is an index into this list.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// The same images with other class names, of the same number.
    pub(super) fn named(mut self, classes: &[String]) -> Self {
        debug_assert_eq!(self.classes.len(), classes.len());
        self.classes = classes.to_vec();
        self
    }

    /// Path and label of each image.
    pub fn images(&self) -> &[(PathBuf, usize)] {
        &self.images
    }

    /// Number of ignored entries: files beside the classes, files whose names are not those of
    /// images, and folders inside a class.
    pub fn ignored(&self) -> usize {
        self.ignored
    }
}

/// The folder's own name.
fn name_of(path: &Path) -> Result<String, DataError> {
    // `.` and `/` have no name.
    let whole = path.canonicalize().map_err(DataError::io(path))?;
    let name = whole.file_name().unwrap_or(whole.as_os_str());
    utf8(path, name.to_owned())
}

fn utf8(path: &Path, name: OsString) -> Result<String, DataError> {
    name.into_string().map_err(|name| {
        DataError::unexpected(path, "class names in UTF-8", name.display().to_string())
    })
}

/// Names in byte order, each with whether it is a folder; links are followed.
fn entries(folder: &Path) -> Result<Vec<(OsString, bool)>, DataError> {
    let mut entries = fs::read_dir(folder)
        .and_then(|entries| {
            entries
                .map(|entry| {
                    let entry = entry?;
                    let is_folder = match entry.file_type()? {
                        kind if kind.is_symlink() => entry.path().is_dir(),
                        kind => kind.is_dir(),
                    };
                    Ok((entry.file_name(), is_folder))
                })
                .collect::<std::io::Result<Vec<_>>>()
        })
        .map_err(DataError::io(folder))?;
    entries.retain(|(name, _)| !name.as_encoded_bytes().starts_with(b"."));
    entries.sort_unstable_by(|(a, _), (b, _)| a.as_encoded_bytes().cmp(b.as_encoded_bytes()));
    Ok(entries)
}

fn is_image(path: &Path) -> bool {
    path.extension().is_some_and(|extension| {
        ["jpg", "jpeg", "png"]
            .iter()
            .any(|known| extension.eq_ignore_ascii_case(known))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        folder
    }

    #[test]
    fn classes_and_images_come_in_byte_order() {
        let root = folder(&[
            "n2/b.PNG",
            "n2/a.jpeg",
            "n10/z.JPG",
            "Z/10.png",
            "Z/9.png",
            "Z/notes.txt",
            "Z/deeper/1.png",
            "list.csv",
            "cat.png",
            ".cache/1.png",
        ]);
        let listed = ImageFolder::open(root.path()).unwrap();
        assert_eq!(listed.classes(), ["Z", "n10", "n2"]);
        let images: Vec<(String, usize)> = listed
            .images()
            .iter()
            .map(|(path, label)| {
                let path = path.strip_prefix(root.path()).unwrap();
                (path.to_str().unwrap().to_owned(), *label)
            })
            .collect();
        let expected = [
            ("Z/10.png", 0),
            ("Z/9.png", 0),
            ("n10/z.JPG", 1),
            ("n2/a.jpeg", 2),
            ("n2/b.PNG", 2),
        ];
        assert_eq!(
            images,
            expected.map(|(path, label)| (path.to_owned(), label))
        );
        assert_eq!(listed.ignored(), 4);
    }

    #[test]
    fn a_flat_folder_is_one_class() {
        let root = folder(&["cats/b.png", "cats/a.jpg", "cats/list.txt", "cats/.x.png"]);
        let listed = ImageFolder::open(&root.path().join("cats")).unwrap();
        let names = listed.images().iter().map(|(path, label)| {
            let name = path.file_name().unwrap().to_str().unwrap();
            (name, *label)
        });
        assert!(names.eq([("a.jpg", 0), ("b.png", 0)]));
        assert_eq!(listed.classes(), ["cats"]);
        assert_eq!(listed.ignored(), 1);
    }

    #[test]
    fn folders_that_are_no_image_folders_are_errors_that_name_them() {
        for (files, expected) in [
            (
                &["a.txt", "b.gif"][..],
                "a sub-folder of them for each class, found neither, and 2 other files",
            ),
            (
                &["x/a.txt", "y/b.gif"],
                "found none in 2, and 2 other files",
            ),
        ] {
            let root = folder(files);
            let message = ImageFolder::open(root.path()).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
            assert!(message.contains(&root.path().display().to_string()));
        }
        let missing = ImageFolder::open(Path::new("/no/such/folder")).unwrap_err();
        assert!(missing.to_string().contains("/no/such/folder"), "{missing}");
    }
}
