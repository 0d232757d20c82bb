//! MAR: masked autoregression over continuous tokens (Li et al., arXiv 2406.11838).
//!
//! Some tokens of an image are known. The encoder sees the class and the known tokens, the decoder
//! all places, and the [`Head`] denoises each unknown token under what the decoder says of its
//! place.

mod block;
mod channels;
mod config;
mod head;
pub(super) mod infer;
pub(super) mod presets;
mod tokens;
mod widths;

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor, backend::Backend};

pub use self::block::{LayerNorm, MarBlock, MarPlace};
pub use self::config::{COPIES, MarConfig, Stack};
pub use self::head::{DiffLoss, Head};
pub use self::tokens::{Known, of_tokens, tokens};
pub(super) use self::widths::BLOCKS_IN_PYTORCH;
pub use self::widths::Widths;
use super::blocks::Standing;
use super::{Denoiser, FillsIn, Prunable, Shape};
use crate::backend::Compute;
use crate::ops::{FusedOps, Linear, indices};
use crate::trunk::{BlockHook, Granularity, Site, Trunk};

/// A masked autoregressive network.
#[derive(Module, Debug)]
pub struct Mar<B: Backend> {
    class_emb: Classes<B>,
    /// In the place of a class whose label was dropped, `[1, width]`.
    fake_latent: Param<Tensor<B, 2>>,
    /// In the place of an unknown token, `[1, 1, width]`.
    mask_token: Param<Tensor<B, 3>>,
    z_proj: Linear<B>,
    z_proj_ln: LayerNorm<B>,
    encoder_pos_embed_learned: Param<Tensor<B, 3>>,
    encoder_blocks: Vec<MarPlace<B>>,
    encoder_norm: LayerNorm<B>,
    decoder_embed: Linear<B>,
    decoder_pos_embed_learned: Param<Tensor<B, 3>>,
    decoder_blocks: Vec<MarPlace<B>>,
    decoder_norm: LayerNorm<B>,
    diffusion_pos_embed_learned: Param<Tensor<B, 3>>,
    /// The head, under the reference's name.
    pub diffloss: DiffLoss<B>,
    patch_size: usize,
    buffer: usize,
    mlp_ratio: f64,
    /// Of the encoder and of the decoder.
    #[module(skip)]
    heads: [usize; 2],
    #[module(skip)]
    granularity: Granularity,
}

/// A vector for each class.
#[derive(Module, Debug)]
pub struct Classes<B: Backend> {
    /// `[classes, width]`
    weight: Param<Tensor<B, 2>>,
}

impl<B: Backend> Mar<B> {
    /// A network of zeros, to be filled from a checkpoint or an initialisation.
    pub fn zeros(config: &MarConfig, device: &B::Device) -> Self {
        let (encoder, decoder) = (config.encoder, config.decoder);
        let places = config.buffer + config.tokens();
        let table = |places: usize, width: usize| {
            Param::from_tensor(Tensor::zeros([1, places, width], device))
        };
        let vectors =
            |count: usize, width: usize| Param::from_tensor(Tensor::zeros([count, width], device));
        let blocks = |width: usize, places: Vec<Standing>| {
            let place = |Standing { kind, within }: Standing| {
                MarPlace::new(kind, |block| {
                    MarBlock::zeros(width, (kind, within[block]), device)
                })
            };
            places.into_iter().map(place).collect()
        };
        let [encoding, decoding] = config.places();
        Self {
            class_emb: Classes {
                weight: vectors(config.classes, encoder.width),
            },
            fake_latent: vectors(1, encoder.width),
            mask_token: table(1, decoder.width),
            z_proj: Linear::zeros(config.token_width(), encoder.width, device),
            z_proj_ln: LayerNorm::ones(encoder.width, device),
            encoder_pos_embed_learned: table(places, encoder.width),
            encoder_blocks: blocks(encoder.width, encoding),
            encoder_norm: LayerNorm::ones(encoder.width, device),
            decoder_embed: Linear::zeros(encoder.width, decoder.width, device),
            decoder_pos_embed_learned: table(places, decoder.width),
            decoder_blocks: blocks(decoder.width, decoding),
            decoder_norm: LayerNorm::ones(decoder.width, device),
            diffusion_pos_embed_learned: table(config.tokens(), decoder.width),
            diffloss: DiffLoss {
                net: Head::zeros(config, device),
            },
            patch_size: config.patch_size,
            buffer: config.buffer,
            mlp_ratio: config.mlp_ratio,
            heads: [encoder.heads, decoder.heads],
            granularity: Granularity::Block,
        }
    }

