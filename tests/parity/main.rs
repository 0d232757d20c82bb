//! Parity with the PyTorch reference, on golden vectors.
//!
//! Vectors are read from the folder in `TINYFUSION_FIXTURES`, by default `tests/fixtures`; all
//! sizes, cases and tolerances come from the group's `case.json`. Each check is generic over the
//! backend: with the feature `ndarray` or `torch` all run on it. With the feature `wgpu` the model,
//! its gradients and optimisation steps run on wgpu, which needs an adapter (Mesa's software Vulkan
//! works).

// A test fails by panicking.
#![allow(clippy::unwrap_used)]
// On wgpu alone fewer checks run.
#![cfg_attr(
    not(any(feature = "ndarray", feature = "torch")),
    allow(dead_code, unused_macros)
)]

mod compare;
mod evaluator;
mod feature_shards;
mod fixture;
mod forward;
mod image_preprocess;
mod inception;
mod losses;
mod mar;
mod masks;
mod sampling;
mod schedule;
mod scores;
mod steps;
mod trajectory;
mod transport;
mod unet;
mod vae;
mod width;

/// Instantiates checks on a backend, as tests of a module.
macro_rules! on {
    ($name:ident, $backend:ty, $($module:ident::$check:ident),* $(,)?) => {
        mod $name {
            $(#[test]
            fn $check() {
                crate::$module::$check::<$backend>(1.0);
            })*
        }
    };
}

/// Every check on a backend of full precision, as tests of the modules `$name` and `$inference`.
#[cfg(any(feature = "ndarray", feature = "torch"))]
macro_rules! every_check_on {
    ($name:ident, $inference:ident, $backend:ty) => {
        on!(
            $name,
            burn::backend::Autodiff<$backend>,
            forward::dit_forward,
            forward::dit_weights,
            forward::prune_forward,
            forward::sit_forward,
            losses::distill_losses,
            mar::mar_forward,
            masks::prune_gate,
            sampling::dit_sampling,
            scores::prune_scores,
            steps::diffusion_steps,
            trajectory::prune_trajectory,
            trajectory::train_trajectory,
            transport::sit_losses,
            transport::sit_ode,
            transport::sit_paths,
            transport::sit_sde,
            unet::diff_pruning,
            vae::vae_kl16_mar,
            vae::vae_kl_f8,
            width::dit_width,
        );

        // Networks for inference only: without a graph, other kernels compute them.
        on!(
            $inference,
            $backend,
            inception::inception_fid,
            mar::mar_forward,
            mar::mar_sampling,
            mar::mar_zoo,
            vae::vae_kl16_mar,
            vae::vae_kl_f8,
            vae::vae_odd_slices,
            vae::vae_zoo,
        );
    };
}

#[cfg(feature = "ndarray")]
every_check_on!(ndarray, inference, burn_ndarray::NdArray);

#[cfg(feature = "torch")]
every_check_on!(torch, torch_inference, burn_tch::LibTorch);

/// The same on wgpu. The slack allows for f32 transcendental functions, which WGSL allows to differ
/// by many units in the last place (`exp` by 3 + 2|x|); the timestep embedding passes this on.
#[cfg(feature = "wgpu")]
mod wgpu {
    type B = burn::backend::Autodiff<tinyfusion::backend::Wgpu>;
    const SLACK: f64 = 10.0;

    #[test]
    fn forward_gradients_and_steps() {
        crate::forward::dit_forward::<B>(SLACK);
        crate::forward::prune_forward::<B>(SLACK);
        crate::losses::distill_losses::<B>(SLACK);
        crate::trajectory::train_steps::<B>(SLACK, 2);
        crate::forward::sit_forward::<B>(SLACK);
        crate::transport::sit_losses::<tinyfusion::backend::Wgpu>(SLACK);
    }

    #[test]
    fn autoencoder() {
        crate::vae::vae_kl_f8::<tinyfusion::backend::Wgpu>(SLACK);
    }
}
