//! A model on disk: weights, the architecture that rebuilds the module, and where it came from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use burn::tensor::backend::Backend;
use safetensors::Dtype;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::layout::{DiffusersConfig, from_diffusers, is_diffusers};
use super::safetensors::{open, open_safetensors, write_safetensors};
use super::shards::open_shards;
use super::state::encode;
use super::tensors::{Bytes, Tensors};
use super::torch::open_torch;
use super::{WeightFile, WeightsError, assign, collect, infer};
use crate::models::{Architecture, DigitsClassifier, DitConfig, Network, zoo};

/// Metadata keys of our files.
const ARCHITECTURE: &str = "tinyfusion.architecture";
const PROVENANCE: &str = "tinyfusion.provenance";

/// File beside weights that rebuilds their model.
pub(super) const CONFIG: &str = "config.json";

/// Where a checkpoint came from.
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
    /// SHA-256 of the parent checkpoint's weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// SHA-256 of the weights of the teacher it was healed under.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// Layers of the parent that were kept, when the stage pruned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Vec<usize>>,
    /// Depth of that parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent_depth: Option<usize>,
    /// Groups `[N, M]` the kept layers were chosen in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub groups: Option<Vec<[usize; 2]>>,
    /// A sentence a person should read.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// What a person states of a file that the file itself may not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Stated {
    /// Which of a training checkpoint's state dicts to read; by default `ema`, else `model`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights_key: Option<String>,
    /// Attention heads, which no tensor tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<usize>,
    /// The published model it must be, but for the size of its images and the number of classes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// A model file's content; its tensors are read when they are asked for.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// What the weights are of.
    pub architecture: Architecture,
    /// The weights, under the reference's names.
    pub tensors: Tensors,
    /// Where they came from; default for files of other programs.
    pub provenance: Provenance,
    /// The file, for messages.
    pub path: PathBuf,
    fingerprint: OnceLock<String>,
}

impl Checkpoint {
    /// A checkpoint of weights in memory, to be written to `path`.
    pub fn new(
        architecture: Architecture,
        tensors: Tensors,
        provenance: Provenance,
        path: &Path,
    ) -> Self {
        Self {
            architecture,
            tensors,
            provenance,
            path: path.to_owned(),
            fingerprint: OnceLock::new(),
        }
    }

    /// Opens a file that [`WeightFile`] knows. One without our metadata has its architecture inferred from names and
    /// shapes.
    ///
    /// # Errors
    /// When the file can't be read, is damaged, or holds no model this crate knows; one error names all tensors that
    /// are missing, surplus or misshapen.
    pub fn read(path: &Path) -> Result<Self, WeightsError> {
        Self::read_stated(path, &Stated::default())
    }

    /// Opens a file of which a person states something.
    ///
    /// # Errors
    /// As [`read`](Self::read), and when the file contradicts them.
    pub fn read_stated(path: &Path, stated: &Stated) -> Result<Self, WeightsError> {
        let (kind, file) = WeightFile::locate(path)?;
        let (tensors, metadata) = match kind {
            WeightFile::Safetensors => open_safetensors(&file)?,
            WeightFile::Shards => open_shards(&file)?,
            WeightFile::Torch => {
                let tensors = open_torch(&file, stated.weights_key.as_deref())?;
                return Self::from_tensors(tensors, BTreeMap::new(), &file, stated);
            }
        };
        if let Some(key) = &stated.weights_key {
            return Err(WeightsError::Model {
                path: file,
                problem: format!(
                    "weights_key `{key}` is for .pt and .pth files; this one holds one model"
                ),
            });
        }
        Self::from_tensors(tensors, metadata, &file, stated)
    }

