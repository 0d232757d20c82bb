//! What planning knows so far: the models earlier stages leave, the files that are there, and what
//! is missing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn_dataset::Dataset;

use super::missing::{MissingFile, Role, note};
use super::sample::{check_sampling, is_pixels, latents_need_a_vae};
use crate::data::{Digits, IdxPictures, Latents, PictureSet, Split, fashion, with_cause};
use crate::models::{Architecture, Shape};
use crate::process::ProcessKind;
use crate::recipe::published::{public_file, reduction};
use crate::recipe::run::models::read_file;
use crate::recipe::schema::data::{Data, DataShape, Idx, Pictures};
use crate::recipe::schema::intervals::{Intervals, Replacements};
use crate::recipe::schema::optimisation::Meanwhile;
use crate::recipe::schema::prune::{Prune, PruneMethod};
use crate::recipe::schema::sample::{Against, Evaluate};
use crate::recipe::schema::source::Source;
use crate::recipe::schema::width::{Importance, Width};
use crate::recipe::schema::{Recipe, Stage, StageKind};
use crate::weights::{embedded, vae_config};

/// Why a stage can't be planned.
pub(crate) enum Problem {
    /// The model comes from a stage that failed.
    Unknown,
    Said(String),
}

impl<E: std::error::Error> From<E> for Problem {
    fn from(error: E) -> Self {
        Self::Said(with_cause(&error))
    }
}

/// The next evaluation after a stage.
pub(in crate::recipe) fn following<'a>(recipe: &'a Recipe, stage: &Stage) -> Option<&'a Evaluate> {
    let mut later = recipe
        .stages
        .iter()
        .skip_while(|other| other.name != stage.name);
    later.find_map(|stage| match &stage.kind {
        StageKind::Evaluate(evaluate) => Some(evaluate),
        _ => None,
    })
}

/// Whether a stage only takes layers or channels out, so that it is all the same to it how the
/// model was trained.
pub(crate) fn keeps_weights(kind: &StageKind) -> bool {
    let StageKind::Prune(prune) = kind else {
        return false;
    };
    match &prune.method {
        PruneMethod::Oracle { .. }
        | PruneMethod::Uniform { .. }
        | PruneMethod::First { .. }
        | PruneMethod::Random { .. }
        | PruneMethod::Kept { .. } => true,
        PruneMethod::Width(Width { importance, .. }) => {
            matches!(importance, Importance::Magnitude | Importance::Random)
        }
        PruneMethod::Learned(_)
        | PruneMethod::ShortGpt(_)
        | PruneMethod::FluxLite(_)
        | PruneMethod::Sensitivity(_)
        | PruneMethod::Calibration(_)
        | PruneMethod::Intervals(_)
        | PruneMethod::Parallel { .. }
        | PruneMethod::Evolve(_) => false,
    }
}

/// What planning knows so far.
pub(crate) struct Known<'a> {
    pub(crate) recipe: &'a Recipe,
    /// How many share the work.
    pub(crate) workers: usize,
    /// What earlier stages leave, and the process it was trained under.
    pub(crate) made: BTreeMap<String, (Architecture, Option<ProcessKind>)>,
    /// Stages whose model was pruned by branch: it has as many as planned, and maybe others.
    pub(crate) by_branch: BTreeSet<String>,
    /// Stages whose model has as many layers as planned, but maybe more in one of its trunks and
    /// fewer in the other.
    pub(crate) divided: BTreeSet<String>,
    pub(crate) missing: Vec<MissingFile>,
    /// The recipe's pictures to train on and those held out, and how many there are, once they have
    /// been looked at.
    pub(crate) looked: [Option<(DataShape, usize)>; 2],
}

