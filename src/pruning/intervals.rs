//! Interval distillation: runs of layers, each of which is replaced by one layer that is trained to
//! do the work of all (after PPCL, arXiv 2511.16156).

use std::collections::HashSet;

use burn::module::{AutodiffModule, Module, ModuleDisplay, ModuleMapper, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use burn::train::{InferenceStep, TrainOutput, TrainStep};
use serde::{Deserialize, Serialize};

use super::layers::{own_parameters, take_layers};
use crate::data::Batch;
use crate::models::{Denoiser, Network, Prunable};
use crate::ops::TrainingBackend;
use crate::process::{AnyProcess, Noised, Terms};
use crate::state::WeightsError;
use crate::training::{StepReport, scalars};
use crate::trunk::{Block, BlockHook, Site, Trunk};

/// Consecutive layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interval {
    /// The first.
    pub first: usize,
    /// The last.
    pub last: usize,
}

impl Interval {
    /// Number of layers that go when one takes the place of all.
    pub fn saved(self) -> usize {
        self.last - self.first
    }
}

/// Divides a trunk into `keep` intervals, none across a border, such that the states before and
/// after each are as alike as can be: the sum of `1 - similarity` over intervals of more than one
/// layer is least. `similarity` is of each part between borders: its `[i][j]` that of the states
/// before its layers i and j, the last being its output.
///
/// # Panics
/// Unless `keep` lies between the number of parts and that of layers, and when a similarity is not
/// a number.
pub fn intervals(similarity: &[Vec<Vec<f64>>], keep: usize) -> Vec<Interval> {
    let stacks = similarity.iter().map(|of| of.len() - 1);
    let depth = stacks.clone().sum();
    assert!(
        (similarity.len()..=depth).contains(&keep) && keep > 0,
        "{keep} intervals of {depth} layers in {} parts",
        similarity.len()
    );
    // The part that each layer is of, and its place there.
    let layers: Vec<(usize, usize)> = (stacks.enumerate())
        .flat_map(|(stack, depth)| (0..depth).map(move |layer| (stack, layer)))
        .collect();
    let cost = |first: usize, after: usize| {
        let (stack, local) = layers[first];
        let length = after - first;
        match layers[after - 1].0 == stack {
            true if length == 1 => 0.0,
            true => 1.0 - similarity[stack][local][local + length],
            false => f64::INFINITY,
        }
    };
    // least[count][after]: of the layers before `after` in `count` intervals, the cost and where
    // the last of them begins.
    let mut least = vec![vec![(f64::INFINITY, 0); depth + 1]; keep + 1];
    least[0][0] = (0.0, 0);
    for count in 1..=keep {
        for after in count..=depth {
            for first in count - 1..after {
                let sum = least[count - 1][first].0 + cost(first, after);
                if sum < least[count][after].0 {
                    least[count][after] = (sum, first);
                }
            }
        }
    }
    let mut found = Vec::with_capacity(keep);
    let mut after = depth;
    for count in (1..=keep).rev() {
        let first = least[count][after].1;
        found.push(Interval {
            first,
            last: after - 1,
        });
        after = first;
    }
    found.reverse();
    found
}

/// Neighbouring layers two by two, none across a border; a last one without a neighbour is alone.
pub fn pairs(trunk: &Trunk) -> Vec<Interval> {
    let pairs = trunk.stacks().flat_map(|stack| {
        let end = stack.end;
        stack.step_by(2).map(move |first| Interval {
            first,
            last: (first + 2).min(end) - 1,
        })
    });
    pairs.collect()
}

/// A replaced interval with its error.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Replaced {
    /// The layers.
    #[serde(flatten)]
    pub interval: Interval,
    /// Mean squared error of the replacement's output over the mean square of the layers' own; 0 of
    /// a single layer, which is not replaced.
    pub error: f64,
}

/// Which of the intervals are replaced so that `keep` layers are left: those of the least sum of
/// errors. None where no choice leaves as many.
pub fn plugged(replaced: &[Replaced], keep: usize) -> Option<Vec<bool>> {
    let depth = replaced.last().map_or(0, |last| last.interval.last + 1);
    let goal = depth.checked_sub(keep)?;
    // By the number of layers that go: the least sum of errors, and what is replaced for it.
    let mut least: Vec<Option<(f64, Vec<bool>)>> = vec![None; goal + 1];
    least[0] = Some((0.0, Vec::new()));
    for Replaced { interval, error } in replaced {
        let saved = interval.saved();
        let mut next = vec![None; goal + 1];
        for (gone, choice) in least.iter().enumerate() {
            let Some((sum, choice)) = choice else {
                continue;
            };
            for replace in [false, true] {
                let gone = gone + if replace { saved } else { 0 };
                if gone > goal || replace && saved == 0 {
                    continue;
                }
                let sum = sum + if replace { *error } else { 0.0 };
                let better = |(known, _): &(f64, Vec<bool>)| sum < *known;
                if next[gone].as_ref().is_none_or(better) {
                    let choice = choice.iter().copied().chain([replace]).collect();
                    next[gone] = Some((sum, choice));
                }
            }
        }
        least = next;
    }
    least.pop()?.map(|(_, choice)| choice)
}

