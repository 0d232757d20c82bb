//! `report` and `runs`: what runs have left, as a page and as lists.

use std::path::{Path, PathBuf};

use super::error::CliError;
use super::stage::refuse_file;
use crate::recipe::RecipeError;
use crate::recipe::results::{PAGE, Results, comparable, compared, write_page, write_sweep};
use crate::report::{Table, rounded};

#[derive(Debug, clap::Args)]
pub(super) struct ReportArguments {
    /// Folders of runs, such as artifacts/runs/quickstart/001, or of one sweep
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// The folder to write to; of a single run by default its own
    #[arg(long, value_name = "FOLDER")]
    into: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct RunsArguments {
    /// Folder of all runs
    #[arg(long, value_name = "FOLDER", default_value = "artifacts/runs")]
    runs: PathBuf,
    #[command(subcommand)]
    what: Option<Runs>,
}

#[derive(Debug, clap::Subcommand)]
enum Runs {
    /// Print the tables of several runs as one
    #[command(after_help = "Example:
  tinyfusion runs compare artifacts/runs/quickstart/001 artifacts/runs/quickstart/002 --csv both.csv")]
    Compare {
        /// Their folders
        #[arg(required = true, num_args = 2..)]
        runs: Vec<PathBuf>,
        /// Write the table as CSV, too
        #[arg(long, value_name = "FILE")]
        csv: Option<PathBuf>,
    },
}

fn read(runs: &[PathBuf]) -> Result<Vec<Results>, RecipeError> {
    runs.iter().map(|run| Results::read(run)).collect()
}

/// Writes a page.
pub(super) fn report(arguments: &ReportArguments) -> Result<(), CliError> {
    let into = match (&arguments.into, arguments.runs.as_slice()) {
        (Some(into), _) => into,
        (None, [run]) => run,
        (None, _) => {
            return Err(CliError::Usage(
                "a page of several runs needs a folder: --into FOLDER".into(),
            ));
        }
    };
    if arguments.into.is_some() {
        refuse_foreign(&into.join(PAGE))?;
    }
    let sweeps = arguments
        .runs
        .iter()
        .filter(|run| run.join("sweep.json").exists());
    let page = match (sweeps.count(), arguments.runs.as_slice()) {
        (0, runs) => write_page(&read(runs)?, into, None)?,
        (1, [sweep]) => write_sweep(sweep, into)?,
        _ => {
            return Err(CliError::Usage(
                "a sweep is a page of its own; name its folder alone, or single runs of it".into(),
            ));
        }
    };
    crate::tell!("{}", page.display());
    Ok(())
}

/// Refuses to replace a page that this program didn't write.
fn refuse_foreign(page: &Path) -> Result<(), CliError> {
    let known = match std::fs::read(page) {
        Ok(text) => text.windows(TITLE.len()).any(|part| part == TITLE),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    };
    match known {
        true => Ok(()),
        false => Err(CliError::Usage(format!(
            "{}: not a page of runs, and it would be overwritten; name another folder",
            page.display()
        ))),
    }
}

/// How the title of every page begins.
const TITLE: &[u8] = b"<title>TinyFusion: ";

/// Lists runs, or compares some.
pub(super) fn runs(arguments: &RunsArguments) -> Result<(), CliError> {
    match &arguments.what {
        None => list(&arguments.runs),
        Some(Runs::Compare { runs, csv }) => {
            if let Some(path) = csv {
                refuse_file(path)?;
            }
            let runs = read(runs)?;
            comparable(&runs)?;
            let grid = compared(&runs);
            if let Some(path) = csv {
                crate::files::write_atomic(path, |file| {
                    std::io::Write::write_all(file, grid.csv().as_bytes())
                })
                .map_err(RecipeError::io(path))?;
            }
            crate::tell!("{grid}");
            Ok(())
        }
    }
}

/// A line for each run, by the names of recipes and the numbers of runs.
fn list(folder: &Path) -> Result<(), CliError> {
    let mut table = Table::new([
        "run",
        "state",
        "lowest FID",
        "model",
        "work",
        "started",
        "page",
    ]);
    let mut unreadable = Vec::new();
    let mut count = 0;
    let recipes = match folders(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(CliError::Usage(format!(
                "{}: no folder of runs; `recipe` makes it as it runs one, unless `--runs` names another",
                folder.display()
            )));
        }
        found => found.map_err(RecipeError::io(folder))?,
    };
    for recipe in recipes {
        for run in folders(&recipe).map_err(RecipeError::io(&recipe))? {
            if !run.join("resolved.toml").exists() {
                continue;
            }
            count += 1;
            let found = match Results::read(&run) {
                Ok(found) => found,
                Err(error) => {
                    unreadable.push(error.to_string());
                    continue;
                }
            };
            let state = match &found.status {
                Some(status) if status.state == "finished" => "finished".to_owned(),
                Some(status) if !status.stage.is_empty() => {
                    format!("{}, {}", status.state, status.stage)
                }
                Some(status) => status.state.clone(),
                None => "-".into(),
            };
            let best = found.best();
            let page = run.join(PAGE);
            let dash = || "-".to_owned();
            table.row([
                found.name.clone(),
                state,
                best.as_ref().map_or_else(dash, |(_, fid)| rounded(*fid)),
                best.map_or_else(dash, |(model, _)| model),
                found.worked().unwrap_or_else(dash),
                found.environment["started"]
                    .as_str()
                    .map_or_else(dash, str::to_owned),
                if page.exists() {
                    page.display().to_string()
                } else {
                    dash()
                },
            ]);
        }
    }
    for problem in &unreadable {
        crate::say!("left out: {problem}");
    }
    match count {
        0 => crate::tell!("no runs in {}", folder.display()),
        _ => crate::tell!("{}", table.without_empty()),
    }
    Ok(())
}

/// The folders in a folder, in order.
fn folders(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    found.sort();
    Ok(found)
}
