//! How much sooner are masks measured that share the layers they begin with? The 28-layer teacher
//! of Fashion-MNIST, 14 layers kept, 8 pictures a mask.
//!
//! `cargo bench --bench search` prints the time a mask of 2,000 that are measured together and of
//! 100 that are measured one by one, in turns, and fails unless the first is at most three quarters
//! of the second. Of 2,000 masks about 11 layers are shared, of 100,000 about 17.

use std::time::Instant;

use burn_ndarray::NdArray;
use tinyfusion::models::Denoiser;
use tinyfusion::pruning::{ScoreBatch, mask_losses, random_masks};
use tinyfusion::stop::Stop;
use tinyfusion::weights::{EmbeddedName, embedded};

const TOGETHER: usize = 2000;
const ALONE: usize = 100;
const PICTURES: usize = 8;
const ROUNDS: usize = 3;

fn main() {
    let teacher = embedded::checkpoint(EmbeddedName::FashionTeacher).expect("it is embedded");
    let network = teacher.network::<NdArray>(&Default::default());
    let network = network.expect("it is a diffusion network");
    let process = teacher.trained_by().process();
    let mut batch = ScoreBatch::noise(network.shape(), PICTURES, 0, &Default::default());
    batch.t = (0..PICTURES)
        .map(|t| (t * 1000 / PICTURES) as f32)
        .collect();
    let depth = teacher.architecture.depth();
    let masks = random_masks(0, depth, depth / 2, TOGETHER);
    let stop = Stop::default();
    let measure = |masks: &[Vec<bool>]| {
        mask_losses(&network, &process, &batch, masks, &stop, |_| ()).expect("nobody stops it")
    };
    let (mut together, mut alone) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let losses = measure(&masks);
        together.push(begun.elapsed().as_secs_f64() / TOGETHER as f64);
        let begun = Instant::now();
        for (mask, loss) in masks.iter().zip(&losses).take(ALONE) {
            assert_eq!(measure(std::slice::from_ref(mask)), [*loss]);
        }
        alone.push(begun.elapsed().as_secs_f64() / ALONE as f64);
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        1e3 * times[ROUNDS / 2]
    };
    let (together, alone) = (median(&mut together), median(&mut alone));
    println!(
        "{together:.2} ms a mask of {TOGETHER} together, {alone:.2} ms one by one: {:.2} times as many",
        alone / together
    );
    println!(
        "100,000 masks, which share more: at most {:.0} min",
        together * 1e5 / 60e3
    );
    assert!(together <= alone * 0.75);
}
