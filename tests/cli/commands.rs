use crate::program::{Place, root, short_quickstart};

#[test]
fn a_dry_run_prints_the_plan_and_writes_nothing() {
    let place = Place::new();
    for recipe in std::fs::read_dir(root().join("recipes")).unwrap() {
        let recipe = recipe.unwrap().path();
        if recipe.extension().is_none_or(|ending| ending != "toml") {
            continue;
        }
        let finished = place
            .run(&["recipe", recipe.to_str().unwrap(), "--dry-run"])
            .succeeded();
        assert!(
            ["parameters", "classifier", "standin-dit.pt"]
                .iter()
                .any(|word| finished.stdout.contains(word)),
            "{}",
            finished.stdout
        );
    }
    let arguments = short_quickstart("runs");
    let arguments: Vec<&str> = arguments
        .iter()
        .map(String::as_str)
        .chain(["--dry-run"])
        .collect();
    let plan = place.run(&arguments).succeeded().stdout;
    for part in [
        "prune, learned",
        "12 layers",
        "6 layers",
        "8 steps, 64 images",
        "recover, masked-kd",
        "prune, oracle",
        "prune, random",
        "MiB",
    ] {
        assert!(plan.contains(part), "`{part}` is missing:\n{plan}");
    }
    assert_eq!(place.files(), []);
}

#[test]
fn inspect_tells_what_a_checkpoint_holds() {
    let place = Place::new();
    let text = place
        .run(&["inspect", "embedded:digits-teacher"])
        .succeeded()
        .stdout;
    assert!(
        text.contains("DiT, 12 layers, width 64") && text.contains("recipe digits_teacher"),
        "{text}"
    );
    let json = place
        .run(&["inspect", "embedded:digits-features", "--json"])
        .succeeded()
        .stdout;
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(value["architecture"]["family"], "classifier");
}

#[test]
fn samples_do_not_depend_on_the_batch_they_are_made_in() {
    let place = Place::new();
    let sample = |runs: &str, batch: &str, solver: &str| {
        place
            .run(&[
                "sample",
                "embedded:digits-teacher",
                "--count",
                "7",
                "--steps",
                "3",
                "--batch",
                batch,
                "--solver",
                solver,
                "--runs",
                runs,
            ])
            .succeeded();
        let folder = place.path(&format!("{runs}/sample/001/01-sample"));
        let samples = tinyfusion::npz::read_samples(&folder.join("samples.npz")).unwrap();
        assert_eq!(samples.images.shape(), [7, 8, 8, 1]);
        assert_eq!(samples.labels.unwrap(), [0, 1, 2, 3, 4, 5, 6]);
        samples.images.pixels().to_vec()
    };
    for solver in ["ddpm", "ddim"] {
        let together = sample(&format!("{solver}-7"), "7", solver);
        for batch in ["1", "3"] {
            // Not exact: the order of a matrix product's sums depends on its number of rows, and a
            // value between two bytes may round to either.
            let apart = sample(&format!("{solver}-{batch}"), batch, solver);
            assert!(
                together
                    .iter()
                    .zip(&apart)
                    .all(|(a, b)| a.abs_diff(*b) <= 1),
                "{solver}, batch {batch}"
            );
        }
    }
}

