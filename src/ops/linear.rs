//! A linear layer that can carry a low-rank update.

use std::ops::Range;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Tensor, backend::Backend};

use crate::backend::Compute;

use super::{Activation, FusedOps, LinearWeights, LoraWeights, product};

/// `y = x W^T + b`, plus `scale (x A^T) B^T` while a [`Lora`] is attached.
///
/// The weight is `[out, in]`, as PyTorch stores it, so checkpoints need no transposition.
#[derive(Module, Debug)]
pub struct Linear<B: Backend> {
    /// `[out, in]`
    pub weight: Param<Tensor<B, 2>>,
    /// `[out]`
    pub bias: Param<Tensor<B, 1>>,
    /// The low-rank update of this layer, if one is being learned.
    pub lora: Option<Lora<B>>,
    /// Type of its products.
    #[module(skip)]
    pub compute: Compute,
}

/// A low-rank update `scale B A` of a weight (TinyFusion, equation 7; Hu et al., arXiv 2106.09685).
#[derive(Module, Debug)]
pub struct Lora<B: Backend> {
    /// `[rank, in]`
    pub a: Param<Tensor<B, 2>>,
    /// `[out, rank]`
    pub b: Param<Tensor<B, 2>>,
    /// alpha / rank
    pub scale: f64,
}

/// Sizes of a linear layer, for initialisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearLayout {
    /// Input features.
    pub input: usize,
    /// Output features.
    pub output: usize,
}

impl<B: Backend> Linear<B> {
    /// A layer of zeros, to be filled from a checkpoint or an initialisation.
    ///
    /// The weight is allocated on first use: a checkpoint fills it before that, and skipping the
    /// zeros halves the time of opening one.
    pub fn zeros(input: usize, output: usize, device: &B::Device) -> Self {
        let shape = [output, input];
        let zeros = move |device: &B::Device, learns: bool| {
            Tensor::zeros(shape, device).set_require_grad(learns)
        };
        Self {
            weight: Param::uninitialized(ParamId::new(), zeros, device.clone(), true, shape.into()),
            bias: Param::from_tensor(Tensor::zeros([output], device)),
            lora: None,
            compute: Compute::F32,
        }
    }

    /// Sizes of the layer.
    pub fn layout(&self) -> LinearLayout {
        let [output, input] = self.weight.lazy_shape().dims();
        LinearLayout { input, output }
    }

    /// The same layer with only a range of its outputs.
    ///
    /// # Panics
    /// When the range reaches beyond them.
    pub fn keep_outputs(mut self, kept: Range<usize>) -> Self {
        self.weight = self.weight.map(|weight| weight.slice([kept.clone()]));
        self.bias = self.bias.map(|bias| bias.slice([kept.clone()]));
        if let Some(lora) = &mut self.lora {
            lora.b = lora.b.clone().map(|b| b.slice([kept]));
        }
        self
    }

    /// Freezes the layer and adds a low-rank update of zeros; the caller fills A and B.
    pub fn attach_lora(&mut self, rank: usize, alpha: f64) {
        let LinearLayout { input, output } = self.layout();
        let device = self.weight.val().device();
        self.lora = Some(Lora {
            a: Param::from_tensor(Tensor::zeros([rank, input], &device)),
            b: Param::from_tensor(Tensor::zeros([output, rank], &device)),
            scale: alpha / rank as f64,
        });
    }
}

impl<B: FusedOps> Linear<B> {
    /// The same layer with its low-rank update, if it has one, added to its weight.
    pub fn merge_lora(&mut self) {
        if let Some(Lora { a, b, scale }) = self.lora.take() {
            let update = product(b.val(), a.val(), Compute::F32).mul_scalar(scale);
            self.weight = self.weight.clone().map(|weight| weight + update);
        }
    }

    /// Applies the layer to the last dimension.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        self.forward_activated(x, Activation::Identity)
    }

    /// Applies the layer to `activation(x)`.
    pub fn forward_activated<const D: usize>(
        &self,
        x: Tensor<B, D>,
        activation: Activation,
    ) -> Tensor<B, D> {
        B::linear_layer(x, self.weights(), activation)
    }

    /// The parameters, as operators read them.
    pub fn weights(&self) -> LinearWeights<B> {
        LinearWeights {
            weight: self.weight.val(),
            bias: self.bias.val(),
            lora: self.lora.as_ref().map(|lora| LoraWeights {
                a: lora.a.val(),
                b: lora.b.val(),
                scale: lora.scale,
            }),
            compute: self.compute,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Distribution;
    use burn_ndarray::NdArray;

    use super::*;

    #[test]
    fn a_merged_update_does_what_it_did_beside_the_weight_and_outputs_are_kept_with_it() {
        let device = Default::default();
        let mut linear = Linear::<NdArray>::zeros(5, 4, &device);
        linear.attach_lora(2, 6.0);
        let fill = |shape: [usize; 2]| Tensor::random(shape, Distribution::Default, &device);
        linear.weight = Param::from_tensor(fill([4, 5]));
        if let Some(lora) = &mut linear.lora {
            lora.a = Param::from_tensor(fill([2, 5]));
            lora.b = Param::from_tensor(fill([4, 2]));
        }
        let x = fill([3, 5]);
        let expected = linear.forward(x.clone());
        // Sums of five products of numbers below 3, in another order.
        let near = |found: Tensor<NdArray, 2>, expected: Tensor<NdArray, 2>| {
            (found - expected).abs().max().into_scalar() < 1e-5
        };
        let some = linear.clone().keep_outputs(1..3).forward(x.clone());
        assert!(near(some, expected.clone().slice([0..3, 1..3])));
        linear.merge_lora();
        assert!(linear.lora.is_none());
        assert!(near(linear.forward(x), expected));
    }
}
