//! The stages that sample images: for viewing, and for comparing models.

use std::path::PathBuf;

use serde::Serialize;

use super::data::DataShape;
use super::optimisation::positive;
use super::source::{Lineage, Source};
use crate::evaluation::Distances;
use crate::process::Solver;
use crate::process::masked::{GuidanceSchedule, Rounds};
use crate::process::transport::{DiffusionForm, LastStep, Ode, Sde, SdeMethod};
use crate::recipe::document::reader::Section;
use crate::sampling::{DEMO, DEMO_GUIDANCE, Labels, Sampling};
use crate::weights::EmbeddedName;

/// `kind = "sample"`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// The model to sample from.
    pub from: Source,
    /// The autoencoder that decodes latents to images; none for a model of pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<PathBuf>,
    /// Settings of the sampling.
    #[serde(flatten)]
    pub sampling: Sampling,
}

/// `kind = "evaluate"`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluate {
    /// The models to compare, all with the same sampling.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub compare: Vec<Source>,
    /// Reference of the comparison.
    #[serde(flatten)]
    pub against: Against,
    /// Number of neighbours that span the manifolds of precision and recall; default 3.
    pub neighbours: usize,
    /// Settings of the sampling.
    #[serde(flatten)]
    pub sampling: Sampling,
}

/// Reference that samples are compared with.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Against {
    /// A reference batch in Inception's features, with the protocol of ADM's evaluation.
    Reference {
        /// npz archive with its images or their statistics, or a folder of pictures. Default: the
        /// held-out pictures of the recipe's data.
        #[serde(skip_serializing_if = "Option::is_none")]
        reference: Option<PathBuf>,
        /// The Inception network's weights.
        inception: PathBuf,
        /// The autoencoder that decodes latents to images; none for models of pixels.
        #[serde(skip_serializing_if = "Option::is_none")]
        vae: Option<PathBuf>,
        /// Archives or folders of existing samples, measured beside the models' samples; of each,
        /// the first [`count`](Sampling::count).
        #[serde(skip_serializing_if = "Vec::is_empty")]
        samples: Vec<PathBuf>,
        /// Number type of the distances for precision and recall; default f64.
        distances: Distances,
    },
    /// The held-out pictures of the recipe's data, in a classifier's features.
    HeldOut {
        /// The classifier whose features are compared.
        features: Source,
    },
}

impl Sample {
    pub(crate) fn read(section: &Section<'_>, lineage: Lineage<'_>) -> Option<Self> {
        let from = lineage.from(section);
        let vae = section.string("vae").optional().map(PathBuf::from);
        let sampling = Sampling::read(section, 100);
        Some(Self {
            from: from?,
            vae,
            sampling,
        })
    }
}

impl Evaluate {
    pub(crate) fn read(
        section: &Section<'_>,
        lineage: Lineage<'_>,
        data: Option<&DataShape>,
    ) -> Option<Self> {
        let compare = section.list("compare", |node| lineage.source(node)).check(
            |all| (1..all.len()).all(|i| !all[..i].contains(&all[i])),
            "names a model twice",
        );
        // Existing samples can be measured without a model.
        let compare = if section.table().contains_key("samples") {
            Some(compare.or(Vec::new()))
        } else {
            compare.required()
        };
        let reference = section.string("reference");
        let by_inception = !reference.is_absent() || section.table().contains_key("inception");
        let count = match (by_inception, compare.as_deref()) {
            (false, _) => 2000,
            (true, Some([])) => Sampling::ALL,
            (true, _) if reference.is_absent() => 2000,
            (true, _) => 50_000,
        };
        let against = if !by_inception {
            let features = section.value("features", |node| lineage.source(node));
            let embedded = data.and_then(|data| data.features).map(Source::Embedded);
            // Missing data have already been reported; for latents, planning reports what to do.
            let embedded = embedded.or_else(|| {
                data.is_none()
                    .then_some(Source::Embedded(EmbeddedName::DigitsFeatures))
            });
            let features = match embedded {
                Some(embedded) => Some(features.or(embedded)),
                None => features.required_since(
                    "a classifier of these pictures, made by a stage of kind \"train\" with family = \"classifier\"; \
                     or give `inception`, the weights that FID is measured with",
                ),
            };
            let why = "an evaluation without `reference` or `inception`";
            section.refuse(&["vae", "samples", "distances"], why);
            features.map(|features| Against::HeldOut { features })
        } else {
            let inception = section.string("inception").required();
            let vae = section.string("vae").optional().map(PathBuf::from);
            let samples = section.list("samples", |node| node.string().map(PathBuf::from));
            let samples = samples.optional().unwrap_or_default();
            let distances = [Distances::F64, Distances::F16].map(|kind| (kind.as_str(), kind));
            let distances = section.choice("distances", &distances).or(Distances::F64);
            section.refuse(&["features"], "an evaluation in Inception's features");
            let reference = reference.optional().map(PathBuf::from);
            inception.map(|inception| Against::Reference {
                reference,
                inception: inception.into(),
                vae,
                samples,
                distances,
            })
        };
        let sampling = Sampling::read(section, count);
        let neighbours = section.integer("neighbours", 1..=1000).or_checked(
            3,
            |&neighbours| neighbours < sampling.count,
            "must be below `count`",
        );
        section.refuse(
            &["from"],
            "kind \"evaluate\", which takes its models from `compare`",
        );
        Some(Self {
            compare: compare?,
            against: against?,
            neighbours,
            sampling,
        })
    }
}