#[test]
fn every_method_of_pruning_and_recovery_runs() {
    let place = Place::new();
    let mut stages = String::new();
    for (name, lines) in [
        (
            "shortgpt",
            "method = 'shortgpt'\nkeep = 6\nbatches = 1\nbatch = 4",
        ),
        (
            "flux-lite",
            "method = 'flux-lite'\nkeep = 7\nbatches = 1\nbatch = 4",
        ),
        (
            "sensitivity",
            "method = 'sensitivity'\nkeep = 8\nbatches = 1\nbatch = 4",
        ),
        ("kept", "method = 'kept'\nkept = [0, 3, 4, 7, 9, 11]"),
        (
            "hybrid",
            "groups = [[2, 4], [3, 4], [1, 2], [1, 2]]\nupdate = 'full'\nsteps = 2\nbatch = 4",
        ),
        (
            "frozen",
            "groups = '2:4'\nupdate = 'frozen'\nsteps = 2\nbatch = 4",
        ),
        (
            "protected",
            "groups = [[4, 4], [1, 2], [2, 4], [1, 2]]\nsteps = 2\nbatch = 4",
        ),
        ("random", "method = 'random'\nkeep = 6"),
    ] {
        stages += &format!(
            "[[stage]]\nkind = 'prune'\nname = '{name}'\nfrom = 'embedded:digits-teacher'\n{lines}\n"
        );
    }
    for (name, from, lines) in [
        ("tune", "shortgpt", "method = 'fine-tune'"),
        (
            "kd",
            "flux-lite",
            "method = 'kd'\nteacher = 'embedded:digits-teacher'",
        ),
        (
            "rep",
            "kept",
            "method = 'rep-kd'\nteacher = 'embedded:digits-teacher'",
        ),
        (
            "masked",
            "hybrid",
            "method = 'masked-kd'\nteacher = 'embedded:digits-teacher'\ntaps = [[0, 1], [6, 11]]",
        ),
    ] {
        stages += &format!(
            "[[stage]]\nkind = 'recover'\nname = '{name}'\nfrom = '{from}'\nsteps = 2\nbatch = 4\n{lines}\n"
        );
    }
    place.write("all.toml", format!("data = 'digits'\n{stages}"));
    place.run(&["recipe", "all.toml"]).succeeded();
    let inspected = place
        .run(&[
            "inspect",
            "artifacts/runs/all/001/12-masked/model.safetensors",
        ])
        .succeeded()
        .stdout;
    assert!(
        inspected.contains("7 layers") && inspected.contains("of 12 layers"),
        "{inspected}"
    );
    let kept = |stage: &str| {
        let model = format!("artifacts/runs/all/001/{stage}/model.safetensors");
        let json = place.run(&["inspect", &model, "--json"]).succeeded().stdout;
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        serde_json::from_value::<Vec<usize>>(value["provenance"]["kept"].clone()).unwrap()
    };
    let protected = kept("07-protected");
    assert_eq!((&protected[..4], protected.len()), (&[0, 1, 2, 3][..], 8));
    let random = kept("08-random");
    assert!(random.len() == 6 && random.is_sorted(), "{random:?}");
}

#[test]
fn a_budget_too_short_for_its_average_is_noted() {
    let place = Place::new();
    let recover = |more: &str| {
        let text = format!(
            "[[stage]]\nkind = 'recover'\nfrom = 'embedded:digits-teacher'\nmethod = 'fine-tune'\nsteps = 300\n{more}"
        );
        place.write("short.toml", text);
        place
            .run(&["recipe", "short.toml", "--dry-run"])
            .succeeded()
            .stdout
    };
    // 0.999^300 = 0.74; the default, unlike the reference's rule, warms up.
    let reference = recover("ema_warmup = false");
    assert!(
        reference.contains("note: after 300 steps, 74% of the average (ema = 0.999)"),
        "{reference}"
    );
    assert!(!recover("").contains("note:"));
    assert!(!recover("ema_warmup = false\nema = 0.98").contains("note:"));
}

#[test]
fn a_short_training_leaves_what_it_learned() {
    let place = Place::new();
    let train = "[[stage]]\nkind = 'train'\nsteps = 40\nbatch = 4\nema_warmup = WARM\n[stage.architecture]\nfamily = 'dit'\ndepth = 1\nwidth = 16\nheads = 2\n";
    let distance = |warm: &str| {
        let name = format!("average-{warm}");
        place.write(&format!("{name}.toml"), train.replace("WARM", warm));
        place.run(&["recipe", &format!("{name}.toml")]).succeeded();
        let model = place.path(&format!(
            "artifacts/runs/{name}/001/01-train/model.safetensors"
        ));
        let state = tinyfusion::weights::read_safetensors(&model).unwrap().0;
        // The bias starts at zero, so its norm in the average is what the average has learned.
        let last = &state["final_layer.linear.bias"].data;
        last.iter().map(|value| value * value).sum::<f32>().sqrt()
    };
    // With the decay of 0.999 from the start, the average is 96% initial weights after 40 steps.
    let (warmed, constant) = (distance("true"), distance("false"));
    assert!(warmed > 10.0 * constant, "{warmed} {constant}");
}

