//! Named arrays on the host and their safetensors files.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::WeightsError;
use crate::atomic::write_atomic;

/// A dense f32 array, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Sizes of the dimensions.
    pub shape: Vec<usize>,
    /// The values.
    pub data: Vec<f32>,
}

impl Array {
    /// An array; `data` must fill `shape`.
    ///
    /// # Panics
    /// When it does not.
    pub fn new(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> Self {
        let shape = shape.into();
        assert_eq!(
            shape.iter().product::<usize>(),
            data.len(),
            "data must fill the shape {shape:?}"
        );
        Self { shape, data }
    }
}

/// Arrays by parameter name.
pub type StateDict = BTreeMap<String, Array>;

/// Reads a safetensors file: its float tensors as f32, and its metadata.
///
/// # Errors
/// When the file can't be read, is not safetensors, or holds a tensor that is not of a float type.
pub fn read_safetensors(
    path: &Path,
) -> Result<(StateDict, BTreeMap<String, String>), WeightsError> {
    let bytes = std::fs::read(path).map_err(WeightsError::io(path))?;
    decode(&bytes, path)
}

/// Decodes the bytes of a safetensors file; `path` is for messages.
pub(super) fn decode(
    bytes: &[u8],
    path: &Path,
) -> Result<(StateDict, BTreeMap<String, String>), WeightsError> {
    let broken = |found: String| WeightsError::Format {
        path: path.to_owned(),
        expected: "safetensors",
        found,
    };
    let (_, header) =
        SafeTensors::read_metadata(bytes).map_err(|error| broken(error.to_string()))?;
    let metadata = header
        .metadata()
        .clone()
        .unwrap_or_default()
        .into_iter()
        .collect();
    let file = SafeTensors::deserialize(bytes).map_err(|error| broken(error.to_string()))?;
    let mut state = StateDict::new();
    for (name, view) in file.tensors() {
        let data = floats(view.dtype(), view.data()).ok_or_else(|| {
            broken(format!(
                "tensor `{name}` is {:?}, expected F32, F16, BF16 or F64",
                view.dtype()
            ))
        })?;
        state.insert(name, Array::new(view.shape(), data));
    }
    Ok((state, metadata))
}

/// Values of a float type as f32, from their little-endian bytes; `None` for another type.
pub(super) fn floats(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    fn values<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks().0.iter().map(|b| value(*b)).collect()
    }
    Some(match dtype {
        Dtype::F32 => values(bytes, f32::from_le_bytes),
        Dtype::F64 => values(bytes, |b| f64::from_le_bytes(b) as f32),
        Dtype::F16 => values(bytes, |b| half::f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => values(bytes, |b| half::bf16::from_le_bytes(b).to_f32()),
        _ => return None,
    })
}

/// Writes arrays and metadata as a safetensors file, atomically.
///
/// # Errors
/// When the file can't be written.
pub fn write_safetensors(
    path: &Path,
    state: &StateDict,
    metadata: BTreeMap<String, String>,
) -> Result<(), WeightsError> {
    let broken = |found: String| WeightsError::Format {
        path: path.to_owned(),
        expected: "safetensors",
        found,
    };
    let bytes: Vec<(&String, Vec<u8>, &Array)> = state
        .iter()
        .map(|(name, array)| {
            (
                name,
                array
                    .data
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect(),
                array,
            )
        })
        .collect();
    let mut views = Vec::with_capacity(bytes.len());
    for (name, data, array) in &bytes {
        let view = TensorView::new(Dtype::F32, array.shape.clone(), data)
            .map_err(|error| broken(error.to_string()))?;
        views.push((name.as_str(), view));
    }
    let encoded = safetensors::serialize(views, Some(metadata.into_iter().collect()))
        .map_err(|error| broken(error.to_string()))?;
    write_atomic(path, |file| std::io::Write::write_all(file, &encoded))
        .map_err(WeightsError::io(path))
}
