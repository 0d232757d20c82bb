//! The processes that work on one recipe: one alone, or several that an MPI launcher started.
//!
//! All of them run the same program on the same recipe. What they share out is the groups of a
//! training step ([`Share`]), whose gradients are summed in one fixed tree ([`Tree`]), and the
//! pieces of what is measured and drawn ([`share_out`]); so the result is the same to the last bit
//! however many there are. The first one alone writes the run's directory; the others work in a
//! folder of their own that is removed at the end.

mod alone;
mod devices;
#[cfg(test)]
pub(crate) mod fake;
mod launch;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(all(feature = "cuda", feature = "mpi"))]
mod nccl;
mod pieces;
mod slices;
mod tree;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

pub use alone::Alone;
#[cfg(test)]
pub(crate) use devices::tests::ThroughHost;
pub use devices::{Devices, devices, sum_on_devices};
#[cfg(any(feature = "cli", feature = "tui", feature = "mpi"))]
pub(crate) use launch::end;
pub use launch::{device, start};
pub(crate) use pieces::values_of;
pub use pieces::{EndsAll, share_out};
pub use slices::Slices;
pub use tree::{Tree, sum};

/// Numbers that are exchanged at once: 32 MiB of them.
pub(crate) const BUCKET: usize = 8 << 20;

/// A group of processes. Every call but [`at`](Self::at) and [`abort`](Self::abort) is made by all
/// of them, in the same order.
pub trait Workers: Debug + Send + Sync {
    /// The number of this one, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// The first one's bytes; those that the others give are ignored.
    fn broadcast(&self, bytes: Vec<u8>) -> Vec<u8>;

    /// Everyone's bytes, in the order of their numbers.
    fn all_gather(&self, bytes: &[u8]) -> Vec<Vec<u8>>;

    /// Sends part `i` of as many equal parts as there are workers to worker `i`. Returns what all
    /// sent to this one, in the order of their numbers.
    fn exchange(&self, parts: &[f32]) -> Vec<f32>;

    /// Everyone's values, equally many of each, in the order of their numbers: into `all`, which is
    /// as long as they are together.
    fn collect(&self, part: &[f32], all: &mut [f32]);

    /// Says what this one works on from here: a stage, and which step of it. For those who want to
    /// know why it waits.
    fn at(&self, _place: String) {}

    /// Ends all of them with this exit status, whatever they do.
    fn abort(&self, status: i32) -> !;

    /// Whether the cards that the workers train on speak to each other by NCCL.
    fn have_nccl(&self) -> bool {
        false
    }

    /// Whether this one writes and speaks.
    fn leads(&self) -> bool {
        self.rank() == 0
    }
}

/// A group of processes, shared by those who ask it.
pub type Group = Arc<dyn Workers>;

/// A group of this process alone.
pub fn alone() -> Group {
    Arc::new(Alone)
}

/// Whether all workers give the same bytes for `what`.
///
/// # Errors
/// Names those that differ from the first, and of text the first difference.
pub fn agree(workers: &dyn Workers, what: &str, bytes: &[u8]) -> Result<(), String> {
    if workers.size() == 1 {
        return Ok(());
    }
    let all = workers.all_gather(bytes);
    let others: Vec<usize> = (1..all.len()).filter(|&rank| all[rank] != all[0]).collect();
    let Some(&other) = others.first() else {
        return Ok(());
    };
    let named: Vec<String> = others.iter().map(usize::to_string).collect();
    let differs = match others.len() {
        1 => "differs",
        _ => "differ",
    };
    let said = difference(&all[0], &all[other]).map_or_else(String::new, |[first, there]| {
        format!(": worker 0 has `{first}`, worker {other} `{there}`")
    });
    Err(format!(
        "the workers don't agree on {what}: {} {differs} from worker 0{said}",
        named.join(", ")
    ))
}

/// Longest part of a text that a message shows, in bytes.
const SHOWN: usize = 100;

/// Where two texts first differ: the lines, or what stands between two commas or braces if a line
/// is too long to show. None of bytes that are no text, or of parts that are too long too.
fn difference(one: &[u8], other: &[u8]) -> Option<[String; 2]> {
    let texts = [
        std::str::from_utf8(one).ok()?,
        std::str::from_utf8(other).ok()?,
    ];
    // Bytes that no one could read may be text by chance.
    let unreadable = |c: char| c.is_control() && !c.is_whitespace();
    if texts.iter().any(|text| text.contains(unreadable)) {
        return None;
    }
    let pairs = texts[0].chars().zip(texts[1].chars());
    let same: String = pairs.take_while(|(a, b)| a == b).map(|(a, _)| a).collect();
    let parts = |ends: fn(char) -> bool| {
        let begin = same.rfind(ends).map_or(0, |at| at + 1);
        let part = |text: &str| {
            let end = text[same.len()..].find(ends);
            let end = end.map_or(text.len(), |at| same.len() + at);
            text[begin..end].trim().to_owned()
        };
        let parts = texts.map(part);
        // Of a text that goes on where the other ends there is no part to show.
        let shown = parts[0] != parts[1] && parts.iter().all(|part| part.len() <= SHOWN);
        shown.then_some(parts)
    };
    parts(|c| c == '\n').or_else(|| parts(|c| matches!(c, '\n' | ',' | '{' | '}')))
}

