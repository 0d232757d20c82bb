//! The dashboard on a terminal made by `script`: a key press, and a terminal that is closed.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::program::Place;

const LONG: &str = "[[stage]]
    kind = 'train'
    steps = 1000000
    batch = 4
    checkpoint_every = 1000000
    architecture = { family = 'dit', width = 8, heads = 2, depth = 1 }
    ";

/// Starts a training on a terminal, and waits until it is running.
fn start(place: &Place) -> Child {
    place.write("long.toml", LONG);
    let program = env!("CARGO_BIN_EXE_tinyfusion");
    let run = format!("{program} recipe long.toml --runs runs");
    let child = Command::new("script")
        .args(["-qefc", &run, "/dev/null"])
        .current_dir(place.path("long.toml").parent().unwrap())
        .env("TERM", "xterm-256color")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let log = place.path("runs/long/001/01-train/metrics.jsonl");
    wait(
        || std::fs::read_to_string(&log).is_ok_and(|text| !text.is_empty()),
        "the first step",
    );
    child
}

fn wait(until: impl Fn() -> bool, what: &str) {
    let begun = Instant::now();
    while !until() {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "waited for {what}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_saved(run: &Path) -> bool {
    let status = std::fs::read_to_string(run.join("status.json"));
    let checkpoints = std::fs::read_dir(run.join("01-train/checkpoints"));
    status.is_ok_and(|status| status.contains("interrupted"))
        && checkpoints.is_ok_and(|mut entries| entries.next().is_some())
}

#[cfg(target_os = "linux")]
#[test]
fn a_key_ends_a_training_and_saves_it() {
    let place = Place::new();
    let mut child = start(&place);
    let mut keys = child.stdin.take().unwrap();
    // Other keys do nothing.
    keys.write_all(b"uickstart? ").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(child.try_wait().unwrap().is_none(), "a key ended it");
    keys.write_all(b"q").unwrap();
    keys.flush().unwrap();
    let run = place.path("runs/long/001");
    wait(|| is_saved(&run), "the checkpoint");
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[cfg(target_os = "linux")]
#[test]
fn a_terminal_that_goes_away_saves_the_training() {
    let place = Place::new();
    let mut child = start(&place);
    child.kill().unwrap();
    child.wait().unwrap();
    let run = place.path("runs/long/001");
    wait(|| is_saved(&run), "the checkpoint");
    // The program ends and releases the run, which can then be continued.
    let lock = std::fs::File::open(run.join("run.lock")).unwrap();
    wait(|| lock.try_lock().is_ok(), "the end of the program");
}
