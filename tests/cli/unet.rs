//! A UNet, which has no trunk, through the commands.

use serde_json::Value;

use super::program::Place;

const RECIPE: &str = "
    [[stage]]
    kind = 'train'
    name = 'teacher'
    steps = 4
    batch = 4
    architecture = { family = 'unet', levels = 2, width = 16, norm_groups = 4, layers = 1 }

    [[stage]]
    kind = 'prune'
    method = 'width'
    ratio = 0.5
    timesteps = 6
    batch = 2
    multiple = 1

    [[stage]]
    kind = 'recover'
    name = 'student'
    method = 'kd'
    teacher = 'teacher'
    steps = 2
    batch = 4

    [[stage]]
    kind = 'evaluate'
    compare = ['teacher', 'student']
    count = 40
    steps = 2
    batch = 20
    solver = 'ddim'
";

#[test]
fn a_unet_is_trained_pruned_in_width_and_measured() {
    let place = Place::new();
    place.write("unet.toml", RECIPE);
    let plan = place.run(&["recipe", "unet.toml", "--dry-run"]);
    let plan = plan.succeeded().stdout;
    for part in [
        "UNet, levels 16 32, 1x8x8, 10 classes",
        "groups of channels narrower",
    ] {
        assert!(plan.contains(part), "`{part}` is missing:\n{plan}");
    }
    place
        .run(&["recipe", "unet.toml", "--runs", "runs"])
        .succeeded();
    place
        .run(&["recipe", "runs/unet/001/resolved.toml", "--dry-run"])
        .succeeded();
    let inspect = |path: &str| -> Value {
        let told = place.run(&["inspect", path, "--json"]).succeeded().stdout;
        serde_json::from_str(&told).unwrap()
    };
    let (teacher, student) = (
        "runs/unet/001/01-teacher/model.safetensors",
        "runs/unet/001/03-student/model.safetensors",
    );
    let found = inspect(student);
    assert_eq!(found["architecture"]["family"], "unet");
    assert_eq!(found["architecture"]["left"]["conv_in"], 8);
    let evaluation = place.path("runs/unet/001/04-evaluate/eval.json");
    let evaluation = std::fs::read_to_string(evaluation).unwrap();
    let evaluation: Value = serde_json::from_str(&evaluation).unwrap();
    assert!(evaluation["verdicts"][2]["ssim"].as_f64().unwrap() < 1.0);

    // diffusers' layout has the teacher, and no word for the student.
    place
        .run(&["convert", teacher, "folder", "--diffusers"])
        .succeeded();
    let config = std::fs::read_to_string(place.path("folder/config.json")).unwrap();
    assert!(config.contains("UNet2DModel"), "{config}");
    assert_eq!(
        inspect("folder")["architecture"],
        inspect(teacher)["architecture"]
    );
    let refused = place.run(&["convert", student, "other", "--diffusers"]);
    assert_ne!(refused.status, Some(0));
    assert!(
        refused.stderr.contains("narrower in places"),
        "{}",
        refused.stderr
    );
    place.run(&["convert", student, "student"]).succeeded();
    assert_eq!(inspect("student")["architecture"], found["architecture"]);
    std::fs::remove_file(place.path("student/config.json")).unwrap();
    place.run(&["convert", student, "bare.pt"]).succeeded();
    let alone = place.run(&["inspect", "bare.pt"]);
    assert!(
        alone.stderr.contains("config.json must lie beside it"),
        "{}",
        alone.stderr
    );

    let stage = |lines: &str| format!("[[stage]]\nfrom = '{teacher}'\n{lines}\n");
    for (recipe, why) in [
        (
            stage("kind = 'prune'\nmethod = 'first'\nkeep = 1"),
            "has no trunk that layers can be taken out of",
        ),
        (
            stage("kind = 'prune'\nmethod = 'learned'\ngroups = '1:2'\nsteps = 1"),
            "has no trunk that layers can be taken out of",
        ),
        (
            stage(&format!(
                "kind = 'recover'\nmethod = 'masked-kd'\nsteps = 1\nteacher = '{teacher}'"
            )),
            "hidden states are compared along a trunk",
        ),
        (
            stage("kind = 'prune'\nmethod = 'width'\nratio = 0.99"),
            "leaves none of the",
        ),
    ] {
        place.write("wrong.toml", &recipe);
        let refused = place.run(&["recipe", "wrong.toml", "--dry-run"]);
        assert_eq!(refused.status, Some(2), "{why}:\n{}", refused.stdout);
        assert!(refused.stderr.contains(why), "{why}:\n{}", refused.stderr);
    }
}

#[test]
fn a_unet_without_classes_is_not_guided() {
    let place = Place::new();
    let planned = |more: &str| {
        let text = format!(
            "[[stage]]\nkind = 'sample'\nfrom = 'artifacts/pretrained/ddpm-ema-bedroom-256'\ncount = 8\n{more}"
        );
        place.write("bedroom.toml", text);
        let told = place.run(&["recipe", "bedroom.toml", "--dry-run"]);
        told.succeeded().stdout
    };
    let (usual, unguided) = (planned(""), planned("guidance = 1.0\n"));
    let note = "note: without classes there is nothing to guide to: guidance is 1";
    assert!(usual.contains(note), "{usual}");
    assert!(!unguided.contains("note:"), "{unguided}");
    // The same memory and operations.
    let cost = |told: &str| {
        told.lines()
            .find(|line| line.contains("FLOPs"))
            .unwrap()
            .to_owned()
    };
    assert_eq!(cost(&usual), cost(&unguided));
}
