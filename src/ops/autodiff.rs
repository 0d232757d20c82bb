//! The operators as nodes of the autodiff graph.
//!
//! Each node keeps the operator's inputs and calls the backend's own backward half. Two memory
//! passes of Burn's composed operators are saved: a sum of gradients is formed inside the operator
//! that computes the second of them ([`earlier`]), and a slice's gradient is written into the whole
//! once.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorPrimitive};

use super::branch::{self, BranchGradients, BranchWeights};
use super::{
    Activation, FusedOps, GroupNormOptions, LinearGradients, LinearWants, LinearWeights,
    LoraWeights, Support, Window,
};
use crate::backend::Compute;

/// A tensor of the graph.
type Tracked<B> = FloatTensor<Autodiff<B>>;

fn tracked<B: FusedOps, const D: usize>(x: Tensor<Autodiff<B>, D>) -> Tracked<B> {
    x.into_primitive().tensor()
}

fn tensor<B: FusedOps, const D: usize>(primitive: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

fn primitive<B: FusedOps, const D: usize>(x: Tensor<B, D>) -> FloatTensor<B> {
    x.into_primitive().tensor()
}

fn inner<B: FusedOps, const D: usize>(x: &Tracked<B>) -> Tensor<B, D> {
    tensor(x.primitive.clone())
}

/// Makes a node of `inputs` with output `$output`; its backward step is `$operator` with `$state`.
macro_rules! node {
    ($operator:expr, [$($input:ident),+], $output:expr, $state:expr) => {{
        let output = primitive($output);
        let prepared = $operator.prepare::<NoCheckpointing>([$($input.node.clone()),+]);
        let node = match prepared.compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish($state, output),
            OpsKind::UnTracked(prepared) => prepared.finish(output),
        };
        Tensor::from_primitive(TensorPrimitive::Float(node))
    }};
}

/// Registers a gradient for a parent that needs one.
macro_rules! give {
    ($grads:expr, $parent:expr, $gradient:expr) => {
        if let (Some(parent), Some(gradient)) = (&$parent, $gradient) {
            $grads.register::<B>(parent.id, primitive(gradient));
        }
    };
}

/// Takes the gradient that parent `index` has so far, so that the operator can add its own.
fn earlier<B: FusedOps, S, const N: usize>(
    ops: &Ops<S, N>,
    index: usize,
    grads: &mut Gradients,
    any: &FloatTensor<B>,
) -> Option<FloatTensor<B>> {
    let node = ops.parents[index].clone()?;
    // The container is keyed by the node alone; the tensor only fills the signature.
    grads.remove::<B>(&Tracked::<B> {
        rc: std::sync::Arc::new(node.id),
        primitive: any.clone(),
        node,
    })
}

#[derive(Debug)]
struct Activate;

impl<B: FusedOps> Backward<B, 1> for Activate {
    /// x and the activation.
    type State = (FloatTensor<B>, Activation);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let (x, activation) = ops.state;
        let [parent] = ops.parents;
        if let Some(parent) = parent {
            let shape = burn::tensor::TensorMetadata::shape(&x);
            let flat =
                |x: FloatTensor<B>| tensor::<B, 1>(B::with_shape(x, [shape.num_elements()].into()));
            let gradient = primitive(B::activate_backward(
                flat(gradient),
                flat(x.clone()),
                activation,
            ));
            grads.register::<B>(parent.id, B::with_shape(gradient, shape.clone()));
        }
    }
}

#[derive(Debug)]
struct Softmax;

impl<B: FusedOps> Backward<B, 1> for Softmax {
    /// The result.
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let [parent] = ops.parents;
        if let Some(parent) = parent {
            let gradient = B::row_softmax_backward(tensor(gradient), tensor(ops.state));
            grads.register::<B>(parent.id, primitive(gradient));
        }
    }
}

#[derive(Debug)]
struct Transposed;

impl<B: FusedOps> Backward<B, 1> for Transposed {
    type State = ();

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let [parent] = ops.parents;
        give!(grads, parent, Some(B::transposed(tensor(gradient))));
    }
}

/// The parameters of a linear layer in the graph.
struct TrackedLinear<B: FusedOps> {
    weight: Tracked<B>,
    bias: Tracked<B>,
    lora: Option<[Tracked<B>; 2]>,
    inner: LinearWeights<B>,
}

