//! The paper's experiment: its recipes without their files, and all of it on small stand-ins.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use tinyfusion::data::Latents;
use tinyfusion::npz::read_samples;
use tinyfusion::weights::Checkpoint;

use crate::program::{Place, root};

const STANDIN: &str = "artifacts/standin";

fn recipe(name: &str) -> String {
    root().join("recipes").join(name).display().to_string()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn every_recipe_can_be_planned_without_its_files() {
    let place = Place::new();
    let mut recipes = 0;
    for entry in std::fs::read_dir(root().join("recipes")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|ending| ending != "toml") {
            continue;
        }
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let dry = place
            .run(&["recipe", path.to_str().unwrap(), "--dry-run"])
            .succeeded();
        assert!(place.files().is_empty(), "{name} wrote something");
        let sit = name.starts_with("sit_");
        let dit = name.starts_with("width_")
            || (name.strip_prefix('d'))
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        if name.starts_with("mar_") {
            for words in [
                "mar_large.pth",
                "https://www.dropbox.com/",
                "kl16.ckpt",
                "imagenet256-kl16",
                "5 files are missing",
                "encoder of 8 layers of width 1024",
                "276,786,720 parameters",
            ] {
                assert!(dry.stdout.contains(words), "{words}: {}", dry.stdout);
            }
            states_its_cost(&path, &dry.stdout);
        }
        if name.starts_with("ddpm_") {
            assert!(
                dry.stdout.contains("huggingface.co/google/ddpm-"),
                "{}",
                dry.stdout
            );
            states_its_cost(&path, &dry.stdout);
        }
        if !sit && !dit {
            continue;
        }
        let (teacher, address) = match sit {
            true => (
                "SiT-XL-2-256x256.pt",
                "https://www.dl.dropboxusercontent.com/",
            ),
            false => ("DiT-XL-2-256x256.pt", "https://dl.fbaipublicfiles.com/"),
        };
        recipes += 1;
        for file in [
            teacher,
            "artifacts/data/imagenet256",
            "VIRTUAL_imagenet256_labeled.npz",
            "pt_inception-2015-12-05-6726825d.pth",
            "sd-vae-ft-mse",
        ] {
            assert!(
                dry.stdout.contains(file),
                "{name} does not list {file}:\n{}",
                dry.stdout
            );
        }
        assert!(
            dry.stdout.contains("28 layers, width 1152"),
            "{name}:\n{}",
            dry.stdout
        );
        states_its_cost(&path, &dry.stdout);
        // A run reports the same and does nothing.
        let run = place.run(&[
            "recipe",
            path.to_str().unwrap(),
            "--backend",
            "ndarray",
            "--set",
            "compute=f32",
        ]);
        assert_eq!(run.status, Some(2), "{name}: {}", run.stderr);
        assert!(
            run.stderr.contains("5 files are missing"),
            "{name}: {}",
            run.stderr
        );
        assert!(run.stderr.contains(address), "{name}: {}", run.stderr);
        assert!(place.files().is_empty(), "{name} wrote something");
    }
    assert_eq!(recipes, 14);
}

/// The cost in a recipe's first lines is that of the plan.
fn states_its_cost(recipe: &std::path::Path, plan: &str) {
    let text = std::fs::read_to_string(recipe).unwrap().replace("\n#", " ");
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (images, flops) = cost(plan);
    for stated in [images, flops] {
        let path = recipe.display();
        assert!(
            text.contains(&stated),
            "{path} does not state its cost as {stated}"
        );
    }
}

/// Images and operations of all stages of a plan, in the form of a recipe's first lines.
fn cost(plan: &str) -> (String, String) {
    let (mut images, mut flops) = (0u64, 0f64);
    let stages = plan.lines().filter(|line| line.contains(" MiB"));
    for line in stages {
        let number = |before: &str| {
            let end = line.find(before).unwrap();
            line[..end].rsplit(' ').next().unwrap().replace(',', "")
        };
        images += number(" images").parse::<u64>().unwrap();
        if line.contains(" FLOPs") {
            flops += number(" FLOPs").parse::<f64>().unwrap();
        }
    }
    (
        format!("{:.1} million images", images as f64 / 1e6),
        format!("{flops:.1e} FLOPs"),
    )
}

