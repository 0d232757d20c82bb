//! What the same bits on any number of workers cost: a sum over workers in the fixed tree, against
//! `MPI_Allreduce`, whose order depends on how many there are.
//!
//! `cargo bench --features mpi --bench exchange`, with `mpiexec` in the path; `-- N` for N workers
//! on this machine instead of two. Both sum in turns; it fails where the tree takes more than
//! twice as long at the size of a training's buckets.

use std::process::Command;
use std::time::Instant;

use mpi::collective::SystemOperation;
use mpi::topology::SimpleCommunicator;
use mpi::traits::CommunicatorCollectives;
use tinyfusion::evaluation::median;
use tinyfusion::workers::{Group, start, sum};

// The allocator of the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// mimalloc's `mi_option_purge_delay`, set as the program sets it.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Longest time of the tree, as a multiple of MPI's sum, at the last of `SIZES`.
const MOST: f64 = 2.0;
const ROUNDS: usize = 21;
/// Numbers that are summed, up to those of a bucket.
const SIZES: [usize; 3] = [128 << 10, 1 << 20, 8 << 20];

/// Says that this process is one of those that sum.
const WORKER: &str = "TINYFUSION_BENCH_WORKER";

fn main() {
    // SAFETY: the option exists in every mimalloc since 1.0, and takes any number.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    if std::env::var_os(WORKER).is_some() {
        return measure();
    }
    let given = std::env::args().find_map(|argument| argument.parse::<usize>().ok());
    let workers = given.unwrap_or(2);
    assert!(workers > 1, "a sum needs two workers at least");
    let program = std::env::current_exe().expect("a program knows where it is");
    let ran = Command::new("mpiexec")
        .args(["-n", &workers.to_string()])
        .arg(program)
        .env(WORKER, "1")
        .status()
        .expect("mpiexec can be started");
    assert!(ran.success(), "{ran}");
}

fn measure() {
    let (workers, _) = start(None, false).expect("a launcher started this process");
    let world = SimpleCommunicator::world();
    if workers.leads() {
        println!("| MiB | tree, ms | MPI_Allreduce, ms | tree / MPI |");
        println!("|---:|---:|---:|---:|");
    }
    let mut ratio = 0.0;
    for size in SIZES {
        let seed = workers.rank() as f32 * 0.7 + 0.3;
        let own: Vec<f32> = (0..size).map(|i| (i as f32 * seed).sin()).collect();
        let (mut tree, mut mpi) = (own.clone(), own.clone());
        let mut by_tree = || {
            tree.copy_from_slice(&own);
            timed(&workers, || sum(&*workers, &mut tree))
        };
        let mut by_mpi = || {
            timed(&workers, || {
                world.all_reduce_into(&own[..], &mut mpi[..], SystemOperation::sum());
            })
        };
        let (mut times, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            // Who begins takes turns; the first round warms up.
            let (ours, other) = match round % 2 {
                0 => {
                    let ours = by_tree();
                    (ours, by_mpi())
                }
                _ => {
                    let other = by_mpi();
                    (by_tree(), other)
                }
            };
            if round > 0 {
                times.push(ours);
                theirs.push(other);
                ratios.push(ours / other);
            }
        }
        let differences = tree.iter().zip(&mpi).map(|(a, b)| (a - b).abs());
        let difference = differences.fold(0f32, f32::max);
        // Sums of few numbers of at most 1 differ by their rounding, if at all.
        assert!(difference < 1e-5 * workers.size() as f32, "{difference}");
        ratio = median(&ratios);
        if workers.leads() {
            println!(
                "| {} | {:.2} | {:.2} | {ratio:.2} |",
                (size * 4) as f64 / f64::from(1 << 20),
                median(&times) * 1e3,
                median(&theirs) * 1e3,
            );
        }
    }
    assert!(
        ratio <= MOST,
        "the tree takes {ratio:.2} times as long as MPI_Allreduce"
    );
}

/// How long the slowest of the workers took, in seconds.
fn timed(workers: &Group, what: impl FnOnce()) -> f64 {
    workers.all_gather(&[]);
    let started = Instant::now();
    what();
    let own = started.elapsed().as_secs_f64();
    let all = workers.all_gather(&own.to_le_bytes());
    all.iter()
        .map(|bytes| f64::from_le_bytes(bytes[..].try_into().expect("8 bytes")))
        .fold(0.0, f64::max)
}
