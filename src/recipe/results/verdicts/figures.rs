//! The figures of a sweep: which layers its cases keep, loss against FID, and FID against training.

use std::collections::BTreeMap;

use super::{Verdicts, mean_deviation};
use crate::recipe::schema::prune::MAX_DEPTH;
use crate::recipe::schema::sweep::label;
use crate::report::{Axis, Chart, Choice, Choices, Series, Style};

/// Most runs of a case that stand out in a figure; more are a crowd.
const STANDING_OUT: usize = 5;

/// Times the least training that the most is, from which on a figure's axis is logarithmic.
const WIDE: f64 = 10.0;

impl Verdicts {
    /// Figures of what there is so far, with the names of their files without an ending.
    pub fn charts(&self) -> Vec<(&'static str, Chart)> {
        let charts = [
            ("loss-fid", self.loss_against_fid()),
            ("images-fid", self.images_against_fid()),
        ];
        let drawn = charts.into_iter();
        drawn
            .filter_map(|(name, chart)| Some((name, chart?)))
            .collect()
    }

    /// Which layers the last models of the runs kept, and their FID, if there are several choices.
    /// Of a case that keeps the same layers under many settings, the best are taken.
    pub fn choices(&self) -> Option<Choices> {
        let mut found: Vec<(Option<&str>, Choice)> = Vec::new();
        let layers = self.layers()?;
        for group in self.groups() {
            let last = group.iter().filter_map(|run| run.verdicts.last());
            let chosen = last.filter_map(|row| Some((row.kept_among(layers)?, row.fid)));
            let (kept, fids): (Vec<&[usize]>, Vec<f64>) = chosen.unzip();
            if fids.is_empty() {
                continue;
            }
            let share = |layer: usize| {
                let keep = kept.iter().filter(|kept| kept.contains(&layer)).count();
                keep as f64 / kept.len() as f64
            };
            let choice = Choice {
                name: label(group[0].case.as_deref(), &group[0].settings),
                kept: (0..layers).map(share).collect(),
                fid: mean_deviation(&fids),
            };
            let case = group[0].case.as_deref();
            let same = |(of, known): &&mut (Option<&str>, Choice)| {
                *of == case && known.kept == choice.kept
            };
            match found.iter_mut().find(same) {
                Some((_, known)) if known.fid.0 <= choice.fid.0 => {}
                Some((_, known)) => *known = choice,
                None => found.push((case, choice)),
            }
        }
        let several = found
            .iter()
            .any(|(_, choice)| choice.kept != found[0].1.kept);
        let choices = Choices::new(found.into_iter().map(|(_, choice)| choice).collect());
        several.then_some(choices)
    }

    /// How many layers the first model that was pruned had before.
    fn layers(&self) -> Option<usize> {
        let rows = self.runs.iter().filter_map(|run| run.verdicts.last());
        let pruned = rows.clone().find(|row| row.kept.is_some())?;
        let layers = pruned.kept_of.or_else(|| {
            // Older files don't say it: the deepest model, or the last layer that is kept.
            let all = self.runs.iter().flat_map(|run| &run.verdicts);
            let depths = all.filter_map(|row| row.depth);
            let kept = rows.flat_map(|row| row.kept.iter().flatten());
            depths
                .chain(kept.map(|layer| layer.saturating_add(1)))
                .max()
        });
        // A file may say any depth; a recipe knows none beyond this.
        layers.filter(|layers| *layers <= 2 * MAX_DEPTH)
    }

