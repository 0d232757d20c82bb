//! The page of all recipe keys and the schema for editors, made from what the reader asks for.
//!
//! Forms and ranges are those that the reader checks, defaults those of a recipe with nothing but
//! its required keys, meanings the doc comments of the fields that keep them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::Recipe;
use crate::recipe::document::Document;
use crate::recipe::document::reader::{Asked, Sink, ValueForm};

/// A table of a recipe, and recipes that between them read all of its keys.
struct Topic {
    title: &'static str,
    /// What it is for.
    about: &'static str,
    /// The table as messages call it; stages are called `it`.
    table: &'static str,
    /// What is written for the table, each with what it is a case of.
    cases: &'static [(&'static str, &'static str)],
}

const BASE: &str = "[[stage]]\nkind = 'prune'\nname = 'base'\nfrom = 'embedded:digits-teacher'\nmethod = 'oracle'\n";

#[rustfmt::skip]
const TOPICS: [Topic; 12] = [
    Topic {
        title: "The recipe", about: "Keys at the top of the file.", table: "the recipe",
        cases: &[("", "")],
    },
    Topic {
        title: "data", about: "What is learned from: a word, a path, or a table.", table: "`data` of the recipe",
        cases: &[
            ("pictures", "data = { images = 'PICTURES', size = 8, held_out = 0.2 }"),
            ("padded pictures", "data = { images = 'PICTURES', size = 8, fit = 'pad' }"),
            ("idx", "data = { idx = 'MISSING' }"),
            ("set", "data = { set = 'fashion-10k' }"),
        ],
    },
    Topic {
        title: "kind = \"train\"", about: "Trains a model, from nothing or on.", table: "it",
        cases: &[("", "kind = 'train'\nsteps = 1000\narchitecture = { family = 'dit' }")],
    },
    Topic {
        title: "architecture", about: "The model of a stage that trains.", table: "`architecture` of [[stage]] \"it\"",
        cases: &[
            ("dit", "kind = 'train'\nsteps = 1000\narchitecture = { family = 'dit' }"),
            ("sit", "kind = 'train'\nsteps = 1000\narchitecture = { family = 'sit' }"),
            ("unet", "kind = 'train'\nsteps = 1000\narchitecture = { family = 'unet' }"),
            ("mar", "kind = 'train'\nsteps = 1000\narchitecture = { family = 'mar' }"),
            ("classifier", "kind = 'train'\nsteps = 1000\narchitecture = { family = 'classifier' }"),
            ("a preset", "kind = 'train'\nsteps = 1000\narchitecture = { family = 'dit', preset = 'DiT-XL/2' }"),
            ("a preset", "kind = 'train'\nsteps = 1000\narchitecture = { family = 'sit', preset = 'SiT-XL/2' }"),
            ("a preset", "kind = 'train'\nsteps = 1000\narchitecture = { family = 'unet', preset = 'UNet-CIFAR10' }"),
            ("a preset", "kind = 'train'\nsteps = 1000\narchitecture = { family = 'mar', preset = 'MAR-L' }"),
        ],
    },
    Topic {
        title: "kind = \"prune\"", about: "Takes layers out.", table: "it",
        cases: &[
            ("learned", "kind = 'prune'\nfrom = 'base'\nmethod = 'learned'\ngroups = '1:2'\nsteps = 1000"),
            ("oracle", "kind = 'prune'\nfrom = 'base'\nmethod = 'oracle'"),
            ("uniform", "kind = 'prune'\nfrom = 'base'\nmethod = 'uniform'\nkeep = 3"),
            ("first", "kind = 'prune'\nfrom = 'base'\nmethod = 'first'\nkeep = 3"),
            ("shortgpt", "kind = 'prune'\nfrom = 'base'\nmethod = 'shortgpt'\nkeep = 3"),
            ("flux-lite", "kind = 'prune'\nfrom = 'base'\nmethod = 'flux-lite'\nkeep = 3"),
            ("sensitivity", "kind = 'prune'\nfrom = 'base'\nmethod = 'sensitivity'\nkeep = 3"),
            ("calibration", "kind = 'prune'\nfrom = 'base'\nmethod = 'calibration'\nkeep = 3"),
            ("evolve", "kind = 'prune'\nfrom = 'base'\nmethod = 'evolve'\nkeep = 3"),
            ("intervals", "kind = 'prune'\nfrom = 'base'\nmethod = 'intervals'\nkeep = 3\nsteps = 1000"),
            ("intervals of another stage", "kind = 'prune'\nfrom = 'base'\nmethod = 'intervals'\nkeep = 3\ntrained = 'base'"),
            ("parallel", "kind = 'prune'\nfrom = 'base'\nmethod = 'parallel'\nsteps = 1000"),
            ("random", "kind = 'prune'\nfrom = 'base'\nmethod = 'random'\nkeep = 3"),
            ("kept", "kind = 'prune'\nfrom = 'base'\nmethod = 'kept'\nkept = [0, 2]"),
            ("width", "kind = 'prune'\nfrom = 'base'\nmethod = 'width'\nratio = 0.5"),
            ("width by gradients at random times", "kind = 'prune'\nfrom = 'base'\nmethod = 'width'\nratio = 0.5\nimportance = 'taylor'"),
        ],
    },
    Topic {
        title: "kind = \"recover\"", about: "Trains what is left, alone or under a teacher.", table: "it",
        cases: &[
            ("fine-tune", "kind = 'recover'\nfrom = 'base'\nmethod = 'fine-tune'\nsteps = 1000"),
            ("kd", "kind = 'recover'\nfrom = 'base'\nmethod = 'kd'\nsteps = 1000\nteacher = 'embedded:digits-teacher'"),
            ("rep-kd", "kind = 'recover'\nfrom = 'base'\nmethod = 'rep-kd'\nsteps = 1000\nteacher = 'embedded:digits-teacher'"),
            ("masked-kd", "kind = 'recover'\nfrom = 'base'\nmethod = 'masked-kd'\nsteps = 1000\nteacher = 'embedded:digits-teacher'"),
        ],
    },
    Topic {
        title: "kind = \"sample\"", about: "Draws samples of a model.", table: "it",
        cases: &[
            ("ddpm", "kind = 'sample'\nfrom = 'base'"),
            ("ddim", "kind = 'sample'\nfrom = 'base'\nsolver = 'ddim'"),
            ("ode", "kind = 'sample'\nfrom = 'base'\nsolver = 'ode'"),
            ("sde", "kind = 'sample'\nfrom = 'base'\nsolver = 'sde'"),
            ("masked", "kind = 'sample'\nfrom = 'base'\nsolver = 'masked'"),
        ],
    },
    Topic {
        title: "kind = \"evaluate\"", about: "Measures models, and archives of samples, side by side.", table: "it",
        cases: &[
            ("held-out pictures", "kind = 'evaluate'\ncompare = ['base']"),
            ("Inception", "kind = 'evaluate'\ncompare = ['base']\nreference = 'x.npz'\ninception = 'x.pth'"),
            ("ddim", "kind = 'evaluate'\ncompare = ['base']\nsolver = 'ddim'"),
            ("ode", "kind = 'evaluate'\ncompare = ['base']\nsolver = 'ode'"),
            ("sde", "kind = 'evaluate'\ncompare = ['base']\nsolver = 'sde'"),
            ("masked", "kind = 'evaluate'\ncompare = ['base']\nsolver = 'masked'"),
        ],
    },
    Topic {
        title: "kind = \"analyse\"", about: "Looks into a model, and draws what is there.", table: "it",
        cases: &[("", "kind = 'analyse'\nfrom = 'base'")],
    },
    Topic {
        title: "kind = \"extract\"", about: "Encodes a folder of pictures as latents.", table: "it",
        cases: &[("", "kind = 'extract'\nimages = 'PICTURES'\nvae = 'x'\nsize = 256")],
    },
    Topic {
        title: "sweep", about: "Runs the recipe with many settings, each in a folder of its own, and ends in one table.",
        table: "`sweep` of the recipe",
        cases: &[("", "[sweep]")],
    },
    Topic {
        title: "[[sweep.case]]", about: "Settings of a sweep that have a name. Every case is run under every combination of the grids.",
        table: "[[case]] \"it\"",
        cases: &[("", "[[sweep.case]]\nname = 'it'")],
    },
];

