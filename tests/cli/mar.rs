//! A MAR goes through every stage, over both of its trunks, and remains a MAR.

use tinyfusion::npz::read_samples;
use tinyfusion::weights::Checkpoint;

use crate::program::Place;

/// A recipe with every stage for a small MAR of the digits.
const RECIPE: &str = "
data = 'digits'
[[stage]]
kind = 'train'
steps = 4
batch = 4
architecture = { family = 'mar', patch_size = 2, width = 8, heads = 2, encoder_depth = 2, decoder_depth = 4, buffer = 2, head_width = 8, head_depth = 1 }
[[stage]]
kind = 'prune'
name = 'learned'
from = 'train'
groups = '1:2'
steps = 3
batch = 4
[[stage]]
kind = 'prune'
name = 'shortgpt'
from = 'train'
method = 'shortgpt'
keep = 3
batches = 1
batch = 4
[[stage]]
kind = 'prune'
name = 'sensitivity'
from = 'train'
method = 'sensitivity'
keep = 3
batches = 1
batch = 4
[[stage]]
kind = 'prune'
name = 'lowest'
from = 'train'
method = 'calibration'
keep = 3
masks = 4
batches = 1
batch = 4
[[stage]]
kind = 'prune'
name = 'oracle'
from = 'train'
method = 'oracle'
[[stage]]
kind = 'prune'
name = 'average'
from = 'train'
method = 'kept'
kept = [1, 2, 4]
start = 'average'
[[stage]]
kind = 'recover'
from = 'average'
method = 'masked-kd'
teacher = 'train'
steps = 4
batch = 4
accumulate = 2
[[stage]]
kind = 'sample'
from = 'recover'
count = 3
solver = 'masked'
rounds = 3
steps = 2
[[stage]]
kind = 'evaluate'
compare = ['train', 'learned', 'recover']
count = 12
batch = 6
solver = 'masked'
rounds = 2
steps = 2
guidance_schedule = 'constant'
temperature = 0.9
clip = true
";

#[test]
fn a_mar_goes_through_every_stage() {
    let place = Place::new();
    place.write("mar.toml", RECIPE);
    let planned = place.run(&["recipe", "mar.toml", "--dry-run"]).succeeded();
    assert!(
        planned.stdout.contains("MAR, encoder of 2"),
        "{}",
        planned.stdout
    );
    let ran = place.run(&["recipe", "mar.toml"]).succeeded();
    assert!(ran.stdout.contains("recover"), "{}", ran.stdout);
    let run = "artifacts/runs/mar/001";
    for (stage, layers) in [
        ("01-train", Some([2, 4])),
        ("02-learned", Some([1, 2])),
        ("03-shortgpt", None),
        ("04-sensitivity", None),
        ("05-lowest", None),
        ("06-oracle", Some([1, 2])),
        ("07-average", Some([1, 2])),
        ("08-recover", Some([1, 2])),
    ] {
        let model = format!("{run}/{stage}/model.safetensors");
        let said = place.run(&["inspect", &model]).succeeded().stdout;
        let expected = match layers {
            Some([encoder, decoder]) => format!(
                "MAR, encoder of {encoder} layers of width 8 with 2 heads, decoder of {decoder} layers"
            ),
            None => "MAR, encoder of".to_owned(),
        };
        assert!(said.contains(&expected), "{said}");
        let checkpoint = Checkpoint::read(&place.path(&model)).unwrap();
        let depth = layers.map_or(3, |[encoder, decoder]| encoder + decoder);
        assert_eq!(checkpoint.architecture.depth(), depth, "{stage}");
    }
    // Terms of the head, and of the hidden states of both trunks.
    let log = std::fs::read_to_string(place.path(&format!("{run}/08-recover/metrics.jsonl")));
    let log = log.unwrap();
    for term in ["mse", "vb", "kd", "vb_kd", "features"] {
        assert!(log.contains(&format!("\"{term}\"")), "{log}");
    }

    // The samples don't depend on the batch; the command knows how a MAR is drawn.
    let model = format!("{run}/08-recover/model.safetensors");
    let sample = |model: &str, to: &str, batch: &str| {
        let arguments = [
            "sample", model, "--into", to, "--count", "5", "--steps", "2", "--batch", batch,
            "--set", "rounds=4",
        ];
        place.run(&arguments).succeeded();
        read_samples(&place.path(to).join("samples.npz"))
            .unwrap()
            .images
    };
    let together = sample(&model, "together", "5");
    assert_eq!(together.shape(), [5, 8, 8, 1]);
    assert_eq!(together, sample(&model, "apart", "2"));

    // A folder says what tensors don't: that a token is of two by two pixels.
    place.run(&["convert", &model, "folder"]).succeeded();
    assert_eq!(together, sample("folder", "of-folder", "5"));
    let diffusers = place.run(&["convert", &model, "other", "--diffusers"]);
    assert_eq!(diffusers.status, Some(2));
    assert!(
        diffusers.stderr.contains("diffusers has no MAR"),
        "{}",
        diffusers.stderr
    );
}

