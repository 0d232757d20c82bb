//! Running a sweep: each of its recipes in a folder of its own, and one table of all verdicts.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::directory::{RESOLVED, RunDirectory, Status, json, read_status};
use super::together::{can_share, take};
use super::{Options, run_in};
use crate::backend::BackendKind;
use crate::recipe::RecipeError;
use crate::recipe::plan::Plan;
use crate::recipe::results::{Verdicts, write_sweep};
use crate::recipe::schema::sweep::Point;

/// What is wrong with runs of a sweep, each said once with those that it is of.
#[derive(Default)]
pub(crate) struct Problems(BTreeMap<String, Vec<String>>);

impl Problems {
    /// Adds one of a run's.
    pub(crate) fn add(&mut self, point: &Point, problem: &str) {
        let of = self.0.entry(problem.to_owned()).or_default();
        of.push(point.to_string());
    }

    /// All of them, a line each; None where there is none.
    pub(crate) fn said(&self) -> Option<String> {
        let lines = self.0.iter().map(|(problem, of)| match of.len() {
            1 => format!("{}: {problem}", of[0]),
            count => format!("{} and {} more: {problem}", of[0], count - 1),
        });
        let lines: Vec<String> = lines.collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    }
}

/// Runs every point of a sweep, and returns the sweep's directory with all verdicts, which are
/// written there after each run: `sweep.json` and `sweep.csv`. An interrupted sweep is resumed at
/// the run that it was at, one that has grown with the runs that are new; what it asks for no more
/// stays in its folder, and is in no table. Processes that [`Resume::Join`](super::Resume::Join) a
/// sweep take runs that no other has; each returns when none is left, with the verdicts so far.
///
/// # Errors
/// When a run fails, or a person interrupts.
///
/// # Panics
/// When there is no point.
#[inline]
pub fn run_sweep(points: &[Point], options: &Options) -> Result<(PathBuf, Verdicts), RecipeError> {
    let mut plans = Vec::new();
    // A case may name a backend of its own.
    let backend = |point: &Point| point.recipe.backend.unwrap_or(options.backend);
    // What is wrong with any of them is said at once, so that it is mended at once.
    let mut problems = Problems::default();
    for point in points {
        let plan = match backend(point).missing() {
            Some(problem) => Err(RecipeError::Run(problem)),
            None => Plan::new(&point.recipe)
                .and_then(|plan| plan.complete().map(|()| plan))
                .and_then(|plan| can_share(&plan, &options.workers).map(|()| plan)),
        };
        match plan {
            Ok(plan) => plans.push(plan),
            Err(error) => problems.add(point, &error.to_string()),
        }
    }
    if let Some(said) = problems.said() {
        return Err(RecipeError::Run(said));
    }
    let recipes = (points.iter())
        .map(|point| point.recipe.to_toml())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| RecipeError::Run(error.to_string()))?;
    let name = &points[0].recipe.name;
    let fresh = Folders::default().with(points, &recipes).to_toml()?;
    let (directory, _scratch) = take(options, name, &fresh, &|noted| {
        Folders::continued(noted, points, &recipes)?.to_toml().ok()
    })?;
    let unreadable = |error: toml::de::Error| {
        let path = directory.path().join(RESOLVED);
        RecipeError::Run(format!("{}: {error}", path.display()))
    };
    let noted = directory.read(RESOLVED)?;
    let folders: Folders = toml::from_str(&noted).map_err(unreadable)?;
    let begun = (folders.run.iter())
        .filter(|run| directory.path().join(&run.name).exists())
        .count();
    let told = [
        (begun, "begun before"),
        (folders.before.len(), "no longer asked for"),
    ];
    let told = told.iter().filter(|(count, _)| *count > 0);
    let told: String = told
        .map(|(count, what)| format!(", {count} {what}"))
        .collect();
    crate::say!(
        "sweep of {} runs{told}, in {}",
        points.len(),
        directory.path().display()
    );
    let started = Instant::now();
    let runs = (points.iter().zip(&plans).zip(&recipes).zip(&folders.run))
        .enumerate()
        .map(|(index, (((point, plan), resolved), folder))| Run {
            number: index + 1,
            point,
            plan,
            resolved,
            name: &folder.name,
            path: directory.path().join(&folder.name),
        })
        .collect();
    let mut sweep = Sweep {
        directory,
        noted,
        runs,
        started,
        options,
    };
    let worked = sweep.work(backend);
    let verdicts = worked.inspect_err(|error| sweep.failed(error))?;
    Ok((sweep.directory.path().to_owned(), verdicts))
}

