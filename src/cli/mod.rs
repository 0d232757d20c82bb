//! The command line.

mod bench;
mod duration;
mod error;
mod evaluate;
mod extract;
mod recipe;
mod report;
mod sample;
mod stage;
mod weights;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};

use crate::stop::{Stop, leave};
use crate::training::watch_panics;
use crate::workers::{Group, Workers, agree};
use bench::{BenchArguments, benchmark};
use duration::duration;
use error::CliError;
use evaluate::{EvaluateArguments, evaluate};
use extract::{ExtractArguments, extract};
use recipe::{RecipeArguments, recipe};
use report::{ReportArguments, RunsArguments, runs};
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
    /// Threads to compute on; they change no result [default: one for each core]
    #[arg(long, global = true, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// How long one of several workers waits for the others, such as 30m, before it ends them all
    /// and says what it waited for [default: for ever]
    #[arg(long, global = true, value_name = "TIME", value_parser = duration)]
    #[cfg_attr(not(feature = "mpi"), arg(hide = true))]
    patience: Option<Duration>,
    /// Sum gradients of several workers on their NVIDIA cards, by NCCL, in place of the host's
    /// memory by MPI; it has not run on any card yet
    #[arg(long, global = true)]
    #[cfg_attr(not(all(feature = "cuda", feature = "mpi")), arg(hide = true))]
    nccl: bool,
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
        after_help = "The ending of TO decides: .safetensors, .safetensors.index.json (several files), .pt, .pth,
.bin or .ckpt (PyTorch's), or none for a folder with weights, config.json and model card.

Examples:
  tinyfusion convert DiT-XL-2-256x256.pt DiT-XL-2-256x256.safetensors
  tinyfusion convert artifacts/runs/d14_1_2/001/02-recover/model.safetensors TinyDiT-D14 --diffusers --dtype bf16
  tinyfusion convert TinyDiT-D14 TinyDiT-D14.pt"
    )]
    Convert(ConvertArguments),
    /// Write the page of a run, of several side by side, or of a sweep
    #[command(
        after_help = "The page is one file, report.html, that asks for nothing from elsewhere; its tables and figures lie beside it in
report/. A recipe with an evaluate stage ends by writing its own.

Examples:
  tinyfusion report artifacts/runs/quickstart/001
  tinyfusion report artifacts/runs/quickstart/001 artifacts/runs/quickstart/002 --into both"
    )]
    Report(ReportArguments),
    /// List runs, or compare some
    #[command(after_help = "Examples:
  tinyfusion runs
  tinyfusion runs compare artifacts/runs/quickstart/001 artifacts/runs/quickstart/002")]
    Runs(RunsArguments),
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
        folder: std::path::PathBuf,
    },
    /// Write a shell's completions to standard output
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Runs the program.
pub fn main() -> ExitCode {
    watch_panics();
    let cli = Cli::try_parse();
    let (patience, nccl) = (cli.as_ref()).map_or((None, false), |cli| {
        // Who takes runs of a sweep waits for the others' at its end.
        let joins = matches!(&cli.command, Command::Recipe(arguments) if arguments.join);
        (cli.patience.filter(|_| !joins), cli.nccl)
    });
    let (workers, here) = match crate::workers::start(patience, nccl) {
        Ok(started) => started,
        Err(problem) => {
            if let Err(told) = &cli {
                return print(told);
            }
            crate::say!("error: {problem}");
            return ExitCode::from(2);
        }
    };
    crate::terminal::speak(workers.leads());
    let asked = match &cli {
        Ok(cli) => format!("{:?}", cli.command),
        Err(told) => told.to_string(),
    };
    if let Err(unlike) = agree(&*workers, "what is asked", asked.as_bytes()) {
        give_up(&*workers, &CliError::Usage(unlike));
    }
    let cli = match cli {
        Ok(cli) => cli,
        Err(told) if workers.leads() => return print(&told),
        Err(told) => return status(&told),
    };
    let result = start_threads(&cli, here).and_then(|()| obey(cli.command, &workers));
    if let (Err(error), true) = (&result, workers.size() > 1) {
        give_up(&*workers, error);
    }
    match result {
        Ok(()) if crate::terminal::all_told() => ExitCode::SUCCESS,
        Ok(()) => {
            crate::say!("error: standard output can't be written");
            ExitCode::from(2)
        }
        Err(error) if error.is_interrupted() => {
            crate::say!("{error}");
            ExitCode::from(130)
        }
        Err(error) => {
            tell_causes(&error);
            ExitCode::from(2)
        }
    }
}

/// Prints what is wrong with the arguments, or the help that they ask for.
fn print(told: &clap::Error) -> ExitCode {
    // Nobody is left to be told that it can't be printed.
    let _ = told.print();
    status(told)
}

fn status(told: &clap::Error) -> ExitCode {
    ExitCode::from(u8::try_from(told.exit_code()).unwrap_or(2))
}

/// How long the first worker waits for the others to tidy up. They wait longer: an error that all
/// met is told by the first one alone.
const A_MOMENT: Duration = Duration::from_secs(1);

/// Ends all workers after an error that one of them met.
fn give_up(workers: &dyn Workers, error: &CliError) -> ! {
    if error.is_interrupted() && !workers.leads() {
        // All stopped at one step; the first one ends the job once it has saved.
        workers.broadcast(Vec::new());
    }
    std::thread::sleep(match workers.leads() {
        true => A_MOMENT,
        false => 4 * A_MOMENT,
    });
    crate::terminal::speak(true);
    if !workers.leads() {
        crate::say!("worker {} of {}:", workers.rank(), workers.size());
    }
    if error.is_interrupted() {
        crate::say!("{error}");
        workers.abort(130);
    }
    tell_causes(error);
    workers.abort(2)
}

