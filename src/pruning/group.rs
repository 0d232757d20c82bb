//! One group `N:M`: the ways to keep N of M consecutive layers.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use thiserror::Error;

/// The most candidates of a group that have a logit each, and the most layers of a group.
///
/// Each costs a row of the mask matrix too. 7:14, the widest group of the paper, has 3432. A group
/// with more has a [logit for each layer](Group::by_layer).
pub const MAX_CANDIDATES: usize = 4096;

/// Why layers can't be grouped as requested.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum GroupError {
    /// The text is not of the form `N:M`.
    #[error("expected a group such as \"1:2\", found {text:?}")]
    Malformed {
        /// The text.
        text: String,
    },
    /// N is zero: no layer of the group would be left.
    #[error("group 0:{of} keeps no layer; N of N:M must be at least 1")]
    KeepsNone {
        /// M.
        of: usize,
    },
    /// N is above M.
    #[error("group {keep}:{of} keeps more layers than it has; N of N:M must be at most M")]
    KeepsMore {
        /// N.
        keep: usize,
        /// M.
        of: usize,
    },
    /// All groups keep all their layers.
    #[error("the groups remove no layer; in one of them N of N:M must be below M")]
    RemovesNothing,
    /// The group spans more than [`MAX_CANDIDATES`] layers.
    #[error("group {keep}:{of} spans more than {MAX_CANDIDATES} layers")]
    TooManyLayers {
        /// N.
        keep: usize,
        /// M.
        of: usize,
    },
    /// Repeating the group does not fill the trunk.
    #[error("groups of {of} layers do not fill a depth of {depth}")]
    Indivisible {
        /// M.
        of: usize,
        /// Layers of the model.
        depth: usize,
    },
    /// The groups span more or fewer layers than the model has.
    #[error("the {groups} groups span {sum} layers, but the model has a depth of {depth}")]
    DepthMismatch {
        /// Number of groups.
        groups: usize,
        /// The sum of all M.
        sum: usize,
        /// Layers of the model.
        depth: usize,
    },
    /// A group crosses a border of the trunk.
    #[error(
        "group {group} (from layer {first}, of {of}) reaches over the border of the trunk before layer {border}"
    )]
    Crosses {
        /// Index of the group, from 0.
        group: usize,
        /// Its first layer.
        first: usize,
        /// Number of its layers.
        of: usize,
        /// The layer before which the border lies.
        border: usize,
    },
    /// There are no groups or no layers.
    #[error("there are no layers to group")]
    Empty,
    /// A list of kept layers is empty, not strictly increasing, or exceeds the trunk.
    #[error(
        "kept layers must be strictly increasing and below the depth of {depth}, found {kept:?}"
    )]
    Kept {
        /// The list.
        kept: Vec<usize>,
        /// Layers of the model.
        depth: usize,
    },
}

/// M consecutive layers of which N are kept.
///
/// ```
/// use tinyfusion::pruning::Group;
///
/// let group: Group = "2:3".parse()?;
/// assert_eq!(group.candidates(), [[0, 1], [0, 2], [1, 2]]);
/// # Ok::<(), tinyfusion::pruning::GroupError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    keep: usize,
    of: usize,
}

impl Group {
    /// The group `keep:of`. A group that keeps all its layers protects them.
    ///
    /// # Errors
    ///
    /// Unless `0 < keep <= of`, and if there are more than [`MAX_CANDIDATES`] layers.
    pub fn new(keep: usize, of: usize) -> Result<Self, GroupError> {
        if keep == 0 {
            return Err(GroupError::KeepsNone { of });
        }
        if keep > of {
            return Err(GroupError::KeepsMore { keep, of });
        }
        match of > MAX_CANDIDATES {
            true => Err(GroupError::TooManyLayers { keep, of }),
            false => Ok(Self { keep, of }),
        }
    }

    /// Whether there are too many candidates to list: then a gate has a logit for each layer in
    /// place of one for each candidate.
    #[must_use]
    pub fn by_layer(self) -> bool {
        self.num_candidates() > MAX_CANDIDATES
    }

    /// The number of a gate's logits.
    #[must_use]
    pub fn num_logits(self) -> usize {
        match self.by_layer() {
            true => self.of,
            false => self.num_candidates(),
        }
    }

    /// N: the number of kept layers.
    #[must_use]
    pub fn keep(self) -> usize {
        self.keep
    }

    /// M: the number of layers in the group.
    #[must_use]
    pub fn of(self) -> usize {
        self.of
    }

    /// Every choice of kept layers, as indices within the group, in lexicographic order.
    ///
    /// The order is that of Python's `itertools.combinations`: a trained logit vector of the
    /// reference implementation keeps its meaning.
    ///
    /// # Panics
    ///
    /// If the group is one [by layer](Self::by_layer).
    #[must_use]
    pub fn candidates(self) -> Vec<Vec<usize>> {
        assert!(!self.by_layer(), "{self} has too many candidates to list");
        let mut current: Vec<usize> = (0..self.keep).collect();
        let mut all = vec![current.clone()];
        // The successor raises the rightmost index that has room and packs the rest behind it.
        while let Some(place) =
            (0..self.keep).rfind(|&place| current[place] < self.of - self.keep + place)
        {
            let first = current[place] + 1;
            for (step, index) in current[place..].iter_mut().enumerate() {
                *index = first + step;
            }
            all.push(current.clone());
        }
        all
    }

