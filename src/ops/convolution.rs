//! A convolution over height and width.

use burn::module::{Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use super::FusedOps;
use crate::backend::Compute;

/// Padding and stride of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Rows and columns between neighbouring places of the kernel.
    pub stride: [usize; 2],
    /// Rows and columns of zeros above and left of the image.
    pub before: [usize; 2],
    /// Rows and columns of zeros below and right of the image.
    pub after: [usize; 2],
}

impl Window {
    /// Stride 1, with the same padding `[rows, columns]` on both sides.
    pub const fn padded(padding: [usize; 2]) -> Self {
        Self {
            stride: [1; 2],
            before: padding,
            after: padding,
        }
    }

    /// The same padding with this stride along both sides.
    pub const fn every(self, stride: usize) -> Self {
        Self {
            stride: [stride; 2],
            ..self
        }
    }

    /// Height and width of the result for an image and a kernel of these sizes.
    ///
    /// # Panics
    /// When the kernel is larger than the padded image.
    pub fn output(&self, image: [usize; 2], kernel: [usize; 2]) -> [usize; 2] {
        std::array::from_fn(|side| {
            let padded = self.before[side] + image[side] + self.after[side];
            assert!(
                kernel[side] <= padded,
                "a kernel of {kernel:?} does not fit an image of {image:?} within {self:?}"
            );
            (padded - kernel[side]) / self.stride[side] + 1
        })
    }
}

/// A convolution; weight and bias are laid out as PyTorch stores them.
#[derive(Module, Debug)]
pub struct Convolution<B: Backend> {
    /// `[out, in, height, width]`
    pub weight: Param<Tensor<B, 4>>,
    /// `[out]`
    pub bias: Option<Param<Tensor<B, 1>>>,
    #[module(skip)]
    window: Window,
    /// Type of its products.
    #[module(skip)]
    pub compute: Compute,
}

impl<B: Backend> Convolution<B> {
    /// A convolution of zeros, with a bias, from `input` to `output` channels.
    pub fn zeros(
        input: usize,
        output: usize,
        kernel: [usize; 2],
        window: Window,
        device: &B::Device,
    ) -> Self {
        let weight = Tensor::zeros([output, input, kernel[0], kernel[1]], device);
        Self {
            weight: Param::from_tensor(weight),
            bias: Some(Param::from_tensor(Tensor::zeros([output], device))),
            window,
            compute: Compute::F32,
        }
    }

    /// The same convolution without a bias.
    #[must_use]
    pub fn without_bias(self) -> Self {
        Self { bias: None, ..self }
    }
}

impl<B: FusedOps> Convolution<B> {
    /// `[batch, in, height, width]` to `[batch, out, height', width']`, by [`Window::output`].
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let bias = self.bias.as_ref().map(Param::val);
        B::convolution(x, self.weight.val(), bias, self.window, self.compute)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{StateDict, assign, names};
    use burn_ndarray::NdArray;

    #[test]
    fn a_bias_is_a_parameter_where_there_is_one() {
        let device = Default::default();
        let named = |layer: &Convolution<NdArray>| -> Vec<String> {
            let names = names::<NdArray, _>(layer).into_iter();
            names.map(|parameter| parameter.name).collect()
        };
        let whole = Convolution::zeros(1, 1, [1; 2], Window::padded([0; 2]), &device);
        assert_eq!(named(&whole), ["weight", "bias"]);
        let mut state: StateDict = crate::state::collect::<NdArray, _>(&whole);
        for (array, value) in state.values_mut().zip([5.0, 2.0]) {
            array.data.fill(value); // bias, weight
        }
        let filled = assign(whole.clone(), &state, "".as_ref(), "a layer").unwrap();
        state.remove("bias");
        let bare = assign(whole.without_bias(), &state, "".as_ref(), "a layer").unwrap();
        assert_eq!(named(&bare), ["weight"]);
        let x = Tensor::ones([1, 1, 1, 1], &device);
        assert_eq!(filled.forward(x.clone()).into_scalar(), 7.0);
        assert_eq!(bare.forward(x).into_scalar(), 2.0);
    }

    #[test]
    fn the_size_of_what_comes_out() {
        // A 3 x 3 kernel with stride 2 on 299 values: (299 - 3) / 2 + 1 = 149.
        let window = Window::padded([0; 2]).every(2);
        assert_eq!(window.output([299, 300], [3, 3]), [149, 149]);
        let window = Window {
            after: [1; 2],
            ..window
        };
        assert_eq!(window.output([8, 7], [3, 3]), [4, 3]);
        assert_eq!(Window::padded([0, 3]).output([17, 17], [1, 7]), [17, 17]);
    }
}
