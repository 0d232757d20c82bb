//! Recovery of a pruned network: fine-tuning, distillation, masked distillation.
//!
//! Pretraining is the same step with a fresh network.

use std::marker::PhantomData;

use burn::module::{AutodiffModule, Module, ModuleDisplay, Param};
use burn::optim::GradientsParams;
use burn::tensor::TensorData;
use burn::tensor::backend::Backend;
use burn::train::{InferenceStep, TrainOutput, TrainStep};

use crate::data::Batch;
use crate::models::{Denoiser, Network};
use crate::ops::{FusedOps, Linear, TrainingBackend};
use crate::process::{AnyProcess, Distillation, Terms};
use crate::random::{self, Stream};
use crate::training::{StepReport, scalars};
use crate::trunk::{Plain, Tap};

/// A network in training, alone or with a teacher.
///
/// ```
/// # #[cfg(feature = "ndarray")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use burn::backend::Autodiff;
/// use burn_ndarray::{NdArray, NdArrayDevice};
/// use std::sync::Arc;
/// use tinyfusion::data::{BatchPlan, BatchSource, Digits, Split};
/// use tinyfusion::models::{Denoiser, Prunable};
/// use tinyfusion::process::Process;
/// use tinyfusion::recovery::Student;
/// use tinyfusion::weights::{EmbeddedName, embedded};
///
/// let device = NdArrayDevice::Cpu;
/// let teacher = embedded::checkpoint(EmbeddedName::DigitsTeacher)?;
/// let network = teacher.network::<Autodiff<NdArray>>(&device)?;
/// let process = teacher.trained_by().process();
/// let shape = network.shape();
/// let plan = BatchPlan {
///     batch: 4,
///     seed: 0,
///     channels: shape.channels,
///     size: shape.side,
///     classes: shape.classes,
///     label_drop: 0.1,
///     times: process.times(),
///     masking: None,
///     logits: Vec::new(),
/// };
/// let batch = BatchSource::new(plan, Arc::new(Digits::new(Split::Train))).draw(0, &device)?;
/// let half = network.keep(&[0, 2, 4, 6, 8, 10]);
/// let student = Student::new(half, None, process, 350);
/// let loss = student.terms(&batch).total.mean();
/// assert!(loss.into_scalar() > 0.0);
/// # Ok(()) }
/// # #[cfg(not(feature = "ndarray"))] fn main() {}
/// ```
#[derive(Module, Debug)]
pub struct Student<B: Backend, N: Module<B> = Network<B>> {
    /// The network.
    pub network: N,
    /// Maps of its tapped features to the teacher's width, one a tap; none where they are as wide.
    feature_maps: Vec<Linear<B>>,
    #[module(skip)]
    distillation: Option<Distillation>,
    #[module(skip)]
    process: AnyProcess,
    steps: usize,
    #[module(skip)]
    backend: PhantomData<B>,
}

impl<B: Backend, N: Module<B>> Student<B, N> {
    /// A student that trains for `steps`; without a distillation it learns from data alone.
    pub fn new(
        network: N,
        distillation: Option<Distillation>,
        process: AnyProcess,
        steps: usize,
    ) -> Self {
        Self {
            network,
            feature_maps: Vec::new(),
            distillation,
            process,
            steps,
            backend: PhantomData,
        }
    }

    /// The same student, whose tapped features go through linear maps to the teacher's width, which
    /// are learned along and are no part of the network (as in FitNets, arXiv 1412.6550).
    pub fn mapped(mut self, from: usize, to: usize, seed: u64, device: &B::Device) -> Self {
        let taps = self.distillation.iter().flat_map(|d| &d.features);
        let taps: usize = taps.map(|features| features.taps.len()).sum();
        let bound = (6.0 / (from + to) as f32).sqrt();
        let map = |tap: usize| {
            let count = from * to;
            let range = (-bound, bound);
            let values = random::uniform(seed, Stream::Weights, 2, tap as u64, count, range);
            let mut map = Linear::zeros(from, to, device);
            map.weight = Param::from_data(TensorData::new(values, [to, from]), device);
            map
        };
        self.feature_maps = (0..taps).map(map).collect();
        self
    }
}

