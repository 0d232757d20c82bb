//! The stage that trains a model from scratch, or continues with an existing one.

use std::ops::Bound;

use serde::{Serialize, Serializer};

use super::data::DataShape;
use super::optimisation::{Meanwhile, label_drop, optimisation};
use super::source::{Lineage, Source};
use crate::models::{Architecture, Demand, Key, Keys, Shape};
use crate::process::{FAMILIES, Family, ProcessKind};
use crate::recipe::document::reader::Section;
use crate::recipe::document::string_in;
use crate::training::Optimisation;

/// `kind = "train"`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Train {
    /// The model to continue with; without it, a model is trained from scratch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<Source>,
    /// Budget and schedule.
    #[serde(flatten)]
    pub optimisation: Optimisation,
    /// Probability of replacing a label by the null class; default 0.1. Not used by a classifier.
    pub label_drop: f64,
    /// How it is measured while it is trained, if it is.
    #[serde(flatten)]
    pub meanwhile: Option<Meanwhile>,
    /// The model to train; required without `from`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architecture: Option<Wanted>,
}

impl Train {
    pub(crate) fn read(
        section: &Section<'_>,
        lineage: Lineage<'_>,
        data: Option<&DataShape>,
    ) -> Option<Self> {
        let from = section.value("from", |node| lineage.source(node));
        let from_scratch = from.is_absent();
        let from = from.optional();
        let optimisation = optimisation(section, 1e-3, 0.0);
        let label_drop = label_drop(section);
        let meanwhile = Meanwhile::read(section);
        let architecture = section.section("architecture");
        let architecture = if from_scratch {
            architecture.required_since("without `from` a model is trained from scratch")
        } else {
            architecture.optional()
        };
        Some(Self {
            from,
            architecture: architecture.and_then(|section| Wanted::read(section, data)),
            label_drop,
            meanwhile,
            optimisation: optimisation?,
        })
    }
}

/// The model to train: the table `architecture`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Wanted {
    /// What its network is, and the process it is trained under.
    pub family: &'static Family,
    /// Which of the family's.
    #[serde(flatten)]
    pub model: Model,
    /// What it is trained under; None of a classifier.
    ///
    /// Left out of the resolved recipe where it is as of the published models, so that runs of
    /// versions without these keys go on.
    #[serde(flatten, serialize_with = "unlike_published")]
    pub process: Option<ProcessKind>,
}

fn unlike_published<S: Serializer>(
    process: &Option<ProcessKind>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    process.and_then(ProcessKind::along).serialize(serializer)
}

/// A model of a family, by name or by its sizes.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Model {
    /// A published one.
    Preset {
        /// Its name.
        preset: String,
    },
    /// Each size on its own.
    #[serde(serialize_with = "Architecture::sizes_alone")]
    Sizes(Architecture),
}

/// What a model reads where neither its table nor the recipe's data say it: the digits.
const DIGITS: Shape = Shape {
    channels: 1,
    side: 8,
    classes: 10,
};

impl Wanted {
    /// The architecture; published transformers are those of ImageNet at 256 x 256.
    pub fn architecture(&self) -> Option<Architecture> {
        match &self.model {
            Model::Preset { preset } => Architecture::preset(preset),
            Model::Sizes(architecture) => Some(architecture.clone()),
        }
    }

    /// Reads the table; sizes of pictures that it does not state are those of the recipe's `data`.
    fn read(section: Section<'_>, data: Option<&DataShape>) -> Option<Self> {
        let families: Vec<_> = FAMILIES
            .iter()
            .map(|family| (family.name, family))
            .collect();
        let family = section.choice("family", &families);
        let has_preset = section.table().contains_key("preset");
        let stated = !family.is_absent();
        let family = if has_preset && family.is_absent() {
            // The preset's name implies the family.
            let name = string_in(section.table(), "preset").unwrap_or_default();
            let assumed = ProcessKind::ASSUMED.family();
            Some(Family::of_model(name).unwrap_or(assumed))
        } else {
            family.required()
        };
        // Of the keys of all families, those that this one does not read are refused.
        let all: Vec<&str> = FAMILIES.iter().flat_map(keys).chain(["preset"]).collect();
        let wanted = family.and_then(|family| {
            let trained = |published| (family.trained)(&mut Asked(&section), published);
            let process = family.process.map(trained);
            if has_preset && !family.presets().is_empty() {
                let presets: Vec<&str> = match stated {
                    true => family.presets(),
                    false => Architecture::presets().collect(),
                };
                let presets: Vec<_> = presets.into_iter().map(|name| (name, name)).collect();
                let preset = section.choice("preset", &presets);
                let preset = preset.optional();
                section.refuse(&all, "a preset");
                let preset = preset?.to_owned();
                let model = Model::Preset { preset };
                return Some(Self {
                    family,
                    model,
                    process,
                });
            }
            let samples = data.map_or(DIGITS, DataShape::sizes);
            let architecture = (family.read)(&mut Asked(&section), samples);
            section.refuse(&all, &format!("family {:?}", family.name));
            let model = Model::Sizes(architecture);
            Some(Self {
                family,
                model,
                process,
            })
        });
        if family.is_none() {
            section.accept(&all);
        }
        section.finish();
        wanted
    }
}

