//! What runs have left, read from their folders, and the page that shows it.

mod beside;
mod figures;
mod page;
mod sweep_page;
mod verdicts;
mod words;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::RecipeError;
use super::run::DONE;
use super::run::directory::{EVALUATION, RESOLVED, Status, read_status};
use super::run::models::MODEL;
use crate::report::{Grid, brief};
use crate::weights::{Checkpoint, Provenance};

pub use page::write_page;
pub use sweep_page::write_sweep;
pub use verdicts::Verdicts;

/// File of the page, in a run's folder.
pub const PAGE: &str = "report.html";

/// What a run has left so far.
#[derive(Debug)]
pub struct Results {
    /// Its folder.
    pub path: PathBuf,
    /// The recipe's name, and the run's number.
    pub name: String,
    /// How it stands.
    pub status: Option<Status>,
    /// The program, device and arguments.
    pub environment: Value,
    /// The recipe, nothing left implicit.
    pub recipe: String,
    /// Its stages, as far as they were begun.
    pub stages: Vec<StageResults>,
}

/// What a stage has left so far.
#[derive(Debug)]
pub struct StageResults {
    /// Its name.
    pub name: String,
    /// Kind and method, once it is finished.
    pub what: Option<String>,
    /// Seconds it took, once it is finished.
    pub seconds: Option<f64>,
    /// Its folder.
    pub folder: PathBuf,
    /// Its scores with their protocol, of a stage that evaluates.
    pub evaluation: Option<Value>,
    /// Where its model comes from, of a stage that makes one.
    pub provenance: Option<Provenance>,
}

impl Results {
    /// Reads a run's folder.
    ///
    /// # Errors
    /// When it is none, or a file of it can't be read or is not what it should be.
    pub fn read(path: &Path) -> Result<Self, RecipeError> {
        let recipe = path.join(RESOLVED);
        let recipe = std::fs::read_to_string(&recipe).map_err(|error| {
            match error.kind() {
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
                    RecipeError::Run(format!(
                        "{}: no run; a run's folder has a {RESOLVED}, such as artifacts/runs/quickstart/001",
                        path.display()
                    ))
                }
                _ => RecipeError::io(&recipe)(error),
            }
        })?;
        let mut folders: Vec<PathBuf> = std::fs::read_dir(path)
            .map_err(RecipeError::io(path))?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.is_dir())
            .collect();
        folders.sort();
        let mut stages = Vec::new();
        for folder in folders {
            stages.extend(StageResults::read(folder)?);
        }
        Ok(Self {
            path: path.to_owned(),
            name: run_name(path),
            status: read_status(path),
            environment: json(&path.join("environment.json"))?.unwrap_or(Value::Null),
            recipe,
            stages,
        })
    }

    /// The scores and protocol of the last stage that evaluated, with the scores of earlier ones by
    /// the same protocol before them. Of a model that was measured again the last score counts.
    pub fn evaluation(&self) -> Option<Value> {
        let mut all: Vec<&Value> = (self.stages.iter())
            .filter_map(|stage| stage.evaluation.as_ref())
            .collect();
        let last = *all.last()?;
        all.retain(|one| unlike(&one["protocol"], &last["protocol"]).is_empty());
        let mut joined: Vec<Value> = Vec::new();
        for verdict in (all.iter()).flat_map(|one| one["verdicts"].as_array().into_iter().flatten())
        {
            match joined
                .iter_mut()
                .find(|known| known["model"] == verdict["model"])
            {
                Some(known) => *known = verdict.clone(),
                None => joined.push(verdict.clone()),
            }
        }
        let mut evaluation = last.clone();
        if evaluation.is_object() {
            evaluation["verdicts"] = joined.into();
        }
        Some(evaluation)
    }

    /// How long its stages took, or it as a whole where it has none of its own, as a sweep.
    pub fn worked(&self) -> Option<String> {
        let stages: f64 = self.stages.iter().filter_map(|stage| stage.seconds).sum();
        let seconds = match self.stages.is_empty() {
            true => self.status.as_ref()?.seconds,
            false => stages,
        };
        spent(seconds).filter(|_| seconds > 0.0)
    }

    /// The model of the lowest FID among those that the run made, or among all if it made none that
    /// was measured, and that FID. Of a sweep, the mean over its seeds.
    pub fn best(&self) -> Option<(String, f64)> {
        let models = match self.evaluation() {
            Some(evaluation) => models(&evaluation),
            None => Verdicts::read(&self.path).ok()?.models(),
        };
        let is_made = |model: &&Scored| match self.stages.is_empty() {
            true => !model.name.contains("embedded:"),
            false => self.stages.iter().any(|stage| stage.name == model.name),
        };
        let lowest = |a: &&Scored, b: &&Scored| a.fid.total_cmp(&b.fid);
        let made = models.iter().filter(is_made).min_by(lowest);
        let best = made.or_else(|| models.iter().min_by(lowest))?;
        Some((best.name.clone(), best.fid))
    }
}

