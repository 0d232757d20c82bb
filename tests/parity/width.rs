use std::collections::BTreeSet;

use burn::tensor::Tensor;
use serde_json::Value;
use tinyfusion::models::{Denoiser, DitConfig, Part};
use tinyfusion::ops::TrainingBackend;
use tinyfusion::process::{GaussianDiffusion, Noised, Process};
use tinyfusion::pruning::{
    Descent, Leaves, LossGradients, Saliency, ScoreBatch, importance, kept_channels, left_of,
    losses_at, mean_loss, ranked, units, units_left, without,
};
use tinyfusion::state::StateDict;
use tinyfusion::trunk::Plain;
use tinyfusion::workers::alone;

use crate::compare::{Largest, values};
use crate::fixture::{File, Group, Values, config, f64_of, network, usize_of, usizes_of};

/// Times in one pass, where the reference takes one at a time: an odd number, so that the threshold
/// falls into a pass.
const TOGETHER: usize = 3;

pub fn dit_width<B: TrainingBackend>(slack: f64) {
    let group = Group::open("dit_width");
    let expected: Value =
        serde_json::from_slice(&std::fs::read(group.path.join("expected.json")).unwrap()).unwrap();
    let file = group.file("io.safetensors");
    let weights = group.state("weights.safetensors");
    let config = config(&group.case["config"]);
    let tolerance = |key: &str| f64_of(&group.case["tolerance"][key]) * slack;

    same_members(&group, &config);
    let out = output::<B>(&config, &weights, &file);
    let outputs = Largest {
        tolerance: tolerance("out"),
    };
    outputs.tensor("full_out", out, file.get("full_out"));

    for (name, case) in expected.as_object().unwrap() {
        let gradients = match case["gradient"].as_str() {
            None => StateDict::new(),
            Some("taylor") => taylor::<B>(&group, &config, &weights, &file),
            Some(_) => threshold::<B>(&group, case, &config, &weights, &file),
        };
        let saliency = match (case["gradient"].is_null(), name.contains("multivariable")) {
            (true, _) => Saliency::Magnitude,
            (_, true) => Saliency::Multivariable,
            _ => Saliency::Taylor,
        };
        let bound = Largest {
            tolerance: tolerance("gradients"),
        };
        for key in file.names() {
            let Some(parameter) = key.strip_prefix(&format!("grad.{name}.")) else {
                continue;
            };
            let gradient = &gradients[parameter];
            let found = Tensor::<B::InnerBackend, 1>::from_floats(
                gradient.data.as_slice(),
                &Default::default(),
            );
            let expected = file.get(key);
            assert_eq!(gradient.shape, expected.shape, "{key}");
            let flat = Values {
                shape: vec![expected.data.len()],
                data: expected.data.clone(),
            };
            bound.tensor(key, found, &flat);
        }

        // What the reference does not list, or does not accept, loses nothing.
        let groups = config.channel_groups();
        let ratio = f64_of(&case["pruning_ratio"]);
        let (mut kept, mut left) = (Vec::new(), Vec::new());
        for group in &groups {
            let (count, _) = units(group, Leaves::Dims);
            let listed = case["groups"].as_array().unwrap().iter();
            let listed = listed.filter(|listed| listed["accepted"] == true);
            let listed: Vec<&Value> = listed
                .filter(|listed| listed["root"] == group.root.as_str())
                .collect();
            let [listed] = listed[..] else {
                assert!(
                    listed.is_empty() && (group.part == Part::Stream || name.contains("inner"))
                );
                kept.push((0..group.channels).collect());
                left.push(left_of(group, count, Leaves::Dims));
                continue;
            };
            let found = importance(group, &weights, &gradients, saliency);
            let near = |what: &str, found: &[f64]| {
                let key = format!("{name}.{what}.{}", group.root);
                let expected = &file.get(&key).data;
                assert_eq!(found.len(), expected.len(), "{key}");
                for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
                    let allowed = tolerance(what) * (expected.abs() + 1.0);
                    assert!(
                        (found - expected).abs() <= allowed,
                        "{key}[{index}]: {found} is not {expected}"
                    );
                }
            };
            near("importance", &found);
            let ranked = ranked(group, &found, Leaves::Dims);
            if group.heads > 1 {
                near("ranked", &ranked);
            }
            assert_eq!(ranked.len(), usize_of(&listed["ranked"]));
            let keep = units_left(count, group.slices, ratio);
            assert_eq!(count - keep, usize_of(&listed["n_pruned"]), "{name}");
            let stays = kept_channels(group, &ranked, keep, Leaves::Dims);
            let leaves: Vec<usize> = (0..group.channels)
                .filter(|channel| !stays.contains(channel))
                .collect();
            assert_eq!(
                leaves,
                usizes_of(&listed["pruned"]),
                "{name}, {}",
                group.root
            );
            kept.push(stays);
            left.push(left_of(group, keep, Leaves::Dims));
        }

        let pruned = without(weights.clone(), &groups, &kept);
        let narrowed = config.narrowed(&left);
        let stored = match name.as_str() {
            "taylor" => Some("pruned.safetensors"),
            "inner_only" => Some("pruned_inner_only.safetensors"),
            _ => None,
        };
        if let Some(stored) = stored {
            assert_eq!(pruned, group.state(stored), "{name}");
        }
        for (tensor, shape) in case["shapes"].as_object().unwrap() {
            assert_eq!(pruned[tensor].shape, usizes_of(shape), "{name}, {tensor}");
        }
        let blocks = narrowed.widths().blocks;
        let heads: Vec<usize> = blocks.iter().map(|block| block.heads).collect();
        let dims: Vec<usize> = blocks.iter().map(|block| block.head_dim).collect();
        assert_eq!(heads, usizes_of(&case["num_heads"]), "{name}");
        assert_eq!(dims, usizes_of(&case["head_dim"]), "{name}");
        // Products are counted otherwise than by Torch-Pruning, which counts biases too.
        let parameters = |config: &DitConfig| -> usize {
            let tensors = config.tensors().into_iter();
            tensors
                .map(|(_, shape)| shape.iter().product::<usize>())
                .sum()
        };
        assert_eq!(
            [parameters(&config), parameters(&narrowed)],
            usizes_of(&case["parameters"])[..],
            "{name}"
        );
        let key = format!("{name}.out");
        outputs.tensor(&key, output::<B>(&narrowed, &pruned, &file), file.get(&key));
    }
}

