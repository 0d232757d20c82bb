//! N:M groups: how the trunk is divided for learnable depth pruning.
//!
//! A group `N:M` spans M consecutive layers, of which exactly N are kept. A model's groups are
//! adjacent and cover its trunk without gaps, so that a decision for the whole model is one
//! decision per group, drawn from the `C(M, N)` ways to keep N of M layers (arXiv 2412.01199).
//! Mixed patterns such as 2:4, 3:4, 1:2 are allowed if they add up; a group such as 4:4 beside them
//! protects its layers.

use std::fmt;

use serde::Serialize;

pub use super::group::{Group, GroupError, MAX_CANDIDATES};
use crate::trunk::Trunk;

/// Groups that cover a trunk from its first layer to its last.
///
/// ```
/// use tinyfusion::pruning::Groups;
///
/// let groups = Groups::parse_ratio("1:2", 12)?;
/// assert_eq!(groups.to_string(), "1:2 ×6");
/// assert_eq!(groups.kept_depth(), 6);
/// # Ok::<(), tinyfusion::pruning::GroupError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Groups(Vec<Group>);

#[expect(clippy::len_without_is_empty, reason = "a trunk always has a group")]
impl Groups {
    /// The given groups, side by side over a trunk of `depth` layers.
    ///
    /// # Errors
    ///
    /// If they do not add up to `depth`, keep all its layers, or there are none.
    pub fn new(groups: Vec<Group>, depth: usize) -> Result<Self, GroupError> {
        if groups.is_empty() || depth == 0 {
            return Err(GroupError::Empty);
        }
        let count = groups.len();
        let groups = Self(groups);
        match groups.depth() {
            sum if sum == depth && groups.kept_depth() == depth => Err(GroupError::RemovesNothing),
            sum if sum == depth => Ok(groups),
            sum => Err(GroupError::DepthMismatch {
                groups: count,
                sum,
                depth,
            }),
        }
    }

    /// One group repeated until it fills a trunk of `depth` layers.
    ///
    /// # Errors
    ///
    /// If `depth` is not a multiple of M.
    pub fn repeat(group: Group, depth: usize) -> Result<Self, GroupError> {
        if !depth.is_multiple_of(group.of()) {
            return Err(GroupError::Indivisible {
                of: group.of(),
                depth,
            });
        }
        Self::new(vec![group; depth / group.of()], depth)
    }

    /// Reads `N:M` and repeats it over `depth` layers.
    ///
    /// # Errors
    ///
    /// As for [`Group::new`] and [`Groups::repeat`], or if `ratio` is not of the form `N:M`.
    pub fn parse_ratio(ratio: &str, depth: usize) -> Result<Self, GroupError> {
        Self::repeat(ratio.parse()?, depth)
    }

    /// Groups given as a list of `[N, M]`.
    ///
    /// # Errors
    ///
    /// As for [`Group::new`] and [`Groups::new`].
    pub fn from_pairs(pairs: &[[usize; 2]], depth: usize) -> Result<Self, GroupError> {
        let groups = pairs.iter().map(|&[keep, of]| Group::new(keep, of));
        Self::new(groups.collect::<Result<_, _>>()?, depth)
    }

