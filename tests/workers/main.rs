//! One recipe on several workers, started by an MPI launcher: the same files as by one.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod hosts;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const RECIPE: &str = "
data = 'digits'
[[stage]]
kind = 'train'
name = 'teacher'
steps = 6
batch = 24
accumulate = 4
checkpoint_every = 2
architecture = { family = 'dit', width = 32, heads = 2, depth = 4 }
[[stage]]
kind = 'prune'
name = 'scored'
from = 'teacher'
method = 'sensitivity'
batches = 3
batch = 8
keep = 2
[[stage]]
kind = 'prune'
name = 'searched'
from = 'teacher'
method = 'calibration'
batches = 2
batch = 8
keep = 2
masks = 5
[[stage]]
kind = 'prune'
from = 'teacher'
groups = '1:2'
steps = 4
batch = 16
accumulate = 4
shard_optimizer = true
[[stage]]
kind = 'recover'
name = 'student'
method = 'masked-kd'
teacher = 'teacher'
steps = STEPS
batch = 16
accumulate = 4
checkpoint_every = 5
keep_checkpoints = true
shard_optimizer = true
log_every = 1
evaluate_every = 100
evaluate_count = 4
[[stage]]
kind = 'sample'
from = 'student'
count = 8
steps = 3
[[stage]]
kind = 'evaluate'
compare = ['teacher', 'student']
count = 20
batch = 10
steps = 2
solver = 'ddim'
[[stage]]
kind = 'prune'
name = 'weighed'
from = 'teacher'
method = 'width'
importance = 'taylor'
batches = 5
batch = 8
ratio = 0.5
[[stage]]
kind = 'prune'
name = 'narrow'
from = 'teacher'
method = 'width'
timesteps = 9
batch = 32
# Of five passes of two times the third counts by its first time alone: with two workers it is the
# first of a round, of which the other counts nothing, with four the third. The losses of the time
# before and of this one are 0.0012 above and 0.0047 below the threshold.
threshold = 0.356
ratio = 0.5
";

/// Files that two runs have in common, to the last byte.
const SAME: [&str; 10] = [
    "01-teacher/model.safetensors",
    "02-scored/model.safetensors",
    "03-searched/model.safetensors",
    "04-prune/model.safetensors",
    "04-prune/decisions.jsonl",
    "05-student/model.safetensors",
    "06-sample/samples.npz",
    "08-weighed/model.safetensors",
    "09-narrow/model.safetensors",
    "resolved.toml",
];

struct Place(tempfile::TempDir);

