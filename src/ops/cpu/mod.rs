//! CPU kernels: the operators of [`FusedOps`] on burn-ndarray's tensors.
//!
//! Burn's own operators pass over memory once each, mostly on one core, and call the C library for
//! every exponential. Here an operator is one pass over all cores ([`threads`]), in vector
//! instructions chosen at run time (`pulp`: AVX-512, AVX2, NEON), and its matrix products are
//! [`product`]'s, of f32 or of factors rounded to bf16. Tensors of another type than f32 go to the
//! reference.
//!
//! Nothing below this file is generic over a rank: it is compiled once, not again in every program
//! and test.
//!
//! The `unsafe` code rests on one idea: the rows of an output are divided among tasks, and each
//! writes its own (see [`memory::Out`]).

mod attention;
mod bf16;
mod blocks;
mod by_columns;
mod convolution;
mod convolution_backward;
mod elementwise;
mod group_norm;
mod linear;
mod low_rank;
mod memory;
mod optimizer;
mod panels;
mod product;
mod simd;
#[cfg(test)]
mod tests;
mod threads;
mod transpose;

use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Shape, Tensor, TensorPrimitive};
use burn_ndarray::NdArray;

use self::memory::{Rows, Values};
use crate::backend::Compute;

use super::{
    Activation, AdamWState, AdamWStep, ConvolutionGradients, FusedOps, GroupNormGradients,
    GroupNormOptions, LinearGradients, LinearWants, LinearWeights, NormGradients, Support, Window,
    reference,
};

/// Views tensors as rows of f32, or returns the reference's result.
macro_rules! rows {
    ($($tensor:ident),+ ; else $reference:expr) => {
        let ($(Some($tensor),)+) = ($(Rows::of($tensor.clone()),)+) else {
            return $reference;
        };
    };
}

fn reshaped<const D: usize, const E: usize>(
    x: Tensor<NdArray, D>,
    shape: [usize; E],
) -> Tensor<NdArray, E> {
    let x = memory::with_shape(x.into_primitive().tensor(), shape.into());
    Tensor::from_primitive(TensorPrimitive::Float(x))
}

impl FusedOps for NdArray {
    fn support(compute: Compute, _: &Self::Device) -> Support {
        match compute {
            Compute::F32 => Support::Full,
            #[cfg(target_arch = "x86_64")]
            Compute::Bf16 if bf16::native::is_slow() => Support::Slow,
            #[cfg(target_arch = "x86_64")]
            Compute::Bf16 if bf16::native::vectors().is_some() => Support::Full,
            Compute::Bf16 => Support::Emulated,
        }
    }

    fn activate<const D: usize>(x: Tensor<Self, D>, activation: Activation) -> Tensor<Self, D> {
        let shape = x.dims();
        rows!(x; else reference::activate(x, activation));
        reshaped(elementwise::activate(&x, activation), shape)
    }

    fn activate_backward<const D: usize>(
        gradient: Tensor<Self, D>,
        x: Tensor<Self, D>,
        activation: Activation,
    ) -> Tensor<Self, D> {
        let shape = x.dims();
        rows!(gradient, x; else gradient * reference::activate_derivative(x, activation));
        reshaped(
            elementwise::activate_backward(&gradient, &x, activation),
            shape,
        )
    }

    fn linear_layer<const D: usize>(
        x: Tensor<Self, D>,
        weights: LinearWeights<Self>,
        activation: Activation,
    ) -> Tensor<Self, D> {
        let mut shape = x.dims();
        shape[D - 1] = weights.weight.dims()[0];
        match (Rows::of(x.clone()), linear::Weights::of(weights.clone())) {
            (Some(x), Some(weights)) => reshaped(linear::forward(&x, &weights, activation), shape),
            _ => reference::linear(x, weights, activation),
        }
    }

    fn linear_layer_backward(
        gradient: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        weights: LinearWeights<Self>,
        activation: Activation,
        wants: LinearWants,
    ) -> LinearGradients<Self> {
        let Some(parameters) = linear::Weights::of(weights.clone()) else {
            return reference::linear_backward(gradient, x, weights, activation, wants);
        };
        rows!(gradient, x; else reference::linear_backward(gradient, x, weights, activation, wants));
        linear::backward(&gradient, &x, &parameters, activation, wants)
    }

