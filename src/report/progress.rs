//! Progress of a long stage: a bar with the time left on a terminal, an occasional line elsewhere.

use std::time::{Duration, Instant};

use self::bar::Bar;
use super::{brief, thousands};

/// Time between lines without a terminal.
const BETWEEN: Duration = Duration::from_secs(30);

/// Progress of a counted task.
pub(crate) struct Progress {
    name: String,
    what: &'static str,
    total: usize,
    done: usize,
    started: Instant,
    told: Instant,
    bar: Option<Bar>,
}

impl Progress {
    /// Progress through `total` items, called `what` (such as images).
    pub(crate) fn new(name: &str, what: &'static str, total: usize) -> Self {
        let now = Instant::now();
        Self {
            name: name.to_owned(),
            what,
            total,
            done: 0,
            started: now,
            told: now,
            bar: crate::terminal::draws()
                .then(|| Bar::start(name, what, total))
                .flatten(),
        }
    }

    /// Counts items that an earlier process finished; they don't enter the rate.
    pub(crate) fn skip(&mut self, count: usize) {
        self.total -= count.min(self.total);
        if let Some(bar) = &self.bar {
            bar.length(self.total);
        }
    }

    /// Counts `count` more items.
    pub(crate) fn add(&mut self, count: usize) {
        self.reach(self.done + count);
    }

    /// Sets the number of items done.
    pub(crate) fn reach(&mut self, done: usize) {
        self.done = done;
        match &self.bar {
            Some(bar) => bar.position(self.done),
            None if self.told.elapsed() >= BETWEEN && self.done > 0 => {
                self.told = Instant::now();
                let rate = self.done as f64 / self.started.elapsed().as_secs_f64();
                let left = self.total.saturating_sub(self.done) as f64 / rate;
                crate::say!(
                    "{}: {} of {} {}, {rate:.1} a second, {} left",
                    self.name,
                    thousands(self.done),
                    thousands(self.total),
                    self.what,
                    brief(Duration::from_secs_f64(left))
                );
            }
            None => {}
        }
    }
}

/// A callback for library code, which passes the items done and the total.
pub(crate) fn watch(name: &str, what: &'static str) -> impl FnMut(usize, usize) {
    let (name, mut progress) = (name.to_owned(), None);
    move |done, total| {
        progress
            .get_or_insert_with(|| Progress::new(&name, what, total))
            .reach(done);
    }
}

/// A bar on standard error.
#[cfg(feature = "cli")]
mod bar {
    use std::fmt;
    use std::io::IsTerminal;

    use indicatif::{ProgressBar, ProgressState, ProgressStyle};

    pub(super) struct Bar(ProgressBar);

    impl Bar {
        /// A bar, if standard error is a terminal.
        pub(super) fn start(name: &str, what: &str, total: usize) -> Option<Self> {
            if !std::io::stderr().is_terminal() {
                return None;
            }
            let template = format!(
                "{{msg:<12}} {{wide_bar}} {{pos}}/{{len}} {what}, {{rate}}/s, {{eta}} left"
            );
            let style = ProgressStyle::with_template(&template)
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .with_key("rate", |state: &ProgressState, out: &mut dyn fmt::Write| {
                    // Writing to a string does not fail.
                    let _ = write!(out, "{:.1}", state.per_sec());
                });
            let bar = ProgressBar::new(total as u64).with_style(style);
            // On a terminal that can't move its cursor there are lines.
            (!bar.is_hidden()).then(|| Self(bar.with_message(name.to_owned())))
        }

        pub(super) fn length(&self, total: usize) {
            self.0.set_length(total as u64);
        }

        pub(super) fn position(&self, done: usize) {
            self.0.set_position(done as u64);
        }
    }

    /// Clears the line.
    impl Drop for Bar {
        fn drop(&mut self) {
            self.0.finish_and_clear();
        }
    }
}

/// The library alone draws no bars.
#[cfg(not(feature = "cli"))]
mod bar {
    pub(super) enum Bar {}

    impl Bar {
        pub(super) fn start(_: &str, _: &str, _: usize) -> Option<Self> {
            None
        }

        pub(super) fn length(&self, _: usize) {
            match *self {}
        }

        pub(super) fn position(&self, _: usize) {
            match *self {}
        }
    }
}
