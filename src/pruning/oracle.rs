//! The hand-made rule of BK-SDM (arXiv 2305.15798), as in the paper's "oracle" for DiT.

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

#[cfg(test)]
mod tests {
    use super::*;

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
