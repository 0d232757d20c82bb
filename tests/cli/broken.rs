//! Broken inputs: each is refused with a message that says what is wrong where, exit status 2, no
//! panic, and no output files.

use crate::program::{Place, root};

/// A recipe that prunes, with `lines` added to its stage.
fn prune(lines: &str) -> String {
    format!("[[stage]]\nkind = \"prune\"\nfrom = \"embedded:digits-teacher\"\n{lines}\n")
}

/// A recipe that samples, with `lines` added to its stage.
fn sample(lines: &str) -> String {
    format!(
        "[[stage]]\nkind = \"sample\"\nfrom = \"embedded:digits-teacher\"\ncount = 2\nsteps = 2\n{lines}\n"
    )
}

/// A recipe that recovers the embedded teacher.
fn recover(lines: &str) -> String {
    format!(
        "[[stage]]\nkind = \"recover\"\nfrom = \"embedded:digits-teacher\"\nsteps = 1\nbatch = 2\n{lines}\n"
    )
}

#[track_caller]
fn refuse(place: &Place, name: &str, arguments: &[&str], expected: &[&str]) {
    let before = place.files();
    let finished = place.run(arguments);
    let said = &finished.stderr;
    assert_eq!(finished.status, Some(2), "{name}: exit status\n{said}");
    assert!(!said.contains("panicked"), "{name}: panicked\n{said}");
    for expected in expected {
        assert!(
            said.contains(expected),
            "{name}: `{expected}` is not in\n{said}"
        );
    }
    assert_eq!(place.files(), before, "{name}: files were written");
}

