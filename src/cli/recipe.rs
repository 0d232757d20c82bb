//! `recipe`: runs a recipe, or goes on with a run of one.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::duration::duration;
use super::error::CliError;
use super::{how_to_go_on, listen};
use crate::backend::BackendKind;
use crate::recipe::document::{Document, MOST_BYTES};
use crate::recipe::plan::Plan;
use crate::recipe::run::sweep::{Problems, run_sweep};
use crate::recipe::run::{Options, Resume, can_share, run};
use crate::recipe::schema::sweep::{Point, Sweep};
use crate::recipe::schema::{Recipe, Stage, StageKind};
use crate::recipe::{RecipeError, embedded_recipes};
use crate::report::{brief, scientific};
use crate::stop::Stop;
use crate::workers::{Group, alone};

#[derive(Debug, clap::Args)]
pub(super) struct RecipeArguments {
    /// The recipe's TOML file, or the name of one that is part of the program, such as quickstart
    recipe: PathBuf,
    /// Override a key; stages go by name, or by index from 0 (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print what would be done, and stop
    #[arg(long)]
    dry_run: bool,
    /// Where to compute; by default what the recipe says, else ndarray
    #[arg(long)]
    backend: Option<BackendKind>,
    /// Seed of all randomness; by default the recipe's
    #[arg(long, value_parser = clap::value_parser!(u64).range(..1 << 63))]
    seed: Option<u64>,
    /// Run with this many seeds in a row, and print mean and spread of the verdicts
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(2..=1000))]
    seeds: Option<u64>,
    /// Save and stop after this time, such as 3h50m, before a queue's own limit; `--resume` goes on
    #[arg(long, value_name = "TIME", value_parser = duration)]
    max_time: Option<Duration>,
    /// Go on with the newest unfinished run of this recipe; of a sweep that has more runs now than
    /// it had, run those
    #[arg(long)]
    resume: bool,
    /// Go on with the newest unfinished run of this very recipe, or begin one where there is
    /// none: for a job that a queue starts again
    #[arg(long, conflicts_with = "resume")]
    resume_if_any: bool,
    /// Take runs of a sweep beside other processes that do, on one disk; begin it where there is
    /// none: for the many jobs of an array, one process a GPU, or the processes of a launcher
    #[arg(long, conflicts_with_all = ["resume", "resume_if_any"])]
    pub(super) join: bool,
    /// Folder of all runs
    #[arg(long, value_name = "FOLDER", default_value = "artifacts/runs")]
    runs: PathBuf,
    /// Plain progress lines instead of the dashboard and bars
    #[arg(long)]
    plain: bool,
    /// Write the run's page while it goes on, for a browser that is left open
    #[arg(long)]
    watch: bool,
}