    /// Opens the bytes of a safetensors file inside the binary; `path` is for messages.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn embedded(bytes: &'static [u8], path: &Path) -> Result<Self, WeightsError> {
        let (tensors, metadata) = open(&Bytes::embedded(path, bytes), bytes.len() as u64, path)?;
        Self::from_tensors(tensors, metadata, path, &Stated::default())
    }

    fn from_tensors(
        tensors: Tensors,
        metadata: BTreeMap<String, String>,
        path: &Path,
        stated: &Stated,
    ) -> Result<Self, WeightsError> {
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
        let known = match known {
            Some(known) => Some(known),
            None => beside(path)?,
        };
        let (mut tensors, mut known) = (tensors, known);
        if is_diffusers(&tensors) {
            let Some(Architecture::Dit(config)) = &known else {
                return Err(problem(
                    "it has the names of diffusers' DiT, whose config.json must lie beside it"
                        .into(),
                ));
            };
            check(config, path)?;
            tensors = from_diffusers(tensors, config.input_size / config.patch_size, path)?;
        }
        if !matches!(known, Some(Architecture::DigitsClassifier(_))) {
            let heads = match &known {
                Some(Architecture::Dit(config)) => Some(config.heads),
                _ => stated.heads,
            };
            let found = infer::dit(&tensors, heads, path)?;
            if let Some(heads) = stated.heads
                && heads != found.heads
            {
                return Err(problem(format!(
                    "{heads} heads are stated, but it has {}",
                    found.heads
                )));
            }
            let config = match known {
                Some(Architecture::Dit(config)) => config,
                _ => found,
            };
            if let Some(name) = &stated.model {
                let (size, channels) = (config.input_size, config.channels);
                let expected = zoo::config(name, size, channels, config.classes);
                if expected.as_ref() != Some(&config) {
                    let expected = expected.map_or("no model".into(), |config| config.to_string());
                    return Err(problem(format!(
                        "it is said to be {name} ({expected}), but it is: {config}"
                    )));
                }
            }
            check(&config, path)?;
            infer::check_dit(&tensors, &config, path)?;
            known = Some(Architecture::Dit(config));
        }
        let architecture = known.ok_or_else(|| problem("it holds no model".into()))?;
        Ok(Self::new(
            architecture,
            tensors,
            provenance.unwrap_or_default(),
            path,
        ))
    }

    /// A checkpoint of a network.
    pub fn of<B: Backend>(network: &Network<B>, provenance: Provenance, path: &Path) -> Self {
        let tensors = collect::<B, _>(network).into();
        Self::new(
            Architecture::Dit(network.config()),
            tensors,
            provenance,
            path,
        )
    }

    /// Writes the checkpoint to its path as safetensors, atomically.
    ///
    /// # Errors
    /// When a tensor can't be read or the file can't be written.
    pub fn write(&self) -> Result<(), WeightsError> {
        write_safetensors(&self.path, &self.tensors, self.metadata()?, None)
    }

    /// What our files say of themselves.
    pub(super) fn metadata(&self) -> Result<BTreeMap<String, String>, WeightsError> {
        let encode = |problem: serde_json::Error| WeightsError::Model {
            path: self.path.clone(),
            problem: problem.to_string(),
        };
        let architecture = serde_json::to_string(&self.architecture).map_err(encode)?;
        let provenance = serde_json::to_string(&self.provenance).map_err(encode)?;
        Ok(BTreeMap::from([
            (ARCHITECTURE.to_owned(), architecture),
            (PROVENANCE.to_owned(), provenance),
            // Other programs' loaders ask whose conventions the names follow.
            ("format".to_owned(), "pt".to_owned()),
        ]))
    }

    /// The configuration, if this is a diffusion network.
    ///
    /// # Errors
    /// When it is something else.
    pub fn dit(&self) -> Result<&DitConfig, WeightsError> {
        match &self.architecture {
            Architecture::Dit(config) => Ok(config),
            other => Err(self.wrong("a diffusion network", other)),
        }
    }

    /// Builds the network.
    ///
    /// # Errors
    /// When the checkpoint holds something else, or its weights do not fit its architecture.
    pub fn network<B: Backend>(&self, device: &B::Device) -> Result<Network<B>, WeightsError> {
        let config = self.dit()?;
        assign(
            Network::zeros(config, device),
            &self.tensors,
            &self.path,
            &config.to_string(),
        )
    }

    /// Builds the digit classifier.
    ///
    /// # Errors
    /// As [`network`](Self::network).
    pub fn digits_classifier<B: Backend>(
        &self,
        device: &B::Device,
    ) -> Result<DigitsClassifier<B>, WeightsError> {
        match &self.architecture {
            Architecture::DigitsClassifier(config)
                if (4..=4096).contains(&config.width) && config.width % 4 == 0 =>
            {
                assign(
                    DigitsClassifier::zeros(config, device),
                    &self.tensors,
                    &self.path,
                    &self.architecture.to_string(),
                )
            }
            other => Err(self.wrong("a digit classifier whose width is a multiple of 4", other)),
        }
    }

    fn wrong(&self, expected: &str, found: &Architecture) -> WeightsError {
        WeightsError::Model {
            path: self.path.clone(),
            problem: format!("expected {expected}, found {found}"),
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
        let hash = hash.finalize();
        let text: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(self.fingerprint.get_or_init(|| text).clone())
    }
}

/// Refuses a configuration that no model can have.
fn check(config: &DitConfig, path: &Path) -> Result<(), WeightsError> {
    config.problem().map_or(Ok(()), |why| {
        Err(WeightsError::Model {
            path: path.to_owned(),
            problem: format!("the architecture it describes can't be built: {why}"),
        })
    })
}

/// The architecture in a `config.json` beside a file: ours, or that of diffusers' DiT.
fn beside(path: &Path) -> Result<Option<Architecture>, WeightsError> {
    let path = path.with_file_name(CONFIG);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(WeightsError::io(&path)(error)),
    };
    let format = |found: String| WeightsError::Format {
        path: path.clone(),
        expected: "config.json",
        found,
    };
    let Ok(json) = serde_json::from_str::<serde_json::Value>(&text) else {
        return Err(format("it is no JSON".into()));
    };
    if let Some(config) = DiffusersConfig::of(&json) {
        let config = config.and_then(|config| config.dit()).map_err(format)?;
        return Ok(Some(Architecture::Dit(config)));
    }
    // Somebody else's configuration may lie there too.
    if json.get("family").is_none() {
        return Ok(None);
    }
    let architecture = serde_json::from_value(json).map_err(|error| format(error.to_string()))?;
    Ok(Some(architecture))
}