#[test]
fn data_of_ones_own_are_not_measured_against_the_digits() {
    let place = Place::new();
    place.write(
        "own.toml",
        "data = 'my/latents'\n[[stage]]\nkind = 'evaluate'\ncompare = ['embedded:digits-teacher']\n",
    );
    for more in [&["--dry-run"][..], &[]] {
        let arguments = [&["recipe", "own.toml"], more].concat();
        let refused = place.run(&arguments);
        assert_eq!(refused.status, Some(2));
        for part in [
            "held-out pictures",
            "my/latents",
            "`reference`",
            "`inception`",
        ] {
            assert!(refused.stderr.contains(part), "{}", refused.stderr);
        }
    }
}

#[test]
fn a_model_of_other_pictures_is_told_what_to_be_measured_against() {
    let place = Place::new();
    let config = tinyfusion::models::DitConfig {
        input_size: 32,
        patch_size: 4,
        channels: 3,
        width: 16,
        depth: 1,
        heads: 2,
        mlp_ratio: 4.0,
        classes: 10,
        learn_sigma: false,
        blocks: Vec::new(),
        widths: None,
    };
    type Network = tinyfusion::models::Network<burn_ndarray::NdArray>;
    let network = Network::zeros(&config.into(), &Default::default()).unwrap();
    let model = place.path("own.safetensors");
    tinyfusion::weights::Checkpoint::of(&network, Default::default(), &model)
        .write()
        .unwrap();
    let refused = place.run(&["evaluate", "own.safetensors"]);
    assert_eq!(refused.status, Some(2));
    for part in ["draws 3x32x32", "`reference`", "`inception`", "--data"] {
        assert!(refused.stderr.contains(part), "{}", refused.stderr);
    }
}

