//! The reference's folders of `.npy` files.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::data::DataError;
use crate::files::{open_file, write_atomic};
use crate::npz::npy::{self, Header};

/// Folder of the latents.
pub(super) const FEATURES: &str = "imagenet256_features";
/// Folder of the labels.
pub(super) const LABELS: &str = "imagenet256_labels";
const FLOAT: &str = "<f4";
const INTEGER: &str = "<i8";
/// Most bytes of a file; the largest latents in use, those of 1024 x 1024 pictures, take 8 MiB.
const MOST_BYTES: u64 = 1 << 26;

/// Writes sample `index` below `root`: `latents`, `[views, channels, side, side]` for `shape` =
/// `[views, channels, side]`, and its label. Each file appears whole or not at all, the label last:
/// a sample exists if its label does.
///
/// # Errors
/// [`DataError::Sample`] when `latents` do not fill `shape`, are not all finite, or the label is no
/// `i64`; [`DataError::Io`] when a file can't be written.
pub fn write_npy(
    root: &Path,
    index: usize,
    shape: [usize; 3],
    latents: &[f32],
    label: usize,
) -> Result<(), DataError> {
    let [views, channels, side] = shape;
    let shape = [views, channels, side, side];
    let wrong = |expected: String, found: String| DataError::Sample {
        index,
        expected,
        found,
    };
    if latents.len() != shape.iter().product::<usize>() {
        let found = format!("{} numbers", latents.len());
        return Err(wrong(format!("latents of shape {shape:?}"), found));
    }
    if let Some(value) = latents.iter().find(|value| !value.is_finite()) {
        return Err(wrong("finite latents".to_owned(), value.to_string()));
    }
    let label = i64::try_from(label)
        .map_err(|_| wrong("a label below 2^63".to_owned(), label.to_string()))?;
    let write = |folder: &str, header: Vec<u8>, data: &[u8]| {
        let path = root.join(folder).join(format!("{index}.npy"));
        write_atomic(&path, |file| {
            file.write_all(&header)?;
            file.write_all(data)
        })
        .map_err(DataError::io(&path))
    };
    let bytes: Vec<u8> = latents.iter().flat_map(|v| v.to_le_bytes()).collect();
    write(FEATURES, npy::header(FLOAT, &shape), &bytes)?;
    write(LABELS, npy::header(INTEGER, &[1]), &label.to_le_bytes())
}

/// Number of samples of `shape` = `[views, channels, side]` written below `root`, consecutively
/// from 0. Removes temporary files of a killed writer.
///
/// # Errors
/// When a folder can't be read, or when the size of a file is not the one it was written with.
pub(in crate::data) fn written(
    root: &Path,
    [views, channels, side]: [usize; 3],
) -> Result<usize, DataError> {
    for folder in [FEATURES, LABELS].map(|name| root.join(name)) {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(DataError::io(&folder)(error)),
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.as_encoded_bytes();
            if name.starts_with(b".") && name.ends_with(b".tmp") {
                fs::remove_file(entry.path()).map_err(DataError::io(&entry.path()))?;
            }
        }
    }
    let shape = [views, channels, side, side];
    let values = shape.iter().product::<usize>();
    let sizes = [
        (LABELS, npy::header(INTEGER, &[1]).len() + 8),
        (FEATURES, npy::header(FLOAT, &shape).len() + 4 * values),
    ];
    for index in 0.. {
        for (folder, size) in sizes {
            let path = root.join(folder).join(format!("{index}.npy"));
            match fs::metadata(&path) {
                Ok(file) if file.len() == size as u64 => {}
                Ok(file) => {
                    let found = format!(
                        "{}; it was changed since: remove it and all of higher numbers, and extract again",
                        file.len()
                    );
                    return Err(DataError::unexpected(&path, format!("{size} bytes"), found));
                }
                // A sample exists if its label does.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && folder == LABELS => {
                    return Ok(index);
                }
                Err(error) => return Err(DataError::io(&path)(error)),
            }
        }
    }
    Ok(0)
}

