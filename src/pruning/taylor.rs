//! Gradients by which channels are weighed: of a loss at random times, or at one time after
//! another until it has fallen (Diff-Pruning, Fang et al., arXiv 2305.10924, section 4.2).

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

/// Signed sums of the gradients of a network's loss.
pub struct LossGradients<N> {
    sums: GradientsAccumulator<N>,
}

impl<N> Default for LossGradients<N> {
    fn default() -> Self {
        let sums = GradientsAccumulator::new();
        Self { sums }
    }
}

impl<N> LossGradients<N> {
    /// Goes on from [`sums`](Self::sums) as if it had never been interrupted; a sum that is not of
    /// a parameter's name and shape is ignored.
    pub fn resumed<B: TrainingBackend>(network: &N, sums: &StateDict) -> Self
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
        let mut resumed = Self::default();
        resumed.sums.accumulate::<B>(network, put.gradients);
        resumed
    }

    /// Adds the gradients of the mean loss of a batch.
    pub fn add<B: TrainingBackend>(
        &mut self,
        network: &N,
        process: &impl Process,
        batch: &ScoreBatch<B>,
    ) where
        N: Denoiser<B> + AutodiffModule<B>,
    {
        let seen = batch.noised(process);
        let output = seen.run(process, network, &mut Plain);
        self.add_loss(network, seen.terms(process, output).total.mean());
    }

    /// Adds the gradients of a batch's mean losses at some times, each of which it is noised to
    /// with the same noise, as far as `descent` goes.
    pub fn add_times<B: TrainingBackend>(
        &mut self,
        network: &N,
        process: &impl Process,
        batch: &ScoreBatch<B>,
        times: &[f32],
        descent: &mut Descent,
    ) where
        N: Denoiser<B> + AutodiffModule<B>,
    {
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
        let losses = losses
            .reshape([times.len(), count])
            .mean_dim(1)
            .squeeze_dim::<1>(1); // [times]
        let values: Vec<f64> = losses.to_data().iter::<f64>().collect();
        let counted = descent.count(&values);
        if counted > 0 {
            self.add_loss(network, losses.narrow(0, 0, counted).sum());
        }
    }

    fn add_loss<B: TrainingBackend>(&mut self, network: &N, loss: Tensor<B, 1>)
    where
        N: AutodiffModule<B>,
    {
        let gradients = GradientsParams::from_grads(loss.backward(), network);
        self.sums.accumulate::<B>(network, gradients);
    }

    /// The sums so far, by the names of the parameters.
    pub fn sums<B: TrainingBackend>(&mut self, network: &N) -> StateDict
    where
        N: AutodiffModule<B>,
    {
        struct Take {
            walk: Walk,
            gradients: GradientsParams,
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
                if let Some(sum) = self.gradients.get::<B::InnerBackend, D>(param.id) {
                    let shape = sum.dims().to_vec();
                    let array = Array::new(shape, values(sum));
                    self.taken.insert(self.walk.name(), array);
                }
            }
        }
        let mut take = Take {
            walk: Walk::default(),
            gradients: self.sums.grads(),
            taken: StateDict::new(),
        };
        network.visit(&mut take);
        self.sums.accumulate::<B>(network, take.gradients);
        take.taken
    }
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

    /// How many of the next losses count.
    fn count(&mut self, losses: &[f64]) -> usize {
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

    #[test]
    fn sums_go_on_with_the_same_bits() {
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
        let sums = |interrupted: bool| {
            let mut gradients = LossGradients::default();
            for seed in 0..4 {
                gradients.add(&network, &process, &batch(seed));
                if interrupted && seed == 1 {
                    gradients = LossGradients::resumed(&network, &gradients.sums::<B>(&network));
                }
            }
            gradients.sums::<B>(&network)
        };
        let (through, interrupted) = (sums(false), sums(true));
        assert!(!through.is_empty() && through.keys().eq(interrupted.keys()));
        for (name, sum) in &through {
            assert!(sum.data.iter().all(|value| value.is_finite()), "{name}");
            assert!(sum.data.iter().any(|value| *value != 0.0), "{name}");
            // Not `assert_eq`, which would print all values.
            assert!(*sum == interrupted[name], "{name}");
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
