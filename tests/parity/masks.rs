use tinyfusion::ops::TrainingBackend;
use tinyfusion::pruning::{Annealing, Group as PruningGroup, Groups, decide, draw};

use crate::compare::Rule;
use crate::fixture::{Group, Values, f64_of, usize_of, usizes_of};

#[test]
fn prune_masks() {
    let group = Group::open("prune_masks");
    let rule = Rule::new(&group.case, 1.0);
    let file = group.file("masks.safetensors");
    for case in group.case["cases"].as_array().unwrap() {
        let index = usize_of(&case["index"]);
        let pruning = PruningGroup::new(usize_of(&case["n"]), usize_of(&case["m"])).unwrap();
        let masks = pruning.masks();
        assert_eq!(masks.len(), usize_of(&case["num_options"]));
        assert_eq!(pruning.num_candidates(), masks.len());
        let rows = usize_of(&case["rows_in_first_and_last"]);
        let check = |key: &str, rows: &[Vec<f32>]| {
            let key = format!("{index}.{key}");
            let actual: Vec<f64> = rows.concat().into_iter().map(f64::from).collect();
            rule.check(&file.name, &key, &actual, file.get(&key));
        };
        check("first", &masks[..rows]);
        check("last", &masks[masks.len() - rows..]);
        if case["full"].as_bool().unwrap() {
            check("masks", &masks);
        }
    }
    for hybrid in group.case["hybrids"].as_array().unwrap() {
        let pairs: Vec<[usize; 2]> = serde_json::from_value(hybrid["groups"].clone()).unwrap();
        let depth = usize_of(&hybrid["depth"]);
        let groups = Groups::from_pairs(&pairs, depth).unwrap();
        assert_eq!(groups.offsets(), usizes_of(&hybrid["layer_offsets"]));
        assert_eq!(groups.kept_depth(), usize_of(&hybrid["num_kept"]));
        let kept = groups.kept(&usizes_of(&hybrid["choice"]));
        assert_eq!(kept, usizes_of(&hybrid["kept"]));
        let mask: Vec<usize> = (0..depth)
            .map(|layer| usize::from(kept.contains(&layer)))
            .collect();
        assert_eq!(mask, usizes_of(&hybrid["mask"]));
    }
}

pub fn prune_gate<B: TrainingBackend>(slack: f64) {
    let group = Group::open("prune_gate");
    let rule = Rule::new(&group.case, slack);
    let file = group.file("gates.safetensors");
    for case in group.case["cases"].as_array().unwrap() {
        let key = |name: &str| format!("{}.{name}", case["index"]);
        let input = |name: &str| file.get(&key(name)).tensor::<B, 2>();
        let pruning = PruningGroup::new(usize_of(&case["n"]), usize_of(&case["m"])).unwrap();
        let options: Vec<f64> = pruning
            .masks()
            .concat()
            .into_iter()
            .map(f64::from)
            .collect();
        rule.check(
            &file.name,
            &key("options"),
            &options,
            file.get(&key("options")),
        );
        let logits = input("logits").require_grad();
        let drawn = draw(
            pruning,
            logits.clone(),
            input("gumbel"),
            f64_of(&case["tau"]),
            f64_of(&case["scaling"]),
        );
        rule.tensor(&file.name, &key("soft"), drawn.soft, file.get(&key("soft")));
        rule.tensor(&file.name, &key("hard"), drawn.hard, file.get(&key("hard")));
        rule.tensor(
            &file.name,
            &key("mask"),
            drawn.mask.clone(),
            file.get(&key("mask")),
        );
        let gradients = (drawn.mask * input("upstream")).sum().backward();
        rule.tensor(
            &file.name,
            &key("grad_logits"),
            logits.grad(&gradients).unwrap(),
            file.get(&key("grad_logits")),
        );
    }
    for case in group.case["decisions"].as_array().unwrap() {
        let pairs: Vec<[usize; 2]> = serde_json::from_value(case["groups"].clone()).unwrap();
        let groups = Groups::from_pairs(&pairs, pairs.iter().map(|pair| pair[1]).sum()).unwrap();
        let gates: Vec<Vec<f32>> = serde_json::from_value(case["gates"].clone()).unwrap();
        let decision = decide(&groups, &gates, f64_of(&case["scaling"]));
        let choices: Vec<usize> = decision
            .choices
            .iter()
            .map(|choice| choice.candidate.unwrap())
            .collect();
        assert_eq!(choices, usizes_of(&case["argmax"]));
        assert_eq!(decision.kept, usizes_of(&case["kept"]));
        let confidence: Vec<f64> = decision
            .choices
            .iter()
            .map(|choice| choice.confidence)
            .collect();
        let expected: Vec<f64> = serde_json::from_value(case["confidence"].clone()).unwrap();
        rule.check(
            "case.json",
            "confidence",
            &confidence,
            &Values {
                shape: vec![expected.len()],
                data: expected,
            },
        );
    }
    let schedule = &group.case["schedule"];
    let pair = |name: &str| (f64_of(&schedule[name][0]), f64_of(&schedule[name][1]));
    let steps = usize_of(&schedule["total_steps"]);
    for (first, second, names) in [
        ("tau_range", "scaling_range", ("tau", "scaling")),
        ("tau_range", "other_range", ("tau", "other")),
    ] {
        let annealing = Annealing {
            tau: pair(first),
            scaling: pair(second),
            steps,
        };
        let (tau, scaling): (Vec<f64>, Vec<f64>) =
            (0..steps).map(|step| annealing.at(step)).unzip();
        for (name, actual) in [(names.0, tau), (names.1, scaling)] {
            let expected: Vec<f64> = serde_json::from_value(schedule[name].clone()).unwrap();
            rule.check(
                "case.json",
                name,
                &actual,
                &Values {
                    shape: vec![steps],
                    data: expected,
                },
            );
        }
    }
}
