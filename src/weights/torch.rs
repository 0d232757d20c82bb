//! PyTorch's `.pt` and `.pth` files: an archive of a pickle, which says what there is, and of the bytes of each storage.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use safetensors::Dtype;
use zip::ZipArchive;
use zip::result::ZipError;

use super::pickle::{Id, Node, Pickle};
use super::state::floats;
use super::{Array, StateDict, WeightsError};

/// Where a training checkpoint keeps its weights, best first: published samples come from the EMA.
const PRECEDENCE: [&str; 2] = ["ema", "model"];

/// The largest pickle that is read; those of checkpoints say little more than names and sizes.
const MOST: u64 = 256 << 20;

/// Reads a state dict, either bare or inside a training checkpoint (`ema`, else `model`; `key` overrides).
///
/// Whatever else a checkpoint holds (optimizer, arguments, schedules) is passed over, and nothing in it is run.
///
/// # Errors
/// When the file can't be read, is no PyTorch file, or lacks `key`; when a tensor is not of a float type, or lies
/// outside its storage.
pub fn read_pickle(path: &Path, key: Option<&str>) -> Result<StateDict, WeightsError> {
    let file = File::open(path).map_err(WeightsError::io(path))?;
    let length = file.metadata().map_err(WeightsError::io(path))?.len();
    let broken = |found: String| WeightsError::Format {
        path: path.to_owned(),
        expected: "PyTorch",
        found,
    };
    let archive = ZipArchive::new(BufReader::new(file)).map_err(|error| match error {
        ZipError::Io(source) => WeightsError::io(path)(source),
        _ => broken(
            "it is no archive, which torch.save writes since PyTorch 1.6; load it there and save it again"
                .into(),
        ),
    })?;
    Checkpoint::open(archive, length)
        .and_then(|mut checkpoint| checkpoint.state(key))
        .map_err(broken)
}

/// The type of a storage's values, by its class, and their size in bytes; None if it is no float.
fn float(class: &str) -> Option<(Dtype, usize)> {
    match class {
        "torch HalfStorage" => Some((Dtype::F16, 2)),
        "torch BFloat16Storage" => Some((Dtype::BF16, 2)),
        "torch FloatStorage" => Some((Dtype::F32, 4)),
        "torch DoubleStorage" => Some((Dtype::F64, 8)),
        _ => None,
    }
}

/// A tensor as the pickle describes it.
struct Tensor<'a> {
    /// Name of the storage in the archive.
    storage: &'a str,
    dtype: Dtype,
    /// Bytes of a value.
    size: usize,
    /// Values of the storage.
    count: usize,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

/// An open file.
struct Checkpoint {
    archive: ZipArchive<BufReader<File>>,
    /// The folder that all entries lie in.
    folder: String,
    pickle: Pickle,
    /// Bytes of the file.
    length: u64,
}

impl Checkpoint {
    fn open(mut archive: ZipArchive<BufReader<File>>, length: u64) -> Result<Self, String> {
        let name = archive
            .file_names()
            .find(|name| *name == "data.pkl" || name.ends_with("/data.pkl"))
            .ok_or("the archive has no data.pkl")?
            .to_owned();
        let folder = name.trim_end_matches("data.pkl").to_owned();
        if let Ok(order) = entry(&mut archive, &format!("{folder}byteorder"), 16)
            && order == b"big"
        {
            return Err("it was written by a big-endian machine".into());
        }
        let pickle = Pickle::read(&entry(&mut archive, &name, MOST)?)?;
        Ok(Self {
            archive,
            folder,
            pickle,
            length,
        })
    }

