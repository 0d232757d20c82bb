//! Tests that run the real program.

// A test fails by panicking.
#![allow(clippy::unwrap_used)]

mod broken;
mod checkpoints;
mod choosing;
mod commands;
mod failing;
mod hostile;
mod kills;
mod mar;
mod own_pictures;
mod page;
mod paper;
mod program;
mod recompute;
mod resume;
mod sit;
mod sweep;
mod terminal;
mod threads;
mod unet;
mod width;
