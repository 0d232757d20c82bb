//! The Inception Score (Salimans et al. 2016, arXiv:1606.03498, section 4).

use super::{EvaluationError, Features};

/// Pictures per split in published numbers (`evaluator.py`, `compute_inception_score`).
pub const DEFAULT_SPLIT_SIZE: usize = 5000;

/// Tolerance for the sum of a row: a half-precision softmax over 1000 classes passes, logits do
/// not.
const SUM_TOLERANCE: f64 = 0.02;

/// `exp(mean_x KL(p(y|x) || p(y)))`, averaged over splits.
///
/// `probabilities` is `[pictures, classes]`, the softmax output for each picture. The rows are cut
/// into consecutive splits of `split_size`; the last may be shorter and counts as much as the
/// others. `p(y)` is the mean row of a split. The score lies between 1 and the number of classes.
///
/// # Errors
///
/// [`EvaluationError::TooFew`] without any row, [`EvaluationError::Shape`] when `split_size` is
/// zero, [`EvaluationError::Value`] when a row is not a probability distribution.
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
    let mut splits = InceptionScore::new(split_size);
    splits.push(probabilities)?;
    splits.finish()
}

/// Computes [`inception_score`] from batches, so that the probabilities need not be kept. Holds one
/// split.
///
/// # Examples
///
/// ```
/// use tinyfusion::evaluation::{Features, InceptionScore};
/// let mut score = InceptionScore::new(5000);
/// score.push(&Features::new(2, vec![1.0, 0.0])?)?;
/// score.push(&Features::new(2, vec![0.0, 1.0])?)?;
/// assert!((score.finish()? - 2.0).abs() < 1e-12);
/// # Ok::<(), tinyfusion::evaluation::EvaluationError>(())
/// ```
#[derive(Clone, Debug)]
pub struct InceptionScore {
    split_size: usize,
    /// Number of classes; zero before the first row.
    classes: usize,
    /// Number of rows in earlier splits.
    before: usize,
    /// Rows of the current split, `[pictures, classes]`.
    split: Vec<f32>,
    /// Sum of the scores of the full splits, and their number.
    sum: f64,
    splits: usize,
}

impl InceptionScore {
    /// An empty score with splits of `split_size`.
    pub fn new(split_size: usize) -> Self {
        Self {
            split_size,
            classes: 0,
            before: 0,
            split: Vec::new(),
            sum: 0.0,
            splits: 0,
        }
    }

    /// Adds rows of class probabilities, `[pictures, classes]`.
    ///
    /// # Errors
    ///
    /// [`EvaluationError::Shape`] when the split size is zero or the number of classes differs from
    /// earlier rows, [`EvaluationError::Value`] when a row is not a probability distribution.
    pub fn push(&mut self, probabilities: &Features) -> Result<(), EvaluationError> {
        let shape = |what, expected: String, found: usize| EvaluationError::Shape {
            what,
            expected,
            found: found.to_string(),
        };
        if self.split_size == 0 {
            return Err(shape("split size", "at least 1".to_owned(), 0));
        }
        let classes = probabilities.dim();
        if self.classes != 0 && self.classes != classes {
            return Err(shape(
                "number of classes",
                self.classes.to_string(),
                classes,
            ));
        }
        self.classes = classes;
        for row in probabilities.data().chunks(classes) {
            let sum: f64 = row.iter().map(|&p| f64::from(p)).sum();
            if (sum - 1.0).abs() > SUM_TOLERANCE || row.iter().any(|&p| p < 0.0) {
                let index = self.before + self.split.len() / classes;
                let problem = format!("row {index} is not a probability distribution (sum {sum})");
                return Err(EvaluationError::Value {
                    what: "class probabilities",
                    problem,
                });
            }
            self.split.extend_from_slice(row);
            if self.split.len() / classes == self.split_size {
                self.end_split();
            }
        }
        Ok(())
    }

    fn end_split(&mut self) {
        self.sum += split_score(&self.split, self.classes);
        self.splits += 1;
        self.before += self.split_size;
        self.split.clear();
    }

    /// The score of all rows; the last split may be shorter.
    ///
    /// # Errors
    ///
    /// [`EvaluationError::TooFew`] without any row.
    pub fn finish(mut self) -> Result<f64, EvaluationError> {
        if !self.split.is_empty() {
            self.end_split();
        }
        if self.splits == 0 {
            return Err(EvaluationError::TooFew {
                what: "the Inception Score",
                needed: 1,
                found: 0,
            });
        }
        Ok(self.sum / self.splits as f64)
    }
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
        // Equal rows give 1. Certain and different rows give the number of classes.
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
    fn batches_may_end_anywhere() {
        let rows: Vec<f32> = (0..23)
            .flat_map(|i| {
                let p = (i as f32 * 0.37).sin().abs();
                [p, 1.0 - p]
            })
            .collect();
        let whole = score(2, &rows, 5).unwrap();
        for batch in [1, 4, 5, 6, 23] {
            let mut splits = InceptionScore::new(5);
            for rows in rows.chunks(2 * batch) {
                splits
                    .push(&Features::new(2, rows.to_vec()).unwrap())
                    .unwrap();
            }
            // Bitwise equal: the splits hold the same rows.
            assert_eq!(splits.finish().unwrap(), whole, "{batch}");
        }
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

        let mut splits = InceptionScore::new(2);
        let certain = Features::new(3, [1.0, 0.0, 0.0].repeat(3)).unwrap();
        splits.push(&certain).unwrap();
        assert!(
            splits
                .push(&Features::new(2, vec![1.0, 0.0]).unwrap())
                .is_err()
        );
        let logits = Features::new(3, vec![1.0, 0.0, 0.0, 9.0, 0.0, 0.0]).unwrap();
        let error = splits.push(&logits).unwrap_err().to_string();
        assert!(error.contains("row 4 is not"), "{error}");
    }
}
