//! Other orders of a tensor's values.

use burn::tensor::Tensor;
use burn_ndarray::NdArray;

use super::memory::tensor;
use super::threads;

/// Columns that a task of [`transposed`] moves, in values: a line of a cache.
const BAND: usize = 16;
/// Side of the squares that are turned in registers.
const SIDE: usize = 8;
/// Columns that are turned of all rows before the next ones: the lines of the result that they
/// are written to, a panel's 8 KiB, stay in the first-level cache until all squares have written
/// theirs.
pub(super) const NEAR: usize = 64;

/// Rows become columns: `out[p * stride + i] = row(i)[p]`, for `rows` rows of `columns` values.
///
/// # Panics
///
/// If a row is shorter, if `out` ends before the last value, or if rows overlap in it
/// (`rows > stride`).
#[inline(always)]
pub(super) fn turn<'a>(
    rows: usize,
    columns: usize,
    row: impl Fn(usize) -> &'a [f32],
    out: &mut [f32],
    stride: usize,
) {
    if rows == 0 || columns == 0 {
        return;
    }
    let end = (columns - 1)
        .checked_mul(stride)
        .and_then(|last| last.checked_add(rows));
    assert!(rows <= stride && end.is_some_and(|end| end <= out.len()));
    let squares = squares();
    for from in (0..columns).step_by(NEAR) {
        let deep = NEAR.min(columns - from);
        for first in (0..rows).step_by(SIDE) {
            let high = SIDE.min(rows - first);
            let lines: [&[f32]; SIDE] = std::array::from_fn(|i| match i < high {
                true => &row(first + i)[from..][..deep],
                false => &[],
            });
            let whole = if high == SIDE { deep / SIDE * SIDE } else { 0 };
            // SAFETY: where `whole` isn't 0 there are `SIDE` lines of at least as many values. The
            // last place written, `(from + whole - 1) * stride + first + SIDE - 1`, is at most
            // `(columns - 1) * stride + rows - 1`, which was found to be inside `out`.
            unsafe {
                let place = out.as_mut_ptr().add(from * stride + first);
                squares(lines.map(<[f32]>::as_ptr), whole / SIDE, place, stride);
            }
            for p in whole..deep {
                for (i, line) in lines[..high].iter().enumerate() {
                    out[(from + p) * stride + first + i] = line[p];
                }
            }
        }
    }
}

/// Turns so many squares that lie side by side: `out[p * stride + i] = lines[i][p]`.
type Squares = unsafe fn([*const f32; SIDE], usize, *mut f32, usize);

/// The one for this machine: [`by_lanes`] only where the processor has AVX, so that what is left of
/// the contract is that of [`one_by_one`].
#[inline]
fn squares() -> Squares {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx") {
        return by_lanes;
    }
    one_by_one
}

/// # Safety
///
/// Each line holds [`SIDE`] values for each square, and `out` as many rows of [`SIDE`], `stride`
/// apart.
unsafe fn one_by_one(lines: [*const f32; SIDE], squares: usize, out: *mut f32, stride: usize) {
    for p in 0..squares * SIDE {
        for (i, line) in lines.iter().enumerate() {
            // SAFETY: guaranteed by the caller.
            unsafe { out.add(p * stride + i).write(line.add(p).read()) };
        }
    }
}

/// As [`one_by_one`]: the lines' values take turns by pairs, these pairs by pairs, then halves of a
/// register change places.
///
/// # Safety
///
/// As for [`one_by_one`], and the processor has AVX.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn by_lanes(lines: [*const f32; SIDE], squares: usize, out: *mut f32, stride: usize) {
    use std::arch::x86_64::{
        _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_shuffle_ps, _mm256_storeu_ps,
        _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };
    // Two values of each of two registers, in every half: the first or the last.
    const FIRST: i32 = 0b01_00_01_00;
    const LAST: i32 = 0b11_10_11_10;
    for p in (0..squares * SIDE).step_by(SIDE) {
        // SAFETY: guaranteed by the caller.
        let rows = lines.map(|line| unsafe { _mm256_loadu_ps(line.add(p)) });
        let low = |i: usize| _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        let high = |i: usize| _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        let four = |i: usize| {
            [
                _mm256_shuffle_ps::<FIRST>(low(i), low(i + 2)),
                _mm256_shuffle_ps::<LAST>(low(i), low(i + 2)),
                _mm256_shuffle_ps::<FIRST>(high(i), high(i + 2)),
                _mm256_shuffle_ps::<LAST>(high(i), high(i + 2)),
            ]
        };
        for (q, (one, other)) in four(0).into_iter().zip(four(4)).enumerate() {
            let low = _mm256_permute2f128_ps::<0x20>(one, other);
            let high = _mm256_permute2f128_ps::<0x31>(one, other);
            // SAFETY: guaranteed by the caller.
            unsafe {
                _mm256_storeu_ps(out.add((p + q) * stride), low);
                _mm256_storeu_ps(out.add((p + q + SIDE / 2) * stride), high);
            }
        }
    }
}

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
    let bands = columns.div_ceil(BAND);
    // SAFETY: the bands of all matrices cover the result, and each belongs to one task.
    unsafe {
        tensor(shape, |out| {
            threads::over(batch * bands, 1, values.len() * 2, |range| {
                for task in range {
                    let (index, band) = (task / bands, task % bands);
                    let from = band * BAND;
                    let wide = BAND.min(columns - from);
                    let values = &values[index * matrix..][..matrix];
                    // SAFETY: only this task writes these rows of the result.
                    let out = out.part(index * matrix + from * rows, wide * rows);
                    let line = |row| &values[row * columns + from..][..wide];
                    turn(rows, wide, line, out, rows);
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
    fn rows_become_columns() {
        for (rows, columns) in [
            (1, 1),
            (7, 9),
            (8, 8),
            (13, 64),
            (16, 65),
            (32, 200),
            (40, 150),
        ] {
            let line = |row: usize| -> Vec<f32> {
                let first = (1000 * row) as f32;
                (0..columns).map(|column| first + column as f32).collect()
            };
            let lines: Vec<_> = (0..rows).map(line).collect();
            let stride = rows + 3;
            let mut out = vec![-1.0; columns * stride];
            turn(rows, columns, |row| &lines[row], &mut out, stride);
            for (index, found) in out.iter().enumerate() {
                let (column, row) = (index / stride, index % stride);
                let expected = lines.get(row).map_or(-1.0, |line| line[column]);
                assert_eq!(
                    *found, expected,
                    "{rows} x {columns}, row {row} of {column}"
                );
            }
        }
    }

    #[test]
    fn squares_are_turned_by_every_way() {
        const COUNT: usize = 3;
        const STRIDE: usize = SIDE + 3;
        let values: Vec<f32> = (0..COUNT * SIDE * SIDE).map(|value| value as f32).collect();
        let lines = std::array::from_fn(|line| values[line * COUNT * SIDE..].as_ptr());
        for way in [squares(), one_by_one] {
            let mut out = vec![-1.0; COUNT * SIDE * STRIDE];
            // SAFETY: each line has a square's side of values for each square, and there are as
            // many rows of as many places.
            unsafe { way(lines, COUNT, out.as_mut_ptr(), STRIDE) };
            for (index, found) in out.iter().enumerate() {
                let (p, i) = (index / STRIDE, index % STRIDE);
                let expected = if i < SIDE {
                    values[i * COUNT * SIDE + p]
                } else {
                    -1.0
                };
                assert_eq!(*found, expected, "value {p} of line {i}");
            }
        }
    }

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
