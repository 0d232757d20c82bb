//! Charts: lines, dots, bars and rules on two axes.

use std::path::Path;

use super::ReportError;
use super::svg::{Anchor, LINE, Svg, painted, text_width};
use crate::files::write_atomic;

const WIDTH: f64 = 760.0;
/// Height of the part with the data.
const PLOT: f64 = 330.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 24.0;
const BELOW: f64 = 52.0;
/// Lines that the names of rules are written on, from above.
const RULE_NAMES: usize = 12;
/// Bars of a histogram.
const HISTOGRAM: usize = 40;

/// How values are laid out on an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// In proportion.
    Linear,
    /// By their logarithms; values must be positive.
    Log,
}

/// An axis.
#[derive(Debug, Clone)]
pub struct Axis {
    /// What it counts, with the unit.
    pub label: String,
    /// How.
    pub scale: Scale,
    /// A value that is on it in any case.
    pub includes: Option<f64>,
}

impl Axis {
    /// In proportion.
    pub fn linear(label: impl Into<String>) -> Self {
        Self {
            label: label.into(),
            scale: Scale::Linear,
            includes: None,
        }
    }

    /// By logarithms.
    pub fn log(label: impl Into<String>) -> Self {
        Self {
            scale: Scale::Log,
            ..Self::linear(label)
        }
    }

    /// The same with a value that is on it in any case.
    pub fn including(self, value: f64) -> Self {
        Self {
            includes: Some(value),
            ..self
        }
    }
}

/// How a series is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// A line, with a mark at each point.
    Line,
    /// A dashed line without marks, such as an ideal.
    Dashed,
    /// Marks.
    Dots,
    /// Small, pale marks: a crowd that the others stand in.
    Crowd,
    /// Bars from zero, each over the range to the next point's x; the last ends the range.
    Bars,
    /// A rule across the whole height at each point's x.
    Rule,
}

/// Some points that belong together.
#[derive(Debug, Clone)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// How it is drawn.
    pub style: Style,
    /// x and y.
    pub points: Vec<(f64, f64)>,
}

impl Series {
    /// How positive values are distributed: bars of equal width on an axis of logarithms.
    pub fn histogram(name: &str, values: &[f64]) -> Self {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        let width = ((high / low).ln() / HISTOGRAM as f64).max(1e-9);
        let mut counts = vec![0usize; HISTOGRAM];
        for value in values {
            let bar = ((value / low).ln() / width) as usize;
            counts[bar.min(HISTOGRAM - 1)] += 1;
        }
        let edge = |bar: usize| low * (width * bar as f64).exp();
        let mut points: Vec<(f64, f64)> = (counts.iter().enumerate())
            .map(|(bar, count)| (edge(bar), *count as f64))
            .collect();
        points.push((edge(HISTOGRAM), 0.0));
        Self {
            name: name.to_owned(),
            style: Style::Bars,
            points,
        }
    }
}

/// A chart.
#[derive(Debug, Clone)]
pub struct Chart {
    /// What it shows.
    pub title: String,
    /// To the right.
    pub x: Axis,
    /// Upwards.
    pub y: Axis,
    /// What is drawn, in the order of the legend.
    pub series: Vec<Series>,
}

impl Chart {
    /// Writes the chart as SVG, and the values as CSV beside it.
    ///
    /// # Errors
    /// [`ReportError::Invalid`] of a chart without points, or with values that its axes can't show;
    /// [`ReportError::Io`] when a file can't be written.
    pub fn write(&self, path: &Path) -> Result<(), ReportError> {
        self.draw(path)?;
        write(&path.with_extension("csv"), &self.csv())
    }

