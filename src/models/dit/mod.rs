//! DiT: a diffusion transformer with adaptive layer norm, zero-initialised (Peebles and Xie, arXiv
//! 2212.09748).

mod block;
pub(super) mod diffusers;
pub(super) mod infer;
pub mod presets;

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor, backend::Backend};
use serde::{Deserialize, Serialize};

pub(super) use self::block::BLOCKS_IN_PYTORCH;
use self::block::BlockSizes;
pub use self::block::{Attention, BlockKind, DitBlock, Mlp, Place};
use super::embeddings::{position_table, timestep_features};
use super::keys::{Check, Demand, Key, Keys};
use super::{Denoiser, Prunable, Shape};
use crate::backend::Compute;
use crate::ops::{Activation, FusedOps, Linear, LinearWeights, split};
use crate::trunk::{self, BlockHook, Granularity, Site, Trunk};

/// Layer norm of every block and of the head; the reference's value, not Burn's default.
const NORM_EPSILON: f64 = 1e-6;
/// Number of sinusoidal features, the timestep embedder's input.
const TIMESTEP_FEATURES: usize = 256;

/// Most tokens of an image: a side of 4096 pixels in patches of 16.
const MOST_TOKENS: usize = 1 << 16;

/// Sizes of a [`Dit`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DitConfig {
    /// Side of the (latent) image.
    pub input_size: usize,
    /// Side of a patch.
    pub patch_size: usize,
    /// Channels of the (latent) image.
    pub channels: usize,
    /// Width of the trunk.
    pub width: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
    /// Hidden width of the MLP over the width of the trunk.
    pub mlp_ratio: f64,
    /// Number of classes; the label of this value is the null class.
    pub classes: usize,
    /// Whether the variance is predicted too, which doubles the output channels.
    pub learn_sigma: bool,
    /// What stands at each place of the trunk, where that is not one whole block everywhere; else
    /// empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blocks: Vec<BlockKind>,
}

impl std::fmt::Display for DitConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            input_size,
            patch_size,
            channels,
            width,
            depth,
            heads,
            classes,
            ..
        } = self;
        write!(f, "DiT, {depth} layers")?;
        let pairs = self.kinds().filter(|kind| *kind == BlockKind::Pair).count();
        let branches: usize = self.kinds().map(BlockKind::branches).sum();
        if pairs > 0 {
            write!(f, " ({pairs} of them pairs)")?;
        }
        if branches < 2 * depth {
            write!(f, " ({branches} of {} branches)", 2 * depth)?;
        }
        write!(
            f,
            ", width {width}, {heads} heads, patch {patch_size}, {channels}x{input_size}x{input_size}, {classes} classes"
        )
    }
}

impl DitConfig {
    /// Sizes of its samples.
    pub fn shape(&self) -> Shape {
        Shape {
            channels: self.channels,
            side: self.input_size,
            classes: self.classes,
        }
    }

    /// Channels of the output.
    pub fn out_channels(&self) -> usize {
        self.channels * if self.learn_sigma { 2 } else { 1 }
    }

    /// What stands at each place of the trunk.
    pub fn kinds(&self) -> impl Iterator<Item = BlockKind> {
        let whole = self.blocks.is_empty().then_some(BlockKind::Whole);
        let whole = whole.into_iter().cycle().take(self.depth);
        self.blocks.iter().copied().chain(whole)
    }

    /// The layers of its trunk; None by branch where blocks run in pairs, whose branches are not
    /// one after another.
    pub fn trunk(&self, granularity: Granularity) -> Option<Trunk> {
        let depth = match granularity {
            Granularity::Block => self.depth,
            Granularity::Branch if self.kinds().any(|kind| kind == BlockKind::Pair) => return None,
            Granularity::Branch => self.kinds().map(BlockKind::branches).sum(),
        };
        Some(Trunk::plain(depth))
    }

