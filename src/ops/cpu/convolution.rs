//! Convolutions as matrix products: weights `[out, depth]` times the unfolded image
//! `[depth, places]`, where depth runs over input channels and kernel taps.
//!
//! The image is never unfolded as a whole. A task takes a band of places, unfolds as many rows of
//! it as a block of the product is deep, straight into panels, and adds their product to the
//! output. A thread needs [`DEPTH`] x [`BAND`] values, half a mebibyte, whatever the image's size;
//! of bf16 as many again for their pairs.
//! A 1 x 1 kernel with stride 1 unfolds nothing: the image's planes are the rows.

use std::ops::Range;

use burn::tensor::Tensor;
use burn_ndarray::NdArray;
use pulp::{Arch, Simd, WithSimd};

use super::bf16;
use super::memory::{Out, Scratch, Values, tensor};
use super::panels::{PanelView, panel_width};
use super::product::{BLOCK, Block, DEPTH, STRIDE, Start, block_of, size_of_pairs, words};
use super::simd::copy;
use super::threads;
use crate::backend::Compute;
use crate::ops::Window;

/// Most places of a band.
const BAND: usize = 512;
/// Fewest output channels per share: each share unfolds the band again.
const SHARE: usize = 32;

/// Sizes of a convolution.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) batch: usize,
    /// Channels of the image.
    pub(super) input: usize,
    /// Height and width of the image.
    pub(super) image: [usize; 2],
    /// Channels of the result.
    pub(super) output: usize,
    pub(super) kernel: [usize; 2],
    /// Height and width of the result.
    pub(super) result: [usize; 2],
    pub(super) window: Window,
}

impl Sizes {
    pub(super) fn of(x: [usize; 4], weight: [usize; 4], window: Window) -> Self {
        let [batch, input, height, width] = x;
        let [output, channels, kernel @ ..] = weight;
        assert_eq!(
            input, channels,
            "a convolution of {channels} channels was given {input}"
        );
        let image = [height, width];
        Self {
            batch,
            input,
            image,
            output,
            kernel,
            result: window.output(image, kernel),
            window,
        }
    }

    /// A 1 x 1 convolution without padding, at stride 1, as one on an image of a single row; any
    /// other unchanged.
    fn flat(self) -> Self {
        if self.kernel != [1; 2] || self.window != Window::padded([0; 2]) {
            return self;
        }
        let row = [1, self.places()];
        Self {
            image: row,
            result: row,
            ..self
        }
    }

    pub(super) fn places(&self) -> usize {
        self.result[0] * self.result[1]
    }

    pub(super) fn depth(&self) -> usize {
        self.input * self.kernel[0] * self.kernel[1]
    }

    /// Number of bands of an image and of shares of the output channels, so that every thread has
    /// work.
    fn division(&self) -> [usize; 2] {
        let threads = threads::count();
        let mut bands = self.places().div_ceil(BAND);
        let tasks = self.batch * bands;
        if !tasks.is_multiple_of(threads) && tasks < threads::PARTS * threads {
            let most = self.places().div_ceil(2 * panel_width());
            bands = bands.next_multiple_of(threads).min(most).max(bands);
        }
        let shares = threads
            .div_ceil(self.batch * bands)
            .min(self.output.div_ceil(SHARE));
        [bands, shares]
    }
}