    fn modulated_norm(
        x: Tensor<Self, 3>,
        shift: Tensor<Self, 2>,
        scale: Tensor<Self, 2>,
        epsilon: f64,
    ) -> Tensor<Self, 3> {
        let shape = x.dims();
        rows!(x, shift, scale; else reference::modulated_norm(x, shift, scale, epsilon));
        elementwise::modulated_norm(&x, &shift, &scale, shape, epsilon as f32)
    }

    fn modulated_norm_backward(
        gradient: Tensor<Self, 3>,
        x: Tensor<Self, 3>,
        scale: Tensor<Self, 2>,
        epsilon: f64,
        sum: Option<Tensor<Self, 3>>,
    ) -> NormGradients<Self> {
        let shape = x.dims();
        rows!(gradient, x, scale; else reference::modulated_norm_backward(gradient, x, scale, epsilon, sum));
        let sum = sum.and_then(Values::of);
        elementwise::modulated_norm_backward(&gradient, &x, &scale, shape, epsilon as f32, sum)
    }

    fn qkv_attention(qkv: Tensor<Self, 3>, heads: usize, compute: Compute) -> Tensor<Self, 3> {
        let [batch, tokens, _] = qkv.dims();
        rows!(qkv; else reference::qkv_attention(qkv, heads, 1, compute));
        attention::forward(&qkv, heads, [batch, tokens], compute)
    }

    fn qkv_attention_backward(
        gradient: Tensor<Self, 3>,
        qkv: Tensor<Self, 3>,
        heads: usize,
        compute: Compute,
    ) -> Tensor<Self, 3> {
        let [batch, tokens, _] = qkv.dims();
        rows!(gradient, qkv; else reference::qkv_attention_backward(gradient, qkv, heads, 1, compute));
        attention::backward(&gradient, &qkv, heads, [batch, tokens], compute)
    }

    fn gated_residual(
        x: Tensor<Self, 3>,
        gate: Tensor<Self, 2>,
        y: Tensor<Self, 3>,
    ) -> Tensor<Self, 3> {
        let shape = x.dims();
        rows!(x, gate, y; else reference::gated_residual(x, gate, y));
        elementwise::gated_residual(&x, &gate, &y, shape)
    }

    fn gated_residual_backward(
        gradient: Tensor<Self, 3>,
        gate: Tensor<Self, 2>,
        y: Tensor<Self, 3>,
    ) -> (Tensor<Self, 2>, Tensor<Self, 3>) {
        let shape = y.dims();
        rows!(gradient, gate, y; else reference::gated_residual_backward(gradient, gate, y));
        elementwise::gated_residual_backward(&gradient, &gate, &y, shape)
    }

    fn blend(x: Tensor<Self, 3>, y: Tensor<Self, 3>, share: Tensor<Self, 1>) -> Tensor<Self, 3> {
        let shape = x.dims();
        rows!(x, y, share; else reference::blend(x, y, share));
        elementwise::blend(&x, &y, &share, shape)
    }

    fn blend_backward(
        gradient: Tensor<Self, 3>,
        x: Tensor<Self, 3>,
        y: Tensor<Self, 3>,
        share: Tensor<Self, 1>,
    ) -> (Tensor<Self, 3>, Tensor<Self, 3>, Tensor<Self, 1>) {
        let shape = x.dims();
        rows!(gradient, x, y, share; else reference::blend_backward(gradient, x, y, share));
        elementwise::blend_backward(&gradient, &x, &y, &share, shape)
    }

    fn convolution(
        x: Tensor<Self, 4>,
        weight: Tensor<Self, 4>,
        bias: Option<Tensor<Self, 1>>,
        window: Window,
        compute: Compute,
    ) -> Tensor<Self, 4> {
        let tensors = [x.dtype(), weight.dtype()];
        let mut types = tensors.into_iter().chain(bias.as_ref().map(Tensor::dtype));
        if types.any(|dtype| dtype != DType::F32) {
            return reference::convolution(x, weight, bias, window, compute);
        }
        let shapes = [x.dims(), weight.dims()];
        let (Some(x), Some(weight)) = (Values::of(x), Values::of(weight)) else {
            unreachable!("both are f32")
        };
        let bias = bias.and_then(Values::of);
        let [x, weight] = [(&x, shapes[0]), (&weight, shapes[1])];
        convolution::forward(x, weight, bias.as_ref(), window, compute)
    }