#[test]
fn the_stand_ins_go_all_the_way_from_images_to_scores() {
    let place = Place::new();
    let without = place.run(&["recipe", &recipe("standin.toml")]);
    assert_eq!(without.status, Some(2));
    assert!(
        without.stderr.contains("standin-vae") && without.stderr.contains("tinyfusion standin"),
        "{}",
        without.stderr
    );

    place.run(&["standin", STANDIN]).succeeded();
    let again = place.run(&["standin", STANDIN]);
    assert_eq!(again.status, Some(2), "{}", again.stderr);
    let standin = recipe("standin.toml");
    let mut command = vec!["recipe", &standin, "--plain"];
    for set in [
        "stage.recover.evaluate_every=10",
        "stage.recover.evaluate_count=8",
    ] {
        command.extend(["--set", set]);
    }
    let finished = place.run(&command).succeeded();
    for word in ["FID", "sFID", "precision", "recover", "standin-dit.pt"] {
        assert!(
            finished.stdout.contains(word),
            "no {word}:\n{}",
            finished.stdout
        );
    }
    let run = place.path("artifacts/runs/standin/001");
    let latents = Latents::open(&run.join("01-extract/latents")).unwrap();
    latents.verify().unwrap();
    assert_eq!(
        (latents.count(), latents.views(), latents.side()),
        (64, 2, 8)
    );
    let student = Checkpoint::read(&run.join("03-recover/model.safetensors")).unwrap();
    assert_eq!(student.denoiser().unwrap().depth(), 2);
    assert_eq!(student.provenance.kept.as_ref().unwrap().len(), 2);
    assert_eq!(student.provenance.recipe_sha256.len(), 64);
    assert!(run.join("04-sample/samples.png").is_file());
    let quality = std::fs::read_to_string(run.join("03-recover/quality.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = (quality.lines())
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let steps: Vec<_> = lines.iter().map(|line| line["step"].as_u64()).collect();
    assert_eq!(steps, [Some(9), Some(19)]);
    let measured = |line: &serde_json::Value| line["fid"].is_f64() && line["sfid"].is_f64();
    assert!(lines.iter().all(measured), "{quality}");
    let samples = run.join("03-recover/quality/step-000020/samples.png");
    assert!(samples.is_file());
    assert!(!run.join("04-sample/parts").exists());

    let evaluation = json(&run.join("05-evaluate/eval.json"));
    for key in [
        "samples",
        "inception_compute",
        "backend",
        "neighbours",
        "split_size",
    ] {
        assert!(
            !evaluation["protocol"][key].is_null(),
            "{key}: {evaluation:#}"
        );
    }
    for file in ["reference", "inception"] {
        let hash = evaluation["protocol"][file]["sha256"].as_str();
        assert_eq!(hash.map(str::len), Some(64), "{file}: {evaluation:#}");
    }
    let how = &evaluation["protocol"]["sampling"];
    for (key, expected) in [
        ("steps", 10.0),
        ("guidance", 1.5),
        ("guidance_channels", 3.0),
        ("count", 24.0),
    ] {
        assert_eq!(how["how"][key].as_f64(), Some(expected), "{key}: {how:#}");
    }
    assert_eq!(how["vae"].as_str().unwrap().len(), 64);
    let verdicts = evaluation["verdicts"].as_array().unwrap();
    assert_eq!(verdicts.len(), 2);
    for verdict in verdicts {
        for score in ["fid", "sfid", "inception_score", "precision", "recall"] {
            assert!(
                verdict[score].as_f64().is_some_and(f64::is_finite),
                "{score}: {verdict:#}"
            );
        }
    }

    // A file that doesn't state its number of heads can be sampled if the command line does.
    let (dit, vae) = (
        format!("{STANDIN}/standin-dit.pt"),
        format!("{STANDIN}/standin-vae"),
    );
    let sample = [
        "sample", &dit, "--vae", &vae, "--count", "2", "--steps", "2",
    ];
    let finished = place.run(&sample);
    assert_eq!(finished.status, Some(2), "{}", finished.stderr);
    assert!(finished.stderr.contains("heads"), "{}", finished.stderr);
    place
        .run(&[&sample[..], &["--heads", "2"]].concat())
        .succeeded();

    // Measuring the stage's archive by the command gives the stage's scores; so does its cached
    // reference.
    let cache = run.join("05-evaluate");
    let cache = cache.to_str().unwrap();
    let samples = run.join("05-evaluate/2-recover/samples.npz");
    let reference = format!("{STANDIN}/standin-reference.npz");
    let inception = format!("{STANDIN}/standin-inception.pth");
    let measure = [
        "evaluate",
        samples.to_str().unwrap(),
        &reference,
        "--inception",
        &inception,
        "--out",
        "e.json",
        "--cache",
        cache,
    ];
    place.run(&measure).succeeded();
    let measured = json(&place.path("e.json"));
    assert_eq!(measured["verdicts"][0]["fid"], verdicts[1]["fid"]);
    let overwritten = place.run(&measure);
    assert_eq!(overwritten.status, Some(2), "{}", overwritten.stderr);

    // A folder of its pictures gives the same scores for any number of samples.
    let images = read_samples(&samples).unwrap().images;
    let [count, height, width, _] = images.shape();
    for index in 0..count {
        let path = place.write(&format!("pictures/{}/{index:02}.png", index / 10), "");
        let (width, height) = (width as u32, height as u32);
        let picture = image::RgbImage::from_raw(width, height, images.image(index).to_vec());
        picture.unwrap().save(path).unwrap();
    }
    place.write("pictures/list.txt", "");
    let both = place.run(&[
        "evaluate",
        samples.to_str().unwrap(),
        "pictures",
        &reference,
        "--inception",
        &inception,
        "--out",
        "both.json",
        "--cache",
        cache,
        "--count",
        "12",
        "--distances",
        "f16",
    ]);
    let both = both.succeeded();
    for words in ["FID of 12 samples", "distances in f16"] {
        assert!(both.stdout.contains(words), "{}", both.stdout);
    }
    assert!(
        both.stderr.contains("pictures: 1 other entry"),
        "{}",
        both.stderr
    );
    let both = json(&place.path("both.json"));
    assert_eq!(both["protocol"]["samples"], 12);
    assert_eq!(both["protocol"]["distances"], "f16");
    let [of_archive, of_folder] = [0, 1].map(|index| &both["verdicts"][index]);
    for score in [
        "count",
        "fid",
        "sfid",
        "inception_score",
        "precision",
        "recall",
    ] {
        assert_eq!(of_archive[score], of_folder[score], "{score}");
    }
    assert_ne!(of_archive["fid"], verdicts[1]["fid"]);

    // The student in a folder, with a model card of its scores.
    let model = run.join("03-recover/model.safetensors");
    place
        .run(&[
            "convert",
            model.to_str().unwrap(),
            "student",
            "--licence",
            "cc-by-nc-4.0",
        ])
        .succeeded();
    let card = std::fs::read_to_string(place.path("student/README.md")).unwrap();
    for words in [
        "license: cc-by-nc-4.0",
        "of 4 layers",
        "sha256",
        "sFID",
        "strict=True",
    ] {
        assert!(card.contains(words), "no {words}:\n{card}");
    }
    // In the layout of diffusers, the card has the lines that correct its outputs.
    place
        .run(&["convert", model.to_str().unwrap(), "shifted", "--diffusers"])
        .succeeded();
    let card = std::fs::read_to_string(place.path("shifted/README.md")).unwrap();
    assert!(
        card.contains("    block.norm1.emb.time_proj.downscale_freq_shift = 0\n"),
        "{card}"
    );
    let converted = Checkpoint::read(&place.path("student")).unwrap();
    assert_eq!(
        converted.fingerprint().unwrap(),
        student.fingerprint().unwrap()
    );
    assert_eq!(converted.provenance, student.provenance);
}

/// Every file below a folder, by its relative path.
fn below(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let bytes = std::fs::read(&path).unwrap();
                found.insert(path.strip_prefix(folder).unwrap().to_owned(), bytes);
            }
        }
    }
    found
}

