//! Noise schedule, respacing and the tables derived from them, in f64.

use std::collections::BTreeSet;
use std::f64::consts::PI;

use thiserror::Error;

/// Number of steps of the process that the published models were trained with.
const STEPS: usize = 1000;

/// An invalid respacing.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RespacingError {
    /// Not a number, a comma separated list of numbers, or `ddimN`.
    #[error(
        "timestep respacing `{0}` is not a step count such as \"250\", a list of counts per section such as \"100,50,25\", or \"ddim50\""
    )]
    Syntax(String),
    /// More steps than the process has.
    #[error("timestep respacing asks for {asked} of {available} steps")]
    TooMany {
        /// Number of steps asked for.
        asked: usize,
        /// Number of steps of the process.
        available: usize,
    },
    /// `ddimN` where no integer stride gives N steps.
    #[error("no integer stride through {STEPS} steps gives exactly {0} of them")]
    NoStride(usize),
}

/// Which of the 1,000 steps a respaced process keeps, ascending (`space_timesteps` of
/// guided-diffusion).
///
/// The empty string keeps all. Section strides accumulate in floating point and are rounded half to
/// even, as in Python: published samples depend on it.
///
/// # Errors
/// See [`RespacingError`].
pub fn respace(spacing: &str) -> Result<Vec<usize>, RespacingError> {
    let syntax = || RespacingError::Syntax(spacing.to_owned());
    if spacing.is_empty() {
        return Ok((0..STEPS).collect());
    }
    if let Some(count) = spacing.strip_prefix("ddim") {
        let count: usize = count.trim().parse().map_err(|_| syntax())?;
        return (1..STEPS)
            .map(|stride| (0..STEPS).step_by(stride))
            .find(|steps| steps.len() == count)
            .map(Iterator::collect)
            .ok_or(RespacingError::NoStride(count));
    }
    let counts: Vec<usize> = spacing
        .split(',')
        .map(|count| count.trim().parse().map_err(|_| syntax()))
        .collect::<Result<_, _>>()?;
    let (size, extra) = (STEPS / counts.len(), STEPS % counts.len());
    let mut kept = BTreeSet::new();
    let mut start = 0;
    for (section, &count) in counts.iter().enumerate() {
        let size = size + usize::from(section < extra);
        if count == 0 {
            return Err(syntax());
        }
        if count > size {
            return Err(RespacingError::TooMany {
                asked: count,
                available: size,
            });
        }
        let stride = if count == 1 {
            1.0
        } else {
            (size - 1) as f64 / (count - 1) as f64
        };
        let mut position = 0.0f64;
        for _ in 0..count {
            kept.insert(start + position.round_ties_even() as usize);
            position += stride;
        }
        start += size;
    }
    Ok(kept.into_iter().collect())
}

/// Values derived from the betas of a (respaced) process; one entry per step.
///
/// Names and formulas are those of Ho et al. (arXiv 2006.11239) and Nichol and Dhariwal (arXiv
/// 2102.09672).
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)] // Every field is the formula its name spells.
pub struct DiffusionTables {
    pub betas: Vec<f64>,
    pub log_betas: Vec<f64>,
    pub alphas_cumprod: Vec<f64>,
    pub alphas_cumprod_prev: Vec<f64>,
    pub alphas_cumprod_next: Vec<f64>,
    pub sqrt_alphas_cumprod: Vec<f64>,
    pub sqrt_one_minus_alphas_cumprod: Vec<f64>,
    pub log_one_minus_alphas_cumprod: Vec<f64>,
    pub sqrt_recip_alphas_cumprod: Vec<f64>,
    pub sqrt_recipm1_alphas_cumprod: Vec<f64>,
    pub posterior_variance: Vec<f64>,
    pub posterior_log_variance_clipped: Vec<f64>,
    pub posterior_mean_coef1: Vec<f64>,
    pub posterior_mean_coef2: Vec<f64>,
}

impl DiffusionTables {
    /// Tables of the linear 1,000-step schedule restricted to the `kept` steps, ascending, as from
    /// [`respace`].
    pub fn linear(kept: &[usize]) -> Self {
        let (first, last) = (1e-4, 0.02);
        let step = (last - first) / (STEPS - 1) as f64;
        let full: Vec<f64> = (0..STEPS)
            .map(|i| {
                if i == STEPS - 1 {
                    last
                } else {
                    first + i as f64 * step
                }
            })
            .collect();
        Self::respaced(&full, kept)
    }

