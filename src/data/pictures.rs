//! Folders of pictures as training data in pixel space. Each picture is decoded once, into records
//! that training reads from then on.
//!
//! The records are packed shards of bytes ([`latents`](super::latents)), with `train` and `test`
//! side by side. Whether a picture is held out for the test depends on its name alone, not on a
//! recipe's seed or on other files in the folder: no model has learned a picture that another is
//! tested on.

use std::fs::{self, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use image::RgbImage;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::latents::{Dtype, INDEX, Latents, Layout, ShardWriter};
use super::{DataError, ImageFolder, Split, level, with_cause};
use crate::files::lock_file;
use crate::images::{center_crop, pad, read_then};
use crate::stop::Stop;

/// How a picture becomes a square.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "fit", rename_all = "lowercase")]
pub enum Fit {
    /// The shorter side is resized to the size, and the middle cut out ([`center_crop`]).
    Crop,
    /// A longer side is resized to the size, and the rest is filled ([`pad`]).
    Pad {
        /// Level of the filling; 0 is black.
        fill: u8,
    },
}

/// How pictures become records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Side of a record.
    pub size: usize,
    /// 3, or 1 for grey: `0.299 red + 0.587 green + 0.114 blue`, in Pillow's arithmetic.
    pub channels: usize,
    /// How a picture becomes a square.
    #[serde(flatten)]
    pub fit: Fit,
}

impl Rule {
    /// A picture as numbers, `[channels, size, size]` in [−1, 1].
    fn apply(&self, picture: &RgbImage) -> Vec<f32> {
        let pixels = match self.fit {
            Fit::Crop => center_crop(picture, self.size),
            Fit::Pad { fill } => pad(picture, self.size, fill),
        };
        let (pixels, _) = pixels.as_chunks::<3>();
        match self.channels {
            1 => pixels.iter().map(|pixel| level(grey(*pixel))).collect(),
            _ => (0..3)
                .flat_map(|channel| pixels.iter().map(move |pixel| level(pixel[channel])))
                .collect(),
        }
    }
}

/// Pillow's `convert("L")`: ITU-R 601-2 luma in fixed point with 16 fractional bits, rounded.
fn grey([red, green, blue]: [u8; 3]) -> u8 {
    let [red, green, blue] = [red, green, blue].map(u32::from);
    ((red * 19_595 + green * 38_470 + blue * 7_471 + 0x8000) >> 16) as u8
}

/// Source of the held-out pictures.
#[derive(Debug, Clone, PartialEq)]
pub enum HeldOut {
    /// About this share of the folder's pictures; each is held out or not by its own name.
    Share(f64),
    /// Another folder with the same classes.
    Folder(PathBuf),
}

/// Pictures for training and test, listed but not read.
#[derive(Debug)]
pub struct PictureSet {
    rule: Rule,
    classes: Vec<String>,
    train: Vec<(PathBuf, usize)>,
    test: Vec<(PathBuf, usize)>,
    ignored: usize,
}

impl PictureSet {
    /// Lists a folder and divides it.
    ///
    /// # Errors
    /// When a folder can't be read or has no pictures; when a class has no training picture, or the
    /// test folder has other classes.
    pub fn open(folder: &Path, held_out: &HeldOut, rule: Rule) -> Result<Self, DataError> {
        let listed = ImageFolder::open(folder)?;
        let mut ignored = listed.ignored();
        let classes = listed.classes().to_vec();
        let (train, test) = match held_out {
            HeldOut::Share(share) => divide(&listed, *share),
            HeldOut::Folder(other) => {
                let whole = |path: &Path| path.canonicalize().map_err(DataError::io(path));
                if whole(other)? == whole(folder)? {
                    let found = "that of the training pictures";
                    return Err(DataError::unexpected(
                        other,
                        "a folder of other pictures",
                        found,
                    ));
                }
                let mut test = ImageFolder::open(other)?;
                ignored += test.ignored();
                // The only class of a flat folder has the folder's name, which may differ.
                if test.classes().len() == 1 && classes.len() == 1 {
                    test = test.named(&classes);
                }
                if test.classes() != classes {
                    return Err(DataError::unexpected(
                        other,
                        format!(
                            "the classes of {}: {}",
                            folder.display(),
                            classes.join(", ")
                        ),
                        test.classes().join(", "),
                    ));
                }
                (listed.images().to_vec(), test.images().to_vec())
            }
        };
        let empty = |part: &[(PathBuf, usize)]| {
            let mut counts = vec![0usize; classes.len()];
            part.iter().for_each(|(_, label)| counts[*label] += 1);
            let class = counts.iter().position(|count| *count == 0);
            class.map(|class| classes[class].clone())
        };
        if let Some(class) = empty(listed.images()) {
            let found = "a folder without any: take it away, or put pictures into it";
            let path = folder.join(class);
            return Err(DataError::unexpected(&path, "pictures of a class", found));
        }
        if let Some(class) = empty(&train) {
            return Err(DataError::unexpected(
                folder,
                "pictures of each class to train on",
                format!(
                    "all of class `{class}` held out: hold out less, or name a folder of test pictures"
                ),
            ));
        }
        Ok(Self {
            rule,
            classes,
            train,
            test,
            ignored,
        })
    }

