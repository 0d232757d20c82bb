//! The process that a network learns, which turns data into noise; its losses and its samplers.
//!
//! [`Process`] is the interface: data draws times from it, training and scores use its noised
//! samples and terms, and none of them names a process. [`GaussianDiffusion`] is DiT's,
//! [`Interpolant`] SiT's, [`AnyProcess`] the one that a checkpoint names. [`Sampler`] goes from
//! noise to data.

mod dopri5;
mod family;
mod gaussian;
mod gaussian_loss;
pub mod interpolant;
mod kind;
mod likelihood;
mod losses;
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
