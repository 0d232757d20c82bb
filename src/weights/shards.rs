//! Safetensors in several files with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::safetensors::{cause, encoded, open_safetensors, write_safetensors};
use super::torch::is_counter;
use crate::files::write_atomic;
use crate::state::{Tensors, WeightsError, size_of_value, some};

/// The fields read from an index.
#[derive(Serialize, Deserialize)]
struct Index {
    /// Has `total_size`, the bytes of all tensors; for other programs.
    #[serde(default)]
    metadata: BTreeMap<String, serde_json::Value>,
    /// The file of each tensor, by name.
    weight_map: BTreeMap<String, String>,
}

/// Opens the tensors of an index from its files, and reads the metadata of all of them.
///
/// # Errors
/// When a file can't be read; when the files hold other tensors than the index names.
pub(super) fn open_shards(
    path: &Path,
) -> Result<(Tensors, BTreeMap<String, String>), WeightsError> {
    let broken = |found: String| WeightsError::Format {
        path: path.to_owned(),
        expected: "safetensors index",
        found,
    };
    let text = crate::files::read_text(path).map_err(WeightsError::io(path))?;
    let index: Index = serde_json::from_str(&text).map_err(|error| broken(error.to_string()))?;
    let files: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
    let (mut state, mut metadata) = (Tensors::default(), BTreeMap::new());
    for file in files {
        let mut parts = Path::new(file).components();
        if !matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        ) {
            return Err(broken(format!(
                "{file:?} is not the name of a file beside it"
            )));
        }
        let (tensors, said) = open_safetensors(&path.with_file_name(file))?;
        for (key, value) in said {
            if metadata.get(&key).is_some_and(|known| *known != value) {
                return Err(broken(format!(
                    "{file} says another `{key}` than a file before it: they are of several models"
                )));
            }
            metadata.insert(key, value);
        }
        for (name, tensor) in tensors {
            if index.weight_map.get(&name).map(String::as_str) != Some(file) {
                return Err(broken(format!(
                    "{file} holds `{name}`, which is not said of it"
                )));
            }
            state.insert(name, tensor);
        }
    }
    let missing: Vec<&str> = (index.weight_map.keys())
        .filter(|name| state.get(name).is_none() && !is_counter(name))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        let count = missing.len();
        return Err(broken(format!(
            "the files lack {}",
            some(missing.into_iter(), count)
        )));
    }
    Ok((state, metadata))
}

/// Writes tensors into files of at most `most` bytes (more only for a single larger tensor) and
/// their index to `path`, each atomically, the index last. A file with the same content, left by a
/// process that was killed before the index, is kept. Returns the files without the index.
///
/// # Errors
/// When a tensor can't be read or a file can't be written; when a needed file name is taken by
/// another file.
pub(super) fn write_shards(
    path: &Path,
    tensors: &Tensors,
    metadata: &BTreeMap<String, String>,
    dtype: Option<Dtype>,
    most: u64,
) -> Result<Vec<PathBuf>, WeightsError> {
    let mut shards: Vec<Tensors> = Vec::new();
    let (mut total, mut free) = (0, 0);
    for (name, tensor) in tensors.iter() {
        let size = (tensor.count() * size_of_value(dtype.unwrap_or(tensor.dtype()))) as u64;
        total += size;
        if size > free || shards.is_empty() {
            shards.push(Tensors::default());
            free = most;
        }
        free = free.saturating_sub(size);
        if let Some(shard) = shards.last_mut() {
            shard.insert(name, tensor.clone());
        }
    }
    let name = path
        .file_name()
        .map(std::ffi::OsStr::to_string_lossy)
        .unwrap_or_default();
    let stem = name.trim_end_matches(".safetensors.index.json");
    let mut index = Index {
        metadata: BTreeMap::from([("total_size".to_owned(), total.into())]),
        weight_map: BTreeMap::new(),
    };
    let mut written = Vec::new();
    let file_of = |number: usize| {
        format!(
            "{stem}-{:05}-of-{:05}.safetensors",
            number + 1,
            shards.len()
        )
    };
    // Checked before anything is written.
    for (number, shard) in shards.iter().enumerate() {
        let file = path.with_file_name(file_of(number));
        if file.exists() && !holds(&file, shard, metadata, dtype)? {
            return Err(WeightsError::Model {
                path: file,
                problem: "exists; nothing is overwritten, name another".into(),
            });
        }
    }
    for (number, shard) in shards.iter().enumerate() {
        let file = file_of(number);
        index
            .weight_map
            .extend(shard.iter().map(|(name, _)| (name.clone(), file.clone())));
        let file = path.with_file_name(file);
        if !file.exists() {
            write_safetensors(&file, shard, metadata.clone(), dtype)?;
        }
        written.push(file);
    }
    let text = serde_json::to_vec_pretty(&index).map_err(|error| WeightsError::Format {
        path: path.to_owned(),
        expected: "safetensors index",
        found: error.to_string(),
    })?;
    write_atomic(path, |file| file.write_all(&text)).map_err(WeightsError::io(path))?;
    Ok(written)
}

