//! A user's own pictures, in pixel space: from a folder or from files in MNIST's format to a table
//! of scores.

use std::io::{BufRead, BufReader};
use std::path::Path;

use image::{Rgb, RgbImage};
use serde_json::Value;
use tinyfusion::weights::Checkpoint;

use crate::program::Place;

/// A bright picture with a dark stripe, across or down, in various sizes.
fn picture(across: bool, index: u32) -> RgbImage {
    let (width, height) = (16 + 5 * (index % 4), 16 + 3 * (index % 5));
    RgbImage::from_fn(width, height, |x, y| {
        let (at, of) = if across { (y, height) } else { (x, width) };
        let dark = at > of / 3 && at < 2 * of / 3;
        let level = 200 + (index * 7 % 50) as u8;
        Rgb(if dark {
            [20, 30, 40]
        } else {
            [level, level, 90]
        })
    })
}

/// A folder `stripes` of two classes, PNG and JPEG.
fn stripes(place: &Place) {
    for (class, across) in [("across", true), ("down", false)] {
        let folder = place.path("stripes").join(class);
        std::fs::create_dir_all(&folder).unwrap();
        for index in 0..20 {
            let ending = if index % 3 == 0 { "jpg" } else { "png" };
            let path = folder.join(format!("{index:02}.{ending}"));
            let picture = picture(across, index);
            if ending == "png" {
                picture.save(path).unwrap();
                continue;
            }
            let [width, height] = [picture.width() as u16, picture.height() as u16];
            let jpeg = jpeg_encoder::Encoder::new_file(path, 75).unwrap();
            jpeg.encode(&picture, width, height, jpeg_encoder::ColorType::Rgb)
                .unwrap();
        }
    }
    place.write("stripes/across/notes.txt", "no picture");
}

/// The same pictures, grey and 8 x 8, in MNIST's format.
fn idx(place: &Place) {
    for (part, count) in [("train", 24), ("t10k", 10)] {
        let (mut pixels, mut labels) = (Vec::new(), Vec::new());
        for index in 0..count {
            let across = index % 2 == 0;
            let grey = image::imageops::thumbnail(&picture(across, index), 8, 8);
            pixels.extend(grey.pixels().map(|pixel| pixel.0[0]));
            labels.push(u8::from(!across));
        }
        let header = |kind: u8, sizes: &[u32]| -> Vec<u8> {
            let sizes = sizes.iter().flat_map(|size| size.to_be_bytes());
            [0, 0, 8, kind].into_iter().chain(sizes).collect()
        };
        let images = [header(3, &[count, 8, 8]), pixels].concat();
        place.write(&format!("idx/{part}-images-idx3-ubyte"), images);
        let labels = [header(1, &[count]), labels].concat();
        place.write(&format!("idx/{part}-labels-idx1-ubyte"), labels);
    }
}

/// All kinds of stages on some data, which give both networks' sizes.
fn recipe(data: &str) -> String {
    format!(
        "data = {data}
        [[stage]]
        kind = 'train'
        name = 'features'
        steps = 120
        batch = 16
        architecture = {{ family = 'classifier', width = 8 }}
        [[stage]]
        kind = 'train'
        name = 'teacher'
        steps = 8
        batch = 8
        checkpoint_every = 2
        log_every = 1
        architecture = {{ family = 'dit', patch_size = 4, width = 8, heads = 2, depth = 4 }}
        [[stage]]
        kind = 'prune'
        groups = '1:2'
        steps = 3
        batch = 8
        [[stage]]
        kind = 'prune'
        name = 'shortgpt'
        from = 'teacher'
        method = 'shortgpt'
        keep = 2
        batches = 2
        batch = 4
        [[stage]]
        kind = 'recover'
        from = 'prune'
        method = 'masked-kd'
        teacher = 'teacher'
        steps = 3
        batch = 8
        [[stage]]
        kind = 'sample'
        count = 4
        steps = 2
        [[stage]]
        kind = 'evaluate'
        features = 'features'
        compare = ['teacher', 'recover']
        count = 10
        neighbours = 1
        steps = 2
        "
    )
}

