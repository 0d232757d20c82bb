//! However many threads compute, a run's files are the same to the last bit.

use tinyfusion::weights::Checkpoint;

use crate::program::Place;

/// What the kernels meet: transformers with more rows than one part of a weight's gradient, few
/// samples, LoRA, convolutions, both ways of measuring.
const RECIPE: &str = "
data = 'digits'
[[stage]]
kind = 'train'
name = 'teacher'
steps = 3
batch = 40
architecture = { family = 'dit', width = 32, heads = 2, depth = 4 }
[[stage]]
kind = 'prune'
groups = '1:2'
steps = 3
batch = 40
[[stage]]
kind = 'recover'
name = 'student'
method = 'masked-kd'
teacher = 'teacher'
steps = 3
batch = 3
[[stage]]
kind = 'prune'
name = 'flux-lite'
from = 'teacher'
method = 'flux-lite'
keep = 2
batches = 1
batch = 4
[[stage]]
kind = 'train'
name = 'unet'
steps = 2
batch = 5
architecture = { family = 'unet', levels = 2, width = 16, norm_groups = 4, layers = 1 }
[[stage]]
kind = 'prune'
name = 'narrow'
from = 'unet'
method = 'width'
ratio = 0.5
timesteps = 3
batch = 5
multiple = 1
[[stage]]
kind = 'train'
name = 'mar'
steps = 2
batch = 40
architecture = { family = 'mar', width = 16, heads = 2, encoder_depth = 2, decoder_depth = 2, buffer = 2, head_width = 16, head_depth = 1 }
[[stage]]
kind = 'evaluate'
compare = ['teacher', 'student', 'unet', 'narrow']
count = 30
batch = 7
solver = 'ddim'
steps = 2
";

#[test]
fn the_number_of_threads_changes_no_bit() {
    let place = Place::new();
    place.write("all.toml", RECIPE);
    let files = |threads: &str, compute: &str| {
        let runs = format!("runs-{compute}-{threads}");
        let command = ["recipe", "all.toml", "--runs", &runs, "--threads", threads];
        let compute = format!("compute={compute}");
        place
            .run(&[&command[..], &["--set", &compute]].concat())
            .succeeded();
        let run = place.path(&runs).join("all/001");
        let read = |path: &str| std::fs::read(run.join(path)).unwrap();
        let mut models: Vec<_> = [
            "teacher",
            "prune",
            "student",
            "flux-lite",
            "unet",
            "narrow",
            "mar",
        ]
        .iter()
        .zip(1..)
        .map(|(stage, number)| {
            (
                stage.to_string(),
                read(&format!("{number:02}-{stage}/model.safetensors")),
            )
        })
        .collect();
        let text = String::from_utf8(read("08-evaluate/eval.json")).unwrap();
        let mut measured: serde_json::Value = serde_json::from_str(&text).unwrap();
        for model in measured["verdicts"].as_array_mut().unwrap() {
            model["images_per_second"].take();
        }
        models.push(("evaluate".to_owned(), measured.to_string().into_bytes()));
        models
    };
    let runs = [("f32", ["2", "5"].as_slice()), ("bf16", &["2"])];
    for (compute, counts) in runs {
        let one = files("1", compute);
        for threads in counts {
            for ((stage, one), (_, other)) in one.iter().zip(&files(threads, compute)) {
                assert!(
                    one == other,
                    "{stage} differs between 1 and {threads} threads, {compute}"
                );
            }
        }
    }
    // Networks of every kind have products that are rounded. (Files of the two differ anyway: each
    // names its recipe.)
    let weights = |compute: &str, stage: &str| {
        let path = format!("runs-{compute}-1/all/001/{stage}/model.safetensors");
        let model = Checkpoint::read(&place.path(&path)).unwrap();
        model.fingerprint().unwrap()
    };
    for stage in ["01-teacher", "03-student", "05-unet", "07-mar"] {
        assert_ne!(weights("f32", stage), weights("bf16", stage), "{stage}");
    }
}
