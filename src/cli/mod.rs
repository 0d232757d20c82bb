//! The command line.

mod bench;
mod evaluate;
mod extract;
mod sample;
mod weights;

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::backend::{BackendKind, Compute};
use crate::process::ProcessKind;
use crate::recipe::document::{Document, MOST_BYTES};
use crate::recipe::plan::Plan;
use crate::recipe::run::models::read_file;
use crate::recipe::run::seeds::Verdicts;
use crate::recipe::run::{Options, run};
use crate::recipe::schema::data::Data;
use crate::recipe::schema::source::Source;
use crate::recipe::schema::{Recipe, Stage, StageKind};
use crate::recipe::{RecipeError, embedded_recipes};
use crate::sampling::{Labels, Sampling};
use crate::stop::{Stop, leave};
use crate::training::watch_panics;
use crate::weights::{Checkpoint, EmbeddedName, embedded};
use bench::{BenchArguments, benchmark};
use evaluate::{EvaluateArguments, evaluate};
use extract::{ExtractArguments, extract};
use sample::{SampleArguments, sample};
use weights::{ConvertArguments, InspectArguments, convert, inspect};

/// Learns which layers of a diffusion transformer to drop, heals what is left, and proves how good
/// the result is.
#[derive(Debug, Parser)]
#[command(
    name = "tinyfusion",
    version,
    max_term_width = 110,
    after_help = "Exit status: 0 done, 2 an error, 130 interrupted (a training saves a checkpoint first)."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a recipe, or go on with an interrupted run
    #[command(after_help = "Examples:
  tinyfusion recipe quickstart
  tinyfusion recipe recipes/quickstart.toml --dry-run
  tinyfusion recipe recipes/quickstart.toml --set stage.prune.groups=2:4 --seed 7
  tinyfusion recipe recipes/quickstart.toml --resume")]
    Recipe(RecipeArguments),
    /// Draw samples from a checkpoint, as a picture and an npz archive
    #[command(after_help = "Examples:
  tinyfusion sample embedded:digits-teacher --count 100 --steps 50 --images pictures
  tinyfusion sample artifacts/runs/quickstart/001/02-learned/model.safetensors --classes 3,8 --guidance 2 --solver ddim")]
    Sample(SampleArguments),
    /// Measure samples against a reference batch, as ADM's evaluation does, or models of pixels
    /// side by side
    #[command(
        after_help = "Samples are .npz archives of 8-bit images, or folders of PNG and JPEG pictures of one size, in the folder itself or in
one folder for each class. The last one is the reference; it may also be an archive of statistics (mu, sigma, and for
sFID mu_s, sigma_s), which must have been measured by the protocol of ADM's evaluation: those of another, such as
pytorch-fid's, are not comparable. A folder with config.json or weights is a checkpoint. Models are sampled, and
measured against the held-out pictures of --data in the features of a classifier of such pictures.

FID depends on the number of samples: archives of unlike numbers are refused unless --count says how many are measured.

Examples:
  tinyfusion evaluate samples.npz VIRTUAL_imagenet256_labeled.npz --inception pt_inception-2015-12-05-6726825d.pth
  tinyfusion evaluate samples.npz VIRTUAL_imagenet256_labeled.npz --distances f16
  tinyfusion evaluate ours.npz theirs pictures-of-reference --count 10000 --cache artifacts/cache
  tinyfusion evaluate embedded:digits-teacher artifacts/runs/quickstart/001/02-learned/model.safetensors
  tinyfusion evaluate model.safetensors --data '{ images = \"flowers\", size = 32 }' --features classifier.safetensors"
    )]
    Evaluate(EvaluateArguments),
    /// Turn a folder of images into the latents that training reads
    #[command(
        after_help = "The folder of images has one folder for each class, numbered in sorted order; a flat folder is one class.
Started again with the same arguments, it goes on where it stopped.

Examples:
  tinyfusion extract ILSVRC2012_img_train artifacts/data/imagenet256 --vae sd-vae-ft-mse --backend cuda --batch 64
  tinyfusion extract images latents --vae vae --size 64 --form npy"
    )]
    Extract(ExtractArguments),
    /// Say what a checkpoint holds: architecture, depth, parameters, kept layers, provenance
    #[command(after_help = "Examples:
  tinyfusion inspect DiT-XL-2-256x256.pt
  tinyfusion inspect embedded:digits-teacher --json")]
    Inspect(InspectArguments),
    /// Write a checkpoint in another form: one file or several, PyTorch's, or a folder in the
    /// layout of diffusers
    #[command(
        after_help = "The ending of TO decides: .safetensors, .safetensors.index.json (several files), .pt, or
none for a folder with weights, config.json and model card.

