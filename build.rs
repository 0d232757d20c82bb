//! Records the commit that a release is built from, for `environment.json`.

use std::path::Path;
use std::process::Command;

fn main() {
    // Everything the program is built from.
    for path in [
        "artifacts/pretrained",
        "build.rs",
        "Cargo.lock",
        "Cargo.toml",
        "recipes",
        "src",
    ] {
        println!("cargo:rerun-if-changed={path}");
    }
    // Only in releases, which are measured: with it, every commit recompiles the crate.
    let release = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
    // A published crate has no repository, a surrounding one is another project's, and in a
    // worktree this is a file.
    let commit = match release && Path::new(".git").is_dir() {
        true => commit(),
        false => String::new(),
    };
    println!("cargo:rustc-env=TINYFUSION_COMMIT={commit}");
}

fn commit() -> String {
    println!("cargo:rerun-if-changed=.git/logs/HEAD");
    let describe = [
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ];
    let described = Command::new("git").args(describe).output();
    let text = described
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok());
    text.unwrap_or_default().trim().to_owned()
}
