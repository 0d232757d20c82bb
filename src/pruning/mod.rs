//! Selection of the layers to keep, learned by a differentiable gate, by a score, or by a rule; and
//! of the channels to keep, by their importance.

mod gate;
mod group;
mod groups;
mod intervals;
mod layers;
mod learned;
mod rules;
mod scores;
mod search;
mod start;
mod taylor;
mod width;

pub use gate::{Annealing, Choice, Decision, GateDraw, decide, draw};
pub use groups::*;
pub use intervals::{Interval, Regression, Replaced, intervals, left, pairs, plug, plugged};
pub use learned::{LearnedPruner, Update};
pub use rules::{oracle, uniform};
pub use scores::{Calibration, Score, ScoreBatch, keep_by_scores, prediction_loss, score};
pub use search::{Evolution, Mask, Pick, evolve, kept_by, mask_losses, mask_of, random_masks};
pub use start::{Start, averaged};
pub use taylor::{Descent, LossGradients, losses_at, mean_loss};
pub use width::{
    Leaves, Saliency, importance, kept_channels, left_of, random_importance, ranked, units,
    units_left, whole_heads, without,
};