impl Topic {
    /// Names of its cases. Several may share one.
    fn names(&self) -> BTreeSet<&'static str> {
        self.cases.iter().map(|(name, _)| *name).collect()
    }
}

/// Meanings of keys that choose among variants, which no field keeps.
#[rustfmt::skip]
const MEANINGS: [(&str, &str); 32] = [
    ("sweep", "Settings that the recipe is run with, one after the other."),
    ("case", "Settings with a name; the section below."),
    ("[[sweep.case]] name", "The name, in tables and in the names of folders."),
    ("stage", "The stages, in order."),
    ("kind", "What the stage does."),
    ("method", "How."),
    ("solver", "How a sample is drawn; a model of Gaussian diffusion takes `ddpm` or `ddim`, one of an interpolant `ode` or `sde`, a MAR `masked`."),
    ("update", "Weights trained along with the masks."),
    ("importance", "By what channels are chosen: by their share in the first-order change of the loss, over times from the least noise on (`diff-pruning`) or at random times (`taylor`); by the squares of their weights; or at random."),
    ("ratio", "Share of the channels that leaves attention, MLPs and condition, and a UNet's convolutions."),
    ("parameters", "Share of the parameters that is left, within 2%; the ratio is searched for."),
    ("macs", "Share of the multiply-accumulates that is left, within 2%; the ratio is searched for."),
    ("latency", "Share of the time of a pass that is left, measured on the run's backend; the ratio is searched for."),
    ("family", "The family of the model."),
    ("architecture width", "Width of the trunk, or of a classifier's features; of a UNet, channels of the first level, half as many as of the others."),
    ("levels", "Number of levels, each of half the side of the one before."),
    ("encoder_depth", "Blocks of a MAR over the class and the known tokens."),
    ("decoder_depth", "Blocks of a MAR over the class and all tokens."),
    ("attention_level", "The level with attention, counted from 1; none where there is no such level."),
    ("eta", "Share of the ancestral noise in a step of `ddim`; 0 is deterministic."),
    ("fill", "Grey value, 0 to 255, of what `pad` adds."),
    ("diffusion_form", "Form of the noise over time in the stochastic equation."),
    ("diffusion_norm", "Factor of that noise."),
    ("keep_checkpoints", "Whether the training checkpoints stay when the stage is finished."),
    ("shard_optimizer", "Whether several workers divide Adam's moments and the moving average among them, to need less memory each (ZeRO-1)."),
    ("preset", "A published model by its name; of sampling, `demo` draws the picture of the reference's `sample.py`."),
    ("held_out", "Share of the pictures that is held out to measure against."),
    ("test", "A folder of pictures to measure against, in place of `held_out`."),
    ("fit", "How a picture becomes a square: `crop` cuts the middle out, `pad` fills the rest."),
    ("data size", "Side of the square that a picture is made, in pixels."),
    ("data channels", "Channels of a picture: 1 (grey) or 3."),
    ("name", "The name, by which later stages and the command line call it; by default the method or kind, of a recipe the file's."),
];

