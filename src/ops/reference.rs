//! The operators of [`FusedOps`](super::FusedOps) and their gradients, composed of Burn's own
//! operators: exact, on any backend.
//!
//! Burn can differentiate the forward halves too; the backward halves are tested against that.

use burn::tensor::ops::{ConvOptions, PaddedConvOptions};
use burn::tensor::{DType, Tensor, TensorPrimitive, activation, backend::Backend, module};

use super::{
    Activation, AdamWState, AdamWStep, ConvolutionGradients, GroupNormGradients, GroupNormOptions,
    LinearGradients, LinearWants, LinearWeights, NormGradients, Window,
};
use crate::backend::Compute;

/// `2 sqrt(2 / pi)`
pub(super) const TWICE_ROOT_2_OVER_PI: f64 = 1.595_769_121_605_730_8;
/// GELU's coefficient of the cubic term.
pub(super) const CUBE: f64 = 0.044715;
/// Largest exponent, so that a gradient never multiplies infinity by zero; sigmoid(-80) is 2e-35.
pub(super) const EXPONENT: f64 = 80.0;

/// `1 / (1 + exp(-x))` by a division: on ndarray, Burn's `recip` is accurate to some 14 bits.
fn sigmoid<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    let one = x.ones_like();
    one / (x.clamp(-EXPONENT, EXPONENT).neg().exp() + 1.0)
}

/// GELU's `2 u`: `(1 + tanh u) / 2 = sigmoid(2 u)`.
fn gelu_argument<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    let square = x.clone() * x.clone();
    (square.mul_scalar(CUBE * TWICE_ROOT_2_OVER_PI) + TWICE_ROOT_2_OVER_PI) * x
}

/// The normal distribution function, `(1 + erf(x / sqrt(2))) / 2`.
fn normal_cdf<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    (x.mul_scalar(std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0).mul_scalar(0.5)
}

/// See [`FusedOps::activate`](super::FusedOps::activate).
pub fn activate<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    activation: Activation,
) -> Tensor<B, D> {
    match activation {
        Activation::Identity => x,
        Activation::Gelu => x.clone() * normal_cdf(x),
        Activation::GeluTanh => x.clone() * sigmoid(gelu_argument(x)),
        Activation::Silu => x.clone() * sigmoid(x),
    }
}

/// The activation's derivative at `x`.
pub fn activate_derivative<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    activation: Activation,
) -> Tensor<B, D> {
    // d(x s(v)) = s + x s (1 - s) v'
    let product = |v: Tensor<B, D>, slope: Tensor<B, D>| {
        let s = sigmoid(v);
        s.clone() + x.clone() * s.clone() * (s.neg() + 1.0) * slope
    };
    match activation {
        Activation::Identity => x.ones_like(),
        Activation::Gelu => {
            // d(x cdf(x)) = cdf(x) + x exp(-x^2 / 2) / sqrt(2 pi)
            let density = (x.clone() * x.clone()).mul_scalar(-0.5).exp();
            let root = 1.0 / (2.0 * std::f64::consts::PI).sqrt();
            normal_cdf(x.clone()) + x * density.mul_scalar(root)
        }
        Activation::GeluTanh => {
            let slope = (x.clone() * x.clone()).mul_scalar(3.0 * CUBE * TWICE_ROOT_2_OVER_PI)
                + TWICE_ROOT_2_OVER_PI;
            product(gelu_argument(x.clone()), slope)
        }
        Activation::Silu => product(x.clone(), x.ones_like()),
    }
}

/// A matrix product of type `compute`: of bf16 the operands are rounded, and the result, which is
/// given as f32.
pub(super) fn product<B: Backend, const D: usize>(
    a: Tensor<B, D>,
    b: Tensor<B, D>,
    compute: Compute,
) -> Tensor<B, D> {
    match compute {
        Compute::F32 => a.matmul(b),
        Compute::Bf16 => {
            let (a, b) = (a.cast(DType::BF16), b.cast(DType::BF16));
            a.matmul(b).cast(DType::F32)
        }
    }
}

