use std::collections::BTreeSet;

use burn::tensor::Tensor;
use serde_json::Value;
use tinyfusion::models::{Architecture, ChannelGroup, Denoiser, Left, Network, UnetConfig};
use tinyfusion::ops::TrainingBackend;
use tinyfusion::process::{DiffusionTables, GaussianDiffusion, Variance};
use tinyfusion::pruning::{
    Descent, Leaves, LossGradients, Saliency, ScoreBatch, importance, kept_channels, losses_at,
    units_left, without,
};
use tinyfusion::state::{StateDict, assign};
use tinyfusion::trunk::Plain;
use tinyfusion::weights::Checkpoint;

use crate::compare::Largest;
use crate::fixture::{File, Group, Values, f64_of, usize_of, usizes_of};

pub fn diff_pruning<B: TrainingBackend>(slack: f64) {
    let group = Group::open("diff_pruning");
    let json = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(group.path.join(name)).unwrap()).unwrap()
    };
    let file = group.file("io.safetensors");
    let bound = |key: &str| Largest {
        tolerance: f64_of(&group.case["tolerance"][key]) * slack,
    };
    // By the file that diffusers writes beside the weights.
    let checkpoint = Checkpoint::read(&group.path.join("unet")).unwrap();
    let Architecture::Unet(config) = checkpoint.architecture.clone() else {
        panic!("it is a UNet");
    };
    let weights = checkpoint.tensors.read_all().unwrap();
    let listed = json("groups.json");
    let listed = listed.as_array().unwrap();
    same_groups(&config, listed);
    bound("forward").tensor(
        "out",
        output::<B>(&config, &weights, &file),
        file.get("out"),
    );

    let expected = json("expected.json");
    // The score of `ddpm_exp_ours` adds squares of one kind of weight to absolute values of
    // another, so that it depends on the scale of the loss; it is not offered.
    for name in ["diff_pruning", "taylor", "magnitude"] {
        let case = &expected[name];
        let saliency = match name {
            "diff_pruning" => Saliency::Taylor,
            "taylor" => Saliency::Multivariable,
            _ => Saliency::Magnitude,
        };
        let gradients = match saliency {
            Saliency::Magnitude => StateDict::new(),
            _ => {
                let threshold = if name == "taylor" {
                    0.0
                } else {
                    f64_of(&group.case["thr"])
                };
                gradients::<B>(&config, &weights, &file, case, (threshold, bound("losses")))
            }
        };
        for key in file.names() {
            let Some(parameter) = key.strip_prefix(&format!("{name}.grad.")) else {
                continue;
            };
            let (found, expected) = (&gradients[parameter], file.get(key));
            assert_eq!(found.shape, expected.shape, "{key}");
            let flat = Values {
                shape: vec![expected.data.len()],
                data: expected.data.clone(),
            };
            let found = Tensor::<B::InnerBackend, 1>::from_floats(
                found.data.as_slice(),
                &Default::default(),
            );
            bound("gradients").tensor(key, found, &flat);
        }

        // One group after the other is scored and cut, so that later ones are scored without what
        // earlier ones lost.
        let (mut config, mut weights, mut gradients) = (config.clone(), weights.clone(), gradients);
        let ratio = f64_of(&group.case["pruning_ratio"]);
        let score =
            |group: &ChannelGroup, weights: &StateDict, gradients: &StateDict, key: &str| {
                let scores = importance(group, weights, gradients, saliency);
                let expected = file.get(key);
                let found = Tensor::<B::InnerBackend, 1>::from_floats(
                    scores
                        .iter()
                        .map(|score| *score as f32)
                        .collect::<Vec<_>>()
                        .as_slice(),
                    &Default::default(),
                );
                bound("importance").tensor(key, found, expected);
                scores
            };
        let whole = config.channel_groups();
        let first = (weights.clone(), gradients.clone());
        for listed in listed {
            let root = listed["root"].as_str().unwrap();
            let own = of_root(&whole, root);
            let key = format!("{name}.importance_initial.{root}");
            score(&whole[own], &first.0, &first.1, &key);
            let groups = config.channel_groups();
            let group = &groups[own];
            let key = format!("{name}.importance_sequential.{root}");
            let scores = score(group, &weights, &gradients, &key);
            let keep = units_left(group.channels, group.slices, ratio);
            let stays = kept_channels(group, &scores, keep, Leaves::Dims);
            let leaves: Vec<usize> = (0..group.channels)
                .filter(|channel| !stays.contains(channel))
                .collect();
            let mut expected = usizes_of(&case["pruned_channels"][root]);
            expected.sort_unstable();
            assert_eq!(leaves, expected, "{name}, {root}");
            let left: Vec<Left> = (groups.iter().enumerate())
                .map(|(index, group)| Left {
                    channels: if index == own { keep } else { group.channels },
                    heads: 1,
                })
                .collect();
            let cut = std::slice::from_ref(group);
            weights = without(weights, cut, std::slice::from_ref(&stays));
            if !gradients.is_empty() {
                gradients = without(gradients, cut, &[stays]);
            }
            config = config.narrowed(&left);
        }
        assert_eq!(config.problem(), None);
        if name == "diff_pruning" {
            assert_eq!(weights, group.state("unet_pruned.safetensors"));
        }
        let parameters = |config: &UnetConfig| -> usize {
            let tensors = config.tensors().into_iter();
            tensors
                .map(|(_, shape)| shape.iter().product::<usize>())
                .sum()
        };
        assert_eq!(
            [parameters(&config.whole()), parameters(&config)],
            usizes_of(&case["parameters"])[..],
            "{name}"
        );
        let key = format!("{name}.pruned_out");
        let found = output::<B>(&config, &weights, &file);
        bound("pruned_out").tensor(&key, found, file.get(&key));
    }
}