#[test]
fn a_killed_extraction_goes_on_to_the_same_bytes() {
    let place = Place::new();
    place.run(&["standin", STANDIN]).succeeded();
    let images = format!("{STANDIN}/images");
    std::fs::write(place.path(&images).join("class-1/broken.png"), "no picture").unwrap();
    let vae = format!("{STANDIN}/standin-vae");
    let arguments = |to: &'static str, form: &'static str| -> Vec<String> {
        let arguments = [
            "extract", &images, to, "--vae", &vae, "--size", "64", "--batch", "4", "--form", form,
        ];
        arguments.map(str::to_owned).to_vec()
    };
    let run = |arguments: &[String]| {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        place.run(&arguments)
    };
    let whole = run(&arguments("whole", "npy")).succeeded();
    assert!(whole.stderr.contains("broken.png"), "{}", whole.stderr);
    // Killed once some latents exist, which shows file by file only in this form.
    let words = arguments("parts", "npy");
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut child = place.start(&words);
    let label = place.path("parts/imagenet256_labels/5.npy");
    let begun = Instant::now();
    while !label.exists() && begun.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let killed = below(&place.path("parts")).len();
    run(&arguments("parts", "npy")).succeeded();
    let (parts, whole) = (below(&place.path("parts")), below(&place.path("whole")));
    assert!(killed < whole.len(), "it had ended before it was killed");
    assert!(
        parts.keys().eq(whole.keys()),
        "{:?}\n{:?}",
        parts.keys(),
        whole.keys()
    );
    assert!(parts == whole, "the same files with other bytes");
    let other = run(&arguments("parts", "f16"));
    assert_eq!(other.status, Some(2), "{}", other.stderr);
    assert!(other.stderr.contains("extraction.json"), "{}", other.stderr);
}

