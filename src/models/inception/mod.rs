//! The network behind published FIDs: InceptionV3 in the TensorFlow graph of 2015-12-05.
//!
//! FID, sFID and the Inception Score are comparable between papers only with these weights and this
//! arithmetic (Heusel et al., arXiv 1706.08500; the evaluator of guided-diffusion, arXiv
//! 2105.05233). It differs from torchvision's InceptionV3: average pools exclude the padding, the
//! last block uses max pooling, there are 1008 outputs, and images are resized without regard to
//! pixel centres ([`prepare`]).
//!
//! It is only used for inference, so it is no Burn module: each batch normalisation is folded into
//! its convolution when the weights are read.

mod layers;

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Tensor, TensorData, activation, backend::Backend, module};
use rayon::prelude::*;
use thiserror::Error;

pub use self::layers::{CLASSES, POOLED, formula_weights, shapes};
use self::layers::{LAYERS, Layer};
use crate::backend::Compute;
use crate::images::Images;
use crate::ops::{FusedOps, Window};
use crate::state::{Misfits, StateDict, WeightsError};

/// Side of the input images.
pub const SIDE: usize = 299;
/// Channels of the map in sFID's features.
const SPATIAL_CHANNELS: usize = 7;
/// Number of sFID's features: a 17 x 17 map of seven channels.
pub const SPATIAL: usize = 17 * 17 * SPATIAL_CHANNELS;
/// Added to the variance of every batch normalisation.
const NORM_EPSILON: f64 = 1e-3;

/// The network.
#[derive(Debug)]
pub struct Inception<B: Backend> {
    /// All of [`LAYERS`], by name.
    layers: BTreeMap<&'static str, Folded<B>>,
    /// `[pooled, classes]`
    head: Tensor<B, 2>,
}

/// A convolution with its normalisation folded in.
#[derive(Debug)]
struct Folded<B: Backend> {
    weight: Tensor<B, 4>,
    bias: Tensor<B, 1>,
    window: Window,
}

/// The network's output for a batch of images.
#[derive(Debug)]
pub struct Activations<B: Backend> {
    /// `[batch, 2048]`, FID's features.
    pub pool: Tensor<B, 2>,
    /// `[batch, 2023]`, sFID's features: the first seven channels of a 17 x 17 map, channels
    /// innermost.
    pub spatial: Tensor<B, 2>,
    /// `[batch, 1008]`, without the last layer's bias, as in the reference.
    pub logits: Tensor<B, 2>,
    /// `[batch, 1008]`, the softmax of the logits, for the Inception Score.
    pub probabilities: Tensor<B, 2>,
}

/// Pictures that can't be resized to the network's input.
#[derive(Debug, Error)]
#[error(
    "pictures of shape [count, height, width, channels] = {shape:?}, expected 1 or 3 channels and at least one pixel"
)]
pub struct UnreadablePictures {
    shape: [usize; 4],
}

impl<B: Backend> Inception<B> {
    /// The network with the weights of `pt_inception-2015-12-05-6726825d.pth` ([`shapes`]).
    /// PyTorch's optional counters, `num_batches_tracked`, are ignored.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] with every weight that is missing, surplus or misshapen. `path`
    /// is for that message.
    pub fn new(
        mut state: StateDict,
        path: &Path,
        device: &B::Device,
    ) -> Result<Self, WeightsError> {
        state.retain(|name, _| !name.ends_with(".num_batches_tracked"));
        let wanted = shapes();
        let mut misfits = Misfits::default();
        misfits.compare(
            &state,
            wanted
                .iter()
                .map(|(name, shape)| (name.as_str(), shape.as_slice())),
        );
        misfits.into_result(path, "InceptionV3 of 2015-12-05")?;
        let layers = LAYERS.iter();
        let layers = layers.map(|layer| (layer.name, Folded::new(layer, &state, device)));
        let head = TensorData::new(state["fc.weight"].data.clone(), [CLASSES, POOLED]);
        Ok(Self {
            layers: layers.collect(),
            head: Tensor::<B, 2>::from_data(head, device).transpose(),
        })
    }

    /// The device of the weights.
    fn device(&self) -> B::Device {
        self.head.device()
    }
}

