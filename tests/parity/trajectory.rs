use burn::module::AutodiffModule;
use burn::optim::{GradientsParams, Optimizer};
use burn::tensor::backend::Backend;
use serde_json::Value;
use tinyfusion::data::Batch;
use tinyfusion::models::DitConfig;
use tinyfusion::models::Prunable;
use tinyfusion::ops::TrainingBackend;
use tinyfusion::process::{AnyProcess, GaussianDiffusion};
use tinyfusion::pruning::{Annealing, Groups, LearnedPruner, Update};
use tinyfusion::recovery::Student;
use tinyfusion::state::{StateDict, assign, collect, names};
use tinyfusion::training::{AdamW, Ema, ParameterGroup, Schedule};

use crate::compare::{Rule, values};
use crate::fixture::{File, Group, config, dropped, f64_of, network, usize_of, usizes_of};

/// The batch at a step of a trajectory.
fn batch<B: Backend>(file: &File, config: &DitConfig, groups: usize, step: usize) -> Batch<B> {
    let row = |name: &str| file.get(name).row(step);
    Batch {
        step,
        x: row("x").tensor(),
        noise: row("noise").tensor(),
        t: row("t").times(),
        known: None,
        y: dropped(&row("y"), &row("drop_ids"), config.classes).labels(),
        gumbel: (0..groups)
            .map(|group| row(&format!("gumbel.{group}")).tensor())
            .collect(),
        teacher: None,
    }
}

/// One optimisation step, as in the training strategy; returns the norm before clipping.
fn optimise<B: TrainingBackend, M: AutodiffModule<B>>(
    model: M,
    optimizer: &mut AdamW<B>,
    lr: f64,
    loss: burn::tensor::Tensor<B, 1>,
    clip: f64,
) -> (M, f64) {
    let gradients = GradientsParams::from_grads(loss.backward(), &model);
    let norm = optimizer.clip_next(&model, &gradients, 1, clip);
    (
        Optimizer::<M, B>::step(optimizer, lr, model, gradients),
        norm,
    )
}

/// Checks the constants that the optimizer hard-codes.
fn assert_adamw(optimizer: &Value) {
    assert_eq!(optimizer["betas"], serde_json::json!([0.9, 0.999]));
    assert_eq!(optimizer["eps"], serde_json::json!(1e-8));
}

pub fn train_trajectory<B: TrainingBackend>(slack: f64) {
    train_steps::<B>(slack, Group::open("train_trajectory").steps());
}

/// The first `steps` of the trajectory, and its final weights if these are all steps.
pub fn train_steps<B: TrainingBackend>(slack: f64, steps: usize) {
    let group = Group::open("train_trajectory");
    let case = &group.case;
    let rule = Rule::new(case, slack);
    let config = config(&case["config"]);
    let (inputs, expected) = (
        group.file("inputs.safetensors"),
        group.file("expected.safetensors"),
    );
    let initial = group.state("init.safetensors");
    let diffusion = AnyProcess::from(
        GaussianDiffusion::new(case["timestep_respacing"].as_str().unwrap()).unwrap(),
    );
    let mut student = Student::new(
        network::<B>(&config, &initial),
        None,
        diffusion,
        group.steps(),
    );
    assert_adamw(&case["optimizer"]);
    let mut optimizer = AdamW::<B>::new(f64_of(&case["optimizer"]["weight_decay"]), Vec::new());
    let schedule = Schedule::new(
        f64_of(&case["optimizer"]["lr"]),
        f64_of(&case["schedule"]["eta_min"]),
        0,
        usize_of(&case["schedule"]["t_max"]),
    );
    let mut ema = Ema::new(&student, f64_of(&case["ema_decay"]));
    let check = |step: usize, key: &str, actual: f64| {
        rule.check(
            &expected.name,
            key,
            &[actual],
            &expected.get(key).row(step).scalar(),
        )
    };
    for step in 0..steps {
        let terms = student.terms(&batch(&inputs, &config, 0, step));
        let mean = |term: burn::tensor::Tensor<B, 1>| values(term.mean())[0];
        check(step, "loss", mean(terms.total.clone()));
        check(step, "mse", mean(terms.get("mse").unwrap().clone()));
        check(step, "vb", mean(terms.get("vb").unwrap().clone()));
        check(step, "lr", schedule.at(step));
        let (updated, norm) = optimise(
            student,
            &mut optimizer,
            schedule.at(step),
            terms.total.mean(),
            f64_of(&case["clip_grad_norm"]),
        );
        student = updated;
        check(step, "grad_norm", norm);
        ema.update(&student);
    }
    if steps < group.steps() {
        return;
    }
    let last = collect::<B::InnerBackend, _>(&student.network.valid());
    let average = collect::<B::InnerBackend, _>(&ema.apply(student.valid()).network);
    weights_by_distance(&group, &initial, &last, "final.safetensors");
    weights_by_distance(&group, &initial, &average, "ema.safetensors");
    let untouched = &case["untouched"];
    let (name, row) = (
        untouched["name"].as_str().unwrap(),
        usize_of(&untouched["row"]),
    );
    let row = |state: &StateDict| {
        let array = &state[name];
        let width = array.shape[1];
        array.data[row * width..(row + 1) * width].to_vec()
    };
    assert_eq!(
        row(&last),
        row(&initial),
        "a class that never occurs must not move"
    );
}

