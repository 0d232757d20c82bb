//! Gradients by which channels are weighed: of a loss at random times, or at one time after
//! another until it has fallen (Diff-Pruning, Fang et al., arXiv 2305.10924, section 4.2).

use std::vec::IntoIter;

use burn::module::{AutodiffModule, ModuleVisitor, Param};
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::scores::ScoreBatch;
use crate::models::Denoiser;
use crate::ops::TrainingBackend;
use crate::process::Process;
use crate::state::{Array, StateDict, Walk, values};
use crate::trunk::Plain;
use crate::workers::{Group, Slices};

/// Signed sums of the gradients of a network's loss, of one pass after the other. Several workers
/// have the passes in turn; the sums are the same to the last bit however many there are.
pub struct LossGradients<N> {
    sums: Sums<N>,
}

enum Sums<N> {
    /// Of a process that works alone, on its device.
    Alone(GradientsAccumulator<N>),
    /// Of several, in the order of the network's parameters.
    Shared(Slices),
}

impl<N> Default for LossGradients<N> {
    fn default() -> Self {
        let sums = Sums::Alone(GradientsAccumulator::new());
        Self { sums }
    }
}

impl<N> LossGradients<N> {
    /// Goes on from [`sums`](Self::sums), the same of all workers, as if it had never been
    /// interrupted; a sum that is not of a parameter's name and shape is ignored.
    pub fn resumed<B: TrainingBackend>(workers: &Group, network: &N, sums: &StateDict) -> Self
    where
        N: AutodiffModule<B>,
    {
        struct Put<'a> {
            walk: Walk,
            sums: &'a StateDict,
            gradients: GradientsParams,
        }
        impl<B: TrainingBackend> ModuleVisitor<B> for Put<'_> {
            fn enter_module(&mut self, name: &str, container: &str) {
                self.walk.enter(name, container);
            }
            fn exit_module(&mut self, _: &str, _: &str) {
                self.walk.leave();
            }
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                let sum = self.sums.get(&self.walk.name());
                let fits = |sum: &&Array| *sum.shape == *param.lazy_shape().as_slice();
                if let Some(sum) = sum.filter(fits) {
                    let data = TensorData::new(sum.data.clone(), sum.shape.clone());
                    let sum = Tensor::<B::InnerBackend, D>::from_data(data, &param.device());
                    self.gradients.register(param.id, sum);
                }
            }
        }
        let mut put = Put {
            walk: Walk::default(),
            sums,
            gradients: GradientsParams::new(),
        };
        network.visit(&mut put);
        if workers.size() > 1 {
            let begun = in_order::<B, N>(network, put.gradients);
            let sums = Sums::Shared(Slices::new(workers.clone(), &begun));
            return Self { sums };
        }
        let mut sums = GradientsAccumulator::new();
        sums.accumulate::<B>(network, put.gradients);
        let sums = Sums::Alone(sums);
        Self { sums }
    }

    /// Adds the gradients of each worker's first losses, so many of them as count, in the order of
    /// the workers' numbers. `own` are this one's; None where it has none. Of all workers at once.
    pub fn add<B: TrainingBackend>(
        &mut self,
        network: &N,
        own: Option<Tensor<B, 1>>,
        counted: &[usize],
    ) where
        N: AutodiffModule<B>,
    {
        let rank = match &self.sums {
            Sums::Alone(_) => 0,
            Sums::Shared(sums) => sums.rank(),
        };
        let own = own.filter(|_| counted[rank] > 0).map(|losses| {
            let loss = losses.narrow(0, 0, counted[rank]).sum();
            GradientsParams::from_grads(loss.backward(), network)
        });
        match (&mut self.sums, own) {
            (Sums::Alone(_), None) => {}
            (Sums::Alone(sums), Some(own)) => sums.accumulate::<B>(network, own),
            (Sums::Shared(sums), own) => {
                let own = own.map(|own| in_order::<B, N>(network, own));
                let have: Vec<bool> = counted.iter().map(|counted| *counted > 0).collect();
                sums.add(&own.unwrap_or_default(), &have);
            }
        }
    }

    /// The sums so far, by the names of the parameters; of one without gradients nothing, or zeros.
    /// Of all workers at once.
    pub fn sums<B: TrainingBackend>(&mut self, network: &N) -> StateDict
    where
        N: AutodiffModule<B>,
    {
        enum From {
            Gradients(GradientsParams),
            InOrder(IntoIter<f32>),
        }
        struct Take {
            walk: Walk,
            from: From,
            taken: StateDict,
        }
        impl<B: TrainingBackend> ModuleVisitor<B> for Take {
            fn enter_module(&mut self, name: &str, container: &str) {
                self.walk.enter(name, container);
            }
            fn exit_module(&mut self, _: &str, _: &str) {
                self.walk.leave();
            }
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                let shape = param.lazy_shape();
                let sum = match &mut self.from {
                    From::Gradients(sums) => {
                        let sum = sums.get::<B::InnerBackend, D>(param.id);
                        sum.map(values)
                    }
                    From::InOrder(sums) => Some(sums.take(shape.num_elements()).collect()),
                };
                if let Some(sum) = sum {
                    let sum = Array::new(shape.to_vec(), sum);
                    self.taken.insert(self.walk.name(), sum);
                }
            }
        }
        let mut take = Take {
            walk: Walk::default(),
            from: match &mut self.sums {
                Sums::Alone(sums) => From::Gradients(sums.grads()),
                Sums::Shared(sums) => From::InOrder(sums.all().into_iter()),
            },
            taken: StateDict::new(),
        };
        network.visit(&mut take);
        if let (Sums::Alone(sums), From::Gradients(gradients)) = (&mut self.sums, take.from) {
            sums.accumulate::<B>(network, gradients);
        }
        take.taken
    }
}

