//! Scores the layers of a checkpoint in three ways, on the embedded digits.
//!
//! `cargo run --example score_layers` takes the embedded teacher, `cargo run --example score_layers
//! -- model.safetensors` any model of the digits.

use std::path::PathBuf;
use std::sync::Arc;

use burn_ndarray::{NdArray, NdArrayDevice};
use tinyfusion::data::{BatchPlan, BatchSource, Digits, Split};
use tinyfusion::models::{Denoiser, Prunable, Shape};
use tinyfusion::process::Process;
use tinyfusion::pruning::{Score, ScoreBatch, keep_by_scores, score};
use tinyfusion::weights::{Checkpoint, EmbeddedName, embedded};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let checkpoint = match std::env::args_os().nth(1) {
        Some(path) => Checkpoint::read(&PathBuf::from(path))?,
        None => embedded::checkpoint(EmbeddedName::DigitsTeacher)?,
    };
    let network = checkpoint.network::<NdArray>(&NdArrayDevice::Cpu)?;
    let process = checkpoint.trained_by().process();
    let depth = network.trunk().depth;

    let Shape {
        channels,
        side,
        classes,
    } = network.shape();
    let batches = BatchPlan {
        batch: 64,
        seed: 0,
        channels,
        size: side,
        classes,
        label_drop: 0.0,
        times: process.times(),
        masking: None,
        logits: Vec::new(),
    };
    let batch = BatchSource::new(batches, Arc::new(Digits::new(Split::Train)));
    let batch = ScoreBatch::from(batch.draw::<NdArray>(0, &NdArrayDevice::Cpu)?);

    println!("{}", checkpoint.model());
    for (name, method) in [
        ("shortgpt", Score::Shortgpt),
        ("flux-lite", Score::FluxLite),
        ("sensitivity", Score::Sensitivity),
    ] {
        let scores = score(&network, &process, method, &batch).scores;
        let kept = keep_by_scores(method, &scores, depth / 2);
        let scores: Vec<String> = scores.iter().map(|score| format!("{score:.3}")).collect();
        println!("{name:12} {}  keeps {kept:?}", scores.join(" "));
    }
    Ok(())
}
