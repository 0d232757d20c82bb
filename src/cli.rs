//! The command line.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::backend::BackendKind;
use crate::bench::{self, BenchPlan, Workload};
use crate::evaluation::DEFAULT_NEIGHBOURS;
use crate::interrupt;
use crate::models::zoo;
use crate::process::Solver;
use crate::recipe::document::Document;
use crate::recipe::plan::{Plan, thousands};
use crate::recipe::run::{Options, run};
use crate::recipe::sampling::{Evaluate, Sample, Sampling};
use crate::recipe::schema::{Data, Recipe, Stage, StageKind};
use crate::recipe::seeds::Verdicts;
use crate::recipe::source::{EmbeddedName, Source};
use crate::recipe::{RecipeError, embedded};
use crate::weights::{Checkpoint, Provenance};

/// Learns which layers of a diffusion transformer to drop, heals what is left, and proves how good the result is.
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
  tinyfusion recipe recipes/quickstart.toml
  tinyfusion recipe recipes/quickstart.toml --dry-run
  tinyfusion recipe recipes/quickstart.toml --set stage.prune.groups=2:4 --seed 7
  tinyfusion recipe recipes/quickstart.toml --resume")]
    Recipe(RecipeArguments),
    /// Draw samples from a checkpoint, as a picture and an npz archive
    #[command(after_help = "Examples:
  tinyfusion sample embedded:digits-teacher --count 100 --steps 50
  tinyfusion sample artifacts/runs/quickstart/001/02-recover/model.safetensors --classes 3,8 --guidance 2 --solver ddim")]
    Sample(SampleArguments),
    /// Measure checkpoints side by side
    #[command(after_help = "Example:
  tinyfusion evaluate embedded:digits-teacher artifacts/runs/quickstart/001/02-recover/model.safetensors")]
    Evaluate(EvaluateArguments),
    /// Say what a checkpoint holds: architecture, depth, parameters, kept layers, provenance
    #[command(after_help = "Examples:
  tinyfusion inspect DiT-XL-2-256x256.pt
  tinyfusion inspect embedded:digits-teacher --json")]
    Inspect {
        /// A .safetensors, .safetensors.index.json, .pt or .pth file, or an embedded checkpoint
        checkpoint: String,
        /// As one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Time a workload on random weights
    #[command(after_help = "Examples:
  tinyfusion bench
  tinyfusion bench --workload finetune --model DiT-S/2 --batch 4 --repeats 10
  tinyfusion bench --workload infer --model DiT-XL/2 --depth 14 --backend cuda --json")]
    Bench(BenchArguments),
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
    /// How many samples
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    count: u32,
    /// Samples made at once
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: u32,
    /// Sampling steps
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    steps: u32,
    /// Rule of a step
    #[arg(long, default_value = "ddpm", value_parser = ["ddpm", "ddim"])]
    solver: String,
    /// Share of noise in a DDIM step
    #[arg(long, default_value_t = 0.0)]
    eta: f64,
    /// Scale of classifier-free guidance; 1 is none
    #[arg(long, default_value_t = 1.5)]
    guidance: f64,
    /// Channels that are guided, from the first
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1024))]
    guidance_channels: u32,
    /// Classes to draw, in turn; by default all
    #[arg(long, value_delimiter = ',')]
    classes: Option<Vec<usize>>,
}

#[derive(Debug, clap::Args)]
struct SampleArguments {
    /// A .safetensors, .safetensors.index.json, .pt or .pth file, or an embedded checkpoint
    checkpoint: String,
    #[command(flatten)]
    run: RunArguments,
}

#[derive(Debug, clap::Args)]
struct EvaluateArguments {
    /// .safetensors, .safetensors.index.json, .pt or .pth files, or embedded checkpoints
    #[arg(required = true)]
    checkpoints: Vec<String>,
    /// The classifier whose features are compared
    #[arg(long, default_value = "embedded:digits-features")]
    features: String,
    #[command(flatten)]
    run: RunArguments,
}

