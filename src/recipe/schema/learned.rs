//! Settings of learned pruning.

use serde::{Serialize, Serializer};

use super::optimisation::{self, POSITIVE, label_drop, positive};
use super::prune::MAX_DEPTH;
use crate::pruning::{Group, GroupError, Groups, Update};
use crate::recipe::document::diagnostic::Diagnostic;
use crate::recipe::document::reader::Section;
use crate::recipe::document::{Node, Value};
use crate::training::Optimisation;

/// Settings of learned pruning.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Learned {
    /// Groups of layers that compete with each other. Up to 4096 ways to choose within a group have
    /// a probability each; of a larger one, such as `"14:28"`, each layer has one.
    pub groups: GroupsSpec,
    /// Budget and schedule of the update.
    #[serde(flatten)]
    pub optimisation: Optimisation,
    /// Probability of replacing a label by the null class; default 0.1.
    pub label_drop: f64,
    /// Weights trained along with the masks, to estimate recoverability; default: a low-rank
    /// update.
    #[serde(flatten)]
    pub update: Update,
    /// Learning rate of the mask logits; default: ten times `lr`.
    pub gate_lr: f64,
    /// Initial value of every mask logit; default 0.02.
    pub gate_init: f64,
    /// Gumbel-softmax temperature at the first and the last step; default `[4.0, 0.1]`.
    pub tau: [f64; 2],
    /// Factor on the logits at the first and the last step; default `[100.0, 100.0]`.
    pub scaling: [f64; 2],
}

/// Groups of layers; their sum is checked once the model's depth is known.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum GroupsSpec {
    /// `"1:2"`: one group, repeated to fill the trunk.
    Ratio(#[serde(serialize_with = "as_ratio")] Group),
    /// `[[2, 4], [3, 4]]`: each group in order.
    Pairs(Vec<Group>),
}

fn as_ratio<S: Serializer>(group: &Group, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(group)
}

impl GroupsSpec {
    /// The groups of a trunk of `depth` layers.
    ///
    /// # Errors
    ///
    /// If the groups do not fill it exactly.
    pub fn resolve(&self, depth: usize) -> Result<Groups, GroupError> {
        match self {
            Self::Ratio(group) => Groups::repeat(*group, depth),
            Self::Pairs(groups) => Groups::new(groups.clone(), depth),
        }
    }

    fn parse(node: &Node) -> Result<Self, Diagnostic> {
        let place = |node: &Node, error: GroupError| node.fault(error.to_string());
        let group = |node: &Node| {
            let [keep, of] = node.pair("two integers", |item| item.integer(&(0..=MAX_DEPTH)))?;
            Group::new(keep, of).map_err(|error| place(node, error))
        };
        let spec = match &node.value {
            Value::String(ratio) => Self::Ratio(ratio.parse().map_err(|error| place(node, error))?),
            Value::Array(items) if items.is_empty() => return Err(node.fault("must not be empty")),
            Value::Array(items) => Self::Pairs(items.iter().map(group).collect::<Result<_, _>>()?),
            _ => return Err(node.mismatch("\"N:M\" or a list of [N, M]")),
        };
        let groups = match &spec {
            Self::Ratio(group) => std::slice::from_ref(group),
            Self::Pairs(groups) => groups,
        };
        match groups.iter().all(|group| group.keep() == group.of()) {
            true => Err(place(node, GroupError::RemovesNothing)),
            false => Ok(spec),
        }
    }
}

impl Learned {
    pub(super) fn read(section: &Section<'_>) -> Option<Self> {
        let groups = section.value("groups", GroupsSpec::parse).required();
        let optimisation = optimisation::optimisation(section, 1e-4, 1.0);
        let label_drop = label_drop(section);
        let update = read_update(section);
        let gate_lr = section.float("gate_lr", positive(10.0)).optional();
        let gate_init = section.float("gate_init", ..).or(0.02);
        let tau = section.float_pair("tau", POSITIVE).or([4.0, 0.1]);
        let scaling = section.float_pair("scaling", POSITIVE).or([100.0, 100.0]);

        let optimisation = optimisation?;
        Some(Self {
            groups: groups?,
            gate_lr: gate_lr.unwrap_or(10.0 * optimisation.lr),
            optimisation,
            label_drop,
            update,
            gate_init,
            tau,
            scaling,
        })
    }
}

fn read_update(section: &Section<'_>) -> Update {
    let names = [("lora", "lora"), ("full", "full"), ("frozen", "frozen")];
    let name = section.choice("update", &names).or("lora");
    if name != "lora" {
        section.refuse(&["rank", "alpha"], &format!("update {name:?}"));
    }
    match name {
        "full" => Update::Full,
        "frozen" => Update::Frozen,
        _ => {
            let rank = section.integer("rank", 1..=65_536).or(8);
            let alpha = section.float("alpha", POSITIVE).or(2.0 * rank as f64);
            Update::Lora { rank, alpha }
        }
    }
}
