//! Gradients of convolutions: that of the weight as a linear layer's on the unfolded image, that of
//! the image at stride 1 as a convolution of its own, which unfolds nothing as a whole.
//!
//! For each place of the result, the values under its kernel are a row of `[places, depth]`, where
//! depth runs over the kernel's taps and then the channels. Channels come last, so a kernel's row
//! of taps is one contiguous run of the image. At other strides the gradient of the rows is added
//! back at the same positions. A few images are unfolded at a time.

use std::ops::Range;

use burn::tensor::Tensor;
use burn_ndarray::NdArray;

use super::convolution::{self, Sizes};
use super::memory::{Out, Values, tensor};
use super::simd::copy;
use super::threads;
use super::transpose::{self, transposed};
use crate::backend::Compute;
use crate::ops::{Activation, ConvolutionGradients, FusedOps, LinearWants, LinearWeights, Window};

/// Most values unfolded at once: 16 MiB, memory that an allocator keeps and uses again.
const UNFOLDED: usize = 1 << 22;

/// See [`FusedOps::convolution_backward`]; all are f32.
pub(super) fn backward(
    gradient: Tensor<NdArray, 4>,
    x: Tensor<NdArray, 4>,
    weight: Tensor<NdArray, 4>,
    window: Window,
    compute: Compute,
    wants_x: bool,
) -> ConvolutionGradients<NdArray> {
    let (shape, kernel) = (x.dims(), weight.dims());
    let sizes = Sizes::of(shape, kernel, window);
    let (places, depth) = (sizes.places(), sizes.depth());
    let device = x.device();
    let of = |x: Tensor<NdArray, 4>| Values::of(x).expect("all are f32");
    let [gradient, x, weight] = [gradient, x, weight].map(of);
    let by_convolution = match mirrored(window, sizes.kernel) {
        Some(window) if wants_x => {
            let turned = transpose::mirrored(weight.read(), kernel);
            let turned_shape = turned.dims();
            let weight = (&of(turned), turned_shape);
            let shape = [sizes.batch, sizes.output, sizes.result[0], sizes.result[1]];
            Some(convolution::forward(
                (&gradient, shape),
                weight,
                None,
                window,
                compute,
            ))
        }
        _ => None,
    };
    let by_rows = wants_x && by_convolution.is_none();
    let (taps, pixels) = (
        sizes.kernel[0] * sizes.kernel[1],
        sizes.image[0] * sizes.image[1],
    );
    let by_taps = [sizes.output, sizes.input, taps];
    let weights = LinearWeights {
        weight: match by_rows {
            true => transposed(weight.read(), by_taps, [sizes.output, depth]),
            // Its shape alone is asked for.
            false => super::reshaped(weight.into_tensor::<4>(), [sizes.output, depth]),
        },
        bias: Tensor::zeros([sizes.output], &device),
        lora: None,
        compute,
    };
    let wants = LinearWants {
        x: by_rows,
        weight: true,
        bias: true,
        lora: false,
    };
    let rows: Tensor<NdArray, 2> = transposed(
        gradient.read(),
        [sizes.batch, sizes.output, places],
        [sizes.batch * places, sizes.output],
    );
    let by_pixels = [sizes.batch, sizes.input, pixels];
    let image = sizes.input * pixels;
    let pixels = of(transposed(
        x.read(),
        by_pixels,
        [sizes.batch, sizes.image[0], sizes.image[1], sizes.input],
    ));
    let mut dx = vec![0.0; if by_rows { sizes.batch * image } else { 0 }];
    let mut sums: Option<(Tensor<NdArray, 2>, Tensor<NdArray, 1>)> = None;
    let at_once = (UNFOLDED / (places * depth).max(1)).clamp(1, sizes.batch.max(1));
    for first in (0..sizes.batch).step_by(at_once) {
        let count = at_once.min(sizes.batch - first);
        let values = places * depth;
        // SAFETY: each row is written, by one task.
        let unfolded = unsafe {
            tensor([count * places, depth], |out| {
                threads::over(count * places, 1, count * values, |rows| {
                    for row in rows {
                        let (sample, place) = (row / places, row % places);
                        let image = &pixels.read()[(first + sample) * image..][..image];
                        // SAFETY: only this task writes this row.
                        unfold(&sizes, image, place, out.part(row * depth, depth));
                    }
                });
            })
        };
        let part = first * places..(first + count) * places;
        let gradient = rows.clone().slice([part, 0..sizes.output]);
        let gradients = NdArray::linear_layer_backward(
            gradient,
            unfolded,
            weights.clone(),
            Activation::Identity,
            wants,
        );
        if let Some(folded) = gradients.x.and_then(Values::of) {
            let out = Out::of(&mut dx);
            threads::over(count, 1, count * values, |samples| {
                for sample in samples {
                    let rows = &folded.read()[sample * values..][..values];
                    // SAFETY: only this task writes this image, and `dx` outlives the tasks.
                    let image = unsafe { out.part((first + sample) * image, image) };
                    fold(&sizes, rows, image);
                }
            });
        }
        if let (Some(weight), Some(bias)) = (gradients.weight, gradients.bias) {
            sums = Some(match sums {
                None => (weight, bias),
                Some((weights, biases)) => (weights + weight, biases + bias),
            });
        }
    }
    let (dweight, dbias) = sums.unwrap_or_else(|| {
        let weight = Tensor::zeros([sizes.output, depth], &device);
        (weight, Tensor::zeros([sizes.output], &device))
    });
    // Channels before taps and places again.
    let dweight = Values::of(dweight).expect("a product of f32");
    let from_rows = || transposed(&dx, [sizes.batch, image / sizes.input, sizes.input], shape);
    ConvolutionGradients {
        x: by_convolution.or_else(|| by_rows.then(from_rows)),
        weight: transposed(dweight.read(), [sizes.output, taps, sizes.input], kernel),
        bias: dbias,
    }
}