    /// The same with neighbouring blocks in pairs on one input; a last one without a neighbour
    /// stays alone. None where a block is not whole.
    pub fn in_pairs(&self) -> Option<Self> {
        self.blocks.is_empty().then(|| {
            let pairs = vec![BlockKind::Pair; self.depth / 2];
            let alone = vec![BlockKind::Whole; self.depth % 2];
            self.of_blocks([pairs, alone].concat())
        })
    }

    /// The same with these blocks.
    pub fn of_blocks(&self, blocks: Vec<BlockKind>) -> Self {
        let whole = blocks.iter().all(|block| *block == BlockKind::Whole);
        Self {
            depth: blocks.len(),
            blocks: if whole { Vec::new() } else { blocks },
            ..self.clone()
        }
    }

    /// The same with only the given layers of its trunk.
    pub fn keep(&self, kept: &[usize], granularity: Granularity) -> Self {
        let mut layers = (0..).map(|layer| kept.contains(&layer));
        let mut next = || layers.next().unwrap_or(false);
        let left = self.kinds().filter_map(|block| match granularity {
            Granularity::Block => next().then_some(block),
            Granularity::Branch => {
                let attention = block.attention() && next();
                BlockKind::new(attention, block.mlp() && next())
            }
        });
        self.of_blocks(left.collect())
    }

    /// Tokens of the trunk.
    pub fn tokens(&self) -> usize {
        (self.input_size / self.patch_size).pow(2)
    }

    /// Hidden width of the MLP.
    pub fn hidden(&self) -> usize {
        // A ratio inferred from sizes may be a rounding error below the whole number it stands for.
        (self.width as f64 * self.mlp_ratio + 1e-6) as usize
    }

