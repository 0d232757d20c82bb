//! The operators by LibTorch's kernels, which are PyTorch's: cuBLASLt, cuDNN and flash attention on
//! an NVIDIA GPU, MKL and oneDNN on processors.
//!
//! Gradients for which LibTorch has a kernel, but the bindings have no function, come from its own
//! differentiation.

use burn::tensor::ops::{FloatTensor, FloatTensorOps};
use burn::tensor::{Shape, Tensor, TensorMetadata, TensorPrimitive};
use burn_tch::{LibTorch, TchTensor};
use tch::Kind;

use super::{
    Activation, AdamWState, AdamWStep, FusedOps, GroupNormGradients, GroupNormOptions,
    LinearGradients, LinearWants, LinearWeights, NormGradients, reference,
};
use crate::backend::Compute;

/// Has LibTorch compute on this many threads of the CPU.
pub fn set_threads(count: usize) {
    tch::set_num_threads(i32::try_from(count).unwrap_or(i32::MAX));
}

fn inner<const D: usize>(x: Tensor<LibTorch, D>) -> tch::Tensor {
    x.into_primitive().tensor().tensor
}

/// A result of LibTorch that shares its memory with no other tensor of Burn's.
fn outer<const D: usize>(x: tch::Tensor) -> Tensor<LibTorch, D> {
    Tensor::from_primitive(TensorPrimitive::Float(TchTensor::new(x)))
}

/// The values, in memory that nothing else reads: they may be overwritten.
///
/// Not of a transposed view, whose memory burn-tch 0.21 takes for the view's own (`TchOps::permute`
/// and `swap_dims` count no one else's hold): what is overwritten here are parameters, moments and
/// averages, which are none.
fn owned<const D: usize>(x: Tensor<LibTorch, D>) -> tch::Tensor {
    let x = x.into_primitive().tensor();
    match x.can_mut() {
        true => x.tensor,
        false => x.tensor.copy(),
    }
}

/// `[batch, width]` to `[batch, 1, width]`.
fn by_sample(x: Tensor<LibTorch, 2>) -> tch::Tensor {
    inner(x).unsqueeze(1)
}

/// `value`, rounded to the type of the products.
fn rounded(value: &tch::Tensor, compute: Compute) -> tch::Tensor {
    value.to_kind(match compute {
        Compute::F32 => Kind::Float,
        Compute::Bf16 => Kind::BFloat16,
    })
}

/// `a b`, rounded operands, in f32.
fn product(a: &tch::Tensor, b: &tch::Tensor) -> tch::Tensor {
    a.mm(b).to_kind(Kind::Float)
}

fn activated(x: tch::Tensor, activation: Activation) -> tch::Tensor {
    match activation {
        Activation::Identity => x,
        Activation::Gelu => x.gelu("none"),
        Activation::GeluTanh => x.gelu("tanh"),
        Activation::Silu => x.silu(),
    }
}

/// The gradient of an activation at `x`.
fn activated_backward(
    gradient: tch::Tensor,
    x: &tch::Tensor,
    activation: Activation,
) -> tch::Tensor {
    match activation {
        Activation::Identity => gradient,
        Activation::Gelu => x.gelu_backward(&gradient, "none"),
        Activation::GeluTanh => x.gelu_backward(&gradient, "tanh"),
        Activation::Silu => x.silu_backward(&gradient),
    }
}

/// Most elements of a scalar product, in which cuBLAS counts in 32 bits.
const MOST_IN_A_DOT: usize = i32::MAX as usize;

/// Elements of a parameter that are updated at once on a processor.
const AT_ONCE: usize = 1 << 16;