/// Files in whose doc comments the meanings of a topic's keys are looked for, in this order.
#[rustfmt::skip]
fn sources(title: &str) -> &'static [&'static str] {
    match title {
        "The recipe" => &["recipe/schema/mod.rs"],
        "data" => &["recipe/schema/data.rs"],
        "architecture" => &["models/dit/config.rs", "models/unet/config.rs", "models/mar/config.rs", "models/classifier.rs", "process/kind.rs"],
        "kind = \"train\"" => &["recipe/schema/train.rs", "recipe/schema/optimisation.rs", "training/optimisation.rs"],
        "kind = \"prune\"" => &["recipe/schema/prune.rs", "recipe/schema/learned.rs", "recipe/schema/intervals.rs", "recipe/schema/width.rs", "pruning/learned.rs", "pruning/search.rs", "training/optimisation.rs"],
        "kind = \"recover\"" => &["recipe/schema/recover.rs", "recipe/schema/optimisation.rs", "training/optimisation.rs"],
        "kind = \"analyse\"" => &["recipe/schema/analyse.rs"],
        "kind = \"extract\"" => &["recipe/schema/extract.rs"],
        "sweep" | "[[sweep.case]]" => &["recipe/schema/sweep.rs"],
        _ => &["recipe/schema/sample.rs", "sampling/mod.rs", "process/transport.rs", "process/masked.rs"],
    }
}

/// Defaults that follow from other keys or are left out of a resolved recipe; empty of keys whose
/// default is said with their meaning.
const DEFAULTS: [(&str, &str); 14] = [
    ("seeds", "1"),
    ("width", "`64`; of a UNet `32`"),
    ("levels", "`3`"),
    ("attention_level", "`2`"),
    ("path", "`\"linear\"`"),
    ("predicts", "`\"velocity\"`"),
    ("weighting", "`\"none\"`"),
    ("name", ""),
    ("stage", ""),
    ("checkpoint_every", "a fifth of `steps`"),
    ("log_every", "a fiftieth of `steps`"),
    ("keep_checkpoints", "`false`"),
    ("shard_optimizer", "`false`"),
    (
        "final_lr",
        "of `recover`, half of `lr`; of `prune`, `lr`; else 0",
    ),
];

