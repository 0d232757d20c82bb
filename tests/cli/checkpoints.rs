//! Weights in users' forms: in the middle of a training, of another family, with missing
//! information.

use crate::program::{Place, root};

/// The output of `inspect` for a file.
#[track_caller]
fn inspect(place: &Place, arguments: &[&str]) -> String {
    let arguments: Vec<&str> = ["inspect"].iter().chain(arguments).copied().collect();
    place.run(&arguments).succeeded().stdout
}

/// The line with the hash of the weights.
fn hash(inspected: &str) -> &str {
    let mut lines = inspected.lines();
    lines.find(|line| line.contains("sha-256")).unwrap()
}

#[track_caller]
fn refused(place: &Place, arguments: &[&str], expected: &[&str]) {
    let finished = place.run(arguments);
    assert_eq!(finished.status, Some(2), "{}", finished.stderr);
    for expected in expected {
        assert!(
            finished.stderr.contains(expected),
            "`{expected}` is not in\n{}",
            finished.stderr
        );
    }
}

fn fixture(place: &Place, path: &str, name: &str) {
    let bytes = std::fs::read(root().join("tests/fixtures").join(path)).unwrap();
    place.write(name, bytes);
}

#[test]
fn a_training_is_a_model_at_every_checkpoint() {
    let place = Place::new();
    let training =
        "steps = 5\nbatch = 4\ncheckpoint_every = 2\nkeep_last = 9\nkeep_checkpoints = true\n";
    let stages = [
        "kind = 'train'\nname = 'dit'\narchitecture = { family = 'dit', depth = 2, width = 16, heads = 2 }\n",
        "kind = 'train'\nname = 'features'\narchitecture = { family = 'classifier', width = 8 }\n",
        "kind = 'recover'\nfrom = 'dit'\nmethod = 'fine-tune'\n",
        "kind = 'prune'\nname = 'lora'\nfrom = 'dit'\ngroups = '1:2'\n",
        "kind = 'prune'\nname = 'full'\nfrom = 'dit'\ngroups = '1:2'\nupdate = 'full'\n",
    ];
    let recipe: String = stages
        .iter()
        .map(|stage| format!("[[stage]]\n{stage}{training}"))
        .collect();
    place.write("all.toml", recipe);
    place.run(&["recipe", "all.toml"]).succeeded();
    let at = |stage: &str, step: usize| {
        format!("artifacts/runs/all/001/{stage}/checkpoints/step-{step:08}.safetensors")
    };

    let dit = at("01-dit", 2);
    let average = inspect(&place, &[&dit]);
    for says in [
        "DiT, 2 layers, width 16, 2 heads",
        "gaussian",
        "2 steps, 8 images",
        "after step 2 of 5",
    ] {
        assert!(average.contains(says), "{average}");
    }
    let raw = inspect(&place, &[&dit, "--weights-key", "model"]);
    assert_ne!(hash(&average), hash(&raw));
    assert_ne!(hash(&average), hash(&inspect(&place, &[&at("01-dit", 4)])));

    let told = place.run(&["convert", &dit, "raw.pt", "--weights-key", "model"]);
    let told = told.succeeded().stderr;
    assert!(
        told.contains("and not how they came about; state `--heads 2` where it is read"),
        "{told}"
    );
    let converted = inspect(&place, &["raw.pt", "--heads", "2"]);
    assert_eq!(hash(&converted), hash(&raw));
    for arguments in [
        ["sample", &dit, "--count", "2", "--steps", "2"],
        ["evaluate", &dit, "--count", "5", "--steps", "1"],
    ] {
        let with_key = arguments.iter().chain(&["--weights-key", "model"]).copied();
        place.run(&arguments).succeeded();
        place.run(&with_key.collect::<Vec<_>>()).succeeded();
    }
    place.write(
        "from.toml",
        format!("[[stage]]\nkind = 'prune'\nmethod = 'oracle'\nfrom = {{ path = '{dit}', weights_key = 'model' }}\n"),
    );
    place.run(&["recipe", "from.toml"]).succeeded();
    let pruned = inspect(
        &place,
        &["artifacts/runs/from/001/01-prune/model.safetensors"],
    );
    let parent = hash(&raw).trim_start_matches("  sha-256     ");
    assert!(
        pruned.contains("DiT, 1 layer,") && pruned.contains(parent),
        "{pruned}"
    );

    let features = inspect(&place, &[&at("02-features", 4)]);
    let words = "classifier of 1x8x8, 10 classes, width 8";
    assert!(features.contains(words), "{features}");
    assert!(!features.contains("process"), "{features}");
    for stage in ["03-recover", "05-full"] {
        let inspected = inspect(&place, &[&at(stage, 4)]);
        assert!(inspected.contains("DiT, 2 layers"), "{inspected}");
        assert!(inspected.contains("after step 4 of 5"), "{inspected}");
    }
    let says = [
        "holds no whole model",
        "gates of 1 groups",
        "low-rank updates",
    ];
    refused(&place, &["inspect", &at("04-lora", 2)], &says);
    for inputs in [["embedded:digits-teacher"].as_slice(), &["a.npz", "b.npz"]] {
        let arguments: Vec<&str> = (["evaluate"].iter())
            .chain(inputs)
            .chain(&["--weights-key", "model"])
            .copied()
            .collect();
        refused(&place, &arguments, &["are for checkpoints in files"]);
    }
    refused(
        &place,
        &["inspect", &dit, "--weights-key", "opt"],
        &["has no `opt`", "ema, model"],
    );
}

