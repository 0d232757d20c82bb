//! What a network learns: the process that turns data into noise, its losses, and its samplers.
//!
//! [`Process`] is the seam: data draw times from it, training and scores take noised samples and terms, and none of them
//! knows a process by name. [`GaussianDiffusion`] is DiT's, [`Interpolant`] SiT's, [`AnyProcess`] whichever a checkpoint
//! names. [`Sampler`] goes back from noise to data.

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
pub use kind::ProcessKind;
pub use likelihood::{discretized_gaussian_log_likelihood, normal_kl};
pub use losses::{
    Distillation, MaskedFeatures, TeacherOutput, Term, Terms, masked_feature_loss, typical,
};
pub use objective::{AnyProcess, Noised, Process, Times};
pub use sampler::{Guidance, Sampler, Solver, StepNoise, guided};
pub use schedule::{DiffusionTables, RespacingError, respace};
