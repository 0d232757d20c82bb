//! Pages that stand alone: no script, no font, no picture from elsewhere; light and dark, on a
//! phone and in print.

use std::fmt::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::svg::escaped;
use super::table::{in_columns, is_missing};

/// What a page looks like.
const STYLE: &str = "
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2126; --pale: #5b6470; --line: #d9dee4; --tint: #f3f6f9; --link: #0b5cad }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e6e8eb; --pale: #a3acb7; --line: #343a42; --tint: #1e2228; --link: #7fb8f0 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, 'Liberation Sans', Arial, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .8rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem }
a { color: var(--link) }
p.facts, figcaption, caption, .pale { color: var(--pale) }
.verdict { font-size: 1.15rem; background: var(--tint); border-left: 4px solid var(--link); padding: .8rem 1rem; margin: 1rem 0 }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
caption { text-align: left; caption-side: bottom; padding-top: .5rem; font-size: .88rem }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; white-space: nowrap }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 12rem }
thead th { border-bottom: 2px solid var(--line) }
td.number, th.number { text-align: right }
tr.best td, tr.best th { font-weight: 600 }
figure { margin: 1rem 0; overflow-x: auto }
figure img, figure svg { width: 100%; max-width: 60rem; min-width: 32rem; height: auto }
figure img { image-rendering: pixelated; border: 1px solid var(--line) }
figcaption { font-size: .88rem }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 1.5rem }
pre { overflow-x: auto; background: var(--tint); padding: .8rem; font-size: .85rem; line-height: 1.4 }
details summary { cursor: pointer; color: var(--link) }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .92rem }
ul.runs { list-style: none; padding: 0; columns: 18rem; font-size: .92rem }
.strip { display: flex; flex-wrap: wrap; gap: 2px }
.strip span { min-width: 1.9em; text-align: center; font-size: .75rem; border: 1px solid var(--line); padding: 1px 2px; color: var(--pale) }
.strip span.kept { background: var(--link); color: var(--paper); border-color: var(--link) }
.skip { position: absolute; left: -999rem }
.skip:focus { position: static }
@media print { details { display: none } }
";

/// A page that is being written.
#[derive(Debug, Default)]
pub struct Page {
    title: String,
    body: String,
    /// Headings of sections, with the names they are linked by.
    sections: Vec<(String, String)>,
}

impl Page {
    /// An empty page.
    pub fn new(title: &str) -> Self {
        Self {
            title: title.to_owned(),
            ..Self::default()
        }
    }

    /// Begins a section.
    pub fn section(&mut self, heading: &str) {
        let name = format!("s{}", self.sections.len() + 1);
        self.put(format_args!("<h2 id=\"{name}\">{}</h2>", escaped(heading)));
        self.sections.push((name, heading.to_owned()));
    }

    /// Begins a part of a section.
    pub fn part(&mut self, heading: &str) {
        self.put(format_args!("<h3>{}</h3>", escaped(heading)));
    }

    /// A paragraph, of a class of the style sheet or of none.
    pub fn paragraph(&mut self, class: &str, text: &str) {
        let class = match class {
            "" => String::new(),
            class => format!(" class=\"{class}\""),
        };
        self.put(format_args!("<p{class}>{}</p>", escaped(text)));
    }

    /// A text whose lines stay as they are, behind a word that opens it.
    pub fn folded(&mut self, word: &str, text: &str) {
        self.put(format_args!(
            "<details><summary>{}</summary><pre tabindex=\"0\">{}</pre></details>",
            escaped(word),
            escaped(text)
        ));
    }

    /// A command or another text whose lines stay as they are.
    pub fn verbatim(&mut self, text: &str) {
        self.put(format_args!("<pre tabindex=\"0\">{}</pre>", escaped(text)));
    }

    /// A table. Columns whose cells are all numbers are aligned right; the first cell of a row is
    /// its heading.
    pub fn table(&mut self, grid: &Grid, caption: &str) {
        let numeric: Vec<bool> = (0..grid.titles.len())
            .map(|column| {
                let mut cells = grid.rows.iter().map(|row| row[column].as_str());
                column > 0
                    && cells.all(|cell| {
                        cell == "-" || cell.starts_with(|c: char| c.is_ascii_digit() || c == '-')
                    })
            })
            .collect();
        let class = |column: usize| {
            if numeric[column] {
                " class=\"number\""
            } else {
                ""
            }
        };
        self.put("<div class=\"wide\" tabindex=\"0\"><table>");
        if !caption.is_empty() {
            self.put(format_args!("<caption>{}</caption>", escaped(caption)));
        }
        let titles = (grid.titles.iter().enumerate()).map(|(column, title)| {
            format!("<th scope=\"col\"{}>{}</th>", class(column), escaped(title))
        });
        self.put(format_args!(
            "<thead><tr>{}</tr></thead><tbody>",
            titles.collect::<String>()
        ));
        for (index, row) in grid.rows.iter().enumerate() {
            let cells = row.iter().enumerate().map(|(column, cell)| {
                let cell = escaped(cell);
                match column {
                    0 => format!("<th scope=\"row\">{cell}</th>"),
                    // Hashes and paths are broken where the page ends.
                    _ if cell.len() > 60 => format!("<td class=\"wrap\">{cell}</td>"),
                    _ => format!("<td{}>{cell}</td>", class(column)),
                }
            });
            let best = if grid.best == Some(index) {
                " class=\"best\""
            } else {
                ""
            };
            self.put(format_args!("<tr{best}>{}</tr>", cells.collect::<String>()));
        }
        self.put("</tbody></table></div>");
    }