/// See [`FusedOps::linear_layer`](super::FusedOps::linear_layer).
pub fn linear<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    weights: LinearWeights<B>,
    activation: Activation,
) -> Tensor<B, D> {
    let mut shape = x.dims();
    let [output, input] = weights.weight.dims();
    let product = |a, b| product(a, b, weights.compute);
    // One matrix product over all rows: some backends run a batch of small products one at a time.
    let rows = shape.iter().product::<usize>() / input;
    let x = activate(x.reshape([rows, input]), activation);
    let mut y = product(x.clone(), weights.weight.transpose()) + weights.bias.unsqueeze();
    if let Some(lora) = weights.lora {
        let update = product(product(x, lora.a.transpose()), lora.b.transpose());
        y = y + update.mul_scalar(lora.scale);
    }
    shape[D - 1] = output;
    y.reshape(shape)
}

/// See [`FusedOps::linear_layer_backward`](super::FusedOps::linear_layer_backward).
pub fn linear_backward<B: Backend>(
    gradient: Tensor<B, 2>,
    x: Tensor<B, 2>,
    weights: LinearWeights<B>,
    activation: Activation,
    wants: LinearWants,
) -> LinearGradients<B> {
    let compute = weights.compute;
    let activated = activate(x.clone(), activation);
    let gradients = linear_backward_by(gradient, activated, weights, wants, |a, b| {
        product(a, b, compute)
    });
    let of_x = |dx: Tensor<B, 2>| match activation {
        Activation::Identity => dx,
        _ => dx * activate_derivative(x, activation),
    };
    LinearGradients {
        x: gradients.x.map(of_x),
        ..gradients
    }
}

/// Gradients of a linear layer of the input `activated`, by these matrix products.
pub(super) fn linear_backward_by<B: Backend>(
    gradient: Tensor<B, 2>,
    activated: Tensor<B, 2>,
    weights: LinearWeights<B>,
    wants: LinearWants,
    product: impl Fn(Tensor<B, 2>, Tensor<B, 2>) -> Tensor<B, 2>,
) -> LinearGradients<B> {
    let narrow = weights.lora.as_ref().map(|lora| {
        let scaled = gradient.clone().mul_scalar(lora.scale);
        let gradient_b = product(scaled.clone(), lora.b.clone()); // [rows, rank]
        (lora, scaled, gradient_b)
    });
    let lora = narrow.as_ref().filter(|_| wants.lora);
    let lora = lora.map(|(lora, scaled, narrow)| {
        let a = product(narrow.clone().transpose(), activated.clone());
        let seen = product(activated.clone(), lora.a.clone().transpose()); // [rows, rank]
        (a, product(scaled.clone().transpose(), seen))
    });
    let dx = wants.x.then(|| {
        let mut dx = product(gradient.clone(), weights.weight);
        if let Some((lora, _, narrow)) = &narrow {
            dx = dx + product(narrow.clone(), lora.a.clone());
        }
        dx
    });
    LinearGradients {
        x: dx,
        weight: wants
            .weight
            .then(|| product(gradient.clone().transpose(), activated)),
        bias: wants.bias.then(|| gradient.sum_dim(0).squeeze_dim(0)),
        lora,
    }
}

/// Gradient of a softmax along rows with result `y`: `y_i sum_j y_j (g_i - g_j)`.
///
/// The usual form `y_i (g_i - sum_j y_j g_j)` loses digits when one probability is near one: the
/// gradient is then a small difference of two nearly equal sums. Here gradients are taken relative
/// to that of the most probable value, whose own term is then exactly zero, so only small terms are
/// added. The result is the same, because a constant gradient contributes nothing.
pub fn softmax_backward<B: Backend>(gradient: Tensor<B, 2>, y: Tensor<B, 2>) -> Tensor<B, 2> {
    let most = y.clone().argmax(1);
    let from_most = gradient.clone() - gradient.gather(1, most);
    let mean = (y.clone() * from_most.clone()).sum_dim(1);
    y * (from_most - mean)
}

