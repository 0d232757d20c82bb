//! The Inception Score (Salimans et al. 2016, arXiv:1606.03498, section 4).

use super::{EvaluationError, Features};

/// Pictures per split in the published numbers (`evaluator.py`, `compute_inception_score`).
pub const DEFAULT_SPLIT_SIZE: usize = 5000;

/// How far the sum of a row may be from one: half-precision softmax over 1000 classes passes,
/// logits do not.
const SUM_TOLERANCE: f64 = 0.02;

/// `exp(mean_x KL(p(y|x) || p(y)))`, averaged over splits.
///
/// `probabilities` is `[pictures, classes]`, the softmax output for each picture. The rows are cut
/// into consecutive splits of `split_size`, of which the last may be shorter and counts as much as
/// the others; `p(y)` is the mean row of a split. The score lies between 1 and the number of
/// classes.
///
/// # Errors
///
/// [`EvaluationError::TooFew`] without any row, [`EvaluationError::Shape`] when `split_size` is zero,
/// [`EvaluationError::Value`] when a row is not a probability distribution.
///
/// # Examples
///
/// ```
/// use tinyfusion::evaluation::{Features, inception_score};
/// let sure_and_varied = Features::new(2, vec![1.0, 0.0, 0.0, 1.0])?;
/// assert!((inception_score(&sure_and_varied, 5000)? - 2.0).abs() < 1e-12);
/// # Ok::<(), tinyfusion::evaluation::EvaluationError>(())
/// ```
pub fn inception_score(
    probabilities: &Features,
    split_size: usize,
) -> Result<f64, EvaluationError> {
    let what = "the Inception Score";
    if probabilities.rows() == 0 {
        return Err(EvaluationError::TooFew {
            what,
            needed: 1,
            found: 0,
        });
    }
    let classes = probabilities.dim();
    let values = split_size.saturating_mul(classes);
    if values == 0 {
        let (expected, found) = ("at least 1".to_owned(), split_size.to_string());
        return Err(EvaluationError::Shape {
            what: "split size",
            expected,
            found,
        });
    }
    for (index, row) in probabilities.data().chunks(classes).enumerate() {
        let sum: f64 = row.iter().map(|&p| f64::from(p)).sum();
        if (sum - 1.0).abs() > SUM_TOLERANCE || row.iter().any(|&p| p < 0.0) {
            let problem = format!("row {index} is not a probability distribution (sum {sum})");
            return Err(EvaluationError::Value {
                what: "class probabilities",
                problem,
            });
        }
    }
    let splits = probabilities.data().chunks(values);
    let count = splits.len() as f64;
    Ok(splits.map(|split| split_score(split, classes)).sum::<f64>() / count)
}

/// The score of one split, `[pictures, classes]` flattened.
fn split_score(split: &[f32], classes: usize) -> f64 {
    let pictures = (split.len() / classes) as f64;
    let mut marginal = vec![0.0f64; classes];
    for row in split.chunks(classes) {
        for (sum, &p) in marginal.iter_mut().zip(row) {
            *sum += f64::from(p) / pictures;
        }
    }
    let divergence: f64 = split
        .chunks(classes)
        .flat_map(|row| row.iter().zip(&marginal))
        // p ln p tends to 0, but 0 * ln 0 is NaN.
        .filter(|&(&p, _)| p > 0.0)
        .map(|(&p, &q)| f64::from(p) * (f64::from(p).ln() - q.ln()))
        .sum();
    (divergence / pictures).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(classes: usize, data: &[f32], split_size: usize) -> Result<f64, EvaluationError> {
        inception_score(&Features::new(classes, data.to_vec())?, split_size)
    }

    #[test]
    fn by_hand() {
        // All pictures alike: 1. All certain and different: the number of classes.
        assert_eq!(score(2, &[0.5, 0.5, 0.5, 0.5], 10).unwrap(), 1.0);
        let certain = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
        assert!((score(3, &certain, 10).unwrap() - 3.0).abs() < 1e-12);
        // Rows (3/4, 1/4) and (1/4, 3/4): exp(3/4 ln(3/2) + 1/4 ln(1/2)).
        let expected = (0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln()).exp();
        assert!((score(2, &[0.75, 0.25, 0.25, 0.75], 10).unwrap() - expected).abs() < 1e-12);
    }

    #[test]
    fn a_short_last_split_counts_as_much() {
        // Splits {a, b} with score 2 and {a} with score 1.
        let rows = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0];
        assert!((score(2, &rows, 2).unwrap() - 1.5).abs() < 1e-12);
        assert_eq!(
            score(2, &rows, usize::MAX).unwrap(),
            score(2, &rows, 3).unwrap()
        );
    }

    #[test]
    fn bad_input_is_an_error() {
        assert!(matches!(
            score(2, &[], 10),
            Err(EvaluationError::TooFew { .. })
        ));
        assert!(matches!(
            score(2, &[1.0, 0.0], 0),
            Err(EvaluationError::Shape { .. })
        ));
        let logits = score(2, &[1.0, 0.0, 3.0, -2.0], 10).unwrap_err();
        assert!(
            logits.to_string().contains("row 1 is not a probability"),
            "{logits}"
        );
        assert!(score(2, &[1.5, -0.5], 10).is_err());
    }
}
