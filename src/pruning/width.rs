//! Which channels leave when a network is pruned in width: their importance, and their removal
//! (Fang et al., "Structural Pruning for Diffusion Models", arXiv 2305.10924; Torch-Pruning).

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;

use crate::models::{ChannelGroup, Left};
use crate::random::{Stream, permutation};
use crate::state::{Array, StateDict};

/// What a channel's importance is computed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Saliency {
    /// The first-order change of the loss: `|w dw|` of every weight of the channel, summed.
    Taylor,
    /// The same of the channel's weights in a layer together: `|sum w dw|`.
    Multivariable,
    /// `w^2`, summed.
    Magnitude,
}

/// What leaves of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Leaves {
    /// The same dimensions of every head.
    Dims,
    /// Whole heads.
    Heads,
}

impl Leaves {
    /// All, by their names.
    pub const NAMES: [(&'static str, Self); 2] = [("dims", Self::Dims), ("heads", Self::Heads)];
}

/// The importance of each channel of a group; their mean is 1. `gradients` are those of the loss,
/// summed with their signs; magnitudes need none.
///
/// A member's share is summed over all other dimensions of its weight and over the times that the
/// channels occur in it; the group's is the mean over its layers.
///
/// # Panics
/// When a tensor of the group is missing, or of other sizes.
pub fn importance(
    group: &ChannelGroup,
    weights: &StateDict,
    gradients: &StateDict,
    saliency: Saliency,
) -> Vec<f64> {
    let mut sums = vec![0.0; group.channels];
    let scored = group.members.iter().filter(|member| member.scored);
    let layers = scored.clone().count();
    for member in scored {
        let weight = &weights[&member.tensor];
        let factor = match saliency {
            Saliency::Magnitude => weight,
            Saliency::Taylor | Saliency::Multivariable => &gradients[&member.tensor],
        };
        let both = [&weight.data[..], &factor.data[..]];
        let shares = match saliency {
            Saliency::Taylor => along(&weight.shape, member.dim, both, f64::abs),
            Saliency::Magnitude | Saliency::Multivariable => {
                along(&weight.shape, member.dim, both, |change| change)
            }
        };
        for offset in &member.offsets {
            let shares = &shares[*offset..][..group.channels];
            sums.iter_mut().zip(shares).for_each(|(sum, share)| {
                *sum += share.abs();
            });
        }
    }
    sums.iter_mut().for_each(|sum| *sum /= layers.max(1) as f64);
    let mean = sums.iter().sum::<f64>() / sums.len().max(1) as f64;
    // Of a group without any weight or gradient no channel matters more than another.
    if mean != 0.0 {
        sums.iter_mut().for_each(|sum| *sum /= mean);
    }
    sums
}

/// The importance of what leaves together in a group: of the dimensions of heads their mean over
/// the heads, of heads their mean over the dimensions, of other channels their own.
pub fn ranked(group: &ChannelGroup, importance: &[f64], leaves: Leaves) -> Vec<f64> {
    let heads = group.heads.max(1);
    let dims = group.channels / heads;
    let mean = |count: usize, of: usize, at: &dyn Fn(usize, usize) -> usize| {
        let of_one = |unit| (0..of).map(|i| importance[at(unit, i)]).sum::<f64>() / of as f64;
        (0..count).map(of_one).collect()
    };
    match leaves {
        _ if heads == 1 => importance.to_vec(),
        Leaves::Dims => mean(dims, heads, &|dim, head| head * dims + dim),
        Leaves::Heads => mean(heads, dims, &|head, dim| head * dims + dim),
    }
}

/// Whether whole heads leave a group.
pub fn whole_heads(group: &ChannelGroup, leaves: Leaves) -> bool {
    leaves == Leaves::Heads && group.heads > 1
}

/// How many units a group has that can leave, and how many channels each stands for.
pub fn units(group: &ChannelGroup, leaves: Leaves) -> (usize, usize) {
    let heads = group.heads.max(1);
    match whole_heads(group, leaves) {
        true => (heads, group.channels / heads),
        false => (group.channels / heads, heads),
    }
}

/// How many of so many units stay when a share of them leaves: rounded down, as Torch-Pruning does.
/// Of units in slices, equally many of each leave, as near as that comes from above.
pub fn units_left(units: usize, slices: usize, share: f64) -> usize {
    let left = (units as f64 * (1.0 - share)) as usize;
    units - (units - left) / slices * slices
}

/// The channels that stay, in their order: those of the `keep` units of the largest importance; of
/// equals the later. Of a group in slices each slice keeps its share.
///
/// # Panics
/// When `keep` is no multiple of the slices.
pub fn kept_channels(
    group: &ChannelGroup,
    ranked: &[f64],
    keep: usize,
    leaves: Leaves,
) -> Vec<usize> {
    assert!(
        keep.is_multiple_of(group.slices),
        "{keep} can't be shared by {} slices",
        group.slices
    );
    let (size, keep) = (ranked.len() / group.slices, keep / group.slices);
    let mut stays = vec![false; ranked.len()];
    for slice in 0..group.slices {
        let mut units: Vec<usize> = (slice * size..(slice + 1) * size).collect();
        units.sort_by(|a, b| ranked[*a].total_cmp(&ranked[*b]));
        for unit in units.split_off(size.saturating_sub(keep)) {
            stays[unit] = true;
        }
    }
    let heads = group.heads.max(1);
    let dims = group.channels / heads;
    let unit = |channel: usize| match leaves {
        _ if heads == 1 => channel,
        Leaves::Dims => channel % dims,
        Leaves::Heads => channel / dims,
    };
    (0..group.channels)
        .filter(|channel| stays[unit(*channel)])
        .collect()
}

/// What is left of a group of which `keep` units stay.
pub fn left_of(group: &ChannelGroup, keep: usize, leaves: Leaves) -> Left {
    let (units, of) = units(group, leaves);
    let heads = match whole_heads(group, leaves) {
        true => keep,
        false => group.heads,
    };
    Left {
        channels: keep.min(units) * of,
        heads,
    }
}

/// Random importance, in place of a measured one, keyed by seed and group.
pub fn random_importance(group: &ChannelGroup, seed: u64, index: usize) -> Vec<f64> {
    let order = permutation(seed, Stream::Channels, index as u64, group.channels);
    order.into_iter().map(|place| place as f64).collect()
}

/// The weights without the channels that leave: of each group those stay that `kept` names.
///
/// # Panics
/// When a tensor of a group is missing, or of other sizes.
pub fn without(weights: StateDict, groups: &[ChannelGroup], kept: &[Vec<usize>]) -> StateDict {
    // All places that leave are counted in the sizes before anything left.
    let mut leaves: BTreeMap<(&str, usize), Vec<bool>> = BTreeMap::new();
    for (group, kept) in groups.iter().zip(kept) {
        let mut stays = vec![false; group.channels];
        kept.iter().for_each(|channel| stays[*channel] = true);
        for member in &group.members {
            let size = weights[&member.tensor].shape[member.dim];
            let places = leaves.entry((&member.tensor, member.dim));
            let places = places.or_insert_with(|| vec![true; size]);
            for offset in &member.offsets {
                places[*offset..][..group.channels].copy_from_slice(&stays);
            }
        }
    }
    let mut weights = weights;
    for ((tensor, dim), stays) in leaves {
        if let Some(array) = weights.get_mut(tensor).filter(|_| stays.contains(&false)) {
            *array = select(array, dim, &stays);
        }
    }
    weights
}

/// The entries of a dimension that stay.
fn select(array: &Array, dim: usize, stays: &[bool]) -> Array {
    let inner: usize = array.shape[dim + 1..].iter().product();
    let mut shape = array.shape.clone();
    shape[dim] = stays.iter().filter(|stays| **stays).count();
    let rows = array.data.chunks_exact(inner.max(1));
    let kept = rows.zip(stays.iter().cycle());
    let kept = kept.filter_map(|(row, stays)| stays.then_some(row));
    Array::new(shape, kept.flatten().copied().collect())
}

/// Rows that are summed one after the other; the sums of so many are then added in their order, so
/// that the number of threads changes nothing.
const ROWS: usize = 64;

/// Sums over all dimensions but one of `share(a b)`, for each place of two arrays.
fn along(
    shape: &[usize],
    dim: usize,
    both: [&[f32]; 2],
    share: impl Fn(f64) -> f64 + Sync,
) -> Vec<f64> {
    let size = shape[dim];
    let inner: usize = shape[dim + 1..].iter().product();
    let outer: usize = shape[..dim].iter().product();
    let one = |a: &f32, b: &f32| share(f64::from(*a) * f64::from(*b));
    let total = |[a, b]: [&[f32]; 2]| {
        // In eight running sums: additions to one would wait for each other.
        let mut sums = [0.0; 8];
        let ((a, rest), (b, other)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
        for (a, b) in a.iter().zip(b) {
            for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                *sum += one(a, b);
            }
        }
        let rest = rest.iter().zip(other).map(|(a, b)| one(a, b));
        sums.iter().sum::<f64>() + rest.sum::<f64>()
    };
    if outer == 1 {
        return (0..size)
            .into_par_iter()
            .map(|index| total(both.map(|values| &values[index * inner..][..inner])))
            .collect();
    }
    let some = |rows: usize| -> Vec<f64> {
        let mut sums = vec![0.0; size];
        for row in rows * ROWS..outer.min((rows + 1) * ROWS) {
            let [a, b] = both.map(|values| &values[row * size * inner..][..size * inner]);
            if inner == 1 {
                for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                    *sum += one(a, b);
                }
            } else {
                let places = a.chunks_exact(inner).zip(b.chunks_exact(inner));
                for (sum, (a, b)) in sums.iter_mut().zip(places) {
                    *sum += total([a, b]);
                }
            }
        }
        sums
    };
    let parts: Vec<Vec<f64>> = (0..outer.div_ceil(ROWS))
        .into_par_iter()
        .map(some)
        .collect();
    let mut sums = vec![0.0; size];
    for part in parts {
        sums.iter_mut()
            .zip(part)
            .for_each(|(sum, part)| *sum += part);
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{Member, Part};
    use crate::random::{self, Stream};

    fn group(heads: usize, channels: usize) -> ChannelGroup {
        let member = |tensor: &str, dim, offsets: &[usize], scored| Member {
            tensor: tensor.to_owned(),
            dim,
            offsets: offsets.to_vec(),
            scored,
        };
        ChannelGroup {
            root: "a".into(),
            part: Part::Attention,
            channels,
            slices: 1,
            heads,
            members: vec![
                member("a", 0, &[0, channels], true),
                member("b", 1, &[0], true),
                member("c", 0, &[0], false),
            ],
        }
    }

    fn weights() -> StateDict {
        let counted = |shape: &[usize]| {
            let count: usize = shape.iter().product();
            Array::new(shape, (0..count).map(|i| i as f32).collect())
        };
        StateDict::from([
            ("a".to_owned(), counted(&[8, 2])),
            ("b".to_owned(), counted(&[3, 4])),
            ("c".to_owned(), counted(&[4])),
        ])
    }

    #[test]
    fn importance_is_the_mean_over_layers_of_sums_over_places() {
        let weights = weights();
        let ones = |state: &StateDict| -> StateDict {
            let one = |array: &Array| Array::new(array.shape.clone(), vec![-1.0; array.data.len()]);
            state.iter().map(|(k, v)| (k.clone(), one(v))).collect()
        };
        let found = importance(&group(2, 4), &weights, &ones(&weights), Saliency::Taylor);
        // Rows 0 and 4 of a: 0 + 1 + 8 + 9; column 0 of b: 0 + 4 + 8.
        let sums = [30.0, 41.0, 52.0, 63.0].map(|sum| sum / 2.0);
        let mean = sums.iter().sum::<f64>() / 4.0;
        for (found, sum) in found.iter().zip(sums) {
            assert!((found - sum / mean).abs() < 1e-12);
        }
    }

    #[test]
    fn sums_along_any_dimension_are_those_of_its_places() {
        let shape = [70, 3, 19]; // more rows than are summed at once, and more places than eight
        let count: usize = shape.iter().product();
        let values = |index| random::normal(0, Stream::Bench, 13, index, count);
        let (a, b) = (values(0), values(1));
        for dim in 0..3 {
            let found = along(&shape, dim, [&a, &b], f64::abs);
            let inner: usize = shape[dim + 1..].iter().product();
            let mut expected = vec![0.0; shape[dim]];
            for (index, (a, b)) in a.iter().zip(&b).enumerate() {
                expected[index / inner % shape[dim]] += (f64::from(*a) * f64::from(*b)).abs();
            }
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(expected) {
                assert!(
                    (found - expected).abs() < 1e-9,
                    "{dim}: {found}, {expected}"
                );
            }
        }
    }

    #[test]
    fn dimensions_or_heads_leave_together() {
        let group = group(2, 4);
        let importance = [4.0, 1.0, 2.0, 3.0];
        let dims = ranked(&group, &importance, Leaves::Dims);
        assert_eq!(dims, [3.0, 2.0]);
        assert_eq!(kept_channels(&group, &dims, 1, Leaves::Dims), [0, 2]);
        let heads = ranked(&group, &importance, Leaves::Heads);
        assert_eq!(heads, [2.5, 2.5]);
        // Of equals the later stays.
        assert_eq!(kept_channels(&group, &heads, 1, Leaves::Heads), [2, 3]);
        let two = Left {
            channels: 2,
            heads: 2,
        };
        assert_eq!(left_of(&group, 1, Leaves::Dims), two);
        assert_eq!(left_of(&group, 1, Leaves::Heads), Left { heads: 1, ..two });
    }

    #[test]
    fn slices_keep_equally_many() {
        let group = ChannelGroup {
            slices: 2,
            ..group(1, 4)
        };
        let importance = [4.0, 3.0, 1.0, 2.0];
        assert_eq!(kept_channels(&group, &importance, 2, Leaves::Dims), [0, 3]);
    }

    #[test]
    fn channels_leave_all_their_places() {
        let left = without(weights(), &[group(2, 4)], &[vec![0, 2]]);
        assert_eq!(left["a"].shape, [4, 2]);
        assert_eq!(left["a"].data, [0., 1., 4., 5., 8., 9., 12., 13.]);
        assert_eq!(left["b"].shape, [3, 2]);
        assert_eq!(left["b"].data, [0., 2., 4., 6., 8., 10.]);
        assert_eq!(left["c"].data, [0., 2.]);
    }
}
