//! Runs that are killed at any moment, and then continue to the same bytes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::program::Place;

/// Kills in one test; `TINYFUSION_KILLS` sets another number.
const KILLS: usize = 60;

/// Every kind of stage that writes files, in about a second.
const RECIPE: &str = "
    data = { images = './images', size = 8, channels = 1, held_out = 0.3 }
    [[stage]]
    kind = 'train'
    name = 'features'
    steps = 6
    batch = 8
    checkpoint_every = 2
    log_every = 1
    architecture = { family = 'classifier', width = 8 }
    [[stage]]
    kind = 'train'
    name = 'teacher'
    steps = 8
    batch = 4
    checkpoint_every = 2
    keep_checkpoints = true
    log_every = 1
    architecture = { family = 'dit', width = 8, heads = 2, depth = 4 }
    [[stage]]
    kind = 'prune'
    from = 'teacher'
    groups = '1:2'
    update = 'lora'
    steps = 8
    batch = 4
    checkpoint_every = 2
    log_every = 1
    [[stage]]
    kind = 'recover'
    from = 'prune'
    method = 'masked-kd'
    teacher = 'teacher'
    steps = 8
    batch = 4
    checkpoint_every = 2
    log_every = 1
    [[stage]]
    kind = 'sample'
    from = 'recover'
    count = 24
    batch = 4
    steps = 4
    [[stage]]
    kind = 'evaluate'
    compare = ['teacher', 'recover']
    features = 'features'
    count = 40
    batch = 8
    steps = 2
";

/// Files that must be identical: all of a finished run except those with times and processes.
/// Numbers that depend on the clock are removed from the logs.
fn results(run: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![run.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                // The page's tables and figures have speeds.
                if !path.ends_with("report") {
                    folders.push(path);
                }
                continue;
            }
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let of_the_process = [
                "environment",
                // The page, which tells times and speeds.
                "report.html",
                "status",
                "run.lock",
                "done.json",
                "pack.lock",
            ];
            if of_the_process.iter().any(|start| name.starts_with(start)) {
                continue;
            }
            let mut bytes = std::fs::read(&path).unwrap();
            if name == "metrics.jsonl" || name == "eval.json" {
                let text = String::from_utf8(bytes).unwrap();
                let whole = if name == "eval.json" {
                    text.replace('\n', " ")
                } else {
                    text
                };
                bytes = whole.lines().map(timeless).collect::<String>().into_bytes();
            }
            found.insert(path.strip_prefix(run).unwrap().to_owned(), bytes);
        }
    }
    found
}

/// JSON without the fields that depend on the clock.
fn timeless(line: &str) -> String {
    fn strip(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::Object(entries) => {
                entries.retain(|key, _| !["time", "images_per_second"].contains(&key.as_str()));
                entries.values_mut().for_each(strip);
            }
            serde_json::Value::Array(items) => items.iter_mut().for_each(strip),
            _ => {}
        }
    }
    let mut value = serde_json::from_str(line).unwrap();
    strip(&mut value);
    format!("{value}\n")
}

#[test]
fn runs_that_are_killed_at_random_end_in_the_same_bytes() {
    let place = Place::new();
    for class in ["dark", "light"] {
        for index in 0..30u8 {
            let level = index + if class == "dark" { 0 } else { 200 };
            let path = place
                .path("images")
                .join(class)
                .join(format!("{index}.png"));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let picture = image::GrayImage::from_fn(8, 8, |x, y| {
                image::Luma([level.wrapping_add((x * y) as u8)])
            });
            picture.save(path).unwrap();
        }
    }
    place.write("all.toml", RECIPE);
    let begun = Instant::now();
    place
        .run(&["recipe", "all.toml", "--runs", "whole"])
        .succeeded();
    let whole = begun.elapsed();
    let expected = results(&place.path("whole/all/001"));
    for file in [
        "01-features/model.safetensors",
        "02-teacher/checkpoints/step-00000006.safetensors",
        "03-prune/decisions.svg",
        "05-sample/samples.npz",
        "06-evaluate/eval.json",
    ] {
        assert!(
            expected.contains_key(Path::new(file)),
            "{file}: {:?}",
            expected.keys()
        );
    }
    let kills = std::env::var("TINYFUSION_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    // Fixed draws: a linear congruential generator (Knuth).
    let mut state = 1u64;
    let mut draw = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1u64 << 31) as f64
    };
    let (mut killed, mut finished) = (0, 0);
    while killed < kills || finished == 0 {
        let runs = format!("runs-{finished}");
        let mut arguments = vec!["recipe", "all.toml", "--runs", &runs];
        loop {
            // The time between two kills covers anything from the start alone to whole stages; a
            // run has about five kills.
            let patience = whole.mul_f64(draw() * 0.45);
            let mut child = place.start(&arguments);
            let begun = Instant::now();
            let ended = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break Some(status);
                }
                if killed < kills && begun.elapsed() >= patience {
                    child.kill().unwrap();
                    child.wait().unwrap();
                    killed += 1;
                    break None;
                }
                std::thread::sleep(Duration::from_millis(1));
            };
            match ended {
                Some(status) => {
                    let output = child.wait_with_output().unwrap();
                    let said = String::from_utf8_lossy(&output.stderr).into_owned();
                    // A run that was killed before it wrote anything does not exist, so another is
                    // started.
                    if said.contains("no unfinished run to resume") {
                        arguments.retain(|argument| *argument != "--resume");
                        continue;
                    }
                    assert!(status.success(), "after {killed} kills: {said}");
                    break;
                }
                None if !arguments.contains(&"--resume") => arguments.push("--resume"),
                None => {}
            }
        }
        let folder = place.path(&runs).join("all");
        let mut made: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|run| run.unwrap().path())
            .collect();
        made.sort();
        let found = results(made.last().unwrap());
        assert!(
            found.keys().eq(expected.keys()),
            "{:?}, not {:?}",
            found.keys(),
            expected.keys()
        );
        for (path, bytes) in &expected {
            assert!(
                found[path] == *bytes,
                "{}: other bytes, after {killed} kills",
                path.display()
            );
        }
        std::fs::remove_dir_all(place.path(&runs)).unwrap();
        finished += 1;
    }
    println!("{killed} kills of {finished} runs, all with the same files");
}
