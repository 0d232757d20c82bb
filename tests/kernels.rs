//! The kernels of CubeCL against the reference that they take the place of, on a graphics card or
//! on Mesa's software Vulkan.

#![cfg(any(feature = "wgpu", feature = "cuda"))]
// A test fails by panicking.
#![allow(clippy::unwrap_used)]

use burn::tensor::backend::Backend;
use burn::tensor::{Distribution, Tensor};
use burn_flex::Flex;
use tinyfusion::backend::Compute;
use tinyfusion::ops::{
    Activation, AdamWState, AdamWStep, FusedOps, GroupNormOptions, LinearWants, LinearWeights,
    LoraWeights, reference,
};

/// Every activation that a kernel computes.
const ACTIVATIONS: [Activation; 4] = [
    Activation::Identity,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Silu,
];

/// Batch, tokens and width: widths that vectors of 4, 2 and 1 divide, more columns and rows than
/// one cube takes, and fewer.
const SIZES: [[usize; 3]; 5] = [
    [2, 5, 8],
    [1, 1, 6],
    [3, 19, 33],
    [2, 70, 1156],
    [300, 1, 64],
];

fn noise<B: Backend, const D: usize>(shape: [usize; D]) -> Tensor<B, D> {
    Tensor::random(shape, Distribution::Normal(0.3, 1.0), &Default::default())
}

/// The tensor, or a copy that nothing else reads, which a kernel may overwrite.
fn given<B: Backend, const D: usize>(x: &Tensor<B, D>, own: bool) -> Tensor<B, D> {
    match own {
        true => x.clone() + 0.0,
        false => x.clone(),
    }
}

/// Refuses a result further from the reference's than `slack` times the largest of its values times
/// 1e-6: sums of f32 in another order, whose terms are no larger.
#[track_caller]
fn alike<B: Backend, E: Backend, const D: usize>(
    found: Tensor<B, D>,
    expected: Tensor<E, D>,
    slack: f32,
) {
    assert_eq!(found.dims(), expected.dims());
    let found = found.into_data().to_vec::<f32>().unwrap();
    let expected = expected.into_data().to_vec::<f32>().unwrap();
    let largest = expected.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let off = (found - expected).abs() / largest;
        assert!(off <= slack * 1e-6, "value {at} is {found}, not {expected}");
    }
}

/// A tensor of the processor, whose products are sound at every size.
fn cpu<B: Backend, const D: usize>(x: &Tensor<B, D>) -> Tensor<Flex, D> {
    Tensor::from_data(x.to_data(), &Default::default())
}

/// Whether inputs are read by others too, which a kernel then must not overwrite, or by it alone.
const OWN: [bool; 2] = [false, true];

fn activations<B: FusedOps>() {
    for shape in [[7, 9], [64, 32]] {
        // To where an exponent would overflow.
        let x = noise::<B, 2>(shape) * 40.0;
        let gradient = noise::<B, 2>(shape);
        let before = [&x, &gradient].map(Tensor::to_data);
        for (activation, own) in ACTIVATIONS.iter().flat_map(|a| OWN.map(|own| (*a, own))) {
            let expected = reference::activate(x.clone(), activation);
            alike(B::activate(given(&x, own), activation), expected, 1.0);
            let slope = reference::activate_derivative(x.clone(), activation);
            let found = B::activate_backward(given(&gradient, own), x.clone(), activation);
            alike(found, gradient.clone() * slope, 1.0);
        }
        assert_eq!([&x, &gradient].map(Tensor::to_data), before);
    }
}