    /// Links that save files which are part of the page.
    pub fn downloads(&mut self, files: &[(&str, &str, &str)]) {
        let links = files.iter().map(|(word, name, text)| {
            format!(
                "<a download=\"{}\" href=\"data:text/plain;base64,{}\">{}</a>",
                escaped(name),
                STANDARD.encode(text),
                escaped(word)
            )
        });
        let links: Vec<String> = links.collect();
        self.put(format_args!("<p class=\"pale\">{}</p>", links.join(" · ")));
    }

    /// Short lines, in columns where there is room; those with a target lead to another page
    /// beside this one.
    pub fn list(&mut self, items: &[(String, Option<String>)]) {
        let items = items.iter().map(|(text, target)| {
            let text = escaped(text);
            match target {
                Some(target) => format!("<li><a href=\"{}\">{text}</a></li>", escaped(target)),
                None => format!("<li>{text}</li>"),
            }
        });
        let items: String = items.collect();
        self.put(format_args!("<ul class=\"runs\">{items}</ul>"));
    }

    /// Begins a row of figures, side by side where there is room.
    pub fn begin_figures(&mut self) {
        self.put("<div class=\"figures\">");
    }

    /// Ends a row of figures.
    pub fn end_figures(&mut self) {
        self.put("</div>");
    }

    /// A drawing, with the values it was made of one click away.
    pub fn drawing(&mut self, svg: &str, caption: &str, data: Option<(&str, &str)>) {
        // An XML declaration has no place within a page.
        let svg = svg.find("<svg").map_or(svg, |start| &svg[start..]);
        self.put("<figure>");
        self.put(svg.trim_end());
        let link = data.map(|(name, text)| {
            format!(
                " <a download=\"{}\" href=\"data:text/csv;base64,{}\">Data</a>",
                escaped(name),
                STANDARD.encode(text)
            )
        });
        self.put(format_args!(
            "<figcaption>{}{}</figcaption></figure>",
            escaped(caption),
            link.unwrap_or_default()
        ));
    }

    /// A picture, as PNG.
    pub fn picture(&mut self, png: &[u8], caption: &str) {
        self.put(format_args!(
            "<figure><img alt=\"{0}\" src=\"data:image/png;base64,{1}\"><figcaption>{0}</figcaption></figure>",
            escaped(caption),
            STANDARD.encode(png)
        ));
    }

    /// The layers of a trunk, those that are kept filled.
    pub fn strip(&mut self, kept: &[usize], depth: usize) {
        let layers = (0..depth).map(|layer| match kept.contains(&layer) {
            true => format!("<span class=\"kept\">{layer}</span>"),
            false => format!("<span>{layer}</span>"),
        });
        let said: Vec<String> = kept.iter().map(ToString::to_string).collect();
        self.put(format_args!(
            "<div class=\"strip\" role=\"img\" aria-label=\"kept layers: {} of {depth}\">{}</div>",
            said.join(", "),
            layers.collect::<String>()
        ));
    }

    fn put(&mut self, element: impl std::fmt::Display) {
        // Writing to a string does not fail.
        let _ = writeln!(self.body, "{element}");
    }

    /// The file. A page that is `renewed` every so many seconds is loaded again by the browser.
    pub fn finish(self, lead: &str, renewed: Option<u32>) -> String {
        let links = self.sections.iter().map(|(name, heading)| {
            format!("<li><a href=\"#{name}\">{}</a></li>", escaped(heading))
        });
        let renewed =
            renewed.map(|seconds| format!("<meta http-equiv=\"refresh\" content=\"{seconds}\">\n"));
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n{}\
             <link rel=\"icon\" href=\"data:,\">\n<title>{1}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
             <a class=\"skip\" href=\"#main\">Skip to the results</a>\n<header>\n<h1>{1}</h1>\n<p class=\"facts\">{2}</p>\n\
             <nav aria-label=\"Sections\"><ul>{3}</ul></nav>\n</header>\n<main id=\"main\">\n{4}</main>\n</body>\n</html>\n",
            renewed.unwrap_or_default(),
            escaped(&self.title),
            escaped(lead),
            links.collect::<String>(),
            self.body
        )
    }
}

/// A table of text: titles, and rows of as many cells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Grid {
    /// Titles of the columns.
    pub titles: Vec<String>,
    /// The rows.
    pub rows: Vec<Vec<String>>,
    /// The row that stands out.
    pub best: Option<usize>,
}

impl Grid {
    /// The table without columns that no row has anything in.
    pub fn without_empty(mut self) -> Self {
        let filled: Vec<bool> = (0..self.titles.len())
            .map(|column| self.rows.iter().any(|row| !is_missing(&row[column])))
            .collect();
        for cells in self.rows.iter_mut().chain([&mut self.titles]) {
            let mut filled = filled.iter();
            cells.retain(|_| filled.next().is_some_and(|filled| *filled));
        }
        self
    }

