//! Training data: the embedded digits, and the deterministic loader.

mod digits;
mod loader;

pub use digits::{Digits, Image, Split};
pub use loader::{Batch, BatchPlan, BatchSource, Batches, Teacher};
