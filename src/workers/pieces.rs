//! Pieces of work of which one worker alone does each.

use bytemuck::Pod;

use super::Workers;

/// An error that ends a shared work for all workers.
pub trait EndsAll: Sized {
    /// What the others are told; None of a request to stop.
    fn told(&self) -> Option<String>;

    /// The error of those who are told that of another.
    fn heard(told: Option<String>) -> Self;
}

/// Shares out so many pieces of work: of `n` workers, worker `i` does every `n`-th from the `i`-th
/// on. What a piece came to is given to `take` on every worker, in the order of the pieces, so that
/// a sum over them does not depend on how many workers there are.
///
/// # Errors
/// Those of `work` and `take`, whichever worker met them: all of them end with an error after the
/// same pieces, and can go on with something else together.
pub fn share_out<T: Pod, E: EndsAll>(
    workers: &dyn Workers,
    pieces: usize,
    mut work: impl FnMut(usize) -> Result<Vec<T>, E>,
    mut take: impl FnMut(usize, Vec<T>) -> Result<(), E>,
) -> Result<(), E> {
    if workers.size() == 1 {
        return (0..pieces).try_for_each(|piece| take(piece, work(piece)?));
    }
    let mut taken = Ok(());
    for first in (0..pieces).step_by(workers.size()) {
        let own = first + workers.rank();
        // What went wrong in the last round is told in this one.
        let values = std::mem::replace(&mut taken, Ok(())).and_then(|()| match own < pieces {
            true => work(own),
            false => Ok(Vec::new()),
        });
        let all = all_of(workers, values)?;
        for (piece, bytes) in (first..pieces).zip(all) {
            if taken.is_ok() {
                taken = take(piece, values_of(&bytes));
            }
        }
    }
    all_of(workers, taken.map(|()| Vec::<u8>::new())).map(drop)
}

/// What precedes values.
const VALUES: u8 = 0;
/// What precedes a message.
const FAILED: u8 = 1;
/// What is sent by who was asked to stop.
const STOPPED: u8 = 2;

/// The bytes of everyone's values, or the first one's error among those who have one.
fn all_of<T: Pod, E: EndsAll>(
    workers: &dyn Workers,
    own: Result<Vec<T>, E>,
) -> Result<Vec<Vec<u8>>, E> {
    let said = match &own {
        Ok(values) => [&[VALUES], bytemuck::cast_slice(values)].concat(),
        Err(error) => match error.told() {
            Some(told) => [&[FAILED], told.as_bytes()].concat(),
            None => vec![STOPPED],
        },
    };
    let all = workers.all_gather(&said);
    own?;
    let mut heard = Vec::with_capacity(all.len());
    for (rank, mut bytes) in all.into_iter().enumerate() {
        let first = (!bytes.is_empty()).then(|| bytes.remove(0));
        match first {
            Some(STOPPED) => return Err(E::heard(None)),
            Some(FAILED) => {
                let told = String::from_utf8_lossy(&bytes);
                return Err(E::heard(Some(format!("worker {rank}: {told}"))));
            }
            _ => heard.push(bytes),
        }
    }
    Ok(heard)
}

/// The values that bytes are, in this machine's order.
pub(crate) fn values_of<T: Pod>(bytes: &[u8]) -> Vec<T> {
    bytes
        .chunks_exact(size_of::<T>())
        .map(bytemuck::pod_read_unaligned)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::workers::fake;

    #[derive(Debug, PartialEq, Eq)]
    enum Ended {
        Stopped,
        Failed(String),
    }

    impl EndsAll for Ended {
        fn told(&self) -> Option<String> {
            match self {
                Self::Stopped => None,
                Self::Failed(why) => Some(why.clone()),
            }
        }

        fn heard(told: Option<String>) -> Self {
            told.map_or(Self::Stopped, Self::Failed)
        }
    }

    #[test]
    fn all_end_after_the_same_pieces_whoever_fails() {
        // Of 7 pieces of three workers: which piece fails where, and what each has taken then.
        let broken = || Ended::Failed("broken".into());
        for (piece, stops, rounds) in [(4, true, 1), (2, false, 0), (6, false, 2)] {
            let found = fake::group(3, |workers| {
                let mut taken = 0;
                let work = |own| match (own == piece, stops) {
                    (false, _) => Ok(vec![own as u8]),
                    (true, true) => Err(Ended::Stopped),
                    (true, false) => Err(broken()),
                };
                let take = |_, _| {
                    taken += 1;
                    Ok(())
                };
                let ended = share_out(workers, 7, work, take).unwrap_err();
                // They can speak to one another as before.
                assert_eq!(workers.broadcast(vec![9]), [9]);
                (ended, taken)
            });
            for (rank, (ended, taken)) in found.into_iter().enumerate() {
                let expected = match (stops, rank == piece % 3) {
                    (true, _) => Ended::Stopped,
                    (false, true) => Ended::Failed("broken".into()),
                    (false, false) => Ended::Failed(format!("worker {}: broken", piece % 3)),
                };
                assert_eq!((ended, taken), (expected, 3 * rounds), "{piece} {rank}");
            }
        }
        // What one alone can't take, such as who writes to a full disk.
        for full in [1, 6] {
            let found = fake::group(3, |workers| {
                let take = |piece, _| match workers.leads() && piece == full {
                    true => Err(broken()),
                    false => Ok(()),
                };
                share_out(workers, 7, |own| Ok(vec![own as u8]), take)
            });
            let of_first = |told: &str| Err(Ended::Failed(told.to_owned()));
            assert_eq!(found[0], of_first("broken"));
            assert_eq!(found[2], of_first("worker 0: broken"));
        }
    }

    #[test]
    fn each_piece_is_done_once_and_known_to_all() {
        for (size, pieces) in [(1, 3), (3, 0), (3, 2), (3, 7), (2, 4)] {
            let done = AtomicUsize::new(0);
            let found = fake::group(size, |workers| {
                let mut taken = Vec::new();
                let work = |piece| {
                    assert_eq!(piece % size, workers.rank());
                    done.fetch_add(1, Ordering::Relaxed);
                    // Of unlike lengths.
                    Ok::<_, Ended>(vec![piece as f64 / 3.0; piece])
                };
                let take = |piece, values| {
                    taken.push((piece, values));
                    Ok(())
                };
                share_out(workers, pieces, work, take).unwrap();
                taken
            });
            let expected: Vec<_> = (0..pieces).map(|i| (i, vec![i as f64 / 3.0; i])).collect();
            assert!(
                found.iter().all(|taken| *taken == expected),
                "{size}, {pieces}"
            );
            assert_eq!(done.into_inner(), pieces);
        }
    }
}