/// The groups have the members that the reference finds by tracing; that of the residual stream
/// apart, which it counts otherwise.
fn same_members(group: &Group, config: &DitConfig) {
    let listed: Value =
        serde_json::from_slice(&std::fs::read(group.path.join("groups.json")).unwrap()).unwrap();
    let ours = config.channel_groups();
    let ours: Vec<_> = ours
        .iter()
        .filter(|group| group.part != Part::Stream)
        .collect();
    let listed = &listed.as_array().unwrap()[1..];
    assert_eq!(ours.len(), listed.len());
    for (ours, listed) in ours.iter().zip(listed) {
        assert_eq!(listed["root"], ours.root.as_str());
        assert_eq!(usize_of(&listed["channels"]), ours.channels);
        assert_eq!(usize_of(&listed["heads"]), ours.heads);
        let members = listed["members"].as_array().unwrap().iter();
        let expected: BTreeSet<(String, usize, Vec<usize>)> = members
            .map(|member| {
                let [layer, side, offsets, first] = &member.as_array().unwrap()[..] else {
                    panic!("{member}");
                };
                assert_eq!(usize_of(first), 0);
                let layer = layer.as_str().unwrap();
                // A table's outputs are its columns.
                let dim = usize::from(side == "in" || layer.ends_with("table"));
                (format!("{layer}.weight"), dim, usizes_of(offsets))
            })
            .collect();
        let members = ours.members.iter();
        let members = members.filter(|member| member.tensor.ends_with(".weight"));
        let found =
            members.map(|member| (member.tensor.clone(), member.dim, member.offsets.clone()));
        assert_eq!(found.collect::<BTreeSet<_>>(), expected, "{}", ours.root);
    }
}

