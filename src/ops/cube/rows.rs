//! Kernels in which a cube goes through a row: normalisation, softmax, sums of squares.
//!
//! Sums are formed in a tree in shared memory, which every GPU has, in an order that depends on
//! the sizes alone.

use burn::tensor::TensorMetadata;
use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl::{self, prelude::*};
use burn_cubecl::tensor::CubeTensor;

use super::super::{Activation, GroupNormOptions};
use super::elementwise::{activated, target};
use super::launch::{cubes, empty, units, vector};

/// The sum of the cube's values, for each of its units.
#[cube]
pub(super) fn total(value: f32, scratch: &mut SharedMemory<f32>, #[comptime] units: u32) -> f32 {
    let unit = UNIT_POS as usize;
    scratch[unit] = value;
    sync_cube();
    #[unroll]
    for step in 0..comptime!(units.ilog2()) {
        let half = comptime!(units as usize >> (step + 1));
        if unit < half {
            scratch[unit] = scratch[unit] + scratch[unit + half];
        }
        sync_cube();
    }
    let sum = scratch[0];
    // Before anyone writes the next sum's values.
    sync_cube();
    sum
}

/// The largest of the cube's values, for each of its units.
#[cube]
fn largest(value: f32, scratch: &mut SharedMemory<f32>, #[comptime] units: u32) -> f32 {
    let unit = UNIT_POS as usize;
    scratch[unit] = value;
    sync_cube();
    #[unroll]
    for step in 0..comptime!(units.ilog2()) {
        let half = comptime!(units as usize >> (step + 1));
        if unit < half {
            scratch[unit] = max(scratch[unit], scratch[unit + half]);
        }
        sync_cube();
    }
    let most = scratch[0];
    sync_cube();
    most
}

/// The sum of a vector.
#[cube]
pub(super) fn sum_of<N: Size>(x: Vector<f32, N>) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for part in 0..N::value() {
        sum += x[part];
    }
    sum
}

/// Mean of a row's values, and 1 / their standard deviation. The variance is the mean of squares of
/// the centred values, so that a large mean costs no precision.
#[cube]
fn moments<N: Size>(
    x: &Tensor<Vector<f32, N>>,
    start: usize,
    width: usize,
    epsilon: f32,
    scratch: &mut SharedMemory<f32>,
    #[comptime] units: u32,
) -> (f32, f32) {
    let count = f32::cast_from(width * N::value());
    let mut sum = Vector::new(0.0);
    let mut column = UNIT_POS as usize;
    while column < width {
        sum += x[start + column];
        column += comptime!(units as usize);
    }
    let mean = total(sum_of::<N>(sum), scratch, units) / count;

    let mut squares = Vector::new(0.0);
    let mut column = UNIT_POS as usize;
    while column < width {
        let centred = x[start + column] - Vector::new(mean);
        squares += centred * centred;
        column += comptime!(units as usize);
    }
    let variance = total(sum_of::<N>(squares), scratch, units) / count;
    (mean, 1.0 / (variance + epsilon).sqrt())
}

#[cube(launch_unchecked)]
fn modulated_norm_kernel<N: Size>(
    x: &Tensor<Vector<f32, N>>,
    shift: &Tensor<Vector<f32, N>>,
    scale: &Tensor<Vector<f32, N>>,
    out: &mut Tensor<Vector<f32, N>>,
    rows: usize,
    tokens: usize,
    width: usize,
    shift_pitch: usize,
    scale_pitch: usize,
    epsilon: f32,
    #[comptime] units: u32,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let mut scratch = SharedMemory::<f32>::new(comptime!(units as usize));
    let start = row * width;
    let (mean, inverse) = moments::<N>(x, start, width, epsilon, &mut scratch, units);
    let sample = row / tokens;
    let mut column = UNIT_POS as usize;
    while column < width {
        let normal = (x[start + column] - Vector::new(mean)) * Vector::new(inverse);
        let factor = scale[sample * scale_pitch + column] + Vector::new(1.0);
        out[start + column] = normal * factor + shift[sample * shift_pitch + column];
        column += comptime!(units as usize);
    }
}