impl Sampling {
    /// Reads the keys shared by sampling and evaluation, which differ in the default of `count`.
    fn read(section: &Section<'_>, count: usize) -> Self {
        let demo = section.choice("preset", &[("evaluation", false), ("demo", true)]);
        let demo = demo.or(false);
        let (count, classes, guidance) = if demo {
            (DEMO.len(), Some(DEMO.to_vec()), DEMO_GUIDANCE)
        } else {
            (count, None, 1.5)
        };
        let count = section.integer("count", 1..=10_000_000).or(count);
        let batch = section.integer("batch", 1..=65_536).or(100);
        let chosen = section.integers("classes", 0..=999_999).optional();
        let classes = chosen.or(classes);
        let labels = section
            .choice("labels", &Labels::NAMES)
            .or(Labels::Balanced);
        let guidance = section.float("guidance", 1.0..).or(guidance);
        // What a solver does not use is refused before it is read.
        let solver = read_solver(section);
        let guidance_channels = section.integer("guidance_channels", 1..=1024).or(3);
        let usual = match solver {
            Solver::Masked(_) => Rounds::STEPS,
            _ => 250,
        };
        let steps = section.integer("steps", 1..=1000).or(usual);
        Self {
            count,
            batch,
            classes,
            labels,
            guidance,
            guidance_channels,
            solver,
            steps,
        }
    }
}

/// Keys of the ordinary and the stochastic equation besides `solver`.
const EQUATION: [&str; 7] = [
    "method",
    "atol",
    "rtol",
    "diffusion_form",
    "diffusion_norm",
    "last_step",
    "last_step_size",
];

/// Keys of masked autoregression besides `solver`.
const ROUNDS: [&str; 3] = ["rounds", "guidance_schedule", "temperature"];

