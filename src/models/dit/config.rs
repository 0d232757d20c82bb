//! Sizes of a [`Dit`](super::Dit), and what follows from them.

use serde::{Deserialize, Serialize};

use super::{TIMESTEP_FEATURES, Widths};
use crate::models::Shape;
use crate::models::blocks::{self, BlockKind, Named, Standing, listed, standing};
use crate::models::keys::{Check, Key, Keys, Tokens};
use crate::trunk::{Granularity, Trunk};

/// Most tokens of an image: a side of 4096 pixels in patches of 16.
const MOST_TOKENS: usize = 1 << 16;

/// Sizes of a [`Dit`](super::Dit).
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
    /// Widths within the network, where they do not follow from `width`, `heads` and `mlp_ratio`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub widths: Option<Widths>,
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
        let layers = if *depth == 1 { "layer" } else { "layers" };
        let blocks = blocks::described(self.kinds());
        write!(f, "DiT, {depth} {layers}{blocks}")?;
        write!(f, ", width {width}, ")?;
        match &self.widths {
            None => write!(f, "{heads} heads")?,
            Some(widths) => widths.fmt(f)?,
        }
        write!(
            f,
            ", patch {patch_size}, {channels}x{input_size}x{input_size}, {classes} classes"
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

    /// The same, with their widths.
    pub(super) fn places(&self) -> Vec<Standing> {
        standing(self.kinds(), &mut self.widths().blocks.into_iter())
    }

    /// The blocks in order, with the beginning of their tensors' names.
    pub(super) fn named_blocks(&self) -> Vec<Named> {
        blocks::named("blocks", &self.places())
    }

    /// The layers of its trunk; None by branch where blocks run in pairs, whose branches are not
    /// one after another.
    pub fn trunk(&self, granularity: Granularity) -> Option<Trunk> {
        blocks::layers(self.kinds(), granularity).map(Trunk::plain)
    }

    /// The same with neighbouring blocks in pairs on one input; a last one without a neighbour
    /// stays alone. None where a block is not whole.
    pub fn in_pairs(&self) -> Option<Self> {
        self.blocks.is_empty().then(|| {
            let paired = self.of_blocks(blocks::in_pairs(self.depth));
            paired.of_widths(self.widths())
        })
    }

    /// The same with these blocks, of widths that follow from the other sizes.
    pub fn of_blocks(&self, blocks: Vec<BlockKind>) -> Self {
        Self {
            depth: blocks.len(),
            blocks: listed(blocks),
            widths: None,
            ..self.clone()
        }
    }

    /// The same with only the given layers of its trunk.
    pub fn keep(&self, kept: &[usize], granularity: Granularity) -> Self {
        let mut layers = (0..).map(|layer| kept.contains(&layer));
        let stays = || layers.next().unwrap_or(false);
        let left = blocks::keep(self.places(), stays, granularity);
        let kinds = left.iter().map(|place| place.kind).collect();
        let widths = Widths {
            blocks: left.into_iter().flat_map(|place| place.within).collect(),
            ..self.widths()
        };
        self.of_blocks(kinds).of_widths(widths)
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
        let (width, patch) = (self.width, self.patch_size);
        let Widths {
            condition,
            timestep,
            ..
        } = self.widths();
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
            &[self.classes + 1, condition],
        );
        let mut linear = |name: &str, input: usize, output: usize| {
            put(&format!("{name}.weight"), &[output, input]);
            put(&format!("{name}.bias"), &[output]);
        };
        linear("t_embedder.mlp.0", TIMESTEP_FEATURES, timestep);
        linear("t_embedder.mlp.2", timestep, condition);
        for Named {
            name: block,
            kind,
            widths,
        } in self.named_blocks()
        {
            let (attention, hidden) = (widths.attention(), widths.hidden);
            if kind.attention() {
                linear(&format!("{block}.attn.qkv"), width, 3 * attention);
                linear(&format!("{block}.attn.proj"), attention, width);
            }
            if kind.mlp() {
                linear(&format!("{block}.mlp.fc1"), width, hidden);
                linear(&format!("{block}.mlp.fc2"), hidden, width);
            }
            let rows = 3 * kind.branches() * width;
            linear(&format!("{block}.adaLN_modulation.1"), condition, rows);
        }
        linear("final_layer.adaLN_modulation.1", condition, 2 * width);
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
        let Widths {
            condition,
            timestep,
            ..
        } = self.widths();
        let blocks = self.named_blocks().into_iter().map(|block| {
            let (kind, widths) = (block.kind, block.widths);
            let attention = widths.attention();
            let block = tokens * 4 * width * attention
                + 2 * tokens * tokens * attention
                + tokens * 2 * width * widths.hidden
                + 3 * kind.branches() * condition * width;
            block as u128
        });
        let patch = self.patch_size.pow(2);
        let ends = tokens * width * patch * (self.channels + self.out_channels())
            + timestep * (TIMESTEP_FEATURES + condition)
            + 2 * condition * width;
        // A recipe can ask for more than can be counted; no machine can do it.
        let all = blocks.sum::<u128>() + ends as u128;
        usize::try_from(all).unwrap_or(usize::MAX)
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
    pub fn block_bytes(&self, batch: usize) -> u128 {
        let tokens = self.tokens();
        let blocks = self.widths().blocks.into_iter();
        let block = blocks.map(|block| 9 * block.hidden + 5 * block.heads * tokens);
        let values = tokens as u128 * (30 * self.width + block.max().unwrap_or(0)) as u128;
        4 * batch as u128 * values
    }

    /// Reads the sizes from whoever gives them; those of the samples are `samples` where none are
    /// given.
    #[rustfmt::skip]
    pub fn read(keys: &mut dyn Keys, samples: Shape) -> Self {
        let Shape { channels, side: input_size, classes } = Shape::read(keys, samples);
        let Tokens { patch_size, heads, width } = Tokens::read(keys, input_size, 2);
        let depth = keys.integer(Key { name: "depth", least: 1, most: 4096, default: 12 }, None);
        let mlp_ratio = keys.float(Key { name: "mlp_ratio", least: 0.0, most: 64.0, default: 4.0 });
        let learn_sigma = keys.boolean("learn_sigma", true);
        let (blocks, widths) = (Vec::new(), None);
        Self { input_size, patch_size, channels, width, depth, heads, mlp_ratio, classes, learn_sigma, blocks, widths }
    }

    /// Why no model can have these sizes, if so.
    pub fn problem(&self) -> Option<String> {
        let mut check = Check::new(|name| match name {
            "input_size" => self.input_size as f64,
            "patch_size" => self.patch_size as f64,
            "channels" => self.channels as f64,
            // Any width will do where heads have one of their own, and positions are stored.
            "width" if self.widths.is_some() => self.heads as f64 * 4.0,
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
        if let Some(problem) = self.problem_of_widths() {
            return Some(problem);
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
