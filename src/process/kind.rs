//! Kinds of processes that networks are trained under.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::family::{FAMILIES, Family};
use super::transport::{Ode, Sde};
use super::{AnyProcess, GaussianDiffusion, Interpolant, Solver};

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
    /// Both, by their names in recipes, on the command line and in files.
    pub const NAMES: [(&'static str, Self); 2] = [
        ("gaussian", Self::Gaussian),
        ("interpolant", Self::Interpolant),
    ];

    /// What a diffusion network is taken for of which nothing says how it was trained.
    pub const ASSUMED: Self = Self::Gaussian;

    /// The name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gaussian => "gaussian",
            Self::Interpolant => "interpolant",
        }
    }

    /// The process with the settings of the family's published models.
    pub fn process(self) -> AnyProcess {
        match self {
            Self::Gaussian => GaussianDiffusion::full().into(),
            Self::Interpolant => Interpolant::published().into(),
        }
    }

    /// The solver that the family's published models are sampled by.
    pub fn solver(self) -> Solver {
        match self {
            Self::Gaussian => Solver::Ddpm,
            Self::Interpolant => Solver::Ode(Ode::DOPRI5),
        }
    }

    /// The solvers that sample it, as a recipe names them.
    pub fn solvers(self) -> &'static str {
        match self {
            Self::Gaussian => "\"ddpm\" or \"ddim\"",
            Self::Interpolant => "\"ode\" or \"sde\"",
        }
    }

    /// The solver of a name in its usual setting; `eta` is DDIM's.
    pub fn solver_named(name: &str, eta: f64) -> Option<Solver> {
        Some(match name {
            "ddpm" => Solver::Ddpm,
            "ddim" => Solver::Ddim { eta },
            "ode" => Solver::Ode(Ode::DOPRI5),
            "sde" => Solver::Sde(Sde::default()),
            _ => return None,
        })
    }

    /// The fewest steps that sampling can take.
    pub fn least_steps(self) -> usize {
        match self {
            Self::Gaussian => 1,
            // The start and the end of an equation.
            Self::Interpolant => 2,
        }
    }

    /// Whether a weight file of another program says nothing of this process, and is not taken for it.
    pub fn must_be_stated(self) -> bool {
        self != Self::ASSUMED
    }

    /// The family whose models are trained under it.
    pub fn family(self) -> &'static Family {
        let found = FAMILIES.iter().find(|family| family.process == Some(self));
        found.unwrap_or_else(|| unreachable!("each process has a family in the table"))
    }

    /// What a model is called, in words; the family by the process, which says more than the tensors.
    pub fn called(process: Option<Self>, model: &impl fmt::Display) -> String {
        let text = model.to_string();
        match (process, text.strip_prefix(Self::ASSUMED.family().title)) {
            (Some(process), Some(sizes)) => format!("{}{sizes}", process.family().title),
            _ => text,
        }
    }

    /// The process of a reference's training script, by the arguments that it has.
    pub(crate) fn of_arguments(has: impl Fn(&str) -> bool) -> Option<Self> {
        // SiT's alone names a path between data and noise.
        has("path_type").then_some(Self::Interpolant)
    }

    /// How a person states one, for messages: `--process gaussian` or ... with these pieces around each name.
    pub fn stated(before: &str, after: &str) -> String {
        let each = Self::NAMES.map(|(name, _)| format!("`{before}{name}{after}`"));
        each.join(" or ")
    }

    /// The process of a model by its name, such as `SiT-XL/2`; None for names of other families.
    pub fn of_model(name: &str) -> Option<Self> {
        Family::of_model(name).and_then(|family| family.process)
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
    fn names_are_those_of_files() {
        for (name, kind) in ProcessKind::NAMES {
            assert_eq!(kind.name(), name);
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{name}\""));
            assert_eq!(kind.solver().process(), kind);
        }
        assert_eq!(ProcessKind::of_model("mar_base"), None);
    }
}