/// `(1 + scale) norm(x) + shift`; the rows of shift and scale lie some values apart.
pub(super) fn modulated_norm<R: CubeRuntime>(
    x: CubeTensor<R>,
    (shift, shift_pitch): (CubeTensor<R>, usize),
    (scale, scale_pitch): (CubeTensor<R>, usize),
    epsilon: f64,
) -> CubeTensor<R> {
    let client = x.client.clone();
    let [batch, tokens, width] = x.shape().dims();
    let size = vector(&[width, shift_pitch, scale_pitch]);
    let units = units(width / size);
    let (count, dim) = cubes(&client, batch * tokens, CubeDim::new_1d(units));
    let (out, written) = target(&x, 0);
    let [x, shift, scale] = [x, shift, scale].map(CubeTensor::into_tensor_arg);
    // SAFETY: no cube goes past the rows of x and the result, no unit past their width; shift and
    // scale have a row for each sample.
    unsafe {
        modulated_norm_kernel::launch_unchecked::<R>(
            &client,
            count,
            dim,
            size,
            x,
            shift,
            scale,
            written,
            batch * tokens,
            tokens,
            width / size,
            shift_pitch / size,
            scale_pitch / size,
            epsilon as f32,
            units,
        );
    }
    out
}

#[cube(launch_unchecked)]
fn modulated_norm_backward_kernel<N: Size>(
    gradient: &Tensor<Vector<f32, N>>,
    x: &Tensor<Vector<f32, N>>,
    scale: &Tensor<Vector<f32, N>>,
    sum: &Tensor<Vector<f32, N>>,
    out: &mut Tensor<Vector<f32, N>>,
    statistics: &mut Tensor<f32>,
    rows: usize,
    tokens: usize,
    width: usize,
    scale_pitch: usize,
    epsilon: f32,
    #[comptime] summed: bool,
    #[comptime] units: u32,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let mut scratch = SharedMemory::<f32>::new(comptime!(units as usize));
    let start = row * width;
    let (mean, inverse) = moments::<N>(x, start, width, epsilon, &mut scratch, units);
    let sample = row / tokens * scale_pitch;

    let mut inner = Vector::new(0.0);
    let mut projected = Vector::new(0.0);
    let mut column = UNIT_POS as usize;
    while column < width {
        let normal = (x[start + column] - Vector::new(mean)) * Vector::new(inverse);
        let gradient = gradient[start + column] * (scale[sample + column] + Vector::new(1.0));
        inner += gradient;
        projected += gradient * normal;
        column += comptime!(units as usize);
    }
    let count = f32::cast_from(width * N::value());
    let inner = total(sum_of::<N>(inner), &mut scratch, units) / count;
    let projected = total(sum_of::<N>(projected), &mut scratch, units) / count;

    let mut column = UNIT_POS as usize;
    while column < width {
        let normal = (x[start + column] - Vector::new(mean)) * Vector::new(inverse);
        let gradient = gradient[start + column] * (scale[sample + column] + Vector::new(1.0));
        let centred = gradient - Vector::new(inner) - normal * Vector::new(projected);
        let mut slope = centred * Vector::new(inverse);
        if comptime!(summed) {
            slope += sum[start + column];
        }
        out[start + column] = slope;
        column += comptime!(units as usize);
    }
    if UNIT_POS == 0 {
        statistics[2 * row] = mean;
        statistics[2 * row + 1] = inverse;
    }
}

