//! Parts of a training step, timed one by one on ndarray. Whole workloads are `tinyfusion bench`.

use std::hint::black_box;
use std::sync::Arc;

use burn::module::AutodiffModule;
use burn::tensor::{Distribution, Tensor};
use burn_ndarray::{NdArray, NdArrayDevice};
use criterion::{Criterion, criterion_group, criterion_main};
use tinyfusion::backend::Compute;
use tinyfusion::bench;
use tinyfusion::data::{BatchPlan, BatchSource, Digits, Split};
use tinyfusion::evaluation::{Features, StatisticsAccumulator, frechet_distance, precision_recall};
use tinyfusion::models::{Network, initialise};
use tinyfusion::ops::{
    Activation, AdamWState, AdamWStep, FusedOps, LinearWants, LinearWeights, LoraWeights, Window,
    reference,
};
use tinyfusion::process::{GaussianDiffusion, Times};
use tinyfusion::pruning::{Group, draw};
use tinyfusion::random::{self, Stream};
use tinyfusion::recovery::Student;
use tinyfusion::state::{assign, collect};
use tinyfusion::training::Ema;

// As in the program: memory freed by a step is reused by the next.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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

/// Every operator, forward and backward, at the digit model's sizes and at DiT-S/2's.
fn operators(criterion: &mut Criterion) {
    for [batch, tokens, width, heads] in [[BATCH, TOKENS, WIDTH, HEADS], [4, 256, 384, 6]] {
        let name = |what: &str| format!("{what}, {batch} x {tokens} x {width}");
        let [x, y, gradient] = [(); 3].map(|()| noise([batch, tokens, width]));
        let [shift, scale] = [(); 2].map(|()| noise([batch, width]));
        for (layer, input, output, activation) in [
            ("qkv", width, 3 * width, Activation::Identity),
            ("gelu and fc2", 4 * width, width, Activation::GeluTanh),
        ] {
            for rank in [None, Some(8)] {
                let kind = if rank.is_some() { "low-rank" } else { "full" };
                let weights = || LinearWeights {
                    weight: noise([output, input]),
                    bias: noise([output]),
                    lora: rank.map(|rank| LoraWeights {
                        a: noise([rank, input]),
                        b: noise([output, rank]),
                        scale: 2.0,
                    }),
                    compute: Compute::F32,
                };
                let (weights, x): (_, Tensor<Inner, 2>) =
                    (weights(), noise([batch * tokens, input]));
                let gradient = noise([batch * tokens, output]);
                criterion.bench_function(&name(&format!("{layer}, {kind}")), |b| {
                    b.iter(|| {
                        black_box(Inner::linear_layer(x.clone(), weights.clone(), activation))
                    })
                });
                let wants = LinearWants {
                    x: true,
                    weight: rank.is_none(),
                    bias: rank.is_none(),
                    lora: rank.is_some(),
                };
                criterion.bench_function(&name(&format!("{layer}, {kind}, backward")), |b| {
                    b.iter(|| {
                        black_box(Inner::linear_layer_backward(
                            gradient.clone(),
                            x.clone(),
                            weights.clone(),
                            activation,
                            wants,
                        ))
                    })
                });
            }
        }
        criterion.bench_function(&name("modulated norm"), |b| {
            b.iter(|| {
                black_box(Inner::modulated_norm(
                    x.clone(),
                    shift.clone(),
                    scale.clone(),
                    1e-6,
                ))
            })
        });
        criterion.bench_function(&name("modulated norm, backward"), |b| {
            b.iter(|| {
                let (gradient, x) = (gradient.clone(), x.clone());
                black_box(Inner::modulated_norm_backward(
                    gradient,
                    x,
                    scale.clone(),
                    1e-6,
                    None,
                ))
            })
        });
        let qkv = noise([batch, tokens, 3 * width]);
        criterion.bench_function(&name("attention"), |b| {
            b.iter(|| black_box(Inner::qkv_attention(qkv.clone(), heads, Compute::F32)))
        });
        criterion.bench_function(&name("attention, backward"), |b| {
            b.iter(|| {
                black_box(Inner::qkv_attention_backward(
                    gradient.clone(),
                    qkv.clone(),
                    heads,
                    Compute::F32,
                ))
            })
        });
        criterion.bench_function(&name("gated residual"), |b| {
            b.iter(|| black_box(Inner::gated_residual(x.clone(), scale.clone(), y.clone())))
        });
        criterion.bench_function(&name("gated residual, backward"), |b| {
            b.iter(|| {
                black_box(Inner::gated_residual_backward(
                    gradient.clone(),
                    scale.clone(),
                    y.clone(),
                ))
            })
        });
        let share = noise([batch]);
        criterion.bench_function(&name("blend"), |b| {
            b.iter(|| black_box(Inner::blend(x.clone(), y.clone(), share.clone())))
        });
        let hidden = noise([batch, tokens, 4 * width]);
        criterion.bench_function(&name("gelu"), |b| {
            b.iter(|| black_box(Inner::activate(hidden.clone(), Activation::GeluTanh)))
        });
        criterion.bench_function(&name("silu"), |b| {
            b.iter(|| black_box(Inner::activate(hidden.clone(), Activation::Silu)))
        });
        let step = AdamWStep {
            gradient_scale: 1.0,
            lr: 1e-4,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: 0.0,
            time: 2,
        };
        let gradient = noise([12, width, 4 * width]);
        let mut state = Some(AdamWState {
            value: gradient.clone() + 0.0,
            first: gradient.clone() + 0.0,
            second: gradient.clone().abs(),
        });
        criterion.bench_function(&name("adamw"), |b| {
            b.iter(|| {
                // Moved out and back: an unshared value is overwritten in place.
                if let Some(before) = state.take() {
                    state = Some(Inner::adamw(before, gradient.clone(), step));
                }
            })
        });
    }
    let group = Group::new(2, 4).expect("2:4 is a group");
    let (logits, gumbel) = (noise([1, 6]), noise([BATCH, 6]));
    criterion.bench_function("gate", |b| {
        b.iter(|| black_box(draw(group, logits.clone(), gumbel.clone(), 1.0, 100.0)))
    });
}