/// A recipe's text, or the beginning of one that is too long. `<(a command)` works too, so that it
/// need not be a regular file.
fn read_recipe(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?
        .take(MOST_BYTES as u64 + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() > MOST_BYTES {
        return Ok(String::from_utf8_lossy(&bytes).into_owned());
    }
    String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// What is told at a recipe's end.
#[derive(Default)]
struct Ending {
    /// Runs that it tells of.
    runs: usize,
    text: String,
}

/// Runs the recipe.
pub(super) fn recipe(arguments: &RecipeArguments, workers: &Group) -> Result<(), CliError> {
    if !arguments.join || workers.size() == 1 {
        tell(&carry_out(arguments, workers)?.text);
        return Ok(());
    }
    // Each takes runs of the sweep for itself. The one that tells the most began it, and has waited
    // for the others.
    let ended = carry_out(arguments, &alone());
    workers.at("the sweep's end".to_owned());
    let own = ended.as_ref().map_or_else(
        |_| Vec::new(),
        |ending| {
            let runs = (ending.runs as u64).to_be_bytes();
            [&runs[..], ending.text.as_bytes()].concat()
        },
    );
    let all = workers.all_gather(&own).into_iter();
    let most = all.max_by_key(|told| told.first_chunk::<8>().copied());
    if let Some((_, text)) = most.as_ref().and_then(|told| told.split_first_chunk::<8>()) {
        tell(&String::from_utf8_lossy(text));
    }
    ended.map(drop)
}

fn tell(text: &str) {
    if !text.is_empty() {
        crate::tell!("{text}");
    }
}

/// Does what the arguments ask for.
fn carry_out(arguments: &RecipeArguments, workers: &Group) -> Result<Ending, CliError> {
    let path = &arguments.recipe;
    let text = match read_recipe(path) {
        Ok(text) => text,
        // A single word may name an embedded recipe.
        Err(error) => match path.to_str().and_then(embedded_recipes::recipe) {
            Some(text) => text.to_owned(),
            None if error.kind() == io::ErrorKind::NotFound
                && path.parent() == Some("".as_ref()) =>
            {
                let names: Vec<&str> = embedded_recipes::RECIPES
                    .iter()
                    .map(|(name, _)| *name)
                    .collect();
                return Err(CliError::Usage(format!(
                    "{}: there is no such file; the recipes that go by name alone are {}",
                    path.display(),
                    names.join(", ")
                )));
            }
            None => return Err(RecipeError::io(path)(error).into()),
        },
    };
    let mut document = Document::parse(path, &text)?;
    for assignment in &arguments.set {
        document.set(assignment);
    }
    if let Some(seed) = arguments.seed {
        document.set_by(&format!("--seed {seed}"), &format!("seed={seed}"));
    }
    let mut recipe = Recipe::from_document(&document)?;
    let backend = arguments
        .backend
        .or(recipe.backend)
        .unwrap_or(BackendKind::Ndarray);
    recipe.backend = Some(backend);
    if let Some(seeds) = arguments.seeds {
        let evaluates = |stage: &Stage| matches!(stage.kind, StageKind::Evaluate(_));
        if !recipe.stages.iter().any(evaluates) {
            return Err(CliError::Usage(format!(
                "{}: --seeds compares verdicts, but the recipe has no evaluate stage",
                path.display()
            )));
        }
        let sweep = || Sweep::of_seeds(seeds);
        recipe.sweep.get_or_insert_with(sweep).seeds = seeds;
    }
    if arguments.plain {
        crate::terminal::draw_nothing();
    }
    let options = |stop| Options {
        runs: arguments.runs.clone(),
        resume: match arguments {
            RecipeArguments { resume: true, .. } => Resume::Yes,
            RecipeArguments { join: true, .. } => Resume::Join,
            RecipeArguments {
                resume_if_any: true,
                ..
            } => Resume::IfAny,
            _ => Resume::No,
        },
        backend,
        plain: arguments.plain,
        stop,
        watch: arguments.watch,
        workers: workers.clone(),
    };
    // Of workers that share every run the first one looks at the clock.
    let looks = arguments.join || crate::terminal::speaks();
    let stop = || listen_within(arguments.max_time.filter(|_| looks));
    let again = match arguments.resume_if_any || arguments.join {
        true => "the same command",
        false => "the same command with `--resume`",
    };
    if arguments.join && recipe.sweep.is_none() {
        return Err(CliError::Usage(format!(
            "{}: --join: it shares out the runs of a sweep, and the recipe has none (`[sweep]`)",
            path.display()
        )));
    }
    if let (true, Some(problem)) = (arguments.dry_run, backend.missing()) {
        crate::say!("note: {problem}");
    }
    let Some(sweep) = &recipe.sweep else {
        let plan = Plan::shared(&recipe, workers.size())?;
        if arguments.dry_run {
            can_share(&plan, workers)?;
            let text = plan.to_string();
            return Ok(Ending { runs: 0, text });
        }
        let directory = how_to_go_on(run(&plan, &options(stop()?)), again)?;
        let text = directory.display().to_string();
        return Ok(Ending { runs: 1, text });
    };
    let mut points = sweep.points(&recipe, &document)?;
    for point in &mut points {
        // The flag goes before what a case says, and that before the recipe.
        let own = arguments.backend.or(point.recipe.backend);
        point.recipe.backend = own.or(Some(backend));
    }
    if arguments.dry_run {
        outline(&points, workers.size())?;
        return Ok(Ending::default());
    }
    let (directory, verdicts) = how_to_go_on(run_sweep(&points, &options(stop()?)), again)?;
    let heading = match (sweep.seeds, verdicts.runs().len(), points.len()) {
        // Another process that joined still works on the others.
        (_, done, all) if done < all => format!("{done} of {all} runs\n\n"),
        (1, ..) => String::new(),
        (seeds, ..) => format!("{seeds} seeds, mean ± standard deviation\n\n"),
    };
    let mut text = String::new();
    if !verdicts.is_empty() {
        text += &format!("\n{heading}{verdicts}\n");
    }
    if let Some(remark) = verdicts.loss_and_fid() {
        text += &format!("{remark}\n");
    }
    text += &directory.display().to_string();
    let runs = verdicts.runs().len();
    Ok(Ending { runs, text })
}

/// The stop that signals request, and the clock, if the run has a limit.
fn listen_within(limit: Option<Duration>) -> Result<Stop, CliError> {
    let stop = listen()?;
    if let Some(limit) = limit {
        let requested = stop.clone();
        std::thread::spawn(move || {
            std::thread::sleep(limit);
            if !requested.request() {
                crate::say!("{} are over: stopping after this step", brief(limit));
            }
        });
    }
    Ok(stop)
}

/// What a sweep would do.
fn outline(points: &[Point], workers: usize) -> Result<(), CliError> {
    let mut flops = 0.0;
    let mut missing = Problems::default();
    for point in points {
        let plan = Plan::shared(&point.recipe, workers)
            .map_err(|error| CliError::Usage(format!("{point}: {error}")))?;
        if let Some(backend) = point.recipe.backend.and_then(BackendKind::missing) {
            missing.add(point, &backend);
        }
        if let Err(files) = plan.complete() {
            missing.add(point, &files.to_string());
        }
        let of_run: f64 = plan.stages.iter().map(|stage| stage.flops).sum();
        crate::tell!(
            "{point}: {} stages, {} FLOPs",
            plan.stages.len(),
            scientific(of_run)
        );
        flops += of_run;
    }
    crate::tell!("\n{} runs, {} FLOPs", points.len(), scientific(flops));
    if let Some(missing) = missing.said() {
        crate::tell!("\n{missing}");
    }
    // The first of those with the most stages.
    let example = points
        .iter()
        .rev()
        .max_by_key(|point| point.recipe.stages.len());
    if let Some(point) = example {
        let plan = Plan::shared(&point.recipe, workers)?;
        crate::tell!("\n{point}:\n{plan}");
    }
    Ok(())
}
