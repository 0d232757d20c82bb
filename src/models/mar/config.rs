//! Sizes of a [`Mar`](super::Mar), and what follows from them.

use serde::{Deserialize, Serialize};

use super::Widths;
use crate::models::Shape;
use crate::models::blocks::{self, BlockKind, MOST_WIDTH, Named, Standing, listed, standing};
use crate::models::dit::TIMESTEP_FEATURES;
use crate::models::keys::{Check, Key, Keys, Tokens};
use crate::trunk::{Granularity, Trunk};

/// Most tokens of an image: a side of 4096 pixels in patches of 16.
const MOST_TOKENS: usize = 1 << 16;
/// Noised copies of each token in the training of the published models.
pub const COPIES: usize = 4;
/// Mean of the share of unknown tokens in that training: of a normal distribution of deviation 0.25
/// around 1, cut to 0.7 to 1.
const MEAN_UNKNOWN: f64 = 0.867;

/// Sizes of a [`Mar`](super::Mar).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MarConfig {
    /// Side of the (latent) image.
    pub input_size: usize,
    /// Side of a patch, which is a token.
    pub patch_size: usize,
    /// Channels of the image.
    pub channels: usize,
    /// Number of classes; a dropped label has a vector of its own.
    pub classes: usize,
    /// Places in front of the tokens that hold the class.
    pub buffer: usize,
    /// Ratio of the MLPs' hidden width to the width.
    pub mlp_ratio: f64,
    /// Blocks over the class and the known tokens.
    pub encoder: Stack,
    /// Blocks over the class and all tokens.
    pub decoder: Stack,
    /// Width of the head, which denoises one token at a time.
    pub head_width: usize,
    /// Residual blocks of the head.
    pub head_depth: usize,
    /// What stands at each place of both trunks, where that is not one whole block everywhere; else
    /// empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blocks: Vec<BlockKind>,
    /// Widths within the network, where they do not follow from its other sizes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub widths: Option<Widths>,
}

/// Sizes of a trunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stack {
    /// Width.
    pub width: usize,
    /// Blocks.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
}

impl std::fmt::Display for MarConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            input_size,
            patch_size,
            channels,
            classes,
            encoder,
            decoder,
            ..
        } = self;
        let widths = self.widths.as_ref();
        let places = self.places();
        let of = |stack: &Stack, places: &[Standing]| {
            let Stack {
                width,
                depth,
                heads,
            } = stack;
            let layers = if *depth == 1 { "layer" } else { "layers" };
            let kinds = blocks::described(places.iter().map(|place| place.kind));
            let within = match widths {
                None => format!("{heads} heads"),
                Some(_) => {
                    let within = places.iter().flat_map(|place| &place.within);
                    blocks::in_words(&within.copied().collect::<Vec<_>>())
                }
            };
            format!("{depth} {layers}{kinds} of width {width} with {within}")
        };
        let [encoder, decoder] = [of(encoder, &places[0]), of(decoder, &places[1])];
        write!(
            f,
            "MAR, encoder of {encoder}, decoder of {decoder}, head of {} blocks of width {}",
            self.head_depth, self.head_width
        )?;
        if let Some(widths) = widths {
            let hidden = blocks::range(widths.head.iter().copied());
            write!(f, ", MLP {hidden}, condition {}", widths.condition)?;
        }
        write!(
            f,
            ", patch {patch_size}, {channels}x{input_size}x{input_size}, {classes} classes"
        )
    }
}

/// Counts beyond what a number can hold are of models that no machine can run.
fn countable(count: u128) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

impl MarConfig {
    /// Tokens of an image.
    pub fn tokens(&self) -> usize {
        (self.input_size / self.patch_size).pow(2)
    }

    /// Numbers of a token.
    pub fn token_width(&self) -> usize {
        self.channels * self.patch_size.pow(2)
    }

    /// Sizes of its samples.
    pub fn shape(&self) -> Shape {
        Shape {
            channels: self.channels,
            side: self.input_size,
            classes: self.classes,
        }
    }

    /// Blocks of both trunks.
    pub fn depth(&self) -> usize {
        self.encoder.depth + self.decoder.depth
    }

    /// What stands at each place of both trunks.
    pub fn kinds(&self) -> impl Iterator<Item = BlockKind> {
        let whole = self.blocks.is_empty().then_some(BlockKind::Whole);
        let whole = whole.into_iter().cycle().take(self.depth());
        self.blocks.iter().copied().chain(whole)
    }

