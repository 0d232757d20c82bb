//! A model on disk: weights, architecture and provenance.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use burn::tensor::backend::Backend;
use safetensors::Dtype;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::WeightFile;
use super::opened::Opened;
use super::safetensors::{open, write_safetensors};
use crate::models::{
    Architecture, Classifier, ClassifierConfig, DIFFUSERS_ALONE, Heads, Network, UNET_ALONE,
    is_diffusers, is_unet,
};
use crate::process::ProcessKind;
use crate::state::{Bytes, Tensors, WeightsError, assign, collect, encode};
use crate::trunk::Granularity;

/// Metadata keys of this program's files.
pub(super) const ARCHITECTURE: &str = "tinyfusion.architecture";
const PROVENANCE: &str = "tinyfusion.provenance";
const PROCESS: &str = "tinyfusion.process";

/// The mark of a diffusion network whose process is unknown. Files without any mark are older than
/// the mark, when all networks were trained by Gaussian diffusion.
const UNSTATED: &str = "unstated";

/// File beside weights with the configuration that rebuilds their model.
pub(super) const CONFIG: &str = "config.json";

/// Origin of a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// Recipe that made it.
    pub recipe: String,
    /// SHA-256 of that recipe, with overrides applied and defaults written out.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub recipe_sha256: String,
    /// Stage of the recipe, with its method.
    pub stage: String,
    /// Seed of the run.
    pub seed: u64,
    /// Optimizer steps of the stage.
    pub steps: usize,
    /// Images seen in the stage.
    pub images: usize,
    /// Whether what the stage learned only chose layers: no weight here was trained by it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub chose: bool,
    /// SHA-256 of the parent checkpoint's weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// SHA-256 of the weights of the teacher it was recovered under.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// What the kept layers and the groups count.
    #[serde(skip_serializing_if = "Granularity::is_block")]
    pub granularity: Granularity,
    /// Layers of the parent that were kept, when the stage pruned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Vec<usize>>,
    /// Number of layers of the pruned parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent_depth: Option<usize>,
    /// Groups `[N, M]` within which the kept layers were chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub groups: Option<Vec<[usize; 2]>>,
    /// The training data, as its recipe names them.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub data: String,
    /// Names of the classes, where the data have any; a label is an index into this list.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub class_names: Vec<String>,
    /// A note for the reader, one sentence.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// Statements about a file that may lack them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Stated {
    /// Which state dict of a training checkpoint to read; by default `ema`, else `model`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights_key: Option<String>,
    /// Number of attention heads, which no tensor shows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<usize>,
    /// Number of attention heads if the file doesn't state them and no published model has its
    /// width.
    #[serde(skip)]
    pub heads_otherwise: Option<usize>,
    /// The process it was trained under, which only a MAR's tensors show.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<ProcessKind>,
    /// The published model that the file must hold, up to image size and number of classes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// Description of the model in a file of this program.
#[derive(Debug, Clone, Serialize)]
pub struct Description {
    /// The architecture.
    pub architecture: Architecture,
    /// The process a diffusion network was trained under; None if unknown.
    pub process: Option<ProcessKind>,
    /// Origin of the weights.
    pub provenance: Provenance,
}

impl Description {
    /// The description as metadata.
    ///
    /// # Errors
    /// None for values that can be written as JSON.
    pub(crate) fn metadata(&self) -> Result<BTreeMap<String, String>, serde_json::Error> {
        let mut metadata = BTreeMap::from([
            (
                ARCHITECTURE.to_owned(),
                serde_json::to_string(&self.architecture)?,
            ),
            (
                PROVENANCE.to_owned(),
                serde_json::to_string(&self.provenance)?,
            ),
            // Other programs' loaders ask which framework's tensor layout the file has.
            ("format".to_owned(), "pt".to_owned()),
        ]);
        if self.architecture.is_denoiser() {
            metadata.insert(PROCESS.to_owned(), mark(self.process));
        }
        Ok(metadata)
    }
}

/// The mark of a process in files.
pub(super) fn mark(process: Option<ProcessKind>) -> String {
    process.map_or_else(|| UNSTATED.to_owned(), ProcessKind::mark)
}

/// The process of a mark; the inner `None` if it is marked as unstated.
fn marked(mark: &str) -> Result<Option<ProcessKind>, String> {
    if mark == UNSTATED {
        return Ok(None);
    }
    let known = mark.parse().map(Some);
    known.map_err(|why| {
        format!("it is marked for a process that is not known: {why}, or {UNSTATED:?}")
    })
}

