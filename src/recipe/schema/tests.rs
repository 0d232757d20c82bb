//! Whole recipes, and helpers for the tests of single stages.

use super::learned::GroupsSpec;
use super::prune::PruneMethod;
use super::sample::Against;
use super::source::Source;
use super::*;
use crate::pruning::Group;
use crate::weights::EmbeddedName;

const QUICKSTART: &str = r#"
seed = 1
backend = "ndarray"

[[stage]]
kind = "prune"
from = "embedded:digits-teacher"
groups = "1:2"
steps = 300

[[stage]]
kind = "recover"
method = "masked-kd"
teacher = "embedded:digits-teacher"
steps = 1000

[[stage]]
kind = "prune"
name = "oracle"
from = "embedded:digits-teacher"
method = "oracle"

[[stage]]
kind = "recover"
name = "oracle-student"
from = "oracle"
method = "masked-kd"
teacher = "embedded:digits-teacher"
steps = 1000

[[stage]]
kind = "sample"
from = "recover"
count = 100

[[stage]]
kind = "evaluate"
compare = ["embedded:digits-teacher", "prune", "recover", "oracle-student"]
"#;

pub(in crate::recipe) fn document(text: &str) -> Document {
    Document::parse(Path::new("recipes/quickstart.toml"), text).unwrap()
}

fn read(text: &str) -> Recipe {
    match Recipe::from_document(&document(text)) {
        Ok(recipe) => recipe,
        Err(errors) => panic!("{errors}"),
    }
}

pub(in crate::recipe) fn errors(text: &str) -> Diagnostics {
    Recipe::from_document(&document(text)).unwrap_err()
}

/// The messages of all mistakes, in order of position.
pub(in crate::recipe) fn messages(text: &str) -> Vec<String> {
    errors(text)
        .items()
        .iter()
        .map(|item| item.message.clone())
        .collect()
}

/// A recipe whose second stage has the given lines, after a prune stage called `base`.
pub(in crate::recipe) fn stage(lines: &str) -> String {
    format!(
        "[[stage]]\nkind = \"prune\"\nname = \"base\"\nmethod = \"oracle\"\n\
         from = \"embedded:digits-teacher\"\n[[stage]]\n{lines}\n"
    )
}

/// The second stage, as read.
pub(in crate::recipe) fn second(lines: &str) -> StageKind {
    read(&stage(lines)).stages.swap_remove(1).kind
}

#[test]
fn quickstart_reads_with_its_defaults() {
    let recipe = read(QUICKSTART);
    assert_eq!((recipe.name.as_str(), recipe.seed), ("quickstart", 1));
    assert_eq!(recipe.backend, Some(crate::backend::BackendKind::Ndarray));
    let names: Vec<_> = recipe
        .stages
        .iter()
        .map(|stage| stage.name.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "prune",
            "recover",
            "oracle",
            "oracle-student",
            "sample",
            "evaluate"
        ]
    );

    let StageKind::Prune(prune) = &recipe.stages[0].kind else {
        panic!("not prune")
    };
    assert_eq!(prune.from, Source::Embedded(EmbeddedName::DigitsTeacher));
    let StageKind::Recover(recover) = &recipe.stages[1].kind else {
        panic!("not recover")
    };
    assert_eq!(recover.from, Source::Stage("prune".to_owned()));
    let StageKind::Evaluate(evaluate) = &recipe.stages[5].kind else {
        panic!("not evaluate")
    };
    assert_eq!(
        evaluate.compare[3],
        Source::Stage("oracle-student".to_owned())
    );
    assert_eq!(
        evaluate.against,
        Against::HeldOut {
            features: Source::Embedded(EmbeddedName::DigitsFeatures)
        }
    );
    assert_eq!((evaluate.neighbours, evaluate.sampling.count), (3, 2000));
}

