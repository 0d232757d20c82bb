//! Pruning in width through the commands.

use serde_json::{Value, json};

use super::program::Place;

const RECIPE: &str = "
    [[stage]]
    kind = 'prune'
    name = 'half'
    from = 'embedded:digits-teacher'
    method = 'width'
    ratio = 0.5
    timesteps = 20
    batch = 4

    [[stage]]
    kind = 'prune'
    name = 'less'
    from = 'embedded:digits-teacher'
    method = 'width'
    ratio = 0.25
    timesteps = 20
    batch = 4

    [[stage]]
    kind = 'recover'
    name = 'student'
    from = 'half'
    method = 'masked-kd'
    teacher = 'embedded:digits-teacher'
    steps = 2
    batch = 4

    [[stage]]
    kind = 'prune'
    name = 'both'
    from = 'student'
    method = 'first'
    keep = 6

    [[stage]]
    kind = 'recover'
    name = 'healed'
    from = 'both'
    method = 'rep-kd'
    teacher = 'embedded:digits-teacher'
    steps = 2
    batch = 4

    [[stage]]
    kind = 'sample'
    from = 'healed'
    count = 2
    steps = 2

    [[stage]]
    kind = 'prune'
    name = 'third'
    from = 'embedded:digits-teacher'
    method = 'width'
    importance = 'magnitude'
    parameters = 0.3

    [[stage]]
    kind = 'prune'
    name = 'heads'
    from = 'embedded:digits-teacher'
    method = 'width'
    importance = 'taylor'
    leaves = 'heads'
    ratio = 0.5
    mlp = 0.0
    condition = 0.0
    batches = 2
    batch = 4

    [[stage]]
    kind = 'prune'
    name = 'stream'
    from = 'both'
    method = 'width'
    importance = 'random'
    macs = 0.6
    stream = 0.3
    multiple = 4

    [[stage]]
    kind = 'prune'
    name = 'faster'
    from = 'embedded:digits-teacher'
    method = 'width'
    importance = 'magnitude'
    latency = 0.6

    [[stage]]
    kind = 'recover'
    name = 'narrow'
    from = 'stream'
    method = 'masked-kd'
    teacher = 'embedded:digits-teacher'
    steps = 2
    batch = 4
    checkpoint_every = 1
    keep_checkpoints = true
";

