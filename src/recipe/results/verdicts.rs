//! What the runs of a sweep found: its table, its file and its figures.

mod figures;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::evaluation::{RankCorrelation, Speed};
use crate::recipe::RecipeError;
use crate::recipe::results::Scored;
use crate::recipe::run::directory::EVALUATION;
use crate::recipe::schema::sweep::{Point, label};
use crate::report::{Grid, csv_cell, short, thousands};

/// Fewest runs of which a rank correlation is told.
const FEWEST_PAIRS: usize = 10;

/// Verdicts of a sweep's runs: `sweep.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Verdicts {
    runs: Vec<RunVerdicts>,
}

/// What a run's evaluations found.
#[derive(Debug, Serialize, Deserialize)]
struct RunVerdicts {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    case: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    settings: BTreeMap<String, String>,
    seed: u64,
    /// Its folder in the sweep's.
    run: PathBuf,
    verdicts: Vec<Row>,
}

/// Verdict on one model, of either kind of evaluation.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Row {
    model: String,
    parameters: Option<usize>,
    depth: Option<usize>,
    macs: Option<usize>,
    images_per_second: Option<Speed>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    images: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kept: Option<Vec<usize>>,
    /// Of how many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kept_of: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    loss: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ssim: Option<f64>,
    fid: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sfid: Option<f64>,
    inception_score: f64,
    precision: Option<f64>,
    recall: Option<f64>,
    #[serde(default)]
    accuracy: Option<f64>,
}

/// What is read of `eval.json`.
#[derive(Deserialize)]
struct Evaluated {
    verdicts: Vec<Row>,
}

impl Verdicts {
    /// Adds what the evaluate stages of a run found.
    pub(in crate::recipe) fn add(
        &mut self,
        point: &Point,
        name: &str,
        run: &Path,
    ) -> Result<(), RecipeError> {
        let mut verdicts = Vec::new();
        let mut folders: Vec<PathBuf> = std::fs::read_dir(run)
            .map_err(RecipeError::io(run))?
            .flatten()
            .map(|entry| entry.path())
            .collect();
        folders.sort();
        for path in folders
            .into_iter()
            .map(|folder| folder.join(EVALUATION))
            .filter(|path| path.exists())
        {
            let text = std::fs::read_to_string(&path).map_err(RecipeError::io(&path))?;
            let evaluation: Evaluated = serde_json::from_str(&text)
                .map_err(|error| RecipeError::io(&path)(error.into()))?;
            verdicts.extend(evaluation.verdicts);
        }
        self.runs.push(RunVerdicts {
            case: point.case.clone(),
            settings: point.settings.clone(),
            seed: point.recipe.seed,
            run: name.into(),
            verdicts,
        });
        Ok(())
    }

    /// All verdicts, a line each.
    pub(in crate::recipe) fn csv(&self) -> String {
        let keys: BTreeSet<&String> = (self.runs.iter())
            .flat_map(|run| run.settings.keys())
            .collect();
        let mut text = String::from("case,");
        for key in &keys {
            text += &format!("{},", csv_cell(key));
        }
        text += "seed,model,depth,parameters,macs,images_per_second,images,kept,loss,ssim,fid,sfid,inception_score,precision,recall,accuracy\n";
        for run in &self.runs {
            for row in &run.verdicts {
                let mut cells = vec![csv_cell(run.case.as_deref().unwrap_or_default())];
                let setting = |key: &&String| {
                    run.settings
                        .get(*key)
                        .map_or_else(String::new, |value| csv_cell(value))
                };
                cells.extend(keys.iter().map(setting));
                let count = |value: Option<usize>| {
                    value.map_or_else(String::new, |value| value.to_string())
                };
                let number =
                    |value: Option<f64>| value.map_or_else(String::new, |value| value.to_string());
                let kept = row.kept.iter().flatten().map(ToString::to_string);
                cells.extend([
                    run.seed.to_string(),
                    csv_cell(&row.model),
                    count(row.depth),
                    count(row.parameters),
                    count(row.macs),
                    number(row.images_per_second.map(|speed| speed.median)),
                    count(row.images),
                    kept.collect::<Vec<_>>().join(" "),
                    number(row.loss),
                    number(row.ssim),
                    number(Some(row.fid)),
                    number(row.sfid),
                    number(Some(row.inception_score)),
                    number(row.precision),
                    number(row.recall),
                    number(row.accuracy),
                ]);
                text += &cells.join(",");
                text.push('\n');
            }
        }
        text
    }