    /// Names and shapes of all parameters in a checkpoint, the fixed position table among them.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (width, patch, hidden) = (self.width, self.patch_size, self.hidden());
        let mut tensors = Vec::new();
        let mut put = |name: &str, shape: &[usize]| tensors.push((name.to_owned(), shape.to_vec()));
        put("pos_embed", &[1, self.tokens(), width]);
        put(
            "x_embedder.proj.weight",
            &[width, self.channels, patch, patch],
        );
        put("x_embedder.proj.bias", &[width]);
        put(
            "y_embedder.embedding_table.weight",
            &[self.classes + 1, width],
        );
        let mut linear = |name: &str, input: usize, output: usize| {
            put(&format!("{name}.weight"), &[output, input]);
            put(&format!("{name}.bias"), &[output]);
        };
        linear("t_embedder.mlp.0", TIMESTEP_FEATURES, width);
        linear("t_embedder.mlp.2", width, width);
        for (place, kind) in self.kinds().enumerate() {
            for block in 0..kind.blocks() {
                let block = match kind {
                    BlockKind::Pair => format!("blocks.{place}.{block}"),
                    _ => format!("blocks.{place}"),
                };
                if kind.attention() {
                    linear(&format!("{block}.attn.qkv"), width, 3 * width);
                    linear(&format!("{block}.attn.proj"), width, width);
                }
                if kind.mlp() {
                    linear(&format!("{block}.mlp.fc1"), width, hidden);
                    linear(&format!("{block}.mlp.fc2"), hidden, width);
                }
                let rows = 3 * kind.branches() * width;
                linear(&format!("{block}.adaLN_modulation.1"), width, rows);
            }
        }
        linear("final_layer.adaLN_modulation.1", width, 2 * width);
        linear(
            "final_layer.linear",
            width,
            patch * patch * self.out_channels(),
        );
        tensors
    }

    /// Multiply-accumulates of one forward pass of one image.
    pub fn macs(&self) -> usize {
        let (width, tokens) = (self.width, self.tokens());
        let attention = tokens * 4 * width * width + 2 * tokens * tokens * width;
        let mlp = tokens * 2 * width * self.hidden();
        let blocks = self.kinds().map(|kind| {
            let block = usize::from(kind.attention()) * attention
                + usize::from(kind.mlp()) * mlp
                + 3 * kind.branches() * width * width;
            kind.blocks() * block
        });
        let patch = self.patch_size.pow(2);
        blocks.sum::<usize>()
            + tokens * width * patch * (self.channels + self.out_channels())
            + width * (TIMESTEP_FEATURES + width)
            + 2 * width * width
    }

    /// Parameters of a low-rank update of every linear layer: all matrices but the labels' table,
    /// which is looked up.
    pub fn lora_parameters(&self, rank: usize) -> usize {
        let matrices = self.tensors().into_iter().filter(|(name, shape)| {
            shape.len() == 2 && name != "y_embedder.embedding_table.weight"
        });
        matrices
            .map(|(_, shape)| rank * (shape[0] + shape[1]))
            .sum()
    }

    /// Bytes of f32 activations that one block leaves for its backward pass: composed of Burn's
    /// operators, each of which keeps its inputs, about 30 tensors of the trunk's width, 9 of the
    /// MLP's and 5 of the attention weights. Kernels keep less: for the 12-layer digit model at
    /// batch 128 this gives 426 MiB, and its fine-tuning on ndarray takes 197 MiB in all
    /// (`benches/README.md`).
    pub fn block_bytes(&self, batch: usize) -> usize {
        let tokens = self.tokens();
        4 * batch * tokens * (30 * self.width + 9 * self.hidden() + 5 * self.heads * tokens)
    }

    /// Reads the sizes from whoever gives them; those of the samples are `samples` where none are
    /// given.
    #[rustfmt::skip]
    pub fn read(keys: &mut dyn Keys, samples: Shape) -> Self {
        let Shape { channels, side: input_size, classes } = Shape::read(keys, samples);
        let patch_size = keys.integer(
            Key { name: "patch_size", least: 1, most: 4096, default: 2 },
            Some(Demand {
                holds: &|patch| input_size.is_multiple_of(patch),
                must: format!("divide `input_size`, which is {input_size}"),
            }),
        );
        let heads = keys.integer(Key { name: "heads", least: 1, most: 1024, default: 4 }, None);
        let width = keys.integer(
            Key { name: "width", least: 1, most: 65_536, default: 64 },
            Some(Demand {
                // The position table needs a multiple of 4.
                holds: &|width| width.is_multiple_of(heads) && width.is_multiple_of(4),
                must: format!("be a multiple of 4 and of `heads`, which is {heads}"),
            }),
        );
        let depth = keys.integer(Key { name: "depth", least: 1, most: 4096, default: 12 }, None);
        let mlp_ratio = keys.float(Key { name: "mlp_ratio", least: 0.0, most: 64.0, default: 4.0 });
        let learn_sigma = keys.boolean("learn_sigma", true);
        let blocks = Vec::new();
        Self { input_size, patch_size, channels, width, depth, heads, mlp_ratio, classes, learn_sigma, blocks }
    }

    /// Why no model can have these sizes, if so.
    pub fn problem(&self) -> Option<String> {
        let mut check = Check::new(|name| match name {
            "input_size" => self.input_size as f64,
            "patch_size" => self.patch_size as f64,
            "channels" => self.channels as f64,
            "width" => self.width as f64,
            "depth" => self.depth as f64,
            "heads" => self.heads as f64,
            "classes" => self.classes as f64,
            "mlp_ratio" => self.mlp_ratio,
            _ => f64::from(u8::from(self.learn_sigma)),
        });
        Self::read(&mut check, self.shape());
        if check.problem.is_some() {
            return check.problem;
        }
        let Self {
            input_size,
            patch_size,
            depth,
            ..
        } = self;
        if !self.blocks.is_empty() && self.blocks.len() != *depth {
            let said = self.blocks.len();
            return Some(format!("{said} blocks are described, and depth is {depth}"));
        }
        if self.tokens() > MOST_TOKENS {
            return Some(format!(
                "input_size {input_size} in patches of {patch_size} makes more than {MOST_TOKENS} tokens"
            ));
        }
        (self.hidden() == 0).then(|| format!("mlp_ratio {} leaves no hidden width", self.mlp_ratio))
    }
}

