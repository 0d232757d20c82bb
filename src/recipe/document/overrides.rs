//! Values that are put into a recipe after it was written: by the command line, by a sweep.

use toml::de::DeValue;

use super::diagnostic::{Diagnostic, Origin};
use super::{Entry, Node, Value, own, string_in, table_of, title, too_deep};

/// Puts the value of `path.to.key=value` where the path leads.
pub(super) fn assign(root: &mut Node, assignment: &str, origin: &Origin) -> Result<(), Diagnostic> {
    let Some((path, value)) = assignment.split_once('=') else {
        return Err(Diagnostic::new(origin, "expected `key=value`"));
    };
    let value = value.trim();
    let mut faults = Vec::new();
    let parsed = match too_deep(value) {
        Some(_) => None,
        None => DeValue::parse(value).ok(),
    };
    // No key holds a time of day, and groups of 14:28 look like one.
    let parsed = parsed.filter(|value| !matches!(value.get_ref(), DeValue::Datetime(_)));
    let value = match parsed {
        Some(value) => own(value.into_inner(), origin, &|_| origin.clone(), &mut faults),
        None => Value::String(value.to_owned()),
    };
    if let Some(fault) = faults.pop() {
        return Err(fault);
    }
    let node = Node {
        value,
        origin: origin.clone(),
    };
    place(root, path, node)
}

/// Puts a value where a path leads.
pub(super) fn place(root: &mut Node, path: &str, node: Node) -> Result<(), Diagnostic> {
    let origin = &node.origin.clone();
    let path: Vec<&str> = path.trim().split('.').collect();
    if path.contains(&"") {
        return Err(Diagnostic::new(origin, "a part of the key is empty"));
    }
    let mut parent = root;
    for depth in 0..path.len() - 1 {
        parent = descend(parent, &path[..=depth], origin)?;
    }
    let last = path[path.len() - 1];
    if let Value::Table(table) = &mut parent.value {
        table.insert(
            last.to_owned(),
            Entry {
                key: origin.clone(),
                node,
            },
        );
    } else {
        *descend(parent, &path, origin)? = node;
    }
    Ok(())
}

/// The child named by the last segment of `path`.
pub(super) fn descend<'n>(
    node: &'n mut Node,
    path: &[&str],
    origin: &Origin,
) -> Result<&'n mut Node, Diagnostic> {
    let segment = path[path.len() - 1];
    let index = match &node.value {
        Value::Array(items) => position(items, segment).filter(|index| *index < items.len()),
        Value::Table(table) => table.contains_key(segment).then_some(0),
        _ => None,
    };
    // A suggestion is expensive among long keys, so it is made only if there is no child.
    let Some(index) = index else {
        return Err(no_child(&node.value, path, origin));
    };
    let child = match &mut node.value {
        Value::Table(table) => table.get_mut(segment).map(|entry| &mut entry.node),
        Value::Array(items) => items.get_mut(index),
        _ => None,
    };
    child.ok_or_else(|| Diagnostic::new(origin, "there is no such key"))
}

fn no_child(parent: &Value, path: &[&str], origin: &Origin) -> Diagnostic {
    let segment = path[path.len() - 1];
    let absent = format!("there is no `{}` in the recipe", path.join("."));
    match parent {
        Value::Table(table) => {
            let keys = table.keys().map(String::as_str);
            let mut fault = Diagnostic::new(origin, absent).suggesting(segment, keys);
            // A stage's key without the `stage.` before it.
            let stages = match table.get("stage").map(|entry| &entry.node.value) {
                Some(Value::Array(stages)) => stages.as_slice(),
                _ => &[],
            };
            let mut titles = stages.iter().filter_map(table_of).filter_map(title);
            if titles.any(|title| title == segment) {
                fault.suggestion = Some(format!("stage.{segment}"));
            }
            fault
        }
        Value::Array(items) => {
            let titles = items.iter().filter_map(table_of).filter_map(title);
            Diagnostic::new(origin, absent).suggesting(segment, titles)
        }
        other => {
            let parent = path[..path.len() - 1].join(".");
            let message = format!("`{parent}` is {}, which has no `{segment}`", other.kind());
            Diagnostic::new(origin, message)
        }
    }
}

/// The index of the list item that a segment names: by index, by title, or by a kind that occurs
/// once.
fn position(items: &[Node], segment: &str) -> Option<usize> {
    if let Ok(index) = segment.parse() {
        return Some(index);
    }
    let tables = || {
        items
            .iter()
            .enumerate()
            .filter_map(|(i, node)| Some((i, table_of(node)?)))
    };
    if let Some((index, _)) = tables().find(|(_, table)| title(table) == Some(segment)) {
        return Some(index);
    }
    let mut of_kind = tables().filter(|(_, table)| string_in(table, "kind") == Some(segment));
    match (of_kind.next(), of_kind.next()) {
        (Some((index, _)), None) => Some(index),
        _ => None,
    }
}
