//! Commands as recipes of one stage: a flag that is given overrides a key, so that defaults, ranges
//! and messages are the recipe's.

use std::path::{Path, PathBuf};

use serde::Serialize;
use toml::Value;

use super::error::CliError;
use super::how_to_go_on;
use super::weights::open;
use crate::backend::{BackendKind, Compute};
use crate::recipe::document::Document;
use crate::recipe::plan::Plan;
use crate::recipe::run::{Options, Resume, run};
use crate::recipe::schema::Recipe;
use crate::recipe::schema::source::Source;
use crate::sampling::Labels;
use crate::stop::Stop;
use crate::workers::Group;

/// A recipe of one stage that is being written by flags.
pub(super) struct OneStage {
    document: Document,
    /// The keys that flags have set, and those flags.
    flags: Vec<(String, String)>,
}

impl OneStage {
    /// A stage of this kind, all of whose keys have their defaults.
    pub(super) fn new(kind: &str) -> Result<Self, CliError> {
        let mut document = Document::parse(Path::new(kind), "")?;
        // What is wrong with the whole stage is then said of the command.
        document.set_by(kind, &format!("stage=[{{ kind = \"{kind}\" }}]"));
        Ok(Self {
            document,
            flags: Vec::new(),
        })
    }

    /// Sets a key of the stage to what `flag` was given.
    pub(super) fn set(&mut self, flag: &str, key: &str, value: impl Into<Value>) {
        self.set_above(flag, &format!("stage.0.{key}"), value);
    }

    /// Sets keys of the stage to the numbers that are given.
    pub(super) fn set_numbers<T: Into<Value>, const N: usize>(
        &mut self,
        numbers: [(&str, &str, Option<T>); N],
    ) {
        for (flag, key, number) in numbers {
            if let Some(number) = number {
                self.set(flag, key, number);
            }
        }
    }

    /// Sets a key of the recipe.
    pub(super) fn set_above(&mut self, flag: &str, key: &str, value: impl Into<Value>) {
        let value = value.into();
        let shown = match &value {
            Value::Boolean(_) => flag.to_owned(),
            Value::String(text) => format!("{flag} {text}"),
            value => format!("{flag} {value}"),
        };
        let assignment = format!("{key}={value}");
        let shown = shown.trim_start();
        if !flag.is_empty() {
            self.flags.push((key.to_owned(), shown.to_owned()));
        }
        self.document.set_by(shown, &assignment);
    }

    /// Sets the recipe's data to text as a recipe has it; a word needs no quotes.
    pub(super) fn set_data(&mut self, text: &str) {
        let assignment = format!("data={text}");
        self.document.set_by(&format!("--data {text}"), &assignment);
    }

    /// Sets a key of the stage to a file or folder.
    ///
    /// # Errors
    /// When its name is not Unicode, which TOML can't hold.
    pub(super) fn set_path(&mut self, flag: &str, key: &str, path: &Path) -> Result<(), CliError> {
        self.set(flag, key, unicode(path)?);
        Ok(())
    }

    /// Sets a key of the stage to a list of files or folders.
    ///
    /// # Errors
    /// As [`set_path`](Self::set_path).
    pub(super) fn set_paths(&mut self, key: &str, paths: &[PathBuf]) -> Result<(), CliError> {
        let names = paths.iter().map(|path| unicode(path));
        self.set("", key, names.collect::<Result<Vec<_>, _>>()?);
        Ok(())
    }

