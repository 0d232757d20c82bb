//! Widths that a file's tensors show.

use super::blocks::{BlockWidths, Named};
use crate::state::Tensors;

/// The size that two layers' weights share, each by its name and the dimension; None where they
/// disagree, or one is missing.
pub(super) fn shown(tensors: &Tensors, one: (&str, usize), other: (&str, usize)) -> Option<usize> {
    let size = |(name, dim): (&str, usize)| {
        let tensor = tensors.get(&format!("{name}.weight"))?;
        tensor.shape().get(dim).copied()
    };
    let (one, other) = (size(one)?, size(other)?);
    (one == other && one > 0).then_some(one)
}

/// The widths of the blocks of a trunk of this width. Where two tensors that show one of them
/// disagree, or are missing, it is the block's own, so that they are reported.
///
/// # Errors
/// When the heads of a block do not divide its attention.
pub(super) fn widths_of(
    tensors: &Tensors,
    blocks: &[Named],
    width: usize,
) -> Result<Vec<BlockWidths>, String> {
    let of_block = |block: &Named| {
        let layer = |layer: &str| format!("{}.{layer}", block.name);
        let mut widths = block.widths;
        if let Some(hidden) = shown(tensors, (&layer("mlp.fc1"), 0), (&layer("mlp.fc2"), 1)) {
            widths.hidden = hidden;
        }
        let attention = tensors.get(&layer("attn.proj.weight")).and_then(|proj| {
            let columns = *proj.shape().get(1)?;
            let rows = *tensors.get(&layer("attn.qkv.weight"))?.shape().first()?;
            (columns > 0 && columns.checked_mul(3) == Some(rows)).then_some(columns)
        });
        // As wide as usual: heads that do not divide it are reported with the other sizes.
        let Some(attention) = attention.filter(|attention| *attention != width) else {
            return Ok(widths);
        };
        if !attention.is_multiple_of(widths.heads) {
            return Err(format!(
                "the attention of {} is {attention} wide, which {} heads do not divide",
                block.name, widths.heads
            ));
        }
        widths.head_dim = attention / widths.heads;
        Ok(widths)
    };
    blocks.iter().map(of_block).collect()
}
