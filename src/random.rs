//! Counter-keyed randomness, drawn on the host.
//!
//! A draw is addressed by (seed, [`Stream`], step, index) and doesn't depend on earlier draws. So a
//! run uses the same masks, noise and order on every backend, with any batch size, and after a
//! restart. Burn's own generator is one global state per backend and guarantees none of these.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Gumbel, StandardNormal, Uniform};

/// Purpose of a random number. Streams never share numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Weight initialisation; `index` counts parameters.
    Weights = 1,
    /// Order of an epoch; `step` is the epoch.
    Order = 2,
    /// Diffusion timestep of a training sample.
    Timestep = 3,
    /// Noise added to a training sample.
    Noise = 4,
    /// Whether a sample's label is dropped.
    LabelDrop = 5,
    /// Gumbel noise of a pruning gate.
    Gumbel = 6,
    /// Initial noise of a generated sample; `index` is the sample.
    SampleStart = 7,
    /// Noise of one denoising step; `step` is the step, `index` the sample.
    SampleStep = 8,
    /// Train / test split.
    Split = 9,
    /// Benchmark inputs.
    Bench = 10,
    /// Whether a training sample is the mirrored view.
    Mirror = 11,
    /// Draw from an autoencoder's posterior; `step` is the view, `index` the image.
    Posterior = 12,
    /// Layers that random pruning keeps; `step` counts choices.
    Layers = 13,
    /// Class of a generated sample; `index` is the sample.
    Class = 14,
    /// Children of a search for masks; `step` is the generation, `index` the child.
    Search = 15,
    /// Combinations of a sweep's grid.
    Sweep = 16,
    /// Resampled pairs of an interval; `index` is the resampling.
    Bootstrap = 17,
    /// Channels that random pruning keeps; `step` counts groups.
    Channels = 18,
    /// Share of the tokens that are unknown in a training step.
    MaskRatio = 19,
    /// Order in which a training sample's tokens become known.
    MaskOrder = 20,
    /// Order in which a generated sample's tokens become known; `index` is the sample.
    SampleOrder = 21,
}

/// The generator for one address.
pub fn generator(seed: u64, stream: Stream, step: u64, index: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (slot, word) in key
        .chunks_exact_mut(8)
        .zip([seed, stream as u64, step, index])
    {
        slot.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// `count` standard normal numbers.
pub fn normal(seed: u64, stream: Stream, step: u64, index: u64, count: usize) -> Vec<f32> {
    let rng = generator(seed, stream, step, index);
    StandardNormal.sample_iter(rng).take(count).collect()
}

/// `count` numbers uniform in [low, high).
pub fn uniform(
    seed: u64,
    stream: Stream,
    step: u64,
    index: u64,
    count: usize,
    (low, high): (f32, f32),
) -> Vec<f32> {
    let rng = generator(seed, stream, step, index);
    let unit = Uniform::new(0.0f32, 1.0).expect("0 < 1");
    unit.sample_iter(rng)
        .take(count)
        .map(|u| low + (high - low) * u)
        .collect()
}

/// `count` Gumbel(0, 1) numbers. A draw in 2^24 is infinite, and would be the whole share of a soft
/// choice, which is then no number; it is cut off above the largest of the others, 24 ln 2.
pub fn gumbel(seed: u64, stream: Stream, step: u64, index: u64, count: usize) -> Vec<f32> {
    let rng = generator(seed, stream, step, index);
    let unit = Gumbel::new(0.0f32, 1.0).expect("scale 1 is positive");
    let noise = unit.sample_iter(rng).take(count);
    noise.map(|noise| noise.min(17.0)).collect()
}

/// An integer uniform in 0..bound.
///
/// # Panics
/// When `bound` is 0.
pub fn below(seed: u64, stream: Stream, step: u64, index: u64, bound: usize) -> usize {
    use rand::Rng;
    generator(seed, stream, step, index).random_range(0..bound)
}

/// 0..count in random order.
pub fn permutation(seed: u64, stream: Stream, step: u64, count: usize) -> Vec<usize> {
    permutation_of(seed, stream, step, 0, count)
}

/// 0..count in random order, one for each index.
pub fn permutation_of(
    seed: u64,
    stream: Stream,
    step: u64,
    index: u64,
    count: usize,
) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(&mut generator(seed, stream, step, index));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_always_gives_the_same_numbers_and_another_gives_others() {
        let first = normal(7, Stream::Noise, 3, 11, 4);
        assert_eq!(first, normal(7, Stream::Noise, 3, 11, 4));
        assert_eq!(first[..2], normal(7, Stream::Noise, 3, 11, 2));
        for other in [
            normal(8, Stream::Noise, 3, 11, 4),
            normal(7, Stream::Timestep, 3, 11, 4),
            normal(7, Stream::Noise, 4, 11, 4),
            normal(7, Stream::Noise, 3, 12, 4),
        ] {
            assert_ne!(first, other);
        }
    }

    #[test]
    fn a_permutation_holds_every_index_once() {
        let mut order = permutation(0, Stream::Order, 5, 100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn gumbel_noise_has_the_mean_of_its_law() {
        let draws = gumbel(1, Stream::Gumbel, 0, 0, 20_000);
        let mean = draws.iter().sum::<f32>() / draws.len() as f32;
        // Euler's constant; the standard error of this mean is 1.28 / sqrt(20,000) = 0.009.
        assert!((mean - 0.5772).abs() < 0.04, "{mean}");
        // A draw of 1, which has an infinite one.
        assert_eq!(gumbel(2335, Stream::Gumbel, 3, 7, 1), [17.0]);
    }
}
