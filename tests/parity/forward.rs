use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use tinyfusion::data::Batch;
use tinyfusion::models::{Architecture, Denoiser, Network, presets, timestep_features};
use tinyfusion::ops::TrainingBackend;
use tinyfusion::process::{AnyProcess, GaussianDiffusion, Guidance, guided};
use tinyfusion::pruning::{Annealing, Groups, LearnedPruner, Update};
use tinyfusion::state::{assign, names};
use tinyfusion::trunk::{Block, BlockHook, Gated, Plain, Site};
use tinyfusion::weights::open_torch;

use crate::compare::{Largest, Rule};
use crate::fixture::{File, Group, config, dropped, f64_of, gradients, network, usize_of};

/// Records the trunk's input and each layer's output under another hook.
pub struct Record<'a, B: Backend> {
    hook: &'a mut dyn BlockHook<B>,
    pub hidden: Vec<Tensor<B, 3>>,
}

impl<B: Backend> BlockHook<B> for Record<'_, B> {
    fn around(&mut self, site: Site, x: Tensor<B, 3>, block: Block<'_, B>) -> Tensor<B, 3> {
        if site.layer == 0 {
            self.hidden.push(x.clone());
        }
        let x = self.hook.around(site, x, block);
        self.hidden.push(x.clone());
        x
    }
}

pub fn dit_forward<B: TrainingBackend>(slack: f64) {
    let group = Group::open("dit_forward");
    let rule = Rule::new(&group.case, slack);
    for (name, model) in group.case["models"].as_object().unwrap() {
        let config = config(&model["config"]);
        let (file, grads) = (
            group.file(&format!("{name}_io.safetensors")),
            group.file(&format!("{name}_grads.safetensors")),
        );
        let state = group.state(model["checkpoint"].as_str().unwrap());
        let network = network::<B>(&config, &state);
        let Network::Dit(dit) = &network else {
            panic!("it is a DiT");
        };
        let (x, t, y) = (
            file.get("x").tensor::<B, 4>(),
            file.get("t").tensor::<B, 1>(),
            file.get("y").labels::<B>(),
        );

        // The cosine of an angle near 1,000 shows a backend's own sine, so the key has its own
        // slack.
        rule.tensor(
            &file.name,
            "t_freq",
            timestep_features(t.clone(), file.get("t_freq").shape[1]),
            file.get("t_freq"),
        );
        rule.tensor(
            &file.name,
            "t_emb",
            dit.t_embedder.forward(t.clone()),
            file.get("t_emb"),
        );
        rule.tensor(
            &file.name,
            "y_emb",
            dit.y_embedder.forward(y.clone()),
            file.get("y_emb"),
        );
        let mut record = Record {
            hook: &mut Plain,
            hidden: Vec::new(),
        };
        let out = network.forward(x.clone(), t.clone(), y.clone(), &mut record);
        rule.tensor(
            &file.name,
            "hidden",
            Tensor::stack::<4>(record.hidden, 0),
            file.get("hidden"),
        );
        rule.tensor(&file.name, "out", out.clone(), file.get("out"));
        let y_dropped = dropped(file.get("y"), file.get("drop_ids"), config.classes).labels::<B>();
        rule.tensor(
            &file.name,
            "out_drop",
            network.forward(x.clone(), t.clone(), y_dropped, &mut Plain),
            file.get("out_drop"),
        );

        // The second half of a guided batch is the null class's; only the first is used.
        let batch = file.get("cfg.x").shape[0] / 2;
        let guidance = Guidance {
            scale: f64_of(&model["cfg_scale"]),
            channels: 3,
        };
        let part = |key: &str| file.get(key).first(batch);
        let actual = guided(
            &network,
            part("cfg.x").tensor::<B, 4>(),
            part("cfg.t").tensor(),
            part("cfg.y").labels(),
            guidance,
        );
        rule.tensor(&file.name, "cfg.out", actual, &part("cfg.out"));

        let loss = (out.clone() * out).mean();
        let actual = gradients::<B, _>(&network, &loss.backward());
        let expected: Vec<&str> = grads.names().collect();
        assert_eq!(
            actual.keys().map(String::as_str).collect::<Vec<_>>(),
            expected,
            "parameters with a gradient"
        );
        for (name, gradient) in &actual {
            rule.check(&grads.name, name, &gradient.data, grads.get(name));
        }
    }
}

