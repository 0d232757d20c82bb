use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Child;

use tinyfusion::weights::{Checkpoint, read_safetensors, write_safetensors};

use crate::program::{Finished, Place, short_quickstart};

/// Stages of the quickstart that make a model.
const MODELS: [&str; 4] = ["01-prune", "02-learned", "03-prune-oracle", "04-oracle"];

/// Waits until the program reports a step of a stage; returns its output until then.
fn wait_for(child: &mut Child, stage: &str, step: &str) -> Vec<String> {
    let stderr = child.stderr.take().unwrap();
    let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
    let mut said: Vec<String> = Vec::new();
    while !said.last().is_some_and(|line| is_step(line, stage, step)) {
        let line = lines.next();
        said.push(line.unwrap_or_else(|| {
            panic!("the program ended before step {step} of {stage}: {said:#?}")
        }));
    }
    // Kept open and drained: a full pipe would block the program.
    std::thread::spawn(move || lines.for_each(drop));
    said
}

fn is_step(line: &str, stage: &str, step: &str) -> bool {
    line.starts_with(&format!("{stage} ")) && line.contains(&format!(" {step}/8"))
}

/// Because of keyed randomness a fresh start would give the same result, so the log must show that
/// a resumed stage continued from its checkpoint.
fn assert_went_on<'a>(said: impl IntoIterator<Item = &'a str>, stage: &str) {
    let mut said = said.into_iter();
    assert!(
        !said.any(|line| is_step(line, stage, "1")),
        "{stage} started over"
    );
}

fn models(run: &Path) -> Vec<Checkpoint> {
    MODELS
        .iter()
        .map(|stage| Checkpoint::read(&run.join(stage).join("model.safetensors")).unwrap())
        .collect()
}

fn assert_same(actual: &Path, expected: &Path) {
    for ((name, actual), expected) in MODELS.iter().zip(models(actual)).zip(models(expected)) {
        assert_eq!(
            actual.tensors.read_all().unwrap(),
            expected.tensors.read_all().unwrap(),
            "{name}: weights must be bit-identical"
        );
        assert_eq!(actual.provenance, expected.provenance, "{name}");
    }
    for log in [
        "01-prune/metrics.jsonl",
        "01-prune/decisions.jsonl",
        "02-learned/metrics.jsonl",
    ] {
        let steps = |run: &Path| -> Vec<u64> {
            let text = std::fs::read_to_string(run.join(log)).unwrap();
            text.lines()
                .map(|line| {
                    serde_json::from_str::<serde_json::Value>(line).unwrap()["step"]
                        .as_u64()
                        .unwrap()
                })
                .collect()
        };
        assert_eq!(steps(actual), steps(expected), "{log}: every step once");
    }
}

