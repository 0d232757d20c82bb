//! The public files that the paper's recipes start from: content, size and address.

use std::path::Path;

use crate::models::Architecture;
use crate::process::ProcessKind;

/// A published file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicFile {
    /// Its published file name, by which a recipe's path is recognised.
    pub name: &'static str,
    /// Description of its content.
    pub what: &'static str,
    /// Its size, with a unit.
    pub size: &'static str,
    /// Its source: the address where its project publishes it, or the command that makes it.
    pub from: &'static str,
    /// The published model it holds, if it holds one.
    model: Option<&'static str>,
}

impl PublicFile {
    /// The architecture, if it is a diffusion network of the zoo.
    pub fn architecture(&self) -> Option<Architecture> {
        Architecture::preset(self.model?)
    }

    /// The process it was trained under, if it is a diffusion network; the file itself may not
    /// state it.
    pub fn process(&self) -> Option<ProcessKind> {
        match self.model {
            Some(model) => ProcessKind::of_model(model),
            None => (self.name == STANDIN_NETWORK).then_some(ProcessKind::ASSUMED),
        }
    }
}

/// The stand-in for a published diffusion network.
const STANDIN_NETWORK: &str = "standin-dit.pt";

const MAR_AUTOENCODER: &str = "kl16.ckpt";

/// Source of the stand-ins in `recipes/standin.toml`.
const STANDIN: &str = "`tinyfusion standin FOLDER`, which makes all stand-ins";

const FILES: [PublicFile; 18] = [
    PublicFile {
        name: "DiT-XL-2-256x256.pt",
        what: "DiT-XL/2 of ImageNet, 256 x 256, CC BY-NC 4.0",
        size: "2.7 GB",
        from: "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt",
        model: Some("DiT-XL/2"),
    },
    PublicFile {
        name: "SiT-XL-2-256x256.pt",
        what: "SiT-XL/2 of ImageNet, 256 x 256",
        size: "2.7 GB",
        from: "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0",
        model: Some("SiT-XL/2"),
    },
    PublicFile {
        name: "TinyDiT-D14-MaskedKD-500K.pt",
        what: "TinyDiT-D14, healed for 500,000 steps",
        size: "1.4 GB",
        from: "https://github.com/VainF/TinyFusion/releases/download/v1.0.0/TinyDiT-D14-MaskedKD-500K.pt",
        model: Some("DiT-D14/2"),
    },
    PublicFile {
        name: "mar_large.pth",
        what: "MAR-L of ImageNet, 256 x 256, there called checkpoint-last.pth, MIT",
        size: "3.7 GB",
        from: "https://www.dropbox.com/scl/fi/pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt&dl=0",
        model: Some("MAR-L"),
    },
    PublicFile {
        name: MAR_AUTOENCODER,
        what: "MAR's autoencoder, which reduces a picture's sides sixteen times",
        size: "0.3 GB",
        from: "https://www.dropbox.com/scl/fi/hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=0",
        model: None,
    },
    PublicFile {
        name: "ddpm-cifar10-32",
        what: "DDPM's UNet of CIFAR-10: a folder with config.json and the weights, Apache 2.0",
        size: "143 MB",
        from: "https://huggingface.co/google/ddpm-cifar10-32",
        model: Some("UNet-CIFAR10"),
    },
    PublicFile {
        name: "ddpm-ema-celebahq-256",
        what: "DDPM's UNet of CelebA-HQ, 256 x 256: a folder with config.json and the weights, Apache 2.0",
        size: "455 MB",
        from: "https://huggingface.co/google/ddpm-ema-celebahq-256",
        model: Some("UNet-256"),
    },
    PublicFile {
        name: "ddpm-ema-church-256",
        what: "DDPM's UNet of LSUN Church, 256 x 256: a folder with config.json and the weights, Apache 2.0",
        size: "455 MB",
        from: "https://huggingface.co/google/ddpm-ema-church-256",
        model: Some("UNet-256"),
    },
    PublicFile {
        name: "ddpm-ema-bedroom-256",
        what: "DDPM's UNet of LSUN Bedroom, 256 x 256: a folder with config.json and the weights, Apache 2.0",
        size: "455 MB",
        from: "https://huggingface.co/google/ddpm-ema-bedroom-256",
        model: Some("UNet-256"),
    },
    PublicFile {
        name: "sd-vae-ft-mse",
        what: "Stable Diffusion's autoencoder: a folder with config.json and diffusion_pytorch_model.safetensors",
        size: "335 MB",
        from: "https://huggingface.co/stabilityai/sd-vae-ft-mse",
        model: None,
    },
    PublicFile {
        name: "sd-vae-ft-ema",
        what: "Stable Diffusion's autoencoder: a folder with config.json and diffusion_pytorch_model.safetensors",
        size: "335 MB",
        from: "https://huggingface.co/stabilityai/sd-vae-ft-ema",
        model: None,
    },
    PublicFile {
        name: "pt_inception-2015-12-05-6726825d.pth",
        what: "the Inception network that FID is measured in",
        size: "95 MB",
        from: "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        model: None,
    },
    PublicFile {
        name: "VIRTUAL_imagenet256_labeled.npz",
        what: "ADM's reference batch of ImageNet, 256 x 256",
        size: "2.0 GB",
        from: "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
        model: None,
    },
    PublicFile {
        name: "ILSVRC2012_img_train",
        what: "the training images of ImageNet: a folder with one folder for each of the 1,000 classes",
        size: "138 GB",
        from: "https://www.image-net.org/download.php",
        model: None,
    },
    PublicFile {
        name: STANDIN_NETWORK,
        what: "a random stand-in for DiT-XL/2",
        size: "0.4 MB",
        from: STANDIN,
        model: None,
    },
    PublicFile {
        name: "standin-vae",
        what: "a random stand-in for an autoencoder",
        size: "0.2 MB",
        from: STANDIN,
        model: None,
    },
    PublicFile {
        name: "standin-inception.pth",
        what: "a stand-in for Inception, its weights by formula",
        size: "95 MB",
        from: STANDIN,
        model: None,
    },
    PublicFile {
        name: "standin-reference.npz",
        what: "a stand-in for a reference batch",
        size: "0.4 MB",
        from: STANDIN,
        model: None,
    },
];

