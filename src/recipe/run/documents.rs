//! Tables of measurements in the README and in the cards are those of the committed files that they
//! name.
//!
//! A line `<!-- table: FILE -->` before a table says where it is from. A table that nobody could
//! have copied row by row from two runs is one that is compared whole.

use std::path::{Path, PathBuf};

use crate::evaluation::{ClassifiedVerdict, classified_table};
use crate::recipe::results::Verdicts;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The README and the cards.
fn documents() -> Vec<PathBuf> {
    let cards = std::fs::read_dir(root().join("artifacts/pretrained")).unwrap();
    let mut all: Vec<PathBuf> = cards
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "md"))
        .collect();
    all.push(root().join("README.md"));
    all
}

/// What is read of `eval.json`.
#[derive(serde::Deserialize)]
struct Evaluated {
    verdicts: Vec<ClassifiedVerdict>,
}

/// The table of a result file as the program prints it.
fn printed(file: &Path) -> String {
    let text =
        std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    match serde_json::from_str::<Evaluated>(&text) {
        Ok(evaluation) => classified_table(&evaluation.verdicts).to_string(),
        Err(_) => serde_json::from_str::<Verdicts>(&text).unwrap().to_string(),
    }
}

/// Tables of scores, each with the file that it names: blocks of code, or Markdown tables.
fn tables(text: &str) -> Vec<(Option<String>, String)> {
    let mut found = Vec::new();
    let mut source = None;
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(named) = line.strip_prefix("<!-- table: ") {
            source = named.strip_suffix(" -->").map(str::to_owned);
            continue;
        }
        let block: String = if line.starts_with("```") {
            let inside = lines.by_ref().take_while(|line| !line.starts_with("```"));
            inside.map(|line| format!("{line}\n")).collect()
        } else if line.starts_with('|') {
            let rest = lines.by_ref().take_while(|line| line.starts_with('|'));
            std::iter::once(line)
                .chain(rest)
                .map(|line| format!("{line}\n"))
                .collect()
        } else {
            if !line.trim().is_empty() {
                source = None;
            }
            continue;
        };
        let header = block.lines().next().unwrap_or_default();
        if header.split(['|', ' ']).any(|word| word == "FID") {
            found.push((source.take(), block));
        }
    }
    found
}

#[test]
fn tables_of_scores_are_those_of_the_files_they_name() {
    let mut held = 0;
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        for (source, block) in tables(&text) {
            let place = document.display();
            let source =
                source.unwrap_or_else(|| panic!("{place}: a table names no file:\n{block}"));
            if source == "recipes" {
                published(&block);
            } else {
                let printed = printed(&root().join(&source));
                assert_eq!(block, printed, "{place} shows another table than {source}");
            }
            held += 1;
        }
    }
    assert!(
        held >= 4,
        "{held} tables: those of the README and the teacher's card are missing"
    );
}

/// Each row's recipes state the published scores that the row shows, in their first lines.
fn published(block: &str) {
    for row in block.lines().skip(2) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
        let headers: String = cells[0]
            .split('(')
            .filter_map(|part| part.split_once(')').map(|(path, _)| path))
            .map(|path| {
                let text = std::fs::read_to_string(root().join(path)).unwrap();
                let head = text.lines().take_while(|line| line.starts_with('#'));
                head.collect::<Vec<_>>().join("\n")
            })
            .collect();
        for number in cells[2].split([',', ' ']).filter(|word| word.contains('.')) {
            assert!(
                headers.contains(number),
                "{row}: no recipe says {number}:\n{headers}"
            );
        }
    }
}

#[test]
fn the_classifiers_cards_say_what_their_files_say() {
    use crate::weights::EmbeddedName;
    for (name, card) in [
        (EmbeddedName::DigitsFeatures, "digits-features"),
        (EmbeddedName::FashionFeatures, "fashion-features"),
    ] {
        let checkpoint = crate::weights::embedded::checkpoint(name).unwrap();
        let note = &checkpoint.provenance.note;
        let accuracy = note.split(' ').find(|word| word.starts_with("0.")).unwrap();
        let card = root().join(format!("artifacts/pretrained/{card}.md"));
        let card = std::fs::read_to_string(card).unwrap();
        for said in [
            format!("| Test accuracy | {accuracy} "),
            format!(
                "| Weights, SHA-256 | {} |",
                checkpoint.fingerprint().unwrap()
            ),
        ] {
            assert!(card.contains(&said), "{said}");
        }
    }
}

#[test]
fn the_readme_says_how_fast_as_the_benches_do() {
    let read = |name: &str| std::fs::read_to_string(root().join(name)).unwrap();
    let benches = read("benches/README.md");
    let table = benches
        .lines()
        .skip_while(|line| !line.starts_with("| size | workload | PyTorch, ms | TinyFusion, ms |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    let mut times: Vec<&str> = table
        .map(|row| row.split('|').nth(5).unwrap().trim())
        .collect();
    times.sort_by(|a, b| f64::total_cmp(&a.parse().unwrap(), &b.parse().unwrap()));
    let said = format!("{} to {} times as fast", times[0], times[times.len() - 1]);
    assert!(read("README.md").contains(&said), "{said}");
}

/// Markdown tables, each with its head, without the rule under it, which only aligns columns.
fn whole_tables(text: &str) -> Vec<Vec<String>> {
    let lines: Vec<&str> = text.lines().collect();
    let is_head = |at: usize| {
        let rule = lines.get(at + 1).is_some_and(|line| line.starts_with("|-"));
        rule && lines[at].starts_with('|')
    };
    let heads = (0..lines.len()).filter(|at| is_head(*at));
    heads
        .map(|head| {
            let rows = (head + 2..lines.len())
                .take_while(|at| lines[*at].starts_with('|') && !is_head(*at));
            std::iter::once(head)
                .chain(rows)
                .map(|at| lines[at].to_owned())
                .collect()
        })
        .collect()
}

#[test]
fn tables_of_benches_are_those_that_were_printed() {
    let pages = ["benches/README.md", "docs/clusters.md"]
        .map(|page| std::fs::read_to_string(root().join(page)).unwrap());
    let mut held = 0;
    for entry in std::fs::read_dir(root().join("artifacts/benches")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let printed = whole_tables(&std::fs::read_to_string(&path).unwrap());
        // The first tables after its name.
        let shown = pages.iter().any(|page| {
            let after = page.split_once(name).map(|(_, after)| after);
            after.is_some_and(|after| whole_tables(after).starts_with(&printed))
        });
        assert!(
            shown,
            "no page shows first of all, after {name}, its {printed:#?}"
        );
        held += printed.len();
    }
    assert!(
        held >= 7,
        "{held} tables: some of artifacts/benches are missing"
    );
}

#[test]
fn a_spliced_table_is_found() {
    let text = "<!-- table: a.json -->\n\n```\nmodel  FID\n-----  ---\nx  1\n```\n\n| a | FID |\n|---|---|\n| x | 1 |\n";
    let found = tables(text);
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].0.as_deref(), Some("a.json"));
    assert_eq!(found[1].0, None);
}
