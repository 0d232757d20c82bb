//! The stage that looks into a model: tables as CSV, and a figure of each.

use std::path::Path;

use super::context::Context;
use super::directory::write_text;
use super::measuring::{Measured, Measuring};
use crate::analysis::{LayerStates, similarity};
use crate::data::Split;
use crate::ops::TrainingBackend;
use crate::pruning::{Pick, Score, prediction_loss, uniform};
use crate::recipe::RecipeError;
use crate::recipe::plan::{AnalysePlan, Search};
use crate::recipe::schema::StageKind;
use crate::recipe::schema::analyse::View;
use crate::recipe::schema::prune::{FEATURES, MASKS, SCORES, Scored, TIMES};
use crate::recipe::schema::source::Source;
use crate::report::{Axis, Chart, Heatmap, Series, Style, csv_cell};
use crate::trunk::Granularity;
use crate::weights::Checkpoint;

/// Layers whose distribution is drawn, at most; the table has all.
const DRAWN: usize = 6;

impl<B: TrainingBackend> Context<'_, B> {
    pub(crate) fn analyse(
        &self,
        stage: &str,
        plan: &AnalysePlan,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let parent = self.load(&plan.from)?;
        let shows = |view: View| plan.show.contains(&view);
        // Scores and losses are shared; the first worker alone does the rest.
        let leads = self.workers.leads();
        if leads && (shows(View::States) || shows(View::Similarity)) {
            self.show_states(stage, plan, &parent, folder)?;
        }
        if shows(View::Scores) {
            self.show_scores(stage, plan, &parent, folder)?;
        }
        if shows(View::Losses) {
            self.show_losses(stage, plan, &parent, folder)?;
        }
        if leads && shows(View::Speed) {
            self.show_speed(plan, &parent, folder)?;
        }
        crate::say!("{stage}: figures and tables in {}", folder.display());
        Ok(())
    }

    /// Pictures that a model is looked at with.
    pub(super) fn pictures_for(
        &self,
        plan: &AnalysePlan,
        parent: &Checkpoint,
    ) -> Result<Measuring<'_, B>, RecipeError> {
        self.measuring(parent, Split::Train, self.recipe.seed, plan.batch, None)
    }

    fn show_states(
        &self,
        stage: &str,
        plan: &AnalysePlan,
        parent: &Checkpoint,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let states = self.pictures_for(plan, parent)?.trunk_states(stage)?;
        if plan.show.contains(&View::States) {
            let outputs = states.iter().flat_map(|states| states.iter().skip(1));
            let layers: Vec<LayerStates> = (outputs.enumerate())
                .map(|(layer, output)| LayerStates::new(layer, output, plan.k))
                .collect();
            write_states(&layers, plan.k, folder)?;
        }
        if plan.show.contains(&View::Similarity) {
            let values = states.iter().map(|states| similarity(states)).collect();
            draw_similarity(values, folder)?;
        }
        Ok(())
    }

    fn show_scores(
        &self,
        stage: &str,
        plan: &AnalysePlan,
        parent: &Checkpoint,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let methods = [
            (
                Score::Shortgpt,
                "shortgpt",
                FEATURES,
                "1 - cosine similarity of input and output",
            ),
            (
                Score::FluxLite,
                "flux-lite",
                FEATURES,
                "mean squared change of the hidden state",
            ),
            (
                Score::Sensitivity,
                "sensitivity",
                TIMES,
                "increase of the loss without the layer",
            ),
        ];
        let mut columns = Vec::new();
        for (method, name, timesteps, label) in methods {
            let scored = Scored {
                keep: plan.keep,
                batches: SCORES.0,
                batch: plan.batch,
                timesteps,
            };
            let measured = Measured {
                parent,
                granularity: Granularity::Block,
                scored: &scored,
            };
            let mut scores = self.measured_scores(stage, method, &measured)?;
            if method == Score::Shortgpt {
                // So that of all three the larger is the more important.
                scores.iter_mut().for_each(|score| *score = 1.0 - *score);
            }
            let mut points: Vec<(f64, f64)> = (scores.iter().enumerate())
                .map(|(layer, score)| (layer as f64 - 0.5, *score))
                .collect();
            points.push((scores.len() as f64 - 0.5, 0.0));
            let chart = Chart {
                title: format!("Layers by the score of {name}"),
                x: Axis::linear("layer"),
                y: Axis::linear(label),
                series: vec![Series {
                    name: name.into(),
                    style: Style::Bars,
                    points,
                }],
            };
            chart.draw(&folder.join(format!("scores-{name}.svg")))?;
            columns.push(scores);
        }
        let depth = columns[0].len();
        let lines = (0..depth).map(|layer| {
            format!(
                "{layer},{},{},{}\n",
                columns[0][layer], columns[1][layer], columns[2][layer]
            )
        });
        let header = "layer,shortgpt (1 - similarity),flux-lite,sensitivity\n".to_owned();
        write_text(
            &folder.join("scores.csv"),
            &(header + &lines.collect::<String>()),
        )
    }

    fn show_losses(
        &self,
        stage: &str,
        plan: &AnalysePlan,
        parent: &Checkpoint,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let scored = Scored {
            keep: plan.keep,
            batches: MASKS.0,
            batch: plan.batch.min(MASKS.1),
            timesteps: TIMES,
        };
        let measured = Measured {
            parent,
            granularity: Granularity::Block,
            scored: &scored,
        };
        let search = Search::Random {
            masks: plan.masks,
            pick: Pick::Lowest,
        };
        let masks = self.measured_masks(stage, search, &measured)?;
        write_text(&folder.join("masks.csv"), &masks.text)?;
        let depth = parent.denoiser()?.depth();
        let measuring = self.calibration(&measured)?;
        let process = &measuring.process;
        let batch = measuring.batch(0)?;
        let whole = prediction_loss(&measuring.network, process, &batch);
        let mut rows = String::from("model,kept,loss,share of random masks below\n");
        let losses = masks.losses();
        let mut series = vec![Series::histogram("random masks", &losses)];
        for Marked { name, kept, model } in self.marks(stage, plan, parent)? {
            let network = model.network(self.device)?.computing(self.recipe.compute);
            let loss = prediction_loss(&network, process, &batch);
            let below = losses.iter().filter(|other| **other < loss).count();
            let kept: Vec<String> = kept.iter().map(ToString::to_string).collect();
            let share = below as f64 / losses.len() as f64;
            rows += &format!("{},{},{loss},{share}\n", csv_cell(&name), kept.join(" "));
            series.push(rule(&name, loss));
        }
        let from = csv_cell(&plan.from.to_string());
        rows += &format!("{from} (all layers),,{whole},\n");
        series.push(rule("all layers", whole));
        write_text(&folder.join("losses-marked.csv"), &rows)?;
        let chart = Chart {
            title: format!(
                "Loss of {} random masks that keep {} of {depth} layers, before training",
                crate::report::thousands(losses.len()),
                plan.keep
            ),
            x: Axis::log("mean squared error"),
            y: Axis::linear("masks"),
            series,
        };
        Ok(chart.write(&folder.join("losses.svg"))?)
    }

    /// The pruned models that are marked.
    fn marks(
        &self,
        stage: &str,
        plan: &AnalysePlan,
        parent: &Checkpoint,
    ) -> Result<Vec<Marked>, RecipeError> {
        let fingerprint = parent.fingerprint()?;
        let fitting = |source: &Source| -> Result<Option<Marked>, RecipeError> {
            let model = self.load(source)?;
            let own = model.provenance.parent.as_ref() == Some(&fingerprint);
            let fits =
                own && model.architecture.is_whole() && model.architecture.depth() == plan.keep;
            let kept = model.provenance.kept.clone().filter(|_| fits);
            Ok(kept.map(|kept| Marked {
                name: source.to_string(),
                kept,
                model,
            }))
        };
        if let Some(mark) = &plan.mark {
            return (mark.iter())
                .map(|source| {
                    fitting(source)?.ok_or_else(|| RecipeError::Stage {
                        stage: stage.to_owned(),
                        problem: format!(
                            "`{source}` is not {} layers taken from `{}`, and its loss can't be marked",
                            plan.keep, plan.from
                        ),
                    })
                })
                .collect();
        }
        let earlier = self
            .recipe
            .stages
            .iter()
            .take_while(|other| other.name != stage);
        let prunes = earlier.filter(|other| matches!(other.kind, StageKind::Prune(_)));
        let mut marks = Vec::new();
        for other in prunes {
            marks.extend(fitting(&Source::Stage(other.name.clone()))?);
        }
        Ok(marks)
    }
}

