//! Batches by step number: deterministic, resumable, the same on every backend.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};

use super::{DataError, Samples, view};
use crate::models::mar::Known;
use crate::process::masked::Masking;
use crate::process::{Noised, Process, TeacherOutput, Times};
use crate::random::{self, Stream};

/// Inputs of a training step, including all its random draws.
#[derive(Debug, Clone)]
pub struct Batch<B: Backend> {
    /// Index of the step, from 0.
    pub step: usize,
    /// Clean samples, `[batch, channels, size, size]`.
    pub x: Tensor<B, 4>,
    /// Noise, of the shape of `x`; of masked samples, as [`Noised::new`] takes it.
    pub noise: Tensor<B, 4>,
    /// Diffusion time of each sample, or of each noised token.
    pub t: Vec<f32>,
    /// Labels `[batch]`, dropped ones replaced by the null class.
    pub y: Tensor<B, 1, Int>,
    /// The known tokens of masked samples.
    pub known: Option<Known>,
    /// Gumbel noise of each pruning group, `[batch, logits]`.
    pub gumbel: Vec<Tensor<B, 2>>,
    /// The teacher's output on the noised samples.
    pub teacher: Option<TeacherOutput<B>>,
}

impl<B: Backend> Batch<B> {
    /// Number of samples.
    pub fn samples(&self) -> usize {
        self.x.dims()[0]
    }

    /// The samples as input of a network.
    pub fn noised(&self, process: &impl Process) -> Noised<B> {
        let (clean, noise) = (self.x.clone(), self.noise.clone());
        let (t, known) = (self.t.clone(), self.known.clone());
        Noised::new(process, clean, noise, t, self.y.clone(), known)
    }
}

/// Settings of the batches.
#[derive(Debug, Clone)]
pub struct BatchPlan {
    /// Samples per batch.
    pub batch: usize,
    /// Seed of every draw.
    pub seed: u64,
    /// Channels of a sample.
    pub channels: usize,
    /// Side of a sample.
    pub size: usize,
    /// Number of classes; also the null label.
    pub classes: usize,
    /// Probability that a label is dropped.
    pub label_drop: f64,
    /// Distribution of the diffusion times.
    pub times: Times,
    /// How samples are masked; None where whole samples are noised.
    pub masking: Option<Masking>,
    /// Number of logits of each pruning group
    /// ([`num_logits`](crate::pruning::Group::num_logits)); empty outside pruning.
    pub logits: Vec<usize>,
}

/// Index of an epoch, and its order.
type Epoch = (usize, Arc<[usize]>);

/// Draws batches from a data set.
#[derive(Clone)]
pub struct BatchSource {
    /// Settings of the batches.
    pub plan: BatchPlan,
    /// The data.
    pub data: Arc<dyn Samples>,
    /// The last epoch used, so that it is shuffled once per epoch, not once per step.
    order: Arc<Mutex<Option<Epoch>>>,
}

impl BatchSource {
    /// A source of batches with these settings.
    pub fn new(plan: BatchPlan, data: Arc<dyn Samples>) -> Self {
        Self {
            plan,
            data,
            order: Arc::default(),
        }
    }

    /// Indices in the data of some of a step's samples. Epochs are permutations, and batches may
    /// span two epochs.
    pub fn indices(&self, step: usize, samples: Range<usize>) -> Vec<usize> {
        let (count, first) = (self.data.len(), step * self.plan.batch);
        (first + samples.start..first + samples.end)
            .map(|position| self.order(position / count)[position % count])
            .collect()
    }

    fn order(&self, epoch: usize) -> Arc<[usize]> {
        let mut last = self.order.lock();
        match &*last {
            Some((known, order)) if *known == epoch => order.clone(),
            _ => {
                let order: Arc<[usize]> = random::permutation(
                    self.plan.seed,
                    Stream::Order,
                    epoch as u64,
                    self.data.len(),
                )
                .into();
                *last = Some((epoch, order.clone()));
                order
            }
        }
    }

