//! Small stand-ins for the public files that the paper's recipes start from.
//!
//! Their quality is poor: weights are random numbers, images are drawn by formula. They have the
//! real files' formats, so that everything from an image folder to a table of scores can be run,
//! and tested, without a download.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use image::{Rgb, RgbImage};
use thiserror::Error;

use crate::files::{write_atomic, write_folder};
use crate::images::{Images, center_crop};
use crate::models::inception::formula_weights;
use crate::models::vae::VaeConfig;
use crate::models::{Architecture, Demand, Key, Keys, Network, Shape, Vae};
use crate::npz::{NpzError, write_samples};
use crate::process::ProcessKind;
use crate::random::{self, Stream};
use crate::state::{Array, StateDict, WeightsError, collect, names};
use crate::weights::{write_safetensors, write_torch};

/// Why the stand-ins could not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StandinError {
    /// The folder holds something.
    #[error("{}: is not empty; nothing is overwritten, name another folder", .0.display())]
    NotEmpty(PathBuf),
    /// A file or folder can't be written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// An error of weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// An error of the reference batch.
    #[error(transparent)]
    Npz(#[from] NpzError),
}

impl StandinError {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// Number of images, in equal parts of [`CLASSES`] classes.
pub const IMAGES: usize = 64;
/// Number of images in the reference batch: the first ones.
pub const REFERENCE: usize = 32;
/// Number of classes.
pub const CLASSES: usize = 4;
/// Side of the centre crop for the reference batch; the latents' side is an eighth of it.
pub const SIDE: usize = 64;

/// The diffusion transformer, of four layers.
pub fn network() -> Architecture {
    let samples = Shape {
        channels: 4,
        side: SIDE / 8,
        classes: CLASSES,
    };
    let mut sizes = Small;
    (ProcessKind::ASSUMED.family().read)(&mut sizes, samples)
}

/// A small network's sizes.
struct Small;

impl Keys for Small {
    fn integer(&mut self, key: Key<usize>, _: Option<Demand<'_>>) -> usize {
        match key.name {
            "width" => 32,
            "depth" => 4,
            "heads" => 2,
            _ => key.default,
        }
    }

    fn float(&mut self, key: Key<f64>) -> f64 {
        key.default
    }

    fn boolean(&mut self, _: &'static str, default: bool) -> bool {
        default
    }

    fn choice(&mut self, _: &'static str, _: &[&'static str]) -> usize {
        0
    }
}

/// The autoencoder's sizes.
pub fn vae() -> VaeConfig {
    VaeConfig {
        in_channels: 3,
        out_channels: 3,
        block_out_channels: vec![8, 8, 16, 16],
        layers_per_block: 1,
        latent_channels: 4,
        norm_num_groups: 4,
        encoder_attention: false,
        scaling_factor: 0.18215,
    }
}

/// Writes all stand-ins into a folder, which must be new or empty: `images/`, `standin-dit.pt`,
/// `standin-vae/`, `standin-inception.pth` (95 MB) and `standin-reference.npz`.
///
/// # Errors
/// When the folder holds anything, or can't be written.
pub fn make(folder: &Path) -> Result<(), StandinError> {
    if std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(StandinError::NotEmpty(folder.to_owned()));
    }
    write_folder(folder, fill, |error| StandinError::io(folder)(error))?;
    crate::tell!(
        "{}: {IMAGES} images, a diffusion transformer, an autoencoder, an Inception network and a reference batch, all random{}",
        folder.display(),
        match folder == Path::new("artifacts/standin") {
            true => "; `tinyfusion recipe standin` goes through them",
            false => "",
        }
    );
    Ok(())
}

