//! What a checkpoint holds, and what any room may ask of it: sizes, cost, tensors.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use super::blocks::{BlockKind, BlockWidths};
use super::dit::diffusers::DIFFUSERS_USE;
use super::dit::{BLOCKS_IN_PYTORCH, WIDTHS_IN_PYTORCH, diffusers, infer, presets};
use super::mar::{COPIES, MarConfig, Stack};
use super::unet::diffusers::UNET_USE;
use super::{ChannelGroup, ClassifierConfig, DitConfig, Left, Shape, UnetConfig, mar, unet};
use crate::state::{Tensors, WeightsError};
use crate::trunk::{Granularity, Trunk};

/// A network's kind and sizes: enough to rebuild the module without code.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "family", rename_all = "kebab-case")]
pub enum Architecture {
    /// A diffusion transformer.
    Dit(DitConfig),
    /// A UNet.
    Unet(UnetConfig),
    /// A masked autoregressive network.
    Mar(MarConfig),
    /// The classifier whose features evaluation uses.
    #[serde(alias = "digits-classifier")]
    Classifier(ClassifierConfig),
}

/// Asks whichever it is.
macro_rules! ask {
    ($architecture:expr, $config:ident => $answer:expr) => {
        match $architecture {
            Architecture::Dit($config) => $answer,
            Architecture::Unet($config) => $answer,
            Architecture::Mar($config) => $answer,
            Architecture::Classifier($config) => $answer,
        }
    };
}

impl Architecture {
    /// A published model: a transformer of ImageNet at 256 x 256, in latents of the autoencoder it
    /// was published with, or a UNet of pictures.
    pub fn preset(name: &str) -> Option<Self> {
        let shape = match (unet::presets::preset(name), mar::presets::preset_of(name)) {
            (Some(unet), _) => unet.shape,
            (_, Some(_)) => mar::presets::IMAGENET_256,
            _ => presets::IMAGENET_256,
        };
        Self::preset_of(name, shape)
    }

    /// A published model's sizes, for samples of another shape.
    pub fn preset_of(name: &str, shape: Shape) -> Option<Self> {
        if let Some(unet) = unet::presets::preset(name) {
            return Some(Self::Unet(unet.config(shape)));
        }
        if let Some(mar) = mar::presets::preset_of(name) {
            return Some(Self::Mar(mar.config(shape)));
        }
        let Shape {
            channels,
            side,
            classes,
        } = shape;
        presets::config(name, side, channels, classes).map(Self::Dit)
    }

