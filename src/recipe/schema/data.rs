//! The recipe's data set: the key `data`.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use crate::data::{
    DataError, Fit, HeldOut, IdxPictures, ImageFolder, Latents, Rule, Split, digits, fashion,
    with_cause,
};
use crate::models::Shape;
use crate::recipe::document::diagnostic::Diagnostic;
use crate::recipe::document::reader::Section;
use crate::recipe::document::{Node, Value};
use crate::weights::EmbeddedName;

/// A data set.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// The embedded 8x8 handwritten digits.
    Digits,
    /// Fashion-MNIST, or its part that needs no files for training.
    Fashion(Fashion),
    /// A folder of files in MNIST's format.
    Idx(Idx),
    /// A folder of pictures.
    Pictures(Pictures),
    /// Latents of an `extract` stage, by the stage's name.
    Stage(String),
    /// A folder of latents: packed shards of this project, or the reference's `.npy` files.
    Latents(PathBuf),
}

/// `"fashion"`, `"fashion-10k"` or `{ set = "fashion", folder = "F", flips = true }`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fashion {
    /// The training pictures.
    pub set: FashionSet,
    /// Folder of the files; default: the usual folders.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
    /// Whether each training picture is mirrored half of the time; default false.
    pub flips: bool,
}

/// Training pictures of Fashion-MNIST.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum FashionSet {
    /// All 60,000, from the files.
    #[serde(rename = "fashion")]
    Whole,
    /// The 10,000 that are embedded in the program; the test part is read from the files.
    #[serde(rename = "fashion-10k")]
    Embedded,
}

impl FashionSet {
    const NAMES: [(&str, Self); 2] = [("fashion", Self::Whole), ("fashion-10k", Self::Embedded)];

    fn name(self) -> &'static str {
        match self {
            Self::Whole => "fashion",
            Self::Embedded => "fashion-10k",
        }
    }
}

/// `{ idx = "folder" }`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Idx {
    /// The folder.
    pub idx: PathBuf,
    /// Whether each training picture is mirrored half of the time; default false.
    pub flips: bool,
    /// Sizes and classes of the pictures, read from the files with the recipe.
    #[serde(skip)]
    shape: DataShape,
}

/// `{ images = "folder", size = 32 }`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pictures {
    /// A folder with one folder of pictures per class, or a flat one, which is one class.
    pub images: PathBuf,
    /// Size in pixels, number of channels (default 3), and how a picture is brought to them.
    #[serde(flatten)]
    pub rule: Rule,
    /// Whether each training picture is mirrored half of the time; default false.
    pub flips: bool,
    /// The held-out pictures for evaluation; default: a tenth of the folder.
    #[serde(flatten, serialize_with = "held_out")]
    pub held_out: HeldOut,
    /// Folder that keeps the decoded pictures for other runs; default: in the run directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// Number of classes, by which a recipe can be planned before its pictures are there; default:
    /// as many as the folder has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<usize>,
    /// Sizes and classes of the pictures, read from the folder with the recipe.
    #[serde(skip)]
    shape: DataShape,
}

fn held_out<S: Serializer>(held_out: &HeldOut, serializer: S) -> Result<S::Ok, S::Error> {
    let (key, value) = match held_out {
        HeldOut::Share(share) => ("held_out", serde_json::json!(share)),
        HeldOut::Folder(folder) => ("test", serde_json::json!(folder)),
    };
    serializer.collect_map([(key, value)])
}

/// Sizes and classes of a data set's samples; displayed as `1x28x28 in 10 classes`.
#[derive(Clone, Debug, PartialEq)]
pub struct DataShape {
    /// Channels.
    pub channels: usize,
    /// Side, in pixels.
    pub side: usize,
    /// Number of classes.
    pub classes: usize,
    /// Names of the classes; empty if unknown.
    pub class_names: Vec<String>,
    /// The embedded classifier for these pictures.
    pub features: Option<EmbeddedName>,
}

impl DataShape {
    /// The sizes alone.
    pub(crate) fn sizes(&self) -> Shape {
        Shape {
            channels: self.channels,
            side: self.side,
            classes: self.classes,
        }
    }
}

impl fmt::Display for DataShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            channels,
            side,
            classes,
            ..
        } = self;
        write!(f, "{channels}x{side}x{side} in {classes} classes")
    }
}

/// Approximate share of a folder's pictures that is held out by default.
const HELD_OUT: f64 = 0.1;

const NAMES: [&str; 3] = ["digits", "fashion", "fashion-10k"];

impl fmt::Display for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digits => f.write_str("digits"),
            Self::Fashion(fashion) => f.write_str(fashion.set.name()),
            Self::Stage(name) => f.write_str(name),
            Self::Latents(path) => path.display().fmt(f),
            Self::Idx(Idx { idx, .. }) => idx.display().fmt(f),
            Self::Pictures(pictures) => pictures.images.display().fmt(f),
        }
    }
}

