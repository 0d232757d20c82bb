//! Memory of the kernels: rows of tensors, uninitialised outputs, reusable scratch.

use std::cell::RefCell;

use burn::tensor::ops::FloatTensorOps;
use burn::tensor::{Shape, Tensor, TensorData, TensorPrimitive};
use burn_ndarray::{NdArray, NdArrayDevice, NdArrayTensor};
use ndarray::{ArcArray, IxDyn};

use super::transpose::transposed;

/// A tensor seen as rows: all dimensions but the last are flattened, and a row is contiguous.
#[derive(Debug, Clone)]
pub(super) struct Rows {
    array: ArcArray<f32, IxDyn>,
    /// Number of rows.
    pub(super) count: usize,
    /// Length of a row.
    pub(super) width: usize,
    /// Distance between the starts of neighbouring rows.
    stride: usize,
}

impl Rows {
    /// None if the tensor isn't f32.
    pub(super) fn of<const D: usize>(tensor: Tensor<NdArray, D>) -> Option<Self> {
        let shape = tensor.dims();
        let NdArrayTensor::F32(storage) = tensor.into_primitive().tensor() else {
            return None;
        };
        let width = shape[D - 1];
        let count = shape[..D - 1].iter().product();
        let mut array = storage.into_shared();
        let mut stride = width;
        if !array.is_standard_layout() {
            let strides = array.strides();
            // A matrix with contiguous rows is read in place; anything else is copied.
            if D == 2 && strides[1] == 1 && strides[0] >= width as isize {
                stride = strides[0] as usize;
            } else {
                array = in_order(array);
            }
        }
        Some(Self {
            array,
            count,
            width,
            stride,
        })
    }

    pub(super) fn row(&self, index: usize) -> &[f32] {
        assert!(index < self.count, "row {index} of {}", self.count);
        // SAFETY: the array holds `count` rows of `width` values, `stride` apart, and the index was
        // checked.
        unsafe {
            std::slice::from_raw_parts(self.array.as_ptr().add(index * self.stride), self.width)
        }
    }

    /// All values, row after row. Copied if the rows are not adjacent.
    pub(super) fn into_values(self) -> Values {
        Values(in_order(self.array))
    }
}

/// The same array with its values in order. ndarray moves them one at a time, on one core; of
/// matrices that are only transposed they are moved by squares, on all.
fn in_order(array: ArcArray<f32, IxDyn>) -> ArcArray<f32, IxDyn> {
    if array.is_standard_layout() {
        return array;
    }
    if let [.., rows, columns] = *array.shape() {
        let (last, dims) = (array.ndim() - 1, array.raw_dim());
        let mut turned = array.view();
        turned.swap_axes(last - 1, last);
        if let Some(values) = turned.as_slice() {
            let sizes = [values.len() / (rows * columns), columns, rows];
            let moved = Rows::of(transposed(values, sizes, [values.len()]));
            let moved = moved.expect("of f32").array;
            return moved.into_shape_with_order(dims).expect("as many values");
        }
    }
    array.as_standard_layout().into_owned().into_shared()
}

/// All values of a tensor, contiguous.
#[derive(Debug)]
pub(super) struct Values(ArcArray<f32, IxDyn>);

impl Values {
    /// None if the tensor isn't f32.
    pub(super) fn of<const D: usize>(tensor: Tensor<NdArray, D>) -> Option<Self> {
        Rows::of(tensor).map(Rows::into_values)
    }

    /// An uninitialised tensor of `shape`.
    ///
    /// # Safety
    ///
    /// The caller writes every value before reading any.
    pub(super) unsafe fn unwritten<const D: usize>(shape: [usize; D]) -> Self {
        // SAFETY: the caller writes what the closure doesn't.
        Self(unsafe { array(shape, |_| ()) })
    }

    /// If these values are shared, replaces them by uninitialised memory and returns the old ones.
    ///
    /// # Safety
    ///
    /// If values are returned, the caller writes every new value before reading any.
    pub(super) unsafe fn renew(&mut self) -> Option<Self> {
        if self.0.is_unique() {
            return None;
        }
        // SAFETY: the caller writes what the closure doesn't.
        let room = unsafe { array([self.0.len()], |_| ()) };
        let room = room
            .into_shape_with_order(self.0.raw_dim())
            .expect("as many values");
        Some(Self(std::mem::replace(&mut self.0, room)))
    }