#[test]
fn broken_recipes() {
    let place = Place::new();
    let learned = "groups = \"1:2\"\nsteps = 2\n";
    let cases: Vec<(&str, String, Vec<&str>)> = vec![
        ("empty", String::new(), vec!["stage"]),
        ("syntax", "seed = \n".into(), vec!["broken.toml:1:"]),
        ("unclosed string", "name = \"a\n".into(), vec!["broken.toml:1:"]),
        ("duplicate key", "seed = 1\nseed = 2\n".into(), vec!["broken.toml:2:1"]),
        ("not utf-8 text in a key", prune("gr\u{fc}ppen = 1"), vec!["broken.toml:4:"]),
        ("unknown key", prune(&format!("{learned}stpes = 3")), vec!["broken.toml:6:1", "unknown key `stpes`", "did you mean `steps`?"]),
        ("unknown top-level key", format!("sed = 1\n{}", prune(learned)), vec!["broken.toml:1:1", "`sed`", "`seed`"]),
        ("wrong type", prune("groups = \"1:2\"\nsteps = \"many\""), vec!["broken.toml:5:9", "expected an integer, found a string"]),
        ("float for integer", prune("groups = \"1:2\"\nsteps = 1.5"), vec!["broken.toml:5:9", "expected an integer"]),
        ("missing key", prune("groups = \"1:2\""), vec!["missing key `steps`"]),
        ("zero steps", prune("groups = \"1:2\"\nsteps = 0"), vec!["broken.toml:5:9"]),
        ("negative rate", prune(&format!("{learned}lr = -1.0")), vec!["broken.toml:6:6"]),
        ("unknown stage kind", "[[stage]]\nkind = \"prun\"\n".into(), vec!["broken.toml:2:8", "\"prune\""]),
        ("unknown method", prune("method = \"lerned\""), vec!["broken.toml:4:10", "learned"]),
        ("unknown embedded checkpoint", prune(learned).replace("digits-teacher", "digit-teacher"), vec!["broken.toml:3:8", "embedded:digits-teacher"]),
        ("missing file", prune(learned).replace("embedded:digits-teacher", "no/such.safetensors"), vec!["broken.toml:3:8", "no/such.safetensors"]),
        ("unknown stage", prune(learned).replace("embedded:digits-teacher", "teacher"), vec!["broken.toml:3:8", "teacher"]),
        ("N is 0", prune("groups = \"0:2\"\nsteps = 1"), vec!["broken.toml:4:10"]),
        ("N not below M", prune("groups = \"2:2\"\nsteps = 1"), vec!["broken.toml:4:10"]),
        ("groups no ratio", prune("groups = \"half\"\nsteps = 1"), vec!["broken.toml:4:10"]),
        ("too many layers of a group", prune("groups = \"15:4097\"\nsteps = 1"), vec!["broken.toml:4:10", "4096"]),
        ("groups do not fill the depth", prune("groups = \"2:5\"\nsteps = 1"), vec!["12"]),
        ("groups exceed the depth", prune("groups = [[2, 4], [2, 4], [2, 4], [2, 4]]\nsteps = 1"), vec!["16", "12"]),
        ("key of another method", prune("method = \"oracle\"\nsteps = 3"), vec!["broken.toml:5:1", "`steps`"]),
        ("keep more than there is", prune("method = \"shortgpt\"\nkeep = 12"), vec!["`keep` is 12"]),
        ("kept beyond the depth", prune("method = \"kept\"\nkept = [0, 12]"), vec!["layer 12"]),
        ("kept twice", prune("method = \"kept\"\nkept = [1, 1]"), vec!["kept"]),
        ("a classifier can't be pruned", prune(learned).replace("digits-teacher", "digits-features"), vec!["embedded:digits-features", "diffusion network"]),
        ("no teacher", recover("method = \"kd\""), vec!["missing key `teacher`"]),
        ("teacher unused", recover("method = \"fine-tune\"\nteacher = \"embedded:digits-teacher\""), vec!["broken.toml:7:1"]),
        ("warm-up too long", recover("method = \"fine-tune\"\nwarmup = 1"), vec!["broken.toml:7:10", "`steps`"]),
        ("EMA of 1", recover("method = \"fine-tune\"\nema = 1.0"), vec!["broken.toml:7:7"]),
        ("class that is not there", sample("classes = [10]"), vec!["class 10"]),
        ("guidance below 1", sample("guidance = 0.5"), vec!["broken.toml:6:12"]),
        ("eta for ddpm", sample("solver = \"ddpm\"\neta = 0.5"), vec!["broken.toml:7:1", "`eta`"]),
        ("too many sampling steps", sample("").replace("steps = 2", "steps = 1001"), vec!["broken.toml:5:9"]),
        ("same name twice", format!("{}{}", sample(""), sample("")), vec!["sample"]),
        ("heads do not divide", "[[stage]]\nkind = \"train\"\nsteps = 1\n[stage.architecture]\nfamily = \"dit\"\nwidth = 62\n".into(), vec!["broken.toml:6:9"]),
        ("a model that is not for digits", "[[stage]]\nkind = \"train\"\nsteps = 1\n[stage.architecture]\npreset = \"DiT-S/2\"\n".into(), vec!["1x8x8"]),
        ("unknown preset", "[[stage]]\nkind = \"train\"\nsteps = 1\n[stage.architecture]\npreset = \"DiT-M/2\"\n".into(), vec!["broken.toml:5:10", "DiT-"]),
        ("seed too large", format!("seed = 9223372036854775808\n{}", sample("")), vec!["broken.toml:1:"]),
        ("all at once", format!("sed = 1\n{}", prune("gruops = \"1:2\"\nsteps = 0\nlr = \"x\"")), vec!["`sed`", "`gruops`", "steps", "expected a number"]),
    ];
    for (name, text, expected) in cases {
        place.write("broken.toml", text);
        refuse(&place, name, &["recipe", "broken.toml"], &expected);
    }
    place.write("broken.toml", [0xff, 0xfe, 0x00]);
    refuse(
        &place,
        "bytes that are no text",
        &["recipe", "broken.toml"],
        &["broken.toml"],
    );
    refuse(
        &place,
        "no such recipe",
        &["recipe", "nowhere.toml"],
        &["nowhere.toml"],
    );
    refuse(&place, "a folder for a recipe", &["recipe", "."], &["."]);
    place.write("good.toml", sample(""));
    refuse(
        &place,
        "override of nothing",
        &["recipe", "good.toml", "--set", "stage.smaple.steps=3"],
        &["--set stage.smaple.steps=3"],
    );
    refuse(
        &place,
        "override without a value",
        &["recipe", "good.toml", "--set", "stage.sample.steps"],
        &["--set"],
    );
    refuse(
        &place,
        "override out of range",
        &["recipe", "good.toml", "--set", "stage.sample.steps=0"],
        &["--set stage.sample.steps=0"],
    );
    refuse(
        &place,
        "nothing to resume",
        &["recipe", "good.toml", "--resume"],
        &["no unfinished run"],
    );
    refuse(
        &place,
        "a backend that is not built in",
        &["recipe", "good.toml", "--backend", "metal"],
        &["metal"],
    );
}

