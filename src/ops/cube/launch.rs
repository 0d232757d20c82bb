//! Tensors as kernels take them, and how many units a kernel is launched with.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Shape, Tensor, TensorPrimitive};
use burn_cubecl::cubecl::client::ComputeClient;
use burn_cubecl::cubecl::{CubeCount, CubeDim, calculate_cube_count_elemwise};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime};

/// A backend of CubeCL's.
pub(super) type Cube<R, BT> = CubeBackend<R, f32, i32, BT>;

/// Most units of a cube. Every GPU allows as many (WebGPU's default limit).
const MOST_UNITS: usize = 256;

/// The tensor of a kernel: values of f32, one after the other. Copies a tensor that lies otherwise.
pub(super) fn inner<R: CubeRuntime, BT: BoolElement, const D: usize>(
    x: Tensor<Cube<R, BT>, D>,
) -> CubeTensor<R> {
    into_contiguous(strided(x))
}

/// The tensor as it lies in memory.
fn strided<R: CubeRuntime, BT: BoolElement, const D: usize>(
    x: Tensor<Cube<R, BT>, D>,
) -> CubeTensor<R> {
    let x = x.into_primitive().tensor();
    assert!(x.dtype == DType::F32, "kernels compute in f32");
    x
}

/// Rows and how far apart they begin, such as columns of a matrix, which need no copy.
pub(super) fn rows<R: CubeRuntime, BT: BoolElement>(
    x: Tensor<Cube<R, BT>, 2>,
) -> (CubeTensor<R>, usize) {
    let x = strided(x);
    let [across, along] = [x.meta.strides()[0], x.meta.strides()[1]];
    if along == 1 && across >= x.meta.shape()[1] && across % 4 == 0 {
        return (x, across);
    }
    let x = into_contiguous(x);
    let width = x.meta.shape()[1];
    (x, width)
}

/// A kernel's result as a tensor of the backend.
pub(super) fn outer<R: CubeRuntime, BT: BoolElement, const D: usize>(
    x: CubeTensor<R>,
) -> Tensor<Cube<R, BT>, D>
where
    Cube<R, BT>: Backend<FloatTensorPrimitive = CubeTensor<R>>,
{
    Tensor::from_primitive(TensorPrimitive::Float(x))
}

/// Memory for values in order, on the device of `x`, of which nothing is set.
pub(super) fn empty<R: CubeRuntime>(x: &CubeTensor<R>, shape: impl Into<Shape>) -> CubeTensor<R> {
    let (client, device) = (x.client.clone(), x.device.clone());
    empty_device_contiguous_dtype(client, device, shape.into(), DType::F32)
}

/// How many values a unit reads at once: the largest power of 2 up to 4 that divides all `widths`.
pub(super) fn vector(widths: &[usize]) -> usize {
    let divides = |size: &usize| widths.iter().all(|width| width.is_multiple_of(*size));
    [4, 2].into_iter().find(divides).unwrap_or(1)
}

/// Units of a cube that goes through `count` values together: a power of 2.
pub(super) fn units(count: usize) -> u32 {
    count.next_power_of_two().clamp(32, MOST_UNITS) as u32
}

/// One unit for each of `count` values.
pub(super) fn each<R: CubeRuntime>(
    client: &ComputeClient<R>,
    count: usize,
) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new_1d(MOST_UNITS as u32);
    (calculate_cube_count_elemwise(client, count, dim), dim)
}

/// At least `count` cubes of `dim`: a kernel leaves those past the end alone.
pub(super) fn cubes<R: CubeRuntime>(
    client: &ComputeClient<R>,
    count: usize,
    dim: CubeDim,
) -> (CubeCount, CubeDim) {
    let units = count * dim.num_elems() as usize;
    (calculate_cube_count_elemwise(client, units, dim), dim)
}
