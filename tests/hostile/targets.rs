//! The targets: files in a folder, and the reader that the program's commands use on them.

use std::error::Error;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};

use burn_ndarray::NdArray;
use tinyfusion::data::latents::{Dtype, Layout, ShardWriter, write_npy};
use tinyfusion::data::{IdxPictures, ImageFolder, Latents, Samples, Split};
use tinyfusion::evaluation::read_reference_statistics;
use tinyfusion::images::read_rgb;
use tinyfusion::npz::{SampleReader, read_samples};
use tinyfusion::recipe::RecipeError;
use tinyfusion::recipe::document::Document;
use tinyfusion::recipe::plan::Plan;
use tinyfusion::recipe::run::directory::RunDirectory;
use tinyfusion::recipe::schema::Recipe;
use tinyfusion::state::collect;
use tinyfusion::training::JsonLines;
use tinyfusion::weights::{Checkpoint, Conversion, Stated, convert, open_torch, read_vae};

use super::mutation::Form;

/// One file of a target, unchanged.
pub struct File {
    pub name: String,
    pub bytes: Vec<u8>,
    pub form: Form,
}

/// Result of reading a target.
pub enum Seen {
    /// An error message, with its causes.
    Refused(String),
    /// A hash of the values.
    Values(u64),
    /// A false success, with the reason.
    Wrong(String),
}

type Read = Box<dyn Fn(&Path) -> Seen + std::panic::RefUnwindSafe>;

/// Files and their reader.
pub struct Target {
    pub name: &'static str,
    pub folder: PathBuf,
    read: Read,
    /// Whether each file is read separately.
    apart: bool,
    /// Whether the reader writes, as when continuing a run.
    pub writes: bool,
    /// Whether checksums detect damage of any byte.
    pub sealed: bool,
    /// Hash of the unchanged files' values.
    pub values: u64,
    files: Vec<File>,
}

impl Target {
    /// Reads the files, or only the changed one if they are separate.
    pub fn read(&self, changed: &File) -> Seen {
        match self.apart {
            true => (self.read)(&self.folder.join(&changed.name)),
            false => (self.read)(&self.folder),
        }
    }

