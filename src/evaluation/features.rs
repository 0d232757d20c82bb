//! Rows of activations or of class probabilities.

use super::EvaluationError;

/// A matrix of `f32`, one row per picture: `[rows, dim]`, row-major, as a network returns it.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    dim: usize,
    data: Vec<f32>,
}

impl Features {
    /// Takes `data` as rows of `dim` values each.
    ///
    /// # Errors
    ///
    /// [`EvaluationError::Shape`] when `dim` is zero or does not divide the number of values, and
    /// [`EvaluationError::Value`] when a value is NaN or infinite: one such value would turn every
    /// measure into NaN.
    ///
    /// # Examples
    ///
    /// ```
    /// use tinyfusion::evaluation::Features;
    /// let features = Features::new(2, vec![1.0, 2.0, 3.0, 4.0])?;
    /// assert_eq!((features.rows(), features.row(1)), (2, &[3.0, 4.0][..]));
    /// # Ok::<(), tinyfusion::evaluation::EvaluationError>(())
    /// ```
    pub fn new(dim: usize, data: Vec<f32>) -> Result<Self, EvaluationError> {
        if dim == 0 || !data.len().is_multiple_of(dim) {
            return Err(EvaluationError::Shape {
                what: "features",
                expected: format!("a number of values divisible by the dimension {dim}"),
                found: format!("{} values", data.len()),
            });
        }
        if let Some(index) = data.iter().position(|value| !value.is_finite()) {
            let problem = format!(
                "row {}, column {} is {}",
                index / dim,
                index % dim,
                data[index]
            );
            return Err(EvaluationError::Value {
                what: "features",
                problem,
            });
        }
        Ok(Self { dim, data })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.data.len() / self.dim
    }

    /// Number of values in a row, never zero.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// All values, `[rows, dim]`.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// Row `index`, `[dim]`.
    ///
    /// # Panics
    ///
    /// When `index >= rows()`.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.dim..(index + 1) * self.dim]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_shapes_and_values_are_errors() {
        assert!(Features::new(0, vec![]).is_err());
        assert!(Features::new(3, vec![0.0; 4]).is_err());
        assert_eq!(Features::new(3, vec![]).unwrap().rows(), 0);
        let error = Features::new(2, vec![0.0, 0.0, 0.0, f32::NAN]).unwrap_err();
        assert_eq!(error.to_string(), "features: row 1, column 1 is NaN");
    }
}
