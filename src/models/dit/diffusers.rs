//! The diffusers layout of DiT: read into the reference's names, and written from them.
//!
//! `DiTTransformer2DModel` keeps q, k and v apart, gives every block a copy of the embedders, and
//! recomputes the position table. The name pairs below are those of the two public implementations.

use std::path::Path;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::DitConfig;
use crate::models::position_table;
use crate::state::{Array, Misfits, Stored, Tensors, WeightsError};

/// What is wrong with files in this layout without their `config.json`.
pub(crate) const DIFFUSERS_ALONE: &str =
    "it has the names of diffusers' DiT, whose config.json must lie beside it";

/// How a folder in this layout is used, for its card.
pub(crate) const DIFFUSERS_USE: &str = "```python\nfrom diffusers import DiTTransformer2DModel\nmodel = DiTTransformer2DModel.from_pretrained(\"THIS_FOLDER\")\nfor block in model.transformer_blocks:\n    block.norm1.emb.time_proj.downscale_freq_shift = 0\n```\n\nThe loop is part of it: diffusers spaces the frequencies of timesteps otherwise than DiT does, which changes the predicted\nnoise by some percent (of a trained model up to 3.6%). With it the outputs are those of the original code.";

/// Names outside the blocks: the reference's, and diffusers'.
const ENDS: [(&str, &str); 6] = [
    ("x_embedder.proj.weight", "pos_embed.proj.weight"),
    ("x_embedder.proj.bias", "pos_embed.proj.bias"),
    ("final_layer.adaLN_modulation.1.weight", "proj_out_1.weight"),
    ("final_layer.adaLN_modulation.1.bias", "proj_out_1.bias"),
    ("final_layer.linear.weight", "proj_out_2.weight"),
    ("final_layer.linear.bias", "proj_out_2.bias"),
];

/// Embedders that diffusers copies into every block, after `transformer_blocks.N.norm1.emb.`.
#[rustfmt::skip]
const EMBEDDERS: [(&str, &str); 5] = [
    ("t_embedder.mlp.0.weight",            "timestep_embedder.linear_1.weight"),
    ("t_embedder.mlp.0.bias",              "timestep_embedder.linear_1.bias"),
    ("t_embedder.mlp.2.weight",            "timestep_embedder.linear_2.weight"),
    ("t_embedder.mlp.2.bias",              "timestep_embedder.linear_2.bias"),
    ("y_embedder.embedding_table.weight",  "class_embedder.embedding_table.weight"),
];

/// Names within a block, after `blocks.N.` and `transformer_blocks.N.`.
const BLOCK: [(&str, &str); 8] = [
    ("adaLN_modulation.1.weight", "norm1.linear.weight"),
    ("adaLN_modulation.1.bias", "norm1.linear.bias"),
    ("attn.proj.weight", "attn1.to_out.0.weight"),
    ("attn.proj.bias", "attn1.to_out.0.bias"),
    ("mlp.fc1.weight", "ff.net.0.proj.weight"),
    ("mlp.fc1.bias", "ff.net.0.proj.bias"),
    ("mlp.fc2.weight", "ff.net.2.weight"),
    ("mlp.fc2.bias", "ff.net.2.bias"),
];

/// Tensors that the reference stacks as `attn.qkv`.
const STACKED: [&str; 3] = ["to_q", "to_k", "to_v"];

/// Name of the fixed position table, which diffusers does not store.
const POSITIONS: &str = "pos_embed";

/// Largest distance of a stored position table from the computed one, in units of its type's
/// precision near 1: a cosine computed elsewhere may be rounded the other way.
const ROUNDING: f32 = 2.0;

/// Whether tensors are named as diffusers names DiT's.
pub(crate) fn is_diffusers(tensors: &Tensors) -> bool {
    let mut names = tensors.iter().map(|(name, _)| name);
    names.any(|name| name.starts_with("transformer_blocks."))
}

/// The fields read from a `DiTTransformer2DModel`'s `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::models) struct DiffusersConfig {
    pub num_attention_heads: usize,
    pub attention_head_dim: usize,
    pub in_channels: usize,
    pub out_channels: usize,
    pub num_layers: usize,
    pub sample_size: usize,
    pub patch_size: usize,
    pub num_embeds_ada_norm: usize,
}

