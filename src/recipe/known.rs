//! What planning knows so far: the models earlier stages leave, the files that are there, and what is missing.

use std::collections::BTreeMap;
use std::path::Path;

use super::embedded;
use super::missing::{MissingFile, Role, note};
use super::public::public_file;
use super::schema::{Data, Recipe, Stage, StageKind};
use super::source::Source;
use crate::data::Latents;
use crate::models::{Architecture, DitConfig, digits, zoo};
use crate::weights::{Checkpoint, vae_config};

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

/// What planning knows so far.
pub(super) struct Known<'a> {
    pub(super) recipe: &'a Recipe,
    /// What earlier stages leave.
    pub(super) made: BTreeMap<String, Architecture>,
    pub(super) missing: Vec<MissingFile>,
}

impl Known<'_> {
    /// Notes a file that a stage needs; says whether it is there.
    pub(super) fn need(&mut self, stage: &Stage, path: &Path, role: Role) -> bool {
        note(&mut self.missing, &stage.name, path, role)
    }

    pub(super) fn architecture(
        &mut self,
        stage: &Stage,
        source: &Source,
    ) -> Result<Architecture, Problem> {
        match source {
            Source::Stage(name) => self.made.get(name).cloned().ok_or(Problem::Unknown),
            Source::Embedded(name) => Ok(embedded::checkpoint(*name)?.architecture),
            Source::File(file) => {
                if self.need(stage, &file.path, Role::Weights) {
                    return Ok(Checkpoint::read_stated(&file.path, &file.stated)?.architecture);
                }
                // A recipe can be planned without its files where it is known what they hold.
                let stated = file.stated.model.as_deref();
                let stated = stated.and_then(|name| zoo::config(name, 32, 4, 1000));
                let public = public_file(&file.path).and_then(|file| file.architecture());
                // One that others publish is listed among the missing.
                if stated.is_none() && public.is_none() && public_file(&file.path).is_some() {
                    return Err(Problem::Unknown);
                }
                stated.map(Architecture::Dit).or(public).ok_or_else(|| {
                    Problem::Said(format!(
                        "`{source}` is not there, and nothing says what it holds"
                    ))
                })
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
