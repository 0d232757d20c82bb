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
    // Each is saved, loaded, and sampled from.
    let ways = ["uniform", "first", "median", "highest", "evolve"];
    let samples = ways.map(|way| {
        format!(
            "[[stage]]\nkind = 'sample'\nname = 'of-{way}'\nfrom = '{way}'\ncount = 2\nsteps = 2\n"
        )
    });
    place.write("choose.toml", recipe.concat() + &samples.concat());
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
    for (way, number) in ways.iter().zip(9..) {
        let samples = format!("runs/choose/001/{number:02}-of-{way}/samples.npz");
        assert!(place.path(&samples).exists(), "{samples}");
    }
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

#[test]
fn branches_are_pruned_one_by_one() {
    let place = Place::new();
    let recipe = "
        [[stage]]
        kind = 'prune'
        name = 'learned'
        from = 'embedded:digits-teacher'
        granularity = 'branch'
        groups = '2:4'
        start = 'update'
        steps = 2
        batch = 4
        [[stage]]
        kind = 'recover'
        name = 'student'
        method = 'masked-kd'
        teacher = 'embedded:digits-teacher'
        steps = 2
        batch = 4
        [[stage]]
        kind = 'prune'
        name = 'again'
        method = 'sensitivity'
        granularity = 'branch'
        keep = 7
        batch = 4
        [[stage]]
        kind = 'sample'
        count = 2
        steps = 2
        [[stage]]
        kind = 'prune'
        name = 'chosen'
        from = 'embedded:digits-teacher'
        method = 'kept'
        granularity = 'branch'
        kept = [0, 3, 4, 5, 7]
    ";
    place.write("branch.toml", recipe);
    let plan = place.run(&["recipe", "branch.toml", "--dry-run"]);
    let plan = plan.succeeded().stdout;
    for part in [
        "prune, learned, by branch",
        "which branches stay is known once it has run",
        // Attention of layer 0, the MLP of 1, both of 2, the MLP of 3.
        "4 layers (5 of 8 branches)",
    ] {
        assert!(plan.contains(part), "`{part}` is missing:\n{plan}");
    }
    let told = place.run(&["recipe", "branch.toml", "--runs", "runs"]);
    let told = told.succeeded();
    assert!((told.stdout + &told.stderr).contains("with the weights trained along with the masks"));
    let inspect = |path: &str| -> serde_json::Value {
        let told = place.run(&["inspect", path, "--json"]).succeeded().stdout;
        serde_json::from_str(&told).unwrap()
    };
    let model = "runs/branch/001/02-student/model.safetensors";
    let found = inspect(model);
    assert_eq!(found["provenance"]["granularity"], "branch");
    assert_eq!(found["provenance"]["parent_depth"], 24);
    assert_eq!(found["provenance"]["kept"].as_array().unwrap().len(), 12);
    let chosen = "runs/branch/001/05-chosen/model.safetensors";
    let found = inspect(chosen);
    let blocks = serde_json::json!(["attention", "mlp", "whole", "mlp"]);
    assert_eq!(found["architecture"]["blocks"], blocks);

    // Other formats show by their tensors what each block has.
    place.run(&["convert", chosen, "chosen.pt"]).succeeded();
    let heads = found["architecture"]["heads"].to_string();
    let again = place.run(&["inspect", "chosen.pt", "--heads", &heads, "--json"]);
    let again: serde_json::Value = serde_json::from_str(&again.succeeded().stdout).unwrap();
    assert_eq!(again["architecture"], found["architecture"]);
    assert_eq!(again["parameters"], found["parameters"]);
    place.run(&["convert", chosen, "folder"]).succeeded();
    assert_eq!(inspect("folder")["architecture"], found["architecture"]);
    let card = std::fs::read_to_string(place.path("folder/README.md")).unwrap();
    for part in ["5 of 24 branches", "class Pair"] {
        assert!(card.contains(part), "`{part}` is missing:\n{card}");
    }
    let refused = place.run(&["convert", chosen, "diffusers", "--diffusers"]);
    assert_ne!(refused.status, Some(0));
    let why = "has one whole block after another";
    assert!(refused.stderr.contains(why), "{}", refused.stderr);
    assert!(!place.path("diffusers").exists());

    for (wrong, why) in [
        (
            recipe.replace(
                "method = 'sensitivity'\n        granularity = 'branch'\n        keep = 7\n        batch = 4",
                "method = 'first'\n        keep = 7",
            ),
            "prune it further by branch too",
        ),
        (
            recipe.replace(
                "groups = '2:4'\n        start = 'update'",
                "groups = '2:4'\n        start = 'average'",
            ),
            "`start`: \"average\" is of whole blocks",
        ),
        (
            recipe.replace(
                "start = 'update'",
                "start = 'update'\n        update = 'frozen'",
            ),
            "needs weights that are trained along",
        ),
        (
            recipe.replace("method = 'sensitivity'", "method = 'oracle'"),
            "`granularity` is not used by method \"oracle\"",
        ),
        (
            recipe.replace(
                "method = 'sensitivity'",
                "method = 'sensitivity'\n        start = 'update'",
            ),
            "trained along with the masks, of method \"learned\"",
        ),
        (
            recipe.replace("kept = [0, 3, 4, 5, 7]", "kept = [0, 24]"),
            "`kept` names branch 24; there are 24 branches, counted from 0",
        ),
    ] {
        place.write("wrong.toml", wrong);
        let refused = place.run(&["recipe", "wrong.toml", "--dry-run"]);
        assert_ne!(refused.status, Some(0), "{why}");
        assert!(refused.stderr.contains(why), "{why}:\n{}", refused.stderr);
    }
}