    /// Some clean samples of a step's batch, `[samples, channels, size, size]`, and their labels.
    /// If the data has two views of each sample, a draw of its own chooses one.
    ///
    /// # Errors
    /// When a sample can't be read, or is not of the plan's shape and classes.
    pub fn samples(
        &self,
        step: usize,
        samples: Range<usize>,
    ) -> Result<(Vec<f32>, Vec<usize>), DataError> {
        let BatchPlan {
            seed,
            channels,
            size,
            classes,
            ..
        } = self.plan;
        let wrong = |index, expected, found| DataError::Sample {
            index,
            expected,
            found,
        };
        if self.data.is_empty() {
            return Err(wrong(0, "at least one".to_owned(), "none".to_owned()));
        }
        let (views, pixels) = (self.data.views(), channels * size * size);
        let indices = self.indices(step, samples.clone());
        let mut x = Vec::with_capacity(indices.len() * pixels);
        let mut labels = Vec::with_capacity(indices.len());
        for (sample, index) in samples.zip(indices) {
            let view = match views {
                2 => view(
                    views,
                    unit(seed, Stream::Mirror, step as u64, sample as u64),
                ),
                _ => 0,
            };
            let label = self.data.read(index, view, &mut x)?;
            let read = x.len() - labels.len() * pixels;
            if read != pixels {
                let expected = format!("[{channels}, {size}, {size}], as the model reads");
                let found = format!("{read} numbers");
                return Err(wrong(index, expected, found));
            }
            if label >= classes {
                let expected = format!("a label below the model's {classes} classes");
                return Err(wrong(index, expected, label.to_string()));
            }
            labels.push(label);
        }
        Ok((x, labels))
    }

    /// The batch of a step on the host, without a teacher.
    ///
    /// # Errors
    /// As [`samples`](Self::samples).
    pub fn on_host(&self, step: usize) -> Result<HostBatch, DataError> {
        self.some_on_host(step, 0..self.plan.batch)
    }

    /// Some samples of a step's batch, as they are in the whole one.
    ///
    /// # Errors
    /// As [`samples`](Self::samples).
    pub fn some_on_host(&self, step: usize, samples: Range<usize>) -> Result<HostBatch, DataError> {
        let BatchPlan {
            seed,
            channels,
            size,
            classes,
            label_drop,
            times,
            masking,
            logits,
            ..
        } = &self.plan;
        let (seed, classes, at) = (*seed, *classes, step as u64);
        let (x, labels) = self.samples(step, samples.clone())?;
        let per_sample = || samples.start as u64..samples.end as u64;
        let known = masking.map(|masking| {
            let tokens = (size / masking.patch).pow(2);
            (masking, masking.known(seed, at, samples.clone(), tokens))
        });
        let noised = match &known {
            None => [*channels, *size, *size],
            Some((Masking { patch, copies, .. }, known)) => {
                let unknown = known.tokens() - known.count();
                [*copies, unknown, channels * patch.pow(2)]
            }
        };
        let noise = per_sample()
            .flat_map(|sample| {
                random::normal(seed, Stream::Noise, at, sample, noised.iter().product())
            })
            .collect();
        let t = per_sample()
            .flat_map(|sample| match known {
                None => vec![times.draw(seed, at, sample)],
                Some(_) => times.draw_many(seed, at, sample, noised[0] * noised[1]),
            })
            .collect();
        let y = labels
            .into_iter()
            .zip(per_sample())
            .map(|(label, sample)| {
                let kept = f64::from(unit(seed, Stream::LabelDrop, at, sample)) >= *label_drop;
                (if kept { label } else { classes }) as i64
            })
            .collect();
        // One stream of numbers per sample, divided among the groups.
        let total: usize = logits.iter().sum();
        let draws: Vec<Vec<f32>> = per_sample()
            .map(|sample| random::gumbel(seed, Stream::Gumbel, at, sample, total))
            .collect();
        let mut first = 0;
        let gumbel = logits
            .iter()
            .map(|&count| {
                let values = draws
                    .iter()
                    .flat_map(|row| row[first..first + count].iter().copied())
                    .collect();
                first += count;
                (values, count)
            })
            .collect();
        Ok(HostBatch {
            step,
            shape: [samples.len(), *channels, *size, *size],
            x,
            noised,
            noise,
            t,
            known: known.map(|(_, known)| known),
            y,
            gumbel,
        })
    }

    /// The batch of a step on a device, without a teacher.
    ///
    /// # Errors
    /// As [`samples`](Self::samples).
    pub fn draw<B: Backend>(&self, step: usize, device: &B::Device) -> Result<Batch<B>, DataError> {
        Ok(self.on_host(step)?.upload(device))
    }
}

