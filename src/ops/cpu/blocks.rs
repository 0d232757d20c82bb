//! Blocks of a matrix's rows or columns, copied for a product.

use std::ops::Range;

use super::elementwise::activate_row;
use super::memory::Rows;
use super::product::STRIDE;
use crate::ops::Activation;

/// Copies a block of rows, in their order in memory, and applies the activation.
#[inline(always)]
pub(super) fn rows_of(
    x: &Rows,
    activation: Activation,
) -> impl Fn(Range<usize>, Range<usize>, &mut [f32]) + Sync {
    #[inline(always)]
    move |rows, depths, scratch| {
        for (place, row) in scratch.chunks_exact_mut(STRIDE).zip(rows) {
            let values = &x.row(row)[depths.clone()];
            activate_row(values, &mut place[..depths.len()], activation);
        }
    }
}

/// Copies a block of columns; the product then sums over the rows.
#[inline(always)]
pub(super) fn columns_of(
    x: &Rows,
    activation: Activation,
) -> impl Fn(Range<usize>, Range<usize>, &mut [f32]) + Sync {
    #[inline(always)]
    move |columns, depths, scratch| {
        for (place, row) in scratch.chunks_exact_mut(STRIDE).zip(depths) {
            let values = &x.row(row)[columns.clone()];
            activate_row(values, &mut place[..columns.len()], activation);
        }
    }
}
