//! A model on disk: weights, the architecture that rebuilds the module, and where it came from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::shards::read_shards;
use super::state::{decode, write_safetensors};
use super::torch::read_pickle;
use super::{StateDict, WeightFile, WeightsError, assign, collect};
use crate::models::{Architecture, DigitsClassifier, DitConfig, Network, zoo};

/// Metadata keys of our files.
const ARCHITECTURE: &str = "tinyfusion.architecture";
const PROVENANCE: &str = "tinyfusion.provenance";

/// Where a checkpoint came from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// Recipe that made it.
    pub recipe: String,
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

/// A model file's content.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// What the weights are of.
    pub architecture: Architecture,
    /// The weights.
    pub state: StateDict,
    /// Where they came from; default for files of other programs.
    pub provenance: Provenance,
    /// The file, for messages.
    pub path: PathBuf,
}

impl Checkpoint {
    /// Reads a file that [`WeightFile`] knows. One without our metadata has its architecture inferred from names and
    /// shapes.
    ///
    /// # Errors
    /// When the file can't be read, is damaged, or holds no model this crate knows.
    pub fn read(path: &Path) -> Result<Self, WeightsError> {
        match WeightFile::of(path) {
            Some(WeightFile::Safetensors) => {
                Self::decode(&std::fs::read(path).map_err(WeightsError::io(path))?, path)
            }
            Some(WeightFile::Shards) => {
                let (state, metadata) = read_shards(path)?;
                Self::from_state(state, metadata, path)
            }
            Some(WeightFile::Torch) => {
                Self::from_state(read_pickle(path, None)?, BTreeMap::new(), path)
            }
            None => Err(WeightsError::Model {
                path: path.to_owned(),
                problem: format!(
                    "expected a file ending in {}",
                    WeightFile::ENDINGS.join(", ")
                ),
            }),
        }
    }

    /// Decodes the bytes of a safetensors file; `path` is for messages.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn decode(bytes: &[u8], path: &Path) -> Result<Self, WeightsError> {
        let (state, metadata) = decode(bytes, path)?;
        Self::from_state(state, metadata, path)
    }

    fn from_state(
        state: StateDict,
        metadata: BTreeMap<String, String>,
        path: &Path,
    ) -> Result<Self, WeightsError> {
        let problem = |problem: String| WeightsError::Model {
            path: path.to_owned(),
            problem,
        };
        let architecture = match metadata.get(ARCHITECTURE) {
            Some(text) => serde_json::from_str(text).map_err(|error| {
                problem(format!(
                    "metadata `{ARCHITECTURE}` is not understood: {error}"
                ))
            })?,
            None => Architecture::Dit(infer(&state).map_err(problem)?),
        };
        if let Architecture::Dit(config) = &architecture
            && let Some(why) = config.problem()
        {
            return Err(problem(format!(
                "the architecture it describes can't be built: {why}"
            )));
        }
        let provenance = match metadata.get(PROVENANCE) {
            Some(text) => serde_json::from_str(text).map_err(|error| {
                problem(format!(
                    "metadata `{PROVENANCE}` is not understood: {error}"
                ))
            })?,
            None => Provenance::default(),
        };
        Ok(Self {
            architecture,
            state,
            provenance,
            path: path.to_owned(),
        })
    }

    /// A checkpoint of a network.
    pub fn of<B: Backend>(network: &Network<B>, provenance: Provenance, path: &Path) -> Self {
        Self {
            architecture: Architecture::Dit(network.config()),
            state: collect::<B, _>(network),
            provenance,
            path: path.to_owned(),
        }
    }

    /// Writes the checkpoint to its path, atomically.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn write(&self) -> Result<(), WeightsError> {
        let encode = |problem: serde_json::Error| WeightsError::Model {
            path: self.path.clone(),
            problem: problem.to_string(),
        };
        let metadata = BTreeMap::from([
            (
                ARCHITECTURE.to_owned(),
                serde_json::to_string(&self.architecture).map_err(encode)?,
            ),
            (
                PROVENANCE.to_owned(),
                serde_json::to_string(&self.provenance).map_err(encode)?,
            ),
        ]);
        write_safetensors(&self.path, &self.state, metadata)
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
        // Shapes first: a damaged configuration must not make us allocate what no file holds.
        let stored: usize = self.state.values().map(|array| array.data.len()).sum();
        if config.parameters() != stored {
            let expected = config.parameters();
            return Err(WeightsError::Mismatch {
                path: self.path.clone(),
                model: config.to_string(),
                problems: format!("  expected {expected} parameters, found {stored}"),
            });
        }
        assign(
            Network::zeros(config, device),
            &self.state,
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
                    &self.state,
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

    /// SHA-256 of the weights: names, shapes and values.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for (name, array) in &self.state {
            hash.update(name.as_bytes());
            hash.update(format!("{:?}", array.shape));
            for value in &array.data {
                hash.update(value.to_le_bytes());
            }
        }
        hash.finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// The DiT whose state dict this is.
fn infer(state: &StateDict) -> Result<DitConfig, String> {
    let shape = |name: &str, rank: usize| match state.get(name) {
        Some(array) if array.shape.len() == rank => Ok(array.shape.clone()),
        Some(array) => Err(format!(
            "`{name}` has shape {:?}, expected {rank} dimensions",
            array.shape
        )),
        None => Err(format!("it is no DiT: `{name}` is missing")),
    };
    let patches = shape("x_embedder.proj.weight", 4)?;
    let (width, channels, patch_size) = (patches[0], patches[1], patches[2]);
    let tokens = shape("pos_embed", 3)?[1];
    let rows = shape("y_embedder.embedding_table.weight", 2)?[0];
    let hidden = shape("blocks.0.mlp.fc1.weight", 2)?[0];
    let output = shape("final_layer.linear.weight", 2)?[0];
    let depth = (0..)
        .take_while(|layer| state.contains_key(&format!("blocks.{layer}.attn.qkv.weight")))
        .count();
    let heads = zoo::heads_of_width(width).ok_or_else(|| {
        format!("the number of heads is not stored, and no published model is {width} wide")
    })?;
    if rows == 0 || width == 0 || patch_size == 0 || patch_size > 4096 || channels > 1024 {
        return Err("a dimension of its embedders is 0, or beyond any model".into());
    }
    Ok(DitConfig {
        input_size: tokens.isqrt() * patch_size,
        patch_size,
        channels,
        width,
        depth,
        heads,
        mlp_ratio: hidden as f64 / width as f64,
        classes: rows - 1,
        learn_sigma: output == 2 * channels * patch_size * patch_size,
    })
}
