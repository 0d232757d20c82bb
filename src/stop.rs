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
/// // A person's first request is not a second one, whoever made one before.
/// assert!(!stop.insist());
/// assert!(stop.insist());
/// ```
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<Asked>);

/// Who has asked for it.
#[derive(Debug, Default)]
struct Asked {
    anyone: AtomicBool,
    /// A person, who may ask twice.
    person: AtomicBool,
}

impl Stop {
    /// Requests a stop; returns whether one was requested before.
    pub fn request(&self) -> bool {
        self.0.anyone.swap(true, Ordering::SeqCst)
    }

    /// A person's request; returns whether a person has requested it before. A time limit and a
    /// queue's warning are no such request.
    pub fn insist(&self) -> bool {
        self.request();
        self.0.person.swap(true, Ordering::SeqCst)
    }

    /// Whether a stop was requested.
    pub fn requested(&self) -> bool {
        self.0.anyone.load(Ordering::SeqCst)
    }
}

/// Ends the program, and all that work on the same job, without waiting for the current step.
#[cfg(any(feature = "cli", feature = "tui"))]
pub(crate) fn leave() -> ! {
    crate::workers::end(130)
}