/// The gradients of all parameters one after the other, 0 where there is none.
fn in_order<B: TrainingBackend, N: AutodiffModule<B>>(
    network: &N,
    gradients: GradientsParams,
) -> Vec<f32> {
    struct Flatten(GradientsParams, Vec<f32>);
    impl<B: TrainingBackend> ModuleVisitor<B> for Flatten {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            match self.0.remove::<B::InnerBackend, D>(param.id) {
                Some(gradient) => self.1.extend(values(gradient)),
                None => {
                    let end = self.1.len() + param.lazy_shape().num_elements();
                    self.1.resize(end, 0.0);
                }
            }
        }
    }
    let mut flatten = Flatten(gradients, Vec::new());
    network.visit(&mut flatten);
    flatten.1
}

/// The mean loss of a batch, `[1]`.
pub fn mean_loss<B: TrainingBackend, N: Denoiser<B>>(
    network: &N,
    process: &impl Process,
    batch: &ScoreBatch<B>,
) -> Tensor<B, 1> {
    let seen = batch.noised(process);
    let output = seen.run(process, network, &mut Plain);
    seen.terms(process, output).total.mean()
}

/// A batch's mean losses at some times, `[times]`, to each of which it is noised with the same
/// noise.
pub fn losses_at<B: TrainingBackend, N: Denoiser<B>>(
    network: &N,
    process: &impl Process,
    batch: &ScoreBatch<B>,
    times: &[f32],
) -> Tensor<B, 1> {
    let (count, rows) = (batch.samples(), batch.t.len());
    let at_all = times.iter().flat_map(|t| std::iter::repeat_n(*t, rows));
    let all = ScoreBatch {
        x: batch.x.clone().repeat_dim(0, times.len()),
        noise: batch.noise.clone().repeat_dim(0, times.len()),
        y: batch.y.clone().repeat_dim(0, times.len()),
        t: at_all.collect(),
        known: (batch.known.as_ref()).map(|known| known.repeated(times.len())),
    };
    let seen = all.noised(process);
    let output = seen.run(process, network, &mut Plain);
    let losses = seen.terms(process, output).total;
    losses
        .reshape([times.len(), count])
        .mean_dim(1)
        .squeeze_dim::<1>(1)
}

/// The way through the times of a process: it ends where the loss has fallen below a share of the
/// largest before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Descent {
    /// The share; 0 goes through all times.
    pub threshold: f64,
    /// Whether the gradient of the loss that ends it counts, as in Diff-Pruning for DDPM; for LDM
    /// it does not.
    pub last_counts: bool,
    /// The loss of each time that was gone through.
    pub losses: Vec<f64>,
    /// How many of them count.
    pub counted: usize,
    /// Whether it has ended.
    pub ended: bool,
}

impl Descent {
    /// At the beginning.
    pub fn new(threshold: f64, last_counts: bool) -> Self {
        Self {
            threshold,
            last_counts,
            losses: Vec::new(),
            counted: 0,
            ended: false,
        }
    }

