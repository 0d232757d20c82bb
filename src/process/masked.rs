//! Masked autoregression with a diffusion loss (Li et al., arXiv 2406.11838): tokens become known
//! in rounds, and those of a round are denoised each on its own, under what the network says of
//! their places.

use burn::tensor::{Int, Tensor, backend::Backend};

use super::losses::Terms;
use super::{GaussianDiffusion, Noised, Process};
use crate::models::mar::{Head, Known, Mar};
use crate::ops::{FusedOps, indices};
use crate::trunk::Plain;

/// The loss that a network is trained by.
#[derive(Debug, Clone)]
pub struct DiffusionLoss {
    diffusion: GaussianDiffusion,
    /// Noised copies of each token, which share the network's pass.
    pub copies: usize,
}

impl DiffusionLoss {
    /// The published loss, over the cosine schedule of 1,000 steps.
    pub fn new(copies: usize) -> Self {
        let diffusion = GaussianDiffusion::full_cosine();
        Self { diffusion, copies }
    }

    /// Tokens `[batch, tokens, token width]` noised to times `t`, one for each row of `noise`
    /// `[copies batch tokens, token width]`: all tokens of the first copy, then those of the next.
    pub fn noised<B: Backend>(
        &self,
        tokens: Tensor<B, 3>,
        noise: Tensor<B, 2>,
        t: Vec<f32>,
    ) -> Noised<B> {
        let [batch, count, width] = tokens.dims();
        let rows = tokens.reshape([batch * count, width]);
        let clean = as_images(rows.repeat_dim(0, self.copies));
        let y = Tensor::zeros([t.len()], &noise.device());
        Noised::new(&self.diffusion, clean, as_images(noise), t, y)
    }

    /// The head's terms for each row of noised tokens, under vectors `z` `[batch, tokens, width]`.
    pub fn terms<B: FusedOps>(
        &self,
        head: &Head<B>,
        seen: &Noised<B>,
        z: Tensor<B, 3>,
    ) -> Terms<B> {
        let [batch, count, width] = z.dims();
        let t = self.diffusion.told(&seen.t, &z.device());
        let projected = head.project(z.reshape([batch * count, width]));
        let projected = projected.repeat_dim(0, self.copies);
        let output = head.forward(as_rows(seen.state.clone()), t, projected);
        seen.terms(&self.diffusion, as_images(output))
    }

    /// The mean of the rows' losses over unknown tokens, `[1]`; 0 where all are known.
    pub fn over_unknown<B: Backend>(&self, losses: Tensor<B, 1>, known: &Known) -> Tensor<B, 1> {
        let unknown = known.unknown();
        let mask: Vec<f32> = (0..self.copies)
            .flat_map(|_| unknown.iter().map(|unknown| f32::from(u8::from(*unknown))))
            .collect();
        let count = mask.iter().sum::<f32>().max(1.0);
        let mask = Tensor::from_floats(mask.as_slice(), &losses.device());
        (losses * mask).sum() / count
    }
}

/// How guidance grows over the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuidanceSchedule {
    /// It is the same in all rounds.
    Constant,
    /// It grows with the share of known tokens, from 1 on.
    Linear,
}

/// How images are drawn.
#[derive(Debug, Clone)]
pub struct MaskedSampler {
    /// The head's diffusion, respaced to the steps to take.
    pub diffusion: GaussianDiffusion,
    /// Rounds in which tokens become known.
    pub rounds: usize,
    /// Classifier-free guidance of the predicted noise; 1 is none.
    pub scale: f64,
    /// Guidance over the rounds.
    pub schedule: GuidanceSchedule,
    /// Factor of the noise of the head's steps.
    pub temperature: f64,
}

/// Which noise is asked for: that of one token of each row, `[rows, token width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoiseOf<'a> {
    /// Index of the round.
    pub round: usize,
    /// What a token begins with, or what the head's step of this index, from 0, adds.
    pub step: Option<usize>,
    /// The tokens of each sample that become known.
    pub tokens: &'a [Vec<usize>],
}

