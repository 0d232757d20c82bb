//! Work over all cores.
//!
//! A team of our own instead of rayon's pool: an operator at the digit model's size takes a tenth
//! of a millisecond, and waking a sleeping pool thread takes a good part of that. These threads
//! spin briefly after each piece of work, long enough for the next operator to arrive, and sleep
//! when a step is over. Their number is rayon's number of threads, so that one setting serves both.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// Work of fewer basic operations than this is not worth another thread.
const LEAST: usize = 1 << 16;

/// Most parts per thread: more than one, so that a delayed thread holds up little.
pub(super) const PARTS: usize = 4;

/// How long a helper spins before it sleeps: longer than the gaps between the operators of a step.
const PATIENCE: Duration = Duration::from_micros(200);

/// Number of threads, including the caller.
pub(super) fn count() -> usize {
    team().helpers + 1
}

/// Runs `work` over parts of `0..count`, on all threads. All parts but the last are multiples of
/// `unit`. `cost` is the total number of basic operations (a multiplication, an addition, a value
/// moved).
pub(super) fn over(count: usize, unit: usize, cost: usize, work: impl Fn(Range<usize>) + Sync) {
    let team = team();
    let threads = team.helpers + 1;
    let units = count.div_ceil(unit);
    let parts = (cost / LEAST).min(PARTS * threads).min(units).max(1);
    if parts == 1 || threads == 1 {
        if count > 0 {
            work(0..count);
        }
        return;
    }
    let next = AtomicUsize::new(0);
    team.run(&|| {
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                break;
            }
            let bound = |part: usize| (part * units / parts * unit).min(count);
            work(bound(part)..bound(part + 1));
        }
    });
}

/// Threads that work together on one piece of work at a time.
struct Team {
    helpers: usize,
    /// Number of the piece (from bit 17), whether it may be entered ([`OPEN`]), and the helpers in
    /// it.
    state: AtomicU64,
    /// The piece: valid while it is open or a helper is in it.
    work: UnsafeCell<Option<Work>>,
    /// Held by the thread that submitted the piece.
    owner: Mutex<()>,
    panicked: AtomicBool,
    asleep: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

type Work = *const (dyn Fn() + Sync);

// SAFETY: only the owner writes `work`, before it opens the piece; helpers read it inside the
// piece.
unsafe impl Sync for Team {}

const OPEN: u64 = 1 << 16;
const PIECE: u64 = 1 << 17;

fn team() -> &'static Team {
    static TEAM: OnceLock<&Team> = OnceLock::new();
    TEAM.get_or_init(|| Team::of(rayon::current_num_threads()))
}

