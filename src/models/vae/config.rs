//! Sizes of an autoencoder, from configuration files or weights.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::models::convolutional::ATTENTION_NAMES;
use crate::state::StateDict;

/// Sizes of a [`Vae`](super::Vae), under diffusers' names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VaeConfig {
    /// Channels of an encoded image.
    pub in_channels: usize,
    /// Channels of a decoded image.
    pub out_channels: usize,
    /// Widths of the levels, from the image inwards; each level halves the sides of the one before.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks per level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Groups of every normalisation.
    pub norm_num_groups: usize,
    /// Whether each residual block of the encoder's last level has an attention after it, as in
    /// KL-16.
    #[serde(default)]
    pub encoder_attention: bool,
    /// Factor from latents to the inputs of a diffusion model.
    #[serde(default = "stable_diffusion_scaling")]
    pub scaling_factor: f64,
}

/// 1 over the standard deviation of Stable Diffusion's latents (arXiv 2112.10752, appendix G).
fn stable_diffusion_scaling() -> f64 {
    0.18215
}

/// The same of MAR's KL-16 (Li et al., arXiv 2406.11838).
const KL16_SCALING: f64 = 0.2325;

impl std::fmt::Display for VaeConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "autoencoder, widths {:?}, {} blocks a level{}, {} latent channels, a factor of {}",
            self.block_out_channels,
            self.layers_per_block,
            match self.encoder_attention {
                true => " (with attention on the encoder's last)",
                false => "",
            },
            self.latent_channels,
            self.factor()
        )
    }
}

