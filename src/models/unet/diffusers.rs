//! The `config.json` of diffusers' `UNet2DModel`, read and written. Its tensors have the names used
//! here.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::UnetConfig;
use crate::models::convolutional::ATTENTION_NAMES;
use crate::state::Tensors;

/// How a folder in this layout is used, for its card.
pub(in crate::models) const UNET_USE: &str = "```python\nfrom diffusers import UNet2DModel\nmodel = UNet2DModel.from_pretrained(\"THIS_FOLDER\")\n```";

/// What is wrong with a UNet's file without its configuration, which its tensors do not show.
pub(crate) const UNET_ALONE: &str =
    "it has the names of diffusers' UNet, whose config.json must lie beside it";

/// Whether tensors are named as a UNet's.
pub(crate) fn is_unet(tensors: &Tensors) -> bool {
    ["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"]
        .iter()
        .all(|name| tensors.get(name).is_some())
}

/// Tensors of any version under the names of newer ones.
pub(in crate::models) fn renamed(tensors: &Tensors) -> Tensors {
    let mut renamed = Tensors::default();
    for (name, tensor) in tensors.iter() {
        let newer = ATTENTION_NAMES.iter().find_map(|(old, new)| {
            let (old, new) = (format!(".{old}."), format!(".{new}."));
            name.contains(&old).then(|| name.replace(&old, &new))
        });
        // Of both names the older stays, and is refused.
        let newer = newer.filter(|newer| tensors.get(newer).is_none());
        renamed.insert(newer.unwrap_or_else(|| name.clone()), tensor.clone());
    }
    renamed
}

/// The fields read from a `UNet2DModel`'s `config.json`.
#[derive(Debug, Deserialize)]
struct Fields {
    sample_size: usize,
    in_channels: usize,
    out_channels: usize,
    block_out_channels: Vec<usize>,
    layers_per_block: usize,
    norm_num_groups: usize,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    #[serde(default = "one")]
    downsample_padding: usize,
    #[serde(default)]
    num_class_embeds: Option<usize>,
}

// diffusers' default.
fn one() -> usize {
    1
}

/// The configuration that a `config.json` holds; None if it is of another kind of model.
pub(in crate::models) fn config(json: &Value) -> Option<Result<UnetConfig, String>> {
    (json.get("_class_name")?.as_str()? == "UNet2DModel").then(|| read(json))
}

fn read(json: &Value) -> Result<UnetConfig, String> {
    // What DDPM's UNets have; other forms are other networks.
    let expected = [
        ("act_fn", json!("silu")),
        ("center_input_sample", json!(false)),
        ("flip_sin_to_cos", json!(false)),
        ("freq_shift", json!(1)),
        ("time_embedding_type", json!("positional")),
        ("mid_block_scale_factor", json!(1)),
        ("norm_eps", json!(1e-6)),
        ("resnet_time_scale_shift", json!("default")),
        ("add_attention", json!(true)),
        ("attention_head_dim", Value::Null),
        ("attn_norm_num_groups", Value::Null),
        ("downsample_type", json!("conv")),
        ("upsample_type", json!("conv")),
        ("class_embed_type", Value::Null),
    ];
    // What diffusers takes where these are not said is another network.
    for key in [
        "flip_sin_to_cos",
        "freq_shift",
        "norm_eps",
        "attention_head_dim",
    ] {
        if json.get(key).is_none() {
            return Err(format!(
                "`{key}` is missing, and diffusers' default is not DDPM's"
            ));
        }
    }
    for (key, expected) in expected {
        let same = |found: &Value| match (found.as_f64(), expected.as_f64()) {
            (Some(found), Some(expected)) => found == expected,
            _ => *found == expected,
        };
        if let Some(found) = json.get(key)
            && !same(found)
        {
            return Err(format!(
                "`{key}` is {found}, and DDPM's UNet has {expected}"
            ));
        }
    }
    let fields: Fields = serde_json::from_value(json.clone()).map_err(|error| error.to_string())?;
    if fields.in_channels != fields.out_channels {
        return Err(format!(
            "in_channels {} and out_channels {} differ",
            fields.in_channels, fields.out_channels
        ));
    }
    let attention = |kinds: &[String], of: &str| -> Result<Vec<bool>, String> {
        let kinds = kinds.iter().map(|kind| match kind.as_str() {
            plain if plain == format!("{of}Block2D") => Ok(false),
            with if with == format!("Attn{of}Block2D") => Ok(true),
            other => Err(format!("no block `{other}` is known")),
        });
        kinds.collect()
    };
    let down = attention(&fields.down_block_types, "Down")?;
    let mut up = attention(&fields.up_block_types, "Up")?;
    up.reverse();
    if down != up {
        return Err("it has attention on other levels on the way down than on the way up".into());
    }
    let padded = match fields.downsample_padding {
        0 => false,
        1 => true,
        other => return Err(format!("`downsample_padding` is {other}, expected 0 or 1")),
    };
    let config = UnetConfig {
        input_size: fields.sample_size,
        channels: fields.in_channels,
        // The last row is the null class's.
        classes: fields
            .num_class_embeds
            .map_or(0, |rows| rows.saturating_sub(1)),
        levels: fields.block_out_channels,
        layers: fields.layers_per_block,
        attention: down,
        norm_groups: fields.norm_num_groups,
        padded,
        left: BTreeMap::new(),
    };
    config.problem().map_or(Ok(config), Err)
}

/// The `config.json` with which diffusers rebuilds the model.
///
/// # Errors
/// When it has no word for it.
pub(in crate::models) fn written(config: &UnetConfig) -> Result<Value, String> {
    if !config.left.is_empty() {
        return Err(
            "diffusers' UNet2DModel has levels of one width, and this one's layers are narrower in places; keep this program's layout".into(),
        );
    }
    let kinds = |of: &str, attention: &mut dyn Iterator<Item = bool>| -> Vec<String> {
        let kind = |attends| {
            if attends {
                format!("Attn{of}Block2D")
            } else {
                format!("{of}Block2D")
            }
        };
        attention.map(kind).collect()
    };
    let attention = || config.attention.iter().copied();
    Ok(json!({
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "add_attention": true,
        "attention_head_dim": null,
        "block_out_channels": config.levels,
        "center_input_sample": false,
        "down_block_types": kinds("Down", &mut attention()),
        "downsample_padding": usize::from(config.padded),
        "downsample_type": "conv",
        "flip_sin_to_cos": false,
        "freq_shift": 1,
        "in_channels": config.channels,
        "layers_per_block": config.layers,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": config.norm_groups,
        "num_class_embeds": (config.classes > 0).then_some(config.classes + 1),
        "out_channels": config.channels,
        "resnet_time_scale_shift": "default",
        "sample_size": config.input_size,
        "time_embedding_type": "positional",
        "up_block_types": kinds("Up", &mut attention().rev()),
        "upsample_type": "conv",
    }))
}
