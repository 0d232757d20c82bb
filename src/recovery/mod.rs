//! Recovery of a pruned network: fine-tuning, distillation, masked distillation.
//!
//! Pretraining is the same step with a fresh network.

use std::marker::PhantomData;

use burn::module::{AutodiffModule, Module, ModuleDisplay};
use burn::optim::GradientsParams;
use burn::tensor::backend::Backend;
use burn::train::{InferenceStep, TrainOutput, TrainStep};

use crate::data::Batch;
use crate::models::{Denoiser, Network};
use crate::ops::TrainingBackend;
use crate::process::{AnyProcess, Distillation, Terms};
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
///     candidates: Vec::new(),
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
            distillation,
            process,
            steps,
            backend: PhantomData,
        }
    }
}

impl<B: Backend, N: Denoiser<B>> Student<B, N> {
    /// The loss's terms for a batch; for distillation, the batch has the teacher's output.
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
                let tapped = &tap.outputs;
                seen.distillation_terms(&self.process, output, tapped, teacher, distillation, beta)
            }
            _ => {
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
                images: batch.t.len(),
            },
        }
    }
}

impl<B: Backend, N: Module<B> + ModuleDisplay> InferenceStep for Student<B, N> {
    type Input = ();
    type Output = ();

    fn step(&self, (): ()) {}
}
