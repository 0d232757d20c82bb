//! The families of models: a network, and the process that its models are trained under.

use std::fmt;

use serde::{Serialize, Serializer};

use super::interpolant::{Path, Predicts, Weighting};
use super::kind::{Along, ProcessKind};
use crate::models::{
    Architecture, ClassifierConfig, DitConfig, Keys, MarConfig, Shape, UnetConfig,
};

/// A family of models.
pub struct Family {
    /// Its name in a recipe.
    pub name: &'static str,
    /// Its name in words, with which the names of its published models begin.
    pub title: &'static str,
    /// What its published models are trained under; None of a classifier.
    pub process: Option<ProcessKind>,
    /// Reads what a model is trained under, where that is not as of the published ones.
    pub trained: fn(&mut dyn Keys, ProcessKind) -> ProcessKind,
    /// Reads the sizes of a model, those of its samples being the given ones where none are said.
    pub read: fn(&mut dyn Keys, Shape) -> Architecture,
}

/// All of them.
#[rustfmt::skip]
pub const FAMILIES: [Family; 5] = [
    Family { name: "dit", title: "DiT", process: Some(ProcessKind::Gaussian), trained: as_published, read: dit },
    Family { name: "sit", title: "SiT", process: Some(ProcessKind::SIT), trained: interpolant, read: dit },
    Family { name: "unet", title: "UNet", process: Some(ProcessKind::Gaussian), trained: as_published, read: unet },
    Family { name: "mar", title: "MAR", process: Some(ProcessKind::Masked), trained: as_published, read: mar },
    Family { name: "classifier", title: "classifier", process: None, trained: as_published, read: classifier },
];

fn as_published(_: &mut dyn Keys, published: ProcessKind) -> ProcessKind {
    published
}

fn interpolant(keys: &mut dyn Keys, _: ProcessKind) -> ProcessKind {
    let path = keys.choice("path", &Path::NAMES.map(|(name, _)| name));
    let predicts = keys.choice("predicts", &Predicts::NAMES.map(|(name, _)| name));
    let weighting = keys.choice("weighting", &Weighting::NAMES.map(|(name, _)| name));
    ProcessKind::Interpolant(Along {
        path: Path::NAMES[path].1,
        predicts: Predicts::NAMES[predicts].1,
        weighting: Weighting::NAMES[weighting].1,
    })
}

// A SiT has a DiT's network.
fn dit(keys: &mut dyn Keys, samples: Shape) -> Architecture {
    Architecture::Dit(DitConfig::read(keys, samples))
}

fn unet(keys: &mut dyn Keys, samples: Shape) -> Architecture {
    Architecture::Unet(UnetConfig::read(keys, samples))
}

fn mar(keys: &mut dyn Keys, samples: Shape) -> Architecture {
    Architecture::Mar(MarConfig::read(keys, samples))
}

fn classifier(keys: &mut dyn Keys, samples: Shape) -> Architecture {
    Architecture::Classifier(ClassifierConfig::read(keys, samples))
}

impl Family {
    /// The family of a published model, by its name.
    pub fn of_model(name: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| {
            let rest = name.strip_prefix(family.title);
            rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphanumeric()))
        })
    }

    /// The names of its published models.
    pub fn presets(&self) -> Vec<&'static str> {
        let own = |name: &&str| Self::of_model(name).is_some_and(|family| family == self);
        Architecture::presets().filter(own).collect()
    }
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.title)
    }
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Serialize for Family {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_known_by_their_family() {
        let family = |name: &str| Family::of_model(name).map(|family| family.name);
        assert_eq!(family("DiT-XL/2"), Some("dit"));
        assert_eq!(family("SiT-tiny"), Some("sit"));
        assert_eq!(family("SiTar"), None);
        assert_eq!(family("mar_base"), None);
        let presets: usize = FAMILIES.iter().map(|family| family.presets().len()).sum();
        assert_eq!(presets, Architecture::presets().count());
    }
}