/// Gradients of `inputs` for that of `forward`'s result.
fn differentiate<const N: usize>(
    inputs: [tch::Tensor; N],
    gradient: &tch::Tensor,
    forward: impl FnOnce(&[tch::Tensor; N]) -> tch::Tensor,
) -> [tch::Tensor; N] {
    let inputs = inputs.map(|input| input.detach().set_requires_grad(true));
    let sum = tch::with_grad(|| {
        let output = forward(&inputs);
        let gradient = gradient.to_kind(output.kind());
        match output.numel() <= MOST_IN_A_DOT {
            true => output.reshape([-1]).dot(&gradient.reshape([-1])),
            false => (output * gradient).sum(Kind::Float),
        }
    });
    let gradients = tch::Tensor::run_backward(&[sum], &inputs, false, false);
    let mut gradients = gradients.into_iter();
    std::array::from_fn(|_| gradients.next().expect("one gradient for each input"))
}

fn modulated(
    x: &tch::Tensor,
    shift: &tch::Tensor,
    scale: &tch::Tensor,
    epsilon: f64,
) -> tch::Tensor {
    let width = x.size()[2];
    let none = None::<&tch::Tensor>;
    let normal = x.layer_norm([width], none, none, epsilon, true);
    shift.addcmul(&normal, &(scale + 1.0))
}

/// `[batch, tokens, width]` from the fused projection.
fn attention(qkv: &tch::Tensor, heads: usize) -> tch::Tensor {
    let size = qkv.size();
    let (batch, tokens, width) = (size[0], size[1], size[2] / 3);
    let heads = heads as i64;
    let parts = qkv
        .reshape([batch, tokens, 3, heads, width / heads])
        .permute([2, 0, 3, 1, 4])
        .unbind(0);
    let [q, k, v] = parts.as_slice() else {
        unreachable!("three parts");
    };
    let none = None::<&tch::Tensor>;
    tch::Tensor::scaled_dot_product_attention(q, k, v, none, 0.0, false, None, false)
        .transpose(1, 2)
        .reshape([batch, tokens, width])
}

impl FusedOps for LibTorch {
    fn activate<const D: usize>(x: Tensor<Self, D>, activation: Activation) -> Tensor<Self, D> {
        match activation {
            Activation::Identity => x,
            _ => outer(activated(inner(x), activation)),
        }
    }

    fn activate_backward<const D: usize>(
        gradient: Tensor<Self, D>,
        x: Tensor<Self, D>,
        activation: Activation,
    ) -> Tensor<Self, D> {
        match activation {
            Activation::Identity => gradient,
            _ => outer(activated_backward(inner(gradient), &inner(x), activation)),
        }
    }

    fn linear_layer<const D: usize>(
        x: Tensor<Self, D>,
        weights: LinearWeights<Self>,
        activation: Activation,
    ) -> Tensor<Self, D> {
        let compute = weights.compute;
        let x = rounded(&activated(inner(x), activation), compute);
        let (weight, bias) = (
            rounded(&inner(weights.weight), compute),
            inner(weights.bias),
        );
        let none = None::<&tch::Tensor>;
        let mut y = match compute {
            Compute::F32 => x.linear(&weight, Some(&bias)),
            // Of unlike types, which makes the sum f32.
            Compute::Bf16 => x.linear(&weight, none) + bias,
        };
        if let Some(lora) = weights.lora {
            let (a, b) = (
                rounded(&inner(lora.a), compute),
                rounded(&inner(lora.b), compute),
            );
            y += x.linear(&a, none).linear(&b, none).to_kind(Kind::Float) * lora.scale;
        }
        outer(y)
    }

