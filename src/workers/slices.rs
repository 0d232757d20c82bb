//! Sums of long vectors that the workers have in turn.

use std::ops::Range;

use super::{BUCKET, Group};

/// A sum of equally long vectors of several workers, added one after the other in the order of
/// their numbers, as one worker would add them: the same to the last bit however many there are.
///
/// Each worker has the sums of a slice of every bucket.
#[derive(Debug)]
pub struct Slices {
    workers: Group,
    /// Length of a vector.
    length: usize,
    bucket: usize,
    sums: Vec<f32>,
}

impl Slices {
    /// A sum that begins with these values, the same of all workers.
    pub fn new(workers: Group, values: &[f32]) -> Self {
        Self::in_buckets(workers, values, BUCKET)
    }

    fn in_buckets(workers: Group, values: &[f32], bucket: usize) -> Self {
        let mut slices = Self {
            length: values.len(),
            sums: Vec::with_capacity(values.len().div_ceil(workers.size())),
            workers,
            bucket,
        };
        for bucket in slices.buckets() {
            let slice = slices.slice(&bucket);
            let parts = padded(&values[bucket], slice * slices.workers.size());
            let own = slices.workers.rank() * slice;
            slices.sums.extend(&parts[own..own + slice]);
        }
        slices
    }

    /// The number of this worker.
    pub fn rank(&self) -> usize {
        self.workers.rank()
    }

    /// Adds the vectors of those workers that have one. Of all workers at once; who has none gives
    /// no values.
    pub fn add(&mut self, own: &[f32], have: &[bool]) {
        let mut sums = std::mem::take(&mut self.sums);
        let mut begin = 0;
        for bucket in self.buckets() {
            let slice = self.slice(&bucket);
            let own = own.get(bucket).unwrap_or(&[]);
            let parts = padded(own, slice * self.workers.size());
            let received = self.workers.exchange(&parts);
            let parts = received.chunks_exact(slice).zip(have);
            for (part, _) in parts.filter(|(_, has)| **has) {
                let sums = sums[begin..begin + slice].iter_mut();
                sums.zip(part).for_each(|(sum, value)| *sum += value);
            }
            begin += slice;
        }
        self.sums = sums;
    }

    /// The sums. Of all workers at once.
    pub fn all(&self) -> Vec<f32> {
        let mut all = Vec::with_capacity(self.length);
        let mut begin = 0;
        for bucket in self.buckets() {
            let slice = self.slice(&bucket);
            let mut parts = vec![0.0; slice * self.workers.size()];
            self.workers
                .collect(&self.sums[begin..begin + slice], &mut parts);
            all.extend(&parts[..bucket.len()]);
            begin += slice;
        }
        all
    }

    fn buckets(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (length, bucket) = (self.length, self.bucket);
        let begins = (0..length).step_by(bucket);
        begins.map(move |begin| begin..length.min(begin + bucket))
    }

    /// Length of each worker's slice of a bucket; the last one's is padded.
    fn slice(&self, bucket: &Range<usize>) -> usize {
        bucket.len().div_ceil(self.workers.size())
    }
}

fn padded(values: &[f32], length: usize) -> Vec<f32> {
    let mut padded = values.to_vec();
    padded.resize(length, 0.0);
    padded
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::fake;

    #[test]
    fn terms_are_added_in_the_order_of_the_workers() {
        let term = |index: usize, place: usize| 1.0 / ((index * 31 + place) as f32 * 7.3 + 0.37);
        for (length, terms) in [(1, 3), (7, 5), (23, 8), (24, 9)] {
            let vector = |index: usize| (0..length).map(|place| term(index, place)).collect();
            let begun: Vec<f32> = vector(99);
            let one_by_one = |begun: Vec<f32>| {
                (0..terms).fold(begun, |sums: Vec<f32>, index| {
                    let term: Vec<f32> = vector(index);
                    sums.iter()
                        .zip(term)
                        .map(|(sum, term)| sum + term)
                        .collect()
                })
            };
            let expected = one_by_one(begun.clone());
            for size in 1..=4 {
                let found = fake::shared(size, |workers| {
                    let rank = workers.rank();
                    let mut sums = Slices::in_buckets(workers, &begun, 5);
                    for first in (0..terms).step_by(size) {
                        let have: Vec<bool> = (0..size).map(|i| first + i < terms).collect();
                        let own: Vec<f32> = match have[rank] {
                            true => vector(first + rank),
                            false => Vec::new(),
                        };
                        sums.add(&own, &have);
                    }
                    sums.all()
                });
                assert!(
                    found.iter().all(|sums| *sums == expected),
                    "{length} {size}"
                );
            }
        }
        // The terms do tell orders apart.
        let forwards: f32 = (0..9).map(|index| term(index, 0)).sum();
        let backwards: f32 = (0..9).rev().map(|index| term(index, 0)).sum();
        assert_ne!(forwards, backwards);
    }
}
