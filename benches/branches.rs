//! What does a dropped branch save? The 28-layer teacher of Fashion-MNIST, without half of its
//! attentions, half of its MLPs, or half of its layers, against the whole.
//!
//! `cargo bench --bench branches` prints each model's share of the whole's time, beside its shares
//! of the operations and the parameters: medians of forward passes over 32 pictures, in turns. It
//! fails where a model saves less than half of what its operations say: machines are noisy.

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::{Distribution, Tensor};
use burn_ndarray::NdArray;
use tinyfusion::models::{Denoiser, Network, Prunable};
use tinyfusion::trunk::Plain;
use tinyfusion::weights::{EmbeddedName, embedded};

const PICTURES: usize = 32;
const ROUNDS: usize = 31;

fn main() {
    let device = Default::default();
    let teacher = embedded::checkpoint(EmbeddedName::FashionTeacher).expect("it is embedded");
    let network = teacher.network::<NdArray>(&device);
    let whole: Network<NdArray> = network.expect("it is a diffusion network");
    let depth = whole.trunk().depth;
    let by_branch = whole.clone().by_branch().expect("it has branches");
    // Attention and MLP of layer l are branches 2 l and 2 l + 1.
    let without = |dropped: fn(usize) -> bool| {
        let kept: Vec<usize> = (0..2 * depth).filter(|&branch| !dropped(branch)).collect();
        by_branch.clone().keep(&kept)
    };
    let models = [
        ("the whole", whole.clone()),
        ("without half of the attentions", without(|b| b % 4 == 2)),
        ("without half of the MLPs", without(|b| b % 4 == 3)),
        ("without half of the layers", without(|b| b % 4 >= 2)),
    ];

    let shape = whole.shape();
    let size = [PICTURES, shape.channels, shape.side, shape.side];
    let x = Tensor::random(size, Distribution::Normal(0.0, 1.0), &device);
    let t = Tensor::full([PICTURES], 500.0, &device);
    let y = Tensor::zeros([PICTURES], &device);
    let mut times = vec![Vec::new(); models.len()];
    for round in 0..=ROUNDS {
        for ((_, model), times) in models.iter().zip(&mut times) {
            let begun = Instant::now();
            black_box(
                model
                    .forward(x.clone(), t.clone(), y.clone(), &mut Plain)
                    .into_data(),
            );
            // The first pass warms up.
            if round > 0 {
                times.push(begun.elapsed().as_secs_f64());
            }
        }
    }
    let medians: Vec<f64> = (times.into_iter())
        .map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[ROUNDS / 2]
        })
        .collect();
    let of_whole = |count: fn(&Network<NdArray>) -> usize, model: &Network<NdArray>| {
        count(model) as f64 / count(&whole) as f64
    };
    for ((name, model), median) in models.iter().zip(&medians) {
        let macs = of_whole(|model| model.architecture().macs(), model);
        let parameters = of_whole(|model| model.architecture().parameters(), model);
        let time = median / medians[0];
        println!(
            "{name}: {:.1} ms, {time:.2} of the time, {macs:.2} of the operations, {parameters:.2} of the parameters",
            1e3 * median
        );
        assert!(1.0 - time >= 0.5 * (1.0 - macs), "{name} saves too little");
    }
}
