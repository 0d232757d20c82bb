//! Checkpoints inside the binary, so that the quickstart needs no files.

use std::path::Path;

use crate::state::WeightsError;
use crate::weights::Checkpoint;

/// A checkpoint embedded in the binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmbeddedName {
    /// The diffusion transformer trained on digits.
    DigitsTeacher,
    /// The digits classifier, whose features are compared in evaluation.
    DigitsFeatures,
    /// The diffusion transformer of 28 layers trained on Fashion-MNIST.
    FashionTeacher,
    /// The UNet trained on Fashion-MNIST.
    FashionUnet,
    /// The Fashion-MNIST classifier, whose features are compared in evaluation.
    FashionFeatures,
}

impl EmbeddedName {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::DigitsTeacher,
        Self::DigitsFeatures,
        Self::FashionTeacher,
        Self::FashionUnet,
        Self::FashionFeatures,
    ];

    /// Its name in recipes, prefix included.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::DigitsTeacher => "embedded:digits-teacher",
            Self::DigitsFeatures => "embedded:digits-features",
            Self::FashionTeacher => "embedded:fashion-teacher",
            Self::FashionUnet => "embedded:fashion-unet",
            Self::FashionFeatures => "embedded:fashion-features",
        }
    }
}

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
        EmbeddedName::FashionUnet => {
            include_bytes!("../../artifacts/pretrained/fashion-unet.safetensors")
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
