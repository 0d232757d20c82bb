//! Verdicts over several seeds.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::directory::EVALUATION;
use super::directory::json;
use super::evaluate::Evaluated;
use crate::evaluation::ClassifiedVerdict;
use crate::files::write_atomic;
use crate::recipe::RecipeError;
use crate::report::Table;

/// Verdicts of the same models, one list per seed.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Verdicts {
    runs: Vec<SeedVerdicts>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SeedVerdicts {
    seed: u64,
    run: PathBuf,
    verdicts: Vec<ClassifiedVerdict>,
}

impl Verdicts {
    /// Adds what a run's evaluate stages found.
    ///
    /// # Errors
    /// When the run has none.
    pub fn add(&mut self, seed: u64, run: &Path) -> Result<(), RecipeError> {
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
        if verdicts.is_empty() {
            return Err(RecipeError::Run(format!(
                "{}: the recipe evaluates nothing, so seeds can't be compared",
                run.display()
            )));
        }
        self.runs.push(SeedVerdicts {
            seed,
            run: run.to_owned(),
            verdicts,
        });
        Ok(())
    }

    /// Writes all verdicts to `seeds-<first run>-<last run>.json` in a folder.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write(&self, folder: &Path) -> Result<PathBuf, RecipeError> {
        let name = |run: Option<&SeedVerdicts>| {
            run.and_then(|run| run.run.file_name())
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default()
        };
        let path = folder.join(format!(
            "seeds-{}-{}.json",
            name(self.runs.first()),
            name(self.runs.last())
        ));
        let text = json(self)?;
        write_atomic(&path, |file| {
            std::io::Write::write_all(file, text.as_bytes())
        })
        .map_err(RecipeError::io(&path))?;
        Ok(path)
    }
}

impl fmt::Display for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(["model", "FID", "IS", "precision", "recall", "accuracy"]);
        let models = self.runs.first().map_or(&[][..], |run| &run.verdicts);
        for (index, model) in models.iter().enumerate() {
            let cell = |digits: usize, of: fn(&ClassifiedVerdict) -> f64| {
                let values: Vec<f64> = self
                    .runs
                    .iter()
                    .filter_map(|run| run.verdicts.get(index))
                    .map(of)
                    .collect();
                let (mean, deviation) = mean_deviation(&values);
                format!("{mean:.digits$} ± {deviation:.digits$}")
            };
            table.row([
                model.model.clone(),
                cell(2, |verdict| verdict.fid),
                cell(2, |verdict| verdict.inception_score),
                cell(3, |verdict| verdict.precision),
                cell(3, |verdict| verdict.recall),
                cell(1, |verdict| 100.0 * verdict.accuracy),
            ]);
        }
        table.fmt(f)
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
}
