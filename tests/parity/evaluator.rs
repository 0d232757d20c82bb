//! Golden vectors of the reference evaluator: fixture groups `evaluator` and `npz`.

use std::fs;
use std::path::PathBuf;

use safetensors::SafeTensors;
use serde_json::Value;
use tinyfusion::evaluation::{
    Distances, Features, Statistics, StatisticsAccumulator, frechet_distance, inception_score,
    neighbour_radii, precision_recall, precision_recall_with, read_reference_statistics,
};
use tinyfusion::npz::{read_samples, write_samples};

fn group(name: &str) -> PathBuf {
    crate::fixture::Group::open(name).path
}

fn json(group_name: &str, file: &str) -> Value {
    let path = group(group_name).join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

fn floats(tensors: &SafeTensors, key: &str) -> Vec<f32> {
    let bytes = tensors.tensor(key).unwrap().data();
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|&item| f32::from_le_bytes(item))
        .collect()
}

fn features(tensors: &SafeTensors, key: &str) -> Features {
    let dim = tensors.tensor(key).unwrap().shape()[1];
    Features::new(dim, floats(tensors, key)).unwrap()
}

/// Adds batches of 37 rows, so that merging is tested too.
fn statistics(features: &Features) -> Statistics {
    let mut accumulator = StatisticsAccumulator::new(features.dim());
    for batch in features.data().chunks(37 * features.dim()) {
        accumulator
            .push(&Features::new(features.dim(), batch.to_vec()).unwrap())
            .unwrap();
    }
    accumulator.finish().unwrap()
}

fn worst<'a>(found: impl IntoIterator<Item = &'a f64>, expected: &[f32]) -> f64 {
    let found: Vec<f64> = found.into_iter().copied().collect();
    assert_eq!(found.len(), expected.len());
    found
        .iter()
        .zip(expected)
        .map(|(a, &e)| (a - f64::from(e)).abs())
        .fold(0.0, f64::max)
}

/// softmax(activations @ weights), in `f64`.
fn softmax(activations: &Features, weights: &Features) -> Features {
    let classes = weights.dim();
    let mut rows = Vec::new();
    for index in 0..activations.rows() {
        let row = activations.row(index);
        let logits: Vec<f64> = (0..classes)
            .map(|class| {
                let column = (0..weights.rows()).map(|input| weights.row(input)[class]);
                row.iter()
                    .zip(column)
                    .map(|(&a, w)| f64::from(a) * f64::from(w))
                    .sum()
            })
            .collect();
        let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = logits.iter().map(|logit| (logit - most).exp()).sum();
        rows.extend(
            logits
                .iter()
                .map(|logit| ((logit - most).exp() / total) as f32),
        );
    }
    Features::new(classes, rows).unwrap()
}