#[test]
fn a_sit_is_not_taken_for_a_dit() {
    let place = Place::new();
    fixture(&place, "sit_forward/checkpoint.pt", "sit.pt");
    let inspected = inspect(&place, &["sit.pt", "--heads", "3"]);
    assert!(inspected.contains("SiT, 3 layers"), "{inspected}");
    assert!(inspected.contains("interpolant"), "{inspected}");
    let json = inspect(&place, &["sit.pt", "--heads", "3", "--json"]);
    assert!(json.contains("\"process\": \"interpolant\""), "{json}");
    let says = ["`sit.pt`", "(a SiT)", "\"ode\" or \"sde\""];
    let ddpm = ["sample", "sit.pt", "--heads", "3", "--solver", "ddpm"];
    refused(&place, &ddpm, &says);
    // By default it is sampled as a SiT, and needs the same as any model of latents.
    refused(&place, &["sample", "sit.pt", "--heads", "3"], &["`vae`"]);
    refused(
        &place,
        &["inspect", "sit.pt", "--heads", "3", "--process", "gaussian"],
        &["stated to be trained by gaussian"],
    );

    // What a format can't hold is reported when it is written.
    for (to, notes) in [("sit.safetensors", 0), ("bare.pt", 1)] {
        let converted = place.run(&["convert", "sit.pt", to, "--heads", "3"]);
        let said = converted.succeeded().stderr;
        assert_eq!(said.matches("note:").count(), notes, "{said}");
    }
    // Removing layers needs no process; the result is still a SiT, for later stages and later runs.
    let kept =
        "heads = 3\n[[stage]]\nkind = 'prune'\nfrom = 'sit.pt'\nmethod = 'kept'\nkept = [0, 2]\n";
    place.write("kept.toml", kept);
    place.run(&["recipe", "kept.toml"]).succeeded();
    let pruned = "artifacts/runs/kept/001/01-prune/model.safetensors";
    assert!(inspect(&place, &[pruned]).contains("SiT, 2 layers"));
    refused(
        &place,
        &["sample", pruned, "--solver", "ddim"],
        &["(a SiT)"],
    );
}

#[test]
fn what_a_file_does_not_say_is_noted_once() {
    let place = Place::new();
    fixture(&place, "dit_forward/a_plain.pt", "plain.pt");
    let recipe = "heads = HEADS\n[[stage]]\nkind = 'prune'\nfrom = FROM\nmethod = 'kept'\nkept = [0]\n[[stage]]\nkind = 'prune'\nname = 'again'\nfrom = FROM\nmethod = 'kept'\nkept = [1]\n";
    let recipe = recipe.replace("HEADS", "4");
    place.write("noted.toml", recipe.replace("FROM", "'plain.pt'"));
    let said = place.run(&["recipe", "noted.toml"]).succeeded().stderr;
    assert_eq!(said.matches("note: plain.pt").count(), 1, "{said}");
    assert!(said.contains("process = \"gaussian\""), "{said}");
    let resolved = std::fs::read_to_string(place.path("artifacts/runs/noted/001/resolved.toml"));
    assert!(resolved.unwrap().contains("heads = 4\n"));
    let stated = "{ path = 'plain.pt', process = 'gaussian' }";
    place.write("stated.toml", recipe.replace("FROM", stated));
    let said = place.run(&["recipe", "stated.toml"]).succeeded().stderr;
    assert!(!said.contains("note:"), "{said}");

    let known = place.run(&[
        "inspect",
        "plain.pt",
        "--heads",
        "4",
        "--process",
        "gaussian",
    ]);
    let known = known.succeeded();
    assert!(!known.stderr.contains("note:"), "{}", known.stderr);
    assert!(known.stdout.contains("gaussian"), "{}", known.stdout);
    // Its published file name shows the process too.
    let published = "DiT-XL-2-256x256.pt";
    fixture(&place, "dit_forward/a_plain.pt", published);
    let named = place
        .run(&["inspect", published, "--heads", "4"])
        .succeeded();
    assert!(!named.stderr.contains("note:"), "{}", named.stderr);
    assert!(named.stdout.contains("gaussian"), "{}", named.stdout);
}

#[test]
fn conversions_have_one_hash() {
    let place = Place::new();
    let bytes: Vec<Vec<u8>> = (0..3)
        .map(|run| {
            let to = format!("{run}.safetensors");
            place
                .run(&["convert", "embedded:digits-teacher", &to])
                .succeeded();
            std::fs::read(place.path(&to)).unwrap()
        })
        .collect();
    assert!(bytes[0] == bytes[1] && bytes[0] == bytes[2]);
}