#[test]
fn an_interrupted_or_killed_run_resumes_to_bit_identical_weights() {
    let place = Place::new();
    let arguments = |runs: &str| short_quickstart(runs);
    let run = |runs: &str, more: &[&str]| {
        let arguments = arguments(runs);
        let arguments: Vec<&str> = arguments
            .iter()
            .map(String::as_str)
            .chain(more.iter().copied())
            .collect();
        place.run(&arguments)
    };
    let finished = run("whole", &[]).succeeded();
    for word in [
        "model",
        "70 training images",
        "embedded:digits-teacher",
        "prune",
        "learned",
        "flux-lite",
        "random",
        "FID",
    ] {
        assert!(
            finished.stdout.contains(word),
            "the verdict must have `{word}`:\n{}",
            finished.stdout
        );
    }
    let whole = place.path("whole/quickstart/001");
    for file in [
        "resolved.toml",
        "environment.json",
        "status.json",
        "01-prune/decisions.svg",
        "13-sample/samples.png",
        "13-sample/samples.npz",
        "14-evaluate/eval.json",
        "14-evaluate/comparison.png",
    ] {
        assert!(whole.join(file).is_file(), "{file}");
    }

    let start = |runs: &str| {
        let arguments = arguments(runs);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        place.start(&arguments)
    };
    // Killed in the middle of pruning, then interrupted in the middle of recovery.
    let mut child = start("broken");
    wait_for(&mut child, "prune", "4");
    child.kill().unwrap();
    child.wait().unwrap();

    let resumed = arguments("broken");
    let resumed: Vec<&str> = resumed
        .iter()
        .map(String::as_str)
        .chain(["--resume"])
        .collect();
    let mut child = place.start(&resumed);
    let said = wait_for(&mut child, "learned", "2");
    assert_went_on(said.iter().map(String::as_str), "prune");
    let id = child.id().to_string();
    assert!(
        std::process::Command::new("kill")
            .args(["-TERM", &id])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(
        child.wait().unwrap().code(),
        Some(130),
        "an interrupted run says so by its exit status"
    );
    let status = std::fs::read_to_string(place.path("broken/quickstart/001/status.json")).unwrap();
    assert!(status.contains("interrupted"), "{status}");

    let Finished { stderr, .. } = run("broken", &["--resume"]).succeeded();
    assert_went_on(stderr.lines(), "learned");
    assert!(stderr.contains("prune: already done"), "{stderr}");
    assert_same(&place.path("broken/quickstart/001"), &whole);

    // A finished run is never changed, and a changed recipe never continues another's checkpoints.
    let nothing = run("broken", &["--resume"]);
    assert_eq!(nothing.status, Some(2));
    assert!(
        nothing.stderr.contains("no unfinished run"),
        "{}",
        nothing.stderr
    );
    let mut child = start("changed");
    wait_for(&mut child, "prune", "4");
    child.kill().unwrap();
    child.wait().unwrap();
    let changed = run("changed", &["--resume", "--set", "stage.prune.lr=1e-2"]);
    assert_eq!(changed.status, Some(2));
    assert!(
        changed.stderr.contains("has changed since"),
        "{}",
        changed.stderr
    );
}

/// Converts a training checkpoint to the form from before checkpoints named their model.
fn make_old(path: &Path) {
    let (mut state, mut metadata) = read_safetensors(path).unwrap();
    let tensors = state.len();
    state.retain(|name, _| !name.starts_with("fixed."));
    assert!(state.len() < tensors && metadata.contains_key("tinyfusion.architecture"));
    metadata.retain(|key, _| key == "tinyfusion.training");
    write_safetensors(path, &state.into(), metadata, None).unwrap();
}

#[test]
fn checkpoints_that_do_not_say_their_model_are_resumed() {
    let place = Place::new();
    place.write(
        "train.toml",
        "[[stage]]\nkind = 'train'\nsteps = 8\nbatch = 4\ncheckpoint_every = 2\nlog_every = 1\narchitecture = { family = 'dit', depth = 2, width = 16, heads = 2 }\n",
    );
    place
        .run(&["recipe", "train.toml", "--runs", "whole"])
        .succeeded();
    let mut child = place.start(&["recipe", "train.toml", "--runs", "old"]);
    wait_for(&mut child, "train", "5");
    child.kill().unwrap();
    child.wait().unwrap();
    let folder = place.path("old/train/001/01-train/checkpoints");
    let mut made: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "safetensors"))
        .collect();
    made.sort();
    made.iter().for_each(|path| make_old(path));
    let last = made.last().unwrap().display().to_string();
    let inspected = place.run(&["inspect", &last]);
    assert_eq!(inspected.status, Some(2));
    let says = "does not say of which model";
    assert!(inspected.stderr.contains(says), "{}", inspected.stderr);
    let resumed = ["recipe", "train.toml", "--runs", "old", "--resume"];
    let resumed = place.run(&resumed).succeeded();
    assert_went_on(resumed.stderr.lines(), "train");
    let weights = |runs: &str| {
        let model = format!("{runs}/train/001/01-train/model.safetensors");
        let read = Checkpoint::read(&place.path(&model)).unwrap();
        read.tensors.read_all().unwrap()
    };
    assert_eq!(weights("old"), weights("whole"));
}

#[test]
fn a_training_whose_losses_stay_non_finite_gives_up() {
    let place = Place::new();
    let arguments = short_quickstart("runs");
    let arguments: Vec<&str> = arguments
        .iter()
        .map(String::as_str)
        .chain([
            "--set",
            "stage.prune.update=full",
            "--set",
            "stage.prune.lr=1.0",
            "--set",
            "stage.prune.clip=1e30",
            "--set",
            "stage.prune.steps=60",
            "--set",
            "stage.prune.max_bad_steps=3",
        ])
        .collect();
    let finished = place.run(&arguments);
    assert_eq!(finished.status, Some(2), "{}", finished.stderr);
    assert!(
        finished
            .stderr
            .contains("3 losses in a row were not finite")
            && finished.stderr.contains("lower `lr`"),
        "{}",
        finished.stderr
    );
    assert!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
    let status = std::fs::read_to_string(place.path("runs/quickstart/001/status.json")).unwrap();
    assert!(
        status.contains("failed") && status.contains("not finite"),
        "{status}"
    );
    let log =
        std::fs::read_to_string(place.path("runs/quickstart/001/01-prune/metrics.jsonl")).unwrap();
    assert!(log.lines().last().unwrap().contains("skipped"), "{log}");
}