    /// Writes the chart as SVG alone, of values that stand elsewhere.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn draw(&self, path: &Path) -> Result<(), ReportError> {
        let svg = self.svg().map_err(|problem| ReportError::Invalid {
            path: path.to_owned(),
            problem,
        })?;
        write(path, &svg)
    }

    /// The values, a line for each point.
    pub fn csv(&self) -> String {
        let mut text = String::from("series,x,y\n");
        for series in &self.series {
            let name = csv_cell(&series.name);
            for (x, y) in &series.points {
                text += &format!("{name},{x},{y}\n");
            }
        }
        text
    }

    /// The chart as SVG.
    ///
    /// # Errors
    /// What is wrong with the values.
    pub fn svg(&self) -> Result<String, String> {
        let values = |of: fn(&(f64, f64)) -> f64, rules: bool| {
            let drawn = self.series.iter();
            let drawn = drawn.filter(move |series| rules || series.style != Style::Rule);
            drawn.flat_map(move |series| series.points.iter().map(of))
        };
        let bars = self.series.iter().any(|series| series.style == Style::Bars);
        let zero = (bars && self.y.scale == Scale::Linear).then_some(0.0);
        let x = Range::new(&self.x, values(|point| point.0, true))?;
        let y = Range::new(&self.y, values(|point| point.1, false).chain(zero))?;

        let legend = self.legend();
        let rows = legend.last().map_or(0.0, |(_, (_, row))| row + 1.0);
        let top = 34.0 + LINE * rows + 8.0;
        let mut svg = Svg::new(WIDTH, top + PLOT + BELOW);
        svg.text("title", (LEFT, 24.0), Anchor::Start, &self.title);
        for (index, (at, row)) in legend {
            let (x, y) = (LEFT + at, 34.0 + LINE * row + 9.0);
            draw_key(&mut svg, index, self.series[index].style, (x, y));
            svg.text(
                "label",
                (x + 20.0, y + 4.0),
                Anchor::Start,
                &self.series[index].name,
            );
        }
        let (bottom, right) = (top + PLOT, WIDTH - RIGHT);
        let place = |point: (f64, f64)| {
            (
                LEFT + x.share(point.0) * (right - LEFT),
                bottom - y.share(point.1) * PLOT,
            )
        };
        for tick in y.ticks() {
            let (_, at) = place((x.low, tick));
            svg.line("grid", (LEFT, at), (right, at));
            svg.text("tick", (LEFT - 8.0, at + 4.0), Anchor::End, &number(tick));
        }
        for tick in x.ticks() {
            let (at, _) = place((tick, y.low));
            svg.line("axis", (at, bottom), (at, bottom + 5.0));
            svg.text("tick", (at, bottom + 19.0), Anchor::Middle, &number(tick));
        }
        svg.line("axis", (LEFT, bottom), (right, bottom));
        svg.line("axis", (LEFT, top), (LEFT, bottom));
        svg.text(
            "label",
            ((LEFT + right) / 2.0, bottom + 40.0),
            Anchor::Middle,
            &self.x.label,
        );
        svg.upright((18.0, top + PLOT / 2.0), &self.y.label);
        let mut rules = 0;
        for (index, series) in self.series.iter().enumerate() {
            let stroke = painted("stroke", index);
            let points: Vec<(f64, f64)> = series.points.iter().copied().map(place).collect();
            let said =
                |(x, y): &(f64, f64)| format!("{}: {}, {}", series.name, number(*x), number(*y));
            match series.style {
                Style::Line | Style::Dots | Style::Crowd => {
                    if series.style == Style::Line {
                        svg.path(&stroke, &points);
                    }
                    let radius = match series.style {
                        Style::Crowd => 2.6,
                        // So many marks would be the line.
                        Style::Line if points.len() > 40 => continue,
                        _ => 4.5,
                    };
                    for (at, point) in points.iter().zip(&series.points) {
                        svg.mark(index, *at, radius, &said(point));
                    }
                }
                Style::Dashed => svg.path(&format!("{stroke} dashed"), &points),
                Style::Bars => {
                    let floor = bottom - y.share(y.low.max(0.0)) * PLOT;
                    for pair in points.windows(2) {
                        let (from, to) = (pair[0], pair[1]);
                        let gap = (0.1 * (to.0 - from.0)).min(1.0);
                        svg.rectangle(
                            &painted("fill", index),
                            (from.0 + gap, from.1),
                            (to.0 - gap, floor),
                            0.75,
                        );
                    }
                }
                Style::Rule => {
                    for (at, _) in points {
                        svg.line(&format!("{stroke} dashed"), (at, top), (at, bottom));
                        // Named where it stands, each on a line of its own: rules may coincide.
                        let name = &series.name;
                        let under = top + 12.0 + LINE * (rules % RULE_NAMES) as f64;
                        rules += 1;
                        let (at, anchor) = match at + text_width(name) + 8.0 > right {
                            true => (at - 5.0, Anchor::End),
                            false => (at + 5.0, Anchor::Start),
                        };
                        svg.text("label", (at, under), anchor, name);
                    }
                }
            }
        }
        let names: Vec<&str> = (self.series.iter())
            .map(|series| series.name.as_str())
            .collect();
        let summary = format!(
            "{} against {}: {}",
            self.y.label,
            self.x.label,
            names.join(", ")
        );
        Ok(svg.finish(&self.title, &summary))
    }

    /// The series of the legend, each with its place: pixels from the left, and row.
    fn legend(&self) -> Vec<(usize, (f64, f64))> {
        let (mut at, mut row) = (0.0, 0.0);
        let mut placed = Vec::new();
        for (index, series) in self.series.iter().enumerate() {
            if series.style == Style::Rule {
                continue;
            }
            let width = 20.0 + text_width(&series.name) + 18.0;
            if at > 0.0 && at + width > WIDTH - LEFT - RIGHT {
                (at, row) = (0.0, row + 1.0);
            }
            placed.push((index, (at, row)));
            at += width;
        }
        placed
    }
}

