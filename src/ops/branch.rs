//! A residual branch of a transformer block as one operator, which keeps its input alone for the
//! backward pass and computes the rest again there (Chen et al., arXiv 1604.06174).
//!
//! The backward pass calls the backward halves of the operators within, in the order in which the
//! graph would: the gradients are those of the composed branch to the last bit. (Burn's own
//! backward pass can't be called within a backward pass.)

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::{Activation, FusedOps, LinearGradients, LinearWants, LinearWeights};
use crate::backend::Compute;

/// What a branch does between its two linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Between {
    /// Self-attention of queries, keys and values.
    Attention {
        /// Heads.
        heads: usize,
        /// Type of the products.
        compute: Compute,
    },
    /// An activation.
    Activation(Activation),
}

/// The parameters of a residual branch.
#[derive(Debug, Clone)]
pub struct BranchWeights<B: Backend> {
    /// The layer before.
    pub first: LinearWeights<B>,
    /// What is done between.
    pub between: Between,
    /// The layer after.
    pub second: LinearWeights<B>,
}

/// Gradients of a branch.
#[derive(Debug, Clone)]
pub(super) struct BranchGradients<B: Backend> {
    /// `[batch, tokens, width]`, including the earlier gradient.
    pub(super) x: Tensor<B, 3>,
    /// Those of shift, scale and gate, `[batch, width]`.
    pub(super) modulation: [Tensor<B, 2>; 3],
    pub(super) first: LinearGradients<B>,
    pub(super) second: LinearGradients<B>,
}

/// The branch, composed of its operators: [`FusedOps::branch`].
pub fn composed<B: FusedOps>(
    x: Tensor<B, 3>,
    [shift, scale, gate]: [Tensor<B, 2>; 3],
    weights: BranchWeights<B>,
    epsilon: f64,
) -> Tensor<B, 3> {
    let seen = B::modulated_norm(x.clone(), shift, scale, epsilon);
    let first = B::linear_layer(seen, weights.first, Activation::Identity);
    let (second, activation) = between(first, weights.between);
    let said = B::linear_layer(second, weights.second, activation);
    B::gated_residual(x, gate, said)
}

/// Input of the second layer, and its activation.
fn between<B: FusedOps>(first: Tensor<B, 3>, between: Between) -> (Tensor<B, 3>, Activation) {
    match between {
        Between::Attention { heads, compute } => (
            B::qkv_attention(first, heads, compute),
            Activation::Identity,
        ),
        Between::Activation(activation) => (first, activation),
    }
}

/// Gradients of [`composed`]; `earlier` is one that `x` has already. `wants` are the two layers'.
pub(super) fn backward<B: FusedOps>(
    gradient: Tensor<B, 3>,
    x: Tensor<B, 3>,
    [shift, scale, gate]: [Tensor<B, 2>; 3],
    weights: BranchWeights<B>,
    epsilon: f64,
    earlier: Option<Tensor<B, 3>>,
    wants: [LinearWants; 2],
) -> BranchGradients<B> {
    let seen = B::modulated_norm(x.clone(), shift, scale.clone(), epsilon);
    let first = B::linear_layer(seen.clone(), weights.first.clone(), Activation::Identity);
    let (second, activation) = between(first.clone(), weights.between);
    let said = B::linear_layer(second.clone(), weights.second.clone(), activation);

    let (dgate, dsaid) = B::gated_residual_backward(gradient.clone(), gate, said);
    let of_second = B::linear_layer_backward(
        rows(dsaid),
        rows(second.clone()),
        weights.second,
        activation,
        LinearWants {
            x: true,
            ..wants[1]
        },
    );
    let dsecond = like(&of_second.x, second);
    let dfirst = match weights.between {
        Between::Attention { heads, compute } => {
            B::qkv_attention_backward(dsecond, first, heads, compute)
        }
        Between::Activation(_) => dsecond,
    };
    let of_first = B::linear_layer_backward(
        rows(dfirst),
        rows(seen.clone()),
        weights.first,
        Activation::Identity,
        LinearWants {
            x: true,
            ..wants[0]
        },
    );
    // That of the sum comes before that of the norm, which adds its own.
    let sum = match earlier {
        Some(earlier) => earlier + gradient,
        None => gradient,
    };
    let dseen = like(&of_first.x, seen);
    let norm = B::modulated_norm_backward(dseen, x, scale, epsilon, Some(sum));
    BranchGradients {
        x: norm.x,
        modulation: [norm.shift, norm.scale, dgate],
        first: of_first,
        second: of_second,
    }
}

/// `[batch, tokens, width]` as `[batch tokens, width]`.
fn rows<B: FusedOps>(x: Tensor<B, 3>) -> Tensor<B, 2> {
    let [batch, tokens, width] = x.dims();
    shaped(x, [batch * tokens, width])
}

/// A gradient of rows in the shape of the tensor that it is of.
fn like<B: FusedOps>(rows: &Option<Tensor<B, 2>>, of: Tensor<B, 3>) -> Tensor<B, 3> {
    match rows {
        Some(rows) => shaped(rows.clone(), of.dims()),
        // An operator leaves none out that it is asked for.
        None => of.zeros_like(),
    }
}