impl<B: FusedOps> From<LinearWeights<Autodiff<B>>> for TrackedLinear<B> {
    fn from(weights: LinearWeights<Autodiff<B>>) -> Self {
        let (weight, bias) = (tracked(weights.weight), tracked(weights.bias));
        let scale = weights.lora.as_ref().map_or(0.0, |lora| lora.scale);
        let lora = weights.lora.map(|lora| [tracked(lora.a), tracked(lora.b)]);
        Self {
            inner: LinearWeights {
                weight: inner(&weight),
                bias: inner(&bias),
                lora: lora.as_ref().map(|[a, b]| LoraWeights {
                    a: inner(a),
                    b: inner(b),
                    scale,
                }),
                compute: weights.compute,
            },
            weight,
            bias,
            lora,
        }
    }
}

#[derive(Debug)]
struct LinearNode;

#[derive(Debug, Clone)]
struct LinearState<B: FusedOps> {
    /// `[rows, in]`
    x: Tensor<B, 2>,
    /// Shape of the input, before its flattening to rows.
    shape: Vec<usize>,
    weights: LinearWeights<B>,
    activation: Activation,
}

impl LinearNode {
    /// The backward step for the parents x, weight, bias and perhaps A, B.
    fn run<B: FusedOps, const N: usize>(ops: Ops<LinearState<B>, N>, grads: &mut Gradients) {
        let gradient = grads.consume::<B>(&ops.node);
        let LinearState {
            x,
            shape,
            weights,
            activation,
        } = ops.state;
        let output = weights.weight.dims()[0];
        let gradient = tensor(B::with_shape(gradient, [x.dims()[0], output].into()));
        let wants = LinearWants {
            x: ops.parents[0].is_some(),
            weight: ops.parents[1].is_some(),
            bias: ops.parents[2].is_some(),
            lora: ops.parents[3..].iter().any(Option::is_some),
        };
        let gradients = B::linear_layer_backward(gradient, x, weights, activation, wants);
        if let (Some(parent), Some(gradient)) = (&ops.parents[0], gradients.x) {
            let gradient = B::with_shape(primitive(gradient), shape.into());
            grads.register::<B>(parent.id, gradient);
        }
        give!(grads, ops.parents[1], gradients.weight);
        give!(grads, ops.parents[2], gradients.bias);
        if let (Some((a, b)), [parent_a, parent_b]) = (gradients.lora, &ops.parents[3..]) {
            give!(grads, parent_a, Some(a));
            give!(grads, parent_b, Some(b));
        }
    }
}

impl<B: FusedOps> Backward<B, 3> for LinearNode {
    type State = LinearState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        Self::run(ops, grads);
    }
}

impl<B: FusedOps> Backward<B, 5> for LinearNode {
    type State = LinearState<B>;

    fn backward(self, ops: Ops<Self::State, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
        Self::run(ops, grads);
    }
}

#[derive(Debug)]
struct ModulatedNorm;

impl<B: FusedOps> Backward<B, 3> for ModulatedNorm {
    /// x, scale, epsilon
    type State = (Tensor<B, 3>, Tensor<B, 2>, f64);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        // The residual branch has already registered its gradient of x.
        let sum = earlier::<B, _, 3>(&ops, 0, grads, &gradient).map(tensor);
        let (x, scale, epsilon) = ops.state;
        let gradients = B::modulated_norm_backward(tensor(gradient), x, scale, epsilon, sum);
        give!(grads, ops.parents[0], Some(gradients.x));
        give!(grads, ops.parents[1], Some(gradients.shift));
        give!(grads, ops.parents[2], Some(gradients.scale));
    }
}

#[derive(Debug)]
struct QkvAttention;

impl<B: FusedOps> Backward<B, 1> for QkvAttention {
    /// qkv, heads, type of products
    type State = (Tensor<B, 3>, usize, Compute);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let (qkv, heads, compute) = ops.state;
        let gradient = B::qkv_attention_backward(tensor(gradient), qkv, heads, compute);
        give!(grads, ops.parents[0], Some(gradient));
    }
}

#[derive(Debug)]
struct GatedResidual;

impl<B: FusedOps> Backward<B, 3> for GatedResidual {
    /// gate, y
    type State = (Tensor<B, 2>, Tensor<B, 3>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient: Tensor<B, 3> = tensor(grads.consume::<B>(&ops.node));
        let (gate, y) = ops.state;
        if ops.parents[1].is_some() || ops.parents[2].is_some() {
            let (dgate, dy) = B::gated_residual_backward(gradient.clone(), gate, y);
            give!(grads, ops.parents[1], Some(dgate));
            give!(grads, ops.parents[2], Some(dy));
        }
        give!(grads, ops.parents[0], Some(gradient));
    }
}

