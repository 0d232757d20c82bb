//! Parts of a training step, timed one by one on ndarray. Whole workloads are `tinyfusion bench`.

use std::hint::black_box;
use std::sync::Arc;

use burn::module::AutodiffModule;
use burn::tensor::{Distribution, Tensor};
use burn_ndarray::{NdArray, NdArrayDevice};
use criterion::{Criterion, criterion_group, criterion_main};
use tinyfusion::bench;
use tinyfusion::data::{BatchPlan, BatchSource, Digits, Split};
use tinyfusion::evaluation::{Features, StatisticsAccumulator, frechet_distance, precision_recall};
use tinyfusion::models::{Network, initialise};
use tinyfusion::ops::FusedOps;
use tinyfusion::process::GaussianDiffusion;
use tinyfusion::pruning::{Group, draw};
use tinyfusion::random::{self, Stream};
use tinyfusion::recovery::Student;
use tinyfusion::training::Ema;
use tinyfusion::weights::{assign, collect};

type Inner = NdArray;
type Training = burn::backend::Autodiff<Inner>;

/// The digit model's sizes: 64 wide, 16 tokens, 4 heads.
const BATCH: usize = 64;
const TOKENS: usize = 16;
const WIDTH: usize = 64;
const HEADS: usize = 4;

fn noise<const D: usize>(shape: [usize; D]) -> Tensor<Inner, D> {
    Tensor::random(
        shape,
        Distribution::Normal(0.0, 1.0),
        &NdArrayDevice::default(),
    )
}

fn operators(criterion: &mut Criterion) {
    let hidden = noise([BATCH, TOKENS, 4 * WIDTH]);
    criterion.bench_function("gelu", |b| {
        b.iter(|| black_box(Inner::gelu_tanh(hidden.clone())))
    });
    let (x, shift, scale) = (
        noise([BATCH, TOKENS, WIDTH]),
        noise([BATCH, WIDTH]),
        noise([BATCH, WIDTH]),
    );
    criterion.bench_function("modulated norm", |b| {
        b.iter(|| {
            black_box(Inner::modulated_norm(
                x.clone(),
                shift.clone(),
                scale.clone(),
                1e-6,
            ))
        })
    });
    let qkv = noise([BATCH, TOKENS, 3 * WIDTH]);
    criterion.bench_function("attention", |b| {
        b.iter(|| black_box(Inner::qkv_attention(qkv.clone(), HEADS)))
    });
    let group = Group::new(2, 4).expect("2:4 is a group");
    let (logits, gumbel) = (noise([1, 6]), noise([BATCH, 6]));
    criterion.bench_function("gate", |b| {
        b.iter(|| black_box(draw(group, logits.clone(), gumbel.clone(), 1.0, 100.0)))
    });
}

fn training(criterion: &mut Criterion) {
    let device = NdArrayDevice::default();
    let config = bench::model("digits").expect("the digit model is there");
    let plan = BatchPlan {
        batch: BATCH,
        seed: 0,
        channels: 1,
        size: 8,
        classes: 10,
        label_drop: 0.1,
        diffusion_steps: 1000,
        candidates: vec![2; 6],
    };
    let source = BatchSource::new(plan, Arc::new(Digits::new(Split::Train)));
    let mut step = 0;
    criterion.bench_function("batch", |b| {
        b.iter(|| {
            step += 1;
            black_box(source.draw::<Inner>(step, &device))
        })
    });
    let network = Network::<Training>::zeros(&config, &device);
    let mut state = collect::<Training, _>(&network);
    initialise(&mut state, 0);
    let network = assign(
        network,
        &state,
        std::path::Path::new("bench"),
        "the digit model",
    )
    .expect("the state is the network's own");
    let student = Student::new(network, None, Arc::new(GaussianDiffusion::full()), 1);
    let mut ema = Ema::new(&student, 0.999);
    criterion.bench_function("ema", |b| b.iter(|| ema.update(&student)));
    let inner = student.valid();
    let batch = source.draw::<Inner>(0, &device);
    criterion.bench_function("loss", |b| b.iter(|| black_box(inner.terms(&batch))));
}

fn evaluation(criterion: &mut Criterion) {
    let features = |index: u64| {
        Features::new(64, random::normal(0, Stream::Bench, 0, index, 1000 * 64))
            .expect("normal numbers are finite")
    };
    let (a, b) = (features(0), features(1));
    let statistics = |features: &Features| {
        let mut accumulator = StatisticsAccumulator::new(features.dim());
        accumulator
            .push(features)
            .and_then(|()| accumulator.finish())
            .expect("a thousand rows are enough")
    };
    let (of_a, of_b) = (statistics(&a), statistics(&b));
    criterion.bench_function("frechet distance, 64 wide", |bencher| {
        bencher.iter(|| black_box(frechet_distance(&of_a, &of_b)))
    });
    criterion.bench_function("precision and recall, 1,000 x 1,000", |bencher| {
        bencher.iter(|| black_box(precision_recall(&a, &b, 3)))
    });
}

criterion_group!(parts, operators, training, evaluation);
criterion_main!(parts);