/// The gradient of a modulated norm's input, added to `sum`, and mean and 1 / deviation of each
/// row.
pub(super) fn modulated_norm_backward<R: CubeRuntime>(
    gradient: CubeTensor<R>,
    x: CubeTensor<R>,
    (scale, pitch): (CubeTensor<R>, usize),
    epsilon: f64,
    sum: Option<CubeTensor<R>>,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let client = x.client.clone();
    let [batch, tokens, width] = x.shape().dims();
    let size = vector(&[width, pitch]);
    let units = units(width / size);
    let (count, dim) = cubes(&client, batch * tokens, CubeDim::new_1d(units));
    let summed = sum.is_some();
    // Without a sum its place is taken by a tensor that is not read.
    let sum = sum.unwrap_or_else(|| gradient.clone());
    let (out, written) = target(&sum, 3);
    let statistics = empty(&x, [batch * tokens, 2]);
    let [gradient, x, scale, sum] = [gradient, x, scale, sum].map(CubeTensor::into_tensor_arg);
    // SAFETY: no cube goes past the rows of gradient, x, sum and results, no unit past their width;
    // the scale has a row for each sample, the statistics two values for each row.
    unsafe {
        modulated_norm_backward_kernel::launch_unchecked::<R>(
            &client,
            count,
            dim,
            size,
            gradient,
            x,
            scale,
            sum,
            written,
            statistics.clone().into_tensor_arg(),
            batch * tokens,
            tokens,
            width / size,
            pitch / size,
            epsilon as f32,
            summed,
            units,
        );
    }
    (out, statistics)
}

#[cube(launch_unchecked)]
fn softmax_kernel<N: Size>(
    x: &Tensor<Vector<f32, N>>,
    out: &mut Tensor<Vector<f32, N>>,
    rows: usize,
    width: usize,
    #[comptime] units: u32,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let mut scratch = SharedMemory::<f32>::new(comptime!(units as usize));
    let start = row * width;
    let mut most = Vector::new(f32::min_value());
    let mut column = UNIT_POS as usize;
    while column < width {
        most = max(most, x[start + column]);
        column += comptime!(units as usize);
    }
    let mut of_unit = f32::min_value();
    #[unroll]
    for part in 0..N::value() {
        of_unit = max(of_unit, most[part]);
    }
    let most = largest(of_unit, &mut scratch, units);

    let mut sum = Vector::new(0.0);
    let mut column = UNIT_POS as usize;
    while column < width {
        sum += (x[start + column] - Vector::new(most)).exp();
        column += comptime!(units as usize);
    }
    let sum = total(sum_of::<N>(sum), &mut scratch, units);

    let mut column = UNIT_POS as usize;
    while column < width {
        out[start + column] = (x[start + column] - Vector::new(most)).exp() / Vector::new(sum);
        column += comptime!(units as usize);
    }
}

/// Softmax over the last dimension.
pub(super) fn softmax<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    let client = x.client.clone();
    let shape = x.shape();
    let width = shape[shape.num_dims() - 1];
    let rows = x.meta.num_elements() / width.max(1);
    let size = vector(&[width]);
    let units = units(width / size);
    let (count, dim) = cubes(&client, rows, CubeDim::new_1d(units));
    let (out, written) = target(&x, 0);
    let x = x.into_tensor_arg();
    // SAFETY: no cube goes past the rows of x and the result, no unit past their width.
    unsafe {
        let width = width / size;
        softmax_kernel::launch_unchecked::<R>(
            &client, count, dim, size, x, written, rows, width, units,
        );
    }
    out
}

#[cube(launch_unchecked)]
fn softmax_backward_kernel<N: Size>(
    gradient: &Tensor<Vector<f32, N>>,
    y: &Tensor<Vector<f32, N>>,
    out: &mut Tensor<Vector<f32, N>>,
    rows: usize,
    width: usize,
    #[comptime] units: u32,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let mut scratch = SharedMemory::<f32>::new(comptime!(units as usize));
    let start = row * width;
    let mut mean = Vector::new(0.0);
    let mut column = UNIT_POS as usize;
    while column < width {
        mean += gradient[start + column] * y[start + column];
        column += comptime!(units as usize);
    }
    let mean = total(sum_of::<N>(mean), &mut scratch, units);
    let mut column = UNIT_POS as usize;
    while column < width {
        out[start + column] = y[start + column] * (gradient[start + column] - Vector::new(mean));
        column += comptime!(units as usize);
    }
}