#[derive(Debug)]
struct BranchNode;

#[derive(Debug, Clone)]
struct BranchState<B: FusedOps> {
    x: Tensor<B, 3>,
    modulation: [Tensor<B, 2>; 3],
    weights: BranchWeights<B>,
    epsilon: f64,
}

impl BranchNode {
    /// Parents before those of low-rank updates: x, shift, scale, gate, then weight and bias of
    /// each layer.
    const PLAIN: usize = 8;

    /// The backward step; A and B of the first layer's low-rank update come before the second's.
    fn run<B: FusedOps, const N: usize>(ops: Ops<BranchState<B>, N>, grads: &mut Gradients) {
        let gradient = grads.consume::<B>(&ops.node);
        let earlier = earlier::<B, _, N>(&ops, 0, grads, &gradient).map(tensor);
        let BranchState {
            x,
            modulation,
            weights,
            epsilon,
        } = ops.state;
        let updates = &ops.parents[Self::PLAIN..];
        let (first, second) = updates.split_at(2 * usize::from(weights.first.lora.is_some()));
        let layers = [
            (&ops.parents[4], &ops.parents[5], first),
            (&ops.parents[6], &ops.parents[7], second),
        ];
        let wants = layers.map(|(weight, bias, lora)| LinearWants {
            x: true,
            weight: weight.is_some(),
            bias: bias.is_some(),
            lora: lora.iter().any(Option::is_some),
        });
        let gradient = tensor(gradient);
        let gradients =
            branch::backward::<B>(gradient, x, modulation, weights, epsilon, earlier, wants);
        let BranchGradients {
            x,
            modulation: [shift, scale, gate],
            first,
            second,
        } = gradients;
        give!(grads, ops.parents[0], Some(x));
        give!(grads, ops.parents[1], Some(shift));
        give!(grads, ops.parents[2], Some(scale));
        give!(grads, ops.parents[3], Some(gate));
        for ((weight, bias, lora), found) in layers.into_iter().zip([first, second]) {
            let LinearGradients {
                weight: of_weight,
                bias: of_bias,
                lora: of_lora,
                ..
            } = found;
            give!(grads, *weight, of_weight);
            give!(grads, *bias, of_bias);
            if let (Some((a, b)), [parent_a, parent_b]) = (of_lora, lora) {
                give!(grads, *parent_a, Some(a));
                give!(grads, *parent_b, Some(b));
            }
        }
    }
}

impl<B: FusedOps> Backward<B, 8> for BranchNode {
    type State = BranchState<B>;

    fn backward(self, ops: Ops<Self::State, 8>, grads: &mut Gradients, _: &mut Checkpointer) {
        Self::run(ops, grads);
    }
}

impl<B: FusedOps> Backward<B, 10> for BranchNode {
    type State = BranchState<B>;

    fn backward(self, ops: Ops<Self::State, 10>, grads: &mut Gradients, _: &mut Checkpointer) {
        Self::run(ops, grads);
    }
}

impl<B: FusedOps> Backward<B, 12> for BranchNode {
    type State = BranchState<B>;

    fn backward(self, ops: Ops<Self::State, 12>, grads: &mut Gradients, _: &mut Checkpointer) {
        Self::run(ops, grads);
    }
}

#[derive(Debug)]
struct ConvolutionNode;

/// x, weight, window, type of the products
type ConvolutionState<B> = (Tensor<B, 4>, Tensor<B, 4>, Window, Compute);

impl ConvolutionNode {
    /// The backward step for the parents x, weight and perhaps bias.
    fn run<B: FusedOps, const N: usize>(ops: Ops<ConvolutionState<B>, N>, grads: &mut Gradients) {
        let gradient = tensor(grads.consume::<B>(&ops.node));
        let (x, weight, window, compute) = ops.state;
        let wants_x = ops.parents[0].is_some();
        let gradients = B::convolution_backward(gradient, x, weight, window, compute, wants_x);
        give!(grads, ops.parents[0], gradients.x);
        give!(grads, ops.parents[1], Some(gradients.weight));
        if let [bias] = &ops.parents[2..] {
            give!(grads, bias, Some(gradients.bias));
        }
    }
}

impl<B: FusedOps> Backward<B, 2> for ConvolutionNode {
    type State = ConvolutionState<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        Self::run(ops, grads);
    }
}

