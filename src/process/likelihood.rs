//! Divergences of the variational bound, elementwise, in nats.

use burn::tensor::{Tensor, backend::Backend};

use crate::ops;

/// KL(N(mean1, exp log_variance1) || N(mean2, exp log_variance2)).
pub fn normal_kl<B: Backend>(
    mean1: Tensor<B, 4>,
    log_variance1: Tensor<B, 4>,
    mean2: Tensor<B, 4>,
    log_variance2: Tensor<B, 4>,
) -> Tensor<B, 4> {
    let difference = mean1 - mean2;
    let ratio = (log_variance1.clone() - log_variance2.clone()).exp();
    let scaled = difference.clone() * difference * log_variance2.clone().neg().exp();
    (log_variance2 - log_variance1 - 1.0 + ratio + scaled).mul_scalar(0.5)
}

/// Log likelihood of 8-bit `x` in [−1, 1] under a Gaussian integrated over each value's bin, with
/// the reference's approximation of the normal distribution function.
pub fn discretized_gaussian_log_likelihood<B: Backend>(
    x: Tensor<B, 4>,
    mean: Tensor<B, 4>,
    log_scale: Tensor<B, 4>,
) -> Tensor<B, 4> {
    const HALF_BIN: f64 = 1.0 / 255.0;
    // Smaller bin probabilities are rounding errors.
    const SMALLEST: f64 = 1e-12;
    let centred = x.clone() - mean;
    let inverse = log_scale.neg().exp();
    let below = normal_cdf(inverse.clone() * (centred.clone() - HALF_BIN));
    let above = normal_cdf(inverse * (centred + HALF_BIN));
    let log = |p: Tensor<B, 4>| ops::log(p.clamp_min(SMALLEST));
    let inside = log(above.clone() - below.clone());
    let high = log(below.neg() + 1.0);
    let low = log(above);
    let likelihood = inside.mask_where(x.clone().greater_elem(0.999), high);
    likelihood.mask_where(x.lower_elem(-0.999), low)
}

/// `(1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2`
fn normal_cdf<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    let root_2_over_pi = std::f64::consts::FRAC_2_PI.sqrt();
    let cube = x.clone() * x.clone() * x.clone();
    ((x + cube.mul_scalar(0.044715))
        .mul_scalar(root_2_over_pi)
        .tanh()
        + 1.0)
        .mul_scalar(0.5)
}
