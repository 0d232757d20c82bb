//! A rate from repeated measurements.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Median and spread of several measurements.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// The median.
    pub median: f64,
    /// Half the distance between the quartiles.
    pub spread: f64,
    /// Number of measurements.
    pub rounds: usize,
}

impl Speed {
    /// From measurements in any order; none if there are none.
    ///
    /// ```
    /// use tinyfusion::evaluation::Speed;
    /// let speed = Speed::of(&[90.0, 101.0, 100.0, 40.0, 103.0]).unwrap();
    /// assert_eq!((speed.median, speed.spread), (100.0, 5.5));
    /// assert_eq!(speed.to_string(), "100 ± 6");
    /// ```
    pub fn of(measured: &[f64]) -> Option<Self> {
        let (median, spread) = median_and_spread(measured)?;
        Some(Self {
            median,
            spread,
            rounds: measured.len(),
        })
    }
}

/// The median of measurements in any order; no number if there are none.
pub fn median(measured: &[f64]) -> f64 {
    median_and_spread(measured).map_or(f64::NAN, |(median, _)| median)
}

/// The median of measurements in any order, and half the distance between their quartiles, between
/// neighbours in proportion; none if there are none.
pub(crate) fn median_and_spread(measured: &[f64]) -> Option<(f64, f64)> {
    let mut sorted = measured.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    let at = |share: f64| {
        let place = last as f64 * share;
        let [low, high] = [place.floor(), place.ceil()].map(|place| sorted[place as usize]);
        low + (high - low) * place.fract()
    };
    Some((at(0.5), (at(0.75) - at(0.25)) / 2.0))
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = if self.median < 10.0 { 1 } else { 0 };
        write!(f, "{:.digits$} ± {:.digits$}", self.median, self.spread)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_round_does_not_move_the_median() {
        assert_eq!(Speed::of(&[]), None);
        let speed = Speed::of(&[2.0, 2.1, 1.9, 0.1, 2.0]).unwrap();
        assert_eq!((speed.median, speed.rounds), (2.0, 5));
        assert_eq!(speed.to_string(), "2.0 ± 0.1");
        assert_eq!(median_and_spread(&[3.0, 1.0]), Some((2.0, 0.5)));
        assert_eq!(median_and_spread(&[7.0]), Some((7.0, 0.0)));
    }
}
