//! The operators by kernels of CubeCL, one code for CUDA, Vulkan, Metal and WebGPU.
//!
//! Matrix products and convolutions are Burn's; what lies between them, which takes Burn a pass
//! over memory for every sum and product, takes one pass here. The kernels compute in f32. Sums are
//! formed in shared memory, in an order that depends on the sizes alone. A kernel checks no index:
//! that shapes fit is asserted here.

mod columns;
mod elementwise;
mod heads;
mod launch;
mod rows;

use burn::tensor::Tensor;
use burn_cubecl::{BoolElement, CubeRuntime};

use self::launch::{Cube, inner, outer};
use super::{
    Activation, AdamWState, AdamWStep, FusedOps, GroupNormOptions, LinearGradients, LinearWants,
    LinearWeights, NormGradients, product, reference,
};
use crate::backend::Compute;

/// CubeCL's matrix products are correct for multiples of this head dimension: some of its kernels
/// read past the end of factors of 72, as DiT-XL's heads have, or of 32 terms, or of 64 more
/// (tracel-ai/burn #5626, tracel-ai/cubek #434).
const HEAD_MULTIPLE: usize = 64;

impl<R: CubeRuntime, BT: BoolElement> FusedOps for Cube<R, BT> {
    fn head_multiple() -> usize {
        HEAD_MULTIPLE
    }

    fn misreads(terms: usize) -> bool {
        terms % 64 == 32
    }

    fn activate<const D: usize>(x: Tensor<Self, D>, activation: Activation) -> Tensor<Self, D> {
        outer(elementwise::activate(inner(x), activation))
    }

    fn activate_backward<const D: usize>(
        gradient: Tensor<Self, D>,
        x: Tensor<Self, D>,
        activation: Activation,
    ) -> Tensor<Self, D> {
        assert_eq!(gradient.dims(), x.dims());
        outer(elementwise::activate_backward(
            inner(gradient),
            inner(x),
            activation,
        ))
    }

    fn linear_layer<const D: usize>(
        x: Tensor<Self, D>,
        weights: LinearWeights<Self>,
        activation: Activation,
    ) -> Tensor<Self, D> {
        let mut shape = x.dims();
        let [output, input] = weights.weight.dims();
        let rows = shape.iter().product::<usize>() / input;
        let x = Self::activate(x, activation).reshape([rows, input]);
        let product = |a, b| product(a, b, weights.compute);
        let y = product(x.clone(), weights.weight.transpose());
        let y: Tensor<Self, 2> = match weights.lora {
            None => y + weights.bias.unsqueeze(),
            Some(lora) => {
                let update = product(product(x, lora.a.transpose()), lora.b.transpose());
                let [y, update] = [y, update].map(inner);
                outer(elementwise::add_update(
                    y,
                    inner(weights.bias),
                    update,
                    lora.scale,
                ))
            }
        };
        shape[D - 1] = output;
        y.reshape(shape)
    }

    fn linear_layer_backward(
        gradient: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        weights: LinearWeights<Self>,
        activation: Activation,
        wants: LinearWants,
    ) -> LinearGradients<Self> {
        let activated = Self::activate(x.clone(), activation);
        let compute = weights.compute;
        let gradients =
            reference::linear_backward_by(gradient, activated, weights, wants, |a, b| {
                product(a, b, compute)
            });
        LinearGradients {
            x: gradients
                .x
                .map(|dx| Self::activate_backward(dx, x, activation)),
            ..gradients
        }
    }

    fn modulated_norm(
        x: Tensor<Self, 3>,
        shift: Tensor<Self, 2>,
        scale: Tensor<Self, 2>,
        epsilon: f64,
    ) -> Tensor<Self, 3> {
        let [batch, _, width] = x.dims();
        assert_eq!([shift.dims(), scale.dims()], [[batch, width]; 2]);
        let (shift, scale) = (launch::rows(shift), launch::rows(scale));
        outer(rows::modulated_norm(inner(x), shift, scale, epsilon))
    }

