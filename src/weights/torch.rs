//! PyTorch's files, `.pt`, `.pth`, `.bin` or `.ckpt`: an archive with a pickle, which describes the
//! tensors, and the bytes of each storage; or, before PyTorch 1.6, the same in a row ([`legacy`]).

use std::collections::HashMap;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use safetensors::Dtype;
use zip::read::ZipReadOptions;
use zip::result::ZipError;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipArchive, ZipWriter};

use super::legacy;
use super::pickle::{Id, Node, Pickle};
use super::safetensors::{encoded, write_tensors};
use crate::files::{Bounded, open_file, open_zip};
use crate::process::ProcessKind;
use crate::state::{Bytes, Stored, Tensors, WeightsError, size_of_value};

/// Keys of the weights in a training checkpoint, best first: published samples come from the EMA.
/// The last is Lightning's.
const PRECEDENCE: [&str; 4] = ["ema", "model_ema", "model", "state_dict"];

/// The largest pickle that is read; a checkpoint's holds little more than names and sizes.
pub(super) const MOST: u64 = 256 << 20;

/// Opens a state dict, either bare or inside a training checkpoint (`ema`, which MAR calls
/// `model_ema`, else `model`; `key` overrides).
///
/// The rest of a checkpoint (optimizer, schedules) is ignored, and nothing in it is run.
///
/// # Errors
/// When the file can't be read, is no PyTorch file, or lacks `key`; when a tensor is not of a float
/// type, or lies outside its storage.
pub fn open_torch(path: &Path, key: Option<&str>) -> Result<Tensors, WeightsError> {
    open_said(path, key).map(|(tensors, _)| tensors)
}

/// As [`open_torch`]; also returns the process according to the training's arguments, if the file
/// has them.
///
/// # Errors
/// As [`open_torch`].
pub(super) fn open_said(
    path: &Path,
    key: Option<&str>,
) -> Result<(Tensors, Option<ProcessKind>), WeightsError> {
    let file = open_file(path).map_err(WeightsError::io(path))?;
    let length = file.metadata().map_err(WeightsError::io(path))?.len();
    let broken = |found: String| WeightsError::Format {
        path: path.to_owned(),
        expected: "PyTorch",
        found,
    };
    let mut reader = BufReader::new(file);
    if legacy::is_legacy(&mut reader).map_err(WeightsError::io(path))? {
        return legacy::open(reader.into_inner(), length, key, path).map_err(broken);
    }
    let archive = open_zip(reader.into_inner()).map_err(|error| match error {
        ZipError::Io(source) => WeightsError::io(path)(source),
        _ => broken(
            "it is neither an archive nor a pickle that torch.save writes, or not whole".into(),
        ),
    })?;
    Checkpoint::open(archive, length)
        .and_then(|checkpoint| checkpoint.tensors(key, path))
        .map_err(broken)
}

/// The process that a training was of, by its arguments: the model's name, else what only one
/// process has.
pub(super) fn process(pickle: &Pickle) -> Option<ProcessKind> {
    let arguments = pickle.get(pickle.entry(pickle.root(), "args")?);
    let model = pickle.entry(arguments, "model");
    let named = model.and_then(|id| ProcessKind::of_model(pickle.text(id)?));
    // The arguments say more of an interpolant than a model's name does.
    ProcessKind::of_arguments(|key| pickle.text(pickle.entry(arguments, key)?)).or(named)
}

/// The storage classes of float values.
const FLOATS: [(&str, Dtype); 4] = [
    ("torch HalfStorage", Dtype::F16),
    ("torch BFloat16Storage", Dtype::BF16),
    ("torch FloatStorage", Dtype::F32),
    ("torch DoubleStorage", Dtype::F64),
];

fn float(class: &str) -> Option<Dtype> {
    let known = FLOATS.iter().find(|(name, _)| *name == class);
    known.map(|(_, dtype)| *dtype)
}

/// Whether a tensor is a normalisation's counter of batches: an integer, not a weight.
pub(super) fn is_counter(name: &str) -> bool {
    name.ends_with(".num_batches_tracked")
}

/// A tensor as the pickle describes it.
pub(super) struct Tensor<'a> {
    /// The storage's name in the file.
    pub(super) storage: &'a str,
    pub(super) dtype: Dtype,
    /// Number of values in the storage.
    pub(super) count: usize,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// The tensors of the state dict at `key`, or else the preferred one, in a file of `length` bytes.
