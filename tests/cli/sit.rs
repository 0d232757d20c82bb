//! A SiT goes through every stage and remains a SiT.

use crate::program::Place;

/// A recipe with every stage for a small SiT of the digits.
const RECIPE: &str = "
data = 'digits'
[[stage]]
kind = 'train'
steps = 4
batch = 4
architecture = { family = 'sit', width = 8, heads = 2, depth = 4 }
[[stage]]
kind = 'prune'
name = 'learned'
from = 'train'
groups = '1:2'
steps = 3
batch = 4
[[stage]]
kind = 'prune'
name = 'flux-lite'
from = 'train'
method = 'flux-lite'
keep = 2
batches = 1
batch = 4
[[stage]]
kind = 'prune'
name = 'sensitivity'
from = 'train'
method = 'sensitivity'
keep = 2
batches = 1
batch = 4
[[stage]]
kind = 'recover'
from = 'learned'
method = 'masked-kd'
teacher = 'train'
steps = 4
batch = 4
[[stage]]
kind = 'sample'
from = 'recover'
count = 3
solver = 'sde'
steps = 4
[[stage]]
kind = 'evaluate'
compare = ['train', 'learned', 'recover']
count = 12
batch = 6
solver = 'ode'
steps = 3
";

#[test]
fn a_sit_goes_through_every_stage() {
    let place = Place::new();
    place.write("sit.toml", RECIPE);
    let ran = place.run(&["recipe", "sit.toml"]).succeeded();
    assert!(ran.stdout.contains("recover"), "{}", ran.stdout);
    let run = "artifacts/runs/sit/001";
    for (stage, layers) in [
        ("01-train", 4),
        ("02-learned", 2),
        ("03-flux-lite", 2),
        ("04-sensitivity", 2),
        ("05-recover", 2),
    ] {
        let model = format!("{run}/{stage}/model.safetensors");
        let said = place.run(&["inspect", &model]).succeeded().stdout;
        assert!(said.contains(&format!("SiT, {layers} layers")), "{said}");
    }
    // Its own loss terms are logged, and no variational bound.
    let log = std::fs::read_to_string(place.path(&format!("{run}/05-recover/metrics.jsonl")));
    let log = log.unwrap();
    assert!(
        log.contains("\"kd\"") && log.contains("\"features\""),
        "{log}"
    );
    assert!(!log.contains("\"vb"), "{log}");

    // The samples don't depend on the batch, and the command draws them too.
    let model = format!("{run}/05-recover/model.safetensors");
    let sample = |to: &str, batch: &str, solver: &str| {
        let arguments = [
            "sample", &model, "--into", to, "--count", "5", "--steps", "4", "--batch", batch,
            "--solver", solver,
        ];
        place.run(&arguments).succeeded();
        tinyfusion::npz::read_samples(&place.path(to).join("samples.npz")).unwrap()
    };
    // Not with `ode`: Dormand and Prince's steps depend on the whole batch.
    assert_eq!(
        sample("together", "5", "sde").images,
        sample("apart", "2", "sde").images
    );
    assert_eq!(sample("flow", "5", "ode").images.shape(), [5, 8, 8, 1]);
}