/// A share of the work, one of several of equal size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Index of the share, from 0.
    pub index: usize,
    /// Number of shares.
    pub of: usize,
}

impl Share {
    /// All of the work.
    pub const WHOLE: Self = Self { index: 0, of: 1 };

    /// A worker's.
    pub fn worker(workers: &dyn Workers) -> Self {
        Self {
            index: workers.rank(),
            of: workers.size(),
        }
    }

    /// Which of `count` things are this share's, consecutive ones; `count` is a multiple of the
    /// number of shares.
    pub fn range(self, count: usize) -> Range<usize> {
        let each = count / self.of;
        self.index * each..(self.index + 1) * each
    }
}

/// Whether so many workers can share out the groups of a step: each of several needs as many as the
/// others, and a power of two of them, which is a whole branch of the tree that sums them.
///
/// # Errors
/// Names the numbers that fit.
pub fn fits(size: usize, groups: usize) -> Result<(), String> {
    let branches = |size: usize| groups.is_multiple_of(size) && (groups / size).is_power_of_two();
    let fit = |size: usize| size == 1 || branches(size);
    if fit(size) {
        return Ok(());
    }
    let fitting: Vec<String> = (1..=groups)
        .filter(|&size| fit(size))
        .map(|size| size.to_string())
        .collect();
    Err(match fitting[..] {
        [_] if groups == 1 => format!(
            "{size} workers can't share out a step that is not divided; say `accumulate = {size}`, or a multiple"
        ),
        _ => format!(
            "{size} workers can't share out a step of {groups} groups (`accumulate`); {} can",
            fitting.join(", ")
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_branches_of_the_tree_are_shared_out() {
        for (groups, fitting) in [
            (1, vec![1]),
            (2, vec![1, 2]),
            (6, vec![1, 3, 6]),
            (8, vec![1, 2, 4, 8]),
            (12, vec![1, 3, 6, 12]),
        ] {
            let fit: Vec<usize> = (1..=16)
                .filter(|&size| fits(size, groups).is_ok())
                .collect();
            assert_eq!(fit, fitting, "{groups}");
        }
        assert!(fits(4, 1).unwrap_err().contains("`accumulate = 4`"));
        let told = fits(5, 8).unwrap_err();
        assert!(
            told.contains("5 workers") && told.contains("1, 2, 4, 8 can"),
            "{told}"
        );
    }

    #[test]
    fn a_difference_is_a_line_or_an_item() {
        let long = |item: &str| format!("Job {{ a: 1, {item}, c: {} }}", "c".repeat(SHOWN));
        for (one, other, expected) in [
            ("a = 1\nb = 2", "a = 1\nb = 3", ["b = 2", "b = 3"]),
            (
                "a\nkept = [0, 1]\n",
                "a\nkept = [0, 2]\n",
                ["kept = [0, 1]", "kept = [0, 2]"],
            ),
            (&long("b: é"), &long("b: è"), ["b: é", "b: è"]),
            ("", "x", ["", "x"]),
        ] {
            let found = difference(one.as_bytes(), other.as_bytes());
            assert_eq!(found.unwrap(), expected.map(str::to_owned), "{one} {other}");
        }
        assert_eq!(difference(&[0xff], b"a"), None);
        assert_eq!(difference(b"a = 1", b"a = 1\nb = 3"), None);
        assert_eq!(difference("a".repeat(200).as_bytes(), b"b"), None);
    }

    #[test]
    fn who_differs_is_named() {
        let found = fake::group(3, |workers| {
            let last = workers.rank() == 2;
            let steps = format!("batch = 4\nsteps = 1{}\n", u8::from(last));
            (
                agree(workers, "it", b"x"),
                agree(workers, "the sum", &[u8::from(last)]),
                agree(workers, "the recipe", steps.as_bytes()),
            )
        });
        for (same, bytes, text) in found {
            same.unwrap();
            assert_eq!(
                bytes.unwrap_err(),
                "the workers don't agree on the sum: 2 differs from worker 0"
            );
            assert_eq!(
                text.unwrap_err(),
                "the workers don't agree on the recipe: 2 differs from worker 0: worker 0 has `steps = 10`, worker 2 `steps = 11`"
            );
        }
    }
}
