//! Batches as burn-train's data loader, read ahead, with the teacher's outputs.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use parking_lot::Mutex;

use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};

use super::DataError;
use super::loader::{Batch, BatchSource, HostBatch};
use crate::models::Denoiser;
use crate::ops::TrainingBackend;
use crate::process::{AnyProcess, Noised, TeacherOutput};
use crate::workers::Share;

/// A loader that can fail.
pub trait Feed<B: Backend, I>: DataLoader<B, I> {
    /// The error that ended the batches early; returned once.
    fn failure(&self) -> Option<DataError>;
}

/// A teacher on the inner backend: its outputs for a batch.
pub type Teacher<B> = Arc<dyn Fn(&Noised<B>) -> TeacherOutput<B> + Send + Sync>;

/// A network as a teacher, which shows the features of `layers`.
pub fn teacher<B: Backend>(
    network: impl Denoiser<B> + Sync + 'static,
    process: AnyProcess,
    layers: Vec<usize>,
) -> Teacher<B> {
    Arc::new(move |seen| seen.teach(&process, &network, &layers))
}

/// Batches from a given step on, as burn-train's data loader. A thread reads and draws the next two
/// batches while the device works on one. The teacher runs on each batch here, on the inner
/// backend, so that no graph is built for it.
pub struct Batches<B: AutodiffBackend> {
    source: BatchSource,
    start: usize,
    steps: usize,
    /// Number of batches that a step's samples are divided into.
    parts: usize,
    /// Which of them are given here.
    share: Share,
    teacher: Option<Teacher<B::InnerBackend>>,
    process: AnyProcess,
    device: B::Device,
    failure: Arc<Mutex<Option<DataError>>>,
    backend: PhantomData<B>,
}