/// The gradient of a softmax over the last dimension, whose result is `y`.
pub(super) fn softmax_backward<R: CubeRuntime>(
    gradient: CubeTensor<R>,
    y: CubeTensor<R>,
) -> CubeTensor<R> {
    let client = y.client.clone();
    let shape = y.shape();
    let width = shape[shape.num_dims() - 1];
    let rows = y.meta.num_elements() / width.max(1);
    let size = vector(&[width]);
    let units = units(width / size);
    let (count, dim) = cubes(&client, rows, CubeDim::new_1d(units));
    let (out, written) = target(&gradient, 0);
    let (gradient, y) = (gradient.into_tensor_arg(), y.into_tensor_arg());
    // SAFETY: no cube goes past the rows of all tensors, no unit past their width.
    unsafe {
        let width = width / size;
        softmax_backward_kernel::launch_unchecked::<R>(
            &client, count, dim, size, gradient, y, written, rows, width, units,
        );
    }
    out
}

#[cube(launch_unchecked)]
fn group_norm_kernel<N: Size>(
    x: &Tensor<Vector<f32, N>>,
    scale: &Tensor<f32>,
    shift: &Tensor<f32>,
    out: &mut Tensor<Vector<f32, N>>,
    rows: usize,
    groups: usize,
    channels: usize,
    plane: usize,
    epsilon: f32,
    #[comptime] activation: Activation,
    #[comptime] units: u32,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let mut scratch = SharedMemory::<f32>::new(comptime!(units as usize));
    let width = channels * plane;
    let start = row * width;
    let (mean, inverse) = moments::<N>(x, start, width, epsilon, &mut scratch, units);
    let first = row % groups * channels;
    let mut place = UNIT_POS as usize;
    while place < width {
        let normal = (x[start + place] - Vector::new(mean)) * Vector::new(inverse);
        let channel = first + place / plane;
        let scaled = normal * Vector::new(scale[channel]) + Vector::new(shift[channel]);
        out[start + place] = activated::<N>(scaled, activation);
        place += comptime!(units as usize);
    }
}

/// Group normalisation of `[batch, channels, height, width]`, scaled and shifted by channel, with
/// an activation.
pub(super) fn group_norm<R: CubeRuntime>(
    x: CubeTensor<R>,
    scale: CubeTensor<R>,
    shift: CubeTensor<R>,
    norm: GroupNormOptions,
) -> CubeTensor<R> {
    let client = x.client.clone();
    let [batch, channels, height, width] = x.shape().dims();
    let (channels, plane) = (channels / norm.groups, height * width);
    let size = vector(&[plane]);
    let units = units(channels * plane / size);
    let (count, dim) = cubes(&client, batch * norm.groups, CubeDim::new_1d(units));
    let (out, written) = target(&x, 0);
    let [x, scale, shift] = [x, scale, shift].map(CubeTensor::into_tensor_arg);
    // SAFETY: no cube goes past the groups of x and the result, no unit past a group; scale and
    // shift have a value for each channel.
    unsafe {
        group_norm_kernel::launch_unchecked::<R>(
            &client,
            count,
            dim,
            size,
            x,
            scale,
            shift,
            written,
            batch * norm.groups,
            norm.groups,
            channels,
            plane / size,
            norm.epsilon as f32,
            norm.activation,
            units,
        );
    }
    out
}

#[cube(launch_unchecked)]
fn squares_kernel<N: Size>(
    x: &Tensor<Vector<f32, N>>,
    out: &mut Tensor<f32>,
    count: usize,
    parts: usize,
    #[comptime] units: u32,
) {
    let part = CUBE_POS;
    if part >= parts {
        terminate!();
    }
    let mut scratch = SharedMemory::<f32>::new(comptime!(units as usize));
    let mut sum = Vector::new(0.0);
    let mut place = part * comptime!(units as usize) + UNIT_POS as usize;
    while place < count {
        sum += x[place] * x[place];
        place += parts * comptime!(units as usize);
    }
    let sum = total(sum_of::<N>(sum), &mut scratch, units);
    if UNIT_POS == 0 {
        out[part] = sum;
    }
}

