//! Safetensors files: opened without reading values, written one tensor at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::ser::{Serialize, SerializeMap, Serializer};

use super::torch::is_counter;
use crate::files::{open_file, write_atomic};
use crate::state::{Bytes, StateDict, Stored, Tensors, WeightsError, encode, size_of_value};

/// Bytes of the header's size, with which the file begins.
const SIZE: usize = 8;
/// The largest header that is read; the format's own library has the same limit.
const MOST: u64 = 100_000_000;
/// The header's key for metadata.
const METADATA: &str = "__metadata__";

/// Opens a safetensors file: its float tensors, unread, and its metadata.
///
/// # Errors
/// When the file can't be read, is not safetensors, or holds a tensor that is not of a float type.
pub fn open_safetensors(path: &Path) -> Result<(Tensors, BTreeMap<String, String>), WeightsError> {
    let file = open_file(path).map_err(WeightsError::io(path))?;
    let length = file.metadata().map_err(WeightsError::io(path))?.len();
    open(&Bytes::file(path, file), length, path)
}

/// Reads a safetensors file: its float tensors as f32, and its metadata.
///
/// # Errors
/// As [`open_safetensors`].
pub fn read_safetensors(
    path: &Path,
) -> Result<(StateDict, BTreeMap<String, String>), WeightsError> {
    let (tensors, metadata) = open_safetensors(path)?;
    Ok((tensors.read_all()?, metadata))
}

/// Opens `length` bytes of a safetensors file; `path` is for messages.
pub(super) fn open(
    bytes: &Bytes,
    length: u64,
    path: &Path,
) -> Result<(Tensors, BTreeMap<String, String>), WeightsError> {
    let broken = |found: String| WeightsError::Format {
        path: path.to_owned(),
        expected: "safetensors",
        found,
    };
    if length < SIZE as u64 {
        return Err(broken(format!(
            "it has {length} bytes, too few for a header"
        )));
    }
    let mut size = [0; SIZE];
    bytes.read(0, &mut size)?;
    let size = u64::from_le_bytes(size);
    if size > MOST || size > length - SIZE as u64 {
        return Err(broken(format!(
            "its header is said to have {size} bytes, and the file has {length}"
        )));
    }
    let mut header = vec![0; size as usize];
    bytes.read(SIZE as u64, &mut header)?;
    let header: Metadata =
        serde_json::from_slice(&header).map_err(|error| broken(format!("its header: {error}")))?;
    let first = SIZE as u64 + size;
    if header.data_len() as u64 != length - first {
        return Err(broken(format!(
            "its tensors need {} bytes, and {} follow the header; is it whole?",
            header.data_len(),
            length - first
        )));
    }
    let mut tensors = Tensors::default();
    for (name, info) in header.tensors() {
        if is_counter(&name) {
            continue;
        }
        let value = size_of_value(info.dtype);
        if value == 0 {
            return Err(broken(format!(
                "tensor `{name}` is {:?}, expected F32, F16, BF16 or F64",
                info.dtype
            )));
        }
        let (start, end) = info.data_offsets;
        let stated = (info.shape.iter()).try_fold(value, |size, n| size.checked_mul(*n));
        if end.checked_sub(start) != stated || end as u64 > length - first {
            return Err(broken(format!(
                "tensor `{name}` of shape {:?} can't lie at {start}..{end}",
                info.shape
            )));
        }
        let tensor = Stored::dense(info.shape.clone(), info.dtype, bytes, first + start as u64);
        tensors.insert(name, tensor);
    }
    let metadata = header.metadata().clone().unwrap_or_default();
    Ok((tensors, metadata.into_iter().collect()))
}

/// Writes tensors and metadata as a safetensors file, atomically, one tensor in memory at a time;
/// `dtype` is the type of the stored values, by default each tensor's own.
///
/// # Errors
/// When a tensor can't be read or the file can't be written.
pub fn write_safetensors(
    path: &Path,
    tensors: &Tensors,
    metadata: BTreeMap<String, String>,
    dtype: Option<Dtype>,
) -> Result<(), WeightsError> {
    let mut infos = Vec::with_capacity(tensors.len());
    let mut end = 0;
    for (name, tensor) in tensors.iter() {
        let dtype = dtype.unwrap_or(tensor.dtype());
        let start = end;
        end += tensor.count() * size_of_value(dtype);
        let info = TensorInfo {
            dtype,
            shape: tensor.shape().to_vec(),
            data_offsets: (start, end),
        };
        infos.push((name.clone(), info));
    }
    let broken = |found: String| WeightsError::Format {
        path: path.to_owned(),
        expected: "safetensors",
        found,
    };
    let header = Header { metadata, infos };
    let mut header = serde_json::to_vec(&header).map_err(|error| broken(error.to_string()))?;
    // Values begin at a multiple of 8 bytes, so that a mapped file can be used in place.
    header.resize(header.len().next_multiple_of(8), b' ');
    write_tensors(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for (name, tensor) in tensors.iter() {
            file.write_all(&encoded(name, tensor, dtype)?)?;
        }
        Ok(())
    })
}

/// A file's header. The format's own library keeps metadata in a hash map, whose order changes
/// between runs; here it is sorted, so that the same weights always make the same bytes.
struct Header {
    metadata: BTreeMap<String, String>,
    /// Ordered by offset.
    infos: Vec<(String, TensorInfo)>,
}

impl Serialize for Header {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry(METADATA, &self.metadata)?;
        }
        for (name, info) in &self.infos {
            map.serialize_entry(name, info)?;
        }
        map.end()
    }
}

