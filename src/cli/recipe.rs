//! `recipe`: runs a recipe, or goes on with a run of one.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::error::CliError;
use super::{how_to_go_on, listen};
use crate::backend::BackendKind;
use crate::recipe::document::{Document, MOST_BYTES};
use crate::recipe::plan::Plan;
use crate::recipe::run::seeds::Verdicts;
use crate::recipe::run::{Options, run};
use crate::recipe::schema::{Recipe, StageKind};
use crate::recipe::{RecipeError, embedded_recipes};

#[derive(Debug, clap::Args)]
pub(super) struct RecipeArguments {
    /// The recipe's TOML file, or the name of one that is part of the program, such as quickstart
    recipe: PathBuf,
    /// Override a key; stages go by name or index (repeatable)
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
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(2..=1000), conflicts_with_all = ["resume", "dry_run"])]
    seeds: Option<u64>,
    /// Go on with the newest unfinished run of this recipe
    #[arg(long)]
    resume: bool,
    /// Folder of all runs
    #[arg(long, value_name = "FOLDER", default_value = "artifacts/runs")]
    runs: PathBuf,
    /// Plain progress lines instead of the dashboard
    #[arg(long)]
    plain: bool,
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

/// Runs the recipe.
pub(super) fn recipe(arguments: &RecipeArguments) -> Result<(), CliError> {
    let path = &arguments.recipe;
    let text = match read_recipe(path) {
        Ok(text) => text,
        // A single word may name an embedded recipe.
        Err(error) => match path.to_str().and_then(embedded_recipes::recipe) {
            Some(text) => text.to_owned(),
            None => return Err(RecipeError::io(path)(error).into()),
        },
    };
    let mut document = Document::parse(path, &text)?;
    for assignment in &arguments.set {
        document.set(assignment);
    }
    let mut recipe = Recipe::from_document(&document)?;
    recipe.seed = arguments.seed.unwrap_or(recipe.seed);
    let backend = arguments
        .backend
        .or(recipe.backend)
        .unwrap_or(BackendKind::Ndarray);
    recipe.backend = Some(backend);
    let plan = Plan::new(&recipe)?;
    if arguments.dry_run {
        crate::tell!("{plan}");
        return Ok(());
    }
    let options = Options {
        runs: arguments.runs.clone(),
        resume: arguments.resume,
        backend,
        plain: arguments.plain,
        stop: listen()?,
    };
    if arguments.seeds.is_some()
        && !recipe
            .stages
            .iter()
            .any(|stage| matches!(stage.kind, StageKind::Evaluate(_)))
    {
        return Err(CliError::Usage(format!(
            "{}: --seeds compares verdicts, but the recipe has no evaluate stage",
            path.display()
        )));
    }
    let Some(seeds) = arguments.seeds else {
        let directory = how_to_go_on(run(&plan, &options), "the same command with `--resume`")?;
        crate::tell!("{}", directory.display());
        return Ok(());
    };
    let mut verdicts = Verdicts::default();
    for seed in recipe.seed..recipe.seed.saturating_add(seeds) {
        crate::say!("seed {seed}");
        let plan = Plan::new(&Recipe {
            seed,
            ..recipe.clone()
        })?;
        verdicts.add(seed, &run(&plan, &options)?)?;
    }
    let path = verdicts.write(&options.runs.join(&recipe.name))?;
    crate::tell!(
        "\n{seeds} seeds, mean ± standard deviation\n\n{verdicts}\n{}",
        path.display()
    );
    Ok(())
}
