//! Masked autoregression with a diffusion loss (Li et al., arXiv 2406.11838): tokens become known
//! in rounds, and those of a round are denoised each on its own, under what the network says of
//! their places.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use serde::Serialize;

use super::GaussianDiffusion;
use super::objective::{as_images, as_rows};
use crate::models::mar::{COPIES, Known, of_tokens};
use crate::models::{FillsIn, Shape};
use crate::ops::indices;
use crate::random::{self, Stream};
use crate::trunk::Plain;

/// Which tokens of a training batch are unknown, and how often each is noised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Masking {
    /// Side of the patch that is a token.
    pub patch: usize,
    /// Noised copies of each unknown token, which share the trunk's pass.
    pub copies: usize,
    /// Least share of unknown tokens.
    pub least: f64,
}

impl Masking {
    /// That of the published models.
    pub fn published(patch: usize) -> Self {
        Self {
            patch,
            copies: COPIES,
            least: 0.7,
        }
    }

    /// Standard deviation of the normal distribution that shares are drawn from; its mean is 1.
    const DEVIATION: f64 = 0.25;

    /// The share of unknown tokens at a quantile: that of the normal distribution around 1, cut to
    /// what lies between the least share and 1.
    pub fn share(&self, quantile: f64) -> f64 {
        let cdf = |z: f64| 0.5 * libm::erfc(-z / std::f64::consts::SQRT_2);
        let least = (self.least - 1.0) / Self::DEVIATION;
        let target = cdf(least) + quantile * (0.5 - cdf(least));
        // A bisection down to the last bits: it is drawn once a step.
        let (mut low, mut high) = (least, 0.0);
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            *(if cdf(middle) < target {
                &mut low
            } else {
                &mut high
            }) = middle;
        }
        1.0 + Self::DEVIATION * 0.5 * (low + high)
    }

    /// The known ones of `tokens` tokens of each sample of a training step's batch: as many of
    /// each, the last ones of an order of its own.
    pub fn known(&self, seed: u64, step: u64, samples: Range<usize>, tokens: usize) -> Known {
        let quantile = random::uniform(seed, Stream::MaskRatio, step, 0, 1, (0.0, 1.0))[0];
        let share = self.share(f64::from(quantile));
        let unknown = ((tokens as f64 * share).ceil() as usize).clamp(1, tokens);
        let order = |sample| random::permutation_of(seed, Stream::MaskOrder, step, sample, tokens);
        let orders: Vec<Vec<usize>> = (samples.start as u64..samples.end as u64)
            .map(order)
            .collect();
        Known::of_orders(&orders, unknown)
    }
}

/// How guidance grows over the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GuidanceSchedule {
    /// It is the same in all rounds.
    Constant,
    /// It grows with the share of known tokens, from 1 on.
    Linear,
}

impl GuidanceSchedule {
    /// Both, by their names.
    pub const NAMES: [(&'static str, Self); 2] =
        [("linear", Self::Linear), ("constant", Self::Constant)];
}

/// The rounds in which tokens become known.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rounds {
    /// Rounds in which the tokens of an image become known.
    pub rounds: usize,
    /// Guidance over the rounds: growing with the share of known tokens, or the same in all.
    pub guidance_schedule: GuidanceSchedule,
    /// Factor of the noise in the steps of each token.
    pub temperature: f64,
    /// Whether each prediction of a clean sample or token is bounded to -1 to 1, where pixels lie;
    /// latents are not bounded. The first steps multiply an error of the network by some hundred,
    /// the more the fewer steps there are: a small model of pixels drifts away without it.
    pub clip: bool,
}

impl Rounds {
    /// The reference's own.
    pub const PUBLISHED: Self = Self {
        rounds: 64,
        guidance_schedule: GuidanceSchedule::Linear,
        temperature: 1.0,
        clip: false,
    };

    /// The head's steps of the published results.
    pub const STEPS: usize = 100;

    /// The count of tokens that are unknown after a round, of `unknown` before it: at least 1. The
    /// last round draws every token that is left, and its guidance still counts one.
    pub fn unknown_after(&self, round: usize, tokens: usize, unknown: usize) -> usize {
        // In the reference's order: a product may be whole, so that the last bit counts.
        let angle = std::f64::consts::FRAC_PI_2 * (round + 1) as f64 / self.rounds as f64;
        let left = (tokens as f64 * angle.cos()).floor() as usize;
        left.min(unknown.saturating_sub(1)).max(1)
    }