    /// Reads the recipe, and plans it.
    pub(super) fn plan(&self) -> Result<Plan, CliError> {
        Ok(Plan::new(&Recipe::from_document(&self.document)?)?)
    }
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@,=".contains(c);
    match text.chars().all(plain) {
        true => text,
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

/// Refuses a file that exists, or whose folder does not.
///
/// # Errors
/// Says which.
pub(super) fn refuse_file(path: &Path) -> Result<(), CliError> {
    let problem = |problem: &str| {
        let path = path.display();
        Err(CliError::Usage(format!("{path}: {problem}")))
    };
    if path.symlink_metadata().is_ok() {
        return problem("exists; nothing is overwritten, name another");
    }
    let folder = match path.parent() {
        Some(folder) if folder == Path::new("") => Path::new("."),
        Some(folder) => folder,
        None => Path::new("/"),
    };
    match folder.is_dir() {
        true => Ok(()),
        false => problem("its folder does not exist; make it first"),
    }
}

fn unicode(path: &Path) -> Result<String, CliError> {
    let name = path.to_str().map(str::to_owned);
    name.ok_or_else(|| CliError::Usage(format!("{}: its name is not Unicode", path.display())))
}

/// A value as TOML; those of this room can be written so.
pub(super) fn toml<T: Serialize>(value: &T) -> Result<Value, CliError> {
    Value::try_from(value).map_err(|error| CliError::Usage(error.to_string()))
}

/// A checkpoint as TOML: a table if it is a file, because a stage may have the file's name.
pub(super) fn source_value(source: &Source) -> Result<Value, CliError> {
    match (source, toml(source)?) {
        (Source::File(_), Value::String(path)) => Ok(Value::Table(
            [("path".to_owned(), Value::String(path))]
                .into_iter()
                .collect(),
        )),
        (_, value) => Ok(value),
    }
}

/// Settings of a run. Those that are not given have a recipe's defaults.
#[derive(Debug, clap::Args)]
pub(super) struct RunArguments {
    /// Where to compute
    #[arg(long, default_value = "ndarray")]
    pub(super) backend: BackendKind,
    /// Seed of all noise [default: 0]
    #[arg(long, allow_negative_numbers = true)]
    pub(super) seed: Option<i64>,
    /// Folder of all runs
    #[arg(long, value_name = "FOLDER", default_value = "artifacts/runs")]
    runs: PathBuf,
    /// Type of the models' matrix products
    #[arg(long, default_value = "f32")]
    pub(super) compute: Compute,
}

impl RunArguments {
    /// Sets the recipe's own keys.
    pub(super) fn put(&self, stage: &mut OneStage) -> Result<(), CliError> {
        stage.set_above("--backend", "backend", toml(&self.backend)?);
        stage.set_above("--compute", "compute", toml(&self.compute)?);
        if let Some(seed) = self.seed {
            stage.set_above("--seed", "seed", seed);
        }
        Ok(())
    }

    /// Runs a stage; returns its run directory, which is printed.
    pub(super) fn run(
        &self,
        stage: &OneStage,
        stop: Stop,
        workers: &Group,
    ) -> Result<PathBuf, CliError> {
        let options = Options {
            runs: self.runs.clone(),
            resume: Resume::No,
            backend: self.backend,
            plain: false,
            watch: false,
            stop,
            workers: workers.clone(),
        };
        let to_go_on = format!(
            "`tinyfusion recipe RUN/resolved.toml --resume --runs {}`, where RUN is the run directory",
            quoted(&self.runs)
        );
        let directory = how_to_go_on(run(&stage.plan()?, &options), &to_go_on)?;
        crate::tell!("{}", directory.display());
        Ok(directory)
    }
}

/// Settings of a sampling. Those that are not given have a recipe's defaults.
#[derive(Debug, clap::Args)]
pub(super) struct SamplingArguments {
    /// How many samples [default: 100; evaluate: 2000 of a model, all of an archive or folder]
    #[arg(long, allow_negative_numbers = true)]
    pub(super) count: Option<i64>,
    /// Samples made at once [default: 100]
    #[arg(long, allow_negative_numbers = true)]
    batch: Option<i64>,
    /// Sampling steps; of a MAR, those of each token [default: 250, or 100 of a MAR]
    #[arg(long, allow_negative_numbers = true)]
    steps: Option<i64>,
    /// Rule of a step: ddpm or ddim of a DiT, ode (Dormand-Prince) or sde (Euler-Maruyama) of a
    /// SiT, masked of a MAR [default: ddpm, ode or masked]
    #[arg(long)]
    solver: Option<String>,
    /// Share of noise in a DDIM step [default: 0]
    #[arg(long, allow_negative_numbers = true)]
    eta: Option<f64>,
    /// Scale of classifier-free guidance; 1 is none [default: 1.5]
    #[arg(long, allow_negative_numbers = true)]
    guidance: Option<f64>,
    /// Channels that are guided, from the first [default: 3]
    #[arg(long, allow_negative_numbers = true)]
    guidance_channels: Option<i64>,
    /// Classes to draw [default: all]
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    classes: Option<Vec<i64>>,
    /// Classes in turn (balanced) or at random (drawn) [default: balanced]
    #[arg(long, value_enum, hide_possible_values = true)]
    labels: Option<Labels>,
    /// Set another key of such a stage, as in a recipe: --set method=heun (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl SamplingArguments {
    /// Refuses settings of a drawing where nothing is drawn.
    ///
    /// # Errors
    /// Names those that are given.
    pub(super) fn refuse_drawing(&self) -> Result<(), CliError> {
        let given = [
            ("--batch", self.batch.is_some()),
            ("--steps", self.steps.is_some()),
            ("--solver", self.solver.is_some()),
            ("--eta", self.eta.is_some()),
            ("--guidance", self.guidance.is_some()),
            ("--guidance-channels", self.guidance_channels.is_some()),
            ("--classes", self.classes.is_some()),
            ("--labels", self.labels.is_some()),
        ];
        let given: Vec<&str> = (given.iter())
            .filter_map(|(flag, given)| given.then_some(*flag))
            .collect();
        match given.is_empty() {
            true => Ok(()),
            false => Err(CliError::Usage(format!(
                "{}: for models, which are sampled; archives and folders are measured as they are",
                given.join(", ")
            ))),
        }
    }

    /// Sets the stage's keys. Without a solver it is that of the process that `model` was trained
    /// under.
    pub(super) fn put(&self, stage: &mut OneStage, model: Option<&Source>) -> Result<(), CliError> {
        stage.set_numbers([
            ("--count", "count", self.count),
            ("--batch", "batch", self.batch),
            ("--steps", "steps", self.steps),
            (
                "--guidance-channels",
                "guidance_channels",
                self.guidance_channels,
            ),
        ]);
        stage.set_numbers([
            ("--eta", "eta", self.eta),
            ("--guidance", "guidance", self.guidance),
        ]);
        if let Some(classes) = &self.classes {
            stage.set("--classes", "classes", classes.clone());
        }
        if let Some(labels) = &self.labels {
            stage.set("--labels", "labels", toml(labels)?);
        }
        match &self.solver {
            Some(solver) => stage.set("--solver", "solver", solver.clone()),
            // A model that can't be read is reported when the stage is planned.
            None => {
                let process = model.and_then(|model| open(model).ok()?.process);
                let solver = process.map(|process| toml(&process.solver())).transpose()?;
                if let Some(solver) = solver.as_ref().and_then(|keys| keys.get("solver")) {
                    stage.set("", "solver", solver.clone());
                }
            }
        }
        for assignment in &self.set {
            let key = assignment.split('=').next().unwrap_or_default();
            let key = key.trim().trim_matches(['"', '\'']);
            if matches!(key, "kind" | "name") {
                return Err(CliError::Usage(format!(
                    "--set {assignment}: the command is a stage of its own kind and name"
                )));
            }
            let set = format!("--set {assignment}");
            let key = format!("stage.0.{key}");
            if let Some((_, flag)) = stage.flags.iter().find(|(by_flag, _)| *by_flag == key) {
                return Err(CliError::Usage(format!(
                    "{set}: {flag} sets the same key; leave one of them out"
                )));
            }
            let assignment = format!("stage.0.{assignment}");
            stage.document.set_by(&set, &assignment);
        }
        Ok(())
    }
}
