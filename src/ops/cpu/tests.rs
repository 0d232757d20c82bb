//! Kernels against the reference, forward and backward, at sizes that are no multiples of a block;
//! nodes against Burn's own gradients; gradients against finite differences.

use burn::backend::Autodiff;
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{Tensor, TensorData, TensorPrimitive};
use burn_flex::Flex;
use burn_ndarray::NdArray;

use crate::backend::Compute;

use super::super::{
    Activation, AdamWState, AdamWStep, FusedOps, LinearGradients, LinearWants, LinearWeights,
    LoraWeights, reference,
};
use super::memory::Values;
use crate::random::{self, Stream};

type Graph = Autodiff<NdArray>;

pub(super) const ACTIVATIONS: [Activation; 4] = [
    Activation::Identity,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Silu,
];

pub(super) fn noise<B: burn::tensor::backend::Backend, const D: usize>(
    index: u64,
    shape: [usize; D],
) -> Tensor<B, D> {
    let count = shape.iter().product();
    Tensor::from_data(
        TensorData::new(random::normal(0, Stream::Bench, 11, index, count), shape),
        &Default::default(),
    )
}

/// Both are f32 computations in different orders. Each value may be off by the rounding of a sum of
/// `terms` terms, the largest of which are a few units: a few units in the last place, growing with
/// the root of the count.
#[track_caller]
pub(super) fn agree<B: burn::tensor::backend::Backend, const D: usize>(
    what: &str,
    terms: usize,
    fast: Tensor<B, D>,
    exact: Tensor<B, D>,
) {
    assert_eq!(fast.dims(), exact.dims(), "{what}");
    let fast = fast.into_data().to_vec::<f32>().unwrap();
    let exact = exact.into_data().to_vec::<f32>().unwrap();
    let size = exact
        .iter()
        .fold(1.0f32, |size, value| size.max(value.abs()));
    let tolerance = 2e-6 * (terms as f32).sqrt().max(4.0) * size;
    for (index, (fast, exact)) in fast.iter().zip(&exact).enumerate() {
        assert!(
            (fast - exact).abs() <= tolerance,
            "{what}, value {index}: {fast}, by the reference {exact} (tolerance {tolerance})"
        );
    }
}

fn weights<B: burn::tensor::backend::Backend>(
    input: usize,
    output: usize,
    rank: Option<usize>,
) -> LinearWeights<B> {
    LinearWeights {
        weight: noise(1, [output, input]),
        bias: noise(2, [output]),
        lora: rank.map(|rank| LoraWeights {
            a: noise(3, [rank, input]),
            b: noise(4, [output, rank]),
            scale: 0.5,
        }),
        compute: Compute::F32,
    }
}

#[test]
fn linear_layers_agree_with_the_reference() {
    let sizes = [
        (1, 1, 1),
        (3, 5, 7),
        (8, 64, 33),
        (9, 17, 192),
        (16, 31, 16),
        (29, 300, 40),
        (171, 64, 65),
        (530, 24, 96),
        (27, 610, 450), // by columns
    ];
    let all = LinearWants {
        x: true,
        weight: true,
        bias: true,
        lora: true,
    };
    for (rows, input, output) in sizes {
        for activation in ACTIVATIONS {
            for rank in [None, Some(1), Some(8)] {
                let what = format!("{rows} x {input} to {output}, {activation:?}, rank {rank:?}");
                let terms = rows.max(input).max(output) * 4;
                let (x, gradient) = (
                    noise::<NdArray, 2>(5, [rows, input]),
                    noise(6, [rows, output]),
                );
                let weights = weights(input, output, rank);
                agree(
                    &what,
                    terms,
                    NdArray::linear_layer(x.clone(), weights.clone(), activation),
                    reference::linear(x.clone(), weights.clone(), activation),
                );
                let run = |wants| -> [LinearGradients<NdArray>; 2] {
                    let (g, x, w) = (gradient.clone(), x.clone(), weights.clone());
                    let fast = NdArray::linear_layer_backward(
                        g.clone(),
                        x.clone(),
                        w.clone(),
                        activation,
                        wants,
                    );
                    [fast, reference::linear_backward(g, x, w, activation, wants)]
                };
                let [fast, exact] = run(all);
                agree(&what, terms, fast.x.unwrap(), exact.x.unwrap());
                agree(&what, terms, fast.weight.unwrap(), exact.weight.unwrap());
                agree(&what, terms, fast.bias.unwrap(), exact.bias.unwrap());
                assert_eq!(fast.lora.is_some(), rank.is_some());
                if let (Some(fast), Some(exact)) = (fast.lora, exact.lora) {
                    agree(&what, terms, fast.0, exact.0);
                    agree(&what, terms, fast.1, exact.1);
                }
                let [fast, exact] = run(LinearWants {
                    weight: false,
                    lora: false,
                    ..all
                });
                assert!(fast.weight.is_none() && fast.lora.is_none());
                agree(&what, terms, fast.bias.unwrap(), exact.bias.unwrap());
            }
        }
    }
}