impl DiffusersConfig {
    /// The configuration that a `config.json` holds; None if it is of another kind of model.
    pub(in crate::models) fn of(json: &Value) -> Option<Result<Self, String>> {
        let class = json.get("_class_name")?.as_str()?;
        // DiT had the second class name before it got its own.
        if !["DiTTransformer2DModel", "Transformer2DModel"].contains(&class) {
            return None;
        }
        let expected = [
            ("norm_type", Value::from("ada_norm_zero")),
            ("activation_fn", Value::from("gelu-approximate")),
            ("attention_bias", Value::from(true)),
            ("norm_elementwise_affine", Value::from(false)),
        ];
        for (key, expected) in expected {
            if let Some(found) = json.get(key)
                && *found != expected
            {
                return Some(Err(format!("`{key}` is {found}, and DiT has {expected}")));
            }
        }
        Some(serde_json::from_value(json.clone()).map_err(|error| error.to_string()))
    }

    /// The configuration of the same model here.
    pub(in crate::models) fn dit(&self) -> Result<DitConfig, String> {
        let width = self
            .num_attention_heads
            .checked_mul(self.attention_head_dim);
        let learn_sigma = match self.out_channels.checked_div(self.in_channels) {
            Some(1) => false,
            Some(2) => true,
            _ => {
                return Err(format!(
                    "out_channels {} is neither in_channels {} nor twice as many",
                    self.out_channels, self.in_channels
                ));
            }
        };
        let config = DitConfig {
            input_size: self.sample_size,
            patch_size: self.patch_size,
            channels: self.in_channels,
            width: width.ok_or("its width can't be addressed")?,
            depth: self.num_layers,
            heads: self.num_attention_heads,
            mlp_ratio: 4.0, // diffusers' blocks have no other
            classes: self.num_embeds_ada_norm,
            learn_sigma,
            blocks: Vec::new(),
            widths: None,
        };
        config.problem().map_or(Ok(config), Err)
    }

    fn new(config: &DitConfig) -> Self {
        Self {
            num_attention_heads: config.heads,
            attention_head_dim: config.width / config.heads,
            in_channels: config.channels,
            out_channels: config.out_channels(),
            num_layers: config.depth,
            sample_size: config.input_size,
            patch_size: config.patch_size,
            num_embeds_ada_norm: config.classes,
        }
    }
}

/// The `config.json` with which diffusers rebuilds the model.
pub(in crate::models) fn diffusers_config(config: &DitConfig) -> Value {
    let mut json = Map::from_iter([
        (
            "_class_name".to_owned(),
            Value::from("DiTTransformer2DModel"),
        ),
        ("activation_fn".to_owned(), Value::from("gelu-approximate")),
        ("attention_bias".to_owned(), Value::from(true)),
        ("norm_elementwise_affine".to_owned(), Value::from(false)),
        // The epsilon of the norm before the MLP: diffusers' default is 1e-5, DiT's norms have
        // 1e-6.
        ("norm_eps".to_owned(), Value::from(1e-6)),
        ("norm_type".to_owned(), Value::from("ada_norm_zero")),
    ]);
    if let Ok(Value::Object(sizes)) = serde_json::to_value(DiffusersConfig::new(config)) {
        json.extend(sizes);
    }
    Value::Object(json)
}

/// Reads diffusers' tensors as the reference's. The configuration must have sizes that can be
/// built.
///
/// # Errors
/// When names are missing or surplus, or a block's embedders differ from the first block's; when a
/// file can't be read.
pub(in crate::models) fn from_diffusers(
    mut found: Tensors,
    config: &DitConfig,
    path: &Path,
) -> Result<Tensors, WeightsError> {
    // No tensor has the number of patches along a side in its shape.
    let (side, depth) = (config.input_size / config.patch_size, config.depth);
    let mut misfits = Misfits::default();
    let mut tensors = Tensors::default();
    let mut take = |name: String, misfits: &mut Misfits| {
        let tensor = found.remove(&name);
        if tensor.is_none() {
            misfits.missing(&name, None);
        }
        tensor
    };
    for (ours, theirs) in ENDS {
        if let Some(tensor) = take(theirs.to_owned(), &mut misfits) {
            tensors.insert(ours, tensor);
        }
    }
    for layer in 0..depth {
        let theirs = format!("transformer_blocks.{layer}");
        for (ours, name) in EMBEDDERS {
            let name = format!("{theirs}.norm1.emb.{name}");
            let Some(tensor) = take(name.clone(), &mut misfits) else {
                continue;
            };
            match tensors.get(ours) {
                None => tensors.insert(ours, tensor),
                Some(first) => {
                    if first.shape() != tensor.shape() || first.bytes()? != tensor.bytes()? {
                        misfits.other(format!(
                            "{name} differs from the first block's, and DiT has one for all"
                        ));
                    }
                }
            }
        }
        for (ours, name) in BLOCK {
            if let Some(tensor) = take(format!("{theirs}.{name}"), &mut misfits) {
                tensors.insert(format!("blocks.{layer}.{ours}"), tensor);
            }
        }
        for kind in ["weight", "bias"] {
            let parts: Vec<Stored> = STACKED
                .into_iter()
                .filter_map(|part| take(format!("{theirs}.attn1.{part}.{kind}"), &mut misfits))
                .collect();
            if parts.len() < STACKED.len() {
                continue;
            }
            match Stored::stack(&parts.iter().collect::<Vec<_>>()) {
                Some(stacked) => tensors.insert(format!("blocks.{layer}.attn.qkv.{kind}"), stacked),
                None => misfits.other(format!(
                    "{theirs}.attn1: to_q, to_k and to_v differ in shape or type"
                )),
            }
        }
    }
    for (name, tensor) in found.iter() {
        misfits.surplus(name, tensor.shape());
    }
    misfits.into_result(path, "the diffusers layout of DiT")?;
    // The position table is made only once all other tensors have the configured sizes: a small
    // file could ask for a table of any size.
    let mut misfits = Misfits::default();
    let expected = config.tensors();
    let others = expected.iter().filter(|(name, _)| name != POSITIONS);
    misfits.compare(
        &tensors,
        others.map(|(name, shape)| (name.as_str(), shape.as_slice())),
    );
    misfits.into_result(path, &config.to_string())?;
    if let Some(patches) = tensors.get("x_embedder.proj.weight") {
        let table = position_table(config.width, side);
        let table = Array::new([1, side * side, config.width], table);
        let table = Stored::values(table).rounded(patches.dtype())?;
        tensors.insert(POSITIONS, table);
    }
    Ok(tensors)
}

