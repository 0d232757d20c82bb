//! The page of a run, and the lists of runs.

use std::path::Path;
use std::process::Command;

use super::program::Place;

/// A job of every kind of stage that leaves something to show.
const RECIPE: &str = "
    log = ['tensorboard', 'csv']
    [[stage]]
    kind = 'prune'
    name = 'learned'
    from = 'embedded:digits-teacher'
    groups = '1:2'
    steps = 3
    batch = 4
    log_every = 1
    [[stage]]
    kind = 'prune'
    name = 'scored'
    from = 'embedded:digits-teacher'
    method = 'shortgpt'
    keep = 6
    batch = 4
    [[stage]]
    kind = 'recover'
    name = 'student'
    from = 'learned'
    method = 'masked-kd'
    teacher = 'embedded:digits-teacher'
    steps = 3
    batch = 4
    log_every = 1
    evaluate_every = 2
    evaluate_count = 40
    [[stage]]
    kind = 'analyse'
    from = 'embedded:digits-teacher'
    show = ['states', 'similarity']
    batch = 4
    [[stage]]
    kind = 'evaluate'
    compare = ['embedded:digits-teacher', 'scored', 'student']
    count = 60
    batch = 30
    steps = 2
";

fn page(place: &Place, name: &str) -> String {
    std::fs::read_to_string(place.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn a_run_ends_in_a_page_and_runs_of_one_protocol_are_compared() {
    let place = Place::new();
    place.write("job.toml", RECIPE);
    let told = place.run(&["recipe", "job.toml", "--runs", "runs", "--watch"]);
    let told = told.succeeded();
    assert!(
        told.stderr.contains("watch runs/job/001/report.html"),
        "{}",
        told.stderr
    );
    let whole = page(&place, "runs/job/001/report.html");
    for part in [
        "TinyFusion: job/001",
        "finished",
        "<h2 id=\"s1\">Results</h2>",
        // The verdict, and the table.
        " times as fast as embedded:digits-teacher, which has ",
        "<th scope=\"row\">student</th>",
        "download=\"models.tex\"",
        "Quality against speed",
        "From the same noise, from above: embedded:digits-teacher, scored, student",
        "aria-label=\"kept layers: ",
        "layers that stay",
        "student: loss and its terms",
        "student: learning rate",
        "student: norm of the gradient",
        "student: FID while it is trained",
        "student after 2 steps",
        "student after 3 steps",
        "Similarity of the states between layers",
        "neighbours",
        "tinyfusion recipe runs/job/001/resolved.toml",
        "kind = &quot;evaluate&quot;",
    ] {
        assert!(whole.contains(part), "`{part}` is missing");
    }
    // The page of a run that goes on is loaded again; this one has ended.
    assert!(!whole.contains("http-equiv"));
    for outside in ["<script", "src=\"http", "href=\"http", "url("] {
        assert!(!whole.contains(outside), "{outside}");
    }
    for file in [
        "models.csv",
        "models.md",
        "models.tex",
        "speed-fid.svg",
        "student-loss.csv",
    ] {
        assert!(
            place.path(&format!("runs/job/001/report/{file}")).exists(),
            "{file}"
        );
    }
    // A page of its own is written again.
    for _ in 0..2 {
        let again = ["report", "runs/job/001", "--into", "elsewhere"];
        place.run(&again).succeeded();
    }
    let csv = page(&place, "runs/job/001/03-student/metrics.csv");
    assert_eq!(csv.lines().count(), 1 + 3, "{csv}");
    let events = std::fs::read_dir(place.path("runs/job/001/03-student"))
        .unwrap()
        .flatten();
    let named = |entry: &std::fs::DirEntry| {
        entry
            .file_name()
            .to_string_lossy()
            .starts_with("events.out.tfevents.")
    };
    assert_eq!(events.filter(named).count(), 1);

    // A second run of the same protocol, and one of another.
    let again = ["recipe", "job.toml", "--runs", "runs", "--seed", "1"];
    place.run(&again).succeeded();
    let other = [
        "recipe",
        "job.toml",
        "--runs",
        "runs",
        "--set",
        "stage.evaluate.count=40",
    ];
    place.run(&other).succeeded();
    let listed = place.run(&["runs", "--runs", "runs"]).succeeded().stdout;
    assert_eq!(
        listed
            .lines()
            .filter(|line| line.contains("finished"))
            .count(),
        3,
        "{listed}"
    );
    // The lowest of what the runs made, not of what they took, their teacher.
    assert!(!listed.contains("embedded:"), "{listed}");

    let (first, second, third) = ("runs/job/001", "runs/job/002", "runs/job/003");
    let compared = place.run(&["runs", "compare", first, second, "--csv", "both.csv"]);
    let compared = compared.succeeded().stdout;
    assert!(
        compared.contains("job/001") && compared.contains("job/002"),
        "{compared}"
    );
    assert!(page(&place, "both.csv").starts_with("run,model,"));
    place
        .run(&["report", first, second, "--into", "both"])
        .succeeded();
    let both = page(&place, "both/report.html");
    assert!(both.contains("<h2 id=\"s2\">Samples: job/001</h2>"));
    assert!(both.contains("Training: job/002"));

    for (arguments, why) in [
        (
            vec!["report", first, third, "--into", "mixed"],
            "unlike protocols, whose numbers can't stand in one column: count 60 and 40",
        ),
        (vec!["runs", "compare", first, third], "unlike protocols"),
        (vec!["report", first, second], "--into FOLDER"),
        (
            vec!["report", "job.toml"],
            "no run; a run's folder has a resolved.toml",
        ),
        (
            vec!["report", "nowhere"],
            "no run; a run's folder has a resolved.toml",
        ),
        (
            vec!["runs", "--runs", "nowhere"],
            "nowhere: no folder of runs",
        ),
    ] {
        let refused = place.run(&arguments);
        assert_eq!(refused.status, Some(2), "{arguments:?}");
        assert!(
            refused.stderr.contains(why),
            "{arguments:?}\n{}",
            refused.stderr
        );
    }
    assert!(!place.path("mixed").exists());

    look_at(&place.path("runs/job/001/report.html"));
    look_at(&place.path("both/report.html"));
}

/// Opens a page in Chromium, where there is one: it must show its figures without a complaint, and
/// ask for nothing.
fn look_at(path: &Path) {
    let found = ["chromium", "chromium-browser", "google-chrome"]
        .into_iter()
        .find(|name| {
            Command::new(name)
                .arg("--version")
                .output()
                .is_ok_and(|told| told.status.success())
        });
    let Some(browser) = found else {
        eprintln!("no Chromium here: {} was not looked at", path.display());
        return;
    };
    let profile = tempfile::tempdir().unwrap();
    let told = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--v=0",
        ])
        // Whatever it asked for elsewhere would fail, and be told.
        .args(["--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("file://{}", path.display()))
        .output()
        .unwrap();
    let (dom, said) = (
        String::from_utf8_lossy(&told.stdout),
        String::from_utf8_lossy(&told.stderr),
    );
    let complaints: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("CONSOLE"))
        .collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    let source = std::fs::read_to_string(path).unwrap();
    for element in ["<figure>", "<svg", "<table>", "<h2"] {
        let wanted = source.matches(element).count();
        assert!(wanted > 0, "{element}");
        assert_eq!(dom.matches(element).count(), wanted, "{element}\n{said}");
    }
}

#[test]
fn a_training_that_nothing_can_measure_is_refused_before_it_begins() {
    let place = Place::new();
    let train = "
        [[stage]]
        kind = 'recover'
        name = 'student'
        from = 'embedded:digits-teacher'
        method = 'fine-tune'
        steps = 3
        batch = 4
        evaluate_every = 2
        evaluate_count = 4
    ";
    let evaluate = "
        [[stage]]
        kind = 'evaluate'
        compare = ['student']
        neighbours = 5
    ";
    for (recipe, expected) in [
        (train.to_owned(), "none follows"),
        (format!("{train}{evaluate}"), "5 neighbours can't be found"),
        (
            format!("{train}{evaluate}").replace("neighbours = 5", "solver = 'ode'"),
            "`student`: the model was trained by",
        ),
    ] {
        place.write("job.toml", &recipe);
        let refused = place.run(&["recipe", "job.toml", "--runs", "runs"]);
        assert_eq!(refused.status, Some(2));
        assert!(refused.stderr.contains(expected), "{}", refused.stderr);
    }
    assert!(!place.path("runs").exists());
}