impl<B: Backend> Folded<B> {
    /// `gamma (w x - mean) / sqrt(var + epsilon) + beta`, as one weight and one bias. All names are
    /// in `state`.
    fn new(layer: &Layer, state: &StateDict, device: &B::Device) -> Self {
        let part = |part: &str| &state[&format!("{}.{part}", layer.name)].data;
        let [gamma, beta, mean, variance] =
            ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"].map(part);
        let mut weight = part("conv.weight").clone();
        let mut bias = Vec::with_capacity(layer.output);
        let filter = weight.len() / layer.output;
        for (channel, filter) in weight.chunks_exact_mut(filter).enumerate() {
            let deviation = (f64::from(variance[channel]) + NORM_EPSILON).sqrt();
            let factor = f64::from(gamma[channel]) / deviation;
            for value in filter {
                *value = (f64::from(*value) * factor) as f32;
            }
            let shift = f64::from(beta[channel]) - f64::from(mean[channel]) * factor;
            bias.push(shift as f32);
        }
        let Layer {
            input,
            output,
            kernel: [height, width],
            window,
            ..
        } = *layer;
        Self {
            weight: Tensor::from_data(
                TensorData::new(weight, [output, input, height, width]),
                device,
            ),
            bias: Tensor::from_data(TensorData::new(bias, [output]), device),
            window,
        }
    }
}

/// Pictures as the network's input, `[count, 3, 299, 299]`, with a single channel repeated.
///
/// Resized as in TensorFlow 1: bilinear between the pixels at `floor(i in / 299)` and the next, in
/// f32, without regard to pixel centres and without smoothing; then `(x - 128) / 128`.
///
/// # Errors
/// When the pictures have another number of channels than one or three, or no pixels.
pub fn prepare<B: Backend>(
    images: &Images,
    device: &B::Device,
) -> Result<Tensor<B, 4>, UnreadablePictures> {
    let shape @ [count, height, width, channels] = images.shape();
    if height == 0 || width == 0 || !matches!(channels, 1 | 3) {
        return Err(UnreadablePictures { shape });
    }
    let (rows, columns) = (places(height), places(width));
    let mut values = vec![0.0; count * 3 * SIDE * SIDE];
    // On all cores: otherwise the GPU waits for it.
    let pictures = values.par_chunks_mut(3 * SIDE * SIDE).enumerate();
    pictures.for_each(|(index, picture)| {
        let image = images.image(index);
        let mut places = picture.iter_mut();
        for channel in [0, 1, 2].map(|channel| channel.min(channels - 1)) {
            let pixel = |row: usize, column: usize| {
                f32::from(image[(row * width + column) * channels + channel])
            };
            for (above, below, down) in &rows {
                for ((left, right, along), place) in columns.iter().zip(&mut places) {
                    let of_row = |row: usize| {
                        let first = pixel(row, *left);
                        first + (pixel(row, *right) - first) * along
                    };
                    let top = of_row(*above);
                    let value = top + (of_row(*below) - top) * down;
                    *place = (value - 128.0) / 128.0;
                }
            }
        }
    });
    Ok(Tensor::from_data(
        TensorData::new(values, [count, 3, SIDE, SIDE]),
        device,
    ))
}

/// For every place along a side of the result: the two pixels of `size` it lies between, and the
/// weight of the second.
fn places(size: usize) -> Vec<(usize, usize, f32)> {
    let scale = size as f32 / SIDE as f32;
    (0..SIDE)
        .map(|place| {
            let source = place as f32 * scale;
            let low = source.floor() as usize;
            (low, (low + 1).min(size - 1), source - low as f32)
        })
        .collect()
}

impl<B: FusedOps> Inception<B> {
    /// Runs the network on a batch of pictures of any size. All are in memory at once, some 20 MiB
    /// each.
    ///
    /// # Errors
    /// As [`prepare`].
    pub fn read(&self, images: &Images) -> Result<Activations<B>, UnreadablePictures> {
        Ok(self.forward(prepare(images, &self.device())?, |_, _| ()))
    }

