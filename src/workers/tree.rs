//! The fixed tree in which a step's gradients are summed.

use super::Workers;

/// A sum whose order depends on the number of its terms alone: a binary counter, in which two
/// branches of equal size become one as soon as both are there.
///
/// A run of terms that is a whole branch may be summed elsewhere and pushed as one: with the same
/// number of terms in each run, a power of two, the result is the same to the last bit.
pub struct Tree<T, F> {
    /// Branches from the largest to the smallest, each with its height.
    branches: Vec<(u32, T)>,
    add: F,
}

impl<T, F: FnMut(T, T) -> T> Tree<T, F> {
    /// An empty sum; `add` gets the earlier terms first.
    pub fn new(add: F) -> Self {
        Self {
            branches: Vec::new(),
            add,
        }
    }

    /// Adds a term.
    pub fn push(&mut self, term: T) {
        let (mut height, mut sum) = (0, term);
        while let Some((_, branch)) = self.branches.pop_if(|(other, _)| *other == height) {
            sum = (self.add)(branch, sum);
            height += 1;
        }
        self.branches.push((height, sum));
    }

    /// The sum; None of no terms.
    pub fn finish(mut self) -> Option<T> {
        let (_, mut sum) = self.branches.pop()?;
        while let Some((_, branch)) = self.branches.pop() {
            sum = (self.add)(branch, sum);
        }
        Some(sum)
    }
}

/// Numbers of each worker that are summed at a time, so that they stay in the fastest cache.
const BLOCK: usize = 1024;

/// Replaces `values` by their sums over all workers, in the order of [`Tree`] over their numbers:
/// each worker sums a slice of them and hands it to all.
pub fn sum(workers: &dyn Workers, values: &mut [f32]) {
    let size = workers.size();
    if size == 1 || values.is_empty() {
        return;
    }
    if values.len().is_multiple_of(size) {
        return sum_slices(workers, values);
    }
    // Slices are equally long.
    let mut padded = values.to_vec();
    padded.resize(values.len().next_multiple_of(size), 0.0);
    sum_slices(workers, &mut padded);
    values.copy_from_slice(&padded[..values.len()]);
}

/// As [`sum`], of a multiple of as many values as there are workers.
fn sum_slices(workers: &dyn Workers, values: &mut [f32]) {
    let slice = values.len() / workers.size();
    let received = workers.exchange(values);
    let mut own = vec![0.0; slice];
    for (block, own) in own.chunks_mut(BLOCK).enumerate() {
        let begin = block * BLOCK;
        let mut tree = Tree::new(|mut sum: Vec<f32>, term: Vec<f32>| {
            for (sum, term) in sum.iter_mut().zip(term) {
                *sum += term;
            }
            sum
        });
        for part in received.chunks_exact(slice) {
            tree.push(part[begin..begin + own.len()].to_vec());
        }
        own.copy_from_slice(&tree.finish().unwrap_or_default());
    }
    workers.collect(&own, values);
}

#[cfg(test)]
mod tests {
    use super::super::{fake, fits};
    use super::*;

    /// Numbers whose sum depends on the order of adding.
    fn term(index: usize) -> f32 {
        1.0 / (index as f32 * 7.3 + 0.37)
    }

    fn of(range: std::ops::Range<usize>) -> f32 {
        let mut tree = Tree::new(|a: f32, b: f32| a + b);
        for index in range {
            tree.push(term(index));
        }
        tree.finish().unwrap()
    }

    #[test]
    fn the_order_is_that_of_a_binary_counter() {
        let mut tree = Tree::new(|a: String, b: String| format!("({a}{b})"));
        for term in "abcdefg".chars() {
            tree.push(term.to_string());
        }
        assert_eq!(tree.finish().unwrap(), "(((ab)(cd))((ef)g))");
        assert!(Tree::new(|a: f32, b: f32| a + b).finish().is_none());
    }

    #[test]
    fn any_number_of_workers_that_fits_gives_the_same_bits() {
        let mut shared = 0;
        for groups in 1..=24 {
            let alone = of(0..groups);
            for size in (2..=groups).filter(|&size| fits(size, groups).is_ok()) {
                let each = groups / size;
                let sums = fake::group(size, |workers| {
                    let first = workers.rank() * each;
                    let mut values = vec![of(first..first + each); 2 * size];
                    sum(workers, &mut values);
                    values
                });
                for values in sums {
                    assert!(
                        values
                            .iter()
                            .all(|value| value.to_bits() == alone.to_bits()),
                        "{groups} over {size}"
                    );
                }
                shared += 1;
            }
        }
        assert!(shared > 24, "{shared}");
        // The terms do tell orders apart.
        assert_ne!(of(0..16), (0..16).map(term).sum::<f32>());
    }

    #[test]
    fn every_value_is_summed_in_its_place() {
        for size in [2, 3, 4] {
            // Fewer than workers, slices that are not full, and several blocks.
            for count in [0, 1, size + 1, size * (2 * BLOCK + 3), size * BLOCK + 1] {
                let value = |rank: usize, place: usize| term(rank * 31 + place);
                let expected: Vec<f32> = (0..count)
                    .map(|place| {
                        let mut tree = Tree::new(|a: f32, b: f32| a + b);
                        (0..size).for_each(|rank| tree.push(value(rank, place)));
                        tree.finish().unwrap()
                    })
                    .collect();
                let sums = fake::group(size, |workers| {
                    let place = |place| value(workers.rank(), place);
                    let mut values: Vec<f32> = (0..count).map(place).collect();
                    sum(workers, &mut values);
                    values
                });
                for values in sums {
                    assert_eq!(values, expected, "{count} over {size}");
                }
            }
        }
    }
}