    /// The same of the encoder and of the decoder, with their widths.
    pub(super) fn places(&self) -> [Vec<Standing>; 2] {
        let mut widths = self.widths().blocks.into_iter();
        let mut kinds = self.kinds();
        [self.encoder, self.decoder]
            .map(|stack| standing(kinds.by_ref().take(stack.depth), &mut widths))
    }

    /// The blocks of the encoder and those of the decoder in order, with the beginning of their
    /// tensors' names.
    pub(super) fn named_blocks(&self) -> [Vec<Named>; 2] {
        let [encoder, decoder] = self.places();
        [
            blocks::named("encoder_blocks", &encoder),
            blocks::named("decoder_blocks", &decoder),
        ]
    }

    /// The layers of the encoder and then those of the decoder, which no group may be across; None
    /// by branch where blocks run in pairs.
    pub fn trunk(&self, granularity: Granularity) -> Option<Trunk> {
        let depth = blocks::layers(self.kinds(), granularity)?;
        let encoder = self.layers_of_encoder(granularity);
        let border = (0 < encoder && encoder < depth).then_some(encoder);
        Some(Trunk {
            depth,
            borders: border.into_iter().collect(),
        })
    }

    /// Sizes `[places, width]` of the states between blocks where all tokens are known; None where
    /// the trunks differ in width.
    pub fn states(&self) -> Option<[usize; 2]> {
        let width = self.decoder.width;
        (self.encoder.width == width).then_some([self.places_of_trunk(), width])
    }

    /// Places of a trunk: those of the class, and the tokens.
    fn places_of_trunk(&self) -> usize {
        self.buffer + self.tokens()
    }

    /// Hidden width of a trunk's MLPs.
    pub fn hidden(&self, stack: Stack) -> usize {
        // A ratio inferred from sizes may be a rounding error below the whole number it stands for.
        (self.mlp_ratio * stack.width as f64 + 1e-6) as usize
    }

    /// Layers of the encoder; 0 by branch where its blocks run in pairs.
    pub(in crate::models) fn layers_of_encoder(&self, granularity: Granularity) -> usize {
        let encoder = self.kinds().take(self.encoder.depth);
        blocks::layers(encoder, granularity).unwrap_or(0)
    }

    /// The same with only the given layers of its trunk.
    pub fn keep(&self, kept: &[usize], granularity: Granularity) -> Self {
        let mut layers = (0..).map(|layer| kept.contains(&layer));
        let mut stays = || layers.next().unwrap_or(false);
        let left = self
            .places()
            .map(|places| blocks::keep(places, &mut stays, granularity));
        let within = left.iter().flatten().flat_map(|place| place.within.clone());
        let widths = Widths {
            blocks: within.collect(),
            ..self.widths()
        };
        let kinds = left.map(|places| places.into_iter().map(|place| place.kind).collect());
        self.of_blocks(kinds).of_widths(widths)
    }

    /// The same with neighbouring blocks of each trunk in pairs on one input; a last one without a
    /// neighbour stays alone. None where a block is not whole.
    pub fn in_pairs(&self) -> Option<Self> {
        self.blocks.is_empty().then(|| {
            let paired = [self.encoder, self.decoder].map(|stack| blocks::in_pairs(stack.depth));
            self.of_blocks(paired).of_widths(self.widths())
        })
    }

    /// The same with these blocks in the encoder and the decoder, of widths that follow from the
    /// other sizes.
    pub fn of_blocks(&self, [encoder, decoder]: [Vec<BlockKind>; 2]) -> Self {
        let with = |stack: Stack, blocks: &Vec<BlockKind>| Stack {
            depth: blocks.len(),
            ..stack
        };
        Self {
            encoder: with(self.encoder, &encoder),
            decoder: with(self.decoder, &decoder),
            blocks: listed([encoder, decoder].concat()),
            widths: None,
            ..self.clone()
        }
    }

    /// The same with so many blocks, all of them whole and of the usual widths, divided as now, the
    /// encoder's share rounded up.
    pub fn with_depth(&self, depth: usize) -> Self {
        let share = (depth * self.encoder.depth).div_ceil(self.depth().max(1));
        let with = |stack: Stack, depth| Stack { depth, ..stack };
        Self {
            encoder: with(self.encoder, share),
            decoder: with(self.decoder, depth - share),
            blocks: Vec::new(),
            widths: None,
            ..self.clone()
        }
    }

