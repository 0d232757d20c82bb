//! Commands on a failing system, and interrupted ones: their messages, their files, and their
//! continuation.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::program::{Finished, Place};

const PROGRAM: &str = env!("CARGO_BIN_EXE_tinyfusion");

/// Runs the program under limits set by the shell.
fn limited(place: &Place, limits: &str, arguments: &str) -> Finished {
    let command = format!("{limits}; exec {PROGRAM} {arguments}");
    let output = Command::new("bash")
        .args(["-c", &command])
        .current_dir(place.path("x").parent().unwrap())
        .output();
    Finished::of(output.unwrap())
}

/// Interrupts a process as Ctrl-C does, once `ready`; returns its result.
fn interrupted(child: Child, ready: impl Fn() -> bool) -> Finished {
    signalled("-INT", child, ready)
}

fn signalled(signal: &str, mut child: Child, ready: impl Fn() -> bool) -> Finished {
    let begun = Instant::now();
    while !ready() {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        assert!(begun.elapsed() < Duration::from_secs(60), "never ready");
        std::thread::sleep(Duration::from_millis(20));
    }
    let id = child.id().to_string();
    let asked = Command::new("kill").args([signal, &id]).status();
    assert!(asked.unwrap().success());
    Finished::of(child.wait_with_output().unwrap())
}

#[cfg(unix)]
#[test]
fn an_interrupted_command_says_what_goes_on_with_it() {
    let place = Place::new();
    let many = [
        "sample",
        "embedded:digits-teacher",
        "--count",
        "100000",
        "--steps",
        "50",
        "--batch",
        "8",
    ];
    let drawn = |parts: std::path::PathBuf| {
        move || std::fs::read_dir(&parts).is_ok_and(|mut parts| parts.next().is_some())
    };
    let run = place.path("artifacts/runs/sample/001");
    let finished = interrupted(place.start(&many), drawn(run.join("01-sample/parts")));
    assert_eq!(finished.status, Some(130), "{finished:?}");
    let says = "to go on: `tinyfusion recipe RUN/resolved.toml --resume --runs artifacts/runs`";
    assert!(finished.stderr.contains(says), "{}", finished.stderr);
    // The command in the message works.
    let resolved = run.join("resolved.toml").display().to_string();
    let again = place.start(&["recipe", &resolved, "--resume", "--runs", "artifacts/runs"]);
    let status = run.join("status.json");
    let running = || std::fs::read_to_string(&status).is_ok_and(|text| text.contains("running"));
    let finished = interrupted(again, running);
    assert_eq!(finished.status, Some(130), "{finished:?}");
    assert!(
        finished.stderr.contains("sample/001"),
        "{}",
        finished.stderr
    );

    let into = [&many[..], &["--into", "folder"]].concat();
    let finished = interrupted(place.start(&into), drawn(place.path("folder/parts")));
    assert_eq!(finished.status, Some(130), "{finished:?}");
    let says = "to go on: the same command";
    assert!(finished.stderr.contains(says), "{}", finished.stderr);
}

#[cfg(unix)]
#[test]
fn a_queues_limit_saves_a_training() {
    let place = Place::new();
    place.write(
        "long.toml",
        "
        [[stage]]
        kind = 'train'
        steps = 1000000
        batch = 2
        log_every = 100
        architecture = { family = 'dit', width = 8, heads = 2, depth = 2 }
        ",
    );
    let saved = |finished: Finished, says: &str| {
        assert_eq!(finished.status, Some(130), "{finished:?}");
        assert!(finished.stderr.contains(says), "{}", finished.stderr);
        let kept = std::fs::read_dir(place.path("runs/long/001/01-train/checkpoints"));
        kept.unwrap().count()
    };
    let command = ["recipe", "long.toml", "--runs", "runs", "--plain"];
    let clock = place.run(&[&command[..], &["--max-time", "2s"]].concat());
    assert!(saved(clock, "2s are over") > 0);
    // Some schedulers announce it by a signal.
    let log = place.path("runs/long/001/01-train/metrics.jsonl");
    let lines = || std::fs::read_to_string(&log).map_or(0, |text| text.lines().count());
    let before = lines();
    let again = place.start(&[&command[..], &["--resume"]].concat());
    let told = signalled("-USR1", again, || lines() > before);
    assert!(saved(told, "stopping after this step") > 0);
    let wrong = place.run(&[&command[..], &["--max-time", "soon"]].concat());
    assert!(wrong.stderr.contains("such as 3h50m"), "{}", wrong.stderr);
}