fn linear_layers<B: FusedOps>(slack: f32) {
    // Of 32 and 96 terms, which products of CubeCL misread, and others.
    for [rows, input, output] in [[6, 8, 12], [70, 33, 64], [96, 32, 96]] {
        for lora in [false, true] {
            let (weight, bias) = (noise::<B, 2>([output, input]), noise::<B, 1>([output]));
            let (a, b) = (noise::<B, 2>([2, input]), noise::<B, 2>([output, 2]));
            let weights = || LinearWeights::<B> {
                weight: weight.clone(),
                bias: bias.clone(),
                lora: lora.then(|| LoraWeights {
                    a: a.clone(),
                    b: b.clone(),
                    scale: 0.7,
                }),
                compute: Compute::F32,
            };
            let of_cpu = || LinearWeights::<Flex> {
                weight: cpu(&weight),
                bias: cpu(&bias),
                lora: lora.then(|| LoraWeights {
                    a: cpu(&a),
                    b: cpu(&b),
                    scale: 0.7,
                }),
                compute: Compute::F32,
            };
            let x = noise::<B, 2>([rows, input]);
            let gradient = noise::<B, 2>([rows, output]);
            let wants = LinearWants {
                x: true,
                weight: true,
                bias: true,
                lora,
            };
            for activation in ACTIVATIONS {
                let expected = reference::linear(cpu(&x), of_cpu(), activation);
                let found = B::linear_layer(x.clone(), weights(), activation);
                alike(found, expected, slack);
                let (g, y) = (cpu(&gradient), cpu(&x));
                let expected = reference::linear_backward(g, y, of_cpu(), activation, wants);
                let (g, y) = (gradient.clone(), x.clone());
                let found = B::linear_layer_backward(g, y, weights(), activation, wants);
                alike(found.x.unwrap(), expected.x.unwrap(), slack);
                alike(found.weight.unwrap(), expected.weight.unwrap(), slack);
                alike(found.bias.unwrap(), expected.bias.unwrap(), slack);
                if let Some((a, b)) = expected.lora {
                    let found = found.lora.unwrap();
                    alike(found.0, a, slack);
                    alike(found.1, b, slack);
                }
            }
        }
    }
}

fn norms<B: FusedOps>() {
    for [batch, tokens, width] in SIZES {
        // Far from zero, where a mean is rounded by 2e-6 of a deviation.
        let x = noise::<B, 3>([batch, tokens, width]) + 30.0;
        let [gradient, sum] = [(); 2].map(|()| noise::<B, 3>([batch, tokens, width]));
        // Columns of a wider matrix, as a modulation's are.
        let modulation = noise::<B, 2>([batch, 6 * width]);
        let part = |index: usize| modulation.clone().narrow(1, index * width, width);
        let (shift, scale) = (part(1), part(4));
        let before = [&x, &gradient, &sum].map(Tensor::to_data);
        for own in OWN {
            let (b, c) = (|| shift.clone(), || scale.clone());
            let expected = reference::modulated_norm(x.clone(), b(), c(), 1e-6);
            let found = B::modulated_norm(given(&x, own), b(), c(), 1e-6);
            alike(found, expected, 20.0);
            for sum in [None, Some(&sum)] {
                let g = || gradient.clone();
                let earlier = sum.cloned();
                let expected =
                    reference::modulated_norm_backward(g(), x.clone(), c(), 1e-6, earlier);
                let earlier = sum.map(|sum| given(sum, own));
                let found = B::modulated_norm_backward(g(), x.clone(), c(), 1e-6, earlier);
                alike(found.x, expected.x, 20.0);
                alike(found.shift, expected.shift, 20.0);
                alike(found.scale, expected.scale, 20.0);
            }
        }
        assert_eq!([&x, &gradient, &sum].map(Tensor::to_data), before);
    }
}

fn group_norms<B: FusedOps>() {
    for (shape, groups) in [([2, 6, 3, 5], 3), ([1, 64, 16, 16], 32), ([3, 8, 4, 4], 1)] {
        let x = noise::<B, 4>(shape);
        let [scale, shift] = [(); 2].map(|()| noise::<B, 1>([shape[1]]));
        let before = x.to_data();
        for (activation, own) in ACTIVATIONS.iter().flat_map(|a| OWN.map(|own| (*a, own))) {
            let norm = GroupNormOptions {
                groups,
                epsilon: 1e-5,
                activation,
            };
            let (b, c) = (|| scale.clone(), || shift.clone());
            let expected = reference::group_norm(x.clone(), b(), c(), norm);
            alike(B::group_norm(given(&x, own), b(), c(), norm), expected, 3.0);
        }
        assert_eq!(x.to_data(), before);
    }
}

fn attention<B: FusedOps>(slack: f32) {
    // Heads of 4, of 72 as DiT-XL's, which are padded, and of 3; tokens that no vector divides, and
    // 32, which are padded too.
    for [batch, tokens, width, heads] in [[2, 5, 8, 2], [1, 65, 144, 2], [3, 32, 9, 3]] {
        let qkv = noise::<B, 3>([batch, tokens, 3 * width]);
        let gradient = noise::<B, 3>([batch, tokens, width]);
        let f32 = Compute::F32;
        let expected = reference::qkv_attention(cpu(&qkv), heads, 1, f32);
        alike(B::qkv_attention(qkv.clone(), heads, f32), expected, slack);
        let expected = reference::qkv_attention_backward(cpu(&gradient), cpu(&qkv), heads, 1, f32);
        let found = B::qkv_attention_backward(gradient, qkv, heads, f32);
        alike(found, expected, slack);
    }
}

