//! Lines for a person. A reader that has gone away (`| head`) is no reason to fail, let alone to end a training.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// Writes a line to standard error.
#[macro_export]
macro_rules! say {
    ($($part:tt)*) => {{
        use std::io::Write as _;
        let text = $crate::terminal::harmless(format!($($part)*));
        let _ = writeln!(std::io::stderr(), "{text}");
    }};
}

/// Text with its control characters, but for line ends and tabs, written as escapes: names and notes come from files that
/// may mean to rule a terminal.
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
        let text = $crate::terminal::harmless(format!($($part)*));
        $crate::terminal::told(writeln!(std::io::stdout(), "{text}"));
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