impl VaeConfig {
    /// Ratio of an image's side to its latent's.
    pub fn factor(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    /// Why no model can have these sizes, if so.
    pub fn problem(&self) -> Option<String> {
        let levels = self.block_out_channels.len();
        let bounded = [
            ("in_channels", self.in_channels, 1024),
            ("out_channels", self.out_channels, 1024),
            ("layers_per_block", self.layers_per_block, 64),
            ("latent_channels", self.latent_channels, 1024),
            ("norm_num_groups", self.norm_num_groups, 65_536),
            ("the number of block_out_channels", levels, 8),
        ];
        let widths = self.block_out_channels.iter();
        let widths = widths.map(|width| ("a width of block_out_channels", *width, 65_536));
        for (name, value, most) in bounded.into_iter().chain(widths) {
            if value == 0 || value > most {
                return Some(format!("{name} is {value}, which must lie in 1..={most}"));
            }
        }
        let groups = self.norm_num_groups;
        let uneven = |width: &&usize| !width.is_multiple_of(groups);
        if let Some(width) = self.block_out_channels.iter().find(uneven) {
            return Some(format!(
                "the width {width} of block_out_channels is not a multiple of norm_num_groups {groups}"
            ));
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor > 0.0) {
            return Some(format!(
                "scaling_factor is {}, which must be above 0",
                self.scaling_factor
            ));
        }
        None
    }

    /// A lower bound on the number of parameters: the second convolution of each residual block in
    /// encoder and decoder.
    pub(crate) fn least_parameters(&self) -> usize {
        let widths = self.block_out_channels.iter();
        widths.fold(0usize, |sum, &width| {
            let block = width.saturating_mul(width).saturating_mul(9);
            sum.saturating_add(block.saturating_mul(2 * self.layers_per_block))
        })
    }

    /// Reads diffusers' `config.json`. Missing values have diffusers' defaults; values without
    /// effect on the computation are ignored.
    ///
    /// # Errors
    /// Every value that asks for an unsupported computation, or a size no model can have, one per
    /// line.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let file: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if !file.is_object() {
            return Err("the configuration is not a table of names and values".to_owned());
        }
        let mut problems = Vec::new();
        let mut config = Self {
            in_channels: read(&file, "in_channels", 3, &mut problems),
            out_channels: read(&file, "out_channels", 3, &mut problems),
            block_out_channels: read(&file, "block_out_channels", vec![64], &mut problems),
            layers_per_block: read(&file, "layers_per_block", 1, &mut problems),
            latent_channels: read(&file, "latent_channels", 4, &mut problems),
            norm_num_groups: read(&file, "norm_num_groups", 32, &mut problems),
            encoder_attention: false,
            scaling_factor: read(
                &file,
                "scaling_factor",
                stable_diffusion_scaling(),
                &mut problems,
            ),
        };
        let mut only = |name: &str, expected: Value| {
            let found = &file[name];
            // JSON's null is Python's None, which counts as missing.
            if !found.is_null() && *found != expected {
                problems.push(format!("{name} is {found}; only {expected} is supported"));
            }
        };
        let levels = config.block_out_channels.len();
        let mut kinds = vec!["DownEncoderBlock2D"; levels];
        let without: Value = kinds.clone().into();
        if let Some(last) = kinds.last_mut() {
            *last = "AttnDownEncoderBlock2D";
        }
        match file["down_block_types"] == Value::from(kinds) {
            true => config.encoder_attention = true,
            false => only("down_block_types", without),
        }
        only("up_block_types", vec!["UpDecoderBlock2D"; levels].into());
        only("act_fn", "silu".into());
        for name in [
            "use_quant_conv",
            "use_post_quant_conv",
            "mid_block_add_attention",
        ] {
            only(name, true.into());
        }
        for name in ["shift_factor", "latents_mean", "latents_std"] {
            only(name, Value::Null);
        }
        problems.extend(config.problem());
        match problems.is_empty() {
            true => Ok(config),
            false => Err(problems.join("\n")),
        }
    }

    /// Infers the sizes from the shapes of weights. Two values don't show in them: the groups are
    /// 32, and the factor is that of the published model of this form, KL-16's 0.2325 with
    /// attention on the encoder's last level and Stable Diffusion's 0.18215 without.
    ///
    /// # Errors
    /// The name of a weight that is missing or has an unexpected shape.
    pub fn infer(state: &StateDict) -> Result<Self, String> {
        let sides = |name: &str| -> Result<[usize; 2], String> {
            let array = state
                .get(name)
                .ok_or_else(|| format!("`{name}` is missing"))?;
            match array.shape[..] {
                [output, input, _, _] => Ok([output, input]),
                _ => Err(format!(
                    "`{name}` has the shape {:?}, expected that of a convolution",
                    array.shape
                )),
            }
        };
        let [_, in_channels] = sides("encoder.conv_in.weight")?;
        let [out_channels, _] = sides("decoder.conv_out.weight")?;
        let [latent_channels, _] = sides("post_quant_conv.weight")?;
        let first = |level: usize, layer: usize| {
            format!("encoder.down_blocks.{level}.resnets.{layer}.conv1.weight")
        };
        let levels = (0..).take_while(|level| state.contains_key(&first(*level, 0)));
        let block_out_channels = levels
            .map(|level| Ok(sides(&first(level, 0))?[0]))
            .collect::<Result<Vec<_>, String>>()?;
        if block_out_channels.is_empty() {
            return Err(format!("`{}` is missing", first(0, 0)));
        }
        let layers = (0..).take_while(|layer| state.contains_key(&first(0, *layer)));
        let last = block_out_channels.len() - 1;
        let attention = format!("encoder.down_blocks.{last}.attentions.0.to_q.weight");
        let encoder_attention = state.contains_key(&attention);
        Ok(Self {
            in_channels,
            out_channels,
            block_out_channels,
            layers_per_block: layers.count(),
            latent_channels,
            norm_num_groups: 32,
            encoder_attention,
            scaling_factor: match encoder_attention {
                true => KL16_SCALING,
                false => stable_diffusion_scaling(),
            },
        })
    }
}

/// A value of a configuration, or its default; a value of another type is a problem.
fn read<T: serde::de::DeserializeOwned>(
    file: &Value,
    name: &str,
    default: T,
    problems: &mut Vec<String>,
) -> T {
    match &file[name] {
        Value::Null => default,
        value => T::deserialize(value).unwrap_or_else(|error| {
            problems.push(format!("{name} is {value}: {error}"));
            default
        }),
    }
}

