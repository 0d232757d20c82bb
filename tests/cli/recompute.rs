//! `recompute = true`: less memory, and the same models.

use tinyfusion::weights::Checkpoint;

use crate::program::Place;

const RECIPE: &str = "
data = 'digits'
[[stage]]
kind = 'train'
name = 'teacher'
steps = 3
batch = 20
architecture = { family = 'dit', width = 32, heads = 2, depth = 4 }
[[stage]]
kind = 'prune'
name = 'learned'
groups = '1:2'
update = 'lora'
steps = 3
batch = 20
[[stage]]
kind = 'prune'
name = 'by-branch'
from = 'teacher'
granularity = 'branch'
groups = '2:4'
steps = 3
batch = 20
[[stage]]
kind = 'recover'
name = 'student'
from = 'learned'
method = 'masked-kd'
teacher = 'teacher'
steps = 3
batch = 20
accumulate = 2
[[stage]]
kind = 'prune'
name = 'paired'
from = 'teacher'
method = 'parallel'
steps = 3
batch = 20
[[stage]]
kind = 'recover'
name = 'paired-student'
method = 'fine-tune'
steps = 3
batch = 20
";

#[test]
fn recomputing_changes_no_bit_of_a_model() {
    let place = Place::new();
    place.write("all.toml", RECIPE);
    let models = |runs: &str, more: &[&str]| {
        let arguments = [&["recipe", "all.toml", "--runs", runs], more].concat();
        place.run(&arguments).succeeded();
        let names = [
            "01-teacher",
            "02-learned",
            "03-by-branch",
            "04-student",
            "05-paired",
            "06-paired-student",
        ];
        let models = names.map(|stage| {
            let path = place.path(&format!("{runs}/all/001/{stage}/model.safetensors"));
            Checkpoint::read(&path).unwrap().fingerprint().unwrap()
        });
        // What is pruned has its original weights: the gates tell what was learned.
        let gates = ["02-learned", "03-by-branch"].map(|stage| {
            let path = place.path(&format!("{runs}/all/001/{stage}/decisions.jsonl"));
            std::fs::read_to_string(path).unwrap()
        });
        (models, gates)
    };
    let kept = models("kept", &[]);
    let again = models("again", &["--set", "recompute=true"]);
    assert_eq!(kept, again);
    let differ = kept.0.iter().collect::<std::collections::HashSet<_>>();
    assert_eq!(differ.len(), kept.0.len());
}

#[test]
fn a_plan_says_what_recomputing_saves_and_who_can() {
    let place = Place::new();
    let wide = "kind = 'train'\nsteps = 1\nbatch = 512\narchitecture = { family = 'dit', width = 256, heads = 4, depth = 12 }";
    place.write("wide.toml", format!("[[stage]]\n{wide}"));
    let plan = |more: &[&str]| {
        let plan = place.run(&[&["recipe", "wide.toml", "--dry-run"], more].concat());
        let plan = plan.succeeded().stdout;
        let number = |before: &str, unit: &str| -> f64 {
            let text = plan[..plan.find(unit).unwrap()]
                .rsplit(before)
                .next()
                .unwrap();
            text.trim().replace(',', "").parse().unwrap()
        };
        (number("about", "MiB"), number("MiB,", "FLOPs"))
    };
    let (kept, again) = (plan(&[]), plan(&["--set", "recompute=true"]));
    assert!(again.0 < 0.3 * kept.0, "{} MiB, {} MiB", kept.0, again.0);
    // Forward once more: four passes in the place of three.
    assert!(
        (again.1 / kept.1 - 4.0 / 3.0).abs() < 0.01,
        "{kept:?} {again:?}"
    );

    let unet = "kind = 'train'\nname = 'unet'\nsteps = 1\narchitecture = { family = 'unet', levels = 2, width = 16, norm_groups = 4, layers = 1 }";
    place.write("unet.toml", format!("recompute = true\n[[stage]]\n{unet}"));
    let refused = place.run(&["recipe", "unet.toml", "--dry-run"]);
    assert_eq!(refused.status, Some(2));
    for part in [
        "stage `unet`",
        "recompute = true is of DiTs and SiTs",
        "UNet",
    ] {
        assert!(refused.stderr.contains(part), "{part}: {}", refused.stderr);
    }
    let refused = place.run(&["bench", "--model", "UNet-CIFAR10", "--recompute"]);
    assert_eq!(refused.status, Some(2));
    assert!(refused.stderr.contains("--recompute"), "{}", refused.stderr);
}
