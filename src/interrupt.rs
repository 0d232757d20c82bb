//! A person's wish to stop: Ctrl-C and SIGTERM.

use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Makes Ctrl-C and SIGTERM request a stop; the step under way finishes and is saved. A second one ends the program
/// at once.
///
/// # Errors
/// When the system refuses the handler.
pub fn listen() -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        eprintln!("stopping after this step; once more to stop at once");
    })
}

/// Whether a stop was requested.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}
