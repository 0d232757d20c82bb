//! The page of a sweep.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::beside::Beside;
use super::page::{pairs, protocol, protocols_of};
use super::words::{best_row, verdict};
use super::{PAGE, Verdicts, json, run_name, unlike};
use crate::recipe::RecipeError;
use crate::report::{Choices, Page};

/// Writes the page of a sweep, as far as it has got.
///
/// # Errors
/// When its verdicts can't be read, or a file can't be written.
pub fn write_sweep(sweep: &Path, into: &Path) -> Result<PathBuf, RecipeError> {
    let verdicts = Verdicts::read(sweep)?;
    let mut beside = Beside::default();
    let name = run_name(sweep);
    let mut page = Page::new(&format!("TinyFusion: sweep {name}"));
    page.section("Results");
    let runs = verdicts.runs();
    let protocols: Vec<Value> = (runs.iter())
        .flat_map(|(_, folder)| protocols_of(&sweep.join(folder)))
        .collect();
    let differ: BTreeSet<String> = (protocols.iter())
        .flat_map(|protocol| unlike(&protocols[0], protocol))
        .collect();
    let mut grid = verdicts.grid();
    let alike = differ.is_empty();
    if alike {
        if let Some(said) = verdict(&verdicts.models()) {
            page.paragraph("verdict", &said);
        }
        if let Some(remark) = verdicts.loss_and_fid() {
            page.paragraph("verdict", &format!("{remark}."));
        }
        grid.best = best_row(&grid);
    } else {
        let differ: Vec<String> = differ.into_iter().collect();
        let said = format!(
            "The runs were measured by unlike protocols ({}), so that not all numbers of a column compare.",
            differ.join(", ")
        );
        page.paragraph("verdict", &said);
    }
    beside.table(
        &mut page,
        &grid,
        "Mean and standard deviation over the seeds, where there are several",
    );
    page.begin_figures();
    if let Some(choices) = verdicts.choices() {
        let drawn = (choices.svg(), choices.csv());
        beside.drawing(&mut page, "choices", Choices::TITLE, drawn);
    }
    for (name, chart) in verdicts.charts() {
        beside.show(&mut page, (name.to_owned(), chart), "");
    }
    page.end_figures();
    page.section("Runs");
    let items = runs.iter().map(|(label, folder)| {
        let target = folder.join(PAGE);
        match into == sweep && sweep.join(&target).exists() {
            true => (label.clone(), Some(target.to_string_lossy().into_owned())),
            false => (format!("{label}: {}", folder.display()), None),
        }
    });
    page.list(&items.collect::<Vec<_>>());
    if let (Some(shared), true) = (protocols.first(), alike) {
        protocol(&mut page, shared);
    }
    let environments = (runs.iter())
        .filter_map(|(_, folder)| json(&sweep.join(folder).join("environment.json")).ok()?);
    if let Some(environment) = environments.into_iter().next() {
        page.section("Environment of the first run");
        page.table(&pairs(&environment), "");
    }
    let lead = format!("{} runs have been evaluated", runs.len());
    beside.finish(page, into, &lead, None)
}
