//! The request to stop, which long work looks at between its steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A request to stop, shared by all its clones: those that work look at it, and any thread may make
/// it.
///
/// ```
/// use tinyfusion::stop::Stop;
///
/// let stop = Stop::default();
/// let of_the_worker = stop.clone();
/// stop.request();
/// assert!(of_the_worker.requested());
/// ```
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Requests a stop; returns whether one was requested before.
    pub fn request(&self) -> bool {
        self.0.swap(true, Ordering::SeqCst)
    }

    /// Whether a stop was requested.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Ends the program, and all that work on the same job, without waiting for the current step.
#[cfg(any(feature = "cli", feature = "tui"))]
pub(crate) fn leave() -> ! {
    crate::workers::end(130)
}
