//! Networks for inference only: the autoencoder and Inception.

use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;

use super::checkpoint::CONFIG;
use super::open_weights;
use crate::files::sha256;
use crate::models::inception::Inception;
use crate::models::vae::{Vae, VaeConfig, rename_to_diffusers};
use crate::state::{Array, StateDict, WeightsError, assign};

/// A network with the file it was read from.
#[derive(Debug)]
pub struct Digested<N> {
    /// The network.
    pub network: N,
    /// The weight file.
    pub path: PathBuf,
    /// SHA-256 of that file.
    pub sha256: String,
}

/// Reads an autoencoder: a folder with diffusers' `config.json` and weights, or a weight file,
/// which may have that configuration beside it. Without a configuration, sizes are inferred.
///
/// # Errors
/// When a file can't be read or asks for an unsupported computation; one error names all tensors
/// that are missing, surplus or misshapen.
pub fn read_vae<B: Backend>(
    path: &Path,
    device: &B::Device,
) -> Result<(Digested<Vae<B>>, VaeConfig), WeightsError> {
    let (tensors, file) = open_weights(path)?;
    let mut state = tensors.read_all()?;
    rename_to_diffusers(&mut state);
    let config = config_of(&state, &file)?;
    // Checked before allocation: a small configuration may ask for any size.
    let (least, there) = (config.least_parameters(), tensors.parameters());
    if least > there {
        return Err(WeightsError::Model {
            path: file,
            problem: format!(
                "it holds {there} numbers, and an autoencoder of the sizes in {CONFIG} ({config}) more than {least}"
            ),
        });
    }
    // A tensor that does not fit is named as here.
    let renamed = tensors.iter().any(|(name, _)| !state.contains_key(name));
    let model = match renamed {
        true => format!("{config}, under diffusers' names"),
        false => config.to_string(),
    };
    let network = assign(Vae::zeros(&config, device), &state, &file, &model)?;
    let sha256 = sha256(&file).map_err(WeightsError::io(&file))?;
    let known = Digested {
        network,
        path: file,
        sha256,
    };
    Ok((known, config))
}

/// The sizes of an autoencoder, without its values: those of the `config.json` beside its weights,
/// or those that their shapes show.
///
/// # Errors
/// When there are no weights, they are no autoencoder's, or the configuration asks for an
/// unsupported computation.
pub fn vae_config(path: &Path) -> Result<VaeConfig, WeightsError> {
    let (tensors, file) = open_weights(path)?;
    let empty = |shape: &[usize]| Array {
        shape: shape.to_vec(),
        data: Vec::new(),
    };
    let mut shapes: StateDict = tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), empty(tensor.shape())))
        .collect();
    rename_to_diffusers(&mut shapes);
    config_of(&shapes, &file)
}

/// The sizes of the autoencoder whose tensors are called as diffusers'.
fn config_of(state: &StateDict, file: &Path) -> Result<VaeConfig, WeightsError> {
    let path = file.with_file_name(CONFIG);
    let text = match crate::files::read_text(&path) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(WeightsError::io(&path)(error)),
    };
    match text.filter(|text| !is_of_another(text)) {
        Some(text) => VaeConfig::from_json(&text).map_err(|found| WeightsError::Format {
            path,
            expected: "configuration of an autoencoder",
            found,
        }),
        None => {
            let model = |problem: String| WeightsError::Model {
                path: file.to_owned(),
                problem: format!("it is no autoencoder: {problem}"),
            };
            let config = VaeConfig::infer(state).map_err(model)?;
            config
                .problem()
                .map_or(Ok(config), |problem| Err(model(problem)))
        }
    }
}

/// Whether a configuration is of another kind of model that lies beside the weights.
fn is_of_another(text: &str) -> bool {
    let config = serde_json::from_str::<serde_json::Value>(text).ok();
    config.is_some_and(|config| {
        let class = config["_class_name"].as_str();
        config.is_object()
            && config["block_out_channels"].is_null()
            && class != Some("AutoencoderKL")
    })
}

/// Reads the Inception network for FID.
///
/// # Errors
/// When the file can't be read, or its tensors don't fit; one error names them all.
pub fn read_inception<B: Backend>(
    path: &Path,
    device: &B::Device,
) -> Result<Digested<Inception<B>>, WeightsError> {
    let (tensors, file) = open_weights(path)?;
    let network = Inception::new(tensors.read_all()?, &file, device)?;
    let sha256 = sha256(&file).map_err(WeightsError::io(&file))?;
    Ok(Digested {
        network,
        path: file,
        sha256,
    })
}
