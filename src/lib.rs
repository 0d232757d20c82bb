//! TinyFusion.
#![recursion_limit = "256"]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod atomic;
pub mod backend;
pub mod bench;
pub mod cli;
pub mod data;
pub mod evaluation;
pub mod images;
pub mod interrupt;
pub mod models;
pub mod ops;
pub mod process;
pub mod pruning;
pub mod random;
pub mod recipe;
pub mod recovery;
pub mod report;
pub mod training;
pub mod trunk;
pub mod weights;