/// The products of a block, by this crate's operator and by the crate `gemm`, both on all cores.
fn products(criterion: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    for (rows, input, output) in [
        (2048, 64, 256),
        (2048, 256, 64),
        (1024, 384, 1152),
        (1024, 1536, 384),
    ] {
        let x = noise([rows, input]);
        let weights = LinearWeights {
            weight: noise([output, input]),
            bias: noise([output]),
            lora: None,
            compute: Compute::F32,
        };
        let name = format!("product, {rows} x {input} x {output}");
        criterion.bench_function(&format!("{name}, ours"), |b| {
            b.iter(|| {
                black_box(Inner::linear_layer(
                    x.clone(),
                    weights.clone(),
                    Activation::Identity,
                ))
            })
        });
        let values = |tensor: Tensor<Inner, 2>| tensor.into_data().to_vec::<f32>().expect("f32");
        let (a, w, mut c) = (values(x), values(weights.weight), vec![0f32; rows * output]);
        criterion.bench_function(&format!("{name}, gemm"), |b| {
            // SAFETY: the three slices have the stated sizes; strides are those of rows, and of the
            // transposed W.
            b.iter(|| unsafe {
                gemm::gemm(
                    rows,
                    output,
                    input,
                    c.as_mut_ptr(),
                    1,
                    output as isize,
                    false,
                    a.as_ptr(),
                    1,
                    input as isize,
                    w.as_ptr(),
                    input as isize,
                    1,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    gemm::Parallelism::Rayon(threads),
                )
            })
        });
    }
}

/// Convolutions of the autoencoder and of InceptionV3, by this crate's operator and by Burn's.
fn convolutions(criterion: &mut Criterion) {
    for (shape, output, kernel, stride) in [
        ([4, 128, 64, 64], 128, [3, 3], 1),
        ([1, 512, 64, 64], 512, [3, 3], 1),
        ([4, 288, 35, 35], 384, [3, 3], 2),
        ([4, 160, 17, 17], 160, [1, 7], 1),
        ([4, 2048, 8, 8], 384, [1, 1], 1),
    ] {
        let x = noise(shape);
        let weight = noise([output, shape[1], kernel[0], kernel[1]]);
        let bias = noise([output]);
        let window = Window::padded(kernel.map(|side| side / 2)).every(stride);
        let name = format!("convolution, {shape:?} to {output} by {kernel:?}, stride {stride}");
        let parameters = || (x.clone(), weight.clone(), Some(bias.clone()));
        criterion.bench_function(&format!("{name}, ours"), |b| {
            b.iter(|| {
                let (x, weight, bias) = parameters();
                black_box(Inner::convolution(x, weight, bias, window, Compute::F32))
            })
        });
        criterion.bench_function(&format!("{name}, Burn's"), |b| {
            b.iter(|| {
                let (x, weight, bias) = parameters();
                black_box(reference::convolution(
                    x,
                    weight,
                    bias,
                    window,
                    Compute::F32,
                ))
            })
        });
    }
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
        times: Times::Steps(1000),
        masking: None,
        logits: vec![2; 6],
    };
    let source = BatchSource::new(plan, Arc::new(Digits::new(Split::Train)));
    let mut step = 0;
    criterion.bench_function("batch", |b| {
        b.iter(|| {
            step += 1;
            black_box(source.draw::<Inner>(step, &device))
        })
    });
    let network = Network::<Training>::zeros(&config, &device).expect("it is a diffusion network");
    let mut state = collect::<Training, _>(&network);
    initialise(&mut state, 0);
    let network = assign(
        network,
        &state,
        std::path::Path::new("bench"),
        "the digit model",
    )
    .expect("the state is the network's own");
    let student = Student::new(network, None, GaussianDiffusion::full().into(), 1);
    let mut ema = Ema::new(&student, 0.999);
    criterion.bench_function("ema", |b| b.iter(|| ema.update(&student)));
    let inner = student.valid();
    let batch = source
        .draw::<Inner>(0, &device)
        .expect("the digits are in memory");
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

criterion_group!(
    parts,
    operators,
    products,
    convolutions,
    training,
    evaluation
);
criterion_main!(parts);
