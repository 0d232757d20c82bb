//! Safetensors in several files, with an index beside them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde::Deserialize;

use super::WeightsError;
use super::state::{StateDict, read_safetensors};

/// What is read of an index.
#[derive(Deserialize)]
struct Index {
    /// The file of each tensor, by name.
    weight_map: BTreeMap<String, String>,
}

/// Reads the tensors that an index names from the files that it names, and the metadata of all of them.
///
/// # Errors
/// When a file can't be read; when the files hold other tensors than the index says.
pub(super) fn read_shards(
    path: &Path,
) -> Result<(StateDict, BTreeMap<String, String>), WeightsError> {
    let broken = |found: String| WeightsError::Format {
        path: path.to_owned(),
        expected: "safetensors index",
        found,
    };
    let text = std::fs::read_to_string(path).map_err(WeightsError::io(path))?;
    let index: Index = serde_json::from_str(&text).map_err(|error| broken(error.to_string()))?;
    let files: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
    let (mut state, mut metadata) = (StateDict::new(), BTreeMap::new());
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
        let (tensors, said) = read_safetensors(&path.with_file_name(file))?;
        metadata.extend(said);
        for (name, array) in tensors {
            if index.weight_map.get(&name).map(String::as_str) != Some(file) {
                return Err(broken(format!(
                    "{file} holds `{name}`, which is not said of it"
                )));
            }
            state.insert(name, array);
        }
    }
    let missing: Vec<&str> = (index.weight_map.keys())
        .filter(|name| !state.contains_key(*name))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        return Err(broken(format!("the files lack {}", missing.join(", "))));
    }
    Ok((state, metadata))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{Array, write_safetensors};

    #[test]
    fn tensors_come_from_the_files_that_the_index_names() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let array = |value| Array::new([2], vec![value; 2]);
        for (file, name, value) in [("a.safetensors", "x", 1.0), ("b.safetensors", "y", 2.0)] {
            let state = StateDict::from([(name.to_owned(), array(value))]);
            write_safetensors(&at(file), &state, BTreeMap::new()).unwrap();
        }
        let index = at("model.safetensors.index.json");
        let read = |map: &str| {
            std::fs::write(
                &index,
                format!("{{\"metadata\": {{}}, \"weight_map\": {map}}}"),
            )
            .unwrap();
            read_shards(&index).map(|(state, _)| state)
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
    }
}
