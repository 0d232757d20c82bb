//! Reading whole weight files as models.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn_ndarray::NdArray;

use super::*;
use crate::models::{Architecture, DitConfig, Vae, VaeConfig, position_table};
use crate::process::ProcessKind;
use crate::random::{self, Stream};

fn config(depth: usize) -> DitConfig {
    DitConfig {
        input_size: 4,
        patch_size: 2,
        channels: 2,
        width: 12,
        depth,
        heads: 3,
        mlp_ratio: 2.0,
        classes: 3,
        learn_sigma: true,
        blocks: Vec::new(),
        widths: None,
    }
}

fn state(config: &DitConfig) -> StateDict {
    let mut state: StateDict = config
        .tensors()
        .into_iter()
        .zip(0..)
        .map(|((name, shape), index)| {
            let values = random::normal(1, Stream::Noise, 0, index, shape.iter().product());
            (name, Array::new(shape, values))
        })
        .collect();
    let table = position_table(config.width, config.input_size / config.patch_size);
    let shape = [1, config.tokens(), config.width];
    state.insert("pos_embed".into(), Array::new(shape, table));
    state
}

fn prefixed(state: &StateDict, prefix: &str) -> StateDict {
    let named = |(name, array): (&String, &Array)| (format!("{prefix}{name}"), array.clone());
    state.iter().map(named).collect()
}

fn heads() -> Stated {
    Stated {
        heads: Some(3),
        ..Stated::default()
    }
}

fn error(path: &Path, stated: &Stated) -> String {
    let error = Checkpoint::read_stated(path, stated).unwrap_err();
    error.to_string()
}

/// A checkpoint of SiT's training script: weights, their average, and the arguments.
fn sit() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sit_forward/checkpoint.pt")
}

#[test]
fn wrapped_models_are_read_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let state = state(&config(2));
    for (index, prefix) in ["module.", "_orig_mod.module.", "module._orig_mod."]
        .iter()
        .enumerate()
    {
        for ending in ["pt", "safetensors"] {
            let path = folder.path().join(format!("{index}.{ending}"));
            let wrapped = prefixed(&state, prefix).into();
            match ending {
                "pt" => write_torch(&path, &wrapped, None).unwrap(),
                _ => write_safetensors(&path, &wrapped, Default::default(), None).unwrap(),
            }
            let read = Checkpoint::read_stated(&path, &heads()).unwrap();
            assert_eq!(read.tensors.read_all().unwrap(), state, "{prefix} {ending}");
        }
    }
    // A prefix that only some names have is not stripped.
    let path = folder.path().join("mixed.pt");
    let mut mixed = prefixed(&state, "module.");
    mixed.insert("sigma".into(), Array::new([1], vec![0.0]));
    write_torch(&path, &mixed.into(), None).unwrap();
    assert!(error(&path, &heads()).contains("module.blocks.0"));
}

#[test]
fn a_lost_tensor_is_named_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.pt");
    for lost in ["blocks.3.attn.qkv.weight", "blocks.0.mlp.fc1.weight"] {
        let mut state = state(&config(6));
        state.remove(lost).unwrap();
        write_torch(&path, &state.into(), None).unwrap();
        let error = error(&path, &heads());
        assert!(error.contains("DiT, 6 layers"), "{error}");
        assert!(error.contains(&format!("missing   {lost} ")), "{error}");
        assert_eq!(error.lines().count(), 2, "{error}");
    }
    // A name may hold any number, but allocations are bounded by the tensors in the file.
    let mut state = state(&config(6));
    let block = "blocks.99999999999.attn.qkv.bias";
    state.insert(block.into(), Array::new([36], vec![0.0; 36]));
    write_torch(&path, &state.into(), None).unwrap();
    let error = error(&path, &heads());
    let says = "its highest block is 99999999999, but blocks 6, 7, 8, 9, 10, 11, 12, 13, and";
    assert!(error.contains(says), "{error}");
}

