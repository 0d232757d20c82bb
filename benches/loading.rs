//! Opening a checkpoint of DiT-XL/2's size, in every format: memory, and time compared with a plain
//! read of the same bytes.
//!
//! `cargo bench --bench loading`. Writes 2.7 GB at a time to the folder of temporary files. Each
//! measurement is a process of its own, because a process's peak never falls; it fails where the
//! peak exceeds 1.3 times the file.

use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use burn_ndarray::{NdArray, NdArrayDevice};
use tinyfusion::evaluation::median;
use tinyfusion::models::{Architecture, position_table, presets};
use tinyfusion::state::{Array, StateDict};
use tinyfusion::weights::{Checkpoint, Conversion, Provenance, WeightFile, convert};

/// Largest allowed peak, as a multiple of the file's size.
const MOST: f64 = 1.3;
const RUNS: usize = 3;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("make") => make(Path::new(&arguments[2])),
        Some("load") => load(Path::new(&arguments[2])),
        _ => compare(),
    }
}

/// Runs this program with other arguments and returns what it prints.
fn again(arguments: &[&str]) -> String {
    let program = std::env::current_exe().expect("a running program has a path");
    let output = Command::new(program).args(arguments).output();
    let output = output.expect("this program starts again");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn compare() {
    println!("| form | GB | plain read, s | load, s | load / read | peak / size |");
    println!("|---|---:|---:|---:|---:|---:|");
    let folder = tempfile::tempdir().expect("a temporary folder");
    for name in [
        "x.safetensors",
        "x.pt",
        "x.safetensors.index.json",
        "diffusers",
    ] {
        let path = folder.path().join(name);
        let at = path
            .to_str()
            .expect("the name of a temporary folder is text");
        again(&["make", at]);
        let files: Vec<_> = files(&path);
        let size: u64 = files
            .iter()
            .map(|file| file.metadata().map_or(0, |m| m.len()))
            .sum();
        let (mut plain, mut loads, mut peak) = (Vec::new(), Vec::new(), 0f64);
        for _ in 0..RUNS {
            plain.push(read(&files));
            let said = again(&["load", at]);
            let (seconds, bytes) = said.split_once(' ').expect("`load` prints two numbers");
            loads.push(seconds.parse().expect("seconds"));
            peak = peak.max(bytes.parse::<f64>().expect("bytes") / size as f64);
        }
        let (plain, load) = (median(&plain), median(&loads));
        println!(
            "| {name} | {:.2} | {plain:.2} | {load:.2} | {:.2} | {peak:.2} |",
            size as f64 / 1e9,
            load / plain
        );
        assert!(
            peak <= MOST,
            "loading {name} peaked at {peak:.2} times its size, expected at most {MOST}"
        );
        for file in files {
            std::fs::remove_file(file).expect("a file just written can be removed");
        }
    }
}

/// The files of one format.
fn files(path: &Path) -> Vec<std::path::PathBuf> {
    let folder = if path.is_dir() {
        path
    } else {
        path.parent().unwrap_or(path)
    };
    let entries = std::fs::read_dir(folder)
        .expect("the folder is there")
        .flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect()
}

/// Reads files at full speed; in seconds.
fn read(files: &[std::path::PathBuf]) -> f64 {
    let started = Instant::now();
    let mut buffer = vec![0; 4 << 20];
    for file in files {
        let mut file = std::fs::File::open(file).expect("a file just written opens");
        while file.read(&mut buffer).expect("a file just written reads") > 0 {}
    }
    started.elapsed().as_secs_f64()
}

/// Writes a DiT-XL/2 with numbered values.
fn make(path: &Path) {
    let config = presets::config("DiT-XL/2", 32, 4, 1000).expect("it is a preset");
    let mut state: StateDict = (config.tensors().into_iter().enumerate())
        .map(|(index, (name, shape))| {
            let values = (0..shape.iter().product()).map(|i: usize| (index + i) as f32 * 1e-7);
            (name, Array::new(shape, values.collect()))
        })
        .collect();
    let table = position_table(config.width, config.input_size / config.patch_size);
    state.insert(
        "pos_embed".into(),
        Array::new([1, config.tokens(), config.width], table),
    );
    let checkpoint = Checkpoint::new(
        Architecture::Dit(config),
        state.into(),
        Provenance::default(),
        path,
    );
    let conversion = Conversion {
        diffusers: WeightFile::of(path).is_none(),
        shard: matches!(WeightFile::of(path), Some(WeightFile::Shards)).then_some(1_000_000_000),
        ..Conversion::default()
    };
    convert(&checkpoint, path, &conversion).expect("a temporary folder has room");
}

/// Builds a file's network, and prints seconds and peak memory.
fn load(path: &Path) {
    let before = peak();
    let started = Instant::now();
    let checkpoint = Checkpoint::read(path).expect("a file just written opens");
    let network = checkpoint.network::<NdArray>(&NdArrayDevice::default());
    let took = started.elapsed().as_secs_f64();
    let network = network.expect("a file just written fits");
    println!("{took} {}", peak() - before);
    drop(network);
}

/// This process's peak memory, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| {
        line.trim()
            .trim_end_matches("kB")
            .trim()
            .parse::<u64>()
            .ok()
    });
    1024 * kilobytes.expect("Linux says the peak of a process in /proc/self/status")
}