    /// Names of the classes.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Number of pictures in a split.
    pub fn count(&self, split: Split) -> usize {
        self.part(split).len()
    }

    /// Number of ignored entries of the folders.
    pub fn ignored(&self) -> usize {
        self.ignored
    }

    fn part(&self, split: Split) -> &[(PathBuf, usize)] {
        match split {
            Split::Train => &self.train,
            Split::Test => &self.test,
        }
    }

    /// SHA-256 of what the records depend on: the rule, the classes, and each file's name, label,
    /// size and modification time.
    ///
    /// # Errors
    /// When a file no longer exists.
    pub fn key(&self) -> Result<String, DataError> {
        let mut hash = Sha256::new();
        hash.update(format!(
            "{RECORDS_VERSION} {:?} {:?}",
            self.rule, self.classes
        ));
        for split in [Split::Train, Split::Test] {
            hash.update((self.count(split) as u64).to_le_bytes());
            for (path, label) in self.part(split) {
                let file = fs::metadata(path).map_err(DataError::io(path))?;
                let changed = file.modified().map_err(DataError::io(path))?;
                let changed = changed.duration_since(UNIX_EPOCH).unwrap_or_default();
                hash.update(path.file_name().unwrap_or_default().as_encoded_bytes());
                hash.update([0]);
                hash.update((*label as u64).to_le_bytes());
                hash.update(file.len().to_le_bytes());
                hash.update(changed.as_nanos().to_le_bytes());
            }
        }
        Ok(format!("{:x}", hash.finalize()))
    }

    /// Decodes a split into `to`, or continues an interrupted run; `progress` is called with the
    /// number of pictures done. Returns whether all is done; false after an interrupt.
    ///
    /// # Errors
    /// When pictures can't be read (all are named together), or when the folder can't be written.
    pub fn pack(
        &self,
        split: Split,
        to: &Path,
        stop: &Stop,
        mut progress: impl FnMut(usize),
    ) -> Result<bool, DataError> {
        let part = self.part(split);
        let layout = Layout {
            views: 1,
            channels: self.rule.channels,
            side: self.rule.size,
            dtype: Dtype::U8,
            classes: self.classes.len(),
            records_per_shard: records_per_shard(&self.rule),
            scaling_factor: 1.0,
        };
        fs::create_dir_all(to).map_err(DataError::io(to))?;
        let lock_path = to.join("pack.lock");
        let lock = lock_file(&lock_path).map_err(DataError::io(&lock_path))?;
        // Another process may be decoding into the same cache; its result is used. File systems
        // without locks are accepted.
        while matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) {
            if stop.requested() {
                return Ok(false);
            }
            std::thread::sleep(BETWEEN_LOOKS);
        }
        if is_packed(to) {
            return Ok(true);
        }
        let mut writer = ShardWriter::open(to, layout, self.classes.clone())?;
        let (mut broken, mut done) = (Vec::new(), writer.next());
        progress(done);
        let record = self.rule.size * self.rule.size * self.rule.channels;
        let at_once = (DECODED_BYTES / (4 * record)).clamp(1, DECODED_AT_ONCE);
        for pictures in part[done.min(part.len())..].chunks(at_once) {
            if stop.requested() {
                return Ok(false);
            }
            let read: Vec<_> = (pictures.par_iter())
                .map(|(path, _)| read_then(path, |picture| self.rule.apply(&picture)))
                .collect();
            for (values, (_, label)) in read.into_iter().zip(pictures) {
                match values {
                    // After the first broken picture, the others are only checked.
                    Ok(values) if broken.is_empty() => writer.push(&values, *label)?,
                    Ok(_) => {}
                    Err(error) => broken.push(with_cause(&error)),
                }
            }
            done += pictures.len();
            progress(done);
        }
        if !broken.is_empty() {
            return Err(DataError::Broken { pictures: broken });
        }
        writer.finish().map(|()| true)
    }
}

/// To be raised whenever the arithmetic of the records changes, so that cached ones are not reused.
const RECORDS_VERSION: u32 = 1;

