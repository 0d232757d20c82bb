//! Named arrays on the host.

mod error;
mod misfits;
mod module;
mod stored;

use std::collections::BTreeMap;

use safetensors::Dtype;

pub use error::WeightsError;
pub(crate) use misfits::{Misfits, some};
pub use module::{ParameterName, assign, collect, names};
pub(crate) use module::{Walk, floats, overlay, values};
pub(crate) use stored::{Bytes, size_of_value};
pub use stored::{Stored, Tensors};

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

/// A source of a module's parameters.
pub trait TensorSource {
    /// Names and shapes of all tensors.
    fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])>;

    /// The values of a tensor; None if there is none of that name.
    ///
    /// # Errors
    /// When they can't be read.
    fn tensor(&self, name: &str) -> Result<Option<Array>, WeightsError>;
}

impl TensorSource for StateDict {
    fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.iter()
            .map(|(name, array)| (name.as_str(), array.shape.as_slice()))
    }

    fn tensor(&self, name: &str) -> Result<Option<Array>, WeightsError> {
        Ok(self.get(name).cloned())
    }
}

/// Converts little-endian bytes of a float type to f32; `None` for another type.
pub(crate) fn decode(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
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

/// Converts values to little-endian bytes of a float type; half types round to the nearest.
pub(crate) fn encode(values: Vec<f32>, dtype: Dtype) -> Vec<u8> {
    let values = values.into_iter();
    match dtype {
        Dtype::F16 => values
            .flat_map(|v| half::f16::from_f32(v).to_le_bytes())
            .collect(),
        Dtype::BF16 => values
            .flat_map(|v| half::bf16::from_f32(v).to_le_bytes())
            .collect(),
        Dtype::F64 => values.flat_map(|v| f64::from(v).to_le_bytes()).collect(),
        _ => values.flat_map(f32::to_le_bytes).collect(),
    }
}