/// One of a sweep's runs.
struct Run<'a> {
    /// In the sweep's order, from 1.
    number: usize,
    point: &'a Point,
    plan: &'a Plan,
    /// Its recipe.
    resolved: &'a str,
    /// Of its folder.
    name: &'a str,
    path: PathBuf,
}

impl Run<'_> {
    fn finished(&self) -> bool {
        let noted = std::fs::read_to_string(self.path.join(RESOLVED));
        noted.is_ok_and(|noted| noted == self.resolved)
            && read_status(&self.path).is_some_and(|status| status.state == "finished")
    }
}

struct Sweep<'a> {
    directory: RunDirectory,
    /// What it has noted of its runs.
    noted: String,
    runs: Vec<Run<'a>>,
    started: Instant,
    options: &'a Options,
}

/// How long to wait before looking again at runs that other processes have.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// What to do about a run.
enum Taken {
    Finished,
    /// Another process has it.
    PassedOver,
    Here(RunDirectory),
}

impl Sweep<'_> {
    /// Runs what is left. What other processes have is passed over, and waited for by the one that
    /// leads, which runs it if they end without having finished.
    #[inline]
    fn work(&mut self, backend: impl Fn(&Point) -> BackendKind) -> Result<Verdicts, RecipeError> {
        let mut left: Vec<usize> = (0..self.runs.len()).collect();
        let (mut waited, mut ran) = (false, false);
        loop {
            let (mut passed_over, before) = (Vec::new(), left.len());
            for index in left {
                let run = &self.runs[index];
                let taken = match self.take(run)? {
                    Taken::Here(directory) => directory,
                    Taken::PassedOver => {
                        passed_over.push(index);
                        continue;
                    }
                    Taken::Finished => {
                        if !waited {
                            crate::say!("{}: already done", run.point);
                        }
                        continue;
                    }
                };
                ran = true;
                let leads = self.directory.leads(&self.noted);
                self.status(leads, "running", run.name, None)?;
                crate::say!("{} ({} of {})", run.point, run.number, self.runs.len());
                let options = Options {
                    backend: backend(run.point),
                    ..self.options.clone()
                };
                if let Err(error) = run_in(taken, run.plan, &options) {
                    let (state, said) = match &error {
                        RecipeError::Interrupted => ("interrupted", None),
                        error => ("failed", Some(error.to_string())),
                    };
                    let at = run.name;
                    // The run's own error is the one to tell. Others may have finished theirs
                    // meanwhile.
                    let _ = self.tabulate();
                    let _ = self.status(leads, state, at, said);
                    return Err(error);
                }
                if self.directory.leads(&self.noted) {
                    self.tabulate()?;
                }
            }
            if passed_over.is_empty() || !self.directory.leads(&self.noted) {
                break;
            }
            if passed_over.len() == before {
                if !waited {
                    let name = self.directory.path().display();
                    crate::say!("waiting for the other processes at {name}");
                    self.status(true, "running", "waiting for others", None)?;
                }
                waited = true;
                std::thread::sleep(LOOK_AGAIN);
                if self.options.stop.requested() {
                    self.tabulate()?;
                    self.status(true, "interrupted", "", None)?;
                    return Err(RecipeError::Interrupted);
                }
            }
            left = passed_over;
        }
        let leads = self.directory.leads(&self.noted);
        let verdicts = self.tabulate()?;
        let known = self.directory.status();
        if ran || known.is_none_or(|status| status.state != "finished") {
            self.status(leads, "finished", "", None)?;
        }
        Ok(verdicts)
    }

    /// Notes an error that is no run's own, where none is noted.
    fn failed(&self, error: &RecipeError) {
        let running = |status: Status| status.state == "running";
        if self.directory.is_held() && self.directory.status().is_some_and(running) {
            // The error is the one to tell.
            let _ = self.status(true, "failed", "", Some(error.to_string()));
        }
    }

    /// Takes a run for this process. Of several workers the first one's answer counts.
    fn take(&self, run: &Run<'_>) -> Result<Taken, RecipeError> {
        let workers = &self.options.workers;
        // Several workers would not pass over the same runs.
        let passes_over = workers.size() == 1;
        // First of all, so that another process's is whole, its page too.
        let taken = self.directory.inner(run.name, run.resolved, !passes_over);
        let directory = match taken {
            Err(RecipeError::Busy(_)) if passes_over => return Ok(Taken::PassedOver),
            directory => directory?,
        };
        let finished = workers.broadcast(vec![u8::from(run.finished())]);
        Ok(match finished[..] {
            [1] => Taken::Finished,
            _ => Taken::Here(directory),
        })
    }

    /// Notes how the sweep stands, if it is this process's.
    fn status(
        &self,
        leads: bool,
        state: &str,
        at: &str,
        error: Option<String>,
    ) -> Result<(), RecipeError> {
        if !leads {
            return Ok(());
        }
        self.directory.set_status(&Status {
            state: state.into(),
            stage: at.into(),
            seconds: self.started.elapsed().as_secs_f64(),
            error,
        })
    }

    /// The verdicts of all runs that have finished; written, if the sweep is this process's.
    fn tabulate(&mut self) -> Result<Verdicts, RecipeError> {
        let mut verdicts = Verdicts::default();
        if !self.options.workers.leads() {
            return Ok(verdicts);
        }
        for run in self.runs.iter().filter(|run| run.finished()) {
            verdicts.add(run.point, run.name, &run.path)?;
        }
        if self.directory.leads(&self.noted) {
            self.directory.write("sweep.json", &json(&verdicts)?)?;
            self.directory.write("sweep.csv", &verdicts.csv())?;
            let path = self.directory.path();
            // Results that can't be drawn are there all the same.
            if let Err(error) = write_sweep(path, path) {
                crate::say!("the sweep's page can't be written: {error}");
            }
        }
        Ok(verdicts)
    }
}

