//! `tinyfusion bench`: timing of whole workloads. Weights and data are random, without files, so
//! that it runs without cargo.

use std::sync::Arc;
use std::time::Instant;

use burn::module::{AutodiffModule, Module, ModuleMapper, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use burn::train::TrainStep;
use serde::Serialize;

use burn_dataset::Dataset;

use crate::backend::Compute;
use crate::data::{Batch, BatchPlan, BatchSource, DataError, Image, Samples, plain};
use crate::evaluation::median_and_spread;
use crate::models::{Architecture, Denoiser, Network, Prunable, Shape};
use crate::ops::{FusedOps, TrainingBackend};
use crate::process::masked::Rounds;
use crate::process::{
    Distillation, Guidance, MaskedFeatures, Process, ProcessKind, Sampler, Solver, TeacherOutput,
};
use crate::pruning::{
    Annealing, Groups, LearnedPruner, LossGradients, Saliency, ScoreBatch, Update, importance,
    mean_loss, taps_from_kept,
};
use crate::random::{self, Stream};
use crate::recovery::Student;
use crate::state::collect;
use crate::training::{AdamW, Ema, StepReport};
use crate::trunk::{Granularity, Plain, Trunk};
use crate::weights::{EmbeddedName, embedded};

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// One forward pass of a batch.
    Infer,
    /// One fine-tuning step: forward, backward, clip, AdamW, EMA.
    Finetune,
    /// One step of learned pruning with low-rank updates, groups 1:2.
    Prune,
    /// One step of masked distillation of half the layers, the teacher's forward pass included.
    MaskedKd,
    /// One guided sampling step of a batch; of a network that fills in images, a whole guided
    /// drawing in 4 rounds, of 25 steps of each token.
    Sample,
    /// A batch's gradients, and by them the importance of all channels.
    Importance,
}

/// Rounds of a drawing of a network that fills in images, and steps of each token.
const DRAWING: (usize, usize) = (4, 25);

/// Settings of a measurement.
#[derive(Debug, Clone)]
pub struct BenchPlan {
    /// The workload.
    pub workload: Workload,
    /// Sizes.
    pub model: Architecture,
    /// Samples of a batch.
    pub batch: usize,
    /// Type of matrix products.
    pub compute: Compute,
    /// Whether backward passes compute the branches of blocks again.
    pub recompute: bool,
    /// Runs before timing.
    pub warmup: usize,
    /// Timed runs.
    pub repeats: usize,
}

/// A measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Measurement {
    /// The workload.
    pub workload: Workload,
    /// Backend and device.
    pub backend: String,
    /// Sizes.
    #[serde(serialize_with = "Architecture::sizes_alone")]
    pub model: Architecture,
    /// Parameters.
    pub parameters: usize,
    /// Samples per batch.
    pub batch: usize,
    /// Threads of the CPU backend.
    pub threads: usize,
    /// Milliseconds of each timed run.
    pub runs_ms: Vec<f64>,
    /// Their median.
    pub median_ms: f64,
    /// Half the interquartile range, in milliseconds.
    pub spread_ms: f64,
    /// Images per second at the median.
    pub images_per_second: f64,
    /// Peak resident memory of the process in MiB, where the system reports it.
    pub peak_memory_mib: Option<f64>,
}

/// The model of that name: `digits`, the embedded teacher's sizes, or a published one.
pub fn model(name: &str) -> Option<Architecture> {
    match name {
        "digits" => (embedded::checkpoint(EmbeddedName::DigitsTeacher).ok())
            .map(|teacher| teacher.architecture),
        name => Architecture::preset(name),
    }
}

/// Random images.
struct Random {
    pixels: usize,
    classes: usize,
    count: usize,
}

impl Dataset<Image> for Random {
    fn len(&self) -> usize {
        self.count
    }

    fn get(&self, index: usize) -> Option<Image> {
        plain(self, index)
    }
}

impl Samples for Random {
    fn views(&self) -> usize {
        1
    }

    fn read(&self, index: usize, _: usize, out: &mut Vec<f32>) -> Result<usize, DataError> {
        out.extend(random::normal(
            0,
            Stream::Bench,
            1,
            index as u64,
            self.pixels,
        ));
        Ok(index % self.classes)
    }
}