impl Known<'_> {
    /// Notes a file that a stage needs; says whether it is there.
    pub(crate) fn need(&mut self, stage: &Stage, path: &Path, role: Role) -> bool {
        note(&mut self.missing, &stage.name, path, role)
    }

    /// What a stage's source holds, and the process it was trained under; None of a classifier, and
    /// where nothing says it.
    pub(crate) fn model(
        &mut self,
        stage: &Stage,
        source: &Source,
    ) -> Result<(Architecture, Option<ProcessKind>), Problem> {
        match source {
            Source::Stage(name) => self.made.get(name).cloned().ok_or(Problem::Unknown),
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
                let stated = stated.and_then(Architecture::preset);
                let public = public_file(&file.path).and_then(|file| file.architecture());
                // One that others publish is listed among the missing.
                if stated.is_none() && public.is_none() && public_file(&file.path).is_some() {
                    return Err(Problem::Unknown);
                }
                let known = stated.or(public).ok_or_else(|| {
                    Problem::Said(format!(
                        "`{source}` is not there, and nothing says what it holds"
                    ))
                })?;
                let named = file.stated.model.as_deref().and_then(ProcessKind::of_model);
                let public = public_file(&file.path).and_then(|file| file.process());
                Ok((known, file.stated.process.or(named).or(public)))
            }
        }
    }

    /// A diffusion network, and its process if it is known.
    pub(crate) fn denoiser(
        &mut self,
        stage: &Stage,
        source: &Source,
    ) -> Result<(Architecture, Option<ProcessKind>), Problem> {
        let (model, process) = self.model(stage, source)?;
        match model.is_denoiser() {
            true => Ok((model, process)),
            false => Err(Problem::Said(format!(
                "`{source}` is a {model}; a diffusion network is needed"
            ))),
        }
    }

    /// Refuses a stage that trains no replacements of a model's intervals.
    pub(crate) fn trained_intervals(
        &self,
        source: &Source,
        whole: &Architecture,
    ) -> Result<(), Problem> {
        let trains = |stage: &&Stage| {
            matches!(source, Source::Stage(name) if stage.name == *name)
                && matches!(
                    &stage.kind,
                    StageKind::Prune(Prune {
                        method: PruneMethod::Intervals(Intervals {
                            replacements: Replacements::Train { .. },
                            ..
                        }),
                        ..
                    })
                )
        };
        if !self.recipe.stages.iter().any(|stage| trains(&stage)) {
            return Err(Problem::Said(format!(
                "`trained` names `{source}`, which trains no layers in the place of others; method = \"intervals\" with `steps` does"
            )));
        }
        let Source::Stage(name) = source else {
            return Err(Problem::Unknown);
        };
        let (trained, _) = self.made.get(name).ok_or(Problem::Unknown)?;
        match trained.with_depth(1) == whole.with_depth(1) {
            true => Ok(()),
            false => Err(Problem::Said(format!(
                "`trained` names `{source}`, which differs in more than depth: {trained}; {whole}"
            ))),
        }
    }

    /// Refuses to measure a stage's model while it is trained where no evaluation says how, or the
    /// one that follows can't measure it.
    pub(crate) fn measured_meanwhile(
        &mut self,
        stage: &Stage,
        (model, process): (&Architecture, Option<ProcessKind>),
        meanwhile: &Meanwhile,
    ) -> Result<(), Problem> {
        let Some(evaluate) = following(self.recipe, stage) else {
            return Err(Problem::Said(
                "`evaluate_every` measures as the next `evaluate` stage does, and none follows"
                    .into(),
            ));
        };
        let (count, neighbours) = (meanwhile.evaluate_count, evaluate.neighbours);
        if neighbours >= count {
            return Err(Problem::Said(format!(
                "`evaluate_count` is {count}, and {neighbours} neighbours can't be found among so many samples"
            )));
        }
        let source = Source::Stage(stage.name.clone());
        check_sampling(&evaluate.sampling, model, &source, process)?;
        let model = model.shape();
        match &evaluate.against {
            Against::HeldOut { features } => match features {
                Source::Stage(name) if !self.made.contains_key(name) => {
                    Err(Problem::Said(format!(
                        "`evaluate_every` needs the classifier `{name}`, which is trained later"
                    )))
                }
                _ => Ok(()),
            },
            Against::Reference { vae: Some(vae), .. } => self.vae(stage, vae, model),
            Against::Reference { vae: None, .. } if !is_pixels(model) => {
                Err(latents_need_a_vae(model))
            }
            Against::Reference { .. } => Ok(()),
        }
    }

    /// Whether an earlier stage pruned a model by branch.
    pub(crate) fn is_by_branch(&self, source: &Source) -> bool {
        matches!(source, Source::Stage(name) if self.by_branch.contains(name))
    }

    /// Whether it isn't known how a model's layers are divided among its trunks.
    pub(crate) fn is_divided(&self, source: &Source) -> bool {
        matches!(source, Source::Stage(name) if self.divided.contains(name))
    }

    /// Notes an autoencoder; refuses one whose latents are not what a model draws, as far as it can
    /// be known.
    pub(crate) fn vae(&mut self, stage: &Stage, path: &Path, model: Shape) -> Result<(), Problem> {
        if !self.need(stage, path, Role::Vae) {
            return Ok(());
        }
        let channels = vae_config(path)?.latent_channels;
        if channels == model.channels {
            return Ok(());
        }
        Err(Problem::Said(format!(
            "the latents of {} have {channels} channels, and the model draws {}",
            path.display(),
            model.channels
        )))
    }

    /// What the pictures of the recipe's data are, in pixel space, and how many a part has; None
    /// where they are missing, which is noted.
    pub(crate) fn pictures(
        &mut self,
        stage: &Stage,
        split: Split,
    ) -> Result<Option<(DataShape, usize)>, Problem> {
        let data = &self.recipe.data;
        let at = usize::from(split == Split::Test);
        if let Some(looked) = &self.looked[at] {
            return Ok(Some(looked.clone()));
        }
        let Some(shape) = data.shape() else {
            return Ok(None);
        };
        let count = match data {
            Data::Digits => Digits::new(split).count(),
            Data::Fashion(data) if !data.needs_files(split) => fashion::EMBEDDED_COUNT,
            Data::Fashion(data) => match data.files() {
                Ok(folder) => fashion::open(&folder, split)?.len(),
                // The folder may be there, and not all of its files.
                Err(error) if self.need(stage, Path::new(fashion::FOLDERS[0]), Role::Fashion) => {
                    return Err(error.into());
                }
                Err(_) => return Ok(None),
            },
            Data::Idx(Idx { idx, .. }) => {
                let pictures = IdxPictures::open(idx, split)?;
                if shape.side != pictures.side() || shape.classes < pictures.classes() {
                    return Err(Problem::Said(format!(
                        "{}: the test part's pictures have sides of {} and {} classes, unlike those to train on",
                        idx.display(),
                        pictures.side(),
                        pictures.classes()
                    )));
                }
                pictures.len()
            }
            Data::Pictures(Pictures { images, .. }) if !self.need(stage, images, Role::Images) => {
                return Ok(None);
            }
            Data::Pictures(Pictures {
                images,
                rule,
                held_out,
                ..
            }) => PictureSet::open(images, held_out, *rule)?.count(split),
            Data::Stage(_) | Data::Latents(_) => return Ok(None),
        };
        self.looked[at] = Some((shape, count));
        Ok(self.looked[at].clone())
    }

    /// Names of the classes of a model, where they are known before anything runs.
    pub(crate) fn class_names(&self, source: &Source) -> Result<Vec<String>, Problem> {
        Ok(match source {
            Source::Stage(_) => Vec::new(),
            Source::Embedded(name) => embedded::checkpoint(*name)?.provenance.class_names,
            Source::File(file) if file.path.exists() => {
                read_file(file, self.recipe.heads)?.provenance.class_names
            }
            Source::File(_) => Vec::new(),
        })
    }

    /// Refuses a model that can't learn from the recipe's data.
    pub(crate) fn fits_data(&mut self, stage: &Stage, model: Shape) -> Result<(), Problem> {
        let recipe = self.recipe;
        let (name, channels, size, classes) = match &recipe.data {
            Data::Digits | Data::Fashion(_) | Data::Idx(_) | Data::Pictures(_) => {
                let Some((shape, _)) = self.pictures(stage, Split::Train)? else {
                    return Ok(());
                };
                (
                    recipe.data.to_string(),
                    shape.channels,
                    shape.side,
                    shape.classes,
                )
            }
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
                    latents.stated_classes().unwrap_or(model.classes),
                )
            }
            Data::Stage(name) => {
                let of = recipe.stages.iter().find(|stage| stage.name == *name);
                let Some(StageKind::Extract(extract)) = of.map(|stage| &stage.kind) else {
                    return Err(Problem::Unknown);
                };
                // How many classes and channels it makes is known once it has run.
                let factor = match extract.vae.exists() {
                    true => vae_config(&extract.vae)?.factor(),
                    false => reduction(&extract.vae),
                };
                let size = extract.size / factor;
                (name.clone(), model.channels, size, model.classes)
            }
        };
        // A model may know more classes than latents have: a part of a data set is one too. Those
        // of pictures are numbered by the names there are.
        let fits = match recipe.data {
            Data::Latents(_) | Data::Stage(_) => model.classes >= classes,
            _ => model.classes == classes,
        };
        if (model.side, model.channels) == (size, channels) && fits {
            return Ok(());
        }
        Err(Problem::Said(format!(
            "the data are {name}, {channels}x{size}x{size} in {classes} classes, but the model is for {}x{}x{} in {}",
            model.channels, model.side, model.side, model.classes
        )))
    }

    /// Refuses a classifier that can't learn from the recipe's data.
    pub(crate) fn classifies(
        &mut self,
        stage: &Stage,
        model: &Architecture,
    ) -> Result<(), Problem> {
        if let Some(why) = model.problem() {
            return Err(Problem::Said(format!("the {model} can't be built: {why}")));
        }
        let data = &self.recipe.data;
        if data.shape().is_none() {
            return Err(Problem::Said(format!(
                "a classifier learns from pictures, and the recipe's data, {data}, are latents"
            )));
        }
        let Some((shape, _)) = self.pictures(stage, Split::Train)? else {
            return Ok(());
        };
        if shape.sizes() == model.shape() {
            return Ok(());
        }
        Err(Problem::Said(format!(
            "the data are {}, {shape}, but the model is a {model}",
            self.recipe.data
        )))
    }

    /// Refuses a model of other classes than the data's, where both have names.
    pub(crate) fn same_classes(&self, source: &Source) -> Result<(), Problem> {
        let names = self.class_names(source)?;
        let data = &self.recipe.data;
        let of_data = (data.shape()).map_or_else(Vec::new, |shape| shape.class_names);
        if names.is_empty() || of_data.is_empty() || names == of_data {
            return Ok(());
        }
        Err(Problem::Said(format!(
            "`{source}` is of other pictures: its classes are {}, those of the data, {data}, are {}",
            names.join(", "),
            of_data.join(", ")
        )))
    }

    /// Refuses a classifier of other pictures than the recipe's.
    pub(crate) fn reads(
        &self,
        source: &Source,
        model: &Architecture,
        pictures: &DataShape,
    ) -> Result<(), Problem> {
        if pictures.sizes() != model.shape() {
            return Err(Problem::Said(format!(
                "`{source}` is a {model}, and the data, {}, are {pictures}; `features` needs a classifier trained on them",
                self.recipe.data
            )));
        }
        self.same_classes(source)
    }

    /// Refuses a model whose samples can't be compared with the recipe's pictures.
    pub(crate) fn draws(
        &self,
        source: &Source,
        model: Shape,
        pictures: &DataShape,
    ) -> Result<(), Problem> {
        if pictures.sizes() == model {
            return self.same_classes(source);
        }
        Err(Problem::Said(format!(
            "`{source}` draws {0}x{1}x{1} in {2} classes, and the data, {3}, are {pictures}; `data` (`--data` on the command \
             line) names the pictures that a model is measured against, or `reference` and `inception` do in a recipe; \
             `tinyfusion evaluate SAMPLES REFERENCE` measures what `tinyfusion sample` drew",
            model.channels, model.side, model.classes, self.recipe.data
        )))
    }

    /// Refuses a model of latents whose decoded samples are no pictures of the recipe's classes.
    pub(crate) fn decodes(
        &self,
        source: &Source,
        model: Shape,
        pictures: &DataShape,
    ) -> Result<(), Problem> {
        if model.classes == pictures.classes {
            return self.same_classes(source);
        }
        Err(Problem::Said(format!(
            "`{source}` draws pictures of {} classes, and the data, {}, have {}; `data` or `reference` names the pictures \
             that a model is measured against",
            model.classes, self.recipe.data, pictures.classes
        )))
    }
}