#[test]
fn heads_that_hold_otherwise_give_way() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.pt");
    write_torch(&path, &state(&config(1)).into(), None).unwrap();
    let read = |heads, heads_otherwise| {
        let stated = Stated {
            heads,
            heads_otherwise,
            ..Stated::default()
        };
        Checkpoint::read_stated(&path, &stated)
            .map(|read| read.denoiser().unwrap().heads().unwrap())
    };
    assert_eq!(read(None, Some(2)).unwrap(), 2);
    assert_eq!(read(Some(3), Some(2)).unwrap(), 3);
    let error = read(None, None).unwrap_err().to_string();
    assert!(
        error.contains("`--heads N` on the command line, `heads = N` in a recipe"),
        "{error}"
    );
    // A published width and the heads in a file of this program take precedence.
    let wide = DitConfig {
        width: 384,
        heads: 6,
        ..config(1)
    };
    let path = folder.path().join("wide.pt");
    write_torch(&path, &state(&wide).into(), None).unwrap();
    let stated = Stated {
        heads_otherwise: Some(4),
        ..Stated::default()
    };
    let read = Checkpoint::read_stated(&path, &stated).unwrap();
    assert_eq!(read.denoiser().unwrap().heads(), Some(6));
    let path = folder.path().join("ours.safetensors");
    let ours = Checkpoint::new(
        Architecture::Dit(config(1)),
        state(&config(1)).into(),
        Provenance::default(),
        &path,
    );
    ours.write().unwrap();
    let read = Checkpoint::read_stated(&path, &stated).unwrap();
    assert_eq!(read.denoiser().unwrap().heads(), Some(3));
}

#[test]
fn a_sit_is_known_by_its_training_and_stays_one() {
    let folder = tempfile::tempdir().unwrap();
    let sit = Checkpoint::read_stated(&sit(), &heads()).unwrap();
    assert_eq!(sit.process, Some(ProcessKind::SIT));
    assert!(sit.model().starts_with("SiT, 3 layers"), "{}", sit.model());
    let shards = Conversion {
        shard: Some(20_000),
        ..Conversion::default()
    };
    for (name, conversion) in [
        ("a.safetensors", &Conversion::default()),
        ("b.safetensors.index.json", &shards),
        ("c", &Conversion::default()),
    ] {
        let path = folder.path().join(name);
        convert(&sit, &path, conversion).unwrap();
        let read = Checkpoint::read(&path).unwrap();
        assert_eq!(read.process, Some(ProcessKind::SIT), "{name}");
    }
    let card = std::fs::read_to_string(folder.path().join("c/README.md")).unwrap();
    assert!(card.contains("# SiT, 3 layers"), "{card}");
    // `config.json` also names the process, for weights without metadata beside it.
    let weights = folder.path().join("c/model.safetensors");
    write_safetensors(&weights, &sit.tensors, Default::default(), None).unwrap();
    let read = Checkpoint::read(&folder.path().join("c")).unwrap();
    assert_eq!(read.process, Some(ProcessKind::SIT));

    let diffusers = Conversion {
        diffusers: true,
        ..Conversion::default()
    };
    let refused = convert(&sit, &folder.path().join("d"), &diffusers);
    assert!(refused.unwrap_err().to_string().contains("has no SiT"));
    let stated = Stated {
        process: Some(ProcessKind::Gaussian),
        ..heads()
    };
    let error = error(&super::tests::sit(), &stated);
    assert!(
        error.contains("stated to be trained by gaussian"),
        "{error}"
    );
}

#[test]
fn what_nobody_says_of_a_process_stays_unsaid() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_torch(&at("bare.pt"), &state(&config(2)).into(), None).unwrap();
    let bare = Checkpoint::read_stated(&at("bare.pt"), &heads()).unwrap();
    assert!(bare.is_unmarked());
    convert(&bare, &at("bare.safetensors"), &Conversion::default()).unwrap();
    convert(&bare, &at("bare"), &Conversion::default()).unwrap();
    for name in ["bare.safetensors", "bare"] {
        assert!(Checkpoint::read(&at(name)).unwrap().is_unmarked(), "{name}");
    }
    let interpolant = Stated {
        process: Some(ProcessKind::SIT),
        ..heads()
    };
    let read = Checkpoint::read_stated(&at("bare.pt"), &interpolant).unwrap();
    assert_eq!(read.process, Some(ProcessKind::SIT));
    let model = Stated {
        model: Some("DiT-S/2".into()),
        process: Some(ProcessKind::SIT),
        ..Stated::default()
    };
    let wide = DitConfig {
        width: 384,
        heads: 6,
        depth: 12,
        mlp_ratio: 4.0,
        ..config(12)
    };
    write_torch(&at("s.pt"), &state(&wide).into(), None).unwrap();
    let says = "DiT-S/2 is trained by gaussian";
    assert!(error(&at("s.pt"), &model).contains(says));
    let model = Stated {
        process: None,
        ..model
    };
    let read = Checkpoint::read_stated(&at("s.pt"), &model).unwrap();
    assert_eq!(read.process, Some(ProcessKind::Gaussian));

    // Files of this program without the mark are Gaussian, as is diffusers' class.
    let metadata = bare.metadata().unwrap();
    let old = metadata.into_iter();
    let old = old.filter(|(key, _)| key != "tinyfusion.process").collect();
    write_safetensors(&at("old.safetensors"), &bare.tensors, old, None).unwrap();
    let read = Checkpoint::read(&at("old.safetensors")).unwrap();
    assert_eq!(read.process, Some(ProcessKind::Gaussian));
    let mut strange = bare.metadata().unwrap();
    strange.insert("tinyfusion.process".into(), "karras".into());
    write_safetensors(&at("strange.safetensors"), &bare.tensors, strange, None).unwrap();
    let error = error(&at("strange.safetensors"), &Stated::default());
    assert!(error.contains("\"karras\""), "{error}");
}