impl<B: FusedOps> Backward<B, 3> for ConvolutionNode {
    type State = ConvolutionState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        Self::run(ops, grads);
    }
}

#[derive(Debug)]
struct GroupNormNode;

impl<B: FusedOps> Backward<B, 3> for GroupNormNode {
    /// x, scale, shift, options
    type State = (Tensor<B, 4>, Tensor<B, 1>, Tensor<B, 1>, GroupNormOptions);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = tensor(grads.consume::<B>(&ops.node));
        let (x, scale, shift, norm) = ops.state;
        let gradients = B::group_norm_backward(gradient, x, scale, shift, norm);
        give!(grads, ops.parents[0], Some(gradients.x));
        give!(grads, ops.parents[1], Some(gradients.scale));
        give!(grads, ops.parents[2], Some(gradients.shift));
    }
}

#[derive(Debug)]
struct Blend;

impl<B: FusedOps> Backward<B, 3> for Blend {
    /// x, y, share
    type State = (Tensor<B, 3>, Tensor<B, 3>, Tensor<B, 1>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = tensor(grads.consume::<B>(&ops.node));
        let (x, y, share) = ops.state;
        let (dx, dy, dshare) = B::blend_backward(gradient, x, y, share);
        give!(grads, ops.parents[0], Some(dx));
        give!(grads, ops.parents[1], Some(dy));
        give!(grads, ops.parents[2], Some(dshare));
    }
}

#[derive(Debug)]
struct Columns;

impl<B: FusedOps> Backward<B, 1> for Columns {
    /// Shape of the whole tensor, and the first column of the slice.
    type State = ([usize; 2], usize);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let sum = earlier::<B, _, 1>(&ops, 0, grads, &gradient).map(tensor::<B, 2>);
        let (shape, start) = ops.state;
        let gradient: Tensor<B, 2> = tensor(gradient);
        let part = [0..shape[0], start..start + gradient.dims()[1]];
        let whole = match sum {
            Some(sum) => {
                let there = sum.clone().slice(part.clone());
                sum.slice_assign(part, there + gradient)
            }
            None => Tensor::zeros(shape, &gradient.device()).slice_assign(part, gradient),
        };
        give!(grads, ops.parents[0], Some(whole));
    }
}

impl<B: FusedOps> FusedOps for Autodiff<B> {
    fn support(compute: Compute, device: &Self::Device) -> Support {
        B::support(compute, device)
    }

    fn head_multiple() -> usize {
        B::head_multiple()
    }

    fn misreads(terms: usize) -> bool {
        B::misreads(terms)
    }

    fn activate<const D: usize>(x: Tensor<Self, D>, activation: Activation) -> Tensor<Self, D> {
        let x = tracked(x);
        let output = B::activate(inner::<B, D>(&x), activation);
        node!(Activate, [x], output, (x.primitive.clone(), activation))
    }

    fn linear_layer<const D: usize>(
        x: Tensor<Self, D>,
        weights: LinearWeights<Self>,
        activation: Activation,
    ) -> Tensor<Self, D> {
        let shape = x.dims();
        let x = tracked(x);
        let TrackedLinear {
            weight,
            bias,
            lora,
            inner: weights,
        } = weights.into();
        let output = B::linear_layer(inner::<B, D>(&x), weights.clone(), activation);
        let rows = shape[..D - 1].iter().product();
        let state = LinearState {
            x: tensor(B::with_shape(
                x.primitive.clone(),
                [rows, shape[D - 1]].into(),
            )),
            shape: shape.to_vec(),
            weights,
            activation,
        };
        match lora {
            None => node!(LinearNode, [x, weight, bias], output, state),
            Some([a, b]) => node!(LinearNode, [x, weight, bias, a, b], output, state),
        }
    }

    fn row_softmax(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        let x = tracked(x);
        let output = B::row_softmax(inner(&x));
        let state = primitive(output.clone());
        node!(Softmax, [x], output, state)
    }

    fn transposed(x: Tensor<Self, 3>) -> Tensor<Self, 3> {
        let x = tracked(x);
        let output = B::transposed(inner(&x));
        node!(Transposed, [x], output, ())
    }

    fn modulated_norm(
        x: Tensor<Self, 3>,
        shift: Tensor<Self, 2>,
        scale: Tensor<Self, 2>,
        epsilon: f64,
    ) -> Tensor<Self, 3> {
        let (x, shift, scale) = (tracked(x), tracked(shift), tracked(scale));
        let output = B::modulated_norm(inner(&x), inner(&shift), inner(&scale), epsilon);
        let state = (inner(&x), inner(&scale), epsilon);
        node!(ModulatedNorm, [x, shift, scale], output, state)
    }

