//! How much faster smaller models are, of fewer layers and of fewer channels (the paper's
//! Figure 4).

use std::path::Path;
use std::time::Instant;

use super::context::Context;
use super::directory::write_text;
use crate::evaluation::median;
use crate::models::{ChannelGroup, Network, Prunable};
use crate::ops::{FusedOps, TrainingBackend};
use crate::pruning::{Leaves, kept_channels, prediction_loss, ranked, uniform, without};
use crate::recipe::RecipeError;
use crate::recipe::plan::AnalysePlan;
use crate::recipe::plan::analyse::{ROUNDS, SIZES};
use crate::recipe::plan::width::{Narrowed, narrow};
use crate::recipe::schema::width::{Amount, Importance, MULTIPLE, Parts, Width};
use crate::report::{Axis, Chart, Series, Style};
use crate::state::StateDict;
use crate::trunk::Granularity;
use crate::weights::Checkpoint;

/// Points that the curve of the ideal is drawn through.
const IDEAL: usize = 60;

/// How a model became smaller.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Depth,
    Width,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Depth => "depth",
            Self::Width => "width",
        }
    }
}

/// A model that is timed.
struct Timed<N> {
    way: Way,
    network: N,
    seconds: Vec<f64>,
}

impl<B: TrainingBackend> Context<'_, B> {
    /// Times smaller models, in turns.
    pub(super) fn show_speed(
        &self,
        plan: &AnalysePlan,
        parent: &Checkpoint,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let measuring = self.pictures_for(plan, parent)?;
        let batch = measuring.batch(0)?;
        let whole = measuring.network.architecture();
        let timed = |way, network| Timed {
            way,
            network,
            seconds: Vec::new(),
        };
        let shallower = shallower(&measuring.network).into_iter();
        let mut models: Vec<_> = shallower.map(|model| timed(Way::Depth, model)).collect();
        if let Some(groups) = whole.channel_groups() {
            let weights = parent.tensors.read_all()?;
            for size in (1..SIZES).rev() {
                let share = size as f64 / SIZES as f64;
                if let Some(model) = narrower(parent, (&groups, &weights), share) {
                    let network = model.network::<B::InnerBackend>(self.device)?;
                    models.push(timed(Way::Width, network.computing(self.recipe.compute)));
                }
            }
        }
        // The first pass has cold caches and untuned kernels.
        for round in 0..=ROUNDS {
            for model in &mut models {
                if self.stop.requested() {
                    return Err(RecipeError::Interrupted);
                }
                let begun = Instant::now();
                // Its value is read, so that the device is waited for.
                let _ = prediction_loss(&model.network, &measuring.process, &batch);
                if round > 0 {
                    model.seconds.push(begun.elapsed().as_secs_f64());
                }
            }
        }
        let (before, parameters) = (median(&models[0].seconds), whole.parameters() as f64);
        let mut text = String::from(
            "way,layers,parameters,MACs,seconds,parameters left out,time saved,speed-up\n",
        );
        // Nothing left out is the beginning of both.
        let mut points = [Way::Depth, Way::Width].map(|way| (way, vec![(0.0, 1.0)]));
        for (index, model) in models.iter().enumerate() {
            let (seconds, way) = (median(&model.seconds), model.way);
            let architecture = model.network.architecture();
            let left_out = 1.0 - architecture.parameters() as f64 / parameters;
            let (saved, speed_up) = (1.0 - seconds / before, before / seconds);
            text += &format!(
                "{},{},{},{},{seconds},{left_out},{saved},{speed_up}\n",
                way.name(),
                architecture.layers(Granularity::Block),
                architecture.parameters(),
                architecture.macs(),
            );
            for (_, points) in points.iter_mut().filter(|(of, _)| index > 0 && *of == way) {
                points.push((100.0 * left_out, speed_up));
            }
        }
        write_text(&folder.join("speed.csv"), &text)?;
        let furthest = points
            .iter()
            .flat_map(|(_, points)| points)
            .map(|(x, _)| *x);
        let furthest = furthest.fold(0.0, f64::max);
        let ideal = (0..=IDEAL).map(|step| furthest * step as f64 / IDEAL as f64);
        for (_, points) in &mut points {
            // Branches that were taken out before make layers of unlike sizes.
            points.sort_by(|(one, _), (other, _)| one.total_cmp(other));
        }
        let measured = points.into_iter().filter(|(_, points)| points.len() > 1);
        let mut series: Vec<Series> = measured
            .map(|(way, points)| Series {
                name: format!("{}, measured", way.name()),
                style: Style::Line,
                points,
            })
            .collect();
        series.push(Series {
            name: "time in proportion to parameters".into(),
            style: Style::Dashed,
            points: ideal.map(|x| (x, 100.0 / (100.0 - x))).collect(),
        });
        let chart = Chart {
            title: format!("Speed-up of smaller models, batch {}", plan.batch),
            x: Axis::linear("parameters left out, %"),
            y: Axis::linear("time before / time after"),
            series,
        };
        Ok(chart.draw(&folder.join("speed.svg"))?)
    }
}

/// Models of evenly fewer layers, the whole one first.
fn shallower<B: FusedOps>(network: &Network<B>) -> Vec<Network<B>> {
    let depth = network.trunk().depth;
    let sizes = (1..=SIZES).rev();
    let mut depths: Vec<usize> = sizes.map(|size| (depth * size).div_ceil(SIZES)).collect();
    depths.dedup();
    let keep = |depth_left| network.clone().keep(&uniform(depth, depth_left));
    depths.into_iter().map(keep).collect()
}

/// A model of all layers with about this share of the parameters; None where pruning in width can't
/// reach it by its default settings. Which channels leave makes no difference to the time.
fn narrower(
    parent: &Checkpoint,
    (groups, weights): (&[ChannelGroup], &StateDict),
    share: f64,
) -> Option<Checkpoint> {
    let leaves = Leaves::Dims;
    let settings = Width {
        importance: Importance::Random,
        amount: Amount::Parameters(share),
        parts: Parts::default(),
        leaves,
        multiple: MULTIPLE,
    };
    let Narrowed { keep, after } = narrow(&parent.architecture, groups, &settings, None).ok()?;
    let stay = |(group, keep): (&ChannelGroup, &usize)| {
        let alike = ranked(group, &vec![1.0; group.channels], leaves);
        kept_channels(group, &alike, *keep, leaves)
    };
    let kept: Vec<_> = groups.iter().zip(&keep).map(stay).collect();
    let left = without(weights.clone(), groups, &kept);
    let provenance = parent.provenance.clone();
    Some(Checkpoint::new(
        after,
        left.into(),
        provenance,
        &parent.path,
    ))
}
