//! Small pictures, encoded by a small autoencoder with random weights.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn_ndarray::{NdArray, NdArrayDevice};
use image::{Rgb, RgbImage};

use super::written::SKIPPED;
use super::*;
use crate::data::Latents;
use crate::images::read_rgb;
use crate::state::{assign, collect};
use crate::workers::{Alone, fake};

/// An autoencoder of two levels with random weights.
fn vae() -> (Vae<NdArray>, VaeConfig) {
    let config = VaeConfig {
        in_channels: 3,
        out_channels: 3,
        block_out_channels: vec![4, 8],
        layers_per_block: 1,
        latent_channels: 4,
        norm_num_groups: 2,
        encoder_attention: false,
        scaling_factor: 0.5,
    };
    let vae = Vae::<NdArray>::zeros(&config, &NdArrayDevice::default());
    let mut state = collect(&vae);
    for (array, index) in state.values_mut().zip(0..) {
        let count = array.data.len();
        let values = random::normal(3, Stream::Weights, 0, index, count);
        array.data = values.into_iter().map(|value| 0.3 * value).collect();
    }
    let vae = assign(vae, &state, Path::new("test"), "a small autoencoder").unwrap();
    (vae, config)
}

/// Eleven pictures of three classes. One file is no picture, and one picture is cut off in its
/// scan.
fn pictures(root: &Path) -> ImageFolder {
    for index in 0..11u8 {
        let class = root.join(["cat", "dog", "eel"][usize::from(index) / 4]);
        std::fs::create_dir_all(&class).unwrap();
        let path = class.join(format!("{index:02}.png"));
        if index == 3 {
            std::fs::write(path, "no picture").unwrap();
            continue;
        }
        if index == 9 {
            let jpeg = include_bytes!("../../../tests/fixtures/jpeg/baseline_420.jpg");
            let (half, end) = (jpeg.len() - 50, jpeg.len() - 2);
            std::fs::write(path, [&jpeg[..half], &jpeg[end..]].concat()).unwrap();
            continue;
        }
        let pixel = |x: u32, y: u32| Rgb([x as u8 * 8, y as u8 * 7, index * 20]);
        RgbImage::from_fn(20 + u32::from(index), 24, pixel)
            .save(path)
            .unwrap();
    }
    ImageFolder::open(root).unwrap()
}

fn how(form: Form) -> Extraction<'static> {
    Extraction {
        size: 16,
        mirror: true,
        form,
        records_per_shard: 2,
        batch: 4,
        slice: 3,
        readers: 3,
        seed: 5,
        vae_sha256: "v".into(),
        workers: &Alone,
        stop: Stop::default(),
    }
}

/// All files below a folder.
fn files(folder: &Path) -> BTreeMap<std::path::PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        if entry.path().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            let name = entry.path().strip_prefix(folder).unwrap().to_owned();
            found.insert(
                Path::new(folder.file_name().unwrap()).join(name),
                std::fs::read(entry.path()).unwrap(),
            );
        }
    }
    found
}