impl Team {
    /// A team of `threads` threads, including the caller, that lives as long as the process.
    fn of(threads: usize) -> &'static Self {
        let team: &Self = Box::leak(Box::new(Self {
            helpers: threads - 1,
            state: AtomicU64::new(0),
            work: UnsafeCell::new(None),
            owner: Mutex::new(()),
            panicked: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        }));
        for index in 1..threads {
            // If a thread can't be started, the others do its share.
            let _ = std::thread::Builder::new()
                .name(format!("kernels-{index}"))
                .spawn(|| team.help());
        }
        team
    }

    /// Calls `work` on this thread, and on every helper that enters before this thread is done;
    /// `work` must divide itself. If the team is busy for another thread, or this call comes from
    /// inside a piece, this thread does all of it.
    fn run(&self, work: &(dyn Fn() + Sync)) {
        let _owner = match self.owner.try_lock() {
            Ok(owner) => owner,
            // The last owner panicked. The lock protects no data, so nothing is left half done.
            Err(TryLockError::Poisoned(owner)) => owner.into_inner(),
            Err(TryLockError::WouldBlock) => return work(),
        };
        self.panicked.store(false, Ordering::Relaxed);
        // SAFETY: the piece is closed below, and all helpers have left it, before the reference
        // ends. Nobody reads it before it is opened, because all helpers have left the last piece.
        unsafe {
            let work = std::mem::transmute::<&(dyn Fn() + Sync), Work>(work);
            *self.work.get() = Some(work);
        }
        let last = self.state.load(Ordering::Relaxed) / PIECE;
        self.state
            .store(((last + 1) * PIECE) | OPEN, Ordering::SeqCst);
        // A helper counts itself asleep before it checks the state a last time: it sees the piece,
        // or is seen here.
        if self.asleep.load(Ordering::SeqCst) > 0 {
            let _lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake.notify_all();
        }
        // Closes the piece even if `work` panics.
        struct Close<'a>(&'a Team);
        impl Drop for Close<'_> {
            fn drop(&mut self) {
                self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
                let since = Instant::now();
                while self.0.state.load(Ordering::Acquire) & (OPEN - 1) != 0 {
                    if since.elapsed() < PATIENCE {
                        std::hint::spin_loop();
                    } else {
                        std::thread::yield_now();
                    }
                }
            }
        }
        let close = Close(self);
        work();
        drop(close);
        assert!(
            !self.panicked.load(Ordering::Relaxed),
            "a kernel panicked on another thread"
        );
    }

    /// Loop of a helper thread: waits for work and does it.
    fn help(&self) {
        let mut done = 0;
        loop {
            done = self.enter(done);
            // SAFETY: this thread is in the piece, so its owner waits.
            let work = unsafe { *self.work.get() };
            let calls = || {
                if let Some(work) = work {
                    // SAFETY: as above.
                    unsafe { (*work)() };
                }
            };
            if catch_unwind(AssertUnwindSafe(calls)).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for a piece other than `done`, enters it, and returns its number.
    fn enter(&self, done: u64) -> u64 {
        let mut since = Instant::now();
        loop {
            let state = self.state.load(Ordering::Acquire);
            if is_new(state, done) {
                let entered = self.state.compare_exchange_weak(
                    state,
                    state + 1,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if entered.is_ok() {
                    return state / PIECE;
                }
            } else if since.elapsed() < PATIENCE {
                std::hint::spin_loop();
            } else {
                self.asleep.fetch_add(1, Ordering::SeqCst);
                let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
                while !is_new(self.state.load(Ordering::SeqCst), done) {
                    lock = self.wake.wait(lock).unwrap_or_else(PoisonError::into_inner);
                }
                drop(lock);
                self.asleep.fetch_sub(1, Ordering::SeqCst);
                since = Instant::now();
            }
        }
    }
}

/// Whether an open piece other than `done` can be entered.
fn is_new(state: u64, done: u64) -> bool {
    state & OPEN != 0 && state / PIECE != done
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls `work` for every index of `0..count`, on a team.
    fn each(team: &Team, count: usize, work: impl Fn(usize) + Sync) {
        let next = AtomicUsize::new(0);
        team.run(&|| {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    break;
                }
                work(index);
            }
        });
    }

    #[test]
    fn every_index_is_visited_once_whoever_comes_and_however_it_nests() {
        let team = Team::of(4);
        // Some rounds are further apart than `PATIENCE`, so helpers both spin and sleep.
        std::thread::scope(|scope| {
            for caller in 0..3 {
                scope.spawn(move || {
                    for round in 0..200 {
                        let visits: Vec<_> = (0..37).map(|_| AtomicUsize::new(0)).collect();
                        each(team, visits.len(), |index| {
                            each(team, 2, |_| {
                                visits[index].fetch_add(1, Ordering::Relaxed);
                            });
                        });
                        let all = visits
                            .iter()
                            .all(|visits| visits.load(Ordering::Relaxed) == 2);
                        assert!(all, "round {round}");
                        if round % 50 == caller {
                            std::thread::sleep(3 * PATIENCE);
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_lives_on() {
        let team = Team::of(3);
        for round in 0..50 {
            let met = catch_unwind(AssertUnwindSafe(|| {
                each(team, 8, |index| assert!(index != round % 8, "wanted"));
            }));
            assert!(met.is_err());
            let sum = AtomicUsize::new(0);
            each(team, 8, |index| {
                sum.fetch_add(index, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 28);
        }
    }
}