/// Times a workload.
pub fn bench<B: TrainingBackend>(plan: &BenchPlan, device: &B::Device) -> Measurement {
    let config = &plan.model;
    let Shape {
        channels,
        side,
        classes,
    } = config.shape();
    let data = Random {
        pixels: channels * side.pow(2),
        classes,
        count: plan.batch.max(256),
    };
    let groups = Groups::parse_ratio("1:2", config.depth()).ok();
    let logits = match plan.workload {
        Workload::Prune => groups
            .iter()
            .flat_map(|groups| groups.iter().map(|group| group.num_logits()))
            .collect(),
        _ => Vec::new(),
    };
    let kind = ProcessKind::assumed_of(config);
    let process = kind.process();
    let shape = BatchPlan {
        batch: plan.batch,
        seed: 0,
        channels,
        size: side,
        classes,
        label_drop: 0.1,
        times: process.times(),
        masking: kind.masking(config),
        logits,
    };
    let source = BatchSource::new(shape, Arc::new(data));
    let drawn = source.on_host(0).expect("random images are made, not read");
    let batch = drawn.clone().upload::<B>(device);
    let runs = match plan.workload {
        Workload::Infer => {
            let network = network::<B::InnerBackend>(plan, device);
            let seen = drawn.upload::<B::InnerBackend>(device).noised(&process);
            time::<B>(plan, device, || {
                let _ = seen.run(&process, &network, &mut Plain);
            })
        }
        Workload::Sample => {
            let network = network::<B::InnerBackend>(plan, device);
            let guidance = Guidance {
                scale: 1.5,
                channels: 3,
            };
            let sampler = |steps, solver| {
                Sampler::new(kind, config.predicts_variance(), steps, solver, guidance)
                    .expect("the process can be sampled in so many steps")
            };
            if network.fills_in().is_some() {
                let rounds = Rounds {
                    rounds: DRAWING.0,
                    ..Rounds::PUBLISHED
                };
                let sampler = sampler(DRAWING.1, Solver::Masked(rounds));
                let indices: Vec<usize> = (0..plan.batch).collect();
                let labels = vec![0; plan.batch];
                return measured::<B>(
                    plan,
                    device,
                    time::<B>(plan, device, || {
                        let _ = sampler.generate(&network, 0, &indices, &labels, device, || {});
                    }),
                );
            }
            let sampler = sampler(1, kind.solver());
            let (x, y): (_, Tensor<B::InnerBackend, 1, Int>) = (batch.x.inner(), batch.y.inner());
            let noise = batch.noise.inner();
            time::<B>(plan, device, || {
                let _ = sampler.denoise(
                    &network,
                    x.clone(),
                    y.clone(),
                    &mut |_| noise.clone(),
                    |_, _, _| (),
                );
            })
        }
        Workload::Importance => {
            let network = network::<B>(plan, device);
            let weights = collect::<B, _>(&network);
            // The caller has checked: it is a diffusion network.
            let groups = config.channel_groups().unwrap_or_default();
            let batch = ScoreBatch::from(batch);
            time::<B>(plan, device, || {
                let mut gradients = LossGradients::default();
                let loss = mean_loss(&network, &process, &batch);
                gradients.add(&network, Some(loss), &[1]);
                let sums = gradients.sums::<B>(&network);
                for group in &groups {
                    importance(group, &weights, &sums, Saliency::Taylor);
                }
            })
        }
        Workload::Finetune => train(
            plan,
            device,
            Student::new(network::<B>(plan, device), None, process, 1),
            || batch.clone(),
        ),
        Workload::Prune => {
            // The caller has checked: an odd depth has no pairs.
            let groups = groups.unwrap_or_else(|| unreachable!("the command refuses an odd depth"));
            let annealing = Annealing {
                tau: (4.0, 0.1),
                scaling: (100.0, 100.0),
                steps: 1,
            };
            let pruner = LearnedPruner::new(
                network::<B>(plan, device),
                groups,
                Update::Lora {
                    rank: 8,
                    alpha: 16.0,
                },
                0.02,
                annealing,
                process,
                0,
            )
            .expect("the groups were made for this depth");
            train(plan, device, pruner, || batch.clone())
        }
        Workload::MaskedKd => {
            let teacher = network::<B::InnerBackend>(plan, device);
            let kept: Vec<usize> = (0..config.depth()).step_by(2).collect();
            let student = network::<B>(plan, device).keep(&kept);
            let trunk = config.trunk(Granularity::Block);
            let taps = taps_from_kept(&kept, &trunk.unwrap_or(Trunk::plain(0)));
            // The caller has checked: of at least two layers the first stays.
            let taps = taps.expect("the kept layers are of the trunk");
            let layers: Vec<usize> = taps.iter().map(|tap| tap.1).collect();
            let distillation = Distillation {
                alpha: 0.9,
                features: Some(MaskedFeatures {
                    taps,
                    k: Some(2.0),
                    beta: (0.01, 0.0),
                }),
            };
            let inner = drawn.upload::<B::InnerBackend>(device);
            let student = Student::new(student, Some(distillation), process.clone(), 1);
            train(plan, device, student, || {
                let said = inner.noised(&process).teach(&process, &teacher, &layers);
                let teacher = TeacherOutput {
                    output: Tensor::from_inner(said.output),
                    features: said.features.into_iter().map(Tensor::from_inner).collect(),
                };
                Batch {
                    teacher: Some(teacher),
                    ..batch.clone()
                }
            })
        }
    };
    measured::<B>(plan, device, runs)
}

