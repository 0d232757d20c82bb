//! Rules that choose layers by their places alone.

/// The hand-made rule of BK-SDM (arXiv 2305.15798), as in the paper's "oracle" for DiT.
///
/// Keeps the first layer of each pair in the first half of the trunk and the last of each pair in
/// the second: of 28 layers 0 2 4 6 8 10 12 15 17 19 21 23 25 27. `None` for an odd depth, which
/// has no pairs.
pub fn oracle(depth: usize) -> Option<Vec<usize>> {
    let pairs = depth / 2;
    (depth > 0 && depth.is_multiple_of(2)).then(|| {
        (0..pairs)
            .map(|pair| 2 * pair + usize::from(pair >= pairs.div_ceil(2)))
            .collect()
    })
}

/// The layers nearest to `keep` places that are evenly spaced from the first layer to the last; of
/// two equally near the earlier. A single one is the first.
///
/// # Panics
/// When `keep` is above `depth`.
pub fn uniform(depth: usize, keep: usize) -> Vec<usize> {
    assert!(keep <= depth, "{keep} of {depth} layers can't stay");
    let gaps = keep.saturating_sub(1).max(1);
    (0..keep)
        .map(|place| (2 * place * (depth - 1) + gaps - 1) / (2 * gaps))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evenly_spaced_layers_begin_at_the_first_and_end_at_the_last() {
        assert_eq!(uniform(12, 6), [0, 2, 4, 7, 9, 11]);
        assert_eq!(uniform(5, 2), [0, 4]);
        assert_eq!(uniform(4, 3), [0, 1, 3]);
        assert_eq!(uniform(7, 1), [0]);
        assert_eq!(uniform(3, 3), [0, 1, 2]);
        assert!(uniform(3, 0).is_empty());
        for (depth, keep) in [(28, 14), (28, 27), (29, 3)] {
            let kept = uniform(depth, keep);
            assert_eq!((kept[0], kept[keep - 1]), (0, depth - 1));
            assert!(kept.is_sorted_by(|a, b| a < b), "{kept:?}");
        }
    }

    #[test]
    fn keeps_the_layers_the_paper_lists() {
        assert_eq!(
            oracle(28).unwrap(),
            [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]
        );
        assert_eq!(oracle(12).unwrap(), [0, 2, 4, 7, 9, 11]);
        assert_eq!(oracle(7), None);
    }
}
