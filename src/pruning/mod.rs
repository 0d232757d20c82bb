//! Selection of the layers to keep: learned by a differentiable gate, by a score, or by a rule.

mod gate;
mod group;
mod groups;
mod learned;
mod oracle;
mod scores;

pub use gate::{Annealing, Choice, Decision, GateDraw, decide, draw};
pub use groups::*;
pub use learned::{LearnedPruner, Update};
pub use oracle::oracle;
pub use scores::{Calibration, Score, ScoreBatch, keep_by_scores, score};
