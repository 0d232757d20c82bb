//! Prunes a network of your own: a small transformer over the rows of a picture is trained on the
//! embedded digits, the gates of its eight blocks are learned, and the four that stay are healed.
//!
//! `cargo run --example own_network`

use std::path::Path;
use std::sync::Arc;

use burn::backend::Autodiff;
use burn::module::{AutodiffModule, Module, Param};
use burn::nn::Initializer;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use burn::train::{InferenceStep, TrainStep};
use burn_ndarray::{NdArray, NdArrayDevice};
use tinyfusion::backend::Compute;
use tinyfusion::data::{Batch, BatchPlan, BatchSource, Batches, Digits, Split};
use tinyfusion::models::{Denoiser, Prunable, Shape, timestep_features};
use tinyfusion::ops::{Activation, FusedOps, Linear};
use tinyfusion::process::{AnyProcess, GaussianDiffusion, Process};
use tinyfusion::pruning::{Annealing, Groups, LearnedPruner, Update};
use tinyfusion::recovery::Student;
use tinyfusion::state::{assign, collect};
use tinyfusion::training::{Fit, Fitted, Optimisation, StepReport, Training};
use tinyfusion::trunk::{self, BlockHook, Trunk};

type Device = NdArrayDevice;
type Learning = Autodiff<NdArray>;

const DIGITS: Shape = Shape {
    channels: 1,
    side: 8,
    classes: 10,
};
const WIDTH: usize = 32;

// The network: each row of a picture is a token.

#[derive(Module, Debug)]
struct Rows<B: Backend> {
    rows: Linear<B>,
    time: Linear<B>,
    labels: Param<Tensor<B, 2>>,
    blocks: Vec<Block<B>>,
    head: Linear<B>,
}

#[derive(Module, Debug)]
struct Block<B: Backend> {
    qkv: Linear<B>,
    out: Linear<B>,
    up: Linear<B>,
    down: Linear<B>,
}

impl<B: FusedOps> Block<B> {
    /// `[batch, tokens, width]` to the same.
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let x = self.out.forward(B::qkv_attention(
            self.qkv.forward(x.clone()),
            4,
            Compute::F32,
        )) + x;
        (self.down).forward_activated(self.up.forward(x.clone()), Activation::Silu) + x
    }
}

// What the two traits ask.

impl<B: FusedOps> Denoiser<B> for Rows<B> {
    fn shape(&self) -> Shape {
        DIGITS
    }

    fn forward(
        &self,
        x: Tensor<B, 4>,
        t: Tensor<B, 1>,
        y: Tensor<B, 1, Int>,
        hook: &mut dyn BlockHook<B>,
    ) -> Tensor<B, 4> {
        let condition =
            self.time.forward(timestep_features(t, WIDTH)) + self.labels.val().select(0, y);
        let tokens = self.rows.forward(x.squeeze_dim::<3>(1)) + condition.unsqueeze_dim(1);
        let tokens = trunk::run(self.blocks.len(), tokens, hook, |layer, x| {
            self.blocks[layer].forward(x)
        });
        self.head.forward(tokens).unsqueeze_dim(1)
    }
}

impl<B: FusedOps> Prunable<B> for Rows<B> {
    fn trunk(&self) -> Trunk {
        Trunk::plain(self.blocks.len())
    }

    fn keep(mut self, kept: &[usize]) -> Self {
        let mut layer = 0..;
        self.blocks
            .retain(|_| layer.next().is_some_and(|layer| kept.contains(&layer)));
        self
    }

    fn linears_mut(&mut self) -> Vec<&mut Linear<B>> {
        let blocks = self.blocks.iter_mut();
        let blocks = blocks.flat_map(|b| [&mut b.qkv, &mut b.out, &mut b.up, &mut b.down]);
        blocks
            .chain([&mut self.rows, &mut self.time, &mut self.head])
            .collect()
    }
}

// Its weights at the start.