impl StageResults {
    /// Reads a stage's folder; None of another folder.
    fn read(folder: PathBuf) -> Result<Option<Self>, RecipeError> {
        let name = folder
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let Some((number, name)) = name.split_once('-') else {
            return Ok(None);
        };
        if number.len() != 2 || number.parse::<usize>().is_err() {
            return Ok(None);
        }
        let name = name.to_owned();
        let done = json(&folder.join(DONE))?;
        let of_done = |key: &str| done.as_ref().map(|done| done[key].clone());
        let model = folder.join(MODEL);
        let provenance = match model.exists() {
            true => Some(Checkpoint::read(&model)?.provenance),
            false => None,
        };
        Ok(Some(Self {
            name,
            what: of_done("what").and_then(|what| Some(what.as_str()?.to_owned())),
            seconds: of_done("seconds").and_then(|seconds| seconds.as_f64()),
            evaluation: json(&folder.join(EVALUATION))?,
            provenance,
            folder,
        }))
    }

    /// A file of it as text, if it is there.
    fn text(&self, name: &str) -> Result<Option<String>, RecipeError> {
        let path = self.folder.join(name);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(RecipeError::io(&path)(error)),
        }
    }
}

/// Seconds for people; None of what is no length of time, as a file may say.
fn spent(seconds: f64) -> Option<String> {
    let length = Duration::try_from_secs_f64(seconds).ok()?;
    Some(brief(length))
}

/// `quickstart/001` of a run's folder.
fn run_name(path: &Path) -> String {
    let mut parts = path.components().rev();
    let mut next = || Some(parts.next()?.as_os_str().to_string_lossy().into_owned());
    let number = next().unwrap_or_default();
    match next() {
        Some(recipe) => format!("{recipe}/{number}"),
        None => number,
    }
}

fn json(path: &Path) -> Result<Option<Value>, RecipeError> {
    match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text)
            .map(Some)
            .map_err(|error| RecipeError::io(path)(error.into())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(RecipeError::io(path)(error)),
    }
}

/// A model of an evaluation.
#[derive(Debug, Clone, PartialEq)]
struct Scored {
    name: String,
    /// None of a network without a trunk.
    depth: Option<usize>,
    macs: f64,
    fid: f64,
    /// Images a second.
    speed: Option<f64>,
    /// Images that its last stage trained on.
    images: usize,
}