/// A diffusion transformer.
#[derive(Module, Debug)]
pub struct Dit<B: Backend> {
    /// Patches to tokens.
    pub x_embedder: PatchEmbedder<B>,
    /// Timesteps to conditions.
    pub t_embedder: TimestepEmbedder<B>,
    /// Labels to conditions.
    pub y_embedder: LabelEmbedder<B>,
    /// Fixed positions, `[1, tokens, width]`.
    pub pos_embed: Param<Tensor<B, 3>>,
    /// The trunk.
    pub blocks: Vec<Place<B>>,
    /// Tokens to patches.
    pub final_layer: FinalLayer<B>,
    patch_size: usize,
    heads: usize,
    mlp_ratio: f64,
    learn_sigma: bool,
    #[module(skip)]
    granularity: Granularity,
}

impl<B: Backend> Dit<B> {
    /// A network of zeros (and the position table), to be filled from a checkpoint or an
    /// initialisation.
    pub fn zeros(config: &DitConfig, device: &B::Device) -> Self {
        let width = config.width;
        let side = config.input_size / config.patch_size;
        let table = Tensor::<B, 1>::from_floats(position_table(width, side).as_slice(), device)
            .reshape([1, side * side, width]);
        let sizes = BlockSizes {
            width,
            heads: config.heads,
            hidden: config.hidden(),
        };
        Self {
            x_embedder: PatchEmbedder {
                proj: Patches::zeros(config.channels, config.patch_size, width, device),
            },
            t_embedder: TimestepEmbedder {
                hidden: Linear::zeros(TIMESTEP_FEATURES, width, device),
                out: Linear::zeros(width, width, device),
            },
            y_embedder: LabelEmbedder {
                table: Param::from_tensor(Tensor::zeros([config.classes + 1, width], device)),
            },
            pos_embed: Param::from_tensor(table).set_require_grad(false),
            blocks: (config.kinds())
                .map(|kind| Place::zeros(sizes, kind, device))
                .collect(),
            final_layer: FinalLayer {
                linear: Linear::zeros(
                    width,
                    config.patch_size.pow(2) * config.out_channels(),
                    device,
                ),
                modulation: Linear::zeros(width, 2 * width, device),
            },
            patch_size: config.patch_size,
            heads: config.heads,
            mlp_ratio: config.mlp_ratio,
            learn_sigma: config.learn_sigma,
            granularity: Granularity::Block,
        }
    }

    pub(crate) fn config(&self) -> DitConfig {
        let [width, channels, ..] = self.x_embedder.proj.weight.lazy_shape().dims::<4>();
        let [_, tokens, _] = self.pos_embed.lazy_shape().dims::<3>();
        let [rows, _] = self.y_embedder.table.lazy_shape().dims::<2>();
        let config = DitConfig {
            input_size: tokens.isqrt() * self.patch_size,
            patch_size: self.patch_size,
            channels,
            width,
            depth: 0,
            heads: self.heads,
            mlp_ratio: self.mlp_ratio,
            classes: rows - 1,
            learn_sigma: self.learn_sigma,
            blocks: Vec::new(),
        };
        config.of_blocks(self.blocks.iter().map(Place::kind).collect())
    }
}

impl<B: FusedOps> Denoiser<B> for Dit<B> {
    fn shape(&self) -> Shape {
        self.config().shape()
    }

