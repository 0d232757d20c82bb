//! The command line.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::backend::BackendKind;
use crate::interrupt;
use crate::recipe::RecipeError;
use crate::recipe::document::Document;
use crate::recipe::plan::Plan;
use crate::recipe::run::{Options, run};
use crate::recipe::schema::Recipe;

/// Learns which layers of a diffusion transformer to drop, heals what is left, and proves how good the result is.
#[derive(Debug, Parser)]
#[command(name = "tinyfusion", version, max_term_width = 110, after_help = "Exit status: 0 done, 1 a negative verdict, 2 an error, 130 interrupted after a checkpoint.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a recipe, or go on with an interrupted run
    #[command(after_help = "Examples:
  tinyfusion recipe recipes/quickstart.toml
  tinyfusion recipe recipes/quickstart.toml --dry-run
  tinyfusion recipe recipes/quickstart.toml --set stage.prune.groups=2:4 --seed 7
  tinyfusion recipe recipes/quickstart.toml --resume")]
    Recipe(RecipeArguments),
    /// Write a shell's completions to standard output
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, clap::Args)]
struct RecipeArguments {
    /// The recipe's TOML file
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

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Recipe(arguments) => recipe(&arguments),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "tinyfusion", &mut io::stdout());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(RecipeError::Interrupted) => {
            eprintln!("{}", RecipeError::Interrupted);
            ExitCode::from(130)
        }
        Err(error) => {
            report(&error);
            ExitCode::from(2)
        }
    }
}

/// Prints an error with its causes, each once.
fn report(error: &dyn std::error::Error) {
    let mut text = error.to_string();
    eprintln!("error: {text}");
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            eprintln!("  because: {next}");
        }
        text = next;
        cause = error.source();
    }
}

fn recipe(arguments: &RecipeArguments) -> Result<(), RecipeError> {
    let path = &arguments.recipe;
    let text = std::fs::read_to_string(path).map_err(RecipeError::io(path))?;
    let mut document = Document::parse(path, &text)?;
    for assignment in &arguments.set {
        document.set(assignment);
    }
    let mut recipe = Recipe::from_document(&document)?;
    recipe.seed = arguments.seed.unwrap_or(recipe.seed);
    let backend = arguments.backend.or(recipe.backend).unwrap_or(BackendKind::Ndarray);
    recipe.backend = Some(backend);
    let plan = Plan::new(&recipe)?;
    if arguments.dry_run {
        print!("{plan}");
        return Ok(());
    }
    listen()?;
    let options = Options { runs: arguments.runs.clone(), resume: arguments.resume, backend, plain: arguments.plain };
    let directory = run(&plan, &options)?;
    println!("{}", directory.display());
    Ok(())
}

fn listen() -> Result<(), RecipeError> {
    interrupt::listen().map_err(|error| RecipeError::Run(format!("can't listen for signals: {error}")))
}
