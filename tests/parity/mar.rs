//! MAR against the reference: group `mar_forward`.

use std::sync::Arc;

use burn::tensor::Tensor;
use tinyfusion::models::mar::{Known, Mar, MarConfig, Stack, of_tokens, tokens};
use tinyfusion::models::{Architecture, Denoiser, FillsIn, Prunable};
use tinyfusion::ops::{FusedOps, indices};
use tinyfusion::process::masked::{GuidanceSchedule, MaskedSampler, Masking, Rounds, guided};
use tinyfusion::process::{DiffusionTables, GaussianDiffusion, Noised, Process, respace};
use tinyfusion::state::{StateDict, assign, names};
use tinyfusion::trunk::{Block, BlockHook, Plain, Site};
use tinyfusion::weights::open_weights;

use crate::compare::Largest;
use crate::fixture::{File, Group, Values, dropped, f64_of, usize_of, usizes_of};

fn config(group: &Group) -> MarConfig {
    let stated = &group.case["config"];
    let number = |name: &str| usize_of(&stated[name]);
    let stack = |side: &str| Stack {
        width: number(&format!("{side}_embed_dim")),
        depth: number(&format!("{side}_depth")),
        heads: number(&format!("{side}_num_heads")),
    };
    MarConfig {
        input_size: number("img_size") / number("vae_stride"),
        patch_size: number("patch_size"),
        channels: number("vae_embed_dim"),
        classes: number("class_num"),
        buffer: number("buffer_size"),
        mlp_ratio: f64_of(&stated["mlp_ratio"]),
        encoder: stack("encoder"),
        decoder: stack("decoder"),
        head_width: number("diffloss_w"),
        head_depth: number("diffloss_d"),
        blocks: Vec::new(),
        widths: None,
    }
}

fn network<B: FusedOps>(group: &Group) -> Mar<B> {
    let name = group.case["checkpoint"]["file"].as_str().unwrap();
    let (tensors, path) = open_weights(&group.path.join(name)).unwrap();
    let state: StateDict = tensors.read_all().unwrap();
    let config = config(group);
    let shapes: Vec<(String, Vec<usize>)> = config.tensors();
    assert_eq!(shapes.len(), state.len());
    for (name, shape) in shapes {
        assert_eq!(state[&name].shape, shape, "{name}");
    }
    let zeros = Mar::zeros(&config, &B::Device::default());
    let network = assign(zeros, &state, &path, "the fixture's model").unwrap();
    assert_eq!(network.config(), config);
    network
}

/// The orders of the samples.
fn orders(file: &File) -> Vec<Vec<usize>> {
    let orders = file.get("orders");
    let of = |sample| orders.row(sample).indices();
    (0..orders.shape[0]).map(of).collect()
}

/// The rows of the reference's noise in the order of the samples, of the unknown tokens alone.
fn by_sample(known: &Known, copies: usize) -> Vec<usize> {
    let (all, tokens) = (known.unknown(), known.tokens());
    let batch = all.len() / tokens;
    let mut order = Vec::new();
    for sample in 0..batch {
        for copy in 0..copies {
            let unknown = (0..tokens).map(|token| sample * tokens + token);
            let unknown = unknown.filter(|row| all[*row]);
            order.extend(unknown.map(|row| copy * all.len() + row));
        }
    }
    order
}

/// What goes into a trunk's layer and what comes out of each.
struct Hidden<B: burn::tensor::backend::Backend>(Vec<Tensor<B, 3>>);

impl<B: FusedOps> BlockHook<B> for Hidden<B> {
    fn around(&mut self, _: Site, x: Tensor<B, 3>, block: Block<'_, B>) -> Tensor<B, 3> {
        if self.0.is_empty() {
            self.0.push(x.clone());
        }
        let out = block(x);
        self.0.push(out.clone());
        out
    }
}

fn stacked<B: FusedOps>(hidden: Hidden<B>) -> Tensor<B, 4> {
    Tensor::stack(hidden.0, 0)
}

/// A loss, as the reference writes it down.
fn alone(value: &Values) -> Values {
    Values {
        shape: vec![1],
        data: value.data.clone(),
    }
}