/// Writes a file atomically. If reading a tensor fails meanwhile, its error is returned.
pub(super) fn write_tensors(
    path: &Path,
    write: impl FnOnce(&mut io::BufWriter<File>) -> io::Result<()>,
) -> Result<(), WeightsError> {
    write_atomic(path, write).map_err(|error| cause(path, error))
}

/// The error of a tensor, if that is why writing failed; else the I/O error.
pub(super) fn cause(path: &Path, error: io::Error) -> WeightsError {
    match error.downcast::<WeightsError>() {
        Ok(error) => error,
        Err(error) => WeightsError::io(path)(error),
    }
}

/// A tensor's bytes as `dtype`, by default its own type.
pub(super) fn encoded(name: &str, tensor: &Stored, dtype: Option<Dtype>) -> io::Result<Vec<u8>> {
    let dtype = dtype.unwrap_or(tensor.dtype());
    if dtype == tensor.dtype() {
        return tensor.bytes().map_err(io::Error::other);
    }
    let values = tensor.read().map_err(io::Error::other)?.data;
    let fits = |value: f32| match dtype {
        Dtype::F16 => half::f16::from_f32(value).is_finite(),
        Dtype::BF16 => half::bf16::from_f32(value).is_finite(),
        _ => true,
    };
    if let Some(value) = values
        .iter()
        .find(|value| value.is_finite() && !fits(**value))
    {
        return Err(io::Error::other(format!(
            "tensor `{name}` holds {value:e}, which is too large for {dtype:?}; write another type"
        )));
    }
    Ok(encode(values, dtype))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Array;

    #[test]
    fn what_is_written_is_what_the_formats_library_reads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let state = StateDict::from([
            ("b".to_owned(), Array::new([2, 1], vec![1.0, -2.5])),
            ("a".to_owned(), Array::new([0], vec![])),
            ("c".to_owned(), Array::new([], vec![3.0])),
        ]);
        let said = BTreeMap::from([("by".to_owned(), "ä \"test\"".to_owned())]);
        let tensors = Tensors::from(state.clone());
        write_safetensors(&path, &tensors, said.clone(), None).unwrap();
        assert_eq!(read_safetensors(&path).unwrap(), (state, said));
        let bytes = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("b").unwrap().shape(), [2, 1]);
        assert_eq!(file.tensor("c").unwrap().data(), 3f32.to_le_bytes());

        write_safetensors(&path, &tensors, BTreeMap::new(), Some(Dtype::BF16)).unwrap();
        let (tensors, said) = open_safetensors(&path).unwrap();
        assert_eq!(tensors.get("b").unwrap().dtype(), Dtype::BF16);
        assert_eq!(tensors.get("b").unwrap().read().unwrap().data, [1.0, -2.5]);
        assert!(said.is_empty());
    }

    #[test]
    fn a_weight_that_a_type_cant_hold_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        for (value, dtype, fits) in [
            (1e5, Dtype::F16, false),
            (6e4, Dtype::F16, true),
            (f32::INFINITY, Dtype::F16, true),
            (f32::MAX, Dtype::BF16, false),
            (1e38, Dtype::BF16, true),
        ] {
            let state = StateDict::from([("a".to_owned(), Array::new([2], vec![1.0, value]))]);
            let written = write_safetensors(&path, &state.into(), BTreeMap::new(), Some(dtype));
            assert_eq!(written.is_ok(), fits, "{value} as {dtype:?}");
            if let Err(error) = written {
                let said = error.to_string();
                assert!(
                    said.contains("tensor `a` holds") && said.contains("x.safetensors"),
                    "{said}"
                );
                assert!(!path.exists());
            } else {
                std::fs::remove_file(&path).unwrap();
            }
        }
    }

    #[test]
    fn the_same_weights_are_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = Tensors::from(StateDict::from([
            ("b".to_owned(), Array::new([2], vec![1.0, 2.0])),
            ("a".to_owned(), Array::new([1], vec![3.0])),
        ]));
        let said: BTreeMap<String, String> = (0..8)
            .map(|i| (format!("key{i}"), format!("value{i}")))
            .collect();
        let write = |run: usize| {
            let path = folder.path().join(format!("{run}.safetensors"));
            write_safetensors(&path, &tensors, said.clone(), None).unwrap();
            std::fs::read(path).unwrap()
        };
        let first = write(0);
        for run in 1..4 {
            assert!(write(run) == first, "write {run} differs");
        }
        let text = String::from_utf8_lossy(&first);
        let places: Vec<_> = (said.keys())
            .map(|key| text.find(&format!("\"{key}\"")).unwrap())
            .collect();
        assert!(places.is_sorted(), "{places:?}");
    }

    #[test]
    fn broken_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let whole = |header: &str, data: usize| {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend_from_slice(header.as_bytes());
            bytes.resize(bytes.len() + data, 0);
            bytes
        };
        let one = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        for (bytes, says) in [
            (vec![1, 2], "2 bytes"),
            (u64::MAX.to_le_bytes().to_vec(), "18446744073709551615"),
            (whole("{", 0), "header"),
            (whole(one, 7), "8 bytes, and 7 follow"),
            (whole(one, 9), "8 bytes, and 9 follow"),
            (whole(&one.replace("F32", "I32"), 8), "I32"),
            (
                whole(&one.replace("[2]", "[4611686018427387904, 4]"), 8),
                "header",
            ),
            (whole(&one.replace("[0,8]", "[8,0]"), 8), "header"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = open_safetensors(&path).unwrap_err().to_string();
            assert!(
                error.contains(says) && error.contains("x.safetensors"),
                "{error}"
            );
        }
        std::fs::write(&path, whole(one, 8)).unwrap();
        assert_eq!(open_safetensors(&path).unwrap().0.parameters(), 2);
    }
}