fn linear<B: Backend>(input: usize, output: usize, gain: f64, device: &B::Device) -> Linear<B> {
    let weight = Initializer::XavierUniform { gain };
    Linear {
        weight: weight.init_with([output, input], Some(input), Some(output), device),
        ..Linear::zeros(input, output, device)
    }
}

fn rows<B: Backend>(depth: usize, device: &B::Device) -> Rows<B> {
    let block = |_| Block {
        qkv: linear(WIDTH, 3 * WIDTH, 1.0, device),
        out: linear(WIDTH, WIDTH, 0.3, device),
        up: linear(WIDTH, 2 * WIDTH, 1.0, device),
        down: linear(2 * WIDTH, WIDTH, 0.3, device),
    };
    let labels = Initializer::Normal {
        mean: 0.0,
        std: 0.02,
    };
    Rows {
        rows: linear(DIGITS.side, WIDTH, 1.0, device),
        time: linear(WIDTH, WIDTH, 1.0, device),
        labels: labels.init([DIGITS.classes + 1, WIDTH], device),
        blocks: (0..depth).map(block).collect(),
        head: linear(WIDTH, DIGITS.side, 1.0, device),
    }
}

/// Trains anything whose step takes a batch of digits: a student, or gates, which draw by
/// so many logits of each group.
fn train<M>(
    name: &str,
    model: M,
    optimisation: Optimisation,
    logits: Vec<usize>,
    folder: &Path,
) -> Result<Fitted<Learning, M>, Box<dyn std::error::Error>>
where
    M: TrainStep<Input = Batch<Learning>, Output = StepReport>
        + AutodiffModule<Learning>
        + std::fmt::Display
        + 'static,
    M::InnerModule: InferenceStep<Input = (), Output = ()>,
{
    let process = process();
    let batches = BatchPlan {
        batch: optimisation.batch,
        seed: 0,
        channels: DIGITS.channels,
        size: DIGITS.side,
        classes: DIGITS.classes,
        label_drop: 0.1,
        times: process.times(),
        masking: None,
        logits,
    };
    let source = BatchSource::new(batches, Arc::new(Digits::new(Split::Train)));
    let steps = optimisation.steps;
    let training = Training::new(name, optimisation, &folder.join(name));
    let from =
        move |start| Arc::new(Batches::new(source, start, steps, process, &Device::Cpu)) as _;
    Ok(Fit::new(training, from).run(model)?)
}

/// Gaussian diffusion whose variance is not learned: the network predicts the noise alone.
fn process() -> AnyProcess {
    GaussianDiffusion::full().into()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let student = |network, steps| Student::new(network, None, process(), steps);

    let network = rows::<Learning>(8, &Device::Cpu);
    let teacher = train(
        "teacher",
        student(network, 300),
        Optimisation::new(300),
        Vec::new(),
        folder,
    )?;

    let groups = Groups::parse_ratio("1:2", 8)?;
    let annealing = Annealing {
        tau: (4.0, 0.1),
        scaling: (10.0, 10.0),
        steps: 100,
    };
    let lora = Update::Lora {
        rank: 4,
        alpha: 8.0,
    };
    // A trained module is one of the inner backend, whose parameters no longer learn: its values go
    // into a fresh one.
    let values = collect::<NdArray, _>(&teacher.ema.network);
    let fresh = rows::<Learning>(8, &Device::Cpu);
    let whole = assign::<Learning, _>(fresh, &values, folder, "the teacher")?;
    let pruner = LearnedPruner::new(
        whole.clone(),
        groups.clone(),
        lora,
        0.0,
        annealing,
        process(),
        0,
    )?;
    let logits = groups.iter().map(|group| group.num_logits()).collect();
    let gates = train("gates", pruner, Optimisation::new(100), logits, folder)?;
    let kept = gates.ema.decision(99).kept;

    let healed = train(
        "healed",
        student(whole.keep(&kept), 100),
        Optimisation::new(100),
        Vec::new(),
        folder,
    )?;
    println!(
        "kept layers {kept:?} of 8; the healed network has {}",
        healed.ema.network.trunk().depth
    );
    Ok(())
}
