//! Tokens of images, and which of them are known.

use std::ops::Range;

use burn::tensor::{Tensor, backend::Backend};

/// Images `[batch, channels, side, side]` as tokens `[batch, tokens, token width]`: patches row by
/// row, the numbers of a patch by channel, then row, then column.
pub fn tokens<B: Backend>(images: Tensor<B, 4>, patch: usize) -> Tensor<B, 3> {
    let [batch, channels, side, _] = images.dims();
    let grid = side / patch;
    images
        .reshape([batch, channels, grid, patch, grid, patch])
        .permute([0, 2, 4, 1, 3, 5])
        .reshape([batch, grid * grid, channels * patch * patch])
}

/// The inverse of [`tokens`].
pub fn of_tokens<B: Backend>(tokens: Tensor<B, 3>, patch: usize) -> Tensor<B, 4> {
    let [batch, count, width] = tokens.dims();
    let (grid, channels) = (count.isqrt(), width / (patch * patch));
    tokens
        .reshape([batch, grid, grid, channels, patch, patch])
        .permute([0, 3, 1, 4, 2, 5])
        .reshape([batch, channels, grid * patch, grid * patch])
}

/// Which tokens of each sample are known, as many of every sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    tokens: usize,
    /// By sample, ascending.
    known: Vec<Vec<usize>>,
}

impl Known {
    /// The given ones of `tokens` tokens.
    ///
    /// # Panics
    /// When not as many of every sample are known, or one is not below `tokens`, or is there twice.
    pub fn new(tokens: usize, mut known: Vec<Vec<usize>>) -> Self {
        known.iter_mut().for_each(|known| known.sort_unstable());
        let alike = known.windows(2).all(|pair| pair[0].len() == pair[1].len());
        assert!(alike, "as many tokens of every sample are known");
        for known in &known {
            let once = known.windows(2).all(|pair| pair[0] < pair[1]);
            let below = known.last().is_none_or(|last| *last < tokens);
            assert!(once && below, "tokens {known:?} of {tokens}");
        }
        Self { tokens, known }
    }

    /// All but the first `masked` tokens of each sample's order.
    ///
    /// # Panics
    /// When an order is shorter, or as [`new`](Self::new).
    pub fn of_orders(orders: &[Vec<usize>], masked: usize) -> Self {
        let tokens = orders.first().map_or(0, Vec::len);
        let known = orders.iter().map(|order| order[masked..].to_vec());
        Self::new(tokens, known.collect())
    }

    /// None of any token, for so many samples.
    pub fn none(tokens: usize, samples: usize) -> Self {
        Self::new(tokens, vec![Vec::new(); samples])
    }

    /// Tokens of a sample.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The same `count` times, one after another.
    pub fn repeated(&self, count: usize) -> Self {
        Self {
            tokens: self.tokens,
            known: std::iter::repeat_n(&self.known, count)
                .flatten()
                .cloned()
                .collect(),
        }
    }

    /// Those of some of the samples.
    pub fn of_samples(&self, samples: Range<usize>) -> Self {
        Self {
            tokens: self.tokens,
            known: self.known[samples].to_vec(),
        }
    }

    /// The known tokens of each sample, ascending.
    pub(super) fn by_sample(&self) -> impl Iterator<Item = &Vec<usize>> {
        self.known.iter()
    }

    /// Whether each token of each sample is unknown.
    pub fn unknown(&self) -> Vec<bool> {
        let samples = self.known.iter();
        samples
            .flat_map(|known| (0..self.tokens).map(|token| known.binary_search(&token).is_err()))
            .collect()
    }

    /// Known tokens of a sample.
    pub fn count(&self) -> usize {
        self.known.first().map_or(0, Vec::len)
    }

    /// Rows of the unknown tokens among those of all samples, as many of each.
    pub fn unknown_rows(&self) -> Vec<usize> {
        let unknown = self.unknown().into_iter().enumerate();
        unknown
            .filter_map(|(row, unknown)| unknown.then_some(row))
            .collect()
    }

    /// Rows of the known tokens among those of all samples.
    pub(super) fn rows(&self) -> Vec<usize> {
        let samples = self.known.iter().enumerate();
        samples
            .flat_map(|(sample, known)| known.iter().map(move |token| sample * self.tokens + token))
            .collect()
    }
}
