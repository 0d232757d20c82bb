//! The page of one run or of several.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::beside::Beside;
use super::figures::{self, Figure};
use super::words::{best_row, verdict};
use super::{Results, StageResults, comparable, compared, json, scored, spent};
use crate::pruning::uniform;
use crate::recipe::RecipeError;
use crate::recipe::run::directory::EVALUATION;
use crate::recipe::schema::prune::MAX_DEPTH;
use crate::report::{Grid, Page, protocol_lines, thousands, verdict_grid};
use crate::sampling::PICTURE_FILE;

/// Figures that stages draw themselves, with the table beside each.
const DRAWN: [(&str, &str, &str); 11] = [
    (
        "decisions.svg",
        "decisions.jsonl",
        "What the gates choose while they learn: opaque is certain",
    ),
    (
        "similarity.svg",
        "similarity.csv",
        "How alike the states are (linear CKA)",
    ),
    (
        "similarity-encoder.svg",
        "similarity-encoder.csv",
        "How alike the encoder's states are (linear CKA)",
    ),
    (
        "similarity-decoder.svg",
        "similarity-decoder.csv",
        "How alike the decoder's states are (linear CKA)",
    ),
    (
        "states-histograms.svg",
        "states-histograms.csv",
        "Hidden states; the share that masked distillation leaves out stands in the legend",
    ),
    (
        "states-by-layer.svg",
        "states.csv",
        "Range of the hidden states",
    ),
    (
        "scores-shortgpt.svg",
        "scores.csv",
        "Layers by ShortGPT's score",
    ),
    (
        "scores-flux-lite.svg",
        "scores.csv",
        "Layers by Flux-Lite's score",
    ),
    (
        "scores-sensitivity.svg",
        "scores.csv",
        "Layers by their absence",
    ),
    (
        "losses.svg",
        "losses-marked.csv",
        "Losses of random choices of layers before training; the dashed rules are chosen ones",
    ),
    (
        "speed.svg",
        "speed.csv",
        "How much faster fewer layers are, and fewer channels",
    ),
];

/// Writes the page of runs to a folder, and its tables and figures beside it, in `report/`. A page
/// of a run that goes on is loaded again every `renewed` seconds. Returns the page's path.
///
/// # Errors
/// When runs can't be compared, what they left can't be read, or a file can't be written.
pub fn write_page(
    runs: &[Results],
    into: &Path,
    renewed: Option<u32>,
) -> Result<PathBuf, RecipeError> {
    if runs.len() > 1 {
        comparable(runs)?;
    }
    let mut beside = Beside::default();
    let title = match runs {
        [run] => format!("TinyFusion: {}", run.name),
        runs => format!("TinyFusion: {} runs", runs.len()),
    };
    let mut page = Page::new(&title);
    results(&mut page, runs, &mut beside)?;
    for run in runs {
        pictures(&mut page, run, runs.len() > 1)?;
    }
    for run in runs {
        choices(&mut page, run, runs.len() > 1, &mut beside)?;
    }
    for run in runs {
        trainings(&mut page, run, runs.len() > 1, &mut beside)?;
    }
    conditions(&mut page, runs);

    beside.finish(page, into, &lead(runs), renewed)
}

/// What stands below the title.
fn lead(runs: &[Results]) -> String {
    let [run] = runs else {
        let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
        return names.join(", ");
    };
    let mut facts = Vec::new();
    if let Some(status) = &run.status {
        facts.push(match status.state.as_str() {
            "finished" => "finished".to_owned(),
            state => format!("{state} at stage {}", status.stage),
        });
    }
    facts.extend(run.worked().map(|worked| format!("{worked} of work")));
    for key in ["started", "processor", "backend"] {
        facts.extend(run.environment[key].as_str().map(str::to_owned));
    }
    facts.join(" · ")
}

/// The verdict in words, the table, and the figures of models.
fn results(page: &mut Page, runs: &[Results], beside: &mut Beside) -> Result<(), RecipeError> {
    page.section("Results");
    let evaluated = runs.iter().any(|run| run.evaluation().is_some());
    if !evaluated {
        page.paragraph("verdict", "Nothing has been evaluated yet.");
        return Ok(());
    }
    if let Some(text) = verdict(&scored(runs)) {
        page.paragraph("verdict", &text);
    }
    let mut grid = match runs {
        [run] => verdict_grid(&run.evaluation().unwrap_or_default()),
        runs => compared(runs),
    };
    grid.best = best_row(&grid);
    let bias = runs.iter().find_map(Results::evaluation).and_then(|evaluation| {
        let protocol = &evaluation["protocol"];
        let count = protocol["count"].as_u64().or(protocol["samples"].as_u64())?;
        Some(format!(
            "FID is biased upwards, the more the fewer the samples: compare these, of {} samples, with one another.",
            thousands(count as usize)
        ))
    });
    beside.table(page, &grid, &bias.unwrap_or_default());
    page.begin_figures();
    for figure in figures::models_of(runs) {
        beside.show(page, figure, "");
    }
    page.end_figures();
    Ok(())
}