    /// Runs the network on `[batch, 3, 299, 299]` from [`prepare`]. `watch` is called with the
    /// output of each stage, pool and block, `[batch, channels, height, width]`, and its name in
    /// the weights (or `max_pool_1` and `max_pool_2`).
    pub fn forward(
        &self,
        x: Tensor<B, 4>,
        mut watch: impl FnMut(&str, &Tensor<B, 4>),
    ) -> Activations<B> {
        let mut seen = |name: &str, x: Tensor<B, 4>| {
            watch(name, &x);
            x
        };
        let mut x = x;
        for name in ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"] {
            x = seen(name, self.layer(name, x));
        }
        x = seen("max_pool_1", max_pool(x, 2, 0)); // [batch, 64, 73, 73]
        for name in ["Conv2d_3b_1x1", "Conv2d_4a_3x3"] {
            x = seen(name, self.layer(name, x));
        }
        x = seen("max_pool_2", max_pool(x, 2, 0)); // [batch, 192, 35, 35]
        for name in ["Mixed_5b", "Mixed_5c", "Mixed_5d"] {
            x = seen(name, self.block_5(name, x));
        }
        x = seen("Mixed_6a", self.block_6a(x)); // [batch, 768, 17, 17]
        for name in ["Mixed_6b", "Mixed_6c"] {
            x = seen(name, self.block_6(name, x).0);
        }
        let (mixed, spatial) = self.block_6("Mixed_6d", x);
        x = seen("Mixed_6d", mixed);
        x = seen("Mixed_6e", self.block_6("Mixed_6e", x).0);
        x = seen("Mixed_7a", self.block_7a(x)); // [batch, 1280, 8, 8]
        let pooled = average_pool(x.clone());
        x = seen("Mixed_7b", self.block_7("Mixed_7b", x, pooled)); // [batch, 2048, 8, 8]
        let pooled = max_pool(x.clone(), 1, 1);
        x = seen("Mixed_7c", self.block_7("Mixed_7c", x, pooled));

        let batch = x.dims()[0];
        let pool = x
            .reshape([batch, POOLED, 64])
            .mean_dim(2)
            .reshape([batch, POOLED]);
        let spatial = spatial
            .narrow(1, 0, SPATIAL_CHANNELS)
            .permute([0, 2, 3, 1]) // [batch, 17, 17, 7]
            .reshape([batch, SPATIAL]);
        let logits = pool.clone().matmul(self.head.clone());
        Activations {
            pool,
            spatial,
            probabilities: activation::softmax(logits.clone(), 1),
            logits,
        }
    }

    /// Convolution, normalisation and ReLU.
    fn layer(&self, name: &str, x: Tensor<B, 4>) -> Tensor<B, 4> {
        // `new` reads every layer of the table, and the names below are the table's.
        let layer = &self.layers[name];
        let bias = Some(layer.bias.clone());
        activation::relu(B::convolution(
            x,
            layer.weight.clone(),
            bias,
            layer.window,
            Compute::F32,
        ))
    }

    /// Consecutive layers of a block.
    fn branch(&self, block: &str, layers: &[&str], x: &Tensor<B, 4>) -> Tensor<B, 4> {
        layers.iter().fold(x.clone(), |x, layer| {
            self.layer(&format!("{block}.{layer}"), x)
        })
    }

    fn block_5(&self, block: &str, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let branches = vec![
            self.branch(block, &["branch1x1"], &x),
            self.branch(block, &["branch5x5_1", "branch5x5_2"], &x),
            self.branch(
                block,
                &["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
                &x,
            ),
            self.branch(block, &["branch_pool"], &average_pool(x)),
        ];
        Tensor::cat(branches, 1)
    }

    fn block_6a(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let block = "Mixed_6a";
        let branches = vec![
            self.branch(block, &["branch3x3"], &x),
            self.branch(
                block,
                &["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
                &x,
            ),
            max_pool(x, 2, 0),
        ];
        Tensor::cat(branches, 1)
    }

    /// The output of the block, and of its first branch alone, which sFID uses for one block.
    fn block_6(&self, block: &str, x: Tensor<B, 4>) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let first = self.branch(block, &["branch1x1"], &x);
        let branches = vec![
            first.clone(),
            self.branch(block, &["branch7x7_1", "branch7x7_2", "branch7x7_3"], &x),
            self.branch(
                block,
                &[
                    "branch7x7dbl_1",
                    "branch7x7dbl_2",
                    "branch7x7dbl_3",
                    "branch7x7dbl_4",
                    "branch7x7dbl_5",
                ],
                &x,
            ),
            self.branch(block, &["branch_pool"], &average_pool(x)),
        ];
        (Tensor::cat(branches, 1), first)
    }

    fn block_7a(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let block = "Mixed_7a";
        let branches = vec![
            self.branch(block, &["branch3x3_1", "branch3x3_2"], &x),
            self.branch(
                block,
                &[
                    "branch7x7x3_1",
                    "branch7x7x3_2",
                    "branch7x7x3_3",
                    "branch7x7x3_4",
                ],
                &x,
            ),
            max_pool(x, 2, 0),
        ];
        Tensor::cat(branches, 1)
    }

    /// `pooled` is the pooled `x`: the last two blocks pool in different ways.
    fn block_7(&self, block: &str, x: Tensor<B, 4>, pooled: Tensor<B, 4>) -> Tensor<B, 4> {
        let narrow = self.branch(block, &["branch3x3_1"], &x);
        let double = self.branch(block, &["branch3x3dbl_1", "branch3x3dbl_2"], &x);
        let branches = vec![
            self.branch(block, &["branch1x1"], &x),
            self.branch(block, &["branch3x3_2a"], &narrow),
            self.branch(block, &["branch3x3_2b"], &narrow),
            self.branch(block, &["branch3x3dbl_3a"], &double),
            self.branch(block, &["branch3x3dbl_3b"], &double),
            self.branch(block, &["branch_pool"], &pooled),
        ];
        Tensor::cat(branches, 1)
    }
}

