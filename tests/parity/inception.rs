//! FID's network against torch-fidelity's port of the TensorFlow graph: group `inception_fid`.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Tensor;
use tinyfusion::images::Images;
use tinyfusion::models::inception::{Inception, formula_weights, prepare, shapes};
use tinyfusion::ops::FusedOps;

use crate::compare::Largest;
use crate::fixture::{File, Group, f64_of, usize_of, usizes_of};

/// Test pictures: the formula of case.json at sides `[count, channels, height, width]`, as NHWC.
fn pictures(salt: i64, sides: &[usize]) -> Images {
    let [count, height, width] = sides.try_into().unwrap();
    let mut pixels = Vec::new();
    let values = (0..count as i64).flat_map(|k| {
        (0..height as i64).flat_map(move |y| {
            (0..width as i64).flat_map(move |x| (0..3).map(move |c| (k, y, x, c)))
        })
    });
    for (k, y, x, c) in values {
        let v = (5 + 2 * c + k) * x + (3 + 3 * c) * y + x * y / (7 + c) + 37 * k + 61 * c + salt;
        pixels.push((255 - (v % 510 - 255).abs()) as u8);
    }
    Images::new(pixels, [count, height, width, 3]).unwrap()
}

/// Compares the formula with the stored pictures, NCHW.
fn stored(file: &File, key: &str, images: &Images) {
    if !file.names().any(|name| name == key) {
        return;
    }
    let expected = file.get(key);
    let [count, height, width, channels] = images.shape();
    assert_eq!(expected.shape, [count, channels, height, width]);
    for (index, value) in expected.data.iter().enumerate() {
        let (x, rest) = (index % width, index / width);
        let (y, rest) = (rest % height, rest / height);
        let (c, k) = (rest % channels, rest / channels);
        let pixel = images.image(k)[(y * width + x) * channels + c];
        assert_eq!(f64::from(pixel), *value, "{key} at {index}");
    }
}

pub fn inception_fid<B: FusedOps>(slack: f64) {
    let group = Group::open("inception_fid");
    let weights = &group.case["weights"];
    let state = formula_weights(weights["salt"].as_u64().unwrap());
    for (name, values) in weights["first_four_values"].as_object().unwrap() {
        for (index, expected) in values.as_array().unwrap().iter().enumerate() {
            let actual = state[name].data[index];
            assert_eq!(actual, f64_of(expected) as f32, "{name}[{index}]");
        }
    }
    let device = B::Device::default();
    let network = Inception::<B>::new(state.clone(), Path::new("formula"), &device).unwrap();
    let file = group.file("io.safetensors");
    let rule = |name: &str| Largest {
        tolerance: f64_of(&group.case["tolerance"][name]) * slack,
    };
    let (input, features, softmax) = (rule("input"), rule("features"), rule("softmax"));
    let images = &group.case["images"];
    for (name, sides) in images["sizes"].as_object().unwrap() {
        let key = |what: &str| format!("{name}.{what}");
        let pictures = pictures(images["salt"].as_i64().unwrap(), &usizes_of(sides));
        stored(&file, &key("image"), &pictures);

        let x = prepare::<B>(&pictures, &device).unwrap();
        let [count, channels, height, _] = x.dims();
        let sampled: Vec<i32> = (0..height as i32).step_by(23).collect();
        let sampled = || Tensor::from_data(sampled.as_slice(), &device);
        let every = x.clone().select(2, sampled()).select(3, sampled());
        assert_eq!(every.dims()[..2], [count, channels]);
        input.tensor(
            &key("input_every_23"),
            every,
            file.get(&key("input_every_23")),
        );

        let mut means = BTreeMap::new();
        let found = network.forward(x, |block, x| {
            let mean: Tensor<B, 2> = x.clone().flatten::<3>(2, 3).mean_dim(2).squeeze_dim(2);
            means.insert(block.to_owned(), mean);
        });
        let mut compared = 0;
        for (block, mean) in &means {
            // Three places have a second name, used by average pools.
            let alias = match block.as_str() {
                "max_pool_1" => Some("64"),
                "max_pool_2" => Some("192"),
                "Mixed_6e" => Some("768"),
                _ => None,
            };
            for key in [Some(key(&format!("block_mean.{block}"))), alias.map(key)]
                .into_iter()
                .flatten()
                .filter(|key| file.names().any(|name| name == key))
            {
                features.tensor(&key, mean.clone(), file.get(&key));
                compared += 1;
            }
        }
        let blocks = file.names().filter(|found| {
            let of_block =
                |rest: &str| rest.starts_with("block_mean.") || rest.parse::<usize>().is_ok();
            found
                .strip_prefix(name.as_str())
                .is_some_and(|rest| of_block(&rest[1..]))
        });
        assert_eq!(compared, blocks.count(), "{name}: blocks compared");

        for (what, actual) in [
            ("pool3", found.pool),
            ("spatial", found.spatial),
            ("logits_unbiased", found.logits.clone()),
        ] {
            features.tensor(&key(what), actual, file.get(&key(what)));
        }
        if file.names().any(|name| name == key("logits")) {
            let bias = Tensor::<B, 1>::from_floats(state["fc.bias"].data.as_slice(), &device);
            let logits = found.logits + bias.unsqueeze();
            features.tensor(&key("logits"), logits, file.get(&key("logits")));
        }
        softmax.tensor(
            &key("softmax"),
            found.probabilities,
            file.get(&key("softmax")),
        );
    }
}

#[test]
fn names_and_shapes_are_those_of_the_published_weights() {
    let group = Group::open("inception_fid");
    let name = group.case["weights"]["key_list"].as_str().unwrap();
    let text = std::fs::read_to_string(group.path.join(name)).unwrap();
    let zoo: serde_json::Value = serde_json::from_str(&text).unwrap();
    let expected: BTreeMap<String, Vec<usize>> = zoo["keys"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, shape)| (name.clone(), usizes_of(shape)))
        .collect();
    assert_eq!(shapes(), expected);
    let trained = shapes()
        .into_iter()
        .filter(|(name, _)| !name.contains(".running_"))
        .map(|(_, shape)| shape.iter().product::<usize>());
    assert_eq!(trained.sum::<usize>(), usize_of(&zoo["parameters"]));
}