/// The folders of a sweep's runs.
#[derive(Serialize, Deserialize, Default)]
struct Folders {
    /// Those that it asks for, in its order.
    run: Vec<Folder>,
    /// Those that it asked for before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    before: Vec<Folder>,
}

/// A run's folder, such as `007-learned-seed1`, and what its recipe is known by.
#[derive(Serialize, Deserialize)]
struct Folder {
    #[serde(rename = "folder")]
    name: String,
    recipe_sha256: String,
}

impl Folder {
    /// Its number; none of what is no folder within the sweep's.
    fn number(&self) -> Option<u64> {
        let name = Path::new(&self.name);
        let inner = name.file_name() == Some(name.as_os_str());
        let number = self.name.split('-').next()?.parse::<u32>().ok()?;
        inner.then_some(number.into())
    }
}

impl Folders {
    /// Gives every recipe the folder that it has already, or one with the next free number.
    fn with(self, points: &[Point], recipes: &[String]) -> Self {
        let mut before = self.run;
        before.extend(self.before);
        let mut last = before.iter().filter_map(Folder::number).max().unwrap_or(0);
        let mut run = Vec::new();
        for (point, recipe) in points.iter().zip(recipes) {
            let recipe_sha256 = format!("{:x}", Sha256::digest(recipe));
            let known = |folder: &Folder| folder.recipe_sha256 == recipe_sha256;
            if let Some(index) = before.iter().position(known) {
                run.push(before.remove(index));
                continue;
            }
            last += 1;
            let case = point.case.as_ref().map(|case| format!("{case}-"));
            let case = case.unwrap_or_default();
            let name = format!("{last:03}-{case}seed{}", point.recipe.seed);
            run.push(Folder {
                name,
                recipe_sha256,
            });
        }
        Self { run, before }
    }

