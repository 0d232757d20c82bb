//! Infers the model from a file's tensors.

use std::path::Path;

use super::{MarConfig, Stack, presets};
use crate::models::Heads;
use crate::state::{Tensors, WeightsError};

/// Whether the tensors are called as a MAR's.
pub(in crate::models) fn is_mar(tensors: &Tensors) -> bool {
    // Other networks have a `mask_token` too.
    tensors.get("encoder_pos_embed_learned").is_some()
        || (tensors.iter()).any(|(name, _)| name.starts_with("diffloss.net."))
}

/// The MAR whose state dict this is, with a patch of one pixel, as the published ones have it.
/// Without known heads it has those of the published model of its width.
///
/// # Errors
/// What makes it none.
pub(in crate::models) fn mar(
    tensors: &Tensors,
    heads: Heads,
    path: &Path,
) -> Result<MarConfig, WeightsError> {
    let problem = |problem: String| WeightsError::Model {
        path: path.to_owned(),
        problem,
    };
    let [encoder, decoder] = ["encoder", "decoder"].map(|side| depth(tensors, side));
    // Any block shows the MLPs' width.
    let mlp = tensors.iter().find_map(|(name, tensor)| {
        (name.contains("coder_blocks.") && name.ends_with(".mlp.fc1.weight"))
            .then(|| tensor.shape().to_vec())
            .filter(|shape| shape.len() == 2 && shape[1] > 0)
    });
    let mlp_ratio = mlp.map_or(PUBLISHED_RATIO, |shape| shape[0] as f64 / shape[1] as f64);
    let needed = [
        ("class_emb.weight", 2),
        ("encoder_pos_embed_learned", 3),
        ("decoder_pos_embed_learned", 3),
        ("diffusion_pos_embed_learned", 3),
        ("z_proj.weight", 2),
        ("diffloss.net.input_proj.weight", 2),
    ];
    let mut missing = Vec::new();
    let shapes = needed.map(|(name, rank)| {
        let shape = tensors.get(name).map(|tensor| tensor.shape().to_vec());
        let shape = shape.filter(|shape| shape.len() == rank);
        shape.unwrap_or_else(|| {
            missing.push(format!("`{name}` of {rank} dimensions"));
            vec![0; rank]
        })
    });
    if !missing.is_empty() {
        return Err(problem(format!(
            "it is no MAR: it lacks {}",
            missing.join(", ")
        )));
    }
    let [classes, places, decoded, tokens, z_proj, head] = shapes;
    let (width, count) = (places[2], tokens[1]);
    let stack = |width: usize, depth: usize| {
        let found = heads.known.or_else(|| presets::heads_of_width(width));
        let heads = found.or(heads.otherwise).ok_or_else(|| {
            problem(format!(
                "the number of heads is not stored, and no published model is {width} wide; state it: `--heads N` on the command line, `heads = N` in a recipe"
            ))
        })?;
        Ok::<_, WeightsError>(Stack {
            width,
            depth,
            heads,
        })
    };
    let buffer = places[1].checked_sub(count).ok_or_else(|| {
        problem(format!(
            "it has positions of {} places in the encoder and of {count} tokens",
            places[1]
        ))
    })?;
    Ok(MarConfig {
        input_size: count.isqrt(),
        patch_size: 1,
        channels: z_proj[1],
        classes: classes[0],
        buffer,
        mlp_ratio,
        encoder: stack(width, encoder)?,
        decoder: stack(decoded[2], decoder)?,
        head_width: head[0],
        head_depth: depth_of(tensors, "diffloss.net.res_blocks."),
    })
}

/// The ratio of the published models, for one without blocks.
const PUBLISHED_RATIO: f64 = 4.0;

fn depth(tensors: &Tensors, side: &str) -> usize {
    depth_of(tensors, &format!("{side}_blocks."))
}

/// One more than the highest number after a prefix, within what a model may have.
fn depth_of(tensors: &Tensors, prefix: &str) -> usize {
    let numbers = tensors.iter().filter_map(|(name, _)| {
        let (number, _) = name.strip_prefix(prefix)?.split_once('.')?;
        number.parse::<usize>().ok()
    });
    numbers.max().map_or(0, |highest| highest.min(1 << 12) + 1)
}