/// Sample grids, with the same noise side by side.
fn pictures(page: &mut Page, run: &Results, named: bool) -> Result<(), RecipeError> {
    let mut found = Vec::new();
    for stage in &run.stages {
        for name in ["comparison.png", "samples.png"] {
            let path = stage.folder.join(name);
            match std::fs::read(&path) {
                Ok(png) => found.push((stage, png)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(RecipeError::io(&path)(error)),
            }
        }
    }
    if found.is_empty() {
        return Ok(());
    }
    page.section(&heading("Samples", run, named));
    for (stage, png) in found {
        let caption = match &stage.evaluation {
            Some(evaluation) => rows_of(evaluation),
            None => format!("Samples of stage {}", stage.name),
        };
        page.picture(&png, &caption);
    }
    Ok(())
}

/// What the rows of an evaluation's picture are. Models draw from the same noise; samples in
/// archives may be of any.
fn rows_of(evaluation: &Value) -> String {
    let verdicts = evaluation["verdicts"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    // Of real pictures nothing is counted.
    let is_drawn = |verdict: &&Value| verdict["macs"].is_number() || verdict["count"].is_number();
    let drawn: Vec<&Value> = verdicts.iter().filter(is_drawn).collect();
    let names: Vec<&str> = (drawn.iter())
        .filter_map(|verdict| verdict["model"].as_str())
        .collect();
    let from = match drawn.iter().all(|verdict| verdict["macs"].is_number()) {
        true => "From the same noise, from",
        false => "From",
    };
    format!("{from} above: {}", names.join(", "))
}

/// Which layers stay, and why.
fn choices(
    page: &mut Page,
    run: &Results,
    named: bool,
    beside: &mut Beside,
) -> Result<(), RecipeError> {
    let prefix = prefix(run, named);
    let mut begun = false;
    for stage in &run.stages {
        let mut figures: Vec<Figure> = Vec::new();
        figures.extend(figures::scores(stage)?);
        figures.extend(figures::masks(stage)?);
        let drawn = drawn(stage)?;
        // A model that was healed, lost width or runs in pairs has the layers of the one before it.
        let prunes = stage
            .what
            .as_ref()
            .is_some_and(|what| what.starts_with("prune,") && what != "prune, parallel");
        let kept = stage.provenance.as_ref().and_then(|provenance| {
            let kept = provenance.kept.as_ref().filter(|_| prunes)?;
            // A file may say any depth; a recipe knows none beyond this.
            let depth = provenance
                .parent_depth
                .filter(|depth| *depth <= 2 * MAX_DEPTH)?;
            Some((kept, depth, provenance.granularity))
        });
        if figures.is_empty() && drawn.is_empty() && kept.is_none() {
            continue;
        }
        if !begun {
            page.section(&heading("Layers", run, named));
            begun = true;
        }
        page.part(&stage.name);
        if let Some((kept, depth, granularity)) = kept {
            let what = granularity.layers();
            page.paragraph("", &format!("{} of {depth} {what} stay:", kept.len()));
            page.strip(kept, depth);
        }
        if let Some(text) = stage.text("decisions.jsonl")? {
            page.table(
                &decisions(&text),
                "Each group's choice at the end, and the probability of every way to choose",
            );
        }
        page.begin_figures();
        for figure in figures {
            beside.show(page, figure, &prefix);
        }
        for (svg, data, caption) in drawn {
            let data = data
                .as_ref()
                .map(|(name, text)| (name.as_str(), text.as_str()));
            page.drawing(&svg, caption, data);
        }
        page.end_figures();
    }
    Ok(())
}

/// A figure that a stage drew, its data with the name of their file, and its caption.
type Drawn = (String, Option<(String, String)>, &'static str);

/// The figures that a stage drew itself.
fn drawn(stage: &StageResults) -> Result<Vec<Drawn>, RecipeError> {
    let mut found = Vec::new();
    for (figure, table, caption) in DRAWN {
        if let Some(svg) = stage.text(figure)? {
            let data = stage.text(table)?;
            found.push((svg, data.map(|text| (table.to_owned(), text)), caption));
        }
    }
    Ok(found)
}

/// Most probabilities of a group that the table lists.
const LISTED: usize = 12;

/// The last choices of the gates.
fn decisions(text: &str) -> Grid {
    let last = text
        .lines()
        .rev()
        .find_map(|line| serde_json::from_str::<Value>(line).ok());
    let choices = last.as_ref().and_then(|last| last["choices"].as_array());
    let row = |(group, choice): (usize, &Value)| {
        let layers: Vec<String> = (choice["layers"].as_array().into_iter().flatten())
            .map(ToString::to_string)
            .collect();
        let mut all: Vec<f64> = (choice["probabilities"].as_array().into_iter().flatten())
            .filter_map(Value::as_f64)
            .collect();
        let count = all.len();
        if count > LISTED {
            all.sort_by(|a, b| b.total_cmp(a));
            all.truncate(LISTED);
        }
        let mut shown: Vec<String> = all.iter().map(|one| format!("{one:.2}")).collect();
        if count > LISTED {
            shown.push(format!("and {} smaller", count - LISTED));
        }
        vec![
            group.to_string(),
            layers.join(" "),
            choice["confidence"]
                .as_f64()
                .map_or("-".into(), |one| format!("{one:.2}")),
            shown.join("  "),
        ]
    };
    Grid {
        titles: [
            "group",
            "layers that stay",
            "probability",
            "probabilities of all",
        ]
        .map(str::to_owned)
        .to_vec(),
        rows: choices.into_iter().flatten().enumerate().map(row).collect(),
        best: None,
    }
}

/// Curves of every training.
fn trainings(
    page: &mut Page,
    run: &Results,
    named: bool,
    beside: &mut Beside,
) -> Result<(), RecipeError> {
    let prefix = prefix(run, named);
    let mut begun = false;
    for stage in &run.stages {
        let mut figures = figures::training(stage)?;
        figures.extend(figures::quality(stage)?);
        if figures.is_empty() {
            continue;
        }
        if !begun {
            page.section(&heading("Training", run, named));
            begun = true;
        }
        page.part(&stage.name);
        page.begin_figures();
        for figure in figures {
            beside.show(page, figure, &prefix);
        }
        page.end_figures();
        for (step, png) in meanwhile(stage)? {
            page.picture(&png, &format!("{} after {step} steps", stage.name));
        }
    }
    Ok(())
}

/// Most sample grids of a stage that are shown; of more, evenly spaced ones.
const GRIDS: usize = 6;

/// Sample grids that were drawn while a stage trained, with their steps.
fn meanwhile(stage: &StageResults) -> Result<Vec<(usize, Vec<u8>)>, RecipeError> {
    let Ok(entries) = std::fs::read_dir(stage.folder.join("quality")) else {
        return Ok(Vec::new());
    };
    let step = |path: PathBuf| -> Option<(usize, PathBuf)> {
        let step = path
            .file_name()?
            .to_str()?
            .strip_prefix("step-")?
            .parse()
            .ok()?;
        let picture = path.join(PICTURE_FILE);
        picture.exists().then_some((step, picture))
    };
    let mut found: Vec<(usize, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| step(entry.path()))
        .collect();
    found.sort();
    let shown = uniform(found.len(), found.len().min(GRIDS)).into_iter();
    shown
        .map(|index| {
            let (step, path) = &found[index];
            Ok((*step, std::fs::read(path).map_err(RecipeError::io(path))?))
        })
        .collect()
}

/// Keys and values, in two columns without titles.
pub(super) fn pairs(values: &Value) -> Grid {
    let lines = protocol_lines(values).into_iter();
    Grid {
        titles: vec!["".into(), "".into()],
        rows: lines.map(|(key, value)| vec![key, value]).collect(),
        best: None,
    }
}

/// How it was measured.
pub(super) fn protocol(page: &mut Page, protocol: &Value) {
    page.section("Protocol");
    let caption = "What the numbers can only be compared under";
    page.table(&pairs(protocol), caption);
}

/// The protocols of a run's evaluations, in their order, as far as they can be read.
pub(super) fn protocols_of(run: &Path) -> Vec<Value> {
    let stages = std::fs::read_dir(run).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = stages.map(|stage| stage.path().join(EVALUATION)).collect();
    files.sort();
    let found = files.iter().filter_map(|file| json(file).ok()?);
    found
        .map(|evaluation| evaluation["protocol"].clone())
        .collect()
}

/// How it was measured, on what, by which recipe, and how to do it again.
fn conditions(page: &mut Page, runs: &[Results]) {
    if let Some(evaluation) = runs.iter().find_map(Results::evaluation) {
        protocol(page, &evaluation["protocol"]);
    }
    let named = runs.len() > 1;
    for run in runs {
        page.section(&heading("Environment and recipe", run, named));
        page.table(&pairs(&run.environment), "");
        let steps = run.stages.iter().map(|stage| {
            let spent = stage.seconds.and_then(spent);
            vec![
                stage.name.clone(),
                stage.what.clone().unwrap_or_else(|| "not finished".into()),
                spent.unwrap_or_else(|| "-".into()),
            ]
        });
        let stages = Grid {
            titles: ["stage", "what", "time"].map(str::to_owned).to_vec(),
            rows: steps.collect(),
            best: None,
        };
        page.table(&stages, "");
        page.paragraph("", "To do it again:");
        page.verbatim(&format!(
            "tinyfusion recipe {}",
            run.path.join("resolved.toml").display()
        ));
        page.folded("The recipe, nothing left implicit", &run.recipe);
    }
}

fn heading(text: &str, run: &Results, named: bool) -> String {
    match named {
        true => format!("{text}: {}", run.name),
        false => text.to_owned(),
    }
}

/// What the names of a run's files begin with.
fn prefix(run: &Results, named: bool) -> String {
    match named {
        true => format!("{}-", run.name.replace('/', "-")),
        false => String::new(),
    }
}