/// The layers that are left, and for each the index of the replacement that it takes its weights
/// from, if any.
pub fn left(replaced: &[Replaced], plugged: &[bool]) -> Vec<(usize, Option<usize>)> {
    let mut layers = Vec::new();
    for (index, (Replaced { interval, .. }, plugged)) in replaced.iter().zip(plugged).enumerate() {
        match plugged {
            true => layers.push((interval.first, Some(index))),
            false => layers.extend((interval.first..=interval.last).map(|layer| (layer, None))),
        }
    }
    layers
}

/// A network with some of its intervals replaced: layers of `whole`, with weights of
/// `replacements`, whose layer `i` stands for interval `i`.
///
/// # Errors
/// When weights can't be read.
pub fn plug<B: Backend, N: Prunable<B>>(
    whole: N,
    replacements: &N,
    layers: &[(usize, Option<usize>)],
) -> Result<N, WeightsError> {
    let kept: Vec<usize> = layers.iter().map(|(layer, _)| *layer).collect();
    let taken = (layers.iter().enumerate())
        .filter_map(|(place, (_, replacement))| Some((place, (*replacement)?)))
        .collect::<Vec<_>>();
    take_layers(whole.keep(&kept), replacements, &taken)
}

/// Layers in training, each on what the teacher's layers were given, to do what several of them
/// did: one in the place of an interval, or a pair side by side.
#[derive(Module, Debug)]
pub struct Regression<B: Backend, N: Module<B> = Network<B>> {
    /// The network of the replacements alone.
    pub network: N,
    #[module(skip)]
    trained: Vec<bool>,
    #[module(skip)]
    process: AnyProcess,
    #[module(skip)]
    backend: std::marker::PhantomData<B>,
}

impl<B: Backend, N: Prunable<B>> Regression<B, N> {
    /// The first layer of each interval of `whole`, to be trained where it stands for more than
    /// itself; everything else stays as it is.
    ///
    /// # Panics
    /// When an interval begins beyond the trunk.
    pub fn of_intervals(whole: N, intervals: &[Interval], process: AnyProcess) -> Self {
        let firsts: Vec<usize> = intervals.iter().map(|interval| interval.first).collect();
        let trained: Vec<bool> = intervals
            .iter()
            .map(|interval| interval.saved() > 0)
            .collect();
        Self::new(whole.keep(&firsts), trained, process)
    }

    /// The layers of a network, to be trained where `trained` says so.
    ///
    /// # Panics
    /// Unless it says so of each layer.
    pub fn new(network: N, trained: Vec<bool>, process: AnyProcess) -> Self {
        assert_eq!(trained.len(), network.trunk().depth, "a word on each layer");
        let learn: HashSet<ParamId> = (trained.iter().enumerate())
            .filter(|(_, trained)| **trained)
            .flat_map(|(layer, _)| own_parameters(&network, layer).into_keys())
            .collect();
        Self {
            network: network.map(&mut Learning(&learn)),
            trained,
            process,
            backend: std::marker::PhantomData,
        }
    }
}

/// Freezes all parameters but some.
struct Learning<'a>(&'a HashSet<ParamId>);

impl<B: Backend> ModuleMapper<B> for Learning<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let learns = self.0.contains(&param.id);
        param.set_require_grad(learns)
    }
}

impl<B: Backend, N: Denoiser<B>> Regression<B, N> {
    /// The error of each interval, over the mean square of the teacher's state: `[batch]` each, of
    /// those that are trained. `states` are the teacher's after the last layer of each interval,
    /// `[batch, tokens, width]`.
    pub fn errors(&self, seen: &Noised<B>, states: &[Tensor<B, 3>]) -> Vec<Tensor<B, 1>> {
        let mut hook = OnTeacher {
            trained: &self.trained,
            states,
            errors: Vec::new(),
        };
        seen.run(&self.process, &self.network, &mut hook);
        hook.errors
    }

