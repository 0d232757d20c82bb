//! Malicious inputs and failing systems: each ends at once, with a message, and without a false
//! success.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tinyfusion::weights::{Checkpoint, open_safetensors, write_safetensors};

use crate::program::{Place, root};

/// Refused too quickly for anything large to be allocated or waited for.
fn refused(place: &Place, arguments: &[&str], expected: &[&str]) {
    let begun = Instant::now();
    let finished = place.run(arguments);
    assert_eq!(finished.status, Some(2), "{arguments:?}: {finished:?}");
    for words in expected {
        assert!(
            finished.stderr.contains(words),
            "{arguments:?}: {}",
            finished.stderr
        );
    }
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{arguments:?}: {:?}",
        begun.elapsed()
    );
}

/// A `.npy` file with a header of version 1.
fn npy(header: &str) -> Vec<u8> {
    let length = (header.len() as u16).to_le_bytes();
    [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes()].concat()
}

fn zip(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in members {
        let options = zip::write::SimpleFileOptions::default();
        archive.start_file(*name, options).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

#[test]
fn headers_of_arrays_do_not_hang_or_overflow() {
    let place = Place::new();
    let deep = |open: &str, close: &str, times: usize| {
        let nested = open.repeat(times) + &close.repeat(times);
        npy(&format!(
            "{{'descr': '|u1', 'fortran_order': False, 'shape': {nested}, }}"
        ))
    };
    for (name, bytes) in [
        ("brackets", deep("[", "]", 40)),
        ("tuples", deep("(", ")", 5000)),
    ] {
        let file = format!("{name}.npz");
        place.write(&file, zip(&[("arr_0.npy", &bytes)]));
        refused(
            &place,
            &["evaluate", &file, &file, "--inception", &file],
            &[&file, "arr_0"],
        );
        place.write(&format!("{name}/imagenet256_features/0.npy"), &bytes);
        place.write(&format!("{name}/imagenet256_labels/0.npy"), &bytes);
        place.write(
            "latents.toml",
            format!(
                "data = './{name}'\n[[stage]]\nkind = 'train'\nsteps = 1\narchitecture = {{ family = 'dit' }}\n"
            ),
        );
        refused(&place, &["recipe", "latents.toml", "--dry-run"], &["0.npy"]);
    }
}

#[test]
fn flags_that_would_do_nothing_or_overwrite_are_refused() {
    let place = Place::new();
    place.write("a.npz", zip(&[]));
    place.write("there.csv", "mine");
    place.write("foreign/report.html", "<title>Mine</title>");
    for (arguments, words) in [
        ("runs compare x y --csv there.csv", "nothing is overwritten"),
        ("runs compare x y --csv no/there.csv", "make it first"),
        (
            "evaluate a.npz a.npz --steps 5 --labels drawn",
            "--steps, --labels: for models",
        ),
        ("evaluate a.npz a.npz --seed 1", "--seed is for models"),
        ("evaluate a.npz a.npz --out no/x.json", "make it first"),
        (
            "evaluate a.npz a.npz --cache there.csv",
            "--cache is a folder",
        ),
        (
            "sample embedded:digits-teacher --set kind=analyse",
            "a stage of its own kind",
        ),
        (
            "sample embedded:digits-teacher --steps 5 --set steps=6",
            "--set steps=6: --steps 5 sets the same key",
        ),
        ("sample embedded:digits-teacher --count -3", "--count -3: "),
        (
            "sample embedded:digits-teacher --into d --images d",
            "folders of their own",
        ),
        (
            "sample embedded:digits-teacher --into d --runs e",
            "cannot be used with",
        ),
        (
            "convert embedded:digits-teacher x.pt --licence mit",
            "model card of a folder",
        ),
        (
            "convert embedded:digits-teacher x.safetensor",
            "did you mean `.safetensors`?",
        ),
        (
            "bench --workload infer --recompute",
            "workloads with a backward pass",
        ),
        ("runs --runs x compare y z", "cannot be used with"),
        ("report x --into foreign", "not a page of runs"),
    ] {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        refused(&place, &arguments, &[words]);
    }
    assert_eq!(std::fs::read(place.path("there.csv")).unwrap(), b"mine");
    assert!(!place.path("d").exists());
}

#[test]
fn small_models_do_not_take_all_memory() {
    let place = Place::new();
    // A pickle of 5,000,000 values, which deflates to a few kilobytes.
    let values = vec![b'N'; 5_000_000];
    place.write(
        "bomb.pt",
        zip(&[("bomb/data.pkl", &values), ("bomb/version", b"3\n")]),
    );
    refused(
        &place,
        &["inspect", "bomb.pt"],
        &["bomb.pt", "four million instructions"],
    );

    // A configuration with a position table of terabytes.
    let folder = place.path("diffusers");
    place
        .run(&[
            "convert",
            "embedded:digits-teacher",
            "diffusers",
            "--diffusers",
        ])
        .succeeded();
    let weights = folder.join("diffusion_pytorch_model.safetensors");
    // In the form that diffusers writes, so that the configuration is used.
    let (tensors, _) = open_safetensors(&weights).unwrap();
    let state = tensors.read_all().unwrap();
    write_safetensors(&weights, &state.into(), Default::default(), None).unwrap();
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let of = |size: &str| {
        config
            .replace("\"sample_size\": 8", size)
            .replace("\"patch_size\": 2", "\"patch_size\": 1")
    };
    assert_ne!(of("\"sample_size\": 4096"), config);
    std::fs::write(folder.join("config.json"), of("\"sample_size\": 4096")).unwrap();
    refused(
        &place,
        &["inspect", "diffusers"],
        &["more than 65536 tokens"],
    );
    std::fs::write(folder.join("config.json"), of("\"sample_size\": 256")).unwrap();
    refused(
        &place,
        &["inspect", "diffusers"],
        &["misshapen x_embedder.proj.weight"],
    );

    // An autoencoder with layers of a hundred gigabytes.
    place.run(&["standin", "standin"]).succeeded();
    let path = place.path("standin/standin-vae/config.json");
    let mut config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let levels = config["block_out_channels"].as_array().unwrap().len();
    config["block_out_channels"] = vec![65_536; levels].into();
    std::fs::write(&path, config.to_string()).unwrap();
    let arguments = [
        "sample",
        "standin/standin-dit.pt",
        "--heads",
        "2",
        "--vae",
        "standin/standin-vae",
        "--count",
        "1",
        "--steps",
        "1",
        "--into",
        "out",
    ];
    refused(
        &place,
        &arguments,
        &["standin-vae", "config.json", "numbers"],
    );
}

#[test]
fn a_model_of_no_numbers_is_neither_drawn_nor_scored() {
    let place = Place::new();
    let path = root().join("artifacts/pretrained/digits-teacher.safetensors");
    let checkpoint = Checkpoint::read(&path).unwrap();
    let (_, metadata) = open_safetensors(&path).unwrap();
    for (file, name) in [
        ("nan.safetensors", "final_layer.linear.weight"),
        ("within.safetensors", "blocks.3.mlp.fc1.weight"),
    ] {
        let mut state = checkpoint.tensors.read_all().unwrap();
        state.get_mut(name).unwrap().data[7] = f32::NAN;
        write_safetensors(&place.path(file), &state.into(), metadata.clone(), None).unwrap();
    }
    let words = "not of finite numbers";
    let few = ["--count", "4", "--steps", "2"];
    refused(
        &place,
        &[&["sample", "nan.safetensors"][..], &few].concat(),
        &[words],
    );
    refused(
        &place,
        &[&["evaluate", "nan.safetensors"][..], &few].concat(),
        &[words],
    );
    // Guidance that overflows.
    let strong = [
        &["sample", "embedded:digits-teacher", "--guidance", "1e38"][..],
        &few,
    ]
    .concat();
    refused(&place, &strong, &[words]);
    for method in ["shortgpt", "flux-lite", "sensitivity"] {
        place.write(
            "score.toml",
            format!(
                "[[stage]]\nkind = 'prune'\nfrom = 'within.safetensors'\nmethod = '{method}'\nkeep = 6\nbatches = 1\nbatch = 4\n"
            ),
        );
        refused(
            &place,
            &["recipe", "score.toml"],
            &["has the score NaN", "damaged"],
        );
    }
    for keys in [
        "kind = 'prune'\nmethod = 'intervals'\nkeep = 6\nsteps = 1",
        "kind = 'analyse'",
    ] {
        let recipe = format!("[[stage]]\nfrom = 'within.safetensors'\nbatch = 4\n{keys}\n");
        place.write("states.toml", recipe);
        let why = ["hidden states are not finite", "damaged"];
        refused(&place, &["recipe", "states.toml"], &why);
    }
}

#[cfg(unix)]
#[test]
fn what_the_system_can_not_read_is_not_left_out_of_an_extraction() {
    let place = Place::new();
    place.run(&["standin", "standin"]).succeeded();
    let lost = place.path("standin/images/class-1/0000.png");
    std::os::unix::fs::symlink(place.path("elsewhere.png"), &lost).unwrap();
    let arguments = [
        "extract",
        "standin/images",
        "latents",
        "--vae",
        "standin/standin-vae",
        "--size",
        "64",
    ];
    refused(&place, &arguments, &["class-1/0000.png"]);
    assert!(!place.path("latents/skipped.txt").exists());
    // Once the file can be read again, it is included.
    std::fs::copy(
        place.path("standin/images/class-1/001.png"),
        place.path("elsewhere.png"),
    )
    .unwrap();
    place.run(&arguments).succeeded();
    assert!(!place.path("latents/skipped.txt").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_can_not_be_written_is_a_failure() {
    let full = || {
        Stdio::from(
            std::fs::File::options()
                .write(true)
                .open("/dev/full")
                .unwrap(),
        )
    };
    let run = |arguments: &[&str], stdout: Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tinyfusion"));
        let output = command
            .args(arguments)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .output();
        let output = output.unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    for arguments in [
        &["inspect", "embedded:digits-teacher", "--json"][..],
        &["completions", "zsh"],
    ] {
        let (status, said) = run(arguments, full());
        assert_eq!(
            (status, said.contains("panicked")),
            (Some(2), false),
            "{said}"
        );
        assert!(said.contains("standard output"), "{said}");
        // A closed reader is not a failure.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let (status, said) = run(arguments, writer.into());
        assert_eq!(
            (status, said.contains("panicked")),
            (Some(0), false),
            "{said}"
        );
    }
}

#[cfg(unix)]
#[test]
fn names_that_are_no_unicode_are_no_panic() {
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new();
    let name = std::ffi::OsStr::from_bytes(b"\xff.toml");
    std::fs::write(
        place.path("x").with_file_name(name),
        "[[stage]]\nkind = 'prune'\nfrom = 'embedded:digits-teacher'\nmethod = 'oracle'\n",
    )
    .unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tinyfusion"));
    let output = command
        .arg("recipe")
        .arg(name)
        .current_dir(place.path("x").parent().unwrap())
        .output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
}

#[test]
fn a_damaged_checkpoint_gives_way_to_the_one_before() {
    let place = Place::new();
    place.write(
        "short.toml",
        "[[stage]]
        kind = 'train'
        steps = 6
        batch = 4
        checkpoint_every = 2
        keep_checkpoints = true
        architecture = { family = 'dit', width = 8, heads = 2, depth = 1 }
        ",
    );
    place
        .run(&["recipe", "short.toml", "--runs", "runs"])
        .succeeded();
    let run = place.path("runs/short/001");
    let model = std::fs::read(run.join("01-train/model.safetensors")).unwrap();
    let newest = run.join("01-train/checkpoints/step-00000004.safetensors");
    let whole = std::fs::read(&newest).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for (damaged, says) in [
        (&whole[..whole.len() / 2], "is it whole?"),
        (&flipped, "its checksum is"),
    ] {
        std::fs::write(&newest, damaged).unwrap();
        // Left by a killed writer.
        let half = run.join("01-train/checkpoints/.step-6.safetensors.1-2.tmp");
        std::fs::write(&half, "half").unwrap();
        std::fs::remove_file(run.join("01-train/done.json")).unwrap();
        let status = std::fs::read_to_string(run.join("status.json")).unwrap();
        std::fs::write(
            run.join("status.json"),
            status.replace("finished", "failed"),
        )
        .unwrap();
        let resumed = place
            .run(&["recipe", "short.toml", "--runs", "runs", "--resume"])
            .succeeded();
        for says in [says, "going on from the checkpoint before"] {
            assert!(resumed.stderr.contains(says), "{}", resumed.stderr);
        }
        assert_eq!(
            std::fs::read(run.join("01-train/model.safetensors")).unwrap(),
            model
        );
        assert!(!half.exists());
        // The checkpoint is written again.
        assert_eq!(std::fs::read(&newest).unwrap(), whole);
    }
}

#[test]
fn samples_that_somebody_else_put_there_are_not_taken_for_drawn() {
    let place = Place::new();
    let arguments = [
        "sample",
        "embedded:digits-teacher",
        "--count",
        "3",
        "--steps",
        "2",
        "--into",
        "out",
    ];
    place.run(&arguments).succeeded();
    let archive = place.path("out/samples.npz");
    place.run(&arguments).succeeded();
    std::fs::write(&archive, "").unwrap();
    refused(&place, &arguments, &["samples.npz"]);
    std::fs::remove_file(&archive).unwrap();
    std::fs::create_dir(&archive).unwrap();
    refused(&place, &arguments, &["samples.npz", "found a folder"]);
}

#[test]
fn what_a_file_says_of_itself_is_not_believed() {
    let place = Place::new();
    let path = root().join("artifacts/pretrained/digits-features.safetensors");
    let (tensors, mut metadata) = open_safetensors(&path).unwrap();
    let state = tensors.read_all().unwrap();
    for (said, expected) in [
        (
            "{\"family\":\"digits-classifier\",\"width\":1000000000000}",
            "must lie in 4..=4096",
        ),
        ("{\"family\":\"classifier\",\"width\":32}", "misshapen"),
    ] {
        metadata.insert("tinyfusion.architecture".to_owned(), said.to_owned());
        let file = place.path("said.safetensors");
        write_safetensors(&file, &state.clone().into(), metadata.clone(), None).unwrap();
        refused(&place, &["inspect", "said.safetensors"], &[expected]);
        refused(
            &place,
            &["convert", "said.safetensors", "other.safetensors"],
            &[expected],
        );
    }
    // Control characters from a file don't reach the terminal.
    let (tensors, mut metadata) = open_safetensors(&path).unwrap();
    let note = "{\"recipe\":\"x\",\"note\":\"\\u001b]0;title\\u0007\\u001b[2J\"}";
    metadata.insert("tinyfusion.provenance".to_owned(), note.to_owned());
    let state = tensors.read_all().unwrap();
    write_safetensors(
        &place.path("note.safetensors"),
        &state.into(),
        metadata,
        None,
    )
    .unwrap();
    let shown = place.run(&["inspect", "note.safetensors"]).succeeded();
    assert!(
        shown.stdout.contains("\\u{1b}]0;title\\u{7}"),
        "{}",
        shown.stdout
    );
    assert!(!shown.stdout.contains('\u{1b}'), "{}", shown.stdout);
}

#[cfg(unix)]
#[test]
fn pipes_are_not_waited_for() {
    let place = Place::new();
    for name in ["pipe.pt", "pipe.safetensors", "pipe.npz"] {
        let made = Command::new("mkfifo").arg(place.path(name)).status();
        assert!(made.unwrap().success());
    }
    refused(&place, &["inspect", "pipe.pt"], &["pipe.pt"]);
    refused(
        &place,
        &["inspect", "pipe.safetensors"],
        &["pipe.safetensors"],
    );
    refused(
        &place,
        &["evaluate", "pipe.npz", "pipe.npz", "--inception", "pipe.pt"],
        &["pipe."],
    );
}

#[test]
fn small_mistakes_are_told_with_what_to_do() {
    let place = Place::new();
    refused(
        &place,
        &["convert", "embedded:digits-teacher", "model.onnx"],
        &["the form .onnx", ".safetensors"],
    );
    assert!(!place.path("model.onnx").exists());
    let quickstart = ["recipe", "quickstart", "--dry-run"];
    place.run(&quickstart).succeeded();
    let wrong = [&quickstart[..], &["--set", "prune.steps=5"]].concat();
    refused(&place, &wrong, &["did you mean `stage.prune`"]);
    place.write(
        "keys.toml",
        "[[stage]]\nkind = 'sample'\nfrom = 'embedded:digits-teacher'\ncount = 1\nzzz = 1\n",
    );
    refused(
        &place,
        &["recipe", "keys.toml"],
        &["unknown key `zzz`", "there are batch, classes, clip, count"],
    );
    let many: String = (0..60_000)
        .map(|index| format!("key{index} = 1\n"))
        .collect();
    place.write("many.toml", many);
    refused(
        &place,
        &["recipe", "many.toml"],
        &["unknown key `key0`", "more"],
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_tinyfusion"));
    let begun = Instant::now();
    let output = command
        .args([
            "sample",
            "embedded:digits-teacher",
            "--count",
            "1",
            "--steps",
            "1",
            "--into",
        ])
        .arg(place.path("threads"))
        .env("RAYON_NUM_THREADS", "100000")
        .output();
    assert!(output.unwrap().status.success());
    assert!(
        begun.elapsed() < Duration::from_secs(60),
        "{:?}",
        begun.elapsed()
    );
}