Examples:
  tinyfusion convert DiT-XL-2-256x256.pt DiT-XL-2-256x256.safetensors
  tinyfusion convert artifacts/runs/d14_1_2/001/02-recover/model.safetensors TinyDiT-D14 --diffusers --dtype bf16
  tinyfusion convert TinyDiT-D14 TinyDiT-D14.pt"
    )]
    Convert(ConvertArguments),
    /// Time a workload on random weights
    #[command(after_help = "Examples:
  tinyfusion bench
  tinyfusion bench --workload finetune --model DiT-S/2 --batch 4 --repeats 10
  tinyfusion bench --workload infer --model DiT-XL/2 --depth 14 --backend cuda --json")]
    Bench(BenchArguments),
    /// Make small random stand-ins for the public files, to try the paper's job without a download
    #[cfg(feature = "ndarray")]
    #[command(after_help = "Example:
  tinyfusion standin artifacts/standin
  tinyfusion recipe recipes/standin.toml")]
    Standin {
        /// The folder to write, new or empty
        folder: PathBuf,
    },
    /// Write a shell's completions to standard output
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, clap::Args)]
struct RecipeArguments {
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

#[derive(Debug, clap::Args)]
struct RunArguments {
    /// Where to compute
    #[arg(long, default_value = "ndarray")]
    backend: BackendKind,
    /// Seed of all noise
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..1 << 63))]
    seed: u64,
    /// Folder of all runs
    #[arg(long, value_name = "FOLDER", default_value = "artifacts/runs")]
    runs: PathBuf,
    /// How many samples [default: 100; evaluate: 2000 of a model, all of an archive or folder]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    count: Option<u32>,
    /// Samples made at once
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: u32,
    /// Sampling steps [default: 100; with --demo 250]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    steps: Option<u32>,
    /// Rule of a step: ddpm or ddim of a DiT, ode (Dormand-Prince) or sde (Euler-Maruyama) of a SiT
    /// [default: ddpm or ode]
    #[arg(long, value_parser = ["ddpm", "ddim", "ode", "sde"], hide_possible_values = true)]
    solver: Option<String>,
    /// Share of noise in a DDIM step
    #[arg(long, default_value_t = 0.0)]
    eta: f64,
    /// Scale of classifier-free guidance; 1 is none
    #[arg(long, default_value_t = 1.5)]
    guidance: f64,
    /// Channels that are guided, from the first
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1024))]
    guidance_channels: u32,
    /// Classes to draw; by default all
    #[arg(long, value_delimiter = ',')]
    classes: Option<Vec<usize>>,
    /// Classes in turn (balanced) or at random (drawn)
    #[arg(long, value_enum, default_value_t = Labels::Balanced, hide_possible_values = true)]
    labels: Labels,
    /// Type of the models' matrix products
    #[arg(long, default_value = "f32")]
    compute: Compute,
}

/// Runs the program.
pub fn main() -> ExitCode {
    watch_panics();
    let cli = Cli::parse();
    let result = start_threads(&cli.command).and_then(|()| obey(cli.command));
    match result {
        Ok(()) if crate::terminal::all_told() => ExitCode::SUCCESS,
        Ok(()) => {
            crate::say!("error: standard output can't be written");
            ExitCode::from(2)
        }
        Err(RecipeError::Interrupted) => {
            crate::say!("{}", RecipeError::Interrupted);
            ExitCode::from(130)
        }
        Err(error) => {
            report(&error);
            ExitCode::from(2)
        }
    }
}

fn obey(command: Command) -> Result<(), RecipeError> {
    match command {
        Command::Recipe(arguments) => recipe(&arguments),
        Command::Sample(arguments) => sample(&arguments),
        Command::Evaluate(arguments) => evaluate(&arguments),
        Command::Extract(arguments) => extract(&arguments),
        Command::Inspect(arguments) => inspect(&arguments),
        Command::Convert(arguments) => convert(&arguments),
        #[cfg(feature = "ndarray")]
        Command::Standin { folder } => crate::standin::make(&folder),
        Command::Bench(arguments) => benchmark(&arguments),
        Command::Completions { shell } => {
            // Into memory first: the generator panics when writing fails.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tinyfusion", &mut script);
            crate::terminal::told(io::stdout().write_all(&script));
            Ok(())
        }
    }
}

/// Most threads that can be requested: more take minutes to start.
const MOST_THREADS: usize = 1024;

/// Starts the worker threads, with an upper limit. Without this, rayon would panic at first use
/// when threads can't be started.
fn start_threads(command: &Command) -> Result<(), RecipeError> {
    let stated = match command {
        // Commands that compute nothing.
        Command::Completions { .. } | Command::Inspect(_) => return Ok(()),
        Command::Bench(arguments) => arguments.threads(),
        _ => None,
    };
    let asked = || std::env::var("RAYON_NUM_THREADS").ok()?.parse().ok();
    // 0 means one thread per core for rayon.
    let count = stated.or_else(asked).unwrap_or(0).min(MOST_THREADS);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(count);
    pool.build_global().map_err(|error| {
        let count = match count {
            0 => "a thread for each core".to_owned(),
            count => format!("{count} threads"),
        };
        RecipeError::Run(format!(
            "{count} can't be had ({error}); ask for fewer by RAYON_NUM_THREADS or `bench --threads`, or free some of this \
             user's processes"
        ))
    })
}