/// See [`FusedOps::convolution`](crate::ops::FusedOps::convolution); `x` and `weight` have these
/// shapes.
pub(super) fn forward(
    (x, x_shape): (&Values, [usize; 4]),
    (weight, weight_shape): (&Values, [usize; 4]),
    bias: Option<&Values>,
    window: Window,
    compute: Compute,
) -> Tensor<NdArray, 4> {
    let sizes = Sizes::of(x_shape, weight_shape, window);
    let shape = [sizes.batch, sizes.output, sizes.result[0], sizes.result[1]];
    let sizes = sizes.flat();
    let (x, weight, bias) = (x.read(), weight.read(), bias.map(Values::read));
    let (places, depth) = (sizes.places(), sizes.depth());
    let image = sizes.input * sizes.image[0] * sizes.image[1];
    if shape.contains(&0) {
        // SAFETY: the result has no values.
        return unsafe { tensor(shape, |_| ()) };
    }
    let [bands, shares] = sizes.division();
    // Bands end where panels do.
    let band = places.div_ceil(bands).next_multiple_of(panel_width());
    let bands = places.div_ceil(band);
    let share = sizes.output.div_ceil(shares);
    let tasks = sizes.batch * bands * shares;
    let cost = sizes.batch * sizes.output * places * (depth / 8 + 1);
    // SAFETY: the bands and shares of all images cover the result, and each belongs to one task.
    unsafe {
        tensor(shape, |out| {
            threads::over(tasks, 1, cost, |range| {
                for task in range {
                    let (rest, index) = (task / shares, task % shares);
                    let channels = index * share..sizes.output.min((index + 1) * share);
                    let (sample, index) = (rest / bands, rest % bands);
                    let columns = index * band..places.min((index + 1) * band);
                    Arch::new().dispatch(Part {
                        sizes,
                        image: &x[sample * image..][..image],
                        weight,
                        bias,
                        compute,
                        out,
                        first: sample * sizes.output * places,
                        channels,
                        columns,
                    });
                }
            });
        })
    }
}

/// A share of the output channels at a band of places of one image.
struct Part<'a> {
    sizes: Sizes,
    /// `[in, height, width]`
    image: &'a [f32],
    /// `[out, depth]`
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    compute: Compute,
    /// The whole result.
    out: Out,
    /// Where the result of this image begins.
    first: usize,
    channels: Range<usize>,
    columns: Range<usize>,
}

impl WithSimd for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (places, depth) = (self.sizes.places(), self.sizes.depth());
        let count = self.columns.len();
        let width = 2 * S::F32_LANES;
        let compute = self.compute;
        let room = DEPTH * count.next_multiple_of(width);
        let (mut panels, mut scratch) = (Scratch::new(room), Scratch::new(BLOCK * STRIDE));
        let mut line = Scratch::new(count);
        let (panels, scratch, line) = (panels.values(), scratch.values(), line.values());
        let mut panel_pairs = Scratch::new(size_of_pairs(compute, room));
        let mut block_pairs = Scratch::new(size_of_pairs(compute, BLOCK * STRIDE));
        let (panel_pairs, block_pairs) = (panel_pairs.values(), block_pairs.values());
        let mut runs = Vec::new();
        let start = |channel: usize| self.first + channel * places + self.columns.start;
        for channel in self.channels.clone() {
            // SAFETY: only this task writes these places of this channel.
            let values = unsafe { self.out.part(start(channel), count) };
            values.fill(self.bias.map_or(0.0, |bias| bias[channel]));
        }
        for from in (0..depth).step_by(DEPTH) {
            let rows = from..depth.min(from + DEPTH);
            let deep = rows.len();
            unfold::<S>(
                &self.sizes,
                self.image,
                self.columns.clone(),
                rows.clone(),
                &mut runs,
                line,
                panels,
            );
            let sizes = [count.div_ceil(width), deep, width];
            let panels = panels_of(compute, sizes, panels, panel_pairs);
            for channel in self.channels.clone().step_by(BLOCK) {
                let high = BLOCK.min(self.channels.end - channel);
                let weights = self.weight[channel * depth..].chunks(depth).take(high);
                for (place, weights) in scratch.chunks_exact_mut(STRIDE).zip(weights) {
                    copy(&weights[rows.clone()], place);
                }
                let scratch = block_of::<false>(compute, high, deep, scratch, block_pairs);
                // SAFETY: scratch and panels are filled as far as they are read; the target's rows
                // are `places` apart, and only this task writes these places of them.
                unsafe {
                    Block::<false> {
                        rows: high,
                        deep: words(compute, deep),
                        scratch: scratch.as_ptr(),
                        panels: PanelView {
                            start: panels.as_ptr(),
                            depth: words(compute, deep),
                            values: deep,
                            columns: count,
                            compute,
                        },
                        from: 0,
                        columns: 0..count,
                        c: self.out.pointer().add(start(channel)),
                        stride: places,
                        start: Start::Sum,
                        ahead: None,
                    }
                    .multiply(simd);
                }
            }
        }
    }
}