fn shaped<B: FusedOps, const D: usize, const E: usize>(
    x: Tensor<B, D>,
    shape: [usize; E],
) -> Tensor<B, E> {
    let x = B::with_shape(x.into_primitive().tensor(), shape.into());
    Tensor::from_primitive(burn::tensor::TensorPrimitive::Float(x))
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn::tensor::{Distribution, TensorData};
    use burn_flex::Flex;
    use burn_ndarray::NdArray;

    use super::super::LoraWeights;
    use super::*;
    use crate::ops::TrainingBackend;

    const SIZES: [usize; 4] = [3, 5, 8, 12];

    fn noise<B: Backend, const D: usize>(shape: [usize; D]) -> Tensor<B, D> {
        Tensor::random(shape, Distribution::Normal(0.0, 0.7), &Default::default())
    }

    fn layer<B: TrainingBackend>([input, output]: [usize; 2], lora: bool) -> LinearWeights<B> {
        LinearWeights {
            weight: noise([output, input]).require_grad(),
            bias: noise([output]).require_grad(),
            lora: lora.then(|| LoraWeights {
                a: noise([2, input]).require_grad(),
                b: noise([output, 2]).require_grad(),
                scale: 0.5,
            }),
            compute: Compute::F32,
        }
    }

    type Run<B> = fn(Tensor<B, 3>, [Tensor<B, 2>; 3], BranchWeights<B>, f64) -> Tensor<B, 3>;

    /// The result and all gradients, of an input that is used beside the branch too.
    fn found<B: TrainingBackend>(
        run: Run<B>,
        (x, modulation): (&Tensor<B, 3>, &[Tensor<B, 2>; 3]),
        weights: &BranchWeights<B>,
    ) -> Vec<TensorData> {
        // No leaf, and used twice: its gradients are summed.
        let doubled = x.clone() * 2.0;
        let out = run(doubled.clone(), modulation.clone(), weights.clone(), 1e-6);
        let loss = (out.clone() * out.clone()).sum() + doubled.powi_scalar(3).sum();
        let gradients = loss.backward();
        let layers = [&weights.first, &weights.second];
        let mut all = vec![out.into_data()];
        all.extend(x.grad(&gradients).map(Tensor::into_data));
        for tensor in modulation {
            all.extend(tensor.grad(&gradients).map(Tensor::into_data));
        }
        for layer in layers {
            all.extend(layer.weight.grad(&gradients).map(Tensor::into_data));
            all.extend(layer.bias.grad(&gradients).map(Tensor::into_data));
            if let Some(lora) = &layer.lora {
                all.extend(lora.a.grad(&gradients).map(Tensor::into_data));
                all.extend(lora.b.grad(&gradients).map(Tensor::into_data));
            }
        }
        all
    }

    fn recomputed_is_composed<B: TrainingBackend>() {
        let [batch, tokens, width, hidden] = SIZES;
        let compute = Compute::F32;
        for (between, inside) in [
            (Between::Attention { heads: 2, compute }, [3 * width, width]),
            (Between::Activation(Activation::GeluTanh), [hidden, hidden]),
        ] {
            for loras in [[false, false], [true, false], [false, true], [true, true]] {
                let x = noise::<B, 3>([batch, tokens, width]).require_grad();
                let modulation: [_; 3] =
                    std::array::from_fn(|_| noise::<B, 2>([batch, width]).require_grad());
                let weights = BranchWeights {
                    first: layer([width, inside[0]], loras[0]),
                    between,
                    second: layer([inside[1], width], loras[1]),
                };
                let of = |run: Run<B>| found::<B>(run, (&x, &modulation), &weights);
                let (plain, again) = (of(composed::<B>), of(B::branch));
                let loras = loras.into_iter().filter(|lora| *lora).count();
                assert_eq!(plain.len(), 1 + 4 + 4 + 2 * loras);
                assert_eq!(plain, again, "{between:?} {loras}");
            }
        }
    }

    #[test]
    fn what_is_computed_again_gives_the_same_bits() {
        recomputed_is_composed::<Autodiff<NdArray>>();
        recomputed_is_composed::<Autodiff<Flex>>();
    }

    #[test]
    fn frozen_parameters_get_no_gradients() {
        type B = Autodiff<NdArray>;
        let [batch, tokens, width, hidden] = SIZES;
        let frozen = |layer: LinearWeights<B>| LinearWeights {
            weight: layer.weight.set_require_grad(false),
            bias: layer.bias.set_require_grad(false),
            ..layer
        };
        let x = noise::<B, 3>([batch, tokens, width]);
        let modulation = std::array::from_fn(|_| noise::<B, 2>([batch, width]));
        let weights = BranchWeights {
            first: frozen(layer([width, hidden], true)),
            between: Between::Activation(Activation::GeluTanh),
            second: frozen(layer([hidden, width], false)),
        };
        let of = |run: Run<B>| found::<B>(run, (&x, &modulation), &weights);
        let (plain, again) = (of(composed::<B>), of(B::branch));
        // The result's, and the low-rank update's.
        assert_eq!(plain.len(), 1 + 2);
        assert_eq!(plain, again);
    }
}
