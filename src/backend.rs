//! The backend, chosen at run time; all other code is generic over it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    /// The CPU.
    Ndarray,
    /// Any GPU with Vulkan, Metal, DirectX 12 or WebGPU.
    Wgpu,
    /// An NVIDIA GPU.
    Cuda,
    /// LibTorch, on the GPU that it finds or on the CPU.
    Torch,
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ndarray => "ndarray",
            Self::Wgpu => "wgpu",
            Self::Cuda => "cuda",
            Self::Torch => "torch",
        })
    }
}

/// Type of the factors of matrix products; weights, sums and everything else stay f32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// 32-bit floats.
    #[default]
    F32,
    /// bfloat16, if the backend has it; on processors faster than f32 with AVX512-BF16 alone.
    Bf16,
}

impl BackendKind {
    /// The backends in this binary; the best for a plain run comes first.
    pub const BUILT: &'static [Self] = &[
        #[cfg(feature = "ndarray")]
        Self::Ndarray,
        #[cfg(feature = "wgpu")]
        Self::Wgpu,
        #[cfg(feature = "cuda")]
        Self::Cuda,
        #[cfg(feature = "torch")]
        Self::Torch,
    ];

    /// Why this backend can't be used, if it can't.
    pub fn missing(self) -> Option<String> {
        let built: Vec<String> = Self::BUILT.iter().map(ToString::to_string).collect();
        (!Self::BUILT.contains(&self)).then(|| {
            format!("this program was built without the backend `{self}` (it has: {}); build it with `cargo build --release --features {self}`", built.join(", "))
        })
    }
}

/// Burn's `wgpu` without its fusion of operators, whichever features of `burn-wgpu` another crate
/// turns on: the kernels of [`FusedOps`](crate::ops::FusedOps) are of this type.
#[cfg(feature = "wgpu")]
pub type Wgpu = burn_cubecl::CubeBackend<burn_wgpu::WgpuRuntime, f32, i32, u32>;

/// Burn's `cuda`, likewise.
#[cfg(feature = "cuda")]
pub type Cuda = burn_cubecl::CubeBackend<burn_cubecl::cubecl::cuda::CudaRuntime, f32, i32, u8>;

/// The first of CUDA, Metal and the CPU that this LibTorch has a device of; `index` counts the GPUs
/// of CUDA.
#[cfg(feature = "torch")]
pub fn torch_device(index: usize) -> burn_tch::LibTorchDevice {
    if tch::Cuda::is_available() {
        burn_tch::LibTorchDevice::Cuda(index)
    } else if tch::utils::has_mps() {
        burn_tch::LibTorchDevice::Mps
    } else {
        burn_tch::LibTorchDevice::Cpu
    }
}

/// Runs `$body` with the type `$B` bound to the training backend of a [`BackendKind`] and `$device`
/// to its default device; of several workers on a machine with CUDA, each has one of its own. For a
/// [`missing`](BackendKind::missing) kind, evaluates `$absent` instead.
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
                type $B = burn::backend::Autodiff<$crate::backend::Wgpu>;
                let $device = &burn_wgpu::WgpuDevice::default();
                $body
            }
            #[cfg(feature = "cuda")]
            $crate::backend::BackendKind::Cuda => {
                type $B = burn::backend::Autodiff<$crate::backend::Cuda>;
                let $device = &burn_cuda::CudaDevice {
                    index: $crate::workers::device(),
                };
                $body
            }
            #[cfg(feature = "torch")]
            $crate::backend::BackendKind::Torch => {
                type $B = burn::backend::Autodiff<burn_tch::LibTorch>;
                let $device = &$crate::backend::torch_device($crate::workers::device());
                $body
            }
            #[allow(unreachable_patterns)]
            _ => $absent,
        }
    };
}
