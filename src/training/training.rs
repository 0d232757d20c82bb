//! A training: what is trained how, and where it is kept.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Optimisation, Tracker};
use crate::models::Architecture;
use crate::process::ProcessKind;
use crate::weights::{Description, Provenance};

/// Where a training stands in a larger job, for people.
#[derive(Debug, Clone, Default)]
pub struct About {
    /// The recipe's name.
    pub recipe: String,
    /// The stage's number, from 1, and how many there are.
    pub place: (usize, usize),
    /// The run directory.
    pub run: PathBuf,
    /// Of a pruning that is being learned, the probability of each layer to stay; empty of anything
    /// else.
    pub gates: Arc<Mutex<Vec<f64>>>,
}

/// A training of a model in a folder.
#[derive(Debug, Clone)]
pub struct Training {
    /// Shown in progress lines.
    pub name: String,
    /// Budget, schedule and safeguards.
    pub optimisation: Optimisation,
    /// Folder of `metrics.jsonl` and `checkpoints/`.
    pub directory: PathBuf,
    /// Hash of what defines the training; a checkpoint of another can't be resumed.
    pub fingerprint: String,
    /// What each checkpoint says of the model in it; None where what is trained is no whole model.
    pub description: Option<Description>,
    /// What a dashboard says of the job.
    pub about: About,
    /// Forms of the log beside `metrics.jsonl`.
    pub log: Vec<Tracker>,
}

impl Training {
    /// A training in a folder of its own.
    pub fn new(name: &str, optimisation: Optimisation, directory: &Path) -> Self {
        Self {
            name: name.to_owned(),
            optimisation,
            directory: directory.to_owned(),
            fingerprint: String::new(),
            description: None,
            about: About::default(),
            log: Vec::new(),
        }
    }

    /// Has each checkpoint say what model it holds, so that it can be opened as one, and the
    /// process that a diffusion network is trained under.
    pub fn describe(
        &mut self,
        architecture: Architecture,
        process: Option<ProcessKind>,
        provenance: Provenance,
    ) {
        self.description = Some(Description {
            architecture,
            process,
            provenance,
        });
    }
}
