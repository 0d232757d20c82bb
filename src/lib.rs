//! TinyFusion learns which layers of a diffusion transformer to drop, recovers the rest, and
//! measures how good the result is (Fang et al., "TinyFusion: Diffusion Transformers Learned
//! Shallow", arXiv 2412.01199).
//!
//! # Modules
//!
//! | Module | Purpose |
//! |---|---|
//! | [`models`] | networks, and the seam any network fits: [`models::Denoiser`], [`models::Prunable`]; the autoencoder and Inception |
//! | [`trunk`] | the seam: a stack of blocks, and what may happen around each |
//! | [`ops`] | tensor operators the models share; [`ops::FusedOps`] is where a backend's kernels go |
//! | [`process`] | what is learned, as a trait: Gaussian diffusion and interpolants, their losses and samplers; [`process::FAMILIES`], a network and its process each |
//! | [`pruning`] | which layers stay: groups and masks, the gate, learned pruning, scores, the oracle rule |
//! | [`analysis`] | what is inside a network: distributions of hidden states, similarity of layers |
//! | [`recovery`] | healing: fine-tuning and distillation |
//! | [`training`] | burn-train's `Learner` under a strategy of our own; optimizer, EMA, checkpoints |
//! | [`data`] | digits, Fashion-MNIST, IDX files, folders of pictures, latents on disk; batches by step number |
//! | [`state`] | named arrays, in memory and in files; a module's parameters from them |
//! | [`weights`] | safetensors, `.pt` and the layout of diffusers, in and out, under PyTorch's names |
//! | [`evaluation`] | FID, sFID, Inception Score, precision and recall by ADM's protocol |
//! | [`npz`] | pictures in other programs' formats |
//! | [`sampling`] | drawing samples, in parts and shares; decoding |
//! | [`recipe`] | TOML → plan → run directory → page |
//! | [`report`] | pictures, charts, tables and pages |
//! | [`random`] | randomness keyed by (seed, stream, step, index) |
//! | [`workers`] | several processes at one recipe: alone, over MPI; the tree that sums their gradients |
//! | [`backend`], [`stop`], [`files`], [`images`], [`terminal`] | shared parts |
//! | [`cli`], [`mod@bench`], `standin` | the program's commands |
//!
//! # How data flows
//!
//! A recipe is read into a typed [`recipe::schema::Recipe`], which becomes a [`recipe::plan::Plan`]
//! once every stage's model is known. Each stage reads a [`weights::Checkpoint`] and leaves one in
//! the run directory; nothing else passes between stages, so any of them can be run alone, repeated
//! or resumed.
//!
//! Everything that computes is generic over Burn's `Backend`. [`with_backend!`] turns the choice
//! made on the command line into a type, once. All randomness is drawn on the host and keyed, so
//! the same recipe gives the same masks, noise and order everywhere.
//!
//! # Example
//!
//! Half of the embedded teacher's layers, by how much each changes what goes through it:
//!
//! ```
//! # #[cfg(feature = "ndarray")] fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use burn_ndarray::NdArray;
//! use tinyfusion::models::{Denoiser, Prunable};
//! use tinyfusion::pruning::{Score, ScoreBatch, keep_by_scores, score};
//! use tinyfusion::weights::{EmbeddedName, embedded};
//!
//! let teacher = embedded::checkpoint(EmbeddedName::DigitsTeacher)?;
//! let network = teacher.network::<NdArray>(&Default::default())?;
//! let process = teacher.trained_by().process();
//! let batch = ScoreBatch::noise(network.shape(), 4, 0, &Default::default());
//! let scores = score(&network, &process, Score::FluxLite, &batch).scores;
//! let pruned = network.keep(&keep_by_scores(Score::FluxLite, &scores, 6));
//! assert_eq!(pruned.trunk().depth, 6);
//! # Ok(()) }
//! # #[cfg(not(feature = "ndarray"))] fn main() {}
//! ```
//!
//! `examples/` has a network of one's own, pruned and healed.
#![recursion_limit = "256"]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod analysis;
pub mod backend;
#[cfg(feature = "cli")]
pub mod bench;
#[cfg(feature = "cli")]
pub mod cli;
pub mod data;
pub mod evaluation;
pub mod files;
pub mod images;
pub mod models;
pub mod npz;
pub mod ops;
pub mod process;
pub mod pruning;
pub mod random;
pub mod recipe;
pub mod recovery;
pub mod report;
pub mod sampling;
#[cfg(all(feature = "cli", feature = "ndarray"))]
pub mod standin;
pub mod state;
pub mod stop;
pub mod terminal;
pub mod training;
pub mod trunk;
pub mod weights;
pub mod workers;
