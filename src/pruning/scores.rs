//! Measured importance of layers: block influence (ShortGPT), feature change (Flux-Lite) and
//! sensitivity.

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use serde::{Deserialize, Serialize};

use crate::data::Batch;
use crate::models::mar::Known;
use crate::models::{Prunable, Shape};
use crate::process::{Noised, Process};
use crate::random::{self, Stream};
use crate::trunk::{Block, BlockHook, Plain, Site, Skip};

/// Measure of a layer's importance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// Mean cosine similarity of a block's input and output per token (ShortGPT, arXiv 2403.03853);
    /// layers with a large one are redundant. The last layer is never removed.
    Shortgpt,
    /// Mean squared difference of a block's input and output; layers with a small one are
    /// redundant.
    FluxLite,
    /// Increase of the prediction loss when the block is skipped; layers with a small one are
    /// redundant.
    Sensitivity,
}

/// A batch on which a score is measured.
#[derive(Debug, Clone)]
pub struct ScoreBatch<B: Backend> {
    /// Clean samples.
    pub x: Tensor<B, 4>,
    /// Noise, for sensitivity.
    pub noise: Tensor<B, 4>,
    /// Labels.
    pub y: Tensor<B, 1, Int>,
    /// Times of the process.
    pub t: Vec<f32>,
    /// The known tokens of masked samples.
    pub known: Option<Known>,
}

impl<B: Backend> From<Batch<B>> for ScoreBatch<B> {
    fn from(batch: Batch<B>) -> Self {
        Self {
            x: batch.x,
            noise: batch.noise,
            y: batch.y,
            t: batch.t,
            known: batch.known,
        }
    }
}

impl<B: Backend> ScoreBatch<B> {
    /// Number of samples.
    pub fn samples(&self) -> usize {
        self.x.dims()[0]
    }

    /// Batches of at most `most` of its samples.
    pub fn parts(self, most: usize) -> Vec<Self> {
        let count = self.samples();
        let times = self.t.len() / count.max(1);
        let starts = (0..count).step_by(most.max(1));
        let part = |start: usize| {
            let range = start..(start + most.max(1)).min(count);
            Self {
                x: self.x.clone().slice([range.clone()]),
                noise: self.noise.clone().slice([range.clone()]),
                y: self.y.clone().slice([range.clone()]),
                t: self.t[range.start * times..range.end * times].to_vec(),
                known: (self.known.as_ref()).map(|known| known.of_samples(range)),
            }
        };
        starts.map(part).collect()
    }

    /// What a network is shown of it.
    pub(crate) fn noised(&self, process: &impl Process) -> Noised<B> {
        let (clean, noise) = (self.x.clone(), self.noise.clone());
        let (t, known) = (self.t.clone(), self.known.clone());
        Noised::new(process, clean, noise, t, self.y.clone(), known)
    }

    /// So many samples of nothing but noise, of the first class and at time 0: enough to try a
    /// score.
    pub fn noise(shape: Shape, count: usize, seed: u64, device: &B::Device) -> Self {
        let Shape { channels, side, .. } = shape;
        let shape = [count, channels, side, side];
        let draw = |stream| {
            let values = random::normal(seed, stream, 0, 0, shape.iter().product());
            Tensor::from_data(TensorData::new(values, shape), device)
        };
        Self {
            x: draw(Stream::SampleStart),
            noise: draw(Stream::Noise),
            y: Tensor::zeros([count], device),
            t: vec![0.0; count],
            known: None,
        }
    }
}

/// Mean squared error of a network's predictions on a batch: of a pruned network, its calibration
/// loss.
pub fn prediction_loss<B: Backend>(
    network: &impl Prunable<B>,
    process: &impl Process,
    batch: &ScoreBatch<B>,
) -> f64 {
    let seen = batch.noised(process);
    let output = seen.run(process, network, &mut Plain);
    scalar(seen.error(process, output).mean())
}

/// Scores of one batch.
#[derive(Debug, Clone)]
pub struct Calibration {
    /// One score per layer.
    pub scores: Vec<f64>,
    /// Loss of the whole network, for sensitivity.
    pub base: Option<f64>,
}