#[test]
fn interrupted_work_goes_on_to_the_same_bytes() {
    let root = tempfile::tempdir().unwrap();
    let folder = pictures(&root.path().join("images"));
    let (vae, config) = vae();
    let device = NdArrayDevice::default();
    for form in [
        Form::Packed(Dtype::F16),
        Form::Packed(Dtype::F32),
        Form::Npy,
    ] {
        let at = |name: &str| root.path().join(format!("{form:?}-{name}")).join("latents");
        let whole = extract(
            &folder,
            &vae,
            &config,
            &how(form),
            &at("whole"),
            &device,
            |_, _| (),
        )
        .unwrap();
        assert!(whole.finished);
        assert_eq!(whole.images, 9);
        assert_eq!(whole.skipped.keys().collect::<Vec<_>>(), [&3, &9]);
        let listed = std::fs::read_to_string(at("whole").join(SKIPPED)).unwrap();
        let damaged = listed.lines().find(|line| line.contains("09.png"));
        assert!(
            damaged.is_some_and(|line| line.contains("premature end of data segment")),
            "{listed}"
        );
        // Killed after increasing numbers of batches, with another number of threads each time.
        for (killed, readers) in [(1, 1), (2, 2), (1, 5)] {
            let how = Extraction {
                readers,
                ..how(form)
            };
            let mut batches = 0;
            let result = catch_unwind(AssertUnwindSafe(|| {
                extract(
                    &folder,
                    &vae,
                    &config,
                    &how,
                    &at("parts"),
                    &device,
                    |_, before| {
                        batches += usize::from(!before);
                        assert!(batches < killed, "killed here");
                    },
                )
            }));
            assert!(result.is_err());
        }
        // Asked to stop, it finishes the batch.
        let stopped = how(form);
        let result = extract(
            &folder,
            &vae,
            &config,
            &stopped,
            &at("parts"),
            &device,
            |_, _| {
                stopped.stop.request();
            },
        );
        assert!(!result.unwrap().finished);
        let resumed = extract(
            &folder,
            &vae,
            &config,
            &how(form),
            &at("parts"),
            &device,
            |_, _| (),
        )
        .unwrap();
        assert_eq!(resumed.images, 9);
        assert_eq!(resumed.skipped.len(), 2);
        assert_eq!(files(&at("parts")), files(&at("whole")), "{form:?}");

        let latents = Latents::open(&at("whole")).unwrap();
        latents.verify().unwrap();
        assert_eq!(
            (latents.count(), latents.views(), latents.side()),
            (9, 2, 8)
        );
        assert_eq!(latents.label(8).unwrap(), 2);
        let other = Extraction {
            seed: 6,
            ..how(form)
        };
        let error = extract(
            &folder,
            &vae,
            &config,
            &other,
            &at("whole"),
            &device,
            |_, _| (),
        );
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("others (seed 5, not 6); name another"),
            "{error}"
        );
    }
}

#[test]
fn what_was_lost_of_a_finished_extraction_is_noticed() {
    let root = tempfile::tempdir().unwrap();
    let folder = pictures(&root.path().join("images"));
    let (vae, config) = vae();
    let device = NdArrayDevice::default();
    let run = |to: &Path, form: Form| {
        let how = how(form);
        extract(&folder, &vae, &config, &how, to, &device, |_, _| ())
    };
    let packed = root.path().join("packed");
    run(&packed, Form::Packed(Dtype::F16)).unwrap();
    let before = files(&packed);
    run(&packed, Form::Packed(Dtype::F16)).unwrap();
    std::fs::remove_file(packed.join(SKIPPED)).unwrap();
    let error = run(&packed, Form::Packed(Dtype::F16)).unwrap_err();
    assert!(
        error.to_string().contains("skipped.txt: expected"),
        "{error}"
    );
    let mut after = files(&packed);
    let lost = Path::new("packed").join(SKIPPED);
    after.insert(lost.clone(), before[&lost].clone());
    assert_eq!(after, before);

    let npy = root.path().join("npy");
    run(&npy, Form::Npy).unwrap();
    for name in ["imagenet256_labels/2.npy", "imagenet256_features/5.npy"] {
        let path = npy.join(name);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        let error = run(&npy, Form::Npy).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("found 0"), "{error}");
        std::fs::write(&path, whole).unwrap();
        run(&npy, Form::Npy).unwrap();
    }
}

#[test]
fn what_was_left_out_stays_so_though_it_can_be_read_by_now() {
    let root = tempfile::tempdir().unwrap();
    let folder = pictures(&root.path().join("images"));
    let (vae, config) = vae();
    let device = NdArrayDevice::default();
    let at = |name: &str| root.path().join(name).join("latents");
    let how = how(Form::Npy);
    let run = |to: &Path, killed: usize| {
        let mut batches = 0;
        catch_unwind(AssertUnwindSafe(|| {
            extract(&folder, &vae, &config, &how, to, &device, |_, before| {
                batches += usize::from(!before);
                assert!(batches < killed, "killed here");
            })
        }))
    };
    run(&at("whole"), usize::MAX).unwrap().unwrap();
    assert!(run(&at("parts"), 1).is_err());
    // The broken picture is repaired, and a picture that already has latents is broken.
    let (good, repaired) = (&folder.images()[0].0, &folder.images()[3].0);
    std::fs::copy(good, repaired).unwrap();
    std::fs::write(good, "no picture any more").unwrap();
    assert!(run(&at("parts"), 2).is_err());
    let resumed = run(&at("parts"), usize::MAX).unwrap().unwrap();
    assert_eq!(resumed.images, 9);
    assert_eq!(resumed.skipped.keys().collect::<Vec<_>>(), [&3, &9]);
    assert_eq!(files(&at("parts")), files(&at("whole")));
}