    /// Layers of the trunk before pruning.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.iter().map(Group::of).sum()
    }

    /// Layers of the trunk after pruning.
    #[must_use]
    pub fn kept_depth(&self) -> usize {
        self.iter().map(Group::keep).sum()
    }

    /// Checks that the groups cover a trunk.
    ///
    /// # Errors
    ///
    /// If they span more or fewer layers, or one crosses a border.
    pub fn fit(&self, trunk: &Trunk) -> Result<(), GroupError> {
        if self.depth() != trunk.depth {
            return Err(GroupError::DepthMismatch {
                groups: self.len(),
                sum: self.depth(),
                depth: trunk.depth,
            });
        }
        for (group, first) in self.offsets().into_iter().enumerate() {
            let of = self.0[group].of();
            let inside = first + 1..first + of;
            if let Some(&border) = trunk.borders.iter().find(|border| inside.contains(border)) {
                return Err(GroupError::Crosses {
                    group,
                    first,
                    of,
                    border,
                });
            }
        }
        Ok(())
    }

    /// The first layer of each group.
    #[must_use]
    pub fn offsets(&self) -> Vec<usize> {
        let starts = self.iter().scan(0, |next, group| {
            let start = *next;
            *next += group.of();
            Some(start)
        });
        starts.collect()
    }

    /// The groups in order of depth.
    pub fn iter(&self) -> std::iter::Copied<std::slice::Iter<'_, Group>> {
        self.0.iter().copied()
    }

    /// The number of groups.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The kept layers when group `i` takes its candidate `choice[i]`, in increasing order.
    ///
    /// # Panics
    ///
    /// If there is not one choice per group, each below the number of candidates of its group.
    #[must_use]
    pub fn kept(&self, choice: &[usize]) -> Vec<usize> {
        assert_eq!(choice.len(), self.len(), "one choice per group");
        let chosen = self.iter().zip(choice).zip(self.offsets());
        chosen
            .flat_map(|((group, &choice), offset)| {
                let local = group.candidates().swap_remove(choice);
                local.into_iter().map(move |layer| offset + layer)
            })
            .collect()
    }

    /// Pairs of layers that are compared during distillation, as `(student, teacher)`.
    ///
    /// The last kept layer of a group is matched with the last layer of that group, because both
    /// come after the whole group's work. `kept` are the teacher's layers in the student; a group
    /// without a kept layer has no tap.
    #[must_use]
    pub fn taps(&self, kept: &[usize]) -> Vec<(usize, usize)> {
        let spans = self.iter().zip(self.offsets());
        spans
            .filter_map(|(group, start)| {
                let end = start + group.of();
                let student = kept
                    .iter()
                    .rposition(|layer| (start..end).contains(layer))?;
                Some((student, end - 1))
            })
            .collect()
    }
}

impl fmt::Display for Groups {
    /// Equal neighbours are counted: `2:4 ×2, 3:4`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, run) in self.0.chunk_by(|a, b| a == b).enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{}", run[0])?;
            if run.len() > 1 {
                write!(f, " ×{}", run.len())?;
            }
        }
        Ok(())
    }
}

