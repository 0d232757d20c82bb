//! Which layers several ways of choosing keep, the best way first.

use super::chart::csv_cell;
use super::svg::{Anchor, Svg, text_width};

const CELL: f64 = 15.0;
const ROW: f64 = 20.0;
const TOP: f64 = 58.0;
const MARGIN: f64 = 14.0;
/// Most choices that are drawn.
const MOST: usize = 100;

/// A way of choosing layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Its name.
    pub name: String,
    /// For each layer the share of its runs that keep it.
    pub kept: Vec<f64>,
    /// Mean and standard deviation, over its runs, of the FID of what became of them.
    pub fid: (f64, f64),
}

/// Ways of choosing among equally many layers, the best first.
#[derive(Debug, Clone)]
pub struct Choices {
    rows: Vec<Choice>,
    layers: usize,
}

impl Choices {
    /// What it shows.
    pub const TITLE: &'static str = "Which layers stay; the best choice first";

    /// Puts the ways in order.
    pub fn new(mut rows: Vec<Choice>) -> Self {
        rows.sort_by(|a, b| a.fid.0.total_cmp(&b.fid.0));
        let layers = rows.iter().map(|row| row.kept.len()).max().unwrap_or(0);
        Self { rows, layers }
    }

    /// The ways.
    pub fn rows(&self) -> &[Choice] {
        &self.rows
    }

    /// The drawing, of at most the hundred best; it says how many it leaves out.
    pub fn svg(&self) -> String {
        let rows = &self.rows[..self.rows.len().min(MOST)];
        let names = rows.iter().map(|row| text_width(&row.name));
        let left = 2.0 * MARGIN + names.fold(0.0, f64::max);
        let right = left + CELL * self.layers as f64;
        let fids: Vec<String> = (rows.iter())
            .map(|row| format!("{:.1} ± {:.1}", row.fid.0, row.fid.1))
            .collect();
        let widest = fids.iter().map(|fid| text_width(fid)).fold(0.0, f64::max);
        let title = 2.0 * MARGIN + 8.0 * Self::TITLE.len() as f64;
        let width = title.max(right + 2.0 * MARGIN + widest);
        let bottom = TOP + ROW * rows.len() as f64;
        let mut svg = Svg::new(width, bottom + 40.0);
        svg.text("title", (MARGIN, 26.0), Anchor::Start, Self::TITLE);
        let heading = (right + MARGIN, TOP - 8.0);
        svg.text("label", heading, Anchor::Start, "FID");
        for (index, (row, fid)) in rows.iter().zip(&fids).enumerate() {
            let top = TOP + index as f64 * ROW;
            let middle = top + 0.5 * ROW + 4.0;
            svg.text("label", (left - MARGIN, middle), Anchor::End, &row.name);
            for (layer, share) in row.kept.iter().enumerate() {
                let from = left + layer as f64 * CELL;
                let corner = (from + 1.0, top + 2.0);
                let opposite = (from + CELL - 1.0, top + ROW - 2.0);
                // The place of a layer that no run keeps is seen too.
                let shade = 0.08 + 0.92 * share.clamp(0.0, 1.0);
                svg.rectangle("fill0", corner, opposite, shade);
            }
            svg.text("label", (right + MARGIN, middle), Anchor::Start, fid);
        }
        for layer in (0..self.layers).step_by(self.layers.div_ceil(14).max(1)) {
            let middle = left + (layer as f64 + 0.5) * CELL;
            let name = layer.to_string();
            svg.text("tick", (middle, bottom + 14.0), Anchor::Middle, &name);
        }
        let centre = ((left + right) / 2.0, bottom + 32.0);
        let unseen = match self.rows.len() - rows.len() {
            0 => "layer".to_owned(),
            unseen => format!("layer (the table has {unseen} choices more)"),
        };
        svg.text("label", centre, Anchor::Middle, &unseen);
        svg.finish(Self::TITLE, "a row for each way of choosing")
    }

    /// What is drawn, a line for each way.
    pub fn csv(&self) -> String {
        let layers: Vec<String> = (0..self.layers)
            .map(|layer| format!("layer {layer}"))
            .collect();
        let mut text = format!("choice,FID,deviation,{}\n", layers.join(","));
        for row in &self.rows {
            let kept: Vec<String> = row.kept.iter().map(ToString::to_string).collect();
            let (mean, deviation) = row.fid;
            let name = csv_cell(&row.name);
            text += &format!("{name},{mean},{deviation},{}\n", kept.join(","));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_choice_stands_first() {
        let choice = |name: &str, kept: &[f64], fid: f64| Choice {
            name: name.into(),
            kept: kept.to_vec(),
            fid: (fid, 0.5),
        };
        let choices = Choices::new(vec![
            choice("second & last", &[0.0, 1.0], 20.0),
            choice("first, mostly", &[1.0, 0.5], 10.0),
        ]);
        assert_eq!(
            choices.csv(),
            "choice,FID,deviation,layer 0,layer 1\n\"first, mostly\",10,0.5,1,0.5\nsecond & last,20,0.5,0,1\n"
        );
        let svg = choices.svg();
        let at = |what: &str| svg.find(what).unwrap();
        assert!(at("first, mostly") < at("second &amp; last"), "{svg}");
        assert!(svg.contains("10.0 ± 0.5"), "{svg}");
        for (shade, count) in [("1.00", 2), ("0.54", 1), ("0.08", 1)] {
            let drawn = svg.matches(&format!("opacity=\"{shade}\"")).count();
            assert_eq!(drawn, count, "{shade}: {svg}");
        }
    }

    #[test]
    fn a_drawing_says_what_it_leaves_out() {
        let rows = |count: usize| {
            let row = |index: usize| Choice {
                name: format!("choice{index}."),
                kept: vec![1.0],
                fid: (index as f64, 0.0),
            };
            Choices::new((0..count).rev().map(row).collect())
        };
        let svg = rows(103).svg();
        assert!(svg.contains("the table has 3 choices more"), "{svg}");
        assert!(svg.contains("choice99.") && !svg.contains("choice100."));
        assert_eq!(rows(103).csv().lines().count(), 1 + 103);
        assert!(!rows(100).svg().contains("more"));
    }
}