fn output<B: TrainingBackend>(
    config: &DitConfig,
    weights: &StateDict,
    file: &File,
) -> Tensor<B::InnerBackend, 4> {
    network::<B::InnerBackend>(config, weights).forward(
        file.get("test_x").tensor(),
        file.get("test_t").tensor(),
        file.get("test_y").labels(),
        &mut Plain,
    )
}

/// Gradients summed over the batches.
fn taylor<B: TrainingBackend>(
    group: &Group,
    config: &DitConfig,
    weights: &StateDict,
    file: &File,
) -> StateDict {
    let network = network::<B>(config, weights);
    let process = GaussianDiffusion::new(group.case["respacing"].as_str().unwrap()).unwrap();
    let losses = Largest {
        tolerance: f64_of(&group.case["tolerance"]["losses"]),
    };
    let mut gradients = LossGradients::default();
    for index in 0..usize_of(&group.case["batches"]) {
        let row = |key: &str| file.get(key).row(index);
        let batch = ScoreBatch::<B> {
            x: row("x").tensor(),
            noise: row("noise").tensor(),
            y: row("y").labels(),
            t: row("t").times(),
            known: None,
        };
        let seen = Noised::new(
            &process,
            batch.x.clone(),
            batch.noise.clone(),
            batch.t.clone(),
            batch.y.clone(),
            None,
        );
        let told = process.told::<B>(&batch.t, &Default::default());
        assert_eq!(values(told), row("model_t").data);
        let output = seen.run(&process, &network, &mut Plain);
        let terms = seen.terms(&process, output);
        for term in ["mse", "vb"] {
            let found = terms.get(term).unwrap().clone();
            losses.tensor(term, found, &row(&format!("taylor.{term}")));
        }
        let loss = mean_loss(&network, &process, &batch);
        gradients.add(&network, Some(loss), &[1]);
    }
    gradients.sums::<B>(&network)
}

/// Gradients summed over timesteps until the loss has fallen.
fn threshold<B: TrainingBackend>(
    group: &Group,
    case: &Value,
    config: &DitConfig,
    weights: &StateDict,
    file: &File,
) -> StateDict {
    let network = network::<B>(config, weights);
    let respacing = group.case["respacing_threshold"].as_str().unwrap();
    let process = GaussianDiffusion::new(respacing).unwrap();
    let last_counts = case["test_before_backward"] == false;
    let mut descent = Descent::new(f64_of(&case["thr"]), last_counts);
    let x = file.get("thr_x");
    let batch = ScoreBatch::<B> {
        x: x.tensor(),
        noise: file.get("thr_noise").tensor(),
        y: file.get("thr_y").labels(),
        t: vec![0.0; x.shape[0]],
        known: None,
    };
    let times: Vec<f32> = (0..process.steps()).map(|step| step as f32).collect();
    let mut gradients = LossGradients::default();
    for times in times.chunks(TOGETHER) {
        let losses = losses_at(&network, &process, &batch, times);
        let counted = descent.count(&losses.to_data().iter().collect::<Vec<f64>>());
        gradients.add(&network, Some(losses), &[counted]);
        let sums = gradients.sums::<B>(&network);
        gradients = LossGradients::resumed(&alone(), &network, &sums);
    }
    let expected = case["losses"].as_array().unwrap();
    assert_eq!(descent.losses.len(), expected.len());
    assert_eq!(descent.counted, usize_of(&case["timesteps_included"]));
    let tolerance = f64_of(&group.case["tolerance"]["losses"]);
    let expected: Vec<f64> = expected.iter().map(f64_of).collect();
    let largest = expected.iter().copied().fold(0.0, f64::max);
    for (found, expected) in descent.losses.iter().zip(expected) {
        assert!(
            (found - expected).abs() <= tolerance * largest,
            "{found}, {expected}"
        );
    }
    gradients.sums::<B>(&network)
}
