//! The `tinyfusion` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    tinyfusion::cli::main()
}