    /// What rebuilds this network, kept layers counted.
    pub fn config(&self) -> MarConfig {
        let stack = |norm: &LayerNorm<B>, heads| Stack {
            width: norm.width(),
            depth: 0,
            heads,
        };
        let (places, patch) = (
            self.diffusion_pos_embed_learned.lazy_shape()[1],
            self.patch_size,
        );
        let head = &self.diffloss.net;
        let widths = head.widths(self.blocks().map(MarBlock::widths).collect());
        let config = MarConfig {
            input_size: places.isqrt() * patch,
            patch_size: patch,
            channels: head.token() / (patch * patch),
            classes: self.class_emb.weight.lazy_shape()[0],
            buffer: self.buffer,
            mlp_ratio: self.mlp_ratio,
            encoder: stack(&self.encoder_norm, self.heads[0]),
            decoder: stack(&self.decoder_norm, self.heads[1]),
            head_width: head.width(),
            head_depth: widths.head.len(),
            blocks: Vec::new(),
            widths: None,
        };
        let kinds = [&self.encoder_blocks, &self.decoder_blocks]
            .map(|places| places.iter().map(MarPlace::kind).collect());
        config.of_blocks(kinds).of_widths(widths)
    }

    /// The blocks of both trunks in order.
    fn blocks(&self) -> impl Iterator<Item = &MarBlock<B>> {
        let places = self.encoder_blocks.iter().chain(&self.decoder_blocks);
        places.flat_map(MarPlace::blocks)
    }

    fn blocks_mut(&mut self) -> impl Iterator<Item = &mut MarBlock<B>> {
        let places = self
            .encoder_blocks
            .iter_mut()
            .chain(&mut self.decoder_blocks);
        places.flat_map(MarPlace::blocks_mut)
    }
}

impl<B: FusedOps> Mar<B> {
    /// The same network with matrix products of type `compute`, which the backend must
    /// [support](crate::ops::supports); a new network's are of f32.
    pub fn computing(mut self, compute: Compute) -> Self {
        self.blocks_mut()
            .for_each(|block| block.set_compute(compute));
        for linear in self.linears_mut() {
            linear.compute = compute;
        }
        self
    }

