//! Writing packed shards, resumable after interruptions.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use half::f16;

use super::form::{
    Dtype, FORMAT, HEADER, INDEX, Index, Layout, ShardEntry, TRAILER, VERSION, hexadecimal,
    shard_name,
};
use crate::data::DataError;
use crate::files::write_atomic;

/// Writes latents as packed shards; the [module](super) describes the files.
///
/// The records of one shard are gathered in memory, and a full shard appears on disk whole or not
/// at all. After a kill, [`open`](Self::open) the folder again: the finished shards are counted,
/// and [`next`](Self::next) is the record to continue with. With the same records, the files have
/// the same bytes, however often the writing was interrupted. A folder must have one writer at a
/// time.
///
/// # Examples
///
/// ```
/// use tinyfusion::data::latents::{Dtype, Latents, Layout, ShardWriter};
/// let layout = Layout {
///     views: 1, channels: 4, side: 2, dtype: Dtype::F32,
///     classes: 10, records_per_shard: 2, scaling_factor: 0.18215,
/// };
/// let folder = tempfile::tempdir()?;
/// let mut writer = ShardWriter::open(folder.path(), layout, Vec::new())?;
/// for record in writer.next()..5 {
///     writer.push(&[record as f32; 16], record)?;
/// }
/// writer.finish()?;
/// let latents = Latents::open(folder.path())?;
/// assert_eq!((latents.count(), latents.label(4)?), (5, 4));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ShardWriter {
    folder: PathBuf,
    layout: Layout,
    class_names: Vec<String>,
    /// Checksums of the full shards on disk.
    full: Vec<u32>,
    /// Records of the shard being gathered.
    gathered: Vec<u8>,
}

impl ShardWriter {
    /// Starts a folder, or continues one. `class_names` is empty, or has a name for each class.
    ///
    /// Temporary files of a killed writer are removed. Shards of a finished set are kept, and more
    /// records may follow.
    ///
    /// # Errors
    /// When `layout` can't be stored, the folder can't be written or read, or it holds shards of
    /// another layout or with a gap in their numbers.
    pub fn open(
        folder: &Path,
        layout: Layout,
        class_names: Vec<String>,
    ) -> Result<Self, DataError> {
        layout.check(folder)?;
        if !class_names.is_empty() && class_names.len() != layout.classes {
            let expected = format!("a name for each of {} classes", layout.classes);
            let found = format!("{} names", class_names.len());
            return Err(DataError::unexpected(folder, expected, found));
        }
        fs::create_dir_all(folder).map_err(DataError::io(folder))?;
        let shards = tidy(folder).map_err(DataError::io(folder))?;
        let mut writer = Self {
            folder: folder.to_owned(),
            layout,
            class_names,
            full: Vec::new(),
            gathered: Vec::new(),
        };
        for number in 0..shards {
            writer.take_up(number, number + 1 == shards)?;
        }
        Ok(writer)
    }

    /// Number of the next record, which is the number of records so far.
    pub fn next(&self) -> usize {
        self.full.len() * self.layout.records_per_shard + self.gathered.len() / self.layout.stride()
    }

    /// Whether the set was finished, and nothing was added since.
    pub fn finished(&self) -> bool {
        self.folder.join(INDEX).is_file()
    }

    /// Adds a record: `latents`, `[views, channels, side, side]` row-major, and its label. A full
    /// shard is written before the next record is added.
    ///
    /// # Errors
    /// [`DataError::Sample`] when there are more or fewer numbers, one is not finite or too large
    /// for the layout's type, or the label is no class; [`DataError::Io`] when the full shard can't
    /// be written. The record is then not added.
    pub fn push(&mut self, latents: &[f32], label: usize) -> Result<(), DataError> {
        let Layout {
            dtype,
            classes,
            records_per_shard,
            ..
        } = self.layout;
        let wrong = |expected: String, found: String| {
            Err(DataError::Sample {
                index: self.next(),
                expected,
                found,
            })
        };
        let count = self.layout.views * self.layout.values();
        if latents.len() != count {
            return wrong(format!("{count} numbers"), latents.len().to_string());
        }
        let most = match dtype {
            Dtype::F16 => f16::MAX.to_f32(),
            Dtype::F32 => f32::MAX,
            Dtype::U8 => 1.0,
        };
        let unfit = |value: &&f32| value.is_nan() || value.abs() > most;
        if let Some(value) = latents.iter().find(unfit) {
            return wrong(format!("finite numbers up to {most:e}"), value.to_string());
        }
        if label >= classes {
            return wrong(format!("a label below {classes}"), label.to_string());
        }
        if self.gathered.len() == records_per_shard * self.layout.stride() {
            let checksum = self.write_shard()?;
            self.full.push(checksum);
            self.gathered.clear();
        }
        let end = self.gathered.len() + self.layout.stride();
        for value in latents {
            match dtype {
                Dtype::F16 => self
                    .gathered
                    .extend_from_slice(&f16::from_f32(*value).to_le_bytes()),
                Dtype::F32 => self.gathered.extend_from_slice(&value.to_le_bytes()),
                // Rounded, so that the value of a byte gives that byte again.
                Dtype::U8 => self.gathered.push(((value + 1.0) * 127.5).round() as u8),
            }
        }
        // Below `classes`, which fits a `u32`.
        self.gathered
            .extend_from_slice(&(label as u32).to_le_bytes());
        self.gathered.resize(end, 0);
        Ok(())
    }