/// Measures all layers on one batch. The feature scores use clean samples (as in the reference).
pub fn score<B: Backend>(
    network: &impl Prunable<B>,
    process: &impl Process,
    method: Score,
    batch: &ScoreBatch<B>,
) -> Calibration {
    if method == Score::Sensitivity {
        return sensitivity(network, process, batch);
    }
    let seen = batch.noised(process).without_noise();
    let mut hook = Change {
        method,
        scores: Vec::new(),
    };
    seen.run(process, network, &mut hook);
    Calibration {
        scores: hook.scores,
        base: None,
    }
}

/// Compares each block's output with its input.
struct Change {
    method: Score,
    scores: Vec<f64>,
}

impl<B: Backend> BlockHook<B> for Change {
    fn around(&mut self, _: Site, x: Tensor<B, 3>, block: Block<'_, B>) -> Tensor<B, 3> {
        let y = block(x.clone());
        let score = if self.method == Score::Shortgpt {
            let norm = |x: &Tensor<B, 3>| (x.clone() * x.clone()).sum_dim(2).sqrt();
            // PyTorch's cosine_similarity bounds the norms by 1e-8 from below.
            let scale = norm(&x).clamp_min(1e-8) * norm(&y).clamp_min(1e-8);
            ((x * y.clone()).sum_dim(2) / scale).mean()
        } else {
            let change = y.clone() - x;
            (change.clone() * change).mean()
        };
        self.scores.push(scalar(score));
        y
    }
}

fn sensitivity<B: Backend>(
    network: &impl Prunable<B>,
    process: &impl Process,
    batch: &ScoreBatch<B>,
) -> Calibration {
    let seen = batch.noised(process);
    let loss = |hook: &mut dyn BlockHook<B>| {
        let output = seen.run(process, network, hook);
        scalar(seen.error(process, output).mean())
    };
    let base = loss(&mut Plain);
    let scores = (0..network.trunk().depth)
        .map(|layer| loss(&mut Skip { layer }) - base)
        .collect();
    Calibration {
        scores,
        base: Some(base),
    }
}

pub(super) fn scalar<B: Backend>(tensor: Tensor<B, 1>) -> f64 {
    tensor.into_data().iter::<f64>().next().unwrap_or(f64::NAN)
}

/// The `keep` layers that are kept by their scores, in trunk order.
///
/// Similarity removes the largest scores first and never the last layer; the others remove the
/// smallest.
pub fn keep_by_scores(method: Score, scores: &[f64], keep: usize) -> Vec<usize> {
    let mut redundant_first: Vec<usize> = (0..scores.len()).collect();
    if method == Score::Shortgpt {
        redundant_first.pop();
        redundant_first.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    } else {
        redundant_first.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
    }
    let removed: Vec<usize> = redundant_first
        .into_iter()
        .take(scores.len().saturating_sub(keep))
        .collect();
    (0..scores.len())
        .filter(|layer| !removed.contains(layer))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_batch_are_all_of_it() {
        use burn_ndarray::NdArray;

        let shape = Shape {
            channels: 1,
            side: 2,
            classes: 3,
        };
        let mut batch = ScoreBatch::<NdArray>::noise(shape, 5, 0, &Default::default());
        batch.t = vec![0.0, 1.0, 2.0, 3.0, 4.0];
        let whole = batch.x.clone().into_data();
        let parts = batch.parts(2);
        let times: Vec<Vec<f32>> = parts.iter().map(|part| part.t.clone()).collect();
        assert_eq!(times, [vec![0.0, 1.0], vec![2.0, 3.0], vec![4.0]]);
        let again = Tensor::cat(parts.into_iter().map(|part| part.x).collect(), 0);
        assert_eq!(again.into_data(), whole);
    }

    #[test]
    fn similarity_never_removes_the_last_layer() {
        let scores = [0.1, 0.5, 0.3, 0.9];
        assert_eq!(keep_by_scores(Score::Shortgpt, &scores, 2), [0, 3]);
        assert_eq!(keep_by_scores(Score::FluxLite, &scores, 2), [1, 3]);
    }
}
