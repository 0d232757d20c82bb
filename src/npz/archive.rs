//! Reading and writing arrays of an `.npz`: a zip archive of `.npy` members (NumPy Enhancement
//! Proposal 1).

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Take, Write};
use std::path::{Path, PathBuf};

use flate2::bufread::DeflateDecoder;
use zip::result::ZipError;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::npy::Header;
use super::{NpzError, npy};
use crate::files::{Bounded, open_file, open_zip};

/// Name of the member that holds `array`.
pub(crate) fn member_name(array: &str) -> String {
    format!("{array}.npy")
}

/// An open archive that names its path in every error.
pub(crate) struct Archive<'a> {
    path: &'a Path,
    zip: ZipArchive<BufReader<Bounded>>,
}

impl<'a> Archive<'a> {
    pub(crate) fn open(path: &'a Path) -> Result<Self, NpzError> {
        let file = open_file(path).map_err(NpzError::io(path))?;
        let zip = open_zip(file).map_err(|error| match error {
            ZipError::Io(source) => NpzError::io(path)(source),
            broken => {
                let problem = format!("no .npz archive, or not whole ({broken})");
                NpzError::io(path)(io::Error::new(io::ErrorKind::InvalidData, problem))
            }
        })?;
        Ok(Self { path, zip })
    }

    pub(crate) fn contains(&self, array: &str) -> bool {
        self.zip.index_for_name(&member_name(array)).is_some()
    }

    pub(crate) fn required(&mut self, array: &str) -> Result<Array, NpzError> {
        self.array(array)?.ok_or_else(|| {
            let mut members: Vec<_> = self.zip.file_names().collect();
            members.sort_unstable();
            NpzError::Array {
                path: self.path.to_owned(),
                array: array.to_owned(),
                expected: format!("a member {}", member_name(array)),
                found: format!("only {members:?}"),
            }
        })
    }

    /// An array whose header is read and whose data are not; None if the archive has none of that
    /// name.
    pub(crate) fn array(&mut self, array: &str) -> Result<Option<Array>, NpzError> {
        let at = Place {
            path: self.path.to_owned(),
            array: array.to_owned(),
        };
        let member = match self.zip.by_name(&member_name(array)) {
            Ok(entry) => Member::open(self.path, &entry),
            Err(ZipError::FileNotFound) => return Ok(None),
            Err(error) => Err(error.into()),
        };
        let mut member = member.map_err(|error| at.fail("a readable member", error.to_string()))?;
        let header = Header::read(&mut member)
            .map_err(|found| at.fail("a NumPy array of numbers", found))?;
        let item = header.item_bytes();
        let size = (header.elements().zip(item)).and_then(|(count, item)| count.checked_mul(item));
        let size = size.ok_or_else(|| {
            let found = format!("'{}' of shape {:?}", header.descr, header.shape);
            at.fail("a size that can be addressed", found)
        })?;
        let shape = header.shape.clone();
        Ok(Some(Array {
            at,
            header,
            shape,
            size,
            left: size,
            member,
        }))
    }
}

/// The most bytes that one byte of deflate expands to (zlib's technical details).
const MOST_DEFLATED: u64 = 1032;

/// A member's bytes, unpacked as they are read and checked against their checksum at the end.
///
/// It opens the file itself, so that it can be read piece by piece after the archive is closed.
struct Member {
    bytes: Unpacking,
    /// Most bytes still to come, by the archive's header and its size.
    promised: u64,
    seen: crc32fast::Hasher,
    checksum: u32,
}

enum Unpacking {
    Stored(Take<BufReader<File>>),
    Deflated(DeflateDecoder<Take<BufReader<File>>>),
}

impl Member {
    fn open<R: Read>(path: &Path, entry: &zip::read::ZipFile<'_, R>) -> io::Result<Self> {
        let start = entry.data_start().ok_or(io::ErrorKind::InvalidData)?;
        let file = open_file(path)?;
        let there = file.metadata()?.len().saturating_sub(start);
        let mut file = BufReader::new(file);
        file.seek(SeekFrom::Start(start))?;
        let packed = file.take(entry.compressed_size());
        let most = there.min(entry.compressed_size());
        let (bytes, most) = match entry.compression() {
            CompressionMethod::Stored => (Unpacking::Stored(packed), most),
            CompressionMethod::Deflated => (
                Unpacking::Deflated(DeflateDecoder::new(packed)),
                most.saturating_mul(MOST_DEFLATED),
            ),
            other => return Err(io::Error::other(format!("it is packed by {other}"))),
        };
        Ok(Self {
            bytes,
            promised: entry.size().min(most),
            seen: crc32fast::Hasher::new(),
            checksum: entry.crc32(),
        })
    }
}

impl Read for Member {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = match &mut self.bytes {
            Unpacking::Stored(bytes) => bytes.read(out)?,
            Unpacking::Deflated(bytes) => bytes.read(out)?,
        };
        self.seen.update(&out[..read]);
        self.promised = self.promised.saturating_sub(read as u64);
        if read == 0 && !out.is_empty() && self.seen.clone().finalize() != self.checksum {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the checksum is wrong: the file is damaged",
            ));
        }
        Ok(read)
    }
}

/// Path and array, for error messages.
struct Place {
    path: PathBuf,
    array: String,
}

