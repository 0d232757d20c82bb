//! Other orders of a tensor's values.

use burn::tensor::Tensor;
use burn_ndarray::NdArray;

use super::memory::tensor;
use super::threads;

/// Side of the tiles that are moved at once, in values: a line of a cache.
const TILE: usize = 16;

/// A tensor of `shape` from `batch` matrices `[rows, columns]`, each transposed. Burn's own
/// reordering moves one value at a time, on one core.
pub(super) fn transposed<const D: usize>(
    values: &[f32],
    [batch, rows, columns]: [usize; 3],
    shape: [usize; D],
) -> Tensor<NdArray, D> {
    let matrix = rows * columns;
    assert_eq!(values.len(), batch * matrix);
    assert_eq!(shape.iter().product::<usize>(), values.len());
    let bands = columns.div_ceil(TILE);
    // SAFETY: the bands of all matrices cover the result, and each belongs to one task.
    unsafe {
        tensor(shape, |out| {
            threads::over(batch * bands, 1, values.len() * 2, |range| {
                for task in range {
                    let (index, band) = (task / bands, task % bands);
                    let from = band * TILE;
                    let wide = TILE.min(columns - from);
                    let values = &values[index * matrix..][..matrix];
                    // SAFETY: only this task writes these rows of the result.
                    let out = out.part(index * matrix + from * rows, wide * rows);
                    for first in (0..rows).step_by(TILE) {
                        for row in first..rows.min(first + TILE) {
                            let line = &values[row * columns + from..][..wide];
                            for (column, value) in line.iter().enumerate() {
                                out[column * rows + row] = *value;
                            }
                        }
                    }
                }
            });
        })
    }
}

/// A convolution's weight `[out, in, height, width]` as `[in, out, height, width]`, its taps in the
/// opposite order.
pub(super) fn mirrored(weight: &[f32], shape: [usize; 4]) -> Tensor<NdArray, 4> {
    let [output, input, height, width] = shape;
    let taps = height * width;
    assert_eq!(weight.len(), output * input * taps);
    // SAFETY: the channels cover the result, and each belongs to one task.
    unsafe {
        tensor([input, output, height, width], |out| {
            threads::over(input, 1, weight.len() * 2, |range| {
                for channel in range {
                    // SAFETY: only this task writes this channel.
                    let out = out.part(channel * output * taps, output * taps);
                    for (index, out) in out.chunks_exact_mut(taps).enumerate() {
                        let from = &weight[(index * input + channel) * taps..][..taps];
                        let turned = from.iter().rev();
                        out.iter_mut()
                            .zip(turned)
                            .for_each(|(out, value)| *out = *value);
                    }
                }
            });
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::Values;
    use super::super::tests::noise;
    use super::*;

    #[test]
    fn orders_are_those_that_burn_gives() {
        for shape @ [batch, rows, columns] in [[1, 1, 1], [3, 5, 2], [2, 33, 47], [5, 16, 32]] {
            let x = noise::<NdArray, 3>(0, shape);
            let values = Values::of(x.clone()).unwrap();
            let found = transposed(values.read(), shape, [batch, columns, rows]);
            assert_eq!(found.into_data(), x.swap_dims(1, 2).into_data());
        }
        for shape in [[1, 1, 1, 1], [4, 3, 3, 2], [20, 70, 3, 3]] {
            let weight = noise::<NdArray, 4>(0, shape);
            let values = Values::of(weight.clone()).unwrap();
            let found = mirrored(values.read(), shape);
            let expected = weight.swap_dims(0, 1).flip([2, 3]);
            assert_eq!(found.into_data(), expected.into_data());
        }
    }
}
