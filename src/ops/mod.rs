//! Tensor operators that the models share.
//!
//! [`FusedOps`] is the place for kernels. Each operator is a pair, forward and backward. The
//! default of each method is composed of Burn's operators (the slow, exact reference, in
//! [`mod@reference`]); a backend overrides what it can do faster. `Autodiff<B>` joins the pairs
//! into nodes of the graph (see `autodiff.rs`), so a backend's kernels train without any
//! differentiation code of their own. (Convolution and group normalisation, through which nothing
//! large is trained, have no backward half: a graph holds their reference.) Models call the trait
//! and don't depend on the backend.
//!
//! ```text
//! models ──> FusedOps ──┬─ Autodiff<B>: one graph node an operator, then B's forward and backward
//!                       ├─ NdArray:     kernels of `cpu/`
//!                       ├─ LibTorch:    PyTorch's own, `torch`
//!                       ├─ CubeCL's:    kernels of `cube/`
//!                       └─ any other:   `reference`
//! ```

mod autodiff;
pub mod branch;
mod convolution;
#[cfg(feature = "ndarray")]
mod cpu;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod cube;
mod linear;
pub mod reference;
#[cfg(feature = "torch")]
pub mod torch;

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Int, Shape, Tensor, TensorData, activation};

use crate::backend::Compute;

pub use branch::{Between, BranchWeights};
pub use convolution::{Convolution, Window};
pub use linear::{Linear, LinearLayout, Lora};

/// A function of one value, applied to every element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x`
    Identity,
    /// GELU, `x/2 (1 + erf(x / sqrt(2)))`.
    Gelu,
    /// GELU by its tanh approximation, `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `x / (1 + exp(-x))`
    Silu,
}

/// The parameters of a linear layer, as its operator reads them.
#[derive(Debug, Clone)]
pub struct LinearWeights<B: Backend> {
    /// `[out, in]`
    pub weight: Tensor<B, 2>,
    /// `[out]`
    pub bias: Tensor<B, 1>,
    /// A low-rank update.
    pub lora: Option<LoraWeights<B>>,
    /// Type of the products.
    pub compute: Compute,
}

/// The factors of a low-rank update `scale B A`.
#[derive(Debug, Clone)]
pub struct LoraWeights<B: Backend> {
    /// `[rank, in]`
    pub a: Tensor<B, 2>,
    /// `[out, rank]`
    pub b: Tensor<B, 2>,
    /// alpha / rank
    pub scale: f64,
}

/// Which gradients of a linear layer are required.
#[derive(Debug, Clone, Copy)]
pub struct LinearWants {
    /// That of the input.
    pub x: bool,
    /// That of the weight.
    pub weight: bool,
    /// That of the bias.
    pub bias: bool,
    /// Those of the low-rank update.
    pub lora: bool,
}

/// Gradients of a linear layer; those not required may be missing.
#[derive(Debug, Clone)]
pub struct LinearGradients<B: Backend> {
    /// `[rows, in]`
    pub x: Option<Tensor<B, 2>>,
    /// `[out, in]`
    pub weight: Option<Tensor<B, 2>>,
    /// `[out]`
    pub bias: Option<Tensor<B, 1>>,
    /// `[rank, in]` and `[out, rank]`
    pub lora: Option<(Tensor<B, 2>, Tensor<B, 2>)>,
}

/// Gradients of [`FusedOps::modulated_norm`].
#[derive(Debug, Clone)]
pub struct NormGradients<B: Backend> {
    /// `[batch, tokens, width]`, including the earlier gradient.
    pub x: Tensor<B, 3>,
    /// `[batch, width]`
    pub shift: Tensor<B, 2>,
    /// `[batch, width]`
    pub scale: Tensor<B, 2>,
}

/// Gradients of [`FusedOps::convolution`].
#[derive(Debug, Clone)]
pub struct ConvolutionGradients<B: Backend> {
    /// `[batch, in, height, width]`
    pub x: Option<Tensor<B, 4>>,
    /// `[out, in, kernel height, kernel width]`
    pub weight: Tensor<B, 4>,
    /// `[out]`
    pub bias: Tensor<B, 1>,
}

