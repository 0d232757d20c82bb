//! Running a plan, stage after stage.

mod analyse;
mod changes;
mod context;
mod dataset;
pub mod directory;
#[cfg(test)]
mod documents;
pub(crate) mod evaluate;
pub(crate) mod extract;
mod importance;
mod intervals;
mod measured;
mod measuring;
pub(crate) mod models;
mod prune;
mod recover;
mod sample;
mod speed;
pub mod sweep;
mod together;
mod train;
mod width;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use self::context::Context;
pub use self::directory::Resume;
use self::directory::{RunDirectory, Status, json, write_text};
pub(crate) use self::together::can_share;
use self::together::take;
use super::RecipeError;
use super::plan::{Plan, Work};
use super::results::{PAGE, Results, write_page};
use super::schema::{Stage, StageKind};
use crate::backend::BackendKind;
use crate::ops::TrainingBackend;
use crate::stop::Stop;
use crate::training::CHECKPOINTS;
use crate::workers::Group;

/// How to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Folder of all runs.
    pub runs: PathBuf,
    /// Whether to go on with the newest unfinished run.
    pub resume: Resume,
    /// Where to compute.
    pub backend: BackendKind,
    /// Plain lines even on a terminal.
    pub plain: bool,
    /// Ends the run after its current step, so that it can be resumed.
    pub stop: Stop,
    /// Write the run's page while it goes on, too.
    pub watch: bool,
    /// Who shares the work.
    pub workers: Group,
}

/// File that says a stage is finished.
pub(crate) const DONE: &str = "done.json";

/// What a result depends on besides the recipe, in `environment.json`.
#[derive(Serialize)]
struct Environment {
    version: &'static str,
    /// Of a release that was built from a repository.
    commit: Option<&'static str>,
    backend: BackendKind,
    device: String,
    os: &'static str,
    architecture: &'static str,
    processor: String,
    /// Threads that compute, in each process.
    threads: usize,
    /// Processes that share the work, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    workers: Option<usize>,
    /// UTC.
    started: String,
    arguments: Vec<String>,
}

/// The processor's name, where the system tells it.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    name.map_or_else(
        || "unknown".to_owned(),
        |name| name.trim_matches([' ', '\t', ':']).to_owned(),
    )
}

/// A time as `2026-01-31T23:59:59Z`, by the calendar of civil days (H. Hinnant, "chrono-compatible
/// low-level date algorithms").
fn utc(time: SystemTime) -> String {
    let seconds = time
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, in eras of 400 years.
    let day = days + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = match month {
        0..=9 => (year + 400 * era, month + 3),
        _ => (year + 400 * era + 1, month - 9),
    };
    let [hour, minute, second] = [second / 3600, second / 60 % 60, second % 60];
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Runs a plan and returns its run directory.
///
/// # Errors
/// When a stage fails, or a person interrupts; the status file says which.
// Inline, here and in what follows: compiled with a program that runs recipes, for its backends,
// and not whenever the library is.
#[inline]
pub fn run(plan: &Plan, options: &Options) -> Result<PathBuf, RecipeError> {
    if let Some(problem) = options.backend.missing() {
        return Err(RecipeError::Run(problem));
    }
    if options.resume == Resume::Join {
        let problem = "only a sweep is shared out by joining it";
        return Err(RecipeError::Run(problem.into()));
    }
    plan.complete()?;
    can_share(plan, &options.workers)?;
    let resolved = plan
        .recipe
        .to_toml()
        .map_err(|error| RecipeError::Run(error.to_string()))?;
    let (directory, _scratch) = take(options, &plan.recipe.name, &resolved, &|noted| {
        (noted == resolved).then(|| resolved.clone())
    })?;
    run_in(directory, plan, options)
}

/// Runs a plan in a directory of its own.
#[inline]
fn run_in(directory: RunDirectory, plan: &Plan, options: &Options) -> Result<PathBuf, RecipeError> {
    crate::say!("run directory {}", directory.path().display());
    for stage in &plan.stages {
        for note in &stage.notes {
            crate::say!("{}: note: {note}", stage.name);
        }
    }
    let started = Instant::now();
    let _panic = Panicking(&directory, started);
    let leads = options.workers.leads();
    let watching = (options.watch && leads).then(|| Watching::new(directory.path()));
    let work = || {
        crate::with_backend!(options.backend, B, device => {
        let note = crate::ops::supports::<B>(plan.recipe.compute, device);
        if let Some(note) = note.map_err(RecipeError::Run)? {
            crate::say!("note: {note}");
        }
        let environment = Environment {
            version: env!("CARGO_PKG_VERSION"),
            commit: Some(env!("TINYFUSION_COMMIT")).filter(|commit| !commit.is_empty()),
            backend: options.backend,
            device: format!("{device:?}"),
            os: std::env::consts::OS,
            architecture: std::env::consts::ARCH,
            processor: processor(),
            started: utc(SystemTime::now()),
            threads: rayon::current_num_threads(),
            workers: Some(options.workers.size()).filter(|&size| size > 1),
            arguments: (std::env::args_os().skip(1))
                .map(|argument| argument.to_string_lossy().into_owned())
                .collect(),
        };
        // A resumed run is still the one its first environment describes; each later one is a
        // record of its own.
        let name = match directory.resumed() {
            // In containers the same number of a process comes again and again.
            true => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH);
                let seconds = since.map_or(0, |since| since.as_secs());
                format!("environment-{seconds}-{}.json", std::process::id())
            }
            false => "environment.json".to_owned(),
        };
        directory.write(&name, &json(&environment)?)?;
        let context = Context::<B> { recipe: &plan.recipe, directory: &directory, device, resume: directory.resumed(), plain: options.plain || !leads, stop: &options.stop, workers: &options.workers };
        stages(plan, &context, started)
    }, else Ok(()))
    };
    let result = work();
    let stage = directory
        .status()
        .map(|status| status.stage)
        .unwrap_or_default();
    let state = match &result {
        Ok(()) => "finished",
        Err(RecipeError::Interrupted) => "interrupted",
        Err(_) => "failed",
    };
    let error = result.as_ref().err().map(ToString::to_string);
    let told = directory.set_status(&Status {
        state: state.into(),
        stage,
        seconds: started.elapsed().as_secs_f64(),
        error,
    });
    drop(watching);
    let evaluates = |stage: &Stage| matches!(stage.kind, StageKind::Evaluate(_));
    let shown = options.watch || result.is_ok() && plan.recipe.stages.iter().any(evaluates);
    if leads && shown {
        // Results that can't be drawn are there all the same.
        match show(directory.path(), None) {
            Ok(page) => crate::say!("{}", page.display()),
            Err(error) => crate::say!("the run's page can't be written: {error}"),
        }
    }
    // The stage's own error is the one to tell.
    result.and(told).map(|()| directory.path().to_owned())
}

