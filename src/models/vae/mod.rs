//! The autoencoder of latent diffusion: images to latents of a fraction of their side, and back.
//!
//! Stable Diffusion's "KL-f8" (Rombach et al., arXiv 2112.10752) and MAR's "KL-16" (Li et al.,
//! arXiv 2406.11838) under the parameter names of diffusers' `AutoencoderKL`. It is only used for
//! inference.

mod blocks;
mod config;

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};

use crate::backend::Compute;
use crate::ops::{Convolution, FusedOps, Window};

use super::convolutional::{GroupNorm, convolution};
pub use blocks::{DownBlock, MidBlock, ResnetBlock, UpBlock};
pub use config::{VaeConfig, rename_to_diffusers};

/// A variational autoencoder.
#[derive(Module, Debug)]
pub struct Vae<B: Backend> {
    /// Images to features of latent size.
    pub encoder: Encoder<B>,
    /// Features to moments.
    pub quant_conv: Convolution<B>,
    /// Latents to the decoder's input.
    pub post_quant_conv: Convolution<B>,
    /// The decoder's input to images.
    pub decoder: Decoder<B>,
    #[module(skip)]
    compute: Compute,
}

impl<B: Backend> Vae<B> {
    /// A network of zeros, to be filled from a checkpoint.
    ///
    /// # Panics
    /// When the configuration has a [`problem`](VaeConfig::problem).
    pub fn zeros(config: &VaeConfig, device: &B::Device) -> Self {
        if let Some(problem) = config.problem() {
            panic!("no autoencoder can have these sizes: {problem}");
        }
        let latent = config.latent_channels;
        let pointwise = |channels| {
            Convolution::zeros(channels, channels, [1; 2], Window::padded([0; 2]), device)
        };
        Self {
            encoder: Encoder::zeros(config, device),
            quant_conv: pointwise(2 * latent),
            post_quant_conv: pointwise(latent),
            decoder: Decoder::zeros(config, device),
            compute: Compute::F32,
        }
    }

    /// The same network with matrix products (those of its attention) of type `compute`, which the
    /// backend must [support](crate::ops::supports); a new network's are of f32. Convolutions stay
    /// of f32: they are nearly all that pictures are made by.
    pub fn computing(mut self, compute: Compute) -> Self {
        self.compute = compute;
        for block in &mut self.encoder.down_blocks {
            block.set_compute(compute);
        }
        self.encoder.mid_block.set_compute(compute);
        self.decoder.mid_block.set_compute(compute);
        self
    }

    /// Type of its matrix products.
    pub fn compute(&self) -> Compute {
        self.compute
    }
}

impl<B: FusedOps> Vae<B> {
    /// The distribution of latents `[batch, latent channels, h, w]` of images `[batch, channels, H,
    /// W]` in [−1, 1]; H and W are multiples of [`VaeConfig::factor`], h and w that much smaller.
    ///
    /// Diffusion models work on latents multiplied by [`VaeConfig::scaling_factor`].
    pub fn encode(&self, x: Tensor<B, 4>) -> Posterior<B> {
        Posterior::of(self.moments(x))
    }

    /// [`encode`](Self::encode) for at most `most` images at once: the same values in less memory.
    pub fn encode_in_slices(&self, x: Tensor<B, 4>, most: usize) -> Posterior<B> {
        Posterior::of(in_slices(x, most, |x| self.moments(x)))
    }

    /// Images `[batch, channels, H, W]`, about in [−1, 1], of latents `[batch, latent channels, h,
    /// w]`.
    ///
    /// Outputs of a diffusion model must be divided by [`VaeConfig::scaling_factor`] first.
    pub fn decode(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        self.decoder.forward(self.post_quant_conv.forward(latents))
    }

    /// [`decode`](Self::decode) for at most `most` latents at once: the same values in less memory.
    pub fn decode_in_slices(&self, latents: Tensor<B, 4>, most: usize) -> Tensor<B, 4> {
        in_slices(latents, most, |latents| self.decode(latents))
    }

    /// Mean and log-variance, `[batch, 2 latent channels, h, w]`.
    fn moments(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        self.quant_conv.forward(self.encoder.forward(x))
    }
}

/// Applies `f` to at most `most` entries (at least one) of the first dimension at a time.
fn in_slices<B: Backend>(
    x: Tensor<B, 4>,
    most: usize,
    f: impl Fn(Tensor<B, 4>) -> Tensor<B, 4>,
) -> Tensor<B, 4> {
    if x.dims()[0] <= most {
        return f(x);
    }
    let parts = x.split(most.max(1), 0).into_iter().map(f).collect();
    Tensor::cat(parts, 0)
}

