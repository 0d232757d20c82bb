//! The format of `torch.save` before PyTorch 1.6: five pickles in a row (a magic number, the
//! format's version, the machine's integer sizes, the object, the names of its storages), then each
//! storage's length and values.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::path::Path;

use super::pickle::{Node, Pickle};
use super::torch::{MOST, process, wanted};
use crate::process::ProcessKind;
use crate::state::{Bytes, Stored, Tensors, size_of_value};

/// The first pickle: protocol 2, the magic number 0x1950a86a20f9469cfc6c as a long of ten bytes,
/// the end.
const BEGINNING: &[u8; 15] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e";

/// Bytes per value, by storage class.
const SIZES: [(&str, u64); 10] = [
    ("torch DoubleStorage", 8),
    ("torch FloatStorage", 4),
    ("torch HalfStorage", 2),
    ("torch BFloat16Storage", 2),
    ("torch LongStorage", 8),
    ("torch IntStorage", 4),
    ("torch ShortStorage", 2),
    ("torch CharStorage", 1),
    ("torch ByteStorage", 1),
    ("torch BoolStorage", 1),
];

/// Whether a file begins in this format; the reader is rewound.
pub(super) fn is_legacy(reader: &mut BufReader<File>) -> io::Result<bool> {
    let begins = reader.fill_buf()?.starts_with(BEGINNING);
    reader.rewind()?;
    Ok(begins)
}

/// Opens the state dict at `key`, or else the preferred one, in a file of `length` bytes. Also
/// returns the process according to the training's arguments; `path` is for messages.
pub(super) fn open(
    mut file: File,
    length: u64,
    key: Option<&str>,
    path: &Path,
) -> Result<(Tensors, Option<ProcessKind>), String> {
    let unreadable = |error: io::Error| error.to_string();
    let mut head = Vec::new();
    file.rewind().map_err(unreadable)?;
    file.by_ref()
        .take(MOST.min(length))
        .read_to_end(&mut head)
        .map_err(unreadable)?;
    let mut at = 0;
    let mut next = || {
        let (pickle, bytes) = Pickle::read_first(head.get(at..).unwrap_or_default())?;
        at += bytes;
        Ok::<_, String>(pickle)
    };
    let (_magic, _version, machine, object, keys) = (next()?, next()?, next()?, next()?, next()?);
    let little = machine.entry(machine.root(), "little_endian");
    if little.is_some_and(|little| *machine.get(little) == Node::Bool(false)) {
        return Err("it was written by a big-endian machine".into());
    }
    let wanted = wanted(&object, key, length)?;

    // Storages lie in the order of the keys, whatever their type: the place of each depends on the
    // sizes of all before it.
    let damaged = "its list of storages is damaged";
    let mut sizes = HashMap::new();
    for node in object.nodes() {
        let Node::Persistent(storage) = node else {
            continue;
        };
        let [_, class, key, _, _, view, ..] = object.list(*storage).ok_or(damaged)? else {
            return Err(damaged.into());
        };
        if *object.get(*view) != Node::None {
            return Err("it holds views of storages; load it in PyTorch and save it again".into());
        }
        let Node::Global(class) = object.get(*class) else {
            return Err(damaged.into());
        };
        let size = SIZES.iter().find(|(name, _)| name == class);
        let (_, size) = size.ok_or_else(|| format!("it holds a {class}, which is not known"))?;
        sizes.insert(object.text(*key).ok_or(damaged)?, *size);
    }
    let Node::List(names) = keys.root() else {
        return Err(damaged.into());
    };
    let bytes = Bytes::file(path, file);
    let mut places = HashMap::new();
    let mut place = at as u64;
    for name in names {
        let name = keys.text(*name).ok_or(damaged)?;
        let mut count = [0; 8];
        bytes
            .read(place, &mut count)
            .map_err(|_| "it ends before its storages do")?;
        let count = u64::from_le_bytes(count);
        let size = sizes.get(name).ok_or(damaged)?;
        let start = place + 8;
        let end = count
            .checked_mul(*size)
            .and_then(|size| start.checked_add(size));
        place = end
            .filter(|end| *end <= length)
            .ok_or("it ends before its storages do")?;
        places.insert(name, (start, count));
    }
    let mut tensors = Tensors::default();
    for (name, tensor) in wanted {
        let (start, count) = places.get(tensor.storage).ok_or(damaged)?;
        if *count != tensor.count as u64 {
            return Err(format!(
                "tensor `{name}`: its storage has {count} values, expected {}",
                tensor.count
            ));
        }
        if !tensor.lies_inside() {
            return Err(format!("tensor `{name}` lies outside its storage"));
        }
        let start = start + (tensor.offset * size_of_value(tensor.dtype)) as u64;
        let stored = Stored::strided(tensor.shape, tensor.strides, tensor.dtype, &bytes, start);
        tensors.insert(name, stored);
    }
    Ok((tensors, process(&object)))
}

