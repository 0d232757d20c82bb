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

/// Replaces `values` by their sums over all workers, in the order of [`Tree`] over their numbers:
/// each worker sums a slice of them and hands it to all.
pub fn sum(workers: &dyn Workers, values: &mut [f32]) {
    let size = workers.size();
    if size == 1 || values.is_empty() {
        return;
    }
    let slice = values.len().div_ceil(size);
    let mut parts = values.to_vec();
    parts.resize(size * slice, 0.0);
    let received = workers.exchange(&parts);
    let mut tree = Tree::new(|mut sum: Vec<f32>, term: Vec<f32>| {
        for (sum, term) in sum.iter_mut().zip(term) {
            *sum += term;
        }
        sum
    });
    for part in received.chunks_exact(slice) {
        tree.push(part.to_vec());
    }
    let all = workers.collect(&tree.finish().unwrap_or_default());
    values.copy_from_slice(&all[..values.len()]);
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
                    // More values than one, of which the last slice is not full.
                    let mut values = vec![of(first..first + each); 2 * size + 1];
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
}