    fn forward(
        &self,
        x: Tensor<B, 4>,
        t: Tensor<B, 1>,
        y: Tensor<B, 1, Int>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 4> {
        // [batch, tokens, width]
        let x = self.x_embedder.proj.forward(x, self.patch_size) + self.pos_embed.val();
        let condition = self.t_embedder.forward(t) + self.y_embedder.forward(y); // [batch, width]
        // Every modulation uses the same SiLU of the condition: computed once.
        let condition = B::activate(condition, Activation::Silu);
        let x = match self.granularity {
            Granularity::Block => trunk::run(self.blocks.len(), x, hook, |layer, x| {
                self.blocks[layer].forward(x, condition.clone())
            }),
            Granularity::Branch => self.run_branches(x, condition.clone(), hook),
        };
        self.unpatchify(self.final_layer.forward(x, condition))
    }
}

impl<B: FusedOps> Prunable<B> for Dit<B> {
    fn trunk(&self) -> Trunk {
        let trunk = self.config().trunk(self.granularity);
        // The branches of pairs are refused by `by_branch`.
        trunk.unwrap_or_else(|| Trunk::plain(self.blocks.len()))
    }

    fn by_branch(mut self) -> Option<Self> {
        self.granularity = Granularity::Branch;
        self.config().trunk(self.granularity).map(|_| self)
    }

    fn in_pairs(mut self) -> Option<Self> {
        self.config().in_pairs()?;
        let mut blocks =
            std::mem::take(&mut self.blocks)
                .into_iter()
                .flat_map(|place| match place {
                    Place::One(block) => vec![block],
                    Place::Pair(blocks) => blocks,
                });
        while let Some(block) = blocks.next() {
            self.blocks.push(match blocks.next() {
                Some(next) => Place::Pair(vec![block, next]),
                None => Place::One(block),
            });
        }
        Some(self)
    }

    fn keep(mut self, kept: &[usize]) -> Self {
        let depth = self.trunk().depth;
        assert!(
            kept.iter().all(|layer| *layer < depth),
            "kept layers {kept:?} must lie below the depth {depth}"
        );
        let mut layers = (0..depth).map(|layer| kept.contains(&layer));
        let granularity = self.granularity;
        let left = std::mem::take(&mut self.blocks).into_iter();
        let left = left.filter_map(|place| match (granularity, place) {
            (Granularity::Branch, Place::One(block)) => {
                let kept = layers.by_ref().take(block.kind().branches());
                block.keep(&kept.collect::<Vec<bool>>()).map(Place::One)
            }
            (_, place) => layers.next().filter(|kept| *kept).map(|_| place),
        });
        self.blocks = left.collect();
        self
    }

    fn linears_mut(&mut self) -> Vec<&mut Linear<B>> {
        let mut linears = vec![&mut self.t_embedder.hidden, &mut self.t_embedder.out];
        for block in self.blocks.iter_mut().flat_map(Place::blocks_mut) {
            linears.extend(block.linears_mut());
        }
        linears.extend([
            &mut self.final_layer.linear,
            &mut self.final_layer.modulation,
        ]);
        linears
    }
}

impl<B: FusedOps> Dit<B> {
    /// The same network with matrix products of type `compute`.
    pub fn computing(mut self, compute: Compute) -> Self {
        self.x_embedder.proj.compute = compute;
        for block in self.blocks.iter_mut().flat_map(Place::blocks_mut) {
            if let Some(attn) = &mut block.attn {
                attn.compute = compute;
            }
        }
        for linear in self.linears_mut() {
            linear.compute = compute;
        }
        self
    }