    fn modulated_norm_backward(
        gradient: Tensor<Self, 3>,
        x: Tensor<Self, 3>,
        scale: Tensor<Self, 2>,
        epsilon: f64,
        sum: Option<Tensor<Self, 3>>,
    ) -> NormGradients<Self> {
        let shape @ [batch, _, width] = x.dims();
        assert_eq!((gradient.dims(), scale.dims()), (shape, [batch, width]));
        assert!(sum.as_ref().is_none_or(|sum| sum.dims() == shape));
        let (gradient, x, scale) = (inner(gradient), inner(x), launch::rows(scale));
        let sum = sum.map(inner);
        let (of_x, statistics) =
            rows::modulated_norm_backward(gradient.clone(), x.clone(), scale, epsilon, sum);
        let [shift, scale] = columns::norm(gradient, x, statistics);
        NormGradients {
            x: outer(of_x),
            shift: outer(shift),
            scale: outer(scale),
        }
    }

    fn qkv_attention(qkv: Tensor<Self, 3>, heads: usize, compute: Compute) -> Tensor<Self, 3> {
        let [batch, tokens, triple] = qkv.dims();
        if batch * heads * tokens * tokens > reference::SCORES {
            let product = |a, b| product(a, b, compute);
            return reference::qkv_attention_by(qkv, heads, HEAD_MULTIPLE, product);
        }
        let head_dim = triple / 3 / heads;
        let [q, k, v] = queries_keys_values(qkv, heads);
        let attention = probabilities(q, k, compute);
        let mixed = product(attention, v, compute);
        outer(heads::merge([(inner(mixed), 1.0)], head_dim))
    }

    fn qkv_attention_backward(
        gradient: Tensor<Self, 3>,
        qkv: Tensor<Self, 3>,
        heads: usize,
        compute: Compute,
    ) -> Tensor<Self, 3> {
        let product = |a, b| product(a, b, compute);
        let head_dim = gradient.dims()[2] / heads;
        let padded = head_dim.next_multiple_of(HEAD_MULTIPLE);
        let gradient = heads::split(&inner(gradient), [0, 1], heads, padded, 1.0);
        let gradient: Tensor<Self, 4> = outer(gradient);
        let [q, k, v] = queries_keys_values(qkv, heads);
        let attention = probabilities(q.clone(), k.clone(), compute);
        let dv = product(attention.clone().swap_dims(2, 3), gradient.clone());
        let dattention = product(gradient, v.swap_dims(2, 3)); // [batch, heads, tokens, tokens]
        let dscores = rows::softmax_backward(inner(dattention), inner(attention));
        let dscores: Tensor<Self, 4> = outer(dscores);
        // The gradient of k includes the scale, which q carries; that of q must be for the unscaled
        // queries.
        let dq = product(dscores.clone(), k);
        let dk = product(dscores.swap_dims(2, 3), q);
        let scale = 1.0 / (head_dim as f64).sqrt();
        let parts = [(inner(dq), scale), (inner(dk), 1.0), (inner(dv), 1.0)];
        outer(heads::merge(parts, head_dim))
    }

    fn gated_residual(
        x: Tensor<Self, 3>,
        gate: Tensor<Self, 2>,
        y: Tensor<Self, 3>,
    ) -> Tensor<Self, 3> {
        let shape @ [batch, _, width] = x.dims();
        assert_eq!((y.dims(), gate.dims()), (shape, [batch, width]));
        outer(elementwise::gated_residual(
            inner(x),
            launch::rows(gate),
            inner(y),
        ))
    }

    fn gated_residual_backward(
        gradient: Tensor<Self, 3>,
        gate: Tensor<Self, 2>,
        y: Tensor<Self, 3>,
    ) -> (Tensor<Self, 2>, Tensor<Self, 3>) {
        let shape @ [batch, _, width] = y.dims();
        assert_eq!((gradient.dims(), gate.dims()), (shape, [batch, width]));
        let [of_gate, of_y] = columns::gate(inner(gradient), launch::rows(gate), inner(y));
        (outer(of_gate), outer(of_y))
    }