/// Settings of [`FusedOps::group_norm`].
#[derive(Debug, Clone, Copy)]
pub struct GroupNormOptions {
    /// Number of groups; it divides the channels.
    pub groups: usize,
    /// Added to the variance.
    pub epsilon: f64,
    /// Applied to the result.
    pub activation: Activation,
}

/// Gradients of [`FusedOps::group_norm`].
#[derive(Debug, Clone)]
pub struct GroupNormGradients<B: Backend> {
    /// `[batch, channels, height, width]`
    pub x: Tensor<B, 4>,
    /// `[channels]`
    pub scale: Tensor<B, 1>,
    /// `[channels]`
    pub shift: Tensor<B, 1>,
}

/// One step of AdamW for one parameter.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// Factor of the gradient, such as that of clipping, applied first.
    pub gradient_scale: f64,
    /// The parameter's learning rate.
    pub lr: f64,
    /// Decay of the first and the second moment.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub time: i32,
}

/// A parameter and its moments, all of one shape.
#[derive(Debug, Clone)]
pub struct AdamWState<B: Backend, const D: usize> {
    /// The parameter.
    pub value: Tensor<B, D>,
    /// Running mean of gradients.
    pub first: Tensor<B, D>,
    /// Running mean of squared gradients.
    pub second: Tensor<B, D>,
}

/// How a backend computes matrix products of a type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// With instructions for it.
    Full,
    /// With instructions for it, which are no faster than those for f32.
    Slow,
    /// With those for f32, and no faster.
    Emulated,
    /// Not at all.
    Missing,
}

/// Operators in which a diffusion transformer spends its time.
///
/// The defaults are the reference; an override must agree with [`mod@reference`] to the last few
/// bits, forward and backward. (Of products of bf16 the reference rounds results as well as
/// factors; an override may keep them.) Nothing here is specific to a device: shapes are whole
/// batches, and the backward pass keeps only the operator's own inputs.
pub trait FusedOps: Backend {
    /// How matrix products of this type are computed.
    fn support(compute: Compute, device: &Self::Device) -> Support {
        match compute == Compute::F32 || Self::supports_dtype(device, DType::BF16) {
            true => Support::Full,
            false => Support::Missing,
        }
    }

    /// The head dimension is padded to a multiple of this; 1 is no padding.
    fn head_multiple() -> usize {
        1
    }

    /// Whether matrix products of so many terms are [padded](product): some kernels read past the
    /// end of their factors.
    fn misreads(_terms: usize) -> bool {
        false
    }

    /// An activation, elementwise.
    fn activate<const D: usize>(x: Tensor<Self, D>, activation: Activation) -> Tensor<Self, D> {
        reference::activate(x, activation)
    }

    /// Gradient of [`activate`](Self::activate) at `x`.
    fn activate_backward<const D: usize>(
        gradient: Tensor<Self, D>,
        x: Tensor<Self, D>,
        activation: Activation,
    ) -> Tensor<Self, D> {
        gradient * reference::activate_derivative(x, activation)
    }

    /// A linear layer on the last dimension of the activated input: `act(x) W^T + b`, plus
    /// `scale act(x) A^T B^T` if it carries a low-rank update.
    ///
    /// The activation comes before the product, not after it, so that only `x` is kept for the
    /// backward pass.
    fn linear_layer<const D: usize>(
        x: Tensor<Self, D>,
        weights: LinearWeights<Self>,
        activation: Activation,
    ) -> Tensor<Self, D> {
        reference::linear(x, weights, activation)
    }

    /// Gradients of [`linear_layer`](Self::linear_layer): `gradient` is `[rows, out]`, `x`
    /// `[rows, in]`.
    fn linear_layer_backward(
        gradient: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        weights: LinearWeights<Self>,
        activation: Activation,
        wants: LinearWants,
    ) -> LinearGradients<Self> {
        reference::linear_backward(gradient, x, weights, activation, wants)
    }

    /// `(1 + scale) norm(x) + shift`, where norm is layer normalisation over the last dimension
    /// without affine parameters. `x` is `[batch, tokens, width]`, `shift` and `scale` are
    /// `[batch, width]`.
    fn modulated_norm(
        x: Tensor<Self, 3>,
        shift: Tensor<Self, 2>,
        scale: Tensor<Self, 2>,
        epsilon: f64,
    ) -> Tensor<Self, 3> {
        reference::modulated_norm(x, shift, scale, epsilon)
    }