/// Most pictures decoded at once, on all cores.
const DECODED_AT_ONCE: usize = 256;
/// Most bytes of their decoded numbers, unless one picture needs more.
const DECODED_BYTES: usize = 128 << 20;

/// Time between two attempts to lock.
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);

/// Approximate bytes of a shard: the work that a kill can lose.
const SHARD_BYTES: usize = 32 << 20;

fn records_per_shard(rule: &Rule) -> usize {
    (SHARD_BYTES / (rule.size * rule.size * rule.channels).max(1)).clamp(1, 1 << 16)
}

type Labelled = Vec<(PathBuf, usize)>;

/// Holds out about a share of the pictures by a hash of class and name; both parts keep the order.
fn divide(folder: &ImageFolder, share: f64) -> (Labelled, Labelled) {
    // The only class of a flat folder has an arbitrary name, which is left out.
    let classes = folder.classes();
    let class = |label: usize| {
        if classes.len() > 1 {
            &classes[label]
        } else {
            ""
        }
    };
    let held_out = |path: &Path, label: usize| {
        let mut hash = Sha256::new();
        hash.update(class(label));
        hash.update("/");
        hash.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        let start = hash
            .finalize()
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes));
        // 53 bits, as a number in [0, 1).
        ((start >> 11) as f64) < share * (1u64 << 53) as f64
    };
    let (mut train, mut test) = (Vec::new(), Vec::new());
    for image @ (path, label) in folder.images() {
        let part = if held_out(path, *label) {
            &mut test
        } else {
            &mut train
        };
        part.push(image.clone());
    }
    (train, test)
}

/// Whether a folder has all records.
pub fn is_packed(folder: &Path) -> bool {
    folder.join(INDEX).is_file()
}

