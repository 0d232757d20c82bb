//! The `tinyfusion` program.

use std::process::ExitCode;

/// Tensor code on the CPU allocates every intermediate anew; the system's allocator returns such
/// blocks to the kernel each time, which causes page faults again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// mimalloc's `mi_option_purge_delay`, which its bindings don't name.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

fn main() -> ExitCode {
    // A training step frees and allocates the same blocks again and again: they are kept between
    // steps.
    // SAFETY: sets a number before any other thread runs.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    tinyfusion::cli::main()
}
