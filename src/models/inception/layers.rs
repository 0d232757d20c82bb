//! The network's convolutions, as one table, and its weights.

use std::collections::BTreeMap;

use crate::ops::Window;
use crate::state::{Array, StateDict};

/// A convolution without bias, a batch normalisation and a ReLU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layer {
    /// Prefix of its weights' names.
    pub(super) name: &'static str,
    /// Input channels.
    pub(super) input: usize,
    /// Output channels.
    pub(super) output: usize,
    /// Height and width.
    pub(super) kernel: [usize; 2],
    pub(super) window: Window,
}

const fn layer(
    name: &'static str,
    input: usize,
    output: usize,
    kernel: [usize; 2],
    stride: usize,
    padding: [usize; 2],
) -> Layer {
    Layer {
        name,
        input,
        output,
        kernel,
        window: Window::padded(padding).every(stride),
    }
}

/// Every convolution, in network order.
#[rustfmt::skip]
pub(super) const LAYERS: &[Layer] = &[
    //    name                           in   out  kernel  stride  padding
    layer("Conv2d_1a_3x3",                3,   32,  [3, 3],      2,  [0, 0]),
    layer("Conv2d_2a_3x3",               32,   32,  [3, 3],      1,  [0, 0]),
    layer("Conv2d_2b_3x3",               32,   64,  [3, 3],      1,  [1, 1]),
    layer("Conv2d_3b_1x1",               64,   80,  [1, 1],      1,  [0, 0]),
    layer("Conv2d_4a_3x3",               80,  192,  [3, 3],      1,  [0, 0]),
    layer("Mixed_5b.branch1x1",         192,   64,  [1, 1],      1,  [0, 0]),
    layer("Mixed_5b.branch5x5_1",       192,   48,  [1, 1],      1,  [0, 0]),
    layer("Mixed_5b.branch5x5_2",        48,   64,  [5, 5],      1,  [2, 2]),
    layer("Mixed_5b.branch3x3dbl_1",    192,   64,  [1, 1],      1,  [0, 0]),
    layer("Mixed_5b.branch3x3dbl_2",     64,   96,  [3, 3],      1,  [1, 1]),
    layer("Mixed_5b.branch3x3dbl_3",     96,   96,  [3, 3],      1,  [1, 1]),
    layer("Mixed_5b.branch_pool",       192,   32,  [1, 1],      1,  [0, 0]),
    layer("Mixed_5c.branch1x1",         256,   64,  [1, 1],      1,  [0, 0]),
    layer("Mixed_5c.branch5x5_1",       256,   48,  [1, 1],      1,  [0, 0]),
    layer("Mixed_5c.branch5x5_2",        48,   64,  [5, 5],      1,  [2, 2]),
    layer("Mixed_5c.branch3x3dbl_1",    256,   64,  [1, 1],      1,  [0, 0]),
    layer("Mixed_5c.branch3x3dbl_2",     64,   96,  [3, 3],      1,  [1, 1]),
    layer("Mixed_5c.branch3x3dbl_3",     96,   96,  [3, 3],      1,  [1, 1]),
    layer("Mixed_5c.branch_pool",       256,   64,  [1, 1],      1,  [0, 0]),
    layer("Mixed_5d.branch1x1",         288,   64,  [1, 1],      1,  [0, 0]),
    layer("Mixed_5d.branch5x5_1",       288,   48,  [1, 1],      1,  [0, 0]),
    layer("Mixed_5d.branch5x5_2",        48,   64,  [5, 5],      1,  [2, 2]),
    layer("Mixed_5d.branch3x3dbl_1",    288,   64,  [1, 1],      1,  [0, 0]),
    layer("Mixed_5d.branch3x3dbl_2",     64,   96,  [3, 3],      1,  [1, 1]),
    layer("Mixed_5d.branch3x3dbl_3",     96,   96,  [3, 3],      1,  [1, 1]),
    layer("Mixed_5d.branch_pool",       288,   64,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6a.branch3x3",         288,  384,  [3, 3],      2,  [0, 0]),
    layer("Mixed_6a.branch3x3dbl_1",    288,   64,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6a.branch3x3dbl_2",     64,   96,  [3, 3],      1,  [1, 1]),
    layer("Mixed_6a.branch3x3dbl_3",     96,   96,  [3, 3],      2,  [0, 0]),
    layer("Mixed_6b.branch1x1",         768,  192,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6b.branch7x7_1",       768,  128,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6b.branch7x7_2",       128,  128,  [1, 7],      1,  [0, 3]),
    layer("Mixed_6b.branch7x7_3",       128,  192,  [7, 1],      1,  [3, 0]),
    layer("Mixed_6b.branch7x7dbl_1",    768,  128,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6b.branch7x7dbl_2",    128,  128,  [7, 1],      1,  [3, 0]),
    layer("Mixed_6b.branch7x7dbl_3",    128,  128,  [1, 7],      1,  [0, 3]),
    layer("Mixed_6b.branch7x7dbl_4",    128,  128,  [7, 1],      1,  [3, 0]),
    layer("Mixed_6b.branch7x7dbl_5",    128,  192,  [1, 7],      1,  [0, 3]),
    layer("Mixed_6b.branch_pool",       768,  192,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6c.branch1x1",         768,  192,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6c.branch7x7_1",       768,  160,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6c.branch7x7_2",       160,  160,  [1, 7],      1,  [0, 3]),
    layer("Mixed_6c.branch7x7_3",       160,  192,  [7, 1],      1,  [3, 0]),
    layer("Mixed_6c.branch7x7dbl_1",    768,  160,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6c.branch7x7dbl_2",    160,  160,  [7, 1],      1,  [3, 0]),
    layer("Mixed_6c.branch7x7dbl_3",    160,  160,  [1, 7],      1,  [0, 3]),
    layer("Mixed_6c.branch7x7dbl_4",    160,  160,  [7, 1],      1,  [3, 0]),
    layer("Mixed_6c.branch7x7dbl_5",    160,  192,  [1, 7],      1,  [0, 3]),
    layer("Mixed_6c.branch_pool",       768,  192,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6d.branch1x1",         768,  192,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6d.branch7x7_1",       768,  160,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6d.branch7x7_2",       160,  160,  [1, 7],      1,  [0, 3]),
    layer("Mixed_6d.branch7x7_3",       160,  192,  [7, 1],      1,  [3, 0]),
    layer("Mixed_6d.branch7x7dbl_1",    768,  160,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6d.branch7x7dbl_2",    160,  160,  [7, 1],      1,  [3, 0]),
    layer("Mixed_6d.branch7x7dbl_3",    160,  160,  [1, 7],      1,  [0, 3]),
    layer("Mixed_6d.branch7x7dbl_4",    160,  160,  [7, 1],      1,  [3, 0]),
    layer("Mixed_6d.branch7x7dbl_5",    160,  192,  [1, 7],      1,  [0, 3]),
    layer("Mixed_6d.branch_pool",       768,  192,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6e.branch1x1",         768,  192,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6e.branch7x7_1",       768,  192,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6e.branch7x7_2",       192,  192,  [1, 7],      1,  [0, 3]),
    layer("Mixed_6e.branch7x7_3",       192,  192,  [7, 1],      1,  [3, 0]),
    layer("Mixed_6e.branch7x7dbl_1",    768,  192,  [1, 1],      1,  [0, 0]),
    layer("Mixed_6e.branch7x7dbl_2",    192,  192,  [7, 1],      1,  [3, 0]),
    layer("Mixed_6e.branch7x7dbl_3",    192,  192,  [1, 7],      1,  [0, 3]),
    layer("Mixed_6e.branch7x7dbl_4",    192,  192,  [7, 1],      1,  [3, 0]),
    layer("Mixed_6e.branch7x7dbl_5",    192,  192,  [1, 7],      1,  [0, 3]),
    layer("Mixed_6e.branch_pool",       768,  192,  [1, 1],      1,  [0, 0]),
    layer("Mixed_7a.branch3x3_1",       768,  192,  [1, 1],      1,  [0, 0]),
    layer("Mixed_7a.branch3x3_2",       192,  320,  [3, 3],      2,  [0, 0]),
    layer("Mixed_7a.branch7x7x3_1",     768,  192,  [1, 1],      1,  [0, 0]),
    layer("Mixed_7a.branch7x7x3_2",     192,  192,  [1, 7],      1,  [0, 3]),
    layer("Mixed_7a.branch7x7x3_3",     192,  192,  [7, 1],      1,  [3, 0]),
    layer("Mixed_7a.branch7x7x3_4",     192,  192,  [3, 3],      2,  [0, 0]),
    layer("Mixed_7b.branch1x1",        1280,  320,  [1, 1],      1,  [0, 0]),
    layer("Mixed_7b.branch3x3_1",      1280,  384,  [1, 1],      1,  [0, 0]),
    layer("Mixed_7b.branch3x3_2a",      384,  384,  [1, 3],      1,  [0, 1]),
    layer("Mixed_7b.branch3x3_2b",      384,  384,  [3, 1],      1,  [1, 0]),
    layer("Mixed_7b.branch3x3dbl_1",   1280,  448,  [1, 1],      1,  [0, 0]),
    layer("Mixed_7b.branch3x3dbl_2",    448,  384,  [3, 3],      1,  [1, 1]),
    layer("Mixed_7b.branch3x3dbl_3a",   384,  384,  [1, 3],      1,  [0, 1]),
    layer("Mixed_7b.branch3x3dbl_3b",   384,  384,  [3, 1],      1,  [1, 0]),
    layer("Mixed_7b.branch_pool",      1280,  192,  [1, 1],      1,  [0, 0]),
    layer("Mixed_7c.branch1x1",        2048,  320,  [1, 1],      1,  [0, 0]),
    layer("Mixed_7c.branch3x3_1",      2048,  384,  [1, 1],      1,  [0, 0]),
    layer("Mixed_7c.branch3x3_2a",      384,  384,  [1, 3],      1,  [0, 1]),
    layer("Mixed_7c.branch3x3_2b",      384,  384,  [3, 1],      1,  [1, 0]),
    layer("Mixed_7c.branch3x3dbl_1",   2048,  448,  [1, 1],      1,  [0, 0]),
    layer("Mixed_7c.branch3x3dbl_2",    448,  384,  [3, 3],      1,  [1, 1]),
    layer("Mixed_7c.branch3x3dbl_3a",   384,  384,  [1, 3],      1,  [0, 1]),
    layer("Mixed_7c.branch3x3dbl_3b",   384,  384,  [3, 1],      1,  [1, 0]),
    layer("Mixed_7c.branch_pool",      2048,  192,  [1, 1],      1,  [0, 0]),
];

/// Width of the pooled features, the last layer's input.
pub const POOLED: usize = 2048;
/// Outputs of the last layer: the 1000 classes of ImageNet, from index 1, and eight that were never
/// trained.
pub const CLASSES: usize = 1008;

impl Layer {
    fn weight_shape(&self) -> Vec<usize> {
        vec![self.output, self.input, self.kernel[0], self.kernel[1]]
    }
}

/// Name and shape of every weight in `pt_inception-2015-12-05-6726825d.pth`.
pub fn shapes() -> BTreeMap<String, Vec<usize>> {
    let mut shapes: BTreeMap<String, Vec<usize>> = LAYERS
        .iter()
        .flat_map(|layer| {
            let norm = ["weight", "bias", "running_mean", "running_var"]
                .map(|part| (format!("{}.bn.{part}", layer.name), vec![layer.output]));
            let weight = (format!("{}.conv.weight", layer.name), layer.weight_shape());
            norm.into_iter().chain([weight])
        })
        .collect();
    shapes.insert("fc.weight".to_owned(), vec![CLASSES, POOLED]);
    shapes.insert("fc.bias".to_owned(), vec![CLASSES]);
    shapes
}

/// Weights from an integer formula, for tests and where the published weights are missing: the
/// network then measures the same values on every machine, which are not comparable with published
/// numbers.
///
/// Element `i` of the weight `name` comes from splitmix64 at `fnv1a(name) + salt + (i + 1)
/// 0x9E3779B97F4A7C15`, its top 24 bits as a number `u` in [−1, 1). Filters are `u` minus its mean
/// over the filter, times `sqrt(9 / fan_in)`: centred, so that features depend on the image rather
/// than on the mean activation. Scales and variances are `1 + 0.2 u`, shifts, means and the last
/// layer's bias `0.1 u`, its weight `sqrt(6 / 2048) u`.
pub fn formula_weights(salt: u64) -> StateDict {
    shapes()
        .into_iter()
        .map(|(name, shape)| {
            let data = formula(&name, &shape, salt);
            (name, Array::new(shape, data))
        })
        .collect()
}

fn formula(name: &str, shape: &[usize], salt: u64) -> Vec<f32> {
    let start = fnv1a(name).wrapping_add(salt);
    let mut values: Vec<f64> = (0..shape.iter().product::<usize>() as u64)
        .map(|index| unit(start, index))
        .collect();
    let scaled = |offset: f64, factor: f64, value: &f64| (offset + factor * value) as f32;
    let (offset, factor) = if name.ends_with(".conv.weight") {
        let fan_in: usize = shape[1..].iter().product();
        for filter in values.chunks_exact_mut(fan_in) {
            let mean = filter.iter().sum::<f64>() / fan_in as f64;
            filter.iter_mut().for_each(|value| *value -= mean);
        }
        (0.0, (9.0 / fan_in as f64).sqrt())
    } else if name == "fc.weight" {
        (0.0, (6.0 / POOLED as f64).sqrt())
    } else if name.ends_with(".bn.weight") || name.ends_with(".running_var") {
        (1.0, 0.2)
    } else {
        (0.0, 0.1)
    };
    values
        .iter()
        .map(|value| scaled(offset, factor, value))
        .collect()
}

/// The 64-bit hash of Fowler, Noll and Vo.
fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    })
}

/// Number `index` of the sequence from `start`, in [−1, 1).
fn unit(start: u64, index: u64) -> f64 {
    let z = start.wrapping_add((index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    let z = z ^ (z >> 31);
    (z >> 40) as f64 / f64::from(1 << 23) - 1.0
}