/// The tensor, each value rounded to bf16.
pub(super) fn rounded<const D: usize>(x: Tensor<NdArray, D>) -> Tensor<NdArray, D> {
    let shape = x.dims();
    let values = x.into_data().to_vec::<f32>().unwrap().into_iter();
    let values: Vec<f32> = values.map(|x| half::bf16::from_f32(x).to_f32()).collect();
    Tensor::from_data(TensorData::new(values, shape), &Default::default())
}

#[test]
fn linear_layers_of_bf16_round_their_factors_and_nothing_else() {
    // Odd depths, few rows (which stay f32), small and large weights, several blocks.
    let sizes = [
        (3, 5, 7),
        (9, 17, 192),
        (29, 301, 40),
        (171, 64, 65),
        (531, 24, 96),
        (2101, 24, 40), // parts of two blocks, the second of an odd depth
        (300, 300, 260),
        (27, 611, 450), // by columns
    ];
    let wants = LinearWants {
        x: true,
        weight: true,
        bias: true,
        lora: false,
    };
    let identity = Activation::Identity;
    for (rows, input, output) in sizes {
        let what = format!("{rows} x {input} to {output}");
        let terms = rows.max(input).max(output);
        let exact = weights::<NdArray>(input, output, None);
        let (x, gradient) = (noise(5, [rows, input]), noise(6, [rows, output]));
        let few = rows <= 8;
        let weight = match few {
            true => exact.weight.clone(),
            false => rounded(exact.weight.clone()),
        };
        let of_rounded = LinearWeights {
            weight,
            ..exact.clone()
        };
        let weights = LinearWeights {
            compute: Compute::Bf16,
            ..exact
        };
        let of = |x: Tensor<NdArray, 2>| if few { x } else { rounded(x) };
        agree(
            &what,
            terms,
            NdArray::linear_layer(x.clone(), weights.clone(), identity),
            reference::linear(of(x.clone()), of_rounded.clone(), identity),
        );
        let fast = NdArray::linear_layer_backward(
            gradient.clone(),
            x.clone(),
            weights.clone(),
            identity,
            wants,
        );
        let (g, w) = (of(gradient.clone()), of_rounded.clone());
        let exact = reference::linear_backward(g, of(x.clone()), w, identity, wants);
        agree(&what, terms, fast.x.unwrap(), exact.x.unwrap());
        // Rows are the depth of this product, so that few of them are no exception.
        let (g, x) = (rounded(gradient.clone()), rounded(x));
        let exact = reference::linear_backward(g, x, of_rounded, identity, wants);
        agree(&what, terms, fast.weight.unwrap(), exact.weight.unwrap());
        // The gradient of the bias is a sum without products.
        agree(
            &what,
            terms,
            fast.bias.unwrap(),
            gradient.sum_dim(0).squeeze(),
        );
    }
}

/// How far `found` is from `expected`, as a share of its root mean square.
fn off<const D: usize>(found: Tensor<NdArray, D>, expected: Tensor<NdArray, D>) -> f32 {
    let root = |x: Tensor<NdArray, D>| (x.clone() * x).mean().sqrt().into_scalar();
    root(found - expected.clone()) / root(expected)
}

