//! Workers over MPI. The program's only user of the crate `mpi`, so that another binding can take
//! its place.

use std::sync::Arc;
use std::time::Duration;

use mpi::Threading;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Root};
use parking_lot::Mutex;

use super::{Share, Workers};

/// Most bytes of one call: counts are 32-bit in MPI 3.
const MOST: usize = 1 << 30;

/// How long a launcher has to pass on what was said before the end: MPICH's does not read what it
/// has not read by then.
const SAID: Duration = Duration::from_millis(500);

/// How often a worker looks whether it waits too long.
const LOOK: Duration = Duration::from_secs(1);

/// Looks after which the job ends, from when a worker has said that it waited too long: so long
/// have the others to say it too.
const MORE: u64 = 10;

/// The processes of a job.
pub(super) struct Mpi {
    world: Mutex<World>,
    share: Share,
    watched: Arc<Mutex<Watched>>,
    nccl: bool,
}

/// What a worker does.
#[derive(Default)]
struct Watched {
    /// What it said last of its work.
    place: String,
    /// The call in which it waits for the others, and for how many looks. (A clock would go on
    /// while the job is suspended.)
    call: Option<(&'static str, u64)>,
}

struct World {
    communicator: SimpleCommunicator,
    /// Ends MPI when it is dropped, after the communicator.
    _universe: Universe,
}

// SAFETY: MPI was started so that any thread may call it, one at a time; the lock sees to that.
unsafe impl Send for World {}

impl Mpi {
    /// Joins the job, and says which of the processes on this machine this one is. Where it waits
    /// for others longer than its patience, if that has an end, it ends all.
    /// `nccl` says whether their cards speak by NCCL.
    pub(super) fn join(patience: Option<Duration>, nccl: bool) -> Result<(Self, Share), String> {
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
        let watched = Arc::<Mutex<Watched>>::default();
        if let Some(patience) = patience {
            let seen = watched.clone();
            std::thread::Builder::new()
                .name("patience".into())
                .spawn(move || watch(&seen, share, patience))
                .map_err(|error| format!("a thread can't be had: {error}"))?;
        }
        let joined = Self {
            world,
            share,
            watched,
            nccl,
        };
        Ok((joined, local))
    }

    /// A call that waits for the others.
    fn call<T>(&self, what: &'static str, call: impl FnOnce(&SimpleCommunicator) -> T) -> T {
        let world = self.world.lock();
        self.watched.lock().call = Some((what, 0));
        let result = call(&world.communicator);
        self.watched.lock().call = None;
        result
    }
}

/// Says so when this worker waits too long, and ends all a little later.
fn watch(watched: &Mutex<Watched>, share: Share, patience: Duration) {
    let most = patience.as_secs().max(1);
    loop {
        std::thread::sleep(LOOK);
        let Watched { place, call } = &mut *watched.lock();
        let Some((what, looks)) = call else { continue };
        *looks += 1;
        if *looks == most {
            crate::terminal::speak(true);
            crate::say!(
                "worker {} of {} has waited {patience:?} for the others, in {what} of {place}; one that does not say so now may hang",
                share.index,
                share.of
            );
        }
        if *looks == most + MORE {
            super::end(2);
        }
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

    fn at(&self, place: String) {
        self.watched.lock().place = place;
    }

    fn broadcast(&self, bytes: Vec<u8>) -> Vec<u8> {
        self.call("a broadcast", |communicator| {
            let first = communicator.process_at_rank(0);
            let mut length = bytes.len() as u64;
            first.broadcast_into(&mut length);
            let mut bytes = bytes;
            bytes.resize(length as usize, 0);
            for part in bytes.chunks_mut(MOST) {
                first.broadcast_into(part);
            }
            bytes
        })
    }

    fn all_gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        self.call("a gathering", |communicator| {
            let mut lengths = vec![0_u64; self.share.of];
            communicator.all_gather_into(&(bytes.len() as u64), &mut lengths[..]);
            // Padded to the longest, and in parts of which all together fit one call.
            let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
            let mut own = bytes.to_vec();
            own.resize(longest, 0);
            let mut all: Vec<Vec<u8>> = vec![Vec::new(); self.share.of];
            for part in own.chunks((MOST / self.share.of).max(1)) {
                let mut of_all = vec![0_u8; part.len() * self.share.of];
                communicator.all_gather_into(part, &mut of_all[..]);
                for (bytes, more) in all.iter_mut().zip(of_all.chunks(part.len())) {
                    bytes.extend(more);
                }
            }
            for (bytes, length) in all.iter_mut().zip(lengths) {
                bytes.truncate(length as usize);
            }
            all
        })
    }

    fn exchange(&self, parts: &[f32]) -> Vec<f32> {
        self.call("an exchange", |communicator| {
            let mut received = vec![0.0; parts.len()];
            communicator.all_to_all_into(parts, &mut received[..]);
            received
        })
    }

    fn collect(&self, part: &[f32], all: &mut [f32]) {
        // MPI takes the length of each part from that of all.
        assert_eq!(all.len(), part.len() * self.share.of);
        self.call("a collection", |communicator| {
            communicator.all_gather_into(part, all);
        });
    }

    fn have_nccl(&self) -> bool {
        self.nccl
    }

    fn abort(&self, status: i32) -> ! {
        std::thread::sleep(SAID);
        // Without the lock: another thread may wait in a call that never ends.
        // SAFETY: MPI_Abort ends the process.
        unsafe { (*self.world.data_ptr()).communicator.abort(status) }
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The others wait for this one in their next exchange.
            let Share { index, of } = self.share;
            crate::terminal::speak(true);
            crate::say!("worker {index} of {of} ends the job: it panicked");
            self.abort(101);
        }
    }
}
