//! The choice of a backend, made once; everything behind it is generic.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where tensors live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    /// The processor.
    Ndarray,
    /// Any graphics card with Vulkan, Metal, DirectX 12 or WebGPU.
    Wgpu,
    /// An NVIDIA card.
    Cuda,
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ndarray => "ndarray",
            Self::Wgpu => "wgpu",
            Self::Cuda => "cuda",
        })
    }
}

/// Type that matrix products are computed in; weights, sums and everything else stay f32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// 32-bit floats.
    #[default]
    F32,
    /// Brain floats, where the backend has them.
    Bf16,
}

impl BackendKind {
    /// The backends this binary was built with, best for a plain run first.
    pub const BUILT: &'static [Self] = &[
        #[cfg(feature = "ndarray")]
        Self::Ndarray,
        #[cfg(feature = "wgpu")]
        Self::Wgpu,
        #[cfg(feature = "cuda")]
        Self::Cuda,
    ];

    /// Why this backend can't be used, if so.
    pub fn missing(self) -> Option<String> {
        let built: Vec<String> = Self::BUILT.iter().map(ToString::to_string).collect();
        (!Self::BUILT.contains(&self)).then(|| {
            format!("this program was built without the backend `{self}` (it has: {}); build it with `cargo build --release --features {self}`", built.join(", "))
        })
    }
}

/// Runs `$body` with the type `$B` bound to the training backend of a [`BackendKind`] and `$device` to its default
/// device. The kind must not be [`missing`](BackendKind::missing); `$absent` is evaluated if it is.
#[macro_export]
macro_rules! with_backend {
    ($kind:expr, $B:ident, $device:ident => $body:expr, else $absent:expr) => {
        match $kind {
            #[cfg(feature = "ndarray")]
            $crate::backend::BackendKind::Ndarray => {
                type $B = burn::backend::Autodiff<burn_ndarray::NdArray>;
                let $device = &burn_ndarray::NdArrayDevice::default();
                $body
            }
            #[cfg(feature = "wgpu")]
            $crate::backend::BackendKind::Wgpu => {
                type $B = burn::backend::Autodiff<burn_wgpu::Wgpu>;
                let $device = &burn_wgpu::WgpuDevice::default();
                $body
            }
            #[cfg(feature = "cuda")]
            $crate::backend::BackendKind::Cuda => {
                type $B = burn::backend::Autodiff<burn_cuda::Cuda>;
                let $device = &burn_cuda::CudaDevice::default();
                $body
            }
            #[allow(unreachable_patterns)]
            _ => $absent,
        }
    };
}
