//! What model a file's tensors are of.

use std::path::Path;

use super::tensors::Tensors;
use super::{Misfits, WeightsError};
use crate::models::{DitConfig, zoo};

/// The DiT whose state dict this is; `heads` where something states them, else those of the published model of that
/// width.
///
/// # Errors
/// What makes it none.
pub(super) fn dit(
    tensors: &Tensors,
    heads: Option<usize>,
    path: &Path,
) -> Result<DitConfig, WeightsError> {
    let problem = |problem: String| WeightsError::Model {
        path: path.to_owned(),
        problem,
    };
    const NEEDED: [(&str, usize); 5] = [
        ("x_embedder.proj.weight", 4),
        ("pos_embed", 3),
        ("y_embedder.embedding_table.weight", 2),
        ("blocks.0.mlp.fc1.weight", 2),
        ("final_layer.linear.weight", 2),
    ];
    let mut missing = Vec::new();
    let shapes = NEEDED.map(|(name, rank)| {
        let shape = tensors.get(name).map(|tensor| tensor.shape().to_vec());
        shape
            .filter(|shape| shape.len() == rank)
            .unwrap_or_else(|| {
                missing.push(format!("`{name}` of {rank} dimensions"));
                vec![0; rank]
            })
    });
    if !missing.is_empty() {
        let some: Vec<&str> = tensors
            .iter()
            .map(|(name, _)| name.as_str())
            .take(5)
            .collect();
        let names = if some.is_empty() {
            "nothing".to_owned()
        } else {
            some.join(", ")
        };
        return Err(problem(format!(
            "it is no DiT: it lacks {}. It holds {names}{}",
            missing.join(", "),
            if tensors.len() > some.len() {
                ", and more"
            } else {
                ""
            }
        )));
    }
    let [patches, positions, labels, mlp, output] = shapes;
    let (width, channels, patch_size) = (patches[0], patches[1], patches[2]);
    if labels[0] == 0 || width == 0 || patch_size == 0 || patch_size > 4096 || channels > 1024 {
        return Err(problem(
            "a dimension of its embedders is 0, or beyond any model".into(),
        ));
    }
    let heads = heads.or_else(|| zoo::heads_of_width(width)).ok_or_else(|| {
        problem(format!(
            "the number of heads is not stored, and no published model is {width} wide; state it (`heads`)"
        ))
    })?;
    let depth = (0..)
        .take_while(|layer| {
            tensors
                .get(&format!("blocks.{layer}.attn.qkv.weight"))
                .is_some()
        })
        .count();
    Ok(DitConfig {
        input_size: positions[1].isqrt() * patch_size,
        patch_size,
        channels,
        width,
        depth,
        heads,
        mlp_ratio: mlp[0] as f64 / width as f64,
        classes: labels[0] - 1,
        learn_sigma: output[0] == 2 * channels * patch_size * patch_size,
    })
}

/// Refuses tensors that are not those of the model, naming all that are missing, surplus or misshapen.
pub(super) fn check_dit(
    tensors: &Tensors,
    config: &DitConfig,
    path: &Path,
) -> Result<(), WeightsError> {
    let mut misfits = Misfits::default();
    misfits.compare(
        tensors,
        config
            .tensors()
            .iter()
            .map(|(name, shape)| (name.as_str(), shape.as_slice())),
    );
    misfits.into_result(path, &config.to_string())
}