/// A SiT is the same network with times in [0, 1]; the output channels for a variance are unused.
pub fn sit_forward<B: TrainingBackend>(slack: f64) {
    let group = Group::open("sit_forward");
    let case = &group.case;
    let rule = Largest {
        tolerance: slack * f64_of(&case["tolerance"]["all"]),
    };
    let file = group.file("io.safetensors");
    let checkpoint = group.path.join("checkpoint.pt");
    let of = |key: &str| {
        open_torch(&checkpoint, Some(key))
            .unwrap()
            .read_all()
            .unwrap()
    };
    let usual = open_torch(&checkpoint, None).unwrap().read_all().unwrap();
    assert_eq!(
        usual,
        of("ema"),
        "the average is what a checkpoint stands for"
    );
    assert_eq!(usual, group.state("ema.safetensors"));
    for (name, state) in [
        ("ema", usual),
        ("model", of("model")),
        ("no_sigma", group.state("no_sigma.safetensors")),
    ] {
        let mut sizes = case["config"].clone();
        sizes["learn_sigma"] = (name != "no_sigma").into();
        let config = config(&sizes);
        let network = network::<B>(&config, &state);
        let (x, t, y) = (
            file.get("x").tensor::<B, 4>(),
            file.get("t").tensor::<B, 1>(),
            file.get("y").labels::<B>(),
        );
        let key = |what: &str| format!("{name}.{what}");
        let check = |what: &str, actual: Tensor<B, 4>| {
            rule.tensor(&key(what), actual, file.get(&key(what)));
        };
        let mut record = Record {
            hook: &mut Plain,
            hidden: Vec::new(),
        };
        let out = network.forward(x.clone(), t.clone(), y.clone(), &mut record);
        check("out", out.narrow(1, 0, config.channels));
        let guidance = Guidance {
            scale: f64_of(&case["cfg_scale"]),
            channels: 3,
        };
        let (batch, expected) = (x.dims()[0], key("out_cfg"));
        let actual = guided(&network, x, t.clone(), y.clone(), guidance);
        let actual = actual.narrow(1, 0, config.channels);
        rule.tensor(&expected, actual, &file.get(&expected).first(batch));
        if name == "ema" {
            check("hidden", Tensor::stack::<4>(record.hidden, 0));
            let Network::Dit(dit) = &network else {
                panic!("it is a DiT");
            };
            let rows = |what: &str, actual: Tensor<B, 2>| {
                rule.tensor(&key(what), actual, file.get(&key(what)));
            };
            rows(
                "t_freq",
                timestep_features(t.clone(), file.get("ema.t_freq").shape[1]),
            );
            rows("t_emb", dit.t_embedder.forward(t));
            rows("y_emb", dit.y_embedder.forward(y));
        }
    }
}

/// The published sizes of SiT.
#[test]
fn sit_zoo() {
    let path = Group::open("sit_forward").path.join("sit_zoo.json");
    let zoo_json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    for (name, model) in zoo_json["models"].as_object().unwrap() {
        let config = presets::config(name, 32, 4, 1000).unwrap_or_else(|| panic!("no {name}"));
        let sizes =
            ["depth", "hidden_size", "num_heads", "patch_size"].map(|key| usize_of(&model[key]));
        let found = [config.depth, config.width, config.heads, config.patch_size];
        assert_eq!(found, sizes, "{name}");
        let parameters = usize_of(&model["parameters_learn_sigma"]);
        assert_eq!(
            Architecture::from(config).parameters(),
            parameters,
            "{name}"
        );
    }
}

