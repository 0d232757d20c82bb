use serde_json::json;

use super::*;
use crate::random::{self, Stream};

#[test]
fn sizes_of_hostile_files_are_refused_before_anything_is_computed_with_them() {
    const VALUES: [u64; 12] = [
        0,
        1,
        2,
        3,
        4,
        8,
        64,
        4096,
        65_536,
        1 << 32,
        1 << 62,
        u64::MAX,
    ];
    let mut sound = [0; 4];
    for step in 0..4000 {
        let draw = |index: u64, below: usize| random::below(0, Stream::Bench, step, index, below);
        // Mostly what a network may have, and now and then anything.
        let value = |index: u64| match draw(1000 + index, 12) {
            0 => VALUES[draw(index, VALUES.len())],
            _ => VALUES[1 + draw(index, 6)],
        };
        let levels: Vec<u64> = (0..1 + draw(0, 3) as u64)
            .map(|level| value(10 + level))
            .collect();
        let attention: Vec<bool> = (0..1 + draw(1, 3)).map(|_| step % 2 == 0).collect();
        let block = json!({ "heads": value(20), "head_dim": value(21), "hidden": value(22) });
        let files = [
            json!({
                "family": "unet", "input_size": value(1), "channels": value(2), "classes": value(3),
                "levels": levels, "layers": value(4), "attention": attention, "norm_groups": value(5),
                "left": { "conv_in": value(6) },
            }),
            json!({
                "family": "dit", "input_size": value(1), "patch_size": value(2), "channels": value(3),
                "width": value(4), "depth": value(5), "heads": value(6), "mlp_ratio": value(7) as f64,
                "classes": value(8), "learn_sigma": true,
                "widths": {
                    "condition": value(9), "timestep": value(10),
                    "blocks": vec![&block; draw(2, 5)],
                },
            }),
            json!({
                "family": "mar", "input_size": value(1), "patch_size": value(2), "channels": value(3),
                "classes": value(4), "buffer": value(5), "mlp_ratio": value(6) as f64,
                "encoder": { "width": value(7), "depth": value(8), "heads": value(9) },
                "decoder": { "width": value(7), "depth": value(10), "heads": value(9) },
                "head_width": value(11), "head_depth": value(12),
            }),
            // Of blocks that are not whole, and of widths of its own.
            json!({
                "family": "mar", "input_size": value(1), "patch_size": value(2), "channels": value(3),
                "classes": value(4), "buffer": value(5), "mlp_ratio": value(6) as f64,
                "encoder": { "width": value(7), "depth": draw(3, 3), "heads": value(9) },
                "decoder": { "width": value(8), "depth": draw(4, 3), "heads": value(9) },
                "head_width": value(11), "head_depth": 1 + draw(5, 2),
                "blocks": vec![["whole", "pair", "whole", "mlp"][draw(6, 4)]; draw(7, 5)],
                "widths": {
                    "blocks": vec![&block; draw(8, 5)], "condition": value(12),
                    "timestep": value(13), "head": vec![value(14); 1 + draw(9, 2)],
                },
            }),
        ];
        for (file, sound) in files.into_iter().zip(&mut sound) {
            let Ok(architecture) = serde_json::from_value::<Architecture>(file) else {
                continue;
            };
            if architecture.problem().is_some() {
                continue;
            }
            *sound += 1;
            // None of these may overflow, divide by 0, or index what is not there.
            let _ = (
                architecture.to_string(),
                architecture.macs(),
                architecture.tensors(),
            );
            let _ = (architecture.kept_bytes(1), architecture.pass_bytes(1));
            let groups = architecture.channel_groups().unwrap_or_default();
            assert!(groups.iter().all(|group| group.channels > 0));
        }
    }
    // The largest that no rule refuses, with the largest batch.
    let largest = [
        json!({
            "family": "unet", "input_size": 4096, "channels": 1024, "classes": 1_000_000,
            "levels": [8192, 8192, 8192, 8192, 8192, 8192, 8192, 8192], "layers": 16,
            "attention": [false, false, false, false, true, true, true, true], "norm_groups": 1024,
        }),
        json!({
            "family": "dit", "input_size": 4096, "patch_size": 16, "channels": 1024,
            "width": 65_536, "depth": 4096, "heads": 1024, "mlp_ratio": 64.0,
            "classes": 1_000_000, "learn_sigma": true,
        }),
        json!({
            "family": "mar", "input_size": 4096, "patch_size": 16, "channels": 1024,
            "classes": 1_000_000, "buffer": 4096, "mlp_ratio": 64.0,
            "encoder": { "width": 65_536, "depth": 4096, "heads": 1024 },
            "decoder": { "width": 65_536, "depth": 4096, "heads": 1024 },
            "head_width": 65_536, "head_depth": 1024,
        }),
    ];
    for file in largest {
        let architecture: Architecture = serde_json::from_value(file).unwrap();
        assert_eq!(architecture.problem(), None);
        assert!(architecture.macs() > 1 << 50);
        let _ = (
            architecture.kept_bytes(65_536),
            architecture.recomputed_bytes(65_536),
            architecture.pass_bytes(65_536),
        );
    }
    // All kinds were met.
    assert!(sound.iter().all(|sound| *sound > 0), "{sound:?}");
}

#[test]
fn pairs_of_which_some_are_gone_are_not_all_layers() {
    let whole = Architecture::preset("DiT-S/2").unwrap();
    let paired = whole.in_pairs().unwrap();
    let firsts = [0, 2, 4, 6, 8, 10];
    assert_eq!(paired.pairs_of(&firsts, 12), Some(6));
    assert_eq!(whole.pairs_of(&firsts, 12), None);
    // Three pairs are six layers, as many as there were pairs.
    let kept = [0, 3, 5];
    let pruned = paired.keep(&kept, Granularity::Block);
    assert_eq!(pruned.pairs_of(&kept, 6), None);
}
