//! The model card beside exported weights: what they are, where they come from, and their measured
//! quality.

use std::fmt::Write;

use serde_json::Value;

use super::convert::Evaluated;
use super::{Checkpoint, Conversion, Provenance};
use crate::report::{protocol_lines, verdict_grid};
use crate::state::WeightsError;

/// A text as a value of YAML: an identifier as it is, anything else as a string in quotes.
fn yaml(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-.+_".contains(c);
    match text.starts_with(|c: char| c.is_ascii_alphabetic()) && text.chars().all(is_plain) {
        true => text.to_owned(),
        false => Value::from(text).to_string(), // JSON's strings are YAML's
    }
}

/// The card, as Markdown with the front matter that model hubs read.
pub(super) fn card(
    checkpoint: &Checkpoint,
    conversion: &Conversion,
) -> Result<String, WeightsError> {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write_card(
        &mut text,
        checkpoint,
        conversion,
        &checkpoint.fingerprint()?,
    );
    Ok(text)
}

fn write_card(
    out: &mut String,
    checkpoint: &Checkpoint,
    conversion: &Conversion,
    fingerprint: &str,
) -> std::fmt::Result {
    let Checkpoint {
        tensors,
        provenance,
        ..
    } = checkpoint;
    let licence = conversion.licence.as_deref();
    writeln!(out, "---\nlicense: {}", yaml(licence.unwrap_or("other")))?;
    if conversion.diffusers {
        writeln!(out, "library_name: diffusers")?;
    }
    writeln!(out, "tags: [diffusion, pruned, tinyfusion]\n---\n")?;
    writeln!(out, "# {}\n", checkpoint.model())?;
    match (&provenance.kept, provenance.parent_depth) {
        (Some(kept), Some(depth)) if checkpoint.architecture.pairs_of(kept, depth).is_some() => {
            writeln!(
                out,
                "All {depth} layers of its parent, neighbours on one input.\n"
            )?;
        }
        (Some(kept), Some(depth)) => writeln!(
            out,
            "{} of {depth} {} of its parent, counted from 0: {kept:?}.\n",
            kept.len(),
            provenance.granularity.layers()
        )?,
        _ => writeln!(out, "{} parameters.\n", tensors.parameters())?,
    }
    if licence.is_none() {
        writeln!(
            out,
            "**Licence:** not stated. Weights made from others are under the licence of those; say it with `tinyfusion convert --licence`.\n"
        )?;
    }
    writeln!(out, "## Where it came from\n\n| | |\n|---|---|")?;
    let rounded = conversion
        .dtype
        .filter(|dtype| tensors.iter().any(|(_, tensor)| tensor.dtype() != *dtype));
    let label = rounded.map_or("weights", |_| "weights before they were rounded");
    writeln!(out, "| {label}, SHA-256 | `{fingerprint}` |")?;
    let Provenance {
        recipe,
        recipe_sha256,
        stage,
        seed,
        steps,
        images,
        parent,
        teacher,
        groups,
        note,
        ..
    } = provenance;
    if recipe.is_empty() {
        writeln!(out, "| made by | another program; the file says no more |")?;
    } else {
        writeln!(
            out,
            "| made by | tinyfusion {}, recipe {recipe}, stage {stage}, seed {seed} |",
            env!("CARGO_PKG_VERSION")
        )?;
        writeln!(out, "| training | {steps} steps, {images} images |")?;
    }
    let rows = [
        (
            "recipe, SHA-256",
            Some(recipe_sha256).filter(|hash| !hash.is_empty()),
        ),
        ("parent, SHA-256", parent.as_ref()),
        ("teacher, SHA-256", teacher.as_ref()),
    ];
    for (label, hash) in rows {
        if let Some(hash) = hash {
            writeln!(out, "| {label} | `{hash}` |")?;
        }
    }
    if let Some(groups) = groups {
        let groups: Vec<String> = groups.iter().map(|[n, m]| format!("{n}:{m}")).collect();
        writeln!(out, "| groups | {} |", groups.join(" "))?;
    }
    if !note.is_empty() {
        writeln!(out, "| note | {note} |")?;
    }

    writeln!(out, "\n## Measured\n")?;
    if let Some(dtype) = rounded {
        writeln!(
            out,
            "Of the weights before they were rounded to {dtype:?}.\n"
        )?;
    }
    match &conversion.evaluation {
        Some(Evaluated { model, evaluation }) => write_evaluation(out, model, evaluation)?,
        None => writeln!(
            out,
            "No evaluation lies beside the weights. `tinyfusion evaluate` makes one.\n"
        )?,
    }

    writeln!(out, "## How to load it\n")?;
    if let Some(how) = checkpoint.architecture.before_loading() {
        writeln!(out, "{how}\n")?;
    }
    if conversion.diffusers {
        writeln!(out, "{}", checkpoint.architecture.in_diffusers())
    } else if conversion.shard.is_some() {
        writeln!(
            out,
            "{}\n\n```python\nfrom glob import glob\nfrom safetensors.torch import load_file\nstate = {{}}\nfor file in glob(\"model-*.safetensors\"):\n    state.update(load_file(file))\nmodel.load_state_dict(state, strict=True)\n```",
            checkpoint.architecture.named_as()
        )
    } else {
        writeln!(
            out,
            "{}\n\n```python\nfrom safetensors.torch import load_file\nmodel.load_state_dict(load_file(\"model.safetensors\"), strict=True)\n```",
            checkpoint.architecture.named_as()
        )
    }
}

