//! Writes weights in any of the formats that are read.

use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;

use super::card::card;
use super::checkpoint::{CONFIG, mark};
use super::safetensors::write_safetensors;
use super::shards::write_shards;
use super::torch::write_torch;
use super::{Checkpoint, WeightFile};
use crate::files::{write_atomic, write_folder};
use crate::process::ProcessKind;
use crate::state::WeightsError;

/// Endings of other model formats, which are not written.
const UNKNOWN_FORMS: [&str; 9] = [
    "onnx", "gguf", "ggml", "h5", "npz", "npy", "pb", "tflite", "msgpack",
];

/// Options for writing a checkpoint.
#[derive(Debug, Clone, Default)]
pub struct Conversion {
    /// Use diffusers' names and configuration instead of the reference's; for a folder.
    pub diffusers: bool,
    /// Type of the values; by default each tensor's own, so that nothing is rounded.
    pub dtype: Option<Dtype>,
    /// Largest size of a file in bytes; larger safetensors are divided into several with an index.
    pub shard: Option<u64>,
    /// Licence of the weights, for the model card.
    pub licence: Option<String>,
    /// How good the model is, for the model card.
    pub evaluation: Option<Evaluated>,
}

/// An evaluation, and the name a model has in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluated {
    /// The model's name.
    pub model: String,
    /// The content of `eval.json`.
    pub evaluation: Value,
}

/// Writes a checkpoint to `to` and returns the files written. The ending of `to` decides the
/// format: one safetensors file, several with an index, a PyTorch state dict, or, with none of
/// these endings, a folder with the weights, the `config.json` that rebuilds the model, and a model
/// card.
///
/// Names and shapes are the reference's, which PyTorch's `load_state_dict` accepts, or diffusers'.
///
/// # Errors
/// When `to` exists; when it can't be written; when the model does not fit the layout.
pub fn convert(
    checkpoint: &Checkpoint,
    to: &Path,
    conversion: &Conversion,
) -> Result<Vec<PathBuf>, WeightsError> {
    let problem = |problem: &str| WeightsError::Model {
        path: to.to_owned(),
        problem: problem.to_owned(),
    };
    if to.exists() {
        return Err(problem("exists; nothing is overwritten, name another"));
    }
    let kind = WeightFile::of(to);
    // `model.onnx` is not meant as a folder; `TinyDiT-D14.v2` may be.
    let ending = to.extension().and_then(|ending| ending.to_str());
    if kind.is_none()
        && let Some(ending) = ending
        && UNKNOWN_FORMS.contains(&ending.to_ascii_lowercase().as_str())
    {
        return Err(WeightsError::Model {
            path: to.to_owned(),
            problem: format!(
                "the form .{ending} can't be written; there are {}, and a folder, without an ending",
                WeightFile::ENDINGS.join(", ")
            ),
        });
    }
    if kind.is_some_and(|kind| kind != WeightFile::Safetensors)
        && !checkpoint.architecture.is_shown_with_heads()
    {
        return Err(problem(
            "its sizes can't be told from tensors and one number of heads, which is all that this form says; write .safetensors, or a folder",
        ));
    }
    if conversion.diffusers && kind.is_some() {
        return Err(problem(
            "the diffusers layout is a folder: its config.json is a part of it; leave out the ending",
        ));
    }
    if conversion.licence.is_some() && kind.is_some() {
        return Err(problem(
            "a licence stands in the model card of a folder; leave out the ending",
        ));
    }
    if conversion.shard.is_some() && !matches!(kind, None | Some(WeightFile::Shards)) {
        return Err(problem(
            "several files are written for a name ending in .safetensors.index.json, or to a folder",
        ));
    }
    let (tensors, dtype) = (&checkpoint.tensors, conversion.dtype);
    let mut written = match kind {
        Some(WeightFile::Safetensors) => {
            write_safetensors(to, tensors, checkpoint.metadata()?, dtype)?;
            vec![]
        }
        Some(WeightFile::Shards) => {
            let most = conversion.shard.unwrap_or(u64::MAX);
            write_shards(to, tensors, &checkpoint.metadata()?, dtype, most)?
        }
        Some(WeightFile::Torch) => {
            write_torch(to, tensors, dtype)?;
            vec![]
        }
        None => return whole_folder(checkpoint, to, conversion),
    };
    written.push(to.to_owned());
    Ok(written)
}