#[cfg(target_os = "linux")]
#[test]
fn what_could_not_be_written_whole_does_not_block_the_next_try() {
    let place = Place::new();
    // Files of a megabyte at most, as if the disk were full.
    let full = "trap '' XFSZ; ulimit -f 1024";
    for to in ["folder", "model.safetensors", "model.pt"] {
        let arguments = format!("convert embedded:digits-teacher {to}");
        let finished = limited(&place, full, &arguments);
        assert_eq!(finished.status, Some(2), "{finished:?}");
        assert!(
            finished.stderr.contains(to) && !finished.stderr.contains("panicked"),
            "{}",
            finished.stderr
        );
        assert_eq!(place.files(), [], "{to}");
        let arguments: Vec<&str> = arguments.split(' ').collect();
        place.run(&arguments).succeeded();
        std::fs::remove_dir_all(place.path(to))
            .or_else(|_| std::fs::remove_file(place.path(to)))
            .unwrap();
    }
    // A file in the place of a shard is noticed before anything is written.
    let shards = "convert embedded:digits-teacher model.safetensors.index.json --shard 1";
    let arguments: Vec<&str> = shards.split(' ').collect();
    let other = place.write("model-00003-of-00004.safetensors", "another");
    let finished = place.run(&arguments);
    assert_eq!(finished.status, Some(2), "{finished:?}");
    assert!(
        finished.stderr.contains("model-00003-of-00004.safetensors"),
        "{}",
        finished.stderr
    );
    assert_eq!(place.files().len(), 1);
    std::fs::remove_file(other).unwrap();
    place.run(&arguments).succeeded();
    let inspected = place
        .run(&["inspect", "model.safetensors.index.json"])
        .succeeded();
    assert!(inspected.stdout.contains("927,752"), "{}", inspected.stdout);
    assert_eq!(place.files().len(), 5);
    // The stand-ins are larger: the Inception network can't be written.
    let finished = limited(&place, "trap '' XFSZ; ulimit -f 20000", "standin standin");
    assert_eq!(finished.status, Some(2), "{finished:?}");
    place.run(&["standin", "standin"]).succeeded();
}

#[cfg(target_os = "linux")]
#[test]
fn threads_that_can_not_be_had_are_an_error() {
    let place = Place::new();
    let arguments = "sample embedded:digits-teacher --count 1 --steps 1";
    // A thousand stacks of 2 MiB in 1 GB of addresses.
    let limits = "export RAYON_NUM_THREADS=1000; ulimit -v 1000000";
    let tried = || limited(&place, limits, arguments);
    // A thread that has just begun may need memory when the next one's stack has taken the last;
    // the C library ends the program then.
    let mut finished = tried();
    for _ in 0..4 {
        if !finished
            .stderr
            .contains("failed to register TLS destructor")
        {
            break;
        }
        finished = tried();
    }
    assert_eq!(finished.status, Some(2), "{finished:?}");
    assert!(
        finished.stderr.contains("1000 threads can't be had")
            && finished.stderr.contains("RAYON_NUM_THREADS"),
        "{}",
        finished.stderr
    );
}

/// Grey pictures of two classes in MNIST's format, and a recipe that trains on them.
fn pictures(place: &Place, steps: usize, more: &str) {
    let images = place.path("images");
    for class in ["dark", "light"] {
        std::fs::create_dir_all(images.join(class)).unwrap();
        for index in 0..40u8 {
            let level = index + if class == "dark" { 0 } else { 200 };
            image::GrayImage::from_pixel(8, 8, image::Luma([level]))
                .save(images.join(class).join(format!("{index}.png")))
                .unwrap();
        }
    }
    place.write(
        "train.toml",
        format!(
            "data = {{ images = './images', size = 8, channels = 1, cache = './cache' }}
            [[stage]]
            kind = 'train'
            steps = {steps}
            batch = 4
            architecture = {{ family = 'dit', width = 8, heads = 2, depth = 1 }}
            {more}
            "
        ),
    );
}

