//! Tensors of a file, each read on demand.
//!
//! A checkpoint may be larger than the memory that is free beside the network it fills. So opening
//! a file reads only names, shapes and offsets; values come one tensor at a time. A tensor may
//! consist of several pieces of the file: a layout that stores q, k and v apart is read as one that
//! stacks them, without an intermediate copy.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use safetensors::Dtype;

use super::{Array, StateDict, TensorSource, WeightsError, decode, encode};

/// Bytes read at a time when a range is only checksummed.
const PIECE: u64 = 1 << 20;

/// Storage of bytes.
#[derive(Debug)]
enum Store {
    File(PathBuf, Mutex<File>),
    Memory(PathBuf, Vec<u8>),
    Embedded(PathBuf, &'static [u8]),
    /// Computed values.
    Values(Vec<f32>),
    /// Other bytes, with the expected CRC-32 of a range.
    Stated {
        all: Bytes,
        start: u64,
        length: u64,
        crc32: u32,
        /// Whether the CRC-32 has been compared.
        compared: AtomicBool,
    },
}

/// Bytes that hold tensors: a file, or memory.
#[derive(Debug, Clone)]
pub(crate) struct Bytes(Arc<Store>);

impl Bytes {
    pub(crate) fn file(path: &Path, file: File) -> Self {
        Self(Arc::new(Store::File(path.to_owned(), Mutex::new(file))))
    }

    /// Bytes in memory; `path` is for messages.
    pub(crate) fn memory(path: &Path, bytes: Vec<u8>) -> Self {
        Self(Arc::new(Store::Memory(path.to_owned(), bytes)))
    }

    /// Bytes inside the binary; `path` is for messages.
    pub(crate) fn embedded(path: &Path, bytes: &'static [u8]) -> Self {
        Self(Arc::new(Store::Embedded(path.to_owned(), bytes)))
    }

    /// The same bytes; the `length` bytes from `start` are compared with `crc32` before any of them
    /// is used.
    pub(crate) fn stated(&self, start: u64, length: u64, crc32: u32) -> Self {
        Self(Arc::new(Store::Stated {
            all: self.clone(),
            start,
            length,
            crc32,
            compared: AtomicBool::new(false),
        }))
    }

    /// Path of the file, for messages.
    fn path(&self) -> &Path {
        match &*self.0 {
            Store::File(path, _) | Store::Memory(path, _) | Store::Embedded(path, _) => path,
            Store::Values(_) => Path::new("computed values"),
            Store::Stated { all, .. } => all.path(),
        }
    }

    /// The CRC-32 of `length` bytes from `start`; `first` are those already read, from the first
    /// on.
    fn crc32(&self, start: u64, length: u64, first: &[u8]) -> Result<u32, WeightsError> {
        let mut crc32 = crc32fast::Hasher::new();
        crc32.update(first);
        let mut done = first.len() as u64;
        let mut buffer = vec![0; (length - done).min(PIECE) as usize];
        while done < length {
            let piece = (length - done).min(PIECE) as usize;
            self.read(start + done, &mut buffer[..piece])?;
            crc32.update(&buffer[..piece]);
            done += piece as u64;
        }
        Ok(crc32.finalize())
    }

