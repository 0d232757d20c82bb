//! The weights that the kept layers start from.

use std::collections::HashMap;

use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::groups::{GroupError, taps_from_kept};
use super::layers::own_names;
use crate::models::Prunable;
use crate::state::{Array, StateDict, collect, overlay};

/// What the kept layers have for weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// Those of the model that was pruned.
    #[default]
    Original,
    /// Those that were trained along with the masks.
    Update,
    /// The mean of each kept layer and the removed ones that follow it, up to a border of the
    /// trunk; the first, or the first after a border, stands for those before it too.
    Average,
}

impl Start {
    /// All, by their names.
    pub const NAMES: [(&'static str, Self); 3] = [
        ("original", Self::Original),
        ("update", Self::Update),
        ("average", Self::Average),
    ];

    /// Whether it is the default.
    pub fn is_original(&self) -> bool {
        *self == Self::Original
    }
}

/// A network whose kept layers have the [mean weights](Start::Average) of what they stand for;
/// its other layers are as they were.
///
/// # Errors
/// When `kept` is empty, not strictly increasing or beyond the trunk; when layers that belong
/// together differ in shape.
pub fn averaged<B: Backend, N: Prunable<B>>(network: N, kept: &[usize]) -> Result<N, String> {
    let trunk = network.trunk();
    let spans = taps_from_kept(kept, &trunk).map_err(|error: GroupError| error.to_string())?;
    let state = collect::<B, N>(&network);
    let mut means = StateDict::new();
    for (index, (_, last)) in spans.into_iter().enumerate() {
        let begins = trunk.borders.iter().rev();
        let begin = begins.copied().find(|border| *border <= kept[index]);
        let begin = begin.unwrap_or(0);
        let is_first = index == 0 || kept[index - 1] < begin;
        let first = if is_first { begin } else { kept[index] };
        let span: Vec<HashMap<String, String>> = (first..=last)
            .map(|layer| own_names(&network, layer))
            .collect();
        for (local, name) in &span[kept[index] - first] {
            let parts: Option<Vec<&Array>> = (span.iter())
                .map(|layer| state.get(layer.get(local)?))
                .collect();
            let parts = parts.unwrap_or_default();
            if parts.len() < span.len() || parts.iter().any(|part| part.shape != parts[0].shape) {
                return Err(format!(
                    "layers {first} to {last} differ in shape, and have no mean"
                ));
            }
            means.insert(name.clone(), mean(&parts));
        }
    }
    overlay::<B, N>(network, &means).map_err(|error| error.to_string())
}

fn mean(parts: &[&Array]) -> Array {
    let shape = parts[0].shape.clone();
    let sum = |index: usize| -> f64 { parts.iter().map(|part| f64::from(part.data[index])).sum() };
    let data = (0..parts[0].data.len()).map(|index| (sum(index) / parts.len() as f64) as f32);
    Array {
        data: data.collect(),
        shape,
    }
}

#[cfg(test)]
mod tests {
    use burn_ndarray::NdArray;

    use super::*;
    use crate::weights::{EmbeddedName, embedded};

    #[test]
    fn a_kept_layer_is_the_mean_of_what_it_stands_for() {
        let teacher = embedded::checkpoint(EmbeddedName::DigitsTeacher).unwrap();
        let network = teacher.network::<NdArray>(&Default::default()).unwrap();
        let before = collect::<NdArray, _>(&network);
        let after = averaged(network, &[1, 2, 9]).unwrap();
        let after = collect::<NdArray, _>(&after);
        // Layer 1 stands for 0 and 1, layer 2 for 2 to 8, layer 9 for 9 to 11.
        let spans = [(1, 0..=1), (2, 2..=8), (9, 9..=11)];
        for rest in [
            "mlp.fc1.weight",
            "adaLN_modulation.1.bias",
            "attn.qkv.weight",
        ] {
            let name = |layer: usize| format!("blocks.{layer}.{rest}");
            for (kept, span) in spans.clone() {
                for index in [0, 7, 100] {
                    let values = span.clone().map(|layer| before[&name(layer)].data[index]);
                    let values: Vec<f32> = values.collect();
                    let mean = values.iter().sum::<f32>() / values.len() as f32;
                    let found = after[&name(kept)].data[index];
                    // Sums of f32 and of f64 differ by a few units in the last place.
                    assert!((found - mean).abs() < 1e-6, "{rest} {kept}: {found} {mean}");
                }
            }
            assert_eq!(after[&name(5)], before[&name(5)]);
        }
        let shared = "final_layer.linear.weight";
        assert_eq!(after[shared], before[shared]);
    }
}
