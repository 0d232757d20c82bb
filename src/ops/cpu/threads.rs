//! Work over all cores.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Work below this many basic operations is not worth waking another thread for.
const LEAST: usize = 1 << 17;

/// Most parts for each thread: more than one, so that a thread that was disturbed holds up little.
pub(super) const PARTS: usize = 4;

/// Runs `work` over parts of `0..count` that are multiples of `unit` (but for the last), on all threads of rayon's
/// pool. `cost` is the number of basic operations (a multiplication, an addition, a value moved) of all together.
///
/// The calling thread takes part from the start: it does not wait for the pool to wake.
pub(super) fn over(count: usize, unit: usize, cost: usize, work: impl Fn(Range<usize>) + Sync) {
    let threads = rayon::current_num_threads();
    let units = count.div_ceil(unit);
    let parts = (cost / LEAST).min(PARTS * threads).min(units).max(1);
    if parts == 1 || threads == 1 {
        if count > 0 {
            work(0..count);
        }
        return;
    }
    let next = AtomicUsize::new(0);
    let run = || {
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                break;
            }
            let bound = |part: usize| (part * units / parts * unit).min(count);
            work(bound(part)..bound(part + 1));
        }
    };
    rayon::in_place_scope(|scope| {
        for _ in 1..threads.min(parts) {
            scope.spawn(|_| run());
        }
        run();
    });
}
