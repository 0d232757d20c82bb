//! Whether one measure orders things as another does.

use rand::Rng;

use crate::random::{Stream, generator};

/// Spearman's rank correlation, with the interval that holds 95 of 100 values of resampled pairs
/// (the percentile bootstrap).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankCorrelation {
    /// From -1, the opposite order, to 1, the same.
    pub value: f64,
    /// Ends of the interval.
    pub interval: [f64; 2],
    /// Number of pairs.
    pub pairs: usize,
}

/// Resamplings of an interval.
const RESAMPLINGS: u64 = 2000;

impl RankCorrelation {
    /// Of pairs of numbers. None of fewer than three, or when one side is the same everywhere.
    ///
    /// ```
    /// use tinyfusion::evaluation::RankCorrelation;
    /// let squares: Vec<[f64; 2]> = (0..10).map(|x| [f64::from(x), f64::from(x * x)]).collect();
    /// let same = RankCorrelation::of(&squares).unwrap();
    /// assert_eq!((same.value, same.pairs), (1.0, 10));
    /// ```
    pub fn of(pairs: &[[f64; 2]]) -> Option<Self> {
        let value = spearman(pairs)?;
        let mut resampled: Vec<f64> = (0..RESAMPLINGS)
            .filter_map(|index| {
                let mut rng = generator(0, Stream::Bootstrap, 0, index);
                let drawn = pairs
                    .iter()
                    .map(|_| pairs[rng.random_range(0..pairs.len())]);
                spearman(&drawn.collect::<Vec<_>>())
            })
            .collect();
        resampled.sort_by(f64::total_cmp);
        let last = resampled.len().checked_sub(1)?;
        let at = |share: f64| resampled[(share * last as f64).round() as usize];
        Some(Self {
            value,
            interval: [at(0.025), at(0.975)],
            pairs: pairs.len(),
        })
    }
}

/// Pearson's correlation of the ranks.
fn spearman(pairs: &[[f64; 2]]) -> Option<f64> {
    if pairs.len() < 3 || pairs.iter().flatten().any(|value| value.is_nan()) {
        return None;
    }
    let ranks: [Vec<f64>; 2] = [0, 1].map(|side| ranks(pairs.iter().map(|pair| pair[side])));
    // Ranks have the same mean, with ties or without.
    let mean = (pairs.len() as f64 + 1.0) / 2.0;
    let product = |a: &[f64], b: &[f64]| -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - mean) * (b - mean)).sum()
    };
    let scale = (product(&ranks[0], &ranks[0]) * product(&ranks[1], &ranks[1])).sqrt();
    (scale > 0.0).then(|| product(&ranks[0], &ranks[1]) / scale)
}

/// The place of each value in ascending order, from 1; equal values share the mean of theirs.
fn ranks(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let values: Vec<f64> = values.collect();
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for tied in order.chunk_by(|a, b| values[*a] == values[*b]) {
        let mean = first as f64 + (tied.len() as f64 + 1.0) / 2.0;
        tied.iter().for_each(|index| ranks[*index] = mean);
        first += tied.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_scipy() {
        // scipy.stats.spearmanr of scipy 1.17.1.
        let expected = [-0.642_857_142_857_143, 0.630_893_268_144_044_9];
        let pairs = |a: &[f64], b: &[f64]| -> Vec<[f64; 2]> {
            a.iter().zip(b).map(|(a, b)| [*a, *b]).collect()
        };
        let plain = pairs(
            &[0.2, 0.9, 0.4, 1.3, 0.7, 37.0, 0.5],
            &[20.7, 6.4, 22.3, 7.4, 25.9, 5.7, 21.2],
        );
        let found = RankCorrelation::of(&plain).unwrap();
        assert!((found.value - expected[0]).abs() < 1e-12, "{found:?}");
        let tied = pairs(&[1.0, 2.0, 2.0, 3.0, 5.0], &[2.0, 1.0, 4.0, 4.0, 4.0]);
        let found = RankCorrelation::of(&tied).unwrap();
        assert!((found.value - expected[1]).abs() < 1e-12, "{found:?}");
        let [low, high] = found.interval;
        assert!(
            low < found.value && found.value < high && high <= 1.0,
            "{found:?}"
        );
        for none in [&plain[..2], &pairs(&[1.0; 3], &[1.0, 2.0, 3.0])] {
            assert_eq!(RankCorrelation::of(none), None);
        }
        let nan = pairs(&[1.0, 2.0, f64::NAN], &[1.0, 2.0, 3.0]);
        assert_eq!(RankCorrelation::of(&nan), None);
    }

    #[test]
    fn the_interval_of_more_pairs_is_narrower() {
        let noisy = |count: usize| -> f64 {
            let pairs: Vec<[f64; 2]> = (0..count)
                .map(|i| {
                    [
                        i as f64,
                        i as f64 + 0.5 * count as f64 * (i as f64 * 2.4).sin(),
                    ]
                })
                .collect();
            let [low, high] = RankCorrelation::of(&pairs).unwrap().interval;
            high - low
        };
        assert!(noisy(200) < 0.6 * noisy(20));
    }
}