/// See [`FusedOps::convolution`](super::FusedOps::convolution).
pub fn convolution<B: Backend>(
    x: Tensor<B, 4>,
    weight: Tensor<B, 4>,
    bias: Option<Tensor<B, 1>>,
    window: Window,
    compute: Compute,
) -> Tensor<B, 4> {
    let Window {
        stride,
        before,
        after,
    } = window;
    if compute == Compute::F32 {
        let options = PaddedConvOptions::asymmetric(stride, before, after, [1; 2], 1);
        return module::conv2d(x, weight, bias, options);
    }
    // Padded before it is rounded: burn-flex's own padding of bf16 is of f32.
    let x = x.pad((before[1], after[1], before[0], after[0]), 0.0);
    let options = PaddedConvOptions::asymmetric(stride, [0; 2], [0; 2], [1; 2], 1);
    let [x, weight] = [x, weight].map(|factor| factor.cast(DType::BF16));
    let y = module::conv2d(x, weight, None, options).cast(DType::F32);
    match bias {
        None => y,
        Some(bias) => y + bias.unsqueeze_dims(&[0, 2, 3]),
    }
}

/// See [`FusedOps::convolution_backward`](super::FusedOps::convolution_backward).
pub fn convolution_backward<B: Backend>(
    gradient: Tensor<B, 4>,
    x: Tensor<B, 4>,
    weight: Tensor<B, 4>,
    window: Window,
    compute: Compute,
    wants_x: bool,
) -> ConvolutionGradients<B> {
    let Window {
        stride,
        before,
        after,
    } = window;
    let [_, _, height, width] = x.dims();
    let [batch, output, down, along] = gradient.dims();
    let by_channel = gradient.clone().reshape([batch, output, down * along]);
    let dtype = match compute {
        Compute::F32 => x.dtype(),
        Compute::Bf16 => DType::BF16,
    };
    // Burn's own convolutions only know the same padding on both sides.
    let x = x.pad((before[1], after[1], before[0], after[0]), 0.0);
    let [gradient, x, weight] = [gradient, x, weight].map(|factor| factor.cast(dtype));
    let options = ConvOptions::new(stride, [0; 2], [1; 2], 1);
    let primitive = |x: &Tensor<B, 4>| x.clone().into_primitive().tensor();
    let dtype = by_channel.dtype();
    let tensor = |x| Tensor::<B, 4>::from_primitive(TensorPrimitive::Float(x)).cast(dtype);
    let dx = wants_x.then(|| {
        let dx = B::conv2d_x_backward(
            primitive(&x),
            primitive(&weight),
            primitive(&gradient),
            options.clone(),
        );
        let rows = before[0]..before[0] + height;
        let columns = before[1]..before[1] + width;
        tensor(dx).slice([0..x.dims()[0], 0..x.dims()[1], rows, columns])
    });
    let dweight = B::conv2d_weight_backward(
        primitive(&x),
        primitive(&weight),
        primitive(&gradient),
        options,
    );
    ConvolutionGradients {
        x: dx,
        weight: tensor(dweight),
        bias: by_channel.sum_dim(2).sum_dim(0).reshape([output]),
    }
}

/// See [`FusedOps::group_norm`](super::FusedOps::group_norm).
pub fn group_norm<B: Backend>(
    x: Tensor<B, 4>,
    scale: Tensor<B, 1>,
    shift: Tensor<B, 1>,
    norm: GroupNormOptions,
) -> Tensor<B, 4> {
    let shape @ [batch, channels, height, width] = x.dims();
    let of_group = channels / norm.groups * height * width;
    let x = layer_norm(x.reshape([batch, norm.groups, of_group]), norm.epsilon).reshape(shape);
    let by_channel = |values: Tensor<B, 1>| values.reshape([1, channels, 1, 1]);
    activate(x * by_channel(scale) + by_channel(shift), norm.activation)
}

