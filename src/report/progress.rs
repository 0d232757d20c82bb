//! How far a long stage is: a bar with the time left on a terminal, a line now and then elsewhere.

use std::fmt;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use super::{brief, thousands};

/// Time between lines where there is no terminal.
const BETWEEN: Duration = Duration::from_secs(30);

/// Progress of something that is counted.
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
    /// Progress through `total` of `what` (images, say).
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
                            // A string takes all that is written.
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

    /// Counts what an earlier process did: it is no part of the rate.
    pub(crate) fn skip(&mut self, count: usize) {
        self.total -= count.min(self.total);
        if let Some(bar) = &self.bar {
            bar.set_length(self.total as u64);
        }
    }

    /// Counts on.
    pub(crate) fn add(&mut self, count: usize) {
        self.reach(self.done + count);
    }

    /// So many are done.
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

/// A bar is taken away when what it counts is over.
impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Progress of library code, which tells how many of how many are done.
pub(crate) fn watch(name: &str, what: &'static str) -> impl FnMut(usize, usize) {
    let (name, mut progress) = (name.to_owned(), None);
    move |done, total| {
        progress
            .get_or_insert_with(|| Progress::new(&name, what, total))
            .reach(done);
    }
}
