//! FID, sFID, Inception Score, precision and recall of an archive (or folder) of pictures against a
//! reference, by ADM's protocol. Two archives' FID is this, one of them being the reference.
//!
//! `cargo run --release --example fid -- SAMPLES.npz REFERENCE.npz
//! pt_inception-2015-12-05-6726825d.pth`
//!
//! `tinyfusion standin FOLDER` makes small files of these forms, to try it with.

use std::path::PathBuf;

use burn_ndarray::{NdArray, NdArrayDevice};
use tinyfusion::evaluation::{DEFAULT_NEIGHBOURS, Distances, Reading, Reference, compare, measure};
use tinyfusion::npz::SampleReader;
use tinyfusion::stop::Stop;
use tinyfusion::weights::read_inception;
use tinyfusion::workers::Alone;

/// Pictures that go through Inception at once.
const BATCH: usize = 16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [samples, reference, weights] = paths.as_slice() else {
        return Err("expected SAMPLES REFERENCE INCEPTION".into());
    };
    let inception = read_inception::<NdArray>(weights, &NdArrayDevice::Cpu)?.network;
    // Nobody asks it to stop; a longer program would hand the same one to all that works.
    let stop = Stop::default();
    let reading = Reading {
        inception: &inception,
        batch: BATCH,
        workers: &Alone,
        stop: &stop,
    };
    let samples = measure(&reading, SampleReader::open(samples)?, |_| ())?;
    let reference = Reference::open(reference)?.measure(&reading, |_| ())?;
    let neighbours = DEFAULT_NEIGHBOURS.min(samples.features.rows() - 1);
    println!(
        "{:#?}",
        compare(&reference, &samples, neighbours, Distances::F64)?
    );
    Ok(())
}