#[test]
fn a_resolved_recipe_is_a_recipe_that_says_the_same() {
    let every_kind = "heads = 3\n".to_owned()
        + QUICKSTART
        + "[[stage]]\nkind = 'train'\nsteps = 9\narchitecture = { family = 'dit' }\n\
           [[stage]]\nkind = 'train'\nname = 'features'\nsteps = 9\n\
           architecture = { family = 'classifier' }\n\
           [[stage]]\nkind = 'train'\nname = 'xl'\nsteps = 9\n\
           architecture = { preset = 'DiT-XL/2' }\n\
           [[stage]]\nkind = 'train'\nname = 'mar'\nsteps = 9\n\
           architecture = { family = 'mar', patch_size = 2, decoder_depth = 3 }\n\
           [[stage]]\nkind = 'train'\nname = 'more'\nfrom = 'train'\nsteps = 9\n\
           [[stage]]\nkind = 'prune'\nname = 'pairs'\ngroups = [[2, 4], [1, 2]]\nsteps = 9\n\
           update = 'frozen'\n\
           [[stage]]\nkind = 'prune'\nname = 'bi'\nmethod = 'shortgpt'\nkeep = 6\n\
           [[stage]]\nkind = 'prune'\nname = 'kept'\nmethod = 'kept'\nkept = [0, 3]\n\
           [[stage]]\nkind = 'recover'\nname = 'ft'\nmethod = 'fine-tune'\nsteps = 9\n\
           [[stage]]\nkind = 'recover'\nname = 'rep'\nmethod = 'rep-kd'\nsteps = 9\n\
           teacher = 'train'\ntaps = [[0, 1], [1, 3]]\n\
           [[stage]]\nkind = 'sample'\nname = 'fast'\ncount = 4\nsolver = 'ddim'\nclasses = [0, 7]\n\
           [[stage]]\nkind = 'evaluate'\nname = 'adm'\ncompare = ['train']\nreference = 'r.npz'\n\
           inception = 'i.pth'\ndistances = 'f16'\n\
           [[stage]]\nkind = 'evaluate'\nname = 'given'\nsamples = ['a.npz', 'b']\nreference = 'r'\n\
           inception = 'i.pth'\n";
    let recipe = read(&every_kind);
    let resolved = recipe.to_toml().unwrap();
    assert_eq!(read(&resolved), recipe, "{resolved}");
}

#[test]
fn heads_are_stated_once() {
    let recipe = read(&format!("heads = 12{QUICKSTART}"));
    assert_eq!(recipe.heads, Some(12));
    assert!(recipe.to_toml().unwrap().contains("heads = 12\n"));
    assert_eq!(read(QUICKSTART).heads, None);
    for wrong in ["0", "1025"] {
        assert_eq!(
            messages(&format!("heads = {wrong}{QUICKSTART}")),
            [format!(
                "`heads`: must be between 1 and 1024, found {wrong}"
            )]
        );
    }
}

#[test]
fn every_mistake_is_reported_at_once_and_in_place() {
    let text = "\
sede = 3
[[stage]]
kind = \"prune\"
from = \"embedded:digits-techer\"
groups = \"1:2\"
stpes = 100
batch = 0
[[stage]]
kind = \"recovr\"
";
    let mut document = document(text);
    document.set("stage.prune.lr=fast");
    document.set("stage.nowhere.lr=1");
    let shown = Recipe::from_document(&document).unwrap_err().to_string();
    let expected = r#"recipes/quickstart.toml:1:1: unknown key `sede` in the recipe
    1 | sede = 3
      | ^^^^
      = did you mean `seed`?
recipes/quickstart.toml:2:1: missing key `steps` in [[stage]] "prune"
    2 | [[stage]]
      | ^^^^^^^^^
recipes/quickstart.toml:4:8: `from`: there is no embedded checkpoint "embedded:digits-techer"
    4 | from = "embedded:digits-techer"
      |        ^^^^^^^^^^^^^^^^^^^^^^^^
      = did you mean `embedded:digits-teacher`?
recipes/quickstart.toml:6:1: unknown key `stpes` in [[stage]] "prune"
    6 | stpes = 100
      | ^^^^^
      = did you mean `steps`?
recipes/quickstart.toml:7:9: `batch`: must be between 1 and 65536, found 0
    7 | batch = 0
      |         ^
recipes/quickstart.toml:9:8: `kind`: expected one of "extract", "train", "prune", "recover", "sample", "evaluate", "analyse", found "recovr"
    9 | kind = "recovr"
      |        ^^^^^^^^
      = did you mean `recover`?
--set stage.nowhere.lr=1: there is no `stage.nowhere` in the recipe
--set stage.prune.lr=fast: `lr`: expected a number, found a string"#;
    assert_eq!(shown, expected);
}

#[test]
fn overrides_reach_the_recipe() {
    let mut document = document(QUICKSTART);
    for assignment in [
        "seed=9",
        "name=other",
        "stage.oracle-student.steps=7",
        "stage.0.groups=2:4",
    ] {
        document.set(assignment);
    }
    let recipe = Recipe::from_document(&document).unwrap();
    assert_eq!((recipe.seed, recipe.name.as_str()), (9, "other"));
    let StageKind::Recover(recover) = &recipe.stages[3].kind else {
        panic!("not recover")
    };
    assert_eq!(recover.optimisation.steps, 7);
    let StageKind::Prune(prune) = &recipe.stages[0].kind else {
        panic!("not prune")
    };
    let PruneMethod::Learned(learned) = &prune.method else {
        panic!("not learned")
    };
    assert_eq!(learned.groups, GroupsSpec::Ratio(Group::new(2, 4).unwrap()));
}

