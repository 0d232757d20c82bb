//! What planning knows so far: the models earlier stages leave, the files that are there, and what is missing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::embedded;
use super::missing::{MissingFile, Role, note};
use super::models::read_file;
use super::prune::PruneMethod;
use super::public::public_file;
use super::schema::{Data, Recipe, Stage, StageKind};
use super::source::Source;
use crate::data::Latents;
use crate::models::{Architecture, DitConfig, digits, zoo};
use crate::process::ProcessKind;
use crate::weights::vae_config;

/// How many times an autoencoder of latents reduces each side, where its configuration is not there to say.
const AUTOENCODER_REDUCTION: usize = 8;

/// Why a stage can't be planned.
pub(super) enum Problem {
    /// The model comes from a stage that failed.
    Unknown,
    Said(String),
}

impl<E: std::error::Error> From<E> for Problem {
    fn from(error: E) -> Self {
        Self::Said(error.to_string())
    }
}

/// Whether a stage only takes layers out, so that it is all the same to it how the model was trained.
fn keeps_weights(kind: &StageKind) -> bool {
    let StageKind::Prune(prune) = kind else {
        return false;
    };
    match prune.method {
        PruneMethod::Oracle { .. } | PruneMethod::Random { .. } | PruneMethod::Kept { .. } => true,
        PruneMethod::Learned(_)
        | PruneMethod::ShortGpt(_)
        | PruneMethod::FluxLite(_)
        | PruneMethod::Sensitivity(_) => false,
    }
}

/// What planning knows so far.
pub(super) struct Known<'a> {
    pub(super) recipe: &'a Recipe,
    /// What earlier stages leave.
    pub(super) made: BTreeMap<String, Architecture>,
    /// Stages that leave a model of another process than Gaussian diffusion.
    pub(super) interpolants: BTreeSet<String>,
    pub(super) missing: Vec<MissingFile>,
}

impl Known<'_> {
    /// Notes a file that a stage needs; says whether it is there.
    pub(super) fn need(&mut self, stage: &Stage, path: &Path, role: Role) -> bool {
        note(&mut self.missing, &stage.name, path, role)
    }

    /// What a stage's source holds; refuses a model of a process that the stage can't compute.
    pub(super) fn architecture(
        &mut self,
        stage: &Stage,
        source: &Source,
    ) -> Result<Architecture, Problem> {
        let (architecture, process) = self.model(stage, source)?;
        if process == Some(ProcessKind::Interpolant) {
            if !keeps_weights(&stage.kind) {
                return Err(Problem::Said(format!(
                    "`{source}` is a SiT, trained by an interpolant; this stage computes by Gaussian diffusion, as for a DiT. A SiT can be inspected, converted, and pruned by the methods `kept`, `oracle` and `random`"
                )));
            }
            self.interpolants.insert(stage.name.clone());
        }
        Ok(architecture)
    }

    fn model(
        &mut self,
        stage: &Stage,
        source: &Source,
    ) -> Result<(Architecture, Option<ProcessKind>), Problem> {
        match source {
            Source::Stage(name) => {
                let made = self.made.get(name).cloned().ok_or(Problem::Unknown)?;
                let interpolant = self.interpolants.contains(name);
                Ok((made, interpolant.then_some(ProcessKind::Interpolant)))
            }
            Source::Embedded(name) => {
                let checkpoint = embedded::checkpoint(*name)?;
                Ok((checkpoint.architecture, checkpoint.process))
            }
            Source::File(file) => {
                if self.need(stage, &file.path, Role::Weights) {
                    let checkpoint = read_file(file, self.recipe.heads)?;
                    return Ok((checkpoint.architecture, checkpoint.process));
                }
                // A recipe can be planned without its files where it is known what they hold.
                let stated = file.stated.model.as_deref();
                let stated = stated.and_then(|name| zoo::config(name, 32, 4, 1000));
                let public = public_file(&file.path).and_then(|file| file.architecture());
                // One that others publish is listed among the missing.
                if stated.is_none() && public.is_none() && public_file(&file.path).is_some() {
                    return Err(Problem::Unknown);
                }
                let known = stated.map(Architecture::Dit).or(public).ok_or_else(|| {
                    Problem::Said(format!(
                        "`{source}` is not there, and nothing says what it holds"
                    ))
                })?;
                Ok((known, file.stated.process))
            }
        }
    }

    pub(super) fn dit(&mut self, stage: &Stage, source: &Source) -> Result<DitConfig, Problem> {
        match self.architecture(stage, source)? {
            Architecture::Dit(config) => Ok(config),
            other => Err(Problem::Said(format!(
                "`{source}` is a {other}; a diffusion network is needed"
            ))),
        }
    }

    /// Notes an autoencoder; refuses one whose latents are not what a model draws, as far as it can be known.
    pub(super) fn vae(
        &mut self,
        stage: &Stage,
        path: &Path,
        model: &DitConfig,
    ) -> Result<(), Problem> {
        if !self.need(stage, path, Role::Vae) {
            return Ok(());
        }
        match vae_config(path)? {
            Some(config) if config.latent_channels != model.channels => {
                Err(Problem::Said(format!(
                    "the latents of {} have {} channels, and the model draws {}",
                    path.display(),
                    config.latent_channels,
                    model.channels
                )))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a model that can't learn from the recipe's data.
    pub(super) fn fits_data(&mut self, stage: &Stage, config: &DitConfig) -> Result<(), Problem> {
        let recipe = self.recipe;
        let (name, channels, size, classes) = match &recipe.data {
            Data::Digits => ("digits".to_owned(), 1, digits::SIDE, digits::CLASSES),
            Data::Latents(path) => {
                if !self.need(stage, path, Role::Latents) {
                    return Ok(());
                }
                let latents = Latents::open(path)?;
                (
                    path.display().to_string(),
                    latents.channels(),
                    latents.side(),
                    // Labels of files that don't say are checked as they are read.
                    latents.stated_classes().unwrap_or(config.classes),
                )
            }
            Data::Stage(name) => {
                let of = recipe.stages.iter().find(|stage| stage.name == *name);
                let Some(StageKind::Extract(extract)) = of.map(|stage| &stage.kind) else {
                    return Err(Problem::Unknown);
                };
                // How many classes and channels it makes is known once it has run.
                let vae = match extract.vae.exists() {
                    true => vae_config(&extract.vae)?,
                    false => None,
                };
                let factor = vae.map_or(AUTOENCODER_REDUCTION, |vae| vae.factor());
                let size = extract.size / factor;
                (name.clone(), config.channels, size, config.classes)
            }
        };
        // A model may know more classes than the data has: a part of a data set is one too.
        let fits = match recipe.data {
            Data::Digits => config.classes == classes,
            _ => config.classes >= classes,
        };
        if (config.input_size, config.channels) == (size, channels) && fits {
            return Ok(());
        }
        Err(Problem::Said(format!(
            "the data are {name}, {channels}x{size}x{size} in {classes} classes, but the model is for {}x{}x{} in {}",
            config.channels, config.input_size, config.input_size, config.classes
        )))
    }
}