#[test]
fn attention_of_bf16_is_off_by_its_rounding() {
    let sizes = [
        (2, 3, 2, 5),
        (3, 16, 4, 16),
        (1, 101, 3, 72),
        (1, 260, 2, 8),
        (1, 601, 1, 16),
        (1, 5, 1, 301),
    ];
    for (batch, tokens, heads, dim) in sizes {
        let what = format!("{batch} x {tokens} tokens, {heads} heads of {dim}");
        let width = heads * dim;
        let qkv = rounded(noise::<NdArray, 3>(0, [batch, tokens, 3 * width]));
        let gradient = rounded(noise(1, [batch, tokens, width]));
        let forward = |compute| NdArray::qkv_attention(qkv.clone(), heads, compute);
        let backward = |compute| {
            NdArray::qkv_attention_backward(gradient.clone(), qkv.clone(), heads, compute)
        };
        for (found, expected) in [
            (forward(Compute::Bf16), forward(Compute::F32)),
            (backward(Compute::Bf16), backward(Compute::F32)),
        ] {
            // Scaled queries, shares and their changes are rounded, by 2^-8 of themselves at most
            // and less than half of that on average; scores of some units add as much to their
            // exponentials.
            let off = off(found, expected);
            assert!((1e-4..1e-2).contains(&off), "{what}: {off}");
        }
    }
}

#[test]
fn norms_residuals_and_blends_agree_with_the_reference() {
    for [batch, tokens, width] in [
        [1, 1, 4],
        [1, 300, 33],
        [3, 5, 64],
        [2, 17, 130],
        [70, 2, 16],
    ] {
        let what = format!("{batch} x {tokens} x {width}");
        let terms = 2 * tokens.max(width);
        let [x, y, gradient] =
            [0, 1, 2].map(|index| noise::<NdArray, 3>(index, [batch, tokens, width]));
        // Columns of a wider matrix, as a modulation delivers them.
        let wide = noise::<NdArray, 2>(3, [batch, 3 * width]);
        let shift = wide.clone().narrow(1, width, width);
        let scale = wide.narrow(1, 0, width);
        let share = noise::<NdArray, 1>(4, [batch]);
        agree(
            &what,
            terms,
            NdArray::modulated_norm(x.clone(), shift.clone(), scale.clone(), 1e-6),
            reference::modulated_norm(x.clone(), shift.clone(), scale.clone(), 1e-6),
        );
        for sum in [None, Some(y.clone())] {
            let (g, x, s) = (gradient.clone(), x.clone(), scale.clone());
            let fast = NdArray::modulated_norm_backward(
                g.clone(),
                x.clone(),
                s.clone(),
                1e-6,
                sum.clone(),
            );
            let exact = reference::modulated_norm_backward(g, x, s, 1e-6, sum);
            agree(&what, terms, fast.x, exact.x);
            agree(&what, terms, fast.shift, exact.shift);
            agree(&what, terms, fast.scale, exact.scale);
        }
        agree(
            &what,
            terms,
            NdArray::gated_residual(x.clone(), scale.clone(), y.clone()),
            reference::gated_residual(x.clone(), scale.clone(), y.clone()),
        );
        let fast = NdArray::gated_residual_backward(gradient.clone(), scale.clone(), y.clone());
        let exact = reference::gated_residual_backward(gradient.clone(), scale, y.clone());
        agree(&what, terms, fast.0, exact.0);
        agree(&what, terms, fast.1, exact.1);
        agree(
            &what,
            terms,
            NdArray::blend(x.clone(), y.clone(), share.clone()),
            reference::blend(x.clone(), y.clone(), share.clone()),
        );
        let fast = NdArray::blend_backward(gradient.clone(), x.clone(), y.clone(), share.clone());
        let exact = reference::blend_backward(gradient, x, y, share);
        agree(&what, terms, fast.0, exact.0);
        agree(&what, terms, fast.1, exact.1);
        agree(&what, tokens * width, fast.2, exact.2);
    }
}