    fn linear_layer_backward(
        gradient: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        weights: LinearWeights<Self>,
        activation: Activation,
        wants: LinearWants,
    ) -> LinearGradients<Self> {
        let compute = weights.compute;
        let (gradient, x) = (inner(gradient), inner(x));
        let bias = wants.bias.then(|| gradient.sum_dim_intlist(0, false, None));
        let rounded_gradient = rounded(&gradient, compute);
        let seen = (wants.weight || wants.lora)
            .then(|| rounded(&activated(x.shallow_clone(), activation), compute));
        let weight = seen.as_ref().filter(|_| wants.weight);
        let weight = weight.map(|seen| product(&rounded_gradient.tr(), seen));
        let mut dx = wants.x.then(|| {
            let weight = rounded(&inner(weights.weight), compute);
            product(&rounded_gradient, &weight)
        });
        let mut update = None;
        if let Some(lora) = weights.lora {
            let (a, b) = (
                rounded(&inner(lora.a), compute),
                rounded(&inner(lora.b), compute),
            );
            let narrow = product(&rounded_gradient, &b) * lora.scale; // [rows, rank]
            let narrow = rounded(&narrow, compute);
            if let Some(seen) = seen.as_ref().filter(|_| wants.lora) {
                let da = product(&narrow.tr(), seen);
                let low = rounded(&product(seen, &a.tr()), compute); // [rows, rank]
                let db = product(&rounded_gradient.tr(), &low) * lora.scale;
                update = Some((outer(da), outer(db)));
            }
            if let Some(dx) = dx.as_mut() {
                *dx += product(&narrow, &a);
            }
        }
        LinearGradients {
            x: dx.map(|dx| outer(activated_backward(dx, &x, activation))),
            weight: weight.map(outer),
            bias: bias.map(outer),
            lora: update,
        }
    }

    fn modulated_norm(
        x: Tensor<Self, 3>,
        shift: Tensor<Self, 2>,
        scale: Tensor<Self, 2>,
        epsilon: f64,
    ) -> Tensor<Self, 3> {
        outer(modulated(
            &inner(x),
            &by_sample(shift),
            &by_sample(scale),
            epsilon,
        ))
    }

    fn modulated_norm_backward(
        gradient: Tensor<Self, 3>,
        x: Tensor<Self, 3>,
        scale: Tensor<Self, 2>,
        epsilon: f64,
        sum: Option<Tensor<Self, 3>>,
    ) -> NormGradients<Self> {
        let scale = by_sample(scale);
        let shift = scale.zeros_like();
        let inputs = [inner(x), shift, scale];
        let [mut dx, dshift, dscale] =
            differentiate(inputs, &inner(gradient), |[x, shift, scale]| {
                modulated(x, shift, scale, epsilon)
            });
        if let Some(sum) = sum {
            dx += inner(sum);
        }
        NormGradients {
            x: outer(dx),
            shift: outer(dshift.squeeze_dim(1)),
            scale: outer(dscale.squeeze_dim(1)),
        }
    }

    fn qkv_attention(qkv: Tensor<Self, 3>, heads: usize, compute: Compute) -> Tensor<Self, 3> {
        let mixed = attention(&rounded(&inner(qkv), compute), heads);
        outer(mixed.to_kind(Kind::Float))
    }

    fn qkv_attention_backward(
        gradient: Tensor<Self, 3>,
        qkv: Tensor<Self, 3>,
        heads: usize,
        compute: Compute,
    ) -> Tensor<Self, 3> {
        let qkv = rounded(&inner(qkv), compute);
        let [gradient] = differentiate([qkv], &inner(gradient), |[qkv]| attention(qkv, heads));
        outer(gradient.to_kind(Kind::Float))
    }

    fn gated_residual(
        x: Tensor<Self, 3>,
        gate: Tensor<Self, 2>,
        y: Tensor<Self, 3>,
    ) -> Tensor<Self, 3> {
        outer(inner(x).addcmul(&by_sample(gate), &inner(y)))
    }

    fn group_norm(
        x: Tensor<Self, 4>,
        scale: Tensor<Self, 1>,
        shift: Tensor<Self, 1>,
        norm: GroupNormOptions,
    ) -> Tensor<Self, 4> {
        outer(group_norm(&inner(x), &inner(scale), &inner(shift), norm))
    }