/// The reference's tensors under diffusers' names.
///
/// # Errors
/// When the position table is not the standard one, which diffusers would put in its place; when a
/// file can't be read.
pub(in crate::models) fn to_diffusers(
    mut tensors: Tensors,
    config: &DitConfig,
    path: &Path,
) -> Result<Tensors, WeightsError> {
    let damaged = |problem: String| WeightsError::Model {
        path: path.to_owned(),
        problem,
    };
    if !config.blocks.is_empty() {
        return Err(damaged(
            "diffusers' DiT has one whole block after another, and this one has not; keep the reference's layout".into(),
        ));
    }
    let mut take = |name: &str| {
        let tensor = tensors.remove(name);
        tensor.ok_or_else(|| damaged(format!("`{name}` is missing")))
    };
    let positions = take(POSITIONS)?;
    let precision = match positions.dtype() {
        Dtype::F16 => half::f16::EPSILON.to_f32(),
        Dtype::BF16 => half::bf16::EPSILON.to_f32(),
        _ => f32::EPSILON,
    };
    let table = position_table(config.width, config.input_size / config.patch_size);
    let stored = positions.read()?.data;
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= ROUNDING * precision;
    if !stored.iter().zip(&table).all(near) {
        return Err(damaged(
            "its position table is not the standard one, which is the only one the diffusers layout has; keep the reference's layout".into(),
        ));
    }
    if config.widths.is_some() {
        return Err(damaged(
            "diffusers' DiT is as wide in all blocks and in its condition, and this one is not; keep the reference's layout".into(),
        ));
    }
    if config.hidden() != 4 * config.width {
        return Err(damaged(
            "diffusers' DiT has an MLP four times as wide as the trunk".into(),
        ));
    }
    let mut named = Tensors::default();
    for (ours, theirs) in ENDS {
        named.insert(theirs, take(ours)?);
    }
    let embedders = EMBEDDERS.map(|(ours, theirs)| (take(ours), theirs));
    for (tensor, theirs) in embedders {
        let tensor = tensor?;
        for layer in 0..config.depth {
            let name = format!("transformer_blocks.{layer}.norm1.emb.{theirs}");
            named.insert(name, tensor.clone());
        }
    }
    for layer in 0..config.depth {
        let theirs = format!("transformer_blocks.{layer}");
        for (ours, name) in BLOCK {
            named.insert(
                format!("{theirs}.{name}"),
                take(&format!("blocks.{layer}.{ours}"))?,
            );
        }
        for kind in ["weight", "bias"] {
            let name = format!("blocks.{layer}.attn.qkv.{kind}");
            let stacked = take(&name)?;
            for (index, part) in STACKED.into_iter().enumerate() {
                let rows = stacked.rows(index * config.width, config.width);
                let rows = rows.ok_or_else(|| damaged(format!("`{name}` can't be divided")))?;
                named.insert(format!("{theirs}.attn1.{part}.{kind}"), rows);
            }
        }
    }
    Ok(named)
}