/// Content of a model file; tensors are read on demand.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// The architecture.
    pub architecture: Architecture,
    /// The process it was trained under; None for a classifier, and for a diffusion network if
    /// unknown.
    pub process: Option<ProcessKind>,
    /// The weights, under the reference's names.
    pub tensors: Tensors,
    /// Origin of the weights; default for files of other programs.
    pub provenance: Provenance,
    /// The file, for messages.
    pub path: PathBuf,
    fingerprint: OnceLock<String>,
}

impl Checkpoint {
    /// A checkpoint of weights in memory, to be written to `path`; a diffusion network's process is
    /// Gaussian, unless its tensors tell another.
    pub fn new(
        architecture: Architecture,
        tensors: Tensors,
        provenance: Provenance,
        path: &Path,
    ) -> Self {
        let process = (architecture.is_denoiser()).then(|| ProcessKind::assumed_of(&architecture));
        Self {
            architecture,
            process,
            tensors,
            provenance,
            path: path.to_owned(),
            fingerprint: OnceLock::new(),
        }
    }

    /// Opens a file of any kind in [`WeightFile`]. Without this program's metadata, the
    /// architecture is inferred from names and shapes.
    ///
    /// # Errors
    /// When the file can't be read, is damaged, or holds no model this crate knows; one error names
    /// all tensors that are missing, surplus or misshapen.
    pub fn read(path: &Path) -> Result<Self, WeightsError> {
        Self::read_stated(path, &Stated::default())
    }

    /// Opens a file about which the caller states something.
    ///
    /// # Errors
    /// As [`read`](Self::read), and when the file contradicts the statements.
    pub fn read_stated(path: &Path, stated: &Stated) -> Result<Self, WeightsError> {
        let (kind, file) = WeightFile::locate(path)?;
        let opened = Opened::open(kind, &file, stated.weights_key.as_deref())?;
        Self::from_opened(opened, &file, stated)
    }