/// Loading: precedence of weights in a checkpoint, and the names, shapes and sizes of the whole
/// zoo.
pub fn dit_weights<B: TrainingBackend>(slack: f64) {
    let group = Group::open("dit_forward");
    let rule = Rule::new(&group.case, slack);
    for (name, model) in group.case["models"].as_object().unwrap() {
        let config = config(&model["config"]);
        let file = group.file(&format!("{name}_io.safetensors"));
        let ema = group.state(model["checkpoint"].as_str().unwrap());
        if let Some(plain) = model["plain"].as_str() {
            assert_eq!(
                group.state(plain),
                ema,
                "the EMA is what a checkpoint stands for"
            );
        }
        let only = model["model_only"].as_str().map(|name| group.state(name));
        let raw = only.unwrap_or_else(|| {
            open_torch(
                &group.path.join(model["checkpoint"].as_str().unwrap()),
                Some("model"),
            )
            .and_then(|tensors| tensors.read_all())
            .unwrap()
        });
        let out = network::<B>(&config, &raw).forward(
            file.get("x").tensor(),
            file.get("t").tensor(),
            file.get("y").labels(),
            &mut Plain,
        );
        rule.tensor(&file.name, "out_model", out, file.get("out_model"));
    }

    let zoo: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(group.path.join("dit_zoo.json")).unwrap())
            .unwrap();
    let size = |key: &str| usize_of(&zoo[key]);
    for (name, expected) in zoo["models"].as_object().unwrap() {
        // Models with gates are a trunk plus groups here, not separate models.
        if !expected["num_gate_params"].is_null() {
            continue;
        }
        let config = presets::config(
            name,
            size("input_size"),
            size("in_channels"),
            size("num_classes"),
        )
        .unwrap_or_else(|| panic!("{name} is not in the zoo"));
        assert_eq!(config.depth, usize_of(&expected["depth"]), "{name}");
        assert_eq!(config.width, usize_of(&expected["hidden_size"]), "{name}");
        assert_eq!(config.heads, usize_of(&expected["num_heads"]), "{name}");
        assert_eq!(
            config.patch_size,
            usize_of(&expected["patch_size"]),
            "{name}"
        );
        assert_eq!(
            Architecture::from(config.clone()).parameters(),
            usize_of(&expected["num_params"]),
            "{name}"
        );
    }
    for (name, entries) in zoo["state_dict"].as_object().unwrap() {
        // One block is as good as all: names and shapes are compared through a model of the same
        // width.
        let config = presets::config(
            name,
            size("input_size"),
            size("in_channels"),
            size("num_classes"),
        )
        .unwrap();
        let small = tinyfusion::models::DitConfig {
            depth: 1,
            ..config.clone()
        };
        let network = Network::<B>::zeros(&small.clone().into(), &B::Device::default()).unwrap();
        let actual: std::collections::BTreeMap<String, Vec<usize>> = names::<B, _>(&network)
            .into_iter()
            .map(|parameter| (parameter.name, parameter.shape))
            .collect();
        // The names and shapes that a checkpoint is checked against before a module is built.
        let mut named = config.clone();
        named.depth = 1;
        let named: std::collections::BTreeMap<_, _> = named.tensors().into_iter().collect();
        assert_eq!(named, actual, "{name}");
        let mut blocks = 0;
        for entry in entries.as_array().unwrap() {
            let (key, shape) = (
                entry[0].as_str().unwrap(),
                crate::fixture::usizes_of(&entry[1]),
            );
            let key = match key.strip_prefix("blocks.") {
                Some(rest) => {
                    let (layer, rest) = rest.split_once('.').unwrap();
                    blocks = blocks.max(layer.parse::<usize>().unwrap() + 1);
                    format!("blocks.0.{rest}")
                }
                None => key.to_owned(),
            };
            assert_eq!(actual.get(&key), Some(&shape), "{name}: {key}");
        }
        assert_eq!(blocks, config.depth, "{name}");
    }
}