/// What was measured.
fn measured<B: TrainingBackend>(
    plan: &BenchPlan,
    device: &B::Device,
    runs: Vec<f64>,
) -> Measurement {
    let config = &plan.model;
    // Without runs there is no median; the command asks for at least one.
    let (median, spread) = median_and_spread(&runs).unwrap_or((f64::NAN, f64::NAN));
    Measurement {
        workload: plan.workload,
        backend: <B::InnerBackend as Backend>::name(device),
        model: config.clone(),
        parameters: config.parameters(),
        batch: plan.batch,
        threads: rayon::current_num_threads(),
        median_ms: median,
        spread_ms: spread,
        images_per_second: plan.batch as f64 * 1000.0 / median,
        runs_ms: runs,
        peak_memory_mib: peak_memory(),
    }
}

/// A network of small random weights, made one parameter after the other, so that there is never
/// more than one of it.
fn network<B: FusedOps>(plan: &BenchPlan, device: &B::Device) -> Network<B> {
    struct Randomise(u64);
    impl<B: Backend> ModuleMapper<B> for Randomise {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            self.0 += 1;
            param.map(|old| {
                let (shape, device, learns) = (old.dims(), old.device(), old.is_require_grad());
                drop(old);
                let count = shape.iter().product();
                let mut values = random::normal(0, Stream::Bench, 2, self.0, count);
                values.iter_mut().for_each(|value| *value *= 0.02);
                Tensor::from_data(TensorData::new(values, shape), &device).set_require_grad(learns)
            })
        }
    }
    let zeros = Network::<B>::zeros(&plan.model, device);
    // Checked by the caller.
    let zeros = zeros.unwrap_or_else(|| unreachable!("models of this name are diffusion networks"));
    let network = zeros.map(&mut Randomise(0));
    network.computing(plan.compute).recomputing(plan.recompute)
}

fn train<B, M>(
    plan: &BenchPlan,
    device: &B::Device,
    model: M,
    mut batch: impl FnMut() -> Batch<B>,
) -> Vec<f64>
where
    B: TrainingBackend,
    M: TrainStep<Input = Batch<B>, Output = StepReport> + AutodiffModule<B>,
{
    let mut optimizer = AdamW::<B>::new(0.0, Vec::new());
    let mut ema = Ema::new(&model, 0.999);
    let mut model = Some(model);
    time::<B>(plan, device, || {
        // Moved out and back around the step that consumes it.
        if let Some(current) = model.take() {
            let output = TrainStep::step(&current, batch());
            optimizer.clip_next(&current, &output.grads, 1, 1.0);
            let updated =
                burn::optim::Optimizer::<M, B>::step(&mut optimizer, 1e-4, current, output.grads);
            ema.update(&updated);
            model = Some(updated);
        }
    })
}

/// Milliseconds of each timed run, including the wait for the device.
fn time<B: Backend>(plan: &BenchPlan, device: &B::Device, mut run: impl FnMut()) -> Vec<f64> {
    let mut once = || {
        let started = Instant::now();
        run();
        // If waiting fails, the device has failed, and the next operation reports it.
        let _ = B::sync(device);
        started.elapsed().as_secs_f64() * 1000.0
    };
    for _ in 0..plan.warmup {
        once();
    }
    (0..plan.repeats).map(|_| once()).collect()
}

/// Peak resident memory in MiB, as counted by Linux.
fn peak_memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024.0)
}