/// The groups have the members that the reference finds by tracing.
fn same_groups(config: &UnetConfig, listed: &[Value]) {
    type Members = BTreeSet<(String, &'static str, Vec<usize>)>;
    let ours = config.channel_groups();
    assert_eq!(ours.len(), listed.len());
    for listed in listed {
        let root = listed["root"].as_str().unwrap();
        let own = &ours[of_root(&ours, root)];
        assert_eq!(usize_of(&listed["channels"]), own.channels, "{root}");
        assert_eq!(usize_of(&listed["norm_groups"]), own.slices, "{root}");
        let members = listed["members"].as_array().unwrap().iter();
        let expected: Members = members
            .map(|member| {
                let side = match member[1].as_str().unwrap() {
                    "out" => "out",
                    "in" => "in",
                    _ => "norm",
                };
                let layer = member[0].as_str().unwrap().to_owned();
                (layer, side, usizes_of(&member[2]))
            })
            .collect();
        let members = own.members.iter();
        let weights = members.filter_map(|member| {
            let layer = member.tensor.strip_suffix(".weight")?;
            let side = match (member.scored, member.dim) {
                (false, _) => "norm",
                (true, 0) => "out",
                (true, _) => "in",
            };
            Some((layer.to_owned(), side, member.offsets.clone()))
        });
        assert_eq!(weights.collect::<Members>(), expected, "{root}");
    }
}

/// The group to which a layer's outputs belong.
fn of_root(groups: &[ChannelGroup], root: &str) -> usize {
    let tensor = format!("{root}.weight");
    let of = |group: &ChannelGroup| {
        let mut members = group.members.iter();
        members.any(|member| member.tensor == tensor && member.dim == 0)
    };
    groups.iter().position(of).unwrap()
}

fn network<B: TrainingBackend>(config: &UnetConfig, weights: &StateDict) -> Network<B> {
    let zeros = Network::zeros(&Architecture::Unet(config.clone()), &Default::default());
    assign(
        zeros.unwrap(),
        weights,
        "fixture".as_ref(),
        "the fixture's model",
    )
    .unwrap()
}

fn output<B: TrainingBackend>(
    config: &UnetConfig,
    weights: &StateDict,
    file: &File,
) -> Tensor<B, 4> {
    let t = file.get("t");
    let y = Tensor::zeros([t.data.len()], &Default::default());
    network::<B>(config, weights).forward(file.get("x").tensor(), t.tensor(), y, &mut Plain)
}

/// Gradients summed over timesteps, and the losses on the way.
fn gradients<B: TrainingBackend>(
    config: &UnetConfig,
    weights: &StateDict,
    file: &File,
    case: &Value,
    (threshold, bound): (f64, Largest),
) -> StateDict {
    let network = network::<B>(config, weights);
    let process = GaussianDiffusion {
        tables: DiffusionTables::from_betas(file.get("betas").data.clone()),
        timestep_map: (0..file.get("betas").data.len()).collect(),
        variance: Variance::FixedSmall,
    };
    let clean = file.get("clean");
    let batch = ScoreBatch::<B> {
        x: clean.tensor(),
        noise: file.get("noise").tensor(),
        y: Tensor::zeros([clean.shape[0]], &Default::default()),
        t: vec![0.0; clean.shape[0]],
        known: None,
    };
    let times: Vec<f32> = (0..process.steps()).map(|step| step as f32).collect();
    let mut descent = Descent::new(threshold, true);
    let mut gradients = LossGradients::default();
    // An odd number together, so that the threshold falls into a pass.
    for times in times.chunks(3) {
        let losses = losses_at(&network, &process, &batch, times);
        let counted = descent.count(&losses.to_data().iter().collect::<Vec<f64>>());
        gradients.add(&network, Some(losses), &[counted]);
    }
    assert_eq!(descent.counted, usize_of(&case["timesteps_included"]));
    let expected = case["losses"].as_array().unwrap().iter();
    let expected = Values {
        data: expected.map(f64_of).collect(),
        shape: vec![descent.losses.len()],
    };
    let losses: Vec<f32> = descent.losses.iter().map(|loss| *loss as f32).collect();
    let losses = Tensor::<B, 1>::from_floats(losses.as_slice(), &Default::default());
    assert_eq!(expected.data.len(), descent.losses.len());
    bound.tensor("losses", losses, &expected);
    gradients.sums::<B>(&network)
}