pub(super) fn wanted<'a>(
    pickle: &'a Pickle,
    key: Option<&str>,
    length: u64,
) -> Result<Vec<(String, Tensor<'a>)>, String> {
    let root = pickle.root();
    let Node::Dict(entries) = root else {
        return Err(
            "it holds an object, not a dict of tensors; save its state_dict() in PyTorch".into(),
        );
    };
    let there = |entries: &[(Id, Id)]| {
        let names = entries.iter().filter_map(|(name, _)| pickle.text(*name));
        names.take(20).collect::<Vec<_>>().join(", ")
    };
    let chosen = match key {
        Some(key) => {
            let id = pickle.entry(root, key).ok_or_else(|| {
                format!("weights_key: it has no `{key}`; it has {}", there(entries))
            })?;
            pickle.get(id)
        }
        None => {
            let mut known = PRECEDENCE.iter().filter_map(|key| pickle.entry(root, key));
            let dict = known.find(|id| matches!(pickle.get(*id), Node::Dict(_)));
            dict.map_or(root, |id| pickle.get(id))
        }
    };
    let Node::Dict(entries) = chosen else {
        return Err("what holds the weights is no dict; save its state_dict() in PyTorch".into());
    };
    let mut wanted = Vec::new();
    for (name, value) in entries {
        let Some(name) = pickle.text(*name).filter(|name| !is_counter(name)) else {
            continue;
        };
        let Some(tensor) = Tensor::of(pickle, *value).transpose() else {
            continue;
        };
        let tensor = tensor.map_err(|problem| format!("tensor `{name}` {problem}"))?;
        // A small file must not cause large allocations: no tensor has more values than the file
        // has room for.
        let bytes = (tensor.shape.iter()).try_fold(size_of_value(tensor.dtype), |bytes, size| {
            bytes.checked_mul(*size)
        });
        if bytes.is_none_or(|bytes| bytes as u64 > length) {
            return Err(format!(
                "tensor `{name}` states more data than the file holds"
            ));
        }
        wanted.push((name.to_owned(), tensor));
    }
    if wanted.is_empty() {
        return Err(match there(entries) {
            names if names.is_empty() => "it holds no tensors".into(),
            names => format!(
                "it holds no tensors where they are looked for, but {names}; name the key of the weights (`--weights-key`, \
                 in a recipe `weights_key`)"
            ),
        });
    }
    Ok(wanted)
}

/// An open file.
struct Checkpoint {
    archive: ZipArchive<BufReader<Bounded>>,
    /// The folder of all entries.
    folder: String,
    pickle: Pickle,
    /// The file's size in bytes.
    length: u64,
}

impl Checkpoint {
    fn open(mut archive: ZipArchive<BufReader<Bounded>>, length: u64) -> Result<Self, String> {
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

    /// The state dict at `key`, or else the preferred one.
    fn tensors(
        mut self,
        key: Option<&str>,
        path: &Path,
    ) -> Result<(Tensors, Option<ProcessKind>), String> {
        let process = process(&self.pickle);
        let wanted = wanted(&self.pickle, key, self.length)?;
        let mut places = Vec::with_capacity(wanted.len());
        for (name, tensor) in &wanted {
            let bytes = (tensor.count as u64).saturating_mul(size_of_value(tensor.dtype) as u64);
            if !tensor.lies_inside() {
                return Err(format!("tensor `{name}` lies outside its storage"));
            }
            let place = format!("{}data/{}", self.folder, tensor.storage);
            let problem = |problem: String| format!("tensor `{name}`: {problem}");
            let file = (self.archive.by_name(&place))
                .map_err(|error| problem(format!("the archive's `{place}`: {error}")))?;
            if file.size() != bytes {
                return Err(problem(format!(
                    "its storage has {} bytes, expected {bytes}",
                    file.size()
                )));
            }
            // PyTorch does not compress.
            let start = (file.compression() == CompressionMethod::Stored)
                .then(|| file.data_start())
                .flatten();
            let start = start.ok_or_else(|| {
                problem("its storage is packed; load it in PyTorch and save it again".into())
            })?;
            if start.checked_add(bytes).is_none_or(|end| end > self.length) {
                return Err(problem("its storage ends beyond the file".into()));
            }
            // 0 if PyTorch was told not to compute checksums.
            places.push((start, bytes, Some(file.crc32()).filter(|crc32| *crc32 != 0)));
        }
        let file = Bytes::file(path, self.archive.into_inner().into_inner().into_inner());
        let mut tensors = Tensors::default();
        // Tensors may share a storage, whose checksum is verified once.
        let mut storages = HashMap::new();
        for ((name, tensor), (start, bytes, crc32)) in wanted.into_iter().zip(places) {
            let storage = storages.entry(start).or_insert_with(|| match crc32 {
                Some(crc32) => file.stated(start, bytes, crc32),
                None => file.clone(),
            });
            let start = start + (tensor.offset * size_of_value(tensor.dtype)) as u64;
            let stored =
                Stored::strided(tensor.shape, tensor.strides, tensor.dtype, storage, start);
            tensors.insert(name, stored);
        }
        Ok((tensors, process))
    }
}

impl<'a> Tensor<'a> {
    /// The tensor that a value describes; None if it is not a tensor.
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
        // Behind whether it learns, and its hooks.
        let lazy = arguments.get(6).map(|id| pickle.get(*id));
        if let Some(Node::Dict(states)) = lazy {
            let named = |name: &str| {
                states
                    .iter()
                    .any(|(key, _)| pickle.text(*key) == Some(name))
            };
            if named("neg") || named("conj") {
                return Err(
                    "is negated or conjugated where it is read; call .resolve_neg() and .resolve_conj() in PyTorch, and save again"
                        .into(),
                );
            }
        }
        let Node::Persistent(storage) = pickle.get(*storage) else {
            return Err(damaged.into());
        };
        let [_, class, key, _, count, ..] = pickle.list(*storage).ok_or(damaged)? else {
            return Err(damaged.into());
        };
        let Node::Global(class) = pickle.get(*class) else {
            return Err(damaged.into());
        };
        let dtype = float(class).ok_or_else(|| {
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
            count: pickle.size(*count).ok_or(damaged)?,
            offset: pickle.size(*offset).ok_or(damaged)?,
            shape,
            strides,
        }))
    }

    /// Whether all its values lie in the storage.
    pub(super) fn lies_inside(&self) -> bool {
        let last = (self.shape.iter().zip(&self.strides))
            .try_fold(self.offset, |last, (size, stride)| {
                last.checked_add(size.checked_sub(1)?.checked_mul(*stride)?)
            });
        self.shape.contains(&0) || last.is_some_and(|last| last < self.count)
    }
}