/// Writes a folder, all of it or nothing.
fn whole_folder(
    checkpoint: &Checkpoint,
    to: &Path,
    conversion: &Conversion,
) -> Result<Vec<PathBuf>, WeightsError> {
    let write = |temporary: &Path| {
        let written = folder(checkpoint, temporary, to, conversion)?;
        let within = |path: PathBuf| match path.strip_prefix(temporary) {
            Ok(name) => to.join(name),
            Err(_) => path,
        };
        Ok(written.into_iter().map(within).collect())
    };
    write_folder(to, write, |error| WeightsError::io(to)(error))
}

/// Writes into the folder `into`; messages name it `to`.
fn folder(
    checkpoint: &Checkpoint,
    into: &Path,
    to: &Path,
    conversion: &Conversion,
) -> Result<Vec<PathBuf>, WeightsError> {
    let wrong = |problem: String| WeightsError::Model {
        path: to.to_owned(),
        problem,
    };
    let architecture = &checkpoint.architecture;
    let (stem, tensors, config) = if conversion.diffusers {
        if let Some(process) = checkpoint
            .process
            .filter(|process| process.must_be_stated())
        {
            let (family, assumed) = (process.family(), ProcessKind::ASSUMED.family());
            return Err(wrong(format!(
                "diffusers has no {family}: it would sample the model as a {assumed}; leave out --diffusers"
            )));
        }
        let tensors = checkpoint.tensors.clone();
        let (tensors, config) = architecture.write_diffusers(tensors, &checkpoint.path)?;
        ("diffusion_pytorch_model", tensors, config)
    } else {
        let config = serde_json::to_value(architecture);
        let mut config: Value = config.map_err(|error| wrong(error.to_string()))?;
        if let Some(config) = config.as_object_mut()
            && architecture.is_denoiser()
        {
            config.insert("process".to_owned(), mark(checkpoint.process).into());
        }
        ("model", checkpoint.tensors.clone(), config)
    };
    let (metadata, dtype) = (checkpoint.metadata()?, conversion.dtype);
    let mut written = if let Some(most) = conversion.shard {
        let index = into.join(format!("{stem}.safetensors.index.json"));
        let mut written = write_shards(&index, &tensors, &metadata, dtype, most)?;
        written.push(index);
        written
    } else {
        let file = into.join(format!("{stem}.safetensors"));
        write_safetensors(&file, &tensors, metadata, dtype)?;
        vec![file]
    };
    let texts = [
        (CONFIG, format!("{config:#}\n")),
        ("README.md", card(checkpoint, conversion)?),
    ];
    for (name, text) in texts {
        let path = into.join(name);
        write_atomic(&path, |file| file.write_all(text.as_bytes()))
            .map_err(WeightsError::io(&path))?;
        written.push(path);
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::mar::Stack;
    use crate::models::{Architecture, BlockKind, DitConfig, MarConfig, position_table};
    use crate::random::{self, Stream};
    use crate::state::{Array, StateDict, Tensors};
    use crate::weights::{Provenance, Stated, open_torch};

    fn config() -> DitConfig {
        DitConfig {
            input_size: 8,
            patch_size: 2,
            channels: 4,
            width: 24,
            depth: 3,
            heads: 3,
            mlp_ratio: 4.0,
            classes: 5,
            learn_sigma: true,
            blocks: Vec::new(),
            widths: None,
        }
    }

    fn drawn(tensors: Vec<(String, Vec<usize>)>) -> StateDict {
        let named = tensors.into_iter().zip(0..);
        let drawn = named.map(|((name, shape), index)| {
            let count = shape.iter().product();
            let values = random::normal(1, Stream::Noise, 0, index, count);
            (name, Array::new(shape, values))
        });
        drawn.collect()
    }

    fn checkpoint(config: &DitConfig) -> Checkpoint {
        let mut state = drawn(config.tensors());
        let table = position_table(config.width, config.input_size / config.patch_size);
        state.insert("pos_embed".into(), Array::new([1, 16, config.width], table));
        let provenance = Provenance {
            recipe: "d14".into(),
            kept: Some(vec![0, 2, 3]),
            parent_depth: Some(6),
            ..Provenance::default()
        };
        let architecture = Architecture::Dit(config.clone());
        Checkpoint::new(architecture, state.into(), provenance, Path::new("parent"))
    }

    fn bytes(tensors: &Tensors) -> Vec<(String, Dtype, Vec<u8>)> {
        tensors
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.dtype(), tensor.bytes().unwrap()))
            .collect()
    }

    #[test]
    fn every_form_comes_back_to_the_bit() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let first = checkpoint(&config());
        for dtype in [None, Some(Dtype::F16), Some(Dtype::BF16), Some(Dtype::F64)] {
            let plain = Conversion {
                dtype,
                ..Conversion::default()
            };
            let start = at(&format!("start-{dtype:?}.safetensors"));
            convert(&first, &start, &plain).unwrap();
            let start = Checkpoint::read(&start).unwrap();
            let expected = bytes(&start.tensors);
            assert!(
                expected
                    .iter()
                    .all(|(_, found, _)| *found == dtype.unwrap_or(Dtype::F32))
            );
            let mut last = start;
            // Each is converted from the one before, so that every format is read and written.
            let diffusers = Conversion {
                diffusers: true,
                ..Conversion::default()
            };
            let shards = Conversion {
                shard: Some(20_000),
                ..Conversion::default()
            };
            let kept = Conversion::default();
            for (name, conversion) in [
                ("a.pt", &kept),
                ("b.safetensors.index.json", &shards),
                ("c", &diffusers),
                ("d", &kept),
                (
                    "e",
                    &Conversion {
                        shard: Some(20_000),
                        ..diffusers.clone()
                    },
                ),
                ("f.pth", &kept),
                ("g", &shards),
                ("h.safetensors", &kept),
            ] {
                let path = at(&format!("{dtype:?}-{name}"));
                let written = convert(&last, &path, conversion).unwrap();
                assert!(written.iter().all(|path| path.is_file()), "{written:?}");
                // A .pt has no field for heads, and no published model is that narrow.
                let torch = matches!(WeightFile::of(&path), Some(WeightFile::Torch));
                let stated = Stated {
                    heads: torch.then_some(3),
                    ..Stated::default()
                };
                let next = Checkpoint::read_stated(&path, &stated).unwrap();
                assert_eq!(next.architecture, first.architecture, "{name}");
                assert!(
                    bytes(&next.tensors) == expected,
                    "{name} of {dtype:?} differs"
                );
                if name == "c" {
                    last.provenance = first.provenance.clone();
                }
                last = next;
            }
            // Provenance is lost in a.pt, which can't hold it, and is not invented afterwards.
            assert_eq!(last.provenance, Provenance::default());
        }
    }

    #[test]
    fn branches_and_pairs_come_back_to_the_bit() {
        use BlockKind::{Attention, Mlp, Pair, Whole};
        let folder = tempfile::tempdir().unwrap();
        let branches = config().of_blocks(vec![Attention, Whole, Mlp, Mlp]);
        let pairs = config().of_blocks(vec![Pair, Whole, Pair]);
        let stack = Stack {
            width: 24,
            depth: 4,
            heads: 3,
        };
        let mar = MarConfig {
            input_size: 8,
            patch_size: 2,
            channels: 4,
            classes: 5,
            buffer: 3,
            mlp_ratio: 4.0,
            encoder: stack,
            decoder: stack,
            head_width: 16,
            head_depth: 2,
            blocks: Vec::new(),
            widths: None,
        };
        let mar = |blocks: [Vec<BlockKind>; 2]| {
            let architecture = Architecture::Mar(mar.of_blocks(blocks));
            let state = drawn(architecture.tensors());
            let provenance = Provenance::default();
            Checkpoint::new(architecture, state.into(), provenance, Path::new("parent"))
        };
        for (index, first) in [
            checkpoint(&branches),
            checkpoint(&pairs),
            mar([vec![Mlp, Attention, Whole], vec![Attention, Attention]]),
            mar([vec![Pair, Pair], vec![Whole, Pair]]),
        ]
        .into_iter()
        .enumerate()
        {
            let shards = Conversion {
                shard: Some(20_000),
                ..Conversion::default()
            };
            let kept = Conversion::default();
            let mut last = None;
            for (name, conversion) in [
                ("a.safetensors", &kept),
                ("b.pt", &kept),
                ("c.safetensors.index.json", &shards),
                ("d", &kept),
                ("e.pth", &kept),
                ("f", &shards),
                ("g.safetensors", &kept),
            ] {
                let path = folder.path().join(format!("{index}-{name}"));
                let from = last.as_ref().unwrap_or(&first);
                let written = convert(from, &path, conversion);
                let torch = matches!(WeightFile::of(&path), Some(WeightFile::Torch));
                let by_tensors = torch || name.ends_with(".index.json");
                if by_tensors && matches!(first.architecture, Architecture::Mar(_)) {
                    // They don't show the sizes of a MAR that is not published.
                    written.unwrap_err();
                    continue;
                }
                written.unwrap();
                let stated = Stated {
                    heads: torch.then_some(3),
                    ..Stated::default()
                };
                let next = Checkpoint::read_stated(&path, &stated).unwrap();
                assert_eq!(next.architecture, first.architecture, "{name}");
                assert!(bytes(&next.tensors) == bytes(&first.tensors), "{name}");
                last = Some(next);
            }
            let diffusers = Conversion {
                diffusers: true,
                ..Conversion::default()
            };
            let path = folder.path().join(format!("{index}-diffusers"));
            convert(&first, &path, &diffusers).unwrap_err();
            assert!(!path.exists());
        }
    }

    #[test]
    fn what_can_not_be_written_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let says = |checkpoint: &Checkpoint, name: &str, conversion: &Conversion| {
            convert(checkpoint, &at(name), conversion)
                .unwrap_err()
                .to_string()
        };
        let (whole, kept) = (checkpoint(&config()), Conversion::default());
        std::fs::write(at("there.pt"), "x").unwrap();
        assert!(says(&whole, "there.pt", &kept).contains("exists"));
        let diffusers = Conversion {
            diffusers: true,
            ..kept.clone()
        };
        assert!(says(&whole, "x.pt", &diffusers).contains("folder"));
        let shards = Conversion {
            shard: Some(1),
            ..kept.clone()
        };
        assert!(says(&whole, "x.pt", &shards).contains("index.json"));
        let mut moved = checkpoint(&config()).tensors.read_all().unwrap();
        moved.get_mut("pos_embed").unwrap().data[5] += 1e-4;
        let moved = Checkpoint::new(
            whole.architecture.clone(),
            moved.into(),
            Provenance::default(),
            Path::new("moved"),
        );
        assert!(says(&moved, "x", &diffusers).contains("position table"));
        assert!(!at("x").exists());
    }

    #[test]
    fn a_layout_that_does_not_fit_is_named_tensor_by_tensor() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let diffusers = Conversion {
            diffusers: true,
            ..Conversion::default()
        };
        convert(&checkpoint(&config()), &at("m"), &diffusers).unwrap();
        let weights = at("m/diffusion_pytorch_model.safetensors");
        let (tensors, _) = super::super::open_safetensors(&weights).unwrap();
        let mut state = tensors.read_all().unwrap();
        let lost = state
            .remove("transformer_blocks.1.attn1.to_k.bias")
            .unwrap();
        state.insert("transformer_blocks.1.attn1.to_x.bias".into(), lost);
        let copy = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight";
        state.get_mut(copy).unwrap().data[0] += 1.0;
        write_safetensors(&weights, &state.into(), Default::default(), None).unwrap();
        let error = Checkpoint::read(&at("m")).unwrap_err().to_string();
        for says in [
            "missing   transformer_blocks.1.attn1.to_k.bias",
            "surplus   transformer_blocks.1.attn1.to_x.bias",
            "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight differs",
        ] {
            assert!(error.contains(says), "{error}");
        }
        std::fs::remove_file(at("m/config.json")).unwrap();
        let error = Checkpoint::read(&at("m")).unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
    }

    #[test]
    fn all_that_is_wrong_with_a_state_dict_is_said_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pt");
        let mut state = checkpoint(&config()).tensors.read_all().unwrap();
        state.remove("blocks.1.mlp.fc2.bias");
        state.remove("t_embedder.mlp.0.bias");
        state.insert(
            "blocks.2.attn.proj.bias".into(),
            Array::new([3], vec![0.0; 3]),
        );
        state.insert("sigma".into(), Array::new([1], vec![0.0]));
        write_torch(&path, &state.into(), None).unwrap();
        let stated = Stated {
            heads: Some(3),
            ..Stated::default()
        };
        let error = Checkpoint::read_stated(&path, &stated)
            .unwrap_err()
            .to_string();
        for says in [
            "missing   blocks.1.mlp.fc2.bias [24]",
            "missing   t_embedder.mlp.0.bias [24]",
            "misshapen blocks.2.attn.proj.bias: expected [24], found [3]",
            "surplus   sigma [1]",
        ] {
            assert!(error.contains(says), "{error}");
        }
        let error = Checkpoint::read(&path).unwrap_err().to_string();
        assert!(error.contains("24 wide"), "{error}");
        let other = StateDict::from([("conv.weight".to_owned(), Array::new([1], vec![0.0]))]);
        write_torch(&path, &other.into(), None).unwrap();
        let error = Checkpoint::read(&path).unwrap_err().to_string();
        assert!(
            error.contains("`pos_embed` of 3 dimensions") && error.contains("conv.weight"),
            "{error}"
        );
        assert!(open_torch(&path, None).is_ok());
    }
}