/// A pruned model whose loss is marked.
struct Marked {
    name: String,
    /// Layers of its parent that it has.
    kept: Vec<usize>,
    model: Checkpoint,
}

/// Draws how alike the states between layers are, of each trunk apart: the states of an encoder and
/// of a decoder are of other places.
pub(super) fn draw_similarity(
    values: Vec<Vec<Vec<f64>>>,
    folder: &Path,
) -> Result<(), RecipeError> {
    let several = values.len() > 1;
    let trunks = ["encoder", "decoder"].into_iter();
    for (values, trunk) in values.into_iter().zip(trunks) {
        let (name, of) = match several {
            true => (
                format!("similarity-{trunk}.svg"),
                format!(" of the {trunk}"),
            ),
            false => ("similarity.svg".to_owned(), String::new()),
        };
        let map = Heatmap {
            title: format!("Similarity of the states between layers{of} (linear CKA)"),
            label: "before layer".into(),
            values,
        };
        map.write(&folder.join(name))?;
    }
    Ok(())
}

fn write_states(layers: &[LayerStates], k: f64, folder: &Path) -> Result<(), RecipeError> {
    let mut text = format!("layer,min,max,mean,standard deviation,share masked at k = {k}\n");
    for states in layers {
        let LayerStates {
            layer,
            min,
            max,
            mean,
            deviation,
            masked,
            ..
        } = states;
        text += &format!("{layer},{min},{max},{mean},{deviation},{masked}\n");
    }
    write_text(&folder.join("states.csv"), &text)?;
    let series = uniform(layers.len(), layers.len().min(DRAWN)).into_iter();
    let histograms = Chart {
        title: "Hidden states after some layers".into(),
        x: Axis::linear("value"),
        y: Axis::log("number of values"),
        series: series
            .map(|layer| &layers[layer])
            .map(|states| Series {
                name: format!(
                    "layer {}: {:.1} to {:.1}, deviation {:.2}, {:.1}% masked",
                    states.layer,
                    states.min,
                    states.max,
                    states.deviation,
                    100.0 * states.masked
                ),
                style: Style::Line,
                points: states.bins(),
            })
            .collect(),
    };
    histograms.write(&folder.join("states-histograms.svg"))?;
    let by_layer = |name: &str, of: fn(&LayerStates) -> f64| Series {
        name: name.to_owned(),
        style: Style::Line,
        // A state that is 0 everywhere has no place on an axis of logarithms.
        points: (layers.iter())
            .map(|states| (states.layer as f64, of(states)))
            .filter(|(_, value)| *value > 0.0)
            .collect(),
    };
    let range = Chart {
        title: "Range of the hidden states by layer".into(),
        x: Axis::linear("layer"),
        y: Axis::log("absolute value"),
        series: vec![
            by_layer("largest absolute value", |states| {
                states.max.abs().max(states.min.abs())
            }),
            by_layer("standard deviation", |states| states.deviation),
        ],
    };
    Ok(range.draw(&folder.join("states-by-layer.svg"))?)
}

fn rule(name: &str, at: f64) -> Series {
    Series {
        name: name.to_owned(),
        style: Style::Rule,
        points: vec![(at, 0.0)],
    }
}
