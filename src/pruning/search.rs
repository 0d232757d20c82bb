//! Choosing a mask by its calibration loss: the error that a network makes without the layers that
//! the mask removes, before it is healed.
//!
//! That such a loss does not tell how well the rest can be healed is what the paper's section 4.3
//! shows (TinyFusion, Table 3 and Figure 5); these are the searches it is shown with.

use std::collections::HashSet;

use burn::tensor::{Tensor, backend::Backend};
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use serde::{Deserialize, Serialize};

use super::groups::Group;
use super::scores::{ScoreBatch, scalar};
use crate::models::Prunable;
use crate::process::Process;
use crate::random::{Stream, generator, permutation};
use crate::stop::Stop;
use crate::trunk::{Block, BlockHook, Site};

/// Layers that are kept, of a trunk of so many: a mask.
pub type Mask = Vec<bool>;

/// The layers that a mask keeps, in trunk order.
pub fn kept_by(mask: &[bool]) -> Vec<usize> {
    let kept = mask.iter().enumerate().filter(|(_, kept)| **kept);
    kept.map(|(layer, _)| layer).collect()
}

/// The mask that keeps these layers of `depth`.
pub fn mask_of(kept: &[usize], depth: usize) -> Mask {
    (0..depth).map(|layer| kept.contains(&layer)).collect()
}

/// `count` masks that keep `keep` of `depth` layers: the draws of random pruning from the first on,
/// which may repeat; or each mask once, if there are not more, and at most
/// [`MAX_CANDIDATES`](super::MAX_CANDIDATES).
///
/// # Panics
/// When `keep` is 0 or above `depth`.
pub fn random_masks(seed: u64, depth: usize, keep: usize, count: usize) -> Vec<Mask> {
    assert!(
        0 < keep && keep <= depth,
        "{keep} of {depth} layers can't stay"
    );
    if let Ok(group) = Group::new(keep, depth)
        && !group.by_layer()
        && group.num_candidates() <= count
    {
        let all = group.candidates().into_iter();
        return all.map(|kept| mask_of(&kept, depth)).collect();
    }
    let draw = |draw| {
        let order = permutation(seed, Stream::Layers, draw, depth);
        mask_of(&order[..keep], depth)
    };
    (0..count as u64).map(draw).collect()
}

/// The network's prediction error on a batch under each mask, in the masks' order. `progress` is
/// called with the number of masks that are done. None when a stop is requested.
///
/// The masks are gone through in lexicographic order, and the input of each layer is kept: a mask
/// that begins as the one before it is computed from the first layer where they differ.
///
/// # Panics
/// When a mask is not of the trunk's depth.
pub fn mask_losses<B: Backend>(
    network: &impl Prunable<B>,
    process: &impl Process,
    batch: &ScoreBatch<B>,
    masks: &[Mask],
    stop: &Stop,
    mut progress: impl FnMut(usize),
) -> Option<Vec<f64>> {
    let depth = network.trunk().depth;
    assert!(
        masks.iter().all(|mask| mask.len() == depth),
        "a mask has an entry for each of {depth} layers"
    );
    let seen = batch.noised(process);
    let mut order: Vec<usize> = (0..masks.len()).collect();
    order.sort_by(|a, b| masks[*a].cmp(&masks[*b]));
    let mut losses = vec![f64::NAN; masks.len()];
    let mut hook = Resumed {
        mask: &[],
        shared: 0,
        inputs: Vec::new(),
    };
    for (done, index) in order.into_iter().enumerate() {
        if stop.requested() {
            return None;
        }
        hook.turn_to(&masks[index]);
        let output = seen.run(process, network, &mut hook);
        losses[index] = scalar(seen.error(process, output).mean());
        progress(done + 1);
    }
    Some(losses)
}

/// Runs the blocks of a mask from the first layer on at which it differs from the mask before.
struct Resumed<'a, B: Backend> {
    mask: &'a [bool],
    /// Number of layers with which both this mask and the one before begin.
    shared: usize,
    /// Inputs of the layers, of the mask before and then of this one.
    inputs: Vec<Tensor<B, 3>>,
}

impl<'a, B: Backend> Resumed<'a, B> {
    fn turn_to(&mut self, mask: &'a [bool]) {
        let alike = self.mask.iter().zip(mask).take_while(|(a, b)| a == b);
        // The last layer is run in any case: its output is not kept.
        self.shared = alike.count().min(mask.len().saturating_sub(1));
        self.mask = mask;
    }
}