    /// Multiply-accumulates of the blocks of a trunk of this width over so many places.
    fn stack_macs(stack: Stack, blocks: &[Named], places: usize) -> u128 {
        let (width, places) = (stack.width as u128, places as u128);
        let blocks = blocks.iter().map(|Named { widths, .. }| {
            let (attention, hidden) = (widths.attention() as u128, widths.hidden as u128);
            places * width * (4 * attention + 2 * hidden) + 2 * places * places * attention
        });
        blocks.sum()
    }

    /// Multiply-accumulates of the trunks with so many known tokens.
    fn trunk_macs(&self, known: usize) -> u128 {
        let blocks = self.named_blocks();
        let (encoder, decoder) = (self.encoder.width as u128, self.decoder.width as u128);
        let seen = (self.buffer + known) as u128;
        known as u128 * self.token_width() as u128 * encoder
            + Self::stack_macs(self.encoder, &blocks[0], self.buffer + known)
            + seen * encoder * decoder
            + Self::stack_macs(self.decoder, &blocks[1], self.places_of_trunk())
    }

    /// Multiply-accumulates of the head's part that is the same at all times, of one token.
    fn projection_macs(&self) -> u128 {
        self.decoder.width as u128 * self.widths().condition as u128
    }

    /// Multiply-accumulates of a pass of one token through the head.
    fn head_macs(&self) -> u128 {
        let (width, token) = (self.head_width as u128, self.token_width() as u128);
        let widths = self.widths();
        let (condition, timestep) = (widths.condition as u128, widths.timestep as u128);
        let blocks = widths.head.iter().map(|hidden| {
            let hidden = *hidden as u128;
            2 * width * hidden + 3 * condition * width
        });
        token * width
            + timestep * (TIMESTEP_FEATURES as u128 + condition)
            + blocks.sum::<u128>()
            + width * (2 * condition + 2 * token)
    }

    /// Multiply-accumulates of a pass of one image in training, at the published mean share of
    /// unknown tokens and their number of noised copies.
    pub fn training_macs(&self) -> usize {
        let tokens = self.tokens();
        let unknown = (tokens as f64 * MEAN_UNKNOWN).ceil() as usize;
        let rows = unknown as u128;
        let head = self.projection_macs() + COPIES as u128 * self.head_macs();
        countable(self.trunk_macs(tokens - unknown) + rows * head)
    }

    /// Multiply-accumulates of one pass of one image of which every token is known, and every token
    /// is denoised once.
    pub fn macs(&self) -> usize {
        let tokens = self.tokens() as u128;
        countable(
            self.trunk_macs(self.tokens()) + tokens * (self.projection_macs() + self.head_macs()),
        )
    }

    /// Multiply-accumulates of drawing an image in rounds, in each of which so many tokens are
    /// `known`, and so many steps of the head.
    pub fn drawing_macs(&self, known: &[usize], steps: usize) -> usize {
        let rounds: u128 = known.iter().map(|known| self.trunk_macs(*known)).sum();
        let token = self.projection_macs() + steps as u128 * self.head_macs();
        countable(rounds + self.tokens() as u128 * token)
    }

    /// Parameters of a low-rank update of every linear layer: all matrices but the classes' table
    /// and the vector of a dropped one.
    pub fn lora_parameters(&self, rank: usize) -> usize {
        let matrices = self.tensors().into_iter().filter(|(name, shape)| {
            shape.len() == 2 && !["class_emb.weight", "fake_latent"].contains(&name.as_str())
        });
        matrices
            .map(|(_, shape)| rank * (shape[0] + shape[1]))
            .sum()
    }

    /// Bytes of f32 activations that a block leaves for its backward pass, all tokens known: as of
    /// [`DitConfig`](crate::models::DitConfig), without its modulations.
    pub fn block_bytes(&self, batch: usize) -> u128 {
        let places = self.places_of_trunk() as u128;
        let blocks = self.named_blocks();
        let of_stack = |stack: Stack, blocks: &[Named]| {
            let within = blocks.iter().map(|Named { widths, .. }| {
                9 * widths.hidden as u128 + 5 * widths.heads as u128 * places
            });
            places * (24 * stack.width as u128 + within.max().unwrap_or(0))
        };
        let values = of_stack(self.encoder, &blocks[0]).max(of_stack(self.decoder, &blocks[1]));
        4 * batch as u128 * values
    }