    /// The state dict of that key, or the best there is.
    fn state(&mut self, key: Option<&str>) -> Result<StateDict, String> {
        let pickle = &self.pickle;
        let root = pickle.root();
        let Node::Dict(entries) = root else {
            return Err(
                "it holds an object, not a dict of tensors; save its state_dict() in PyTorch"
                    .into(),
            );
        };
        let chosen = match key {
            Some(key) => {
                let id = pickle.entry(root, key).ok_or_else(|| {
                    let there: Vec<_> = entries
                        .iter()
                        .filter_map(|(name, _)| pickle.text(*name))
                        .take(20)
                        .collect();
                    format!("it has no `{key}`; it has {}", there.join(", "))
                })?;
                pickle.get(id)
            }
            None => PRECEDENCE
                .iter()
                .find_map(|key| pickle.entry(root, key))
                .map_or(root, |id| pickle.get(id)),
        };
        let Node::Dict(entries) = chosen else {
            return Err(
                "what holds the weights is no dict; save its state_dict() in PyTorch".into(),
            );
        };
        let mut wanted = Vec::new();
        let mut stated = 0u64;
        for (name, value) in entries {
            let Some(name) = pickle.text(*name) else {
                continue;
            };
            let Some(tensor) = Tensor::of(pickle, *value).transpose() else {
                continue;
            };
            let tensor = tensor.map_err(|problem| format!("tensor `{name}` {problem}"))?;
            // Sizes first: a small file must not make us allocate much. A tensor's values are its storage's, so there
            // are no more of them than bytes in the file, but where a file repeats them.
            let bytes = (tensor.shape.iter())
                .try_fold(tensor.size, |bytes, size| bytes.checked_mul(*size))
                .and_then(|bytes| u64::try_from(bytes).ok());
            stated = bytes
                .and_then(|bytes| stated.checked_add(bytes))
                .filter(|stated| *stated <= self.length)
                .ok_or_else(|| {
                    format!("with tensor `{name}` it states more data than the file holds")
                })?;
            wanted.push((name.to_owned(), tensor));
        }
        if wanted.is_empty() {
            return Err("it holds no tensors".into());
        }
        let mut state = StateDict::new();
        for (name, tensor) in wanted {
            let bytes = (tensor.count as u64).saturating_mul(tensor.size as u64);
            // A storage is stored as it is: one larger than the file would be a packed trap.
            if bytes > self.length {
                return Err(format!(
                    "tensor `{name}`: its storage is said to be larger than the file"
                ));
            }
            let place = format!("{}data/{}", self.folder, tensor.storage);
            let storage = entry(&mut self.archive, &place, bytes)
                .map_err(|problem| format!("tensor `{name}`: {problem}"))?;
            if storage.len() as u64 != bytes {
                return Err(format!(
                    "tensor `{name}`: its storage has {} bytes, expected {bytes}",
                    storage.len()
                ));
            }
            let data = tensor
                .read(&storage)
                .ok_or_else(|| format!("tensor `{name}` lies outside its storage"))?;
            state.insert(name, Array::new(tensor.shape, data));
        }
        Ok(state)
    }
}

impl<'a> Tensor<'a> {
    /// The tensor that a value is; None if it is none.
    fn of(pickle: &'a Pickle, id: Id) -> Result<Option<Self>, String> {
        let Some((callee, arguments)) = pickle.call(id) else {
            return Ok(None);
        };
        let arguments = match callee {
            "torch._utils _rebuild_tensor_v2" | "torch._utils _rebuild_tensor" => arguments,
            "torch._utils _rebuild_parameter" | "torch._utils _rebuild_parameter_with_state" => {
                let inner = arguments.first().and_then(|id| pickle.call(*id));
                inner.ok_or("is a parameter of nothing")?.1
            }
            _ => return Ok(None),
        };
        let damaged = "is damaged";
        let [storage, offset, shape, strides, ..] = arguments else {
            return Err(damaged.into());
        };
        let Node::Persistent(storage) = pickle.get(*storage) else {
            return Err(damaged.into());
        };
        let [_, class, key, _, count, ..] = pickle.list(*storage).ok_or(damaged)? else {
            return Err(damaged.into());
        };
        let Node::Global(class) = pickle.get(*class) else {
            return Err(damaged.into());
        };
        let (dtype, size) = float(class).ok_or_else(|| {
            let name = class
                .trim_start_matches("torch ")
                .trim_end_matches("Storage");
            format!("is of type {name}, expected a float type")
        })?;
        let shape = pickle.sizes(*shape).ok_or(damaged)?;
        let strides = pickle.sizes(*strides).ok_or(damaged)?;
        if shape.len() != strides.len() {
            return Err(damaged.into());
        }
        Ok(Some(Self {
            storage: pickle.text(*key).ok_or(damaged)?,
            dtype,
            size,
            count: pickle.size(*count).ok_or(damaged)?,
            offset: pickle.size(*offset).ok_or(damaged)?,
            shape,
            strides,
        }))
    }