    fn convolution_backward(
        gradient: Tensor<Self, 4>,
        x: Tensor<Self, 4>,
        weight: Tensor<Self, 4>,
        window: Window,
        compute: Compute,
        wants_x: bool,
    ) -> ConvolutionGradients<Self> {
        let types = [gradient.dtype(), x.dtype(), weight.dtype()];
        if types.iter().any(|dtype| *dtype != DType::F32) {
            return reference::convolution_backward(gradient, x, weight, window, compute, wants_x);
        }
        convolution_backward::backward(gradient, x, weight, window, compute, wants_x)
    }

    fn group_norm(
        x: Tensor<Self, 4>,
        scale: Tensor<Self, 1>,
        shift: Tensor<Self, 1>,
        norm: GroupNormOptions,
    ) -> Tensor<Self, 4> {
        let shape = x.dims();
        let values = [Values::of(scale.clone()), Values::of(shift.clone())];
        match (Values::of(x.clone()), values) {
            (Some(x), [Some(scale), Some(shift)]) => {
                group_norm::forward(&x, [&scale, &shift], shape, norm)
            }
            _ => reference::group_norm(x, scale, shift, norm),
        }
    }

    fn group_norm_backward(
        gradient: Tensor<Self, 4>,
        x: Tensor<Self, 4>,
        scale: Tensor<Self, 1>,
        shift: Tensor<Self, 1>,
        norm: GroupNormOptions,
    ) -> GroupNormGradients<Self> {
        let shape = x.dims();
        let wide = [&gradient, &x].map(|tensor| Values::of(tensor.clone()));
        let values = [&scale, &shift].map(|tensor| Values::of(tensor.clone()));
        match (wide, values) {
            ([Some(gradient), Some(x)], [Some(scale), Some(shift)]) => {
                group_norm::backward(&gradient, &x, [&scale, &shift], shape, norm)
            }
            _ => reference::group_norm_backward(gradient, x, scale, shift, norm),
        }
    }

    fn transposed(x: Tensor<Self, 3>) -> Tensor<Self, 3> {
        let [batch, rows, columns] = x.dims();
        match Values::of(x.clone()) {
            Some(values) => transpose::transposed(
                values.read(),
                [batch, rows, columns],
                [batch, columns, rows],
            ),
            None => x.swap_dims(1, 2),
        }
    }

    fn with_shape(x: FloatTensor<Self>, shape: Shape) -> FloatTensor<Self> {
        memory::with_shape(x, shape)
    }

    fn sum_of_squares<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, 1> {
        match Values::of(x.clone()) {
            Some(values) => optimizer::sum_of_squares(values.read()),
            None => (x.clone() * x).sum(),
        }
    }

    fn adamw<const D: usize>(
        state: AdamWState<Self, D>,
        gradient: Tensor<Self, D>,
        step: AdamWStep,
    ) -> AdamWState<Self, D> {
        let all = [&state.value, &state.first, &state.second, &gradient];
        if all.iter().any(|tensor| tensor.dtype() != DType::F32) {
            return reference::adamw(state, gradient, step);
        }
        // Moved, not cloned: values that are not shared are updated in place.
        let state = [state.value, state.first, state.second].map(Values::of);
        let [Some(mut value), Some(mut first), Some(mut second)] = state else {
            unreachable!("all are f32")
        };
        let gradient = Values::of(gradient);
        let gradient = gradient.as_ref().map_or(&[][..], Values::read);
        let moments = [first.write(), second.write()];
        optimizer::adamw(&mut value, moments, gradient, step);
        AdamWState {
            value: value.into_tensor(),
            first: first.into_tensor(),
            second: second.into_tensor(),
        }
    }

    fn moving_average<const D: usize>(
        average: Tensor<Self, D>,
        value: Tensor<Self, D>,
        decay: f64,
    ) -> Tensor<Self, D> {
        if [&average, &value]
            .iter()
            .any(|tensor| tensor.dtype() != DType::F32)
        {
            return reference::moving_average(average, value, decay);
        }
        let (Some(mut average), Some(value)) = (Values::of(average), Values::of(value)) else {
            unreachable!("both are f32")
        };
        optimizer::moving_average(average.write(), value.read(), decay);
        average.into_tensor()
    }
}