    /// Bytes of f32 activations that the head leaves for its backward pass, of so many copies of
    /// every token.
    pub fn head_bytes(&self, batch: usize, copies: usize) -> u128 {
        self.bytes_of_head_blocks(batch, copies, self.head_depth)
    }

    /// Bytes of f32 activations that the head needs at once: those of one of its blocks.
    pub fn head_pass_bytes(&self, batch: usize, copies: usize) -> u128 {
        self.bytes_of_head_blocks(batch, copies, 1)
    }

    fn bytes_of_head_blocks(&self, batch: usize, copies: usize, blocks: usize) -> u128 {
        let rows = (batch * copies) as u128 * self.tokens() as u128;
        4 * rows * (10 * blocks as u128 + 6) * self.head_width as u128
    }

    /// Reads the sizes from whoever gives them; those of the samples are `samples` where none are
    /// given. Both trunks are of one width.
    #[rustfmt::skip]
    pub fn read(keys: &mut dyn Keys, samples: Shape) -> Self {
        let Shape { channels, side: input_size, classes } = Shape::read(keys, samples);
        let Tokens { patch_size, heads, width } = Tokens::read(keys, input_size, 1);
        let mut count = |name, least, most, default| {
            keys.integer(Key { name, least, most, default }, None)
        };
        let encoder = Stack { width, heads, depth: count("encoder_depth", 0, 4096, 6) };
        let decoder = Stack { width, heads, depth: count("decoder_depth", 0, 4096, 6) };
        let buffer = count("buffer", 1, 4096, 8);
        let head_width = count("head_width", 1, 65_536, 64);
        let head_depth = count("head_depth", 1, 1024, 3);
        let mlp_ratio = keys.float(Key { name: "mlp_ratio", least: 0.0, most: 64.0, default: 4.0 });
        let (blocks, widths) = (Vec::new(), None);
        Self { input_size, patch_size, channels, classes, buffer, mlp_ratio, encoder, decoder, head_width, head_depth, blocks, widths }
    }

    /// The sizes under the names of [`read`](Self::read)'s keys, for trunks of one width.
    pub(in crate::models) fn keys(&self) -> impl Serialize {
        #[derive(Serialize)]
        struct AsKeys {
            input_size: usize,
            patch_size: usize,
            channels: usize,
            classes: usize,
            width: usize,
            heads: usize,
            encoder_depth: usize,
            decoder_depth: usize,
            buffer: usize,
            head_width: usize,
            head_depth: usize,
            mlp_ratio: f64,
        }
        AsKeys {
            input_size: self.input_size,
            patch_size: self.patch_size,
            channels: self.channels,
            classes: self.classes,
            width: self.decoder.width,
            heads: self.decoder.heads,
            encoder_depth: self.encoder.depth,
            decoder_depth: self.decoder.depth,
            buffer: self.buffer,
            head_width: self.head_width,
            head_depth: self.head_depth,
            mlp_ratio: self.mlp_ratio,
        }
    }

    /// Why no model can have these sizes, if so.
    pub fn problem(&self) -> Option<String> {
        if self.encoder.depth == 0 && self.decoder.depth == 0 {
            return Some("encoder_depth and decoder_depth are 0, and one must be above".into());
        }
        for stack in [self.encoder, self.decoder] {
            let mut check = Check::new(|name| match name {
                "input_size" => self.input_size as f64,
                "patch_size" => self.patch_size as f64,
                "channels" => self.channels as f64,
                "classes" => self.classes as f64,
                // Any width will do where heads have one of their own.
                "width" if self.widths.is_some() => stack.heads as f64 * 4.0,
                // Positions are stored, so that any multiple of the heads will do.
                "width" if stack.width.is_multiple_of(stack.heads.max(1)) => {
                    stack.heads as f64 * 4.0
                }
                "width" => stack.width as f64,
                "heads" => stack.heads as f64,
                "encoder_depth" => self.encoder.depth as f64,
                "decoder_depth" => self.decoder.depth as f64,
                "buffer" => self.buffer as f64,
                "head_width" => self.head_width as f64,
                "head_depth" => self.head_depth as f64,
                _ => self.mlp_ratio,
            });
            Self::read(&mut check, self.shape());
            if check.problem.is_some() {
                return check.problem;
            }
            if !(1..=MOST_WIDTH).contains(&stack.width) {
                return Some(format!(
                    "width is {}, which must lie in 1..={MOST_WIDTH}",
                    stack.width
                ));
            }
            if self.hidden(stack) == 0 {
                return Some(format!(
                    "mlp_ratio {} leaves no hidden width",
                    self.mlp_ratio
                ));
            }
        }
        if !self.blocks.is_empty() && self.blocks.len() != self.depth() {
            return Some(format!(
                "{} blocks are described, and both trunks have {}",
                self.blocks.len(),
                self.depth()
            ));
        }
        if let Some(problem) = self.problem_of_widths() {
            return Some(problem);
        }
        let Self {
            input_size,
            patch_size,
            ..
        } = self;
        (self.tokens() > MOST_TOKENS).then(|| {
            format!(
                "input_size {input_size} in patches of {patch_size} makes more than {MOST_TOKENS} tokens"
            )
        })
    }