/// A diagonal Gaussian over latents, `[batch, latent channels, h, w]` each.
#[derive(Debug, Clone)]
pub struct Posterior<B: Backend> {
    /// Means.
    pub mean: Tensor<B, 4>,
    /// Log-variances, within [−30, 20].
    pub log_variance: Tensor<B, 4>,
}

impl<B: Backend> Posterior<B> {
    /// The distribution with moments `[batch, 2 latent channels, h, w]`, means first; log-variances
    /// are clamped.
    pub fn of(moments: Tensor<B, 4>) -> Self {
        let latent = moments.dims()[1] / 2;
        Self {
            mean: moments.clone().narrow(1, 0, latent),
            log_variance: moments.narrow(1, latent, latent).clamp(-30.0, 20.0),
        }
    }

    /// Standard deviations.
    pub fn std(&self) -> Tensor<B, 4> {
        (self.log_variance.clone() * 0.5).exp()
    }

    /// A latent from standard normal `noise` of its shape.
    pub fn sample(&self, noise: Tensor<B, 4>) -> Tensor<B, 4> {
        self.mean.clone() + self.std() * noise
    }
}

/// Images to features of latent size.
#[derive(Module, Debug)]
pub struct Encoder<B: Backend> {
    /// Image to the first width.
    pub conv_in: Convolution<B>,
    /// All but the last halve the sides.
    pub down_blocks: Vec<DownBlock<B>>,
    /// The block with attention.
    pub mid_block: MidBlock<B>,
    /// Normalisation before the last convolution.
    pub conv_norm_out: GroupNorm<B>,
    /// To twice the latent channels.
    pub conv_out: Convolution<B>,
}

impl<B: Backend> Encoder<B> {
    fn zeros(config: &VaeConfig, device: &B::Device) -> Self {
        let widths = &config.block_out_channels;
        let (groups, layers) = (config.norm_num_groups, config.layers_per_block);
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let down_blocks = (0..widths.len())
            .map(|level| {
                let input = widths[level.saturating_sub(1)];
                let is_last = level + 1 == widths.len();
                let attends = is_last && config.encoder_attention;
                let sizes = [input, widths[level], layers, groups];
                DownBlock::zeros(sizes, !is_last, attends, device)
            })
            .collect();
        Self {
            conv_in: convolution(config.in_channels, first, device),
            down_blocks,
            mid_block: MidBlock::zeros(last, groups, device),
            conv_norm_out: GroupNorm::ones(last, groups, device),
            conv_out: convolution(last, 2 * config.latent_channels, device),
        }
    }
}

impl<B: FusedOps> Encoder<B> {
    /// `[batch, channels, H, W]` to `[batch, 2 latent channels, h, w]`.
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let mut x = self.conv_in.forward(x);
        for block in &self.down_blocks {
            x = block.forward(x);
        }
        let x = self.mid_block.forward(x);
        self.conv_out.forward(self.conv_norm_out.silu(x))
    }
}

/// Latents to images.
#[derive(Module, Debug)]
pub struct Decoder<B: Backend> {
    /// Latent to the last width.
    pub conv_in: Convolution<B>,
    /// The block with attention.
    pub mid_block: MidBlock<B>,
    /// All but the last double the sides.
    pub up_blocks: Vec<UpBlock<B>>,
    /// Normalisation before the last convolution.
    pub conv_norm_out: GroupNorm<B>,
    /// To the channels of an image.
    pub conv_out: Convolution<B>,
}

impl<B: Backend> Decoder<B> {
    fn zeros(config: &VaeConfig, device: &B::Device) -> Self {
        let widths: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (groups, layers) = (config.norm_num_groups, config.layers_per_block + 1);
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let up_blocks = (0..widths.len())
            .map(|level| {
                let input = widths[level.saturating_sub(1)];
                let doubles = level + 1 < widths.len();
                UpBlock::zeros(input, widths[level], layers, groups, doubles, device)
            })
            .collect();
        Self {
            conv_in: convolution(config.latent_channels, first, device),
            mid_block: MidBlock::zeros(first, groups, device),
            up_blocks,
            conv_norm_out: GroupNorm::ones(last, groups, device),
            conv_out: convolution(last, config.out_channels, device),
        }
    }
}

impl<B: FusedOps> Decoder<B> {
    /// `[batch, latent channels, h, w]` to `[batch, channels, H, W]`.
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let mut x = self.mid_block.forward(self.conv_in.forward(x));
        for block in &self.up_blocks {
            x = block.forward(x);
        }
        self.conv_out.forward(self.conv_norm_out.silu(x))
    }
}