/// The window of the convolution of the gradient by which that of the image is found, its kernel
/// mirrored; None where there is none.
fn mirrored(window: Window, kernel: [usize; 2]) -> Option<Window> {
    let rest = |padding: [usize; 2]| -> Option<[usize; 2]> {
        let [down, along] = kernel;
        Some([
            (down - 1).checked_sub(padding[0])?,
            (along - 1).checked_sub(padding[1])?,
        ])
    };
    (window.stride == [1; 2]).then_some(())?;
    Some(Window {
        stride: [1; 2],
        before: rest(window.before)?,
        after: rest(window.after)?,
    })
}

/// For a place and a kernel row: which taps lie within the image, and where the first of them
/// reads.
fn taps(sizes: &Sizes, place: usize, down: usize) -> (Range<usize>, usize) {
    let Window { stride, before, .. } = sizes.window;
    let [height, width] = sizes.image;
    let (y, x) = (place / sizes.result[1], place % sizes.result[1]);
    let row = (y * stride[0] + down).checked_sub(before[0]);
    let Some(row) = row.filter(|row| *row < height) else {
        return (0..0, 0);
    };
    let left = x * stride[1];
    let from = before[1].saturating_sub(left);
    let to = (width + before[1])
        .saturating_sub(left)
        .min(sizes.kernel[1]);
    if from >= to {
        return (0..0, 0);
    }
    (
        from..to,
        (row * width + left + from - before[1]) * sizes.input,
    )
}

/// `image` is `[height, width, in]`; `row`, of a place, `[kernel height, kernel width, in]`.
fn unfold(sizes: &Sizes, image: &[f32], place: usize, row: &mut [f32]) {
    let along = sizes.kernel[1] * sizes.input;
    for (down, values) in row.chunks_exact_mut(along).enumerate() {
        let (taps, source) = taps(sizes, place, down);
        let (from, to) = (taps.start * sizes.input, taps.end * sizes.input);
        values[..from].fill(0.0);
        copy(&image[source..source + to - from], &mut values[from..to]);
        values[to..].fill(0.0);
    }
}

