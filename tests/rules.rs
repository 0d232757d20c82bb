//! The rules that hold the rooms of `src` apart.

#![allow(clippy::unwrap_used)] // a test that can't read the sources fails

use std::path::{Path, PathBuf};

/// The rooms from the ground up. A room uses those that stand before it.
const FLOORS: [&str; 26] = [
    "terminal",
    "workers",
    "backend",
    "files",
    "random",
    "images",
    "stop",
    "npz",
    "report",
    "ops",
    "trunk",
    "state",
    "models",
    "process",
    "weights",
    "data",
    "evaluation",
    "training",
    "pruning",
    "analysis",
    "recovery",
    "sampling",
    "recipe",
    "bench",
    "standin",
    "cli",
];

/// Words that name a family or a process, as identifiers begin.
const NAMES: [&str; 5] = ["Dit", "Sit", "Mar", "Gaussian", "Interpolant"];
/// The same as whole words in texts.
const WORDS: [&str; 8] = [
    "dit",
    "sit",
    "mar",
    "gaussian",
    "interpolant",
    "DiT",
    "SiT",
    "MAR",
];
/// Published files are called by their models' names, in examples of the help too.
const PUBLISHED: [&str; 3] = ["cli/mod.rs", "recipe/published.rs", "standin.rs"];

/// Files of tests alone.
const TESTS: [&str; 3] = ["tests.rs", "schema/keys.rs", "run/documents.rs"];

/// A source file, without comments and tests.
struct Source {
    /// Its path within `src`.
    path: String,
    /// The code; what stands in quotes is left out.
    code: String,
    /// What stands in quotes.
    texts: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    files.sort();
    let read = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap();
        let (code, texts) = divide(&text);
        let path = path.strip_prefix(&root).unwrap();
        Source {
            path: path.to_str().unwrap().replace('\\', "/"),
            code,
            texts,
        }
    };
    let is_test = |path: &PathBuf| TESTS.iter().any(|name| path.ends_with(name));
    files
        .iter()
        .filter(|path| !is_test(path))
        .map(read)
        .collect()
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => walk(&path, files),
            false if path.extension().is_some_and(|ending| ending == "rs") => files.push(path),
            false => {}
        }
    }
}

/// Code and texts of a file. A module of tests is its end.
fn divide(text: &str) -> (String, String) {
    let tests = text.match_indices("#[cfg(").map(|(at, _)| at).find(|at| {
        let mut lines = text[*at..].lines();
        let is_test = lines.next().is_some_and(|line| line.contains("test"));
        is_test
            && lines
                .next()
                .is_some_and(|line| line.contains("mod tests {"))
    });
    let mut rest = &text[..tests.unwrap_or(text.len())];
    let (mut code, mut texts) = (String::new(), String::new());
    while let Some(first) = rest.chars().next() {
        let end = |text: &str, mark: &str, from: usize| {
            text[from..]
                .find(mark)
                .map_or(text.len(), |at| from + at + mark.len())
        };
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("r#\"") {
            let length = end(rest, "\"#", 3);
            texts.push_str(&rest[..length]);
            length
        } else if first == '"' {
            let mut length = 1;
            let mut escaped = false;
            for c in rest[1..].chars() {
                length += c.len_utf8();
                if c == '"' && !escaped {
                    break;
                }
                escaped = c == '\\' && !escaped;
            }
            texts.push_str(&rest[..length]);
            texts.push('\n');
            length
        } else if let Some(quoted) = ["'\"'", "'\\''", "'\\\"'"]
            .iter()
            .find(|q| rest.starts_with(**q))
        {
            quoted.len()
        } else {
            code.push(first);
            first.len_utf8()
        };
        rest = &rest[length..];
    }
    (code, texts)
}

/// Whether an identifier begins with a name, as `DitConfig` does with `Dit` and `Site` does not
/// with `Sit`.
fn begins(word: &str, name: &str) -> bool {
    let rest = word.strip_prefix(name);
    rest.is_some_and(|rest| !rest.starts_with(char::is_lowercase))
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
}

#[test]
fn a_room_uses_those_below_it() {
    let mut wrong = Vec::new();
    for Source { path, code, .. } in sources() {
        let room = path.split(['/', '.']).next().unwrap();
        let Some(floor) = FLOORS.iter().position(|name| *name == room) else {
            assert!(
                ["lib", "main"].contains(&room),
                "{path} is in no room that the rules know"
            );
            continue;
        };
        for used in code.split("crate::").skip(1) {
            let used = words(used).next().unwrap();
            if FLOORS[floor + 1..].contains(&used) {
                wrong.push(format!("{path} uses {used}, which stands above it"));
            }
        }
    }
    wrong.dedup();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn families_and_processes_are_named_in_their_rooms_alone() {
    let mut wrong = Vec::new();
    for Source { path, code, texts } in sources() {
        if path.starts_with("models/") || path.starts_with("process/") {
            continue;
        }
        let named = words(&code).filter(|word| NAMES.iter().any(|name| begins(word, name)));
        wrong.extend(named.map(|word| format!("{path} names {word}")));
        if PUBLISHED.contains(&path.as_str()) {
            continue;
        }
        let named = words(&texts).filter(|word| WORDS.contains(word));
        wrong.extend(named.map(|word| format!("{path} says {word}")));
    }
    wrong.dedup();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn comments_fit_100_columns() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "tests", "examples", "benches"] {
        walk(&root.join(folder), &mut files);
    }
    let mut wrong = Vec::new();
    for path in files {
        for (number, line) in std::fs::read_to_string(&path).unwrap().lines().enumerate() {
            let comment = line.trim_start();
            let wraps =
                comment.starts_with("//") && !comment.contains(" | ") && !comment.contains("://");
            if wraps && line.chars().count() > 100 {
                wrong.push(format!("{}:{}", path.display(), number + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_rules_see_what_they_forbid() {
    let text = "use crate::a; // Dit\nlet x = \"a \\\" DiT\"; let y = '\"'; Sit::b();\n#[cfg(test)]\nmod tests {\nGaussian";
    let (code, texts) = divide(text);
    assert_eq!(words(&code).filter(|word| *word == "Sit").count(), 1);
    assert!(!code.contains("Dit") && !code.contains("Gaussian"));
    assert!(words(&texts).any(|word| word == "DiT"));
}
