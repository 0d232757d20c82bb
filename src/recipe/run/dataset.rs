//! The recipe's data, opened.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use burn_dataset::Dataset;

use super::context::Context;
use super::extract::LATENTS;
use super::models::stage_folder;
use crate::data::{
    DataError, Digits, IdxPictures, Latents, Mirrored, PictureSet, Samples, Split, fashion,
    is_packed, open_records,
};
use crate::ops::TrainingBackend;
use crate::recipe::RecipeError;
use crate::recipe::schema::data::{Data, DataShape, Idx, Pictures};
use crate::report::Progress;
use crate::report::thousands;

/// Folder of decoded pictures in the run directory.
const RECORDS: &str = "data";
/// File of the run directory that says which pictures were decoded.
const NOTE: &str = "data.json";

/// Which pictures a run learns from.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    /// [`PictureSet::key`], or the checksum of IDX files.
    key: String,
    train: usize,
    test: usize,
    class_names: Vec<String>,
}

impl<B: TrainingBackend> Context<'_, B> {
    /// Samples to learn from, or to be measured against.
    ///
    /// # Errors
    /// When they can't be read; and of held-out latents, of which there are none.
    pub(crate) fn part(&self, split: Split) -> Result<Arc<dyn Samples>, RecipeError> {
        let data = &self.recipe.data;
        let (samples, flips, side): (Arc<dyn Samples>, _, _) = match data {
            Data::Digits => return Ok(Arc::new(Digits::new(split))),
            Data::Fashion(data) => {
                let pictures = match data.needs_files(split) {
                    true => fashion::open(&data.files()?, split)?,
                    false => fashion::embedded(),
                };
                (Arc::new(pictures), data.flips, fashion::SIDE)
            }
            Data::Idx(Idx { idx, flips, .. }) => {
                let pictures = IdxPictures::open(idx, split)?;
                if split == Split::Train {
                    self.same_as_before(idx, &pictures)?;
                }
                let side = pictures.side();
                (Arc::new(pictures), *flips, side)
            }
            Data::Pictures(pictures) => {
                let records = self.records(pictures, split)?;
                (Arc::new(records), pictures.flips, pictures.rule.size)
            }
            Data::Latents(_) | Data::Stage(_) if split == Split::Test => {
                return Err(RecipeError::Run(format!("{data}: no latents are held out")));
            }
            Data::Latents(path) => return Ok(Arc::new(Latents::open(path)?)),
            Data::Stage(name) => return Ok(Arc::new(Latents::open(&self.extracted(name)?)?)),
        };
        Ok(match flips && split == Split::Train {
            true => Arc::new(Mirrored::new(samples, side)),
            false => samples,
        })
    }

    /// The samples to be measured against, where there are any: files may be missing, and nothing
    /// held out.
    ///
    /// # Errors
    /// As [`part`](Self::part), of what is there.
    pub(crate) fn held_out(&self) -> Result<Option<Arc<dyn Samples>>, RecipeError> {
        let there = match &self.recipe.data {
            Data::Digits => true,
            Data::Fashion(data) => data.files().is_ok(),
            Data::Idx(Idx { idx, .. }) => IdxPictures::is_at(idx, Split::Test),
            Data::Pictures(pictures) => self.note(pictures)?.0.test > 0,
            Data::Stage(_) | Data::Latents(_) => false,
        };
        there.then(|| self.part(Split::Test)).transpose()
    }

    /// What each of the recipe's pictures is.
    ///
    /// # Errors
    /// Of latents.
    pub(crate) fn shape(&self) -> Result<DataShape, RecipeError> {
        let data = &self.recipe.data;
        (data.shape()).ok_or_else(|| RecipeError::Run(format!("{data}: latents are no pictures")))
    }

    /// Names of the classes of the recipe's data, as far as they are known.
    pub(crate) fn class_names(&self) -> Result<Vec<String>, RecipeError> {
        let latents = match &self.recipe.data {
            Data::Latents(path) => path.clone(),
            Data::Stage(name) => self.extracted(name)?,
            // Those of the records, whatever the folders are called by now.
            Data::Pictures(pictures) => return Ok(self.note(pictures)?.0.class_names),
            data => {
                return Ok((data.shape()).map_or_else(Vec::new, |shape| shape.class_names));
            }
        };
        // `.npy` files say none, and a million of them take long to list.
        Ok(match is_packed(&latents) {
            true => Latents::open(&latents)?.class_names().to_vec(),
            false => Vec::new(),
        })
    }

    /// The latents that a stage makes.
    fn extracted(&self, stage: &str) -> Result<PathBuf, RecipeError> {
        Ok(stage_folder(self.recipe, self.directory, stage)?.join(LATENTS))
    }

    /// The decoded pictures of a part, from an earlier stage, run or process where they are there.
    fn records(&self, pictures: &Pictures, split: Split) -> Result<Latents, RecipeError> {
        let (note, listed) = self.note(pictures)?;
        let folder = |split| self.records_folder(pictures, &note, split);
        let missing = |split: &Split| {
            let count = if *split == Split::Train {
                note.train
            } else {
                note.test
            };
            count > 0 && !is_packed(&folder(*split))
        };
        // Both at once: what can't be read in either is told before anything is trained.
        let missing: Vec<Split> = [Split::Train, Split::Test]
            .into_iter()
            .filter(missing)
            .collect();
        if !missing.is_empty() {
            let set = match listed {
                Some(set) => set,
                None => PictureSet::open(&pictures.images, &pictures.held_out, pictures.rule)?,
            };
            if set.key()? != note.key {
                return Err(RecipeError::Run(format!(
                    "{}: the pictures have changed since this run began, and not all of those it began with are in {}; \
                     start a new run",
                    pictures.images.display(),
                    self.records_root(pictures).display()
                )));
            }
            let mut broken = Vec::new();
            for split in missing {
                let mut progress = Progress::new("data", "pictures", set.count(split));
                match set.pack(split, &folder(split), self.stop, |done| {
                    progress.reach(done)
                }) {
                    Ok(true) => {}
                    Ok(false) => return Err(RecipeError::Interrupted),
                    Err(DataError::Broken { pictures }) => broken.extend(pictures),
                    Err(error) => return Err(error.into()),
                }
            }
            if !broken.is_empty() {
                return Err(DataError::Broken { pictures: broken }.into());
            }
        }
        if split == Split::Test && note.test == 0 {
            let problem = format!("{}: no pictures are held out", pictures.images.display());
            return Err(RecipeError::Run(problem));
        }
        Ok(open_records(&folder(split), &pictures.rule)?)
    }

    fn records_root(&self, pictures: &Pictures) -> PathBuf {
        // One worker alone writes outside its run.
        match &pictures.cache {
            Some(cache) if self.workers.leads() => cache.clone(),
            _ => self.directory.path().join(RECORDS),
        }
    }

    fn records_folder(&self, pictures: &Pictures, note: &Note, split: Split) -> PathBuf {
        let name = match split {
            Split::Train => "train",
            Split::Test => "test",
        };
        let key = note.key.get(..KEY).unwrap_or(&note.key);
        self.records_root(pictures).join(key).join(name)
    }

    /// Which pictures the run learns from: those it began with; and their list, if it begins now.
    fn note(&self, pictures: &Pictures) -> Result<(Note, Option<PictureSet>), RecipeError> {
        if let Some(note) = self.noted()? {
            return Ok((note, None));
        }
        let set = PictureSet::open(&pictures.images, &pictures.held_out, pictures.rule)?;
        let note = Note {
            key: set.key()?,
            train: set.count(Split::Train),
            test: set.count(Split::Test),
            class_names: set.classes().to_vec(),
        };
        self.directory
            .write(NOTE, &super::directory::json(&note)?)?;
        crate::say!(
            "data: {} pictures of {} {} to train on, {} held out",
            thousands(note.train),
            note.class_names.len(),
            if note.class_names.len() == 1 {
                "class"
            } else {
                "classes"
            },
            thousands(note.test)
        );
        if set.ignored() > 0 {
            crate::say!(
                "data: {} other entries of {} are passed over; pictures are .png, .jpg and .jpeg, in the folder or one \
                 below",
                set.ignored(),
                pictures.images.display()
            );
        }
        Ok((note, Some(set)))
    }

    /// Notes which IDX files a run learns from, and refuses to go on with others.
    fn same_as_before(&self, folder: &Path, pictures: &IdxPictures) -> Result<(), RecipeError> {
        let key = format!("{:08x}", pictures.checksum());
        match self.noted()? {
            Some(note) if note.key != key => Err(RecipeError::Run(format!(
                "{}: the files have changed since this run began; start a new run",
                folder.display()
            ))),
            Some(_) => Ok(()),
            None => {
                let note = Note {
                    key,
                    train: pictures.len(),
                    test: 0,
                    class_names: Vec::new(),
                };
                self.directory.write(NOTE, &super::directory::json(&note)?)
            }
        }
    }

    fn noted(&self) -> Result<Option<Note>, RecipeError> {
        let path = self.directory.path().join(NOTE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(RecipeError::io(&path)(error)),
        };
        let wrong = |found: String| {
            let path = path.display();
            RecipeError::Run(format!(
                "{path}: expected what this run learns from, found {found}"
            ))
        };
        let note: Note = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        // It names a folder.
        if note.key.is_empty() || !note.key.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(wrong(format!("the key {:?}", note.key)));
        }
        Ok(Some(note))
    }
}

/// Letters of a key that name a folder.
const KEY: usize = 16;
