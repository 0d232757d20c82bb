//! Figures made of what runs have left.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Results, Scored, StageResults, scored};
use crate::recipe::RecipeError;
use crate::recipe::run::evaluate::QUALITY;
use crate::report::{Axis, Chart, Series, Style, thousands};

/// Most points of a curve; a finer one is averaged.
const POINTS: usize = 300;

/// A chart, and the name of its files.
pub(super) type Figure = (String, Chart);

/// Curves of a stage's training.
pub(super) fn training(stage: &StageResults) -> Result<Vec<Figure>, RecipeError> {
    let Some(text) = stage.text("metrics.jsonl")? else {
        return Ok(Vec::new());
    };
    let mut curves: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    // A last line may be half written while the run goes on.
    for line in text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
    {
        let Some(step) = line["step"].as_f64() else {
            continue;
        };
        for (key, value) in line.as_object().into_iter().flatten() {
            if let Some(value) = value.as_f64().filter(|value| value.is_finite()) {
                curves.entry(key.clone()).or_default().push((step, value));
            }
        }
    }
    for key in ["step", "time", "images", "skipped"] {
        curves.remove(key);
    }
    let mut take = |key: &str| Some((key.to_owned(), curves.remove(key)?));
    let single = [
        ("lr", "learning rate"),
        ("grad_norm", "norm of the gradient"),
        ("images_per_second", "images a second"),
    ]
    .map(|(key, label)| (key, label, take(key).into_iter().collect::<Vec<_>>()));
    let gates: Vec<_> = ["tau", "scaling", "confidence"]
        .into_iter()
        .filter_map(&mut take)
        .collect();
    let losses: Vec<_> = curves.into_iter().collect();
    let mut figures = vec![("loss", "loss and its terms", losses)];
    figures.extend(single);
    figures.push((
        "gates",
        "temperature, scaling and confidence of the gates",
        gates,
    ));
    let figures = figures
        .into_iter()
        .filter(|(_, _, curves)| !curves.is_empty());
    Ok(figures
        .map(|(key, label, curves)| {
            let series: Vec<Series> = (curves.into_iter())
                .map(|(name, points)| Series {
                    name,
                    style: Style::Line,
                    points: averaged(&points),
                })
                .collect();
            let mut all = series.iter().flat_map(|series| &series.points);
            let axis = match all.all(|(_, value)| *value > 0.0) && key != "images_per_second" {
                true => Axis::log(label),
                false => Axis::linear(label),
            };
            let chart = Chart {
                title: format!("{}: {label}", stage.name),
                x: Axis::linear("step"),
                y: axis,
                series,
            };
            (format!("{}-{key}", stage.name), chart)
        })
        .collect())
}

/// At most [`POINTS`] points, each the mean of as many neighbours.
fn averaged(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mean = |part: &[(f64, f64)]| {
        let count = part.len() as f64;
        let sum = part
            .iter()
            .fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / count, sum.1 / count)
    };
    points
        .chunks(points.len().div_ceil(POINTS).max(1))
        .map(mean)
        .collect()
}

/// Quality by step, of a stage that was measured while it trained.
pub(super) fn quality(stage: &StageResults) -> Result<Option<Figure>, RecipeError> {
    let Some(text) = stage.text(QUALITY)? else {
        return Ok(None);
    };
    let point = |line: &str| -> Option<(f64, f64)> {
        let line: Value = serde_json::from_str(line).ok()?;
        Some((line["step"].as_f64()? + 1.0, line["fid"].as_f64()?))
    };
    let points: Vec<(f64, f64)> = text.lines().filter_map(point).collect();
    let samples = text.lines().find_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        line["samples"].as_u64()
    });
    // Of fewer than the tables' it is higher.
    let of = samples.map_or(String::new(), |count| {
        format!(" of {} samples", thousands(count as usize))
    });
    let chart = Chart {
        title: format!("{}: FID while it is trained", stage.name),
        x: Axis::linear("step").including(0.0),
        y: Axis::log(format!("FID{of}, lower is better")),
        series: vec![Series {
            name: "moving average".into(),
            style: Style::Line,
            points,
        }],
    };
    Ok(Some((format!("{}-quality", stage.name), chart)))
}