impl<B: FusedOps, N: Denoiser<B>> Student<B, N> {
    /// The loss's terms for a batch.
    ///
    /// # Panics
    ///
    /// If it is distilled, and the batch has no output of the teacher
    /// ([`with_teacher`](crate::data::Batches::with_teacher)).
    pub fn terms(&self, batch: &Batch<B>) -> Terms<B> {
        let seen = batch.noised(&self.process);
        match (&self.distillation, &batch.teacher) {
            (Some(distillation), Some(teacher)) => {
                let features = distillation.features.as_ref();
                let beta = features.map_or(0.0, |features| features.weight(batch.step, self.steps));
                let mut tap = Tap::new(
                    features
                        .iter()
                        .flat_map(|features| features.taps.iter().map(|(student, _)| *student)),
                );
                let output = seen.run(&self.process, &self.network, &mut tap);
                let tapped = match self.feature_maps.is_empty() {
                    true => tap.outputs,
                    false => (self.feature_maps.iter().zip(tap.outputs))
                        .map(|(map, features)| map.forward(features))
                        .collect(),
                };
                seen.distillation_terms(&self.process, output, &tapped, teacher, distillation, beta)
            }
            (Some(_), None) => {
                panic!("a batch without the teacher's output can't be distilled from")
            }
            (None, _) => {
                let output = seen.run(&self.process, &self.network, &mut Plain);
                seen.terms(&self.process, output)
            }
        }
    }
}

impl<B, N> TrainStep for Student<B, N>
where
    B: TrainingBackend,
    N: Denoiser<B> + AutodiffModule<B, InnerModule: ModuleDisplay> + ModuleDisplay,
{
    type Input = Batch<B>;
    type Output = StepReport;

    fn step(&self, batch: Batch<B>) -> TrainOutput<StepReport> {
        let terms = self.terms(&batch);
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

impl<B: Backend, N: Module<B> + ModuleDisplay> InferenceStep for Student<B, N> {
    type Input = ();
    type Output = ();

    fn step(&self, (): ()) {}
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn_ndarray::NdArray;

    use super::*;
    use crate::process::MaskedFeatures;
    use crate::state::names;
    use crate::weights::{EmbeddedName, embedded};

    type B = Autodiff<NdArray>;

    #[test]
    fn a_narrower_student_has_a_map_for_each_tap() {
        let device = Default::default();
        let checkpoint = embedded::checkpoint(EmbeddedName::DigitsTeacher).unwrap();
        let process = checkpoint.trained_by().process();
        let distillation = Distillation {
            alpha: 0.5,
            features: Some(MaskedFeatures {
                taps: vec![(0, 1), (2, 5)],
                k: Some(2.0),
                beta: (1.0, 1.0),
            }),
        };
        let network = checkpoint.network::<B>(&device).unwrap();
        let student =
            Student::new(network, Some(distillation), process, 2).mapped(48, 64, 0, &device);
        let maps = names::<B, _>(&student).into_iter();
        let maps = maps.filter(|parameter| parameter.name.starts_with("feature_maps."));
        let maps: Vec<_> = maps.map(|map| (map.name, map.shape)).collect();
        let expected = [0, 1].map(|tap| {
            let name = |part| format!("feature_maps.{tap}.{part}");
            [(name("weight"), vec![64, 48]), (name("bias"), vec![64])]
        });
        assert_eq!(maps, expected.concat());
        // They learn: their parameters are in the graph.
        assert!(student.feature_maps[0].weight.val().is_require_grad());
        assert!(student.feature_maps[0].bias.val().is_require_grad());
    }
}