/// Sums of squares whose sum is that of all values of `x`.
pub(super) fn squares<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    /// Vectors that a unit sums at least, and most sums.
    const OF_A_UNIT: usize = 8;
    const MOST: usize = 1024;
    let client = x.client.clone();
    let size = vector(&[x.meta.num_elements()]);
    let count = x.meta.num_elements() / size;
    let units = units(count.div_ceil(OF_A_UNIT));
    let parts = count.div_ceil(OF_A_UNIT * units as usize).clamp(1, MOST);
    let out = empty(&x, [parts]);
    let (cubes, dim) = cubes(&client, parts, CubeDim::new_1d(units));
    let (x, written) = (x.into_tensor_arg(), out.clone().into_tensor_arg());
    // SAFETY: no unit goes past `count` vectors of x, no cube past the parts.
    unsafe {
        squares_kernel::launch_unchecked::<R>(
            &client, cubes, dim, size, x, written, count, parts, units,
        );
    }
    out
}

#[cube(launch_unchecked)]
fn blend_backward_kernel<N: Size>(
    gradient: &Tensor<Vector<f32, N>>,
    x: &Tensor<Vector<f32, N>>,
    y: &Tensor<Vector<f32, N>>,
    share: &Tensor<f32>,
    of_x: &mut Tensor<Vector<f32, N>>,
    of_y: &mut Tensor<Vector<f32, N>>,
    of_share: &mut Tensor<f32>,
    of_sample: usize,
    parts: usize,
    cubes: usize,
    #[comptime] units: u32,
) {
    let cube = CUBE_POS;
    if cube >= cubes {
        terminate!();
    }
    let mut scratch = SharedMemory::<f32>::new(comptime!(units as usize));
    let sample = cube / parts;
    let share = share[sample];
    let start = sample * of_sample;
    let mut sum = Vector::new(0.0);
    let mut place = cube % parts * comptime!(units as usize) + UNIT_POS as usize;
    while place < of_sample {
        let gradient = gradient[start + place];
        sum += gradient * (y[start + place] - x[start + place]);
        of_x[start + place] = gradient * Vector::new(1.0 - share);
        of_y[start + place] = gradient * Vector::new(share);
        place += parts * comptime!(units as usize);
    }
    let sum = total(sum_of::<N>(sum), &mut scratch, units);
    if UNIT_POS == 0 {
        of_share[cube] = sum;
    }
}

/// Gradients of a blend for `x`, `y` and the shares; the last as sums, `[batch, parts]`, to be
/// summed.
pub(super) fn blend_backward<R: CubeRuntime>(
    gradient: CubeTensor<R>,
    x: CubeTensor<R>,
    y: CubeTensor<R>,
    share: CubeTensor<R>,
) -> [CubeTensor<R>; 3] {
    /// Vectors that a unit goes through at least.
    const OF_A_UNIT: usize = 8;
    let client = x.client.clone();
    let [batch, tokens, width] = x.shape().dims();
    let size = vector(&[tokens * width]);
    let of_sample = tokens * width / size;
    let units = units(of_sample.div_ceil(OF_A_UNIT));
    let parts = of_sample.div_ceil(OF_A_UNIT * units as usize).max(1);
    let (count, dim) = cubes(&client, batch * parts, CubeDim::new_1d(units));
    let (of_x, written) = target(&gradient, 0);
    let (of_y, of_share) = (empty(&x, x.shape()), empty(&x, [batch, parts]));
    let [gradient, x, y, share] = [gradient, x, y, share].map(CubeTensor::into_tensor_arg);
    // SAFETY: no cube goes past the samples, no unit past a sample's values.
    unsafe {
        blend_backward_kernel::launch_unchecked::<R>(
            &client,
            count,
            dim,
            size,
            gradient,
            x,
            y,
            share,
            written,
            of_y.clone().into_tensor_arg(),
            of_share.clone().into_tensor_arg(),
            of_sample,
            parts,
            batch * parts,
            units,
        );
    }
    [of_x, of_y, of_share]
}