    /// Writes the last shard, full or not, and the index that completes the set.
    ///
    /// # Errors
    /// When there are no records, or a file can't be written.
    pub fn finish(mut self) -> Result<(), DataError> {
        let count = self.next();
        if count == 0 {
            return Err(DataError::unexpected(&self.folder, "records", "none"));
        }
        let capacity = self.layout.records_per_shard;
        if !self.gathered.is_empty() {
            let checksum = self.write_shard()?;
            self.full.push(checksum);
        }
        let shards = self.full.iter().enumerate().map(|(number, checksum)| {
            let records = capacity.min(count - number * capacity);
            ShardEntry {
                file: shard_name(number),
                records,
                checksum: hexadecimal(*checksum),
            }
        });
        let index = Index {
            format: FORMAT.to_owned(),
            version: VERSION,
            count,
            shards: shards.collect(),
            layout: self.layout,
            class_names: self.class_names,
        };
        let path = self.folder.join(INDEX);
        write_atomic(&path, |file| {
            serde_json::to_writer_pretty(&mut *file, &index)?;
            file.write_all(b"\n")
        })
        .map_err(DataError::io(&path))
    }

    /// Writes the gathered records as the next shard and returns its checksum.
    fn write_shard(&self) -> Result<u32, DataError> {
        // An index of fewer records must not outlive the shard it describes.
        let index = self.folder.join(INDEX);
        match fs::remove_file(&index) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(DataError::io(&index)(error));
            }
            _ => {}
        }
        let records = self.gathered.len() / self.layout.stride();
        let first = self.full.len() * self.layout.records_per_shard;
        let header = self.layout.header(first, records);
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(&header);
        checksum.update(&self.gathered);
        let checksum = checksum.finalize();
        let path = self.folder.join(shard_name(self.full.len()));
        write_atomic(&path, |file| {
            file.write_all(&header)?;
            file.write_all(&self.gathered)?;
            file.write_all(&checksum.to_le_bytes())
        })
        .map_err(DataError::io(&path))?;
        Ok(checksum)
    }

    /// Counts an existing shard. If the last one is short, its records are gathered again.
    fn take_up(&mut self, number: usize, last: bool) -> Result<(), DataError> {
        let layout = &self.layout;
        let path = self.folder.join(shard_name(number));
        let io = |error| DataError::io(&path)(error);
        let mut file = File::open(&path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let capacity = layout.records_per_shard;
        let allowed = if last { 1 } else { capacity }..=capacity;
        let records = allowed
            .clone()
            .find(|&records| layout.shard_bytes(records) as u64 == length)
            .ok_or_else(|| {
                let bytes = |records: &usize| layout.shard_bytes(*records);
                let expected = format!(
                    "{} to {} bytes for {allowed:?} records",
                    bytes(allowed.start()),
                    bytes(allowed.end())
                );
                DataError::unexpected(&path, expected, length.to_string())
            })?;
        let mut header = [0; HEADER];
        file.read_exact(&mut header).map_err(io)?;
        let first = number * capacity;
        layout.check_header(&path, &header, first, records)?;
        if records < capacity {
            let mut bytes = Vec::new();
            file.take(length).read_to_end(&mut bytes).map_err(io)?;
            let (records, trailer) = bytes.split_at(bytes.len() - TRAILER);
            let mut checksum = crc32fast::Hasher::new();
            checksum.update(&header);
            checksum.update(records);
            // The shard will get a new checksum, which must not hide damage.
            let checksum = checksum.finalize();
            if trailer != checksum.to_le_bytes() {
                let expected = "a shard that fits its checksum";
                let found = hexadecimal(checksum);
                return Err(DataError::unexpected(&path, expected, found));
            }
            self.gathered = records.to_vec();
            return Ok(());
        }
        let mut trailer = [0; TRAILER];
        let at = length - TRAILER as u64;
        io::Seek::seek(&mut file, io::SeekFrom::Start(at)).map_err(io)?;
        file.read_exact(&mut trailer).map_err(io)?;
        self.full.push(u32::from_le_bytes(trailer));
        Ok(())
    }
}

/// Removes the unfinished files of a killed writer and counts the shards, which must be numbered
/// without a gap.
fn tidy(folder: &Path) -> io::Result<usize> {
    let mut shards = BTreeSet::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.starts_with(".shard-") && name.ends_with(".tmp") {
            fs::remove_file(folder.join(name))?;
        } else if name.starts_with("shard-") && name.ends_with(".bin") {
            shards.insert(name.to_owned());
        }
    }
    match (0..shards.len())
        .map(shard_name)
        .find(|name| !shards.contains(name))
    {
        Some(missing) => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} shards, but {missing} is not among them", shards.len()),
        )),
        None => Ok(shards.len()),
    }
}