/// Renames and reshapes the tensors of other files to diffusers' current form: those of the
/// original code of latent diffusion, which MAR's KL-16 has too, and the attention of older files
/// of diffusers. Weights of attention that are stored as 1 x 1 convolutions, `[C, C, 1, 1]`, become
/// `[C, C]`.
///
/// An existing name is not overwritten; the other tensor then keeps its name, and
/// [`assign`](crate::state::assign) refuses it.
pub fn rename_to_diffusers(state: &mut StateDict) {
    let level = |level: &usize| format!("decoder.up.{level}.block.0.conv1.weight");
    let levels = (0..)
        .take_while(|at| state.contains_key(&level(at)))
        .count();
    let renamed = |name: &str| -> Option<String> {
        let (side, _) = name.split_once('.')?;
        matches!(side, "encoder" | "decoder").then(|| in_diffusers(name, levels))
    };
    let names: Vec<(String, String)> = state
        .keys()
        .filter_map(|name| Some((name.clone(), renamed(name)?)))
        .collect();
    for (old, new) in names {
        if old != new && state.contains_key(&new) {
            continue;
        }
        if let Some(mut array) = state.remove(&old) {
            if let ([output, input, 1, 1], true) = (&array.shape[..], new.contains(ATTENTIONS)) {
                array.shape = vec![*output, *input];
            }
            state.insert(new, array);
        }
    }
}

/// The list of attentions in a name of diffusers.
const ATTENTIONS: &str = ".attentions.";