fn obey(command: Command, workers: &Group) -> Result<(), CliError> {
    let shared = match command {
        Command::Recipe(_) => "recipe",
        Command::Sample(_) => "sample",
        Command::Evaluate(_) => "evaluate",
        Command::Extract(_) => "extract",
        _ if workers.size() == 1 => "",
        _ => {
            return Err(CliError::Usage(format!(
                "{} processes were started, and only `recipe`, `sample`, `evaluate` and `extract` share their work; start this \
                 command once",
                workers.size()
            )));
        }
    };
    workers.at(shared.to_owned());
    match command {
        Command::Recipe(arguments) => recipe(&arguments, workers),
        Command::Sample(arguments) => sample(&arguments, workers),
        Command::Evaluate(arguments) => evaluate(&arguments, workers),
        Command::Extract(arguments) => extract(&arguments, workers),
        Command::Inspect(arguments) => inspect(&arguments),
        Command::Convert(arguments) => convert(&arguments),
        #[cfg(feature = "ndarray")]
        Command::Standin { folder } => Ok(crate::standin::make(&folder)?),
        Command::Report(arguments) => report::report(&arguments),
        Command::Runs(arguments) => runs(&arguments),
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

/// Starts the threads that compute, with an upper limit; `here` processes share the machine's
/// cores. Without this, rayon would panic at first use when threads can't be started.
fn start_threads(cli: &Cli, here: usize) -> Result<(), CliError> {
    // Commands that compute nothing.
    if let Command::Completions { .. }
    | Command::Inspect(_)
    | Command::Report(_)
    | Command::Runs(_) = &cli.command
    {
        return Ok(());
    }
    let asked = || std::env::var("RAYON_NUM_THREADS").ok()?.parse().ok();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    // 0 means one thread per core for rayon.
    let usual = if here > 1 { (cores / here).max(1) } else { 0 };
    let count = (cli.threads.map(|threads| threads as usize))
        .or_else(asked)
        .unwrap_or(usual)
        .min(MOST_THREADS);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(count);
    pool.build_global().map_err(|error| {
        let count = match count {
            0 => "a thread for each core".to_owned(),
            count => format!("{count} threads"),
        };
        CliError::Usage(format!(
            "{count} can't be had ({error}); ask for fewer by `--threads` or RAYON_NUM_THREADS, or free some of this \
             user's processes"
        ))
    })?;
    #[cfg(feature = "torch")]
    crate::ops::torch::set_threads(rayon::current_num_threads());
    Ok(())
}

/// Prints an error with its causes, without repetitions.
fn tell_causes(error: &dyn std::error::Error) {
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

/// Adds the command that continues an interrupted one to the messages.
fn how_to_go_on<T>(result: Result<T, impl Into<CliError>>, command: &str) -> Result<T, CliError> {
    result.map_err(Into::into).inspect_err(|error| {
        if error.is_interrupted() {
            crate::say!("to go on: {command}");
        }
    })
}

/// Refuses a type of products that the backend lacks; says so where it has them and is not faster.
fn supports<B: crate::ops::FusedOps>(
    compute: crate::backend::Compute,
    device: &B::Device,
) -> Result<(), CliError> {
    let note = crate::ops::supports::<B>(compute, device).map_err(CliError::Usage)?;
    if let Some(note) = note {
        crate::say!("note: {note}");
    }
    Ok(())
}

/// The stop that Ctrl-C, SIGTERM, SIGUSR1 and the end of the terminal request; a second one of the
/// first two ends the program at once. Under `nohup` the terminal may end.
fn listen() -> Result<Stop, CliError> {
    let stop = Stop::default();
    let requested = stop.clone();
    let refused = |error: &dyn std::fmt::Display| {
        CliError::Usage(format!("can't listen for signals: {error}"))
    };
    #[cfg(unix)]
    let stays = hangup::is_ignored();
    ctrlc::set_handler(move || {
        // Of several workers the first one stops, and with it all.
        if !crate::terminal::speaks() {
            return;
        }
        if requested.insist() {
            leave();
        }
        crate::say!("stopping after this step; once more to stop at once");
    })
    .map_err(|error| refused(&error))?;
    #[cfg(unix)]
    {
        if stays {
            hangup::ignore();
        }
        use signal_hook::{consts::SIGUSR1, iterator::Signals};
        let mut signals = Signals::new([SIGUSR1]).map_err(|error| refused(&error))?;
        let requested = stop.clone();
        std::thread::spawn(move || {
            for _ in signals.forever() {
                if crate::terminal::speaks() && !requested.request() {
                    crate::say!("stopping after this step");
                }
            }
        });
    }
    Ok(stop)
}

/// SIGHUP, which ctrlc handles as it does SIGTERM.
#[cfg(unix)]
mod hangup {
    /// Whether it is ignored, as `nohup` has it.
    pub(super) fn is_ignored() -> bool {
        // SAFETY: an action of zeros is one, and the call only writes the present one to it.
        let action = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(libc::SIGHUP, std::ptr::null(), &raw mut action);
            action
        };
        action.sa_sigaction == libc::SIG_IGN
    }

    pub(super) fn ignore() {
        // SAFETY: to ignore a signal calls nothing.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
    }
}
