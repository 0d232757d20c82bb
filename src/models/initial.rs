//! Initial weights, by parameter name and shape, from the keyed host generator.

use crate::random::{self, Stream};
use crate::state::{Array, StateDict};

/// Fills a state dict of a fresh network: DiT's rules (Xavier for linear layers and patches, 0.02
/// normals for the embedders, zeros for modulations and the final projection), the same for most of
/// a UNet's, and Kaiming for what is called `conv…` or `features…`: the classifier's ReLU layers,
/// and a UNet's first.
pub fn initialise(state: &mut StateDict, seed: u64) {
    for (index, (name, array)) in state.iter_mut().enumerate() {
        let fan_out = array.shape[0];
        let fan_in = array.data.len() / fan_out;
        let count = array.data.len();
        let index = index as u64;
        let normal = |std: f64| {
            random::normal(seed, Stream::Weights, 0, index, count)
                .into_iter()
                .map(|z| (f64::from(z) * std) as f32)
                .collect()
        };
        let uniform = |bound: f64| {
            random::uniform(
                seed,
                Stream::Weights,
                0,
                index,
                count,
                (-bound as f32, bound as f32),
            )
        };
        // Biases, and scales of norms, have one dimension.
        if array.shape.len() == 1
            || name == "pos_embed"
            || name.contains("adaLN_modulation")
            || name.ends_with("final_layer.linear.weight")
            || name == "conv_out.weight"
        {
            continue;
        }
        let embeds = ["t_embedder", "y_embedder", "class_embedding"];
        // MAR's, of whose embedders only the labels' and the times' are called so.
        let placed = [
            "class_emb.",
            "fake_latent",
            "mask_token",
            "diffloss.net.time_embed",
        ];
        let embeds = embeds.iter().chain(&placed);
        let learned = name.ends_with("pos_embed_learned");
        array.data = if learned || embeds.clone().any(|embeds| name.starts_with(embeds)) {
            normal(0.02)
        } else if name.starts_with("conv") || name.starts_with("features") {
            normal((2.0 / fan_in as f64).sqrt())
        } else {
            uniform((6.0 / (fan_in + fan_out) as f64).sqrt())
        };
    }
}

/// Fills the A matrices of low-rank updates as PEFT does (Kaiming uniform with a = √5, so bound
/// 1/√in); B stays zero, so that training starts at the pretrained function.
pub fn initialise_lora(state: &mut StateDict, seed: u64) {
    for (index, (name, Array { shape, data })) in state.iter_mut().enumerate() {
        if name.ends_with(".lora_a.weight") {
            let bound = 1.0 / (shape[1] as f32).sqrt();
            *data = random::uniform(
                seed,
                Stream::Weights,
                1,
                index as u64,
                data.len(),
                (-bound, bound),
            );
        }
    }
}
