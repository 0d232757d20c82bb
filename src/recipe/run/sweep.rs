//! Running a sweep: each of its recipes in a folder of its own, and one table of all verdicts.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

use sha2::{Digest, Sha256};

use super::directory::{Status, json, read_status};
use super::together::{can_share, take};
use super::{Options, run_in};
use crate::recipe::RecipeError;
use crate::recipe::plan::Plan;
use crate::recipe::results::{Verdicts, write_sweep};
use crate::recipe::schema::sweep::Point;

/// Runs every point of a sweep, and returns the sweep's directory with all verdicts, which are
/// written there after each run: `sweep.json` and `sweep.csv`. An interrupted sweep is resumed at
/// the run that it was at.
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
    for point in points {
        if let Some(problem) = backend(point).missing() {
            return Err(RecipeError::Run(problem));
        }
        let plan = Plan::new(&point.recipe)
            .and_then(|plan| plan.complete().map(|()| plan))
            .and_then(|plan| can_share(&plan, &options.workers).map(|()| plan))
            .map_err(|error| RecipeError::Run(format!("{point}: {error}")))?;
        plans.push(plan);
    }
    let recipes = (points.iter())
        .map(|point| point.recipe.to_toml())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| RecipeError::Run(error.to_string()))?;
    let name = &points[0].recipe.name;
    let (directory, _scratch) = take(options, name, &resolved(points, &recipes))?;
    crate::say!(
        "sweep of {} runs in {}",
        points.len(),
        directory.path().display()
    );
    let started = Instant::now();
    let status = |state: &str, at: String, error: Option<String>| {
        directory.set_status(&Status {
            state: state.into(),
            stage: at,
            seconds: started.elapsed().as_secs_f64(),
            error,
        })
    };
    let mut verdicts = Verdicts::default();
    for (index, ((point, plan), resolved)) in points.iter().zip(&plans).zip(&recipes).enumerate() {
        let at = folder_name(index, point);
        let folder = directory.path().join(&at);
        if read_status(&folder).is_some_and(|status| status.state == "finished") {
            crate::say!("{point}: already done");
        } else {
            status("running", at.clone(), None)?;
            crate::say!("{point} ({} of {})", index + 1, points.len());
            let options = Options {
                backend: backend(point),
                ..options.clone()
            };
            let done = directory
                .inner(&at, resolved)
                .and_then(|directory| run_in(directory, plan, &options));
            if let Err(error) = done {
                let (state, said) = match &error {
                    RecipeError::Interrupted => ("interrupted", None),
                    error => ("failed", Some(error.to_string())),
                };
                // The run's own error is the one to tell.
                let _ = status(state, at, said);
                return Err(error);
            }
        }
        if !options.workers.leads() {
            continue;
        }
        verdicts.add(point, &at, &folder)?;
        directory.write("sweep.json", &json(&verdicts)?)?;
        directory.write("sweep.csv", &verdicts.csv())?;
        // Results that can't be drawn are there all the same.
        if let Err(error) = write_sweep(directory.path(), directory.path()) {
            crate::say!("the sweep's page can't be written: {error}");
        }
    }
    status("finished", String::new(), None)?;
    Ok((directory.path().to_owned(), verdicts))
}

/// `007-learned-seed1`: the case's folder is found by its name.
fn folder_name(index: usize, point: &Point) -> String {
    let case = point.case.as_ref().map(|case| format!("{case}-"));
    let case = case.unwrap_or_default();
    format!("{:03}-{case}seed{}", index + 1, point.recipe.seed)
}

/// What a sweep is resumed by: each run's recipe, by its SHA-256.
fn resolved(points: &[Point], recipes: &[String]) -> String {
    let mut text = String::from("# Each run's recipe is in its folder.\n");
    for (index, (point, recipe)) in points.iter().zip(recipes).enumerate() {
        let _ = write!(
            text,
            "\n[[run]]\nfolder = {:?}\nrecipe_sha256 = \"{:x}\"\n",
            folder_name(index, point),
            Sha256::digest(recipe)
        );
    }
    text
}