pub fn mar_forward<B: FusedOps>(slack: f64) {
    let group = Group::open("mar_forward");
    let tolerance = |name: &str| Largest {
        tolerance: f64_of(&group.case["tolerance"][name]) * slack,
    };
    let (rule, losses) = (tolerance("forward"), tolerance("losses"));
    let file = group.file("forward.safetensors");
    let network = network::<B>(&group);
    let config = network.config();

    let patched = tokens(file.get("imgs").tensor(), config.patch_size);
    rule.tensor("tokens", patched.clone(), file.get("tokens"));
    let back = of_tokens(patched.clone(), config.patch_size);
    rule.tensor("unpatchify", back, file.get("unpatchify"));
    let known = Known::of_orders(&orders(&file), usize_of(&group.case["num_masked"]));
    let unknown: Vec<f64> = known
        .unknown()
        .into_iter()
        .map(|is| f64::from(u8::from(is)))
        .collect();
    assert_eq!(unknown, file.get("mask").data);

    let y = file.get("labels").labels();
    let mut hidden = Hidden(Vec::new());
    let seen = network.encode(patched.clone(), &known, y.clone(), &mut hidden);
    rule.tensor(
        "encoder_hidden",
        stacked(hidden),
        file.get("encoder_hidden"),
    );
    rule.tensor("encoder_out", seen.clone(), file.get("encoder_out"));
    let mut hidden = Hidden(Vec::new());
    let z = network.decode(seen, &known, &mut hidden);
    rule.tensor(
        "decoder_hidden",
        stacked(hidden),
        file.get("decoder_hidden"),
    );
    rule.tensor("decoder_out", z.clone(), file.get("decoder_out"));

    // The head under the reference's rows: all tokens of the first copy, then those of the next.
    let copies = usize_of(&group.case["config"]["diffusion_batch_mul"]);
    let (batch, count) = (orders(&file).len(), config.tokens());
    let (noise, t, state) = (file.get("noise"), file.get("t"), file.get("diffloss.x_t"));
    let rows = copies * batch * count;
    let under = z.clone().flatten(0, 1).repeat_dim(0, copies);
    let under = network.project(under);
    let output = network.denoise(state.tensor(), t.tensor(), under.clone());
    rule.tensor("diffloss.net_out", output, file.get("diffloss.net_out"));
    // The first half of the rows under both halves of the vectors.
    let half = rows / 2;
    let (x, told) = (state.first(half).tensor(), t.first(half).tensor());
    let said = guided(&network, x, told, under, 2.9);
    let expected = file.get("diffloss.net_out_cfg").first(half);
    rule.tensor("diffloss.net_out_cfg", said, &expected);

    // The loss of every token, sample by sample.
    let process = GaussianDiffusion::full_cosine();
    let noised = |known: &Known, y: &Values| -> Noised<B> {
        let order = by_sample(known, copies);
        let unknown = count - known.count();
        let noise = noise.rows(&order).tensor::<B, 2>();
        let noise = noise.reshape([batch, copies, unknown, config.token_width()]);
        let (images, t) = (file.get("imgs").tensor(), t.rows(&order).times());
        Noised::new(&process, images, noise, t, y.labels(), Some(known.clone()))
    };
    let nothing = Known::none(count, batch);
    let order = by_sample(&nothing, copies);
    let all = noised(&nothing, file.get("labels"));
    let all_rows = all.state.clone().reshape([rows, config.token_width()]);
    let expected = |name: &str| file.get(name).rows(&order);
    rule.tensor("x_t", all_rows.clone(), &expected("diffloss.x_t"));
    let of_sample: Vec<usize> = order.iter().map(|row| row % (batch * count)).collect();
    let device = z.device();
    let under = network.project(z.flatten(0, 1).select(0, indices(&of_sample, &device)));
    let output = network.denoise(all_rows, process.told(&all.t, &device), under);
    let output = output.reshape([rows, 2 * config.token_width(), 1, 1]);
    let terms = process.loss(&all, output);
    let mut total = Tensor::zeros([rows], &device);
    for (name, term) in terms {
        let key = format!("diffloss.{name}");
        total = total + term.clone();
        losses.tensor(&key, term, &expected(&key));
    }
    losses.tensor("diffloss.loss", total.clone(), &expected("diffloss.loss"));
    losses.tensor(
        "unmasked",
        total.mean(),
        &alone(file.get("diffloss.unmasked_loss")),
    );

    // That of the unknown ones, as it is trained.
    let whole = |network: &Mar<B>, y: &Values| {
        let seen = noised(&known, y);
        let output = seen.run(&process, network, &mut Plain);
        seen.terms(&process, output).total.mean()
    };
    let found = whole(&network, file.get("labels"));
    for name in ["diffloss.masked_loss", "loss"] {
        losses.tensor(name, found.clone(), &alone(file.get(name)));
    }

    // Labels that were dropped.
    let drop = f64_of(&group.case["config"]["label_drop_prob"]);
    let draws = file.get("drop_rand");
    let below = draws
        .data
        .iter()
        .map(|draw| f64::from(u8::from(*draw < drop)));
    let below = Values {
        shape: draws.shape.clone(),
        data: below.collect(),
    };
    let y = dropped(file.get("labels"), &below, config.classes);
    losses.tensor(
        "train_mode.loss",
        whole(&network, &y),
        &alone(file.get("train_mode.loss")),
    );

    // Without a block of each trunk.
    let pruning = &group.case["depth_pruning"];
    let removed = |side: &str| usizes_of(&pruning[format!("removed_{side}_blocks")]);
    let (encoder, decoder) = (removed("encoder"), removed("decoder"));
    let trunk = network.trunk();
    assert_eq!(trunk.borders, [config.encoder.depth]);
    let kept: Vec<usize> = (0..trunk.depth)
        .filter(|layer| match layer.checked_sub(config.encoder.depth) {
            None => !encoder.contains(layer),
            Some(layer) => !decoder.contains(&layer),
        })
        .collect();
    let shallow = network.keep(&kept);
    let y = file.get("labels").labels();
    let z = shallow.condition(patched, &known, y, &mut Plain);
    rule.tensor("pruned.decoder_out", z, file.get("pruned.decoder_out"));
    let found = whole(&shallow, file.get("labels"));
    losses.tensor("pruned.loss", found, &alone(file.get("pruned.loss")));
}

