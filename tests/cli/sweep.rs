//! `[sweep]`: many runs of one recipe, and their one table.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::program::Place;

const RECIPE: &str = "
    [[stage]]
    kind = 'prune'
    from = 'embedded:digits-teacher'
    method = 'first'
    keep = 6
    [[stage]]
    kind = 'recover'
    name = 'student'
    method = 'fine-tune'
    steps = 4
    batch = 4
    [[stage]]
    kind = 'evaluate'
    compare = ['prune', 'student']
    count = 40
    batch = 8
    steps = 2
    [sweep]
    seeds = 2
    [[sweep.case]]
    name = 'first'
    [[sweep.case]]
    name = 'bi'
    grid.stage.prune.keep = [6, 4]
    set.stage.prune = { method = 'shortgpt', batch = 4, batches = 1 }
    set.stage.student.steps = 3
    [[sweep.case]]
    name = 'teacher'
    stages = ['evaluate']
    set.stage.evaluate.compare = ['embedded:digits-teacher']
    [[sweep.case]]
    name = 'untrained'
    stages = ['prune', 'evaluate']
    set.stage.evaluate.compare = ['prune']
";

/// The lines of `sweep.csv` without the sampling speed, which no two runs share.
fn lines(place: &Place, runs: &str) -> Vec<String> {
    let text = std::fs::read_to_string(place.path(&format!("{runs}/many/001/sweep.csv"))).unwrap();
    let without = |line: &str| {
        let mut cells: Vec<&str> = line.split(',').collect();
        cells.remove(7);
        cells.join(",")
    };
    text.lines().map(without).collect()
}