    /// Indices of the intervals that are trained.
    pub fn trained(&self) -> Vec<usize> {
        let trained = self
            .trained
            .iter()
            .enumerate()
            .filter(|(_, trained)| **trained);
        trained.map(|(index, _)| index).collect()
    }
}

/// Runs each layer on the state that the teacher had there.
struct OnTeacher<'a, B: Backend> {
    trained: &'a [bool],
    states: &'a [Tensor<B, 3>],
    errors: Vec<Tensor<B, 1>>,
}

impl<B: Backend> BlockHook<B> for OnTeacher<'_, B> {
    fn around(&mut self, site: Site, x: Tensor<B, 3>, block: Block<'_, B>) -> Tensor<B, 3> {
        let target = self.states[site.layer].clone();
        // The first layer's input is the embedding, which is the teacher's; any other's is what was
        // returned for the layer before it.
        if self.trained[site.layer] {
            let mean = |x: Tensor<B, 3>| {
                (x.clone() * x)
                    .flatten::<2>(1, 2)
                    .mean_dim(1)
                    .squeeze_dim::<1>(1)
            };
            let size = mean(target.clone()).detach();
            // A true division: the gradient of Burn's takes the reciprocal, which on ndarray is an
            // estimate.
            let inverse = size.ones_like() / size;
            let error = mean(block(x) - target.clone()) * inverse;
            self.errors.push(error);
        }
        target
    }
}

impl<B, N> TrainStep for Regression<B, N>
where
    B: TrainingBackend,
    N: Denoiser<B> + AutodiffModule<B, InnerModule: ModuleDisplay> + ModuleDisplay,
{
    type Input = Batch<B>;
    type Output = StepReport;

    fn step(&self, batch: Batch<B>) -> TrainOutput<StepReport> {
        let states = batch
            .teacher
            .as_ref()
            .map_or(&[][..], |teacher| &teacher.features);
        let errors = self.errors(&batch.noised(&self.process), states);
        let count = errors.len() as f64;
        let sum = errors.into_iter().reduce(|sum, error| sum + error);
        let total = sum.expect("an interval is trained") / count;
        let terms = Terms {
            named: vec![("error", total.clone())],
            total,
        };
        let gradients = GradientsParams::from_grads(terms.total.clone().mean().backward(), self);
        TrainOutput {
            grads: gradients,
            item: StepReport {
                scalars: scalars(&terms),
                images: batch.samples(),
            },
        }
    }
}

impl<B: Backend, N: Module<B> + ModuleDisplay> InferenceStep for Regression<B, N> {
    type Input = ();
    type Output = ();

    fn step(&self, (): ()) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interval(first: usize, last: usize) -> Interval {
        Interval { first, last }
    }

    #[test]
    fn layers_that_change_least_are_joined() {
        // States before layers 0 to 4 and after the last, on a line; layers 1 and 2 hardly move.
        let places = [0.0f64, 0.4, 0.41, 0.43, 0.9];
        let similarity: Vec<Vec<f64>> = (places.iter())
            .map(|a| places.iter().map(|b| 1.0 - (a - b).abs()).collect())
            .collect();
        let one = [similarity.clone()];
        assert_eq!(
            intervals(&one, 3),
            [interval(0, 0), interval(1, 2), interval(3, 3)]
        );
        let single: Vec<Interval> = (0..4).map(|layer| interval(layer, layer)).collect();
        assert_eq!(intervals(&one, 4), single);
        assert_eq!(intervals(&one, 1), [interval(0, 3)]);

        // Of two such trunks none is across, and the dearer is left as it is.
        let dear = similarity.iter().map(|row| {
            let far = row.iter().map(|value| 2.0 * value - 1.0);
            far.collect()
        });
        let two = [dear.collect(), similarity.clone()];
        let joined = |ends: &[(usize, usize)]| -> Vec<Interval> {
            ends.iter()
                .map(|(first, last)| interval(*first, *last))
                .collect()
        };
        assert_eq!(
            intervals(&two, 7),
            joined(&[(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 7)])
        );
        assert_eq!(intervals(&two, 2), joined(&[(0, 3), (4, 7)]));
    }

    #[test]
    fn no_pair_is_across_a_border() {
        let trunk = Trunk {
            depth: 5,
            borders: vec![3],
        };
        assert_eq!(
            pairs(&trunk),
            [interval(0, 1), interval(2, 2), interval(3, 4)]
        );
    }