/// Panels as tiles read them, from panels of f32, `count` of `deep` rows of `width`: those
/// themselves, or their pairs, in `pairs`.
#[inline(always)]
fn panels_of<'a>(
    compute: Compute,
    [count, deep, width]: [usize; 3],
    panels: &'a [f32],
    pairs: &'a mut [f32],
) -> &'a [f32] {
    if compute == Compute::F32 {
        return panels;
    }
    let places = pairs.chunks_exact_mut(width * words(compute, deep));
    let panels = panels.chunks_exact(width * deep).take(count);
    for (panel, place) in panels.zip(places) {
        for (rows, place) in panel.chunks(2 * width).zip(place.chunks_exact_mut(width)) {
            let (first, second) = rows.split_at(width);
            bf16::across(first, (!second.is_empty()).then_some(second), place);
        }
    }
    pairs
}

/// Consecutive places that read values of one row of a plane.
#[derive(Clone, Copy)]
struct Run {
    /// The first place, relative to the band.
    place: usize,
    /// Index in the plane of its value.
    source: usize,
    length: usize,
}

/// Writes `rows` of the unfolded image, for the places `columns`, into panels `rows.len()` deep.
#[inline(always)]
fn unfold<S: Simd>(
    sizes: &Sizes,
    image: &[f32],
    columns: Range<usize>,
    rows: Range<usize>,
    runs: &mut Vec<Run>,
    line: &mut [f32],
    panels: &mut [f32],
) {
    let width = 2 * S::F32_LANES;
    let (deep, taps) = (rows.len(), sizes.kernel[0] * sizes.kernel[1]);
    let plane = sizes.image[0] * sizes.image[1];
    let stride = sizes.window.stride[1];
    // By tap, not by row: the source offsets and the padding are the same for all channels.
    for tap in 0..taps {
        let bound = |row: usize| row.saturating_sub(tap).div_ceil(taps);
        let channels = bound(rows.start)..bound(rows.end);
        if channels.is_empty() {
            continue;
        }
        runs_of(sizes, tap, columns.clone(), runs);
        line.fill(0.0);
        for channel in channels {
            let plane = &image[channel * plane..][..plane];
            let values = match runs[..] {
                [run] if stride == 1 && run.length == line.len() => {
                    &plane[run.source..][..run.length]
                }
                _ => {
                    for run in runs.iter() {
                        let line = &mut line[run.place..][..run.length];
                        let source = &plane[run.source..];
                        if stride == 1 {
                            copy(&source[..run.length], line);
                        } else {
                            for (value, source) in
                                line.iter_mut().zip(source.iter().step_by(stride))
                            {
                                *value = *source;
                            }
                        }
                    }
                    &*line
                }
            };
            let row = channel * taps + tap - rows.start;
            for (panel, values) in values.chunks(width).enumerate() {
                copy(values, &mut panels[(panel * deep + row) * width..]);
            }
        }
    }
}