#[test]
fn a_model_is_looked_into() {
    let place = Place::new();
    let recipe = "
        [[stage]]
        kind = 'prune'
        name = 'first'
        from = 'embedded:digits-teacher'
        method = 'first'
        keep = 6
        [[stage]]
        kind = 'prune'
        name = 'fewer'
        from = 'embedded:digits-teacher'
        method = 'first'
        keep = 4
        [[stage]]
        kind = 'analyse'
        from = 'embedded:digits-teacher'
        batch = 4
        masks = 20
    ";
    place.write("look.toml", recipe);
    let told = place.run(&["recipe", "look.toml", "--runs", "runs"]);
    told.succeeded();
    let read = |name: &str| {
        let path = place.path(&format!("runs/look/001/03-analyse/{name}"));
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    for (table, lines) in [
        ("states.csv", 1 + 12),
        ("scores.csv", 1 + 12),
        ("masks.csv", 1 + 20),
        // The pruned model of as many layers, and the whole one.
        ("losses-marked.csv", 1 + 2),
        // The states before each layer, and after the last.
        ("similarity.csv", 13),
        // Of eight depths, and of all widths but the least, which can't be reached.
        ("speed.csv", 1 + 8 + 6),
    ] {
        let text = read(table);
        let found = text.lines().count();
        assert_eq!(found, lines, "{table}:\n{text}");
        assert!(!text.contains("NaN"), "{table}:\n{text}");
    }
    assert!(read("losses-marked.csv").contains("\nfirst,0 1 2 3 4 5,0."));
    let speed = read("speed.csv");
    let sizes: Vec<[f64; 2]> = (speed.lines().skip(1))
        .map(|line| {
            let cells: Vec<&str> = line.split(',').collect();
            [cells[1], cells[2]].map(|cell| cell.parse().unwrap())
        })
        .collect();
    let narrower = speed.lines().filter(|line| line.starts_with("width,12,"));
    assert_eq!(narrower.count(), 6, "{speed}");
    // The whole model first; each way goes down in parameters.
    let [whole, smallest] = [sizes[0], sizes[7]];
    assert!(whole[0] == 12.0 && smallest[0] == 2.0, "{speed}");
    for way in [&sizes[..8], &sizes[8..]] {
        assert!(way.is_sorted_by(|a, b| a[1] > b[1]), "{speed}");
    }
    for figure in [
        "states-histograms.svg",
        "states-by-layer.svg",
        "similarity.svg",
        "scores-shortgpt.svg",
        "scores-flux-lite.svg",
        "scores-sensitivity.svg",
        "losses.svg",
        "speed.svg",
    ] {
        let svg = read(figure);
        assert!(
            svg.ends_with("</svg>\n") && svg.contains("<title>"),
            "{figure}"
        );
    }

    for (wrong, why) in [
        (
            recipe.replace("masks = 20", "mark = ['fewer']"),
            "`mark` names `fewer`, which has 4 layers, and `keep` is 6",
        ),
        (
            recipe.replace("masks = 20", "show = ['states', 'score']"),
            "found \"score\"",
        ),
        (
            recipe.replace("masks = 20", "show = ['states']\n        keep = 3"),
            "`keep` is not used by a `show` without \"losses\"",
        ),
        (
            recipe.replace("masks = 20", "keep = 12"),
            "`keep` is 12, which must lie between 1 and 11 for 12 layers",
        ),
    ] {
        place.write("wrong.toml", wrong);
        let refused = place.run(&["recipe", "wrong.toml", "--dry-run"]);
        assert_ne!(refused.status, Some(0), "{why}");
        assert!(refused.stderr.contains(why), "{why}:\n{}", refused.stderr);
    }
}

#[test]
fn intervals_are_trained_once_for_several_depths() {
    let place = Place::new();
    let recipe = "
        [[stage]]
        kind = 'prune'
        name = 'six'
        from = 'embedded:digits-teacher'
        method = 'intervals'
        keep = 6
        steps = 3
        batch = 8
        [[stage]]
        kind = 'prune'
        name = 'eight'
        from = 'embedded:digits-teacher'
        method = 'intervals'
        keep = 11
        trained = 'six'
        [[stage]]
        kind = 'recover'
        method = 'masked-kd'
        teacher = 'embedded:digits-teacher'
        steps = 2
        batch = 4
        [[stage]]
        kind = 'sample'
        count = 2
        steps = 2
        [[stage]]
        kind = 'prune'
        name = 'pairs'
        from = 'embedded:digits-teacher'
        method = 'parallel'
        steps = 3
        batch = 8
        [[stage]]
        kind = 'recover'
        name = 'paired'
        method = 'masked-kd'
        taps = [[0, 1], [5, 11]]
        teacher = 'embedded:digits-teacher'
        steps = 2
        batch = 4
        [[stage]]
        kind = 'sample'
        name = 'samples-of-pairs'
        count = 2
        steps = 2
    ";
    place.write("spans.toml", recipe);
    let plan = place.run(&["recipe", "spans.toml", "--dry-run"]);
    let plan = plan.succeeded().stdout;
    assert!(
        plan.contains("six: prune, intervals") && plan.contains("DiT, 11 layers"),
        "{plan}"
    );
    place
        .run(&["recipe", "spans.toml", "--runs", "runs"])
        .succeeded();
    let at = |name: &str| place.path(&format!("runs/spans/001/{name}"));
    let text = std::fs::read_to_string(at("01-six/intervals.json")).unwrap();
    let found: serde_json::Value = serde_json::from_str(&text).unwrap();
    let intervals = found["intervals"].as_array().unwrap();
    assert_eq!(intervals.len(), 6);
    // They cover the trunk without a gap.
    let mut next = 0;
    for interval in intervals {
        assert_eq!(interval["first"], next);
        next = interval["last"].as_u64().unwrap() + 1;
        let replaced = interval["first"] != interval["last"];
        assert_eq!(
            interval["error"].as_f64().unwrap() > 0.0,
            replaced,
            "{interval}"
        );
    }
    assert_eq!(next, 12);
    assert!(at("01-six/similarity.svg").exists());

    let paired = "runs/spans/001/06-paired/model.safetensors";
    let inspect = |arguments: &[&str]| -> serde_json::Value {
        let told = place.run(&[&["inspect", "--json"], arguments].concat());
        serde_json::from_str(&told.succeeded().stdout).unwrap()
    };
    let found = inspect(&[paired]);
    assert_eq!(found["architecture"]["depth"], 6);
    assert_eq!(
        found["architecture"]["blocks"],
        serde_json::json!(vec!["pair"; 6])
    );
    place.run(&["convert", paired, "paired.pt"]).succeeded();
    let heads = found["architecture"]["heads"].to_string();
    let again = inspect(&["paired.pt", "--heads", &heads]);
    assert_eq!(again["architecture"], found["architecture"]);
    let metrics = std::fs::read_to_string(at("01-six/metrics.jsonl")).unwrap();
    assert!(
        metrics.lines().all(|line| line.contains("\"error\":")),
        "{metrics}"
    );

    for (wrong, why) in [
        (
            recipe.replace("trained = 'six'", "trained = 'six'\n        steps = 3"),
            "`steps` is not used by a stage with `trained`",
        ),
        (
            recipe.replace(
                "keep = 6\n        steps = 3\n        batch = 8",
                "keep = 6\n        trained = 'eight'",
            ),
            "does not run before this one",
        ),
        (
            recipe.replace(
                "method = 'intervals'\n        keep = 6\n        steps = 3\n        batch = 8",
                "method = 'first'\n        keep = 6",
            ),
            "trains no layers in the place of others",
        ),
        (
            recipe.replace("keep = 6\n", "keep = 6\n        start = 'average'\n"),
            "`start` is not used by method \"intervals\"",
        ),
    ] {
        place.write("wrong.toml", wrong);
        let refused = place.run(&["recipe", "wrong.toml", "--dry-run"]);
        assert_ne!(refused.status, Some(0), "{why}");
        assert!(refused.stderr.contains(why), "{why}:\n{}", refused.stderr);
    }
}
