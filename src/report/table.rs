//! Plain text tables with aligned columns, readable in a terminal, a log and a commit message.

use std::fmt;

/// Space between two columns.
const GAP: &str = "  ";

/// A table of `N` columns. Columns of numbers are aligned right, all others left.
///
/// A cell counts as a number when it begins with a digit, after a sign if there is one (`-0.5`,
/// `+12.3%`, `1.48x`, `14/28`); `-` and the empty cell stand for a missing number.
///
/// # Examples
///
/// ```
/// use tinyfusion::report::Table;
/// let mut table = Table::new(["model", "FID"]);
/// table.row(["teacher".into(), format!("{:.2}", 2.27)]);
/// table.row(["pruned".into(), format!("{:.2}", 60.5)]);
/// assert_eq!(
///     table.to_string(),
///     "model      FID\n\
///      -------  -----\n\
///      teacher   2.27\n\
///      pruned   60.50\n"
/// );
/// ```
#[derive(Clone, Debug)]
pub struct Table<const N: usize> {
    headers: [String; N],
    rows: Vec<[String; N]>,
    hide_empty: bool,
}

impl<const N: usize> Table<N> {
    /// An empty table with these column titles.
    pub fn new(headers: [&str; N]) -> Self {
        Self {
            headers: headers.map(str::to_owned),
            rows: Vec::new(),
            hide_empty: false,
        }
    }

    /// The table without the columns that no row has anything in.
    #[must_use]
    pub fn without_empty(mut self) -> Self {
        self.hide_empty = true;
        self
    }

    /// Adds a row. Cells are single lines.
    pub fn row(&mut self, cells: [String; N]) -> &mut Self {
        self.rows.push(cells);
        self
    }
}

impl<const N: usize> fmt::Display for Table<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        in_columns(f, &self.headers, &self.rows, self.hide_empty)
    }
}

/// Writes titles, a rule and rows of as many cells in aligned columns.
pub(super) fn in_columns<R: AsRef<[String]>>(
    f: &mut fmt::Formatter<'_>,
    titles: &[String],
    rows: &[R],
    hide_empty: bool,
) -> fmt::Result {
    let column = |index: usize| {
        let cells = || rows.iter().map(|row| row.as_ref()[index].as_str());
        let width = cells().map(width).chain([width(&titles[index])]).max();
        let numeric = cells().all(|cell| is_number(cell) || is_missing(cell));
        Column {
            hidden: hide_empty && cells().all(is_missing),
            width: width.unwrap_or(0),
            right: numeric && cells().any(is_number),
        }
    };
    let columns: Vec<Column> = (0..titles.len()).map(column).collect();
    let rules: Vec<String> = (columns.iter())
        .map(|column| "-".repeat(column.width))
        .collect();
    let head = [titles, &rules].into_iter();
    for row in head.chain(rows.iter().map(AsRef::as_ref)) {
        let cells: Vec<String> = row
            .iter()
            .zip(&columns)
            .filter(|(_, column)| !column.hidden)
            .map(|(cell, column)| column.pad(cell))
            .collect();
        writeln!(f, "{}", cells.join(GAP).trim_end())?;
    }
    Ok(())
}

struct Column {
    hidden: bool,
    /// In characters.
    width: usize,
    right: bool,
}

impl Column {
    fn pad(&self, cell: &str) -> String {
        let width = self.width;
        if self.right {
            format!("{cell:>width$}")
        } else {
            format!("{cell:<width$}")
        }
    }
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

fn is_number(cell: &str) -> bool {
    let unsigned = cell.strip_prefix(['-', '+', '\u{2212}']).unwrap_or(cell);
    unsigned.starts_with(|first: char| first.is_ascii_digit())
}

pub(super) fn is_missing(cell: &str) -> bool {
    matches!(cell, "" | "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_by_kind_and_width() {
        let mut table = Table::new(["name", "change", "note"]);
        table.row(["é".into(), "-12.5%".into(), "3 of 4".into()]);
        table.row(["longer name".into(), "+3%".into(), "ok".into()]);
        table.row(["x".into(), "-".into(), String::new()]);
        let expected = "\
name         change  note
-----------  ------  ------
é            -12.5%  3 of 4
longer name     +3%  ok
x                 -
";
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn an_empty_table_is_its_header() {
        assert_eq!(Table::new(["a", "bc"]).to_string(), "a  bc\n-  --\n");
        assert_eq!(Table::new([]).to_string(), "\n\n");
    }
}
