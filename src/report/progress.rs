//! Progress of a long stage: a bar with the time left on a terminal, an occasional line elsewhere.

use std::fmt;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

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
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Progress through `total` items, called `what` (such as images).
    pub(crate) fn new(name: &str, what: &'static str, total: usize) -> Self {
        let template =
            format!("{{msg:<12}} {{wide_bar}} {{pos}}/{{len}} {what}, {{rate}}/s, {{eta}} left");
        let style = ProgressStyle::with_template(&template);
        let bar = std::io::stderr().is_terminal().then(|| {
            ProgressBar::new(total as u64)
                .with_style(
                    style
                        .unwrap_or_else(|_| ProgressStyle::default_bar())
                        .with_key("rate", |state: &ProgressState, out: &mut dyn fmt::Write| {
                            // Writing to a string can't fail.
                            let _ = write!(out, "{:.1}", state.per_sec());
                        }),
                )
                .with_message(name.to_owned())
        });
        let now = Instant::now();
        Self {
            name: name.to_owned(),
            what,
            total,
            done: 0,
            started: now,
            told: now,
            bar,
        }
    }

    /// Counts items that an earlier process finished; they don't enter the rate.
    pub(crate) fn skip(&mut self, count: usize) {
        self.total -= count.min(self.total);
        if let Some(bar) = &self.bar {
            bar.set_length(self.total as u64);
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
            Some(bar) => bar.set_position(self.done as u64),
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

/// The bar is removed at the end.
impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
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
