//! The stage that trains a pruned model back to quality.

use serde::Serialize;

use super::optimisation::{Meanwhile, POSITIVE, label_drop, optimisation};
use super::source::{Lineage, Source};
use crate::recipe::document::reader::Section;
use crate::recipe::document::{Node, string_in};
use crate::training::Optimisation;

/// `kind = "recover"`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recover {
    /// The model to recover.
    pub from: Source,
    /// The loss.
    #[serde(flatten)]
    pub method: RecoverMethod,
    /// Budget and schedule.
    #[serde(flatten)]
    pub optimisation: Optimisation,
    /// Probability of replacing a label by the null class, for student and teacher alike; default
    /// 0.1.
    pub label_drop: f64,
    /// How it is measured while it is trained, if it is.
    #[serde(flatten)]
    pub meanwhile: Option<Meanwhile>,
}

/// Loss for the training of a pruned model.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "method", rename_all = "kebab-case")]
pub enum RecoverMethod {
    /// The diffusion loss alone.
    FineTune,
    /// The diffusion loss and the teacher's output.
    Kd {
        /// Teacher and weight.
        #[serde(flatten)]
        distillation: TeacherTerm,
    },
    /// As `Kd`, and the teacher's hidden states.
    RepKd {
        /// Teacher and weight.
        #[serde(flatten)]
        distillation: TeacherTerm,
        /// Compared hidden states, and their weight.
        #[serde(flatten)]
        representation: Representation,
    },
    /// As `RepKd`, without activations far from the mean.
    MaskedKd {
        /// Teacher and weight.
        #[serde(flatten)]
        distillation: TeacherTerm,
        /// Compared hidden states, and their weight.
        #[serde(flatten)]
        representation: Representation,
        /// Distance from the mean, in standard deviations, from which activations are left out;
        /// default 2.
        k: f64,
    },
}

/// Settings of any distillation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TeacherTerm {
    /// The teacher.
    pub teacher: Source,
    /// Weight of the teacher's output; the diffusion loss has `1 - alpha`. Default 0.9.
    pub alpha: f64,
}

/// Settings of the distillation of hidden states.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Representation {
    /// Weight of the hidden states at the first and the last step, linear in between; default
    /// `[0.01, 0.0]`.
    pub beta: [f64; 2],
    /// `[student, teacher]` layers to compare; by default they follow from the kept layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub taps: Option<Vec<[usize; 2]>>,
}

#[derive(Clone, Copy)]
enum Method {
    FineTune,
    Kd,
    RepKd,
    MaskedKd,
}

const METHODS: [(&str, Method); 4] = [
    ("fine-tune", Method::FineTune),
    ("kd", Method::Kd),
    ("rep-kd", Method::RepKd),
    ("masked-kd", Method::MaskedKd),
];

/// Keys that some methods read and others do not.
const KEYS: &[&str] = &["teacher", "alpha", "beta", "k", "taps"];

impl Recover {
    pub(crate) fn read(section: &Section<'_>, lineage: Lineage<'_>) -> Option<Self> {
        let from = lineage.from(section);
        let method = section.choice("method", &METHODS).required();
        let optimisation = optimisation(section, 2e-4, 0.5);
        let label_drop = label_drop(section);
        let meanwhile = Meanwhile::read(section);
        let Some(method) = method else {
            section.accept(KEYS);
            return None;
        };

        let read = match method {
            Method::FineTune => Some(RecoverMethod::FineTune),
            Method::Kd => TeacherTerm::read(section, lineage)
                .map(|distillation| RecoverMethod::Kd { distillation }),
            Method::RepKd => {
                let distillation = TeacherTerm::read(section, lineage);
                let representation = Representation::read(section);
                distillation.map(|distillation| RecoverMethod::RepKd {
                    distillation,
                    representation,
                })
            }
            Method::MaskedKd => {
                let distillation = TeacherTerm::read(section, lineage);
                let representation = Representation::read(section);
                let k = section.float("k", POSITIVE).or(2.0);
                distillation.map(|distillation| RecoverMethod::MaskedKd {
                    distillation,
                    representation,
                    k,
                })
            }
        };
        let name = string_in(section.table(), "method").unwrap_or_default();
        section.refuse(KEYS, &format!("method {name:?}"));
        Some(Self {
            from: from?,
            method: read?,
            optimisation: optimisation?,
            label_drop,
            meanwhile,
        })
    }
}

impl TeacherTerm {
    fn read(section: &Section<'_>, lineage: Lineage<'_>) -> Option<Self> {
        let teacher = section
            .value("teacher", |node| lineage.source(node))
            .required();
        let alpha = section.float("alpha", 0.0..=1.0).or(0.9);
        Some(Self {
            teacher: teacher?,
            alpha,
        })
    }
}

impl Representation {
    fn read(section: &Section<'_>) -> Self {
        let pair = |node: &Node| node.pair("two integers", |item| item.integer(&(0..=4095)));
        Self {
            beta: section.float_pair("beta", 0.0..).or([0.01, 0.0]),
            taps: section.list("taps", pair).optional(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::schema::StageKind;
    use crate::recipe::schema::tests::{messages, second, stage};

    #[test]
    fn masked_distillation_defaults() {
        let text = "kind = 'recover'\nmethod = 'masked-kd'\nsteps = 1\nteacher = 'embedded:digits-teacher'";
        let StageKind::Recover(recover) = second(text) else {
            panic!()
        };
        let RecoverMethod::MaskedKd {
            distillation,
            representation,
            k,
        } = recover.method
        else {
            panic!()
        };
        assert_eq!((distillation.alpha, k), (0.9, 2.0));
        assert_eq!(
            (representation.beta, representation.taps),
            ([0.01, 0.0], None)
        );
        assert_eq!(
            messages(&stage("kind = 'recover'\nmethod = 'kd'\nsteps = 1")),
            ["missing key `teacher` in [[stage]] \"recover\""]
        );
        assert_eq!(
            messages(&stage("kind = 'recover'\nsteps = 1")),
            ["missing key `method` in [[stage]] \"recover\""]
        );
    }
}