    /// Each run's loss before training against its FID after it.
    fn loss_against_fid(&self) -> Option<Chart> {
        let mut series = Vec::new();
        for (name, runs) in self.cases() {
            let trained = runs.iter().filter_map(|run| run.trained());
            let points: Vec<(f64, f64)> = trained.map(|(loss, last)| (loss, last.fid)).collect();
            let style = match points.len() {
                0 => continue,
                few if few <= STANDING_OUT => Style::Dots,
                _ => Style::Crowd,
            };
            series.push(Series {
                name: name.to_owned(),
                style,
                points,
            });
        }
        // The crowd is drawn first, so that the others stand on it.
        series.sort_by_key(|series| series.style != Style::Crowd);
        let all: usize = series.iter().map(|series| series.points.len()).sum();
        let losses = (series.iter()).flat_map(|series| &series.points);
        let positive = losses.clone().all(|(loss, _)| *loss > 0.0);
        (all >= 2 && positive).then(|| Chart {
            title: "Does the loss of a pruned model tell its FID after training?".into(),
            x: Axis::log("loss before training"),
            y: Axis::linear("FID after training"),
            series,
        })
    }

    /// FID against the images that a model was trained on, a line for each case: the mean over all
    /// runs of as many images.
    fn images_against_fid(&self) -> Option<Chart> {
        let mut series = Vec::new();
        for (name, runs) in self.cases() {
            let mut fids: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
            for row in runs.iter().filter_map(|run| run.verdicts.last()) {
                let trained = row.images.unwrap_or(0);
                fids.entry(trained).or_default().push(row.fid);
            }
            let points = fids.iter();
            series.push(Series {
                name: name.to_owned(),
                style: Style::Line,
                points: points
                    .map(|(images, fids)| (*images as f64, mean_deviation(fids).0))
                    .collect(),
            });
        }
        series.retain(|series| series.points.len() > 1);
        let all = series.iter().flat_map(|series| &series.points);
        let (least, most) = all.fold((f64::MAX, 0.0_f64), |(least, most), (images, _)| {
            (least.min(*images), most.max(*images))
        });
        let x = match least > 0.0 && most >= WIDE * least {
            true => Axis::log,
            false => Axis::linear,
        };
        (!series.is_empty()).then(|| Chart {
            title: "FID against training".into(),
            x: x("images trained on"),
            y: Axis::log("FID"),
            series,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::RunVerdicts;
    use super::*;
    use crate::report::Scale;

    #[test]
    fn the_loss_is_held_against_the_fid_of_the_last_model() {
        let pair = |case: &str, steps: u64, loss: f64| {
            serde_json::json!({ "case": case, "seed": 0, "run": "x", "verdicts": [
            { "model": "p", "kept": [0], "loss": loss, "fid": 50.0, "inception_score": 9.0 },
            { "model": "s", "kept": [0], "images": steps, "fid": 9.0, "inception_score": 9.0 },
        ] })
        };
        let runs = [pair("a", 8, 0.5), pair("a", 16, 0.5), pair("b", 8, 0.7)];
        let drawn: Verdicts = serde_json::from_value(serde_json::json!({ "runs": runs })).unwrap();
        assert_eq!(drawn.loss_and_fid(), None, "too few pairs");
        // A model of other layers is not what became of the pruned one.
        let mut other = pair("a", 8, 0.5);
        other["verdicts"][1]["kept"] = serde_json::json!([1]);
        let other: RunVerdicts = serde_json::from_value(other).unwrap();
        assert!(other.trained().is_none());
        let charts = drawn.charts();
        assert_eq!(charts[0].1.series[0].points, [(0.5, 9.0), (0.5, 9.0)]);
        assert_eq!(charts[0].1.series[1].name, "b");
        // Of a single budget there is no line.
        assert_eq!(charts[1].1.series.len(), 1);
        assert_eq!(charts[1].1.series[0].points, [(8.0, 9.0), (16.0, 9.0)]);
        assert_eq!(charts[1].1.x.scale, Scale::Linear);
        let runs = [pair("a", 8, 0.5), pair("a", 80, 0.5)];
        let wide: Verdicts = serde_json::from_value(serde_json::json!({ "runs": runs })).unwrap();
        let chart = &wide.charts()[1].1;
        assert_eq!(chart.x.scale, Scale::Log);
        let run = |index: u64| {
            let row = |images: Option<u64>, loss: u64, fid: u64| serde_json::json!({ "model": "m", "images": images, "kept": [0], "loss": loss, "fid": fid, "inception_score": 9.0 });
            serde_json::json!({ "seed": index, "run": "x", "verdicts": [row(None, index, 5), row(Some(8), 200 - index, 100 - index)] })
        };
        let runs: Vec<_> = (0..12).map(run).collect();
        let verdicts: Verdicts =
            serde_json::from_value(serde_json::json!({ "runs": runs })).unwrap();
        let charts: Vec<_> = verdicts
            .charts()
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        // A loss of 0 has no place on its axis, and all are trained alike.
        assert!(charts.is_empty(), "{charts:?}");
        assert_eq!(
            verdicts.loss_and_fid().unwrap(),
            "loss of 12 pruned models against FID after training: rank correlation -1.00 (95%: -1.00 to -1.00); \
             of the loss after training: 1.00 (95%: 1.00 to 1.00)"
        );
        // A case of many is told of apart, one of few is not.
        let mut runs: Vec<_> = (0..12).map(run).collect();
        runs[0]["case"] = "a".into();
        runs[0]["verdicts"][1]["fid"] = 0.into();
        runs[1]["case"] = "a".into();
        let verdicts: Verdicts =
            serde_json::from_value(serde_json::json!({ "runs": runs })).unwrap();
        let told = verdicts.loss_and_fid().unwrap();
        assert!(!told.contains("`a`"), "{told}");
        let apart = "; of the 10 of `runs` alone: -1.00 (95%: -1.00 to -1.00); of the loss";
        assert!(told.contains(apart), "{told}");
    }

    #[test]
    fn choices_are_those_of_the_models_that_runs_end_with() {
        let run = |case: &str, seed: u64, kept: &[usize], fid: f64| {
            serde_json::json!({ "case": case, "seed": seed, "run": "x", "verdicts": [
                { "model": "teacher", "depth": 4, "fid": 5.0, "inception_score": 9.0 },
                { "model": "prune", "kept": [3], "fid": 90.0, "inception_score": 9.0 },
                { "model": "student", "kept": kept, "depth": 2, "fid": fid, "inception_score": 9.0 },
            ] })
        };
        let of = |runs: &[serde_json::Value]| -> Option<Choices> {
            let verdicts = serde_json::json!({ "runs": runs });
            let verdicts: Verdicts = serde_json::from_value(verdicts).unwrap();
            verdicts.choices()
        };
        let a = [run("a", 0, &[0, 1], 10.0), run("a", 1, &[0, 2], 14.0)];
        assert!(of(&a).is_none(), "a single choice is nothing to compare");
        let [first, second] = a;
        let b = run("b", 0, &[1, 2], 9.0);
        let choices = of(&[first.clone(), second.clone(), b.clone()]).unwrap();
        let choice = |name: &str, kept: [f64; 4], fid: (f64, f64)| Choice {
            name: name.into(),
            kept: kept.to_vec(),
            fid,
        };
        let expected = [
            choice("b", [0.0, 1.0, 1.0, 0.0], (9.0, 0.0)),
            choice("a", [1.0, 0.5, 0.5, 0.0], (12.0, 8.0_f64.sqrt())),
        ];
        assert_eq!(choices.rows(), expected);

        // The same layers under another setting, and worse.
        let mut longer = b.clone();
        longer["settings"] = serde_json::json!({ "stage.student.steps": "9" });
        longer["verdicts"][2]["fid"] = 11.0.into();
        let choices = of(&[longer, first.clone(), second.clone(), b.clone()]).unwrap();
        assert_eq!(choices.rows(), expected);

        // What is counted otherwise, and what no recipe says.
        let mut branches = b;
        branches["verdicts"][2]["kept_of"] = 8.into();
        let choices = of(&[first.clone(), second.clone(), branches.clone()]);
        assert!(choices.is_none(), "{choices:?}");
        branches["verdicts"][2]["kept_of"] = u64::MAX.into();
        assert!(of(&[branches, first, second]).is_none());
        assert!(of(&[run("c", 0, &[usize::MAX], 1.0)]).is_none());
    }
}
