//! Whole workloads compared with this machine's limits: `cargo bench --bench limits [-- digits]`.
//!
//! The limit is the time of the arithmetic at the best rate of a matrix product here, plus the time
//! of the memory traffic at the best rate of a pass over memory, without overlap and without
//! caches; a small model may therefore be faster than the limit.

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::{Distribution, Tensor};
use burn_ndarray::{NdArray, NdArrayDevice};
use clap::ValueEnum;
use tinyfusion::backend::Compute;
use tinyfusion::bench::{self, BenchPlan, Workload};
use tinyfusion::models::Architecture;
use tinyfusion::ops::{Activation, FusedOps, LinearWeights};

// As in the program: memory freed by a step is reused by the next.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Inner = NdArray;
type Training = burn::backend::Autodiff<Inner>;

/// Rank of the pruning workload's low-rank updates.
const RANK: usize = 8;

fn main() {
    let flops = peak_product();
    let bytes = peak_bandwidth();
    println!(
        "{} threads: products {:.0} GFLOP/s, passes over memory {:.1} GB/s (best of many)",
        rayon::current_num_threads(),
        flops / 1e9,
        bytes / 1e9
    );
    println!();
    println!(
        "| model, batch | workload | GFLOP | GB | limit, ms | measured, ms | limit / measured |"
    );
    println!("|---|---|---:|---:|---:|---:|---:|");
    let filter = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    for (name, batch, repeats) in [("digits", 128, 20), ("DiT-S/2", 4, 6), ("DiT-B/2", 1, 6)] {
        if filter
            .as_ref()
            .is_some_and(|filter| !name.contains(filter.as_str()))
        {
            continue;
        }
        let model = bench::model(name).expect("the presets are there");
        for workload in [
            Workload::Infer,
            Workload::Finetune,
            Workload::Prune,
            Workload::MaskedKd,
            Workload::Sample,
            Workload::Importance,
        ] {
            let work = Work::of(workload, &model, batch);
            let limit = 1e3 * (work.flops / flops + work.bytes / bytes);
            let plan = BenchPlan {
                workload,
                model: model.clone(),
                batch,
                compute: Compute::F32,
                recompute: false,
                warmup: 3,
                repeats,
            };
            let measured = bench::bench::<Training>(&plan, &NdArrayDevice::default()).median_ms;
            println!(
                "| {name}, {batch} | {} | {:.1} | {:.2} | {limit:.1} | {measured:.1} | {:.2} |",
                workload
                    .to_possible_value()
                    .map_or(String::new(), |value| value.get_name().to_owned()),
                work.flops / 1e9,
                work.bytes / 1e9,
                limit / measured
            );
        }
    }
}

/// The best of many runs, in seconds.
fn best(mut run: impl FnMut()) -> f64 {
    (0..60)
        .map(|_| {
            let started = Instant::now();
            run();
            started.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn noise<const D: usize>(shape: [usize; D]) -> Tensor<Inner, D> {
    Tensor::random(
        shape,
        Distribution::Normal(0.0, 1.0),
        &NdArrayDevice::default(),
    )
}

/// Floating-point operations per second of a product so large that its copies don't count.
fn peak_product() -> f64 {
    let (rows, input, output) = (1344, 1024, 1024);
    let x = noise([rows, input]);
    let weights = LinearWeights {
        weight: noise([output, input]),
        bias: noise([output]),
        lora: None,
        compute: Compute::F32,
    };
    let seconds = best(|| {
        black_box(Inner::linear_layer(
            x.clone(),
            weights.clone(),
            Activation::Identity,
        ));
    });
    (2 * rows * input * output) as f64 / seconds
}

/// Bytes per second of a pass over memory larger than any cache: two values read, one written.
fn peak_bandwidth() -> f64 {
    let count = 1 << 26;
    let value = noise([count]);
    let mut average = Some(value.clone() + 1.0);
    let seconds = best(|| {
        // Moved out and back: an unshared value is overwritten in place.
        if let Some(before) = average.take() {
            average = Some(Inner::moving_average(before, value.clone(), 0.9));
        }
    });
    (3 * 4 * count) as f64 / seconds
}

/// The least work of a workload.
struct Work {
    /// Operations of products; a multiplication and an addition count as two.
    flops: f64,
    /// Memory traffic: operators read their inputs and write their outputs once.
    bytes: f64,
}

impl Work {
    fn of(workload: Workload, model: &Architecture, batch: usize) -> Self {
        let Architecture::Dit(model) = model else {
            unreachable!("the presets are transformers")
        };
        let (rows, width) = (batch * model.tokens(), model.width);
        let forward = 2.0 * (batch * model.macs()) as f64;
        let parameters = Architecture::from(model.clone()).parameters() as f64;
        // Values an operator of a block passes per row and column, forward: two norms 2 each,
        // projection of q, k, v 4, attention 4, its projection 2, two residuals 3 each, the MLP's
        // two layers 5 each.
        let there = (30 * rows * width * model.depth) as f64;
        // The gradients of their outputs, the saved values, and the gradients of their inputs.
        let back = (44 * rows * width * model.depth) as f64;
        let (flops, values) = match workload {
            Workload::Infer => (forward, there + parameters),
            Workload::Sample => (2.0 * forward, 2.0 * there + parameters),
            // Gradients of inputs and of weights cost a forward pass each. Each parameter is read
            // twice and its gradient written; the norm reads 1, AdamW reads 4 and writes 3, the
            // average reads 2 and writes 1.
            Workload::Finetune => (3.0 * forward, there + back + 14.0 * parameters),
            // As there; then gradients are copied, and each weight and its gradient read for the
            // groups of its rows and of its columns.
            Workload::Importance => (3.0 * forward, there + back + 9.0 * parameters),
            Workload::Prune => {
                // x A^T, dy B, and their products with dy and x: over all layers' inputs and
                // outputs.
                let sides = 3 * width + width + 2 * width + 2 * (width + model.hidden());
                let factors = (4 * RANK * rows * sides * model.depth) as f64;
                // The gates also read and write a block's input and output: 3 forward, 4 back.
                let gates = (7 * rows * width * model.depth) as f64;
                (
                    2.0 * forward + factors,
                    there + back + gates + 2.0 * parameters,
                )
            }
            Workload::MaskedKd => (
                forward + 1.5 * forward,
                there + (there + back) / 2.0 + parameters + 7.0 * parameters,
            ),
        };
        Self {
            flops,
            bytes: 4.0 * values,
        }
    }
}
