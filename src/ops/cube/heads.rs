//! Kernels that take tokens apart into heads and put them together again, scaled and padded on the
//! way.

use burn::tensor::TensorMetadata;
use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl::{self, prelude::*};
use burn_cubecl::tensor::CubeTensor;

use super::launch::{each, empty, vector};

#[cube(launch_unchecked)]
fn split_kernel<N: Size>(
    x: &Tensor<Vector<f32, N>>,
    out: &mut Tensor<Vector<f32, N>>,
    count: usize,
    tokens: usize,
    heads: usize,
    head_dim: usize,
    padded: usize,
    pitch: usize,
    start: usize,
    factor: f32,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let place = ABSOLUTE_POS % padded;
    let row = ABSOLUTE_POS / padded;
    let token = row % tokens;
    let head = row / tokens % heads;
    let sample = row / tokens / heads;
    if place < head_dim {
        let from = (sample * tokens + token) * pitch + start + head * head_dim + place;
        out[ABSOLUTE_POS] = x[from] * Vector::new(factor);
    } else {
        out[ABSOLUTE_POS] = Vector::new(0.0);
    }
}

/// Part `index` of `parts` equal ones of each row of `x`, `[batch, tokens, parts width]`, times
/// `factor`, as `[batch, heads, tokens, padded]`: zeros follow each head's values.
pub(super) fn split<R: CubeRuntime>(
    x: &CubeTensor<R>,
    [index, parts]: [usize; 2],
    heads: usize,
    padded: usize,
    factor: f64,
) -> CubeTensor<R> {
    let client = x.client.clone();
    let [batch, tokens, pitch] = x.shape().dims();
    let width = pitch / parts;
    let head_dim = width / heads;
    let size = vector(&[head_dim, padded]);
    let out = empty(x, [batch, heads, tokens, padded]);
    let count = out.meta.num_elements() / size;
    let (cubes, dim) = each(&client, count);
    // SAFETY: no unit goes past `count` vectors of the result; those of x are of its samples,
    // tokens and columns.
    unsafe {
        split_kernel::launch_unchecked::<R>(
            &client,
            cubes,
            dim,
            size,
            x.clone().into_tensor_arg(),
            out.clone().into_tensor_arg(),
            count,
            tokens,
            heads,
            head_dim / size,
            padded / size,
            pitch / size,
            index * width / size,
            factor as f32,
        );
    }
    out
}

#[cube(launch_unchecked)]
fn merge_kernel<N: Size>(
    x: &Tensor<Vector<f32, N>>,
    out: &mut Tensor<Vector<f32, N>>,
    count: usize,
    tokens: usize,
    heads: usize,
    head_dim: usize,
    padded: usize,
    pitch: usize,
    start: usize,
    factor: f32,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let width = heads * head_dim;
    let column = ABSOLUTE_POS % width;
    let row = ABSOLUTE_POS / width;
    let (head, place) = (column / head_dim, column % head_dim);
    let (sample, token) = (row / tokens, row % tokens);
    let from = ((sample * heads + head) * tokens + token) * padded + place;
    out[row * pitch + start + column] = x[from] * Vector::new(factor);
}

/// The heads of each of `parts`, `[batch, heads, tokens, padded]`, times its factor, one after the
/// other in rows: `[batch, tokens, parts width]`.
pub(super) fn merge<R: CubeRuntime, const PARTS: usize>(
    parts: [(CubeTensor<R>, f64); PARTS],
    head_dim: usize,
) -> CubeTensor<R> {
    let client = parts[0].0.client.clone();
    let [batch, heads, tokens, padded] = parts[0].0.shape().dims();
    let width = heads * head_dim;
    let size = vector(&[head_dim, padded]);
    let out = empty(&parts[0].0, [batch, tokens, PARTS * width]);
    let count = batch * tokens * width / size;
    for (index, (part, factor)) in parts.into_iter().enumerate() {
        let (cubes, dim) = each(&client, count);
        // SAFETY: no unit goes past `count` vectors, which a part's heads and its columns of the
        // result have.
        unsafe {
            merge_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                dim,
                size,
                part.into_tensor_arg(),
                out.clone().into_tensor_arg(),
                count,
                tokens,
                heads,
                head_dim / size,
                padded / size,
                PARTS * width / size,
                index * width / size,
                factor as f32,
            );
        }
    }
    out
}
