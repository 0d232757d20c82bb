//! Pruning decisions over the course of training, as in Figure 6 of the TinyFusion paper (Fang et
//! al. 2024, arXiv:2412.01199).
//!
//! The learnable masks choose `keep` of every `of` consecutive layers. Each logged step draws the
//! chosen layers as short bars, the more opaque the more probable the choice: a run that has not
//! decided yet is pale and jumps between layers, a converged one is a set of solid lines.

use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;

use super::ReportError;
use super::decision_history::DecisionHistory;
use crate::files::write_atomic;

/// Size of the plot in pixels, excluding the height of the layers.
const WIDTH: u32 = 960;
const HEAD_AND_FOOT: u32 = 130;

/// Colours of the groups, alternating.
const COLOURS: [RGBColor; 2] = [RGBColor(31, 95, 170), RGBColor(196, 84, 22)];

/// Approximate width of a character at font size one; SVG viewers' fonts differ.
const CHARACTER_WIDTH: f64 = 0.55;

/// Writes `history` as an SVG: training steps to the right, layers (0 is the first) upwards, groups
/// as shaded bands, and bars whose opacity is the probability of the choice.
///
/// Of histories with more than 400 logged steps, evenly spaced ones are drawn. The file appears
/// whole or not at all.
/// or not at all.
///
/// # Errors
///
/// [`ReportError::Invalid`] when the history is empty or contradicts itself (the message says
/// where), [`ReportError::Io`] when the file cannot be written.
pub fn decision_svg(path: &Path, history: &DecisionHistory) -> Result<(), ReportError> {
    let invalid = |problem| ReportError::Invalid {
        path: path.to_owned(),
        problem,
    };
    history.check().map_err(invalid)?;
    let svg = draw(history).map_err(|error| invalid(error.to_string()))?;
    write_atomic(path, |file| std::io::Write::write_all(file, svg.as_bytes())).map_err(|source| {
        ReportError::Io {
            path: path.to_owned(),
            source,
        }
    })
}

type DrawError<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

fn draw(history: &DecisionHistory) -> Result<String, Box<dyn std::error::Error>> {
    let depth = history.depth;
    // Room for every layer's number, or less if there are too many layers to number.
    let layer_height = (600 / depth as u32).clamp(6, 20);
    let mut svg = String::new();
    {
        let height = HEAD_AND_FOOT + depth as u32 * layer_height;
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE)?;
        draw_head(&root, history).map_err(|error| error.to_string())?;

        let steps = history.steps[0] as f64..history.end();
        let layers = LayerAxis {
            depth,
            every: 14u32.div_ceil(layer_height) as usize,
        };
        let mut chart = ChartBuilder::on(&root)
            .margin_top(62)
            .margin_right(24)
            .margin_bottom(8)
            .margin_left(8)
            .x_label_area_size(42)
            .y_label_area_size(52)
            .build_cartesian_2d(steps.clone(), layers)?;

        for (group, band) in history
            .bands()
            .enumerate()
            .filter(|(_, band)| !band.is_empty())
        {
            let (bottom, top) = (band.start as f64 - 0.5, band.end as f64 - 0.5);
            let shade = COLOURS[group % COLOURS.len()].mix(0.06).filled();
            let corners = [(steps.start, bottom), (steps.end, top)];
            chart.draw_series([Rectangle::new(corners, shade)])?;
        }
        chart
            .configure_mesh()
            .disable_mesh()
            .axis_style(BLACK.mix(0.6))
            .x_desc("training step")
            .y_desc("layer")
            .x_labels(8)
            .y_labels(depth)
            .x_label_formatter(&step_label)
            .label_style(("sans-serif", 12))
            .axis_desc_style(("sans-serif", 14))
            .draw()?;
        chart.draw_series(history.bars().into_iter().map(|bar| {
            let layer = bar.layer as f64;
            let style = COLOURS[bar.group % COLOURS.len()].mix(bar.opacity).filled();
            Rectangle::new([(bar.from, layer - 0.32), (bar.until, layer + 0.32)], style)
        }))?;
        root.present()?;
    }
    Ok(svg)
}

/// Steps are integers; a short run has tick marks between them, which get no label.
fn step_label(step: &f64) -> String {
    if (step - step.round()).abs() < 1e-6 {
        format!("{step:.0}")
    } else {
        String::new()
    }
}

/// An axis from below the first layer to above the last, with numbers at integers only: plotters'
/// own axis for `-0.5..depth - 0.5` puts them anywhere.
struct LayerAxis {
    depth: usize,
    /// Distance between numbered layers.
    every: usize,
}

impl Ranged for LayerAxis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, &layer: &f64, (bottom, top): (i32, i32)) -> i32 {
        let fraction = (layer + 0.5) / self.depth as f64;
        bottom + (fraction * f64::from(top - bottom)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        (0..self.depth)
            .step_by(self.every)
            .map(|layer| layer as f64)
            .collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        -0.5..self.depth as f64 - 0.5
    }
}

impl ValueFormatter<f64> for LayerAxis {
    fn format(layer: &f64) -> String {
        format!("{layer:.0}")
    }
}

/// The title, and the legend of opacities with their probabilities.
fn draw_head<'a>(
    root: &DrawingArea<SVGBackend<'a>, Shift>,
    history: &DecisionHistory,
) -> Result<(), DrawError<'a>> {
    let title = format!("Layers kept during pruning ({})", scheme(history));
    root.draw(&Text::new(title, (60, 14), ("sans-serif", 18)))?;
    let caption = "probability of the choice";
    root.draw(&Text::new(caption, (60, 40), ("sans-serif", 12)))?;
    let start = 60 + (caption.len() as f64 * 12.0 * CHARACTER_WIDTH) as i32 + 14;
    for swatch in 0..5 {
        let probability = f64::from(swatch + 1) / 5.0;
        let left = start + swatch * 62;
        let corners = [(left, 39), (left + 26, 52)];
        root.draw(&Rectangle::new(
            corners,
            COLOURS[0].mix(probability).filled(),
        ))?;
        let label = format!("{probability:.1}");
        root.draw(&Text::new(label, (left + 32, 40), ("sans-serif", 12)))?;
    }
    Ok(())
}

/// `2 of 4` if all groups are equal, else the totals.
fn scheme(history: &DecisionHistory) -> String {
    match history.groups.as_slice() {
        [first, rest @ ..] if rest.iter().all(|group| group == first) && !rest.is_empty() => {
            format!("{} of every {}", first.keep, first.of)
        }
        groups => {
            let kept: usize = groups.iter().map(|group| group.keep).sum();
            format!("{kept} of {}", history.depth)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::decision_history::tests::history;

    #[test]
    fn the_picture_holds_its_parts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("decisions.svg");
        decision_svg(&path, &history(&[([0], 0.5), ([1], 0.98)])).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for part in [
            "training step",
            "layer",
            "1 of 2",
            "opacity=\"0.98\"",
            "</svg>",
        ] {
            assert!(svg.contains(part), "{part} is missing");
        }
        // A run with a single logged step is drawn too.
        decision_svg(&path, &history(&[([0], 0.0)])).unwrap();
    }
}