fn fill(folder: &Path) -> Result<(), StandinError> {
    let mut crops = Vec::with_capacity(REFERENCE * SIDE * SIDE * 3);
    for index in 0..IMAGES {
        let class = index % CLASSES;
        let image = picture(index, class);
        if index < REFERENCE {
            crops.extend(center_crop(&image, SIDE));
        }
        let path = folder.join(format!("images/class-{class}/{index:03}.png"));
        write_atomic(&path, |file| {
            let encoder = image::codecs::png::PngEncoder::new(file);
            image
                .write_with_encoder(encoder)
                .map_err(std::io::Error::other)
        })
        .map_err(StandinError::io(&path))?;
    }
    let Ok(crops) = Images::new(crops, [REFERENCE, SIDE, SIDE, 3]) else {
        unreachable!("each crop has so many values")
    };
    write_samples(&folder.join("standin-reference.npz"), &crops, None)?;

    type B = burn_ndarray::NdArray;
    let network = network();
    let zeros = Network::<B>::zeros(&network, &Default::default());
    // What is no zero is fixed, as a table of positions is.
    let fixed = zeros
        .map(|zeros| collect::<B, _>(&zeros))
        .unwrap_or_default();
    let fixed = fixed
        .into_iter()
        .filter(|(_, array)| array.data.iter().any(|value| *value != 0.0));
    let mut state = noise(network.tensors(), 0.2);
    state.extend(fixed);
    write_torch(&folder.join("standin-dit.pt"), &state.into(), None)?;

    let vae_folder = folder.join("standin-vae");
    let weights = vae_folder.join("diffusion_pytorch_model.safetensors");
    write_safetensors(
        &weights,
        &noise(vae_tensors(), 0.3).into(),
        BTreeMap::new(),
        None,
    )?;
    let path = vae_folder.join("config.json");
    let text = format!("{:#}", serde_json::json!(vae()));
    write_atomic(&path, |file| file.write_all(text.as_bytes())).map_err(StandinError::io(&path))?;

    let inception = folder.join("standin-inception.pth");
    write_torch(&inception, &formula_weights(0).into(), None)?;
    Ok(())
}

/// Names and shapes of the autoencoder's weights.
fn vae_tensors() -> Vec<(String, Vec<usize>)> {
    type B = burn_ndarray::NdArray;
    let parameters = names::<B, _>(&Vae::<B>::zeros(&vae(), &Default::default()));
    parameters
        .into_iter()
        .map(|parameter| (parameter.name, parameter.shape))
        .collect()
}

/// Random weights: matrices are scaled by the number of summands, so that the size of values stays
/// the same from layer to layer; a norm's scale is about 1, its shift small.
fn noise(tensors: Vec<(String, Vec<usize>)>, spread: f32) -> StateDict {
    let fill = |(index, (name, shape)): (usize, (String, Vec<usize>))| {
        let count = shape.iter().product();
        let values = random::normal(0, Stream::Weights, 1, index as u64, count);
        let inputs: usize = shape.iter().skip(1).product();
        let (centre, scale) = match shape.len() {
            1 if name.ends_with(".weight") => (1.0, spread / 2.0),
            1 => (0.0, spread / 2.0),
            _ => (0.0, (inputs as f32).sqrt().recip()),
        };
        let values = values
            .into_iter()
            .map(|value| centre + scale * value)
            .collect();
        (name, Array::new(shape, values))
    };
    tensors.into_iter().enumerate().map(fill).collect()
}

/// A picture of a class: bands in the class's own direction, with individual colour and width.
fn picture(index: usize, class: usize) -> RgbImage {
    let (width, height) = (70 + 3 * (index as u32 % 9), 80);
    let period = 6.0 + (index / CLASSES) as f32;
    RgbImage::from_fn(width, height, |x, y| {
        let (x, y) = (x as f32, y as f32);
        let along = match class {
            0 => x,
            1 => y,
            2 => x + y,
            _ => (x - 35.0).hypot(y - 40.0),
        };
        let band = (along * std::f32::consts::TAU / period).sin();
        let tone = |phase: usize| {
            let tint = ((index * 37 + phase * 85) % 100) as f32;
            (128.0 + 60.0 * band + tint - 50.0).clamp(0.0, 255.0) as u8
        };
        Rgb([tone(0), tone(1), tone(2)])
    })
}
