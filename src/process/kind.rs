//! Which process a network was trained under.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{AnyProcess, GaussianDiffusion, Interpolant};

/// The process that a network was trained to reverse. No tensor tells: a SiT has the names and shapes of a DiT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum ProcessKind {
    /// Gaussian diffusion in 1000 steps, as of DiT.
    Gaussian,
    /// A stochastic interpolant over continuous time, as of SiT.
    Interpolant,
}

impl ProcessKind {
    /// Both, by the names that recipes, the command line and files have for them.
    pub const NAMES: [(&'static str, Self); 2] = [
        ("gaussian", Self::Gaussian),
        ("interpolant", Self::Interpolant),
    ];

    /// The name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gaussian => "gaussian",
            Self::Interpolant => "interpolant",
        }
    }

    /// The process, as the family's published models were trained under it.
    pub fn process(self) -> AnyProcess {
        match self {
            Self::Gaussian => GaussianDiffusion::full().into(),
            Self::Interpolant => Interpolant::published().into(),
        }
    }

    /// The family whose models are trained under it.
    pub fn family(self) -> &'static str {
        match self {
            Self::Gaussian => "DiT",
            Self::Interpolant => "SiT",
        }
    }

    /// What a model is called, in words; the family by the process, which says more than the tensors.
    pub fn called(process: Option<Self>, model: &impl fmt::Display) -> String {
        let text = model.to_string();
        match (process, text.strip_prefix(Self::Gaussian.family())) {
            (Some(process), Some(sizes)) => format!("{}{sizes}", process.family()),
            _ => text,
        }
    }

    /// The process of a model by its name, such as `SiT-XL/2`; None for names of other families.
    pub fn of_model(name: &str) -> Option<Self> {
        let mut kinds = Self::NAMES.into_iter().map(|(_, kind)| kind);
        let of = |kind: Self| {
            let rest = name.strip_prefix(kind.family());
            rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphanumeric()))
        };
        kinds.find(|kind| of(*kind))
    }
}

impl fmt::Display for ProcessKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gaussian => f.write_str("gaussian diffusion (a DiT)"),
            Self::Interpolant => f.write_str("an interpolant (a SiT)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_known_by_their_family() {
        let kind = ProcessKind::of_model;
        assert_eq!(kind("DiT-XL/2"), Some(ProcessKind::Gaussian));
        assert_eq!(kind("SiT-tiny"), Some(ProcessKind::Interpolant));
        assert_eq!(kind("SiTar"), None);
        assert_eq!(kind("mar_base"), None);
        for (name, kind) in ProcessKind::NAMES {
            assert_eq!(kind.name(), name);
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{name}\""));
        }
    }
}