#[test]
fn conversions_are_the_same_to_the_byte() {
    let folder = tempfile::tempdir().unwrap();
    let sit = Checkpoint::read_stated(&sit(), &heads()).unwrap();
    let shards = Conversion {
        shard: Some(20_000),
        ..Conversion::default()
    };
    for (name, conversion) in [
        ("m.safetensors", &Conversion::default()),
        ("m.safetensors.index.json", &shards),
        ("m.pt", &Conversion::default()),
        ("m", &shards),
    ] {
        let run = |run: usize| -> Vec<Vec<u8>> {
            let to = folder.path().join(run.to_string()).join(name);
            let written = convert(&sit, &to, conversion).unwrap();
            written
                .iter()
                .map(|path| std::fs::read(path).unwrap())
                .collect()
        };
        let first = run(0);
        assert!(first == run(1) && first == run(2), "{name}");
    }
}

#[test]
fn pickles_have_many_endings_and_folders_many_names() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let state = state(&config(1));
    for name in ["x.bin", "x.ckpt", "X.BIN"] {
        write_torch(&at(name), &state.clone().into(), None).unwrap();
        let read = Checkpoint::read_stated(&at(name), &heads()).unwrap();
        assert_eq!(read.tensors.len(), state.len());
        std::fs::write(at(name), "no pickle").unwrap();
        let error = error(&at(name), &heads());
        assert!(error.contains("neither an archive nor a pickle"), "{error}");
    }
    let bare = |name: &str| {
        std::fs::create_dir_all(at(name).parent().unwrap()).unwrap();
        match WeightFile::of(&at(name)) {
            Some(WeightFile::Torch) => write_torch(&at(name), &state.clone().into(), None),
            _ => write_safetensors(&at(name), &state.clone().into(), Default::default(), None),
        }
        .unwrap();
    };
    let found = || WeightFile::locate(&at("f")).unwrap().1;
    // The same weights in several formats: full precision first, and safetensors before pickles.
    bare("f/diffusion_pytorch_model.fp16.safetensors");
    assert!(found().ends_with("diffusion_pytorch_model.fp16.safetensors"));
    assert!(Checkpoint::read_stated(&at("f"), &heads()).is_ok());
    bare("f/diffusion_pytorch_model.bin");
    assert!(found().ends_with("diffusion_pytorch_model.bin"));
    assert!(Checkpoint::read_stated(&at("f"), &heads()).is_ok());
    bare("f/diffusion_pytorch_model.safetensors");
    assert!(found().ends_with("diffusion_pytorch_model.safetensors"));

    let index = at("g/diffusion_pytorch_model.fp16.safetensors.index.json");
    let checkpoint = Checkpoint::read_stated(&at("f"), &heads()).unwrap();
    let shards = Conversion {
        shard: Some(2_000),
        ..Conversion::default()
    };
    assert!(convert(&checkpoint, &index, &shards).unwrap().len() > 2);
    assert!(Checkpoint::read_stated(&at("g"), &heads()).is_ok());
}

/// Writes a training checkpoint with the given parts.
fn snapshot(path: &Path, parts: &[(&str, StateDict)], described: bool) {
    let state: StateDict = (parts.iter())
        .flat_map(|(part, state)| prefixed(state, &format!("{part}.")))
        .collect();
    let mut metadata = match described {
        true => Description {
            architecture: Architecture::Dit(config(2)),
            process: Some(ProcessKind::Gaussian),
            provenance: Provenance::default(),
        }
        .metadata()
        .unwrap(),
        false => Default::default(),
    };
    metadata.insert(TRAINING.into(), "{}".into());
    write_safetensors(path, &state.into(), metadata, None).unwrap();
}

