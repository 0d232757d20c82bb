//! File readers against malformed files.
//!
//! Whole files are damaged (bits, lengths, moved pieces), or changed inside (archive members,
//! headers, chunks, words of a text) with checksums and lengths corrected. In every case a reader
//! ends within 20 seconds, takes at most 1 GiB of this program's memory above the file's size, does
//! not panic and changes nothing in the folder. From damaged files with checksums it reads the same
//! values as before, or none.
//!
//! ```text
//! cargo test --test hostile                                    # a minute, from a fixed seed
//! cargo test --release --test hostile -- --hours 8 --seed 17   # a night
//! cargo test --test hostile -- --only npz --seconds 300
//! ```
//!
//! A failure is printed with the smallest set of changes that shows it. If a case hangs or ends the
//! process, its files are left in `target/tmp/hostile-SEED/`.

// A test fails by panicking.
#![allow(clippy::unwrap_used)]

mod mutation;
mod targets;
mod unfinished;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use mutation::{Change, change};
use targets::{Seen, Target};

/// Most time that a reader may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Most memory that it may take above the file's size.
const ROOM: usize = 1 << 30;
/// Time between lines that say how far a long run is.
const BETWEEN: Duration = Duration::from_secs(600);
/// Consecutive inputs of one target.
const IN_A_ROW: u32 = 20;

/// Counts the memory in use, and its peak.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

