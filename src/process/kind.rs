//! Kinds of processes that networks are trained under.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::family::{FAMILIES, Family};
use super::interpolant::{Path, Predicts, Weighting};
use super::masked::{Masking, Rounds};
use super::transport::Ode;
use super::{AnyProcess, GaussianDiffusion, Interpolant, Solver};
use crate::models::Architecture;

/// The process that a network was trained to reverse. Only a MAR's tensors tell: a SiT has the
/// names and shapes of a DiT.
///
/// Files and people write it as a word, an interpolant other than SiT's published one with what it
/// is: `gaussian`, `interpolant`, `interpolant:gvp:noise:velocity`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessKind {
    /// Gaussian diffusion in 1000 steps, as of DiT.
    Gaussian,
    /// A stochastic interpolant over continuous time, as of SiT.
    Interpolant(Along),
    /// Gaussian diffusion of single tokens over the cosine schedule, under a network that is shown
    /// other tokens of their image, as of MAR.
    Masked,
}

/// Which interpolant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Along {
    /// How data and noise are mixed over time.
    pub path: Path,
    /// What the network predicts.
    pub predicts: Predicts,
    /// Weight over time of its loss.
    pub weighting: Weighting,
}

impl Along {
    /// SiT's published one: the velocity of the linear path.
    pub const PUBLISHED: Self = Self {
        path: Path::Linear,
        predicts: Predicts::Velocity,
        weighting: Weighting::None,
    };
}

/// The word of a value in a table of names.
fn word<T: PartialEq>(names: &[(&'static str, T)], value: &T) -> &'static str {
    let found = names.iter().find(|(_, other)| other == value);
    found.map_or("", |(name, _)| name)
}

/// The value of a word in a table of names, in any case.
fn named<T: Copy>(names: &[(&'static str, T)], word: &str) -> Option<T> {
    let found = names
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(word));
    found.map(|(_, value)| *value)
}

impl FromStr for ProcessKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((_, known)) = Self::NAMES.iter().find(|(name, _)| *name == text) {
            return Ok(*known);
        }
        let along = || {
            let mut words = text.strip_prefix("interpolant:")?.split(':');
            let along = Along {
                path: named(&Path::NAMES, words.next()?)?,
                predicts: named(&Predicts::NAMES, words.next()?)?,
                weighting: match words.next() {
                    Some(word) => named(&Weighting::NAMES, word)?,
                    None => Weighting::None,
                },
            };
            words.next().is_none().then_some(along)
        };
        along().map(Self::Interpolant).ok_or_else(|| {
            format!(
                "expected one of {}, found {text:?}; other interpolants are interpolant:PATH:PREDICTS:WEIGHTING, \
                 of {}; {}; {}",
                Self::NAMES.map(|(name, _)| format!("{name:?}")).join(", "),
                Path::NAMES.map(|(name, _)| name).join(", "),
                Predicts::NAMES.map(|(name, _)| name).join(", "),
                Weighting::NAMES.map(|(name, _)| name).join(", ")
            )
        })
    }
}

impl Serialize for ProcessKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.mark())
    }
}

impl<'de> Deserialize<'de> for ProcessKind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl ProcessKind {
    /// SiT's published process.
    pub const SIT: Self = Self::Interpolant(Along::PUBLISHED);

