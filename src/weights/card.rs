//! The model card that goes with weights: what they are, where they came from, how good they were measured to be.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use super::{Checkpoint, Conversion, Provenance, WeightsError};

/// The card, as Markdown with the header that model hubs read.
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
        path,
        ..
    } = checkpoint;
    let licence = conversion.licence.as_deref();
    writeln!(out, "---\nlicense: {}", licence.unwrap_or("other"))?;
    if conversion.diffusers {
        writeln!(out, "library_name: diffusers")?;
    }
    writeln!(out, "tags: [diffusion, pruned, tinyfusion]\n---\n")?;
    writeln!(out, "# {}\n", checkpoint.model())?;
    match (&provenance.kept, provenance.parent_depth) {
        (Some(kept), Some(depth)) => writeln!(
            out,
            "{} of {depth} layers of its parent, counted from 0: {kept:?}.\n",
            kept.len()
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
    match verdict(path) {
        Some((protocol, verdict)) => {
            writeln!(
                out,
                "```json\n{verdict:#}\n```\n\nunder this protocol:\n\n```json\n{protocol:#}\n```\n"
            )?;
        }
        None => writeln!(
            out,
            "No evaluation lies beside the weights. `tinyfusion evaluate` makes one.\n"
        )?,
    }

    writeln!(out, "## How to load it\n")?;
    if conversion.diffusers {
        writeln!(
            out,
            "```python\nfrom diffusers import DiTTransformer2DModel\nmodel = DiTTransformer2DModel.from_pretrained(\"THIS_FOLDER\")\nfor block in model.transformer_blocks:\n    block.norm1.emb.time_proj.downscale_freq_shift = 0\n```\n\nThe loop is part of it: diffusers spaces the frequencies of timesteps otherwise than DiT does, which changes the predicted\nnoise by some percent (of a trained model up to 3.6%). With it the outputs are those of the original code."
        )
    } else if conversion.shard.is_some() {
        writeln!(
            out,
            "Names and shapes are those of the original PyTorch code; a model of the sizes in `config.json` takes them as\n\n```python\nfrom glob import glob\nfrom safetensors.torch import load_file\nstate = {{}}\nfor file in glob(\"model-*.safetensors\"):\n    state.update(load_file(file))\nmodel.load_state_dict(state, strict=True)\n```"
        )
    } else {
        writeln!(
            out,
            "Names and shapes are those of the original PyTorch code; a model of the sizes in `config.json` takes them as\n\n```python\nfrom safetensors.torch import load_file\nmodel.load_state_dict(load_file(\"model.safetensors\"), strict=True)\n```"
        )
    }
}

/// What an evaluation of the run that made a checkpoint found: its protocol, and the line of this model.
fn verdict(checkpoint: &Path) -> Option<(Value, Value)> {
    let stage = checkpoint.parent()?;
    let (_, name) = stage.file_name()?.to_str()?.split_once('-')?;
    let stages = std::fs::read_dir(stage.parent()?).ok()?;
    let mut folders: Vec<_> = stages.flatten().map(|folder| folder.path()).collect();
    // A folder lists its entries in any order; of several evaluations the first stage's counts.
    folders.sort();
    folders.iter().find_map(|folder| {
        let text = std::fs::read_to_string(folder.join("eval.json")).ok()?;
        let json: Value = serde_json::from_str(&text).ok()?;
        let verdicts = json.get("verdicts")?.as_array()?;
        let ours = verdicts.iter().find(|verdict| verdict["model"] == name)?;
        Some((json.get("protocol")?.clone(), ours.clone()))
    })
}