    /// How many of the next losses count: the first ones.
    pub fn count(&mut self, losses: &[f64]) -> usize {
        let before = self.counted;
        let mut largest = self.losses.iter().copied().fold(0.0, f64::max);
        for loss in losses {
            if self.ended {
                break;
            }
            largest = f64::max(largest, *loss);
            self.losses.push(*loss);
            self.ended = *loss < self.threshold * largest;
            self.counted += usize::from(!self.ended || self.last_counts);
        }
        self.counted - before
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn_ndarray::NdArray;

    use super::*;
    use crate::models::{Architecture, Network, Shape};
    use crate::process::GaussianDiffusion;
    use crate::random::{self, Stream};
    use crate::state::assign;
    use crate::workers::fake;

    #[test]
    fn sums_go_on_and_are_shared_out_with_the_same_bits() {
        const PASSES: usize = 5;
        type B = Autodiff<NdArray>;
        let device = Default::default();
        let shape = Shape {
            channels: 1,
            side: 4,
            classes: 2,
        };
        let architecture = Architecture::preset_of("DiT-S/2", shape).unwrap();
        // Weights of which none is zero, so that every parameter has a gradient.
        let weights = architecture.tensors().into_iter().zip(0..);
        let weights: StateDict = weights
            .map(|((name, shape), index)| {
                let count = shape.iter().product();
                let mut values = random::normal(0, Stream::Bench, 22, index, count);
                values.iter_mut().for_each(|value| *value *= 0.1);
                (name, Array::new(shape, values))
            })
            .collect();
        let zeros = Network::<B>::zeros(&architecture, &device).unwrap();
        let network = assign(zeros, &weights, "".as_ref(), "a network").unwrap();
        let process = GaussianDiffusion::new("").unwrap();
        let batch = |seed| ScoreBatch::<B>::noise(architecture.shape(), 2, seed, &device);
        let sums = |size: usize, interrupted: bool| {
            // Each pass is one worker's.
            let each = fake::shared(size, |workers| {
                let begin = |sums: &StateDict| LossGradients::resumed(&workers, &network, sums);
                let mut gradients = begin(&StateDict::new());
                for first in (0..PASSES).step_by(size) {
                    let have = |rank| first + rank < PASSES;
                    let own = have(workers.rank()).then(|| {
                        let batch = batch((first + workers.rank()) as u64);
                        mean_loss(&network, &process, &batch)
                    });
                    let counted: Vec<usize> = (0..size).map(|rank| have(rank).into()).collect();
                    gradients.add(&network, own, &counted);
                    if interrupted {
                        gradients = begin(&gradients.sums::<B>(&network));
                    }
                }
                gradients.sums::<B>(&network)
            });
            let [first, others @ ..] = &each[..] else {
                unreachable!("there is one at least");
            };
            assert!(others.iter().all(|sums| sums == first));
            first.clone()
        };
        let through = sums(1, false);
        for (size, interrupted) in [(1, true), (2, false), (3, false), (3, true)] {
            let other = sums(size, interrupted);
            // Several workers have zeros for a parameter without gradients.
            let without = other
                .iter()
                .filter(|(name, _)| !through.contains_key(*name));
            let mut without = without.flat_map(|(_, sum)| &sum.data);
            assert!(!through.is_empty() && without.all(|value| *value == 0.0));
            for (name, sum) in &through {
                assert!(sum.data.iter().all(|value| value.is_finite()), "{name}");
                assert!(sum.data.iter().any(|value| *value != 0.0), "{name}");
                // Not `assert_eq`, which would print all values.
                assert!(*sum == other[name], "{name} of {size}, {interrupted}");
            }
        }
    }

    #[test]
    fn the_way_ends_below_a_share_of_the_largest_loss() {
        let losses = [1.0, 4.0, 2.0, 1.9, 8.0];
        for (last_counts, counted) in [(true, 4), (false, 3)] {
            let mut descent = Descent::new(0.5, last_counts);
            assert_eq!(descent.count(&losses[..2]), 2);
            assert_eq!(descent.count(&losses[2..]), counted - 2);
            assert_eq!((descent.losses.len(), descent.ended), (4, true));
            assert_eq!(descent.count(&losses), 0);
        }
        let mut descent = Descent::new(0.0, true);
        assert_eq!((descent.count(&losses), descent.ended), (5, false));
    }
}
