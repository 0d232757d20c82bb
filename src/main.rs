//! The `tinyfusion` program.

use std::process::ExitCode;

/// Tensor code on the CPU allocates every intermediate afresh; the system's allocator gives such blocks back to the
/// kernel each time and pays for their page faults again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// mimalloc's `mi_option_purge_delay`, which its bindings don't name.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

fn main() -> ExitCode {
    // A training step frees and allocates the same blocks over and over: none is given back between steps.
    // SAFETY: sets a number, before any other thread runs.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    tinyfusion::cli::main()
}
