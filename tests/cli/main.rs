//! The real program, run as a person runs it.

mod broken;
mod commands;
mod program;
mod resume;