/// `l2_rule`: bounds the distance to the expected weights by the distance travelled.
fn weights_by_distance(group: &Group, initial: &StateDict, actual: &StateDict, file: &str) {
    let case = &group.case;
    let tolerance = &case["tolerance"]["overrides"][format!("{file}/*")];
    let excluded = usizes_of(&case["excluded"]["rows"]);
    for (name, expected) in group.state(file) {
        let skip = name.ends_with("attn.qkv.bias");
        let used = |index: &usize| !skip || !(excluded[0]..excluded[1]).contains(index);
        let norm = |f: &dyn Fn(usize) -> f32| {
            (0..expected.data.len())
                .filter(used)
                .map(|index| f64::from(f(index)).powi(2))
                .sum::<f64>()
                .sqrt()
        };
        let off = norm(&|index| actual[&name].data[index] - expected.data[index]);
        let travelled = norm(&|index| expected.data[index] - initial[&name].data[index]);
        let allowed = f64_of(&tolerance["l2_update"]) * travelled
            + f64_of(&tolerance["l2"]) * norm(&|index| expected.data[index]);
        assert!(
            off <= allowed,
            "{file}/{name}: {off:e} off, {allowed:e} allowed"
        );
    }
}

pub fn prune_trajectory<B: TrainingBackend>(slack: f64) {
    let group = Group::open("prune_trajectory");
    let case = &group.case;
    let rule = Rule::new(case, slack);
    let config = config(&case["config"]);
    let (inputs, expected) = (
        group.file("inputs.safetensors"),
        group.file("expected.safetensors"),
    );
    let pairs: Vec<[usize; 2]> = serde_json::from_value(case["config"]["groups"].clone()).unwrap();
    let groups = Groups::from_pairs(&pairs, config.depth).unwrap();
    let range = |name: &str| (f64_of(&case[name][0]), f64_of(&case[name][1]));
    let annealing = Annealing {
        tau: range("tau_range"),
        scaling: range("scaling_range"),
        steps: group.steps(),
    };
    let update = Update::Lora {
        rank: usize_of(&case["lora_rank"]),
        alpha: f64_of(&case["lora_alpha"]),
    };
    let pretrained = group.state("weights.safetensors");
    let diffusion = AnyProcess::from(
        GaussianDiffusion::new(case["timestep_respacing"].as_str().unwrap()).unwrap(),
    );
    let pruner = LearnedPruner::new(
        network::<B>(&config, &pretrained),
        groups.clone(),
        update,
        f64_of(&case["gate_init"]),
        annealing,
        diffusion,
        0,
    )
    .unwrap();
    let mut state = collect::<B, _>(&pruner);
    state.extend(group.state("lora_init.safetensors"));
    let mut pruner = assign::<B, _>(pruner, &state, &group.path, "the gated model").unwrap();

    let optimizer = &case["optimizer"];
    assert_adamw(optimizer);
    let gates = names::<B, _>(&pruner)
        .into_iter()
        .filter(|parameter| parameter.name.starts_with("gumbel_gates."))
        .map(|parameter| parameter.id)
        .collect();
    let (lr, lr_gates) = (
        f64_of(&optimizer["lr_lora"]),
        f64_of(&optimizer["lr_gates"]),
    );
    let mut optimizer = AdamW::<B>::new(
        f64_of(&optimizer["weight_decay"]),
        vec![ParameterGroup {
            parameters: gates,
            lr_factor: lr_gates / lr,
        }],
    );
    let mut ema = Ema::new(&pruner, f64_of(&case["ema_decay"]));
    for step in 0..group.steps() {
        let check = |key: &str, actual: &[f64], values: &crate::fixture::Values| {
            rule.check(&expected.name, key, actual, values)
        };
        let row = |key: &str| expected.get(key).row(step);
        check("tau", &[pruner.annealed(step).0], &row("tau").scalar());
        let batch = batch::<B>(&inputs, &config, groups.len(), step);
        let (terms, mask) = pruner.terms(&batch);
        for (index, (group, offset)) in groups.iter().zip(groups.offsets()).enumerate() {
            let key = format!("choice.{index}");
            let mask = values(mask.clone().narrow(1, offset, group.of()));
            let chosen: Vec<f64> = mask
                .chunks(group.of())
                .map(|row| {
                    group
                        .masks()
                        .iter()
                        .position(|candidate| {
                            candidate
                                .iter()
                                .map(|v| f64::from(*v))
                                .eq(row.iter().copied())
                        })
                        .unwrap() as f64
                })
                .collect();
            check(&key, &chosen, &row(&key));
        }
        let mean = |term: &burn::tensor::Tensor<B, 1>| values(term.clone().mean());
        check("loss", &mean(&terms.total), &row("loss").scalar());
        check(
            "mse",
            &mean(terms.get("mse").unwrap()),
            &row("mse").scalar(),
        );
        check("vb", &mean(terms.get("vb").unwrap()), &row("vb").scalar());
        let (updated, norm) = optimise(
            pruner,
            &mut optimizer,
            lr,
            terms.total.mean(),
            f64_of(&case["clip_grad_norm"]),
        );
        pruner = updated;
        check("grad_norm", &[norm], &row("grad_norm").scalar());
        ema.update(&pruner);
        let averaged = ema.apply(pruner.valid());
        for index in 0..groups.len() {
            let (gates, averages) = (format!("gates.{index}"), format!("ema_gates.{index}"));
            check(&gates, &values(pruner.gates[index].val()), &row(&gates));
            check(
                &averages,
                &values(averaged.gates[index].val()),
                &row(&averages),
            );
        }
    }
    let wanted = &case["decision"];
    let last = group.steps() - 1;
    let decision = ema.apply(pruner.valid()).decision(last);
    let raw = pruner.valid().decision(last);
    let candidates = |decision: &tinyfusion::pruning::Decision| {
        decision
            .choices
            .iter()
            .map(|choice| choice.candidate.unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(candidates(&decision), usizes_of(&wanted["argmax"]));
    assert_eq!(
        candidates(&raw),
        usizes_of(&wanted["argmax_of_raw_gates"]),
        "the raw gates decide as the reference's do"
    );
    assert_eq!(decision.kept, usizes_of(&wanted["kept"]));
    let kept = network::<B::InnerBackend>(&config, &pretrained).keep(&decision.kept);
    assert_eq!(
        collect::<B::InnerBackend, _>(&kept),
        group.state("pruned.pt")
    );
}