    /// Gradients of [`modulated_norm`](Self::modulated_norm); that of `x` is added to `sum`, if
    /// given.
    fn modulated_norm_backward(
        gradient: Tensor<Self, 3>,
        x: Tensor<Self, 3>,
        scale: Tensor<Self, 2>,
        epsilon: f64,
        sum: Option<Tensor<Self, 3>>,
    ) -> NormGradients<Self> {
        reference::modulated_norm_backward(gradient, x, scale, epsilon, sum)
    }

    /// Self-attention of all heads from the fused projection `[batch, tokens, 3 width]` (queries,
    /// keys, values in that order, each split into `heads`), giving `[batch, tokens, width]`. Its
    /// products are of type `compute`.
    fn qkv_attention(qkv: Tensor<Self, 3>, heads: usize, compute: Compute) -> Tensor<Self, 3> {
        reference::qkv_attention(qkv, heads, Self::head_multiple(), compute)
    }

    /// Gradient of [`qkv_attention`](Self::qkv_attention), `[batch, tokens, 3 width]`.
    fn qkv_attention_backward(
        gradient: Tensor<Self, 3>,
        qkv: Tensor<Self, 3>,
        heads: usize,
        compute: Compute,
    ) -> Tensor<Self, 3> {
        reference::qkv_attention_backward(gradient, qkv, heads, Self::head_multiple(), compute)
    }

    /// `x + gate y`; `x` and `y` are `[batch, tokens, width]`, `gate` is `[batch, width]`.
    fn gated_residual(
        x: Tensor<Self, 3>,
        gate: Tensor<Self, 2>,
        y: Tensor<Self, 3>,
    ) -> Tensor<Self, 3> {
        reference::gated_residual(x, gate, y)
    }

    /// Gradients of [`gated_residual`](Self::gated_residual) for `gate` and `y`; that of `x` is
    /// `gradient` itself.
    fn gated_residual_backward(
        gradient: Tensor<Self, 3>,
        gate: Tensor<Self, 2>,
        y: Tensor<Self, 3>,
    ) -> (Tensor<Self, 2>, Tensor<Self, 3>) {
        reference::gated_residual_backward(gradient, gate, y)
    }

    /// A residual branch: `x + gate said`, where `said` is what its layers make of the modulated
    /// norm of `x`. `x` is `[batch, tokens, width]`, shift, scale and gate are `[batch, width]`.
    ///
    /// In a graph it keeps `x` and the modulation alone, and computes the rest again in the
    /// backward pass; [`branch::composed`] keeps what its operators keep.
    fn branch(
        x: Tensor<Self, 3>,
        modulation: [Tensor<Self, 2>; 3],
        weights: BranchWeights<Self>,
        epsilon: f64,
    ) -> Tensor<Self, 3> {
        branch::composed(x, modulation, weights, epsilon)
    }

    /// `x + share (y - x)`; `x` and `y` are `[batch, tokens, width]`, `share` is `[batch]`.
    fn blend(x: Tensor<Self, 3>, y: Tensor<Self, 3>, share: Tensor<Self, 1>) -> Tensor<Self, 3> {
        reference::blend(x, y, share)
    }

    /// Gradients of [`blend`](Self::blend) for `x`, `y` and `share`.
    fn blend_backward(
        gradient: Tensor<Self, 3>,
        x: Tensor<Self, 3>,
        y: Tensor<Self, 3>,
        share: Tensor<Self, 1>,
    ) -> (Tensor<Self, 3>, Tensor<Self, 3>, Tensor<Self, 1>) {
        reference::blend_backward(gradient, x, y, share)
    }

    /// Softmax of each row.
    fn row_softmax(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        activation::softmax(x, 1)
    }

    /// Gradient of [`row_softmax`](Self::row_softmax) with result `y`.
    fn row_softmax_backward(gradient: Tensor<Self, 2>, y: Tensor<Self, 2>) -> Tensor<Self, 2> {
        reference::softmax_backward(gradient, y)
    }

    /// Each matrix of `x`, `[batch, rows, columns]`, with its dimensions exchanged.
    fn transposed(x: Tensor<Self, 3>) -> Tensor<Self, 3> {
        x.swap_dims(1, 2)
    }