    /// Its values, row after row; None if one lies outside the storage.
    fn read(&self, storage: &[u8]) -> Option<Vec<f32>> {
        let count = self.shape.iter().product::<usize>();
        if count == 0 {
            return Some(Vec::new());
        }
        let reach = self
            .shape
            .iter()
            .zip(&self.strides)
            .try_fold(self.offset, |last, (size, stride)| {
                last.checked_add((size - 1).checked_mul(*stride)?)
            })?;
        if reach >= self.count {
            return None;
        }
        let size = self.size;
        // Rows of the last dimensions that lie in order are read at once; all of a usual tensor is one row.
        let (mut row, mut outer) = (1, self.shape.len());
        while outer > 0 && (self.strides[outer - 1] == row || self.shape[outer - 1] == 1) {
            row *= self.shape[outer - 1];
            outer -= 1;
        }
        let mut data = Vec::with_capacity(count);
        let mut index = vec![0; outer];
        while data.len() < count {
            let place = index
                .iter()
                .zip(&self.strides)
                .map(|(i, stride)| i * stride);
            let first = self.offset + place.sum::<usize>();
            let bytes = storage.get(first * size..(first + row) * size)?;
            data.extend(floats(self.dtype, bytes)?);
            for (i, size) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < *size {
                    break;
                }
                *i = 0;
            }
        }
        Some(data)
    }
}

/// An entry of the archive, of which at most `most` bytes are read.
fn entry(
    archive: &mut ZipArchive<BufReader<File>>,
    name: &str,
    most: u64,
) -> Result<Vec<u8>, String> {
    let file = archive
        .by_name(name)
        .map_err(|error| format!("the archive's `{name}`: {error}"))?;
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(usize::try_from(most.min(file.size())).unwrap_or(usize::MAX))
        .map_err(|error| format!("the archive's `{name}`: {error}"))?;
    file.take(most)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("the archive's `{name}`: {error}"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(offset: usize, shape: &[usize], strides: &[usize]) -> Tensor<'static> {
        Tensor {
            storage: "0",
            dtype: Dtype::F32,
            size: 4,
            count: 24,
            offset,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
        }
    }

    #[test]
    fn strides_are_honoured_and_bounds_are_kept() {
        let storage: Vec<u8> = (0..24).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let read = |tensor: Tensor<'_>| tensor.read(&storage);
        assert_eq!(read(tensor(2, &[3], &[1])), Some(vec![2.0, 3.0, 4.0]));
        // A transposed matrix, a slice of columns, a repeated row, one value, none.
        let turned = vec![0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0];
        assert_eq!(read(tensor(0, &[4, 2], &[1, 4])), Some(turned));
        let columns = vec![1.0, 2.0, 5.0, 6.0];
        assert_eq!(read(tensor(1, &[2, 2], &[4, 1])), Some(columns));
        let repeated = vec![3.0, 4.0, 3.0, 4.0];
        assert_eq!(read(tensor(3, &[2, 2], &[0, 1])), Some(repeated));
        assert_eq!(read(tensor(23, &[], &[])), Some(vec![23.0]));
        assert_eq!(read(tensor(0, &[0, 5], &[5, 1])), Some(vec![]));
        assert_eq!(read(tensor(22, &[3], &[1])), None);
        assert_eq!(read(tensor(0, &[2, 2], &[usize::MAX, 1])), None);
    }
}
