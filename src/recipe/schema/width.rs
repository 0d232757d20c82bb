//! Settings of pruning in width.

use std::ops::Bound;

use serde::Serialize;

use super::prune::TIMES;
use crate::models::Part;
use crate::pruning::Leaves;
use crate::recipe::document::reader::Section;

/// Settings of a method that takes channels out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Width {
    /// By what channels are chosen.
    #[serde(flatten)]
    pub importance: Importance,
    /// How much leaves.
    #[serde(flatten)]
    pub amount: Amount,
    /// What leaves of each part.
    #[serde(flatten)]
    pub parts: Parts,
    /// What leaves of attention: the same dimensions of every head (`dims`), or whole heads
    /// (`heads`); default `dims`.
    pub leaves: Leaves,
    /// Widths that are cut become a multiple of this, as kernels like them; default 8.
    pub multiple: usize,
}

/// By what channels are chosen.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "importance", rename_all = "kebab-case")]
pub enum Importance {
    /// By their share in the first-order change of the loss, summed over times from the least
    /// noise on until the loss has fallen (Diff-Pruning). The default.
    DiffPruning {
        /// Share of the largest loss so far, below which a loss ends the way through the times; 0
        /// goes through all. Default 0.05.
        threshold: f64,
        /// Number of times, evenly spaced, or the range that they are drawn from; default 1000.
        timesteps: usize,
        /// Images at each time, or per batch; default 16.
        batch: usize,
    },
    /// The same over batches at random times.
    Taylor {
        /// Number of batches; default 16.
        batches: usize,
        /// Number of times, evenly spaced, or the range that they are drawn from; default 1000.
        timesteps: usize,
        /// Images at each time, or per batch; default 16.
        batch: usize,
    },
    /// By the squares of their weights.
    Magnitude,
    /// At random: the baseline for every other.
    Random,
}

/// How much leaves.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Amount {
    /// Share of the channels that leaves attention, MLPs, condition and convolutions.
    Ratio(f64),
    /// Share of the parameters that is left; the ratio is searched for.
    Parameters(f64),
    /// Share of the multiply-accumulates that is left; the ratio is searched for.
    Macs(f64),
    /// Share of the time of a pass that is left, measured on the run's backend.
    Latency(f64),
}

/// Shares of channels that leave parts, where they differ from the ratio.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Parts {
    /// Share of the channels that leaves attention; default: the ratio.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention: Option<f64>,
    /// Share of the hidden units that leaves the MLPs; default: the ratio.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mlp: Option<f64>,
    /// Share of the channels that leaves the embedding of time and label; default: the ratio.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub condition: Option<f64>,
    /// Share of the channels that leaves the residual stream; default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<f64>,
    /// Share of the channels that leaves the convolutions of a UNet; default: the ratio.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub convolution: Option<f64>,
}

impl Parts {
    /// The parts that a share is given of, with their keys.
    pub(crate) fn said(&self) -> impl Iterator<Item = (Part, &'static str)> {
        let all = [
            self.attention,
            self.mlp,
            self.condition,
            self.stream,
            self.convolution,
        ];
        let named = all.into_iter().zip(Part::NAMES);
        named.filter_map(|(share, (name, part))| share.map(|_| (part, name)))
    }

    /// The share that leaves a part when `ratio` leaves those that nothing is said of.
    pub fn share(&self, part: Part, ratio: f64) -> f64 {
        match part {
            Part::Attention => self.attention.unwrap_or(ratio),
            Part::Mlp => self.mlp.unwrap_or(ratio),
            Part::Condition => self.condition.unwrap_or(ratio),
            Part::Stream => self.stream.unwrap_or(0.0),
            Part::Convolution => self.convolution.unwrap_or(ratio),
        }
    }
}

/// Keys that this method reads, besides those of scores.
pub(super) const KEYS: [&str; 13] = [
    "importance",
    "threshold",
    "ratio",
    "parameters",
    "macs",
    "latency",
    "attention",
    "mlp",
    "condition",
    "stream",
    "convolution",
    "leaves",
    "multiple",
];

/// What widths are a multiple of where a recipe does not say it.
pub(crate) const MULTIPLE: usize = 8;

/// Above 0 and below 1.
const WITHIN: (Bound<f64>, Bound<f64>) = (Bound::Excluded(0.0), Bound::Excluded(1.0));

/// Which importance.
#[derive(Clone, Copy)]
enum By {
    DiffPruning,
    Taylor,
    Magnitude,
    Random,
}

const IMPORTANCE: [(&str, By); 4] = [
    ("diff-pruning", By::DiffPruning),
    ("taylor", By::Taylor),
    ("magnitude", By::Magnitude),
    ("random", By::Random),
];

impl Width {
    pub(super) fn read(section: &Section<'_>) -> Option<Self> {
        let by = section.choice("importance", &IMPORTANCE);
        let by = by.or(By::DiffPruning);
        let batch = || section.integer("batch", 1..=65_536).or(16);
        let timesteps = || section.integer("timesteps", 1..=TIMES).or(TIMES);
        let importance = match by {
            By::DiffPruning => Importance::DiffPruning {
                threshold: section.float("threshold", 0.0..1.0).or(0.05),
                timesteps: timesteps(),
                batch: batch(),
            },
            By::Taylor => Importance::Taylor {
                batches: section.integer("batches", 1..=1_000_000).or(16),
                timesteps: timesteps(),
                batch: batch(),
            },
            By::Magnitude => Importance::Magnitude,
            By::Random => Importance::Random,
        };
        let amounts = [
            section.float("ratio", WITHIN).optional().map(Amount::Ratio),
            section
                .float("parameters", WITHIN)
                .optional()
                .map(Amount::Parameters),
            section.float("macs", WITHIN).optional().map(Amount::Macs),
            section
                .float("latency", WITHIN)
                .optional()
                .map(Amount::Latency),
        ];
        let amount = match amounts.into_iter().flatten().collect::<Vec<_>>()[..] {
            [amount] => Some(amount),
            ref amounts => {
                section.fault(match amounts.is_empty() {
                    true => "how much leaves is not said: give `ratio`, the share of channels that leaves, or `parameters`, `macs` or `latency`, the share of them that is left",
                    false => "of `ratio`, `parameters`, `macs` and `latency` only one can be given",
                });
                None
            }
        };
        let part = |key| section.float(key, 0.0..1.0).optional();
        let parts = Parts {
            attention: part("attention"),
            mlp: part("mlp"),
            condition: part("condition"),
            stream: part("stream"),
            convolution: part("convolution"),
        };
        let leaves = section.choice("leaves", &Leaves::NAMES).or(Leaves::Dims);
        let multiple = section.integer("multiple", 1..=1024).or(MULTIPLE);
        Some(Self {
            importance,
            amount: amount?,
            parts,
            leaves,
            multiple,
        })
    }
}