/// The keys that a family reads.
fn keys(family: &Family) -> Vec<&'static str> {
    let mut names = Names(Vec::new());
    (family.read)(&mut names, DIGITS);
    if let Some(published) = family.process {
        (family.trained)(&mut names, published);
    }
    names.0
}

/// Notes the names of keys.
struct Names(Vec<&'static str>);

impl Keys for Names {
    fn integer(&mut self, key: Key<usize>, _: Option<Demand<'_>>) -> usize {
        self.0.push(key.name);
        key.default
    }

    fn float(&mut self, key: Key<f64>) -> f64 {
        self.0.push(key.name);
        key.default
    }

    fn boolean(&mut self, name: &'static str, default: bool) -> bool {
        self.0.push(name);
        default
    }

    fn choice(&mut self, name: &'static str, _: &[&'static str]) -> usize {
        self.0.push(name);
        0
    }
}

/// A recipe's table, asked for a configuration's keys.
struct Asked<'a, 'b>(&'a Section<'b>);

impl Keys for Asked<'_, '_> {
    fn integer(&mut self, key: Key<usize>, demand: Option<Demand<'_>>) -> usize {
        let value = self.0.integer(key.name, key.least..=key.most);
        match demand {
            Some(Demand { holds, must }) => {
                value.or_checked(key.default, |value| holds(*value), &format!("must {must}"))
            }
            None => value.or(key.default),
        }
    }

    fn float(&mut self, key: Key<f64>) -> f64 {
        let range = (Bound::Excluded(key.least), Bound::Included(key.most));
        self.0.float(key.name, range).or(key.default)
    }

    fn boolean(&mut self, name: &'static str, default: bool) -> bool {
        self.0.boolean(name).or(default)
    }

    fn choice(&mut self, name: &'static str, words: &[&'static str]) -> usize {
        let places: Vec<_> = words.iter().copied().zip(0..).collect();
        self.0.choice(name, &places).or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{ClassifierConfig, presets};
    use crate::recipe::schema::StageKind;
    use crate::recipe::schema::tests::{errors, messages, second, stage};

    #[test]
    fn train_takes_an_architecture_or_a_checkpoint() {
        assert_eq!(
            messages(&stage("kind = 'train'\nsteps = 1")),
            ["missing key `architecture` in [[stage]] \"train\": \
          without `from` a model is trained from scratch"]
        );
        let StageKind::Train(train) = second("kind = 'train'\nsteps = 1\nfrom = 'base'") else {
            panic!()
        };
        assert_eq!(
            (train.from, train.architecture),
            (Some(Source::Stage("base".to_owned())), None)
        );
    }

    #[test]
    fn architectures() {
        let architecture = |fields: &str| {
            let text = format!("kind = 'train'\nsteps = 1\narchitecture = {{ {fields} }}");
            let StageKind::Train(train) = second(&text) else {
                panic!()
            };
            train.architecture.unwrap()
        };
        let Model::Sizes(Architecture::Dit(sizes)) =
            architecture("family = 'dit', depth = 6").model
        else {
            panic!()
        };
        assert_eq!(
            (sizes.depth, sizes.width, sizes.heads, sizes.mlp_ratio),
            (6, 64, 4, 4.0)
        );
        assert!(sizes.learn_sigma);
        for preset in presets::PRESETS.iter().map(|preset| preset.name) {
            let wanted = architecture(&format!("preset = {preset:?}"));
            let family = match preset.starts_with("SiT") {
                true => "sit",
                false => "dit",
            };
            assert_eq!(wanted.family.name, family);
            let preset = preset.to_owned();
            assert_eq!(wanted.model, Model::Preset { preset });
        }
        let classifier = architecture("family = 'classifier', width = 32");
        assert_eq!(
            classifier.model,
            Model::Sizes(Architecture::Classifier(ClassifierConfig {
                width: 32,
                channels: 1,
                input_size: 8,
                classes: 10
            }))
        );
    }

    #[test]
    fn architectures_that_cannot_be_built_are_refused() {
        let wrong = |fields: &str| {
            messages(&stage(&format!(
                "kind = 'train'\nsteps = 1\narchitecture = {{ {fields} }}"
            )))
        };
        assert_eq!(
            wrong("family = 'dit', input_size = 8, patch_size = 3, heads = 3"),
            [
                "`width`, by default 64, must be a multiple of 4 and of `heads`, which is 3",
                "`patch_size`: must divide `input_size`, which is 8",
            ]
        );
        assert_eq!(
            wrong("family = 'dit', width = 6, heads = 2"),
            ["`width`: must be a multiple of 4 and of `heads`, which is 2"]
        );
        assert_eq!(
            wrong("preset = 'DiT-XL/2', width = 8"),
            ["`width` is not used by a preset"]
        );
        assert_eq!(
            wrong("family = 'classifier', depth = 2"),
            ["`depth` is not used by family \"classifier\""]
        );
        assert_eq!(
            wrong("width = 8"),
            ["missing key `family` in `architecture` of [[stage]] \"train\""]
        );
        let text = stage("kind = 'train'\nsteps = 1\narchitecture = { preset = 'DiT-XL/3' }");
        let errors = errors(&text);
        assert!(
            errors.items()[0]
                .suggestion
                .as_deref()
                .is_some_and(|near| near.starts_with("DiT-XL/"))
        );
    }
}