    /// Whether the loss of a pruned model tells how good it will be, of all cases and of each that
    /// has many, and the loss after training how good it is: their rank correlations with the FID
    /// of the model that is evaluated last in the same run. None of few runs.
    pub fn loss_and_fid(&self) -> Option<String> {
        let told = |pairs: &[[f64; 2]]| {
            let found = (pairs.len() >= FEWEST_PAIRS).then(|| RankCorrelation::of(pairs))??;
            let [low, high] = found.interval;
            Some(format!("{:.2} (95%: {low:.2} to {high:.2})", found.value))
        };
        let cases = self.cases().into_iter().map(|(case, runs)| {
            let trained = runs.into_iter().filter_map(RunVerdicts::trained);
            let pairs: Vec<_> = trained.map(|(before, last)| [before, last.fid]).collect();
            (case, pairs)
        });
        let cases: Vec<(&str, Vec<[f64; 2]>)> = cases.collect();
        let before: Vec<[f64; 2]> = cases.iter().flat_map(|(_, pairs)| pairs).copied().collect();
        let trained = self.runs.iter().filter_map(RunVerdicts::trained);
        let after = trained.filter_map(|(_, last)| Some([last.loss?, last.fid]));
        let after: Vec<[f64; 2]> = after.collect();
        let mut text = format!(
            "loss of {} pruned models against FID after training: rank correlation {}",
            before.len(),
            told(&before)?
        );
        for (case, pairs) in &cases {
            if let (true, Some(found)) = (pairs.len() < before.len(), told(pairs)) {
                text += &format!("; of the {} of `{case}` alone: {found}", pairs.len());
            }
        }
        if let Some(after) = told(&after) {
            text += &format!("; of the loss after training: {after}");
        }
        Some(text)
    }

    /// Whether no run evaluated anything.
    pub fn is_empty(&self) -> bool {
        self.runs.iter().all(|run| run.verdicts.is_empty())
    }

    /// The cases in order, each with its runs.
    fn cases(&self) -> Vec<(&str, Vec<&RunVerdicts>)> {
        let mut cases: Vec<(&str, Vec<&RunVerdicts>)> = Vec::new();
        for run in &self.runs {
            let name = run.case.as_deref().unwrap_or("runs");
            match cases.iter_mut().find(|(known, _)| *known == name) {
                Some((_, runs)) => runs.push(run),
                None => cases.push((name, vec![run])),
            }
        }
        cases
    }

    /// Runs that differ by their seed alone, in order.
    fn groups(&self) -> Vec<Vec<&RunVerdicts>> {
        let mut groups: Vec<Vec<&RunVerdicts>> = Vec::new();
        for run in &self.runs {
            let same = |group: &&mut Vec<&RunVerdicts>| {
                group[0].case == run.case && group[0].settings == run.settings
            };
            match groups.iter_mut().find(same) {
                Some(group) => group.push(run),
                None => groups.push(vec![run]),
            }
        }
        groups
    }
}

impl Row {
    /// The layers it kept of so many.
    fn kept_among(&self, layers: usize) -> Option<&[usize]> {
        let kept = self.kept.as_deref()?;
        let among = self.kept_of.is_none_or(|of| of == layers);
        (among && kept.iter().all(|layer| *layer < layers)).then_some(kept)
    }
}

impl RunVerdicts {
    /// The loss of a pruned model, and the last one, which has the same layers and was trained
    /// since.
    fn trained(&self) -> Option<(f64, &Row)> {
        let (last, before) = self.verdicts.split_last()?;
        let kept = last.kept.as_ref().filter(|_| last.images.is_some())?;
        let of_pruned = |row: &&Row| row.kept.as_ref() == Some(kept) && row.images.is_none();
        let pruned = before.iter().find(of_pruned)?;
        Some((pruned.loss?, last))
    }
}

/// Digits after the point of images/s: none, unless it would be 0.
fn pace_digits(rows: &[&Row]) -> usize {
    let paces = rows.iter().filter_map(|row| row.images_per_second);
    let least = paces
        .map(|speed| speed.median)
        .fold(f64::INFINITY, f64::min);
    match least {
        _ if least < 0.1 => 3,
        _ if least < 1.0 => 2,
        _ => 0,
    }
}

/// Column of the parameters, which real pictures have none of.
const PARAMETERS: usize = 3;

/// Titles of the table of a sweep.
const TITLES: [&str; 15] = [
    "case",
    "model",
    "depth",
    "params",
    "MACs",
    "images/s",
    "trained on",
    "loss",
    "SSIM",
    "FID",
    "sFID",
    "IS",
    "precision",
    "recall",
    "accuracy",
];

