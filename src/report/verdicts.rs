//! The table of an evaluation, from its file: of models against held-out pictures as of archives in
//! Inception's features.

use serde_json::Value;

use super::html::Grid;
use super::numbers::{rounded, short, thousands};

/// The keys of a verdict, and their column titles.
const COLUMNS: [(&str, &str); 15] = [
    ("model", "model"),
    ("depth", "depth"),
    ("parameters", "parameters"),
    ("macs", "MACs"),
    ("images_per_second", "images/s"),
    ("images", "trained on"),
    ("count", "samples"),
    ("loss", "loss"),
    ("ssim", "SSIM"),
    ("fid", "FID"),
    ("sfid", "sFID"),
    ("inception_score", "IS"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("accuracy", "accuracy"),
];

/// All rows of an evaluation, since a score means little without the others.
pub fn verdict_grid(evaluation: &Value) -> Grid {
    let verdicts: &[Value] = evaluation["verdicts"].as_array().map_or(&[], Vec::as_slice);
    let grid = Grid {
        titles: COLUMNS.map(|(_, title)| title.to_owned()).to_vec(),
        rows: (verdicts.iter())
            .map(|verdict| COLUMNS.map(|(key, _)| cell(key, &verdict[key])).to_vec())
            .collect(),
        best: None,
    };
    grid.without_empty()
}

/// A value as a table cell.
fn cell(key: &str, value: &Value) -> String {
    let number = |value: &Value| value.as_f64().map(rounded);
    let whole = value.as_u64().and_then(|whole| usize::try_from(whole).ok());
    match (value, whole) {
        (Value::String(text), _) => Some(text.clone()),
        // As in the table of a sweep.
        (share, _) if key == "accuracy" => {
            share.as_f64().map(|share| format!("{:.1}", 100.0 * share))
        }
        (Value::Object(speed), _) => speed.get("median").and_then(number),
        (_, Some(whole)) if matches!(key, "parameters" | "macs") => Some(short(whole)),
        (_, Some(whole)) if key == "images" => Some(thousands(whole)),
        (_, Some(whole)) => Some(whole.to_string()),
        _ => number(value),
    }
    .unwrap_or_else(|| "-".to_owned())
}

/// What a protocol says, a line each, with underlines as blanks.
pub fn protocol_lines(protocol: &Value) -> Vec<(String, String)> {
    let entries = protocol.as_object().into_iter().flatten();
    entries
        .map(|(key, value)| (key.replace('_', " "), plain(value)))
        .collect()
}

/// A value of the protocol as text.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Object(parts) => {
            let parts = parts
                .iter()
                .map(|(key, value)| format!("{} {}", key.replace('_', " "), plain(value)));
            parts.collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    }
}
