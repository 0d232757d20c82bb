//! Checkpoints inside the binary, so that the quickstart needs no files.

use std::path::Path;

use super::schema::source::EmbeddedName;
use crate::state::WeightsError;
use crate::weights::Checkpoint;

/// Reads an embedded checkpoint.
///
/// # Errors
/// When it is damaged, which a test rules out.
pub fn checkpoint(name: EmbeddedName) -> Result<Checkpoint, WeightsError> {
    let bytes: &'static [u8] = match name {
        EmbeddedName::DigitsTeacher => {
            include_bytes!("../../artifacts/pretrained/digits-teacher.safetensors")
        }
        EmbeddedName::FashionTeacher => {
            include_bytes!("../../artifacts/pretrained/fashion-teacher.safetensors")
        }
        EmbeddedName::FashionFeatures => {
            include_bytes!("../../artifacts/pretrained/fashion-features.safetensors")
        }
        EmbeddedName::DigitsFeatures => {
            include_bytes!("../../artifacts/pretrained/digits-features.safetensors")
        }
    };
    Checkpoint::embedded(bytes, Path::new(name.as_str()))
}
