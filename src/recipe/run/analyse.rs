//! The stage that looks into a model: tables as CSV, and a figure of each.

use std::path::Path;
use std::time::Instant;

use super::context::Context;
use super::measuring::{Measured, Measuring};
use crate::analysis::{HiddenStates, LayerStates, similarity};
use crate::data::Split;
use crate::evaluation::Speed;
use crate::models::Prunable;
use crate::ops::TrainingBackend;
use crate::pruning::{Pick, Score, mask_losses, mask_of, prediction_loss, uniform};
use crate::recipe::RecipeError;
use crate::recipe::plan::{AnalysePlan, LOSS_BATCH, Search};
use crate::recipe::schema::StageKind;
use crate::recipe::schema::analyse::View;
use crate::recipe::schema::prune::{FEATURES, SCORES, Scored, TIMES};
use crate::recipe::schema::source::Source;
use crate::report::{Axis, Chart, Heatmap, Series, Style};
use crate::trunk::Granularity;
use crate::weights::Checkpoint;

/// Layers whose distribution is drawn, at most; the table has all.
const DRAWN: usize = 6;
/// Rounds in each of which a model of every depth is timed once.
const ROUNDS: usize = 5;

impl<B: TrainingBackend> Context<'_, B> {
    pub(crate) fn analyse(
        &self,
        stage: &str,
        plan: &AnalysePlan,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let parent = self.load(&plan.from)?;
        let shows = |view: View| plan.show.contains(&view);
        if shows(View::States) || shows(View::Similarity) {
            self.show_states(plan, &parent, folder)?;
        }
        if shows(View::Scores) {
            self.show_scores(stage, plan, &parent, folder)?;
        }
        if shows(View::Losses) {
            self.show_losses(stage, plan, &parent, folder)?;
        }
        if shows(View::Speed) {
            self.show_speed(plan, &parent, folder)?;
        }
        crate::say!("{stage}: figures and tables in {}", folder.display());
        Ok(())
    }

    /// Pictures that a model is looked at with.
    fn pictures_for(
        &self,
        plan: &AnalysePlan,
        parent: &Checkpoint,
    ) -> Result<Measuring<'_, B>, RecipeError> {
        self.measuring(parent, Split::Train, self.recipe.seed, plan.batch, None)
    }

    fn show_states(
        &self,
        plan: &AnalysePlan,
        parent: &Checkpoint,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let measuring = self.pictures_for(plan, parent)?;
        let batch = measuring.batch(0)?;
        let mut hook = HiddenStates::new(plan.k);
        let seen = batch.noised(&measuring.process);
        seen.run(&measuring.process, &measuring.network, &mut hook);
        if plan.show.contains(&View::States) {
            write_states(&hook.layers, plan.k, folder)?;
        }
        if plan.show.contains(&View::Similarity) {
            let map = Heatmap {
                title: "Similarity of layers' outputs (linear CKA)".into(),
                label: "layer".into(),
                values: similarity(&hook.outputs),
            };
            map.write(&folder.join("similarity.svg"))?;
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
                FEATURES,
                "1 - cosine similarity of input and output",
            ),
            (
                Score::FluxLite,
                FEATURES,
                "mean squared change of the hidden state",
            ),
            (
                Score::Sensitivity,
                TIMES,
                "increase of the loss without the layer",
            ),
        ];
        let mut columns = Vec::new();
        for (method, timesteps, label) in methods {
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
            let name = match method {
                Score::Shortgpt => "shortgpt",
                Score::FluxLite => "flux-lite",
                Score::Sensitivity => "sensitivity",
            };
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
        write(folder, "scores.csv", &(header + &lines.collect::<String>()))
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
            batches: 1,
            batch: plan.batch.min(LOSS_BATCH),
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
        write(folder, "masks.csv", &masks.text)?;
        let marks = self.marks(stage, plan, parent)?;
        let depth = parent.denoiser()?.depth();
        let measuring = self.calibration(&measured)?;
        let (network, process) = (&measuring.network, &measuring.process);
        let chosen: Vec<_> = (marks.iter())
            .map(|(_, kept)| mask_of(kept, depth))
            .collect();
        let marked = mask_losses(
            network,
            process,
            &measuring.batch(0)?,
            &chosen,
            self.stop,
            |_| {},
        );
        let marked = marked.ok_or(RecipeError::Interrupted)?;
        let whole = prediction_loss(network, process, &measuring.batch(0)?);
        let mut rows = String::from("model,kept,loss,share of random masks below\n");
        let losses = masks.losses();
        let mut series = vec![Series::histogram("random masks", &losses)];
        for ((name, kept), loss) in marks.iter().zip(&marked) {
            let below = losses.iter().filter(|other| *other < loss).count();
            let kept: Vec<String> = kept.iter().map(ToString::to_string).collect();
            let share = below as f64 / losses.len() as f64;
            rows += &format!("{name},{},{loss},{share}\n", kept.join(" "));
            series.push(rule(name, *loss));
        }
        rows += &format!("{} (all layers),,{whole},\n", plan.from);
        series.push(rule("all layers", whole));
        write(folder, "losses-marked.csv", &rows)?;
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

    /// Names and kept layers of the pruned models that are marked.
    fn marks(
        &self,
        stage: &str,
        plan: &AnalysePlan,
        parent: &Checkpoint,
    ) -> Result<Vec<(String, Vec<usize>)>, RecipeError> {
        let fingerprint = parent.fingerprint()?;
        let fitting = |source: &Source| -> Result<Option<(String, Vec<usize>)>, RecipeError> {
            let checkpoint = self.load(source)?;
            let provenance = checkpoint.provenance;
            let own = provenance.parent.as_ref() == Some(&fingerprint);
            let kept = provenance.kept.filter(|kept| kept.len() == plan.keep);
            let kept = kept.filter(|_| own && provenance.granularity.is_block());
            Ok(kept.map(|kept| (source.to_string(), kept)))
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

    /// Times models of fewer layers, in turns.
    fn show_speed(
        &self,
        plan: &AnalysePlan,
        parent: &Checkpoint,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let measuring = self.pictures_for(plan, parent)?;
        let (network, process) = (&measuring.network, &measuring.process);
        let batch = measuring.batch(0)?;
        let depth = network.trunk().depth;
        let mut depths: Vec<usize> = (1..=8).map(|eighth| (depth * eighth).div_ceil(8)).collect();
        depths.dedup();
        let models: Vec<_> = (depths.iter())
            .map(|keep| network.clone().keep(&uniform(depth, *keep)))
            .collect();
        let mut seconds = vec![Vec::new(); models.len()];
        // The first pass has cold caches and untuned kernels.
        for round in 0..=ROUNDS {
            for (model, seconds) in models.iter().zip(&mut seconds) {
                if self.stop.requested() {
                    return Err(RecipeError::Interrupted);
                }
                let begun = Instant::now();
                // Its value is read, so that the device is waited for.
                let _ = prediction_loss(model, process, &batch);
                if round > 0 {
                    seconds.push(begun.elapsed().as_secs_f64());
                }
            }
        }
        let median = |seconds: &[f64]| Speed::of(seconds).map_or(f64::NAN, |speed| speed.median);
        let whole = median(&seconds[models.len() - 1]);
        let macs = |index: usize| models[index].architecture().macs() as f64;
        let mut text =
            String::from("layers,MACs,seconds,share of time saved,speed-up,compression\n");
        let (mut measured, mut ideal) = (Vec::new(), Vec::new());
        for (index, keep) in depths.iter().enumerate() {
            let spent = median(&seconds[index]);
            let compression = depth as f64 / *keep as f64;
            let speed_up = whole / spent;
            text += &format!(
                "{keep},{},{spent},{},{speed_up},{compression}\n",
                macs(index),
                1.0 - spent / whole
            );
            measured.push((compression, speed_up));
            ideal.push((compression, compression));
        }
        write(folder, "speed.csv", &text)?;
        let chart = Chart {
            title: format!(
                "Speed-up of models of fewer layers than {depth}, batch {}",
                plan.batch
            ),
            x: Axis::linear("layers before / layers after"),
            y: Axis::linear("time before / time after"),
            series: vec![
                Series {
                    name: "depth, measured".into(),
                    style: Style::Line,
                    points: measured,
                },
                Series {
                    name: "depth, ideal".into(),
                    style: Style::Dashed,
                    points: ideal,
                },
            ],
        };
        Ok(chart.draw(&folder.join("speed.svg"))?)
    }
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
    write(folder, "states.csv", &text)?;
    let series = uniform(layers.len(), layers.len().min(DRAWN)).into_iter();
    let histograms = Chart {
        title: "Hidden states after some layers".into(),
        x: Axis::linear("value"),
        y: Axis::log("number of values"),
        series: series
            .map(|layer| Series {
                name: format!(
                    "layer {layer} ({:.1}% masked)",
                    100.0 * layers[layer].masked
                ),
                style: Style::Line,
                points: layers[layer].bins(),
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

fn write(folder: &Path, name: &str, text: &str) -> Result<(), RecipeError> {
    let path = folder.join(name);
    crate::files::write_atomic(&path, |file| {
        std::io::Write::write_all(file, text.as_bytes())
    })
    .map_err(RecipeError::io(&path))
}