/// Opens the records of a split.
///
/// # Errors
/// As [`Latents::open`]; also when they don't have the rule's size and channels.
pub fn open_records(folder: &Path, rule: &Rule) -> Result<Latents, DataError> {
    let records = Latents::open(folder)?;
    if (records.channels(), records.side()) != (rule.channels, rule.size) {
        let expected = format!("pictures of {0}x{1}x{1}", rule.channels, rule.size);
        let found = format!("{}x{}x{1}", records.channels(), records.side());
        return Err(DataError::unexpected(folder, expected, found));
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::super::Samples;
    use super::*;
    use crate::images::read_rgb;

    const RULE: Rule = Rule {
        size: 4,
        channels: 3,
        fit: Fit::Crop,
    };

    /// `classes` folders of `count` pictures, each of a single colour that identifies it.
    fn folder(classes: &[&str], count: u8) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (label, class) in classes.iter().enumerate() {
            fs::create_dir_all(root.path().join(class)).unwrap();
            for index in 0..count {
                let picture = RgbImage::from_pixel(6, 5, Rgb([index, label as u8, 51]));
                picture
                    .save(root.path().join(class).join(format!("{index:02}.png")))
                    .unwrap();
            }
        }
        root
    }

    fn share(root: &Path, share: f64) -> PictureSet {
        PictureSet::open(root, &HeldOut::Share(share), RULE).unwrap()
    }

    #[test]
    fn records_are_the_pictures_in_order() {
        let root = folder(&["a", "b"], 10);
        let set = share(root.path(), 0.25);
        let counts = [Split::Train, Split::Test].map(|split| set.count(split));
        assert_eq!(counts.iter().sum::<usize>(), 20);
        assert!((2..10).contains(&counts[1]), "{counts:?}");
        let mut seen = Vec::new();
        for split in [Split::Train, Split::Test] {
            let to = tempfile::tempdir().unwrap();
            let mut reached = Vec::new();
            assert!(
                set.pack(split, to.path(), &Stop::default(), |done| reached
                    .push(done))
                    .unwrap()
            );
            assert_eq!(reached, [0, set.count(split)]);
            let records = open_records(to.path(), &RULE).unwrap();
            records.verify().unwrap();
            assert_eq!(records.class_names(), ["a", "b"]);
            for (index, (path, label)) in set.part(split).iter().enumerate() {
                let mut values = Vec::new();
                assert_eq!(records.read(index, 0, &mut values).unwrap(), *label);
                let name: u8 = path.file_stem().unwrap().to_str().unwrap().parse().unwrap();
                let planes = [name, *label as u8, 51].map(|byte| [level(byte); 16]);
                assert_eq!(values, planes.as_flattened());
                seen.push((*label, name));
            }
        }
        // Every picture is in one part; the parts are the same each time.
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 20);
        // A new picture does not change the part of any other.
        let before = set.part(Split::Test).to_vec();
        assert_eq!(share(root.path(), 0.25).part(Split::Test), before);
        let more = RgbImage::from_pixel(6, 5, Rgb([0; 3]));
        more.save(root.path().join("a/more.png")).unwrap();
        let mut after = share(root.path(), 0.25).part(Split::Test).to_vec();
        after.retain(|(path, _)| !path.ends_with("more.png"));
        assert_eq!(after, before);
    }

    #[test]
    fn packing_goes_on_and_leaves_the_same_bytes() {
        let root = folder(&["a"], 7);
        let set = share(root.path(), 0.0);
        let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        set.pack(Split::Train, whole.path(), &Stop::default(), |_| ())
            .unwrap();
        // Simulates a writer that was killed after a shard of two.
        let shard = "shard-00000.bin";
        let layout = Layout {
            views: 1,
            channels: 3,
            side: 4,
            dtype: Dtype::U8,
            classes: 1,
            records_per_shard: records_per_shard(&RULE),
            scaling_factor: 1.0,
        };
        let mut writer = ShardWriter::open(broken.path(), layout, vec!["a".into()]).unwrap();
        for (path, label) in &set.part(Split::Train)[..2] {
            writer
                .push(&RULE.apply(&read_rgb(path).unwrap()), *label)
                .unwrap();
        }
        writer.finish().unwrap();
        fs::remove_file(broken.path().join("latents.json")).unwrap();
        let mut reached = Vec::new();
        set.pack(Split::Train, broken.path(), &Stop::default(), |done| {
            reached.push(done)
        })
        .unwrap();
        assert_eq!(reached, [2, 7]);
        for file in [shard, "latents.json"] {
            let read = |folder: &Path| fs::read(folder.join(file)).unwrap();
            assert_eq!(read(broken.path()), read(whole.path()), "{file}");
        }
    }

    #[test]
    fn grey_is_pillows_luma() {
        // Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0)), Pillow 11.
        for (colour, expected) in [
            ([255, 0, 0], 76),
            ([0, 255, 0], 150),
            ([0, 0, 255], 29),
            ([255, 255, 255], 255),
            ([1, 2, 3], 2),
            ([200, 100, 50], 124),
        ] {
            assert_eq!(grey(colour), expected, "{colour:?}");
        }
        let rule = Rule {
            channels: 1,
            ..RULE
        };
        let values = rule.apply(&RgbImage::from_pixel(9, 9, Rgb([200, 100, 50])));
        assert_eq!(values, [level(124); 16]);
        let rule = Rule {
            fit: Fit::Pad { fill: 255 },
            ..RULE
        };
        let values = rule.apply(&RgbImage::from_pixel(2, 4, Rgb([0; 3])));
        assert_eq!(values[..4], [1.0, -1.0, -1.0, 1.0]);
    }

    #[test]
    fn the_key_says_what_the_records_depend_on() {
        let root = folder(&["a", "b"], 4);
        let key = |set: &PictureSet| set.key().unwrap();
        let before = key(&share(root.path(), 0.5));
        assert_eq!(key(&share(root.path(), 0.5)), before);
        assert_ne!(key(&share(root.path(), 0.25)), before);
        let padded = Rule {
            fit: Fit::Pad { fill: 0 },
            ..RULE
        };
        let padded = PictureSet::open(root.path(), &HeldOut::Share(0.5), padded).unwrap();
        assert_ne!(key(&padded), before);
        fs::write(root.path().join("a/01.png"), "another").unwrap();
        assert_ne!(key(&share(root.path(), 0.5)), before);
    }

    #[test]
    fn test_pictures_of_other_classes_are_refused() {
        let (train, test, flat) = (
            folder(&["a", "b"], 2),
            folder(&["a", "c"], 2),
            folder(&["."], 3),
        );
        let open = |train: &tempfile::TempDir, test: &tempfile::TempDir| {
            let held_out = HeldOut::Folder(test.path().to_owned());
            PictureSet::open(train.path(), &held_out, RULE)
        };
        let error = open(&train, &test).unwrap_err().to_string();
        assert!(error.contains("a, b, found a, c"), "{error}");
        let same = open(&train, &folder(&["a", "b"], 3)).unwrap();
        assert_eq!((same.count(Split::Train), same.count(Split::Test)), (4, 6));
        // For flat folders the names do not matter.
        assert_eq!(
            open(&flat, &folder(&["."], 1)).unwrap().count(Split::Test),
            1
        );
        let all = PictureSet::open(train.path(), &HeldOut::Share(0.9), RULE).unwrap_err();
        assert!(all.to_string().contains("all of class"), "{all}");
    }
}