    /// The names of all published models.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        let unets = unet::presets::PRESETS.iter().map(|preset| preset.name);
        let mars = mar::presets::PRESETS.iter().map(|preset| preset.name);
        presets::PRESETS
            .iter()
            .map(|preset| preset.name)
            .chain(unets)
            .chain(mars)
    }

    /// Whether it is a network that a process trains and samples.
    pub fn is_denoiser(&self) -> bool {
        matches!(self, Self::Dit(_) | Self::Unet(_) | Self::Mar(_))
    }

    /// Whether it is told classes.
    pub fn has_classes(&self) -> bool {
        match self {
            Self::Unet(config) => config.classes > 0,
            Self::Dit(_) | Self::Mar(_) | Self::Classifier(_) => true,
        }
    }

    /// The sizes of a classifier, if it is one.
    pub fn classifier(&self) -> Option<&ClassifierConfig> {
        match self {
            Self::Classifier(config) => Some(config),
            Self::Dit(_) | Self::Unet(_) | Self::Mar(_) => None,
        }
    }

    /// The layers that can be taken out; None of a network without such a trunk.
    pub fn trunk(&self, granularity: Granularity) -> Option<Trunk> {
        match self {
            Self::Dit(config) => config.trunk(granularity),
            Self::Mar(config) => config.trunk(granularity),
            Self::Unet(_) | Self::Classifier(_) => None,
        }
    }

    /// Blocks of the trunk; 0 without one.
    pub fn depth(&self) -> usize {
        self.layers(Granularity::Block)
    }

    /// Blocks of the trunk; None without one.
    pub fn depth_of_trunk(&self) -> Option<usize> {
        self.trunk(Granularity::Block).map(|trunk| trunk.depth)
    }

    /// Layers of the trunk; 0 without one.
    pub fn layers(&self, granularity: Granularity) -> usize {
        self.trunk(granularity).map_or(0, |trunk| trunk.depth)
    }

    /// Whether every block of the trunk is whole.
    pub fn is_whole(&self) -> bool {
        match self {
            Self::Dit(config) => config.blocks.is_empty(),
            Self::Mar(config) => config.blocks.is_empty(),
            Self::Unet(_) | Self::Classifier(_) => true,
        }
    }

    /// Whether the blocks of the trunk are alike: whole, and of the same widths. Those of a MAR are
    /// alike within each trunk: what is across their border is not put together.
    pub fn is_alike(&self) -> bool {
        let alike = |blocks: &[BlockWidths]| blocks.windows(2).all(|pair| pair[0] == pair[1]);
        self.is_whole()
            && match self {
                Self::Dit(config) => alike(&config.widths().blocks),
                Self::Mar(config) => {
                    let blocks = config.widths().blocks;
                    let (encoder, decoder) = blocks.split_at(config.encoder.depth);
                    alike(encoder) && alike(decoder)
                }
                Self::Unet(_) | Self::Classifier(_) => true,
            }
    }

    /// Its tensors under the names used here, which older files of diffusers call otherwise.
    pub(crate) fn renamed(&self, tensors: Tensors) -> Tensors {
        match self {
            Self::Unet(_) => unet::diffusers::renamed(&tensors),
            Self::Dit(_) | Self::Mar(_) | Self::Classifier(_) => tensors,
        }
    }

    /// Whether its tensors show its sizes, but for heads.
    pub(crate) fn is_shown_by_tensors(&self) -> bool {
        match self {
            Self::Dit(config) => config.widths.is_none(),
            Self::Unet(_) | Self::Mar(_) | Self::Classifier(_) => false,
        }
    }

    /// Whether its tensors and one number of heads show its sizes.
    pub(crate) fn is_shown_with_heads(&self) -> bool {
        match self {
            Self::Dit(config) => config.has_heads_alike(),
            Self::Mar(config) => config.patch_size == 1 && config.has_heads_alike(),
            Self::Unet(_) | Self::Classifier(_) => true,
        }
    }

    /// The same with another number of blocks, all of them whole and of the usual widths, if it has
    /// a trunk.
    pub fn with_depth(&self, depth: usize) -> Self {
        match self {
            Self::Dit(config) => Self::Dit(DitConfig {
                depth,
                blocks: Vec::new(),
                widths: None,
                ..config.clone()
            }),
            Self::Mar(config) => Self::Mar(config.with_depth(depth)),
            Self::Unet(_) | Self::Classifier(_) => self.clone(),
        }
    }

    /// The same with neighbouring blocks in pairs on one input; None where it can't be.
    pub fn in_pairs(&self) -> Option<Self> {
        match self {
            Self::Dit(config) => config.in_pairs().map(Self::Dit),
            Self::Mar(config) => config.in_pairs().map(Self::Mar),
            Self::Unet(_) | Self::Classifier(_) => None,
        }
    }

    /// How many pairs run on one input, where its blocks, which begin with the layers `kept` of
    /// so many, are all of them; None where layers are gone, or none run so.
    pub fn pairs_of(&self, kept: &[usize], layers: usize) -> Option<usize> {
        let kinds: Vec<BlockKind> = match self {
            Self::Dit(config) => config.kinds().collect(),
            Self::Mar(config) => config.kinds().collect(),
            Self::Unet(_) | Self::Classifier(_) => Vec::new(),
        };
        let blocks: usize = kinds.iter().map(|kind| kind.blocks()).sum();
        let pairs = blocks - kinds.len();
        let ends = kept.iter().skip(1).chain([&layers]);
        let whole = kept.len() == kinds.len()
            && (kinds.iter().zip(kept).zip(ends))
                .all(|((kind, from), to)| from + kind.blocks() == *to);
        (pairs > 0 && blocks == layers && whole).then_some(pairs)
    }

    /// The same with only the given layers of its trunk, if it has one.
    pub fn keep(&self, kept: &[usize], granularity: Granularity) -> Self {
        match self {
            Self::Dit(config) => Self::Dit(config.keep(kept, granularity)),
            Self::Mar(config) => Self::Mar(config.keep(kept, granularity)),
            Self::Unet(_) | Self::Classifier(_) => self.clone(),
        }
    }

    /// The channels that can be taken out, by groups; None of a network without such.
    pub fn channel_groups(&self) -> Option<Vec<ChannelGroup>> {
        match self {
            Self::Dit(config) => Some(config.channel_groups()),
            Self::Unet(config) => Some(config.channel_groups()),
            Self::Mar(config) => Some(config.channel_groups()),
            Self::Classifier(_) => None,
        }
    }

    /// The same with so many channels left of each of its
    /// [`channel_groups`](Self::channel_groups), if it has any.
    ///
    /// # Panics
    /// When there are not as many numbers as groups.
    pub fn narrowed(&self, left: &[Left]) -> Self {
        match self {
            Self::Dit(config) => Self::Dit(config.narrowed(left)),
            Self::Unet(config) => Self::Unet(config.narrowed(left)),
            Self::Mar(config) => Self::Mar(config.narrowed(left)),
            Self::Classifier(_) => self.clone(),
        }
    }

    /// The same of another width, or with another number of attention heads, if it has any.
    pub fn with_width(&self, width: Option<usize>, heads: Option<usize>) -> Self {
        match self {
            Self::Dit(config) => Self::Dit(DitConfig {
                width: width.unwrap_or(config.width),
                heads: heads.unwrap_or(config.heads),
                widths: None,
                ..config.clone()
            }),
            Self::Mar(config) => {
                let of = |stack: Stack| Stack {
                    width: width.unwrap_or(stack.width),
                    heads: heads.unwrap_or(stack.heads),
                    ..stack
                };
                Self::Mar(MarConfig {
                    encoder: of(config.encoder),
                    decoder: of(config.decoder),
                    widths: None,
                    ..config.clone()
                })
            }
            Self::Unet(_) => self.clone(),
            Self::Classifier(config) => Self::Classifier(ClassifierConfig {
                width: width.unwrap_or(config.width),
                ..config.clone()
            }),
        }
    }

    /// The same for samples of so many tokens; None where they make no square.
    pub fn with_tokens(&self, tokens: usize) -> Option<Self> {
        let side = tokens.isqrt();
        if side * side != tokens {
            return None;
        }
        Some(match self {
            Self::Dit(config) => Self::Dit(DitConfig {
                input_size: side * config.patch_size,
                ..config.clone()
            }),
            Self::Mar(config) => Self::Mar(MarConfig {
                input_size: side * config.patch_size,
                ..config.clone()
            }),
            Self::Unet(_) | Self::Classifier(_) => self.clone(),
        })
    }

    /// Sizes of its samples, or of the pictures it reads.
    pub fn shape(&self) -> Shape {
        ask!(self, config => config.shape())
    }

    /// Sizes `[tokens, width]` of the states between its layers; None without a trunk.
    pub fn states(&self) -> Option<[usize; 2]> {
        match self {
            Self::Dit(config) => Some([config.tokens(), config.width]),
            Self::Mar(config) => config.states(),
            Self::Unet(_) | Self::Classifier(_) => None,
        }
    }

    /// Whether it predicts the variance beside the mean.
    pub fn predicts_variance(&self) -> bool {
        match self {
            Self::Dit(config) => config.learn_sigma,
            Self::Mar(_) => true,
            Self::Unet(_) | Self::Classifier(_) => false,
        }
    }

    /// The side of the patch that a network fills in at a time, if it fills in images: it is shown
    /// some of their tokens, and denoises others one by one.
    pub fn patch_filled_in(&self) -> Option<usize> {
        match self {
            Self::Mar(config) => Some(config.patch_size),
            Self::Dit(_) | Self::Unet(_) | Self::Classifier(_) => None,
        }
    }

    /// Which of its trunks a layer is of: 1 of a MAR's decoder, else 0.
    pub fn stack_of_layer(&self, layer: usize, granularity: Granularity) -> usize {
        match self {
            Self::Mar(config) => usize::from(layer >= config.layers_of_encoder(granularity)),
            Self::Dit(_) | Self::Unet(_) | Self::Classifier(_) => 0,
        }
    }

    /// Multiply-accumulates of a pass of one sample in training or scoring.
    pub fn pass_macs(&self) -> usize {
        match self {
            Self::Mar(config) => config.training_macs(),
            Self::Dit(_) | Self::Unet(_) | Self::Classifier(_) => self.macs(),
        }
    }

    /// Multiply-accumulates of drawing a sample in rounds, in each of which so many tokens are
    /// known, and so many steps of each token; 0 of a network that does not fill in images.
    pub fn drawing_macs(&self, known: &[usize], steps: usize) -> usize {
        match self {
            Self::Mar(config) => config.drawing_macs(known, steps),
            Self::Dit(_) | Self::Unet(_) | Self::Classifier(_) => 0,
        }
    }

    /// Names and shapes of all parameters in a checkpoint.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        ask!(self, config => config.tensors())
    }

    /// Parameters, fixed ones counted.
    pub fn parameters(&self) -> usize {
        let count = |(_, shape): &(String, Vec<usize>)| shape.iter().product::<usize>();
        self.tensors().iter().map(count).sum()
    }

    /// Multiply-accumulates of one pass of one sample.
    pub fn macs(&self) -> usize {
        ask!(self, config => config.macs())
    }

    /// Parameters of a low-rank update of every linear layer that [`Prunable`](super::Prunable)
    /// names.
    pub fn lora_parameters(&self, rank: usize) -> usize {
        match self {
            Self::Dit(config) => config.lora_parameters(rank),
            Self::Mar(config) => config.lora_parameters(rank),
            Self::Unet(_) | Self::Classifier(_) => 0,
        }
    }

    /// Whether its backward pass can compute again what its blocks did.
    pub fn recomputes(&self) -> bool {
        matches!(self, Self::Dit(_))
    }

    /// Bytes that a batch's pass leaves for a backward pass that computes its branches again: the
    /// input of each, and what one needs at once.
    pub fn recomputed_bytes(&self, batch: usize) -> usize {
        match self {
            Self::Dit(config) => {
                let (pass, input) = (
                    config.block_bytes(batch),
                    4 * batch as u128 * (config.tokens() * config.width) as u128,
                );
                let kept = config.kinds().map(|kind| match kind {
                    // Two blocks that are kept whole.
                    BlockKind::Pair => 2 * pass,
                    kind => kind.branches() as u128 * input,
                });
                countable(kept.sum::<u128>() + pass)
            }
            other => other.kept_bytes(batch),
        }
    }

    /// Bytes that a batch's pass leaves for its backward pass.
    pub fn kept_bytes(&self, batch: usize) -> usize {
        countable(match self {
            Self::Dit(config) => {
                let branches = config.kinds().map(|kind| kind.blocks() * kind.branches());
                config.block_bytes(batch).div_ceil(2) * branches.sum::<usize>() as u128
            }
            Self::Unet(config) => config.kept_bytes(batch),
            Self::Mar(config) => {
                let branches = config.kinds().map(|kind| kind.blocks() * kind.branches());
                config.block_bytes(batch).div_ceil(2) * branches.sum::<usize>() as u128
                    + config.head_bytes(batch, COPIES)
            }
            // Each activation with its gradient and what it was computed from.
            Self::Classifier(config) => 4 * 4 * batch as u128 * config.activations() as u128,
        })
    }

    /// Bytes that a batch's pass needs at once beside the weights.
    pub fn pass_bytes(&self, batch: usize) -> usize {
        countable(match self {
            Self::Dit(config) => config.block_bytes(batch),
            Self::Unet(config) => config.pass_bytes(batch),
            Self::Mar(config) => config
                .block_bytes(batch)
                .max(config.head_pass_bytes(batch, COPIES)),
            Self::Classifier(config) => 4 * batch as u128 * config.activations() as u128,
        })
    }

    /// Why no network can have these sizes, if so.
    pub fn problem(&self) -> Option<String> {
        ask!(self, config => config.problem())
    }

    /// Writes the sizes without the word for their kind, which stands elsewhere.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn sizes_alone<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            // Under the names that a recipe has for them.
            Self::Mar(config) => config.keys().serialize(serializer),
            Self::Unet(config) => config.keys().serialize(serializer),
            other => ask!(other, config => config.serialize(serializer)),
        }
    }

    /// The diffusion network whose tensors these are, by their names and shapes.
    ///
    /// # Errors
    /// What makes it none.
    pub(crate) fn of_tensors(
        tensors: &Tensors,
        heads: Heads,
        path: &Path,
    ) -> Result<Self, WeightsError> {
        match mar::infer::is_mar(tensors) {
            true => mar::infer::mar(tensors, heads, path).map(Self::Mar),
            false => infer::dit(tensors, heads, path).map(Self::Dit),
        }
    }

    /// Refuses tensors that are not this network's, naming all that are missing, surplus or
    /// misshapen.
    pub(crate) fn check(&self, tensors: &Tensors, path: &Path) -> Result<(), WeightsError> {
        infer::check(tensors, &self.tensors(), &self.to_string(), path)
    }

    /// Attention heads, which no tensor tells; None of a network without attention.
    pub(crate) fn heads(&self) -> Option<usize> {
        match self {
            Self::Dit(config) => Some(config.heads),
            Self::Mar(config) => Some(config.decoder.heads),
            Self::Unet(_) | Self::Classifier(_) => None,
        }
    }

    /// What a `config.json` of diffusers describes; None if it is of no kind of model known here.
    pub(crate) fn of_diffusers(json: &Value) -> Option<Result<Self, String>> {
        if let Some(config) = unet::diffusers::config(json) {
            return Some(config.map(Self::Unet));
        }
        let config = diffusers::DiffusersConfig::of(json)?;
        Some(config.and_then(|config| config.dit()).map(Self::Dit))
    }

    /// Tensors in diffusers' layout, as the reference's.
    ///
    /// # Errors
    /// When they are not this network's.
    pub(crate) fn read_diffusers(
        &self,
        tensors: Tensors,
        path: &Path,
    ) -> Result<Tensors, WeightsError> {
        match self {
            Self::Dit(config) => diffusers::from_diffusers(tensors, config, path),
            // It has diffusers' names.
            Self::Unet(_) => Ok(tensors),
            Self::Mar(_) | Self::Classifier(_) => Err(self.unknown_to_diffusers(path)),
        }
    }

    /// The reference's tensors in diffusers' layout, and the `config.json` beside them.
    ///
    /// # Errors
    /// When diffusers has no such network.
    pub(crate) fn write_diffusers(
        &self,
        tensors: Tensors,
        path: &Path,
    ) -> Result<(Tensors, Value), WeightsError> {
        match self {
            Self::Dit(config) => {
                let tensors = diffusers::to_diffusers(tensors, config, path)?;
                Ok((tensors, diffusers::diffusers_config(config)))
            }
            Self::Unet(config) => match unet::diffusers::written(config) {
                Ok(config) => Ok((tensors, config)),
                Err(problem) => Err(WeightsError::Model {
                    path: path.to_owned(),
                    problem,
                }),
            },
            Self::Mar(_) | Self::Classifier(_) => Err(self.unknown_to_diffusers(path)),
        }
    }

    /// What a user of the original PyTorch code does to its model before it takes the weights; None
    /// where nothing is to be done.
    pub(crate) fn before_loading(&self) -> Option<String> {
        match self {
            Self::Dit(config) => {
                let blocks = (!config.blocks.is_empty()).then_some(BLOCKS_IN_PYTORCH);
                let widths = config.widths.is_some().then_some(WIDTHS_IN_PYTORCH);
                let all: Vec<&str> = blocks.into_iter().chain(widths).collect();
                (!all.is_empty()).then(|| all.join("\n\n"))
            }
            Self::Mar(config) => {
                let unusual = !config.blocks.is_empty() || config.widths.is_some();
                unusual.then(|| mar::BLOCKS_IN_PYTORCH.to_owned())
            }
            Self::Unet(_) | Self::Classifier(_) => None,
        }
    }

    /// How diffusers opens a folder in its layout.
    pub(crate) fn in_diffusers(&self) -> &'static str {
        match self {
            Self::Unet(_) => UNET_USE,
            Self::Dit(_) | Self::Mar(_) | Self::Classifier(_) => DIFFUSERS_USE,
        }
    }

    /// What has the names and shapes of its tensors.
    pub(crate) fn named_as(&self) -> &'static str {
        match self {
            Self::Unet(config) if !config.left.is_empty() => {
                "Names are those of diffusers' `UNet2DModel`, whose configuration has no word for layers that are narrower in\nplaces; this program reads it by `config.json`. A model whose layers are given the shapes of the tensors takes them as"
            }
            Self::Unet(_) => {
                "Names and shapes are those of diffusers' `UNet2DModel`, for which `convert --diffusers` writes a folder; a model\nof the same sizes takes them as"
            }
            Self::Dit(_) | Self::Mar(_) | Self::Classifier(_) => {
                "Names and shapes are those of the original PyTorch code; a model of the sizes in `config.json` takes them as"
            }
        }
    }

    fn unknown_to_diffusers(&self, path: &Path) -> WeightsError {
        WeightsError::Model {
            path: path.to_owned(),
            problem: format!("diffusers has no {self}"),
        }
    }
}

/// Bytes of which sums can still be counted; a recipe can ask for more, and no machine has them.
fn countable(bytes: u128) -> usize {
    bytes.min(1 << 60) as usize
}

impl From<DitConfig> for Architecture {
    fn from(config: DitConfig) -> Self {
        Self::Dit(config)
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        ask!(self, config => config.fmt(f))
    }
}

/// Heads of a network, which no tensor tells.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Heads {
    /// What is known.
    pub(crate) known: Option<usize>,
    /// What holds where nothing is known and no published model has the width.
    pub(crate) otherwise: Option<usize>,
}

#[cfg(test)]
mod tests;
