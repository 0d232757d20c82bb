//! The autoencoder against diffusers' `AutoencoderKL`, group `vae_kl_f8`, and against MAR's KL-16,
//! group `vae_kl16_mar`.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Tensor, backend::Backend};
use tinyfusion::models::vae::{Posterior, Vae, VaeConfig, rename_to_diffusers};
use tinyfusion::ops::FusedOps;
use tinyfusion::state::{ParameterName, StateDict, assign, names};

use crate::compare::{Largest, values};
use crate::fixture::{File, Group, Values, f64_of, usize_of, usizes_of};

fn autoencoder<B: FusedOps>(config: &VaeConfig, state: &StateDict) -> Vae<B> {
    let zeros = Vae::zeros(config, &B::Device::default());
    assign(zeros, state, Path::new("fixture"), "the fixture's model").unwrap()
}

fn configuration(group: &Group) -> VaeConfig {
    let text = std::fs::read_to_string(group.path.join("vae/config.json")).unwrap();
    let config = VaeConfig::from_json(&text).unwrap();
    let stated = &group.case["config"];
    assert_eq!(
        config.block_out_channels,
        usizes_of(&stated["block_out_channels"])
    );
    for (name, value) in [
        ("norm_num_groups", config.norm_num_groups),
        ("layers_per_block", config.layers_per_block),
        ("latent_channels", config.latent_channels),
    ] {
        assert_eq!(value, usize_of(&stated[name]), "{name}");
    }
    assert_eq!(config.scaling_factor, f64_of(&group.case["scaling_factor"]));
    config
}

pub fn vae_kl_f8<B: FusedOps>(slack: f64) {
    let group = Group::open("vae_kl_f8");
    let config = configuration(&group);
    let file = group.file("io.safetensors");
    let rule = Largest {
        tolerance: f64_of(&group.case["tolerance"]["all"]) * slack,
    };
    let state = group.state("vae/diffusion_pytorch_model.safetensors");
    let mut older = group.state("vae_deprecated_attn.safetensors");
    assert_ne!(older, state);
    rename_to_diffusers(&mut older);
    assert_eq!(older, state, "the same weights under today's names");

    let model = autoencoder::<B>(&config, &state);
    images(&group, &model, &config, &rule);
    for size in group.case["sizes"].as_object().unwrap().keys() {
        let key = |name: &str| format!("{size}.{name}");
        let latents = file.get(&key("latent_scaled")).tensor::<B, 4>() / config.scaling_factor;
        pixels(&file, size, model.decode(latents));
    }
    modules(&model, &file, &rule);

    clamped::<B>(&file, &rule);
}

/// MAR's: the same under the original names, with attention on the encoder's last level.
pub fn vae_kl16_mar<B: FusedOps>(slack: f64) {
    let group = Group::open("vae_kl16_mar");
    let rule = Largest {
        tolerance: f64_of(&group.case["tolerance"]["all"]) * slack,
    };
    let mut files = group.case["files"].as_object().unwrap().keys();
    let checkpoint = files.find(|name| name.ends_with(".ckpt")).unwrap();
    let path = group.path.join(checkpoint);
    let (tensors, _) = tinyfusion::weights::open_weights(&path).unwrap();
    let mut state = tensors.read_all().unwrap();
    rename_to_diffusers(&mut state);
    let config = VaeConfig {
        norm_num_groups: usize_of(&group.case["config"]["num_groups"]),
        ..VaeConfig::infer(&state).unwrap()
    };
    assert_eq!(config, kl16(&group, "config"));
    let model = autoencoder::<B>(&config, &state);
    images(&group, &model, &config, &rule);
    let file = group.file("io.safetensors");
    for size in group.case["sizes"].as_object().unwrap().keys() {
        // As for the cache of mirrored pictures.
        let key = format!("{size}.moments_flip");
        let x: Tensor<B, 4> = file.get(&format!("{size}.x")).tensor();
        let moments = model.quant_conv.forward(model.encoder.forward(x.flip([3])));
        rule.tensor(&key, moments, file.get(&key));
    }
    original_modules(&model, &file, &rule);
    clamped::<B>(&file, &rule);

    // Names and shapes of the real one.
    let text = std::fs::read_to_string(group.path.join("kl16_zoo.json")).unwrap();
    let zoo: serde_json::Value = serde_json::from_str(&text).unwrap();
    let empty = |shape| tinyfusion::state::Array {
        shape: usizes_of(shape),
        data: Vec::new(),
    };
    let keys = zoo["keys"].as_object().unwrap().iter();
    let mut real: StateDict = keys
        .map(|(key, shape)| (key.clone(), empty(shape)))
        .collect();
    rename_to_diffusers(&mut real);
    let config = VaeConfig::infer(&real).unwrap();
    assert_eq!(config, kl16(&group, "real_config"));
    let parameters = parameters::<B>(&config, &zoo);
    assert_eq!(parameters.len(), real.len());
    for parameter in parameters {
        let found = real.get(&parameter.name).map(|array| &array.shape);
        assert_eq!(found, Some(&parameter.shape), "{}", parameter.name);
    }
}