/// Scores of layers by a method.
pub(super) fn scores(stage: &StageResults) -> Result<Option<Figure>, RecipeError> {
    let Some(text) = stage.text("scores.json")? else {
        return Ok(None);
    };
    let Ok(found) = serde_json::from_str::<Value>(&text) else {
        return Ok(None);
    };
    let numbers = found["scores"].as_array().into_iter().flatten();
    let scores: Vec<f64> = numbers.filter_map(Value::as_f64).collect();
    let kept = found["kept"].as_array().into_iter().flatten();
    let kept: Vec<u64> = kept.filter_map(Value::as_u64).collect();
    let bars = |name: &str, of_kept: bool| {
        let layer = |(layer, score): (usize, &f64)| {
            let shown = kept.contains(&(layer as u64)) == of_kept;
            (layer as f64 - 0.5, if shown { *score } else { 0.0 })
        };
        let mut points: Vec<(f64, f64)> = scores.iter().enumerate().map(layer).collect();
        points.push((scores.len() as f64 - 0.5, 0.0));
        Series {
            name: name.into(),
            style: Style::Bars,
            points,
        }
    };
    let method = found["method"].as_str().unwrap_or("score");
    let chart = Chart {
        title: format!("{}: layers by {method}", stage.name),
        x: Axis::linear("layer"),
        y: Axis::linear(method),
        series: vec![bars("kept", true), bars("removed", false)],
    };
    Ok((!scores.is_empty()).then(|| (format!("{}-scores", stage.name), chart)))
}

/// Losses of the masks that were measured.
pub(super) fn masks(stage: &StageResults) -> Result<Option<Figure>, RecipeError> {
    let Some(text) = stage.text("masks.csv")? else {
        return Ok(None);
    };
    let loss = |line: &str| line.rsplit_once(',')?.1.parse::<f64>().ok();
    let losses: Vec<f64> = text
        .lines()
        .skip(1)
        .filter_map(loss)
        .filter(|loss| *loss > 0.0)
        .collect();
    if losses.len() < 2 {
        return Ok(None);
    }
    let chart = Chart {
        title: format!("{}: loss of the masks before training", stage.name),
        x: Axis::log("mean squared error"),
        y: Axis::linear("masks"),
        series: vec![Series::histogram("measured masks", &losses)],
    };
    Ok(Some((format!("{}-masks", stage.name), chart)))
}

/// Quality against speed, against training, and speed-up against compression.
pub(super) fn models_of(runs: &[Results]) -> Vec<Figure> {
    let all = scored(runs);
    let mut figures = Vec::new();
    let dots = |place: &dyn Fn(&Scored) -> Option<(f64, f64)>| -> Vec<Series> {
        let placed = all.iter().filter_map(|model| Some((model, place(model)?)));
        placed
            .map(|(model, point)| Series {
                name: model.name.clone(),
                style: Style::Dots,
                points: vec![point],
            })
            .collect()
    };
    let speed = dots(&|model| Some((model.speed?, model.fid)));
    if speed.len() > 1 {
        let chart = Chart {
            title: "Quality against speed".into(),
            x: Axis::linear("images a second").including(0.0),
            y: Axis::log("FID, lower is better"),
            series: speed,
        };
        figures.push(("speed-fid".into(), chart));
    }
    let budgets: Vec<usize> = all.iter().map(|model| model.images).collect();
    if budgets
        .iter()
        .any(|images| *images > 0 && *images != budgets[0])
    {
        let chart = Chart {
            title: "Quality against training".into(),
            x: Axis::linear("images that the last stage trained on").including(0.0),
            y: Axis::log("FID, lower is better"),
            series: dots(&|model| Some((model.images as f64, model.fid))),
        };
        figures.push(("images-fid".into(), chart));
    }
    let deepest = all.iter().max_by_key(|model| model.macs as u64);
    if let Some(whole) = deepest
        && let Some(pace) = whole.speed
    {
        let place = |model: &Scored| Some((whole.macs / model.macs, model.speed? / pace));
        let mut series = dots(&place);
        let most = all
            .iter()
            .map(|model| whole.macs / model.macs)
            .fold(1.0, f64::max);
        if most > 1.0 {
            series.push(Series {
                name: "ideal".into(),
                style: Style::Dashed,
                points: vec![(1.0, 1.0), (most, most)],
            });
            let chart = Chart {
                title: "Speed-up against compression".into(),
                x: Axis::linear("arithmetic of the largest model / of the model"),
                y: Axis::linear("times as fast as the largest model"),
                series,
            };
            figures.push(("speed-up".into(), chart));
        }
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_curves_are_averaged() {
        let points: Vec<(f64, f64)> = (0..900).map(|step| (f64::from(step), 1.0)).collect();
        let fewer = averaged(&points);
        assert_eq!(fewer.len(), 300);
        assert_eq!(fewer[0], (1.0, 1.0));
        assert_eq!(averaged(&points[..7]).len(), 7);
        assert!(averaged(&[]).is_empty());
    }
}
