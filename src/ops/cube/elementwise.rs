//! Kernels in which every value has a unit of its own: activations, gates, shares, parameters.

use burn::tensor::TensorMetadata;
use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl::{self, prelude::*};
use burn_cubecl::tensor::CubeTensor;

use super::super::{Activation, AdamWStep};
use super::launch::{each, empty, vector};
use crate::ops::reference::{CUBE, EXPONENT, TWICE_ROOT_2_OVER_PI};

/// `1 / (1 + exp(-x))`
#[cube]
fn sigmoid<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let one = Vector::new(1.0);
    let most = comptime!(EXPONENT as f32);
    let x = clamp(x, Vector::new(-most), Vector::new(most));
    one / (one + (-x).exp())
}

/// GELU's `2 u`: `(1 + tanh u) / 2 = sigmoid(2 u)`.
#[cube]
fn gelu_argument<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let cubic = Vector::new(comptime!((CUBE * TWICE_ROOT_2_OVER_PI) as f32));
    let linear = Vector::new(comptime!(TWICE_ROOT_2_OVER_PI as f32));
    (x * x * cubic + linear) * x
}

/// The normal distribution function, `(1 + erf(x / sqrt(2))) / 2`.
#[cube]
fn normal_cdf<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let root = Vector::new(comptime!(std::f32::consts::FRAC_1_SQRT_2));
    ((x * root).erf() + Vector::new(1.0)) * Vector::new(0.5)
}

/// An activation of values.
#[cube]
pub(super) fn activated<N: Size>(
    x: Vector<f32, N>,
    #[comptime] activation: Activation,
) -> Vector<f32, N> {
    match activation {
        Activation::Identity => x,
        Activation::Gelu => x * normal_cdf::<N>(x),
        Activation::GeluTanh => x * sigmoid::<N>(gelu_argument::<N>(x)),
        Activation::Silu => x * sigmoid::<N>(x),
    }
}

/// `d(x s(v)) = s + x s (1 - s) v'`, of `s = sigmoid`.
#[cube]
fn product_slope<N: Size>(
    x: Vector<f32, N>,
    v: Vector<f32, N>,
    slope: Vector<f32, N>,
) -> Vector<f32, N> {
    let s = sigmoid::<N>(v);
    s + x * s * (Vector::new(1.0) - s) * slope
}

/// An activation's derivative.
#[cube]
fn slope<N: Size>(x: Vector<f32, N>, #[comptime] activation: Activation) -> Vector<f32, N> {
    match activation {
        Activation::Identity => Vector::new(1.0),
        Activation::Gelu => {
            // d(x cdf(x)) = cdf(x) + x exp(-x^2 / 2) / sqrt(2 pi)
            let root = comptime!((1.0 / (2.0 * std::f64::consts::PI).sqrt()) as f32);
            let density = (x * x * Vector::new(-0.5)).exp() * Vector::new(root);
            normal_cdf::<N>(x) + x * density
        }
        Activation::GeluTanh => {
            let cubic = Vector::new(comptime!((3.0 * CUBE * TWICE_ROOT_2_OVER_PI) as f32));
            let linear = Vector::new(comptime!(TWICE_ROOT_2_OVER_PI as f32));
            product_slope::<N>(x, gelu_argument::<N>(x), x * x * cubic + linear)
        }
        Activation::Silu => product_slope::<N>(x, x, Vector::new(1.0)),
    }
}

#[cube(launch_unchecked)]
fn activate_kernel<N: Size>(
    x: &Tensor<Vector<f32, N>>,
    out: &mut Tensor<Vector<f32, N>>,
    count: usize,
    #[comptime] activation: Activation,
) {
    if ABSOLUTE_POS < count {
        out[ABSOLUTE_POS] = activated::<N>(x[ABSOLUTE_POS], activation);
    }
}