#[test]
fn measures_match_the_reference() {
    let (case, expected) = (
        json("evaluator", "case.json"),
        json("evaluator", "expected.json"),
    );
    let bytes = fs::read(group("evaluator").join("activations.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let neighbours = case["k"].as_u64().unwrap() as usize;
    let split_size = case["inception_score_split_size"].as_u64().unwrap() as usize;
    let sets = case["sets"].as_array().unwrap();
    assert_eq!(sets.len(), 5);

    for set in sets.iter().map(|set| set.as_str().unwrap()) {
        let number = |key: &str| expected[set][key].as_f64().unwrap();
        let reference = features(&tensors, &format!("{set}.ref"));
        let sample = features(&tensors, &format!("{set}.sample"));

        for (side, points) in [("ref", &reference), ("sample", &sample)] {
            let moments = statistics(points);
            let key = |suffix: &str| format!("{set}.{side}_{suffix}");
            // Tolerances as stated in case.json; the expected moments are rounded to f32.
            let mean = worst(moments.mean(), &floats(&tensors, &key("mu")));
            assert!(
                mean <= case["tolerance"]["mu"].as_f64().unwrap(),
                "{set} {side} mu {mean:e}"
            );
            let sigma = worst(moments.covariance(), &floats(&tensors, &key("sigma")));
            assert!(
                sigma <= case["tolerance"]["sigma"].as_f64().unwrap(),
                "{set} {side} {sigma:e}"
            );
            let radii = neighbour_radii(points, neighbours).unwrap();
            for (found, expected) in radii.iter().zip(floats(&tensors, &key("radii"))) {
                // The reference computes radii in f32, by the expansion, which has cancellation.
                let error = (found / f64::from(expected) - 1.0).abs();
                assert!(error < 1e-5, "{set} {side} radius {found} {expected}");
            }
        }

        let fid = frechet_distance(&statistics(&reference), &statistics(&sample)).unwrap();
        let error = (fid - number("fid")).abs();
        assert!(
            error <= 1e-5 * number("fid").abs().max(1.0),
            "{set} FID {fid}"
        );
        if set == "identical" {
            assert!(fid.abs() <= 1e-4, "identical FID {fid:e}");
        }

        let score = precision_recall(&reference, &sample, neighbours).unwrap();
        assert!(
            (score.precision - number("precision")).abs() <= 1e-9,
            "{set} {score:?}"
        );
        assert!(
            (score.recall - number("recall")).abs() <= 1e-9,
            "{set} {score:?}"
        );

        if expected[set]["inception_score"].is_null() {
            continue;
        }
        let probabilities = softmax(&sample, &features(&tensors, "softmax_w"));
        let splits = [
            ("inception_score", split_size),
            ("inception_score_one_split", 5000),
        ];
        for (key, size) in splits {
            let score = inception_score(&probabilities, size).unwrap();
            assert!(
                (score / number(key) - 1.0).abs() <= 1e-5,
                "{set} {key} {score}"
            );
        }
    }

    let probabilities = features(&tensors, "basic.softmax");
    let score = inception_score(&probabilities, split_size).unwrap();
    let stated = expected["basic"]["inception_score"].as_f64().unwrap();
    assert!(
        (score / stated - 1.0).abs() <= 1e-5,
        "given softmax {score}"
    );
    let splits = expected["basic"]["inception_score_per_split"]
        .as_array()
        .unwrap();
    let values = split_size * probabilities.dim();
    assert_eq!(probabilities.data().chunks(values).len(), splits.len());
    for (split, stated) in probabilities.data().chunks(values).zip(splits) {
        let split = Features::new(probabilities.dim(), split.to_vec()).unwrap();
        let score = inception_score(&split, split_size).unwrap();
        assert!(
            (score / stated.as_f64().unwrap() - 1.0).abs() <= 1e-5,
            "{score} {stated}"
        );
    }
}

/// The numbers of samples and of reference points that NumPy 2 finds covered in `float16`, which
/// sums products and squares in `float32` and rounds once, with `max((|u|^2 - 2 u.v) + |v|^2, 0)`
/// as in evaluator.py. The offset makes squared lengths large compared with distances, until
/// rounding decides.
const IN_HALF_PRECISION: [(f32, &str, f64, f64); 11] = [
    (2.0, "basic", 79.0, 156.0),
    (2.0, "spatial", 120.0, 120.0),
    (2.0, "dead_features", 116.0, 140.0),
    (4.0, "basic", 83.0, 155.0),
    (4.0, "spatial", 120.0, 124.0),
    (8.0, "basic", 82.0, 156.0),
    (8.0, "rank_deficient", 11.0, 14.0),
    (8.0, "dead_features", 117.0, 145.0),
    (16.0, "basic", 93.0, 157.0),
    (16.0, "spatial", 127.0, 146.0),
    (16.0, "rank_deficient", 11.0, 15.0),
];

#[test]
fn half_precision_matches_numpy() {
    let bytes = fs::read(group("evaluator").join("activations.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for (offset, set, samples_covered, reference_covered) in IN_HALF_PRECISION {
        let [reference, samples] = ["ref", "sample"].map(|side| {
            let points = features(&tensors, &format!("{set}.{side}"));
            let data = points.data().iter().map(|value| value + offset).collect();
            Features::new(points.dim(), data).unwrap()
        });
        let score = precision_recall_with(&reference, &samples, 3, Distances::F16).unwrap();
        let precision = samples_covered / samples.rows() as f64;
        let recall = reference_covered / reference.rows() as f64;
        assert_eq!(
            (score.precision, score.recall),
            (precision, recall),
            "{set} + {offset}"
        );
        let exact = precision_recall(&reference, &samples, 3).unwrap();
        assert!(
            exact.precision < score.precision || exact.recall < score.recall,
            "{set} + {offset} {exact:?}"
        );
    }
}

#[test]
fn archives_match_numpy() {
    let case = json("npz", "case.json");
    let bytes = fs::read(group("npz").join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let scratch = tempfile::tempdir().unwrap();

    let files = case["files"].as_object().unwrap();
    assert_eq!(files.len(), 6);
    for (file, members) in files {
        let samples = read_samples(&group("npz").join(file)).unwrap();
        let key = if file == "reference.npz" {
            "reference"
        } else {
            "samples"
        };
        let pixels = tensors.tensor(key).unwrap();
        assert_eq!(samples.images.shape(), pixels.shape(), "{file}");
        assert_eq!(samples.images.pixels(), pixels.data(), "{file}");

        let labels = members.get("arr_1").map(|_| {
            let items = tensors.tensor("labels").unwrap().data().as_chunks().0;
            items
                .iter()
                .map(|&item| i64::from_le_bytes(item))
                .collect::<Vec<_>>()
        });
        assert_eq!(samples.labels, labels, "{file}");

        let copy = scratch.path().join(file);
        write_samples(&copy, &samples.images, samples.labels.as_deref()).unwrap();
        assert_eq!(read_samples(&copy).unwrap(), samples, "{file}");
        let has_statistics = read_reference_statistics(&group("npz").join(file))
            .unwrap()
            .is_some();
        assert_eq!(has_statistics, members.get("mu").is_some(), "{file}");
    }

    let path = group("npz").join("reference.npz");
    let statistics = read_reference_statistics(&path).unwrap().unwrap();
    let spatial = statistics.spatial.unwrap();
    for (moments, suffix) in [(&statistics.pooled, ""), (&spatial, "_s")] {
        let mean = worst(moments.mean(), &floats(&tensors, &format!("mu{suffix}")));
        assert_eq!(mean, case["tolerance"]["mu"].as_f64().unwrap());
        let sigma = worst(
            moments.covariance(),
            &floats(&tensors, &format!("sigma{suffix}")),
        );
        assert!(
            sigma <= case["tolerance"]["sigma"].as_f64().unwrap(),
            "{sigma:e}"
        );
    }
}
