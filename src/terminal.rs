//! Lines for the user. A closed reader (`| head`) is no error, and must not end a training.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether this process says nothing: of several workers one speaks.
static SILENT: AtomicBool = AtomicBool::new(false);

/// Whether lines are written.
pub fn speaks() -> bool {
    !SILENT.load(Ordering::Relaxed)
}

/// Writes lines, or swallows them, from now on.
pub fn speak(speaks: bool) {
    SILENT.store(!speaks, Ordering::Relaxed);
}

/// Whether progress is told in lines, on a terminal too.
static PLAIN: AtomicBool = AtomicBool::new(false);

/// Whether progress is drawn as a bar, where there is a terminal.
pub fn draws() -> bool {
    speaks() && !PLAIN.load(Ordering::Relaxed)
}

/// Tells progress in lines from now on.
pub fn draw_nothing() {
    PLAIN.store(true, Ordering::Relaxed);
}

/// Writes a line to standard error.
#[macro_export]
macro_rules! say {
    ($($part:tt)*) => {{
        use std::io::Write as _;
        if $crate::terminal::speaks() {
            let text = $crate::terminal::harmless(format!($($part)*));
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }};
}

/// Escapes control characters except line ends and tabs: names and notes come from files that may
/// contain terminal commands.
pub fn harmless(text: String) -> String {
    let rules = |c: char| c.is_control() && c != '\n' && c != '\t';
    match text.contains(rules) {
        false => text,
        true => (text.chars())
            .map(|c| {
                if rules(c) {
                    c.escape_default().to_string()
                } else {
                    c.to_string()
                }
            })
            .collect(),
    }
}

/// Whether some requested output could not be written to standard output.
static LOST: AtomicBool = AtomicBool::new(false);

/// Records the result of writing to standard output; a closed reader is not a failure.
pub fn told(written: io::Result<()>) {
    if written.is_err_and(|error| error.kind() != io::ErrorKind::BrokenPipe) {
        LOST.store(true, Ordering::Relaxed);
    }
}

/// Whether all of standard output was written; false, for instance, on a full disk. Called at the
/// end.
pub fn all_told() -> bool {
    told(io::stdout().flush());
    !LOST.load(Ordering::Relaxed)
}

/// Writes a line to standard output.
#[macro_export]
macro_rules! tell {
    ($($part:tt)*) => {{
        use std::io::Write as _;
        if $crate::terminal::speaks() {
            let text = $crate::terminal::harmless(format!($($part)*));
            $crate::terminal::told(writeln!(std::io::stdout(), "{text}"));
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_rules_the_terminal() {
        let text = harmless("a\x1b]0;b\x07\tc\u{9b}2J\nü…".to_owned());
        assert_eq!(text, "a\\u{1b}]0;b\\u{7}\tc\\u{9b}2J\nü…");
    }
}