#[cfg(test)]
mod tests {
    use super::super::open_torch;
    use super::*;

    /// A pickle of the given instructions after the protocol.
    fn pickle(instructions: &[u8]) -> Vec<u8> {
        [b"\x80\x02", instructions, b"."].concat()
    }

    /// `{"n.num_batches_tracked": a long, "a": [2, 3] transposed, "b": [2] from the fourth value}`,
    /// with a storage of one long followed by a storage of six floats.
    fn file(values: usize) -> Vec<u8> {
        let tensor = |name: &str,
                      class: &str,
                      key: &str,
                      count: u8,
                      offset: u8,
                      shape: &[u8],
                      strides: &[u8]| {
            let text = |text: &str| {
                [
                    b"X",
                    &(text.len() as u32).to_le_bytes()[..],
                    text.as_bytes(),
                ]
                .concat()
            };
            let tuple = |values: &[u8]| {
                let values = values.iter().flat_map(|value| [b'K', *value]);
                [vec![b'('], values.collect(), vec![b't']].concat()
            };
            [
                text(name),
                b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
                text("storage"),
                format!("ctorch\n{class}\n").into_bytes(),
                text(key),
                text("cpu"),
                vec![b'K', count, b'N', b't', b'Q', b'K', offset],
                tuple(shape),
                tuple(strides),
                b"\x89ccollections\nOrderedDict\n)RtR".to_vec(),
            ]
            .concat()
        };
        let object = [
            b"}(".to_vec(),
            tensor("n.num_batches_tracked", "LongStorage", "77", 1, 0, &[], &[]),
            tensor("a", "FloatStorage", "9", 6, 0, &[2, 3], &[1, 2]),
            tensor("b", "FloatStorage", "9", 6, 3, &[2], &[1]),
            b"u".to_vec(),
        ]
        .concat();
        let machine = b"}X\x0d\x00\x00\x00little_endian\x88s";
        let keys = b"](X\x02\x00\x00\x0077X\x01\x00\x00\x009e";
        let mut bytes = [
            BEGINNING.to_vec(),
            pickle(b"M\xe9\x03"),
            pickle(machine),
            pickle(&object),
            pickle(keys),
        ]
        .concat();
        bytes.extend(1u64.to_le_bytes());
        bytes.extend(5i64.to_le_bytes());
        bytes.extend((values as u64).to_le_bytes());
        bytes.extend((0..values).flat_map(|value| (value as f32).to_le_bytes()));
        bytes
    }

    #[test]
    fn storages_are_found_one_behind_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("old.pth");
        std::fs::write(&path, file(6)).unwrap();
        let state = open_torch(&path, None).unwrap().read_all().unwrap();
        assert_eq!(state.len(), 2);
        assert_eq!(state["a"].data, [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
        assert_eq!(state["b"].data, [3.0, 4.0]);
    }

    #[test]
    fn damage_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("old.pth");
        let whole = file(6);
        for length in BEGINNING.len()..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let error = open_torch(&path, None).unwrap_err().to_string();
            assert!(error.contains("old.pth"), "{error}");
        }
        std::fs::write(&path, file(5)).unwrap();
        let error = open_torch(&path, None).unwrap_err().to_string();
        assert!(error.contains("has 5 values, expected 6"), "{error}");
    }
}