/// A key of a topic.
#[derive(Debug)]
struct Listed {
    key: &'static str,
    form: ValueForm,
    /// Default values, by case where they differ; none of a required key or one without a default.
    defaults: BTreeMap<String, Vec<&'static str>>,
    cases: Vec<&'static str>,
    meaning: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The doc comment of a field of that name.
fn meaning(key: &str, title: &str) -> String {
    let of_topic = format!("{title} {key}");
    let said = MEANINGS
        .iter()
        .find(|(name, _)| *name == key || *name == of_topic);
    if let Some((_, meaning)) = said {
        return (*meaning).to_owned();
    }
    for path in sources(title) {
        let text = std::fs::read_to_string(root().join("src").join(path)).unwrap();
        let mut doc: Vec<&str> = Vec::new();
        for line in text.lines().map(str::trim) {
            if let Some(comment) = line.strip_prefix("/// ") {
                doc.push(comment);
                continue;
            }
            let field = line.strip_prefix("pub ").unwrap_or(line);
            let is_key = field.split_once(':').is_some_and(|(name, _)| name == key);
            if is_key && !doc.is_empty() {
                return without_links(&doc.join(" "));
            }
            if !line.starts_with("#[") && line != "///" {
                doc.clear();
            }
        }
    }
    String::new()
}

/// Text without the targets of its links: `[`a`](b)` is `a`.
fn without_links(text: &str) -> String {
    let mut rest = text;
    let mut plain = String::new();
    while let Some((before, after)) = rest.split_once("[`") {
        plain.push_str(before);
        plain.push('`');
        let (name, after) = after.split_once("`]").unwrap_or((after, ""));
        plain.push_str(name);
        plain.push('`');
        rest = match after
            .strip_prefix('(')
            .and_then(|target| target.split_once(')'))
        {
            Some((_, after)) => after,
            None => after,
        };
    }
    plain + rest
}

/// All keys of a topic, in the order they are asked for.
fn list(topic: &Topic, pictures: &Path) -> Vec<Listed> {
    let mut listed: Vec<Listed> = Vec::new();
    for (case, text) in topic.cases {
        let text = text.replace("PICTURES", &pictures.display().to_string());
        let stage = match topic.table {
            table if table.starts_with("the recipe") || table.starts_with("`data`") => {
                format!("{text}\n{BASE}")
            }
            _ if topic.title.contains("sweep") => format!("{BASE}{text}\n"),
            _ => format!("{BASE}[[stage]]\nname = 'it'\n{text}\n"),
        };
        let document = Document::parse(Path::new("keys.toml"), &stage).unwrap();
        let sink = Sink::listing();
        let recipe = Recipe::read(&document, &sink);
        let resolved: toml::Value = recipe
            .and_then(|recipe| recipe.to_toml().ok())
            .map_or(toml::Value::Boolean(false), |text| {
                toml::from_str(&text).unwrap()
            });
        let table = match topic.table {
            "it" => "[[stage]] \"it\"",
            other => other,
        };
        let of_stage = || resolved.get("stage")?.as_array()?.last();
        let values = match topic.table {
            "the recipe" => Some(&resolved),
            "`data` of the recipe" => resolved.get("data"),
            "it" => of_stage(),
            _ => of_stage().and_then(|stage| stage.get("architecture")),
        };
        for Asked { key, form, .. } in sink
            .into_asked()
            .into_iter()
            .filter(|asked| asked.table == table)
        {
            let written = text.contains(&format!("{key} = "));
            let default = values
                .and_then(|values| values.get(key))
                .filter(|_| !written);
            let default = default
                .filter(|value| !value.is_table())
                .map(ToString::to_string);
            let at = match listed.iter().position(|known| known.key == key) {
                Some(at) => at,
                None => {
                    let meaning = meaning(key, topic.title);
                    listed.push(Listed {
                        key,
                        form: form.clone(),
                        defaults: BTreeMap::new(),
                        cases: Vec::new(),
                        meaning,
                    });
                    listed.len() - 1
                }
            };
            let known = &mut listed[at];
            // Another case may allow other words.
            if let (ValueForm::Choice(all), ValueForm::Choice(more)) = (&mut known.form, &form) {
                let new = more.iter().filter(|word| !all.contains(word)).cloned();
                all.extend(new.collect::<Vec<_>>());
            }
            if !known.cases.contains(case) {
                known.cases.push(case);
                if let Some(default) = default {
                    known.defaults.entry(default).or_default().push(case);
                }
            }
        }
    }
    listed
}

fn words(form: &ValueForm) -> String {
    match form {
        ValueForm::Integer(least, most) => format!("whole number, {least} to {most}"),
        ValueForm::Float(range, _) => format!("number, {range}"),
        ValueForm::Boolean => "true or false".to_owned(),
        ValueForm::Text => "text".to_owned(),
        ValueForm::Choice(names) if names.len() > 40 => format!("{:?}, …", names[0]),
        ValueForm::Choice(names) => {
            let names: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
            names.join(", ")
        }
        ValueForm::List(form) => match words(form) {
            of if of.is_empty() => "list".to_owned(),
            of => format!("list; each: {of}"),
        },
        ValueForm::Pair(form) => format!("`[first, last]`; each: {}", words(form)),
        ValueForm::Table => "table".to_owned(),
        ValueForm::Other => String::new(),
    }
}

fn page(topics: &[(&Topic, Vec<Listed>)]) -> String {
    let mut page = "# Keys of a recipe\n\n\
        Made from the program's own reader by `cargo test`, which compares. `recipes/schema.json` holds the same for\n\
        editors: write `#:schema schema.json` at the top of a recipe. A key that is unknown, or that the chosen method does\n\
        not use, is refused.\n"
        .to_owned();
    for (topic, keys) in topics {
        let _ = write!(
            page,
            "\n## {}\n\n{}\n\n| Key | Value | Default | Meaning |\n|---|---|---|---|\n",
            topic.title, topic.about
        );
        for listed in keys {
            let stated = DEFAULTS.iter().find(|(key, _)| *key == listed.key);
            let defaults: Vec<String> = match stated {
                Some((_, default)) => vec![(*default).to_owned()],
                None => (listed.defaults.iter())
                    .map(|(value, cases)| match listed.defaults.len() {
                        1 => format!("`{value}`"),
                        _ => format!("`{value}` ({})", cases.join(", ")),
                    })
                    .collect(),
            };
            let only = match listed.cases.len() == topic.names().len() {
                true => String::new(),
                false => format!(" Only: {}.", listed.cases.join(", ")),
            };
            let cell = |text: &str| text.replace('|', "\\|");
            let _ = writeln!(
                page,
                "| `{}` | {} | {} | {}{only} |",
                listed.key,
                cell(&words(&listed.form)),
                defaults.join(", "),
                cell(&listed.meaning)
            );
        }
    }
    page
}

fn schema_of(form: &ValueForm) -> Value {
    let whole = |text: &str| text.parse::<u64>().map_or(Value::Null, Value::from);
    match form {
        ValueForm::Integer(least, most) => {
            json!({ "type": "integer", "minimum": whole(least), "maximum": whole(most) })
        }
        ValueForm::Float(_, [low, high]) => {
            let mut schema = Map::from_iter([("type".to_owned(), json!("number"))]);
            for (end, open, shut) in [
                (low, "exclusiveMinimum", "minimum"),
                (high, "exclusiveMaximum", "maximum"),
            ] {
                if let Some((end, is_open)) = end {
                    schema.insert(if *is_open { open } else { shut }.to_owned(), json!(end));
                }
            }
            schema.into()
        }
        ValueForm::Boolean => json!({ "type": "boolean" }),
        ValueForm::Text => json!({ "type": "string" }),
        ValueForm::Choice(names) => json!({ "enum": names }),
        ValueForm::List(form) => {
            json!({ "type": "array", "minItems": 1, "items": schema_of(form) })
        }
        ValueForm::Pair(form) => {
            json!({ "type": "array", "minItems": 2, "maxItems": 2, "items": schema_of(form) })
        }
        ValueForm::Table => json!({ "type": "object" }),
        ValueForm::Other => json!({}),
    }
}

fn properties(keys: &[Listed]) -> Map<String, Value> {
    let mut properties = Map::new();
    for listed in keys {
        let mut schema = schema_of(&listed.form);
        if !listed.meaning.is_empty() {
            schema["description"] = json!(listed.meaning);
        }
        properties.insert(listed.key.to_owned(), schema);
    }
    properties
}

fn schema(topics: &[(&Topic, Vec<Listed>)]) -> Value {
    let keys = |title: &str| {
        let found = topics.iter().find(|(topic, _)| topic.title == title);
        properties(&found.unwrap().1)
    };
    let stages: Vec<Value> = (topics.iter())
        .filter_map(|(topic, listed)| {
            let kind = topic.title.strip_prefix("kind = \"")?.strip_suffix('"')?;
            let mut properties = properties(listed);
            properties.insert("kind".to_owned(), json!({ "const": kind }));
            if kind == "train" {
                properties.insert(
                    "architecture".to_owned(),
                    json!({ "type": "object", "properties": keys("architecture"), "additionalProperties": false }),
                );
            }
            Some(json!({ "type": "object", "required": ["kind"], "properties": properties, "additionalProperties": false }))
        })
        .collect();
    let mut recipe = keys("The recipe");
    recipe.insert(
        "stage".to_owned(),
        json!({ "type": "array", "minItems": 1, "items": { "oneOf": stages } }),
    );
    let mut sweep = keys("sweep");
    let case = json!({ "type": "object", "required": ["name"], "properties": keys("[[sweep.case]]"), "additionalProperties": false });
    sweep.insert(
        "case".to_owned(),
        json!({ "type": "array", "minItems": 1, "items": case }),
    );
    recipe.insert(
        "sweep".to_owned(),
        json!({ "type": "object", "properties": sweep, "additionalProperties": false }),
    );
    let table =
        json!({ "type": "object", "properties": keys("data"), "additionalProperties": false });
    recipe.insert(
        "data".to_owned(),
        json!({ "anyOf": [{ "type": "string" }, table] }),
    );
    json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of tinyfusion",
        "type": "object",
        "required": ["stage"],
        "properties": recipe,
        "additionalProperties": false,
    })
}