/// The public file that a path names by its last part.
pub fn public_file(path: &Path) -> Option<&'static PublicFile> {
    let name = path.file_name()?;
    FILES.iter().find(|file| name == file.name)
}

/// By how much an autoencoder that is not there yet reduces a picture's sides: MAR's by 16, all
/// others known by 8.
pub fn reduction(autoencoder: &Path) -> usize {
    let mars = autoencoder
        .file_name()
        .is_some_and(|name| name == MAR_AUTOENCODER);
    if mars { 16 } else { 8 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_name_wherever_they_lie() {
        let teacher = public_file(Path::new("weights/DiT-XL-2-256x256.pt")).unwrap();
        let Some(Architecture::Dit(config)) = teacher.architecture() else {
            panic!("{teacher:?}")
        };
        assert_eq!(
            (config.depth, config.width, config.input_size),
            (28, 1152, 32)
        );
        assert!(
            public_file(Path::new("x/sd-vae-ft-mse"))
                .unwrap()
                .architecture()
                .is_none()
        );
        assert_eq!(public_file(Path::new("x.pt")), None);
        let reduced = ["x/kl16.ckpt", "x/sd-vae-ft-mse"].map(|path| reduction(Path::new(path)));
        assert_eq!(reduced, [16, 8]);
        for file in FILES {
            assert_eq!(
                file.model.is_some(),
                file.architecture().is_some(),
                "{file:?}"
            );
            let is_dit = file.model.is_some() || file.name == "standin-dit.pt";
            let process = is_dit.then_some(match file.name {
                name if name.starts_with("SiT") => ProcessKind::SIT,
                name if name.starts_with("mar_") => ProcessKind::Masked,
                _ => ProcessKind::Gaussian,
            });
            assert_eq!(file.process(), process, "{file:?}");
        }
    }
}