/// See [`FusedOps::group_norm_backward`](super::FusedOps::group_norm_backward).
pub fn group_norm_backward<B: Backend>(
    gradient: Tensor<B, 4>,
    x: Tensor<B, 4>,
    scale: Tensor<B, 1>,
    shift: Tensor<B, 1>,
    norm: GroupNormOptions,
) -> GroupNormGradients<B> {
    let shape @ [batch, channels, height, width] = x.dims();
    let grouped = [batch, norm.groups, channels / norm.groups * height * width];
    let by_channel = |values: Tensor<B, 1>| values.reshape([1, channels, 1, 1]);
    let over_channels = |values: Tensor<B, 4>| {
        let planes = values.reshape([batch, channels, height * width]);
        planes.sum_dim(2).sum_dim(0).reshape([channels])
    };
    let (normal, deviation) = normalise(x.reshape(grouped), norm.epsilon);
    let normal = normal.reshape(shape);
    let scale = by_channel(scale);
    let activated = normal.clone() * scale.clone() + by_channel(shift);
    let gradient = gradient * activate_derivative(activated, norm.activation);
    let inner = (gradient.clone() * scale).reshape(grouped);
    GroupNormGradients {
        x: normalise_backward(inner, normal.clone().reshape(grouped), deviation).reshape(shape),
        scale: over_channels(gradient.clone() * normal),
        shift: over_channels(gradient),
    }
}

/// Centred values divided by their standard deviation, and that deviation (last dimension 1).
fn normalise<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    epsilon: f64,
) -> (Tensor<B, D>, Tensor<B, D>) {
    let centred = x.clone() - x.mean_dim(D - 1);
    let variance = (centred.clone() * centred.clone()).mean_dim(D - 1);
    let deviation = (variance + epsilon).sqrt();
    (centred / deviation.clone(), deviation)
}

/// Gradient of [`normalise`]'s input, by its result and deviation.
fn normalise_backward<B: Backend, const D: usize>(
    gradient: Tensor<B, D>,
    normal: Tensor<B, D>,
    deviation: Tensor<B, D>,
) -> Tensor<B, D> {
    let projected = (gradient.clone() * normal.clone()).mean_dim(D - 1);
    (gradient.clone() - gradient.mean_dim(D - 1) - normal * projected) / deviation
}

/// Layer normalisation over the last dimension, without affine parameters.
///
/// The variance is the mean of squares of the centred values, so a large mean costs no precision.
pub fn layer_norm<B: Backend, const D: usize>(x: Tensor<B, D>, epsilon: f64) -> Tensor<B, D> {
    normalise(x, epsilon).0
}

/// See [`FusedOps::modulated_norm`](super::FusedOps::modulated_norm).
pub fn modulated_norm<B: Backend>(
    x: Tensor<B, 3>,
    shift: Tensor<B, 2>,
    scale: Tensor<B, 2>,
    epsilon: f64,
) -> Tensor<B, 3> {
    let scale = (scale + 1.0).unsqueeze_dim::<3>(1); // [batch, 1, width]
    layer_norm(x, epsilon) * scale + shift.unsqueeze_dim::<3>(1)
}

/// See [`FusedOps::modulated_norm_backward`](super::FusedOps::modulated_norm_backward).
pub fn modulated_norm_backward<B: Backend>(
    gradient: Tensor<B, 3>,
    x: Tensor<B, 3>,
    scale: Tensor<B, 2>,
    epsilon: f64,
    sum: Option<Tensor<B, 3>>,
) -> NormGradients<B> {
    let (normal, deviation) = normalise(x, epsilon);
    let shift = gradient.clone().sum_dim(1).squeeze_dim(1);
    let dscale = (gradient.clone() * normal.clone())
        .sum_dim(1)
        .squeeze_dim(1);
    let inner = gradient * (scale + 1.0).unsqueeze_dim::<3>(1);
    let dx = normalise_backward(inner, normal, deviation);
    NormGradients {
        x: match sum {
            Some(sum) => sum + dx,
            None => dx,
        },
        shift,
        scale: dscale,
    }
}