    fn blend(x: Tensor<Self, 3>, y: Tensor<Self, 3>, share: Tensor<Self, 1>) -> Tensor<Self, 3> {
        let shape @ [batch, ..] = x.dims();
        assert_eq!((y.dims(), share.dims()), (shape, [batch]));
        outer(elementwise::blend(inner(x), inner(y), inner(share)))
    }

    fn blend_backward(
        gradient: Tensor<Self, 3>,
        x: Tensor<Self, 3>,
        y: Tensor<Self, 3>,
        share: Tensor<Self, 1>,
    ) -> (Tensor<Self, 3>, Tensor<Self, 3>, Tensor<Self, 1>) {
        let shape @ [batch, ..] = x.dims();
        assert_eq!([gradient.dims(), y.dims()], [shape; 2]);
        assert_eq!(share.dims(), [batch]);
        let [of_x, of_y, parts] =
            rows::blend_backward(inner(gradient), inner(x), inner(y), inner(share));
        let parts: Tensor<Self, 2> = outer(parts);
        (outer(of_x), outer(of_y), parts.sum_dim(1).squeeze_dim(1))
    }

    fn group_norm(
        x: Tensor<Self, 4>,
        scale: Tensor<Self, 1>,
        shift: Tensor<Self, 1>,
        norm: GroupNormOptions,
    ) -> Tensor<Self, 4> {
        let channels = x.dims()[1];
        assert_eq!([scale.dims(), shift.dims()], [[channels]; 2]);
        outer(rows::group_norm(inner(x), inner(scale), inner(shift), norm))
    }

    fn sum_of_squares<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, 1> {
        let parts: Tensor<Self, 1> = outer(rows::squares(inner(x)));
        match parts.dims() {
            [1] => parts,
            _ => parts.sum(),
        }
    }

    fn adamw<const D: usize>(
        state: AdamWState<Self, D>,
        gradient: Tensor<Self, D>,
        step: AdamWStep,
    ) -> AdamWState<Self, D> {
        let state = [state.value, state.first, state.second];
        assert_eq!(
            [(); 3].map(|()| gradient.dims()),
            state.each_ref().map(Tensor::dims)
        );
        let state = state.map(inner);
        let [value, first, second] = elementwise::adamw(state, inner(gradient), step).map(outer);
        AdamWState {
            value,
            first,
            second,
        }
    }

    fn moving_average<const D: usize>(
        average: Tensor<Self, D>,
        value: Tensor<Self, D>,
        decay: f64,
    ) -> Tensor<Self, D> {
        assert_eq!(average.dims(), value.dims());
        outer(elementwise::moving_average(
            inner(average),
            inner(value),
            decay,
        ))
    }
}

/// Queries (scaled), keys and values, `[batch, heads, tokens, head_dim + padding]` each.
fn queries_keys_values<R: CubeRuntime, BT: BoolElement>(
    qkv: Tensor<Cube<R, BT>, 3>,
    heads: usize,
) -> [Tensor<Cube<R, BT>, 4>; 3] {
    let head_dim = qkv.dims()[2] / 3 / heads;
    let padded = head_dim.next_multiple_of(HEAD_MULTIPLE);
    let qkv = inner(qkv);
    let scale = 1.0 / (head_dim as f64).sqrt();
    [(0, scale), (1, 1.0), (2, 1.0)]
        .map(|(part, factor)| outer(heads::split(&qkv, [part, 3], heads, padded, factor)))
}

/// Softmax of the scores, `[batch, heads, queries, keys]`.
fn probabilities<R: CubeRuntime, BT: BoolElement>(
    q: Tensor<Cube<R, BT>, 4>,
    k: Tensor<Cube<R, BT>, 4>,
    compute: Compute,
) -> Tensor<Cube<R, BT>, 4> {
    let scores = product(q, k.swap_dims(2, 3), compute);
    outer(rows::softmax(inner(scores)))
}