/// A configuration of MAR's, as this program says it.
fn kl16(group: &Group, which: &str) -> VaeConfig {
    let stated = &group.case[which];
    let width = usize_of(&stated["ch"]);
    let widths = usizes_of(&stated["ch_mult"]).into_iter();
    VaeConfig {
        in_channels: 3,
        out_channels: 3,
        block_out_channels: widths.map(|times| times * width).collect(),
        layers_per_block: usize_of(&stated["num_res_blocks"]),
        latent_channels: usize_of(&stated["embed_dim"]),
        norm_num_groups: usize_of(&stated["num_groups"]),
        encoder_attention: true,
        scaling_factor: f64_of(&group.case["scaling_factor"]),
    }
}

/// Images of every size, to latents and back.
fn images<B: FusedOps>(group: &Group, model: &Vae<B>, config: &VaeConfig, rule: &Largest) {
    let file = group.file("io.safetensors");
    for (size, sides) in group.case["sizes"].as_object().unwrap() {
        let key = |name: &str| format!("{size}.{name}");
        let check = |name: &str, actual: Tensor<B, 4>| {
            rule.tensor(&key(name), actual, file.get(&key(name)));
        };
        let x = file.get(&key("x"));
        assert_eq!(x.shape[2..], usizes_of(sides)[..]);
        let x: Tensor<B, 4> = x.tensor();
        check(
            "moments",
            model.quant_conv.forward(model.encoder.forward(x.clone())),
        );
        let posterior = model.encode(x.clone());
        check("mean", posterior.mean.clone());
        check("logvar", posterior.log_variance.clone());
        check("std", posterior.std());
        let sample = posterior.sample(file.get(&key("noise")).tensor());
        check("sample", sample.clone());
        let scaled = sample * config.scaling_factor;
        check("latent_scaled", scaled.clone());
        assert_eq!(
            x.dims()[2] / config.factor(),
            scaled.dims()[2],
            "side of a latent"
        );
        let latents = file.get(&key("latent_scaled")).tensor::<B, 4>() / config.scaling_factor;
        let recon = model.decode(latents.clone());
        check("recon", recon);

        // Each image alone gives the same values: no kernel changes its order of sums.
        let alone = model.encode_in_slices(x, 1);
        rule.tensor(&key("mean"), alone.mean, file.get(&key("mean")));
        check("recon", model.decode_in_slices(latents, 1));
    }
}

fn clamped<B: FusedOps>(file: &File, rule: &Largest) {
    let clamped = Posterior::<B>::of(file.get("clamp.moments").tensor());
    for (name, actual) in [
        ("clamp.mean", clamped.mean.clone()),
        ("clamp.logvar", clamped.log_variance.clone()),
        ("clamp.std", clamped.std()),
    ] {
        rule.tensor(name, actual, file.get(name));
    }
}

/// The 8-bit picture of a reconstruction.
fn pixels<B: Backend>(file: &File, size: &str, recon: Tensor<B, 4>) {
    let images = tinyfusion::images::truncated(recon);
    let expected = file.get(&format!("{size}.recon_uint8"));
    assert_eq!(images.shape().to_vec(), expected.shape);
    let [batch, height, width, channels] = images.shape();
    let exact = file.get(&format!("{size}.recon")).tensor::<B, 4>();
    let exact = values((exact * 127.5 + 128.0).permute([0, 2, 3, 1]));
    assert_eq!(exact.len(), batch * height * width * channels);
    for ((actual, expected), exact) in images.pixels().iter().zip(&expected.data).zip(exact) {
        let off = (f64::from(*actual) - expected).abs();
        // One step, and only where truncation depends on the rounding of the reconstruction, as
        // case.json states.
        let near_a_step = (exact - exact.round()).abs() <= 1e-3;
        assert!(
            off == 0.0 || (off == 1.0 && near_a_step),
            "{size}: {actual} is not {expected} ({exact})"
        );
    }
}

