//! Fixed embeddings, computed as in the references.

use burn::tensor::{Tensor, backend::Backend};

/// Sinusoidal features of timesteps: `t` `[batch]` to `[batch, dim]`, cosines before sines, longest
/// period 10,000.
pub fn timestep_features<B: Backend>(t: Tensor<B, 1>, dim: usize) -> Tensor<B, 2> {
    let angles = angles(t, dim / 2, dim / 2);
    Tensor::cat(vec![angles.clone().cos(), angles.sin()], 1)
}

/// DDPM's features of timesteps: `t` `[batch]` to `[batch, dim]`, sines before cosines, the last
/// frequency 1 / 10,000.
pub(super) fn ddpm_features<B: Backend>(t: Tensor<B, 1>, dim: usize) -> Tensor<B, 2> {
    let half = dim / 2;
    // Of a single frequency there is no last.
    let angles = angles(t, half, half.saturating_sub(1).max(1));
    Tensor::cat(vec![angles.clone().sin(), angles.cos()], 1)
}

/// `t` times each of `count` frequencies, `[batch, count]`: the one of index `last` would be 1 /
/// 10,000.
///
/// The frequencies are computed on the host in f64: near t = 1000, the last bit of a frequency
/// affects the fourth digit of a cosine.
fn angles<B: Backend>(t: Tensor<B, 1>, count: usize, last: usize) -> Tensor<B, 2> {
    let frequencies: Vec<f32> = (0..count)
        .map(|i| (-(10_000f64.ln()) * i as f64 / last as f64).exp() as f32)
        .collect();
    let frequencies = Tensor::<B, 1>::from_floats(frequencies.as_slice(), &t.device());
    // Expanded by multiplication with ones rather than by a view: a broadcast view of an expanded
    // tensor is misread on CubeCL backends (tracel-ai/burn #5071).
    t.unsqueeze_dim::<2>(1)
        .matmul(frequencies.unsqueeze_dim::<2>(0))
}

/// The 2-D sine-cosine position table of a `side` x `side` grid, `[side * side * width]` row-major.
///
/// The first half of the width encodes the column (the reference's meshgrid puts w first), the
/// second the row; each half holds sines, then cosines.
pub fn position_table(width: usize, side: usize) -> Vec<f32> {
    let quarter = width / 4;
    let encode = |position: usize, out: &mut Vec<f32>| {
        let angle = |i: usize| position as f64 / 10_000f64.powf(i as f64 / quarter as f64);
        out.extend((0..quarter).map(|i| angle(i).sin() as f32));
        out.extend((0..quarter).map(|i| angle(i).cos() as f32));
    };
    let mut table = Vec::with_capacity(side * side * width);
    for row in 0..side {
        for column in 0..side {
            encode(column, &mut table);
            encode(row, &mut table);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_column_then_row_sines_then_cosines() {
        let table = position_table(8, 2);
        let second = &table[8..16]; // row 0, column 1
        let expected = [
            1f64.sin(),
            0.01f64.sin(),
            1f64.cos(),
            0.01f64.cos(),
            0.0,
            0.0,
            1.0,
            1.0,
        ];
        for (value, expected) in second.iter().zip(expected) {
            // Half a unit in the last place of an f32 near 1.
            assert!((f64::from(*value) - expected).abs() < 6e-8, "{second:?}");
        }
    }
}