#[derive(Debug, clap::Args)]
struct BenchArguments {
    /// What to time
    #[arg(long, default_value = "infer")]
    workload: Workload,
    /// `digits`, or a published model such as DiT-S/2
    #[arg(long, default_value = "digits")]
    model: String,
    /// Layers, instead of the model's
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    depth: Option<u32>,
    /// Width, instead of the model's
    #[arg(long, value_parser = clap::value_parser!(u32).range(4..=65_536))]
    width: Option<u32>,
    /// Attention heads, instead of the model's
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    heads: Option<u32>,
    /// Tokens, a square number, instead of the model's
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    tokens: Option<u32>,
    /// Samples of a batch
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: u32,
    /// Where to compute
    #[arg(long, default_value = "ndarray")]
    backend: BackendKind,
    /// Type of matrix products
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
    compute: String,
    /// Threads of the CPU backend [default: one a core]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    threads: Option<u32>,
    /// Runs before timing
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Timed runs
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    repeats: u32,
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the program.
pub fn main() -> ExitCode {
    interrupt::watch_panics();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Recipe(arguments) => recipe(&arguments),
        Command::Sample(arguments) => sample(&arguments),
        Command::Evaluate(arguments) => evaluate(&arguments),
        Command::Inspect { checkpoint, json } => inspect(&checkpoint, json),
        Command::Bench(arguments) => benchmark(&arguments),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "tinyfusion", &mut io::stdout());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
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

/// Prints an error with its causes, each once.
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

fn recipe(arguments: &RecipeArguments) -> Result<(), RecipeError> {
    let path = &arguments.recipe;
    let text = std::fs::read_to_string(path).map_err(RecipeError::io(path))?;
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
    listen()?;
    let options = Options {
        runs: arguments.runs.clone(),
        resume: arguments.resume,
        backend,
        plain: arguments.plain,
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
        let directory = run(&plan, &options)?;
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
    if path.is_file() {
        return Ok(Source::Path(path));
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
    fn sampling(&self) -> Result<Sampling, RecipeError> {
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
            count: self.count as usize,
            batch: self.batch as usize,
            classes: self.classes.clone(),
            guidance: self.guidance,
            guidance_channels: self.guidance_channels as usize,
            solver: if self.solver == "ddim" {
                Solver::Ddim { eta: self.eta }
            } else {
                Solver::Ddpm
            },
            steps: self.steps as usize,
        })
    }

    /// Runs a recipe of one stage.
    fn run(&self, name: &str, kind: StageKind) -> Result<(), RecipeError> {
        let recipe = Recipe {
            name: name.to_owned(),
            seed: self.seed,
            backend: Some(self.backend),
            data: Data::Digits,
            stages: vec![Stage {
                name: name.to_owned(),
                kind,
            }],
        };
        let plan = Plan::new(&recipe)?;
        listen()?;
        let directory = run(
            &plan,
            &Options {
                runs: self.runs.clone(),
                resume: false,
                backend: self.backend,
                plain: false,
            },
        )?;
        crate::tell!("{}", directory.display());
        Ok(())
    }
}

fn sample(arguments: &SampleArguments) -> Result<(), RecipeError> {
    let kind = StageKind::Sample(Sample {
        from: source(&arguments.checkpoint)?,
        sampling: arguments.run.sampling()?,
    });
    arguments.run.run("sample", kind)
}

fn evaluate(arguments: &EvaluateArguments) -> Result<(), RecipeError> {
    let compare = arguments
        .checkpoints
        .iter()
        .map(|name| source(name))
        .collect::<Result<_, _>>()?;
    let kind = StageKind::Evaluate(Evaluate {
        compare,
        features: source(&arguments.features)?,
        neighbours: DEFAULT_NEIGHBOURS,
        sampling: arguments.run.sampling()?,
    });
    arguments.run.run("evaluate", kind)
}

fn inspect(name: &str, json: bool) -> Result<(), RecipeError> {
    let checkpoint = match source(name)? {
        Source::Embedded(name) => embedded::checkpoint(name)?,
        Source::Path(path) => Checkpoint::read(&path)?,
        Source::Stage(_) => return Err(RecipeError::Run(format!("{name}: not a file"))),
    };
    let parameters: usize = checkpoint
        .state
        .values()
        .map(|array| array.data.len())
        .sum();
    let Checkpoint {
        architecture,
        provenance,
        ..
    } = &checkpoint;
    if json {
        let value = serde_json::json!({ "file": name, "architecture": architecture, "parameters": parameters, "weights_sha256": checkpoint.fingerprint(), "provenance": provenance });
        crate::tell!("{value:#}");
        return Ok(());
    }
    crate::tell!(
        "{name}\n  model       {architecture}\n  parameters  {} in {} tensors\n  sha-256     {}",
        thousands(parameters),
        checkpoint.state.len(),
        checkpoint.fingerprint()
    );
    if *provenance == Provenance::default() {
        crate::tell!("  provenance  not stated (a file of another program)");
        return Ok(());
    }
    crate::tell!(
        "  made by     recipe {}, stage {}, seed {}, {} steps, {} images",
        provenance.recipe,
        provenance.stage,
        provenance.seed,
        thousands(provenance.steps),
        thousands(provenance.images)
    );
    if let (Some(kept), Some(depth)) = (&provenance.kept, provenance.parent_depth) {
        crate::tell!("  kept        {kept:?} of {depth} layers");
    }
    if let Some(parent) = &provenance.parent {
        crate::tell!("  parent      {parent}");
    }
    if !provenance.note.is_empty() {
        crate::tell!("  note        {}", provenance.note);
    }
    Ok(())
}

fn benchmark(arguments: &BenchArguments) -> Result<(), RecipeError> {
    let usage = |problem: String| RecipeError::Run(problem);
    if let Some(problem) = arguments.backend.missing() {
        return Err(usage(problem));
    }
    if arguments.compute != "f32" {
        return Err(usage(format!(
            "--compute {} is not there yet; all products are f32",
            arguments.compute
        )));
    }
    let mut model = bench::model(&arguments.model).ok_or_else(|| {
        let names: Vec<&str> = zoo::PRESETS.iter().map(|preset| preset.name).collect();
        usage(format!(
            "no model is called `{}`; there are digits, {}",
            arguments.model,
            names.join(", ")
        ))
    })?;
    let set = |field: &mut usize, value: Option<u32>| {
        *field = value.map_or(*field, |value| value as usize)
    };
    set(&mut model.depth, arguments.depth);
    set(&mut model.width, arguments.width);
    set(&mut model.heads, arguments.heads);
    if let Some(tokens) = arguments.tokens {
        let side = (tokens as usize).isqrt();
        if side * side != tokens as usize {
            return Err(usage(format!("--tokens {tokens} is not a square number")));
        }
        model.input_size = side * model.patch_size;
    }
    if let Some(problem) = model.problem() {
        return Err(usage(problem));
    }
    if arguments.workload == Workload::Prune && model.depth % 2 == 1 {
        return Err(usage(format!(
            "the prune workload has groups 1:2, and {} layers are no pairs",
            model.depth
        )));
    }
    if arguments.workload == Workload::MaskedKd && model.depth < 2 {
        return Err(usage(
            "the masked-kd workload keeps every other layer of at least 2".into(),
        ));
    }
    if let Some(threads) = arguments.threads {
        // Fails only if the pool is already there, and nothing has run yet. The kernels are as many.
        let _ = rayon::ThreadPoolBuilder::new()
            .num_threads(threads as usize)
            .build_global();
    }
    let plan = BenchPlan {
        workload: arguments.workload,
        model,
        batch: arguments.batch as usize,
        warmup: arguments.warmup,
        repeats: arguments.repeats as usize,
    };
    let measured = crate::with_backend!(arguments.backend, B, device => Some(bench::bench::<B>(&plan, device)), else None);
    let Some(measured) = measured else {
        return Ok(());
    };
    if arguments.json {
        crate::tell!(
            "{}",
            serde_json::to_string(&measured).map_err(|error| usage(error.to_string()))?
        );
        return Ok(());
    }
    let memory = measured
        .peak_memory_mib
        .map_or("unknown".into(), |mib| format!("{mib:.0} MiB"));
    crate::tell!(
        "{}\nbatch {}, backend {}, {} threads",
        measured.model,
        measured.batch,
        measured.backend,
        measured.threads
    );
    crate::tell!(
        "{:?}: median {:.2} ms (± {:.2}) of {}, {:.1} images/s, peak memory {memory}",
        measured.workload,
        measured.median_ms,
        measured.spread_ms,
        measured.runs_ms.len(),
        measured.images_per_second
    );
    Ok(())
}

fn listen() -> Result<(), RecipeError> {
    interrupt::listen()
        .map_err(|error| RecipeError::Run(format!("can't listen for signals: {error}")))
}