/// The cosine schedule, whole and respaced to the head's steps of sampling.
#[test]
fn mar_schedule() {
    let group = Group::open("mar_forward");
    let stated = &group.case["diffusion"];
    let numbers = |name: &str| -> Vec<f64> {
        stated[name]
            .as_array()
            .unwrap()
            .iter()
            .map(f64_of)
            .collect()
    };
    // f64 on both sides; the smallest is 2e-9.
    let near = |name: &str, found: &[f64]| {
        let expected = numbers(name);
        assert_eq!(found.len(), expected.len(), "{name}");
        for (found, expected) in found.iter().zip(expected) {
            let off = (found - expected).abs();
            assert!(
                off <= 1e-12 + 1e-9 * expected.abs(),
                "{name}: {found}, {expected}"
            );
        }
    };
    let spacing = group.case["config"]["num_sampling_steps"].as_str().unwrap();
    let kept = respace(spacing).unwrap();
    let masking = Masking {
        least: f64_of(&group.case["config"]["mask_ratio_min"]),
        ..Masking::published(1)
    };
    let stated_shares = &group.case["mask_rate_distribution"];
    let shares = stated_shares["ppf"].as_array().unwrap();
    for (quantile, share) in (stated_shares["u"].as_array().unwrap().iter()).zip(shares) {
        let off = masking.share(f64_of(quantile)) - f64_of(share);
        assert!(off.abs() < 1e-12, "{quantile}: {off}");
    }
    assert_eq!(kept, usizes_of(&stated["gen_timestep_map"]));
    let tables = DiffusionTables::cosine(&kept);
    near("gen_betas", &tables.betas);
    near("gen_alphas_cumprod", &tables.alphas_cumprod);
    let variances = &tables.posterior_log_variance_clipped;
    near("gen_posterior_log_variance_clipped", variances);
    let all: Vec<usize> = (0..1000).collect();
    let tables = DiffusionTables::cosine(&all);
    let at = |table: &[f64]| [0, 500, 999].map(|step| table[step]);
    near("train_betas_at_0_500_999", &at(&tables.betas));
    near(
        "train_alphas_cumprod_at_0_500_999",
        &at(&tables.alphas_cumprod),
    );
}

