//! Batches by step number: deterministic, resumable, the same on every backend.

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Int, Tensor, TensorData};
use burn_dataset::Dataset;

use super::digits::Image;
use crate::models::Network;
use crate::ops::TrainingBackend;
use crate::process::{GaussianDiffusion, Objective, TeacherOutput};
use crate::random::{self, Stream};

/// What a training step is computed from; every random draw of it has been made.
#[derive(Debug, Clone)]
pub struct Batch<B: Backend> {
    /// Number of the step, from 0.
    pub step: usize,
    /// Clean samples, `[batch, channels, size, size]`.
    pub x: Tensor<B, 4>,
    /// Noise like `x`.
    pub noise: Tensor<B, 4>,
    /// Diffusion step of each sample.
    pub t: Vec<usize>,
    /// Labels `[batch]`, dropped ones replaced by the null class.
    pub y: Tensor<B, 1, Int>,
    /// Gumbel noise of each pruning group, `[batch, candidates]`.
    pub gumbel: Vec<Tensor<B, 2>>,
    /// What the teacher says of the noised samples.
    pub teacher: Option<TeacherOutput<B>>,
}

impl<B: Backend> Batch<B> {
    /// The batch as an objective of a process.
    pub fn objective<'a>(&'a self, diffusion: &'a GaussianDiffusion) -> Objective<'a, B> {
        Objective {
            diffusion,
            x_start: self.x.clone(),
            noise: self.noise.clone(),
            t: &self.t,
            y: self.y.clone(),
        }
    }
}

/// Shape of the batches.
#[derive(Debug, Clone)]
pub struct BatchPlan {
    /// Samples of a batch.
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
    /// Steps of the diffusion process.
    pub diffusion_steps: usize,
    /// Candidates of each pruning group, empty outside pruning.
    pub candidates: Vec<usize>,
}

/// An epoch's number, and its order.
type Epoch = (usize, Arc<[usize]>);

/// Draws batches from a data set.
#[derive(Clone)]
pub struct BatchSource {
    /// Shape of the batches.
    pub plan: BatchPlan,
    /// The data.
    pub data: Arc<dyn Dataset<Image>>,
    /// The epoch last used, and its order: shuffled once an epoch, not once a step.
    order: Arc<Mutex<Option<Epoch>>>,
}

impl BatchSource {
    /// A source of a plan's batches.
    pub fn new(plan: BatchPlan, data: Arc<dyn Dataset<Image>>) -> Self {
        Self {
            plan,
            data,
            order: Arc::default(),
        }
    }

    /// Indices of a step's samples: epochs are permutations, and batches run across their borders.
    pub fn indices(&self, step: usize) -> Vec<usize> {
        let (count, batch) = (self.data.len(), self.plan.batch);
        (step * batch..(step + 1) * batch)
            .map(|position| self.order(position / count)[position % count])
            .collect()
    }