/// Adds rows back to the image they were unfolded from.
fn fold(sizes: &Sizes, rows: &[f32], image: &mut [f32]) {
    let along = sizes.kernel[1] * sizes.input;
    for (place, row) in rows.chunks_exact(sizes.depth()).enumerate() {
        for (down, values) in row.chunks_exact(along).enumerate() {
            let (taps, source) = taps(sizes, place, down);
            let values = &values[taps.start * sizes.input..taps.end * sizes.input];
            for (sum, value) in image[source..].iter_mut().zip(values) {
                *sum += value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;

    use super::super::tests::{agree, noise, rounded};
    use super::*;
    use crate::ops::reference;

    type Graph = Autodiff<NdArray>;

    /// The node's gradients of x, weight and bias against those of Burn's own convolution.
    #[test]
    fn a_node_gives_the_gradients_that_burn_gives() {
        let window = Window::padded([1; 2]).every(2);
        let x = noise::<Graph, 4>(0, [2, 3, 7, 8]).require_grad();
        let weight = noise::<Graph, 4>(1, [5, 3, 3, 3]).require_grad();
        let bias = noise::<Graph, 1>(2, [5]).require_grad();
        type Convolve = fn(
            Tensor<Graph, 4>,
            Tensor<Graph, 4>,
            Option<Tensor<Graph, 1>>,
            Window,
            Compute,
        ) -> Tensor<Graph, 4>;
        let gradients = |convolve: Convolve, bias: Option<&Tensor<Graph, 1>>| {
            let y = convolve(
                x.clone(),
                weight.clone(),
                bias.cloned(),
                window,
                Compute::F32,
            );
            let shape = y.dims();
            let gradients = (y * noise(3, shape)).sum().backward();
            let of_bias = bias.map(|bias| bias.grad(&gradients).unwrap());
            (
                x.grad(&gradients).unwrap(),
                weight.grad(&gradients).unwrap(),
                of_bias,
            )
        };
        for bias in [None, Some(&bias)] {
            let fast = gradients(Graph::convolution, bias);
            let exact = gradients(reference::convolution, bias);
            agree("x", 45, fast.0, exact.0);
            agree("weight", 32, fast.1, exact.1);
            match (fast.2, exact.2) {
                (Some(fast), Some(exact)) => agree("bias", 32, fast, exact),
                (fast, exact) => assert!(fast.is_none() && exact.is_none()),
            }
        }
        // A gradient that nobody requires is not computed.
        let picture = noise::<Graph, 4>(0, [2, 3, 7, 8]);
        let y = Graph::convolution(picture.clone(), weight.clone(), None, window, Compute::F32);
        let gradients = y.sum().backward();
        assert!(picture.grad(&gradients).is_none() && weight.grad(&gradients).is_some());
    }

    #[test]
    fn gradients_agree_with_the_reference() {
        let same = |kernel: [usize; 2]| Window::padded(kernel.map(|side| side / 2));
        let valid = Window::padded([0; 2]);
        let lopsided = Window {
            stride: [2, 1],
            before: [0, 3],
            after: [1, 2],
        };
        // [batch, in, height, width], out, kernel, window
        let cases = [
            ([1, 1, 1, 1], 1, [1, 1], valid),
            ([2, 3, 5, 7], 4, [1, 1], valid),
            ([3, 2, 4, 5], 3, [3, 3], same([3, 3])),
            ([2, 3, 6, 5], 4, [3, 3], valid),
            ([2, 3, 4, 5], 4, [3, 2], lopsided.every(1)), // more padding than taps
            ([2, 5, 8, 8], 7, [3, 3], same([3, 3]).every(2)),
            ([2, 5, 7, 9], 7, [3, 3], same([3, 3]).every(2)), // fewer taps reach the last row
            ([3, 5, 11, 13], 7, [3, 3], valid.every(2)),
            ([1, 3, 9, 8], 5, [3, 3], lopsided),
            ([2, 4, 6, 17], 3, [1, 7], same([1, 7])),
            ([1, 3, 3, 2], 4, [5, 5], same([5, 5])), // the image is smaller than the kernel
        ];
        for (shape, output, kernel, window) in cases {
            let [batch, input, height, width] = shape;
            let x = noise::<NdArray, 4>(0, shape);
            let weight = noise(1, [output, input, kernel[0], kernel[1]]);
            let [rows, columns] = window.output([height, width], kernel);
            let gradient = noise(2, [batch, output, rows, columns]);
            let what = format!("{shape:?} to {output} by {kernel:?}, {window:?}");
            let of = |wants_x| {
                let (gradient, x, weight) = (gradient.clone(), x.clone(), weight.clone());
                backward(gradient, x, weight, window, Compute::F32, wants_x)
            };
            let fast = of(true);
            let exact = reference::convolution_backward(
                gradient.clone(),
                x.clone(),
                weight.clone(),
                window,
                Compute::F32,
                true,
            );
            let (places, taps) = (batch * rows * columns, kernel[0] * kernel[1]);
            agree(&what, places, fast.weight, exact.weight);
            agree(&what, places, fast.bias, exact.bias);
            agree(&what, output * taps, fast.x.unwrap(), exact.x.unwrap());
            assert!(of(false).x.is_none());
            let with =
                |gradient, x, weight, compute| backward(gradient, x, weight, window, compute, true);
            let (g, w) = (gradient.clone(), weight.clone());
            let fast = with(g, x.clone(), w, Compute::Bf16);
            let [g, x, w] = [gradient.clone(), x.clone(), weight.clone()].map(rounded);
            let exact = with(g, x, w, Compute::F32);
            agree(&what, output * taps, fast.x.unwrap(), exact.x.unwrap());
            agree(&what, places, fast.weight, exact.weight);
        }
    }
}