/// Taps as `(student, teacher)` from the kept layers alone, without groups.
///
/// Each student layer stands for everything up to the next kept layer: it is matched with the
/// teacher's layer just before that one, and the last student layer with the teacher's last, so
/// that both sides of a tap feed the same next layer; none stands for layers beyond a border. Where
/// each group keeps its first layer, this agrees with [`Groups::taps`].
///
/// # Errors
///
/// If `kept` is empty, not strictly increasing, or names a layer at or beyond the depth.
pub fn taps_from_kept(kept: &[usize], trunk: &Trunk) -> Result<Vec<(usize, usize)>, GroupError> {
    let depth = trunk.depth;
    let increasing = kept.windows(2).all(|pair| pair[0] < pair[1]);
    if !increasing || kept.last().is_none_or(|&last| last >= depth) {
        return Err(GroupError::Kept {
            kept: kept.to_vec(),
            depth,
        });
    }
    let next = kept[1..].iter().copied().chain([depth]);
    let taps = kept.iter().zip(next).enumerate();
    Ok(taps
        .map(|(student, (layer, next))| {
            let end = trunk.borders.iter().find(|border| *border > layer);
            (student, end.map_or(next, |border| next.min(*border)) - 1)
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hybrid() -> Groups {
        Groups::from_pairs(&[[2, 4], [3, 4], [1, 2]], 10).unwrap()
    }

    #[test]
    fn groups_must_fill_the_depth() {
        assert_eq!(
            Groups::parse_ratio("1:2", 7).unwrap_err().to_string(),
            "groups of 2 layers do not fill a depth of 7"
        );
        // The reference's DiT-D14-2-4 recipe: 28 layers addressed in a model of 14.
        assert_eq!(
            Groups::from_pairs(&[[2, 4]; 7], 14)
                .unwrap_err()
                .to_string(),
            "the 7 groups span 28 layers, but the model has a depth of 14"
        );
        assert_eq!(Groups::from_pairs(&[], 0), Err(GroupError::Empty));
        assert_eq!(Groups::parse_ratio("1:2", 0), Err(GroupError::Empty));
    }

    #[test]
    fn no_group_reaches_over_a_border() {
        let trunk = |depth, border| Trunk {
            depth,
            borders: vec![border],
        };
        // Groups of layers 0..4, 4..8 and 8..10.
        for border in [4, 8] {
            assert_eq!(hybrid().fit(&trunk(10, border)), Ok(()));
        }
        for (border, group, first) in [(1, 0, 0), (3, 0, 0), (5, 1, 4), (9, 2, 8)] {
            let of = [4, 4, 2][group];
            let expected = GroupError::Crosses {
                group,
                first,
                of,
                border,
            };
            assert_eq!(hybrid().fit(&trunk(10, border)), Err(expected));
        }
        assert!(matches!(
            hybrid().fit(&Trunk::plain(12)),
            Err(GroupError::DepthMismatch { .. })
        ));
    }

    #[test]
    fn hybrid_groups_keep_what_was_chosen() {
        let groups = hybrid();
        assert_eq!(
            (groups.depth(), groups.kept_depth(), groups.len()),
            (10, 6, 3)
        );
        assert_eq!(groups.offsets(), [0, 4, 8]);
        assert_eq!(groups.kept(&[0, 0, 0]), [0, 1, 4, 5, 6, 8]);
        assert_eq!(groups.kept(&[5, 3, 1]), [2, 3, 5, 6, 7, 9]);
        assert_eq!(groups.kept(&[2, 1, 0]), [0, 3, 4, 5, 7, 8]);
    }

    #[test]
    fn groups_may_protect_layers_but_not_all() {
        let groups = Groups::from_pairs(&[[4, 4], [1, 2], [1, 2]], 8).unwrap();
        assert_eq!(groups.kept(&[0, 1, 0]), [0, 1, 2, 3, 5, 6]);
        assert_eq!(groups.taps(&[0, 1, 2, 3, 5, 6]), [(3, 3), (4, 5), (5, 7)]);
        assert_eq!(groups.to_string(), "4:4, 1:2 ×2");
        for pairs in [&[[4, 4], [2, 2]][..], &[[6, 6]], &[[1, 1]; 6]] {
            assert_eq!(
                Groups::from_pairs(pairs, 6),
                Err(GroupError::RemovesNothing)
            );
        }
        assert_eq!(
            Groups::parse_ratio("2:2", 6),
            Err(GroupError::RemovesNothing)
        );
    }

    #[test]
    fn one_of_two_taps_every_second_teacher_layer() {
        let groups = Groups::parse_ratio("1:2", 6).unwrap();
        assert_eq!(groups.taps(&[0, 3, 4]), [(0, 1), (1, 3), (2, 5)]);
        assert_eq!(groups.taps(&[0, 1]), [(1, 1)]);
    }

    #[test]
    fn taps_of_the_published_d19() {
        let pairs = [[3, 4], [3, 4], [2, 4], [3, 4], [2, 4], [3, 4], [3, 4]];
        let groups = Groups::from_pairs(&pairs, 28).unwrap();
        let taps = groups.taps(&groups.kept(&[0; 7]));
        let (student, teacher): (Vec<_>, Vec<_>) = taps.into_iter().unzip();
        assert_eq!(student, [2, 5, 7, 10, 12, 15, 18]);
        assert_eq!(teacher, [3, 7, 11, 15, 19, 23, 27]);
    }

    #[test]
    fn taps_without_groups_end_before_the_next_kept_layer() {
        assert_eq!(
            taps_from_kept(&[0, 2, 5], &Trunk::plain(8)),
            Ok(vec![(0, 1), (1, 4), (2, 7)])
        );
        let plain = Trunk::plain(4);
        assert_eq!(taps_from_kept(&[3], &plain), Ok(vec![(0, 3)]));
        // None stands for layers beyond a border, whether or not any is kept there.
        let bordered = Trunk {
            depth: 8,
            borders: vec![4],
        };
        assert_eq!(
            taps_from_kept(&[0, 2, 5], &bordered),
            Ok(vec![(0, 1), (1, 3), (2, 7)])
        );
        assert_eq!(taps_from_kept(&[1], &bordered), Ok(vec![(0, 3)]));
        for kept in [&[][..], &[0, 0], &[2, 1], &[4]] {
            assert!(matches!(
                taps_from_kept(kept, &plain),
                Err(GroupError::Kept { .. })
            ));
        }
    }

    #[test]
    fn written_as_runs_and_as_pairs() {
        let groups = Groups::from_pairs(&[[2, 4], [2, 4], [1, 2], [2, 4]], 14).unwrap();
        assert_eq!(groups.to_string(), "2:4 ×2, 1:2, 2:4");
        assert_eq!(
            serde_json::to_string(&groups).unwrap(),
            "[[2,4],[2,4],[1,2],[2,4]]"
        );
    }
}
