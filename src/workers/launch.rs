//! Whether an MPI launcher started this process, and what follows from it.

use std::sync::{OnceLock, Weak};
use std::time::Duration;

use super::{Group, Workers, alone};

/// What launchers tell their processes: how many there are.
const SIZES: [&str; 3] = [
    "OMPI_COMM_WORLD_SIZE", // Open MPI
    "PMI_SIZE",             // MPICH, Intel MPI
    "SLURM_STEP_NUM_TASKS", // srun
];

/// This process's number among those on this machine, and the group, if there are others.
static JOINED: OnceLock<(usize, Weak<dyn Workers>)> = OnceLock::new();

/// The accelerator that this process works on, where it has a choice.
pub fn device() -> usize {
    let rank = JOINED.get().map_or(0, |(rank, _)| *rank);
    // Some schedulers show each process the one card that is its own.
    let shown = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    match shown.map(|shown| shown.split(',').count()) {
        Some(count) => rank % count,
        None => rank,
    }
}

/// Ends this process, and with it all others of its group.
#[allow(clippy::exit)]
#[cfg(any(feature = "cli", feature = "tui", feature = "mpi"))]
pub(crate) fn end(status: i32) -> ! {
    match JOINED.get().and_then(|(_, group)| group.upgrade()) {
        Some(group) => group.abort(status),
        None => std::process::exit(status),
    }
}

/// How many processes a launcher says there are, if several, and where it says so. Of two
/// launchers the one that is named first is the inner one.
fn launched(variable: impl Fn(&str) -> Option<String>) -> Option<(&'static str, usize)> {
    let mut said = SIZES
        .iter()
        .filter_map(|&name| Some((name, variable(name)?.parse().ok()?)));
    said.next().filter(|(_, size)| *size > 1)
}

/// The group that this process was started in, and how many of it share this machine. A worker
/// that waits for the others longer than its patience, if that has an end, ends them all. `nccl`
/// says whether their cards speak to each other by NCCL.
///
/// # Errors
/// When a launcher started several processes, and this program can't speak to the others.
pub fn start(patience: Option<Duration>, nccl: bool) -> Result<(Group, usize), String> {
    if nccl && !cfg!(all(feature = "cuda", feature = "mpi")) {
        return Err("--nccl: this program was built without it; build it with `cargo build --release --features cuda,mpi`".into());
    }
    match launched(|name| std::env::var(name).ok()) {
        None if !nccl => Ok((alone(), 1)),
        // One card can try what several do.
        launched => join(launched, patience, nccl),
    }
}

#[cfg(feature = "mpi")]
fn join(
    launched: Option<(&str, usize)>,
    patience: Option<Duration>,
    nccl: bool,
) -> Result<(Group, usize), String> {
    let (group, local) = super::mpi::Mpi::join(patience, nccl)?;
    let group: Group = std::sync::Arc::new(group);
    let found = group.size();
    if let Some((name, size)) = launched.filter(|(_, size)| *size != found) {
        return Err(format!(
            "the launcher says that there are {size} processes ({name}), and MPI sees {found}: it is another MPI's launcher \
             than the one this program was built with; start it with that one's mpirun or mpiexec"
        ));
    }
    let _ = JOINED.set((local.index, std::sync::Arc::downgrade(&group)));
    Ok((group, local.of))
}

#[cfg(not(feature = "mpi"))]
fn join(
    launched: Option<(&str, usize)>,
    _: Option<Duration>,
    _: bool,
) -> Result<(Group, usize), String> {
    let Some((name, size)) = launched else {
        return Ok((alone(), 1));
    };
    Err(format!(
        "a launcher started {size} processes ({name}), and this program was built without MPI, so that each would do all of the \
         work; build it with `cargo build --release --features mpi`, or start it once. Processes that have work of their own \
         are told so by `env -u {name}`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launchers_are_known_by_what_they_tell() {
        let of = |name: &'static str, value: &'static str| {
            launched(move |asked| (asked == name).then(|| value.to_owned()))
        };
        assert_eq!(of("PMI_SIZE", "4"), Some(("PMI_SIZE", 4)));
        let open = "OMPI_COMM_WORLD_SIZE";
        assert_eq!(of(open, "2"), Some((open, 2)));
        // One process that a launcher started within another's.
        assert_eq!(
            launched(|name| Some(if name == open { "1" } else { "2" }.into())),
            None
        );
        // One process needs no group.
        assert_eq!(of("SLURM_STEP_NUM_TASKS", "1"), None);
        assert_eq!(of("PMI_SIZE", "many"), None);
    }
}
