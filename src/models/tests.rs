//! What tests of several networks share.

use burn::tensor::Tensor;
use burn_ndarray::NdArray;

use super::{Architecture, ChannelGroup, Denoiser, Heads, Left, Network, Part, Prunable};
use crate::pruning::{Leaves, kept_channels, left_of, units, without};
use crate::random::{self, Stream};
use crate::state::{Array, StateDict, assign, collect, floats};
use crate::trunk::{Block, BlockHook, Plain, Site};

/// Weights drawn for an architecture, large enough for every layer to matter.
pub fn drawn(architecture: &Architecture) -> StateDict {
    let tensors = architecture.tensors().into_iter().zip(0..);
    let arrays = tensors.map(|((name, shape), index)| {
        let count = shape.iter().product();
        let values = random::normal(0, Stream::Bench, 23, index, count);
        let data = values.into_iter().map(|value| value * 0.3).collect();
        (name, Array { shape, data })
    });
    arrays.collect()
}

/// The network of an architecture with these weights; it says of itself that it is that.
pub fn filled(architecture: &Architecture, weights: &StateDict) -> Network<NdArray> {
    let zeros = Network::zeros(architecture, &Default::default()).unwrap();
    let network = assign(zeros, weights, "x".as_ref(), "it").unwrap();
    assert_eq!(network.architecture(), *architecture);
    assert_eq!(architecture.problem(), None);
    network
}

/// What a network's tensors show, with its heads; they are those that its architecture names.
pub fn shown(network: &Network<NdArray>) -> Architecture {
    let architecture = network.architecture();
    let state = collect::<NdArray, _>(network);
    let mut named: Vec<_> = architecture.tensors();
    named.sort();
    let found = state
        .iter()
        .map(|(name, array)| (name.clone(), array.shape.clone()));
    assert_eq!(named, found.collect::<Vec<_>>());
    let heads = Heads {
        known: architecture.heads(),
        otherwise: None,
    };
    Architecture::of_tensors(&state.into(), heads, "x".as_ref()).unwrap()
}

/// What a network says of two drawn samples at two times, one of them without a label.
pub fn run(network: &Network<NdArray>, hook: &mut dyn BlockHook<NdArray>) -> Vec<f32> {
    let device = Default::default();
    let shape = network.shape();
    let sizes = [2, shape.channels, shape.side, shape.side];
    let x = random::normal(0, Stream::Bench, 24, 0, sizes.iter().product());
    let x = Tensor::<NdArray, 1>::from_floats(x.as_slice(), &device).reshape(sizes);
    let t = Tensor::from_floats([20.0, 900.0], &device);
    let y = Tensor::from_ints([1, shape.classes as i32], &device);
    floats(network.forward(x, t, y, hook).into_data())
}

/// A network with so many units of each group, the last of each.
pub fn narrowed(
    (architecture, weights): (&Architecture, &StateDict),
    keep: impl Fn(&ChannelGroup, usize) -> usize,
    leaves: Leaves,
) -> Network<NdArray> {
    let groups = architecture.channel_groups().unwrap();
    let (mut kept, mut left) = (Vec::new(), Vec::new());
    for group in &groups {
        let (units, _) = units(group, leaves);
        let keep = keep(group, units);
        let ranked: Vec<f64> = (0..units).map(|unit| unit as f64).collect();
        kept.push(kept_channels(group, &ranked, keep, leaves));
        left.push(left_of(group, keep, leaves));
    }
    let weights = without(weights.clone(), &groups, &kept);
    filled(&architecture.narrowed(&left), &weights)
}

/// Channels of which nothing is read can be taken out of every inner layer, and the network does
/// what it did.
pub fn leave_without_a_trace(architecture: &Architecture, mut weights: StateDict) {
    let groups = architecture.channel_groups().unwrap();
    let inner = |group: &ChannelGroup| group.part != Part::Stream;
    let (mut kept, mut left) = (Vec::new(), Vec::<Left>::new());
    for group in &groups {
        let (units, _) = units(group, Leaves::Heads);
        let keep = if inner(group) { units / 2 } else { units };
        let ranked: Vec<f64> = (0..units).map(|unit| unit as f64).collect();
        let stays = kept_channels(group, &ranked, keep, Leaves::Heads);
        // Where the channels are inputs of a layer.
        let columns = group.members.iter();
        let columns = columns.filter(|member| member.dim == 1 && member.scored);
        for member in columns.filter(|_| inner(group)) {
            let array = weights.get_mut(&member.tensor).unwrap();
            let width = array.shape[1];
            for (at, value) in array.data.iter_mut().enumerate() {
                if !stays.contains(&(at % width)) {
                    *value = 0.0;
                }
            }
        }
        kept.push(stays);
        left.push(left_of(group, keep, Leaves::Heads));
    }
    let whole = filled(architecture, &weights);
    let narrow = architecture.narrowed(&left);
    assert!(narrow.parameters() < architecture.parameters());
    let narrow = filled(&narrow, &without(weights, &groups, &kept));
    let (whole, narrow) = (run(&whole, &mut Plain), run(&narrow, &mut Plain));
    // Sums without their zeros, in another order.
    assert!(whole.iter().zip(&narrow).all(|(a, b)| (a - b).abs() < 1e-4));
    assert!(whole.iter().any(|value| value.abs() > 0.1));
}

/// A network of which only some branches are left does what it did when the others were skipped;
/// returns it.
pub fn branches_left(whole: Network<NdArray>, kept: &[usize]) -> Network<NdArray> {
    struct Only<'a>(&'a [usize]);
    impl BlockHook<NdArray> for Only<'_> {
        fn around(
            &mut self,
            site: Site,
            x: Tensor<NdArray, 3>,
            block: Block<'_, NdArray>,
        ) -> Tensor<NdArray, 3> {
            match self.0.contains(&site.layer) {
                true => block(x),
                false => x,
            }
        }
    }
    let by_branch = whole.clone().by_branch().unwrap();
    // The same operations in the same order.
    assert_eq!(run(&whole, &mut Plain), run(&by_branch, &mut Plain));
    let expected = run(&by_branch, &mut Only(kept));
    let left = by_branch.keep(kept);
    assert_eq!(left.trunk().depth, kept.len());
    // A DiT's products of three rows of the modulation in place of six may be summed in another
    // order.
    let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
    assert!(near(&run(&left, &mut Plain), &expected));
    left
}