/// Whether a file already holds the tensors that would be written to it.
fn holds(
    file: &Path,
    shard: &Tensors,
    metadata: &BTreeMap<String, String>,
    dtype: Option<Dtype>,
) -> Result<bool, WeightsError> {
    // A file that is no safetensors file is another one.
    let Ok((tensors, said)) = open_safetensors(file) else {
        return Ok(false);
    };
    if said != *metadata || tensors.len() != shard.len() {
        return Ok(false);
    }
    for ((name, ours), (other, theirs)) in shard.iter().zip(tensors.iter()) {
        let alike = name == other
            && ours.shape() == theirs.shape()
            && dtype.unwrap_or(ours.dtype()) == theirs.dtype()
            && encoded(name, ours, dtype).map_err(|error| cause(file, error))? == theirs.bytes()?;
        if !alike {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Array, StateDict};

    #[test]
    fn tensors_come_from_the_files_that_the_index_names() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let array = |value| Array::new([2], vec![value; 2]);
        for (file, name, value) in [("a.safetensors", "x", 1.0), ("b.safetensors", "y", 2.0)] {
            let state = StateDict::from([(name.to_owned(), array(value))]);
            write_safetensors(&at(file), &state.into(), BTreeMap::new(), None).unwrap();
        }
        let index = at("model.safetensors.index.json");
        let read = |map: &str| {
            std::fs::write(
                &index,
                format!("{{\"metadata\": {{}}, \"weight_map\": {map}}}"),
            )
            .unwrap();
            open_shards(&index).map(|(tensors, _)| tensors.read_all().unwrap())
        };
        let whole = read(r#"{"x": "a.safetensors", "y": "b.safetensors"}"#).unwrap();
        assert_eq!(whole["x"], array(1.0));
        assert_eq!(whole["y"], array(2.0));
        for (map, says) in [
            (r#"{"x": "a.safetensors", "z": "a.safetensors"}"#, "lack z"),
            (r#"{"z": "b.safetensors"}"#, "`y`"),
            (r#"{"x": "../a.safetensors"}"#, "beside it"),
            (r#"{"x": "c.safetensors"}"#, "c.safetensors"),
            (r#"{"x": 3}"#, "invalid type"),
        ] {
            let error = read(map).unwrap_err().to_string();
            assert!(error.contains(says), "{map}: {error}");
        }
        // A counter of a normalisation is no weight, in an index either.
        let with_counter = r#"{"x": "a.safetensors", "y": "b.safetensors", "n.num_batches_tracked": "a.safetensors"}"#;
        assert!(read(with_counter).is_ok());
        for (file, by) in [("a.safetensors", "us"), ("b.safetensors", "them")] {
            let (tensors, _) = open_safetensors(&at(file)).unwrap();
            let said = BTreeMap::from([("by".to_owned(), by.to_owned())]);
            write_safetensors(&at(file), &tensors, said, None).unwrap();
        }
        let error = read(with_counter).unwrap_err().to_string();
        assert!(error.contains("b.safetensors says another `by`"), "{error}");
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let state: StateDict = (0..5)
            .map(|i| (format!("t{i}"), Array::new([i], vec![i as f32; i])))
            .collect();
        let said = BTreeMap::from([("by".to_owned(), "us".to_owned())]);
        let tensors = Tensors::from(state.clone());
        for (most, files) in [(0, 5), (12, 3), (1 << 20, 1)] {
            let path = folder
                .path()
                .join(format!("m{most}.safetensors.index.json"));
            let written = write_shards(&path, &tensors, &said, None, most).unwrap();
            assert_eq!(written.len(), files, "{most}");
            // As after a kill before the index was written.
            std::fs::remove_file(&path).unwrap();
            std::fs::remove_file(&written[0]).unwrap();
            assert_eq!(
                write_shards(&path, &tensors, &said, None, most).unwrap(),
                written
            );
            let mut other = state.clone();
            other.insert("t4".into(), Array::new([4], vec![5.0; 4]));
            let again = write_shards(&path, &other.into(), &said, None, most).unwrap_err();
            assert!(again.to_string().contains("exists"), "{again}");
            let (read, metadata) = open_shards(&path).unwrap();
            assert_eq!(
                (read.read_all().unwrap(), metadata),
                (state.clone(), said.clone())
            );
        }
    }
}