#[test]
fn attention_agrees_with_the_reference() {
    // More tokens than a group of keys (256) and than the limit for large blocks (512), and heads
    // wider than a block is deep.
    let sizes = [
        (1, 1, 1, 1),
        (2, 3, 2, 5),
        (3, 16, 4, 16),
        (2, 17, 1, 24),
        (1, 100, 3, 72),
        (1, 260, 2, 8),
        (1, 601, 1, 16),
        (1, 5, 1, 300),
    ];
    for (batch, tokens, heads, dim) in sizes {
        let what = format!("{batch} x {tokens} tokens, {heads} heads of {dim}");
        let width = heads * dim;
        let qkv = noise::<NdArray, 3>(0, [batch, tokens, 3 * width]);
        let gradient = noise(1, [batch, tokens, width]);
        let terms = 4 * tokens.max(dim);
        agree(
            &what,
            terms,
            NdArray::qkv_attention(qkv.clone(), heads, Compute::F32),
            reference::qkv_attention(qkv.clone(), heads, 1, Compute::F32),
        );
        agree(
            &what,
            terms,
            NdArray::qkv_attention_backward(gradient.clone(), qkv.clone(), heads, Compute::F32),
            reference::qkv_attention_backward(gradient, qkv, heads, 1, Compute::F32),
        );
    }
}

#[test]
fn values_that_do_not_lie_in_order_are_read_in_order() {
    let x = noise::<NdArray, 3>(0, [6, 4, 5]).swap_dims(0, 1); // [4, 6, 5]
    let ordered = Tensor::<NdArray, 3>::from_data(x.to_data(), &Default::default());
    let run = |x: Tensor<NdArray, 3>| {
        let layer = NdArray::linear_layer(x.clone(), weights(5, 12, None), Activation::Silu);
        let mixed = NdArray::qkv_attention(layer.swap_dims(0, 1), 2, Compute::F32);
        NdArray::activate(mixed, Activation::GeluTanh)
            + NdArray::blend(
                x.clone().narrow(2, 0, 4).swap_dims(0, 1),
                x.narrow(2, 1, 4).swap_dims(0, 1),
                noise(1, [6]),
            )
    };
    run(x)
        .into_data()
        .assert_eq(&run(ordered).into_data(), true);
}

#[test]
fn an_optimizer_step_agrees_with_the_reference_and_leaves_shared_values_alone() {
    let shape = [37, 61];
    let [value, first, gradient] = [0, 1, 2].map(|index| noise::<NdArray, 2>(index, shape));
    let second = noise::<NdArray, 2>(3, shape).abs();
    let state = AdamWState {
        value: value.clone(),
        first,
        second,
    };
    let before = value.to_data();
    for weight_decay in [0.0, 0.1] {
        let step = AdamWStep {
            gradient_scale: 0.3,
            lr: 1e-2,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay,
            time: 3,
        };
        let fast = NdArray::adamw(state.clone(), gradient.clone(), step);
        let exact = reference::adamw(state.clone(), gradient.clone(), step);
        // Values that are not shared are updated in place.
        let own = AdamWState {
            value: value.clone() + 0.0,
            ..state.clone()
        };
        let over = NdArray::adamw(own, gradient.clone(), step);
        over.value.to_data().assert_eq(&fast.value.to_data(), true);
        agree("value", 1, fast.value, exact.value);
        agree("first", 1, fast.first, exact.first);
        agree("second", 1, fast.second, exact.second);
    }
    value.to_data().assert_eq(&before, true);
    agree(
        "average",
        1,
        NdArray::moving_average(value.clone(), gradient.clone(), 0.9),
        reference::moving_average(value.clone(), gradient, 0.9),
    );
    value.to_data().assert_eq(&before, true);
    agree(
        "squares",
        1,
        NdArray::sum_of_squares(value.clone()),
        (value.clone() * value).sum(),
    );
}

