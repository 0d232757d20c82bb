//! The files beside a page: its tables and figures, each in `report/` as well.

use std::path::{Path, PathBuf};

use super::PAGE;
use super::figures::Figure;
use crate::recipe::RecipeError;
use crate::recipe::run::directory::write_text;
use crate::report::{Grid, Page};

/// Files beside the page, by their names.
#[derive(Default)]
pub(super) struct Beside(Vec<(String, String)>);

impl Beside {
    /// Puts a table on the page, with its other forms one click away and beside it.
    pub(super) fn table(&mut self, page: &mut Page, grid: &Grid, caption: &str) {
        page.table(grid, caption);
        let (csv, markdown, latex) = (grid.csv(), grid.markdown(), grid.latex());
        page.downloads(&[
            ("CSV", "models.csv", &csv),
            ("Markdown", "models.md", &markdown),
            ("LaTeX", "models.tex", &latex),
        ]);
        self.0.extend([
            ("models.csv".into(), csv),
            ("models.md".into(), markdown),
            ("models.tex".into(), latex),
        ]);
    }

    /// Writes the page, and its files beside it.
    pub(super) fn finish(
        self,
        page: Page,
        into: &Path,
        lead: &str,
        renewed: Option<u32>,
    ) -> Result<PathBuf, RecipeError> {
        let folder = into.join("report");
        std::fs::create_dir_all(&folder).map_err(RecipeError::io(&folder))?;
        for (name, text) in &self.0 {
            write_text(&folder.join(name), text)?;
        }
        let path = into.join(PAGE);
        write_text(&path, &page.finish(lead, renewed))?;
        Ok(path)
    }

    /// Puts a figure on the page, and its files beside it.
    pub(super) fn show(&mut self, page: &mut Page, (name, chart): Figure, prefix: &str) {
        // What can't be drawn, such as a curve of one value that is not finite, is left out.
        let Ok(svg) = chart.svg() else {
            return;
        };
        let name = format!("{prefix}{name}");
        self.drawing(page, &name, &chart.title, (svg, chart.csv()));
    }

    /// Puts a drawing on the page, with its data.
    pub(super) fn drawing(
        &mut self,
        page: &mut Page,
        name: &str,
        title: &str,
        (svg, csv): (String, String),
    ) {
        page.drawing(&svg, title, Some((&format!("{name}.csv"), &csv)));
        self.0.push((format!("{name}.svg"), svg));
        self.0.push((format!("{name}.csv"), csv));
    }
}