    /// Opens the bytes of an embedded safetensors file; `path` is for messages.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn embedded(bytes: &'static [u8], path: &Path) -> Result<Self, WeightsError> {
        let (tensors, metadata) = open(&Bytes::embedded(path, bytes), bytes.len() as u64, path)?;
        let opened = Opened {
            tensors,
            metadata,
            process: None,
        };
        Self::from_opened(opened, path, &Stated::default())
    }

    fn from_opened(opened: Opened, path: &Path, stated: &Stated) -> Result<Self, WeightsError> {
        let Opened {
            tensors,
            metadata,
            process: arguments,
        } = opened;
        let problem = |problem: String| WeightsError::Model {
            path: path.to_owned(),
            problem,
        };
        fn said<T: DeserializeOwned>(
            metadata: &BTreeMap<String, String>,
            key: &str,
        ) -> Result<Option<T>, String> {
            let said = metadata.get(key).map(|text| serde_json::from_str(text));
            said.transpose()
                .map_err(|error| format!("metadata `{key}` is not understood: {error}"))
        }
        let known: Option<Architecture> = said(&metadata, ARCHITECTURE).map_err(problem)?;
        let provenance = said(&metadata, PROVENANCE).map_err(problem)?;
        let mut process = match (metadata.get(PROCESS), &known) {
            (Some(mark), _) => marked(mark).map_err(problem)?,
            (None, Some(known)) if known.is_denoiser() => Some(ProcessKind::assumed_of(known)),
            (None, _) => arguments,
        };
        let mut known = match known {
            Some(known) => Some(known),
            None => beside(path)?.map(|(known, beside)| {
                process = process.or(beside);
                known
            }),
        };
        let mut tensors = tensors;
        if known.is_none() && is_unet(&tensors) {
            return Err(problem(UNET_ALONE.into()));
        }
        if is_diffusers(&tensors) {
            let Some(known) = known.as_ref().filter(|known| known.is_denoiser()) else {
                return Err(problem(DIFFUSERS_ALONE.into()));
            };
            check(known, path)?;
            tensors = known.read_diffusers(tensors, path)?;
        }
        // Of a network that was pruned in width tensors do not show all.
        let shown = known.as_ref().is_none_or(Architecture::is_shown_by_tensors);
        if let Some(known) = known.as_ref().filter(|known| !known.is_denoiser()) {
            check(known, path)?;
            known.check(&tensors, path)?;
        } else {
            if let Some(known) = known.as_ref().filter(|_| !shown) {
                check(known, path)?;
                tensors = known.renamed(tensors);
            }
            let heads = Heads {
                known: known.as_ref().map_or(stated.heads, Architecture::heads),
                otherwise: stated.heads_otherwise,
            };
            let architecture = match known {
                Some(known) if !shown => known,
                known => {
                    let found = Architecture::of_tensors(&tensors, heads, path)?;
                    known.unwrap_or(found)
                }
            };
            if let Some(heads) = stated.heads
                && architecture.heads() != Some(heads)
            {
                let found = architecture
                    .heads()
                    .map_or("none".into(), |found| found.to_string());
                return Err(problem(format!(
                    "{heads} heads are stated, but it has {found}"
                )));
            }
            if let Some(name) = &stated.model {
                let expected = Architecture::preset_of(name, architecture.shape());
                if expected.as_ref() != Some(&architecture) {
                    let expected = expected.map_or("no model".into(), |model| model.to_string());
                    return Err(problem(format!(
                        "it is said to be {name} ({expected}), but it is: {architecture}"
                    )));
                }
            }
            check(&architecture, path)?;
            architecture.check(&tensors, path)?;
            process = agreed(process, stated).map_err(problem)?;
            let told = ProcessKind::of_network(&architecture);
            if let Some(process) = process
                && (told.is_some() || process == ProcessKind::Masked)
                && told != Some(process)
            {
                return Err(problem(format!(
                    "it is said to be trained by {process}, which its network is not made for: {architecture}"
                )));
            }
            process = process.or(told);
            known = Some(architecture);
        }
        let architecture = known.ok_or_else(|| problem("it holds no model".into()))?;
        let provenance = provenance.unwrap_or_default();
        let checkpoint = Self::new(architecture, tensors, provenance, path);
        Ok(checkpoint.of_process(process))
    }

    /// The same weights, marked with another process; None for unknown.
    pub fn of_process(self, process: Option<ProcessKind>) -> Self {
        let process = process.filter(|_| self.architecture.is_denoiser());
        Self { process, ..self }
    }

    /// The process it was trained under; if unknown, what its tensors tell or Gaussian diffusion.
    pub fn trained_by(&self) -> ProcessKind {
        self.process
            .unwrap_or_else(|| ProcessKind::assumed_of(&self.architecture))
    }

    /// Whether this is a diffusion network whose process is unknown.
    pub fn is_unmarked(&self) -> bool {
        self.architecture.is_denoiser() && self.process.is_none()
    }

    /// The model in words; the family is named by the process.
    pub fn model(&self) -> String {
        ProcessKind::called(self.process, &self.architecture)
    }

    /// A checkpoint holding a network's weights.
    pub fn of<B: Backend>(network: &Network<B>, provenance: Provenance, path: &Path) -> Self {
        let tensors = collect::<B, _>(network).into();
        Self::new(network.architecture(), tensors, provenance, path)
    }

    /// Writes the checkpoint to its path as safetensors, atomically.
    ///
    /// # Errors
    /// When a tensor can't be read or the file can't be written.
    pub fn write(&self) -> Result<(), WeightsError> {
        write_safetensors(&self.path, &self.tensors, self.metadata()?, None)
    }

    /// The metadata of this program's files.
    pub(super) fn metadata(&self) -> Result<BTreeMap<String, String>, WeightsError> {
        let description = Description {
            architecture: self.architecture.clone(),
            process: self.process,
            provenance: self.provenance.clone(),
        };
        description.metadata().map_err(|error| WeightsError::Model {
            path: self.path.clone(),
            problem: error.to_string(),
        })
    }

    /// The architecture, if it is a diffusion network's.
    ///
    /// # Errors
    /// When it is something else.
    pub fn denoiser(&self) -> Result<&Architecture, WeightsError> {
        match self.architecture.is_denoiser() {
            true => Ok(&self.architecture),
            false => Err(self.wrong("a diffusion network")),
        }
    }

    /// Builds the network.
    ///
    /// # Errors
    /// When the checkpoint holds something else, or its weights do not fit its architecture.
    pub fn network<B: Backend>(&self, device: &B::Device) -> Result<Network<B>, WeightsError> {
        let zeros = Network::zeros(&self.architecture, device)
            .ok_or_else(|| self.wrong("a diffusion network"))?;
        assign(
            zeros,
            &self.tensors,
            &self.path,
            &self.architecture.to_string(),
        )
    }

    /// The configuration, if this is a classifier.
    ///
    /// # Errors
    /// When it is something else.
    pub fn classifier_config(&self) -> Result<&ClassifierConfig, WeightsError> {
        let config = self.architecture.classifier();
        config.ok_or_else(|| self.wrong("a classifier"))
    }

    /// Builds the classifier.
    ///
    /// # Errors
    /// As [`network`](Self::network).
    pub fn classifier<B: Backend>(
        &self,
        device: &B::Device,
    ) -> Result<Classifier<B>, WeightsError> {
        let config = self.classifier_config()?;
        assign(
            Classifier::zeros(config, device),
            &self.tensors,
            &self.path,
            &config.to_string(),
        )
    }

    fn wrong(&self, expected: &str) -> WeightsError {
        WeightsError::Model {
            path: self.path.clone(),
            problem: format!("expected {expected}, found {}", self.architecture),
        }
    }

    /// SHA-256 of the weights: names, shapes and values as f32. Computed once.
    ///
    /// # Errors
    /// When a tensor can't be read.
    pub fn fingerprint(&self) -> Result<String, WeightsError> {
        if let Some(known) = self.fingerprint.get() {
            return Ok(known.clone());
        }
        let mut hash = Sha256::new();
        for (name, tensor) in self.tensors.iter() {
            hash.update(name.as_bytes());
            hash.update(format!("{:?}", tensor.shape()));
            hash.update(encode(tensor.read()?.data, Dtype::F32));
        }
        let text = format!("{:x}", hash.finalize());
        Ok(self.fingerprint.get_or_init(|| text).clone())
    }
}

