//! What a recipe needs and does not find: all of it at once, with where to get it.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::data::fashion;
use crate::recipe::RecipeError;
use crate::recipe::published::public_file;

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A diffusion network.
    Weights,
    /// An autoencoder.
    Vae,
    /// The network that evaluation measures in.
    Inception,
    /// A reference batch.
    Reference,
    /// An archive of samples.
    Samples,
    /// A folder of images.
    Images,
    /// A folder of latents.
    Latents,
    /// The files of Fashion-MNIST.
    Fashion,
}

impl Role {
    fn what(self) -> &'static str {
        match self {
            Self::Weights => "the weights of a diffusion network",
            Self::Vae => {
                "an autoencoder: a folder with config.json and diffusion_pytorch_model.safetensors"
            }
            Self::Inception => "the Inception network that FID is measured in",
            Self::Reference => {
                "a reference batch, as ADM's evaluation reads it, or a folder of pictures"
            }
            Self::Samples => {
                "an archive of samples, as ADM's evaluation reads it, or a folder of pictures"
            }
            Self::Fashion => fashion::HOW_TO_GET,
            Self::Images => "a folder with one folder of images for each class, or a flat one",
            Self::Latents => {
                "latents of the training images; `tinyfusion extract IMAGES THIS_FOLDER --vae VAE` makes them"
            }
        }
    }
}

/// A file or folder that is not there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MissingFile {
    /// Where it is looked for, and so where to put it.
    pub path: PathBuf,
    /// What it is for.
    pub role: Role,
    /// The stages that need it.
    pub stages: Vec<String>,
}

/// Refuses to begin while anything is missing.
///
/// # Errors
/// When the list is not empty; the message is the list.
pub(crate) fn refuse(missing: &[MissingFile]) -> Result<(), RecipeError> {
    match missing.is_empty() {
        true => Ok(()),
        false => {
            let list = Missing(missing).to_string();
            Err(RecipeError::Run(list.trim_end().to_owned()))
        }
    }
}

/// Says whether a path is there, and notes it if it is not.
pub(crate) fn note(missing: &mut Vec<MissingFile>, stage: &str, path: &Path, role: Role) -> bool {
    if path.exists() {
        return true;
    }
    match missing.iter_mut().find(|file| file.path == path) {
        Some(file) => {
            if !file.stages.iter().any(|name| name == stage) {
                file.stages.push(stage.to_owned());
            }
        }
        None => missing.push(MissingFile {
            path: path.to_owned(),
            role,
            stages: vec![stage.to_owned()],
        }),
    }
    false
}

/// The list, as a person reads it.
#[derive(Debug)]
pub struct Missing<'a>(pub &'a [MissingFile]);

impl fmt::Display for Missing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        let (noun, are) = if count == 1 {
            ("file", "is")
        } else {
            ("files", "are")
        };
        writeln!(
            f,
            "{count} {noun} {are} missing; put each where it is looked for:"
        )?;
        for file in self.0 {
            writeln!(f, "  {}", file.path.display())?;
            match public_file(&file.path) {
                Some(public) => {
                    writeln!(f, "      {}, {}", public.what, public.size)?;
                    writeln!(f, "      from {}", public.from)?;
                }
                None => writeln!(f, "      {}", file.role.what())?,
            }
            writeln!(f, "      for {}", file.stages.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_is_listed_once_with_where_it_comes_from() {
        let mut missing = Vec::new();
        for (stage, path, role) in [
            ("prune", "w/DiT-XL-2-256x256.pt", Role::Weights),
            ("recover", "w/DiT-XL-2-256x256.pt", Role::Weights),
            ("recover", "w/DiT-XL-2-256x256.pt", Role::Weights),
            ("prune", "no/latents", Role::Latents),
        ] {
            assert!(!note(&mut missing, stage, Path::new(path), role));
        }
        assert!(note(&mut missing, "prune", Path::new("."), Role::Images));
        let text = Missing(&missing).to_string();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(
            lines[0],
            "2 files are missing; put each where it is looked for:"
        );
        assert_eq!(lines[1], "w/DiT-XL-2-256x256.pt");
        assert!(lines[2].ends_with("2.7 GB"), "{text}");
        assert!(lines[3].starts_with("from https://"), "{text}");
        assert_eq!(lines[4], "for prune, recover");
        assert!(lines[6].contains("tinyfusion extract"), "{text}");
    }
}