/// The models of an evaluation, without rows of real pictures.
fn models(evaluation: &Value) -> Vec<Scored> {
    let verdicts = evaluation["verdicts"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    let model = |verdict: &Value| -> Option<Scored> {
        Some(Scored {
            name: verdict["model"].as_str()?.to_owned(),
            depth: (verdict["depth"].as_u64()).and_then(|depth| usize::try_from(depth).ok()),
            macs: verdict["macs"].as_f64()?,
            fid: verdict["fid"].as_f64()?,
            speed: verdict["images_per_second"]["median"].as_f64(),
            images: verdict["images"].as_u64().unwrap_or(0) as usize,
        })
    };
    verdicts.iter().filter_map(model).collect()
}

/// The models of runs. Those of several are called by their run too, and have no speed: it was not
/// measured in turn, and perhaps not on one machine.
fn scored(runs: &[Results]) -> Vec<Scored> {
    let of_run = |run: &Results| {
        let models = models(&run.evaluation().unwrap_or_default());
        let name = run.name.clone();
        models.into_iter().map(move |model| (name.clone(), model))
    };
    let all = runs.iter().flat_map(of_run);
    let several = runs.len() > 1;
    all.map(|(run, model)| match several {
        true => Scored {
            name: format!("{run} {}", model.name),
            speed: None,
            ..model
        },
        false => model,
    })
    .collect()
}

/// What makes no difference to what is measured, wherever a protocol says it.
const FREE: [&str; 3] = ["seed", "backend", "batch"];

/// A protocol without what makes no difference.
fn essential(protocol: &Value) -> Value {
    match protocol {
        Value::Object(parts) => {
            let parts = parts
                .iter()
                .filter(|(key, _)| !FREE.contains(&key.as_str()));
            parts
                .map(|(key, part)| (key.clone(), essential(part)))
                .collect()
        }
        other => other.clone(),
    }
}

/// The keys in which protocols differ, which makes their numbers no neighbours.
fn unlike(a: &Value, b: &Value) -> Vec<String> {
    let (a, b) = (essential(a), essential(b));
    let (Some(one), Some(other)) = (a.as_object(), b.as_object()) else {
        return vec!["protocol".into()];
    };
    let keys = one
        .keys()
        .chain(other.keys().filter(|key| !one.contains_key(*key)));
    let differs = |key: &&String| one.get(*key) != other.get(*key);
    keys.filter(differs).cloned().collect()
}

/// Refuses runs whose numbers can't stand in one column.
///
/// # Errors
/// When a run has no evaluation, or the protocols differ; says in what.
pub fn comparable(runs: &[Results]) -> Result<(), RecipeError> {
    let Some((first, rest)) = runs.split_first() else {
        return Ok(());
    };
    let none = |run: &Results| {
        let path = run.path.display();
        RecipeError::Run(match run.path.join("sweep.json").exists() {
            true => format!("{path}: it is a sweep; name single runs of it"),
            false => format!("{path}: it has no evaluation yet, and can't be compared"),
        })
    };
    let first_one = first.evaluation().ok_or_else(|| none(first))?;
    let protocol = &first_one["protocol"];
    for run in rest {
        let other = run.evaluation().ok_or_else(|| none(run))?;
        let other = &other["protocol"];
        let differ = unlike(protocol, other);
        if !differ.is_empty() {
            let said = differ.iter().map(|key| {
                format!(
                    "{key} {} and {}",
                    protocol[key.as_str()],
                    other[key.as_str()]
                )
            });
            return Err(RecipeError::Run(format!(
                "{} and {} were measured by unlike protocols, whose numbers can't stand in one column: {}",
                first.path.display(),
                run.path.display(),
                said.collect::<Vec<_>>().join("; ")
            )));
        }
    }
    Ok(())
}

/// The tables of several runs as one; equal rows, such as those of real pictures, stand there once.
pub fn compared(runs: &[Results]) -> Grid {
    let grids: Vec<(&Results, Grid)> = (runs.iter())
        .filter_map(|run| Some((run, crate::report::verdict_grid(&run.evaluation()?))))
        .collect();
    let mut titles: Vec<String> = Vec::new();
    for title in grids.iter().flat_map(|(_, grid)| &grid.titles) {
        if !titles.contains(title) {
            titles.push(title.clone());
        }
    }
    let mut all = Grid::default();
    for (run, grid) in &grids {
        for row in &grid.rows {
            let cell = |title: &String| {
                let column = grid.titles.iter().position(|known| known == title);
                column.map_or("-".to_owned(), |column| row[column].clone())
            };
            let mut cells: Vec<String> = titles.iter().map(cell).collect();
            let known = all.rows.iter().any(|known| known[1..] == cells[..]);
            if !known {
                cells.insert(0, run.name.clone());
                all.rows.push(cells);
            }
        }
    }
    titles.insert(0, "run".into());
    all.titles = titles;
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, protocol: Value, fid: f64) -> Results {
        let evaluation = serde_json::json!({
            "protocol": protocol,
            "verdicts": [
                { "model": "real", "fid": 5.0 },
                { "model": "student", "depth": 6, "macs": 100, "fid": fid, "images_per_second": { "median": 12.0 } },
            ],
        });
        let stage = StageResults {
            name: "evaluate".into(),
            what: None,
            seconds: None,
            folder: "x".into(),
            evaluation: Some(evaluation),
            provenance: None,
        };
        Results {
            path: name.into(),
            name: name.into(),
            status: None,
            environment: Value::Null,
            recipe: String::new(),
            stages: vec![stage],
        }
    }

    #[test]
    fn unlike_protocols_are_not_compared() {
        let protocol = |count: usize, seed: usize| serde_json::json!({ "count": count, "sampling": { "seed": seed, "steps": 2 } });
        let alike = [
            run("a", protocol(10, 0), 9.0),
            run("b", protocol(10, 1), 8.0),
        ];
        assert!(comparable(&alike).is_ok());
        let grid = compared(&alike);
        let titles = ["run", "model", "depth", "MACs", "images/s", "FID"];
        assert_eq!(grid.titles, titles);
        // The row of real pictures is the same in both.
        assert_eq!(grid.rows.len(), 3);
        assert_eq!(alike[1].best(), Some(("student".into(), 8.0)));

        let unlike = [
            run("a", protocol(10, 0), 9.0),
            run("b", protocol(20, 0), 8.0),
        ];
        let said = comparable(&unlike).unwrap_err().to_string();
        assert!(
            said.contains("a and b") && said.contains("count 10 and 20"),
            "{said}"
        );
        // Files say what they like.
        assert_eq!(spent(62.0).as_deref(), Some("1m02s"));
        assert_eq!(
            (spent(-1.0), spent(f64::NAN), spent(1e300)),
            (None, None, None)
        );
        // Of several evaluations those by the protocol of the last count.
        let mut more = run("d", protocol(10, 1), 8.0);
        more.stages.extend(run("d", protocol(20, 0), 1.0).stages);
        more.stages.extend(run("d", protocol(10, 0), 7.0).stages);
        let other = more.stages[0].evaluation.as_mut().unwrap();
        other["verdicts"][1]["model"] = "teacher".into();
        let joined = more.evaluation().unwrap();
        let rows: Vec<_> = (joined["verdicts"].as_array().unwrap().iter())
            .map(|row| (row["model"].as_str().unwrap(), row["fid"].as_f64().unwrap()))
            .collect();
        assert_eq!(rows, [("real", 5.0), ("teacher", 8.0), ("student", 7.0)]);

        let mut none = run("c", protocol(10, 0), 1.0);
        none.stages.clear();
        let said = comparable(&[alike.into_iter().next().unwrap(), none]).unwrap_err();
        assert!(said.to_string().contains("c: it has no evaluation yet"));
    }
}