impl Counting {
    fn add(size: usize) {
        let held = HELD.fetch_add(size, Ordering::Relaxed) + size;
        MOST.fetch_max(held, Ordering::Relaxed);
    }
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::add(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::add(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::add(size);
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The file being read, the start of reading, and the memory in use then.
static UNDER_WAY: Mutex<Option<(Instant, PathBuf, usize)>> = Mutex::new(None);

/// Ends the process when a reader hangs or takes all memory, since a thread cannot be stopped.
#[allow(clippy::exit)]
fn watch() {
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let under_way = UNDER_WAY.lock().unwrap().clone();
        let Some((since, path, held)) = under_way else {
            continue;
        };
        let taken = HELD.load(Ordering::Relaxed).saturating_sub(held);
        let hangs = since.elapsed() > PATIENCE;
        if hangs || taken > 4 * ROOM {
            let what = if hangs { "hangs" } else { "takes all memory" };
            eprintln!(
                "hostile: a reader of {} {what}; the files are there",
                path.display()
            );
            std::process::exit(1);
        }
    }
}

struct Arguments {
    time: Duration,
    seed: u64,
    only: Option<String>,
}

impl Arguments {
    /// None if other tests were asked for in `cargo test`.
    fn read() -> Option<Self> {
        let mut read = Self {
            time: Duration::from_secs(60),
            seed: 0,
            only: None,
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut number = || -> f64 { words.next().unwrap().parse().unwrap() };
            match word.as_str() {
                "--hours" => read.time = Duration::from_secs_f64(3600.0 * number()),
                "--seconds" => read.time = Duration::from_secs_f64(number()),
                "--seed" => read.seed = number() as u64,
                "--only" => read.only = words.next(),
                "--list" => return None,
                // The test harness's own options that take a value.
                "--test-threads" | "--skip" | "--color" | "--format" => drop(words.next()),
                flag if flag.starts_with('-') => {}
                name if "hostile".contains(name) => {}
                _ => return None,
            }
        }
        Some(read)
    }
}

/// Number of inputs for a target, and how many of them were read.
#[derive(Default)]
struct Count {
    seen: usize,
    taken: usize,
    rounds: u64,
    time: Duration,
}

fn main() -> ExitCode {
    let Some(arguments) = Arguments::read() else {
        eprintln!("hostile: other tests were asked for; nothing was read");
        return ExitCode::SUCCESS;
    };
    // Runs with different seeds may go on at the same time.
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("hostile-{}", arguments.seed));
    let _ = std::fs::remove_dir_all(&root);
    std::fs::create_dir_all(&root).unwrap();
    // Relative paths in a changed recipe are resolved here.
    std::env::set_current_dir(&root).unwrap();
    let targets: Vec<Target> = targets::all(&root)
        .into_iter()
        .filter(|target| {
            arguments
                .only
                .as_ref()
                .is_none_or(|only| target.name.contains(only))
        })
        .collect();
    let message = std::panic::take_hook();
    // A panic is reported once its changes are minimised.
    std::panic::set_hook(Box::new(|_| {}));
    std::thread::spawn(watch);
    let begun = Instant::now();
    let mut counts: Vec<Count> = targets.iter().map(|_| Count::default()).collect();
    let mut told = begun;
    while begun.elapsed() < arguments.time {
        // What a night has seen is known even if a fault ends the process.
        if told.elapsed() >= BETWEEN {
            told = Instant::now();
            let seen: usize = counts.iter().map(|count| count.seen).sum();
            println!("{seen} inputs in {} s so far", begun.elapsed().as_secs());
        }
        // All targets get the same time.
        let next = (0..targets.len()).min_by_key(|&index| counts[index].time);
        let Some(next) = next else {
            eprintln!("hostile: there is no reader of that name");
            return ExitCode::FAILURE;
        };
        let (target, count) = (&targets[next], &mut counts[next]);
        let started = Instant::now();
        let round = count.rounds;
        if let Err(failure) = attack(target, arguments.seed, round, count) {
            std::panic::set_hook(message);
            report(&targets, &counts, begun, "one fault");
            eprintln!(
                "hostile: {}, round {round} of seed {}: {failure}",
                target.name, arguments.seed
            );
            return ExitCode::FAILURE;
        }
        count.rounds += 1;
        count.time += started.elapsed();
    }
    report(&targets, &counts, begun, "no fault");
    let _ = std::fs::remove_dir_all(&root);
    ExitCode::SUCCESS
}

/// Counts per target and in total.
fn report(targets: &[Target], counts: &[Count], begun: Instant, found: &str) {
    for (target, count) in targets.iter().zip(counts) {
        println!(
            "{:<24} {:>9} inputs, {:>9} read",
            target.name, count.seen, count.taken
        );
    }
    let all: usize = counts.iter().map(|count| count.seen).sum();
    let seconds = begun.elapsed().as_secs_f64();
    println!("{:<24} {all:>9} inputs in {seconds:.0} s, {found}", "all");
}

/// Runs a series of inputs; returns the failure with the fewest changes.
fn attack(target: &Target, seed: u64, round: u64, count: &mut Count) -> Result<(), String> {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&round.to_le_bytes());
    bytes[16..24].copy_from_slice(&(crc32fast::hash(target.name.as_bytes()) as u64).to_le_bytes());
    let config = Config {
        cases: IN_A_ROW,
        failure_persistence: None,
        max_shrink_iters: 500,
        ..Config::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let counted = RefCell::new(count);
    let cases = (
        any::<u32>(),
        any::<bool>(),
        proptest::collection::vec(change(), 1..4),
    );
    let result = runner.run(&cases, |(file, inside, changes)| {
        let taken = one(target, file, inside, &changes).map_err(TestCaseError::fail)?;
        let mut count = counted.borrow_mut();
        count.seen += 1;
        count.taken += usize::from(taken);
        Ok(())
    });
    match result {
        Ok(()) => Ok(()),
        Err(TestError::Fail(reason, (file, inside, changes))) => {
            let name = &target.file(file).name;
            Err(format!(
                "{reason}\n  {name}, inside: {inside}, {changes:#?}"
            ))
        }
        Err(other) => Err(other.to_string()),
    }
}

/// Runs one input; returns whether it was read.
fn one(target: &Target, file: u32, inside: bool, changes: &[Change]) -> Result<bool, String> {
    let file = target.file(file);
    let changed = file.form.changed(&file.bytes, inside, changes);
    let path = target.folder.join(&file.name);
    std::fs::write(&path, &changed).unwrap();
    let there = content(&target.folder);
    let held = HELD.load(Ordering::Relaxed);
    MOST.store(held, Ordering::Relaxed);
    *UNDER_WAY.lock().unwrap() = Some((Instant::now(), path.clone(), held));
    let read = std::panic::catch_unwind(|| target.read(file));
    *UNDER_WAY.lock().unwrap() = None;
    let most = MOST.load(Ordering::Relaxed).saturating_sub(held);
    let left = content(&target.folder);
    std::fs::write(&path, &file.bytes).unwrap();
    let read = read.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        format!("it panics: {}", text.unwrap_or_default())
    })?;
    if most > ROOM + changed.len() {
        return Err(format!(
            "it holds {} MiB of a file of {} bytes",
            most >> 20,
            changed.len()
        ));
    }
    if left != there && !target.writes {
        return Err(format!("it changes the folder: {left:?}, not {there:?}"));
    }
    match read {
        Seen::Refused(words) if words.is_empty() => Err("it is refused without a word".to_owned()),
        Seen::Refused(_) => Ok(false),
        Seen::Wrong(why) => Err(why),
        Seen::Values(values) => match target.sealed && !inside && values != target.values {
            true => Err("its damage is not noticed: other values are read".to_owned()),
            false => Ok(true),
        },
    }
}

/// The files of a folder, at any depth, with their checksums.
fn content(folder: &Path) -> Vec<(PathBuf, u32)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        let checksum = match path.is_dir() {
            true => {
                found.extend(content(&path));
                0
            }
            false => crc32fast::hash(&std::fs::read(&path).unwrap()),
        };
        found.push((path, checksum));
    }
    found.sort();
    found
}
