//! Panics of other threads.

use std::sync::atomic::{AtomicBool, Ordering};

static PANICKED: AtomicBool = AtomicBool::new(false);

/// Records any thread's panic from now on, in the whole process: a device's own thread only logs
/// it, and what a training computes afterwards is worthless. With this, the training ends with
/// [`TrainingError::Device`](super::TrainingError::Device).
pub fn watch_panics() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICKED.store(true, Ordering::SeqCst);
        report(panic);
    }));
}

/// Whether a thread has panicked.
pub(super) fn panicked() -> bool {
    PANICKED.load(Ordering::SeqCst)
}
