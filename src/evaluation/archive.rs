//! Arrays out of an `.npz`: a zip archive of `.npy` members (NumPy Enhancement Proposal 1).
//!
//! `npyz` parses the headers; the data are read here in one piece, as its reader decodes byte by byte,
//! which is slow for gigabytes of pixels.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use npyz::{NpyHeader, Order};
use zip::ZipArchive;
use zip::result::ZipError;

use super::EvaluationError;

/// The name in the archive of the array `array`.
pub(super) fn member_name(array: &str) -> String {
    format!("{array}.npy")
}

/// An open archive that names its path in every error.
pub(super) struct Archive<'a> {
    path: &'a Path,
    zip: ZipArchive<BufReader<File>>,
}

impl<'a> Archive<'a> {
    pub(super) fn open(path: &'a Path) -> Result<Self, EvaluationError> {
        let zip = File::open(path)
            .and_then(|file| ZipArchive::new(BufReader::new(file)).map_err(io::Error::from))
            .map_err(|source| EvaluationError::Io {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self { path, zip })
    }

    pub(super) fn io(&self, source: io::Error) -> EvaluationError {
        EvaluationError::Io {
            path: self.path.to_owned(),
            source,
        }
    }

    pub(super) fn contains(&self, array: &str) -> bool {
        self.zip.index_for_name(&member_name(array)).is_some()
    }

    pub(super) fn required(&mut self, array: &str) -> Result<Array, EvaluationError> {
        self.array(array)?.ok_or_else(|| {
            let mut members: Vec<_> = self.zip.file_names().collect();
            members.sort_unstable();
            EvaluationError::Array {
                path: self.path.to_owned(),
                array: array.to_owned(),
                expected: format!("a member {}", member_name(array)),
                found: format!("only {members:?}"),
            }
        })
    }

    pub(super) fn array(&mut self, array: &str) -> Result<Option<Array>, EvaluationError> {
        let path = self.path;
        let fail = |expected: &str, found: String| EvaluationError::Array {
            path: path.to_owned(),
            array: array.to_owned(),
            expected: expected.to_owned(),
            found,
        };
        let mut member = match self.zip.by_name(&member_name(array)) {
            Ok(member) => member,
            Err(ZipError::FileNotFound) => return Ok(None),
            Err(error) => return Err(fail("a readable member", error.to_string())),
        };
        let header = NpyHeader::from_reader(&mut member).map_err(|error| {
            // The parser quotes the whole header, which may be 64 KiB of anything.
            let message: String = error.to_string().chars().take(200).collect();
            fail("a NumPy array", message)
        })?;
        let (shape, size) = shape_of(&header)
            .and_then(|shape| {
                let item = header.dtype().num_bytes()?;
                let size = shape
                    .iter()
                    .try_fold(item, |n, &side| n.checked_mul(side))?;
                Some((shape, size))
            })
            .ok_or_else(|| {
                fail(
                    "a size that can be addressed",
                    format!("{:?}", header.shape()),
                )
            })?;

        let mut data = Vec::new();
        data.try_reserve_exact(size)
            .map_err(|_| fail("a size that fits the memory", format!("{size} bytes")))?;
        member
            .take(size as u64)
            .read_to_end(&mut data)
            .map_err(|error| fail("readable data", error.to_string()))?;
        if data.len() != size {
            let expected = format!("{size} bytes for the shape {shape:?}");
            return Err(fail(&expected, format!("{} bytes", data.len())));
        }
        let (path, name) = (path.to_owned(), array.to_owned());
        Ok(Some(Array {
            path,
            name,
            header,
            shape,
            data,
        }))
    }
}

fn shape_of(header: &NpyHeader) -> Option<Vec<usize>> {
    header
        .shape()
        .iter()
        .map(|&side| usize::try_from(side).ok())
        .collect()
}

/// A member as it was read, not yet interpreted.
pub(super) struct Array {
    path: PathBuf,
    name: String,
    header: NpyHeader,
    /// Number of elements along each axis.
    pub(super) shape: Vec<usize>,
    data: Vec<u8>,
}

impl Array {
    /// `expected` was asked for, and the array is what it is.
    pub(super) fn mismatch(&self, expected: &str) -> EvaluationError {
        EvaluationError::Array {
            path: self.path.clone(),
            array: self.name.clone(),
            expected: expected.to_owned(),
            found: format!("{} of shape {:?}", self.header.dtype().descr(), self.shape),
        }
    }

    /// Values in C order, of `SIZE` bytes and the NumPy type `descr`.
    pub(super) fn values<T: Copy, const SIZE: usize>(
        self,
        descr: &str,
        decode: impl Fn([u8; SIZE]) -> T,
    ) -> Result<Vec<T>, EvaluationError> {
        if self.header.dtype().descr() != format!("'{descr}'") {
            return Err(self.mismatch(&format!("the type '{descr}'")));
        }
        let (items, _) = self.data.as_chunks::<SIZE>();
        let values: Vec<T> = items.iter().map(|&item| decode(item)).collect();
        Ok(match self.header.order() {
            Order::C => values,
            Order::Fortran => c_order(&values, &self.shape),
        })
    }

    pub(super) fn floats(self) -> Result<Vec<f64>, EvaluationError> {
        match self.header.dtype().descr().as_str() {
            "'<f4'" => self.values("<f4", |item| f64::from(f32::from_le_bytes(item))),
            "'<f8'" => self.values("<f8", f64::from_le_bytes),
            _ => Err(self.mismatch("the type '<f4' or '<f8'")),
        }
    }
}

/// Reorders values whose first index runs fastest into values whose last index does.
fn c_order<T: Copy>(values: &[T], shape: &[usize]) -> Vec<T> {
    let mut index = vec![0; shape.len()];
    let mut next = || {
        let mut position = 0;
        for (&i, &side) in index.iter().zip(shape).rev() {
            position = position * side + i;
        }
        for (i, &side) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < side {
                break;
            }
            *i = 0;
        }
        position
    };
    (0..values.len()).map(|_| values[next()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fortran_order_by_hand() {
        // [[1, 2, 3], [4, 5, 6]] column by column.
        assert_eq!(c_order(&[1, 4, 2, 5, 3, 6], &[2, 3]), [1, 2, 3, 4, 5, 6]);
        assert_eq!(c_order(&[1, 2], &[2]), [1, 2]);
        assert!(c_order::<u8>(&[], &[0, 3]).is_empty());
    }
}