#[test]
fn broken_checkpoints() {
    let place = Place::new();
    let whole =
        std::fs::read(root().join("artifacts/pretrained/digits-teacher.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let edited = |from: &str, to: &str| -> Vec<u8> {
        assert_eq!(
            from.len(),
            to.len(),
            "an edit must keep the header's length"
        );
        let text = String::from_utf8(whole[8..header].to_vec()).unwrap();
        assert!(text.contains(from), "{from}");
        [
            &whole[..8],
            text.replace(from, to).as_bytes(),
            &whole[header..],
        ]
        .concat()
    };
    let pickle = std::fs::read(root().join("tests/fixtures/dit_forward/a_plain.pt")).unwrap();
    let cases: Vec<(&str, &str, Vec<u8>, Vec<&str>)> = vec![
        ("empty", "a.safetensors", Vec::new(), vec!["safetensors"]),
        (
            "seven bytes",
            "a.safetensors",
            whole[..7].to_vec(),
            vec!["safetensors"],
        ),
        (
            "half a header",
            "a.safetensors",
            whole[..header / 2].to_vec(),
            vec!["safetensors"],
        ),
        (
            "half the weights",
            "a.safetensors",
            whole[..whole.len() / 2].to_vec(),
            vec!["safetensors"],
        ),
        (
            "one byte short",
            "a.safetensors",
            whole[..whole.len() - 1].to_vec(),
            vec!["safetensors"],
        ),
        (
            "one byte long",
            "a.safetensors",
            [&whole[..], &[0]].concat(),
            vec!["safetensors"],
        ),
        (
            "a header of 2^63 bytes",
            "a.safetensors",
            [&(1u64 << 63).to_le_bytes(), &whole[8..]].concat(),
            vec!["safetensors"],
        ),
        (
            "no JSON",
            "a.safetensors",
            [&whole[..8], &vec![b'{'; header - 8], &whole[header..]].concat(),
            vec!["safetensors"],
        ),
        (
            "integers",
            "a.safetensors",
            edited("\"F32\"", "\"I32\""),
            vec!["I32", "expected F32"],
        ),
        (
            "a parameter renamed",
            "a.safetensors",
            edited(
                "\"blocks.3.attn.qkv.weight\"",
                "\"blocks.3.attn.qkv.weihgt\"",
            ),
            vec!["missing", "surplus", "weihgt"],
        ),
        (
            "a shape swapped",
            "a.safetensors",
            edited("[192,64]", "[64,192]"),
            vec!["misshapen"],
        ),
        (
            "a depth that is not there",
            "a.safetensors",
            edited("\\\"depth\\\":12", "\\\"depth\\\":11"),
            vec!["surplus   blocks.11"],
        ),
        (
            "heads that do not divide",
            "a.safetensors",
            edited("\\\"heads\\\":4", "\\\"heads\\\":7"),
            vec!["`heads`, which is 7"],
        ),
        (
            "a patch of 0",
            "a.safetensors",
            edited("\\\"patch_size\\\":2", "\\\"patch_size\\\":0"),
            vec!["patch_size is 0"],
        ),
        (
            "another family",
            "a.safetensors",
            edited("\\\"family\\\":\\\"dit\\\"", "\\\"family\\\":\\\"did\\\""),
            vec!["did"],
        ),
        ("a pickle of zeros", "a.pt", vec![0; 300], vec!["PyTorch"]),
        ("an empty pickle", "a.pt", Vec::new(), vec!["PyTorch"]),
        (
            "half a pickle",
            "a.pt",
            pickle[..pickle.len() / 2].to_vec(),
            vec!["PyTorch"],
        ),
        (
            "safetensors called .pt",
            "a.pt",
            whole.clone(),
            vec!["PyTorch"],
        ),
        (
            "a pickle called .safetensors",
            "a.safetensors",
            pickle.clone(),
            vec!["safetensors"],
        ),
        ("heads unknown", "a.pt", pickle, vec!["heads"]),
        (
            "no pickle called .bin",
            "a.bin",
            whole.clone(),
            vec!["neither an archive nor a pickle"],
        ),
        (
            "no pickle called .ckpt",
            "a.ckpt",
            b"model".to_vec(),
            vec!["neither an archive nor a pickle"],
        ),
        (
            "another ending",
            "a.npz",
            whole.clone(),
            vec![".safetensors"],
        ),
    ];
    for (name, file, bytes, expected) in cases {
        place.write(file, bytes);
        let arguments = ["sample", file, "--count", "1", "--steps", "1"];
        let finished = place.run(&arguments);
        assert_eq!(
            finished.status,
            Some(2),
            "{name}: exit status\n{}",
            finished.stderr
        );
        assert!(
            !finished.stderr.contains("panicked"),
            "{name}: panicked\n{}",
            finished.stderr
        );
        for expected in expected.into_iter().chain([file]) {
            assert!(
                finished.stderr.contains(expected),
                "{name}: `{expected}` is not in\n{}",
                finished.stderr
            );
        }
        std::fs::remove_file(place.path(file)).unwrap();
    }
    refuse(
        &place,
        "no such checkpoint",
        &["inspect", "nowhere.pt"],
        &["nowhere.pt", "embedded:digits-teacher"],
    );
    refuse(
        &place,
        "a classifier can't be sampled",
        &["sample", "embedded:digits-features"],
        &["diffusion network"],
    );
    refuse(
        &place,
        "no classifier for features",
        &[
            "evaluate",
            "embedded:digits-teacher",
            "--features",
            "embedded:digits-teacher",
        ],
        &["classifier"],
    );
    refuse(
        &place,
        "a class beyond the model's",
        &["sample", "embedded:digits-teacher", "--classes", "3,11"],
        &["class 11"],
    );
    refuse(
        &place,
        "guidance that is no number",
        &["sample", "embedded:digits-teacher", "--guidance", "nan"],
        &["--guidance"],
    );
}

#[test]
fn broken_benchmarks() {
    let place = Place::new();
    for (name, arguments, expected) in [
        ("unknown model", vec!["--model", "DiT-M/2"], "DiT-S/2"),
        ("no square", vec!["--tokens", "17"], "square"),
        ("heads", vec!["--heads", "7"], "`heads`, which is 7"),
        (
            "odd depth",
            vec!["--workload", "prune", "--depth", "5"],
            "pairs",
        ),
        ("f16", vec!["--compute", "f16"], "bf16"),
        ("no workload", vec!["--workload", "think"], "infer"),
    ] {
        let arguments: Vec<&str> = std::iter::once("bench").chain(arguments).collect();
        refuse(&place, name, &arguments, &[expected]);
    }
}