    fn order(&self, epoch: usize) -> Arc<[usize]> {
        let mut last = self.order.lock().unwrap_or_else(PoisonError::into_inner);
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

    /// The batch of a step, without a teacher.
    pub fn draw<B: Backend>(&self, step: usize, device: &B::Device) -> Batch<B> {
        let BatchPlan {
            batch,
            seed,
            channels,
            size,
            classes,
            label_drop,
            diffusion_steps,
            candidates,
        } = &self.plan;
        let (batch, seed, classes, at) = (*batch, *seed, *classes, step as u64);
        let images: Vec<Image> = self
            .indices(step)
            .into_iter()
            .filter_map(|index| self.data.get(index))
            .collect();
        let pixels = channels * size * size;
        let floats = |values: Vec<f32>| {
            Tensor::<B, 4>::from_data(
                TensorData::new(values, [batch, *channels, *size, *size]),
                device,
            )
        };
        let per_sample = || 0..batch as u64;
        let x = floats(
            images
                .iter()
                .flat_map(|image| image.pixels.iter().copied())
                .collect(),
        );
        let noise = floats(
            per_sample()
                .flat_map(|sample| random::normal(seed, Stream::Noise, at, sample, pixels))
                .collect(),
        );
        let t = per_sample()
            .map(|sample| random::below(seed, Stream::Timestep, at, sample, *diffusion_steps))
            .collect();
        let labels: Vec<i64> = images
            .iter()
            .zip(per_sample())
            .map(|(image, sample)| {
                let kept = f64::from(
                    random::uniform(seed, Stream::LabelDrop, at, sample, 1, (0.0, 1.0))[0],
                ) >= *label_drop;
                (if kept { image.label } else { classes }) as i64
            })
            .collect();
        let y = Tensor::from_data(TensorData::new(labels, [batch]), device);
        // One stream of numbers per sample, dealt out to the groups.
        let total: usize = candidates.iter().sum();
        let draws: Vec<Vec<f32>> = per_sample()
            .map(|sample| random::gumbel(seed, Stream::Gumbel, at, sample, total))
            .collect();
        let mut first = 0;
        let gumbel = candidates
            .iter()
            .map(|&count| {
                let values: Vec<f32> = draws
                    .iter()
                    .flat_map(|row| row[first..first + count].iter().copied())
                    .collect();
                first += count;
                Tensor::from_data(TensorData::new(values, [batch, count]), device)
            })
            .collect();
        Batch {
            step,
            x,
            noise,
            t,
            y,
            gumbel,
            teacher: None,
        }
    }
}

/// A teacher on the inner backend, and the layers whose features it shows.
pub type Teacher<B> = (
    Arc<Network<<B as AutodiffBackend>::InnerBackend>>,
    Vec<usize>,
);

/// Batches from a step on, as burn-train's loader. A teacher sees each batch here, on the inner backend, so that no
/// graph is built for it.
pub struct Batches<B: AutodiffBackend> {
    source: BatchSource,
    start: usize,
    steps: usize,
    teacher: Option<Teacher<B>>,
    diffusion: Arc<GaussianDiffusion>,
    device: B::Device,
    backend: PhantomData<B>,
}

impl<B: AutodiffBackend> Clone for Batches<B> {
    fn clone(&self) -> Self {
        Self {
            source: self.source.clone(),
            start: self.start,
            steps: self.steps,
            teacher: self.teacher.clone(),
            diffusion: self.diffusion.clone(),
            device: self.device.clone(),
            backend: PhantomData,
        }
    }
}

impl<B: AutodiffBackend> Batches<B> {
    /// Batches `start..steps` of a source.
    pub fn new(
        source: BatchSource,
        start: usize,
        steps: usize,
        diffusion: Arc<GaussianDiffusion>,
        device: &B::Device,
    ) -> Self {
        Self {
            source,
            start,
            steps,
            teacher: None,
            diffusion,
            device: device.clone(),
            backend: PhantomData,
        }
    }

    /// Has a teacher see every batch; features of `layers` are tapped.
    pub fn with_teacher(self, teacher: Arc<Network<B::InnerBackend>>, layers: Vec<usize>) -> Self {
        Self {
            teacher: Some((teacher, layers)),
            ..self
        }
    }
}

impl<B> DataLoader<B, Batch<B>> for Batches<B>
where
    B: TrainingBackend,
{
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<Batch<B>> + 'a> {
        Box::new(Iter {
            batches: self,
            step: self.start,
        })
    }

    fn num_items(&self) -> usize {
        (self.steps - self.start) * self.source.plan.batch
    }

    fn to_device(&self, device: &B::Device) -> Arc<dyn DataLoader<B, Batch<B>>> {
        Arc::new(Self {
            device: device.clone(),
            ..self.clone()
        })
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, Batch<B>>> {
        let batch = self.source.plan.batch;
        Arc::new(Self {
            start: self.start + start / batch,
            steps: self.start + end.div_ceil(batch),
            ..self.clone()
        })
    }
}

struct Iter<'a, B: AutodiffBackend> {
    batches: &'a Batches<B>,
    step: usize,
}

impl<B> Iterator for Iter<'_, B>
where
    B: TrainingBackend,
{
    type Item = Batch<B>;

    fn next(&mut self) -> Option<Batch<B>> {
        let Batches {
            source,
            steps,
            teacher,
            diffusion,
            device,
            ..
        } = self.batches;
        if self.step >= *steps {
            return None;
        }
        let plain: Batch<B::InnerBackend> = source.draw(self.step, device);
        self.step += 1;
        let teacher = teacher.as_ref().map(|(network, layers)| {
            let said = plain.objective(diffusion).teach(network, layers);
            TeacherOutput {
                output: Tensor::from_inner(said.output),
                features: said.features.into_iter().map(Tensor::from_inner).collect(),
            }
        });
        Some(Batch {
            step: plain.step,
            x: Tensor::from_inner(plain.x),
            noise: Tensor::from_inner(plain.noise),
            t: plain.t,
            y: Tensor::from_inner(plain.y),
            gumbel: plain.gumbel.into_iter().map(Tensor::from_inner).collect(),
            teacher,
        })
    }
}

impl<B> DataLoaderIterator<Batch<B>> for Iter<'_, B>
where
    B: TrainingBackend,
{
    fn progress(&self) -> Progress {
        Progress::new(self.step, self.batches.steps)
    }
}