    /// The file to be changed.
    pub fn file(&self, which: u32) -> &File {
        &self.files[which as usize % self.files.len()]
    }
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

pub fn hashed(values: impl Hash) -> u64 {
    let mut hash = DefaultHasher::new();
    values.hash(&mut hash);
    hash.finish()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// An error and its causes.
pub fn told(error: &dyn Error) -> Seen {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    Seen::Refused(text)
}

pub fn seen<E: Error>(result: Result<u64, E>) -> Seen {
    match result {
        Ok(values) => Seen::Values(values),
        Err(error) => told(&error),
    }
}

/// Every target.
pub fn all(root: &Path) -> Vec<Target> {
    let mut targets = weights(root);
    targets.extend(arrays(root));
    targets.extend(pictures(root));
    targets.extend(texts(root));
    targets.extend(super::unfinished::all(root));
    targets
}

/// A target from files that were just made in a folder.
pub fn target(
    root: &Path,
    name: &'static str,
    sealed: bool,
    forms: &[(&str, Form)],
    read: impl Fn(&Path) -> Seen + std::panic::RefUnwindSafe + 'static,
) -> Target {
    let folder = root.join(name);
    let files = forms
        .iter()
        .map(|(file, form)| File {
            name: (*file).to_owned(),
            bytes: std::fs::read(folder.join(file)).unwrap(),
            form: *form,
        })
        .collect();
    let values = match read(&folder) {
        Seen::Values(values) => values,
        Seen::Refused(why) | Seen::Wrong(why) => panic!("{name}: {why}"),
    };
    Target {
        name,
        folder,
        read: Box::new(read),
        apart: false,
        writes: false,
        sealed,
        values,
        files,
    }
}

pub fn put(root: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    let path = root.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// A model that is read and built.
fn model(path: &Path) -> Seen {
    let stated = Stated {
        heads_otherwise: Some(4),
        ..Stated::default()
    };
    let read = || {
        let checkpoint = Checkpoint::read_stated(path, &stated)?;
        checkpoint.model();
        checkpoint.network::<NdArray>(&Default::default())?;
        checkpoint.tensors.read_all()
    };
    seen(read().map(|state| {
        let tensors = state
            .iter()
            .map(|(name, array)| (name, &array.shape, bits(&array.data)));
        hashed(tensors.collect::<Vec<_>>())
    }))
}

fn weights(root: &Path) -> Vec<Target> {
    let plain = fixtures().join("dit_forward/a_plain.pt");
    let stated = Stated {
        heads: Some(4),
        ..Stated::default()
    };
    let checkpoint = Checkpoint::read_stated(&plain, &stated).unwrap();
    let write = |name: &str, to: &str, conversion: &Conversion| {
        std::fs::create_dir_all(root.join(name)).unwrap();
        convert(&checkpoint, &root.join(name).join(to), conversion).unwrap();
    };
    let kept = Conversion::default();
    write("safetensors", "m.safetensors", &kept);
    write("pt", "m.pt", &kept);
    let shard = Some(60_000);
    write(
        "shards",
        "m.safetensors.index.json",
        &Conversion {
            shard,
            ..kept.clone()
        },
    );
    write(
        "diffusers",
        "m",
        &Conversion {
            diffusers: true,
            ..kept.clone()
        },
    );
    put(root, "legacy/m.pth", legacy());
    put(
        root,
        "training/m.pt",
        std::fs::read(fixtures().join("dit_forward/b_train_ckpt.pt")).unwrap(),
    );
    for name in ["config.json", "diffusion_pytorch_model.safetensors"] {
        let bytes = std::fs::read(fixtures().join("vae_kl_f8/vae").join(name)).unwrap();
        put(root, &format!("vae/{name}"), bytes);
    }
    let torch = |name: &'static str| {
        move |folder: &Path| {
            let read = || open_torch(&folder.join(name), None)?.read_all();
            seen(read().map(|state| {
                let tensors = state.values().map(|array| bits(&array.data));
                hashed(tensors.collect::<Vec<_>>())
            }))
        }
    };
    vec![
        target(
            root,
            "safetensors",
            false,
            &[("m.safetensors", Form::Safetensors)],
            |folder| model(&folder.join("m.safetensors")),
        ),
        target(root, "pt", true, &[("m.pt", Form::Zip)], |folder| {
            model(&folder.join("m.pt"))
        }),
        target(
            root,
            "training",
            true,
            &[("m.pt", Form::Zip)],
            torch("m.pt"),
        ),
        target(
            root,
            "legacy",
            false,
            &[("m.pth", Form::Bytes)],
            torch("m.pth"),
        ),
        target(
            root,
            "shards",
            false,
            &[
                ("m.safetensors.index.json", Form::Bytes),
                ("m-00001-of-00004.safetensors", Form::Safetensors),
            ],
            |folder| model(&folder.join("m.safetensors.index.json")),
        ),
        target(
            root,
            "diffusers",
            false,
            &[
                ("m/config.json", Form::Bytes),
                ("m/diffusion_pytorch_model.safetensors", Form::Safetensors),
            ],
            |folder| model(&folder.join("m")),
        ),
        target(
            root,
            "vae",
            false,
            &[
                ("config.json", Form::Bytes),
                ("diffusion_pytorch_model.safetensors", Form::Safetensors),
            ],
            |folder| {
                let read = read_vae::<NdArray>(folder, &Default::default());
                seen(read.map(|(vae, config)| {
                    let state = collect(&vae.network);
                    let tensors: Vec<_> = state.values().map(|array| bits(&array.data)).collect();
                    hashed((tensors, format!("{config:?}")))
                }))
            },
        ),
    ]
}

/// A file in PyTorch's format before 1.6: pickles in a row, then the storages.
fn legacy() -> Vec<u8> {
    let pickle = |instructions: &[u8]| [b"\x80\x02", instructions, b"."].concat();
    let text = |text: &str| {
        [
            b"X",
            &(text.len() as u32).to_le_bytes()[..],
            text.as_bytes(),
        ]
        .concat()
    };
    let tensor = [
        text("weight"),
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        text("storage"),
        b"ctorch\nFloatStorage\n".to_vec(),
        text("7"),
        text("cpu"),
        b"K\x06NtQK\x00(K\x02K\x03t(K\x03K\x01t\x89ccollections\nOrderedDict\n)RtR".to_vec(),
    ]
    .concat();
    let mut bytes = [
        b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.".to_vec(),
        pickle(b"M\xe9\x03"),
        pickle(&[b"}", &text("little_endian")[..], b"\x88s"].concat()),
        pickle(&[b"}(", &tensor[..], b"u"].concat()),
        pickle(&[b"]", &text("7")[..], b"a"].concat()),
    ]
    .concat();
    bytes.extend(6u64.to_le_bytes());
    bytes.extend((0..6).flat_map(|value| (value as f32).to_le_bytes()));
    bytes
}

/// All that a training reads of latents.
pub fn latents(folder: &Path) -> Seen {
    let read = || {
        let latents = Latents::open(folder)?;
        latents.verify()?;
        latents.classes()?;
        let mut values = Vec::new();
        let mut labels = Vec::new();
        for index in 0..latents.count() {
            labels.push(latents.read(index, 0, &mut values)?);
        }
        Ok::<_, tinyfusion::data::DataError>(hashed((bits(&values), labels)))
    };
    seen(read())
}

fn arrays(root: &Path) -> Vec<Target> {
    for name in [
        "samples",
        "samples_compressed",
        "samples_labeled",
        "reference",
    ] {
        let bytes = std::fs::read(fixtures().join(format!("npz/{name}.npz"))).unwrap();
        put(root, &format!("npz-{name}/s.npz"), bytes);
    }
    let samples = |folder: &Path| {
        seen(
            read_samples(&folder.join("s.npz"))
                .map(|samples| hashed((samples.images.shape(), samples.images.pixels()))),
        )
    };
    let npy = root.join("npy");
    for index in 0..3 {
        write_npy(&npy, index, [2, 4, 2], &[index as f32; 32], index).unwrap();
    }
    let packed = root.join("packed");
    std::fs::create_dir_all(&packed).unwrap();
    let layout = Layout {
        views: 2,
        channels: 4,
        side: 2,
        dtype: Dtype::F16,
        classes: 3,
        records_per_shard: 4,
        scaling_factor: 0.18215,
    };
    let names = ["a", "b", "c"].map(str::to_owned).to_vec();
    let mut writer = ShardWriter::open(&packed, layout, names).unwrap();
    for record in 0..6 {
        writer.push(&[record as f32 / 4.0; 32], record % 3).unwrap();
    }
    writer.finish().unwrap();
    let deflated = |bytes: &[u8]| {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gzip.write_all(bytes).unwrap();
        gzip.finish().unwrap()
    };
    let sizes = |kind: u8, sizes: &[u32]| -> Vec<u8> {
        let sizes = sizes.iter().flat_map(|size| size.to_be_bytes());
        [0, 0, 8, kind].into_iter().chain(sizes).collect()
    };
    let pixels = (0..4 * 36).map(|pixel| pixel as u8);
    let images = [sizes(3, &[4, 6, 6]), pixels.collect()].concat();
    let labels = [sizes(1, &[4]), vec![0, 1, 1, 0]].concat();
    for (folder, ending, packed) in [("idx", "", false), ("idx-gz", ".gz", true)] {
        for (name, bytes) in [("images-idx3", &images), ("labels-idx1", &labels)] {
            let bytes = if packed {
                deflated(bytes)
            } else {
                bytes.clone()
            };
            put(root, &format!("{folder}/train-{name}-ubyte{ending}"), bytes);
        }
    }
    let idx = |folder: &Path| {
        let read = IdxPictures::open(folder, Split::Train);
        seen(
            read.map(|pictures| hashed((pictures.side(), pictures.classes(), pictures.checksum()))),
        )
    };
    vec![
        target(root, "npz-samples", true, &[("s.npz", Form::Zip)], samples),
        target(
            root,
            "npz-samples_compressed",
            true,
            &[("s.npz", Form::Zip)],
            samples,
        ),
        target(
            root,
            "npz-samples_labeled",
            true,
            &[("s.npz", Form::Zip)],
            samples,
        ),
        target(
            root,
            "npz-reference",
            true,
            &[("s.npz", Form::Zip)],
            |folder| {
                let read = read_reference_statistics(&folder.join("s.npz"));
                seen(read.map(|statistics| hashed(format!("{statistics:?}"))))
            },
        ),
        target(
            root,
            "npy",
            false,
            &[
                ("imagenet256_features/1.npy", Form::Npy),
                ("imagenet256_labels/0.npy", Form::Npy),
            ],
            latents,
        ),
        target(
            root,
            "packed",
            true,
            &[
                ("latents.json", Form::Bytes),
                ("shard-00000.bin", Form::Shard),
                ("shard-00001.bin", Form::Shard),
            ],
            latents,
        ),
        target(
            root,
            "idx",
            false,
            &[
                ("train-images-idx3-ubyte", Form::Bytes),
                ("train-labels-idx1-ubyte", Form::Bytes),
            ],
            idx,
        ),
        target(
            root,
            "idx-gz",
            true,
            &[
                ("train-images-idx3-ubyte.gz", Form::Gzip),
                ("train-labels-idx1-ubyte.gz", Form::Gzip),
            ],
            idx,
        ),
    ]
}

fn pictures(root: &Path) -> Vec<Target> {
    let copy = |name: &str, from: &[&str]| -> Vec<String> {
        let copied = from.iter().map(|from| {
            let file = from.rsplit('/').next().unwrap().to_owned();
            put(
                root,
                &format!("{name}/class/{file}"),
                std::fs::read(fixtures().join(from)).unwrap(),
            );
            format!("class/{file}")
        });
        copied.collect()
    };
    let read = |folder: &Path| {
        let read = || -> Result<u64, Box<dyn Error>> {
            let mut pictures = Vec::new();
            for (path, _) in ImageFolder::open(folder)?.images() {
                let picture = read_rgb(path)?;
                pictures.push((picture.dimensions(), picture.into_raw()));
            }
            Ok(hashed(pictures))
        };
        match read() {
            Ok(values) => Seen::Values(values),
            Err(error) => told(&*error),
        }
    };
    let png = copy(
        "png",
        &[
            "image_preprocess/img0.png",
            "jpeg/odd_420.png",
            "jpeg/grey.png",
        ],
    );
    let jpeg = copy(
        "jpeg",
        &[
            "jpeg/baseline_420.jpg",
            "jpeg/progressive_420.jpg",
            "jpeg/arithmetic_420.jpg",
            "jpeg/restart_420.jpg",
            "jpeg/ycck_adobe.jpg",
            "jpeg/grey.jpg",
        ],
    );
    let forms = |files: &[String], form: Form| -> Vec<(String, Form)> {
        files.iter().map(|file| (file.clone(), form)).collect()
    };
    let (png, jpeg) = (forms(&png, Form::Png), forms(&jpeg, Form::Bytes));
    let of = |name: &'static str, sealed: bool, files: &[(String, Form)]| {
        let files: Vec<(&str, Form)> = files
            .iter()
            .map(|(file, form)| (file.as_str(), *form))
            .collect();
        target(root, name, sealed, &files, read)
    };
    // Pictures for evaluation have the same size.
    for name in ["a", "b"] {
        let picture = std::fs::read(fixtures().join("image_preprocess/img0.png")).unwrap();
        put(root, &format!("evaluated/{name}.png"), picture);
    }
    let files = [("a.png", Form::Png)];
    let evaluated = target(root, "evaluated", true, &files, |folder| {
        let read = || {
            let mut pictures = SampleReader::open(folder)?;
            pictures.next_block(usize::MAX)
        };
        seen(read().map(|images| hashed(images.map(|images| images.pixels().to_vec()))))
    });
    vec![of("png", true, &png), of("jpeg", false, &jpeg), evaluated]
}

/// A recipe that is read, written back, read again and planned.
fn recipe(document: &Document) -> Seen {
    let mut recipe = match Recipe::from_document(document) {
        Ok(recipe) => recipe,
        Err(error) => return told(&error),
    };
    if let Some(sweep) = recipe.sweep.take() {
        return match sweep.points(&recipe, document) {
            Ok(points) => Seen::Values(hashed(format!("{points:?}"))),
            Err(error) => told(&error),
        };
    }
    let text = match recipe.to_toml() {
        Ok(text) => text,
        Err(error) => return Seen::Wrong(format!("a recipe that can't be written: {error}")),
    };
    let again = Document::parse(document.path(), &text)
        .and_then(|document| Recipe::from_document(&document));
    match again {
        Ok(again) if again == recipe => {}
        Ok(_) => return Seen::Wrong("its resolved form is another recipe".into()),
        Err(error) => return Seen::Wrong(format!("its resolved form is refused: {error}")),
    }
    match Plan::new(&recipe) {
        Ok(plan) => Seen::Values(hashed(plan.to_string())),
        Err(error) => told(&error),
    }
}

fn texts(root: &Path) -> Vec<Target> {
    let mut names = Vec::new();
    let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    for name in [
        "quickstart",
        "d14_masked_kd",
        "standin",
        "fashion_features",
        "d7_iterative",
        "fashion_masks",
    ] {
        let text = std::fs::read_to_string(recipes.join(format!("{name}.toml"))).unwrap();
        put(root, &format!("recipe/{name}.toml"), text);
        names.push(format!("{name}.toml"));
    }
    let own = "data = { images = './images', size = 8, channels = 1, fit = 'pad', fill = 3, held_out = 0.2 }\n\
        [[stage]]\nkind = 'train'\nsteps = 1\narchitecture = { family = 'dit', width = 8, heads = 2, depth = 1 }\n";
    put(root, "recipe/own.toml", own);
    // Paths in a recipe are relative to the working directory.
    for class in ["a", "b"] {
        for index in 0..12 {
            let picture = std::fs::read(fixtures().join("jpeg/odd_420.png")).unwrap();
            put(root, &format!("images/{class}/{index}.png"), picture);
        }
    }
    names.push("own.toml".to_owned());
    let sets = "seed=3\nstage.learned.steps=8\nstage.prune.groups=\"2:4\"\nstage.evaluate.compare=[\"learned\"]\n\
        data=\"digits\"\nstage.oracle.lr=1e-3\nname=\"x\"\n";
    put(root, "set/set.txt", sets);
    let run = root.join("run/runs/r/001");
    let resolved = "seed = 0\n";
    put(&run, "resolved.toml", resolved);
    put(
        &run,
        "status.json",
        "{ \"state\": \"interrupted\", \"stage\": \"train\", \"seconds\": 1.5 }\n",
    );
    let log: String = (0..6)
        .map(|step| format!("{{\"step\":{step},\"loss\":0.{step}}}\n"))
        .collect();
    put(root, "log/metrics.jsonl", log);
    let forms: Vec<(&str, Form)> = names
        .iter()
        .map(|name| (name.as_str(), Form::Bytes))
        .collect();
    let of_file = |path: &Path| {
        // The program reports invalid text before it reads a recipe.
        let text = String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
        match Document::parse(path, &text) {
            Ok(document) => recipe(&document),
            Err(error) => told(&error),
        }
    };
    let whole = |_: &Path| Seen::Values(0);
    let quickstart = std::fs::read_to_string(recipes.join("quickstart.toml")).unwrap();
    vec![
        Target {
            apart: true,
            read: Box::new(of_file),
            ..target(root, "recipe", false, &forms, whole)
        },
        target(
            root,
            "set",
            false,
            &[("set.txt", Form::Bytes)],
            move |folder| {
                let sets = std::fs::read(folder.join("set.txt")).unwrap();
                let mut document =
                    Document::parse(Path::new("quickstart.toml"), &quickstart).unwrap();
                for line in String::from_utf8_lossy(&sets).lines() {
                    document.set(line);
                }
                recipe(&document)
            },
        ),
        Target {
            writes: true,
            ..target(
                root,
                "run",
                false,
                &[
                    ("runs/r/001/status.json", Form::Bytes),
                    ("runs/r/001/resolved.toml", Form::Bytes),
                ],
                move |folder| {
                    // Resuming creates the lock, which then stays in the folder.
                    let same = |noted: &str| (noted == resolved).then(|| resolved.to_owned());
                    match RunDirectory::unfinished(&folder.join("runs"), "r", resolved, &same) {
                        Ok(run) => Seen::Values(hashed(run.status().map(|status| status.stage))),
                        Err(RecipeError::Run(why)) => Seen::Refused(why),
                        Err(other) => told(&other),
                    }
                },
            )
        },
        Target {
            writes: true,
            ..target(
                root,
                "log",
                false,
                &[("metrics.jsonl", Form::Bytes)],
                |folder| seen(JsonLines::open(&folder.join("metrics.jsonl"), 4).map(|_| 0)),
            )
        },
    ]
}