fn draw_key(svg: &mut Svg, index: usize, style: Style, (x, y): (f64, f64)) {
    let stroke = painted("stroke", index);
    match style {
        Style::Line => {
            svg.path(&stroke, &[(x, y), (x + 14.0, y)]);
            svg.mark(index, (x + 7.0, y), 4.0, "");
        }
        Style::Dashed => svg.path(&format!("{stroke} dashed"), &[(x, y), (x + 14.0, y)]),
        Style::Dots => svg.mark(index, (x + 7.0, y), 4.5, ""),
        Style::Crowd => svg.mark(index, (x + 7.0, y), 2.6, ""),
        Style::Bars => {
            svg.rectangle(
                &painted("fill", index),
                (x, y - 5.0),
                (x + 14.0, y + 5.0),
                0.75,
            );
        }
        // It has its name beside it.
        Style::Rule => {}
    }
}

/// The values that an axis shows.
struct Range {
    low: f64,
    high: f64,
    scale: Scale,
}

impl Range {
    fn new(axis: &Axis, values: impl Iterator<Item = f64>) -> Result<Self, String> {
        let scale = axis.scale;
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.chain(axis.includes) {
            if !value.is_finite() || scale == Scale::Log && value <= 0.0 {
                return Err(format!(
                    "{value} can't be shown on the axis `{}`",
                    axis.label
                ));
            }
            (low, high) = (low.min(value), high.max(value));
        }
        if low > high {
            return Err("there are no points to draw".into());
        }
        // Some air at both ends, and none below a zero.
        let (least, most) = (scaled(scale, low), scaled(scale, high));
        let air = match most - least {
            width if width > 0.0 => 0.04 * width,
            _ => 0.05 * most.abs().max(1e-3),
        };
        let from_zero = scale == Scale::Linear && low == 0.0;
        let back = |value: f64| match scale {
            Scale::Linear => value,
            Scale::Log => 10f64.powf(value),
        };
        Ok(Self {
            low: if from_zero { 0.0 } else { back(least - air) },
            high: back(most + air),
            scale,
        })
    }

    /// Where a value lies, from 0 at the beginning to 1 at the end.
    fn share(&self, value: f64) -> f64 {
        let at = |value| scaled(self.scale, value);
        (at(value) - at(self.low)) / (at(self.high) - at(self.low))
    }