    fn qkv_attention(qkv: Tensor<Self, 3>, heads: usize, compute: Compute) -> Tensor<Self, 3> {
        let qkv = tracked(qkv);
        let output = B::qkv_attention(inner(&qkv), heads, compute);
        node!(QkvAttention, [qkv], output, (inner(&qkv), heads, compute))
    }

    fn gated_residual(
        x: Tensor<Self, 3>,
        gate: Tensor<Self, 2>,
        y: Tensor<Self, 3>,
    ) -> Tensor<Self, 3> {
        let (x, gate, y) = (tracked(x), tracked(gate), tracked(y));
        let output = B::gated_residual(inner(&x), inner(&gate), inner(&y));
        let state = (inner(&gate), inner(&y));
        node!(GatedResidual, [x, gate, y], output, state)
    }

    fn branch(
        x: Tensor<Self, 3>,
        modulation: [Tensor<Self, 2>; 3],
        weights: BranchWeights<Self>,
        epsilon: f64,
    ) -> Tensor<Self, 3> {
        let (x, [shift, scale, gate]) = (tracked(x), modulation.map(tracked));
        let first = TrackedLinear::from(weights.first);
        let second = TrackedLinear::from(weights.second);
        let state = BranchState::<B> {
            x: inner(&x),
            modulation: [inner(&shift), inner(&scale), inner(&gate)],
            weights: BranchWeights {
                first: first.inner,
                between: weights.between,
                second: second.inner,
            },
            epsilon,
        };
        let inputs = (state.x.clone(), state.modulation.clone());
        let output = B::branch(inputs.0, inputs.1, state.weights.clone(), epsilon);
        let (weight, bias) = (first.weight, first.bias);
        let (weight2, bias2) = (second.weight, second.bias);
        match (first.lora, second.lora) {
            (None, None) => node!(
                BranchNode,
                [x, shift, scale, gate, weight, bias, weight2, bias2],
                output,
                state
            ),
            (Some([a, b]), None) | (None, Some([a, b])) => node!(
                BranchNode,
                [x, shift, scale, gate, weight, bias, weight2, bias2, a, b],
                output,
                state
            ),
            (Some([a, b]), Some([a2, b2])) => node!(
                BranchNode,
                [
                    x, shift, scale, gate, weight, bias, weight2, bias2, a, b, a2, b2
                ],
                output,
                state
            ),
        }
    }

    fn convolution(
        x: Tensor<Self, 4>,
        weight: Tensor<Self, 4>,
        bias: Option<Tensor<Self, 1>>,
        window: Window,
        compute: Compute,
    ) -> Tensor<Self, 4> {
        let (x, weight, bias) = (tracked(x), tracked(weight), bias.map(tracked));
        let state = (inner(&x), inner(&weight), window, compute);
        let of = bias.as_ref().map(inner);
        let output = B::convolution(state.0.clone(), state.1.clone(), of, window, compute);
        match bias {
            None => node!(ConvolutionNode, [x, weight], output, state),
            Some(bias) => node!(ConvolutionNode, [x, weight, bias], output, state),
        }
    }

    fn group_norm(
        x: Tensor<Self, 4>,
        scale: Tensor<Self, 1>,
        shift: Tensor<Self, 1>,
        norm: GroupNormOptions,
    ) -> Tensor<Self, 4> {
        let (x, scale, shift) = (tracked(x), tracked(scale), tracked(shift));
        let state = (inner(&x), inner(&scale), inner(&shift), norm);
        let output = B::group_norm(state.0.clone(), state.1.clone(), state.2.clone(), norm);
        node!(GroupNormNode, [x, scale, shift], output, state)
    }

    fn blend(x: Tensor<Self, 3>, y: Tensor<Self, 3>, share: Tensor<Self, 1>) -> Tensor<Self, 3> {
        let (x, y, share) = (tracked(x), tracked(y), tracked(share));
        let state = (inner(&x), inner(&y), inner(&share));
        let output = B::blend(state.0.clone(), state.1.clone(), state.2.clone());
        node!(Blend, [x, y, share], output, state)
    }

    fn columns(x: Tensor<Self, 2>, start: usize, width: usize) -> Tensor<Self, 2> {
        let shape = x.dims();
        let x = tracked(x);
        let output = B::columns(inner(&x), start, width);
        node!(Columns, [x], output, (shape, start))
    }
}