    /// The folders of these points among those that are noted; none where no run was asked for
    /// before, or the note is no sweep's.
    fn continued(noted: &str, points: &[Point], recipes: &[String]) -> Option<Self> {
        let noted: Self = toml::from_str(noted).ok()?;
        let all = noted.run.iter().chain(&noted.before);
        let numbers: Option<Vec<u64>> = all.clone().map(Folder::number).collect();
        let names: HashSet<&str> = all.map(|folder| &*folder.name).collect();
        let runs = numbers?.len();
        if names.len() < runs {
            return None;
        }
        let now = noted.with(points, recipes);
        (now.run.len() + now.before.len() < runs + points.len()).then_some(now)
    }

    fn to_toml(&self) -> Result<String, RecipeError> {
        let folders = toml::to_string(self).map_err(|error| RecipeError::Run(error.to_string()))?;
        Ok(format!(
            "# Each run's recipe is in its folder.\n\n{folders}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::ops::Range;

    use super::*;
    use crate::recipe::document::Document;
    use crate::recipe::schema::Recipe;

    #[test]
    fn a_sweep_that_grows_keeps_the_folders_it_has() {
        let text = "[[stage]]\nkind = 'prune'\nfrom = 'embedded:digits-teacher'\nmethod = 'first'\nkeep = 6";
        let document = Document::parse("a.toml".as_ref(), text).unwrap();
        let recipe = Recipe::from_document(&document).unwrap();
        let points: Vec<Point> = (0..4)
            .map(|seed| Point {
                case: (seed > 1).then(|| "late".to_owned()),
                settings: BTreeMap::new(),
                recipe: Recipe {
                    seed,
                    ..recipe.clone()
                },
            })
            .collect();
        let recipes: Vec<String> = (0..4).map(|seed| format!("seed = {seed}")).collect();
        let of = |range: Range<usize>| (&points[range.clone()], &recipes[range]);
        let names = |folders: &Folders| -> Vec<String> {
            folders.run.iter().map(|run| run.name.clone()).collect()
        };
        let (some, texts) = of(1..3);
        let begun = Folders::default().with(some, texts);
        assert_eq!(names(&begun), ["001-seed1", "002-late-seed2"]);
        let text = |folders: &Folders| folders.to_toml().unwrap();
        let noted = text(&begun);
        let same = Folders::continued(&noted, some, texts).unwrap();
        assert_eq!(text(&same), noted);
        let grown = Folders::continued(&noted, &points, &recipes).unwrap();
        let all = ["003-seed0", "001-seed1", "002-late-seed2", "004-late-seed3"];
        assert_eq!(names(&grown), all);
        // What is asked for no more is known when it is asked for again.
        let (some, texts) = of(0..1);
        let fewer = Folders::continued(&text(&grown), some, texts).unwrap();
        assert_eq!(names(&fewer), ["003-seed0"]);
        assert_eq!(fewer.before.len(), 3);
        let again = Folders::continued(&text(&fewer), &points, &recipes).unwrap();
        assert_eq!(names(&again), all);
        assert_ne!(text(&again), text(&fewer));
        let (other, texts) = of(3..4);
        assert!(Folders::continued(&noted, other, texts).is_none());
        assert!(Folders::continued("seed = 0", other, texts).is_none());
        for outside in ["../001", "/001", "001/..", "001/", "x", "002-late-seed2"] {
            let noted = noted.replace("001-seed1", outside);
            let known = Folders::continued(&noted, &points, &recipes);
            assert!(known.is_none(), "{outside}");
        }
    }
}
