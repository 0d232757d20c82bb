//! The stage that trains a model from scratch, or trains an existing one on.

use serde::Serialize;

use super::data::Shape;
use super::optimisation::{label_drop, optimisation, positive};
use super::source::{Lineage, Source};
use crate::models::zoo::PRESETS;
use crate::models::{ClassifierConfig, DitConfig};
use crate::process::ProcessKind;
use crate::recipe::document::reader::Section;
use crate::recipe::document::string_in;
use crate::training::Optimisation;

/// `kind = "train"`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Train {
    /// What to train on; `None` trains from scratch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<Source>,
    /// Budget and schedule.
    #[serde(flatten)]
    pub optimisation: Optimisation,
    /// How often a label is replaced by the null class. A classifier has no use for it.
    pub label_drop: f64,
    /// What to train; always there without `from`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architecture: Option<Architecture>,
}

impl Train {
    pub(crate) fn read(
        section: &Section<'_>,
        lineage: Lineage<'_>,
        data: Option<&Shape>,
    ) -> Option<Self> {
        let from = section.value("from", |node| lineage.source(node));
        let from_scratch = from.is_absent();
        let from = from.optional();
        let optimisation = optimisation(section, 1e-3, 0.0);
        let label_drop = label_drop(section);
        let architecture = section.section("architecture");
        let architecture = if from_scratch {
            architecture.required_since("without `from` a model is trained from scratch")
        } else {
            architecture.optional()
        };
        Some(Self {
            from,
            architecture: architecture.and_then(|section| Architecture::read(section, data)),
            label_drop,
            optimisation: optimisation?,
        })
    }
}

/// The model to train: the table `architecture`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "family", rename_all = "kebab-case")]
pub enum Architecture {
    /// A diffusion transformer, trained by Gaussian diffusion.
    Dit(Dit),
    /// The same network, trained by an interpolant.
    Sit(Dit),
    /// A small convolutional classifier, which makes features for evaluation.
    Classifier(ClassifierConfig),
}

/// A diffusion transformer, by name or by its sizes.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Dit {
    /// One of [`PRESETS`].
    Preset {
        /// Its name.
        preset: String,
    },
    /// Each size on its own.
    Sizes(DitConfig),
}

#[derive(Clone, Copy)]
enum Family {
    Dit,
    Sit,
    Classifier,
}

impl Family {
    fn process(self) -> Option<ProcessKind> {
        match self {
            Self::Dit => Some(ProcessKind::Gaussian),
            Self::Sit => Some(ProcessKind::Interpolant),
            Self::Classifier => None,
        }
    }

    fn of(self, sizes: Dit) -> Architecture {
        match self {
            Self::Sit => Architecture::Sit(sizes),
            Self::Dit | Self::Classifier => Architecture::Dit(sizes),
        }
    }
}

const KEYS: &[&str] = &[
    "preset",
    "input_size",
    "patch_size",
    "channels",
    "width",
    "depth",
    "heads",
    "mlp_ratio",
    "classes",
    "learn_sigma",
];

impl Architecture {
    /// The process it is trained under; None of a classifier.
    pub fn process(&self) -> Option<ProcessKind> {
        match self {
            Self::Dit(_) => Some(ProcessKind::Gaussian),
            Self::Sit(_) => Some(ProcessKind::Interpolant),
            Self::Classifier(_) => None,
        }
    }