#[test]
fn samples_are_written_as_pictures_with_drawn_labels() {
    let place = Place::new();
    let arguments = [
        "sample",
        "embedded:digits-teacher",
        "--count",
        "12",
        "--steps",
        "2",
        "--labels",
        "drawn",
        "--images",
        "pictures",
    ];
    let drawn = place.run(&arguments).succeeded();
    assert!(drawn.stdout.ends_with("pictures\n"), "{}", drawn.stdout);
    let archive = place.path("artifacts/runs/sample/001/01-sample/samples.npz");
    let samples = tinyfusion::npz::read_samples(&archive).unwrap();
    assert_eq!(
        std::fs::read_dir(place.path("pictures")).unwrap().count(),
        12
    );
    let labels = samples.labels.unwrap();
    assert_ne!(labels[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    // Another count draws the same labels first, and nothing is drawn if pictures can't be written.
    let again = place.run(&arguments);
    assert_eq!(again.status, Some(2));
    assert!(again.stderr.contains("nothing is overwritten"));
    assert!(!place.path("artifacts/runs/sample/002").exists());
}

#[test]
fn every_workload_is_timed() {
    let place = Place::new();
    for workload in ["infer", "finetune", "prune", "masked-kd", "sample"] {
        let arguments = [
            "bench",
            "--workload",
            workload,
            "--depth",
            "2",
            "--width",
            "16",
            "--heads",
            "2",
            "--tokens",
            "4",
            "--batch",
            "2",
            "--repeats",
            "2",
            "--warmup",
            "0",
            "--json",
        ];
        let text = place.run(&arguments).succeeded().stdout;
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["workload"], workload);
        assert!(value["median_ms"].as_f64().unwrap() > 0.0, "{value}");
        assert_eq!(value["runs_ms"].as_array().unwrap().len(), 2);
    }
}

#[test]
fn seeds_are_summed_up() {
    let place = Place::new();
    let arguments = short_quickstart("runs");
    let arguments: Vec<&str> = arguments
        .iter()
        .map(String::as_str)
        .chain([
            "--seeds",
            "2",
            "--set",
            "stage.prune.steps=1",
            "--set",
            "stage.learned.steps=1",
            "--set",
            "stage.oracle.steps=1",
        ])
        .collect();
    let text = place.run(&arguments).succeeded().stdout;
    assert!(
        text.contains("2 seeds, mean ± standard deviation"),
        "{text}"
    );
    for file in ["sweep.json", "sweep.csv", "002-seed1/resolved.toml"] {
        let path = format!("runs/quickstart/001/{file}");
        assert!(place.path(&path).exists(), "{path}");
    }
}

#[test]
fn help_has_examples_and_completions_are_written() {
    let place = Place::new();
    let help = place.run(&["recipe", "--help"]).succeeded().stdout;
    assert!(
        help.contains("Examples:") && help.contains("--resume"),
        "{help}"
    );
    let completions = place.run(&["completions", "bash"]).succeeded().stdout;
    assert!(completions.contains("_tinyfusion"));
}

#[test]
fn a_model_without_a_learned_variance_is_trained_and_sampled() {
    let place = Place::new();
    let train = "[[stage]]\nkind = 'train'\nsteps = 2\nbatch = 4\n[stage.architecture]\nfamily = 'dit'\ndepth = 1\nwidth = 16\nheads = 2\nmlp_ratio = 1.3\nlearn_sigma = false\n";
    place.write(
        "plain.toml",
        format!("{train}[[stage]]\nkind = 'sample'\ncount = 3\nsteps = 3\n"),
    );
    place.run(&["recipe", "plain.toml"]).succeeded();
    let inspected = place
        .run(&[
            "inspect",
            "artifacts/runs/plain/001/01-train/model.safetensors",
        ])
        .succeeded()
        .stdout;
    assert!(inspected.contains("DiT, 1 layer, width 16"), "{inspected}");
}

#[test]
fn the_recipes_of_the_readme_can_be_planned() {
    let place = Place::new();
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let blocks: Vec<&str> = readme
        .split("```toml\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect();
    assert!(blocks.len() >= 2 && blocks[0].contains("mine.toml"));
    // The folder of pictures in one of the recipes.
    for class in ["rose", "tulip"] {
        for index in 0..60 {
            place.write(&format!("flowers/{class}/{index}.png"), "");
        }
    }
    for block in blocks {
        place.write("mine.toml", block);
        let plan = place.run(&["recipe", "mine.toml", "--dry-run"]).succeeded();
        assert!(plan.stdout.contains("prune, learned"), "{}", plan.stdout);
    }
}

#[test]
fn sets_that_can_not_be_compared_are_refused_before_anything_is_measured() {
    let place = Place::new();
    let archive = |name: &str, count: usize| {
        let images =
            tinyfusion::images::Images::new(vec![7; count * 12], [count, 2, 2, 3]).unwrap();
        tinyfusion::npz::write_samples(&place.path(name), &images, None).unwrap();
    };
    archive("ours.npz", 5);
    archive("theirs.npz", 4);
    for (name, width) in [("mixed/a/1.png", 4), ("mixed/b/2.png", 6)] {
        let path = place.write(name, "");
        image::RgbImage::new(width, 3).save(path).unwrap();
    }
    place.write("nothing/notes.txt", "");
    place.write("model/config.json", "{}");
    for (arguments, expected) in [
        (
            &["ours.npz", "theirs.npz", "theirs.npz"][..],
            &["ours.npz has 5 pictures", "theirs.npz has 4", "--count N"][..],
        ),
        (
            &["ours.npz", "theirs.npz", "theirs.npz", "--count", "5"],
            &["theirs.npz: expected at least the 5", "found 4"],
        ),
        (
            &["mixed", "theirs.npz"],
            &["a/1.png is 4 x 3", "b/2.png 6 x 3", "crop"],
        ),
        (&["nothing", "theirs.npz"], &["nothing: expected pictures"]),
        (&["ours.npz"], &["ours.npz: a reference must follow"]),
        (
            &["ours.npz", "model"],
            &["ours.npz is taken for samples and model for a checkpoint"],
        ),
        (&["ours.npz", "nowhere"], &["nowhere: no such file"]),
        (&["ours.npz", "theirs.npz", "--distances", "f8"], &["f16"]),
        (&["ours.npz", "theirs.npz", "--compute", "bf16"], &["f32"]),
        (
            &["embedded:digits-teacher", "--distances", "f16"],
            &["--distances"],
        ),
    ] {
        let arguments = [&["evaluate"], arguments].concat();
        let finished = place.run(&arguments);
        assert_eq!(finished.status, Some(2), "{}", finished.stderr);
        for words in expected {
            assert!(finished.stderr.contains(words), "{}", finished.stderr);
        }
    }
}