    /// The encoder: `[batch, buffer + known, width]`.
    pub fn encode(
        &self,
        tokens: Tensor<B, 3>,
        known: &Known,
        y: Tensor<B, 1, Int>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 3> {
        let [batch, count, token] = tokens.dims();
        let device = tokens.device();
        let classes = Tensor::cat(vec![self.class_emb.weight.val(), self.fake_latent.val()], 0);
        let class = classes.select(0, y).unsqueeze_dim::<3>(1);
        let mut x = class.repeat_dim(1, self.buffer);
        let [.., width] = x.dims();
        if known.count() > 0 {
            // Only known tokens are projected.
            let rows = tokens.reshape([batch * count, token]);
            let rows = rows.select(0, indices(&known.rows(), &device));
            let rows = self.z_proj.forward(rows);
            x = Tensor::cat(vec![x, rows.reshape([batch, known.count(), width])], 1);
        } else {
            // Its gradient is zero then, not missing: an optimiser's moments fade.
            let row = tokens.narrow(0, 0, 1).narrow(1, 0, 1).reshape([1, token]);
            let nothing = self.z_proj.forward(row).mul_scalar(0.0);
            x = x + nothing.unsqueeze_dim::<3>(0);
        }
        // The positions of the buffer, and of each sample's known tokens.
        let positions = known.by_sample().flat_map(|known| {
            let tokens = known.iter().map(|token| self.buffer + token);
            (0..self.buffer).chain(tokens)
        });
        let positions: Vec<usize> = positions.collect();
        let table = self.encoder_pos_embed_learned.val().squeeze_dim::<2>(0);
        let positions = table.select(0, indices(&positions, &device));
        let x = x + positions.reshape([batch, self.buffer + known.count(), width]);
        let x = self.z_proj_ln.forward(x);
        self.encoder_norm
            .forward(self.run(0, &self.encoder_blocks, x, hook))
    }

    /// The decoder: `[batch, tokens, width]` from what the encoder says.
    pub fn decode(
        &self,
        seen: Tensor<B, 3>,
        known: &Known,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 3> {
        let [batch, places, _] = seen.dims();
        let device = seen.device();
        let x = self.decoder_embed.forward(seen);
        let [.., width] = x.dims();
        // The rows of the encoder, and last the one that stands for an unknown token.
        let mask = self.mask_token.val().reshape([1, width]);
        let rows = Tensor::cat(vec![x.reshape([batch * places, width]), mask], 0);
        let mut from = Vec::with_capacity(batch * (self.buffer + known.tokens()));
        for (sample, known_tokens) in known.by_sample().enumerate() {
            let first = sample * places;
            from.extend(first..first + self.buffer);
            let mut next = known_tokens.iter().peekable();
            let mut row = first + self.buffer;
            for token in 0..known.tokens() {
                if next.next_if(|known| **known == token).is_some() {
                    from.push(row);
                    row += 1;
                } else {
                    from.push(batch * places);
                }
            }
        }
        let x = rows.select(0, indices(&from, &device));
        let x = x.reshape([batch, self.buffer + known.tokens(), width]);
        let x = x + self.decoder_pos_embed_learned.val();
        let first = match self.granularity {
            Granularity::Block => self.encoder_blocks.len(),
            Granularity::Branch => branches(&self.encoder_blocks),
        };
        let x = self.run(first, &self.decoder_blocks, x, hook);
        let x = self.decoder_norm.forward(x);
        x.narrow(1, self.buffer, known.tokens()) + self.diffusion_pos_embed_learned.val()
    }

    /// Runs layers, the first of which is the trunk's layer `first`.
    fn run(
        &self,
        first: usize,
        places: &[MarPlace<B>],
        mut x: Tensor<B, 3>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 3> {
        let depth = self.trunk().depth;
        let site = |layer| Site { layer, depth };
        match self.granularity {
            Granularity::Block => {
                for (layer, place) in (first..).zip(places) {
                    x = hook.around(site(layer), x, &|x| place.forward(x));
                }
            }
            Granularity::Branch => {
                let blocks = places.iter().flat_map(MarPlace::blocks);
                let branches = blocks.flat_map(MarBlock::branches).flatten();
                for (layer, branch) in (first..).zip(branches) {
                    x = hook.around(site(layer), x, &|x| branch.forward(x));
                }
            }
        }
        x
    }
}

/// Branches of all blocks at some places.
fn branches<B: Backend>(places: &[MarPlace<B>]) -> usize {
    places.iter().map(|place| place.kind().branches()).sum()
}

impl<B: FusedOps> FillsIn<B> for Mar<B> {
    fn patch(&self) -> usize {
        self.patch_size
    }

    fn condition(
        &self,
        tokens: Tensor<B, 3>,
        known: &Known,
        y: Tensor<B, 1, Int>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 3> {
        let seen = self.encode(tokens, known, y, hook);
        self.decode(seen, known, hook)
    }

    fn project(&self, z: Tensor<B, 2>) -> Tensor<B, 2> {
        self.diffloss.net.project(z)
    }

    fn denoise(&self, x: Tensor<B, 2>, t: Tensor<B, 1>, projected: Tensor<B, 2>) -> Tensor<B, 2> {
        self.diffloss.net.forward(x, t, projected)
    }
}

impl<B: FusedOps> Denoiser<B> for Mar<B> {
    fn shape(&self) -> Shape {
        self.config().shape()
    }

    /// Predicts the noise of all tokens, none of which is known.
    fn forward(
        &self,
        x: Tensor<B, 4>,
        t: Tensor<B, 1>,
        y: Tensor<B, 1, Int>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 4> {
        let x = tokens(x, self.patch_size);
        let [batch, count, width] = x.dims();
        let z = self.condition(x.zeros_like(), &Known::none(count, batch), y, hook);
        let t = t.unsqueeze_dim::<2>(1).repeat_dim(1, count).flatten(0, 1);
        let output = self.denoise(x.flatten(0, 1), t, self.project(z.flatten(0, 1)));
        let half = |first| {
            let half = output.clone().narrow(1, first, width);
            of_tokens(half.reshape([batch, count, width]), self.patch_size)
        };
        Tensor::cat(vec![half(0), half(width)], 1)
    }

    fn fills_in(&self) -> Option<&dyn FillsIn<B>> {
        Some(self)
    }
}

impl<B: FusedOps> Prunable<B> for Mar<B> {
    /// The layers of the encoder and then those of the decoder, which no group may be across.
    fn trunk(&self) -> Trunk {
        let trunk = self.config().trunk(self.granularity);
        // The branches of pairs are refused by `by_branch`.
        trunk.unwrap_or_else(|| Trunk::plain(0))
    }

    fn by_branch(mut self) -> Option<Self> {
        self.granularity = Granularity::Branch;
        self.config().trunk(self.granularity).map(|_| self)
    }

    fn in_pairs(mut self) -> Option<Self> {
        self.config().in_pairs()?;
        self.encoder_blocks = MarPlace::in_pairs(self.encoder_blocks);
        self.decoder_blocks = MarPlace::in_pairs(self.decoder_blocks);
        Some(self)
    }

    fn keep(mut self, kept: &[usize]) -> Self {
        let depth = self.trunk().depth;
        if let Some(layer) = kept.iter().find(|layer| **layer >= depth) {
            panic!("layer {layer} of a trunk of {depth}");
        }
        let mut layers = (0..).map(|layer| kept.contains(&layer));
        let mut stays = || layers.next().unwrap_or(false);
        for places in [&mut self.encoder_blocks, &mut self.decoder_blocks] {
            *places = MarPlace::keep(std::mem::take(places), &mut stays, self.granularity);
        }
        self
    }

    fn linears_mut(&mut self) -> Vec<&mut Linear<B>> {
        let Self {
            z_proj,
            decoder_embed,
            encoder_blocks,
            decoder_blocks,
            diffloss,
            ..
        } = self;
        let blocks = encoder_blocks.iter_mut().chain(decoder_blocks);
        [z_proj, decoder_embed]
            .into_iter()
            .chain(
                blocks
                    .flat_map(MarPlace::blocks_mut)
                    .flat_map(MarBlock::linears_mut),
            )
            .chain(diffloss.net.linears_mut())
            .collect()
    }
}

#[cfg(test)]
mod tests;