    /// A convolution. `x` is `[batch, in, height, width]`, `weight` is
    /// `[out, in, kernel height, kernel width]`, `bias` is `[out]`; the result is
    /// `[batch, out, height', width']` by [`Window::output`]. Its products are of type `compute`.
    fn convolution(
        x: Tensor<Self, 4>,
        weight: Tensor<Self, 4>,
        bias: Option<Tensor<Self, 1>>,
        window: Window,
        compute: Compute,
    ) -> Tensor<Self, 4> {
        reference::convolution(x, weight, bias, window, compute)
    }

    /// Gradients of [`convolution`](Self::convolution); that of `x` only if it is required.
    fn convolution_backward(
        gradient: Tensor<Self, 4>,
        x: Tensor<Self, 4>,
        weight: Tensor<Self, 4>,
        window: Window,
        compute: Compute,
        wants_x: bool,
    ) -> ConvolutionGradients<Self> {
        reference::convolution_backward(gradient, x, weight, window, compute, wants_x)
    }

    /// Group normalisation (arXiv 1803.08494) with an activation: `x` is
    /// `[batch, channels, height, width]`, normalised over each of `groups` equal runs of channels,
    /// then scaled and shifted by channel; `scale` and `shift` are `[channels]`.
    fn group_norm(
        x: Tensor<Self, 4>,
        scale: Tensor<Self, 1>,
        shift: Tensor<Self, 1>,
        norm: GroupNormOptions,
    ) -> Tensor<Self, 4> {
        reference::group_norm(x, scale, shift, norm)
    }

    /// Gradients of [`group_norm`](Self::group_norm).
    fn group_norm_backward(
        gradient: Tensor<Self, 4>,
        x: Tensor<Self, 4>,
        scale: Tensor<Self, 1>,
        shift: Tensor<Self, 1>,
        norm: GroupNormOptions,
    ) -> GroupNormGradients<Self> {
        reference::group_norm_backward(gradient, x, scale, shift, norm)
    }

    /// The same values under another shape. Burn's own reshape copies them on some backends.
    fn with_shape(x: FloatTensor<Self>, shape: Shape) -> FloatTensor<Self> {
        Self::float_reshape(x, shape)
    }

    /// Columns `start .. start + width` of `x`.
    fn columns(x: Tensor<Self, 2>, start: usize, width: usize) -> Tensor<Self, 2> {
        x.narrow(1, start, width)
    }

    /// The sum of squares, `[1]`.
    fn sum_of_squares<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, 1> {
        (x.clone() * x).sum()
    }

    /// One step of AdamW (arXiv 1711.05101) in PyTorch's arithmetic.
    fn adamw<const D: usize>(
        state: AdamWState<Self, D>,
        gradient: Tensor<Self, D>,
        step: AdamWStep,
    ) -> AdamWState<Self, D> {
        reference::adamw(state, gradient, step)
    }

    /// `decay average + (1 - decay) value`
    fn moving_average<const D: usize>(
        average: Tensor<Self, D>,
        value: Tensor<Self, D>,
        decay: f64,
    ) -> Tensor<Self, D> {
        reference::moving_average(average, value, decay)
    }
}

/// Refuses a type of matrix products that the backend does not support; or says why it is not
/// faster than another.
///
/// # Errors
/// When the backend does not support the type.
pub fn supports<B: FusedOps>(
    compute: Compute,
    device: &B::Device,
) -> Result<Option<&'static str>, String> {
    match B::support(compute, device) {
        Support::Full => Ok(None),
        Support::Slow => Ok(Some(
            "compute = \"bf16\": this processor's instructions for it (AVX512-BF16) are no faster than those for f32; f32 takes less time",
        )),
        Support::Emulated => Ok(Some(
            "compute = \"bf16\": this processor has no instructions for it (AVX512-BF16), so that it is no faster than f32",
        )),
        Support::Missing => Err(format!(
            "compute = \"bf16\": the backend {} has no products of bf16; use ndarray, cuda or torch, or compute = \"f32\"",
            B::name(device)
        )),
    }
}

/// A backend that trains: both it and its inner backend have the operators.
pub trait TrainingBackend: AutodiffBackend<InnerBackend: FusedOps> + FusedOps {}