#[test]
fn channels_leave_by_importance_before_and_after_layers() {
    let place = Place::new();
    place.write("width.toml", RECIPE);
    let plan = place.run(&["recipe", "width.toml", "--dry-run"]);
    let plan = plan.succeeded().stdout;
    for part in [
        "prune in width, diff-pruning",
        "it ends where the loss has fallen",
        "width 64, 4 heads of 8, MLP 128, condition 32",
        "2 heads of 16, MLP 256, condition 64",
        "44 wide, are compared after linear maps to 64",
    ] {
        assert!(plan.contains(part), "`{part}` is missing:\n{plan}");
    }
    let told = place.run(&["recipe", "width.toml", "--runs", "runs"]);
    let told = told.succeeded();
    let told = told.stdout + &told.stderr;
    assert!(told.contains("of the time, and `latency` is 0.6"), "{told}");
    // The second ratio needs no gradients of its own.
    assert_eq!(told.matches("times count").count(), 1, "{told}");
    assert_eq!(told.matches("importance from").count(), 1, "{told}");

    let inspect = |path: &str| -> Value {
        let told = place.run(&["inspect", path, "--json"]).succeeded().stdout;
        serde_json::from_str(&told).unwrap()
    };
    let model = |stage: &str| format!("runs/width/001/{stage}/model.safetensors");
    let whole = inspect("embedded:digits-teacher");
    let share =
        |found: &Value, what: &str| found[what].as_f64().unwrap() / whole[what].as_f64().unwrap();
    let half = inspect(&model("01-half"));
    let block = json!({ "heads": 4, "head_dim": 8, "hidden": 128 });
    assert_eq!(half["architecture"]["widths"]["blocks"][11], block);
    assert_eq!(half["architecture"]["width"], 64);
    let widths = std::fs::read_to_string(place.path("runs/width/001/01-half/widths.csv")).unwrap();
    assert_eq!(widths.lines().count(), 1 + 3 + 2 * 12, "{widths}");
    assert!(
        widths.contains("\nblocks.0.mlp.fc1,mlp,256,128,0."),
        "{widths}"
    );

    // Depth after width: the layers that are left, as narrow as before, of the first teacher.
    let healed = inspect(&model("05-healed"));
    assert_eq!(healed["architecture"]["depth"], 6);
    assert_eq!(healed["architecture"]["widths"]["blocks"][5], block);
    assert_eq!(healed["provenance"]["parent_depth"], 12);

    let third = inspect(&model("07-third"));
    assert!(
        (share(&third, "parameters") / 0.3 - 1.0).abs() <= 0.02,
        "{third}"
    );
    let heads = inspect(&model("08-heads"));
    let block = json!({ "heads": 2, "head_dim": 16, "hidden": 256 });
    assert_eq!(heads["architecture"]["widths"]["blocks"][0], block);
    let narrow = inspect(&model("11-narrow"));
    assert_eq!(narrow["architecture"]["width"], 44);
    // Width after depth and width: of the model that it came from.
    assert_eq!(narrow["provenance"]["kept"], json!([0, 1, 2, 3, 4, 5]));

    // What features are compared through is no part of the model, nor of one within the training.
    let within = inspect("runs/width/001/11-narrow/checkpoints/step-00000001.safetensors");
    assert_eq!(within["parameters"], narrow["parameters"]);

    // Files of other programs show the widths by their tensors.
    place
        .run(&["convert", &model("11-narrow"), "narrow.pt"])
        .succeeded();
    let again = place.run(&["inspect", "narrow.pt", "--heads", "4", "--json"]);
    let again: Value = serde_json::from_str(&again.succeeded().stdout).unwrap();
    assert_eq!(again["parameters"], narrow["parameters"]);
    let wrong = place.run(&["inspect", "narrow.pt", "--heads", "7"]);
    assert!(
        wrong.stderr.contains("which 7 heads do not divide"),
        "{}",
        wrong.stderr
    );
    place
        .run(&["convert", &model("08-heads"), "folder"])
        .succeeded();
    assert_eq!(inspect("folder")["architecture"], heads["architecture"]);
    let card = std::fs::read_to_string(place.path("folder/README.md")).unwrap();
    for part in ["2 heads of 16", "scaled_dot_product_attention"] {
        assert!(card.contains(part), "`{part}` is missing:\n{card}");
    }
    let refused = place.run(&["convert", &model("08-heads"), "diffusers", "--diffusers"]);
    assert_ne!(refused.status, Some(0));
    let why = "diffusers' DiT is as wide in all blocks";
    assert!(refused.stderr.contains(why), "{}", refused.stderr);
}

#[test]
fn widths_that_can_not_be_left_are_refused() {
    let place = Place::new();
    let prune = |lines: &str| {
        format!(
            "[[stage]]\nkind = 'prune'\nfrom = 'embedded:digits-teacher'\nmethod = 'width'\n{lines}\n"
        )
    };
    for (recipe, why) in [
        (prune(""), "how much leaves is not said"),
        (prune("ratio = 0.5\nmacs = 0.5"), "only one can be given"),
        (prune("ratio = 1.0"), "`ratio`: must be"),
        (
            prune("ratio = 0.99"),
            "a share of 0.99 leaves none of the 64 channels of t_embedder.mlp.2",
        ),
        (
            prune("ratio = 0.5\nattention = 0.95"),
            "leaves none of the 16 dimensions of each head of blocks.11.attn.proj",
        ),
        (
            prune("ratio = 0.8\nleaves = 'heads'"),
            "leaves none of the 4 heads of blocks.11.attn.proj",
        ),
        (
            prune("ratio = 0.01"),
            "the ratio is too small for widths that are a multiple of 8",
        ),
        (
            prune("parameters = 0.01"),
            "the nearest that can be left is 0.",
        ),
        (
            prune("ratio = 0.5\nkeep = 6"),
            "`keep` is not used by method \"width\"",
        ),
        (
            prune("ratio = 0.5\nimportance = 'magnitude'\nthreshold = 0.1"),
            "`threshold` is not used by method \"width\"",
        ),
        (
            prune("ratio = 0.5\ngranularity = 'branch'"),
            "`granularity` is not used",
        ),
    ] {
        place.write("wrong.toml", &recipe);
        let refused = place.run(&["recipe", "wrong.toml", "--dry-run"]);
        assert_eq!(refused.status, Some(2), "{why}:\n{}", refused.stdout);
        assert!(refused.stderr.contains(why), "{why}:\n{}", refused.stderr);
    }
}