/// Queries (scaled), keys and values, `[batch, heads, tokens, head_dim + padding]` each.
///
/// The head dimension is zero-padded to a multiple of `multiple` (1 is no padding), which changes
/// only the shapes of the products: some kernels read out of bounds at sizes such as DiT-XL's 72
/// (tracel-ai/burn #5626).
fn heads_of<B: Backend>(qkv: Tensor<B, 3>, heads: usize, multiple: usize) -> [Tensor<B, 4>; 3] {
    let [batch, tokens, triple] = qkv.dims();
    let head_dim = triple / 3 / heads;
    let padding = head_dim.next_multiple_of(multiple) - head_dim;
    let qkv = qkv
        .reshape([batch, tokens, 3, heads, head_dim])
        .permute([2, 0, 3, 1, 4]); // [3, batch, heads, tokens, head_dim]
    std::array::from_fn(|index| {
        let part = qkv.clone().narrow(0, index, 1).squeeze_dim::<4>(0);
        let part = match index {
            0 => part.mul_scalar(1.0 / (head_dim as f64).sqrt()),
            _ => part,
        };
        pad(part, padding)
    })
}

fn pad<B: Backend>(x: Tensor<B, 4>, padding: usize) -> Tensor<B, 4> {
    if padding == 0 {
        return x;
    }
    let [batch, heads, tokens, _] = x.dims();
    let zeros = Tensor::zeros([batch, heads, tokens, padding], &x.device());
    Tensor::cat(vec![x, zeros], 3)
}

/// Most scores held at once (1 GiB). A DiT needs far fewer; an autoencoder's attention over the
/// 16,384 places of a large latent would need more.
pub(super) const SCORES: usize = 1 << 28;

/// See [`FusedOps::qkv_attention`](super::FusedOps::qkv_attention).
pub fn qkv_attention<B: Backend>(
    qkv: Tensor<B, 3>,
    heads: usize,
    multiple: usize,
    compute: Compute,
) -> Tensor<B, 3> {
    qkv_attention_by(qkv, heads, multiple, |a, b| product(a, b, compute))
}

/// Attention by these matrix products.
pub(super) fn qkv_attention_by<B: Backend>(
    qkv: Tensor<B, 3>,
    heads: usize,
    multiple: usize,
    product: impl Fn(Tensor<B, 4>, Tensor<B, 4>) -> Tensor<B, 4>,
) -> Tensor<B, 3> {
    let [batch, tokens, _] = qkv.dims();
    let queries = (SCORES / (batch * heads * tokens).max(1)).clamp(1, tokens.max(1));
    attention_in_blocks(qkv, heads, multiple, product, queries)
}

/// Attention for `queries` queries at a time: each query meets all keys, so the blocks are
/// independent.
fn attention_in_blocks<B: Backend>(
    qkv: Tensor<B, 3>,
    heads: usize,
    multiple: usize,
    product: impl Fn(Tensor<B, 4>, Tensor<B, 4>) -> Tensor<B, 4>,
    queries: usize,
) -> Tensor<B, 3> {
    let [batch, tokens, triple] = qkv.dims();
    let width = triple / 3;
    let [q, k, v] = heads_of(qkv, heads, multiple);
    let keys = k.swap_dims(2, 3);
    let attend = |q: Tensor<B, 4>| {
        let scores = product(q, keys.clone()); // [batch, heads, queries, tokens]
        product(activation::softmax(scores, 3), v.clone())
    };
    let mixed = if queries >= tokens {
        attend(q)
    } else {
        let blocks = q.split(queries, 2).into_iter().map(attend).collect();
        Tensor::cat(blocks, 2)
    };
    mixed
        .narrow(3, 0, width / heads) // [batch, heads, tokens, head_dim]
        .swap_dims(1, 2)
        .reshape([batch, tokens, width])
}

