//! Workers that are threads, for tests.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Group, Workers};

type Message = Vec<u8>;

/// One of several threads, which sends to each through a channel.
#[derive(Debug)]
struct Thread {
    rank: usize,
    to: Vec<Sender<Message>>,
    from: Vec<Mutex<Receiver<Message>>>,
}

impl Thread {
    fn send(&self, to: usize, bytes: &[u8]) {
        self.to[to].send(bytes.to_vec()).unwrap();
    }

    fn receive(&self, from: usize) -> Message {
        let from = self.from[from].lock();
        from.unwrap_or_else(PoisonError::into_inner).recv().unwrap()
    }
}

impl Workers for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn broadcast(&self, bytes: Vec<u8>) -> Vec<u8> {
        self.all_gather(&bytes).swap_remove(0)
    }

    fn all_gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        for to in 0..self.size() {
            self.send(to, bytes);
        }
        (0..self.size()).map(|from| self.receive(from)).collect()
    }

    fn exchange(&self, parts: &[f32]) -> Vec<f32> {
        let slice = parts.len() / self.size();
        for (to, part) in parts.chunks_exact(slice).enumerate() {
            self.send(to, bytemuck::cast_slice(part));
        }
        (0..self.size())
            .flat_map(|from| bytemuck::pod_collect_to_vec(&self.receive(from)))
            .collect()
    }

    fn collect(&self, part: &[f32], all: &mut [f32]) {
        let parts = self.all_gather(bytemuck::cast_slice(part)).concat();
        all.copy_from_slice(&bytemuck::pod_collect_to_vec(&parts));
    }

    fn abort(&self, status: i32) -> ! {
        panic!("worker {} ends all with {status}", self.rank)
    }
}

/// What each of `size` workers makes of `work`.
pub(crate) fn group<T: Send>(size: usize, work: impl Fn(&dyn Workers) -> T + Sync) -> Vec<T> {
    shared(size, |workers| work(&*workers))
}

/// The same of work that keeps its group.
pub(crate) fn shared<T: Send>(size: usize, work: impl Fn(Group) -> T + Sync) -> Vec<T> {
    // channels[i][j] leads from i to j.
    let channels: Vec<Vec<_>> = (0..size)
        .map(|_| (0..size).map(|_| channel()).collect())
        .collect();
    let mut from: Vec<Vec<_>> = (0..size).map(|_| Vec::new()).collect();
    let mut threads = Vec::new();
    for (rank, row) in channels.into_iter().enumerate() {
        let mut to = Vec::new();
        for (other, (sender, receiver)) in row.into_iter().enumerate() {
            to.push(sender);
            from[other].push(Mutex::new(receiver));
        }
        threads.push((rank, to));
    }
    let threads: Vec<Group> = threads
        .into_iter()
        .zip(from)
        .map(|((rank, to), from)| -> Group { Arc::new(Thread { rank, to, from }) })
        .collect();
    let work = &work;
    std::thread::scope(|scope| {
        let running: Vec<_> = threads
            .into_iter()
            .map(|worker| scope.spawn(move || work(worker)))
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}
