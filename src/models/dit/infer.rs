//! Infers the model from a file's tensors.

use std::collections::BTreeSet;
use std::path::Path;

use super::{DitConfig, Widths, presets};
use crate::models::Heads;
use crate::models::blocks::BlockKind;
use crate::models::shown::{shown, widths_of};
use crate::state::{Misfits, Tensors, WeightsError, some};

/// The DiT whose state dict this is, as deep as its highest block. Without known heads it has those
/// of the published model of its width.
///
/// # Errors
/// What makes it none.
pub(in crate::models) fn dit(
    tensors: &Tensors,
    heads: Heads,
    path: &Path,
) -> Result<DitConfig, WeightsError> {
    let problem = |problem: String| WeightsError::Model {
        path: path.to_owned(),
        problem,
    };
    let blocks = blocks(tensors);
    // Any block shows the MLP's width, so that a tensor missing in the first is reported with all
    // others; or none does, where the MLPs were taken out of all of them.
    let mlp = (blocks.iter())
        .flat_map(|block| ["", "0."].map(|within| format!("blocks.{block}.{within}mlp.fc1.weight")))
        .find(|name| tensors.get(name).is_some());
    let stream = (tensors.get("x_embedder.proj.weight"))
        .and_then(|patches| patches.shape().first().copied())
        .unwrap_or(0);
    let without = mlp.is_none()
        && !blocks.is_empty()
        && (blocks.iter()).all(|block| kind(tensors, *block, stream) == BlockKind::Attention);
    let mlp = mlp.unwrap_or_else(|| "blocks.0.mlp.fc1.weight".into());
    let needed: [(&str, usize); 5] = [
        ("x_embedder.proj.weight", 4),
        ("pos_embed", 3),
        ("y_embedder.embedding_table.weight", 2),
        (&mlp, 2),
        ("final_layer.linear.weight", 2),
    ];
    let mut missing = Vec::new();
    let shapes = needed.map(|(name, rank)| {
        let shape = tensors.get(name).map(|tensor| tensor.shape().to_vec());
        shape
            .filter(|shape| shape.len() == rank)
            .unwrap_or_else(|| {
                if !(without && name == mlp) {
                    missing.push(format!("`{name}` of {rank} dimensions"));
                }
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
    // The published models of a width have its heads; one that lost width need not.
    let rows = |block: &usize| {
        let qkv = ["", "0."].map(|within| format!("blocks.{block}.{within}attn.qkv.weight"));
        let found = qkv.iter().find_map(|name| tensors.get(name));
        found.and_then(|tensor| tensor.shape().first().copied())
    };
    let usual = labels[1] == width
        && (blocks.iter())
            .all(|block| rows(block).is_none_or(|rows| rows % 3 != 0 || rows / 3 == width));
    let heads = heads
        .known
        .or_else(|| presets::heads_of_width(width).filter(|_| usual))
        .or(heads.otherwise)
        .ok_or_else(|| {
            problem(format!(
                "the number of heads is not stored, and no published model is {width} wide and has its widths; state it: `--heads N` on the command line, `heads = N` in a recipe"
            ))
        })?;
    let depth = depth(&blocks).map_err(problem)?;
    let config = DitConfig {
        input_size: positions[1].isqrt() * patch_size,
        patch_size,
        channels,
        width,
        depth,
        heads,
        mlp_ratio: match without {
            true => PUBLISHED_RATIO,
            false => mlp[0] as f64 / width as f64,
        },
        classes: labels[0] - 1,
        learn_sigma: output[0] == 2 * channels * patch_size * patch_size,
        blocks: Vec::new(),
        widths: None,
    };
    let found = (0..depth).map(|block| kind(tensors, block, width));
    let config = config.of_blocks(found.collect());
    let widths = widths(tensors, &config).map_err(problem)?;
    Ok(config.of_widths(widths))
}

/// The widths within the network. Where two tensors that show one of them disagree, or are missing,
/// it is what follows from the other sizes, so that they are reported.
fn widths(tensors: &Tensors, config: &DitConfig) -> Result<Widths, String> {
    let mut widths = config.widths();
    let condition = shown(
        tensors,
        ("t_embedder.mlp.2", 0),
        ("y_embedder.embedding_table", 1),
    );
    widths.condition = condition.unwrap_or(widths.condition);
    let timestep = shown(tensors, ("t_embedder.mlp.0", 0), ("t_embedder.mlp.2", 1));
    widths.timestep = timestep.unwrap_or(widths.timestep);
    widths.blocks = widths_of(tensors, &config.named_blocks(), config.width)?;
    Ok(widths)
}

/// The MLP's hidden width over the trunk's in every published DiT.
const PUBLISHED_RATIO: f64 = 4.0;

/// What a block of a trunk of this width is. One of a single branch has half of the modulation; any
/// other that lacks tensors is whole and damaged. Of a pair each block has a number.
fn kind(tensors: &Tensors, block: usize, width: usize) -> BlockKind {
    let shape = |name: &str| {
        let tensor = tensors.get(&format!("blocks.{block}.{name}"))?;
        Some(tensor.shape().to_vec())
    };
    let half = shape("adaLN_modulation.1.weight")
        .is_some_and(|shape| matches!(shape[..], [rows, _] if width.checked_mul(3) == Some(rows)));
    if shape("0.adaLN_modulation.1.weight").is_some() {
        return BlockKind::Pair;
    }
    let attention = shape("attn.qkv.weight").is_some();
    match half {
        true if attention => BlockKind::Attention,
        true => BlockKind::Mlp,
        false => BlockKind::Whole,
    }
}

/// Indices of the blocks that have a tensor.
fn blocks(tensors: &Tensors) -> BTreeSet<usize> {
    let index = |name: &str| -> Option<usize> {
        let (index, _) = name.strip_prefix("blocks.")?.split_once('.')?;
        index.parse().ok()
    };
    tensors.iter().filter_map(|(name, _)| index(name)).collect()
}

/// Depth of a trunk with these blocks: the highest index plus 1.
///
/// # Errors
/// When most of the blocks below the highest are missing: a name is wrong then, and nothing of that
/// size must be allocated.
fn depth(blocks: &BTreeSet<usize>) -> Result<usize, String> {
    let Some(&highest) = blocks.last() else {
        return Ok(0);
    };
    let absent = highest - (blocks.len() - 1);
    if absent <= blocks.len() {
        return Ok(highest + 1);
    }
    // Lazy: `highest` may be huge, and only the first few are listed.
    let missing = (0..highest).filter(|index| !blocks.contains(index));
    Err(format!(
        "its highest block is {highest}, but blocks {} are missing",
        some(missing, absent)
    ))
}

/// Refuses tensors that are not the expected ones, naming all that are missing, surplus or
/// misshapen.
pub(in crate::models) fn check(
    tensors: &Tensors,
    expected: &[(String, Vec<usize>)],
    what: &str,
    path: &Path,
) -> Result<(), WeightsError> {
    let mut misfits = Misfits::default();
    let expected = expected.iter();
    misfits.compare(
        tensors,
        expected.map(|(name, shape)| (name.as_str(), shape.as_slice())),
    );
    misfits.into_result(path, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_block_is_the_last() {
        let depth = |blocks: &[usize]| depth(&blocks.iter().copied().collect());
        assert_eq!(depth(&[]), Ok(0));
        assert_eq!(depth(&[0, 1, 2]), Ok(3));
        assert_eq!(depth(&[0, 1, 2, 4, 5]), Ok(6));
        assert_eq!(
            depth(&[0, 2, usize::MAX]).unwrap_err(),
            format!(
                "its highest block is {}, but blocks 1, 3, 4, 5, 6, 7, 8, 9, and {} more are missing",
                usize::MAX,
                usize::MAX - 2 - 8
            )
        );
    }
}