/// Reads an entry of the archive, at most `most` bytes.
fn entry(
    archive: &mut ZipArchive<BufReader<Bounded>>,
    name: &str,
    most: u64,
) -> Result<Vec<u8>, String> {
    let problem = |error: &dyn Display| format!("the archive's `{name}`: {error}");
    let index = (archive.index_for_name(name)).ok_or_else(|| problem(&"is missing"))?;
    let crc32 = (archive.by_index_raw(index))
        .map_err(|error| problem(&error))?
        .crc32();
    // 0 if PyTorch was told not to compute checksums.
    let options = ZipReadOptions::new().ignore_crc32(crc32 == 0);
    let file = (archive.by_index_with_options(index, options)).map_err(|error| problem(&error))?;
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(usize::try_from(most.min(file.size())).unwrap_or(usize::MAX))
        .map_err(|error| problem(&error))?;
    file.take(most)
        .read_to_end(&mut bytes)
        .map_err(|error| problem(&error))?;
    Ok(bytes)
}

/// Writes a state dict in `torch.save`'s format, atomically, one tensor in memory at a time;
/// `dtype` is the type of the stored values, by default each tensor's own.
///
/// # Errors
/// When a tensor can't be read or the file can't be written.
pub fn write_torch(
    path: &Path,
    tensors: &Tensors,
    dtype: Option<Dtype>,
) -> Result<(), WeightsError> {
    write_tensors(path, |file| write_archive(file, tensors, dtype))
}

fn write_archive(
    file: &mut BufWriter<File>,
    tensors: &Tensors,
    dtype: Option<Dtype>,
) -> io::Result<()> {
    let mut archive = ZipWriter::new(file);
    // PyTorch maps files whose storages begin at multiples of 64 bytes. Dates are left out, so that
    // the same weights always make the same bytes.
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .last_modified_time(DateTime::default())
        .with_alignment(64);
    archive.start_file("archive/data.pkl", options)?;
    archive.write_all(&state_dict(tensors, dtype))?;
    archive.start_file("archive/byteorder", options)?;
    archive.write_all(b"little")?;
    for (index, (name, tensor)) in tensors.iter().enumerate() {
        let bytes = encoded(name, tensor, dtype)?;
        let large = bytes.len() as u64 > u64::from(u32::MAX);
        archive.start_file(format!("archive/data/{index}"), options.large_file(large))?;
        archive.write_all(&bytes)?;
    }
    archive.start_file("archive/version", options)?;
    archive.write_all(b"3\n")?;
    archive.finish()?;
    Ok(())
}