    fn group_norm_backward(
        gradient: Tensor<Self, 4>,
        x: Tensor<Self, 4>,
        scale: Tensor<Self, 1>,
        shift: Tensor<Self, 1>,
        norm: GroupNormOptions,
    ) -> GroupNormGradients<Self> {
        let inputs = [inner(x), inner(scale), inner(shift)];
        let [x, scale, shift] = differentiate(inputs, &inner(gradient), |[x, scale, shift]| {
            group_norm(x, scale, shift, norm)
        });
        GroupNormGradients {
            x: outer(x),
            scale: outer(scale),
            shift: outer(shift),
        }
    }

    fn with_shape(x: FloatTensor<Self>, shape: Shape) -> FloatTensor<Self> {
        match x.shape() == shape {
            true => x,
            false => Self::float_reshape(x, shape),
        }
    }

    fn sum_of_squares<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, 1> {
        outer(inner(x).norm().square().view([1]))
    }

    /// In place, in fewer passes over memory than the reference; on a processor in parts that stay
    /// in its cache.
    fn adamw<const D: usize>(
        state: AdamWState<Self, D>,
        gradient: Tensor<Self, D>,
        step: AdamWStep,
    ) -> AdamWState<Self, D> {
        if step.lr == 0.0 {
            return reference::adamw(state, gradient, step);
        }
        let gradient = inner(gradient);
        let [mut value, mut first, mut second] =
            [state.value, state.first, state.second].map(owned);
        let count = value.numel();
        let all = [&value, &first, &second, &gradient];
        let in_parts = value.device() == tch::Device::Cpu
            && count > AT_ONCE
            && all.iter().all(|tensor| tensor.is_contiguous());
        if in_parts {
            let flat = all.map(|tensor| tensor.view([-1]));
            for start in (0..count).step_by(AT_ONCE) {
                let length = AT_ONCE.min(count - start) as i64;
                let part = |tensor: &tch::Tensor| tensor.narrow(0, start as i64, length);
                let [mut value, mut first, mut second, gradient] = flat.each_ref().map(part);
                adamw(&mut value, &mut first, &mut second, gradient, step);
            }
        } else {
            adamw(&mut value, &mut first, &mut second, gradient, step);
        }
        AdamWState {
            value: outer(value),
            first: outer(first),
            second: outer(second),
        }
    }

    fn moving_average<const D: usize>(
        average: Tensor<Self, D>,
        value: Tensor<Self, D>,
        decay: f64,
    ) -> Tensor<Self, D> {
        let mut average = owned(average);
        let _ = average.lerp_(&inner(value), 1.0 - decay);
        outer(average)
    }
}

/// One step of AdamW, in place.
fn adamw(
    value: &mut tch::Tensor,
    first: &mut tch::Tensor,
    second: &mut tch::Tensor,
    gradient: tch::Tensor,
    step: AdamWStep,
) {
    let (beta1, beta2) = step.betas;
    let gradient = match step.gradient_scale {
        1.0 => gradient,
        scale => gradient * scale,
    };
    let _ = first.lerp_(&gradient, 1.0 - beta1);
    let _ = second.lerp_(&gradient.square(), 1.0 - beta2);
    if step.weight_decay != 0.0 {
        *value *= 1.0 - step.lr * step.weight_decay;
    }
    // value - size first / (sqrt(second / correction2) + epsilon), the size in the divisor.
    let correction2 = 1.0 - beta2.powi(step.time);
    let size = step.lr / (1.0 - beta1.powi(step.time));
    let number = |x: f64| tch::Tensor::full([1i64; 0], x, (Kind::Float, value.device()));
    let (slope, offset) = (
        number(-1.0 / (size * correction2.sqrt())),
        number(-step.epsilon / size),
    );
    let divisor = offset.addcmul(&second.sqrt(), &slope);
    let _ = value.addcdiv_(first, &divisor);
}

fn group_norm(
    x: &tch::Tensor,
    scale: &tch::Tensor,
    shift: &tch::Tensor,
    norm: GroupNormOptions,
) -> tch::Tensor {
    let groups = norm.groups as i64;
    let y = x.group_norm(groups, Some(scale), Some(shift), norm.epsilon, true);
    activated(y, norm.activation)
}
