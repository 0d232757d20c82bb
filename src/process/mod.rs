//! The process that a network learns, which turns data into noise; its losses and its samplers.
//!
//! [`Process`] is the interface: data draws times from it, training and scores use its noised
//! samples and terms, and none of them names a process. [`GaussianDiffusion`] is DiT's, and that of
//! MAR's single tokens ([`masked`]); [`Interpolant`] is SiT's, [`AnyProcess`] the one that a
//! checkpoint names. [`Sampler`] goes from noise to data:
//!
//! ```
//! # #[cfg(feature = "ndarray")] fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use burn_ndarray::NdArray;
//! use tinyfusion::process::{Guidance, Sampler};
//! use tinyfusion::weights::{EmbeddedName, embedded};
//!
//! let (device, model) = (Default::default(), embedded::checkpoint(EmbeddedName::DigitsTeacher)?);
//! let network = model.network::<NdArray>(&device)?;
//! let process = model.trained_by();
//! let variance = model.architecture.predicts_variance();
//! let guidance = Guidance { scale: 1.5, channels: 3 };
//! let sampler = Sampler::new(process, variance, 4, process.solver(), guidance)?;
//! // The first sample of seed 0 is the same in any batch.
//! let (indices, labels) = ([0, 1], [3, 8]);
//! let samples = sampler.generate(&network, 0, &indices, &labels, &device, || {});
//! assert_eq!(samples.dims(), [2, 1, 8, 8]);
//! # Ok(()) }
//! # #[cfg(not(feature = "ndarray"))] fn main() {}
//! ```

mod dopri5;
mod family;
mod gaussian;
mod gaussian_loss;
pub mod interpolant;
mod kind;
mod likelihood;
mod losses;
pub mod masked;
mod objective;
mod sampler;
mod schedule;
pub mod transport;

pub use family::{FAMILIES, Family};
pub use gaussian::{GaussianDiffusion, Prediction, Variance};
pub use interpolant::Interpolant;
pub use kind::{Along, ProcessKind};
pub use likelihood::{discretized_gaussian_log_likelihood, normal_kl};
pub use losses::{
    Distillation, MaskedFeatures, TeacherOutput, Term, Terms, masked_feature_loss, typical,
};
pub use objective::{AnyProcess, Noised, Process, Times};
pub use sampler::{Guidance, Sampler, Solver, StepNoise, guided};
pub use schedule::{DiffusionTables, RespacingError, respace};
