//! Which layers several ways of choosing keep, the best way first.

use super::chart::csv_cell;
use super::svg::{Anchor, Svg, text_width};

const CELL: f64 = 15.0;
const ROW: f64 = 20.0;
const TOP: f64 = 58.0;
const MARGIN: f64 = 14.0;

/// A way of choosing layers.
#[derive(Debug, Clone)]
pub struct Choice {
    /// Its name.
    pub name: String,
    /// For each layer the share of its runs that keep it.
    pub kept: Vec<f64>,
    /// What its models came to, a lower one being better: mean and standard deviation over its runs.
    pub score: (f64, f64),
}

/// Ways of choosing among the same layers.
#[derive(Debug, Clone)]
pub struct Choices {
    /// What it shows.
    pub title: String,
    /// What the scores are.
    pub measure: String,
    /// The ways.
    pub rows: Vec<Choice>,
}

impl Choices {
    fn best_first(&self) -> Vec<&Choice> {
        let mut rows: Vec<&Choice> = self.rows.iter().collect();
        rows.sort_by(|a, b| a.score.0.total_cmp(&b.score.0));
        rows
    }

    /// The drawing.
    pub fn svg(&self) -> String {
        let rows = self.best_first();
        let depth = rows.iter().map(|row| row.kept.len()).max().unwrap_or(0);
        let names = rows.iter().map(|row| text_width(&row.name));
        let left = 2.0 * MARGIN + names.fold(0.0, f64::max);
        let right = left + CELL * depth as f64;
        let scores: Vec<String> = (rows.iter())
            .map(|row| format!("{:.1} ± {:.1}", row.score.0, row.score.1))
            .collect();
        let widest = scores.iter().chain([&self.measure]).map(|s| text_width(s));
        let width = right + 2.0 * MARGIN + widest.fold(0.0, f64::max);
        let bottom = TOP + ROW * rows.len() as f64;
        let mut svg = Svg::new(
            width.max(2.0 * MARGIN + 8.0 * self.title.len() as f64),
            bottom + 40.0,
        );
        svg.text("title", (MARGIN, 26.0), Anchor::Start, &self.title);
        let measure = (right + MARGIN, TOP - 8.0);
        svg.text("label", measure, Anchor::Start, &self.measure);
        for (index, (row, score)) in rows.iter().zip(&scores).enumerate() {
            let top = TOP + index as f64 * ROW;
            let middle = top + 0.5 * ROW + 4.0;
            svg.text("label", (left - MARGIN, middle), Anchor::End, &row.name);
            for (layer, share) in row.kept.iter().enumerate() {
                let from = left + layer as f64 * CELL;
                let corners = (
                    (from + 1.0, top + 2.0),
                    (from + CELL - 1.0, top + ROW - 2.0),
                );
                // A layer that no run keeps still has its place.
                let shade = 0.08 + 0.92 * share.clamp(0.0, 1.0);
                svg.rectangle("fill0", corners.0, corners.1, shade);
            }
            svg.text("label", (right + MARGIN, middle), Anchor::Start, score);
        }
        for layer in (0..depth).step_by(depth.div_ceil(14).max(1)) {
            let middle = left + (layer as f64 + 0.5) * CELL;
            let name = layer.to_string();
            svg.text("tick", (middle, bottom + 14.0), Anchor::Middle, &name);
        }
        let centre = ((left + right) / 2.0, bottom + 32.0);
        svg.text("label", centre, Anchor::Middle, "layer");
        svg.finish(
            &self.title,
            "a row for each way of choosing, the best first",
        )
    }

    /// What is drawn, a line for each way.
    pub fn csv(&self) -> String {
        let rows = self.best_first();
        let depth = rows.iter().map(|row| row.kept.len()).max().unwrap_or(0);
        let layers: Vec<String> = (0..depth).map(|layer| format!("layer {layer}")).collect();
        let measure = csv_cell(&self.measure);
        let mut text = format!("choice,{measure},deviation,{}\n", layers.join(","));
        for row in rows {
            let kept: Vec<String> = row.kept.iter().map(ToString::to_string).collect();
            let (mean, deviation) = row.score;
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
        let choice = |name: &str, kept: &[f64], score: f64| Choice {
            name: name.into(),
            kept: kept.to_vec(),
            score: (score, 0.5),
        };
        let choices = Choices {
            title: "Layers".into(),
            measure: "FID".into(),
            rows: vec![
                choice("second & last", &[0.0, 1.0], 20.0),
                choice("first, mostly", &[1.0, 0.5], 10.0),
            ],
        };
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
}