/// All rows of an evaluation, this model's marked, and its protocol.
fn write_evaluation(out: &mut String, name: &str, evaluation: &Value) -> std::fmt::Result {
    let mut grid = verdict_grid(evaluation);
    for row in grid.rows.iter_mut().filter(|row| row[0] == name) {
        row.iter_mut()
            .for_each(|cell| *cell = format!("**{cell}**"));
    }
    writeln!(
        out,
        "{}\nThis model's line is the bold one. The protocol:\n\n| | |\n|---|---|",
        grid.markdown()
    )?;
    for (key, value) in protocol_lines(&evaluation["protocol"]) {
        writeln!(out, "| {key} | {} |", escaped(&value))?;
    }
    writeln!(out)
}

/// Text escaped for a table cell.
fn escaped(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_identifier_is_quoted() {
        for (text, value) in [
            ("cc-by-nc-4.0", "cc-by-nc-4.0"),
            ("mine: ask \"me\"", r#""mine: ask \"me\"""#),
            ("[a]", "\"[a]\""),
            ("4", "\"4\""),
            ("", "\"\""),
        ] {
            assert_eq!(yaml(text), value);
        }
    }

    #[test]
    fn an_evaluation_is_a_table_with_the_models_line_marked() {
        let json = serde_json::json!({
            "protocol": { "count": 2000, "vae": { "file": "v", "sha256": "1f" }, "features": "a|b" },
            "verdicts": [
                { "model": "1,437 training images", "parameters": null, "fid": 5.9338, "count": 1437 },
                { "model": "learned", "parameters": 479_624, "macs": 5_103_616, "fid": 13.0884, "count": 2000,
                  "images_per_second": { "median": 245.6, "spread": 14.4 } },
            ],
        });
        let mut text = String::new();
        write_evaluation(&mut text, "learned", &json).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..4],
            [
                "| model | parameters | MACs | images/s | samples | FID |",
                "|---|---|---|---|---|---|",
                "| 1,437 training images | - | - | - | 1437 | 5.93 |",
                "| **learned** | **480K** | **5.10M** | **246** | **2000** | **13.1** |",
            ]
        );
        for line in ["| features | a\\|b |", "| vae | file v, sha256 1f |"] {
            assert!(lines.contains(&line), "{text}");
        }
    }
}
