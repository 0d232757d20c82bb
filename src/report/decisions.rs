//! Pruning decisions over the course of training, as in Figure 6 of the TinyFusion paper (Fang et
//! al. 2024, arXiv:2412.01199).
//!
//! The learnable masks choose `keep` of every `of` consecutive layers. Each logged step draws the
//! chosen layers as short bars, the more opaque the more probable the choice: a run that has not
//! decided yet is pale and jumps between layers, a converged one is a set of solid lines.

use std::path::Path;

use super::ReportError;
use super::chart::{linear_ticks, write};
use super::decision_history::DecisionHistory;
use super::svg::{Anchor, Svg, painted, text_width};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 24.0;
const ABOVE: f64 = 62.0;
const BELOW: f64 = 50.0;

/// Writes `history` as an SVG: training steps to the right, layers (0 is the first) upwards, groups
/// as shaded bands, and bars whose opacity is the probability of the choice.
///
/// Of histories with more than 400 logged steps, evenly spaced ones are drawn. The file appears
/// whole or not at all.
///
/// # Errors
///
/// [`ReportError::Invalid`] when the history is empty or contradicts itself (the message says
/// where), [`ReportError::Io`] when the file cannot be written.
pub fn decision_svg(path: &Path, history: &DecisionHistory) -> Result<(), ReportError> {
    history.check().map_err(|problem| ReportError::Invalid {
        path: path.to_owned(),
        problem,
    })?;
    write(path, &draw(history))
}

fn draw(history: &DecisionHistory) -> String {
    let (depth, [layer, layers]) = (history.depth, history.names);
    // Room for every layer's number, or less if there are too many layers to number.
    let height = (600.0 / depth as f64).clamp(6.0, 20.0);
    let (right, bottom) = (WIDTH - RIGHT, ABOVE + height * depth as f64);
    let mut svg = Svg::new(WIDTH, bottom + BELOW);
    let title = format!("{layers} kept during pruning ({})", scheme(history));
    let title = title[..1].to_uppercase() + &title[1..];
    svg.text("title", (LEFT, 26.0), Anchor::Start, &title);
    draw_legend(&mut svg);

    let (first, last) = (history.steps[0] as f64, history.end());
    let across = |step: f64| LEFT + (step - first) / (last - first) * (right - LEFT);
    // The middle of a layer's line.
    let up = |layer: f64| bottom - (layer + 0.5) * height;
    for (group, band) in history.bands().enumerate() {
        let edge = |layer: usize| bottom - layer as f64 * height;
        let corners = ((LEFT, edge(band.start)), (right, edge(band.end)));
        svg.rectangle(&painted("fill", group % 2), corners.0, corners.1, 0.07);
    }
    for bar in history.bars() {
        let middle = up(bar.layer as f64);
        let half = 0.32 * height;
        svg.rectangle(
            &painted("fill", bar.group % 2),
            (across(bar.from), middle - half),
            (across(bar.until), middle + half),
            bar.opacity,
        );
    }
    svg.line("axis", (LEFT, bottom), (right, bottom));
    svg.line("axis", (LEFT, ABOVE), (LEFT, bottom));
    // Steps are integers; a short run has round numbers between them, which are left out.
    let whole = linear_ticks(first, last)
        .into_iter()
        .filter(|step| step.fract() == 0.0);
    for step in whole {
        let at = across(step);
        svg.line("axis", (at, bottom), (at, bottom + 5.0));
        svg.text(
            "tick",
            (at, bottom + 18.0),
            Anchor::Middle,
            &step.to_string(),
        );
    }
    for layer in (0..depth).step_by((14.0 / height).ceil() as usize) {
        let place = (LEFT - 8.0, up(layer as f64) + 4.0);
        svg.text("tick", place, Anchor::End, &layer.to_string());
    }
    let middle = (LEFT + right) / 2.0;
    svg.text(
        "label",
        (middle, bottom + 40.0),
        Anchor::Middle,
        "training step",
    );
    svg.upright((18.0, (ABOVE + bottom) / 2.0), layer);
    let summary = format!("which {layers} each group keeps, by training step");
    svg.finish(&title, &summary)
}

/// Opacities with their probabilities.
fn draw_legend(svg: &mut Svg) {
    let caption = "probability of the choice";
    svg.text("label", (LEFT, 50.0), Anchor::Start, caption);
    let start = LEFT + text_width(caption) + 10.0;
    for swatch in 0..5 {
        let probability = f64::from(swatch + 1) / 5.0;
        let left = start + f64::from(swatch) * 62.0;
        svg.rectangle("fill0", (left, 40.0), (left + 26.0, 52.0), probability);
        let label = format!("{probability:.1}");
        svg.text("label", (left + 31.0, 50.0), Anchor::Start, &label);
    }
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