    /// The tokens that are known in each round in which any are drawn.
    pub fn known(&self, tokens: usize) -> Vec<usize> {
        let mut unknown = tokens;
        let mut known = Vec::new();
        for round in 0..self.rounds {
            let left = match round + 1 == self.rounds {
                true => 0,
                false => self.unknown_after(round, tokens, unknown),
            };
            if left < unknown {
                known.push(tokens - unknown);
                unknown = left;
            }
        }
        known
    }
}

/// How images are drawn.
#[derive(Debug, Clone)]
pub struct MaskedSampler {
    /// The head's diffusion, respaced to the steps to take.
    pub diffusion: Arc<GaussianDiffusion>,
    /// The rounds.
    pub rounds: Rounds,
    /// Classifier-free guidance of the predicted noise; 1 is none.
    pub scale: f64,
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
    /// The guidance of a round, after which so many tokens are unknown.
    pub fn guidance(&self, tokens: usize, unknown: usize) -> f64 {
        match self.rounds.guidance_schedule {
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
    /// When there are no rounds, or an order is not as long as a sample has tokens.
    pub fn generate<B: Backend>(
        &self,
        (network, shape): (&dyn FillsIn<B>, Shape),
        orders: &[Vec<usize>],
        y: Tensor<B, 1, Int>,
        noise: RoundNoise<'_, B>,
        mut watch: impl FnMut(usize, &Tensor<B, 2>, &Tensor<B, 2>),
    ) -> Tensor<B, 4> {
        let patch = network.patch();
        let (batch, count) = (orders.len(), (shape.side / patch).pow(2));
        assert!(
            self.rounds.rounds > 0,
            "no rounds in which tokens become known"
        );
        assert!(
            orders.iter().all(|order| order.len() == count),
            "orders are of {count} tokens"
        );
        let device = y.device();
        let guided = self.scale != 1.0;
        let y = match guided {
            true => {
                let null = y.zeros_like().add_scalar(shape.classes as i64);
                Tensor::cat(vec![y, null], 0)
            }
            false => y,
        };
        let mut tokens = Tensor::zeros([batch, count, shape.channels * patch.pow(2)], &device);
        let mut unknown = count;
        for round in 0..self.rounds.rounds {
            let left = self.rounds.unknown_after(round, count, unknown);
            let is_last = round + 1 == self.rounds.rounds;
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
                known = known.repeated(2);
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
            let guidance = guided.then_some(scale);
            let drawn = self.denoise(network, z.clone(), guidance, &mut of_step);
            watch(round, &z, &drawn);
            tokens = with_rows(tokens, &rows[..drawn.dims()[0]], drawn);
            unknown = left;
        }
        of_tokens(tokens, patch)
    }

    /// Draws samples `indices` with `labels`. Orders and noise are keyed by (seed, sample index),
    /// so that a sample does not depend on its batch. `progress` is called after every round.
    ///
    /// # Panics
    /// As [`generate`](Self::generate).
    pub fn draw<B: Backend>(
        &self,
        (network, shape): (&dyn FillsIn<B>, Shape),
        seed: u64,
        (indices, labels): (&[usize], &[usize]),
        device: &B::Device,
        mut progress: impl FnMut(),
    ) -> Tensor<B, 4> {
        let patch = network.patch();
        let (count, width) = ((shape.side / patch).pow(2), shape.channels * patch.pow(2));
        let order = |index: &usize| {
            random::permutation_of(seed, Stream::SampleOrder, 0, *index as u64, count)
        };
        let orders: Vec<Vec<usize>> = indices.iter().map(order).collect();
        let steps = self.diffusion.steps();
        let mut noise = |of: NoiseOf<'_>| -> Tensor<B, 2> {
            let (stream, step) = match of.step {
                None => (Stream::SampleStart, of.round),
                Some(step) => (Stream::SampleStep, of.round * steps + step),
            };
            let drawn = (indices.iter().zip(of.tokens)).flat_map(|(index, tokens)| {
                let count = tokens.len() * width;
                random::normal(seed, stream, step as u64, *index as u64, count)
            });
            let drawn: Vec<f32> = drawn.collect();
            let rows = drawn.len() / width;
            Tensor::<B, 1>::from_floats(drawn.as_slice(), device).reshape([rows, width])
        };
        let y: Vec<i64> = labels.iter().map(|label| *label as i64).collect();
        let y = Tensor::from_data(TensorData::from(y.as_slice()), device);
        self.generate((network, shape), &orders, y, &mut noise, |_, _, _| {
            progress()
        })
    }

    /// Denoises a token for each of the vectors `z` `[rows, width]`; with guidance the second half
    /// of them are those without a class.
    pub fn denoise<B: Backend>(
        &self,
        network: &dyn FillsIn<B>,
        z: Tensor<B, 2>,
        guidance: Option<f64>,
        noise: &mut dyn FnMut(Option<usize>) -> Tensor<B, 2>,
    ) -> Tensor<B, 2> {
        let device = z.device();
        let projected = network.project(z);
        let mut x = noise(None);
        let count = x.dims()[0];
        for (k, step) in (0..self.diffusion.steps()).rev().enumerate() {
            let t = vec![step; count];
            let told = self.diffusion.model_timesteps(&[step], &device);
            let output = match guidance {
                Some(scale) => guided(network, x.clone(), told, projected.clone(), scale),
                None => network.denoise(x.clone(), told, projected.clone()),
            };
            let (output, before) = (as_images(output), as_images(x.clone()));
            let prediction = (self.diffusion).predict(output, before, &t, self.rounds.clip);
            let noise = as_images(noise(Some(k))) * self.rounds.temperature;
            x = as_rows(self.diffusion.ddpm_step(prediction, &t, noise));
        }
        x
    }
}

/// What a network predicts of noised tokens, with classifier-free guidance of the noise (arXiv
/// 2207.12598): under the projected vectors of all rows, and then those without a class. The
/// variance is that with a class.
pub fn guided<B: Backend>(
    network: &dyn FillsIn<B>,
    x: Tensor<B, 2>,
    t: Tensor<B, 1>,
    projected: Tensor<B, 2>,
    scale: f64,
) -> Tensor<B, 2> {
    let [rows, token] = x.dims();
    let t = if t.dims() == [1] {
        t
    } else {
        t.repeat_dim(0, 2)
    };
    let output = network.denoise(x.repeat_dim(0, 2), t, projected);
    let (with, without) = (
        output.clone().narrow(0, 0, rows),
        output.narrow(0, rows, rows),
    );
    let without = without.narrow(1, 0, token);
    let noise = with.clone().narrow(1, 0, token);
    let noise = without.clone() + (noise - without).mul_scalar(scale);
    Tensor::cat(vec![noise, with.narrow(1, token, token)], 1)
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

#[cfg(all(test, feature = "ndarray"))]
mod tests {
    use burn_ndarray::NdArray;

    use super::*;
    use crate::trunk::BlockHook;

    /// A head that predicts nothing but noise of 9, and what it says of a place.
    struct Loud;

    impl FillsIn<NdArray> for Loud {
        fn patch(&self) -> usize {
            1
        }

        fn condition(
            &self,
            tokens: Tensor<NdArray, 3>,
            _: &Known,
            _: Tensor<NdArray, 1, Int>,
            _: &mut dyn BlockHook<NdArray>,
        ) -> Tensor<NdArray, 3> {
            tokens
        }

        fn project(&self, z: Tensor<NdArray, 2>) -> Tensor<NdArray, 2> {
            z
        }

        fn denoise(
            &self,
            x: Tensor<NdArray, 2>,
            _: Tensor<NdArray, 1>,
            _: Tensor<NdArray, 2>,
        ) -> Tensor<NdArray, 2> {
            Tensor::cat(vec![x.ones_like() * 9.0, x.zeros_like()], 1)
        }
    }

    #[test]
    fn predictions_of_pixels_are_bounded_where_it_is_asked() {
        let furthest = |clip| {
            let sampler = MaskedSampler {
                diffusion: Arc::new(GaussianDiffusion::cosine("5").unwrap()),
                rounds: Rounds {
                    rounds: 2,
                    clip,
                    ..Rounds::PUBLISHED
                },
                scale: 1.0,
            };
            let shape = Shape {
                channels: 1,
                side: 2,
                classes: 3,
            };
            let (indices, labels) = (&[0, 1][..], &[0, 1][..]);
            let device = Default::default();
            let drawn = sampler.draw((&Loud, shape), 0, (indices, labels), &device, || ());
            drawn.abs().max().into_scalar()
        };
        assert!(furthest(true) <= 1.0, "{}", furthest(true));
        assert!(furthest(false) > 100.0, "{}", furthest(false));
    }
}
