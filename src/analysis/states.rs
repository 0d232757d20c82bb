//! Distributions of hidden states.

use burn::tensor::{Tensor, backend::Backend};

use crate::process::typical;
use crate::state::floats;

/// Bins of a histogram.
const BINS: usize = 80;

/// The distribution of one layer's output, over all samples, tokens and channels.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerStates {
    /// Index of the layer.
    pub layer: usize,
    /// Least value.
    pub min: f64,
    /// Largest value.
    pub max: f64,
    /// Mean.
    pub mean: f64,
    /// Standard deviation.
    pub deviation: f64,
    /// Share of the values that masked distillation leaves out: `k` deviations from their sample's
    /// mean or further.
    pub masked: f64,
    /// Number of values in each of equally wide bins from the least to the largest.
    pub histogram: Vec<usize>,
}

impl LayerStates {
    /// Of a layer's output, `[batch, tokens, width]`.
    pub fn new<B: Backend>(layer: usize, x: &Tensor<B, 3>, k: f64) -> Self {
        let kept: f64 = typical(x, k)
            .mean()
            .into_data()
            .iter()
            .next()
            .unwrap_or(f64::NAN);
        let values = floats(x.clone().into_data());
        let count = values.len() as f64;
        let of = |value: &f32| f64::from(*value);
        let mean = values.iter().map(of).sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (of(value) - mean).powi(2)).sum();
        let min = values.iter().map(of).fold(f64::INFINITY, f64::min);
        let max = values.iter().map(of).fold(f64::NEG_INFINITY, f64::max);
        let mut histogram = vec![0; BINS];
        for value in &values {
            let share = (of(value) - min) / (max - min);
            // The largest value belongs to the last bin; equal values have no width to be shared.
            let bin = (share * BINS as f64) as usize;
            histogram[bin.min(BINS - 1)] += 1;
        }
        Self {
            layer,
            min,
            max,
            mean,
            deviation: (squares / count).sqrt(),
            masked: 1.0 - kept,
            histogram,
        }
    }

    /// The middle of each bin that has values, with their number.
    pub fn bins(&self) -> Vec<(f64, f64)> {
        let width = (self.max - self.min) / BINS as f64;
        let filled = self
            .histogram
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0);
        filled
            .map(|(bin, count)| (self.min + (bin as f64 + 0.5) * width, *count as f64))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use burn_ndarray::NdArray;

    use super::*;

    #[test]
    fn a_far_value_is_counted_and_masked() {
        let mut values = [1.0f32; 24];
        (values[1], values[2]) = (0.0, 2.0);
        values[23] = 41.0;
        let x = Tensor::<NdArray, 1>::from_floats(values, &Default::default());
        let states = LayerStates::new(3, &x.reshape([2, 3, 4]), 2.0);
        assert_eq!((states.min, states.max), (0.0, 41.0));
        assert!((states.mean - 64.0 / 24.0).abs() < 1e-12);
        // Of the first sample, ten ones, 0 and 2, the deviation is 0.43, so that two are far; of
        // the second one is. The share is of f32.
        assert!(
            (states.masked - 3.0 / 24.0).abs() < 1e-6,
            "{}",
            states.masked
        );
        assert_eq!(states.histogram.iter().sum::<usize>(), 24);
        let bins = states.bins();
        assert_eq!(bins.last().map(|bin| bin.1), Some(1.0));
        assert_eq!(bins.len(), 4);
    }

    #[test]
    fn equal_values_fill_one_bin() {
        let x = Tensor::<NdArray, 3>::ones([1, 2, 2], &Default::default());
        let states = LayerStates::new(0, &x, 2.0);
        assert_eq!(states.bins(), [(1.0, 4.0)]);
        assert_eq!(states.deviation, 0.0);
    }
}
