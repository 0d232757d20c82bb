//! The centre crop and scaling of pictures: fixture group `image_preprocess`, exact.

use std::fs;

use safetensors::SafeTensors;
use tinyfusion::images::{CenterCrop, center_crop, read_rgb, to_chw};

use crate::fixture::{Group, usize_of, usizes_of};

#[test]
fn pictures_are_prepared_as_the_reference_does() {
    let group = Group::open("image_preprocess");
    let bytes = fs::read(group.path.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let sizes = usizes_of(&group.case["image_sizes"]);
    let cases = group.case["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let file = case["image"].as_str().unwrap();
        let (key, size) = (case["key"].as_str().unwrap(), usize_of(&case["image_size"]));
        assert!(sizes.contains(&size));

        let picture = read_rgb(&group.path.join(file)).unwrap();
        let stated = [usize_of(&case["width"]), usize_of(&case["height"])];
        let (width, height) = picture.dimensions();
        assert_eq!([width as usize, height as usize], stated, "{file}");
        let rgb = expected
            .tensor(&format!("{}.rgb", file.trim_end_matches(".png")))
            .unwrap();
        assert!(picture.as_raw() == rgb.data(), "{file}: pixels");

        let crop = center_crop(&picture, size);
        let wanted = expected.tensor(&format!("{key}.crop")).unwrap();
        assert_eq!(wanted.shape(), [size, size, 3]);
        assert!(crop == wanted.data(), "{key}: crop");
        let planned = CenterCrop::new(picture.dimensions(), size);
        assert!(planned.apply(&picture) == crop, "{key}: weights kept");

        let tensor = expected.tensor(&format!("{key}.tensor")).unwrap();
        assert_eq!(tensor.shape(), [3, size, size]);
        let wanted: Vec<f32> = tensor
            .data()
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect();
        assert!(to_chw(&crop, size, false) == wanted, "{key}: tensor");
        let mirrored: Vec<f32> = wanted
            .chunks(size)
            .flat_map(|row| row.iter().rev().copied())
            .collect();
        assert!(to_chw(&crop, size, true) == mirrored, "{key}: mirror");
    }
}