impl Place {
    fn fail(&self, expected: &str, found: String) -> NpzError {
        NpzError::Array {
            path: self.path.clone(),
            array: self.array.clone(),
            expected: expected.to_owned(),
            found,
        }
    }
}

/// An array whose data are read on demand.
pub(crate) struct Array {
    at: Place,
    header: Header,
    /// Number of elements along each axis.
    pub(crate) shape: Vec<usize>,
    /// Bytes of the data.
    size: usize,
    /// Bytes not read yet.
    left: usize,
    member: Member,
}

impl Array {
    /// The error that `expected` was required and this array is something else.
    pub(crate) fn mismatch(&self, expected: &str) -> NpzError {
        let found = format!("'{}' of shape {:?}", self.header.descr, self.shape);
        self.at.fail(expected, found)
    }

    /// Refuses NumPy types other than `descr`.
    pub(crate) fn expect(&self, descr: &str) -> Result<(), NpzError> {
        if self.header.descr == descr {
            return Ok(());
        }
        Err(self.mismatch(&format!("the type '{descr}'")))
    }

    /// Refuses a shape with more data than the archive states, before hours of reading and not
    /// after.
    pub(crate) fn expect_whole(&self) -> Result<(), NpzError> {
        if self.left as u64 <= self.member.promised {
            return Ok(());
        }
        Err(self.short(self.member.promised))
    }

    pub(crate) fn is_fortran(&self) -> bool {
        self.header.fortran
    }

    fn short(&self, found: u64) -> NpzError {
        let expected = format!("{} bytes for the shape {:?}", self.size, self.shape);
        self.at.fail(&expected, format!("{found} bytes"))
    }

    /// The next `count` bytes; the checksum is compared at the end of the array.
    pub(crate) fn read(&mut self, count: usize) -> Result<Vec<u8>, NpzError> {
        let broken = |error: io::Error| self.at.fail("readable data", error.to_string());
        // Checked before allocating, since a system may grant any amount of memory.
        if count as u64 > self.member.promised {
            return Err(self.short((self.size - self.left) as u64 + self.member.promised));
        }
        let mut data = Vec::new();
        data.try_reserve_exact(count).map_err(|_| {
            let found = format!("{count} bytes");
            self.at.fail("a size that fits the memory", found)
        })?;
        let member = &mut self.member;
        let read = member.take(count as u64).read_to_end(&mut data);
        read.map_err(broken)?;
        self.left = self.left.saturating_sub(data.len());
        if data.len() != count {
            return Err(self.short((self.size - self.left) as u64));
        }
        if self.left == 0 {
            // Reading one more byte reaches the end, where the checksum is compared. NumPy ignores
            // data after the array; but no program writes such archives, and a damaged header may
            // state a smaller array.
            if self.member.read(&mut [0]).map_err(broken)? > 0 {
                let expected = format!("nothing after the shape {:?}", self.shape);
                return Err(self.at.fail(&expected, "more bytes".to_owned()));
            }
        }
        Ok(data)
    }

    /// The values in C order, `SIZE` bytes each, of the NumPy type `descr`.
    pub(crate) fn values<T: Copy, const SIZE: usize>(
        mut self,
        descr: &str,
        decode: impl Fn([u8; SIZE]) -> T,
    ) -> Result<Vec<T>, NpzError> {
        self.expect(descr)?;
        let data = self.read(self.size)?;
        let (items, _) = data.as_chunks::<SIZE>();
        let values: Vec<T> = items.iter().map(|&item| decode(item)).collect();
        Ok(if self.is_fortran() {
            c_order(&values, &self.shape)
        } else {
            values
        })
    }

    pub(crate) fn floats(self) -> Result<Vec<f64>, NpzError> {
        match self.header.descr.as_str() {
            "<f4" => self.values("<f4", |item| f64::from(f32::from_le_bytes(item))),
            "<f8" => self.values("<f8", f64::from_le_bytes),
            _ => Err(self.mismatch("the type '<f4' or '<f8'")),
        }
    }
}

/// Begins the member of an array of this type and shape; the caller then writes its `size` bytes of
/// data.
pub(crate) fn start_array<W: Write + Seek>(
    archive: &mut ZipWriter<W>,
    name: &str,
    descr: &str,
    shape: &[usize],
    size: usize,
) -> io::Result<()> {
    let header = npy::header(descr, shape);
    let size = (header.len() as u64).saturating_add(size as u64);
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .large_file(size > u64::from(u32::MAX));
    archive.start_file(member_name(name), options)?;
    archive.write_all(&header)
}

/// Writes an array, stored without compression as `numpy.savez` does.
pub(crate) fn write_array<W: Write + Seek>(
    archive: &mut ZipWriter<W>,
    name: &str,
    descr: &str,
    shape: &[usize],
    data: &[u8],
) -> io::Result<()> {
    start_array(archive, name, descr, shape, data.len())?;
    archive.write_all(data)
}

/// Converts values from Fortran to C order.
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

/// Builds archives for tests.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A deflated archive of these members, and its path.
    pub(crate) fn archive(members: &[(&str, Vec<u8>)]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("batch.npz");
        let mut zip = ZipWriter::new(File::create(&path).unwrap());
        for (name, bytes) in members {
            zip.start_file(*name, SimpleFileOptions::default()).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
        (folder, path)
    }

    pub(crate) fn npy(descr: &str, shape: &[usize], data: &[u8]) -> Vec<u8> {
        [npy::header(descr, shape), data.to_vec()].concat()
    }
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