impl Serialize for Data {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Fashion(fashion) if fashion.folder.is_some() || fashion.flips => {
                fashion.serialize(serializer)
            }
            Self::Idx(idx) => idx.serialize(serializer),
            Self::Pictures(pictures) => pictures.serialize(serializer),
            _ => serializer.collect_str(self),
        }
    }
}

impl Data {
    /// Name of the data in a model's provenance.
    pub(crate) fn said(&self) -> String {
        match self {
            Self::Digits | Self::Fashion(_) => self.to_string(),
            Self::Idx(_) => format!("files of MNIST's format in {self}"),
            Self::Pictures(_) => format!("pictures in {self}"),
            Self::Stage(_) | Self::Latents(_) => format!("latents in {self}"),
        }
    }

    /// The data set named in a model's provenance, if it is one with a fixed name.
    pub(crate) fn of_model(said: &str) -> Option<Self> {
        if said == "digits" {
            return Some(Self::Digits);
        }
        let known = FashionSet::NAMES.iter().find(|(name, _)| *name == said);
        known.map(|(_, set)| {
            Self::Fashion(Fashion {
                set: *set,
                folder: None,
                flips: false,
            })
        })
    }

    /// Reads the key, given the names of the stages that extract latents; default: the digits.
    pub(crate) fn read(section: &Section<'_>, extracts: &[String]) -> Option<Self> {
        match section.table().get("data").map(|entry| &entry.node.value) {
            Some(Value::Table(_)) => section.section("data").optional().and_then(Self::table),
            _ => Some(
                section
                    .value("data", |node| Self::string(node, extracts))
                    .or(Self::Digits),
            ),
        }
    }

    fn string(node: &Node, extracts: &[String]) -> Result<Self, Diagnostic> {
        let text = match &node.value {
            Value::String(text) => text,
            _ => return Err(node.mismatch("a string or a table")),
        };
        if let Some(named) = Self::of_model(text) {
            return Ok(named);
        }
        if extracts.iter().any(|name| name == text) {
            return Ok(Self::Stage(text.to_owned()));
        }
        let path = PathBuf::from(text);
        if path.is_dir() && !Latents::is_at(&path) && ImageFolder::open(&path).is_ok() {
            return Err(node.fault(format!(
                "{text:?} is a folder of pictures; to learn them in pixel space write \
                 {{ images = {text:?}, size = 32, channels = 3 }}, or make latents of them by a stage of kind \"extract\""
            )));
        }
        // A single word that is no folder is a mistyped name.
        if path.components().count() > 1 || path.is_dir() {
            return Ok(Self::Latents(path));
        }
        let message = format!(
            "{text:?} is not one of {}, a stage that extracts latents, or the path of a folder of latents",
            NAMES.map(|name| format!("{name:?}")).join(", ")
        );
        let names = extracts.iter().map(String::as_str);
        Err(node.fault(message).suggesting(text, names.chain(NAMES)))
    }

    fn table(section: Section<'_>) -> Option<Self> {
        const KINDS: [&str; 3] = ["images", "idx", "set"];
        const OTHERS: [&str; 9] = [
            "size", "channels", "fit", "fill", "flips", "held_out", "test", "cache", "folder",
        ];
        let given: Vec<&str> = (KINDS.into_iter())
            .filter(|kind| section.table().contains_key(*kind))
            .collect();
        let data = match given[..] {
            ["images"] => {
                let pictures = Pictures::read(&section).map(Self::Pictures);
                section.refuse(&OTHERS, "a folder of pictures");
                pictures
            }
            ["idx"] => {
                let idx = section.value("idx", idx_folder).optional();
                let flips = section.boolean("flips").or(false);
                section.refuse(&OTHERS, "files in the format of MNIST");
                idx.map(|(idx, shape)| Self::Idx(Idx { idx, flips, shape }))
            }
            ["set"] => {
                let set = section.choice("set", &FashionSet::NAMES).optional();
                let folder = section.value("folder", folder).optional();
                let flips = section.boolean("flips").or(false);
                section.refuse(&OTHERS, "Fashion-MNIST");
                set.map(|set| Self::Fashion(Fashion { set, folder, flips }))
            }
            _ => {
                section.accept(&KINDS);
                section.accept(&OTHERS);
                let found = match given.len() {
                    0 => "none".to_owned(),
                    _ => given.join(" and "),
                };
                section.fault(format!(
                    "`data` needs one of `images` (a folder of pictures), `idx` (a folder of files in the format of \
                     MNIST) and `set` (\"fashion\" or \"fashion-10k\"), found {found}"
                ));
                None
            }
        };
        section.finish();
        data
    }