/// Files of one type and shape.
struct Files {
    folder: PathBuf,
    /// In byte order.
    names: Vec<OsString>,
    descr: &'static str,
    shape: Vec<usize>,
    /// Header of the first file. Most files have the same one, which then need not be parsed again.
    header: Vec<u8>,
}

impl Files {
    fn open(folder: &Path, descr: &'static str) -> Result<Self, DataError> {
        let mut names = fs::read_dir(folder)
            .and_then(|entries| {
                entries
                    .map(|entry| Ok(entry?.file_name()))
                    .collect::<std::io::Result<Vec<_>>>()
            })
            .map_err(DataError::io(folder))?;
        // A name that begins with a dot is a file being written.
        names.retain(|name| {
            let name = name.as_encoded_bytes();
            name.ends_with(b".npy") && !name.starts_with(b".")
        });
        names.sort_unstable_by(|a, b| a.as_encoded_bytes().cmp(b.as_encoded_bytes()));
        let Some(first) = names.first() else {
            return Err(DataError::unexpected(folder, ".npy files", "none"));
        };
        let path = folder.join(first);
        let bytes = contents(&path)?;
        let (shape, start) = parse(&path, &bytes, descr)?;
        Ok(Self {
            folder: folder.to_owned(),
            header: bytes[..start].to_vec(),
            names,
            descr,
            shape,
        })
    }

    fn path(&self, index: usize) -> PathBuf {
        self.folder.join(&self.names[index])
    }

    /// The undecoded values of file `index`, and its path.
    fn data(&self, index: usize) -> Result<(Vec<u8>, PathBuf), DataError> {
        let path = self.path(index);
        let mut bytes = contents(&path)?;
        let start = if bytes.starts_with(&self.header) {
            self.header.len()
        } else {
            let (shape, start) = parse(&path, &bytes, self.descr)?;
            if shape != self.shape {
                let expected = format!("the shape {:?} of the first file", self.shape);
                return Err(DataError::unexpected(&path, expected, format!("{shape:?}")));
            }
            start
        };
        // No overflow: the first file's shape was checked against its size.
        let size = self.shape.iter().product::<usize>() * if self.descr == FLOAT { 4 } else { 8 };
        if bytes.len() - start != size {
            let expected = format!("{size} bytes for the shape {:?}", self.shape);
            let found = format!("{}", bytes.len() - start);
            return Err(DataError::unexpected(&path, expected, found));
        }
        bytes.drain(..start);
        Ok((bytes, path))
    }
}

fn contents(path: &Path) -> Result<Vec<u8>, DataError> {
    let mut bytes = Vec::new();
    let file = open_file(path).map_err(DataError::io(path))?;
    let length = file.metadata().map_err(DataError::io(path))?.len();
    if length > MOST_BYTES {
        let expected = format!("at most {MOST_BYTES} bytes");
        return Err(DataError::unexpected(path, expected, length.to_string()));
    }
    bytes.reserve_exact(length as usize);
    file.take(MOST_BYTES)
        .read_to_end(&mut bytes)
        .map_err(DataError::io(path))?;
    Ok(bytes)
}

/// Shape of an array of type `descr`, and offset of its values.
fn parse(path: &Path, bytes: &[u8], descr: &str) -> Result<(Vec<usize>, usize), DataError> {
    let mut rest = bytes;
    let header = Header::read(&mut rest)
        .map_err(|found| DataError::unexpected(path, "a NumPy array of numbers", found))?;
    if header.descr != descr {
        return Err(DataError::unexpected(
            path,
            format!("the type '{descr}'"),
            format!("'{}'", header.descr),
        ));
    }
    if header.fortran {
        return Err(DataError::unexpected(
            path,
            "values in C order",
            "Fortran order",
        ));
    }
    // A shape with more values than the file has bytes is refused, so that products can't overflow.
    if header.elements().is_none_or(|count| count > rest.len()) {
        let found = format!("{:?} in {} bytes", header.shape, rest.len());
        return Err(DataError::unexpected(
            path,
            "a shape its values fill",
            found,
        ));
    }
    Ok((header.shape, bytes.len() - rest.len()))
}