impl Place {
    fn new(steps: usize) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let recipe = RECIPE.replace("STEPS", &steps.to_string());
        std::fs::write(place.0.path().join("job.toml"), recipe).unwrap();
        std::fs::create_dir(place.0.path().join("tmp")).unwrap();
        place
    }

    fn command(&self, workers: usize, arguments: &[&str]) -> Command {
        let program = env!("CARGO_BIN_EXE_tinyfusion");
        let mut command = match workers {
            1 => Command::new(program),
            _ => {
                let mut command = Command::new("mpiexec");
                command.args(["-n", &workers.to_string(), program]);
                command
            }
        };
        command
            .args(["recipe", "job.toml", "--threads", "1"])
            .args(arguments)
            .current_dir(self.0.path())
            .env("TMPDIR", self.0.path().join("tmp"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, workers: usize, arguments: &[&str]) -> Output {
        self.command(workers, arguments).output().unwrap()
    }

    fn path(&self, runs: &str) -> PathBuf {
        self.0.path().join(runs).join("job/001")
    }
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn succeeded(output: &Output) {
    assert!(output.status.success(), "{}", text(output));
}

/// Lines of a log without what a clock says.
fn log(run: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.join("05-student/metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        for timed in ["time", "images_per_second"] {
            line.as_object_mut().unwrap().remove(timed);
        }
        line
    };
    text.lines().map(line).collect()
}

fn same(one: &Path, other: &Path, what: &str) {
    for file in SAME {
        let read = |run: &Path| std::fs::read(run.join(file));
        assert!(
            read(one).unwrap() == read(other).unwrap(),
            "{what}: {file} differs"
        );
    }
    // Scores of layers, losses of masks, and importance of channels.
    let measured = |run: &Path| {
        let files = std::fs::read_dir(run.join("measured")).unwrap();
        let mut files: Vec<(PathBuf, String)> = files
            .map(|file| file.unwrap().path())
            .map(|path| {
                (
                    path.file_name().unwrap().into(),
                    std::fs::read_to_string(&path).unwrap(),
                )
            })
            .collect();
        files.sort();
        files
    };
    assert_eq!(measured(one).len(), 4);
    assert_eq!(measured(one), measured(other), "{what}");
    assert_eq!(log(one), log(other), "{what}");
    assert_eq!(verdicts(one), verdicts(other), "{what}");
}

/// An evaluation's verdicts without the speeds.
fn verdicts(run: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(run.join("07-evaluate/eval.json")).unwrap();
    let mut read: serde_json::Value = serde_json::from_str(&text).unwrap();
    for verdict in read["verdicts"].as_array_mut().unwrap() {
        verdict.as_object_mut().unwrap().remove("images_per_second");
    }
    read
}

#[test]
fn any_number_of_workers_leaves_the_same_files() {
    let place = Place::new(6);
    succeeded(&place.run(1, &["--runs", "1"]));
    for workers in ["2", "4"] {
        let ran = place.run(workers.parse().unwrap(), &["--runs", workers, "--plain"]);
        succeeded(&ran);
        // One speaks.
        let told = text(&ran);
        assert_eq!(told.matches("teacher: done in").count(), 1, "{told}");
        same(&place.path("1"), &place.path(workers), workers);
        // Of moments and averages that were divided, and of what was measured meanwhile.
        for file in [
            "checkpoints/step-00000005.safetensors",
            "quality/step-000006/samples.png",
            "quality.jsonl",
        ] {
            let read = |runs| std::fs::read(place.path(runs).join("05-student").join(file));
            assert!(read("1").unwrap() == read(workers).unwrap(), "{file}");
        }
    }
    // What the others worked in is gone.
    let left = std::fs::read_dir(place.0.path().join("tmp")).unwrap();
    assert_eq!(left.count(), 0);
}

/// The workers of the run in a folder of runs, in the order in which they were started.
fn processes(runs: &str) -> Vec<String> {
    let program = env!("CARGO_BIN_EXE_tinyfusion");
    let ours = format!("^{program} recipe job.toml.*--runs {runs}");
    let found = Command::new("pgrep").args(["-f", &ours]).output().unwrap();
    let found = String::from_utf8(found.stdout).unwrap();
    let mut found: Vec<String> = found.lines().map(str::to_owned).collect();
    found.sort_by_key(|process| process.parse::<u32>().unwrap());
    found
}

/// The newest run of the recipe in a folder of runs.
fn newest(runs: &Path) -> PathBuf {
    let runs = std::fs::read_dir(runs.join("job")).unwrap();
    runs.map(|run| run.unwrap().path()).max().unwrap()
}

#[test]
fn workers_that_are_killed_end_all_and_any_number_goes_on() {
    const KILLED: usize = 20;
    let place = Place::new(60);
    let runs = place.0.path().join("killed");
    let since = Instant::now();
    succeeded(&place.run(1, &["--runs", "whole"]));
    let whole = since.elapsed();
    let mut state = 7_u64;
    let mut random = |below: u64| {
        // The constants of Knuth's MMIX.
        state = state.wrapping_mul(6_364_136_223_846_793_005);
        state = state.wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let (mut killed, mut ended) = (0, 0);
    for workers in [1, 2, 4].into_iter().cycle() {
        let mut running = place
            .command(workers, &["--runs", "killed", "--plain", "--resume-if-any"])
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // To the end, once enough were killed.
        let mut hit = false;
        if killed < KILLED {
            let limit = (whole / 2).as_millis() as u64;
            std::thread::sleep(Duration::from_millis(200 + random(limit)));
            while running.try_wait().unwrap().is_none() {
                let processes = processes("killed");
                if processes.is_empty() {
                    continue; // not started yet
                }
                let process = &processes[random(processes.len() as u64) as usize];
                let told = Command::new("kill").args(["-9", process]).status();
                hit = told.unwrap().success();
                killed += usize::from(hit);
                break;
            }
        }
        let since = Instant::now();
        let status = loop {
            match running.try_wait().unwrap() {
                Some(status) => break status,
                None => std::thread::sleep(Duration::from_millis(20)),
            }
            let limit = if hit { 20 } else { 300 };
            assert!(since.elapsed() < Duration::from_secs(limit), "goes on");
        };
        assert!(hit || status.success(), "ended by itself: {status}");
        if status.success() {
            ended += 1;
            let of = format!("run {ended}, {killed} killed");
            same(&place.path("whole"), &newest(&runs), &of);
            if killed == KILLED {
                break;
            }
        }
    }
}

#[test]
fn a_signal_saves_and_stops_all() {
    let place = Place::new(100_000);
    let run = place.path("stopped");
    let log = run.join("05-student/metrics.jsonl");
    let lines = || std::fs::read_to_string(&log).map_or(0, |text| text.lines().count());
    for (signal, more) in [
        ("-INT", &[][..]),
        ("-USR1", &["--resume"]),
        ("", &["--resume", "--max-time", "4s"]),
    ] {
        let before = lines();
        let arguments = [&["--runs", "stopped", "--plain"], more].concat();
        let running = place
            .command(2, &arguments)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let since = Instant::now();
        while !signal.is_empty() && lines() <= before {
            assert!(since.elapsed() < Duration::from_secs(120), "no step");
            std::thread::sleep(Duration::from_millis(20));
        }
        if !signal.is_empty() {
            let launcher = running.id().to_string();
            let told = Command::new("kill").args([signal, &launcher]).status();
            assert!(told.unwrap().success());
        }
        let ended = running.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(130), "{signal}: {}", text(&ended));
        let status = std::fs::read_to_string(run.join("status.json")).unwrap();
        assert!(status.contains("interrupted"), "{signal}: {status}");
        let kept = std::fs::read_dir(run.join("05-student/checkpoints")).unwrap();
        assert!(kept.count() > 0, "{signal}");
        let left = std::fs::read_dir(place.0.path().join("tmp")).unwrap();
        assert_eq!(left.count(), 0, "{signal}");
    }
}

/// A training that is measured in between, in Inception's features.
const MEASURED: &str = "
data = 'digits'
[[stage]]
kind = 'train'
steps = 6
batch = 8
accumulate = 2
shard_optimizer = true
architecture = { family = 'dit', width = 32, heads = 2, depth = 2 }
evaluate_every = 4
evaluate_count = 4
[[stage]]
kind = 'evaluate'
compare = ['train']
count = 4
batch = 1
steps = 500
reference = 'reference/samples.npz'
inception = 'files/standin-inception.pth'
";

#[test]
fn what_is_measured_meanwhile_is_shared_and_goes_on() {
    let place = Place::new(6);
    let folder = place.0.path();
    std::fs::write(folder.join("job.toml"), MEASURED).unwrap();
    for arguments in [
        "standin files",
        "sample embedded:digits-teacher --into reference --count 4 --steps 2",
    ] {
        let made = Command::new(env!("CARGO_BIN_EXE_tinyfusion"))
            .args(arguments.split(' '))
            .current_dir(folder)
            .output();
        succeeded(&made.unwrap());
    }
    succeeded(&place.run(1, &["--runs", "1"]));
    let quality = |runs: &str| {
        let log = place.path(runs).join("01-train/quality.jsonl");
        std::fs::read_to_string(log).unwrap_or_default()
    };
    assert_eq!(quality("1").lines().count(), 2, "{}", quality("1"));

    // Interrupted while samples are drawn: all stop, and whoever goes on has it too.
    let parts = place.path("2").join("01-train/quality/step-000004/parts");
    let running = place
        .command(2, &["--runs", "2", "--plain"])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let since = Instant::now();
    while std::fs::read_dir(&parts).map_or(0, Iterator::count) < 1 {
        assert!(since.elapsed() < Duration::from_secs(120), "nothing drawn");
        std::thread::sleep(Duration::from_millis(1));
    }
    let launcher = running.id().to_string();
    let told = Command::new("kill").args(["-INT", &launcher]).status();
    assert!(told.unwrap().success());
    let ended = running.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130), "{}", text(&ended));
    // A machine that is slow to tell may have had it all measured by then.
    assert!(quality("2").lines().count() <= 1);
    succeeded(&place.run(2, &["--runs", "2", "--plain", "--resume"]));
    assert_eq!(quality("1"), quality("2"));
}

