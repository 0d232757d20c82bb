//! Latents in the reference's storage format, exact: fixture group `feature_shards`.

use std::fs;

use tinyfusion::data::latents::{Dtype, Layout, ShardWriter, write_npy};
use tinyfusion::data::{Latents, Samples, view};

use crate::fixture::{Group, usize_of};

/// A view as f64, and its label.
fn read(latents: &Latents, index: usize, view: usize) -> (Vec<f64>, usize) {
    let mut values = Vec::new();
    let label = latents.read(index, view, &mut values).unwrap();
    (values.into_iter().map(f64::from).collect(), label)
}

/// The reference's files, read directly and after packing.
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
    for index in 0..samples {
        let mut both = Vec::new();
        for view in 0..views {
            npy.read(index, view, &mut both).unwrap();
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
                let (found, read) = read(&latents, index, number);
                assert_eq!(read, label);
                assert!(found == values.data, "sample {index}, view {number}");
            }
            // The view that a trainer chooses, given the uniform number.
            let u = expected.get("u").data[index];
            let chosen = view(views, u as f32);
            assert_eq!(chosen == 1, u < flip);
            let (found, label) = read(&latents, index, chosen);
            assert_eq!(label, batch_y.indices()[index]);
            assert!(found == batch_x.row(index).data, "batch, sample {index}");
        }
    }
}

/// The written bytes are NumPy's, except for spaces in the header.
#[test]
fn latents_are_written_as_the_reference_writes_them() {
    let group = Group::open("feature_shards");
    let from = Latents::open(&group.path).unwrap();
    let (views, channels, side) = (from.views(), from.channels(), from.side());
    let folder = tempfile::tempdir().unwrap();
    for index in 0..from.count() {
        let mut both = Vec::new();
        for view in 0..views {
            from.read(index, view, &mut both).unwrap();
        }
        let label = from.label(index).unwrap();
        write_npy(folder.path(), index, [views, channels, side], &both, label).unwrap();
        for (kind, bytes) in [("features", 4 * both.len()), ("labels", 8)] {
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