/// A uniform number in [0, 1).
fn unit(seed: u64, stream: Stream, step: u64, sample: u64) -> f32 {
    random::uniform(seed, stream, step, sample, 1, (0.0, 1.0))[0]
}

/// A [`Batch`] on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct HostBatch {
    step: usize,
    /// Shape of `x`.
    shape: [usize; 4],
    x: Vec<f32>,
    /// Shape of a sample's noise.
    noised: [usize; 3],
    noise: Vec<f32>,
    t: Vec<f32>,
    known: Option<Known>,
    y: Vec<i64>,
    /// Values and number of logits of each group.
    gumbel: Vec<(Vec<f32>, usize)>,
}

impl HostBatch {
    /// Splits into `parts` equal batches of the same step; together they hold the samples in order.
    pub(super) fn split(self, parts: usize) -> Vec<Self> {
        let [batch, channels, height, width] = self.shape;
        let part = batch / parts;
        let rows = |values: &[f32], size: usize, index: usize| {
            values[index * part * size..(index + 1) * part * size].to_vec()
        };
        let pixels = channels * height * width;
        let (noise, times) = (self.noised.iter().product(), self.t.len() / batch);
        (0..parts)
            .map(|index| {
                let range = index * part..(index + 1) * part;
                let gumbel = self.gumbel.iter();
                Self {
                    step: self.step,
                    shape: [part, channels, height, width],
                    x: rows(&self.x, pixels, index),
                    noised: self.noised,
                    noise: rows(&self.noise, noise, index),
                    t: rows(&self.t, times, index),
                    known: (self.known.as_ref()).map(|known| known.of_samples(range.clone())),
                    y: self.y[range].to_vec(),
                    gumbel: gumbel
                        .map(|(values, count)| (rows(values, *count, index), *count))
                        .collect(),
                }
            })
            .collect()
    }