#[test]
fn a_training_is_opened_as_its_average_or_as_it_learns() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("step-00000002.safetensors");
    let mut whole = state(&config(2));
    let table = whole.remove("pos_embed").unwrap();
    let fixed = StateDict::from([("pos_embed".to_owned(), table)]);
    let mut raw = whole.clone();
    raw.get_mut("blocks.1.mlp.fc1.bias").unwrap().data[0] += 1.0;
    let gates = StateDict::from([(
        "gumbel_gates.0".to_owned(),
        Array::new([1, 2], vec![0.0; 2]),
    )]);
    let moments = prefixed(&whole, "first.");
    let with_gates = |state: &StateDict| {
        let both = state.clone().into_iter().chain(gates.clone());
        both.collect::<StateDict>()
    };
    let parts = [
        (EMA, with_gates(&whole)),
        (MODEL, with_gates(&raw)),
        (FIXED, fixed.clone()),
        (MOMENTS, moments),
    ];
    snapshot(&path, &parts, true);
    let keyed = |key: &str| Stated {
        weights_key: Some(key.into()),
        ..Stated::default()
    };
    let read = |stated: &Stated| {
        let read = Checkpoint::read_stated(&path, stated).unwrap();
        read.tensors.read_all().unwrap()
    };
    let with_table = |state: StateDict| {
        state
            .into_iter()
            .chain(fixed.clone())
            .collect::<StateDict>()
    };
    assert_eq!(read(&Stated::default()), with_table(whole.clone()));
    assert_eq!(read(&keyed("ema")), with_table(whole));
    assert_eq!(read(&keyed("model")), with_table(raw));
    assert!(error(&path, &keyed("moments")).contains("which has ema, model"));

    // A checkpoint from before the architecture was part of the metadata.
    snapshot(&path, &parts[..2], false);
    let error_ = error(&path, &Stated::default());
    assert!(error_.contains("does not say of which model"), "{error_}");
    // A pruning with low-rank updates, and one with gates alone.
    let mut update = gates.clone();
    for linear in ["blocks.0.attn.qkv", "blocks.1.attn.qkv"] {
        update.insert(
            format!("{linear}.lora_a.weight"),
            Array::new([1], vec![0.0]),
        );
        update.insert(
            format!("{linear}.lora_b.weight"),
            Array::new([1], vec![0.0]),
        );
    }
    for (part, says) in [
        (
            update,
            "gates of 1 groups and low-rank updates of 2 linear layers",
        ),
        (gates, "gates of 1 groups are of use"),
    ] {
        snapshot(&path, &[(EMA, part.clone()), (MODEL, part)], false);
        let error = error(&path, &Stated::default());
        assert!(error.contains(says), "{error}");
    }
    // A model file of this program has a single state dict.
    let ours = folder.path().join("ours.safetensors");
    write_safetensors(&ours, &state(&config(1)).into(), Default::default(), None).unwrap();
    assert!(error(&ours, &keyed("ema")).contains("holds one model"));
}

#[test]
fn an_autoencoder_is_known_by_its_weights_alone() {
    let config = VaeConfig {
        in_channels: 3,
        out_channels: 3,
        block_out_channels: vec![32, 64],
        layers_per_block: 1,
        latent_channels: 16,
        norm_num_groups: 32,
        encoder_attention: true,
        scaling_factor: 0.2325,
    };
    let device = Default::default();
    let mut state = collect(&Vae::<NdArray>::zeros(&config, &device));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vae.safetensors");
    let write = |state: &StateDict| {
        write_safetensors(&path, &state.clone().into(), BTreeMap::new(), None).unwrap();
    };
    write(&state);
    assert_eq!(vae_config(&path).unwrap(), config);
    let (read, found) = read_vae::<NdArray>(&path, &device).unwrap();
    assert_eq!(
        (collect(&read.network), found),
        (state.clone(), config.clone())
    );

    // A lost tensor is named, and under whose names it is missing.
    let norm = state.remove("encoder.conv_norm_out.weight").unwrap();
    state.remove("decoder.conv_norm_out.bias");
    let error = |state: &StateDict| {
        write(state);
        let error = read_vae::<NdArray>(&path, &device).unwrap_err().to_string();
        assert!(error.contains("decoder.conv_norm_out.bias"), "{error}");
        error
    };
    assert!(!error(&state).contains("diffusers"));
    state.insert("encoder.norm_out.weight".into(), norm);
    let said = error(&state);
    assert!(said.contains("under diffusers' names"), "{said}");
    assert!(!said.contains("encoder.conv_norm_out.weight"), "{said}");
    state.clear();
    write(&state);
    let none = vae_config(&path).unwrap_err().to_string();
    assert!(none.contains("it is no autoencoder"), "{none}");
}