    /// Names and shapes of all parameters in a checkpoint, as in the reference.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (tokens, token) = (self.tokens(), self.token_width());
        let places = self.buffer + tokens;
        let (encoder, decoder) = (self.encoder.width, self.decoder.width);
        let mut tensors: Vec<(String, Vec<usize>)> = Vec::new();
        let mut put = |name: &str, shape: &[usize]| tensors.push((name.to_owned(), shape.to_vec()));
        put("fake_latent", &[1, encoder]);
        put("encoder_pos_embed_learned", &[1, places, encoder]);
        put("mask_token", &[1, 1, decoder]);
        put("decoder_pos_embed_learned", &[1, places, decoder]);
        put("diffusion_pos_embed_learned", &[1, tokens, decoder]);
        put("class_emb.weight", &[self.classes, encoder]);
        linear(&mut put, "z_proj", token, encoder);
        norm(&mut put, "z_proj_ln", encoder);
        let widths = self.widths();
        let stacks = [("encoder", encoder), ("decoder", decoder)];
        for ((stack, width), blocks) in stacks.into_iter().zip(self.named_blocks()) {
            for Named { name, kind, widths } in blocks {
                let (attention, hidden) = (widths.attention(), widths.hidden);
                if kind.attention() {
                    norm(&mut put, &format!("{name}.norm1"), width);
                    linear(&mut put, &format!("{name}.attn.qkv"), width, 3 * attention);
                    linear(&mut put, &format!("{name}.attn.proj"), attention, width);
                }
                if kind.mlp() {
                    norm(&mut put, &format!("{name}.norm2"), width);
                    linear(&mut put, &format!("{name}.mlp.fc1"), width, hidden);
                    linear(&mut put, &format!("{name}.mlp.fc2"), hidden, width);
                }
            }
            norm(&mut put, &format!("{stack}_norm"), width);
        }
        linear(&mut put, "decoder_embed", encoder, decoder);
        let (width, head) = (self.head_width, "diffloss.net");
        let (condition, timestep) = (widths.condition, widths.timestep);
        let time = format!("{head}.time_embed.mlp");
        linear(&mut put, &format!("{time}.0"), TIMESTEP_FEATURES, timestep);
        linear(&mut put, &format!("{time}.2"), timestep, condition);
        linear(&mut put, &format!("{head}.cond_embed"), decoder, condition);
        linear(&mut put, &format!("{head}.input_proj"), token, width);
        for (block, hidden) in widths.head.into_iter().enumerate() {
            let name = format!("{head}.res_blocks.{block}");
            norm(&mut put, &format!("{name}.in_ln"), width);
            linear(&mut put, &format!("{name}.mlp.0"), width, hidden);
            linear(&mut put, &format!("{name}.mlp.2"), hidden, width);
            let modulation = format!("{name}.adaLN_modulation.1");
            linear(&mut put, &modulation, condition, 3 * width);
        }
        let last = format!("{head}.final_layer");
        linear(&mut put, &format!("{last}.linear"), width, 2 * token);
        let modulation = format!("{last}.adaLN_modulation.1");
        linear(&mut put, &modulation, condition, 2 * width);
        tensors
    }
}

fn linear(put: &mut impl FnMut(&str, &[usize]), name: &str, input: usize, output: usize) {
    put(&format!("{name}.weight"), &[output, input]);
    put(&format!("{name}.bias"), &[output]);
}

fn norm(put: &mut impl FnMut(&str, &[usize]), name: &str, width: usize) {
    put(&format!("{name}.weight"), &[width]);
    put(&format!("{name}.bias"), &[width]);
}