    pub(super) fn read(&self) -> &[f32] {
        self.0.as_slice().unwrap_or_default() // always contiguous
    }

    /// The values, mutable; copied first if they are shared.
    pub(super) fn write(&mut self) -> &mut [f32] {
        self.0.as_slice_mut().unwrap_or_default() // always contiguous
    }

    pub(super) fn into_tensor<const D: usize>(self) -> Tensor<NdArray, D> {
        Tensor::from_primitive(TensorPrimitive::Float(self.0.into()))
    }
}

/// The same values under another shape. Contiguous values are not copied; Burn's reshape always
/// copies.
pub(super) fn with_shape(x: NdArrayTensor, shape: Shape) -> NdArrayTensor {
    let NdArrayTensor::F32(storage) = x else {
        return NdArray::<f32>::float_reshape(x, shape);
    };
    let array = in_order(storage.into_shared()).into_shape_with_order(IxDyn(shape.as_slice()));
    array.expect("as many values as the shape holds").into()
}

/// Output memory that several threads write, each its own part.
#[derive(Debug, Clone, Copy)]
pub(super) struct Out(*mut f32);

// SAFETY: only the unsafe methods below dereference the pointer; their callers keep parts disjoint.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    pub(super) fn of(values: &mut [f32]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// # Safety
    ///
    /// `start + length` lies inside the memory, which outlives the part, and the part is not
    /// aliased.
    pub(super) unsafe fn part<'a>(self, start: usize, length: usize) -> &'a mut [f32] {
        // SAFETY: guaranteed by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), length) }
    }

    pub(super) fn pointer(self) -> *mut f32 {
        self.0
    }
}

/// A tensor of `shape`, written by `fill`.
///
/// # Safety
///
/// `fill` writes every value and reads none it has not written.
pub(super) unsafe fn tensor<const D: usize>(
    shape: [usize; D],
    fill: impl FnOnce(Out),
) -> Tensor<NdArray, D> {
    // SAFETY: guaranteed by the caller.
    let array = unsafe { array(shape, fill) };
    Tensor::from_primitive(TensorPrimitive::Float(array.into()))
}

unsafe fn array<const D: usize>(shape: [usize; D], fill: impl FnOnce(Out)) -> ArcArray<f32, IxDyn> {
    let count = shape.iter().product();
    let mut values: Vec<f32> = Vec::with_capacity(count);
    fill(Out(values.as_mut_ptr()));
    // SAFETY: the capacity is reserved, and the caller guarantees that every value was written.
    unsafe { values.set_len(count) };
    ArcArray::from_shape_vec(IxDyn(&shape), values).expect("as many values as the shape holds")
}

/// One cache line of values.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

thread_local! {
    /// This thread's buffers that are not in use.
    static IDLE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Values aligned to a cache line, in a buffer taken from this thread's idle ones and returned on
/// drop.
pub(super) struct Scratch {
    lines: Vec<Line>,
    length: usize,
}

impl Scratch {
    /// Contents are unspecified: those of an earlier use.
    pub(super) fn new(length: usize) -> Self {
        if length == 0 {
            // None is taken from those who need one.
            let lines = Vec::new();
            return Self { lines, length };
        }
        let mut lines = IDLE.with_borrow_mut(Vec::pop).unwrap_or_default();
        let wanted = length.div_ceil(16);
        if lines.len() < wanted {
            lines.clear();
            lines.resize(wanted, Line([0.0; 16]));
        }
        Self { lines, length }
    }

    pub(super) fn values(&mut self) -> &mut [f32] {
        // SAFETY: a line is sixteen values without padding, and the lines hold at least `length` of
        // them.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.length) }
    }

    pub(super) fn pointer(&self) -> *const f32 {
        self.lines.as_ptr().cast()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        if lines.is_empty() {
            return;
        }
        // A thread that is ending has lost its idle buffers; then this one is freed.
        let _ = IDLE.try_with(|idle| idle.borrow_mut().push(lines));
    }
}

/// A tensor of `values`.
pub(super) fn matrix<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<NdArray, D> {
    Tensor::from_data(TensorData::new(values, shape), &NdArrayDevice::Cpu)
}