/// The runs of a kernel's tap; the places between them read padding.
#[inline(always)]
fn runs_of(sizes: &Sizes, tap: usize, columns: Range<usize>, runs: &mut Vec<Run>) {
    let Window { stride, before, .. } = sizes.window;
    let (down, along) = (tap / sizes.kernel[1], tap % sizes.kernel[1]);
    let [height, width] = sizes.image;
    let broad = sizes.result[1];
    runs.clear();
    let mut column = columns.start;
    while column < columns.end {
        let (y, x) = (column / broad, column % broad);
        let end = columns.end.min(column - x + broad);
        let row = (y * stride[0] + down).checked_sub(before[0]);
        if let Some(row) = row.filter(|row| *row < height) {
            // The places x for which `x stride + along - before` lies within the row.
            let within = |side: usize| (before[1] + side).saturating_sub(along).div_ceil(stride[1]);
            let from = within(0).max(x);
            let to = within(width).min(x + end - column);
            if from < to {
                runs.push(Run {
                    place: column - columns.start + from - x,
                    source: row * width + from * stride[1] + along - before[1],
                    length: to - from,
                });
            }
        }
        column = end;
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{agree, noise, rounded};
    use super::*;
    use crate::ops::{FusedOps, reference};

    #[test]
    fn convolutions_agree_with_the_reference() {
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
            ([2, 70, 9, 9], 33, [1, 1], valid), // slightly more than one panel
            ([1, 3, 5, 7], 4, [1, 1], valid.every(2)),
            ([1, 2, 4, 5], 3, [1, 1], same([3, 3])), // the border is the bias alone
            ([2, 5, 8, 8], 7, [3, 3], same([3, 3])),
            ([1, 5, 11, 13], 7, [3, 3], valid),
            ([3, 5, 11, 13], 7, [3, 3], valid.every(2)),
            ([1, 30, 6, 9], 180, [3, 3], same([3, 3])), // two blocks deep, two high
            (
                [2, 4, 8, 6],
                6,
                [3, 3],
                Window {
                    after: [1; 2],
                    ..valid.every(2)
                },
            ),
            (
                [1, 4, 7, 9],
                6,
                [3, 3],
                Window {
                    after: [1; 2],
                    ..valid.every(2)
                },
            ),
            ([1, 3, 9, 8], 5, [3, 3], lopsided),
            ([1, 3, 35, 35], 5, [5, 5], same([5, 5])), // several bands, which end within a row
            ([2, 40, 17, 17], 9, [1, 7], same([1, 7])),
            ([2, 40, 17, 17], 9, [7, 1], same([7, 1])),
            ([1, 3, 3, 2], 4, [5, 5], same([5, 5])), // the image is smaller than the kernel
            ([1, 3, 41, 43], 8, [3, 3], same([3, 3]).every(2)),
            ([0, 3, 4, 4], 2, [3, 3], same([3, 3])),
        ];
        for (shape, output, kernel, window) in cases {
            let [_, input, ..] = shape;
            let x = noise::<NdArray, 4>(0, shape);
            let weight = noise(1, [output, input, kernel[0], kernel[1]]);
            for bias in [None, Some(noise(2, [output]))] {
                let what = format!(
                    "{shape:?} to {output} by {kernel:?}, {window:?}, {}",
                    bias.is_some()
                );
                let fast = NdArray::convolution(
                    x.clone(),
                    weight.clone(),
                    bias.clone(),
                    window,
                    Compute::F32,
                );
                let [_, channels, sides @ ..] = fast.dims();
                assert_eq!(
                    (channels, sides),
                    (output, window.output([shape[2], shape[3]], kernel))
                );
                if shape[0] == 0 {
                    continue; // Burn's own convolution refuses these
                }
                let exact =
                    reference::convolution(x.clone(), weight.clone(), bias, window, Compute::F32);
                agree(&what, input * kernel[0] * kernel[1], fast, exact);
            }
        }
        // Of bf16: factors are rounded, sums and the bias are not.
        for (shape, output, kernel) in [
            ([2, 5, 8, 8], 7, [3, 3]),
            ([1, 31, 6, 9], 180, [3, 3]), // an odd depth, in two blocks
            ([1, 3, 35, 35], 5, [5, 5]),
        ] {
            let [_, input, ..] = shape;
            let window = same(kernel);
            let x = noise::<NdArray, 4>(0, shape);
            let weight = noise(1, [output, input, kernel[0], kernel[1]]);
            let bias = Some(noise(2, [output]));
            let of =
                |x, weight, bias, compute| NdArray::convolution(x, weight, bias, window, compute);
            let fast = of(x.clone(), weight.clone(), bias.clone(), Compute::Bf16);
            let (x, weight) = (rounded(x), rounded(weight));
            let exact = reference::convolution(x, weight, bias, window, Compute::F32);
            agree("bf16", input * kernel[0] * kernel[1], fast, exact);
        }
        // Rows and planes that are not contiguous.
        let x = noise::<NdArray, 4>(0, [6, 5, 2, 3]).permute([2, 3, 0, 1]);
        let weight = noise::<NdArray, 4>(1, [3, 3, 3, 4]).permute([3, 2, 1, 0]);
        let fast =
            NdArray::convolution(x.clone(), weight.clone(), None, same([3, 3]), Compute::F32);
        let exact = reference::convolution(x, weight, None, same([3, 3]), Compute::F32);
        agree("permuted", 27, fast, exact);
    }
}