#[cfg(unix)]
#[test]
fn records_that_are_cut_short_under_a_training_end_it_with_a_word() {
    let place = Place::new();
    pictures(&place, 1_000_000, "log_every = 1");
    let mut command = Command::new(PROGRAM);
    let child = command
        .args(["recipe", "train.toml", "--runs", "runs"])
        .current_dir(place.path("x").parent().unwrap())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = place.path("runs/train/001/01-train/metrics.jsonl");
    let begun = Instant::now();
    while !std::fs::read_to_string(&log).is_ok_and(|text| text.lines().count() > 3) {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "no step was done"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut cut = 0;
    for (path, _) in place.files() {
        if path.extension().is_some_and(|ending| ending == "bin") {
            let file = std::fs::File::options().write(true).open(path).unwrap();
            file.set_len(100).unwrap();
            cut += 1;
        }
    }
    assert_eq!(cut, 2);
    let finished = Finished::of(child.wait_with_output().unwrap());
    // A process killed by a signal has no status.
    assert_eq!(finished.status, Some(2), "{finished:?}");
    assert!(
        finished.stderr.contains("shard-00000.bin: expected")
            && finished.stderr.contains("cut short since it was opened"),
        "{}",
        finished.stderr
    );
    let status = std::fs::read_to_string(place.path("runs/train/001/status.json")).unwrap();
    assert!(status.contains("failed"), "{status}");
}

#[test]
fn a_divergence_names_the_last_checkpoint_only_if_there_is_one() {
    let place = Place::new();
    for (every, there) in [(1000, false), (1, true)] {
        place.write(
            "hot.toml",
            format!(
                "[[stage]]
                kind = 'prune'
                from = 'embedded:digits-teacher'
                groups = '1:2'
                steps = 60
                batch = 8
                lr = 1.0
                clip = 1e30
                max_bad_steps = 3
                checkpoint_every = {every}
                "
            ),
        );
        let runs = format!("runs-{every}");
        let finished = place.run(&["recipe", "hot.toml", "--runs", &runs]);
        assert_eq!(finished.status, Some(2), "{finished:?}");
        let says = |words: &str| finished.stderr.contains(words);
        assert!(says("not finite"), "{}", finished.stderr);
        assert_eq!(says("The last checkpoint is in"), there, "{finished:?}");
    }
}

#[test]
fn a_finished_stage_keeps_its_model_and_no_checkpoints() {
    let place = Place::new();
    for (keep, there) in [("", false), ("keep_checkpoints = true", true)] {
        pictures(&place, 4, &format!("checkpoint_every = 1\n{keep}"));
        let runs = format!("runs-{there}");
        place
            .run(&["recipe", "train.toml", "--runs", &runs])
            .succeeded();
        let stage = place.path(&runs).join("train/001/01-train");
        assert!(stage.join("model.safetensors").is_file());
        assert_eq!(stage.join("checkpoints").exists(), there);
        // Keys in the log have no blanks or slashes, and each line has its time.
        let log = std::fs::read_to_string(stage.join("metrics.jsonl")).unwrap();
        for line in log.lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let keys = line.as_object().unwrap();
            assert!(keys.keys().all(|key| !key.contains([' ', '/'])), "{line}");
            assert!(line["time"].as_f64().unwrap() > 1.7e9, "{line}");
        }
    }
}

#[test]
fn what_can_not_be_measured_is_refused_before_anything_is() {
    let place = Place::new();
    pictures(&place, 1, "");
    let arguments = ["evaluate", "images", "images"];
    let finished = place.run(&arguments);
    assert_eq!(finished.status, Some(2), "{finished:?}");
    for words in [
        "pt_inception-2015-12-05",
        "from https://",
        "FID is measured in",
    ] {
        assert!(finished.stderr.contains(words), "{}", finished.stderr);
    }
    place.run(&["standin", "standin"]).succeeded();
    let few = place.path("few");
    std::fs::create_dir_all(&few).unwrap();
    for index in 0..3 {
        let name = format!("{index}.png");
        std::fs::copy(place.path("images/dark").join(&name), few.join(&name)).unwrap();
    }
    let inception = "standin/standin-inception.pth";
    let arguments = ["evaluate", "images", "few", "--inception", inception];
    let finished = place.run(&arguments);
    assert_eq!(finished.status, Some(2), "{finished:?}");
    for words in ["few", "3 neighbours", "3 pictures"] {
        assert!(finished.stderr.contains(words), "{}", finished.stderr);
    }
}

#[cfg(not(feature = "mpi"))]
#[test]
fn a_launcher_of_several_is_refused_without_mpi() {
    let place = Place::new();
    for name in ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"] {
        let launched = Command::new(PROGRAM)
            .args(["inspect", "embedded:digits-teacher"])
            .env(name, "8")
            .current_dir(place.path("x").parent().unwrap())
            .output()
            .unwrap();
        let refused = Finished::of(launched);
        assert_eq!(refused.status, Some(2), "{}", refused.stderr);
        let expected = format!("a launcher started 8 processes ({name})");
        assert!(refused.stderr.contains(&expected), "{}", refused.stderr);
        assert!(refused.stderr.contains("--features mpi"));
    }
    assert_eq!(place.files(), []);
}