fn show(run: &Path, renewed: Option<u32>) -> Result<PathBuf, RecipeError> {
    write_page(&[Results::read(run)?], run, renewed)
}

/// Seconds after which the page of a run that goes on is written, and loaded, again.
const RENEWED: u32 = 15;

/// Writes a run's page again and again, until it is dropped.
struct Watching {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watching {
    fn new(run: &Path) -> Self {
        let (end, ended) = mpsc::channel::<()>();
        let run = run.to_owned();
        crate::say!("watch {}", run.join(PAGE).display());
        let thread = std::thread::spawn(move || {
            loop {
                // A file may be half written just now; the next page has it.
                let _ = show(&run, Some(RENEWED));
                let wait = Duration::from_secs(RENEWED.into());
                if ended.recv_timeout(wait) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
            }
        });
        Self {
            end: Some(end),
            thread: Some(thread),
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        // The sender's end is the signal.
        drop(self.end.take());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Says that a run failed when a panic takes it down: `running` would be read for ever.
struct Panicking<'a>(&'a RunDirectory, Instant);

impl Drop for Panicking<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let status = self.0.status();
        let stage = status.map(|status| status.stage).unwrap_or_default();
        let seconds = self.1.elapsed().as_secs_f64();
        // The panic's own message is the one to tell.
        let _ = self.0.set_status(&Status {
            state: "failed".into(),
            stage,
            seconds,
            error: Some("the program panicked, which is a fault of its own; its message is on standard error".into()),
        });
    }
}

fn stages<B: TrainingBackend>(
    plan: &Plan,
    context: &Context<'_, B>,
    started: Instant,
) -> Result<(), RecipeError> {
    for (index, (stage, planned)) in plan.recipe.stages.iter().zip(&plan.stages).enumerate() {
        let folder = context.directory.stage(index, &stage.name);
        let temporary = || {
            let optimisation = stage.kind.optimisation();
            if optimisation.is_some_and(|optimisation| !optimisation.keep_checkpoints) {
                // What can't be removed does no harm.
                let _ = std::fs::remove_dir_all(folder.join(CHECKPOINTS));
            }
        };
        if folder.join(DONE).exists() {
            crate::say!("{}: already done", stage.name);
            temporary();
            continue;
        }
        if context.stop.requested() {
            return Err(RecipeError::Interrupted);
        }
        std::fs::create_dir_all(&folder).map_err(RecipeError::io(&folder))?;
        context.directory.set_status(&Status {
            state: "running".into(),
            stage: stage.name.clone(),
            seconds: started.elapsed().as_secs_f64(),
            error: None,
        })?;
        let begun = Instant::now();
        context.workers.at(stage.name.clone());
        match &planned.work {
            Work::Extract(extract) => context.extract(&stage.name, extract, &folder)?,
            Work::Train(train) => context.train(stage, train, &folder)?,
            Work::Prune(prune) => context.prune(stage, prune, &folder)?,
            Work::Width(width) => context.width(&stage.name, width, &folder)?,
            Work::Recover(recover) => context.recover(stage, recover, &folder)?,
            Work::Sample(sample) => context.sample(&stage.name, sample, &folder)?,
            Work::Analyse(analyse) => context.analyse(&stage.name, analyse, &folder)?,
            Work::Evaluate(evaluate) => context.evaluate(&stage.name, evaluate, &folder)?,
        }
        let seconds = begun.elapsed().as_secs_f64();
        let done = json(
            &serde_json::json!({ "stage": stage.name, "what": planned.what, "seconds": seconds }),
        )?;
        write_text(&folder.join(DONE), &done)?;
        temporary();
        crate::say!(
            "{}: done in {}",
            stage.name,
            crate::report::brief(begun.elapsed())
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_date() {
        // date -u -d @SECONDS +%FT%TZ
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }
}