/// A tensor's name in diffusers, of an autoencoder with so many levels, which the original code
/// counts from the image in the decoder too.
fn in_diffusers(name: &str, levels: usize) -> String {
    let mut words = Vec::new();
    let (mut upwards, mut attends) = (false, false);
    for word in name.split('.') {
        let level = word.parse::<usize>().ok().filter(|_| upwards);
        upwards = word == "up";
        let word = match (word, level) {
            (_, Some(level)) if level < levels => (levels - 1 - level).to_string(),
            ("down", _) => "down_blocks".to_owned(),
            ("up", _) => "up_blocks".to_owned(),
            ("block", _) => "resnets".to_owned(),
            ("attn", _) => "attentions".to_owned(),
            ("mid", _) => "mid_block".to_owned(),
            ("block_1", _) => "resnets.0".to_owned(),
            ("block_2", _) => "resnets.1".to_owned(),
            ("attn_1", _) => "attentions.0".to_owned(),
            ("nin_shortcut", _) => "conv_shortcut".to_owned(),
            ("downsample", _) => "downsamplers.0".to_owned(),
            ("upsample", _) => "upsamplers.0".to_owned(),
            ("norm_out", _) => "conv_norm_out".to_owned(),
            ("norm", _) if attends => "group_norm".to_owned(),
            ("q", _) if attends => "to_q".to_owned(),
            ("k", _) if attends => "to_k".to_owned(),
            ("v", _) if attends => "to_v".to_owned(),
            ("proj_out", _) if attends => "to_out.0".to_owned(),
            (word, _) => match ATTENTION_NAMES
                .iter()
                .find(|(old, _)| attends && word == *old)
            {
                Some((_, newer)) => (*newer).to_owned(),
                None => word.to_owned(),
            },
        };
        attends |= word.starts_with("attentions");
        words.push(word);
    }
    words.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Array;

    #[test]
    fn every_value_that_would_change_the_computation_is_refused_at_once() {
        let error = VaeConfig::from_json(
            r#"{"act_fn": "gelu", "use_quant_conv": false, "use_post_quant_conv": false,
                "mid_block_add_attention": false, "shift_factor": 0.1159, "latents_mean": [0.1],
                "latents_std": [1.0], "down_block_types": ["SkipDownBlock2D"], "up_block_types": [],
                "latent_channels": 0, "layers_per_block": "two", "sample_size": 7, "anything": null}"#,
        )
        .unwrap_err();
        let names: Vec<&str> = error
            .lines()
            .map(|line| line.split_once(" is ").unwrap().0)
            .collect();
        assert_eq!(
            names,
            [
                "layers_per_block",
                "down_block_types",
                "up_block_types",
                "act_fn",
                "use_quant_conv",
                "use_post_quant_conv",
                "mid_block_add_attention",
                "shift_factor",
                "latents_mean",
                "latents_std",
                "latent_channels",
            ],
            "{error}"
        );
        assert!(VaeConfig::from_json("[1]").is_err());
        assert!(VaeConfig::from_json("{").is_err());
    }

    #[test]
    fn what_is_missing_has_diffusers_default() {
        let config = VaeConfig::from_json(r#"{"scaling_factor": null}"#).unwrap();
        assert_eq!(config.block_out_channels, [64]);
        assert_eq!((config.layers_per_block, config.norm_num_groups), (1, 32));
        assert_eq!((config.scaling_factor, config.factor()), (0.18215, 1));
    }

    #[test]
    fn sizes_out_of_range_are_named() {
        let good = VaeConfig::from_json("{}").unwrap();
        let broken = |change: fn(&mut VaeConfig)| {
            let mut config = good.clone();
            change(&mut config);
            config.problem().unwrap()
        };
        assert!(broken(|config| config.in_channels = 0).contains("in_channels is 0"));
        assert!(
            broken(|config| config.block_out_channels.clear()).contains("block_out_channels is 0")
        );
        assert!(broken(|config| config.block_out_channels[0] = 1 << 20).contains("1048576"));
        assert!(broken(|config| config.norm_num_groups = 48).contains("norm_num_groups 48"));
        assert!(
            broken(|config| config.scaling_factor = f64::NAN).contains("scaling_factor is NaN")
        );
    }

    #[test]
    fn older_names_and_shapes_of_attention_become_todays() {
        let array = |value: f32, shape: &[usize]| Array::new(shape, vec![value; 4]);
        let mut state = StateDict::new();
        let mut put = |name: &str, value, shape: &[usize]| {
            state.insert(name.to_owned(), array(value, shape));
        };
        put(
            "encoder.mid_block.attentions.0.query.weight",
            1.0,
            &[2, 2, 1, 1],
        );
        put(
            "encoder.mid_block.attentions.0.proj_attn.weight",
            2.0,
            &[2, 2],
        );
        put(
            "encoder.mid_block.attentions.0.to_k.weight",
            3.0,
            &[2, 2, 1, 1],
        );
        put(
            "encoder.mid_block.attentions.0.group_norm.weight",
            4.0,
            &[4],
        );
        put("decoder.mid_block.attentions.0.value.bias", 5.0, &[4]);
        // With both names present, both tensors are kept.
        put("decoder.mid_block.attentions.0.query.bias", 6.0, &[4]);
        put("decoder.mid_block.attentions.0.to_q.bias", 7.0, &[4]);
        put("quant_conv.weight", 8.0, &[2, 2, 1, 1]);
        rename_to_diffusers(&mut state);
        let found: Vec<(&str, f32, &[usize])> = state
            .iter()
            .map(|(name, array)| (name.as_str(), array.data[0], &array.shape[..]))
            .collect();
        assert_eq!(
            found,
            [
                ("decoder.mid_block.attentions.0.query.bias", 6.0, &[4][..]),
                ("decoder.mid_block.attentions.0.to_q.bias", 7.0, &[4]),
                ("decoder.mid_block.attentions.0.to_v.bias", 5.0, &[4]),
                (
                    "encoder.mid_block.attentions.0.group_norm.weight",
                    4.0,
                    &[4]
                ),
                ("encoder.mid_block.attentions.0.to_k.weight", 3.0, &[2, 2]),
                (
                    "encoder.mid_block.attentions.0.to_out.0.weight",
                    2.0,
                    &[2, 2]
                ),
                ("encoder.mid_block.attentions.0.to_q.weight", 1.0, &[2, 2]),
                ("quant_conv.weight", 8.0, &[2, 2, 1, 1]),
            ]
        );
    }

    #[test]
    fn attention_on_the_encoders_last_level_is_known() {
        let read = |kinds: &str| {
            VaeConfig::from_json(&format!(
                r#"{{"block_out_channels": [32, 64], "down_block_types": {kinds},
                    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"]}}"#
            ))
        };
        let attention = |kinds: &str| read(kinds).map(|config| config.encoder_attention);
        let plain = r#"["DownEncoderBlock2D", "DownEncoderBlock2D"]"#;
        assert_eq!(attention(plain), Ok(false));
        let last = r#"["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]"#;
        assert_eq!(attention(last), Ok(true));
        let first = r#"["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]"#;
        assert!(attention(first).is_err());
    }

    #[test]
    fn weights_that_are_no_autoencoder_say_what_is_missing() {
        let error = VaeConfig::infer(&StateDict::new()).unwrap_err();
        assert!(error.contains("encoder.conv_in.weight"), "{error}");
        let mut state = StateDict::new();
        state.insert(
            "encoder.conv_in.weight".into(),
            Array::new([2], vec![0.0; 2]),
        );
        let error = VaeConfig::infer(&state).unwrap_err();
        assert!(error.contains("the shape [2]"), "{error}");
    }
}
