//! A weight file, opened: the tensors that were asked for, and what the file says beside them.

use std::collections::BTreeMap;
use std::path::Path;

use super::WeightFile;
use super::safetensors::open_safetensors;
use super::shards::open_shards;
use super::snapshot::{self, is_snapshot};
use super::torch::open_said;
use crate::process::ProcessKind;
use crate::state::{Tensors, WeightsError};

/// What a file holds.
pub(super) struct Opened {
    /// Its tensors, under the names of the model itself.
    pub(super) tensors: Tensors,
    /// Its metadata; none of a PyTorch file.
    pub(super) metadata: BTreeMap<String, String>,
    /// The process that the arguments of a training tell, which are kept in PyTorch files.
    pub(super) process: Option<ProcessKind>,
}

impl Opened {
    /// Opens a file of a kind; of several state dicts in it, that of `key`, or the best.
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