impl<B: AutodiffBackend<InnerBackend: FusedOps> + FusedOps> TrainingBackend for B {}

/// A matrix product of type `compute`, with zeros after the terms where the backend would
/// [misread](FusedOps::misreads) them.
pub fn product<B: FusedOps, const D: usize>(
    a: Tensor<B, D>,
    b: Tensor<B, D>,
    compute: Compute,
) -> Tensor<B, D> {
    let terms = a.dims()[D - 1];
    if !B::misreads(terms) {
        return reference::product(a, b, compute);
    }
    let padded = |x: Tensor<B, D>, along: usize| {
        let mut shape = x.dims();
        shape[along] = terms.next_multiple_of(64) - terms;
        let zeros = Tensor::zeros(shape, &x.device());
        Tensor::cat(vec![x, zeros], along)
    };
    reference::product(padded(a, D - 1), padded(b, D - 2), compute)
}

/// `[batch, N width]` to N tensors `[batch, width]`.
pub fn split<B: FusedOps, const N: usize>(x: Tensor<B, 2>) -> [Tensor<B, 2>; N] {
    let width = x.dims()[1] / N;
    std::array::from_fn(|part| B::columns(x.clone(), part * width, width))
}

/// Indices for [`Tensor::select`].
pub fn indices<B: Backend>(values: &[usize], device: &B::Device) -> Tensor<B, 1, Int> {
    let values: Vec<i64> = values.iter().map(|value| *value as i64).collect();
    Tensor::from_data(TensorData::from(values.as_slice()), device)
}