/// The pickle, in protocol 2, of an ordered dict of tensors whose storages are numbered from 0.
fn state_dict(tensors: &Tensors, dtype: Option<Dtype>) -> Vec<u8> {
    const EMPTY_DICT: &[u8] = b"ccollections\nOrderedDict\n)R";
    fn text(out: &mut Vec<u8>, text: &str) {
        out.push(b'X');
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
    }
    fn number(out: &mut Vec<u8>, number: usize) {
        out.extend(b"\x8a\x08");
        out.extend((number as i64).to_le_bytes());
    }
    fn sizes(out: &mut Vec<u8>, values: &[usize]) {
        out.push(b'(');
        values.iter().for_each(|value| number(out, *value));
        out.push(b't');
    }
    let mut out = b"\x80\x02".to_vec();
    out.extend(EMPTY_DICT);
    out.push(b'(');
    for (index, (name, tensor)) in tensors.iter().enumerate() {
        let dtype = dtype.unwrap_or(tensor.dtype());
        let class = FLOATS.iter().find(|(_, float)| *float == dtype);
        let class = class.map_or("torch FloatStorage", |(class, _)| class);
        let shape = tensor.shape();
        let strides: Vec<usize> = (1..=shape.len())
            .map(|i| shape[i..].iter().product())
            .collect();
        text(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(format!("c{}\n", class.replace(' ', "\n")).bytes());
        text(&mut out, &index.to_string());
        text(&mut out, "cpu");
        number(&mut out, tensor.count());
        out.extend(b"tQ"); // the storage is named, not held
        number(&mut out, 0);
        sizes(&mut out, shape);
        sizes(&mut out, &strides);
        out.push(0x89); // needs no gradient
        out.extend(EMPTY_DICT); // has no hooks
        out.extend(b"tR");
    }
    out.extend(b"u.");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Array, StateDict};

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pt");
        let state = StateDict::from([
            (
                "b".to_owned(),
                Array::new([2, 1, 3], (0..6).map(|i| i as f32 / 4.0).collect()),
            ),
            ("a.weight".to_owned(), Array::new([], vec![3.0])),
            ("none".to_owned(), Array::new([0, 2], vec![])),
        ]);
        let tensors = Tensors::from(state.clone());
        for dtype in [None, Some(Dtype::F16), Some(Dtype::BF16)] {
            write_torch(&path, &tensors, dtype).unwrap();
            let read = open_torch(&path, None).unwrap();
            assert_eq!(read.read_all().unwrap(), state);
            assert_eq!(read.get("b").unwrap().dtype(), dtype.unwrap_or(Dtype::F32));
        }
        let error = open_torch(&path, Some("ema")).unwrap_err().to_string();
        assert!(
            error.contains("no `ema`; it has a.weight, b, none"),
            "{error}"
        );
    }

    #[test]
    fn values_are_those_of_the_checksum_unless_none_is_stated() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pt");
        let values = Array::new([64], (0..64).map(|i| i as f32).collect());
        let state = StateDict::from([("a".to_owned(), values)]);
        write_torch(&path, &state.clone().into(), None).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let place = |bytes: &[u8]| {
            let at = whole
                .windows(bytes.len())
                .position(|window| window == bytes);
            at.unwrap()
        };
        let mut flipped = whole.clone();
        flipped[place(&63f32.to_le_bytes())] ^= 1;
        std::fs::write(&path, &flipped).unwrap();
        let error = open_torch(&path, None).unwrap().read_all().unwrap_err();
        assert!(error.to_string().contains("x.pt"), "{error}");
        // As written with `config.save.compute_crc32 = False`: checksums of 0 in both headers of
        // each entry.
        let mut stated = whole.clone();
        for (signature, at) in [(b"PK\x03\x04", 14), (b"PK\x01\x02", 16)] {
            for start in 0..whole.len() - 4 {
                if whole[start..].starts_with(signature) {
                    stated[start + at..start + at + 4].fill(0);
                }
            }
        }
        assert_ne!(stated, whole);
        std::fs::write(&path, &stated).unwrap();
        assert_eq!(open_torch(&path, None).unwrap().read_all().unwrap(), state);
    }

    #[test]
    fn a_tensor_outside_its_storage_is_known() {
        let inside = |offset, shape: &[usize], strides: &[usize]| {
            let (shape, strides) = (shape.to_vec(), strides.to_vec());
            Tensor {
                storage: "0",
                dtype: Dtype::F32,
                count: 24,
                offset,
                shape,
                strides,
            }
            .lies_inside()
        };
        assert!(inside(21, &[3], &[1]));
        assert!(!inside(22, &[3], &[1]));
        assert!(inside(0, &[4, 2], &[1, 20]));
        assert!(!inside(0, &[5, 2], &[1, 20]));
        assert!(!inside(0, &[2, 2], &[usize::MAX, 1]));
        assert!(inside(99, &[0, 2], &[usize::MAX, 1]));
        assert!(inside(23, &[], &[]) && !inside(24, &[], &[]));
    }
}
