//! Pieces of work of which one worker alone does each.

use bytemuck::Pod;

use super::Workers;

/// Shares out so many pieces of work: of `n` workers, worker `i` does every `n`-th from the `i`-th
/// on. What a piece came to is given to `take` on every worker, in the order of the pieces, so that
/// a sum over them does not depend on how many workers there are.
///
/// # Errors
/// Those of `work` and `take`. The other workers still wait for this one then: whoever gets an
/// error ends them all ([`Workers::abort`]).
pub fn share_out<T: Pod, E>(
    workers: &dyn Workers,
    pieces: usize,
    mut work: impl FnMut(usize) -> Result<Vec<T>, E>,
    mut take: impl FnMut(usize, Vec<T>) -> Result<(), E>,
) -> Result<(), E> {
    for first in (0..pieces).step_by(workers.size()) {
        let own = first + workers.rank();
        let values = match own < pieces {
            true => work(own)?,
            false => Vec::new(),
        };
        if workers.size() == 1 {
            take(own, values)?;
            continue;
        }
        let all = workers.all_gather(bytemuck::cast_slice(&values));
        for (piece, bytes) in (first..pieces).zip(all) {
            take(piece, values_of(&bytes))?;
        }
    }
    Ok(())
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
                    Ok::<_, ()>(vec![piece as f64 / 3.0; piece])
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