#[test]
fn solvers_and_teachers_of_another_process_are_refused() {
    let place = Place::new();
    let refused = |text: &str, words: &[&str]| {
        place.write("wrong.toml", text);
        let finished = place.run(&["recipe", "wrong.toml", "--dry-run"]);
        assert_eq!(finished.status, Some(2), "{}", finished.stdout);
        let said = finished.stderr;
        for word in words {
            assert!(said.contains(word), "{word}: {said}");
        }
    };
    let train = "[[stage]]\nkind = 'train'\nsteps = 1\narchitecture = { family = 'sit' }\n";
    let sample = |more: &str| format!("{train}[[stage]]\nkind = 'sample'\ncount = 1\n{more}");
    let solvers = ["`train`", "an interpolant (a SiT)", "\"ode\" or \"sde\""];
    refused(&sample(""), &solvers);
    refused(
        &sample("solver = 'ode'\nsteps = 1"),
        &["2 `steps` at least"],
    );
    refused(
        &sample("solver = 'ode'\nmethod = 'euler'\natol = 1e-3"),
        &["`atol` is not used by a method of fixed steps"],
    );
    refused(
        &sample("solver = 'sde'\ndiffusion_form = 'sbdm'"),
        &["`train`", "no bound at noise"],
    );
    refused(
        &sample("solver = 'sde'\nmethod = 'heun'\nlast_step = 'none'"),
        &["not defined at the data"],
    );
    refused(
        &sample("solver = 'sde'\neta = 0.1"),
        &["`eta` is not used by solver \"sde\""],
    );
    let dit =
        "[[stage]]\nkind = 'sample'\nfrom = 'embedded:digits-teacher'\ncount = 1\nsolver = 'sde'\n";
    refused(dit, &["gaussian diffusion (a DiT)", "\"ddpm\" or \"ddim\""]);
    let teacher = "[[stage]]\nkind = 'prune'\nmethod = 'oracle'\n[[stage]]\nkind = 'recover'\nmethod = 'kd'\n\
        teacher = 'embedded:digits-teacher'\nsteps = 1\n";
    refused(
        &format!("{train}{teacher}"),
        &["the student was trained by", "the teacher by gaussian"],
    );
    let on = "[[stage]]\nkind = 'train'\nname = 'on'\nfrom = 'train'\nsteps = 1\narchitecture = { family = 'dit' }\n";
    refused(&format!("{train}{on}"), &["another process"]);
    let preset = "[[stage]]\nkind = 'train'\nsteps = 1\narchitecture = { family = 'dit', preset = 'SiT-S/2' }\n";
    refused(preset, &["`preset`"]);
}

#[test]
fn other_interpolants_are_trained_and_remembered() {
    let place = Place::new();
    for (index, (keys, mark)) in [
        (
            "path = 'gvp', predicts = 'noise', weighting = 'velocity'",
            "interpolant:gvp:noise:velocity",
        ),
        (
            "path = 'vp', predicts = 'score', weighting = 'likelihood'",
            "interpolant:vp:score:likelihood",
        ),
        ("predicts = 'score'", "interpolant:linear:score:none"),
        ("path = 'linear'", "interpolant"),
    ]
    .into_iter()
    .enumerate()
    {
        let recipe = RECIPE
            .replace("family = 'sit',", &format!("family = 'sit', {keys},"))
            // Noise and score have no drift at the data: the last step keeps away from it.
            .replace("solver = 'sde'", "solver = 'sde'\nlast_step = 'mean'");
        let recipe = recipe.split("[[stage]]\nkind = 'evaluate'").next().unwrap();
        let name = format!("other{index}");
        place.write(&format!("{name}.toml"), recipe);
        place.run(&["recipe", &format!("{name}.toml")]).succeeded();
        let run = place.path(&format!("artifacts/runs/{name}/001"));
        for stage in ["01-train", "02-learned", "05-recover"] {
            let model = run.join(stage).join("model.safetensors");
            let model = tinyfusion::weights::Checkpoint::read(&model).unwrap();
            assert_eq!(model.process.unwrap().mark(), mark, "{stage}");
        }
        let resolved = std::fs::read_to_string(run.join("resolved.toml")).unwrap();
        assert_eq!(
            resolved.contains("path = "),
            mark != "interpolant",
            "{resolved}"
        );
    }
    // What a file doesn't say, a person can; what it says, nobody can change.
    let model = "artifacts/runs/other0/001/01-train/model.safetensors";
    let sample = [
        "sample",
        model,
        "--into",
        "x",
        "--count",
        "1",
        "--steps",
        "3",
        "--process",
    ];
    let gvp = [&sample[..], &["interpolant:gvp:noise:velocity"]].concat();
    place.run(&gvp).succeeded();
    let refused = place.run(&[&sample[..], &["interpolant"]].concat());
    assert_eq!(refused.status, Some(2));
    assert!(refused.stderr.contains("path gvp"), "{}", refused.stderr);
    let unknown = place.run(&[&sample[..], &["interpolant:cosine"]].concat());
    assert!(unknown.stderr.contains("gvp"), "{}", unknown.stderr);
}
