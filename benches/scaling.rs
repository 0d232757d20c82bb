//! Where does training on many GPUs stop to pay? A calculation for 8 to 1,024 of them: the passes,
//! the sums of the gradients, and what goes over the network.
//!
//! `cargo bench --bench scaling` measures on this machine how long a worker's part of the fixed
//! tree takes. The rest is assumed: the constants below, each with its source. No GPU has been
//! measured; `-- 300` says how many images a second one trains. Left out: what a step copies before
//! and after the sums, gathering weights under `shard_optimizer`, and reading latents, of which one
//! process reads hundreds of times as many as a GPU trains (`cargo bench --bench loader`).

use std::time::Instant;

use tinyfusion::workers::{Workers, sum};

// The allocator of the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// mimalloc's `mi_option_purge_delay`, set as the program sets it.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Numbers in the gradients of DiT-XL/2 halved in depth.
const PARAMETERS: f64 = 340e6;
/// Images a second that one GPU trains: 0.84 steps of 128 images, fast-DiT's DiT-XL/2 on an A100
/// (its README, with fp16 and recomputed blocks). A halved model is faster; a teacher's pass is not
/// in it.
const IMAGES: f64 = 107.0;
/// Least time of a step's passes, in seconds: some 2,500 kernels at 8 microseconds to start each.
const LEAST: f64 = 0.02;
/// GPUs of a node, as in a DGX A100.
const NODE: f64 = 8.0;
/// Images of a step when the recipes for DiT-XL/2 fine-tune.
const BATCH: f64 = 256.0;
/// Images of each GPU, where the batch grows with their number.
const EACH: f64 = 32.0;
/// Numbers that are exchanged at once (`training/together.rs`).
const BUCKET: usize = 8 << 20;
/// Bytes a second of a GPU's memory over those of a core of this machine, by which sums on the GPU
/// are faster: 1.5 TB/s and some 15 GB/s.
const MEMORY: f64 = 100.0;

/// Bytes a second of each GPU, and seconds that a message takes to start.
struct Links {
    /// Between a GPU and where its numbers are summed.
    up: f64,
    /// To the other GPUs of a node.
    within: f64,
    /// To those of other nodes.
    between: f64,
    message: f64,
}

/// As it is: sums on the host, and one card of 400 Gbit/s for the eight GPUs of a node. PCIe 4.0
/// with sixteen lanes; the memory of a host copies some 100 GB/s for all eight.
const HOST: Links = Links {
    up: 25e9,
    within: 12.5e9,
    between: 6.25e9,
    message: 2e-6,
};

/// With sums on the GPU, and a card of 200 Gbit/s for each (a DGX A100: NVLink 3, 300 GB/s a
/// direction, of which collectives reach two thirds).
const DEVICE: Links = Links {
    up: f64::INFINITY,
    within: 200e9,
    between: 25e9,
    message: 2e-6,
};

fn main() {
    // SAFETY: the option exists in every mimalloc since 1.0, and takes any number.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    let given = std::env::args().find_map(|argument| argument.parse::<f64>().ok());
    let images = given.unwrap_or(IMAGES);
    println!(
        "{images} images/s a GPU, {:.0} million parameters, nodes of {NODE} GPUs; \"at best\" is an exchange that is hidden behind the passes wholly",
        PARAMETERS / 1e6
    );
    println!();
    println!(
        "| GPUs | tree, ms | {BATCH} images, ms | efficiency | {EACH} a GPU, ms | efficiency | summed on the GPU, ms | efficiency | at best, ms | efficiency |"
    );
    println!("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    let passes = |each: f64| (each / images).max(LEAST);
    for power in 3..=10 {
        let workers = f64::from(1 << power);
        let tree = tree(1 << power);
        let [host, device] = [
            exchange(&HOST, workers) + tree,
            exchange(&DEVICE, workers) + tree / MEMORY,
        ];
        let alone = passes(EACH);
        // No more workers than images.
        let each = BATCH / workers;
        let of_batch = match each >= 1.0 {
            true => cells(passes(each) + host, passes(each)),
            false => "- | -".to_owned(),
        };
        println!(
            "| {workers} | {:.0} | {of_batch} | {} | {} | {} |",
            tree * 1e3,
            cells(alone + host, alone),
            cells(alone + device, alone),
            cells(alone.max(device), alone),
        );
    }
}

/// Time and efficiency of a step, against GPUs that need not speak to each other.
fn cells(step: f64, alone: f64) -> String {
    format!("{:.0} | {:.2}", step * 1e3, alone / step)
}

/// Seconds of a step's exchange: each number goes to the one who sums it, and its sum to all.
fn exchange(links: &Links, workers: f64) -> f64 {
    let bytes = 4.0 * PARAMETERS;
    let (near, far) = ((NODE - 1.0) / workers, (workers - NODE) / workers);
    let sent = bytes * (near / links.within + far / links.between);
    let messages = (PARAMETERS / BUCKET as f64).ceil() * (workers - 1.0) * links.message;
    2.0 * (bytes / links.up + sent + messages)
}

/// Seconds that [`sum`] takes a worker of so many for all gradients, without the network.
fn tree(size: usize) -> f64 {
    let mut values = vec![1.0; BUCKET];
    let workers = Mirror(size);
    let mut times: Vec<f64> = (0..5)
        .map(|_| {
            values.fill(1.0);
            let begun = Instant::now();
            sum(&workers, &mut values);
            begun.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2] * PARAMETERS / BUCKET as f64
}

/// A worker whose others have the same numbers.
#[derive(Debug)]
struct Mirror(usize);

impl Workers for Mirror {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        self.0
    }

    fn broadcast(&self, bytes: Vec<u8>) -> Vec<u8> {
        bytes
    }

    fn all_gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        vec![bytes.to_vec(); self.0]
    }

    fn exchange(&self, parts: &[f32]) -> Vec<f32> {
        parts.to_vec()
    }

    fn collect(&self, part: &[f32], all: &mut [f32]) {
        for all in all.chunks_mut(part.len()) {
            all.copy_from_slice(part);
        }
    }

    #[allow(clippy::exit)]
    fn abort(&self, status: i32) -> ! {
        std::process::exit(status)
    }
}
