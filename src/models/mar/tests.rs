use burn::backend::Autodiff;
use burn::module::ModuleVisitor;
use burn::tensor::TensorData;
use burn::tensor::backend::AutodiffBackend;
use burn_flex::Flex;
use burn_ndarray::NdArray;

use super::*;
use crate::process::{GaussianDiffusion, Noised};
use crate::random::{self, Stream};
use crate::state::{Array, StateDict, Walk, assign, floats};
use crate::trunk::Plain;

fn small() -> MarConfig {
    let stack = |depth| Stack {
        width: 12,
        depth,
        heads: 3,
    };
    MarConfig {
        input_size: 4,
        patch_size: 2,
        channels: 2,
        classes: 3,
        buffer: 2,
        mlp_ratio: 2.0,
        encoder: stack(2),
        decoder: stack(1),
        head_width: 10,
        head_depth: 2,
        blocks: Vec::new(),
        widths: None,
    }
}

fn draw(index: u64, count: usize) -> Vec<f32> {
    random::normal(0, Stream::Bench, 21, index, count)
}

fn network<B: FusedOps>() -> Mar<B> {
    let config = small();
    let weights = config.tensors().into_iter().zip(0..);
    let weights = weights.map(|((name, shape), index)| {
        let mut values = draw(index, shape.iter().product());
        values.iter_mut().for_each(|value| *value *= 0.3);
        (name, Array::new(shape, values))
    });
    let weights: StateDict = weights.collect();
    let zeros = Mar::<B>::zeros(&config, &Default::default());
    assign(zeros, &weights, "".as_ref(), "a network").unwrap()
}

/// The gradients of all parameters, by name.
fn gradients<B>() -> StateDict
where
    B: FusedOps,
    Autodiff<B>: AutodiffBackend<InnerBackend = B> + FusedOps,
{
    let device = Default::default();
    let network = network::<Autodiff<B>>();
    let images = TensorData::new(draw(100, 2 * 2 * 16), [2, 2, 4, 4]);
    let known = Known::new(4, vec![vec![1], vec![3]]);
    // The second label was dropped.
    let y = Tensor::from_data(TensorData::from([2i64, 3].as_slice()), &device);
    // Two copies of each of the three unknown tokens.
    let noise = TensorData::new(draw(101, 12 * 8), [2, 2, 3, 8]);
    let times = (0..12).map(|row| row as f32 * 80.0).collect();
    let process = GaussianDiffusion::full_cosine();
    let seen = Noised::new(
        &process,
        Tensor::from_data(images, &device),
        Tensor::from_data(noise, &device),
        times,
        y,
        Some(known),
    );
    let output = seen.run(&process, &network, &mut Plain);
    let gradients = seen.terms(&process, output).total.mean().backward();

    struct Take<'a, B: AutodiffBackend> {
        walk: Walk,
        gradients: &'a B::Gradients,
        taken: StateDict,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Take<'_, B> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.walk.enter(name, container);
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.walk.leave();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(gradient) = param.val().grad(self.gradients) {
                let shape = gradient.dims().to_vec();
                let array = Array::new(shape, floats(gradient.into_data()));
                self.taken.insert(self.walk.name(), array);
            }
        }
    }
    let mut take = Take {
        walk: Walk::default(),
        gradients: &gradients,
        taken: StateDict::new(),
    };
    network.visit(&mut take);
    take.taken
}

#[test]
fn gradients_are_those_of_composed_operators() {
    let (fast, exact) = (gradients::<NdArray>(), gradients::<Flex>());
    // Every parameter learns.
    assert_eq!(fast.len(), small().tensors().len());
    assert!(fast.keys().eq(exact.keys()));
    for (name, fast) in &fast {
        let exact = &exact[name];
        let size = exact
            .data
            .iter()
            .fold(0.0f32, |size, value| size.max(value.abs()));
        assert!(size > 0.0, "{name}");
        for (fast, exact) in fast.data.iter().zip(&exact.data) {
            // Rounding of f32 over some hundred operations.
            assert!(
                (fast - exact).abs() <= 5e-5 * size,
                "{name}: {fast}, {exact}"
            );
        }
    }
}

