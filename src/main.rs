//! The `tinyfusion` program.

use std::process::ExitCode;

/// Tensor code on the CPU allocates every intermediate afresh; the system's allocator gives such blocks back to the
/// kernel each time and pays for their page faults again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    tinyfusion::cli::main()
}
