//! Lines for a person. A reader that has gone away (`| head`) is no reason to fail, let alone to end a training.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// Writes a line to standard error.
#[macro_export]
macro_rules! say {
    ($($part:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($part)*);
    }};
}

/// Whether something that was asked for could not be written to standard output.
static LOST: AtomicBool = AtomicBool::new(false);

/// Notes what became of a line of standard output; that nobody reads on is no failure.
pub fn told(written: io::Result<()>) {
    if written.is_err_and(|error| error.kind() != io::ErrorKind::BrokenPipe) {
        LOST.store(true, Ordering::Relaxed);
    }
}

/// Whether all of standard output has been written, a full disk say; asked at the end.
pub fn all_told() -> bool {
    told(io::stdout().flush());
    !LOST.load(Ordering::Relaxed)
}

/// Writes a line to standard output.
#[macro_export]
macro_rules! tell {
    ($($part:tt)*) => {{
        use std::io::Write as _;
        $crate::terminal::told(writeln!(std::io::stdout(), $($part)*));
    }};
}
