//! Methods of choosing layers that need no training.

use super::program::Place;

/// The layers that a stage of a run kept.
fn kept(place: &Place, stage: &str) -> Vec<u64> {
    let model = format!("runs/choose/001/{stage}/model.safetensors");
    let told = place.run(&["inspect", &model, "--json"]).succeeded().stdout;
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["architecture"]["depth"], 6);
    let layers = told["provenance"]["kept"].as_array().unwrap().iter();
    layers.map(|layer| layer.as_u64().unwrap()).collect()
}

/// `masks.csv` of a stage: kept layers with their loss.
fn masks(place: &Place, stage: &str) -> Vec<(Vec<u64>, f64)> {
    let path = place.path(&format!("runs/choose/001/{stage}/masks.csv"));
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text.lines();
    assert_eq!(lines.clone().next(), Some("kept,loss"));
    let read = |line: &str| {
        let (kept, loss) = line.split_once(',').unwrap();
        let kept = kept.split(' ').map(|layer| layer.parse().unwrap());
        (kept.collect(), loss.parse().unwrap())
    };
    lines.skip(1).map(read).collect()
}

#[test]
fn masks_are_chosen_by_rule_or_by_their_loss_before_healing() {
    let place = Place::new();
    let stage = |name: &str, keys: &str| {
        format!(
            "[[stage]]\nkind = 'prune'\nname = '{name}'\nfrom = 'embedded:digits-teacher'\nkeep = 6\n{keys}\n"
        )
    };
    let recipe = [
        stage("uniform", "method = 'uniform'"),
        stage("first", "method = 'first'"),
        stage("lowest", "method = 'calibration'\nmasks = 30\nbatch = 4"),
        stage("median", "method = 'calibration'\nmasks = 30\nbatch = 4\npick = 'median'"),
        stage("highest", "method = 'calibration'\nmasks = 30\nbatch = 4\npick = 'highest'"),
        stage("evolve", "method = 'evolve'\nmasks = 30\nbatch = 4\npopulation = 6"),
        "[[stage]]\nkind = 'recover'\nfrom = 'lowest'\nmethod = 'masked-kd'\nteacher = 'embedded:digits-teacher'\nsteps = 1\n\
         batch = 4\n"
            .to_owned(),
        "[[stage]]\nkind = 'sample'\ncount = 2\nsteps = 2\n".to_owned(),
    ];
    place.write("choose.toml", recipe.concat());
    let plan = place.run(&["recipe", "choose.toml", "--dry-run"]);
    let plan = plan.succeeded().stdout;
    for part in [
        "prune, uniform",
        "prune, calibration",
        "prune, evolve",
        "30 steps",
    ] {
        assert!(plan.contains(part), "`{part}` is missing:\n{plan}");
    }
    place
        .run(&["recipe", "choose.toml", "--runs", "runs"])
        .succeeded();
    assert_eq!(kept(&place, "01-uniform"), [0, 2, 4, 7, 9, 11]);
    assert_eq!(kept(&place, "02-first"), [0, 1, 2, 3, 4, 5]);

    let measured = masks(&place, "03-lowest");
    assert_eq!(measured.len(), 30);
    // All three measured the same.
    assert_eq!(masks(&place, "04-median"), measured);
    assert_eq!(masks(&place, "05-highest"), measured);
    let mut by_loss = measured;
    by_loss.sort_by(|a, b| a.1.total_cmp(&b.1));
    for (stage, rank) in [("03-lowest", 0), ("04-median", 14), ("05-highest", 29)] {
        assert_eq!(kept(&place, stage), by_loss[rank].0, "{stage}");
    }

    let evolved = masks(&place, "06-evolve");
    assert_eq!(evolved.len(), 30);
    // It begins with the draws of random pruning, as the others do, on the same pictures.
    let drawn = masks(&place, "03-lowest");
    assert_eq!(evolved[..6], drawn[..6]);
    let lowest = evolved.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert_eq!(kept(&place, "06-evolve"), lowest.0);

    let wrong = stage("first", "method = 'first'\nmasks = 3").replace("keep = 6", "keep = 12");
    place.write("wrong.toml", &wrong);
    let refused = place.run(&["recipe", "wrong.toml", "--dry-run"]);
    assert_eq!(refused.status, Some(2));
    assert!(
        refused
            .stderr
            .contains("`masks` is not used by method \"first\""),
        "{}",
        refused.stderr
    );
    place.write("wrong.toml", wrong.replace("\nmasks = 3", ""));
    let refused = place.run(&["recipe", "wrong.toml", "--dry-run"]);
    assert!(
        refused.stderr.contains("must lie between 1 and 11"),
        "{}",
        refused.stderr
    );
}

#[test]
fn a_group_of_more_candidates_than_can_be_listed_is_learned_by_layer() {
    let place = Place::new();
    let recipe = "
        [[stage]]
        kind = 'train'
        name = 'teacher'
        steps = 2
        batch = 4
        architecture = { family = 'dit', width = 8, heads = 2, depth = 16 }
        [[stage]]
        kind = 'prune'
        groups = '8:16'
        steps = 4
        batch = 4
        log_every = 1
        [[stage]]
        kind = 'recover'
        method = 'masked-kd'
        teacher = 'teacher'
        steps = 2
        batch = 4
        [[stage]]
        kind = 'sample'
        count = 2
        steps = 2
    ";
    place.write("wide.toml", recipe);
    let told = place.run(&["recipe", "wide.toml", "--runs", "runs"]);
    let told = told.succeeded();
    let kept = told.stderr.lines().chain(told.stdout.lines());
    assert!(
        kept.into_iter()
            .any(|line| line.contains("group 0 keeps ["))
    );
    let at = |name: &str| place.path(&format!("runs/wide/001/02-prune/{name}"));
    let log = std::fs::read_to_string(at("decisions.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    let choice = &last["choices"][0];
    assert_eq!(choice["layers"].as_array().unwrap().len(), 8);
    let probabilities = choice["probabilities"].as_array().unwrap().iter();
    let sum: f64 = probabilities.map(|one| one.as_f64().unwrap()).sum();
    assert!((sum - 8.0).abs() < 1e-6, "{sum}");
    assert!(at("decisions.svg").exists());
}