fn read_solver(section: &Section<'_>) -> Solver {
    let solvers = [
        ("ddpm", 0),
        ("ddim", 1),
        ("ode", 2),
        ("sde", 3),
        ("masked", 4),
    ];
    let solver = section.choice("solver", &solvers).or(0);
    if solver != 4 {
        let named = solvers.map(|(name, _)| format!("solver \"{name}\""));
        section.refuse(&ROUNDS, &named[solver]);
    }
    match solver {
        4 => {
            let usual = Rounds::PUBLISHED;
            section.refuse(&["eta", "guidance_channels"], "solver \"masked\"");
            section.refuse(&EQUATION, "solver \"masked\"");
            let schedule = section.choice("guidance_schedule", &GuidanceSchedule::NAMES);
            Solver::Masked(Rounds {
                rounds: section.integer("rounds", 1..=65_536).or(usual.rounds),
                guidance_schedule: schedule.or(usual.guidance_schedule),
                temperature: section
                    .float("temperature", 0.0..=10.0)
                    .or(usual.temperature),
                clip: section.boolean("clip").or(usual.clip),
            })
        }
        1 => {
            section.refuse(&EQUATION, "solver \"ddim\"");
            Solver::Ddim {
                eta: section.float("eta", 0.0..=1.0).or(0.0),
                clip: section.boolean("clip").or(false),
            }
        }
        2 => {
            section.refuse(&["eta", "clip"], "solver \"ode\"");
            section.refuse(&EQUATION[3..], "solver \"ode\"");
            let methods = [
                ("euler", Ode::Euler),
                ("heun", Ode::Heun),
                ("dopri5", Ode::DOPRI5),
            ];
            let method = section.choice("method", &methods).or(Ode::DOPRI5);
            if method != Ode::DOPRI5 {
                section.refuse(&["atol", "rtol"], "a method of fixed steps");
                return Solver::Ode(method);
            }
            Solver::Ode(Ode::Dopri5 {
                atol: section.float("atol", positive(1.0)).or(Ode::ATOL),
                rtol: section.float("rtol", positive(1.0)).or(Ode::RTOL),
            })
        }
        3 => {
            let usual = Sde::default();
            section.refuse(&["eta", "clip", "atol", "rtol"], "solver \"sde\"");
            let form = section.choice("diffusion_form", &DiffusionForm::NAMES);
            let last_step = section
                .choice("last_step", &LastStep::NAMES)
                .or(usual.last_step);
            if last_step == LastStep::None {
                section.refuse(&["last_step_size"], "last_step \"none\"");
            }
            let size = section.float("last_step_size", 0.0..=0.5);
            Solver::Sde(Sde {
                method: section.choice("method", &SdeMethod::NAMES).or(usual.method),
                form: form.or(usual.form),
                norm: section
                    .float("diffusion_norm", positive(100.0))
                    .or(usual.norm),
                last_step,
                last_step_size: size.or(usual.last_step_size),
            })
        }
        _ => {
            section.refuse(&["eta"], "solver \"ddpm\"");
            section.refuse(&EQUATION, "solver \"ddpm\"");
            Solver::Ddpm {
                clip: section.boolean("clip").or(false),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::schema::StageKind;
    use crate::recipe::schema::tests::{messages, second, stage};

    #[test]
    fn sampling_defaults_and_limits() {
        let StageKind::Sample(sample) = second("kind = 'sample'\ncount = 8\nsolver = 'ddim'")
        else {
            panic!()
        };
        let sampling = sample.sampling;
        assert_eq!(
            (sampling.count, sampling.batch, sampling.steps),
            (8, 100, 250)
        );
        assert_eq!((sampling.guidance, sampling.guidance_channels), (1.5, 3));
        assert_eq!(
            (sampling.solver, sampling.classes),
            (
                Solver::Ddim {
                    eta: 0.0,
                    clip: false
                },
                None
            )
        );

        let StageKind::Sample(demo) = second("kind = 'sample'\npreset = 'demo'\nsteps = 9") else {
            panic!()
        };
        assert_eq!((demo.sampling.count, demo.sampling.steps), (8, 9));
        assert_eq!(
            (demo.sampling.guidance, demo.sampling.classes),
            (4.0, Some(DEMO.to_vec()))
        );

        let text = "kind = 'sample'\nguidance = 0.5\nsteps = 1001\nclasses = []";
        let expected = [
            "`guidance`: must be at least 1 and finite, found 0.5",
            "`steps`: must be between 1 and 1000, found 1001",
            "`classes`: must not be empty",
        ];
        assert_eq!(messages(&stage(text)), expected);
    }

    #[test]
    fn evaluations_against_a_reference() {
        let read = |more: &str| {
            let text = format!("kind = 'evaluate'\nreference = 'r'\ninception = 'i.pth'\n{more}");
            let StageKind::Evaluate(evaluate) = second(&text) else {
                panic!()
            };
            evaluate
        };
        let of = |evaluate: &Evaluate| match &evaluate.against {
            Against::Reference {
                samples, distances, ..
            } => (samples.len(), *distances),
            Against::HeldOut { .. } => panic!(),
        };
        let drawn = read("compare = ['base']");
        assert_eq!(of(&drawn), (0, Distances::F64));
        assert_eq!(drawn.sampling.count, 50_000);
        // Without a model, all samples are measured unless `count` is given.
        let given = read("samples = ['a.npz', 'b']\ndistances = 'f16'");
        assert_eq!(of(&given), (2, Distances::F16));
        assert_eq!(given.sampling.count, Sampling::ALL);
        assert_eq!(read("samples = ['a.npz']\ncount = 9").sampling.count, 9);
        let both = read("compare = ['base']\nsamples = ['a.npz']");
        assert_eq!(both.sampling.count, 50_000);

        let wrong = "kind = 'evaluate'\ncompare = ['base']\ndistances = 'f16'";
        assert_eq!(
            messages(&stage(wrong)),
            ["`distances` is not used by an evaluation without `reference` or `inception`"]
        );
        let wrong = "kind = 'evaluate'\nreference = 'r'\ninception = 'i'\nsamples = ['a']\ndistances = 'f8'";
        let found = messages(&stage(wrong));
        assert!(found[0].starts_with("`distances`: "), "{found:?}");
    }

    #[test]
    fn evaluation_needs_distinct_models_and_enough_images() {
        assert_eq!(
            messages(&stage("kind = 'evaluate'")),
            ["missing key `compare` in [[stage]] \"evaluate\""]
        );
        let adm = "kind = 'evaluate'\ncompare = ['base']\nreference = 'r.npz'\nfeatures = 'base'";
        assert_eq!(
            messages(&stage(adm)),
            [
                "missing key `inception` in [[stage]] \"evaluate\"",
                "`features` is not used by an evaluation in Inception's features"
            ]
        );
        let digits = "kind = 'evaluate'\ncompare = ['base']\nvae = 'v'";
        assert_eq!(
            messages(&stage(digits)),
            ["`vae` is not used by an evaluation without `reference` or `inception`"]
        );
        assert_eq!(
            messages(&stage(
                "kind = 'evaluate'\ncompare = ['base', 'base']\ncount = 3"
            )),
            [
                "`neighbours`, by default 3, must be below `count`",
                "`compare`: names a model twice"
            ]
        );
    }
}