/// Gives noise of a round.
pub type RoundNoise<'a, B> = &'a mut dyn FnMut(NoiseOf<'_>) -> Tensor<B, 2>;

impl MaskedSampler {
    /// The reference's count of tokens that are unknown after a round, of `unknown` before it: at
    /// least 1. The last round draws every token that is left, and its guidance still counts one.
    pub fn unknown_after(&self, round: usize, tokens: usize, unknown: usize) -> usize {
        // In the reference's order: a product may be whole, so that the last bit counts.
        let angle = std::f64::consts::FRAC_PI_2 * (round + 1) as f64 / self.rounds as f64;
        let left = (tokens as f64 * angle.cos()).floor() as usize;
        left.min(unknown.saturating_sub(1)).max(1)
    }

    /// The guidance of a round, after which so many tokens are unknown.
    pub fn guidance(&self, tokens: usize, unknown: usize) -> f64 {
        match self.schedule {
            GuidanceSchedule::Constant => self.scale,
            GuidanceSchedule::Linear => {
                1.0 + (self.scale - 1.0) * (tokens - unknown) as f64 / tokens as f64
            }
        }
    }

    /// Draws images of labels `y` `[batch]`; tokens become known in the opposite of each sample's
    /// order, a permutation of them. `watch` is shown each round's vectors (those without a class
    /// last, under guidance) and tokens.
    ///
    /// # Panics
    /// When there are no rounds, or an order is not as long as a sample of the network has tokens.
    pub fn generate<B: FusedOps>(
        &self,
        network: &Mar<B>,
        orders: &[Vec<usize>],
        y: Tensor<B, 1, Int>,
        noise: RoundNoise<'_, B>,
        mut watch: impl FnMut(usize, &Tensor<B, 2>, &Tensor<B, 2>),
    ) -> Tensor<B, 4> {
        let config = network.config();
        let (batch, count) = (orders.len(), config.tokens());
        assert!(self.rounds > 0, "no rounds in which tokens become known");
        assert!(
            orders.iter().all(|order| order.len() == count),
            "orders are of {count} tokens"
        );
        let device = y.device();
        let guided = self.scale != 1.0;
        let y = match guided {
            true => {
                let null = y.zeros_like().add_scalar(config.classes as i64);
                Tensor::cat(vec![y, null], 0)
            }
            false => y,
        };
        let mut tokens = Tensor::zeros([batch, count, config.token_width()], &device);
        let mut unknown = count;
        for round in 0..self.rounds {
            let left = self.unknown_after(round, count, unknown);
            let is_last = round + 1 == self.rounds;
            let chosen: Vec<Vec<usize>> = orders
                .iter()
                .map(|order| {
                    let from = if is_last { 0 } else { left };
                    let mut chosen = order[from.min(unknown)..unknown].to_vec();
                    chosen.sort_unstable();
                    chosen
                })
                .collect();
            if chosen.iter().all(Vec::is_empty) {
                continue;
            }
            let mut known = Known::of_orders(orders, unknown);
            let mut seen = tokens.clone();
            if guided {
                known = known.twice();
                seen = seen.repeat_dim(0, 2);
            }
            let said = network.condition(seen, &known, y.clone(), &mut Plain);
            let [samples, _, width] = said.dims();
            let rows: Vec<usize> = (0..samples)
                .flat_map(|sample| {
                    chosen[sample % batch]
                        .iter()
                        .map(move |token| sample * count + token)
                })
                .collect();
            let flat = said.reshape([samples * count, width]);
            let z = flat.select(0, indices(&rows, &device));
            let scale = self.guidance(count, left);
            let mut of_step = |step| {
                let tokens = &chosen;
                noise(NoiseOf {
                    round,
                    step,
                    tokens,
                })
            };
            let head = &network.diffloss.net;
            let drawn = self.denoise(head, z.clone(), guided.then_some(scale), &mut of_step);
            watch(round, &z, &drawn);
            tokens = with_rows(tokens, &rows[..drawn.dims()[0]], drawn);
            unknown = left;
        }
        network.unpatchify(tokens)
    }

    /// Denoises a token for each of the vectors `z` `[rows, width]`; with guidance the second half
    /// of them are those without a class.
    pub fn denoise<B: FusedOps>(
        &self,
        head: &Head<B>,
        z: Tensor<B, 2>,
        guidance: Option<f64>,
        noise: &mut dyn FnMut(Option<usize>) -> Tensor<B, 2>,
    ) -> Tensor<B, 2> {
        let device = z.device();
        let projected = head.project(z);
        let mut x = noise(None);
        let count = x.dims()[0];
        for (k, step) in (0..self.diffusion.steps()).rev().enumerate() {
            let t = vec![step; count];
            let told = self.diffusion.model_timesteps(&[step], &device);
            let output = match guidance {
                Some(scale) => head.guided(x.clone(), told, projected.clone(), scale),
                None => head.forward(x.clone(), told, projected.clone()),
            };
            let prediction =
                (self.diffusion).predict(as_images(output), as_images(x.clone()), &t, false);
            let noise = as_images(noise(Some(k))) * self.temperature;
            x = as_rows(self.diffusion.ddpm_step(prediction, &t, noise));
        }
        x
    }
}

/// Rows as images of one pixel, which the diffusion is written for.
fn as_images<B: Backend>(rows: Tensor<B, 2>) -> Tensor<B, 4> {
    let [count, width] = rows.dims();
    rows.reshape([count, width, 1, 1])
}

fn as_rows<B: Backend>(images: Tensor<B, 4>) -> Tensor<B, 2> {
    let [count, width, ..] = images.dims();
    images.reshape([count, width])
}

/// Tokens `[batch, tokens, token width]` with some rows replaced.
fn with_rows<B: Backend>(
    tokens: Tensor<B, 3>,
    rows: &[usize],
    values: Tensor<B, 2>,
) -> Tensor<B, 3> {
    let shape @ [batch, count, width] = tokens.dims();
    let mut from: Vec<usize> = (0..batch * count).collect();
    for (index, row) in rows.iter().enumerate() {
        from[*row] = batch * count + index;
    }
    let all = Tensor::cat(vec![tokens.reshape([batch * count, width]), values], 0);
    let device = all.device();
    all.select(0, indices(&from, &device)).reshape(shape)
}