    /// Fills `out` from the bytes at `start`.
    pub(crate) fn read(&self, start: u64, out: &mut [u8]) -> Result<(), WeightsError> {
        fn copy(bytes: &[u8], start: u64, out: &mut [u8]) -> io::Result<()> {
            let start = usize::try_from(start).ok();
            let range = start.and_then(|start| bytes.get(start..start.checked_add(out.len())?));
            out.copy_from_slice(range.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }
        match &*self.0 {
            Store::File(path, file) => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.seek(SeekFrom::Start(start))
                    .and_then(|_| file.read_exact(out))
                    .map_err(WeightsError::io(path))
            }
            Store::Memory(path, bytes) => copy(bytes, start, out).map_err(WeightsError::io(path)),
            Store::Embedded(path, bytes) => copy(bytes, start, out).map_err(WeightsError::io(path)),
            Store::Values(values) => copy(bytemuck::cast_slice(values), start, out)
                .map_err(WeightsError::io(self.path())),
            Store::Stated {
                all,
                start: from,
                length,
                crc32,
                compared,
            } => {
                all.read(start, out)?;
                if compared.load(Ordering::Relaxed) {
                    return Ok(());
                }
                // Usually a tensor is its whole storage; then it is read only once.
                let first = match start == *from && out.len() as u64 <= *length {
                    true => &*out,
                    false => &[],
                };
                let found = all.crc32(*from, *length, first)?;
                if found != *crc32 {
                    return Err(WeightsError::Format {
                        path: self.path().to_owned(),
                        expected: "values of the checksum the file states",
                        found: format!(
                            "{length} bytes at {from} of checksum {found:08x}, not {crc32:08x}; is it damaged? fetch it again"
                        ),
                    });
                }
                compared.store(true, Ordering::Relaxed);
                Ok(())
            }
        }
    }
}

/// A strided view of some bytes.
#[derive(Debug, Clone)]
struct Part {
    bytes: Bytes,
    /// Offset of the first value, in bytes.
    start: u64,
    shape: Vec<usize>,
    /// Distance between neighbouring indices of each dimension, in values.
    strides: Vec<usize>,
}

impl Part {
    fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Reads the values in row-major order.
    fn read(&self, size: usize, mut out: &mut [u8]) -> Result<(), WeightsError> {
        // Trailing dimensions that are contiguous are read as one row; most tensors are a single
        // row.
        let (mut row, mut outer) = (1, self.shape.len());
        while outer > 0 && (self.strides[outer - 1] == row || self.shape[outer - 1] == 1) {
            row *= self.shape[outer - 1];
            outer -= 1;
        }
        if outer == 0 {
            return self.bytes.read(self.start, out);
        }
        // In a transposed view rows are short: they are gathered in memory, not read one by one.
        let last =
            (self.shape.iter().zip(&self.strides)).map(|(n, stride)| (n.max(&1) - 1) * stride);
        let mut all = vec![0; (last.sum::<usize>() + 1) * size];
        self.bytes.read(self.start, &mut all)?;
        let mut index = vec![0; outer];
        while !out.is_empty() {
            let place = (index.iter().zip(&self.strides)).map(|(i, stride)| i * stride);
            let first = place.sum::<usize>() * size;
            let (filled, rest) = std::mem::take(&mut out).split_at_mut(row * size);
            filled.copy_from_slice(&all[first..first + row * size]);
            out = rest;
            for (i, count) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < *count {
                    break;
                }
                *i = 0;
            }
        }
        Ok(())
    }
}

/// A tensor that is read on demand.
#[derive(Debug, Clone)]
pub struct Stored {
    shape: Vec<usize>,
    dtype: Dtype,
    /// Their values, concatenated, are the tensor's.
    parts: Vec<Part>,
}

impl Stored {
    /// A dense tensor at offset `start` of `bytes`.
    pub(crate) fn dense(shape: Vec<usize>, dtype: Dtype, bytes: &Bytes, start: u64) -> Self {
        let mut strides = vec![1usize; shape.len()];
        for i in (1..shape.len()).rev() {
            // A tensor without values may have any other sizes.
            strides[i - 1] = strides[i].wrapping_mul(shape[i]);
        }
        Self::strided(shape, strides, dtype, bytes, start)
    }

    /// A strided view from offset `start` of `bytes`; the caller has checked that all of it lies
    /// inside.
    pub(crate) fn strided(
        shape: Vec<usize>,
        strides: Vec<usize>,
        dtype: Dtype,
        bytes: &Bytes,
        start: u64,
    ) -> Self {
        let part = Part {
            bytes: bytes.clone(),
            start,
            shape: shape.clone(),
            strides,
        };
        Self {
            shape,
            dtype,
            parts: vec![part],
        }
    }

    /// A tensor in memory.
    pub(crate) fn values(array: Array) -> Self {
        let bytes = Bytes(Arc::new(Store::Values(array.data)));
        Self::dense(array.shape, Dtype::F32, &bytes, 0)
    }

    /// The values rounded to `dtype`, in memory.
    ///
    /// # Errors
    /// When they can't be read.
    pub(crate) fn rounded(self, dtype: Dtype) -> Result<Self, WeightsError> {
        if dtype == self.dtype {
            return Ok(self);
        }
        let bytes = Bytes::memory(
            Path::new("computed values"),
            encode(self.read()?.data, dtype),
        );
        Ok(Self::dense(self.shape, dtype, &bytes, 0))
    }

    /// Tensors of one type, stacked along the first dimension; None if they don't fit.
    pub(crate) fn stack(tensors: &[&Self]) -> Option<Self> {
        let first = tensors.first()?;
        let (rows, rest) = first.shape.split_first()?;
        let mut stacked = Self {
            shape: vec![*rows],
            dtype: first.dtype,
            parts: first.parts.clone(),
        };
        stacked.shape.extend(rest);
        for tensor in &tensors[1..] {
            if tensor.dtype != first.dtype || tensor.shape.get(1..)? != rest {
                return None;
            }
            stacked.shape[0] += tensor.shape.first()?;
            stacked.parts.extend_from_slice(&tensor.parts);
        }
        Some(stacked)
    }

