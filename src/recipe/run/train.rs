//! The stage that trains a model from nothing, or trains one on.

use std::path::Path;

use burn::module::Module;

use super::context::{Context, finished};
use super::models::MODEL;
use crate::evaluation::{Pictured, accuracy};
use crate::models::{Architecture, Classifier, ClassifierConfig, Network, initialise};
use crate::ops::TrainingBackend;
use crate::process::{Process, ProcessKind};
use crate::recipe::RecipeError;
use crate::recipe::plan::TrainPlan;
use crate::recipe::schema::Stage;
use crate::recipe::schema::train::Train;
use crate::recovery::Student;
use crate::state::{WeightsError, assign, collect};
use crate::training::{ClassifierTrainee, Training};
use crate::weights::{Checkpoint, Provenance};

/// What is trained on, and what is left.
struct Trained<'a> {
    parent: Option<&'a Checkpoint>,
    architecture: &'a Architecture,
    process: Option<ProcessKind>,
    provenance: Provenance,
    /// The file that the model is written to.
    at: &'a Path,
}

impl<B: TrainingBackend> Context<'_, B> {
    pub(crate) fn train(
        &self,
        stage: &Stage,
        plan: &TrainPlan,
        folder: &Path,
    ) -> Result<(), RecipeError> {
        let TrainPlan {
            train,
            architecture,
            process,
        } = plan;
        let parent = train.from.as_ref().map(|source| self.load(source));
        let parent = parent.transpose()?;
        let optimisation = &train.optimisation;
        let mut training = self.training(stage, optimisation, folder, &[parent.as_ref()])?;
        let provenance =
            self.provenance(&stage.name, "train", Some(optimisation), parent.as_ref())?;
        training.describe(architecture.clone(), *process, provenance.clone());
        let trained = Trained {
            parent: parent.as_ref(),
            architecture,
            process: *process,
            provenance,
            at: &folder.join(MODEL),
        };
        match architecture.classifier() {
            Some(config) => self.train_classifier(trained, config, training, train),
            None => self.train_denoiser((stage, folder), trained, training, train),
        }
    }

    /// A module with initial weights in place of its zeros; `at` is for messages.
    fn fresh<M: Module<B>>(&self, zeros: M, at: &Path) -> Result<M, RecipeError> {
        let mut state = collect::<B, _>(&zeros);
        initialise(&mut state, self.recipe.seed);
        Ok(assign(zeros, &state, at, "a fresh model")?)
    }

    fn train_denoiser(
        &self,
        (stage, folder): (&Stage, &Path),
        trained: Trained<'_>,
        training: Training,
        train: &Train,
    ) -> Result<(), RecipeError> {
        let Trained {
            architecture, at, ..
        } = trained;
        let network = match trained.parent {
            Some(parent) => self.network(parent)?,
            None => {
                let zeros = Network::<B>::zeros(architecture, self.device);
                let zeros = zeros.ok_or_else(|| WeightsError::Model {
                    path: at.to_owned(),
                    problem: format!("{architecture} is no diffusion network"),
                })?;
                self.as_trained(self.fresh(zeros, at)?)
            }
        };
        let steps = train.optimisation.steps;
        let kind = trained.process.unwrap_or(ProcessKind::ASSUMED);
        let process = kind.process();
        let student = Student::new(network, None, process.clone(), steps);
        let source = self.source(
            (architecture, kind),
            &train.optimisation,
            train.label_drop,
            Vec::new(),
        )?;
        let curves = process.names().0.to_vec();
        let mut fit = self.over(training, (source, process), None);
        if let Some(meanwhile) = &train.meanwhile {
            fit = fit.observe(self.measured_meanwhile(
                stage,
                meanwhile,
                (architecture, kind),
                folder,
            )?);
        }
        let fitted = finished(fit.curves(curves).run(student)?, steps)?;
        let model = Checkpoint::of(&fitted.ema.network, trained.provenance, at);
        Ok(model.of_process(trained.process).write()?)
    }

    fn train_classifier(
        &self,
        trained: Trained<'_>,
        config: &ClassifierConfig,
        training: Training,
        train: &Train,
    ) -> Result<(), RecipeError> {
        let Trained {
            architecture, at, ..
        } = trained;
        let classifier = match trained.parent {
            Some(parent) => parent.classifier::<B>(self.device)?,
            None => self.fresh(Classifier::<B>::zeros(config, self.device), at)?,
        };
        // A classifier learns from clean pictures; its loss uses neither times nor noise.
        let kind = ProcessKind::ASSUMED;
        let of = (architecture, kind);
        let source = self.source(of, &train.optimisation, 0.0, Vec::new())?;
        // Before the training, so that a mistake in it shows before.
        let test = self.held_out()?;
        let name = training.name.clone();
        let fit = self.over(training, (source, kind.process()), None);
        let fit = fit.curves(vec!["accuracy"]);
        let fitted = fit.run(ClassifierTrainee { classifier })?;
        let model = finished(fitted, train.optimisation.steps)?.ema.classifier;
        let mut provenance = trained.provenance;
        provenance.note = match test {
            Some(test) => {
                let all: Vec<usize> = (0..test.len()).collect();
                let pictured = Pictured::read(&*test, &all, self.shape()?.sizes())?;
                let accuracy = accuracy(&model, config, &pictured, self.device)?;
                format!("test accuracy {accuracy:.4} on {} images", test.len())
            }
            None => "no pictures to test it on".to_owned(),
        };
        crate::say!("{}: {}", name, provenance.note);
        let tensors = collect::<B::InnerBackend, _>(&model).into();
        Ok(Checkpoint::new(architecture.clone(), tensors, provenance, at).write()?)
    }
}