/// See [`FusedOps::qkv_attention_backward`](super::FusedOps::qkv_attention_backward).
pub fn qkv_attention_backward<B: Backend>(
    gradient: Tensor<B, 3>,
    qkv: Tensor<B, 3>,
    heads: usize,
    multiple: usize,
    compute: Compute,
) -> Tensor<B, 3> {
    let product = |a, b| product(a, b, compute);
    let [batch, tokens, width] = gradient.dims();
    let head_dim = width / heads;
    let padding = head_dim.next_multiple_of(multiple) - head_dim;
    let [q, k, v] = heads_of(qkv, heads, multiple);
    let gradient = gradient
        .reshape([batch, tokens, heads, head_dim])
        .swap_dims(1, 2); // [batch, heads, tokens, head_dim]
    let gradient = pad(gradient, padding);
    let attention = activation::softmax(product(q.clone(), k.clone().swap_dims(2, 3)), 3);
    let dv = product(attention.clone().swap_dims(2, 3), gradient.clone());
    let dattention = product(gradient, v.swap_dims(2, 3)); // [batch, heads, tokens, tokens]
    let mean = (dattention.clone() * attention.clone()).sum_dim(3);
    let dscores = attention * (dattention - mean);
    // The gradient of k includes the scale, which q carries; that of q must be for the unscaled
    // queries.
    let dq = product(dscores.clone(), k).mul_scalar(1.0 / (head_dim as f64).sqrt());
    let dk = product(dscores.swap_dims(2, 3), q);
    let parts = [dq, dk, dv].map(|part| {
        part.narrow(3, 0, head_dim)
            .swap_dims(1, 2)
            .reshape([batch, tokens, width])
    });
    Tensor::cat(parts.into(), 2)
}

/// See [`FusedOps::gated_residual`](super::FusedOps::gated_residual).
pub fn gated_residual<B: Backend>(
    x: Tensor<B, 3>,
    gate: Tensor<B, 2>,
    y: Tensor<B, 3>,
) -> Tensor<B, 3> {
    x + gate.unsqueeze_dim::<3>(1) * y
}

/// See [`FusedOps::gated_residual_backward`](super::FusedOps::gated_residual_backward).
pub fn gated_residual_backward<B: Backend>(
    gradient: Tensor<B, 3>,
    gate: Tensor<B, 2>,
    y: Tensor<B, 3>,
) -> (Tensor<B, 2>, Tensor<B, 3>) {
    let dgate = (gradient.clone() * y).sum_dim(1).squeeze_dim(1);
    (dgate, gradient * gate.unsqueeze_dim::<3>(1))
}

/// See [`FusedOps::blend`](super::FusedOps::blend).
pub fn blend<B: Backend>(x: Tensor<B, 3>, y: Tensor<B, 3>, share: Tensor<B, 1>) -> Tensor<B, 3> {
    let share = spread(share);
    y * share.clone() + x * (share.neg() + 1.0)
}

/// See [`FusedOps::blend_backward`](super::FusedOps::blend_backward).
pub fn blend_backward<B: Backend>(
    gradient: Tensor<B, 3>,
    x: Tensor<B, 3>,
    y: Tensor<B, 3>,
    share: Tensor<B, 1>,
) -> (Tensor<B, 3>, Tensor<B, 3>, Tensor<B, 1>) {
    let batch = x.dims()[0];
    let dshare = (gradient.clone() * (y - x))
        .sum_dim(2)
        .sum_dim(1)
        .reshape([batch]);
    let share = spread(share);
    (
        gradient.clone() * (share.clone().neg() + 1.0),
        gradient * share,
        dshare,
    )
}

/// `[batch]` to `[batch, 1, 1]`.
fn spread<B: Backend>(share: Tensor<B, 1>) -> Tensor<B, 3> {
    let [batch] = share.dims();
    share.reshape([batch, 1, 1])
}