    /// Rows `first..first + count` of the first dimension; None if they don't exist or would split
    /// a stacked part.
    pub(crate) fn rows(&self, first: usize, count: usize) -> Option<Self> {
        let (rows, rest) = self.shape.split_first()?;
        if first.checked_add(count)? > *rows {
            return None;
        }
        let mut parts = Vec::new();
        let mut before = 0;
        for part in &self.parts {
            let height = *part.shape.first()?;
            let from = first.max(before);
            let to = (first + count).min(before + height);
            if from < to {
                let mut part = part.clone();
                let skipped = (from - before) * part.strides[0] * size_of_value(self.dtype);
                part.start += skipped as u64;
                part.shape[0] = to - from;
                parts.push(part);
            }
            before += height;
        }
        let mut shape = vec![count];
        shape.extend(rest);
        Some(Self {
            shape,
            dtype: self.dtype,
            parts,
        })
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Type of the stored values.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of values.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// The stored bytes, in row-major order, little-endian.
    ///
    /// # Errors
    /// When the file can't be read.
    pub fn bytes(&self) -> Result<Vec<u8>, WeightsError> {
        let mut out = vec![0; self.count() * size_of_value(self.dtype)];
        self.fill(&mut out)?;
        Ok(out)
    }

    /// The values as f32.
    ///
    /// # Errors
    /// When the file can't be read.
    pub fn read(&self) -> Result<Array, WeightsError> {
        let data = if self.dtype == Dtype::F32 && cfg!(target_endian = "little") {
            // Read in place, without a second copy of the largest tensors.
            let mut data = vec![0f32; self.count()];
            self.fill(bytemuck::cast_slice_mut(&mut data))?;
            data
        } else {
            // Opening a file refuses other types.
            decode(self.dtype, &self.bytes()?).unwrap_or_default()
        };
        Ok(Array::new(self.shape.clone(), data))
    }

    fn fill(&self, mut out: &mut [u8]) -> Result<(), WeightsError> {
        let size = size_of_value(self.dtype);
        for part in &self.parts {
            let (filled, rest) = std::mem::take(&mut out).split_at_mut(part.count() * size);
            if !filled.is_empty() {
                part.read(size, filled)?;
            }
            out = rest;
        }
        Ok(())
    }
}

/// Size of a float value in bytes; 0 for unsupported types.
pub(crate) fn size_of_value(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F16 | Dtype::BF16 => 2,
        Dtype::F32 => 4,
        Dtype::F64 => 8,
        _ => 0,
    }
}

/// Tensors by name.
#[derive(Debug, Clone, Default)]
pub struct Tensors(BTreeMap<String, Stored>);

impl Tensors {
    /// The tensor named `name`.
    pub fn get(&self, name: &str) -> Option<&Stored> {
        self.0.get(name)
    }

    /// Adds a tensor.
    pub(crate) fn insert(&mut self, name: impl Into<String>, tensor: Stored) {
        self.0.insert(name.into(), tensor);
    }

    /// Removes a tensor and returns it.
    pub(crate) fn remove(&mut self, name: &str) -> Option<Stored> {
        self.0.remove(name)
    }

    /// All tensors, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Stored)> {
        self.0.iter()
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of values in all tensors.
    pub fn parameters(&self) -> usize {
        self.0.values().map(Stored::count).sum()
    }

    /// The tensors for which `rename` returns a name, under that name.
    pub(crate) fn renamed(&self, rename: impl Fn(&str) -> Option<&str>) -> Self {
        let renamed = |(name, tensor): (&String, &Stored)| {
            rename(name).map(|name| (name.to_owned(), tensor.clone()))
        };
        Self(self.0.iter().filter_map(renamed).collect())
    }

    /// Removes the prefixes of PyTorch's wrappers, in any order and number, as long as all names
    /// share them: a model that was compiled or trained on several devices is saved with them.
    pub(crate) fn unwrapped(self) -> Self {
        const WRAPPERS: [&str; 2] = ["module.", "_orig_mod."];
        let mut taken = 0;
        while let Some(wrapper) = WRAPPERS.into_iter().find(|wrapper| {
            let carries = |name: &String| {
                name.get(taken..)
                    .is_some_and(|name| name.starts_with(wrapper))
            };
            !self.is_empty() && self.0.keys().all(carries)
        }) {
            taken += wrapper.len();
        }
        if taken == 0 {
            return self;
        }
        self.renamed(|name| name.get(taken..))
    }

    /// Reads all tensors.
    ///
    /// # Errors
    /// When a file can't be read.
    pub fn read_all(&self) -> Result<StateDict, WeightsError> {
        (self.0.iter())
            .map(|(name, tensor)| Ok((name.clone(), tensor.read()?)))
            .collect()
    }
}

impl From<StateDict> for Tensors {
    fn from(state: StateDict) -> Self {
        let stored = |(name, array)| (name, Stored::values(array));
        Self(state.into_iter().map(stored).collect())
    }
}