impl<B: Backend> BlockHook<B> for Resumed<'_, B> {
    fn around(&mut self, site: Site, x: Tensor<B, 3>, block: Block<'_, B>) -> Tensor<B, 3> {
        let Site { layer, .. } = site;
        if layer < self.shared {
            // What the next layer is given does not matter before the first that differs.
            return x;
        }
        let input = match self.inputs.get(layer) {
            Some(input) if layer == self.shared => input.clone(),
            _ => x,
        };
        self.inputs.truncate(layer);
        self.inputs.push(input.clone());
        match self.mask[layer] {
            true => block(input),
            false => input,
        }
    }
}

/// Which of the measured masks is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pick {
    /// That of the lowest loss.
    Lowest,
    /// That in the middle; of an even number the lower.
    Median,
    /// That of the highest loss.
    Highest,
}

impl Pick {
    /// All, by their names.
    pub const NAMES: [(&'static str, Self); 3] = [
        ("lowest", Self::Lowest),
        ("median", Self::Median),
        ("highest", Self::Highest),
    ];

    /// The index of the mask that is taken; of equal losses the first counts as lower. None of no
    /// masks.
    pub fn of(self, losses: &[f64]) -> Option<usize> {
        let mut order: Vec<usize> = (0..losses.len()).collect();
        order.sort_by(|a, b| losses[*a].total_cmp(&losses[*b]));
        let last = order.len().checked_sub(1)?;
        Some(match self {
            Self::Lowest => order[0],
            Self::Median => order[last / 2],
            Self::Highest => order[last],
        })
    }
}

/// Settings of [`evolve`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evolution {
    /// Masks that are measured in all.
    pub masks: usize,
    /// Masks of a generation; default 64.
    pub population: usize,
}

/// Generations without a mask that was not measured before, after which a search ends: small trunks
/// have no more.
const STALE: usize = 20;

/// Searches for the mask of the lowest loss by mutation and crossover. `measure` gives the losses
/// of masks, or None to end the search; returns every measured mask with its loss, in order.
///
/// A generation's parents are the better half of the population. A child keeps the layers that both
/// its parents keep, and of those that one keeps as many at random as are needed; then every other
/// child exchanges a kept layer for a removed one.
pub fn evolve(
    seed: u64,
    depth: usize,
    keep: usize,
    evolution: Evolution,
    mut measure: impl FnMut(&[Mask]) -> Option<Vec<f64>>,
) -> Option<Vec<(Mask, f64)>> {
    let Evolution { masks, population } = evolution;
    let mut known: HashSet<Mask> = HashSet::new();
    let mut measured: Vec<(Mask, f64)> = Vec::new();
    let mut alive: Vec<(Mask, f64)> = Vec::new();
    let mut next = random_masks(seed, depth, keep, population.min(masks));
    let mut stale = 0;
    for generation in 1.. {
        next.retain(|mask| known.insert(mask.clone()));
        let mut fresh = next;
        fresh.truncate(masks - measured.len());
        stale = if fresh.is_empty() { stale + 1 } else { 0 };
        let losses = measure(&fresh)?;
        for (mask, loss) in fresh.into_iter().zip(losses) {
            measured.push((mask.clone(), loss));
            alive.push((mask, loss));
        }
        // Of equal losses the mask that was found first stays.
        alive.sort_by(|a, b| a.1.total_cmp(&b.1));
        alive.truncate(population);
        if measured.len() >= masks || stale == STALE {
            break;
        }
        let parents = &alive[..alive.len().div_ceil(2)];
        next = (0..population as u64)
            .map(|child| offspring(parents, keep, seed, generation, child))
            .collect();
    }
    Some(measured)
}

fn offspring(parents: &[(Mask, f64)], keep: usize, seed: u64, generation: u64, child: u64) -> Mask {
    let mut rng = generator(seed, Stream::Search, generation, child);
    let mut parent = || &parents[rng.random_range(0..parents.len())].0;
    let (one, other) = (parent(), parent());
    let mut mask: Mask = one.iter().zip(other).map(|(a, b)| *a && *b).collect();
    let mut either: Vec<usize> = (0..mask.len())
        .filter(|layer| one[*layer] != other[*layer])
        .collect();
    either.shuffle(&mut rng);
    let missing = keep - kept_by(&mask).len();
    either[..missing]
        .iter()
        .for_each(|layer| mask[*layer] = true);
    if child % 2 == 1 {
        let (kept, removed): (Vec<usize>, Vec<usize>) =
            (0..mask.len()).partition(|layer| mask[*layer]);
        if let (Some(out), Some(into)) = (kept.choose(&mut rng), removed.choose(&mut rng)) {
            mask[*out] = false;
            mask[*into] = true;
        }
    }
    mask
}