/// Latents and labels, matched by position.
pub(super) struct NpyFolders {
    features: Files,
    labels: Files,
    /// Views, channels, side.
    shape: [usize; 3],
    classes: OnceLock<usize>,
}

impl NpyFolders {
    pub(super) fn open(features: &Path, labels: &Path) -> Result<Self, DataError> {
        let (features, labels) = (Files::open(features, FLOAT)?, Files::open(labels, INTEGER)?);
        let shape = match features.shape[..] {
            [views @ 1..=2, channels, height, width]
                if height == width && channels > 0 && height > 0 =>
            {
                [views, channels, height]
            }
            _ => {
                return Err(DataError::unexpected(
                    &features.path(0),
                    "the shape [1 or 2 views, channels, side, side]",
                    format!("{:?}", features.shape),
                ));
            }
        };
        if labels.shape != [1] {
            let found = format!("{:?}", labels.shape);
            return Err(DataError::unexpected(
                &labels.path(0),
                "the shape [1]",
                found,
            ));
        }
        if features.names.len() != labels.names.len() {
            return Err(DataError::unexpected(
                &labels.folder,
                format!("{} labels, one for each latent", features.names.len()),
                labels.names.len().to_string(),
            ));
        }
        // They are paired by their order.
        let mut pairs = features.names.iter().zip(&labels.names);
        if let Some((latent, label)) = pairs.find(|(latent, label)| latent != label) {
            return Err(DataError::unexpected(
                &labels.folder,
                format!("a label for each latent, for {} too", latent.display()),
                format!("{} in its place", label.display()),
            ));
        }
        Ok(Self {
            features,
            labels,
            shape,
            classes: OnceLock::new(),
        })
    }

    pub(super) fn count(&self) -> usize {
        self.features.names.len()
    }

    pub(super) fn shape(&self) -> [usize; 3] {
        self.shape
    }

    pub(super) fn classes(&self) -> Result<usize, DataError> {
        if let Some(classes) = self.classes.get() {
            return Ok(*classes);
        }
        let mut classes = 0;
        for index in 0..self.count() {
            classes = classes.max(self.label(index)? + 1);
        }
        Ok(*self.classes.get_or_init(|| classes))
    }

    pub(super) fn label(&self, index: usize) -> Result<usize, DataError> {
        let (bytes, path) = self.labels.data(index)?;
        let label = bytes
            .first_chunk()
            .map_or(-1, |bytes| i64::from_le_bytes(*bytes));
        // The bound keeps sums with labels far from overflow.
        u32::try_from(label)
            .map(|label| label as usize)
            .map_err(|_| DataError::unexpected(&path, "a label in 0..2^32", label.to_string()))
    }

    /// `view` must exist.
    pub(super) fn read(
        &self,
        index: usize,
        view: usize,
        out: &mut Vec<f32>,
    ) -> Result<usize, DataError> {
        let (bytes, path) = self.features.data(index)?;
        let [_, channels, side] = self.shape;
        let values = channels * side * side;
        let latent = &bytes.as_chunks().0[view * values..(view + 1) * values];
        let start = out.len();
        out.extend(latent.iter().map(|bytes| f32::from_le_bytes(*bytes)));
        if let Some(value) = out[start..].iter().find(|value| !value.is_finite()) {
            let found = value.to_string();
            return Err(DataError::unexpected(&path, "finite latents", found));
        }
        self.label(index)
    }

    pub(super) fn verify(&self) -> Result<(), DataError> {
        let mut latent = Vec::new();
        for index in 0..self.count() {
            for view in 0..self.shape[0] {
                latent.clear();
                self.read(index, view, &mut latent)?;
            }
        }
        Ok(())
    }
}
