//! The page of one run or of several.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Verdicts;
use super::figures::{self, Figure};
use super::{
    PAGE, Results, Scored, StageResults, comparable, compared, json, models, run_name, spent,
    unlike,
};
use crate::pruning::uniform;
use crate::recipe::RecipeError;
use crate::recipe::run::directory::{EVALUATION, write_text};
use crate::recipe::schema::prune::MAX_DEPTH;
use crate::report::{Choices, Grid, Page, protocol_lines, rounded, thousands, verdict_grid};
use crate::sampling::PICTURE_FILE;

/// Figures that stages draw themselves, with the table beside each.
const DRAWN: [(&str, &str, &str); 9] = [
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
    ("speed.svg", "speed.csv", "How much faster fewer layers are"),
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
        .filter_map(|(_, folder)| protocol_of(&sweep.join(folder)))
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
    for (label, folder) in &runs {
        let target = folder.join(PAGE);
        match into == sweep && sweep.join(&target).exists() {
            true => page.link(&target.to_string_lossy(), label),
            false => page.paragraph("", &format!("{label}: {}", folder.display())),
        }
    }
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

/// Files beside the page, by their names.
#[derive(Default)]
struct Beside(Vec<(String, String)>);

impl Beside {
    /// Puts a table on the page, with its other forms one click away and beside it.
    fn table(&mut self, page: &mut Page, grid: &Grid, caption: &str) {
        page.table(grid, caption);
        let (csv, markdown, latex) = (grid.csv(), grid.markdown(), grid.latex());
        page.downloads(&[
            ("CSV", "models.csv", &csv),
            ("Markdown", "models.md", &markdown),
            ("LaTeX", "models.tex", &latex),
        ]);
        self.0.extend([
            ("models.csv".into(), csv),
            ("models.md".into(), markdown),
            ("models.tex".into(), latex),
        ]);
    }

    /// Writes the page, and its files beside it.
    fn finish(
        self,
        page: Page,
        into: &Path,
        lead: &str,
        renewed: Option<u32>,
    ) -> Result<PathBuf, RecipeError> {
        let folder = into.join("report");
        std::fs::create_dir_all(&folder).map_err(RecipeError::io(&folder))?;
        for (name, text) in &self.0 {
            write_text(&folder.join(name), text)?;
        }
        let path = into.join(PAGE);
        write_text(&path, &page.finish(lead, renewed))?;
        Ok(path)
    }

    /// Puts a figure on the page, and its files beside it.
    fn show(&mut self, page: &mut Page, (name, chart): Figure, prefix: &str) {
        // What can't be drawn, such as a curve of one value that is not finite, is left out.
        let Ok(svg) = chart.svg() else {
            return;
        };
        let name = format!("{prefix}{name}");
        self.drawing(page, &name, &chart.title, (svg, chart.csv()));
    }

    /// Puts a drawing on the page, with its data.
    fn drawing(&mut self, page: &mut Page, name: &str, title: &str, (svg, csv): (String, String)) {
        page.drawing(&svg, title, Some((&format!("{name}.csv"), &csv)));
        self.0.push((format!("{name}.svg"), svg));
        self.0.push((format!("{name}.csv"), csv));
    }
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
    let all: Vec<Scored> = (runs.iter())
        .filter_map(Results::evaluation)
        .flat_map(models)
        .collect();
    if let Some(text) = verdict(&all) {
        page.paragraph("verdict", &text);
    }
    let mut grid = match runs {
        [run] => run.evaluation().map(verdict_grid).unwrap_or_default(),
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

/// The row of the lowest FID among those of models.
fn best_row(grid: &Grid) -> Option<usize> {
    let column = |title: &str| grid.titles.iter().position(|known| known == title);
    // Real pictures have no parameters.
    let (fid, parameters) = (column("FID")?, column("params")?);
    let of_models = grid
        .rows
        .iter()
        .enumerate()
        .filter(|(_, row)| row[parameters] != "-");
    // Of a mean and its deviation, the mean.
    let value = |cell: &str| cell.split(' ').next()?.parse::<f64>().ok();
    let scored = of_models.filter_map(|(index, row)| Some((index, value(&row[fid])?)));
    scored
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(index, _)| index)
}

/// The best of the models that compute less, or of all where none does, beside the largest and the
/// next best.
fn verdict(models: &[Scored]) -> Option<String> {
    let largest = models
        .iter()
        .reduce(|a, b| if b.macs > a.macs { b } else { a })?;
    let mut ranked: Vec<&Scored> = (models.iter())
        .filter(|model| model.macs < largest.macs)
        .collect();
    let smaller = !ranked.is_empty();
    if !smaller {
        ranked = models.iter().collect();
    }
    ranked.sort_by(|a, b| a.fid.total_cmp(&b.fid));
    let best = ranked.first()?;
    let mut text = format!("{}: FID {}", best.name, rounded(best.fid));
    let depths = best.depth.zip(largest.depth).filter(|(a, b)| a != b);
    if let Some((depth, _)) = depths {
        text += &format!(" with {depth} layers");
    }
    if smaller {
        let pace = best.speed.zip(largest.speed);
        let pace = pace.map_or_else(
            || "beside".to_owned(),
            |(fast, slow)| format!("{} times as fast as", rounded(fast / slow)),
        );
        let fid = rounded(largest.fid);
        text += &format!(", {pace} {}, which has {fid}", largest.name);
        if let Some((_, depth)) = depths {
            text += &format!(" with {depth}");
        }
    }
    text += ".";
    if let Some(next) = ranked.iter().find(|model| model.name != best.name) {
        text += &format!(" Next best: {}, {}.", next.name, rounded(next.fid));
    }
    Some(text)
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
        let caption = match stage.evaluation.as_ref().map(models) {
            Some(models) if !models.is_empty() => {
                let names: Vec<String> = models.into_iter().map(|model| model.name).collect();
                format!("From the same noise, from above: {}", names.join(", "))
            }
            _ => format!("Samples of stage {}", stage.name),
        };
        page.picture(&png, &caption);
    }
    Ok(())
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
        // A model that was healed or lost width has the layers of the one before it.
        let prunes = stage
            .what
            .as_ref()
            .is_some_and(|what| what.starts_with("prune,"));
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
fn pairs(values: &Value) -> Grid {
    let lines = protocol_lines(values).into_iter();
    Grid {
        titles: vec!["".into(), "".into()],
        rows: lines.map(|(key, value)| vec![key, value]).collect(),
        best: None,
    }
}

/// How it was measured.
fn protocol(page: &mut Page, protocol: &Value) {
    page.section("Protocol");
    let caption = "What the numbers can only be compared under";
    page.table(&pairs(protocol), caption);
}

/// The protocol of a run's last evaluation; none where it can't be read.
fn protocol_of(run: &Path) -> Option<Value> {
    let stages = std::fs::read_dir(run).ok()?.flatten();
    let files = stages.map(|stage| stage.path().join(EVALUATION));
    let last = files.filter(|file| file.exists()).max()?;
    let evaluation = json(&last).ok()??;
    Some(evaluation["protocol"].clone())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_the_smaller_models_comes_first() {
        let scored = |name: &str, depth: Option<usize>, macs: f64, fid: f64| Scored {
            name: name.into(),
            depth,
            macs,
            fid,
            speed: Some(600.0 / macs),
            images: 0,
        };
        let teacher = scored("teacher", Some(28), 60.0, 20.0);
        let said = |models: &[&Scored]| {
            let models: Vec<Scored> = models.iter().map(|model| (*model).clone()).collect();
            verdict(&models).unwrap()
        };
        let (a, b) = (
            scored("a", Some(14), 30.0, 40.0),
            scored("b", Some(14), 30.0, 30.0),
        );
        assert_eq!(
            said(&[&teacher, &a, &b]),
            "b: FID 30.0 with 14 layers, 2.00 times as fast as teacher, which has 20.0 with 28. Next best: a, 40.0."
        );
        // As deep, but narrower; and a network without layers.
        let narrow = scored("narrow", Some(28), 30.0, 40.0);
        assert_eq!(
            said(&[&teacher, &narrow]),
            "narrow: FID 40.0, 2.00 times as fast as teacher, which has 20.0."
        );
        let unet = scored("unet", None, 30.0, 40.0);
        assert_eq!(
            said(&[&teacher, &unet]),
            "unet: FID 40.0, 2.00 times as fast as teacher, which has 20.0."
        );
        assert_eq!(said(&[&a, &b]), "b: FID 30.0. Next best: a, 40.0.");
        assert!(verdict(&[]).is_none());
    }

    #[test]
    fn the_best_row_is_that_of_a_model() {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        let mut grid = Grid {
            titles: row(["model", "params", "FID"]),
            rows: vec![
                row(["real", "-", "1.00 ± 0.00"]),
                row(["a", "2M", "30.00 ± 4.00"]),
                row(["b", "1M", "9.00 ± 1.00"]),
            ],
            best: None,
        };
        assert_eq!(best_row(&grid), Some(2));
        grid.rows.truncate(1);
        assert_eq!(best_row(&grid), None);
    }
}