impl Verdicts {
    /// The sweep's verdicts that are in a folder so far.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn read(folder: &Path) -> Result<Self, RecipeError> {
        let path = folder.join("sweep.json");
        let text = std::fs::read_to_string(&path).map_err(RecipeError::io(&path))?;
        serde_json::from_str(&text).map_err(|error| RecipeError::io(&path)(error.into()))
    }

    /// The table that [`Display`](fmt::Display) prints.
    pub fn grid(&self) -> Grid {
        let grid = Grid {
            titles: TITLES.map(str::to_owned).to_vec(),
            rows: self.rows().into_iter().map(|row| row.to_vec()).collect(),
            best: None,
        };
        grid.without_empty()
    }

    /// The models, each with its mean over the seeds. Their speeds are left out: those of unlike
    /// runs were not measured in turn.
    pub(super) fn models(&self) -> Vec<Scored> {
        let mut models = Vec::new();
        for group in self.groups() {
            let label = label(group[0].case.as_deref(), &group[0].settings);
            let models_of: Vec<(usize, &Row, usize)> = (group[0].verdicts.iter().enumerate())
                .filter_map(|(index, row)| Some((index, row, row.macs?)))
                .collect();
            let alone = models_of.len() == 1;
            for (index, first, macs) in models_of {
                let rows = group.iter().filter_map(|run| run.verdicts.get(index));
                let fids: Vec<f64> = rows.map(|row| row.fid).collect();
                models.push(Scored {
                    name: match (alone, label.as_str()) {
                        (true, label) if !label.is_empty() => label.to_owned(),
                        (_, "") => first.model.clone(),
                        (_, label) => format!("{} of {label}", first.model),
                    },
                    depth: first.depth,
                    macs: macs as f64,
                    fid: mean_deviation(&fids).0,
                    speed: None,
                    images: first.images.unwrap_or(0),
                });
            }
        }
        models
    }

    /// What each run is called, and its folder in the sweep's.
    pub fn runs(&self) -> Vec<(String, PathBuf)> {
        let named = self.runs.iter().map(|run| {
            let name = label(run.case.as_deref(), &run.settings);
            (format!("{name} seed {}", run.seed), run.run.clone())
        });
        named.collect()
    }

    /// A row for each model of each case and combination: mean and standard deviation over the
    /// seeds. Rows of real pictures that are the same everywhere stand there once.
    fn rows(&self) -> Vec<[String; 15]> {
        let groups = self.groups();
        let mut rows: Vec<[String; 15]> = Vec::new();
        for group in &groups {
            for (index, first) in group[0].verdicts.iter().enumerate() {
                let of_seeds: Vec<&Row> = group
                    .iter()
                    .filter_map(|run| run.verdicts.get(index))
                    .collect();
                let cell = |digits: usize, of: &dyn Fn(&Row) -> Option<f64>| {
                    let values: Option<Vec<f64>> = of_seeds.iter().map(|row| of(row)).collect();
                    let Some(values) = values else {
                        return "-".to_owned();
                    };
                    let (mean, deviation) = mean_deviation(&values);
                    match values.len() {
                        1 => format!("{mean:.digits$}"),
                        _ => format!("{mean:.digits$} ± {deviation:.digits$}"),
                    }
                };
                let count = |value: Option<usize>, shown: fn(usize) -> String| {
                    value.map_or_else(|| "-".to_owned(), shown)
                };
                rows.push([
                    label(group[0].case.as_deref(), &group[0].settings),
                    first.model.clone(),
                    count(first.depth, |depth| depth.to_string()),
                    count(first.parameters, short),
                    count(first.macs, short),
                    cell(pace_digits(&of_seeds), &|row| {
                        row.images_per_second.map(|speed| speed.median)
                    }),
                    count(first.images, thousands),
                    cell(4, &|row| row.loss),
                    cell(3, &|row| row.ssim),
                    cell(2, &|row| Some(row.fid)),
                    cell(2, &|row| row.sfid),
                    cell(2, &|row| Some(row.inception_score)),
                    cell(3, &|row| row.precision),
                    cell(3, &|row| row.recall),
                    cell(1, &|row| row.accuracy.map(|share| 100.0 * share)),
                ]);
            }
        }
        // One case, or none: the column would say nothing.
        let cases = groups.len() > 1;
        let mut known = HashSet::new();
        rows.retain(|row| row[PARAMETERS] != "-" || known.insert(row[1..].to_vec()));
        if !cases {
            rows.iter_mut().for_each(|row| row[0] = "-".into());
        }
        rows
    }
}

