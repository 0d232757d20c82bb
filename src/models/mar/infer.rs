//! Infers the model from a file's tensors.

use std::path::Path;

use super::{MarConfig, Stack, Widths, presets};
use crate::models::Heads;
use crate::models::blocks::BlockKind;
use crate::models::shown::{shown, widths_of};
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
    // Any block shows the MLPs' width, or none does where all lack theirs.
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
    // The published models of a width have its heads; one that lost width need not.
    let usual = (tensors.iter()).all(|(name, tensor)| {
        let columns = tensor.shape().get(1);
        !name.ends_with(".attn.proj.weight") || columns == tensor.shape().first()
    });
    let stack = |width: usize, depth: usize| {
        let published = || presets::heads_of_width(width).filter(|_| usual);
        let found = heads.known.or_else(published);
        let heads = found.or(heads.otherwise).ok_or_else(|| {
            problem(format!(
                "the number of heads is not stored, and no published model is {width} wide and has its widths; state it: `--heads N` on the command line, `heads = N` in a recipe"
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
    let config = MarConfig {
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
        blocks: Vec::new(),
        widths: None,
    };
    let kinds = [("encoder", encoder), ("decoder", decoder)]
        .map(|(side, depth)| (0..depth).map(|block| kind(tensors, side, block)).collect());
    let config = config.of_blocks(kinds);
    let widths = widths(tensors, &config).map_err(problem)?;
    Ok(config.of_widths(widths))
}

/// The widths within the network. Where two tensors that show one of them disagree, or are missing,
/// it is what follows from the other sizes, so that they are reported.
fn widths(tensors: &Tensors, config: &MarConfig) -> Result<Widths, String> {
    const HEAD: &str = "diffloss.net";
    let time = |layer: &str| format!("{HEAD}.time_embed.mlp.{layer}");
    let mut widths = config.widths();
    let condition = shown(tensors, (&time("2"), 0), (&format!("{HEAD}.cond_embed"), 0));
    widths.condition = condition.unwrap_or(widths.condition);
    let timestep = shown(tensors, (&time("0"), 0), (&time("2"), 1));
    widths.timestep = timestep.unwrap_or(widths.timestep);
    for (block, hidden) in widths.head.iter_mut().enumerate() {
        let layer = |layer: &str| format!("{HEAD}.res_blocks.{block}.mlp.{layer}");
        *hidden = shown(tensors, (&layer("0"), 0), (&layer("2"), 1)).unwrap_or(*hidden);
    }
    let [encoder, decoder] = config.named_blocks();
    widths.blocks = widths_of(tensors, &encoder, config.encoder.width)?;
    widths
        .blocks
        .extend(widths_of(tensors, &decoder, config.decoder.width)?);
    Ok(widths)
}

/// What a block is. One that lacks every tensor of a branch is without that branch; any other that
/// lacks tensors is whole and damaged. Of a pair each block has a number.
fn kind(tensors: &Tensors, side: &str, block: usize) -> BlockKind {
    let has = |parts: &[&str]| {
        let layers = parts.iter().flat_map(|part| {
            ["weight", "bias"].map(|of| format!("{side}_blocks.{block}.{part}.{of}"))
        });
        layers.into_iter().any(|name| tensors.get(&name).is_some())
    };
    if has(&["0.norm1", "0.norm2"]) {
        return BlockKind::Pair;
    }
    let attention = has(&["norm1", "attn.qkv", "attn.proj"]);
    let mlp = has(&["norm2", "mlp.fc1", "mlp.fc2"]);
    BlockKind::new(attention, mlp).unwrap_or(BlockKind::Whole)
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