#[cube(launch_unchecked)]
fn activate_backward_kernel<N: Size>(
    gradient: &Tensor<Vector<f32, N>>,
    x: &Tensor<Vector<f32, N>>,
    out: &mut Tensor<Vector<f32, N>>,
    count: usize,
    #[comptime] activation: Activation,
) {
    if ABSOLUTE_POS < count {
        let slope = slope::<N>(x[ABSOLUTE_POS], activation);
        out[ABSOLUTE_POS] = gradient[ABSOLUTE_POS] * slope;
    }
}

/// `x`, or memory of its shape where something else reads `x`; with the argument that writes to it.
/// `x` must be argument `position` of the kernel.
pub(super) fn target<R: CubeRuntime>(
    x: &CubeTensor<R>,
    position: usize,
) -> (CubeTensor<R>, TensorArg<R>) {
    if x.can_mut() {
        return (x.clone(), x.as_tensor_alias(position));
    }
    let out = empty(x, x.shape());
    (out.clone(), out.into_tensor_arg())
}

/// An activation, of any shape.
pub(super) fn activate<R: CubeRuntime>(x: CubeTensor<R>, activation: Activation) -> CubeTensor<R> {
    if activation == Activation::Identity {
        return x;
    }
    let client = x.client.clone();
    let size = vector(&[x.meta.num_elements()]);
    let count = x.meta.num_elements() / size;
    let (cubes, dim) = each(&client, count);
    let (out, written) = target(&x, 0);
    let x = x.into_tensor_arg();
    // SAFETY: no unit goes past `count` vectors, which both tensors have.
    unsafe {
        activate_kernel::launch_unchecked::<R>(
            &client, cubes, dim, size, x, written, count, activation,
        );
    }
    out
}

/// The gradient of an activation at `x`.
pub(super) fn activate_backward<R: CubeRuntime>(
    gradient: CubeTensor<R>,
    x: CubeTensor<R>,
    activation: Activation,
) -> CubeTensor<R> {
    if activation == Activation::Identity {
        return gradient;
    }
    let client = x.client.clone();
    let size = vector(&[x.meta.num_elements()]);
    let count = x.meta.num_elements() / size;
    let (cubes, dim) = each(&client, count);
    let (out, written) = target(&gradient, 0);
    let (gradient, x) = (gradient.into_tensor_arg(), x.into_tensor_arg());
    // SAFETY: no unit goes past `count` vectors, which all tensors have.
    unsafe {
        activate_backward_kernel::launch_unchecked::<R>(
            &client, cubes, dim, size, gradient, x, written, count, activation,
        );
    }
    out
}

#[cube(launch_unchecked)]
fn gated_residual_kernel<N: Size>(
    x: &Tensor<Vector<f32, N>>,
    gate: &Tensor<Vector<f32, N>>,
    y: &Tensor<Vector<f32, N>>,
    out: &mut Tensor<Vector<f32, N>>,
    count: usize,
    tokens: usize,
    width: usize,
    pitch: usize,
) {
    if ABSOLUTE_POS < count {
        let sample = ABSOLUTE_POS / (tokens * width);
        let gate = gate[sample * pitch + ABSOLUTE_POS % width];
        out[ABSOLUTE_POS] = x[ABSOLUTE_POS] + gate * y[ABSOLUTE_POS];
    }
}

/// `x + gate y`; the rows of `gate` lie `pitch` values apart.
pub(super) fn gated_residual<R: CubeRuntime>(
    x: CubeTensor<R>,
    (gate, pitch): (CubeTensor<R>, usize),
    y: CubeTensor<R>,
) -> CubeTensor<R> {
    let client = x.client.clone();
    let [_, tokens, width] = x.shape().dims();
    let size = vector(&[width, pitch]);
    let count = x.meta.num_elements() / size;
    let (cubes, dim) = each(&client, count);
    // Of the branch nobody reads more, unless it is kept for the backward pass.
    let (out, written) = match x.can_mut() {
        true => target(&x, 0),
        false => target(&y, 2),
    };
    let [x, gate, y] = [x, gate, y].map(CubeTensor::into_tensor_arg);
    // SAFETY: no unit goes past `count` vectors of x, y and the result; a gate has one for each
    // sample and column.
    unsafe {
        gated_residual_kernel::launch_unchecked::<R>(
            &client,
            cubes,
            dim,
            size,
            x,
            gate,
            y,
            written,
            count,
            tokens,
            width / size,
            pitch / size,
        );
    }
    out
}