#[test]
fn a_sweep_is_killed_and_goes_on_to_the_same_table() {
    let place = Place::new();
    let wrong = RECIPE.replace("grid.stage.prune.keep", "grid.stage.prnue.keep");
    place.write("wrong.toml", wrong);
    let wrong = place.run(&["recipe", "wrong.toml", "--dry-run"]);
    assert_eq!(wrong.status, Some(2));
    for part in [
        "there is no `stage.prnue` in the recipe (case `bi`)",
        "did you mean `prune`?",
    ] {
        assert!(wrong.stderr.contains(part), "{part}: {}", wrong.stderr);
    }

    place.write("many.toml", RECIPE);
    let outline = place.run(&["recipe", "many.toml", "--dry-run"]);
    let outline = outline.succeeded().stdout;
    assert!(outline.contains("bi keep=4 seed=1: 3 stages"), "{outline}");
    assert!(outline.contains("10 runs, "), "{outline}");

    let whole = place.run(&["recipe", "many.toml", "--runs", "whole"]);
    let whole = whole.succeeded().stdout;
    let heading = "2 seeds, mean ± standard deviation";
    assert!(whole.contains(heading), "{whole}");
    let expected = lines(&place, "whole");
    // A header, and for each seed a line for real pictures and for each model.
    assert_eq!(expected.len(), 1 + 2 * (3 + 2 * 3 + 2 + 2));
    let begins = [
        (
            0,
            "case,stage.prune.keep,seed,model,depth,parameters,macs,images,kept,loss,ssim,fid,",
        ),
        (2, "first,,0,prune,6,"),
        (6, "first,,1,student,6,"),
        (7, "bi,6,0,"),
        (13, "bi,4,0,"),
    ];
    for (line, begin) in begins {
        assert!(expected[line].starts_with(begin), "{}", expected[line]);
    }
    let kept = ",,0 1 2 3 4 5,";
    assert!(expected[2].contains(kept), "{}", expected[2]);
    // Four steps of four images.
    assert!(expected[6].contains(",16,0 1 2 3 4 5,"), "{}", expected[6]);
    // Both depths are chosen by the same scores, of each seed's pictures.
    let measured = std::fs::read_dir(place.path("whole/many/001/measured")).unwrap();
    assert_eq!(measured.count(), 2);
    let page = std::fs::read_to_string(place.path("whole/many/001/report.html")).unwrap();
    for part in [
        "Next best: ",
        "Which layers stay; the best choice first",
        "Protocol",
        "Environment of the first run",
        "001-first-seed0/report.html",
    ] {
        assert!(page.contains(part), "{part}: {page}");
    }

    let mut child = place.start(&["recipe", "many.toml", "--runs", "killed"]);
    for kill in 0..40 {
        std::thread::sleep(Duration::from_millis(150 + 37 * kill));
        let ended = child.try_wait().unwrap();
        if ended.is_some_and(|status| status.success()) {
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        child = place.start(&["recipe", "many.toml", "--runs", "killed", "--resume"]);
    }
    let last = child.wait().unwrap();
    assert!(last.success(), "{last}");
    assert_eq!(lines(&place, "killed"), expected);
    let again = place.run(&["recipe", "many.toml", "--runs", "killed", "--resume"]);
    assert_eq!(again.status, Some(2));
    let none = "no unfinished run to resume";
    assert!(again.stderr.contains(none), "{}", again.stderr);

    // A case less, and a depth more: only what is new is run, and the table has what is asked for.
    let (cases, untrained) = RECIPE
        .split_once("[[sweep.case]]\n    name = 'teacher'")
        .unwrap();
    let untrained = &untrained[untrained.find("[[sweep.case]]").unwrap()..];
    let grown = format!("{cases}{untrained}").replace("[6, 4]", "[6, 4, 2]");
    place.write("many.toml", grown);
    let grown = place.run(&["recipe", "many.toml", "--runs", "killed", "--resume"]);
    let grown = grown.succeeded().stderr;
    assert_eq!(grown.matches("seed=0: already done").count(), 4, "{grown}");
    assert!(grown.contains("bi keep=2 seed=1 (8 of 10)"), "{grown}");
    assert!(place.path("killed/many/001/011-bi-seed0").is_dir());
    let (mut new, old): (Vec<_>, Vec<_>) =
        (lines(&place, "killed").into_iter()).partition(|line| line.starts_with("bi,2,"));
    assert_eq!(new.len(), 2 * 3);
    new.retain(|line| line.contains(",student,2,"));
    assert_eq!(new.len(), 2, "{new:?}");
    let mut kept = expected.clone();
    kept.retain(|line| !line.starts_with("teacher,"));
    assert_eq!(old, kept);
    // A case dropped from a sweep that has ended, and asked for again.
    place.write("many.toml", RECIPE);
    let again = place.run(&["recipe", "many.toml", "--runs", "killed", "--resume"]);
    let again = again.succeeded().stderr;
    let told = "sweep of 10 runs, 10 begun before, 2 no longer asked for, in ";
    assert!(again.contains(told), "{again}");
    assert_eq!(lines(&place, "killed"), expected);
    let changed = RECIPE.replace("'first'\n    keep = 6", "'first'\n    keep = 5");
    place.write("many.toml", changed.replace("batch = 8", "batch = 9"));
    let changed = place.run(&["recipe", "many.toml", "--runs", "killed", "--resume"]);
    assert_eq!(changed.status, Some(2));
    let none = "no unfinished run to resume";
    assert!(changed.stderr.contains(none), "{}", changed.stderr);
}

/// Waits until a running program has written a file.
fn wait_for(file: &Path) {
    let started = Instant::now();
    while !file.exists() {
        let file = file.display();
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "{file} is not written"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn processes_that_join_a_sweep_share_out_its_runs() {
    let place = Place::new();
    place.write("many.toml", RECIPE);
    place
        .run(&["recipe", "many.toml", "--runs", "alone"])
        .succeeded();
    let expected = lines(&place, "alone");
    // The one that began the sweep is killed; those that joined it run what it had, too.
    let join = ["recipe", "many.toml", "--runs", "joined", "--join"];
    let mut began = place.start(&join);
    wait_for(&place.path("joined/many/001/001-first-seed0/environment.json"));
    let mut joined: Vec<_> = (0..2).map(|_| place.start(&join)).collect();
    wait_for(&place.path("joined/many/001/002-first-seed1/environment.json"));
    began.kill().unwrap();
    began.wait().unwrap();
    for process in &mut joined {
        assert!(process.wait().unwrap().success());
    }
    assert_eq!(lines(&place, "joined"), expected);
    // One who comes when all is done begins nothing, and no run was run twice.
    let late = place.run(&join).succeeded().stderr;
    assert_eq!(late.matches("already done").count(), 10, "{late}");
    assert!(!place.path("joined/many/002").exists());
    let mut began_again = 0;
    for run in std::fs::read_dir(place.path("joined/many/001")).unwrap() {
        let run = run.unwrap().path();
        let files = std::fs::read_dir(run).into_iter().flatten().flatten();
        let later = |name: std::ffi::OsString| {
            let name = name.into_string().unwrap();
            name.starts_with("environment-") && name.ends_with(".json")
        };
        began_again += files.filter(|file| later(file.file_name())).count();
    }
    assert!(began_again <= 1, "{began_again}");
    let status = std::fs::read_to_string(place.path("joined/many/001/status.json")).unwrap();
    assert!(status.contains("\"finished\""), "{status}");

    let single = &RECIPE[..RECIPE.find("[sweep]").unwrap()];
    place.write("single.toml", single);
    let single = place.run(&["recipe", "single.toml", "--join"]);
    assert_eq!(single.status, Some(2));
    assert!(
        single.stderr.contains("has none (`[sweep]`)"),
        "{}",
        single.stderr
    );
}