impl<B: AutodiffBackend> Clone for Batches<B> {
    fn clone(&self) -> Self {
        Self {
            source: self.source.clone(),
            start: self.start,
            steps: self.steps,
            parts: self.parts,
            share: self.share,
            teacher: self.teacher.clone(),
            process: self.process.clone(),
            device: self.device.clone(),
            failure: self.failure.clone(),
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
        process: AnyProcess,
        device: &B::Device,
    ) -> Self {
        Self {
            source,
            start,
            steps,
            parts: 1,
            share: Share::WHOLE,
            teacher: None,
            process,
            device: device.clone(),
            failure: Arc::default(),
            backend: PhantomData,
        }
    }

    /// Divides each step's samples into consecutive batches of equal size.
    ///
    /// # Panics
    /// When `parts` does not divide the batch.
    pub fn in_parts(self, parts: usize) -> Self {
        let batch = self.source.plan.batch;
        assert!(
            parts > 0 && batch.is_multiple_of(parts),
            "{batch} samples can't be divided into {parts} equal parts"
        );
        Self { parts, ..self }
    }

    /// Gives only one worker's part of each step's batches, and reads no others.
    ///
    /// # Panics
    /// When the workers are not as many as divide the batches of a step evenly.
    pub fn shared(self, share: Share) -> Self {
        assert!(
            self.parts.is_multiple_of(share.of),
            "{} batches of a step for {} workers",
            self.parts,
            share.of
        );
        Self { share, ..self }
    }

    /// Runs a teacher on every batch.
    pub fn with_teacher(self, teacher: Teacher<B::InnerBackend>) -> Self {
        Self {
            teacher: Some(teacher),
            ..self
        }
    }
}

impl<B> DataLoader<B, Batch<B>> for Batches<B>
where
    B: TrainingBackend,
{
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<Batch<B>> + 'a> {
        let (sender, ahead) = sync_channel(1);
        let (source, steps) = (self.source.clone(), self.start..self.steps);
        let samples = self.share.range(self.source.plan.batch);
        let parts = self.share.range(self.parts).len();
        let failed = sender.clone();
        let load = move || {
            for step in steps {
                let batches = match source.some_on_host(step, samples.clone()) {
                    Ok(batch) if parts == 1 => vec![Ok(batch)],
                    Ok(batch) => batch.split(parts).into_iter().map(Ok).collect(),
                    Err(error) => vec![Err(error)],
                };
                for batch in batches {
                    let failed = batch.is_err();
                    // Sending fails once the iterator is dropped.
                    if sender.send(batch).is_err() || failed {
                        return;
                    }
                }
            }
        };
        if let Err(source) = thread::Builder::new().name("batches".into()).spawn(load) {
            // The channel is empty, so this does not block.
            let _ = failed.send(Err(DataError::Threads { count: 1, source }));
        }
        Box::new(Iter {
            batches: self,
            ahead,
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

impl<B> Feed<B, Batch<B>> for Batches<B>
where
    B: TrainingBackend,
{
    fn failure(&self) -> Option<DataError> {
        self.failure.lock().take()
    }
}

struct Iter<'a, B: AutodiffBackend> {
    batches: &'a Batches<B>,
    /// Batches from the reading thread.
    ahead: Receiver<Result<HostBatch, DataError>>,
    step: usize,
}

impl<B> Iterator for Iter<'_, B>
where
    B: TrainingBackend,
{
    type Item = Batch<B>;

    fn next(&mut self) -> Option<Batch<B>> {
        let Batches {
            teacher,
            process,
            device,
            failure,
            ..
        } = self.batches;
        let plain: Batch<B::InnerBackend> = match self.ahead.recv().ok()? {
            Ok(batch) => batch.upload(device),
            Err(error) => {
                *failure.lock() = Some(error);
                return None;
            }
        };
        self.step = plain.step + 1;
        let teacher = teacher.as_ref().map(|teacher| {
            let said = teacher(&plain.noised(process));
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
            known: plain.known,
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

#[cfg(all(test, feature = "ndarray"))]
mod tests {
    use super::super::loader::tests::{Signed, plan};
    use super::super::{Digits, Split};
    use super::*;
    use crate::process::GaussianDiffusion;

    #[test]
    fn batches_read_ahead_are_those_drawn_one_by_one() {
        type B = burn::backend::Autodiff<burn_ndarray::NdArray>;
        let source = BatchSource::new(plan(4), Arc::new(Digits::new(Split::Train)));
        let device = Default::default();
        let diffusion = AnyProcess::from(GaussianDiffusion::full());
        let batches = Batches::<B>::new(source.clone(), 2, 7, diffusion, &device);
        let read: Vec<Batch<B>> = batches.iter().collect();
        assert_eq!(read.len(), 5);
        for (step, batch) in (2..7).zip(read) {
            let drawn = source.draw::<B>(step, &device).unwrap();
            assert_eq!(batch.step, step);
            assert_eq!(batch.x.into_data(), drawn.x.into_data());
            assert_eq!(batch.y.into_data(), drawn.y.into_data());
        }
        assert!(batches.failure().is_none());
    }

    #[test]
    fn a_sample_that_does_not_fit_ends_the_batches_and_is_told() {
        type B = burn::backend::Autodiff<burn_ndarray::NdArray>;
        let mut small = plan(10);
        small.classes = 9;
        let source = BatchSource::new(small, Arc::new(Signed(1)));
        let diffusion = AnyProcess::from(GaussianDiffusion::full());
        let batches = Batches::<B>::new(source, 0, 7, diffusion, &Default::default());
        assert_eq!(batches.iter().count(), 0);
        let message = batches.failure().unwrap().to_string();
        assert_eq!(
            message,
            "sample 9: expected a label below the model's 9 classes, found 9"
        );
    }

    #[test]
    fn samples_of_another_shape_are_told() {
        type B = burn::backend::Autodiff<burn_ndarray::NdArray>;
        let mut large = plan(3);
        large.channels = 4;
        let source = BatchSource::new(large, Arc::new(Digits::new(Split::Train)));
        let message = source
            .draw::<B>(0, &Default::default())
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("expected [4, 8, 8], as the model reads, found 64 numbers"),
            "{message}"
        );
    }

    #[test]
    fn parts_of_a_step_are_its_samples_in_a_row() {
        type B = burn::backend::Autodiff<burn_ndarray::NdArray>;
        let source = BatchSource::new(plan(6), Arc::new(Digits::new(Split::Train)));
        let (device, diffusion) = (
            Default::default(),
            AnyProcess::from(GaussianDiffusion::full()),
        );
        let whole = source.draw::<B>(2, &device).unwrap();
        let batches = Batches::<B>::new(source, 2, 4, diffusion, &device).in_parts(3);
        let parts: Vec<Batch<B>> = batches.iter().collect();
        let steps: Vec<usize> = parts.iter().map(|part| part.step).collect();
        assert_eq!(steps, [2, 2, 2, 3, 3, 3]);
        let join = |of: &dyn Fn(&Batch<B>) -> Tensor<B, 2>| {
            Tensor::cat(parts[..3].iter().map(of).collect(), 0).into_data()
        };
        type Part<'a> = &'a dyn Fn(&Batch<B>) -> Tensor<B, 2>;
        let all: [Part<'_>; 4] = [
            &|batch| batch.x.clone().flatten(1, 3),
            &|batch| batch.noise.clone().flatten(1, 3),
            &|batch| batch.y.clone().float().unsqueeze_dim(1),
            &|batch| batch.gumbel[1].clone(),
        ];
        for of in all {
            assert_eq!(join(of), of(&whole).into_data());
        }
        let t: Vec<f32> = parts[..3].iter().flat_map(|part| part.t.clone()).collect();
        assert_eq!(t, whole.t);
        // Each of three workers gets one of them.
        let second = batches.shared(Share { index: 1, of: 3 });
        let theirs: Vec<Batch<B>> = second.iter().collect();
        assert_eq!(theirs.len(), 2);
        assert_eq!(theirs[0].noise.to_data(), parts[1].noise.to_data());
        assert_eq!(theirs[1].x.to_data(), parts[4].x.to_data());
    }
}
