//! Files of an interrupted process, and the code that continues from them, which runs on a copy
//! because it writes.

use std::error::Error;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;

use burn::backend::Autodiff;
use burn_ndarray::{NdArray, NdArrayDevice};
use tinyfusion::data::latents::{Dtype, Layout, ShardWriter};
use tinyfusion::data::{
    BatchPlan, BatchSource, Batches, DataError, Digits, Extraction, Feed, Form as Stored,
    ImageFolder, Latents, Split, extract,
};
use tinyfusion::models::{Classifier, ClassifierConfig};
use tinyfusion::process::{GaussianDiffusion, Times};
use tinyfusion::state::collect;
use tinyfusion::stop::Stop;
use tinyfusion::training::{self, ClassifierTrainee, Fit, Fitted, Optimisation, TrainingError};
use tinyfusion::weights::read_vae;
use tinyfusion::workers::Alone;

use super::mutation::Form;
use super::targets::{Seen, Target, bits, fixtures, hashed, latents, put, target, told};

/// Every kind of unfinished work.
pub fn all(root: &Path) -> Vec<Target> {
    vec![checkpoint(root), shards(root), extraction(root)]
}

/// Runs the continuing code in a copy of the folder.
fn in_a_copy<E: Error>(folder: &Path, go_on: impl FnOnce(&Path) -> Result<Seen, E>) -> Seen {
    let copy = folder.with_extension("copy");
    let _ = std::fs::remove_dir_all(&copy);
    copied(folder, &copy);
    let seen = go_on(&copy).unwrap_or_else(|error| told(&error));
    std::fs::remove_dir_all(&copy).unwrap();
    seen
}

fn copied(folder: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let to = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copied(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}

type Training = Autodiff<NdArray>;

/// A small classifier after `steps` steps, continued from the checkpoint in the folder. The last
/// step writes no checkpoint.
fn train(
    folder: &Path,
    steps: usize,
) -> Result<Fitted<Training, ClassifierTrainee<Training>>, TrainingError> {
    let config = ClassifierConfig {
        width: 4,
        channels: 1,
        input_size: 8,
        classes: 10,
    };
    let classifier = Classifier::<Training>::zeros(&config, &NdArrayDevice::default());
    let batches = BatchPlan {
        batch: 2,
        seed: 1,
        channels: 1,
        size: 8,
        classes: 10,
        label_drop: 0.0,
        times: Times::Steps(1000),
        masking: None,
        logits: Vec::new(),
    };
    let source = BatchSource::new(batches, Arc::new(Digits::new(Split::Train)));
    let optimisation = Optimisation {
        batch: 2,
        ema: 0.9,
        ema_warmup: false,
        checkpoint_every: 1,
        keep_last: 1,
        max_bad_steps: 1,
        ..Optimisation::new(steps)
    };
    let training = training::Training::new("classifier", optimisation, folder);
    let batches = move |start: usize| -> Arc<dyn Feed<Training, _>> {
        Arc::new(Batches::new(
            source,
            start,
            steps,
            GaussianDiffusion::full().into(),
            &NdArrayDevice::default(),
        ))
    };
    let fit = Fit::new(training, batches).resume(true).plain(true);
    fit.run(ClassifierTrainee { classifier })
}

/// A training's last checkpoint, which has a checksum.
fn checkpoint(root: &Path) -> Target {
    let folder = root.join("checkpoint");
    std::fs::create_dir_all(&folder).unwrap();
    train(&folder, 2).unwrap();
    std::fs::remove_file(folder.join("metrics.jsonl")).unwrap();
    let files = [("checkpoints/step-00000001.safetensors", Form::Safetensors)];
    target(root, "checkpoint", true, &files, move |folder| {
        // A checkpoint without one is read as an earlier version's, which had no checksum.
        let bytes = std::fs::read(folder.join(files[0].0)).unwrap();
        let key = b"tinyfusion.checksum";
        if !bytes.windows(key.len()).any(|window| window == key) {
            return Seen::Refused("its checksum is lost".to_owned());
        }
        in_a_copy(folder, |copy| {
            let fitted = train(copy, 1)?;
            let values = [fitted.model, fitted.ema].map(|model| {
                let state = collect::<NdArray, _>(&model.classifier);
                state
                    .values()
                    .map(|array| bits(&array.data))
                    .collect::<Vec<_>>()
            });
            Ok::<_, TrainingError>(Seen::Values(hashed((values, fitted.steps))))
        })
    })
}

/// Packed shards without the index, which is written last.
fn shards(root: &Path) -> Target {
    let layout = Layout {
        views: 2,
        channels: 1,
        side: 2,
        dtype: Dtype::F16,
        classes: 3,
        records_per_shard: 4,
        scaling_factor: 1.0,
    };
    let write = move |folder: &Path, count: usize| -> Result<(), DataError> {
        let mut writer = ShardWriter::open(folder, layout.clone(), Vec::new())?;
        for record in writer.next()..count {
            writer.push(&[record as f32 / 4.0; 8], record % 3)?;
        }
        writer.finish()
    };
    let folder = root.join("shards-unfinished");
    write(&folder, 6).unwrap();
    std::fs::remove_file(folder.join("latents.json")).unwrap();
    let files = [
        ("shard-00000.bin", Form::Shard),
        ("shard-00001.bin", Form::Shard),
    ];
    target(root, "shards-unfinished", true, &files, move |folder| {
        in_a_copy(folder, |copy| write(copy, 9).map(|()| latents(copy)))
    })
}

/// An interrupted extraction, one of whose pictures is broken.
fn extraction(root: &Path) -> Target {
    let images = root.join("extraction-images");
    for index in 0..6 {
        let name = format!("class/{index}.png");
        match index {
            3 => put(&images, &name, "no picture"),
            _ => {
                let picture = fixtures().join("image_preprocess/img0.png");
                put(&images, &name, std::fs::read(picture).unwrap());
            }
        }
    }
    let (vae, config) =
        read_vae::<NdArray>(&fixtures().join("vae_kl_f8/vae"), &NdArrayDevice::default()).unwrap();
    let images = ImageFolder::open(&images).unwrap();
    let how = Extraction {
        size: 16,
        mirror: false,
        form: Stored::Packed(Dtype::F32),
        records_per_shard: 2,
        batch: 2,
        slice: 2,
        readers: 1,
        workers: &Alone,
        seed: 5,
        vae_sha256: "v".into(),
        stop: Stop::default(),
    };
    // Made once; nothing in it changes.
    let made = AssertUnwindSafe((vae.network, config, images, how));
    let go_on = move |folder: &Path| {
        let AssertUnwindSafe((vae, config, images, how)) = &made;
        let device = NdArrayDevice::default();
        extract(images, vae, config, how, folder, &device, |_, _| ())
    };
    let folder = root.join("extraction");
    go_on(&folder).unwrap();
    for file in ["latents.json", "shard-00002.bin"] {
        std::fs::remove_file(folder.join(file)).unwrap();
    }
    let files = [
        ("extraction.json", Form::Bytes),
        ("skipped.txt", Form::Bytes),
        ("shard-00001.bin", Form::Shard),
    ];
    target(root, "extraction", false, &files, move |folder| {
        in_a_copy(folder, |copy| {
            let extracted = go_on(copy)?;
            let count = Latents::open(copy)?.count();
            let dealt_with = count + extracted.skipped.len();
            if (count, dealt_with) != (extracted.images, 6) {
                let why = format!("{count} latents of 6 pictures, said to be {extracted:?}");
                return Ok(Seen::Wrong(why));
            }
            Ok::<_, DataError>(latents(copy))
        })
    })
}
