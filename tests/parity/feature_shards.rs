//! Latents as the reference stores and reads them: fixture group `feature_shards`, exact.

use std::fs;

use tinyfusion::data::latents::{Dtype, Layout, ShardWriter, write_npy};
use tinyfusion::data::{Latents, Samples, view};

use crate::fixture::{Group, usize_of};

/// The reference's files: read, and read again after they were packed.
#[test]
fn latents_are_read_as_the_reference_reads_them() {
    let group = Group::open("feature_shards");
    let expected = group.file("expected.safetensors");
    let (features, labels) = (expected.get("features"), expected.get("labels"));
    let (batch_x, batch_y) = (expected.get("batch_x"), expected.get("batch_y"));
    let (samples, side) = (
        usize_of(&group.case["samples"]),
        usize_of(&group.case["latent_side"]),
    );
    let flip = group.case["flip"].as_f64().unwrap();
    let [_, views, channels, _, _] = features.shape[..] else {
        panic!("{:?}", features.shape)
    };

    let folder = tempfile::tempdir().unwrap();
    let layout = Layout {
        views,
        channels,
        side,
        dtype: Dtype::F32,
        classes: 1 + labels.indices().into_iter().max().unwrap(),
        records_per_shard: 4,
        scaling_factor: 0.18215,
    };
    let npy = Latents::open(&group.path).unwrap();
    let mut writer = ShardWriter::open(folder.path(), layout, Vec::new()).unwrap();
    let mut latent = vec![0.0; channels * side * side];
    for index in 0..samples {
        let mut both = Vec::new();
        for view in 0..views {
            npy.read(index, view, &mut latent).unwrap();
            both.extend_from_slice(&latent);
        }
        writer.push(&both, npy.label(index).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    let packed = Latents::open(folder.path()).unwrap();
    packed.verify().unwrap();

    for latents in [npy, packed] {
        assert_eq!((latents.count(), latents.views()), (samples, views));
        assert_eq!((latents.channels(), latents.side()), (channels, side));
        for index in 0..samples {
            let label = labels.indices()[index];
            for (number, values) in (0..views).map(|view| (view, features.row(index).row(view))) {
                assert_eq!(latents.read(index, number, &mut latent).unwrap(), label);
                let found: Vec<f64> = latent.iter().map(|value| f64::from(*value)).collect();
                assert!(found == values.data, "sample {index}, view {number}");
            }
            // What a trainer sees, given the uniform number.
            let u = expected.get("u").data[index];
            let chosen = view(views, u as f32);
            assert_eq!(chosen == 1, u < flip);
            assert_eq!(
                latents.read(index, chosen, &mut latent).unwrap(),
                batch_y.indices()[index]
            );
            let found: Vec<f64> = latent.iter().map(|value| f64::from(*value)).collect();
            assert!(found == batch_x.row(index).data, "batch, sample {index}");
        }
    }
}

/// What we write is what NumPy wrote, but for spaces in the header.
#[test]
fn latents_are_written_as_the_reference_writes_them() {
    let group = Group::open("feature_shards");
    let from = Latents::open(&group.path).unwrap();
    let (views, channels, side) = (from.views(), from.channels(), from.side());
    let folder = tempfile::tempdir().unwrap();
    let values = channels * side * side;
    let mut both = vec![0.0; views * values];
    for index in 0..from.count() {
        for (view, latent) in both.chunks_mut(values).enumerate() {
            from.read(index, view, latent).unwrap();
        }
        let label = from.label(index).unwrap();
        write_npy(folder.path(), index, [views, channels, side], &both, label).unwrap();
        for (kind, bytes) in [("features", 4 * views * values), ("labels", 8)] {
            let name = format!("imagenet256_{kind}/{index}.npy");
            let ours = fs::read(folder.path().join(&name)).unwrap();
            let theirs = fs::read(group.path.join(&name)).unwrap();
            assert_eq!(ours.len(), theirs.len(), "{name}");
            assert!(ours.ends_with(&theirs[theirs.len() - bytes..]), "{name}");
        }
    }
}

/// Names are listed in the byte order of Python's `sorted`.
#[test]
fn files_are_listed_in_the_references_order() {
    let group = Group::open("feature_shards");
    let order = group.case["lexicographic_order_of_12"].as_array().unwrap();
    let folder = tempfile::tempdir().unwrap();
    for index in 0..order.len() {
        write_npy(folder.path(), index, [1, 1, 1], &[0.0], index).unwrap();
    }
    let latents = Latents::open(folder.path()).unwrap();
    for (index, name) in order.iter().enumerate() {
        let label = latents.label(index).unwrap();
        assert_eq!(format!("{label}.npy"), name.as_str().unwrap());
    }
}
