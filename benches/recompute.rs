//! What does computing branches again save, and cost? Fine-tuning steps of DiT-S/2, batch 16.
//!
//! `cargo bench --bench recompute` prints time and peak memory with and without, in turns, the best
//! of three each. Each measurement is a process of its own, because a process's peak never falls;
//! it fails where the peak is above 0.6 times that of keeping everything.

use std::process::Command;

use burn::backend::Autodiff;
use burn_ndarray::{NdArray, NdArrayDevice};
use tinyfusion::backend::Compute;
use tinyfusion::bench::{self, BenchPlan, Workload};

/// Largest allowed peak, as a share of the other's. In both are weights, gradients, moments and the
/// average, 0.6 GiB.
const MOST: f64 = 0.6;
const ROUNDS: usize = 3;

fn main() {
    let recompute = std::env::args().nth(1);
    if let Some(recompute) = recompute.filter(|argument| !argument.starts_with('-')) {
        measure(recompute == "again");
        return;
    }
    let mut best = [[f64::MAX; 2]; 2];
    for _ in 0..ROUNDS {
        for (best, how) in best.iter_mut().zip(["kept", "again"]) {
            let program = std::env::current_exe().expect("a running program has a path");
            let output = Command::new(program).arg(how).output();
            let output = output.expect("this program starts again");
            assert!(output.status.success(), "{how}: {output:?}");
            let text = String::from_utf8_lossy(&output.stdout);
            let found = text.split_whitespace().map(str::parse::<f64>);
            for (best, found) in best.iter_mut().zip(found) {
                *best = best.min(found.expect("it prints numbers"));
            }
        }
    }
    let [[kept_ms, kept_mib], [again_ms, again_mib]] = best;
    println!("kept: {kept_ms:.0} ms, {kept_mib:.0} MiB");
    println!("computed again: {again_ms:.0} ms, {again_mib:.0} MiB");
    println!(
        "{:.2} times as long, {:.2} of the memory",
        again_ms / kept_ms,
        again_mib / kept_mib
    );
    assert!(again_mib <= MOST * kept_mib);
}

fn measure(recompute: bool) {
    let plan = BenchPlan {
        workload: Workload::Finetune,
        model: bench::model("DiT-S/2").expect("it is published"),
        batch: 16,
        compute: Compute::F32,
        recompute,
        warmup: 1,
        repeats: 3,
    };
    let measured = bench::bench::<Autodiff<NdArray>>(&plan, &NdArrayDevice::default());
    let peak = measured.peak_memory_mib.unwrap_or(f64::NAN);
    println!("{} {peak}", measured.median_ms);
}