impl fmt::Display for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.grid().fmt(f)
    }
}

/// Mean and sample standard deviation (0 for one value).
fn mean_deviation(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / (count - 1.0).max(1.0)).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_is_the_sample_deviation() {
        let (mean, deviation) = mean_deviation(&[1.0, 2.0, 3.0]);
        assert_eq!((mean, deviation), (2.0, 1.0));
        assert_eq!(mean_deviation(&[5.0]), (5.0, 0.0));
    }

    fn verdicts() -> Verdicts {
        let run = |case: &str, seed: u64, fid: f64| {
            let verdict = |model: &str, fid: f64, depth: Option<usize>| serde_json::json!({ "model": model, "depth": depth, "parameters": depth, "fid": fid, "inception_score": 9.0, "precision": 0.5, "recall": 0.25, "accuracy": 0.125 });
            serde_json::json!({
                "case": case, "settings": { "stage.a.lr": "1, 2" }, "seed": seed, "run": "x",
                "verdicts": [verdict("real", 1.0, None), verdict("student", fid, Some(14))],
            })
        };
        let runs = [
            run("a", 0, 10.0),
            run("a", 1, 12.0),
            run("b", 0, 20.0),
            run("b", 1, 20.0),
        ];
        serde_json::from_value(serde_json::json!({ "runs": runs })).unwrap()
    }

    #[test]
    fn seeds_are_averaged_and_real_pictures_stand_once() {
        let table = verdicts().to_string();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(
            lines[0].split_whitespace().collect::<Vec<_>>(),
            [
                "case",
                "model",
                "depth",
                "params",
                "FID",
                "IS",
                "precision",
                "recall",
                "accuracy"
            ]
        );
        assert_eq!(lines.len(), 2 + 3, "{table}");
        assert!(lines[2].starts_with("a lr=1, 2  real"), "{table}");
        assert!(lines[3].contains("11.00 ± 1.41"), "{table}");
        assert!(lines[4].starts_with("b lr=1, 2  student"), "{table}");
        assert!(lines[4].contains("20.00 ± 0.00"), "{table}");
        // Two ways of choosing may come to the same.
        let mut runs = serde_json::to_value(verdicts()).unwrap();
        for seed in [2, 3] {
            let mut same = runs["runs"][seed].clone();
            same["case"] = "c".into();
            runs["runs"].as_array_mut().unwrap().push(same);
        }
        let table = serde_json::from_value::<Verdicts>(runs)
            .unwrap()
            .to_string();
        assert!(table.contains("c lr=1, 2  student"), "{table}");
    }

    #[test]
    fn a_model_is_called_by_its_case() {
        let row = |model: &str, depth: Option<usize>, fid: f64| serde_json::json!({ "model": model, "depth": depth, "macs": depth, "fid": fid, "inception_score": 9.0 });
        let run = |case: Option<&str>, seed: u64, verdicts: &[serde_json::Value]| serde_json::json!({ "case": case, "seed": seed, "run": "x", "verdicts": verdicts });
        let real = row("real", None, 1.0);
        let runs = [
            run(Some("a"), 0, &[real.clone(), row("student", Some(2), 8.0)]),
            run(Some("a"), 1, &[real.clone(), row("student", Some(2), 12.0)]),
            run(
                Some("b"),
                0,
                &[row("teacher", Some(4), 5.0), row("student", Some(2), 9.0)],
            ),
            run(None, 0, &[real, row("student", Some(2), 7.0)]),
        ];
        let verdicts: Verdicts =
            serde_json::from_value(serde_json::json!({ "runs": runs })).unwrap();
        let named: Vec<(String, f64)> = (verdicts.models().into_iter())
            .map(|model| (model.name, model.fid))
            .collect();
        let expected = [
            ("a", 10.0),
            ("teacher of b", 5.0),
            ("student of b", 9.0),
            ("student", 7.0),
        ];
        assert_eq!(named, expected.map(|(name, fid)| (name.to_owned(), fid)));
    }

    #[test]
    fn lines_of_the_file_are_those_of_all_seeds() {
        let text = verdicts().csv();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 1 + 8);
        assert!(lines[0].starts_with("case,stage.a.lr,seed,model,depth,"));
        assert!(
            lines[2].starts_with("a,\"1, 2\",0,student,14,14,,,,,,,10,,9,"),
            "{text}"
        );
        let columns = |line: &str| line.split(',').count();
        assert_eq!(columns(lines[0]) + 1, columns(lines[1]));
    }
}
