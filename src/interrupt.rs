//! Reasons to stop: a request (Ctrl-C, SIGTERM), or a thread that panicked.

use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Makes Ctrl-C and SIGTERM request a stop; the current step is finished and saved. A second signal
/// ends the program at once.
///
/// # Errors
/// When the system refuses the handler.
#[cfg(feature = "cli")]
pub fn listen() -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(|| {
        if request() {
            leave();
        }
        crate::say!("stopping after this step; once more to stop at once");
    })
}

/// Requests a stop; returns whether one was requested before.
pub fn request() -> bool {
    REQUESTED.swap(true, Ordering::SeqCst)
}

/// Ends the program without waiting for the current step.
#[allow(clippy::exit)]
pub fn leave() -> ! {
    std::process::exit(130)
}

static PANICKED: AtomicBool = AtomicBool::new(false);

/// Records any thread's panic: a device's own thread only logs it, and later results are worthless.
pub fn watch_panics() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICKED.store(true, Ordering::SeqCst);
        report(panic);
    }));
}

/// Whether a thread has panicked.
pub fn panicked() -> bool {
    PANICKED.load(Ordering::SeqCst)
}

/// Whether a stop was requested.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}
