//! Output for people: pictures, the pruning decisions over time, and tables.

use std::path::PathBuf;

use thiserror::Error;

mod chart;
mod choices;
mod decision_history;
mod decisions;
mod glyphs;
mod grid;
mod heatmap;
mod html;
mod numbers;
mod progress;
mod svg;
mod table;
mod verdicts;

pub(crate) use chart::csv_cell;
pub use chart::{Axis, Chart, Scale, Series, Style};
pub use choices::{Choice, Choices};
pub use decision_history::{DecisionGroup, DecisionHistory, KeptLayers};
pub use decisions::decision_svg;
pub(crate) use grid::{COLUMNS, grid_layout};
pub use grid::{comparison_png, grid_png};
pub use heatmap::Heatmap;
pub use html::{Grid, Page};
pub(crate) use numbers::{brief, rounded, scientific, short, thousands};
pub(crate) use progress::{Progress, watch};
pub use table::Table;
pub use verdicts::{protocol_lines, verdict_grid};

/// Why a picture could not be made.
#[derive(Debug, Error)]
pub enum ReportError {
    /// The data cannot be drawn.
    #[error("{}: {problem}", .path.display())]
    Invalid {
        /// The picture that was to be written.
        path: PathBuf,
        /// What is wrong with the data.
        problem: String,
    },
    /// The file could not be written.
    #[error("{}", .path.display())]
    Io {
        /// The picture that was to be written.
        path: PathBuf,
        /// Error of the file system or the encoder.
        source: std::io::Error,
    },
}