    #[test]
    fn the_least_errors_are_plugged_in() {
        let replaced = |first, last, error| Replaced {
            interval: interval(first, last),
            error,
        };
        let all = [
            replaced(0, 1, 0.3),
            replaced(2, 4, 0.2),
            replaced(5, 5, 0.0),
            replaced(6, 7, 0.1),
        ];
        assert_eq!(plugged(&all, 4), Some(vec![true, true, false, true]));
        assert_eq!(plugged(&all, 8), Some(vec![false; 4]));
        assert_eq!(plugged(&all, 7), Some(vec![false, false, false, true]));
        // Two layers go: those of the second, or of the first and the last.
        assert_eq!(plugged(&all, 6), Some(vec![false, true, false, false]));
        assert_eq!(plugged(&all, 3), None);
        assert_eq!(
            left(&all, &[false, true, false, true]),
            [(0, None), (1, None), (2, Some(1)), (5, None), (6, Some(3))]
        );
    }

    #[test]
    fn replacements_learn_alone_and_are_plugged_in_where_they_belong() {
        use burn::backend::Autodiff;
        use burn_ndarray::NdArray;

        use crate::pruning::ScoreBatch;
        use crate::state::collect;
        use crate::trunk::Tap;
        use crate::weights::{EmbeddedName, embedded};

        type B = Autodiff<NdArray>;
        let device = Default::default();
        let teacher = embedded::checkpoint(EmbeddedName::DigitsTeacher).unwrap();
        let whole = teacher.network::<B>(&device).unwrap();
        let process = teacher.trained_by().process();
        let all = [
            interval(0, 1),
            interval(2, 2),
            interval(3, 5),
            interval(6, 11),
        ];
        let seen = ScoreBatch::<B>::noise(whole.shape(), 3, 0, &device).noised(&process);
        let mut tap = Tap::new(all.map(|interval| interval.last));
        seen.run(&process, &whole, &mut tap);
        let regression = Regression::of_intervals(whole.clone(), &all, process.clone());
        assert_eq!(regression.trained(), [0, 2, 3]);
        let errors = regression.errors(&seen, &tap.outputs);

        // The same by hand: layer 3 on the state after layer 2, against that after layer 5.
        struct Third<B: Backend>(Vec<Tensor<B, 3>>);
        impl<B: Backend> BlockHook<B> for Third<B> {
            fn around(&mut self, site: Site, x: Tensor<B, 3>, block: Block<'_, B>) -> Tensor<B, 3> {
                let y = block(x);
                if [3, 5].contains(&site.layer) {
                    self.0.push(y.clone());
                }
                y
            }
        }
        let mut third = Third(Vec::new());
        seen.run(&process, &whole, &mut third);
        let square = |x: Tensor<B, 3>| -> Vec<f32> {
            (x.clone() * x)
                .sum_dims(&[1, 2])
                .into_data()
                .to_vec()
                .unwrap()
        };
        let off = square(third.0[0].clone() - third.0[1].clone());
        let own = square(third.0[1].clone());
        let found: Vec<f32> = errors[1].clone().into_data().to_vec().unwrap();
        for ((off, own), found) in off.iter().zip(&own).zip(&found) {
            // Sums of a thousand squares in another order.
            assert!(
                (off / own - found).abs() < 1e-5 * found.abs(),
                "{off} {own} {found}"
            );
        }

        let loss = errors.into_iter().reduce(|sum, error| sum + error).unwrap();
        let gradients = GradientsParams::from_grads(loss.mean().backward(), &regression);
        let learns: usize = (0..4)
            .filter(|layer| *layer != 1)
            .map(|layer| own_parameters(&regression.network, layer).len())
            .sum();
        assert_eq!(gradients.len(), learns);

        let layers = [
            (0, Some(0)),
            (2, None),
            (3, None),
            (4, None),
            (5, None),
            (6, Some(3)),
        ];
        // What was trained is told from what was not by being doubled.
        struct Twice;
        impl<B: Backend> ModuleMapper<B> for Twice {
            fn map_float<const D: usize>(
                &mut self,
                param: Param<Tensor<B, D>>,
            ) -> Param<Tensor<B, D>> {
                param.map(|value| value * 2)
            }
        }
        let doubled = regression.network.map(&mut Twice);
        let before = collect::<B, _>(&whole);
        let plugged = plug(whole, &doubled, &layers).unwrap();
        let after = collect::<B, _>(&plugged);
        for (place, (layer, replaced)) in layers.into_iter().enumerate() {
            let rest = "mlp.fc1.weight";
            let was = before[&format!("blocks.{layer}.{rest}")].data[5];
            let is = after[&format!("blocks.{place}.{rest}")].data[5];
            let factor = if replaced.is_some() { 2.0 } else { 1.0 };
            assert_eq!(is, factor * was, "{layer}");
        }
        let shared = "final_layer.linear.weight";
        assert_eq!(after[shared], before[shared]);
    }
}