#[test]
fn a_worker_that_hangs_is_told_of() {
    let place = Place::new(100_000);
    let log = place.path("hung").join("05-student/metrics.jsonl");
    let running = place
        .command(2, &["--runs", "hung", "--plain", "--patience", "15s"])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let since = Instant::now();
    while std::fs::read_to_string(&log).map_or(0, |text| text.lines().count()) < 2 {
        assert!(since.elapsed() < Duration::from_secs(120), "no step");
        std::thread::sleep(Duration::from_millis(20));
    }
    let last = processes("hung").pop().unwrap();
    let told = Command::new("kill").args(["-STOP", &last]).status();
    assert!(told.unwrap().success());
    let ended = running.wait_with_output().unwrap();
    let told = text(&ended);
    assert_eq!(ended.status.code(), Some(2), "{told}");
    assert!(
        told.contains(" of 2 has waited 15s for the others, in "),
        "{told}"
    );
    assert!(told.contains(" of student, step "), "{told}");
}

#[test]
fn a_worker_that_fails_is_named_and_ends_all() {
    let place = Place::new(100_000);
    let recipe = ["recipe", "job.toml", "--threads", "1", "--runs", "failed"];
    let program = env!("CARGO_BIN_EXE_tinyfusion");
    // The second has nowhere to work in.
    let nowhere = place.0.path().join("nowhere");
    let nowhere = format!("TMPDIR={}", nowhere.display());
    let first = [&["-n", "1", program][..], &recipe].concat();
    let second = [&["-n", "1", "env", &nowhere, program][..], &recipe].concat();
    let mut launcher = Command::new("mpiexec");
    launcher.args([first, vec![":"], second].concat());
    let since = Instant::now();
    let ended = launcher
        .current_dir(place.0.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    // Not after its hours of training.
    assert!(since.elapsed() < Duration::from_secs(60));
    let told = text(&ended);
    assert_eq!(ended.status.code(), Some(2), "{told}");
    assert!(told.contains("worker 1 of 2:"), "{told}");
    assert!(told.contains("nowhere"), "{told}");
}

#[test]
fn a_plan_says_how_much_less_divided_moments_need() {
    let place = Place::new(6);
    let stage = "
data = 'fashion-10k'
[[stage]]
kind = 'train'
name = 'large'
steps = 1
batch = 8
accumulate = 4
shard_optimizer = SHARD
architecture = { family = 'dit', input_size = 28, patch_size = 4, channels = 1, width = 512, heads = 4, depth = 8, classes = 10 }
";
    let numbers = |workers: usize, shard: bool| {
        let recipe = stage.replace("SHARD", &shard.to_string());
        std::fs::write(place.0.path().join("job.toml"), recipe).unwrap();
        let ran = place.run(workers, &["--dry-run"]);
        succeeded(&ran);
        let told = text(&ran);
        let before = |unit: &str| -> f64 {
            let (before, _) = told.split_once(unit).expect(unit);
            let number = before.rsplit(' ').next().unwrap();
            number.replace(',', "").parse().expect(number)
        };
        (before(" parameters"), before(" MiB"))
    };
    for workers in [1, 2, 4] {
        let ((parameters, all), (_, divided)) = (numbers(workers, false), numbers(workers, true));
        // Two moments and an average, of which each has its part.
        let saved = 12.0 * parameters * (1.0 - 1.0 / workers as f64) / f64::from(1 << 20);
        // Both are rounded to a MiB.
        assert!(
            (all - divided - saved).abs() <= 1.0,
            "{workers} workers: {all} and {divided} MiB, {saved} less expected"
        );
    }
}

#[test]
fn workers_that_join_a_sweep_take_a_run_each() {
    let place = Place::new(6);
    let recipe = "
data = 'digits'
[[stage]]
kind = 'prune'
from = 'embedded:digits-teacher'
method = 'first'
keep = 6
[[stage]]
kind = 'recover'
name = 'student'
method = 'fine-tune'
steps = 3
batch = 5
[[stage]]
kind = 'evaluate'
compare = ['student']
count = 20
batch = 10
steps = 2
[sweep]
seeds = 3
grid.stage.prune.keep = [6, 4]
";
    std::fs::write(place.0.path().join("job.toml"), recipe).unwrap();
    let table = |runs: &str| -> Vec<String> {
        let text = std::fs::read_to_string(place.path(runs).join("sweep.csv")).unwrap();
        let without_speed = |line: &str| {
            let mut cells: Vec<&str> = line.split(',').collect();
            cells.remove(7);
            cells.join(",")
        };
        text.lines().map(without_speed).collect()
    };
    succeeded(&place.run(1, &["--runs", "1", "--plain"]));
    // Steps that are not divided can't be shared.
    let ran = place.run(2, &["--runs", "2", "--plain", "--join"]);
    succeeded(&ran);
    assert_eq!(table("1"), table("2"));
    // The table is told once, whoever wrote it.
    let told = text(&ran);
    assert_eq!(told.matches("3 seeds, mean").count(), 1, "{told}");
    assert!(!told.contains(" of 6 runs\n"), "{told}");
    // The first one, which alone speaks, ran some of them and not all.
    let spoken = told.matches("run directory").count();
    assert!((1..6).contains(&spoken), "{told}");
}

#[test]
fn workers_that_do_not_fit_are_refused() {
    let place = Place::new(6);
    // The first one tells what all of them met.
    let refused = |refused: Output, why: &str| {
        assert_eq!(refused.status.code(), Some(2));
        let told = text(&refused);
        assert_eq!(told.matches(why).count(), 1, "{told:?}");
    };
    let why = "3 workers can't share out a step of 4 groups (`accumulate`); 1, 2, 4 can";
    refused(place.run(3, &["--runs", "3"]), why);
    assert!(!place.path("3").exists());
    // Nor are other commands shared.
    let program = env!("CARGO_BIN_EXE_tinyfusion");
    let launch = |arguments: &[&str]| {
        let mut launcher = Command::new("mpiexec");
        launcher.args(arguments).current_dir(place.0.path());
        launcher.stdin(Stdio::null()).output().unwrap()
    };
    let inspect = ["-n", "2", program, "inspect", "embedded:digits-teacher"];
    let why = "only `recipe`, `sample`, `evaluate` and `extract` share their work";
    refused(launch(&inspect), why);
    // What can't be understood is told once, too.
    let why = "unexpected argument '--stpes' found";
    refused(launch(&["-n", "2", program, "sample", "--stpes", "3"]), why);
    // Nor those of processes that were told different things, such as shares of their own.
    let sample = ["sample", "embedded:digits-teacher", "--into", "x"];
    let one = |share| [&["-n", "1", program][..], &sample, &["--share", share]].concat();
    let both = [one("0/2"), vec![":"], one("1/2")].concat();
    refused(launch(&both), "don't agree on what is asked");
    assert!(!place.0.path().join("x").exists());
}

#[test]
fn samples_latents_and_inceptions_reading_are_shared_by_their_commands() {
    let place = Place::new(6);
    let at = |name: &str| place.0.path().join(name);
    let program = env!("CARGO_BIN_EXE_tinyfusion");
    let run = |workers: &str, arguments: &[&str]| {
        let ran = Command::new("mpiexec")
            .args(["-n", workers, program])
            .args(arguments)
            .args(["--threads", if workers == "1" { "2" } else { "1" }])
            .current_dir(place.0.path())
            .env("TMPDIR", at("tmp"))
            .output()
            .unwrap();
        succeeded(&ran);
    };
    run("1", &["standin", "files"]);
    // Three parts, and a part that a killed process left half written.
    std::fs::create_dir_all(at("two/parts")).unwrap();
    for (workers, into) in [("1", "one"), ("2", "two")] {
        let sample = ["sample", "embedded:digits-teacher", "--into", into];
        let how = ["--count", "17", "--batch", "8", "--steps", "2"];
        if into == "two" {
            std::fs::copy(at("one/sampling.json"), at("two/sampling.json")).unwrap();
            std::fs::write(at("two/parts/part-000001.u8"), [0; 7]).unwrap();
        }
        run(workers, &[&sample[..], &how].concat());
        let latents = format!("{into}-latents");
        let extract = ["extract", "files/images", &latents];
        let how = ["--vae", "files/standin-vae", "--size", "64", "--batch", "6"];
        run(workers, &[&extract[..], &how].concat());
        let inception = "files/standin-inception.pth";
        let out = format!("{into}.json");
        let samples = format!("{into}/samples.npz");
        let evaluate = [
            "evaluate",
            &samples,
            "one/samples.npz",
            "--inception",
            inception,
        ];
        run(
            workers,
            &[&evaluate[..], &["--cache", "cache", "--out", &out]].concat(),
        );
    }
    let read = |name: &str| std::fs::read(at(name)).unwrap();
    assert!(read("one/samples.npz") == read("two/samples.npz"));
    for file in ["extraction.json", "latents.json", "shard-00000.bin"] {
        let of = |into: &str| read(&format!("{into}-latents/{file}"));
        assert!(of("one") == of("two"), "{file}");
    }
    let scores = |name: &str| -> serde_json::Value {
        let read: serde_json::Value = serde_json::from_slice(&read(name)).unwrap();
        let mut verdict = read["verdicts"][0].clone();
        // That of the archive.
        verdict.as_object_mut().unwrap().remove("model");
        verdict
    };
    assert!(scores("one.json")["fid"].is_number());
    assert_eq!(scores("one.json"), scores("two.json"));
}
