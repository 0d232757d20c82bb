//! Sizes of a [`Mar`](super::Mar), and what follows from them.

use serde::{Deserialize, Serialize};

use crate::models::dit::TIMESTEP_FEATURES;

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

impl MarConfig {
    /// Tokens of an image.
    pub fn tokens(&self) -> usize {
        (self.input_size / self.patch_size).pow(2)
    }

    /// Numbers of a token.
    pub fn token_width(&self) -> usize {
        self.channels * self.patch_size.pow(2)
    }

    /// Blocks of both trunks.
    pub fn depth(&self) -> usize {
        self.encoder.depth + self.decoder.depth
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
        for (name, stack) in [("encoder", self.encoder), ("decoder", self.decoder)] {
            let width = stack.width;
            let hidden = (self.mlp_ratio * width as f64) as usize;
            for block in 0..stack.depth {
                let name = format!("{name}_blocks.{block}");
                norm(&mut put, &format!("{name}.norm1"), width);
                linear(&mut put, &format!("{name}.attn.qkv"), width, 3 * width);
                linear(&mut put, &format!("{name}.attn.proj"), width, width);
                norm(&mut put, &format!("{name}.norm2"), width);
                linear(&mut put, &format!("{name}.mlp.fc1"), width, hidden);
                linear(&mut put, &format!("{name}.mlp.fc2"), hidden, width);
            }
            norm(&mut put, &format!("{name}_norm"), width);
        }
        linear(&mut put, "decoder_embed", encoder, decoder);
        let (width, head) = (self.head_width, "diffloss.net");
        linear(
            &mut put,
            &format!("{head}.time_embed.mlp.0"),
            TIMESTEP_FEATURES,
            width,
        );
        linear(&mut put, &format!("{head}.time_embed.mlp.2"), width, width);
        linear(&mut put, &format!("{head}.cond_embed"), decoder, width);
        linear(&mut put, &format!("{head}.input_proj"), token, width);
        for block in 0..self.head_depth {
            let name = format!("{head}.res_blocks.{block}");
            norm(&mut put, &format!("{name}.in_ln"), width);
            linear(&mut put, &format!("{name}.mlp.0"), width, width);
            linear(&mut put, &format!("{name}.mlp.2"), width, width);
            linear(
                &mut put,
                &format!("{name}.adaLN_modulation.1"),
                width,
                3 * width,
            );
        }
        let last = format!("{head}.final_layer");
        linear(&mut put, &format!("{last}.linear"), width, 2 * token);
        linear(
            &mut put,
            &format!("{last}.adaLN_modulation.1"),
            width,
            2 * width,
        );
        tensors
    }

    /// Parameters.
    pub fn parameters(&self) -> usize {
        let count = |(_, shape): &(String, Vec<usize>)| shape.iter().product::<usize>();
        self.tensors().iter().map(count).sum()
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