fn gates_and_shares<B: FusedOps>() {
    for [batch, tokens, width] in SIZES {
        let [x, y, gradient] = [(); 3].map(|()| noise::<B, 3>([batch, tokens, width]));
        let gate = noise::<B, 2>([batch, 6 * width]).narrow(1, 2 * width, width);
        let share = noise::<B, 1>([batch]);
        let (b, c) = (|| gate.clone(), || share.clone());
        let before = [&x, &y, &gradient].map(Tensor::to_data);
        for own in OWN {
            let expected = reference::gated_residual(x.clone(), b(), y.clone());
            for (x, y) in [(given(&x, own), y.clone()), (x.clone(), given(&y, own))] {
                alike(B::gated_residual(x, b(), y), expected.clone(), 1.0);
            }
            let g = || gradient.clone();
            let expected = reference::gated_residual_backward(g(), b(), y.clone());
            let found = B::gated_residual_backward(g(), b(), given(&y, own));
            alike(found.0, expected.0, 2.0);
            alike(found.1, expected.1, 1.0);

            let expected = reference::blend(x.clone(), y.clone(), c());
            alike(B::blend(x.clone(), given(&y, own), c()), expected, 1.0);
            let expected = reference::blend_backward(g(), x.clone(), y.clone(), c());
            let found = B::blend_backward(given(&gradient, own), x.clone(), y.clone(), c());
            alike(found.0, expected.0, 1.0);
            alike(found.1, expected.1, 1.0);
            // A sum of up to 161,840 terms.
            alike(found.2, expected.2, 20.0);
        }
        assert_eq!([&x, &y, &gradient].map(Tensor::to_data), before);
    }
}

fn parameters<B: FusedOps>() {
    let device = Default::default();
    for count in [1, 7, 64, 300_001] {
        let [value, first, gradient] = [(); 3].map(|()| noise::<B, 1>([count]));
        let second = noise::<B, 1>([count]).powi_scalar(2);
        let step = AdamWStep {
            gradient_scale: 0.3,
            lr: 1e-2,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: 0.1,
            time: 3,
        };
        let before = [&value, &first, &second, &gradient].map(Tensor::to_data);
        for own in OWN {
            let state = |own| AdamWState {
                value: given(&value, own),
                first: given(&first, own),
                second: given(&second, own),
            };
            let expected = reference::adamw(state(false), gradient.clone(), step);
            let found = B::adamw(state(own), gradient.clone(), step);
            alike(found.value, expected.value, 2.0);
            alike(found.first, expected.first, 1.0);
            alike(found.second, expected.second, 1.0);
            let expected = reference::moving_average(first.clone(), value.clone(), 0.99);
            alike(
                B::moving_average(given(&first, own), value.clone(), 0.99),
                expected,
                1.0,
            );
        }
        // By the processor: Burn's sums are cut short by Mesa's software Vulkan, which ends a loop
        // after 65,536 rounds.
        let squares = value.to_data().to_vec::<f32>().unwrap();
        let squares: f64 = squares.iter().map(|x| f64::from(*x).powi(2)).sum();
        let expected = Tensor::<B, 1>::from_floats([squares as f32], &device);
        alike(B::sum_of_squares(value.clone()), expected, 5.0);
        assert_eq!(
            [&value, &first, &second, &gradient].map(Tensor::to_data),
            before
        );
    }
}

/// The checks as tests on a backend, whose products may be off by `$slack` times 1e-6.
macro_rules! on {
    ($name:ident, $backend:ty, $slack:literal) => {
        mod $name {
            on!(@tests $backend, activations(), attention($slack), gates_and_shares(),
                group_norms(), linear_layers($slack), norms(), parameters());
        }
    };
    (@tests $backend:ty, $($check:ident($($slack:literal)?)),*) => {
        $(#[test]
        fn $check() {
            crate::$check::<$backend>($($slack)?);
        })*
    };
}

#[cfg(feature = "wgpu")]
on!(wgpu, tinyfusion::backend::Wgpu, 5.0);

// Factors may be rounded to TF32, by 5e-4 of themselves.
#[cfg(feature = "cuda")]
on!(cuda, tinyfusion::backend::Cuda, 3000.0);