pub fn mar_sampling<B: FusedOps>(slack: f64) {
    let group = Group::open("mar_forward");
    let rule = Largest {
        tolerance: f64_of(&group.case["tolerance"]["sample"]) * slack,
    };
    let file = group.file("sample.safetensors");
    let network = network::<B>(&group);
    let orders = orders(&file);
    let rounds = usize_of(&group.case["sample_num_iter"]);
    let spacing = group.case["config"]["num_sampling_steps"].as_str().unwrap();
    for case in group.case["sample_cases"].as_array().unwrap() {
        let key = case["key"].as_str().unwrap();
        let sampler = MaskedSampler {
            diffusion: Arc::new(GaussianDiffusion::cosine(spacing).unwrap()),
            rounds: Rounds {
                rounds,
                guidance_schedule: match case["cfg_schedule"].as_str().unwrap() {
                    "linear" => GuidanceSchedule::Linear,
                    _ => GuidanceSchedule::Constant,
                },
                temperature: f64_of(&case["temperature"]),
                clip: false,
            },
            scale: f64_of(&case["cfg"]),
        };
        let steps = case["steps"].as_array().unwrap();
        let mut unknown = orders[0].len();
        for (round, step) in steps.iter().enumerate() {
            let left = sampler
                .rounds
                .unknown_after(round, orders[0].len(), unknown);
            let guidance = sampler.guidance(orders[0].len(), left);
            // The reference computes it in f32.
            assert!((guidance - f64_of(&step["cfg_iter"])).abs() < 1e-6);
            unknown = left;
        }
        let labels = file.get("labels");
        let labels = match case["labels"].as_bool().unwrap() {
            true => labels.clone(),
            false => Values {
                shape: labels.shape.clone(),
                data: vec![network.config().classes as f64; labels.data.len()],
            },
        };
        let of_round = |round: usize, what: &str| file.get(&format!("{key}.step{round}.{what}"));
        let mut predicted = Vec::new();
        let mut noise = |of: tinyfusion::process::masked::NoiseOf<'_>| -> Tensor<B, 2> {
            match of.step {
                None => {
                    predicted.push(of.tokens.iter().map(Vec::len).sum::<usize>());
                    of_round(of.round, "noise_init").tensor()
                }
                Some(step) => of_round(of.round, "noise_steps").row(step).tensor(),
            }
        };
        let watch = |round: usize, z: &Tensor<B, 2>, drawn: &Tensor<B, 2>| {
            rule.tensor(&format!("{key} {round} z"), z.clone(), of_round(round, "z"));
            let expected = of_round(round, "sampled");
            rule.tensor(&format!("{key} {round} sampled"), drawn.clone(), expected);
        };
        let of = (&network as &dyn FillsIn<B>, network.shape());
        let images = sampler.generate(of, &orders, labels.labels(), &mut noise, watch);
        rule.tensor(key, images, file.get(&format!("{key}.tokens")));
        let expected: Vec<usize> = steps
            .iter()
            .map(|step| usize_of(&step["tokens_predicted"]))
            .collect();
        assert_eq!(predicted, expected, "{key}");
    }
}

/// Patches of more than one pixel, and the published sizes.
pub fn mar_zoo<B: FusedOps>(_: f64) {
    let group = Group::open("mar_forward");
    let exact = Largest { tolerance: 0.0 };
    let file = group.file("patchify2.safetensors");
    let latent = file.get("latent");
    let found = tokens::<B>(latent.tensor(), 2);
    exact.tensor("tokens", found.clone(), file.get("tokens"));
    exact.tensor("latent", of_tokens(found, 2), latent);

    let text = std::fs::read_to_string(group.path.join("mar_zoo.json")).unwrap();
    let zoo: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (name, stated) in zoo["models"].as_object().unwrap() {
        let number = |name: &str| usize_of(&stated[name]);
        let stack = |side: &str| Stack {
            width: number(&format!("{side}_embed_dim")),
            depth: number(&format!("{side}_depth")),
            heads: number(&format!("{side}_num_heads")),
        };
        // The rest is said in the file's note alone.
        let config = MarConfig {
            input_size: 16,
            patch_size: 1,
            channels: 16,
            classes: 1000,
            buffer: 64,
            mlp_ratio: f64_of(&stated["mlp_ratio"]),
            encoder: stack("encoder"),
            decoder: stack("decoder"),
            head_width: number("diffloss_w"),
            head_depth: number("diffloss_d"),
            blocks: Vec::new(),
            widths: None,
        };
        let architecture = Architecture::Mar(config.clone());
        assert_eq!(architecture.parameters(), number("parameters"), "{name}");
        // The embedded table of published models.
        let called = name.replace("mar_", "MAR-").replace("base", "B");
        let called = called.replace("large", "L").replace("huge", "H");
        assert_eq!(Architecture::preset(&called), Some(architecture), "{name}");
        if name == "mar_base" {
            let known = zoo["keys_mar_base"].as_object().unwrap();
            let mut met = std::collections::BTreeSet::new();
            for (name, shape) in config.tensors() {
                let any: Vec<&str> = name
                    .split('.')
                    .enumerate()
                    .map(|(at, word)| match word.parse::<usize>() {
                        // `mlp.0` is a name, not a block's number.
                        Ok(_)
                            if at > 0
                                && name.split('.').nth(at - 1).unwrap().ends_with("blocks") =>
                        {
                            "{i}"
                        }
                        _ => word,
                    })
                    .collect();
                let any = any.join(".");
                let expected = known.get(&any).map(usizes_of);
                assert_eq!(expected, Some(shape), "{name}");
                met.insert(any);
            }
            assert_eq!(met.len(), known.len());
        }
    }
    // The module's own parameters are those of its sizes.
    let config = config(&group);
    let zeros = Mar::<B>::zeros(&config, &B::Device::default());
    let mut found: Vec<(String, Vec<usize>)> = names::<B, _>(&zeros)
        .into_iter()
        .map(|parameter| (parameter.name, parameter.shape))
        .collect();
    let mut expected = config.tensors();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
}
