//! How alike layers are.

use burn::tensor::{Tensor, backend::Backend};

use crate::backend::Compute;
use crate::ops::{self, FusedOps};
use crate::trunk::{Block, BlockHook, Site, Trunk};

/// Notes the states between layers: the input of the first of each trunk, and the output of each.
#[derive(Debug)]
pub struct TrunkStates<B: Backend> {
    borders: Vec<usize>,
    /// The states of each trunk, `[batch, tokens, width]`, one more than it has layers.
    pub states: Vec<Vec<Tensor<B, 3>>>,
}

impl<B: Backend> TrunkStates<B> {
    /// Of a network with these layers.
    pub fn new(trunk: Trunk) -> Self {
        Self {
            borders: trunk.borders,
            states: Vec::new(),
        }
    }
}

impl<B: Backend> BlockHook<B> for TrunkStates<B> {
    fn around(&mut self, site: Site, x: Tensor<B, 3>, block: Block<'_, B>) -> Tensor<B, 3> {
        if self.states.is_empty() || self.borders.contains(&site.layer) {
            self.states.push(vec![x.clone()]);
        }
        let x = block(x);
        if let Some(states) = self.states.last_mut() {
            states.push(x.clone());
        }
        x
    }
}

/// Linear centred kernel alignment of every two states (Kornblith et al., "Similarity of
/// Neural Network Representations Revisited", arXiv 1905.00414): `||Y^T X||^2 / (||X^T X|| ||Y^T
/// Y||)` in Frobenius norms, of columns without their mean. 1 is the same up to rotation and scale,
/// 0 nothing in common. `states` are `[batch, tokens, width]`; of a constant one it is 0.
pub fn similarity<B: FusedOps>(states: &[Tensor<B, 3>]) -> Vec<Vec<f64>> {
    // Scaled, which changes no similarity, so that fourth powers of large states stay within f32.
    let scaled = |x: Tensor<B, 2>| {
        let largest = x.clone().abs().max().into_data();
        match largest.iter::<f64>().next() {
            Some(largest) if largest > 0.0 => x.div_scalar(largest),
            _ => x,
        }
    };
    let centred: Vec<Tensor<B, 2>> = (states.iter())
        .map(|x| scaled(x.clone().flatten(0, 1)))
        .map(|x: Tensor<B, 2>| x.clone() - x.mean_dim(0))
        .collect();
    let product = |x: &Tensor<B, 2>, y: &Tensor<B, 2>| -> f64 {
        let rows = x.dims()[0] as f64;
        let between = ops::product(x.clone().transpose(), y.clone(), Compute::F32).div_scalar(rows);
        let norm = (between.clone() * between).sum();
        norm.into_data().iter().next().unwrap_or(f64::NAN)
    };
    let own: Vec<f64> = centred.iter().map(|x| product(x, x).sqrt()).collect();
    let mut values = vec![vec![0.0; states.len()]; states.len()];
    for (i, x) in centred.iter().enumerate() {
        for (j, y) in centred.iter().enumerate().take(i + 1) {
            let scale = own[i] * own[j];
            let value = match scale {
                0.0 => 0.0,
                scale => product(x, y) / scale,
            };
            (values[i][j], values[j][i]) = (value, value);
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use burn::tensor::Distribution;
    use burn_ndarray::NdArray;

    use super::*;

    #[test]
    fn rotation_scale_and_shift_change_nothing() {
        let device = Default::default();
        let x = Tensor::<NdArray, 2>::random([500, 2], Distribution::Normal(0.0, 1.0), &device);
        let (sin, cos) = 0.7f32.sin_cos();
        let turn = Tensor::from_floats([[cos, -sin], [sin, cos]], &device);
        let turned = x.clone().matmul(turn).mul_scalar(3.0).add_scalar(5.0);
        let other = Tensor::random([500, 2], Distribution::Normal(0.0, 1.0), &device);
        let still = Tensor::ones([500, 2], &device);
        let values = similarity(&[x, turned, other, still].map(|x| x.unsqueeze()));
        // Sums of five hundred products in f32.
        assert!((values[0][0] - 1.0).abs() < 1e-5);
        // The shift by 5 costs a digit when the mean is taken out again.
        assert!((values[0][1] - 1.0).abs() < 1e-4, "{}", values[0][1]);
        // Of independent normals about the width over the values, 0.004.
        assert!(values[0][2] < 0.05, "{}", values[0][2]);
        assert_eq!(values[0][2], values[2][0]);
        assert_eq!(values[3][0], 0.0);
    }

    #[test]
    fn large_states_are_compared_as_small_ones_are() {
        let device = Default::default();
        let draw = || {
            let normal = Distribution::Normal(0.0, 1.0);
            Tensor::<NdArray, 3>::random([4, 20, 3], normal, &device)
        };
        let (x, y) = (draw(), draw());
        let small = similarity(&[x.clone(), y.clone()])[0][1];
        let large = similarity(&[x * 1e15, y * 1e12])[0][1];
        // Rounding of f32 over eighty rows.
        assert!((small - large).abs() < 1e-5, "{small} {large}");
    }
}