#[cfg(test)]
mod tests {
    use burn_ndarray::NdArray;

    use super::*;
    use crate::models::Denoiser;
    use crate::pruning::{Score, prediction_loss, score};
    use crate::weights::{EmbeddedName, embedded};

    #[test]
    fn losses_with_shared_beginnings_are_those_of_pruned_networks() {
        let teacher = embedded::checkpoint(EmbeddedName::DigitsTeacher).unwrap();
        let network = teacher.network::<NdArray>(&Default::default()).unwrap();
        let process = teacher.trained_by().process();
        let mut batch = ScoreBatch::noise(network.shape(), 3, 5, &Default::default());
        batch.t = vec![20.0, 400.0, 900.0];
        let mut masks = random_masks(1, 12, 6, 20);
        // The same mask twice, all layers, and each layer left out.
        masks.push(masks[3].clone());
        masks.push(vec![true; 12]);
        for layer in 0..12 {
            let mut mask = vec![true; 12];
            mask[layer] = false;
            masks.push(mask);
        }
        let mut reached = Vec::new();
        let stop = Stop::default();
        let losses = mask_losses(&network, &process, &batch, &masks, &stop, |done| {
            reached.push(done);
        });
        let losses = losses.unwrap();
        assert_eq!(reached, (1..=34).collect::<Vec<_>>());
        for (mask, loss) in masks.iter().zip(&losses) {
            let pruned = network.clone().keep(&kept_by(mask));
            // The same operations in the same order.
            assert_eq!(prediction_loss(&pruned, &process, &batch), *loss);
        }
        // Sensitivity is the loss of one layer less.
        let sensitivity = score(&network, &process, Score::Sensitivity, &batch);
        for (layer, score) in sensitivity.scores.iter().enumerate() {
            assert_eq!(losses[22 + layer] - losses[21], *score, "{layer}");
        }
        stop.request();
        assert!(mask_losses(&network, &process, &batch, &masks, &stop, |_| ()).is_none());
    }

    #[test]
    fn masks_are_the_draws_of_random_pruning_or_all() {
        let masks = random_masks(4, 12, 5, 3);
        let mut order = permutation(4, Stream::Layers, 2, 12);
        order.truncate(5);
        order.sort_unstable();
        assert_eq!(kept_by(&masks[2]), order);
        let all = random_masks(4, 5, 2, 10);
        assert_eq!(all.len(), 10);
        assert_eq!(kept_by(&all[9]), [3, 4]);
    }

    #[test]
    fn picks_are_the_ends_and_the_middle() {
        let losses = [3.0, 1.0, 2.0, 4.0, 1.0];
        let pick = |pick: Pick| pick.of(&losses).unwrap();
        assert_eq!(
            [Pick::Lowest, Pick::Median, Pick::Highest].map(pick),
            [1, 2, 3]
        );
        assert_eq!(Pick::Median.of(&[2.0, 1.0]), Some(1));
        assert_eq!(Pick::Lowest.of(&[]), None);
    }

    #[test]
    fn evolution_finds_what_few_random_masks_do_not() {
        // The loss counts the removed layers of the first half: the best mask keeps 0 to 9.
        let loss = |mask: &Mask| (0..10).filter(|layer| !mask[*layer]).count() as f64;
        let evolution = Evolution {
            masks: 400,
            population: 40,
        };
        let search = |seed| {
            let measure = |masks: &[Mask]| Some(masks.iter().map(loss).collect());
            evolve(seed, 20, 10, evolution, measure).unwrap()
        };
        let found = search(0);
        assert_eq!(found.len(), 400);
        assert!(found.iter().all(|(mask, _)| kept_by(mask).len() == 10));
        let best = |found: &[(Mask, f64)]| found.iter().map(|(_, loss)| *loss).fold(9.0, f64::min);
        let drawn = random_masks(0, 20, 10, 400);
        let drawn: Vec<(Mask, f64)> = drawn
            .into_iter()
            .map(|mask| (mask.clone(), loss(&mask)))
            .collect();
        assert_eq!(best(&found), 0.0);
        assert!(best(&drawn) > 0.0);
        assert_eq!(search(0), found);
        assert_ne!(search(1), found);
        // Of 10 masks in all, each is measured once.
        let measure =
            |masks: &[Mask]| Some(masks.iter().map(|mask| kept_by(mask)[0] as f64).collect());
        let all = evolve(0, 5, 2, evolution, measure).unwrap();
        assert_eq!(all.len(), 10);
        assert!(evolve(0, 20, 10, evolution, |_| None).is_none());
    }
}