/// The real model's parameters, as many as its description says.
fn parameters<B: FusedOps>(config: &VaeConfig, zoo: &serde_json::Value) -> Vec<ParameterName> {
    let parameters = names::<B, _>(&Vae::<B>::zeros(config, &B::Device::default()));
    let counts = parameters
        .iter()
        .map(|found| found.shape.iter().product::<usize>());
    assert_eq!(counts.sum::<usize>(), usize_of(&zoo["parameters"]));
    parameters
}

/// Outputs of modules on the wide image, each of which must be compared.
struct Spies<'a> {
    file: &'a File,
    rule: &'a Largest,
    left: Vec<&'a str>,
}

impl<'a> Spies<'a> {
    fn of(file: &'a File, rule: &'a Largest) -> Self {
        let left = file.names().filter(|name| name.contains(".spy."));
        let left = left.collect();
        Self { file, rule, left }
    }

    /// Compares a module's output, if it was written down.
    fn check<B: Backend>(&mut self, name: &str, actual: &Tensor<B, 4>) -> bool {
        let key = format!("wide.spy.{name}");
        let known = self.left.contains(&key.as_str());
        if known {
            self.rule.tensor(&key, actual.clone(), self.file.get(&key));
            self.left.retain(|name| *name != key);
        }
        known
    }

    fn all_seen(&self) {
        assert!(self.left.is_empty(), "not compared: {:?}", self.left);
    }
}

/// Every module's output on the wide image.
fn modules<B: FusedOps>(model: &Vae<B>, file: &File, rule: &Largest) {
    let mut spies = Spies::of(file, rule);
    let mut check = |name: &str, actual: &Tensor<B, 4>| {
        assert!(spies.check(name, actual), "{name} was not written down");
    };
    let encoder = &model.encoder;
    let mut x = encoder.conv_in.forward(file.get("wide.x").tensor());
    check("encoder.conv_in", &x);
    for (level, block) in encoder.down_blocks.iter().enumerate() {
        x = block.forward(x);
        check(&format!("encoder.down_blocks.{level}"), &x);
    }
    let first = encoder.mid_block.resnets[0].forward(x.clone());
    check("encoder.mid_block.resnets.0", &first);
    let attended = encoder.mid_block.attentions[0].forward(first);
    check("encoder.mid_block.attentions.0", &attended);
    check("encoder.mid_block", &encoder.mid_block.forward(x));
    let features = encoder.forward(file.get("wide.x").tensor());
    check("encoder", &features);
    check("quant_conv", &model.quant_conv.forward(features));

    let scaling = file.get("wide.sample").tensor::<B, 4>();
    let z = model.post_quant_conv.forward(scaling);
    check("post_quant_conv", &z);
    let decoder = &model.decoder;
    let mut x = decoder.conv_in.forward(z.clone());
    check("decoder.conv_in", &x);
    x = decoder.mid_block.forward(x);
    check("decoder.mid_block", &x);
    for (level, block) in decoder.up_blocks.iter().enumerate() {
        x = block.forward(x);
        check(&format!("decoder.up_blocks.{level}"), &x);
    }
    check("decoder", &decoder.forward(z));
    spies.all_seen();
}