#[test]
fn a_latent_is_a_scaled_draw_from_the_posterior_of_the_crop() {
    let root = tempfile::tempdir().unwrap();
    let folder = pictures(&root.path().join("images"));
    let (vae, config) = vae();
    let (to, device) = (root.path().join("latents"), NdArrayDevice::default());
    extract(
        &folder,
        &vae,
        &config,
        &how(Form::Packed(Dtype::F32)),
        &to,
        &device,
        |_, _| (),
    )
    .unwrap();
    let latents = Latents::open(&to).unwrap();
    // The fifth image of the folder is the fourth readable one.
    let (path, label) = &folder.images()[4];
    let pixels = center_crop(&read_rgb(path).unwrap(), 16);
    for view in 0..2 {
        let x = TensorData::new(to_chw(&pixels, 16, view == 1), [1, 3, 16, 16]);
        let posterior = vae.encode(Tensor::from_data(x, &device));
        let noise = random::normal(5, Stream::Posterior, view as u64, 4, 4 * 8 * 8);
        let noise = Tensor::from_data(TensorData::new(noise, [1, 4, 8, 8]), &device);
        let expected = floats((posterior.sample(noise) * 0.5).into_data());
        let mut found = Vec::new();
        let read = crate::data::Samples::read(&latents, 3, view, &mut found).unwrap();
        assert_eq!(read, *label);
        // Computed alone, not in a batch: sums may be rounded differently.
        for (found, expected) in found.iter().zip(&expected) {
            assert!(
                (found - expected).abs() <= 1e-5 * (1.0 + expected.abs()),
                "{found} {expected}"
            );
        }
    }
}

#[test]
fn any_number_of_workers_leaves_the_same_latents() {
    let root = tempfile::tempdir().unwrap();
    let folder = pictures(&root.path().join("images"));
    let (vae, config) = vae();
    let device = NdArrayDevice::default();
    let at = |name: &str| root.path().join(name).join("latents");
    let how = how(Form::Packed(Dtype::F16));
    let run = |workers: &dyn Workers, seed, to: &str, stop_after: usize| {
        let stop = Stop::default();
        let how = Extraction {
            workers,
            seed,
            stop: stop.clone(),
            ..how.clone()
        };
        let mut batches = 0;
        extract(
            &folder,
            &vae,
            &config,
            &how,
            &at(to),
            &device,
            |_, before| {
                batches += usize::from(!before);
                if batches == stop_after {
                    stop.request();
                }
            },
        )
    };
    run(&Alone, 5, "one", 9).unwrap();
    // Alone at first, it goes on with two.
    assert!(!run(&Alone, 5, "two", 1).unwrap().finished);
    for (size, to) in [(2, "two"), (4, "four")] {
        let all = fake::group(size, |workers| run(workers, 5, to, 9).unwrap());
        assert_eq!((all[0].images, all[1].images), (9, 0));
        assert!(all.iter().all(|done| done.finished));
        assert_eq!(files(&at(to)), files(&at("one")), "{size}");
    }
    let unlike = fake::group(2, |workers| {
        let seed = 5 + workers.rank() as u64;
        run(workers, seed, "unlike", 9).unwrap_err().to_string()
    });
    let told = "the workers don't agree on what they extract: 1 differs from worker 0: worker 0 has `seed: 5`, worker 1 `seed: 6`";
    assert!(unlike.iter().all(|error| error == told), "{unlike:?}");
    assert!(!at("unlike").exists());
}