/// The process according to the file and the caller.
fn agreed(said: Option<ProcessKind>, stated: &Stated) -> Result<Option<ProcessKind>, String> {
    let model = stated.model.as_deref();
    let named = model.and_then(|model| Some((ProcessKind::of_model(model)?, model)));
    // A model's name tells the family, of whose processes the file or the person may name another.
    if let (Some(process), Some((named, model))) = (stated.process, named)
        && process.family() != named.family()
    {
        return Err(format!(
            "the process is stated as {}, but {model} is trained by {named}",
            process.mark()
        ));
    }
    let named = named.map(|(named, _)| named);
    let contradicts = match (said, stated.process, named) {
        (Some(said), Some(stated), _) if said != stated => Some((said, stated)),
        (Some(said), None, Some(named)) if said.family() != named.family() => Some((said, named)),
        _ => None,
    };
    match contradicts {
        Some((said, stated)) => Err(format!(
            "it is stated to be trained by {stated}, but it says that it was trained by {said}"
        )),
        None => Ok(said.or(stated.process).or(named)),
    }
}

/// Refuses a configuration that no model can have.
fn check(architecture: &Architecture, path: &Path) -> Result<(), WeightsError> {
    architecture.problem().map_or(Ok(()), |why| {
        Err(WeightsError::Model {
            path: path.to_owned(),
            problem: format!("the architecture it describes can't be built: {why}"),
        })
    })
}

/// The architecture and process in a `config.json` beside a file, this program's or that of
/// diffusers' DiT.
fn beside(path: &Path) -> Result<Option<(Architecture, Option<ProcessKind>)>, WeightsError> {
    let path = path.with_file_name(CONFIG);
    let text = match crate::files::read_text(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(WeightsError::io(&path)(error)),
    };
    let broken = |found: String| WeightsError::Format {
        path: path.clone(),
        expected: "config.json",
        found,
    };
    let Ok(json) = serde_json::from_str::<serde_json::Value>(&text) else {
        return Err(broken("it is no JSON".into()));
    };
    if let Some(architecture) = Architecture::of_diffusers(&json) {
        let architecture = architecture.map_err(broken)?;
        return Ok(Some((architecture, Some(ProcessKind::ASSUMED))));
    }
    // Another program's configuration may lie there too.
    if json.get("family").is_none() {
        return Ok(None);
    }
    let process = match json.get("process") {
        Some(serde_json::Value::String(mark)) => Some(marked(mark).map_err(broken)?),
        Some(other) => return Err(broken(format!("`process` is {other}, expected a string"))),
        None => None,
    };
    let architecture: Architecture =
        serde_json::from_value(json).map_err(|error| broken(error.to_string()))?;
    // A mark may say that it is unstated.
    let process = process.unwrap_or_else(|| Some(ProcessKind::assumed_of(&architecture)));
    Ok(Some((architecture, process)))
}