#[test]
fn the_page_of_keys_and_the_schema_are_those_of_the_reader() {
    let folder = tempfile::tempdir().unwrap();
    let pictures = folder.path().join("pictures");
    for class in ["a", "b"] {
        std::fs::create_dir_all(pictures.join(class)).unwrap();
        std::fs::write(pictures.join(class).join("x.png"), "").unwrap();
    }
    let topics: Vec<_> = TOPICS
        .iter()
        .map(|topic| (topic, list(topic, &pictures)))
        .collect();
    let mut without = Vec::new();
    for (topic, keys) in &topics {
        assert!(!keys.is_empty(), "{}", topic.title);
        let unsaid = keys.iter().filter(|key| key.meaning.is_empty());
        without.extend(unsaid.map(|key| format!("{}: {}", topic.title, key.key)));
    }
    assert!(without.is_empty(), "keys without a meaning: {without:?}");
    // Every recipe of the repository is made of listed keys alone.
    let known = |title: &str| -> Vec<&str> {
        let (_, listed) = topics
            .iter()
            .find(|(topic, _)| topic.title == title)
            .unwrap();
        listed.iter().map(|listed| listed.key).collect()
    };
    for (name, text) in crate::recipe::embedded_recipes::RECIPES {
        let recipe: toml::Table = toml::from_str(text).unwrap();
        let check = |title: &str, table: &toml::Table| {
            let keys = known(title);
            for key in table.keys() {
                assert!(keys.contains(&key.as_str()), "{name}: `{key}` of {title}");
            }
        };
        check("The recipe", &recipe);
        if let Some(toml::Value::Table(data)) = recipe.get("data") {
            check("data", data);
        }
        if let Some(toml::Value::Table(sweep)) = recipe.get("sweep") {
            check("sweep", sweep);
            for case in sweep
                .get("case")
                .and_then(toml::Value::as_array)
                .into_iter()
                .flatten()
            {
                check("[[sweep.case]]", case.as_table().unwrap());
            }
        }
        for stage in recipe["stage"].as_array().unwrap() {
            let stage = stage.as_table().unwrap();
            check(&format!("kind = {}", stage["kind"]), stage);
            if let Some(toml::Value::Table(architecture)) = stage.get("architecture") {
                check("architecture", architecture);
            }
        }
    }
    let made: [(PathBuf, String); 2] = [
        (root().join("recipes/keys.md"), page(&topics)),
        (
            root().join("recipes/schema.json"),
            format!("{:#}\n", schema(&topics)),
        ),
    ];
    for (path, text) in made {
        if std::env::var_os("TINYFUSION_WRITE").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            found == text,
            "{} is out of date: TINYFUSION_WRITE=1 cargo test --lib the_page_of_keys makes it anew",
            path.display()
        );
    }
}