/// The maximum of 3 x 3 values.
fn max_pool<B: Backend>(x: Tensor<B, 4>, stride: usize, padding: usize) -> Tensor<B, 4> {
    module::max_pool2d(x, [3; 2], [stride; 2], [padding; 2], [1; 2], false)
}

/// The mean of 3 x 3 values; at the border, of those inside.
fn average_pool<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    module::avg_pool2d(x, [3; 2], [1; 2], [1; 2], false, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_are_taken_from_the_corner_not_from_the_centre() {
        // Two pixels, 0 and 255: place i lies at 2 i / 299, so the second half is beyond the last
        // pixel.
        let images = Images::new(vec![0, 255], [1, 1, 2, 1]).unwrap();
        let x = prepare::<burn_ndarray::NdArray>(&images, &Default::default()).unwrap();
        assert_eq!(x.dims(), [1, 3, SIDE, SIDE]);
        let values = x.into_data().to_vec::<f32>().unwrap();
        let expected = |share: f32| (255.0 * share - 128.0) / 128.0;
        for (place, share) in [
            (0, 0.0),
            (1, 2.0 / 299.0),
            (149, 298.0 / 299.0),
            (150, 1.0),
            (298, 1.0),
        ] {
            // One or two roundings of numbers below one.
            assert!((values[place] - expected(share)).abs() < 1e-6, "{place}");
        }
        // A single channel is repeated, and so is a single row.
        assert!(values.chunks(SIDE).all(|row| row == &values[..SIDE]));
    }

    #[test]
    fn pictures_of_no_use_are_an_error() {
        for shape in [[1, 2, 2, 4], [1, 2, 2, 2], [1, 0, 2, 3], [1, 2, 0, 3]] {
            let images = Images::new(vec![0; shape.iter().product()], shape).unwrap();
            let error = prepare::<burn_ndarray::NdArray>(&images, &Default::default()).unwrap_err();
            assert!(error.to_string().contains(&format!("{shape:?}")), "{error}");
        }
    }

    #[test]
    fn all_that_is_wrong_with_weights_is_listed() {
        let mut state: StateDict = shapes()
            .into_iter()
            .map(|(name, shape)| {
                let shape = if name == "fc.bias" { vec![7] } else { shape };
                let data = Vec::new();
                (name, crate::state::Array { shape, data })
            })
            .collect();
        state.remove("Mixed_6d.branch1x1.bn.running_var");
        let empty = crate::state::Array::new([0], Vec::new());
        state.insert(
            "Mixed_6d.branch1x1.bn.num_batches_tracked".to_owned(),
            empty.clone(),
        );
        state.insert("AuxLogits.fc.weight".to_owned(), empty);
        let device = Default::default();
        let error = Inception::<burn_ndarray::NdArray>::new(state, Path::new("w.pth"), &device)
            .unwrap_err()
            .to_string();
        let lines: Vec<&str> = error.lines().skip(1).collect();
        assert_eq!(
            lines,
            [
                "  missing   Mixed_6d.branch1x1.bn.running_var [192]",
                "  misshapen fc.bias: expected [1008], found [7]",
                "  surplus   AuxLogits.fc.weight [0]",
            ],
            "{error}"
        );
    }
}