#[cube(launch_unchecked)]
fn blend_kernel<N: Size>(
    x: &Tensor<Vector<f32, N>>,
    y: &Tensor<Vector<f32, N>>,
    share: &Tensor<f32>,
    out: &mut Tensor<Vector<f32, N>>,
    count: usize,
    of_sample: usize,
) {
    if ABSOLUTE_POS < count {
        let share = share[ABSOLUTE_POS / of_sample];
        let (of_x, of_y) = (Vector::new(1.0 - share), Vector::new(share));
        out[ABSOLUTE_POS] = y[ABSOLUTE_POS] * of_y + x[ABSOLUTE_POS] * of_x;
    }
}

/// `share y + (1 - share) x`, a share for each sample.
pub(super) fn blend<R: CubeRuntime>(
    x: CubeTensor<R>,
    y: CubeTensor<R>,
    share: CubeTensor<R>,
) -> CubeTensor<R> {
    let client = x.client.clone();
    let [_, tokens, width] = x.shape().dims();
    let size = vector(&[tokens * width]);
    let count = x.meta.num_elements() / size;
    let (cubes, dim) = each(&client, count);
    let (out, written) = target(&y, 1);
    let [x, y, share] = [x, y, share].map(CubeTensor::into_tensor_arg);
    // SAFETY: no unit goes past `count` vectors of x, y and the result; a share is of each sample.
    unsafe {
        let of_sample = tokens * width / size;
        blend_kernel::launch_unchecked::<R>(
            &client, cubes, dim, size, x, y, share, written, count, of_sample,
        );
    }
    out
}

#[cube(launch_unchecked)]
fn add_update_kernel<N: Size>(
    y: &Tensor<Vector<f32, N>>,
    bias: &Tensor<Vector<f32, N>>,
    update: &Tensor<Vector<f32, N>>,
    out: &mut Tensor<Vector<f32, N>>,
    count: usize,
    width: usize,
    scale: f32,
) {
    if ABSOLUTE_POS < count {
        let update = update[ABSOLUTE_POS] * Vector::new(scale);
        out[ABSOLUTE_POS] = y[ABSOLUTE_POS] + bias[ABSOLUTE_POS % width] + update;
    }
}

/// `y + bias + scale update`, of rows.
pub(super) fn add_update<R: CubeRuntime>(
    y: CubeTensor<R>,
    bias: CubeTensor<R>,
    update: CubeTensor<R>,
    scale: f64,
) -> CubeTensor<R> {
    let client = y.client.clone();
    let width = bias.meta.num_elements();
    let size = vector(&[width]);
    let count = y.meta.num_elements() / size;
    let (cubes, dim) = each(&client, count);
    let (out, written) = target(&y, 0);
    let [y, bias, update] = [y, bias, update].map(CubeTensor::into_tensor_arg);
    // SAFETY: no unit goes past `count` vectors of y, the update and the result; the bias has one
    // for each column.
    unsafe {
        add_update_kernel::launch_unchecked::<R>(
            &client,
            cubes,
            dim,
            size,
            y,
            bias,
            update,
            written,
            count,
            width / size,
            scale as f32,
        );
    }
    out
}

