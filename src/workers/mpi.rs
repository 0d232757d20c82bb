//! Workers over MPI. The only user of the crate `mpi`, so that another binding can take its place.

use mpi::Threading;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Root};
use parking_lot::Mutex;

use super::{Share, Workers};

/// Most bytes of one call: counts are 32-bit in MPI 3.
const MOST: usize = 1 << 30;

/// The processes of a job.
pub(super) struct Mpi {
    world: Mutex<World>,
    share: Share,
}

struct World {
    communicator: SimpleCommunicator,
    /// Ends MPI when it is dropped, after the communicator.
    _universe: Universe,
}

// SAFETY: MPI was started so that any thread may call it, one at a time; the lock sees to that.
unsafe impl Send for World {}

impl Mpi {
    /// Joins the job, and says which of the processes on this machine this one is.
    pub(super) fn join() -> Result<(Self, Share), String> {
        let (universe, threads) = mpi::initialize_with_threading(Threading::Serialized)
            .ok_or("MPI was already started in this process")?;
        if threads < Threading::Serialized {
            return Err(format!(
                "this MPI can be called by one thread alone ({threads:?}); the trainings of this program have one of their own"
            ));
        }
        let communicator = universe.world();
        let here = communicator.split_shared(communicator.rank());
        let of = |communicator: &SimpleCommunicator| Share {
            index: communicator.rank() as usize,
            of: communicator.size() as usize,
        };
        let (share, local) = (of(&communicator), of(&here));
        let world = Mutex::new(World {
            communicator,
            _universe: universe,
        });
        Ok((Self { world, share }, local))
    }
}

impl std::fmt::Debug for Mpi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Mpi").field(&self.share).finish()
    }
}

impl Workers for Mpi {
    fn rank(&self) -> usize {
        self.share.index
    }

    fn size(&self) -> usize {
        self.share.of
    }

    fn broadcast(&self, bytes: Vec<u8>) -> Vec<u8> {
        let world = self.world.lock();
        let first = world.communicator.process_at_rank(0);
        let mut length = bytes.len() as u64;
        first.broadcast_into(&mut length);
        let mut bytes = bytes;
        bytes.resize(length as usize, 0);
        for part in bytes.chunks_mut(MOST) {
            first.broadcast_into(part);
        }
        bytes
    }

    fn all_gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let world = self.world.lock();
        let mut lengths = vec![0_u64; self.share.of];
        world
            .communicator
            .all_gather_into(&(bytes.len() as u64), &mut lengths[..]);
        // Padded to the longest: these are short, and one call does.
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut own = bytes.to_vec();
        own.resize(longest, 0);
        let mut all = vec![0_u8; longest * self.share.of];
        if longest > 0 {
            world.communicator.all_gather_into(&own[..], &mut all[..]);
        }
        lengths
            .iter()
            .enumerate()
            .map(|(rank, length)| all[rank * longest..][..*length as usize].to_vec())
            .collect()
    }

    fn exchange(&self, parts: &[f32]) -> Vec<f32> {
        let mut received = vec![0.0; parts.len()];
        let world = self.world.lock();
        world.communicator.all_to_all_into(parts, &mut received[..]);
        received
    }

    fn collect(&self, part: &[f32]) -> Vec<f32> {
        let mut all = vec![0.0; part.len() * self.share.of];
        let world = self.world.lock();
        world.communicator.all_gather_into(part, &mut all[..]);
        all
    }

    fn abort(&self, status: i32) -> ! {
        // Without the lock: another thread may wait in a call that never ends.
        // SAFETY: MPI_Abort ends the process.
        unsafe { (*self.world.data_ptr()).communicator.abort(status) }
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The others wait for this one in their next exchange.
            self.abort(101);
        }
    }
}
