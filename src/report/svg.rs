//! What figures are drawn with: SVG that stands alone, is legible in print, on light and dark
//! pages, and by the colour-blind, and says in words what it shows.

use std::fmt::{Display, Write};

/// Colours that people tell apart whatever their sight (Okabe and Ito, "Color Universal Design"),
/// in the order of use; on dark pages lighter ones of the same hue.
const COLOURS: [(&str, &str); 7] = [
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#ff9a4d"),
    ("#009e73", "#2fd3a5"),
    ("#a8518a", "#e3a3c8"),
    ("#b57a00", "#f0c04a"),
    ("#5a5a5a", "#b9b9b9"),
    ("#6a4fb3", "#b3a2ea"),
];

/// Height of a line of text, in pixels.
pub(super) const LINE: f64 = 16.0;

/// Width of a text, about: viewers have different fonts.
pub(super) fn text_width(text: &str) -> f64 {
    6.6 * text.chars().count() as f64
}

/// Where a text stands, seen from its point.
#[derive(Debug, Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// A drawing.
pub(super) struct Svg {
    size: (f64, f64),
    body: String,
}

impl Svg {
    pub(super) fn new(width: f64, height: f64) -> Self {
        Self {
            size: (width, height),
            body: String::new(),
        }
    }

    pub(super) fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        self.put(format_args!(
            "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>",
            from.0, from.1, to.0, to.1
        ));
    }

    pub(super) fn path(&mut self, class: &str, points: &[(f64, f64)]) {
        let points: Vec<String> = (points.iter())
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        self.put(format_args!(
            "<polyline class=\"{class}\" points=\"{}\"/>",
            points.join(" ")
        ));
    }

    /// A rectangle from a corner to the opposite one.
    pub(super) fn rectangle(
        &mut self,
        class: &str,
        (left, top): (f64, f64),
        (right, bottom): (f64, f64),
        opacity: f64,
    ) {
        let (x, y) = (left.min(right), top.min(bottom));
        let (width, height) = ((right - left).abs(), (bottom - top).abs());
        self.put(format_args!(
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" opacity=\"{opacity:.2}\"/>"
        ));
    }

    /// A mark whose shape tells the series too.
    pub(super) fn mark(&mut self, series: usize, (x, y): (f64, f64), radius: f64, title: &str) {
        let colour = series % COLOURS.len();
        let r = radius;
        let shape = match series % 4 {
            0 => {
                format!("<circle class=\"fill{colour}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{r:.1}\">")
            }
            1 => polygon(colour, &[(x - r, y + r), (x + r, y + r), (x, y - r)]),
            2 => polygon(
                colour,
                &[
                    (x - r, y - r),
                    (x + r, y - r),
                    (x + r, y + r),
                    (x - r, y + r),
                ],
            ),
            _ => polygon(
                colour,
                &[
                    (x, y - 1.3 * r),
                    (x + 1.3 * r, y),
                    (x, y + 1.3 * r),
                    (x - 1.3 * r, y),
                ],
            ),
        };
        let name = if series.is_multiple_of(4) {
            "circle"
        } else {
            "polygon"
        };
        let title = escaped(title);
        self.put(format_args!("{shape}<title>{title}</title></{name}>"));
    }

    pub(super) fn text(&mut self, class: &str, (x, y): (f64, f64), anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escaped(text);
        self.put(format_args!(
            "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    /// A text that is read from below to above.
    pub(super) fn upright(&mut self, (x, y): (f64, f64), text: &str) {
        let text = escaped(text);
        self.put(format_args!(
            "<text class=\"label\" transform=\"translate({x:.1} {y:.1}) rotate(-90)\" text-anchor=\"middle\">{text}</text>"
        ));
    }

    fn put(&mut self, element: impl Display) {
        // Writing to a string does not fail.
        let _ = writeln!(self.body, "{element}");
    }

    /// The file. `title` and `summary` are what a screen reader says.
    pub(super) fn finish(self, title: &str, summary: &str) -> String {
        let (width, height) = self.size;
        let (light, dark): (String, String) = (COLOURS.iter().enumerate())
            .map(|(index, (light, dark))| (paint(index, light), paint(index, dark)))
            .unzip();
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"figure\" role=\"img\" viewBox=\"0 0 {width:.0} {height:.0}\" \
             width=\"{width:.0}\" height=\"{height:.0}\">\n\
             <title>{}</title>\n<desc>{}</desc>\n\
             <style>\n\
             .figure {{ font: 12px system-ui, 'Liberation Sans', Arial, sans-serif; max-width: 100%; height: auto }}\n\
             .figure .paper {{ fill: #fff }}\n\
             .figure text {{ fill: #222 }}\n\
             .figure .title {{ font-size: 15px; font-weight: 600 }}\n\
             .figure .axis {{ stroke: #555 }}\n\
             .figure .grid {{ stroke: #e3e3e3 }}\n\
             .figure polyline {{ fill: none; stroke-width: 2 }}\n\
             .figure .dashed {{ stroke-dasharray: 5 4 }}\n\
             {light}\
             @media (prefers-color-scheme: dark) {{\n\
             .figure .paper {{ fill: #16181c }}\n\
             .figure text {{ fill: #e6e6e6 }}\n\
             .figure .axis {{ stroke: #aaa }}\n\
             .figure .grid {{ stroke: #33373d }}\n\
             {dark}\
             }}\n\
             </style>\n\
             <rect class=\"paper\" width=\"100%\" height=\"100%\"/>\n{}</svg>\n",
            escaped(title),
            escaped(summary),
            self.body
        )
    }
}

fn paint(index: usize, colour: &str) -> String {
    format!(
        ".figure .stroke{index} {{ stroke: {colour} }} .figure .fill{index} {{ fill: {colour} }}\n"
    )
}

fn polygon(colour: usize, corners: &[(f64, f64)]) -> String {
    let corners: Vec<String> = (corners.iter())
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect();
    format!(
        "<polygon class=\"fill{colour}\" points=\"{}\">",
        corners.join(" ")
    )
}

/// The colour of a series: lines of it are `stroke`, areas `fill`.
pub(super) fn painted(what: &str, series: usize) -> String {
    format!("{what}{}", series % COLOURS.len())
}

/// Text as XML or HTML.
pub(super) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe += "&amp;",
            '<' => safe += "&lt;",
            '>' => safe += "&gt;",
            '"' => safe += "&quot;",
            // XML has no other control characters.
            c if c.is_control() && !matches!(c, '\n' | '\t') => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}