    /// Uploads the batch to a device.
    pub fn upload<B: Backend>(self, device: &B::Device) -> Batch<B> {
        let batch = self.shape[0];
        let [a, b, c] = self.noised;
        let floats =
            |values: Vec<f32>, shape| Tensor::from_data(TensorData::new(values, shape), device);
        Batch {
            step: self.step,
            x: floats(self.x, self.shape),
            noise: floats(self.noise, [batch, a, b, c]),
            t: self.t,
            known: self.known,
            y: Tensor::from_data(TensorData::new(self.y, [batch]), device),
            gumbel: self
                .gumbel
                .into_iter()
                .map(|(values, count)| {
                    Tensor::from_data(TensorData::new(values, [batch, count]), device)
                })
                .collect(),
            teacher: None,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use burn_dataset::Dataset;

    use super::super::{Digits, Image, Split, plain};
    use super::*;

    pub(in crate::data) fn plan(batch: usize) -> BatchPlan {
        BatchPlan {
            batch,
            seed: 5,
            channels: 1,
            size: 8,
            classes: 10,
            label_drop: 0.4,
            times: Times::Steps(1000),
            masking: None,
            logits: vec![2, 3],
        }
    }

    /// Recorded before data sets had views: a difference would change the results of every recipe.
    #[test]
    fn batches_of_digits_never_change() {
        let source = BatchSource::new(plan(6), Arc::new(Digits::new(Split::Train)));
        let recorded = [
            (
                0,
                0xaa0f_3c8c,
                [1291, 353, 814, 41, 801, 892],
                [209, 768, 72, 577, 246, 550],
                [3, 10, 10, 3, 10, 10],
            ),
            (
                3,
                0x6c81_a2ba,
                [528, 823, 1372, 1244, 231, 137],
                [103, 738, 519, 746, 867, 961],
                [3, 4, 9, 9, 10, 8],
            ),
            (
                500,
                0xbffe_3eba,
                [22, 467, 1071, 1291, 665, 826],
                [712, 605, 768, 574, 732, 196],
                [4, 3, 10, 3, 10, 5],
            ),
        ];
        for (step, pixels, indices, t, y) in recorded {
            let batch = source.on_host(step).unwrap();
            let bytes: Vec<u8> = batch.x.iter().flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!(crc32fast::hash(&bytes), pixels, "{step}");
            assert_eq!(source.indices(step, 0..6), indices);
            assert_eq!(
                (batch.t, batch.y),
                (t.map(|t| t as f32).to_vec(), y.to_vec())
            );
            let second = random::normal(5, Stream::Noise, step as u64, 1, 64);
            assert_eq!(batch.noise[64..128], second);
            let row = random::gumbel(5, Stream::Gumbel, step as u64, 1, 5);
            assert_eq!(batch.gumbel[0].0[2..4], row[..2]);
            assert_eq!(batch.gumbel[1].0[3..6], row[2..]);
        }
    }

    /// Sample `i` is `i` in its plain view and `-i` in the mirrored one; the label is `i`.
    pub(in crate::data) struct Signed(pub usize);

    impl Dataset<Image> for Signed {
        fn len(&self) -> usize {
            10
        }

        fn get(&self, index: usize) -> Option<Image> {
            plain(self, index)
        }
    }

    impl Samples for Signed {
        fn views(&self) -> usize {
            self.0
        }

        fn read(&self, index: usize, view: usize, out: &mut Vec<f32>) -> Result<usize, DataError> {
            let value = index as f32 * if view == 1 { -1.0 } else { 1.0 };
            out.extend([value; 64]);
            Ok(index)
        }
    }

    #[test]
    fn masked_batches_have_a_time_and_noise_for_each_copy_of_an_unknown_token() {
        let masked = |batch| {
            let mut plan = plan(batch);
            plan.masking = Some(Masking {
                patch: 2,
                copies: 3,
                least: 0.7,
            });
            BatchSource::new(plan, Arc::new(Digits::new(Split::Train)))
        };
        let mut shares = Vec::new();
        for step in 0..40 {
            let batch = masked(6).on_host(step).unwrap();
            let known = batch.known.clone().unwrap();
            let unknown = known.tokens() - known.count();
            assert_eq!(known.tokens(), 16);
            assert_eq!(batch.noised, [3, unknown, 4]);
            assert_eq!(batch.noise.len(), 6 * 3 * unknown * 4);
            assert_eq!(batch.t.len(), 6 * 3 * unknown);
            assert!(
                batch
                    .t
                    .iter()
                    .all(|t| t.fract() == 0.0 && (0.0..1000.0).contains(t))
            );
            shares.push(unknown);
            // Parts of the batch hold its samples in order.
            let parts = batch.clone().split(3);
            let noise: Vec<f32> = parts.iter().flat_map(|part| part.noise.clone()).collect();
            let t: Vec<f32> = parts.iter().flat_map(|part| part.t.clone()).collect();
            assert!(noise == batch.noise && t == batch.t);
            assert_eq!(parts[1].known, Some(known.of_samples(2..4)));
        }
        // 12 of 16 are the fewest above 0.7, and the mean share is 0.87.
        assert!(
            shares.iter().all(|unknown| (12..=16).contains(unknown)),
            "{shares:?}"
        );
        assert!(
            shares.iter().any(|unknown| *unknown != shares[0]),
            "{shares:?}"
        );
        // Some of a batch are as they are in the whole one.
        let (whole, some) = (masked(6).on_host(3), masked(6).some_on_host(3, 2..4));
        assert_eq!(some.unwrap(), whole.unwrap().split(3)[1]);
        // What a sample is given does not depend on how many there are.
        let (few, many) = (masked(2).on_host(0).unwrap(), masked(6).on_host(0).unwrap());
        assert_eq!(few.t[..], many.t[..few.t.len()]);
        assert_eq!(few.noise[..], many.noise[..few.noise.len()]);
        assert_eq!(few.known, many.known.map(|known| known.of_samples(0..2)));
    }

    #[test]
    fn mirrored_views_are_drawn_by_step_and_sample() {
        let source = BatchSource::new(plan(1000), Arc::new(Signed(2)));
        let (x, labels) = source.samples(7, 0..1000).unwrap();
        let mut mirrored = 0;
        for (sample, (latent, label)) in x.chunks(64).zip(labels).enumerate() {
            let u = unit(5, Stream::Mirror, 7, sample as u64);
            let expected = label as f32 * if u < 0.5 { -1.0 } else { 1.0 };
            assert!(latent.iter().all(|value| *value == expected), "{sample}");
            mirrored += usize::from(u < 0.5);
        }
        // 1000 fair draws; the standard deviation is 16.
        assert!((420..580).contains(&mirrored), "{mirrored}");
        let plain = BatchSource::new(plan(1000), Arc::new(Signed(1)));
        assert!(
            plain
                .samples(7, 0..1000)
                .unwrap()
                .0
                .iter()
                .all(|value| *value >= 0.0)
        );
    }
}