    /// Reads the table; sizes of pictures that it does not state are those of the recipe's `data`.
    fn read(section: Section<'_>, data: Option<&Shape>) -> Option<Self> {
        let families = [
            ("dit", Family::Dit),
            ("sit", Family::Sit),
            ("classifier", Family::Classifier),
        ];
        let family = section.choice("family", &families);
        let has_preset = section.table().contains_key("preset");
        let family = if has_preset && family.is_absent() {
            // What the name says.
            let name = string_in(section.table(), "preset").unwrap_or_default();
            Some(match ProcessKind::of_model(name) {
                Some(ProcessKind::Interpolant) => Family::Sit,
                _ => Family::Dit,
            })
        } else {
            family.required()
        };
        let architecture = match family {
            Some(family @ (Family::Dit | Family::Sit)) if has_preset => {
                let wanted = family.process();
                let names: Vec<_> = PRESETS
                    .iter()
                    .filter(|preset| ProcessKind::of_model(preset.name) == wanted)
                    .map(|preset| (preset.name, preset.name))
                    .collect();
                let preset = section.choice("preset", &names).optional();
                section.refuse(KEYS, "a preset");
                preset.map(|name| {
                    let preset = name.to_owned();
                    family.of(Dit::Preset { preset })
                })
            }
            Some(family @ (Family::Dit | Family::Sit)) => {
                Some(family.of(Dit::Sizes(read_sizes(&section, data))))
            }
            Some(Family::Classifier) => {
                let width = section
                    .integer("width", 4..=4096)
                    .check(
                        |width: &usize| width.is_multiple_of(4),
                        "must be a multiple of 4",
                    )
                    .or(64);
                let Pictured {
                    input_size,
                    channels,
                    classes,
                } = Pictured::read(&section, data);
                section.refuse(KEYS, "family \"classifier\"");
                Some(Self::Classifier(ClassifierConfig {
                    width,
                    channels,
                    input_size,
                    classes,
                }))
            }
            None => {
                section.accept(KEYS);
                None
            }
        };
        section.finish();
        architecture
    }
}

/// What a model reads: the keys that the data have a say in.
struct Pictured {
    input_size: usize,
    channels: usize,
    classes: usize,
}

impl Pictured {
    fn read(section: &Section<'_>, data: Option<&Shape>) -> Self {
        let [side, channels, classes] =
            data.map_or([8, 1, 10], |data| [data.side, data.channels, data.classes]);
        Self {
            input_size: section.integer("input_size", 1..=4096).or(side),
            channels: section.integer("channels", 1..=1024).or(channels),
            classes: section.integer("classes", 1..=1_000_000).or(classes),
        }
    }
}

fn read_sizes(section: &Section<'_>, data: Option<&Shape>) -> DitConfig {
    {
        let Pictured {
            input_size,
            channels,
            classes,
        } = Pictured::read(section, data);
        let patch_size = section.integer("patch_size", 1..=4096).or_checked(
            2,
            |patch| input_size.is_multiple_of(*patch),
            &format!("must divide `input_size`, which is {input_size}"),
        );
        let heads: usize = section.integer("heads", 1..=1024).or(4);
        let width = section.integer("width", 1..=65_536).or_checked(
            64,
            |width: &usize| width.is_multiple_of(heads) && width.is_multiple_of(4),
            &format!("must be a multiple of 4 and of `heads`, which is {heads}"),
        );
        DitConfig {
            input_size,
            patch_size,
            channels,
            width,
            depth: section.integer("depth", 1..=1024).or(12),
            heads,
            mlp_ratio: section.float("mlp_ratio", positive(64.0)).or(4.0),
            classes,
            learn_sigma: section.boolean("learn_sigma").or(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let Architecture::Dit(Dit::Sizes(sizes)) = architecture("family = 'dit', depth = 6") else {
            panic!()
        };
        assert_eq!(
            (sizes.depth, sizes.width, sizes.heads, sizes.mlp_ratio),
            (6, 64, 4, 4.0)
        );
        assert!(sizes.learn_sigma);
        for preset in PRESETS.iter().map(|preset| preset.name) {
            let sizes = Dit::Preset {
                preset: preset.to_owned(),
            };
            let expected = match preset.starts_with("SiT") {
                true => Architecture::Sit(sizes),
                false => Architecture::Dit(sizes),
            };
            assert_eq!(architecture(&format!("preset = {preset:?}")), expected);
        }
        assert_eq!(
            architecture("family = 'classifier', width = 32"),
            Architecture::Classifier(ClassifierConfig {
                width: 32,
                channels: 1,
                input_size: 8,
                classes: 10
            })
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
