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

fn layers_of(depth: usize) -> String {
    format!("{depth} layer{}", if depth == 1 { "" } else { "s" })
}

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
                "MAR, encoder of {} of width 8 with 2 heads, decoder of {}",
                layers_of(encoder),
                layers_of(decoder)
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

/// Every other way to make it smaller.
const WAYS: &str = "
data = 'digits'
[[stage]]
kind = 'train'
steps = 4
batch = 4
architecture = { family = 'mar', patch_size = 2, width = 16, heads = 2, encoder_depth = 3, decoder_depth = 4, buffer = 2, head_width = 8, head_depth = 2 }
[[stage]]
kind = 'prune'
name = 'branches'
from = 'train'
granularity = 'branch'
groups = '1:2'
steps = 3
batch = 4
[[stage]]
kind = 'recover'
name = 'healed'
from = 'branches'
method = 'masked-kd'
teacher = 'train'
steps = 2
batch = 4
[[stage]]
kind = 'prune'
name = 'pairs'
from = 'train'
method = 'parallel'
steps = 2
batch = 4
[[stage]]
kind = 'prune'
name = 'trained'
from = 'train'
method = 'intervals'
keep = 4
steps = 2
batch = 4
[[stage]]
kind = 'prune'
name = 'plugged'
from = 'train'
method = 'intervals'
trained = 'trained'
keep = 4
[[stage]]
kind = 'prune'
name = 'narrow'
from = 'train'
method = 'width'
ratio = 0.5
stream = 0.25
multiple = 2
timesteps = 4
batch = 4
[[stage]]
kind = 'prune'
name = 'both'
from = 'narrow'
method = 'first'
keep = 5
[[stage]]
kind = 'recover'
name = 'taught'
from = 'narrow'
method = 'rep-kd'
teacher = 'train'
steps = 2
batch = 4
[[stage]]
kind = 'analyse'
from = 'train'
show = ['states', 'similarity', 'speed']
batch = 4
[[stage]]
kind = 'evaluate'
compare = ['healed', 'pairs', 'trained', 'plugged', 'both', 'taught']
count = 4
batch = 4
solver = 'masked'
rounds = 2
steps = 2
";

#[test]
fn a_mar_is_pruned_in_every_way() {
    let place = Place::new();
    place.write("ways.toml", WAYS);
    place.run(&["recipe", "ways.toml", "--dry-run"]).succeeded();
    let ran = place.run(&["recipe", "ways.toml"]).succeeded();
    let run = "artifacts/runs/ways/001";
    let plain = "width 16 with 2 heads";
    for (stage, encoder, decoder) in [
        ("02-branches", "3 of ", "4 of "),
        ("03-healed", "3 of ", "4 of "),
        (
            "04-pairs",
            "2 layers (1 of them pairs)",
            "2 layers (2 of them pairs)",
        ),
        ("05-trained", plain, plain),
        ("06-plugged", plain, plain),
        (
            "07-narrow",
            "3 layers of width 12 with",
            "4 layers of width 12 with 2 heads of 4, MLP 32",
        ),
        ("08-both", "3 layers of width 12", "2 layers of width 12"),
        ("09-taught", "3 layers of width 12", "4 layers of width 12"),
    ] {
        let model = format!("{run}/{stage}/model.safetensors");
        let said = place.run(&["inspect", &model]).succeeded().stdout;
        let line = said.lines().find(|line| line.contains("MAR, ")).unwrap();
        let (one, other) = line.split_once("decoder of").unwrap();
        assert!(
            one.contains(encoder) && other.contains(decoder),
            "{stage}: {said}"
        );
        // Names and shapes are the network's own, and go through the other forms.
        let folder = format!("{stage}-folder");
        place.run(&["convert", &model, &folder]).succeeded();
        let back = Checkpoint::read(&place.path(&folder)).unwrap();
        let checkpoint = Checkpoint::read(&place.path(&model)).unwrap();
        assert_eq!(back.architecture, checkpoint.architecture, "{stage}");
    }
    // A replacement for each trunk's layers: none is across the border.
    let intervals = format!("{run}/05-trained/intervals.json");
    let intervals = std::fs::read_to_string(place.path(&intervals)).unwrap();
    let intervals: serde_json::Value = serde_json::from_str(&intervals).unwrap();
    for interval in intervals["intervals"].as_array().unwrap() {
        let [first, last] = ["first", "last"].map(|end| interval[end].as_u64().unwrap());
        assert_eq!(first < 3, last < 3, "{intervals}");
    }
    for figure in ["05-trained", "10-analyse"] {
        for of in ["encoder", "decoder"] {
            let file = format!("{run}/{figure}/similarity-{of}.svg");
            assert!(place.path(&file).exists(), "{file}");
        }
    }
    assert!(ran.stdout.contains("taught"), "{}", ran.stdout);
    // A folder says how the original code is given such blocks.
    for (folder, words) in [
        ("02-branches-folder", "def attention_alone"),
        ("04-pairs-folder", "class Pair"),
        ("07-narrow-folder", "resize(head, \"cond_embed\""),
    ] {
        let card = std::fs::read_to_string(place.path(folder).join("README.md")).unwrap();
        assert!(card.contains(words), "{card}");
    }
}

#[test]
fn a_plan_does_not_guess_how_trunks_are_left() {
    let place = Place::new();
    let recipe = |stage: &str| {
        format!(
            "data = 'digits'\n[[stage]]\nkind = 'train'\nsteps = 1\n\
             architecture = {{ family = 'mar', patch_size = 2, encoder_depth = 4, decoder_depth = 4 }}\n\
             [[stage]]\nkind = 'prune'\nmethod = 'flux-lite'\nkeep = 4\n{stage}"
        )
    };
    // Of 3 and 1 layers, which may be what is left, where 2 and 2 are planned.
    for stage in [
        "[[stage]]\nkind = 'recover'\nmethod = 'masked-kd'\nteacher = 'train'\nsteps = 1\ntaps = [[2, 3], [3, 7]]\n",
        "[[stage]]\nkind = 'prune'\nname = 'again'\ngroups = [[2, 3], [1, 1]]\nsteps = 1\n",
    ] {
        place.write("guess.toml", recipe(stage));
        let planned = place
            .run(&["recipe", "guess.toml", "--dry-run"])
            .succeeded();
        assert!(
            planned.stdout.contains("of each trunk stay"),
            "{}",
            planned.stdout
        );
    }
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
            prune("method = 'intervals'\nkeep = 1\nsteps = 1"),
            "`keep` is 1, and MAR, encoder of 4",
        ),
        (
            &even,
            prune("method = 'width'\nratio = 0.5\nconvolution = 0.5"),
            "has no such channels",
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
            "[[stage]]\nkind = 'sample'\ncount = 1\nsolver = 'masked'\nguidance_channels = 1\n"
                .to_owned(),
            "`guidance_channels` is not used by solver \"masked\"",
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
    let bench = "bench --model MAR-B --depth 6 --workload prune";
    let finished = place.run(&bench.split(' ').collect::<Vec<_>>());
    assert_eq!(finished.status, Some(2), "{}", finished.stdout);
    assert!(finished.stderr.contains("border"), "{}", finished.stderr);
    let dit = "[[stage]]\nkind = 'sample'\nfrom = 'embedded:digits-teacher'\ncount = 1\nsolver = 'masked'\n";
    refused(dit, "gaussian diffusion (a DiT)");
    let rounds =
        "[[stage]]\nkind = 'sample'\nfrom = 'embedded:digits-teacher'\ncount = 1\nrounds = 3\n";
    refused(rounds, "`rounds` is not used by solver \"ddpm\"");
}
