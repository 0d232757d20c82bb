//! Kernels that sum over the tokens of a sample, by column: gradients of shift, scale and gate.

use burn::tensor::TensorMetadata;
use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl::{self, prelude::*};
use burn_cubecl::tensor::CubeTensor;

use super::elementwise::target;
use super::launch::{cubes, empty, vector};

/// Columns of a cube: its units read as many vectors that lie one after the other.
const ACROSS: usize = 32;
/// Most units of a cube that share a column's tokens.
const MOST_ALONG: usize = 8;

/// The sum of a column's units, for the first of them.
#[cube]
fn column_total<N: Size>(
    value: Vector<f32, N>,
    scratch: &mut SharedMemory<Vector<f32, N>>,
    #[comptime] along: usize,
) -> Vector<f32, N> {
    let unit = UNIT_POS as usize;
    scratch[unit] = value;
    sync_cube();
    #[unroll]
    for step in 0..comptime!(along.ilog2()) {
        let half = comptime!(along >> (step + 1));
        if (UNIT_POS_Y as usize) < half {
            scratch[unit] = scratch[unit] + scratch[unit + half * comptime!(ACROSS)];
        }
        sync_cube();
    }
    let sum = scratch[UNIT_POS_X as usize];
    sync_cube();
    sum
}

#[cube(launch_unchecked)]
fn norm_kernel<N: Size>(
    gradient: &Tensor<Vector<f32, N>>,
    x: &Tensor<Vector<f32, N>>,
    statistics: &Tensor<f32>,
    of_shift: &mut Tensor<Vector<f32, N>>,
    of_scale: &mut Tensor<Vector<f32, N>>,
    samples: usize,
    tokens: usize,
    width: usize,
    #[comptime] along: usize,
) {
    let across = width.div_ceil(comptime!(ACROSS));
    let sample = CUBE_POS / across;
    if sample >= samples {
        terminate!();
    }
    let mut scratch = SharedMemory::<Vector<f32, N>>::new(comptime!(ACROSS * along));
    let column = CUBE_POS % across * comptime!(ACROSS) + UNIT_POS_X as usize;
    let mut shift = Vector::new(0.0);
    let mut scale = Vector::new(0.0);
    if column < width {
        let mut token = UNIT_POS_Y as usize;
        while token < tokens {
            let row = sample * tokens + token;
            let (mean, inverse) = (statistics[2 * row], statistics[2 * row + 1]);
            let gradient = gradient[row * width + column];
            let normal = (x[row * width + column] - Vector::new(mean)) * Vector::new(inverse);
            shift += gradient;
            scale += gradient * normal;
            token += along;
        }
    }
    let shift = column_total::<N>(shift, &mut scratch, along);
    let scale = column_total::<N>(scale, &mut scratch, along);
    if UNIT_POS_Y == 0 && column < width {
        of_shift[sample * width + column] = shift;
        of_scale[sample * width + column] = scale;
    }
}

/// A cube's shape, and how many cubes go through all columns of all samples.
fn shape(samples: usize, tokens: usize, vectors: usize) -> (usize, CubeDim, usize) {
    let along = tokens.next_power_of_two().clamp(1, MOST_ALONG);
    let dim = CubeDim::new_2d(ACROSS as u32, along as u32);
    (samples * vectors.div_ceil(ACROSS), dim, along)
}

/// Gradients of a modulated norm's shift and scale; `statistics` are mean and 1 / deviation of each
/// row of `x`.
pub(super) fn norm<R: CubeRuntime>(
    gradient: CubeTensor<R>,
    x: CubeTensor<R>,
    statistics: CubeTensor<R>,
) -> [CubeTensor<R>; 2] {
    let client = x.client.clone();
    let [batch, tokens, width] = x.shape().dims();
    let size = vector(&[width]);
    let (count, dim, along) = shape(batch, tokens, width / size);
    let (count, dim) = cubes(&client, count, dim);
    let [of_shift, of_scale] = [(); 2].map(|()| empty(&x, [batch, width]));
    let [gradient, x, statistics] = [gradient, x, statistics].map(CubeTensor::into_tensor_arg);
    // SAFETY: no cube goes past the samples, no unit past the width or the tokens.
    unsafe {
        norm_kernel::launch_unchecked::<R>(
            &client,
            count,
            dim,
            size,
            gradient,
            x,
            statistics,
            of_shift.clone().into_tensor_arg(),
            of_scale.clone().into_tensor_arg(),
            batch,
            tokens,
            width / size,
            along,
        );
    }
    [of_shift, of_scale]
}

#[cube(launch_unchecked)]
fn gate_kernel<N: Size>(
    gradient: &Tensor<Vector<f32, N>>,
    gate: &Tensor<Vector<f32, N>>,
    y: &Tensor<Vector<f32, N>>,
    of_gate: &mut Tensor<Vector<f32, N>>,
    of_y: &mut Tensor<Vector<f32, N>>,
    samples: usize,
    tokens: usize,
    width: usize,
    pitch: usize,
    #[comptime] along: usize,
) {
    let across = width.div_ceil(comptime!(ACROSS));
    let sample = CUBE_POS / across;
    if sample >= samples {
        terminate!();
    }
    let mut scratch = SharedMemory::<Vector<f32, N>>::new(comptime!(ACROSS * along));
    let column = CUBE_POS % across * comptime!(ACROSS) + UNIT_POS_X as usize;
    let mut sum = Vector::new(0.0);
    if column < width {
        let gate = gate[sample * pitch + column];
        let mut token = UNIT_POS_Y as usize;
        while token < tokens {
            let place = (sample * tokens + token) * width + column;
            let gradient = gradient[place];
            sum += gradient * y[place];
            of_y[place] = gradient * gate;
            token += along;
        }
    }
    let sum = column_total::<N>(sum, &mut scratch, along);
    if UNIT_POS_Y == 0 && column < width {
        of_gate[sample * width + column] = sum;
    }
}

/// Gradients of a gated residual for the gate and `y`.
pub(super) fn gate<R: CubeRuntime>(
    gradient: CubeTensor<R>,
    (gate, pitch): (CubeTensor<R>, usize),
    y: CubeTensor<R>,
) -> [CubeTensor<R>; 2] {
    let client = y.client.clone();
    let [batch, tokens, width] = y.shape().dims();
    let size = vector(&[width, pitch]);
    let (count, dim, along) = shape(batch, tokens, width / size);
    let (count, dim) = cubes(&client, count, dim);
    let of_gate = empty(&y, [batch, width]);
    let (of_y, written) = target(&y, 2);
    let [gradient, gate, y] = [gradient, gate, y].map(CubeTensor::into_tensor_arg);
    // SAFETY: no cube goes past the samples, no unit past the width or the tokens; the gate has a
    // row for each sample.
    unsafe {
        gate_kernel::launch_unchecked::<R>(
            &client,
            count,
            dim,
            size,
            gradient,
            gate,
            y,
            of_gate.clone().into_tensor_arg(),
            written,
            batch,
            tokens,
            width / size,
            pitch / size,
            along,
        );
    }
    [of_gate, of_y]
}