pub fn prune_forward<B: TrainingBackend>(slack: f64) {
    let group = Group::open("prune_forward");
    let rule = Rule::new(&group.case, slack);
    let case = &group.case;
    let config = config(&case["config"]);
    let pairs: Vec<[usize; 2]> = serde_json::from_value(case["config"]["groups"].clone()).unwrap();
    let groups = Groups::from_pairs(&pairs, config.depth).unwrap();
    let file = group.file("io.safetensors");
    let (tau, scaling) = (f64_of(&case["tau"]), f64_of(&case["scaling"]));
    let annealing = Annealing {
        tau: (tau, tau),
        scaling: (scaling, scaling),
        steps: 1,
    };
    let mut base = group.state("weights.safetensors");
    let gates = base
        .extract_if(.., |name, _| name.starts_with("gumbel_gates."))
        .collect::<Vec<_>>();
    let diffusion = AnyProcess::from(
        GaussianDiffusion::new(case["timestep_respacing"].as_str().unwrap()).unwrap(),
    );
    let lora = Update::Lora {
        rank: usize_of(&case["lora_rank"]),
        alpha: f64_of(&case["lora_alpha"]),
    };
    for (mode, update) in [("full", Update::Full), ("lora", lora)] {
        let pruner = LearnedPruner::new(
            network::<B>(&config, &base),
            groups.clone(),
            update,
            0.0,
            annealing.clone(),
            diffusion.clone(),
            0,
        )
        .unwrap();
        let mut state = base.clone();
        state.extend(gates.clone());
        if mode == "lora" {
            state.extend(group.state("lora.safetensors"));
        }
        let pruner = assign::<B, _>(pruner, &state, &group.path, "the gated model").unwrap();
        let batch = batch::<B>(&file, groups.len(), config.classes);
        let mask = pruner.masks(&batch.gumbel, 0);
        rule.tensor(&file.name, "masks", mask.clone(), file.get("masks"));
        let mut gated = Gated { mask };
        let mut record = Record {
            hook: &mut gated,
            hidden: Vec::new(),
        };
        let out = pruner.network.forward(
            batch.x.clone(),
            file.get("t").tensor(),
            file.get("y").labels(),
            &mut record,
        );
        let key = |name: &str| format!("{mode}.{name}");
        rule.tensor(
            &file.name,
            &key("hidden"),
            Tensor::stack::<4>(record.hidden, 0),
            file.get(&key("hidden")),
        );
        rule.tensor(&file.name, &key("out"), out, file.get(&key("out")));

        let (terms, _) = pruner.terms(&batch);
        rule.tensor(
            &file.name,
            &key("loss.mse"),
            terms.get("mse").unwrap().clone(),
            file.get(&key("loss.mse")),
        );
        rule.tensor(
            &file.name,
            &key("loss.vb"),
            terms.get("vb").unwrap().clone(),
            file.get(&key("loss.vb")),
        );
        rule.tensor(
            &file.name,
            &key("loss.loss"),
            terms.total.clone(),
            file.get(&key("loss.loss")),
        );
        let expected = group.file(&format!("grads_{mode}.safetensors"));
        let actual = gradients::<B, _>(&pruner, &terms.total.mean().backward());
        assert_eq!(
            actual.keys().map(String::as_str).collect::<Vec<_>>(),
            expected.names().collect::<Vec<_>>(),
            "parameters with a gradient"
        );
        for (name, gradient) in &actual {
            rule.check(&expected.name, name, &gradient.data, expected.get(name));
        }
    }
}

/// A batch of a pruning fixture.
fn batch<B: Backend>(file: &File, groups: usize, classes: usize) -> Batch<B> {
    Batch {
        step: 0,
        x: file.get("x").tensor(),
        noise: file.get("noise").tensor(),
        t: file.get("t").times(),
        known: None,
        y: dropped(file.get("y"), file.get("drop_ids"), classes).labels(),
        gumbel: (0..groups)
            .map(|group| file.get(&format!("gumbel.{group}")).tensor())
            .collect(),
        teacher: None,
    }
}