/// See [`FusedOps::adamw`](super::FusedOps::adamw).
pub fn adamw<B: Backend, const D: usize>(
    state: AdamWState<B, D>,
    gradient: Tensor<B, D>,
    step: AdamWStep,
) -> AdamWState<B, D> {
    let (beta1, beta2) = step.betas;
    let gradient = gradient.mul_scalar(step.gradient_scale);
    let square = gradient.clone() * gradient.clone();
    let first = state.first.mul_scalar(beta1) + gradient.mul_scalar(1.0 - beta1);
    let second = state.second.mul_scalar(beta2) + square.mul_scalar(1.0 - beta2);
    let correction1 = 1.0 - beta1.powi(step.time);
    let correction2 = 1.0 - beta2.powi(step.time);
    let scale = second.clone().sqrt().div_scalar(correction2.sqrt()) + step.epsilon;
    let value = if step.weight_decay == 0.0 {
        state.value
    } else {
        state.value.mul_scalar(1.0 - step.lr * step.weight_decay)
    };
    AdamWState {
        value: value - (first.clone() / scale).mul_scalar(step.lr / correction1),
        first,
        second,
    }
}

/// See [`FusedOps::moving_average`](super::FusedOps::moving_average).
pub fn moving_average<B: Backend, const D: usize>(
    average: Tensor<B, D>,
    value: Tensor<B, D>,
    decay: f64,
) -> Tensor<B, D> {
    average.mul_scalar(decay) + value.mul_scalar(1.0 - decay)
}

#[cfg(all(test, feature = "ndarray"))]
mod tests {
    use super::*;
    use burn::backend::Autodiff;
    use burn::tensor::TensorData;
    use burn_ndarray::NdArray;

    use crate::random::{self, Stream};

    type B = Autodiff<NdArray>;

    fn noise<const D: usize>(index: u64, shape: [usize; D]) -> Tensor<B, D> {
        let count = shape.iter().product();
        Tensor::from_data(
            TensorData::new(random::normal(0, Stream::Bench, 9, index, count), shape),
            &Default::default(),
        )
    }

    #[test]
    fn blocks_of_queries_change_nothing() {
        let qkv = noise(0, [2, 7, 3 * 12]);
        let run = |queries: usize| {
            let out = attention_in_blocks(qkv.clone(), 3, 1, |a, b| a.matmul(b), queries);
            out.into_data().to_vec::<f32>().unwrap()
        };
        let whole = run(7);
        for queries in [1, 3, 6] {
            // Products of other sizes may sum in another order.
            let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-6;
            assert!(whole.iter().zip(&run(queries)).all(close), "{queries}");
        }
    }

    #[test]
    fn padding_the_heads_changes_nothing() {
        let qkv = noise(0, [2, 5, 3 * 144]);
        let run = |multiple: usize| {
            let qkv = qkv.clone().require_grad();
            let out = qkv_attention(qkv.clone(), 2, multiple, Compute::F32);
            let gradients = (out.clone() * noise(1, [2, 5, 144])).sum().backward();
            let gradient = qkv.grad(&gradients).unwrap();
            (
                out.into_data().to_vec::<f32>().unwrap(),
                gradient.into_data().to_vec::<f32>().unwrap(),
            )
        };
        let (plain, padded) = (run(1), run(64));
        // Sums of 72 products in another order.
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(close(&plain.0, &padded.0) && close(&plain.1, &padded.1));
    }

    #[test]
    fn gelu_is_its_definition_and_has_a_gradient_everywhere() {
        let values = [-60.0f32, -10.0, -1.0, 0.0, 0.5, 3.0, 60.0];
        let x = Tensor::<B, 1>::from_floats(values, &Default::default()).require_grad();
        let y = activate(x.clone(), Activation::GeluTanh);
        let gradients = y.clone().sum().backward();
        for (x, y) in values.iter().zip(y.into_data().to_vec::<f32>().unwrap()) {
            let x = f64::from(*x);
            let expected = x / 2.0
                * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
            // A few units in the last place of f32.
            assert!(
                (f64::from(y) - expected).abs() <= 4e-7 * expected.abs().max(1.0),
                "{x}: {y}, {expected}"
            );
        }
        assert!(
            x.grad(&gradients)
                .unwrap()
                .into_data()
                .to_vec::<f32>()
                .unwrap()
                .iter()
                .all(|gradient| gradient.is_finite())
        );
    }
}
