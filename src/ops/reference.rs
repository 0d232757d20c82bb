//! The operators of [`FusedOps`](super::FusedOps), composed of Burn's own: exact, differentiable, on any backend.

use burn::tensor::{Tensor, activation, backend::Backend};

/// GELU, tanh approximation: `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
///
/// Written as `x / (1 + exp(-2 u))`, which is the same function: `(1 + tanh u) / 2 = sigmoid(2 u)`. The exponent is
/// bounded, so that the gradient meets no infinity times zero; sigmoid(-80) is 2e-35.
pub fn gelu_tanh<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    const TWICE_ROOT_2_OVER_PI: f64 = 1.595_769_121_605_730_8;
    let square = x.clone() * x.clone();
    let u = (square.mul_scalar(0.044715 * TWICE_ROOT_2_OVER_PI) + TWICE_ROOT_2_OVER_PI) * x.clone();
    x / (u.clamp(-80.0, 80.0).neg().exp() + 1.0)
}

/// Layer normalisation over the last dimension, without affine parameters.
///
/// The variance is the mean of squares of the centred values, so a large mean costs no precision.
pub fn layer_norm<B: Backend, const D: usize>(x: Tensor<B, D>, epsilon: f64) -> Tensor<B, D> {
    let centred = x.clone() - x.mean_dim(D - 1);
    let variance = (centred.clone() * centred.clone()).mean_dim(D - 1);
    centred / (variance + epsilon).sqrt()
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

/// See [`FusedOps::qkv_attention`](super::FusedOps::qkv_attention).
///
/// The head dimension is padded by zeros to a multiple of `multiple` (1 is no padding), which changes nothing but the
/// shapes of the products: some kernels read out of bounds at sizes such as DiT-XL's 72 (tracel-ai/burn #5626).
pub fn padded_qkv_attention<B: Backend>(
    qkv: Tensor<B, 3>,
    heads: usize,
    multiple: usize,
) -> Tensor<B, 3> {
    let [batch, tokens, triple] = qkv.dims();
    let width = triple / 3;
    let head_dim = width / heads;
    let padding = head_dim.next_multiple_of(multiple) - head_dim;
    let qkv = qkv
        .reshape([batch, tokens, 3, heads, head_dim])
        .permute([2, 0, 3, 1, 4]); // [3, batch, heads, tokens, head_dim]
    let part = |index: usize| {
        let part = qkv.clone().narrow(0, index, 1).squeeze_dim::<4>(0);
        if padding == 0 {
            return part;
        }
        let zeros = Tensor::zeros([batch, heads, tokens, padding], &part.device());
        Tensor::cat(vec![part, zeros], 3)
    };
    let (q, k, v) = (part(0), part(1), part(2));
    let scores = q
        .mul_scalar(1.0 / (head_dim as f64).sqrt())
        .matmul(k.swap_dims(2, 3)); // [batch, heads, tokens, tokens]
    let mixed = activation::softmax(scores, 3)
        .matmul(v)
        .narrow(3, 0, head_dim); // [batch, heads, tokens, head_dim]
    mixed.swap_dims(1, 2).reshape([batch, tokens, width])
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
    fn padding_the_heads_changes_nothing() {
        let qkv = noise(0, [2, 5, 3 * 144]);
        let run = |multiple: usize| {
            let qkv = qkv.clone().require_grad();
            let out = padded_qkv_attention(qkv.clone(), 2, multiple);
            let gradients = (out.clone() * noise(1, [2, 5, 144])).sum().backward();
            let gradient = qkv.grad(&gradients).unwrap();
            (
                out.into_data().to_vec::<f32>().unwrap(),
                gradient.into_data().to_vec::<f32>().unwrap(),
            )
        };
        let (plain, padded) = (run(1), run(64));
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5); // sums of 72 products in another order
        assert!(close(&plain.0, &padded.0) && close(&plain.1, &padded.1));
    }

    #[test]
    fn gelu_is_its_definition_and_has_a_gradient_everywhere() {
        let values = [-60.0f32, -10.0, -1.0, 0.0, 0.5, 3.0, 60.0];
        let x = Tensor::<B, 1>::from_floats(values, &Default::default()).require_grad();
        let y = gelu_tanh(x.clone());
        let gradients = y.clone().sum().backward();
        for (x, y) in values.iter().zip(y.into_data().to_vec::<f32>().unwrap()) {
            let x = f64::from(*x);
            let expected = x / 2.0
                * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
            // A few units in the last place of the value, f32.
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
