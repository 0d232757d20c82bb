//! Runs the program in a temporary folder.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A temporary folder in which the program runs.
pub struct Place {
    folder: TempDir,
}

impl Place {
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tinyfusion"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Finished {
        Finished::of(self.command(arguments).output().unwrap())
    }

    pub fn start(&self, arguments: &[&str]) -> Child {
        self.command(arguments).spawn().unwrap()
    }

    /// Every file below the folder, with its bytes.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut found = Vec::new();
        let mut folders = vec![self.folder.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path)
                } else {
                    found.push((path.clone(), std::fs::read(path).unwrap()))
                }
            }
        }
        found.sort();
        found
    }
}

/// The result of a run of the program.
#[derive(Debug)]
pub struct Finished {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    pub fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self {
            status: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert_eq!(self.status, Some(0), "{}\n{}", self.stdout, self.stderr);
        self
    }
}

/// Arguments for the quickstart, shortened to take seconds.
pub fn short_quickstart(runs: &str) -> Vec<String> {
    let recipe = root().join("recipes/quickstart.toml");
    let mut arguments = vec![
        "recipe".to_owned(),
        recipe.display().to_string(),
        "--runs".into(),
        runs.into(),
    ];
    for stage in [
        "prune",
        "learned",
        "oracle",
        "shortgpt",
        "flux-lite",
        "sensitivity",
        "random",
    ] {
        for (key, value) in [
            ("steps", "8"),
            ("batch", "8"),
            ("checkpoint_every", "2"),
            ("log_every", "2"),
        ] {
            arguments.extend(["--set".into(), format!("stage.{stage}.{key}={value}")]);
        }
    }
    for (stage, count) in [("sample", "12"), ("evaluate", "70")] {
        for (key, value) in [("count", count), ("batch", "35"), ("steps", "2")] {
            arguments.extend(["--set".into(), format!("stage.{stage}.{key}={value}")]);
        }
    }
    arguments
}