    fn ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => linear_ticks(self.low, self.high),
            Scale::Log => {
                let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
                let few = self.high / self.low < 1e3;
                let parts: &[f64] = if few { &[1.0, 2.0, 5.0] } else { &[1.0] };
                let all = decades
                    .flat_map(|decade| parts.iter().map(move |part| part * 10f64.powi(decade)));
                let shown: Vec<f64> = all
                    .filter(|tick| (self.low..=self.high).contains(tick))
                    .collect();
                match shown.len() {
                    0 | 1 => linear_ticks(self.low, self.high),
                    many => shown.into_iter().step_by(many.div_ceil(9)).collect(),
                }
            }
        }
    }
}

fn scaled(scale: Scale, value: f64) -> f64 {
    match scale {
        Scale::Linear => value,
        Scale::Log => value.log10(),
    }
}

/// Some six round numbers of a range.
pub(super) fn linear_ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 6.0;
    let decade = 10f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|part| part * decade);
    let step = steps
        .into_iter()
        .find(|step| *step >= rough)
        .unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|tick| tick as f64 * step).collect()
}

/// A tick as people write it.
fn number(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 {
        "0".into()
    } else if !(1e-3..1e6).contains(&size) {
        format!("{value:.1e}")
    } else {
        // What is left of four digits after the whole ones.
        let digits = (3 - size.log10().floor() as i32).max(0) as usize;
        let text = format!("{value:.digits$}");
        match text.contains('.') {
            true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
            false => text,
        }
    }
}

/// A cell of a CSV file (RFC 4180).
pub(crate) fn csv_cell(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}

pub(super) fn write(path: &Path, text: &str) -> Result<(), ReportError> {
    write_atomic(path, |file| {
        std::io::Write::write_all(file, text.as_bytes())
    })
    .map_err(|source| ReportError::Io {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: &[(f64, f64)], scale: Scale) -> Chart {
        Chart {
            title: "Loss & FID".into(),
            x: Axis {
                scale,
                ..Axis::linear("loss")
            },
            y: Axis::linear("FID").including(0.0),
            series: vec![Series {
                name: "a, <b>".into(),
                style: Style::Line,
                points: points.to_vec(),
            }],
        }
    }

    #[test]
    fn a_chart_is_well_formed_and_has_its_values_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chart.svg");
        chart(&[(1.0, 20.0), (10.0, 5.0)], Scale::Log)
            .write(&path)
            .unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.contains("<title>Loss &amp; FID</title>"));
        assert!(svg.contains("a, &lt;b&gt;: 10, 5"));
        let points = svg.split("points=\"").nth(1 + 1).unwrap();
        assert!(points.starts_with(|c: char| c.is_ascii_digit()));
        let csv = std::fs::read_to_string(path.with_extension("csv")).unwrap();
        assert_eq!(csv, "series,x,y\n\"a, <b>\",1,20\n\"a, <b>\",10,5\n");
        let open = svg.matches('<').count();
        assert_eq!(open, svg.matches('>').count());
    }

    #[test]
    fn what_an_axis_cannot_show_is_said() {
        let error = |chart: Chart| chart.svg().unwrap_err();
        assert_eq!(
            error(chart(&[], Scale::Linear)),
            "there are no points to draw"
        );
        assert_eq!(
            error(chart(&[(0.0, 1.0)], Scale::Log)),
            "0 can't be shown on the axis `loss`"
        );
        let nan = chart(&[(1.0, f64::NAN)], Scale::Linear);
        assert!(error(nan).contains("NaN"));
    }

    #[test]
    fn ticks_are_round_numbers_within_the_range() {
        assert_eq!(linear_ticks(0.0, 50.0), [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]);
        assert_eq!(linear_ticks(-1.0, 1.0), [-1.0, -0.5, 0.0, 0.5, 1.0]);
        let log = Range {
            low: 0.9,
            high: 1100.0,
            scale: Scale::Log,
        };
        assert_eq!(log.ticks(), [1.0, 10.0, 100.0, 1000.0]);
        let numbers = [0.0, 0.25, 1e-5, 1234.0, 12.5, -3.0, 2e7];
        assert_eq!(
            numbers.map(number),
            ["0", "0.25", "1.0e-5", "1234", "12.5", "-3", "2.0e7"]
        );
    }
}