const PICTURES: &str = "{ images = 'stripes', size = 8, flips = true, held_out = 0.25 }";

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Files of a resumed run that must be identical to the byte.
fn results(run: &Path) -> Vec<Vec<u8>> {
    [
        "01-features/model.safetensors",
        "02-teacher/model.safetensors",
        "03-prune/model.safetensors",
        "04-shortgpt/model.safetensors",
        "05-recover/model.safetensors",
        "06-sample/samples.npz",
        "07-evaluate/1-teacher/samples.npz",
    ]
    .iter()
    .map(|file| std::fs::read(run.join(file)).unwrap())
    .collect()
}

#[test]
fn a_folder_of_pictures_is_trained_pruned_recovered_and_measured() {
    let place = Place::new();
    stripes(&place);
    place.write("own.toml", recipe(PICTURES));
    let finished = place
        .run(&["recipe", "own.toml", "--runs", "whole"])
        .succeeded();
    for words in [
        "data: 30 pictures of 2 classes to train on, 10 held out",
        "data: 1 other entries of stripes are passed over",
    ] {
        assert!(finished.stderr.contains(words), "{}", finished.stderr);
    }
    let table = "10 held-out images of stripes (FID in the features of features)";
    for words in [table, "10 training images", "recover"] {
        assert!(finished.stdout.contains(words), "{}", finished.stdout);
    }
    let whole = place.path("whole/own/001");
    let teacher = Checkpoint::read(&whole.join("02-teacher/model.safetensors")).unwrap();
    let shape = teacher.denoiser().unwrap().shape();
    assert_eq!((shape.channels, shape.side, shape.classes), (3, 8, 2));
    for stage in [
        "01-features",
        "02-teacher",
        "03-prune",
        "04-shortgpt",
        "05-recover",
    ] {
        let model = Checkpoint::read(&whole.join(stage).join("model.safetensors")).unwrap();
        assert_eq!(model.provenance.class_names, ["across", "down"], "{stage}");
        assert_eq!(model.provenance.data, "pictures in stripes", "{stage}");
    }
    // Any classifier that has learned at all tells the stripes apart.
    let features = Checkpoint::read(&whole.join("01-features/model.safetensors")).unwrap();
    let note = &features.provenance.note;
    let told = ["1.0000", "0.9000"].map(|share| format!("test accuracy {share} on 10 images"));
    assert!(told.contains(note), "{note}");
    let inspected = place
        .run(&["inspect", "whole/own/001/02-teacher/model.safetensors"])
        .succeeded();
    assert!(
        inspected.stdout.contains("across, down"),
        "{}",
        inspected.stdout
    );
    let evaluation = json(&whole.join("07-evaluate/eval.json"));
    assert_eq!(evaluation["verdicts"].as_array().unwrap().len(), 3);
    assert_eq!(
        evaluation["protocol"]["reference"],
        "10 held-out pictures of stripes, 8 bits"
    );

    // Killed while training the teacher; a picture is removed then, but the run has its own copy.
    let mut child = place.start(&["recipe", "own.toml", "--runs", "broken"]);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let reached = |line: &String| line.starts_with("teacher ") && line.contains(" 5/8");
    lines.by_ref().map_while(Result::ok).find(reached).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    std::fs::rename(place.path("stripes/across/00.jpg"), place.path("kept.jpg")).unwrap();
    let resumed = place
        .run(&["recipe", "own.toml", "--runs", "broken", "--resume"])
        .succeeded();
    let started_over = |line: &str| line.starts_with("teacher ") && line.contains(" 1/8");
    assert!(
        !resumed.stderr.lines().any(started_over),
        "{}",
        resumed.stderr
    );
    assert_eq!(results(&place.path("broken/own/001")), results(&whole));

    // Without its copy, a run does not continue with other pictures than it began with.
    let broken = place.path("broken/own/001");
    std::fs::remove_dir_all(broken.join("data")).unwrap();
    std::fs::remove_file(broken.join("07-evaluate/done.json")).unwrap();
    let status = std::fs::read_to_string(broken.join("status.json")).unwrap();
    std::fs::write(
        broken.join("status.json"),
        status.replace("finished", "failed"),
    )
    .unwrap();
    let refused = place.run(&["recipe", "own.toml", "--runs", "broken", "--resume"]);
    assert_eq!(refused.status, Some(2));
    assert!(
        refused.stderr.contains("have changed since this run began"),
        "{}",
        refused.stderr
    );
    let back = place.path("stripes/across/00.jpg");
    std::fs::rename(place.path("kept.jpg"), back).unwrap();
    place
        .run(&["recipe", "own.toml", "--runs", "broken", "--resume"])
        .succeeded();
    assert_eq!(results(&broken), results(&whole));
}