/// The modules' outputs of MAR's, which counts the decoder's levels from the image.
fn original_modules<B: FusedOps>(model: &Vae<B>, file: &File, rule: &Largest) {
    let mut spies = Spies::of(file, rule);
    // Not all of them were written down.
    let mut check = |name: &str, actual: &Tensor<B, 4>| {
        spies.check(name, actual);
    };
    let encoder = &model.encoder;
    let mut x = encoder.conv_in.forward(file.get("wide.x").tensor());
    check("encoder.conv_in", &x);
    for (level, block) in encoder.down_blocks.iter().enumerate() {
        let mut inside = x.clone();
        for (index, (resnet, attention)) in block.resnets.iter().zip(&block.attentions).enumerate()
        {
            inside = attention.forward(resnet.forward(inside));
            check(&format!("encoder.down.{level}.attn.{index}"), &inside);
        }
        x = block.forward(x);
        check(&format!("encoder.down.{level}.downsample"), &x);
    }
    let middle = &encoder.mid_block;
    let attended = middle.attentions[0].forward(middle.resnets[0].forward(x));
    check("encoder.mid.attn_1", &attended);
    check("encoder.mid.block_2", &middle.resnets[1].forward(attended));
    let features = encoder.forward(file.get("wide.x").tensor());
    check("encoder", &features);
    check("quant_conv", &model.quant_conv.forward(features));
    let z = model
        .post_quant_conv
        .forward(file.get("wide.sample").tensor());
    check("post_quant_conv", &z);
    let decoder = &model.decoder;
    let mut x = decoder.conv_in.forward(z.clone());
    check("decoder.conv_in", &x);
    x = decoder.mid_block.forward(x);
    check("decoder.mid.block_2", &x);
    for (index, block) in decoder.up_blocks.iter().enumerate() {
        x = block.forward(x);
        let level = decoder.up_blocks.len() - 1 - index;
        check(&format!("decoder.up.{level}.upsample"), &x);
    }
    check("decoder", &decoder.forward(z));
    spies.all_seen();
}

/// Names, shapes and number of the real model's weights, and the sizes inferred from them.
pub fn vae_zoo<B: FusedOps>(_: f64) {
    let group = Group::open("vae_kl_f8");
    let text = std::fs::read_to_string(group.path.join("vae_zoo.json")).unwrap();
    let zoo: serde_json::Value = serde_json::from_str(&text).unwrap();
    let config = VaeConfig::from_json(&zoo["config"].to_string()).unwrap();
    assert_eq!(config.problem(), None);
    assert_eq!(config.scaling_factor, f64_of(&zoo["scaling_factor"]));
    let parameters = parameters::<B>(&config, &zoo);
    let actual: BTreeMap<String, Vec<usize>> = parameters
        .into_iter()
        .map(|parameter| (parameter.name, parameter.shape))
        .collect();
    let shapes = |keys: &serde_json::Value| -> BTreeMap<String, Vec<usize>> {
        let keys = keys.as_object().unwrap().iter();
        keys.map(|(name, shape)| (name.clone(), usizes_of(shape)))
            .collect()
    };
    let expected = shapes(&zoo["keys"]);
    for (name, shape) in &expected {
        assert_eq!(actual.get(name), Some(shape), "{name}");
    }
    assert_eq!(actual, expected);
    for (key, shape) in shapes(&zoo["keys_attention_only_new_naming"]) {
        assert_eq!(actual.get(&key), Some(&shape), "{key}");
    }

    // Arrays without values: only shapes are checked.
    let state = |shapes: &BTreeMap<String, Vec<usize>>| -> StateDict {
        let array = |shape: &Vec<usize>| tinyfusion::state::Array {
            shape: shape.clone(),
            data: Vec::new(),
        };
        shapes
            .iter()
            .map(|(name, shape)| (name.clone(), array(shape)))
            .collect()
    };
    let complete = state(&expected);
    assert_eq!(VaeConfig::infer(&complete), Ok(config));
    let mut older = state(&shapes(&zoo["keys_attention_only_old_naming"]));
    rename_to_diffusers(&mut older);
    assert!(!older.is_empty());
    for (name, array) in older {
        assert_eq!(Some(&array), complete.get(&name), "{name}");
    }
}

/// Slices keep the order of images; the last slice is smaller than the others.
pub fn vae_odd_slices<B: FusedOps>(slack: f64) {
    let group = Group::open("vae_kl_f8");
    let config = configuration(&group);
    let state = group.state("vae/diffusion_pytorch_model.safetensors");
    let model = autoencoder::<B>(&config, &state);
    let x: Tensor<B, 4> = group.file("io.safetensors").get("wide.x").tensor();
    let x = Tensor::cat(vec![x.clone(), x.clone().neg(), x.mul_scalar(0.5)], 0); // 6 images
    let whole = model.encode(x.clone()).mean;
    let expected = Values {
        shape: whole.dims().to_vec(),
        data: values(whole),
    };
    let rule = Largest {
        // The same sums, which a backend may divide differently.
        tolerance: 1e-6 * slack,
    };
    // Slices of 4 and 2 images; 0 counts as 1.
    for most in [4, 0] {
        let slices = model.encode_in_slices(x.clone(), most).mean;
        rule.tensor("slices", slices, &expected);
    }
}
