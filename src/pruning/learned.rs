//! Learned depth pruning: gates and a weight update, trained together.

use burn::module::{AutodiffModule, Module, ModuleDisplay, Param};
use burn::optim::GradientsParams;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use burn::train::{InferenceStep, TrainOutput, TrainStep};
use serde::{Deserialize, Serialize};

use super::gate::{Annealing, Decision, decide, draw};
use super::groups::{GroupError, Groups};
use crate::data::Batch;
use crate::models::{Network, Prunable, initialise_lora};
use crate::ops::{FusedOps, TrainingBackend};
use crate::process::{AnyProcess, Terms};
use crate::state::{collect, overlay};
use crate::training::{StepReport, scalars};
use crate::trunk::Gated;

/// The weight update that is trained with the gates, to estimate how well a choice would recover.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "update", rename_all = "lowercase")]
pub enum Update {
    /// A low-rank update of every linear layer; base weights and biases are frozen.
    Lora {
        /// Rank.
        rank: usize,
        /// The update's scale is `alpha / rank`.
        alpha: f64,
    },
    /// Full training of all weights.
    Full,
    /// None: only the gates are trained.
    Frozen,
}

/// A network whose layers are gated per sample, with the gates' logits.
///
/// It is trained by [`Fit`](crate::training::Fit) as any other network is
/// (`examples/own_network.rs`); its [decision](Self::decision) then is the layers to keep.
///
/// ```
/// # #[cfg(feature = "ndarray")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use burn::backend::Autodiff;
/// use burn_ndarray::NdArray;
/// use tinyfusion::pruning::{Annealing, Groups, LearnedPruner, Update};
/// use tinyfusion::weights::{EmbeddedName, embedded};
///
/// let teacher = embedded::checkpoint(EmbeddedName::DigitsTeacher)?;
/// let network = teacher.network::<Autodiff<NdArray>>(&Default::default())?;
/// // Of every two of its twelve layers one stays.
/// let groups = Groups::parse_ratio("1:2", 12)?;
/// let update = Update::Lora { rank: 8, alpha: 16.0 };
/// let annealing = Annealing {
///     tau: (4.0, 0.1),
///     scaling: (100.0, 100.0),
///     steps: 350,
/// };
/// let process = teacher.trained_by().process();
/// let pruner = LearnedPruner::new(network, groups, update, 0.0, annealing, process, 0)?;
/// // Equal gates: the first candidate of each group.
/// assert_eq!(pruner.decision(0).kept, [0, 2, 4, 6, 8, 10]);
/// # Ok(()) }
/// # #[cfg(not(feature = "ndarray"))] fn main() {}
/// ```
#[derive(Module, Debug)]
pub struct LearnedPruner<B: Backend, N: Module<B> = Network<B>> {
    /// The network, with its update.
    pub network: N,
    /// Logits of each group's candidates, or of its layers: `[1, logits]`.
    pub gates: Vec<Param<Tensor<B, 2>>>,
    #[module(skip)]
    groups: Groups,
    #[module(skip)]
    annealing: Annealing,
    #[module(skip)]
    process: AnyProcess,
}

impl<B: Backend, N: Prunable<B>> LearnedPruner<B, N> {
    /// Adds gates with logits `gate_init` to a network, and the update to its weights.
    ///
    /// # Errors
    /// When the groups don't cover the network's trunk.
    pub fn new(
        network: N,
        groups: Groups,
        update: Update,
        gate_init: f64,
        annealing: Annealing,
        process: AnyProcess,
        seed: u64,
    ) -> Result<Self, GroupError> {
        groups.fit(&network.trunk())?;
        let device = network.devices().into_iter().next().unwrap_or_default();
        let mut network = if update == Update::Full {
            network
        } else {
            network.no_grad()
        };
        if let Update::Lora { rank, alpha } = update {
            for linear in network.linears_mut() {
                linear.attach_lora(rank, alpha);
            }
            let mut state = collect::<B, _>(&network);
            initialise_lora(&mut state, seed);
            network = overlay::<B, _>(network, &state).expect("values in memory can be read");
        }
        let gates = groups
            .iter()
            .map(|group| {
                let count = group.num_logits();
                let logits = TensorData::new(vec![gate_init as f32; count], [1, count]);
                Param::from_tensor(Tensor::from_data(logits, &device))
            })
            .collect();
        Ok(Self {
            network,
            gates,
            groups,
            annealing,
            process,
        })
    }
}

impl<B: Backend, N: Module<B>> LearnedPruner<B, N> {
    /// The current decision of the gates, at a step's scaling.
    pub fn decision(&self, step: usize) -> Decision {
        // Read back at once: each reading waits for the device.
        let gates = self.gates.iter().map(Param::val).collect();
        let all = Tensor::cat(gates, 1).into_data();
        let mut all = all.iter::<f32>();
        let groups = self.groups.iter();
        let logits: Vec<Vec<f32>> = groups
            .map(|group| all.by_ref().take(group.num_logits()).collect())
            .collect();
        decide(&self.groups, &logits, self.annealing.at(step).1)
    }

    /// (tau, scaling) at a step.
    pub fn annealed(&self, step: usize) -> (f64, f64) {
        self.annealing.at(step)
    }
}

impl<B: FusedOps, N: Prunable<B>> LearnedPruner<B, N> {
    /// The masks of a batch, `[batch, depth]`, from one draw of Gumbel noise per group.
    ///
    /// # Panics
    ///
    /// If there is noise of more or fewer groups.
    pub fn masks(&self, gumbel: &[Tensor<B, 2>], step: usize) -> Tensor<B, 2> {
        assert_eq!(gumbel.len(), self.gates.len(), "one noise for each group");
        let (tau, scaling) = self.annealing.at(step);
        let masks =
            self.groups
                .iter()
                .zip(&self.gates)
                .zip(gumbel)
                .map(|((group, gate), gumbel)| {
                    draw(group, gate.val(), gumbel.clone(), tau, scaling).mask
                });
        Tensor::cat(masks.collect(), 1)
    }

    /// The loss's terms for a batch, and the masks they were computed under.
    pub fn terms(&self, batch: &Batch<B>) -> (Terms<B>, Tensor<B, 2>) {
        let seen = batch.noised(&self.process);
        let mask = self.masks(&batch.gumbel, batch.step);
        let mut gated = Gated { mask: mask.clone() };
        let output = seen.run(&self.process, &self.network, &mut gated);
        (seen.terms(&self.process, output), mask)
    }
}

impl<B, N> TrainStep for LearnedPruner<B, N>
where
    B: TrainingBackend,
    N: Prunable<B> + AutodiffModule<B, InnerModule: ModuleDisplay> + ModuleDisplay,
{
    type Input = Batch<B>;
    type Output = StepReport;

    fn step(&self, batch: Batch<B>) -> TrainOutput<StepReport> {
        let (terms, _) = self.terms(&batch);
        let loss = terms.total.clone().mean();
        let gradients = GradientsParams::from_grads(loss.backward(), self);
        let (tau, scaling) = self.annealing.at(batch.step);
        let mut scalars = scalars(&terms);
        scalars.0.extend([
            ("tau", tau),
            ("scaling", scaling),
            ("confidence", self.decision(batch.step).confidence()),
        ]);
        TrainOutput {
            grads: gradients,
            item: StepReport {
                scalars,
                images: batch.samples(),
            },
        }
    }
}

impl<B: Backend, N: Module<B> + ModuleDisplay> InferenceStep for LearnedPruner<B, N> {
    type Input = ();
    type Output = ();

    fn step(&self, (): ()) {}
}