/// Prints an error with its causes, without repetitions.
fn report(error: &dyn std::error::Error) {
    let mut text = error.to_string();
    crate::say!("error: {text}");
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            crate::say!("  because: {next}");
        }
        text = next;
        cause = error.source();
    }
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

fn recipe(arguments: &RecipeArguments) -> Result<(), RecipeError> {
    let path = &arguments.recipe;
    let text = match read_recipe(path) {
        Ok(text) => text,
        // A single word may name an embedded recipe.
        Err(error) => match path.to_str().and_then(embedded_recipes::recipe) {
            Some(text) => text.to_owned(),
            None => return Err(RecipeError::io(path)(error)),
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
        return Err(RecipeError::Run(format!(
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

/// A checkpoint named on the command line.
fn source(name: &str) -> Result<Source, RecipeError> {
    if let Some(embedded) = EmbeddedName::ALL
        .into_iter()
        .find(|embedded| embedded.as_str() == name)
    {
        return Ok(Source::Embedded(embedded));
    }
    let path = PathBuf::from(name);
    if path.exists() {
        return Ok(Source::File(path.into()));
    }
    let embedded: Vec<&str> = EmbeddedName::ALL
        .into_iter()
        .map(EmbeddedName::as_str)
        .collect();
    Err(RecipeError::Run(format!(
        "{name}: no such file; embedded are {}",
        embedded.join(" and ")
    )))
}

impl RunArguments {
    /// Settings of a model's sampling; `count` samples and a solver that fits the model by default.
    fn sampling(&self, count: u32, model: Option<&Source>) -> Result<Sampling, RecipeError> {
        if !(self.guidance >= 1.0 && self.guidance.is_finite()) {
            return Err(RecipeError::Run(format!(
                "--guidance {} must be at least 1",
                self.guidance
            )));
        }
        if !(0.0..=1.0).contains(&self.eta) {
            return Err(RecipeError::Run(format!(
                "--eta {} must lie in 0..=1",
                self.eta
            )));
        }
        Ok(Sampling {
            count: self.count.unwrap_or(count) as usize,
            batch: self.batch as usize,
            classes: self.classes.clone(),
            labels: self.labels,
            guidance: self.guidance,
            guidance_channels: self.guidance_channels as usize,
            solver: match self.solver.as_deref() {
                Some(name) => ProcessKind::solver_named(name, self.eta)
                    .unwrap_or_else(|| ProcessKind::ASSUMED.solver()),
                // A model that can't be read is told of when it is planned with.
                None => (model.and_then(|model| open(model).ok()?.process))
                    .unwrap_or(ProcessKind::ASSUMED)
                    .solver(),
            },
            steps: self.steps.unwrap_or(100) as usize,
        })
    }

    /// Runs a recipe of one stage; returns its run directory, which is printed.
    fn run(
        &self,
        name: &str,
        kind: StageKind,
        data: Data,
        stop: Stop,
    ) -> Result<PathBuf, RecipeError> {
        let plan = plan_one(name, self, kind, data)?;
        let options = Options {
            runs: self.runs.clone(),
            resume: false,
            backend: self.backend,
            plain: false,
            stop,
        };
        let to_go_on = format!(
            "`tinyfusion recipe RUN/resolved.toml --resume --runs {}`, where RUN is the run directory",
            self.runs.display()
        );
        let directory = how_to_go_on(run(&plan, &options), &to_go_on)?;
        crate::tell!("{}", directory.display());
        Ok(directory)
    }
}

/// Adds the command that continues an interrupted one to the messages.
fn how_to_go_on<T>(result: Result<T, RecipeError>, command: &str) -> Result<T, RecipeError> {
    result.inspect_err(|error| {
        if matches!(error, RecipeError::Interrupted) {
            crate::say!("to go on: {command}");
        }
    })
}

/// Plans a recipe of one stage.
fn plan_one(
    name: &str,
    run: &RunArguments,
    kind: StageKind,
    data: Data,
) -> Result<Plan, RecipeError> {
    let stage = Stage {
        name: name.to_owned(),
        kind,
    };
    Plan::new(&Recipe {
        name: name.to_owned(),
        seed: run.seed,
        backend: Some(run.backend),
        compute: run.compute,
        heads: None,
        data,
        stages: vec![stage],
    })
}

/// Opens a checkpoint that is not a stage's.
fn open(source: &Source) -> Result<Checkpoint, RecipeError> {
    match source {
        Source::Embedded(name) => Ok(embedded::checkpoint(*name)?),
        Source::File(file) => Ok(read_file(file, None)?),
        Source::Stage(name) => Err(RecipeError::Run(format!("{name}: not a file"))),
    }
}

/// The stop that Ctrl-C and SIGTERM request; a second signal ends the program at once.
fn listen() -> Result<Stop, RecipeError> {
    let stop = Stop::default();
    let requested = stop.clone();
    ctrlc::set_handler(move || {
        if requested.request() {
            leave();
        }
        crate::say!("stopping after this step; once more to stop at once");
    })
    .map_err(|error| RecipeError::Run(format!("can't listen for signals: {error}")))?;
    Ok(stop)
}
