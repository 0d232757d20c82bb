//! Feeding latents to training: packed shards against the reference's `.npy` folders.
//!
//! 2,048 synthetic latents of ImageNet's shape, `[2, 4, 32, 32]`, are written in each format to a
//! temporary folder and read as in training: batches of 256 in an epoch's shuffled order, with a
//! drawn view per sample. The timed function is `BatchSource::samples`, which only reads; drawing
//! noise costs the same in any format. All files are in the system's cache, so that formats are
//! compared rather than disks: on a disk the difference is larger, because two files must be found
//! and opened per sample.
//!
//! Criterion measures each format; then the formats take turns, a batch each, over fifteen epochs,
//! and the median times of a batch are compared, so that other load affects all of them. Shards of
//! `f16` must feed at least five times as many samples per second as `.npy` files, or the bench
//! fails. Shards of `f32` are shown for comparison: they take twice the bytes, copied at the speed
//! of memory.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use criterion::{Criterion, Throughput};
use tinyfusion::data::latents::{Dtype, Layout, ShardWriter, write_npy};
use tinyfusion::data::{BatchPlan, BatchSource, DataError, Latents};
use tinyfusion::evaluation::median;
use tinyfusion::process::Times;
use tinyfusion::random::{self, Stream};

// As in the program: memory freed by a batch is reused by the next.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// mimalloc's `mi_option_purge_delay`, set as the program sets it.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

const COUNT: usize = 2048;
const BATCH: usize = 256;
const CLASSES: usize = 1000;
const SHAPE: [usize; 3] = [2, 4, 32];
const EPOCHS: usize = 15;
/// Least ratio of `f16` shards to `.npy` files. 8 was measured; machines are noisy.
const AT_LEAST: f64 = 5.0;

fn write(folder: &Path) -> Result<(), DataError> {
    let shards = |name: &str, dtype| {
        let layout = Layout {
            views: SHAPE[0],
            channels: SHAPE[1],
            side: SHAPE[2],
            dtype,
            classes: CLASSES,
            records_per_shard: 512,
            scaling_factor: 0.18215,
        };
        ShardWriter::open(&folder.join(name), layout, Vec::new())
    };
    let (mut f16, mut f32) = (shards("f16", Dtype::F16)?, shards("f32", Dtype::F32)?);
    let count = SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[2];
    for index in 0..COUNT {
        let latents = random::normal(0, Stream::Bench, 2, index as u64, count);
        let label = index % CLASSES;
        f16.push(&latents, label)?;
        f32.push(&latents, label)?;
        write_npy(&folder.join("npy"), index, SHAPE, &latents, label)?;
    }
    f16.finish()?;
    f32.finish()
}

fn source(folder: &Path) -> Result<BatchSource, DataError> {
    let plan = BatchPlan {
        batch: BATCH,
        seed: 0,
        channels: SHAPE[1],
        size: SHAPE[2],
        classes: CLASSES,
        label_drop: 0.1,
        times: Times::Steps(1000),
        masking: None,
        logits: Vec::new(),
    };
    Ok(BatchSource::new(plan, Arc::new(Latents::open(folder)?)))
}

/// Seconds of a batch.
fn time(source: &BatchSource, step: usize) -> Result<f64, DataError> {
    let start = Instant::now();
    black_box(source.samples(step, 0..BATCH)?);
    Ok(start.elapsed().as_secs_f64())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // SAFETY: sets a number before any other thread runs.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    let folder = tempfile::tempdir()?;
    write(folder.path())?;
    let sources = ["npy", "f16", "f32"]
        .into_iter()
        .map(|form| Ok((form, source(&folder.path().join(form))?)))
        .collect::<Result<Vec<_>, DataError>>()?;

    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("batch of 256 latents");
    group.throughput(Throughput::Elements(BATCH as u64));
    for (form, source) in &sources {
        let mut step = 0;
        group.bench_function(*form, |bencher| {
            bencher.iter(|| {
                step += 1;
                source.samples(step, 0..BATCH).map(black_box)
            })
        });
    }
    group.finish();
    criterion.final_summary();

    let mut times = vec![Vec::new(); sources.len()];
    for step in 0..EPOCHS * COUNT / BATCH {
        for ((_, source), times) in sources.iter().zip(&mut times) {
            times.push(time(source, step)?);
        }
    }
    let rates: Vec<f64> = times
        .into_iter()
        .map(|t| BATCH as f64 / median(&t))
        .collect();
    for ((form, _), rate) in sources.iter().zip(&rates) {
        println!("{form}: {rate:.0} latents/s, {:.1} x npy", rate / rates[0]);
    }
    assert!(
        rates[1] / rates[0] >= AT_LEAST,
        "packed shards must feed at least {AT_LEAST} times what .npy files feed"
    );
    Ok(())
}