#[test]
fn overrides_are_blamed_for_their_values() {
    let mut document = document(QUICKSTART);
    document.set("stage.prune.steps=0");
    document.set("stage.prune.gruops=1:2");
    let shown = Recipe::from_document(&document).unwrap_err().to_string();
    let expected = "\
--set stage.prune.steps=0: `steps`: must be between 1 and 100000000, found 0
--set stage.prune.gruops=1:2: unknown key `gruops` in [[stage]] \"prune\"
      = did you mean `groups`?";
    assert_eq!(shown, expected);
}

#[test]
fn a_recipe_needs_a_stage() {
    assert_eq!(messages(""), ["missing key `stage` in the recipe"]);
    assert_eq!(messages("stage = []"), ["`stage`: must not be empty"]);
    assert_eq!(
        messages("[stage]\nkind = 'train'"),
        ["`stage`: expected a list, found a table"]
    );
    assert_eq!(
        messages("stage = [1]"),
        ["`stage`: expected a table, found an integer"]
    );
    assert_eq!(messages("[[stage]]"), ["missing key `kind` in [[stage]]"]);
}

#[test]
fn names_are_unique_and_plain() {
    let twice = "kind = 'prune'\nmethod = 'oracle'\n";
    let again = stage(&format!("{twice}name = 'base'"));
    assert_eq!(
        messages(&again),
        ["`name`: an earlier stage is called \"base\" as well"]
    );

    let defaults = stage(&format!("{twice}[[stage]]\n{twice}"));
    let expected = "an earlier stage is called \"prune\" as well; give this one a `name`";
    assert_eq!(messages(&defaults), [expected]);

    for name in ["", "Base", "a b", "../up", "é", &"a".repeat(65)] {
        let text = stage(&format!("{twice}name = {name:?}"));
        assert_eq!(messages(&text), [format!("`name`: {NAME_RULE}")]);
    }
}

#[test]
fn the_name_of_the_file_becomes_a_name() {
    assert_eq!(
        name_of(Path::new("recipes/My Recipe.v2.toml")),
        "my-recipe-v2"
    );
    assert_eq!(name_of(Path::new("/")), "recipe");
}

#[test]
fn seeds_fit_toml() {
    assert_eq!(
        read(&format!(
            "seed = {}\n{}",
            i64::MAX,
            stage("kind='sample'\ncount=1")
        ))
        .seed,
        i64::MAX as u64
    );
    let message = "`seed`: must be between 0 and 9223372036854775807, found -1";
    assert_eq!(
        messages(&format!("seed = -1\n{}", stage("kind='sample'\ncount=1"))),
        [message]
    );
}

#[test]
fn keys_of_other_methods_are_refused() {
    for (lines, expected) in [
        (
            "kind = 'prune'\nsteps = 1\ngroups = '1:2'\nkeep = 6",
            "`keep` is not used by method \"learned\"",
        ),
        (
            "kind = 'prune'\nmethod = 'oracle'\nsteps = 6",
            "`steps` is not used by method \"oracle\"",
        ),
        (
            "kind = 'prune'\nmethod = 'shortgpt'\nkeep = 6\ntau = [4, 1]",
            "`tau` is not used by method \"shortgpt\"",
        ),
        (
            "kind = 'prune'\nsteps = 1\ngroups = '1:2'\nupdate = 'full'\nrank = 8",
            "`rank` is not used by update \"full\"",
        ),
        (
            "kind = 'recover'\nsteps = 1\nmethod = 'fine-tune'\nteacher = 'base'",
            "`teacher` is not used by method \"fine-tune\"",
        ),
        (
            "kind = 'recover'\nsteps = 1\nmethod = 'rep-kd'\nteacher = 'base'\nk = 2",
            "`k` is not used by method \"rep-kd\"",
        ),
        (
            "kind = 'sample'\ncount = 1\neta = 0.5",
            "`eta` is not used by solver \"ddpm\"",
        ),
        (
            "kind = 'evaluate'\ncompare = ['base']\nfrom = 'base'",
            "`from` is not used by kind \"evaluate\", which takes its models from `compare`",
        ),
    ] {
        assert_eq!(messages(&stage(lines)), [expected]);
    }
}