impl IntoIterator for Tensors {
    type Item = (String, Stored);
    type IntoIter = std::collections::btree_map::IntoIter<String, Stored>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl TensorSource for Tensors {
    fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.0
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor.shape()))
    }

    fn tensor(&self, name: &str) -> Result<Option<Array>, WeightsError> {
        self.0.get(name).map(Stored::read).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize) -> Bytes {
        let bytes = (0..count).flat_map(|i| (i as f32).to_le_bytes()).collect();
        Bytes::memory(Path::new("numbers"), bytes)
    }

    #[test]
    fn strided_views_are_read_row_after_row() {
        let bytes = numbers(24);
        let read = |start: u64, shape: &[usize], strides: &[usize]| {
            Stored::strided(shape.into(), strides.into(), Dtype::F32, &bytes, 4 * start)
                .read()
                .unwrap()
                .data
        };
        assert_eq!(read(2, &[3], &[1]), [2.0, 3.0, 4.0]);
        // A transposed matrix, a slice of columns, a repeated row, one value, none.
        assert_eq!(
            read(0, &[4, 2], &[1, 4]),
            [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]
        );
        assert_eq!(read(1, &[2, 2], &[4, 1]), [1.0, 2.0, 5.0, 6.0]);
        assert_eq!(read(3, &[2, 2], &[0, 1]), [3.0, 4.0, 3.0, 4.0]);
        assert_eq!(read(23, &[], &[]), [23.0]);
        assert_eq!(read(0, &[0, 3], &[3, 1]), [0f32; 0]);
    }

    #[test]
    fn stacks_and_rows_are_views() {
        let bytes = numbers(24);
        let at =
            |start: u64, rows: usize| Stored::dense(vec![rows, 2], Dtype::F32, &bytes, 4 * start);
        let stacked = Stored::stack(&[&at(4, 2), &at(0, 1), &at(20, 2)]).unwrap();
        assert_eq!(stacked.shape(), [5, 2]);
        let whole = [4.0, 5.0, 6.0, 7.0, 0.0, 1.0, 20.0, 21.0, 22.0, 23.0];
        assert_eq!(stacked.read().unwrap().data, whole);
        for (first, count) in [(0, 5), (1, 3), (2, 1), (4, 1), (3, 2)] {
            let rows = stacked.rows(first, count).unwrap();
            assert_eq!(rows.shape(), [count, 2]);
            assert_eq!(
                rows.read().unwrap().data,
                whole[2 * first..2 * (first + count)]
            );
        }
        assert!(stacked.rows(3, 3).is_none());
        let wide = Stored::dense(vec![2, 3], Dtype::F32, &bytes, 0);
        assert!(Stored::stack(&[&at(0, 1), &wide]).is_none());
    }

    #[test]
    fn prefixes_of_wrappers_are_taken_off_where_all_names_carry_them() {
        let names = |names: &[&str]| -> Vec<String> {
            let array = |name: &&str| (name.to_string(), Array::new([1], vec![0.0]));
            let tensors = Tensors::from(names.iter().map(array).collect::<StateDict>());
            tensors.unwrapped().0.into_keys().collect()
        };
        assert_eq!(names(&["module.a", "module.b"]), ["a", "b"]);
        assert_eq!(names(&["_orig_mod.module.a.module.b"]), ["a.module.b"]);
        let nested = ["module._orig_mod.module.a", "module._orig_mod.b"];
        assert_eq!(names(&nested), ["b", "module.a"]);
        assert_eq!(names(&["a", "module.b"]), ["a", "module.b"]);
        assert_eq!(names(&[]), [""; 0]);
        assert_eq!(names(&["module.".repeat(100_000).as_str()]), [""]);
    }

    #[test]
    fn stated_bytes_are_compared_with_their_checksum() {
        let all: Vec<u8> = (0..24).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let crc32 = crc32fast::hash(&all[8..40]);
        let tensor = |start, count, crc32| {
            let bytes = numbers(24).stated(8, 32, crc32);
            Stored::dense(vec![count], Dtype::F32, &bytes, start).read()
        };
        // The whole range, its beginning, its end.
        for (start, first, count) in [(8, 2.0, 8), (8, 2.0, 3), (32, 8.0, 2)] {
            let read = tensor(start, count, crc32).unwrap();
            assert_eq!((read.data[0], read.data.len()), (first, count));
            let error = tensor(start, count, crc32 ^ 1).unwrap_err().to_string();
            assert!(error.contains("checksum"), "{error}");
        }
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error() {
        let tensor = Stored::dense(vec![3], Dtype::F32, &numbers(2), 0);
        let error = tensor.read().unwrap_err().to_string();
        assert!(error.contains("numbers"), "{error}");
    }
}