#[test]
fn what_a_mar_can_not_do_is_said() {
    let place = Place::new();
    let train = |depths: &str| {
        format!(
            "data = 'digits'\n[[stage]]\nkind = 'train'\nsteps = 1\narchitecture = {{ family = 'mar', patch_size = 2, {depths} }}\n"
        )
    };
    let refused = |text: &str, words: &str| {
        place.write("wrong.toml", text);
        let finished = place.run(&["recipe", "wrong.toml", "--dry-run"]);
        assert_eq!(finished.status, Some(2), "{}", finished.stdout);
        assert!(finished.stderr.contains(words), "{}", finished.stderr);
    };
    let even = train("encoder_depth = 4, decoder_depth = 4");
    let odd = train("encoder_depth = 3, decoder_depth = 5");
    let prune = |how: &str| format!("[[stage]]\nkind = 'prune'\n{how}\n");
    for (model, stage, words) in [
        (&odd, prune("groups = '1:2'\nsteps = 1"), "border"),
        (&odd, prune("method = 'oracle'"), "border"),
        (
            &even,
            prune("method = 'intervals'\nkeep = 4\nsteps = 1"),
            "has two",
        ),
        (
            &even,
            prune("method = 'parallel'\nsteps = 1"),
            "pairs are of whole blocks",
        ),
        (
            &even,
            prune("method = 'random'\nkeep = 4\ngranularity = 'branch'"),
            "can't be taken apart by branch",
        ),
        (
            &even,
            prune("method = 'width'\nratio = 0.5"),
            "has no channels that can be taken out",
        ),
        (
            &even,
            "[[stage]]\nkind = 'sample'\ncount = 1\n".to_owned(),
            "masked autoregression (a MAR), which is sampled by the solvers \"masked\"",
        ),
        (
            &even,
            "[[stage]]\nkind = 'sample'\ncount = 1\nsolver = 'masked'\neta = 0.5\n".to_owned(),
            "`eta` is not used by solver \"masked\"",
        ),
        (
            &even,
            "[[stage]]\nkind = 'analyse'\nshow = ['similarity']\n".to_owned(),
            "has two trunks",
        ),
    ] {
        refused(&format!("{model}{stage}"), words);
    }
    // Under another teacher: of other tokens, of states of other places, or of layers that lie
    // elsewhere.
    let teacher = |keys: &str| {
        format!(
            "[[stage]]\nkind = 'train'\nname = 'other'\nsteps = 1\narchitecture = {{ family = 'mar', {keys} }}\n"
        )
    };
    let kd = |how: &str| {
        format!(
            "[[stage]]\nkind = 'recover'\nfrom = 'train'\nteacher = 'other'\nsteps = 1\n{how}\n"
        )
    };
    let masked_kd = |taps: &str| kd(&format!("method = 'masked-kd'\n{taps}"));
    for (keys, stage, words) in [
        (
            "patch_size = 1",
            kd("method = 'kd'"),
            "predict different things",
        ),
        (
            "patch_size = 2, buffer = 3",
            masked_kd("taps = [[0, 0]]"),
            "places can't be compared",
        ),
        (
            "patch_size = 2, encoder_depth = 6, decoder_depth = 2",
            masked_kd("taps = [[5, 5]]"),
            "between an encoder and a decoder",
        ),
    ] {
        refused(&format!("{even}{}{stage}", teacher(keys)), words);
    }
    refused(
        &train("encoder_depth = 0, decoder_depth = 0"),
        "can't be built",
    );
    for (workload, words) in [("prune", "border"), ("importance", "has none")] {
        let arguments = [
            "bench",
            "--model",
            "MAR-B",
            "--depth",
            "6",
            "--workload",
            workload,
        ];
        let finished = place.run(&arguments);
        assert_eq!(finished.status, Some(2), "{}", finished.stdout);
        assert!(finished.stderr.contains(words), "{}", finished.stderr);
    }
    let dit = "[[stage]]\nkind = 'sample'\nfrom = 'embedded:digits-teacher'\ncount = 1\nsolver = 'masked'\n";
    refused(dit, "gaussian diffusion (a DiT)");
    let rounds =
        "[[stage]]\nkind = 'sample'\nfrom = 'embedded:digits-teacher'\ncount = 1\nrounds = 3\n";
    refused(rounds, "`rounds` is not used by solver \"ddpm\"");
}
