//! The processes that work on one recipe: one alone, or several that an MPI launcher started.
//!
//! All of them run the same program on the same recipe. What they share out is the groups of a
//! training step ([`Share`]), whose gradients are summed in one fixed tree ([`Tree`]), and the
//! pieces of what is measured and drawn ([`share_out`]); so the result is the same to the last bit
//! however many there are. The first one alone writes the run's directory; the others work in a
//! folder of their own that is removed at the end.

mod alone;
#[cfg(test)]
pub(crate) mod fake;
mod launch;
#[cfg(feature = "mpi")]
mod mpi;
mod pieces;
mod tree;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

pub use alone::Alone;
#[cfg(any(feature = "cli", feature = "tui", feature = "mpi"))]
pub(crate) use launch::end;
pub use launch::{device, start};
pub use pieces::share_out;
pub(crate) use pieces::values_of;
pub use tree::{Tree, sum};

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

    /// Everyone's values, equally many of each, in the order of their numbers.
    fn collect(&self, part: &[f32]) -> Vec<f32>;

    /// Says what this one works on from here: a stage, and which step of it. For those who want to
    /// know why it waits.
    fn at(&self, _place: String) {}

    /// Ends all of them with this exit status, whatever they do.
    fn abort(&self, status: i32) -> !;

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
/// Names those that differ from the first.
pub fn agree(workers: &dyn Workers, what: &str, bytes: &[u8]) -> Result<(), String> {
    if workers.size() == 1 {
        return Ok(());
    }
    let all = workers.all_gather(bytes);
    let others: Vec<String> = (1..all.len())
        .filter(|&rank| all[rank] != all[0])
        .map(|rank| rank.to_string())
        .collect();
    match others.is_empty() {
        true => Ok(()),
        false => Err(format!(
            "the workers don't agree on {what}: {} {} from worker 0",
            others.join(", "),
            match others.len() {
                1 => "differs",
                _ => "differ",
            }
        )),
    }
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

/// Whether so many workers can share out the groups of a step: each needs as many as the others,
/// and a power of two of them, which is a whole branch of the tree that sums them.
///
/// # Errors
/// Names the numbers that fit.
pub fn fits(size: usize, groups: usize) -> Result<(), String> {
    let fit = |size: usize| groups.is_multiple_of(size) && (groups / size).is_power_of_two();
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
            (6, vec![3, 6]),
            (8, vec![1, 2, 4, 8]),
            (12, vec![3, 6, 12]),
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
    fn who_differs_is_named() {
        let found = fake::group(3, |workers| {
            let own = [u8::from(workers.rank() == 2)];
            (
                agree(workers, "it", b"x"),
                agree(workers, "the recipe", &own),
            )
        });
        for (same, other) in found {
            same.unwrap();
            assert_eq!(
                other.unwrap_err(),
                "the workers don't agree on the recipe: 2 differs from worker 0"
            );
        }
    }
}