#[test]
fn files_in_the_format_of_mnist_are_trained_on_and_measured_against() {
    let place = Place::new();
    idx(&place);
    place.write("idx.toml", recipe("{ idx = 'idx' }"));
    let finished = place
        .run(&["recipe", "idx.toml", "--runs", "runs"])
        .succeeded();
    let table = "10 held-out images of idx (FID in the features of features)";
    assert!(finished.stdout.contains(table), "{}", finished.stdout);
    let teacher = Checkpoint::read(&place.path("runs/idx/001/02-teacher/model.safetensors"));
    let shape = teacher.unwrap().denoiser().unwrap().shape();
    assert_eq!((shape.channels, shape.side, shape.classes), (1, 8, 2));

    // The same, on the command line.
    let arguments = |data: &'static str| {
        [
            "evaluate",
            "runs/idx/001/05-recover/model.safetensors",
            "--data",
            data,
            "--features",
            "runs/idx/001/01-features/model.safetensors",
            "--count",
            "8",
            "--steps",
            "2",
        ]
    };
    let measured = place.run(&arguments("{ idx = 'idx' }")).succeeded();
    assert!(
        measured.stdout.contains("10 held-out images of idx"),
        "{}",
        measured.stdout
    );
    // Never compared with other pictures.
    let refused = place.run(&arguments("digits"));
    assert_eq!(refused.status, Some(2));
    assert!(
        refused.stderr.contains("draws 1x8x8 in 2 classes"),
        "{}",
        refused.stderr
    );
    let without = [
        "evaluate",
        "runs/idx/001/05-recover/model.safetensors",
        "--data",
        "{ idx = 'idx' }",
    ];
    let refused = place.run(&without);
    for words in ["missing key `features`", "a classifier of these pictures"] {
        assert!(refused.stderr.contains(words), "{}", refused.stderr);
    }
}

#[test]
fn pictures_that_can_not_be_learned_are_refused_by_name() {
    let place = Place::new();
    stripes(&place);
    let refuse = |data: &str, expected: &[&str]| {
        place.write("own.toml", recipe(data));
        let refused = place.run(&["recipe", "own.toml"]);
        assert_eq!(refused.status, Some(2), "{data}: {}", refused.stderr);
        for part in expected {
            assert!(refused.stderr.contains(part), "{data}: {}", refused.stderr);
        }
    };
    refuse(
        "'stripes'",
        &["own.toml:1:8", "{ images = \"stripes\", size = 32"],
    );
    refuse(
        "'fashoin'",
        &["\"digits\", \"fashion\"", "did you mean `fashion`"],
    );
    refuse(
        "{ images = 'no/such', size = 8 }",
        &["folder not found: \"no/such\""],
    );
    refuse("{ images = 'stripes' }", &["missing key `size`"]);
    refuse(
        "{ images = 'stripes', size = 8, channels = 2 }",
        &["must be 1 (grey) or 3"],
    );
    refuse(
        "{ images = 'stripes', size = 8, fill = 3 }",
        &["`fill` is not used by fit \"crop\""],
    );
    refuse(
        "{ size = 8 }",
        &["`data` needs one of `images`", "found none"],
    );
    refuse(
        "{ images = 'stripes', idx = 'stripes', size = 8 }",
        &["found images and idx"],
    );
    refuse(
        "{ idx = 'stripes' }",
        &["stripes", "train-images-idx3-ubyte or"],
    );
    // Patches must divide the side, which the data give.
    refuse(
        "{ images = 'stripes', size = 10 }",
        &["must divide `input_size`, which is 10"],
    );
    // A model of another size than the pictures.
    let other = recipe("{ images = 'stripes', size = 8 }")
        .replace("patch_size", "input_size = 16, patch_size");
    place.write("other.toml", other);
    let refused = place.run(&["recipe", "other.toml"]);
    assert!(
        refused
            .stderr
            .contains("the data are stripes, 3x8x8 in 2 classes"),
        "{}",
        refused.stderr
    );
    // A classifier of other pictures: the embedded one is of digits.
    let other = recipe("{ images = 'stripes', size = 8, channels = 1 }").replace(
        "features = 'features'",
        "features = 'embedded:digits-features'",
    );
    place.write("other.toml", other);
    let refused = place.run(&["recipe", "other.toml"]);
    assert!(
        refused
            .stderr
            .contains("`embedded:digits-features` is a classifier of 1x8x8, 10 classes"),
        "{}",
        refused.stderr
    );
    refuse(
        "{ images = 'stripes', size = 8, held_out = 0 }",
        &["no pictures of the data, stripes, are held out"],
    );
}