    /// Tables of the cosine schedule of 1,000 steps (Nichol and Dhariwal, arXiv 2102.09672,
    /// equation 17) restricted to the `kept` steps, ascending, as from [`respace`].
    pub fn cosine(kept: &[usize]) -> Self {
        let share = |time: f64| ((time + 0.008) / 1.008 * PI / 2.0).cos().powi(2);
        let at = |step: usize| share(step as f64 / STEPS as f64);
        let full: Vec<f64> = (0..STEPS)
            .map(|step| (1.0 - at(step + 1) / at(step)).min(0.999))
            .collect();
        Self::respaced(&full, kept)
    }

    /// Tables of some steps of a schedule with these betas.
    fn respaced(full: &[f64], kept: &[usize]) -> Self {
        let full = cumulative_product(full);
        let mut previous = 1.0;
        let betas = kept
            .iter()
            .map(|&step| {
                let beta = 1.0 - full[step] / previous;
                previous = full[step];
                beta
            })
            .collect();
        Self::from_betas(betas)
    }

    /// Tables of any schedule.
    pub fn from_betas(betas: Vec<f64>) -> Self {
        let alphas_cumprod = cumulative_product(&betas);
        let count = betas.len();
        let alphas_cumprod_prev: Vec<f64> = std::iter::once(1.0)
            .chain(alphas_cumprod.iter().copied())
            .take(count)
            .collect();
        let alphas_cumprod_next: Vec<f64> = alphas_cumprod
            .iter()
            .copied()
            .skip(1)
            .chain([0.0])
            .collect();
        let map =
            |f: &dyn Fn(f64) -> f64| alphas_cumprod.iter().map(|a| f(*a)).collect::<Vec<f64>>();
        let posterior = |f: &dyn Fn(f64, f64, f64) -> f64| {
            (0..count)
                .map(|i| f(betas[i], alphas_cumprod[i], alphas_cumprod_prev[i]))
                .collect::<Vec<f64>>()
        };
        let posterior_variance = posterior(&|beta, a, prev| beta * (1.0 - prev) / (1.0 - a));
        // The first variance is 0; its logarithm is clipped to that of the second. A process of one
        // step has no second (the reference fails on it): its only step adds no noise, so any
        // finite number works.
        let posterior_log_variance_clipped = (0..count)
            .map(|i| match posterior_variance.get(i.max(1)) {
                Some(variance) => variance.ln(),
                None => betas[i].ln(),
            })
            .collect();
        Self {
            sqrt_alphas_cumprod: map(&|a| a.sqrt()),
            sqrt_one_minus_alphas_cumprod: map(&|a| (1.0 - a).sqrt()),
            log_one_minus_alphas_cumprod: map(&|a| (1.0 - a).ln()),
            sqrt_recip_alphas_cumprod: map(&|a| (1.0 / a).sqrt()),
            sqrt_recipm1_alphas_cumprod: map(&|a| (1.0 / a - 1.0).sqrt()),
            posterior_log_variance_clipped,
            posterior_mean_coef1: posterior(&|beta, a, prev| beta * prev.sqrt() / (1.0 - a)),
            posterior_mean_coef2: posterior(&|beta, a, prev| {
                (1.0 - prev) * (1.0 - beta).sqrt() / (1.0 - a)
            }),
            posterior_variance,
            alphas_cumprod_prev,
            alphas_cumprod_next,
            alphas_cumprod,
            log_betas: betas.iter().map(|beta| beta.ln()).collect(),
            betas,
        }
    }
}

/// Running product of `1 - beta`.
fn cumulative_product(betas: &[f64]) -> Vec<f64> {
    betas
        .iter()
        .scan(1.0, |product, beta| {
            *product *= 1.0 - beta;
            Some(*product)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_of_one_step_has_finite_tables() {
        let tables = DiffusionTables::linear(&respace("1").unwrap());
        assert_eq!(tables.posterior_variance, [0.0]);
        assert!(tables.posterior_log_variance_clipped[0].is_finite());
    }

    #[test]
    fn strides_round_half_to_even() {
        // 3 of 1,000: stride 499.5, so the middle step is 499.5 -> 500 (even), not 499.
        assert_eq!(respace("3").unwrap(), [0, 500, 999]);
        assert_eq!(respace("ddim2").unwrap(), [0, 500]);
        assert_eq!(respace("1").unwrap(), [0]);
    }

    #[test]
    fn impossible_respacings_are_refused() {
        assert_eq!(
            respace("1001"),
            Err(RespacingError::TooMany {
                asked: 1001,
                available: 1000
            })
        );
        assert_eq!(respace("ddim37"), Err(RespacingError::NoStride(37)));
        assert_eq!(respace("0"), Err(RespacingError::Syntax("0".into())));
        assert_eq!(
            respace("ddimx"),
            Err(RespacingError::Syntax("ddimx".into()))
        );
    }
}