    /// Runs the blocks branch by branch, each wrapped by `hook`.
    fn run_branches(
        &self,
        mut x: Tensor<B, 3>,
        condition: Tensor<B, 2>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 3> {
        let depth = self.trunk().depth;
        let mut layers = 0..depth;
        for block in self.blocks.iter().flat_map(Place::blocks) {
            let branches = block.modulated(condition.clone()).into_iter().flatten();
            for (branch, layer) in branches.zip(&mut layers) {
                x = hook.around(Site { layer, depth }, x, &|x| branch.forward(x));
            }
        }
        x
    }

    /// `[batch, h w, p p channels]` to `[batch, channels, h p, w p]`.
    fn unpatchify(&self, x: Tensor<B, 3>) -> Tensor<B, 4> {
        let [batch, tokens, features] = x.dims();
        let (side, patch) = (tokens.isqrt(), self.patch_size);
        let channels = features / (patch * patch);
        x.reshape([batch, side, side, patch, patch, channels])
            .permute([0, 5, 1, 3, 2, 4]) // [batch, channels, h, p, w, p]
            .reshape([batch, channels, side * patch, side * patch])
    }
}

/// A strided convolution, computed as a linear layer over non-overlapping patches.
#[derive(Module, Debug)]
pub struct Patches<B: Backend> {
    /// `[width, channels, p, p]`
    pub weight: Param<Tensor<B, 4>>,
    /// `[width]`
    pub bias: Param<Tensor<B, 1>>,
    #[module(skip)]
    compute: Compute,
}

impl<B: Backend> Patches<B> {
    fn zeros(channels: usize, patch: usize, width: usize, device: &B::Device) -> Self {
        Self {
            weight: Param::from_tensor(Tensor::zeros([width, channels, patch, patch], device)),
            bias: Param::from_tensor(Tensor::zeros([width], device)),
            compute: Compute::F32,
        }
    }
}

impl<B: FusedOps> Patches<B> {
    /// `[batch, channels, size, size]` to `[batch, tokens, width]`.
    fn forward(&self, x: Tensor<B, 4>, patch: usize) -> Tensor<B, 3> {
        let [batch, channels, size, _] = x.dims();
        let [width, ..] = self.weight.dims();
        let side = size / patch;
        let x = x
            .reshape([batch, channels, side, patch, side, patch])
            .permute([0, 2, 4, 1, 3, 5]) // [batch, h, w, channels, p, p]
            .reshape([batch, side * side, channels * patch * patch]);
        let weights = LinearWeights {
            weight: self.weight.val().reshape([width, channels * patch * patch]),
            bias: self.bias.val(),
            lora: None,
            compute: self.compute,
        };
        B::linear_layer(x, weights, Activation::Identity)
    }
}

/// Patches to tokens.
#[derive(Module, Debug)]
pub struct PatchEmbedder<B: Backend> {
    /// The patch convolution.
    pub proj: Patches<B>,
}

/// Timesteps to conditions.
#[derive(Module, Debug)]
pub struct TimestepEmbedder<B: Backend> {
    hidden: Linear<B>,
    out: Linear<B>,
}

impl<B: FusedOps> TimestepEmbedder<B> {
    /// `[batch]` to `[batch, width]`.
    pub fn forward(&self, t: Tensor<B, 1>) -> Tensor<B, 2> {
        let features = timestep_features(t, TIMESTEP_FEATURES);
        self.out
            .forward_activated(self.hidden.forward(features), Activation::Silu)
    }
}

/// Labels to conditions.
#[derive(Module, Debug)]
pub struct LabelEmbedder<B: Backend> {
    /// `[classes + 1, width]`; the last row is the null class.
    table: Param<Tensor<B, 2>>,
}

impl<B: FusedOps> LabelEmbedder<B> {
    /// `[batch]` to `[batch, width]`.
    pub fn forward(&self, y: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        self.table.val().select(0, y)
    }
}

/// Tokens to patches, with its own modulation.
#[derive(Module, Debug)]
pub struct FinalLayer<B: Backend> {
    linear: Linear<B>,
    modulation: Linear<B>,
}

impl<B: FusedOps> FinalLayer<B> {
    fn forward(&self, x: Tensor<B, 3>, condition: Tensor<B, 2>) -> Tensor<B, 3> {
        let [shift, scale] = split(self.modulation.forward(condition));
        self.linear
            .forward(B::modulated_norm(x, shift, scale, NORM_EPSILON))
    }
}