#[test]
fn broken_pictures_and_empty_classes_are_refused_by_name() {
    let place = Place::new();
    stripes(&place);
    let data = "{ images = 'stripes', size = 8 }";
    place.write("own.toml", recipe(data));
    let whole = std::fs::read(place.path("stripes/down/06.jpg")).unwrap();
    place.write("stripes/down/06.jpg", &whole[..whole.len() / 2]);
    place.write("stripes/across/07.png", "no picture");
    // One of them is held out: both are reported before anything is trained.
    let refused = place.run(&["recipe", "own.toml", "--runs", "a"]);
    assert_eq!(refused.status, Some(2));
    assert!(!refused.stderr.contains("features "), "{}", refused.stderr);
    for part in [
        "2 pictures can't be read",
        "stripes/down/06.jpg",
        "stripes/across/07.png",
    ] {
        assert!(refused.stderr.contains(part), "{}", refused.stderr);
    }
    place.write("stripes/down/06.jpg", &whole);
    std::fs::remove_file(place.path("stripes/across/07.png")).unwrap();
    place.write("stripes/sideways/list.txt", "no picture");
    let refused = place.run(&["recipe", "own.toml", "--runs", "b"]);
    assert_eq!(refused.status, Some(2));
    let words = "stripes/sideways: expected pictures of a class";
    assert!(refused.stderr.contains(words), "{}", refused.stderr);
    assert!(
        !place.path("b").exists(),
        "refused before anything is written"
    );
}

#[test]
fn a_classifier_is_trained_where_nothing_is_held_out() {
    let place = Place::new();
    stripes(&place);
    place.write(
        "own.toml",
        "data = { images = 'stripes', size = 8, held_out = 0 }
        [[stage]]
        kind = 'train'
        steps = 2
        architecture = { family = 'classifier', width = 8 }
        ",
    );
    place
        .run(&["recipe", "own.toml", "--runs", "runs"])
        .succeeded();
    let model = Checkpoint::read(&place.path("runs/own/001/01-train/model.safetensors"));
    assert_eq!(model.unwrap().provenance.note, "no pictures to test it on");
}

#[test]
fn what_a_model_is_measured_against_is_never_guessed() {
    let place = Place::new();
    stripes(&place);
    place.write("own.toml", recipe(PICTURES));
    place
        .run(&["recipe", "own.toml", "--runs", "runs"])
        .succeeded();
    let model = "runs/own/001/02-teacher/model.safetensors";
    let refuse = |arguments: &[&str], expected: &str| {
        let refused = place.run(arguments);
        assert_eq!(refused.status, Some(2), "{}", refused.stderr);
        assert!(refused.stderr.contains(expected), "{}", refused.stderr);
    };
    refuse(
        &["evaluate", model],
        "the model learned from pictures in stripes; --data says",
    );
    refuse(&["evaluate", model, "--data", "stirpes"], "--data stirpes");
    // Other pictures with the same number of classes.
    std::fs::rename(place.path("stripes/down"), place.path("stripes/upwards")).unwrap();
    let features = "runs/own/001/01-features/model.safetensors";
    let arguments = [
        "evaluate",
        model,
        "--features",
        features,
        "--data",
        PICTURES,
    ];
    refuse(
        &arguments,
        "is of other pictures: its classes are across, down",
    );
    let archive = "runs/own/001/06-sample/samples.npz";
    refuse(
        &["evaluate", archive, archive, "--data", "digits"],
        "--data and --features are for models",
    );
}
