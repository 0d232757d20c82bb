//! Healing a pruned network: fine-tuning, distillation, masked distillation.
//!
//! A fresh network trains by the same step: pretraining is fine-tuning from nothing.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::train::{InferenceStep, TrainOutput, TrainStep};

use crate::data::Batch;
use crate::models::Network;
use crate::ops::{FusedOps, TrainingBackend};
use crate::process::{AnyProcess, Distillation, Terms};
use crate::training::{Scalars, StepReport};
use crate::trunk::{Plain, Tap};

/// A network in training, alone or under a teacher.
#[derive(Module, Debug)]
pub struct Student<B: Backend> {
    /// The network.
    pub network: Network<B>,
    #[module(skip)]
    distillation: Option<Distillation>,
    #[module(skip)]
    process: AnyProcess,
    steps: usize,
}

impl<B: Backend> Student<B> {
    /// A student that trains for `steps`; without a distillation it learns from data alone.
    pub fn new(
        network: Network<B>,
        distillation: Option<Distillation>,
        process: AnyProcess,
        steps: usize,
    ) -> Self {
        Self {
            network,
            distillation,
            process,
            steps,
        }
    }
}

impl<B: FusedOps> Student<B> {
    /// The loss's terms for a batch; under distillation the batch carries what the teacher said of it.
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

impl<B: TrainingBackend> TrainStep for Student<B> {
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

impl<B: Backend> InferenceStep for Student<B> {
    type Input = ();
    type Output = ();

    fn step(&self, (): ()) {}
}

/// Batch means of a loss's terms, in one transfer and outside the graph.
pub(crate) fn scalars<B: AutodiffBackend>(terms: &Terms<B>) -> Scalars {
    let named = std::iter::once(("loss", &terms.total))
        .chain(terms.named.iter().map(|(name, term)| (*name, term)));
    let (names, means): (Vec<_>, Vec<_>) = named
        .map(|(name, term)| (name, term.clone().inner().mean()))
        .unzip();
    let values = Tensor::cat(means, 0).into_data();
    Scalars(names.into_iter().zip(values.iter::<f64>()).collect())
}