    /// The number of candidates, `C(M, N)`; the largest number, if there are more.
    #[must_use]
    pub fn num_candidates(self) -> usize {
        binomial(self.of, self.keep)
            .and_then(|count| usize::try_from(count).ok())
            .unwrap_or(usize::MAX)
    }

    /// The candidates as rows of zeros and ones, shape `[candidates, M]`; 1 marks a kept layer.
    ///
    /// # Panics
    ///
    /// As [`candidates`](Self::candidates).
    #[must_use]
    pub fn masks(self) -> Vec<Vec<f32>> {
        let row = |kept: Vec<usize>| {
            let mut mask = vec![0.0; self.of];
            for layer in kept {
                mask[layer] = 1.0;
            }
            mask
        };
        self.candidates().into_iter().map(row).collect()
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.keep, self.of)
    }
}

impl FromStr for Group {
    type Err = GroupError;

    fn from_str(text: &str) -> Result<Self, GroupError> {
        let malformed = || GroupError::Malformed {
            text: text.to_owned(),
        };
        let (keep, of) = text.split_once(':').ok_or_else(malformed)?;
        let number = |digits: &str| digits.trim().parse().map_err(|_| malformed());
        Self::new(number(keep)?, number(of)?)
    }
}

impl Serialize for Group {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        [self.keep, self.of].serialize(serializer)
    }
}

/// `C(n, k)` for `k <= n`, or `None` if an intermediate product does not fit.
fn binomial(n: usize, k: usize) -> Option<u128> {
    // Every partial result is itself a binomial coefficient, so the division is exact. They grow so
    // fast that for a huge n the loop ends by overflow, not at k.
    (0..k.min(n - k)).try_fold(1u128, |count, step| {
        let factor = (n - step) as u128;
        count
            .checked_mul(factor)
            .map(|product| product / (step as u128 + 1))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_in_the_order_of_itertools() {
        let group = Group::new(2, 4).unwrap();
        let expected = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]];
        assert_eq!(group.candidates(), expected);
        assert_eq!(Group::new(1, 2).unwrap().candidates(), [[0], [1]]);
        assert_eq!(
            Group::new(3, 4).unwrap().candidates(),
            [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]
        );
    }

    #[test]
    fn masks_mark_the_kept_layers() {
        let masks = Group::new(2, 3).unwrap().masks();
        assert_eq!(masks, [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]);
    }

    #[test]
    fn counts_of_candidates() {
        for (keep, of, count) in [
            (1, 2, 2),
            (2, 4, 6),
            (5, 7, 21),
            (7, 14, 3432),
            (1, 4096, 4096),
        ] {
            let group = Group::new(keep, of).unwrap();
            assert_eq!(group.num_candidates(), count, "{group}");
        }
        let widest = Group::new(7, 14).unwrap().candidates();
        assert_eq!(widest.len(), 3432);
        assert_eq!(widest[3431], [7, 8, 9, 10, 11, 12, 13]);
    }

    #[test]
    fn a_group_that_keeps_all_its_layers_has_one_candidate() {
        let group: Group = "3:3".parse().unwrap();
        assert_eq!(group.candidates(), [[0, 1, 2]]);
        assert_eq!(group.masks(), [[1.0, 1.0, 1.0]]);
        assert_eq!(group.num_candidates(), 1);
    }

    #[test]
    fn groups_with_too_many_candidates_have_logits_of_layers() {
        let group = |keep, of| Group::new(keep, of).unwrap();
        assert!(!group(7, 14).by_layer());
        assert_eq!(group(7, 14).num_logits(), 3432);
        assert!(group(10, 20).by_layer());
        assert_eq!(group(10, 20).num_logits(), 20);
        assert_eq!(group(10, 20).num_candidates(), 184_756);
        assert_eq!(group(2048, 4096).num_candidates(), usize::MAX);
        let message = |keep, of| Group::new(keep, of).unwrap_err().to_string();
        assert!(message(1, 4097).contains("group 1:4097 spans more than 4096 layers"));
        assert!(message(usize::MAX / 2, usize::MAX).contains("spans more than"));
    }

    #[test]
    fn degenerate_groups_are_refused() {
        assert_eq!(Group::new(0, 2), Err(GroupError::KeepsNone { of: 2 }));
        assert_eq!(
            Group::new(3, 2),
            Err(GroupError::KeepsMore { keep: 3, of: 2 })
        );
        assert_eq!(
            Group::new(usize::MAX, usize::MAX),
            Err(GroupError::TooManyLayers {
                keep: usize::MAX,
                of: usize::MAX
            })
        );
        for text in [
            "",
            "1",
            "1:",
            ":2",
            "a:b",
            "1:2:3",
            "-1:2",
            "1.5:2",
            "99999999999999999999:2",
        ] {
            let error = text.parse::<Group>().unwrap_err();
            assert_eq!(
                error,
                GroupError::Malformed {
                    text: text.to_owned()
                }
            );
        }
    }
}
