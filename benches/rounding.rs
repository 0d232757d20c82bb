//! How far are products of bf16 from those of f32? For each operator that has them, forward and
//! backward, at DiT-S/2's sizes, and for samples of the embedded teacher of Fashion-MNIST, drawn in
//! 25 steps from the same noise.
//!
//! `cargo bench --bench rounding` prints the root mean square of the difference as a share of the
//! values', and fails where it is more than rounding explains.

use burn::tensor::{Distribution, Tensor};
use burn_ndarray::{NdArray, NdArrayDevice};
use tinyfusion::backend::Compute;
use tinyfusion::ops::{Activation, FusedOps, LinearWants, LinearWeights};
use tinyfusion::process::{Guidance, Sampler, Solver};
use tinyfusion::weights::{EmbeddedName, embedded};

// As in the program: memory freed by a step is reused by the next.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH: usize = 4;
const TOKENS: usize = 256;
const WIDTH: usize = 384;
const HEADS: usize = 6;

/// A factor is off by at most 2^-8 of itself, in the root mean square by 0.0017 of normal values,
/// two factors by 0.0024. Attention has two products after one another and a softmax between.
const ONE_PRODUCT: f64 = 0.003;
const ATTENTION: f64 = 0.006;

fn noise<const D: usize>(shape: [usize; D]) -> Tensor<NdArray, D> {
    Tensor::random(
        shape,
        Distribution::Normal(0.0, 1.0),
        &NdArrayDevice::default(),
    )
}

fn root<const D: usize>(x: &Tensor<NdArray, D>) -> f64 {
    f64::from((x.clone() * x.clone()).mean().into_scalar()).sqrt()
}

/// Prints how far the second of two results is from the first.
fn compare<const D: usize>(what: &str, [exact, rounded]: [Tensor<NdArray, D>; 2], most: f64) {
    let off = root(&(rounded - exact.clone())) / root(&exact);
    println!("| {what} | {off:.5} |");
    assert!(off < most, "{what}: {off}");
}

const BOTH: [Compute; 2] = [Compute::F32, Compute::Bf16];

fn linear() {
    let (x, gradient) = (
        noise([BATCH * TOKENS, 4 * WIDTH]),
        noise([BATCH * TOKENS, WIDTH]),
    );
    let (weight, bias) = (noise([WIDTH, 4 * WIDTH]), noise([WIDTH]));
    let weights = |compute| LinearWeights {
        weight: weight.clone(),
        bias: bias.clone(),
        lora: None,
        compute,
    };
    let activation = Activation::GeluTanh;
    let forward = |compute| NdArray::linear_layer(x.clone(), weights(compute), activation);
    let name = |what: &str| format!("linear layer of a GELU, {} to {WIDTH}: {what}", 4 * WIDTH);
    compare(&name("result"), BOTH.map(forward), ONE_PRODUCT);
    let wants = LinearWants {
        x: true,
        weight: true,
        bias: false,
        lora: false,
    };
    let [exact, rounded] = BOTH.map(|compute| {
        let (gradient, x) = (gradient.clone(), x.clone());
        NdArray::linear_layer_backward(gradient, x, weights(compute), activation, wants)
    });
    for (what, pair) in [
        ("gradient of the input", [exact.x, rounded.x]),
        ("gradient of the weight", [exact.weight, rounded.weight]),
    ] {
        let pair = pair.map(|gradient| gradient.expect("it is wanted"));
        compare(&name(what), pair, ONE_PRODUCT);
    }
}

fn attention() {
    let qkv = noise([BATCH, TOKENS, 3 * WIDTH]);
    let gradient = noise([BATCH, TOKENS, WIDTH]);
    let name = |what: &str| format!("attention, {TOKENS} tokens, {HEADS} heads: {what}");
    let forward = |compute| NdArray::qkv_attention(qkv.clone(), HEADS, compute);
    compare(&name("result"), BOTH.map(forward), ATTENTION);
    let backward =
        |compute| NdArray::qkv_attention_backward(gradient.clone(), qkv.clone(), HEADS, compute);
    compare(&name("gradient"), BOTH.map(backward), ATTENTION);
}

fn samples() {
    let teacher = embedded::checkpoint(EmbeddedName::FashionTeacher).expect("it is embedded");
    let device = NdArrayDevice::default();
    let guidance = Guidance {
        scale: 1.5,
        channels: 3,
    };
    let steps = 25;
    let (kind, predicts) = (
        teacher.trained_by(),
        teacher.architecture.predicts_variance(),
    );
    let solver = Solver::Ddim {
        eta: 0.0,
        clip: false,
    };
    let network = teacher.network::<NdArray>(&device).expect("it is a DiT");
    let sampler =
        Sampler::new(kind, predicts, steps, solver, guidance).expect("the process has more steps");
    let (indices, labels): (Vec<usize>, Vec<usize>) =
        (0..40).map(|index| (index, index % 10)).unzip();
    let drawn = BOTH.map(|compute| {
        let network = network.clone().computing(compute);
        sampler.generate(&network, 0, &indices, &labels, &device, || {})
    });
    // A trajectory has no bound; pictures that differ by a level of 256 differ by 0.008.
    compare(
        &format!("40 samples of 28 layers in {steps} steps, guided"),
        drawn,
        0.1,
    );
}

fn main() {
    println!("| product of bf16 | off by |\n|---|---:|");
    linear();
    attention();
    samples();
}