    /// Those of the published families, by their names in recipes, on the command line and in
    /// files.
    pub const NAMES: [(&'static str, Self); 3] = [
        ("gaussian", Self::Gaussian),
        ("interpolant", Self::SIT),
        ("masked", Self::Masked),
    ];

    /// Those whose networks have alike tensors, so that a person may have to state which it is.
    pub const ALIKE: [(&'static str, Self); 2] = [Self::NAMES[0], Self::NAMES[1]];

    /// What a diffusion network is taken for of which nothing says how it was trained.
    pub const ASSUMED: Self = Self::Gaussian;

    /// The word for it.
    pub fn mark(self) -> String {
        match self {
            Self::Gaussian => "gaussian".to_owned(),
            Self::SIT => "interpolant".to_owned(),
            Self::Masked => "masked".to_owned(),
            Self::Interpolant(along) => format!(
                "interpolant:{}:{}:{}",
                word(&Path::NAMES, &along.path),
                word(&Predicts::NAMES, &along.predicts),
                word(&Weighting::NAMES, &along.weighting)
            ),
        }
    }

    /// Which interpolant, if it is another than the published one.
    pub fn along(self) -> Option<Along> {
        match self {
            Self::Interpolant(along) if along != Along::PUBLISHED => Some(along),
            _ => None,
        }
    }

    /// The process.
    pub fn process(self) -> AnyProcess {
        match self {
            Self::Gaussian => GaussianDiffusion::full().into(),
            Self::Masked => GaussianDiffusion::full_cosine().into(),
            Self::Interpolant(Along {
                path,
                predicts,
                weighting,
            }) => Interpolant::new(path, predicts, weighting, None, None).into(),
        }
    }

    /// The solver that the family's published models are sampled by.
    pub fn solver(self) -> Solver {
        match self {
            Self::Gaussian => Solver::Ddpm { clip: false },
            Self::Interpolant(_) => Solver::Ode(Ode::DOPRI5),
            Self::Masked => Solver::Masked(Rounds::PUBLISHED),
        }
    }

    /// The process that a network must have been trained under, where its tensors tell.
    pub fn of_network(network: &Architecture) -> Option<Self> {
        network.patch_filled_in().map(|_| Self::Masked)
    }

    /// What a network is taken for of which nothing says how it was trained.
    pub fn assumed_of(network: &Architecture) -> Self {
        Self::of_network(network).unwrap_or(Self::ASSUMED)
    }

    /// How samples of a network are masked in training; None where whole samples are noised.
    pub fn masking(self, network: &Architecture) -> Option<Masking> {
        let patch = network.patch_filled_in()?;
        (self == Self::Masked).then_some(Masking::published(patch))
    }

    /// The solvers that sample it, as a recipe names them.
    pub fn solvers(self) -> &'static str {
        match self {
            Self::Gaussian => "\"ddpm\" or \"ddim\"",
            Self::Interpolant(_) => "\"ode\" or \"sde\"",
            Self::Masked => "\"masked\"",
        }
    }

    /// The fewest steps that sampling can take.
    pub fn least_steps(self) -> usize {
        match self {
            Self::Gaussian | Self::Masked => 1,
            // The start and the end of an equation.
            Self::Interpolant(_) => 2,
        }
    }

    /// Whether a weight file of another program says nothing of this process, and is not taken for
    /// it.
    pub fn must_be_stated(self) -> bool {
        matches!(self, Self::Interpolant(_))
    }

    /// The family whose models are trained under it.
    pub fn family(self) -> &'static Family {
        let alike = |other: Self| std::mem::discriminant(&other) == std::mem::discriminant(&self);
        let found = FAMILIES
            .iter()
            .find(|family| family.process.is_some_and(alike));
        found.unwrap_or_else(|| unreachable!("each process has a family in the table"))
    }

    /// What a model is called, in words; the family by the process, which says more than the
    /// tensors.
    pub fn called(process: Option<Self>, model: &impl fmt::Display) -> String {
        let text = model.to_string();
        match (process, text.strip_prefix(Self::ASSUMED.family().title)) {
            (Some(process), Some(sizes)) => format!("{}{sizes}", process.family().title),
            _ => text,
        }
    }

    /// The process of a reference's training script, by the arguments that it had.
    pub(crate) fn of_arguments<'a>(argument: impl Fn(&str) -> Option<&'a str>) -> Option<Self> {
        // SiT's script alone names a path between data and noise.
        let path = named(&Path::NAMES, argument("path_type")?)?;
        let predicts = argument("prediction").and_then(|word| named(&Predicts::NAMES, word));
        let weighting = argument("loss_weight").and_then(|word| named(&Weighting::NAMES, word));
        Some(Self::Interpolant(Along {
            path,
            predicts: predicts.unwrap_or(Predicts::Velocity),
            weighting: weighting.unwrap_or(Weighting::None),
        }))
    }

    /// How a person states one, for messages: `--process gaussian` or ... with these pieces around
    /// each name.
    pub fn stated(before: &str, after: &str) -> String {
        let each = Self::ALIKE.map(|(name, _)| format!("`{before}{name}{after}`"));
        each.join(" or ")
    }

    /// The process of a model by its name, such as `SiT-XL/2`; None for names of other families.
    pub fn of_model(name: &str) -> Option<Self> {
        Family::of_model(name).and_then(|family| family.process)
    }
}

impl fmt::Display for ProcessKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Gaussian => f.write_str("gaussian diffusion (a DiT)"),
            Self::SIT => f.write_str("an interpolant (a SiT)"),
            Self::Masked => f.write_str("masked autoregression (a MAR)"),
            Self::Interpolant(Along {
                path,
                predicts,
                weighting,
            }) => write!(
                f,
                "an interpolant of path {}, predicting the {} with weight {} (a SiT)",
                word(&Path::NAMES, &path),
                word(&Predicts::NAMES, &predicts),
                word(&Weighting::NAMES, &weighting)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_as_they_are_written() {
        for (name, kind) in ProcessKind::NAMES {
            assert_eq!(kind.mark(), name);
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{name}\""));
            assert!(kind.solver().samples(kind));
        }
        for (_, path) in Path::NAMES {
            for (_, predicts) in Predicts::NAMES {
                for (_, weighting) in Weighting::NAMES {
                    let kind = ProcessKind::Interpolant(Along {
                        path,
                        predicts,
                        weighting,
                    });
                    assert_eq!(kind.mark().parse(), Ok(kind));
                    assert_eq!(kind.family().name, "sit");
                }
            }
        }
        let short = "interpolant:vp:score".parse::<ProcessKind>();
        assert_eq!(short.unwrap().mark(), "interpolant:vp:score:none");
        for wrong in [
            "",
            "sit",
            "interpolant:",
            "interpolant:vp",
            "interpolant:vp:score:none:x",
        ] {
            let error = wrong.parse::<ProcessKind>().unwrap_err();
            assert!(
                error.contains("gvp") && error.contains("likelihood"),
                "{error}"
            );
        }
        assert_eq!(ProcessKind::of_model("mar_base"), None);
    }
}