    /// What its samples are; None of latents, of which a folder is asked when it is there.
    pub fn shape(&self) -> Option<DataShape> {
        match self {
            Self::Digits => Some(DataShape {
                channels: 1,
                side: digits::SIDE,
                classes: digits::CLASSES,
                class_names: (0..digits::CLASSES)
                    .map(|digit| digit.to_string())
                    .collect(),
                features: Some(EmbeddedName::DigitsFeatures),
            }),
            Self::Fashion(_) => Some(DataShape {
                channels: 1,
                side: fashion::SIDE,
                classes: fashion::CLASS_NAMES.len(),
                class_names: fashion::CLASS_NAMES.map(str::to_owned).to_vec(),
                features: Some(EmbeddedName::FashionFeatures),
            }),
            Self::Idx(Idx { shape, .. }) | Self::Pictures(Pictures { shape, .. }) => {
                Some(shape.clone())
            }
            Self::Stage(_) | Self::Latents(_) => None,
        }
    }
}

impl Fashion {
    /// Whether a split is read from the files.
    pub(crate) fn needs_files(&self, split: Split) -> bool {
        self.set == FashionSet::Whole || split == Split::Test
    }

    /// The folder of the files.
    ///
    /// # Errors
    /// When it is not found.
    pub(crate) fn files(&self) -> Result<PathBuf, DataError> {
        let found = self.folder.clone().or_else(fashion::folder);
        found.ok_or_else(|| {
            DataError::unexpected(
                Path::new(fashion::FOLDERS[0]),
                fashion::HOW_TO_GET,
                format!("them neither there nor in {}", fashion::FOLDERS[1]),
            )
        })
    }
}

impl Pictures {
    fn read(section: &Section<'_>) -> Option<Self> {
        let classes = section.integer("classes", 1..=1_000_000).optional();
        let listed = |node: &Node| {
            let path = match folder(node) {
                // It can be planned.
                Err(_) if classes.is_some() => return Ok((node.string()?.into(), Vec::new())),
                path => path?,
            };
            let found = ImageFolder::list_classes(&path);
            let found = found.map_err(|error| node.fault(with_cause(&error)))?;
            match classes {
                Some(classes) if classes != found.len() => Err(node.fault(format!(
                    "{} classes are there, and `classes` is {classes}",
                    found.len()
                ))),
                _ => Ok((path, found)),
            }
        };
        let images = section.value("images", listed).optional();
        let size = section.integer("size", 1..=4096).required();
        let channels = section
            .integer("channels", 1..=3)
            .check(|channels| *channels != 2, "must be 1 (grey) or 3")
            .or(3);
        let fit = section.choice("fit", &[("crop", false), ("pad", true)]);
        let fit = if fit.or(false) {
            let fill = section.integer("fill", 0..=255).or(0);
            Fit::Pad { fill }
        } else {
            section.refuse(&["fill"], "fit \"crop\"");
            Fit::Crop
        };
        let flips = section.boolean("flips").or(false);
        let test = section.value("test", folder);
        let held_out = if test.is_absent() {
            let share = section.float("held_out", 0.0..=0.9).or(HELD_OUT);
            Some(HeldOut::Share(share))
        } else {
            section.refuse(&["held_out"], "a folder of test pictures, `test`");
            test.optional().map(HeldOut::Folder)
        };
        let cache = section
            .string("cache")
            .check(|path| !path.is_empty(), "must name a folder");
        let cache = cache.optional().map(PathBuf::from);
        let ((images, class_names), size) = (images?, size?);
        Some(Self {
            images,
            rule: Rule {
                size,
                channels,
                fit,
            },
            flips,
            held_out: held_out?,
            cache,
            shape: DataShape {
                channels,
                side: size,
                classes: classes.unwrap_or(class_names.len()),
                class_names,
                features: None,
            },
            classes,
        })
    }
}

/// A folder of IDX files, and what those to train on hold.
fn idx_folder(node: &Node) -> Result<(PathBuf, DataShape), Diagnostic> {
    let path = folder(node)?;
    let pictures = IdxPictures::open(&path, Split::Train);
    let pictures = pictures.map_err(|error| node.fault(with_cause(&error)))?;
    let shape = DataShape {
        channels: 1,
        side: pictures.side(),
        classes: pictures.classes(),
        class_names: Vec::new(),
        features: None,
    };
    Ok((path, shape))
}

/// An existing folder.
fn folder(node: &Node) -> Result<PathBuf, Diagnostic> {
    let text = node.string()?;
    let path = PathBuf::from(text);
    match path.is_dir() {
        true => Ok(path),
        false => Err(node.fault(format!("folder not found: {text:?}"))),
    }
}