#[test]
fn where_nothing_is_known_each_patch_is_denoised_alone() {
    let (network, device) = (network::<NdArray>(), Default::default());
    let run = |x: &[f32], t: [f32; 2]| {
        let x = TensorData::new(x.to_vec(), [2, 2, 4, 4]);
        let y = Tensor::from_ints([1, 2], &device);
        let t = Tensor::from_floats(t, &device);
        let output = network.forward(Tensor::from_data(x, &device), t, y, &mut Plain);
        // Noise and variance of two channels.
        assert_eq!(output.dims(), [2, 4, 4, 4]);
        floats(output.into_data())
    };
    let x = draw(102, 2 * 2 * 16);
    let whole = run(&x, [700.0, 30.0]);
    // The last pixel of the second image's second channel lies in its last patch.
    let mut other = x.clone();
    other[63] += 1.0;
    let changed = |now: &[f32], image: usize, last_patch: bool| {
        for (index, (before, now)) in whole.iter().zip(now).enumerate() {
            let (of, row, column) = (index / 64, index / 4 % 4, index % 4);
            let within = row >= 2 && column >= 2 || !last_patch;
            assert_eq!(before != now, of == image && within, "{index}");
        }
    };
    changed(&run(&other, [700.0, 30.0]), 1, true);
    changed(&run(&x, [500.0, 30.0]), 0, false);
}

#[test]
fn kept_layers_are_counted_over_both_trunks() {
    let network = Mar::<NdArray>::zeros(&small(), &Default::default());
    assert_eq!(network.trunk().borders, [2]);
    let kept = network.keep(&[1, 2]).config();
    assert_eq!((kept.encoder.depth, kept.decoder.depth), (1, 1));
}
#[test]
fn branches_are_counted_over_both_trunks() {
    use crate::models::tests::{branches_left, drawn, filled, shown};
    use crate::models::{Architecture, Network};

    let architecture = Architecture::Mar(MarConfig {
        patch_size: 1,
        ..small()
    });
    let whole = filled(&architecture, &drawn(&architecture));
    // Of six, the encoder's last MLP and the decoder's attention are taken out.
    let left = branches_left(whole.clone(), &[0, 1, 2, 5]);
    assert_eq!(left.trunk().borders, [3]);
    let text = left.architecture().to_string();
    assert!(
        text.contains("encoder of 2 layers (3 of 4 branches)"),
        "{text}"
    );
    assert!(
        text.contains("decoder of 1 layer (1 of 2 branches)"),
        "{text}"
    );
    assert_eq!(
        left.architecture(),
        architecture.keep(&[0, 1, 2, 5], Granularity::Branch)
    );
    assert_eq!(shown(&left), left.architecture());
    let fewer = left.keep(&[3]);
    assert_eq!(
        (fewer.architecture().depth(), fewer.trunk().borders),
        (1, vec![])
    );

    // Two blocks of the encoder on one input; the decoder's has no neighbour.
    let Network::Mar(model) = whole.clone() else {
        panic!("it is a MAR");
    };
    let x = Tensor::<NdArray, 3>::from_data(
        TensorData::new(draw(103, 2 * 5 * 12), [2, 5, 12]),
        &Default::default(),
    );
    let single = |layer: usize| model.encoder_blocks[layer].forward(x.clone());
    let expected = single(0) + single(1) - x.clone();
    let paired = whole.in_pairs().unwrap();
    assert_eq!(paired.architecture(), architecture.in_pairs().unwrap());
    assert_eq!(paired.architecture().macs(), architecture.macs());
    assert_eq!(shown(&paired), paired.architecture());
    assert!(paired.clone().by_branch().is_none());
    let Network::Mar(model) = paired else {
        panic!("it is a MAR");
    };
    assert_eq!(
        (model.encoder_blocks.len(), model.decoder_blocks.len()),
        (1, 1)
    );
    let found = model.encoder_blocks[0].forward(x.clone());
    // Three sums in another order.
    assert!((found - expected).abs().max().into_scalar() < 1e-5);
}