#[test]
fn values_under_another_shape_keep_their_order() {
    let x = noise::<NdArray, 3>(0, [4, 6, 5]);
    let views = [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
        .map(|order| x.clone().permute(order));
    let part = x.clone().slice([1..3, 0..6]);
    for x in views.into_iter().chain([x, part]) {
        let count = x.shape().num_elements();
        let primitive = NdArray::with_shape(x.clone().into_primitive().tensor(), [count].into());
        let flat = Tensor::<NdArray, 1>::from_primitive(TensorPrimitive::Float(primitive));
        flat.to_data()
            .assert_eq(&x.reshape([count]).to_data(), true);
    }
}

#[test]
fn transposed_matrices_are_read_in_their_order() {
    fn check<const D: usize>(shape: [usize; D]) {
        let x = noise::<NdArray, D>(0, shape).swap_dims(D - 2, D - 1);
        let read = Values::of(x.clone()).unwrap();
        let expected = x.into_data().to_vec::<f32>().unwrap();
        assert!(read.read() == expected, "{shape:?}");
    }
    check([40, 50]);
    check([3, 16, 9]);
    check([2, 3, 17, 33]);
}

/// Inputs of every node, all requiring gradients.
struct Inputs<B: AutodiffBackend> {
    x: Tensor<B, 3>,
    y: Tensor<B, 3>,
    wide: Tensor<B, 2>,
    share: Tensor<B, 1>,
    weights: LinearWeights<B>,
}

impl<B: AutodiffBackend> Inputs<B> {
    fn new() -> Self {
        let LinearWeights {
            weight,
            bias,
            lora,
            compute,
        } = weights::<B>(12, 36, Some(2));
        Self {
            x: noise(0, [3, 4, 12]).require_grad(),
            y: noise(1, [3, 4, 12]).require_grad(),
            wide: noise(2, [3, 36]).require_grad(),
            share: noise(3, [3]).require_grad(),
            weights: LinearWeights {
                weight: weight.require_grad(),
                bias: bias.require_grad(),
                lora: lora.map(|lora| LoraWeights {
                    a: lora.a.require_grad(),
                    b: lora.b.require_grad(),
                    scale: lora.scale,
                }),
                compute,
            },
        }
    }

    /// Gradients of `loss` with respect to the inputs, in order.
    fn gradients(&self, loss: Tensor<B, 1>) -> Vec<Vec<f32>> {
        let gradients = loss.backward();
        let lora = self.weights.lora.as_ref().unwrap();
        let list = |data: TensorData| data.to_vec::<f32>().unwrap();
        vec![
            list(self.x.grad(&gradients).unwrap().into_data()),
            list(self.y.grad(&gradients).unwrap().into_data()),
            list(self.wide.grad(&gradients).unwrap().into_data()),
            list(self.share.grad(&gradients).unwrap().into_data()),
            list(self.weights.weight.grad(&gradients).unwrap().into_data()),
            list(self.weights.bias.grad(&gradients).unwrap().into_data()),
            list(lora.a.grad(&gradients).unwrap().into_data()),
            list(lora.b.grad(&gradients).unwrap().into_data()),
        ]
    }

    fn by_burn(&self) -> Tensor<B, 1> {
        let part = |start| self.wide.clone().narrow(1, start, 12);
        let normal = reference::modulated_norm(self.x.clone(), part(0), part(6), 1e-6);
        let qkv = reference::linear(normal, self.weights.clone(), Activation::GeluTanh);
        let mixed = reference::qkv_attention(qkv, 3, 1, Compute::F32);
        let x = reference::gated_residual(self.x.clone(), part(24), mixed);
        let x = reference::blend(self.y.clone(), x, self.share.clone());
        let wide = self.wide.clone();
        let turned = reference::activate(x, Activation::Silu).swap_dims(1, 2);
        (turned * noise(9, [3, 12, 4])).sum() + (wide.clone() * wide).sum()
    }
}

impl Inputs<Graph> {
    /// All operators, as in a block: x is read by a norm, a residual and a blend; the wide matrix
    /// is read by overlapping columns and by the loss itself.
    fn by_nodes(&self) -> Tensor<Graph, 1> {
        let part = |start| Graph::columns(self.wide.clone(), start, 12);
        let normal = Graph::modulated_norm(self.x.clone(), part(0), part(6), 1e-6);
        let qkv = Graph::linear_layer(normal, self.weights.clone(), Activation::GeluTanh);
        let mixed = Graph::qkv_attention(qkv, 3, Compute::F32);
        let x = Graph::gated_residual(self.x.clone(), part(24), mixed);
        let x = Graph::blend(self.y.clone(), x, self.share.clone());
        let wide = self.wide.clone();
        let turned = Graph::transposed(Graph::activate(x, Activation::Silu));
        (turned * noise(9, [3, 12, 4])).sum() + (wide.clone() * wide).sum()
    }
}

#[test]
fn nodes_give_the_gradients_that_burn_gives_for_the_reference() {
    let inputs = Inputs::<Graph>::new();
    let fast = inputs.gradients(inputs.by_nodes());
    // On burn-flex: ndarray's own `recip`, in the gradient of a division, is the processor's
    // estimate, of 8 bits (NEON) to 14 (AVX-512).
    let inputs = Inputs::<Autodiff<Flex>>::new();
    let exact = inputs.gradients(inputs.by_burn());
    for (index, (fast, exact)) in fast.iter().zip(&exact).enumerate() {
        let size = exact
            .iter()
            .fold(1.0f32, |size, value| size.max(value.abs()));
        for (fast, exact) in fast.iter().zip(exact) {
            // Rounding of f32 over a few dozen operations.
            assert!(
                (fast - exact).abs() <= 2e-5 * size,
                "input {index}: {fast}, {exact}"
            );
        }
    }
}

#[test]
fn an_input_that_waits_for_nothing_gets_nothing() {
    let inputs = Inputs::new();
    let frozen = LinearWeights {
        lora: inputs.weights.lora.clone(),
        ..weights::<Graph>(12, 36, None)
    };
    let x = noise::<Graph, 3>(0, [3, 4, 12]);
    let y = Graph::linear_layer(x.clone(), frozen.clone(), Activation::Identity);
    let gradients = y.sum().backward();
    let lora = inputs.weights.lora.as_ref().unwrap();
    assert!(lora.a.grad(&gradients).is_some() && lora.b.grad(&gradients).is_some());
    assert!(x.grad(&gradients).is_none());
    assert!(frozen.weight.grad(&gradients).is_none());
}

#[test]
fn gradients_are_what_differences_say() {
    let inputs = Inputs::new();
    let gradient = inputs.gradients(inputs.by_nodes());
    // Along each input's own gradient, where rounding matters least.
    let loss = |inputs: &Inputs<Graph>| inputs.by_nodes().into_scalar();
    let step = 1.0 / 256.0;
    let moved = |which: usize, by: f32| {
        let mut inputs = Inputs::new();
        let direction = &gradient[which];
        let length = direction.iter().map(|g| g * g).sum::<f32>().sqrt();
        let shift: Vec<f32> = direction.iter().map(|g| by * g / length).collect();
        fn add<const D: usize>(x: &mut Tensor<Graph, D>, shift: &[f32]) {
            let shift = TensorData::new(shift.to_vec(), x.dims());
            *x = (x.clone() + Tensor::from_data(shift, &x.device()))
                .detach()
                .require_grad();
        }
        match which {
            0 => add(&mut inputs.x, &shift),
            1 => add(&mut inputs.y, &shift),
            2 => add(&mut inputs.wide, &shift),
            3 => add(&mut inputs.share, &shift),
            4 => add(&mut inputs.weights.weight, &shift),
            5 => add(&mut inputs.weights.bias, &shift),
            6 => add(&mut inputs.weights.lora.as_mut().unwrap().a, &shift),
            _ => add(&mut inputs.weights.lora.as_mut().unwrap().b, &shift),
        }
        (loss(&inputs), length)
    };
    for which in 0..gradient.len() {
        let ((after, length), (before, _)) = (moved(which, step), moved(which, -step));
        let slope = (after - before) / (2.0 * step);
        // Rounding of a loss of some hundreds, divided by the step, and the third derivative:
        // within 0.03.
        assert!(
            (slope - length).abs() <= 0.03 * length,
            "input {which}: the slope is {slope}, the gradient's length {length}"
        );
    }
}