/// The natural logarithm of positive values, whose gradient is a division.
///
/// Burn's multiplies by the reciprocal, which on ndarray is the processor's estimate: of 8 bits
/// (NEON) to 14 (AVX-512), and of other bits for the same value where it lies elsewhere in memory,
/// so that two runs would not give the same bits.
pub fn log<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    let value = x.clone().detach();
    let slope = value.ones_like() / value.clone();
    value.clone().log() + (x - value) * slope
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn::tensor::Distribution;
    use burn_flex::{Flex, FlexDevice};

    use super::*;
    use crate::models::{Denoiser, DitConfig, Network, initialise};
    use crate::state::{assign, collect};
    use crate::trunk::Plain;

    /// A CPU backend without kernels, whose tensors can be of bf16.
    impl FusedOps for Flex {}

    #[test]
    fn a_logarithm_has_an_exact_gradient() {
        type B = Autodiff<burn_ndarray::NdArray>;
        let values: Vec<f32> = (1..100).map(|value| value as f32 / 7.0).collect();
        let x = Tensor::<B, 1>::from_floats(values.as_slice(), &Default::default()).require_grad();
        let y = log(x.clone());
        assert_eq!(y.to_data(), x.clone().log().to_data());
        let slopes = x.grad(&y.sum().backward()).unwrap().into_data();
        let expected: Vec<f32> = values.iter().map(|value| 1.0 / value).collect();
        assert_eq!(slopes.to_vec::<f32>().unwrap(), expected);
    }

    /// The output, and the gradient of its mean square for the first block's fused projection.
    fn forward_and_backward<B: TrainingBackend>(
        compute: Compute,
        device: &B::Device,
    ) -> (Vec<f32>, Vec<f32>) {
        let config = DitConfig {
            input_size: 8,
            patch_size: 2,
            channels: 1,
            width: 32,
            depth: 2,
            heads: 2,
            mlp_ratio: 4.0,
            classes: 10,
            learn_sigma: false,
            blocks: Vec::new(),
            widths: None,
        };
        let network = Network::<B>::zeros(&config.into(), device).unwrap();
        let mut state = collect::<B, _>(&network);
        initialise(&mut state, 0);
        // The initialisation zeroes modulations and final projection: the output would not depend
        // on the rest.
        for (array, index) in state.values_mut().zip(0..) {
            let count = array.data.len();
            let noise = crate::random::normal(1, crate::random::Stream::Weights, 0, index, count);
            array
                .data
                .iter_mut()
                .zip(noise)
                .for_each(|(value, noise)| *value += 0.1 * noise);
        }
        let path = std::path::Path::new("test");
        let network = assign::<B, _>(network, &state, path, "test").unwrap();
        let network = network.computing(compute);
        B::seed(device, 3);
        let x = Tensor::<B, 4>::random([4, 1, 8, 8], Distribution::Normal(0.0, 1.0), device);
        let t = Tensor::<B, 1>::from_floats([3.0, 200.0, 500.0, 999.0], device);
        let y = Tensor::<B, 1, burn::tensor::Int>::from_ints([0, 3, 9, 10], device);
        let out = network.forward(x, t, y, &mut Plain);
        let gradients = out.clone().powi_scalar(2).mean().backward();
        let Network::Dit(model) = &network else {
            panic!("it is a DiT");
        };
        let weight = &model.blocks[0].blocks()[0]
            .attn
            .as_ref()
            .unwrap()
            .qkv
            .weight;
        let gradient = weight.val().grad(&gradients).unwrap();
        assert_eq!((out.dtype(), gradient.dtype()), (DType::F32, DType::F32));
        (
            crate::state::floats(out.into_data()),
            crate::state::floats(gradient.into_data()),
        )
    }

    fn rounds_products_and_nothing_else<B: TrainingBackend>(device: &B::Device) {
        let (out, gradient) = forward_and_backward::<B>(Compute::F32, device);
        let (rounded, rounded_gradient) = forward_and_backward::<B>(Compute::Bf16, device);
        for (exact, rounded) in [(out, rounded), (gradient, rounded_gradient)] {
            let norm =
                |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
            let size = norm(&mut exact.iter().copied());
            let off = norm(&mut exact.iter().zip(&rounded).map(|(a, b)| a - b)) / size;
            // An operand is rounded by up to 2^-8 of itself; there are a dozen products in
            // sequence, with independent rounding. Casting anything else to bf16, or losing a
            // factor, would be further off.
            assert!((1e-4..0.03).contains(&off), "{off}");
        }
    }

    /// The reference's convolution of bf16 and its gradients, against those of f32.
    fn rounds_convolutions<B: Backend>(device: &B::Device) {
        let noise = |shape: [usize; 4]| {
            Tensor::<B, 4>::random(shape, Distribution::Normal(0.0, 1.0), device)
        };
        let (x, weight) = (noise([2, 5, 8, 7]), noise([6, 5, 3, 3]));
        let (gradient, window) = (noise([2, 6, 8, 7]), Window::padded([1; 2]));
        let bias = Tensor::<B, 1>::from_floats([300.0; 6], device);
        let of = |compute| {
            let (x, weight) = (x.clone(), weight.clone());
            let bias = Some(bias.clone());
            let y = reference::convolution(x.clone(), weight.clone(), bias, window, compute);
            let gradient = gradient.clone();
            let back = reference::convolution_backward(gradient, x, weight, window, compute, true);
            [y - 300.0, back.x.unwrap(), back.weight]
        };
        for (rounded, exact) in of(Compute::Bf16).into_iter().zip(of(Compute::F32)) {
            let root = |x: Tensor<B, 4>| {
                let mean = (x.clone() * x).mean().sqrt().into_data();
                mean.iter::<f64>().next().unwrap()
            };
            // Two factors and the result are rounded, by 0.0017 of themselves each in the root mean
            // square; a bias that were rounded too would be off by 1 in 300.
            let off = root(rounded - exact.clone()) / root(exact);
            assert!((1e-4..0.006).contains(&off), "{off}");
        }
    }

    #[test]
    fn convolutions_of_bf16_round_products_and_nothing_else() {
        rounds_convolutions::<Flex>(&FlexDevice);
        #[cfg(feature = "torch")]
        rounds_convolutions::<burn_tch::LibTorch>(&burn_tch::LibTorchDevice::Cpu);
    }

    #[test]
    fn bf16_rounds_products_and_nothing_else() {
        rounds_products_and_nothing_else::<Autodiff<burn_ndarray::NdArray>>(&Default::default());
        rounds_products_and_nothing_else::<Autodiff<Flex>>(&FlexDevice);
        #[cfg(feature = "torch")]
        rounds_products_and_nothing_else::<Autodiff<burn_tch::LibTorch>>(
            &burn_tch::LibTorchDevice::Cpu,
        );
    }
}