#[test]
fn shares_of_samples_come_together_as_if_drawn_at_once() {
    let place = Place::new();
    let sample = |into: &str, more: &[&str]| {
        let mut arguments = vec![
            "sample",
            "embedded:digits-teacher",
            "--count",
            "10",
            "--batch",
            "3",
            "--steps",
            "3",
            "--into",
            into,
        ];
        arguments.extend(more);
        place.run(&arguments)
    };
    sample("whole", &[]).succeeded();
    for share in ["1/3", "0/3"] {
        let finished = sample("shares", &["--share", share]).succeeded();
        assert!(finished.stderr.contains("others"), "{}", finished.stderr);
    }
    assert!(!place.path("shares/samples.npz").exists());
    sample("shares", &["--share", "2/3"]).succeeded();
    let bytes = |folder: &str| std::fs::read(place.path(folder).join("samples.npz")).unwrap();
    assert!(bytes("whole") == bytes("shares"));
    place.write("foreign/samples.npz", "x");
    let foreign = sample("foreign", &[]);
    assert_eq!(foreign.status, Some(2), "{}", foreign.stderr);
    assert!(foreign.stderr.contains("not empty"), "{}", foreign.stderr);
    let other = sample("shares", &["--seed", "1"]);
    assert_eq!(other.status, Some(2));
    assert!(other.stderr.contains("sampling.json"), "{}", other.stderr);
}

#[test]
fn accumulated_gradients_train_as_whole_batches_do() {
    let place = Place::new();
    let text = "data = 'digits'\n[[stage]]\nkind = 'train'\nfrom = 'embedded:digits-teacher'\nsteps = 3\nbatch = 8\nlr = 1e-4\nema = 0.0\n";
    for (name, accumulate) in [("whole", 1), ("parts", 4)] {
        let recipe = place.write(
            &format!("{name}.toml"),
            format!("{text}accumulate = {accumulate}\n"),
        );
        place
            .run(&["recipe", recipe.to_str().unwrap(), "--plain"])
            .succeeded();
    }
    let file = |name: &str| place.path(&format!("artifacts/runs/{name}/001/01-train"));
    let state = |name: &str| {
        let checkpoint = Checkpoint::read(&file(name).join("model.safetensors")).unwrap();
        checkpoint.tensors.read_all().unwrap()
    };
    let first = |name: &str, key: &str| -> f64 {
        let log = std::fs::read_to_string(file(name).join("metrics.jsonl")).unwrap();
        let line: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
        line[key].as_f64().unwrap()
    };
    // The same samples and draws, summed in another order. A sum of gradients instead of their mean
    // would have four times the norm.
    for key in ["loss", "grad_norm"] {
        let (whole, parts) = (first("whole", key), first("parts", key));
        assert!((whole / parts - 1.0).abs() < 1e-4, "{key}: {whole} {parts}");
    }
    let (whole, parts) = (state("whole"), state("parts"));
    let (mut off, mut moved) = (0.0, 0.0);
    let teacher =
        tinyfusion::weights::embedded::checkpoint(tinyfusion::weights::EmbeddedName::DigitsTeacher)
            .unwrap();
    for (name, before) in teacher.tensors.read_all().unwrap() {
        let (whole, parts) = (&whole[&name].data, &parts[&name].data);
        for ((a, b), before) in whole.iter().zip(parts).zip(&before.data) {
            off += f64::from(a - b).powi(2);
            moved += f64::from(a - before).powi(2);
        }
    }
    // Adam divides by the gradient's size, so where the gradient is only rounding error its sign
    // depends on the order; such weights are few. Gradients of other samples would be off by as
    // much as the weights moved.
    assert!(
        moved > 0.0 && (off / moved).sqrt() < 0.05,
        "{}",
        (off / moved).sqrt()
    );
}
