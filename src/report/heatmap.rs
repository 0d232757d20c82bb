//! A square of shades: how layers compare with one another.

use std::path::Path;

use super::ReportError;
use super::chart::write;
use super::svg::{Anchor, Svg};

const SIDE: f64 = 420.0;
const LEFT: f64 = 64.0;
const TOP: f64 = 44.0;

/// A square matrix, each value of which is between 0 and 1.
#[derive(Debug, Clone)]
pub struct Heatmap {
    /// What it shows.
    pub title: String,
    /// What its rows and columns are.
    pub label: String,
    /// Rows of values; drawn from below to above, as columns are from left to right.
    pub values: Vec<Vec<f64>>,
}

impl Heatmap {
    /// Writes the matrix as SVG, and the values as CSV beside it.
    ///
    /// # Errors
    /// [`ReportError::Invalid`] of a matrix that is empty or not square, or of values that are not
    /// between 0 and 1; [`ReportError::Io`] when a file can't be written.
    pub fn write(&self, path: &Path) -> Result<(), ReportError> {
        let count = self.values.len();
        let square = count > 0 && self.values.iter().all(|row| row.len() == count);
        // A rounding error beyond the ends is none of the reader's.
        let within = |value: &f64| (-1e-3..=1.001).contains(value);
        if !square || !self.values.iter().flatten().all(within) {
            return Err(ReportError::Invalid {
                path: path.to_owned(),
                problem: "the values are no square of numbers between 0 and 1".into(),
            });
        }
        write(path, &self.svg())?;
        let rows = self.values.iter().map(|row| {
            let cells: Vec<String> = row.iter().map(ToString::to_string).collect();
            cells.join(",") + "\n"
        });
        write(&path.with_extension("csv"), &rows.collect::<String>())
    }

    fn svg(&self) -> String {
        let count = self.values.len();
        let cell = SIDE / count as f64;
        let mut svg = Svg::new(LEFT + SIDE + 96.0, TOP + SIDE + 52.0);
        svg.text("title", (LEFT, 26.0), Anchor::Start, &self.title);
        let (right, bottom) = (LEFT + SIDE, TOP + SIDE);
        for (row, values) in self.values.iter().enumerate() {
            let low = bottom - row as f64 * cell;
            for (column, value) in values.iter().enumerate() {
                let left = LEFT + column as f64 * cell;
                let shade = value.clamp(0.0, 1.0);
                svg.rectangle("fill0", (left, low), (left + cell, low - cell), shade);
            }
        }
        let every = count.div_ceil(14);
        for index in (0..count).step_by(every) {
            let middle = (index as f64 + 0.5) * cell;
            let name = index.to_string();
            svg.text(
                "tick",
                (LEFT + middle, bottom + 16.0),
                Anchor::Middle,
                &name,
            );
            svg.text(
                "tick",
                (LEFT - 8.0, bottom - middle + 4.0),
                Anchor::End,
                &name,
            );
        }
        svg.text(
            "label",
            (LEFT + SIDE / 2.0, bottom + 38.0),
            Anchor::Middle,
            &self.label,
        );
        svg.upright((18.0, TOP + SIDE / 2.0), &self.label);
        // The key: what the shades stand for.
        for step in 0..10 {
            let at = bottom - f64::from(step) * SIDE / 10.0;
            let shade = (f64::from(step) + 0.5) / 10.0;
            svg.rectangle(
                "fill0",
                (right + 24.0, at),
                (right + 44.0, at - SIDE / 10.0),
                shade,
            );
        }
        for (value, name) in [(0.0, "0"), (0.5, "0.5"), (1.0, "1")] {
            let at = bottom - value * SIDE;
            svg.text("tick", (right + 52.0, at + 4.0), Anchor::Start, name);
        }
        svg.finish(&self.title, &format!("{} by {}", self.label, self.label))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_square_is_drawn_and_anything_else_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("map.svg");
        let mut map = Heatmap {
            title: "Similarity".into(),
            label: "layer".into(),
            values: vec![vec![1.0, 0.25], vec![0.25, 1.0]],
        };
        map.write(&path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert_eq!(svg.matches("opacity=\"0.25\"").count(), 3); // and one of the key's
        let csv = std::fs::read_to_string(path.with_extension("csv")).unwrap();
        assert_eq!(csv, "1,0.25\n0.25,1\n");
        map.values[1].pop();
        assert!(map.write(&path).is_err());
    }
}
