//! A training step on two workers of one thread each, against one process of two threads.
//!
//! `cargo bench --features mpi --bench workers`, with `mpiexec` in the path and two cores free.
//! Both train in turns; it fails where the workers take more than 1.1 times as long.

use std::path::Path;
use std::process::Command;

use tinyfusion::evaluation::median;

/// Longest time of the workers, as a multiple of the one process's.
const MOST: f64 = 1.1;
const ROUNDS: usize = 5;
/// Steps before the first that counts.
const WARM_UP: usize = 5;

const RECIPE: &str = "
data = 'fashion-10k'
[[stage]]
kind = 'train'
name = 'trained'
steps = 25
batch = 64
accumulate = 2
log_every = 1
architecture = { family = 'dit', input_size = 28, patch_size = 4, channels = 1, width = WIDTH, heads = 4, depth = 8, classes = 10 }
";

fn main() {
    println!("| width | one process, images/s | two workers, images/s | time, workers / one |");
    println!("|---:|---:|---:|---:|");
    let mut longest = 0f64;
    for width in [64, 256] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let recipe = RECIPE.replace("WIDTH", &width.to_string());
        std::fs::write(folder.path().join("job.toml"), recipe).expect("the folder can be written");
        let (mut one, mut two, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let rate = |workers| images_per_second(folder.path(), workers, round);
            // Who begins takes turns too.
            let (alone, shared) = match round % 2 {
                0 => (rate(1), rate(2)),
                _ => {
                    let shared = rate(2);
                    (rate(1), shared)
                }
            };
            ratios.push(alone / shared);
            one.push(alone);
            two.push(shared);
        }
        let ratio = median(&ratios);
        println!(
            "| {width} | {:.0} | {:.0} | {ratio:.2} |",
            median(&one),
            median(&two)
        );
        longest = longest.max(ratio);
    }
    assert!(
        longest <= MOST,
        "two workers take {longest:.2} times as long as one process"
    );
}

/// Trains, and returns the median over the steps.
fn images_per_second(folder: &Path, workers: usize, round: usize) -> f64 {
    let program = env!("CARGO_BIN_EXE_tinyfusion");
    let runs = format!("{workers}-{round}");
    let mut command = match workers {
        1 => Command::new(program),
        _ => {
            let mut launcher = Command::new("mpiexec");
            launcher.args(["-n", &workers.to_string(), program]);
            launcher
        }
    };
    let ran = command
        .args(["recipe", "job.toml", "--plain", "--runs", &runs])
        .args(["--threads", if workers == 1 { "2" } else { "1" }])
        .current_dir(folder)
        .output()
        .expect("mpiexec can be started");
    assert!(ran.status.success(), "{ran:?}");
    let log = folder.join(runs).join("job/001/01-trained/metrics.jsonl");
    let log = std::fs::read_to_string(log).expect("a training leaves a log");
    let rate = |line: &str| -> f64 {
        let line: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
        line["images_per_second"].as_f64().expect("a number")
    };
    let rates: Vec<f64> = log.lines().skip(WARM_UP).map(rate).collect();
    median(&rates)
}