    /// As CSV (RFC 4180).
    pub fn csv(&self) -> String {
        let line = |cells: &Vec<String>| {
            let cells: Vec<String> = cells
                .iter()
                .map(|cell| super::chart::csv_cell(cell))
                .collect();
            cells.join(",") + "\n"
        };
        std::iter::once(&self.titles)
            .chain(&self.rows)
            .map(line)
            .collect()
    }

    /// As Markdown.
    pub fn markdown(&self) -> String {
        let line = |cells: &Vec<String>| {
            let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let rule = format!("|{}\n", "---|".repeat(self.titles.len()));
        let rows: String = self.rows.iter().map(line).collect();
        line(&self.titles) + &rule + &rows
    }

    /// As a table of LaTeX with the rules of the package booktabs.
    pub fn latex(&self) -> String {
        let line = |cells: &Vec<String>| {
            let cells: Vec<String> = cells.iter().map(|cell| latex(cell)).collect();
            cells.join(" & ") + " \\\\\n"
        };
        let columns = "r".repeat(self.titles.len().saturating_sub(1));
        let rows: String = self.rows.iter().map(line).collect();
        format!(
            "% \\usepackage{{booktabs}}\n\\begin{{tabular}}{{l{columns}}}\n\\toprule\n{}\\midrule\n{rows}\\bottomrule\n\\end{{tabular}}\n",
            line(&self.titles)
        )
    }
}

impl std::fmt::Display for Grid {
    /// For a terminal.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        in_columns(f, &self.titles, &self.rows, false)
    }
}

/// Text with what LaTeX takes for commands taken literally.
fn latex(text: &str) -> String {
    let mut safe = String::new();
    for c in text.chars() {
        match c {
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => safe.extend(['\\', c]),
            '\\' => safe += "\\textbackslash{}",
            '~' => safe += "\\textasciitilde{}",
            '^' => safe += "\\textasciicircum{}",
            '±' => safe += "$\\pm$",
            c => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid() -> Grid {
        Grid {
            titles: ["model", "none", "FID"].map(str::to_owned).to_vec(),
            rows: vec![
                ["a_b, <c>", "-", "9.1 ± 0.2"].map(str::to_owned).to_vec(),
                ["d|e", "-", "-"].map(str::to_owned).to_vec(),
            ],
            best: Some(0),
        }
        .without_empty()
    }

    #[test]
    fn a_table_is_written_in_every_form() {
        let grid = grid();
        assert_eq!(grid.csv(), "model,FID\n\"a_b, <c>\",9.1 ± 0.2\nd|e,-\n");
        assert_eq!(
            grid.markdown(),
            "| model | FID |\n|---|---|\n| a_b, <c> | 9.1 ± 0.2 |\n| d\\|e | - |\n"
        );
        let latex = grid.latex();
        assert!(latex.contains("\\begin{tabular}{lr}\n\\toprule\nmodel & FID \\\\\n\\midrule\n"));
        assert!(
            latex.contains("a\\_b, <c> & 9.1 $\\pm$ 0.2 \\\\\n"),
            "{latex}"
        );
    }

    #[test]
    fn a_page_is_well_formed_and_asks_for_nothing() {
        let mut page = Page::new("Run <1>");
        page.section("Results");
        page.table(&grid(), "of one run");
        page.downloads(&[("CSV", "table.csv", "a,b\n")]);
        page.drawing(
            "<?xml version=\"1.0\"?>\n<svg></svg>\n",
            "a figure",
            Some(("x.csv", "1\n")),
        );
        page.picture(&[1, 2, 3], "samples");
        page.strip(&[0, 2], 3);
        let target = "a&b/report.html".to_owned();
        page.list(&[("1 < 2".into(), Some(target)), ("no page".into(), None)]);
        let text = page.finish("a lead", Some(30));
        for part in [
            "<title>Run &lt;1&gt;</title>",
            "<a href=\"#s1\">Results</a>",
            "<th scope=\"row\">a_b, &lt;c&gt;</th><td class=\"number\">9.1 ± 0.2</td>",
            "<tr class=\"best\">",
            "content=\"30\"",
            "src=\"data:image/png;base64,AQID\"",
            "aria-label=\"kept layers: 0, 2 of 3\"",
            "<li><a href=\"a&amp;b/report.html\">1 &lt; 2</a></li><li>no page</li></ul>",
        ] {
            assert!(text.contains(part), "`{part}` is missing:\n{text}");
        }
        for outside in ["http://", "https://", "<script", "<?xml"] {
            assert!(!text.contains(outside), "{outside}");
        }
        for name in [
            "div", "table", "figure", "details", "main", "header", "p", "h2", "ul", "li",
        ] {
            let opened = text.matches(&format!("<{name}>")).count()
                + text.matches(&format!("<{name} ")).count();
            assert_eq!(
                opened,
                text.matches(&format!("</{name}>")).count(),
                "{name}"
            );
        }
    }
}
