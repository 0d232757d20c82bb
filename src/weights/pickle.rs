//! PyTorch's `.pt` and `.pth` files.

use std::path::Path;

use burn_store::pytorch::{PytorchError, PytorchReader};

use super::{Array, StateDict, WeightsError};
use crate::interrupt::guarded;

/// Where a training checkpoint keeps its weights, best first: published samples come from the EMA.
const PRECEDENCE: [&str; 2] = ["ema", "model"];

/// Reads a state dict, either bare or inside a training checkpoint (`ema`, else `model`; `key` overrides).
///
/// # Errors
/// When the file can't be read, is no PyTorch file, or lacks `key`.
pub fn read_pickle(path: &Path, key: Option<&str>) -> Result<StateDict, WeightsError> {
    let broken = |found: String| WeightsError::Format {
        path: path.to_owned(),
        expected: "PyTorch",
        found,
    };
    let advice = "; if it holds objects besides tensors, save the state dict alone (`torch.save(checkpoint[\"ema\"], …)`) or as safetensors";
    // The reader indexes into untrusted data; what a broken file makes it do must not take the program down.
    let open = |key: Option<&str>| {
        guarded(|| match key {
            Some(key) => PytorchReader::with_top_level_key(path, key),
            None => PytorchReader::new(path),
        })
        .unwrap_or_else(|| Err(PytorchError::InvalidFormat("the pickle is damaged".into())))
    };
    std::fs::metadata(path).map_err(WeightsError::io(path))?;
    let keys: Vec<Option<&str>> = match key {
        Some(key) => vec![Some(key)],
        None => PRECEDENCE.into_iter().map(Some).chain([None]).collect(),
    };
    let mut last = String::new();
    for key in keys {
        match open(key) {
            Ok(reader) if !reader.is_empty() => return tensors(reader, path),
            Ok(_) => last = "it holds no tensors".into(),
            // Only its absence leads on: an average that is there but damaged must not be passed over.
            Err(PytorchError::KeyNotFound(key)) => last = format!("it has no `{key}`"),
            Err(error) => return Err(broken(format!("{error}{advice}"))),
        }
    }
    Err(broken(format!("{last}{advice}")))
}

fn tensors(reader: PytorchReader, path: &Path) -> Result<StateDict, WeightsError> {
    let broken = |found: String| WeightsError::Format {
        path: path.to_owned(),
        expected: "PyTorch",
        found,
    };
    let available = std::fs::metadata(path)
        .map_err(WeightsError::io(path))?
        .len() as usize;
    let mut stated = 0usize;
    let mut state = StateDict::new();
    for (name, snapshot) in reader.into_tensors() {
        if !snapshot.dtype.is_float() {
            return Err(broken(format!(
                "tensor `{name}` is {:?}, expected a float type",
                snapshot.dtype
            )));
        }
        // Sizes first: the reader allocates what a file states, and fills what it lacks with zeros.
        let bytes = snapshot
            .shape
            .iter()
            .try_fold(snapshot.dtype.size(), |bytes, size| {
                bytes.checked_mul(*size)
            });
        stated = bytes
            .and_then(|bytes| stated.checked_add(bytes))
            .filter(|stated| *stated <= available)
            .ok_or_else(|| {
                broken(format!(
                    "with tensor `{name}` it states more data than the file holds"
                ))
            })?;
        let data = guarded(|| snapshot.to_data())
            .ok_or_else(|| broken(format!("tensor `{name}` is damaged")))?
            .map_err(|error| broken(format!("tensor `{name}`: {error:?}")))?;
        let shape = data.shape.to_vec();
        state.insert(
            name,
            Array {
                shape,
                data: super::module::floats(data),
            },
        );
    }
    Ok(state)
}