#[cube(launch_unchecked)]
fn adamw_kernel<N: Size>(
    value: &Tensor<Vector<f32, N>>,
    first: &Tensor<Vector<f32, N>>,
    second: &Tensor<Vector<f32, N>>,
    gradient: &Tensor<Vector<f32, N>>,
    new_value: &mut Tensor<Vector<f32, N>>,
    new_first: &mut Tensor<Vector<f32, N>>,
    new_second: &mut Tensor<Vector<f32, N>>,
    count: usize,
    gradient_scale: f32,
    keep_first: f32,
    take_first: f32,
    keep_second: f32,
    take_second: f32,
    root_correction: f32,
    epsilon: f32,
    keep_value: f32,
    rate: f32,
) {
    if ABSOLUTE_POS < count {
        let gradient = gradient[ABSOLUTE_POS] * Vector::new(gradient_scale);
        let first = first[ABSOLUTE_POS] * Vector::new(keep_first);
        let first = first + gradient * Vector::new(take_first);
        let second = second[ABSOLUTE_POS] * Vector::new(keep_second);
        let second = second + gradient * gradient * Vector::new(take_second);
        let scale = second.sqrt() / Vector::new(root_correction) + Vector::new(epsilon);
        let value = value[ABSOLUTE_POS] * Vector::new(keep_value);
        new_value[ABSOLUTE_POS] = value - first / scale * Vector::new(rate);
        new_first[ABSOLUTE_POS] = first;
        new_second[ABSOLUTE_POS] = second;
    }
}

/// One step of AdamW: value, first and second moment, in place where nothing else reads them.
pub(super) fn adamw<R: CubeRuntime>(
    state: [CubeTensor<R>; 3],
    gradient: CubeTensor<R>,
    step: AdamWStep,
) -> [CubeTensor<R>; 3] {
    let client = gradient.client.clone();
    let size = vector(&[gradient.meta.num_elements()]);
    let count = gradient.meta.num_elements() / size;
    let (cubes, dim) = each(&client, count);
    let (beta1, beta2) = step.betas;
    let correction1 = 1.0 - beta1.powi(step.time);
    let correction2 = 1.0 - beta2.powi(step.time);
    let [value, first, second] = state;
    let [
        (out_value, to_value),
        (out_first, to_first),
        (out_second, to_second),
    ] = [target(&value, 0), target(&first, 1), target(&second, 2)];
    // SAFETY: no unit goes past `count` vectors, which all tensors have.
    unsafe {
        adamw_kernel::launch_unchecked::<R>(
            &client,
            cubes,
            dim,
            size,
            value.into_tensor_arg(),
            first.into_tensor_arg(),
            second.into_tensor_arg(),
            gradient.into_tensor_arg(),
            to_value,
            to_first,
            to_second,
            count,
            step.gradient_scale as f32,
            beta1 as f32,
            (1.0 - beta1) as f32,
            beta2 as f32,
            (1.0 - beta2) as f32,
            correction2.sqrt() as f32,
            step.epsilon as f32,
            (1.0 - step.lr * step.weight_decay) as f32,
            (step.lr / correction1) as f32,
        );
    }
    [out_value, out_first, out_second]
}

#[cube(launch_unchecked)]
fn moving_average_kernel<N: Size>(
    average: &Tensor<Vector<f32, N>>,
    value: &Tensor<Vector<f32, N>>,
    out: &mut Tensor<Vector<f32, N>>,
    count: usize,
    keep: f32,
    take: f32,
) {
    if ABSOLUTE_POS < count {
        let kept = average[ABSOLUTE_POS] * Vector::new(keep);
        out[ABSOLUTE_POS] = kept + value[ABSOLUTE_POS] * Vector::new(take);
    }
}

/// `decay average + (1 - decay) value`
pub(super) fn moving_average<R: CubeRuntime>(
    average: CubeTensor<R>,
    value: CubeTensor<R>,
    decay: f64,
) -> CubeTensor<R> {
    let client = value.client.clone();
    let size = vector(&[value.meta.num_elements()]);
    let count = value.meta.num_elements() / size;
    let (cubes, dim) = each(&client, count);
    let (out, written) = target(&average, 0);
    let (average, value) = (average.into_tensor_arg(), value.into_tensor_arg());
    let (keep, take) = (decay as f32, (1.0 - decay) as f32);
    // SAFETY: no unit goes past `count` vectors, which all tensors have.
    unsafe {
        moving_average_kernel::launch_unchecked::<R>(
            &client, cubes, dim, size, average, value, written, count, keep, take,
        );
    }
    out
}
