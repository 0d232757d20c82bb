//! An opened weight file: the requested tensors and the rest of its content.

use std::collections::BTreeMap;
use std::path::Path;

use super::WeightFile;
use super::safetensors::open_safetensors;
use super::shards::open_shards;
use super::snapshot::{self, is_snapshot};
use super::torch::open_said;
use crate::process::ProcessKind;
use crate::state::{Tensors, WeightsError};

/// Content of a weight file.
pub(super) struct Opened {
    /// Its tensors, under the model's own names.
    pub(super) tensors: Tensors,
    /// Its metadata; empty for a PyTorch file.
    pub(super) metadata: BTreeMap<String, String>,
    /// The process according to the training's arguments, which PyTorch files may keep.
    pub(super) process: Option<ProcessKind>,
}

impl Opened {
    /// Opens a file of a given kind; of several state dicts, the one at `key`, or else the
    /// preferred one.
    ///
    /// # Errors
    /// When the file can't be read, is damaged, or has no such state dict.
    pub(super) fn open(
        kind: WeightFile,
        path: &Path,
        key: Option<&str>,
    ) -> Result<Self, WeightsError> {
        let (tensors, metadata) = match kind {
            WeightFile::Safetensors => open_safetensors(path)?,
            WeightFile::Shards => open_shards(path)?,
            WeightFile::Torch => {
                let (tensors, process) = open_said(path, key)?;
                return Ok(Self {
                    tensors: tensors.unwrapped(),
                    metadata: BTreeMap::new(),
                    process,
                });
            }
        };
        let tensors = match key {
            _ if is_snapshot(&metadata) => snapshot::model(&tensors, &metadata, key, path)?,
            None => tensors.unwrapped(),
            Some(key) => {
                return Err(WeightsError::Model {
                    path: path.to_owned(),
                    problem: format!(
                        "it has no state dict `{key}`: it holds one model. Several are in PyTorch's files and in checkpoints of a training"
                    ),
                });
            }
        };
        Ok(Self {
            tensors,
            metadata,
            process: None,
        })
    }
}
