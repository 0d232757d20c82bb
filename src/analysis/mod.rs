//! What is inside a network: the distributions of its hidden states, and how alike its layers are.

mod similarity;
mod states;

pub use similarity::{TrunkStates, similarity};
pub use states::LayerStates;
