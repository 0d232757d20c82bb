//! Packed shards: their form, and reading them.

use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use serde::{Deserialize, Serialize};

use crate::data::{DataError, level};
use crate::files::{open_file, read_at};

/// The file that says what the shards hold.
pub(in crate::data) const INDEX: &str = "latents.json";
pub(super) const FORMAT: &str = "tinyfusion latents";
pub(super) const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"TFLATENT";
/// Bytes of a shard's header, and what records are aligned to.
pub(super) const HEADER: usize = 64;
/// Bytes of the checksum at a shard's end.
pub(super) const TRAILER: usize = 4;
/// Most bytes of a shard: enough for any, and far from overflow.
const MOST_BYTES: usize = 1 << 36;

/// Bytes that are read at once to compare a shard with its checksum.
const PIECE: usize = 1 << 20;

/// A good number of records in a shard: 33 MB of ImageNet's latents at half precision and both views.
pub const RECORDS_PER_SHARD: usize = 2048;

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Half precision, rounded to nearest, half the size; latents lie far within its range, and the rounding (2^-11
    /// of a value) is small beside the noise of the posterior they were drawn from.
    F16,
    /// What the autoencoder made, to the last bit.
    F32,
    /// The bytes of pictures: `b` stands for `b / 127.5 - 1`.
    U8,
}

impl Dtype {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// What every record of a set holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// Views of each sample: 1 (image) or 2 (image, mirror image).
    pub views: usize,
    /// Channels of a latent.
    pub channels: usize,
    /// Side of a latent.
    pub side: usize,
    /// How numbers are stored.
    pub dtype: Dtype,
    /// Number of classes; labels lie below it.
    pub classes: usize,
    /// Records of every shard but the last; see [`RECORDS_PER_SHARD`].
    pub records_per_shard: usize,
    /// What the autoencoder's latents were multiplied by: 0.18215 for Stable Diffusion's.
    pub scaling_factor: f64,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            views,
            channels,
            side,
            dtype,
            classes,
            records_per_shard,
            scaling_factor,
        } = self;
        write!(
            f,
            "{records_per_shard} records a shard, each {views} x {channels} x {side} x {side} numbers of {} bytes, of \
             {classes} classes, scaled by {scaling_factor}",
            dtype.bytes()
        )
    }
}

impl Layout {
    pub(super) fn shape(&self) -> [usize; 3] {
        [self.views, self.channels, self.side]
    }

    /// Numbers of one view.
    pub(super) fn values(&self) -> usize {
        self.channels * self.side * self.side
    }

    /// Where a record's label lies.
    pub(super) fn label_at(&self) -> usize {
        self.views * self.values() * self.dtype.bytes()
    }

    /// Bytes of a record.
    pub(super) fn stride(&self) -> usize {
        (self.label_at() + 4).next_multiple_of(HEADER)
    }

    /// Bytes of a shard of `records`.
    pub(super) fn shard_bytes(&self, records: usize) -> usize {
        HEADER + records * self.stride() + TRAILER
    }

    /// Refuses what can't be stored; `path` is whose layout it is. After this no product of its sizes overflows.
    pub(super) fn check(&self, path: &Path) -> Result<(), DataError> {
        let sizes = [
            2,
            self.channels,
            self.side,
            self.side,
            4,
            self.records_per_shard,
        ];
        // The record's label and padding are paid for by the factor 16.
        let bytes = sizes
            .iter()
            .try_fold(16usize, |n, &size| n.checked_mul(size));
        let expected = if !(1..=2).contains(&self.views) {
            "1 or 2 views"
        } else if [self.channels, self.side, self.records_per_shard].contains(&0) {
            "channels, side and records_per_shard above 0"
        } else if bytes.is_none_or(|bytes| bytes > MOST_BYTES) {
            "shards of less than 4 GiB: fewer records a shard, or a smaller side"
        } else if self.classes == 0 || u32::try_from(self.classes).is_err() {
            "1 to 2^32 - 1 classes"
        } else if !(self.scaling_factor.is_finite() && self.scaling_factor > 0.0) {
            "a scaling_factor above 0"
        } else {
            return Ok(());
        };
        Err(DataError::unexpected(path, expected, self.to_string()))
    }

    /// The header of a shard of `records`, the first of them number `first`.
    pub(super) fn header(&self, first: usize, records: usize) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        let numbers = [
            VERSION as usize,
            self.dtype.bytes(),
            self.views,
            self.channels,
            self.side,
            self.classes,
        ];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        // `check` has bounded all of these.
        for (at, number) in numbers.into_iter().enumerate() {
            put(8 + 4 * at, &(number as u32).to_le_bytes());
        }
        put(32, &self.scaling_factor.to_le_bytes());
        put(40, &(self.records_per_shard as u32).to_le_bytes());
        put(44, &(records as u32).to_le_bytes());
        put(48, &(first as u64).to_le_bytes());
        header
    }

    /// Compares what a shard begins with to the header it should have.
    pub(super) fn check_header(
        &self,
        path: &Path,
        found: &[u8],
        first: usize,
        records: usize,
    ) -> Result<(), DataError> {
        let expected = self.header(first, records);
        if found == expected {
            return Ok(());
        }
        let word = |at: usize| {
            let bytes = found.get(at..).and_then(<[u8]>::first_chunk);
            bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
        };
        let (expected, found) = if !found.starts_with(MAGIC) {
            let start = &found[..found.len().min(MAGIC.len())];
            (
                "a shard of latents, beginning with TFLATENT".to_owned(),
                format!("{:?}", start.escape_ascii().to_string()),
            )
        } else if word(8) != VERSION {
            (format!("version {VERSION}"), word(8).to_string())
        } else {
            (
                format!("{self}; {records} of them from number {first} on"),
                format!(
                    "{} bytes a number, {} views, {} channels, side {}, {} classes, {} of {} records from number {}",
                    word(12),
                    word(16),
                    word(20),
                    word(24),
                    word(28),
                    word(44),
                    word(40),
                    word(48)
                ),
            )
        };
        Err(DataError::unexpected(path, expected, found))
    }
}

/// `latents.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Index {
    pub(super) format: String,
    pub(super) version: u32,
    pub(super) count: usize,
    pub(super) layout: Layout,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) class_names: Vec<String>,
    pub(super) shards: Vec<ShardEntry>,
}

/// One file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ShardEntry {
    pub(super) file: String,
    pub(super) records: usize,
    pub(super) checksum: String,
}

/// Name of a shard.
pub(super) fn shard_name(shard: usize) -> String {
    format!("shard-{shard:05}.bin")
}

/// A checksum as the index writes it.
pub(super) fn hexadecimal(checksum: u32) -> String {
    format!("{checksum:08x}")
}

impl Index {
    fn read(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join(INDEX);
        let text = std::fs::read_to_string(&path).map_err(DataError::io(&path))?;
        let wrong =
            |expected: &str, found: String| Err(DataError::unexpected(&path, expected, found));
        // The version first: another one may have other keys.
        #[derive(Deserialize)]
        struct Kind {
            format: String,
            version: u32,
        }
        let kind: Kind = match serde_json::from_str(&text) {
            Ok(kind) => kind,
            Err(error) => return wrong("JSON with `format` and `version`", error.to_string()),
        };
        if (kind.format.as_str(), kind.version) != (FORMAT, VERSION) {
            let found = format!("`{}`, version {}", kind.format, kind.version);
            return wrong(&format!("`{FORMAT}`, version {VERSION}"), found);
        }
        let index: Self = match serde_json::from_str(&text) {
            Ok(index) => index,
            Err(error) => return wrong("an index of latents", error.to_string()),
        };
        index.layout.check(&path)?;
        let (full, last) = match index.shards.split_last() {
            Some((last, full)) => (full, last),
            None => return wrong("shards", "none".to_owned()),
        };
        let capacity = index.layout.records_per_shard;
        if full.iter().any(|shard| shard.records != capacity)
            || !(1..=capacity).contains(&last.records)
        {
            return wrong(
                &format!("shards of {capacity} records, the last of 1 to {capacity}"),
                format!(
                    "{:?}",
                    index.shards.iter().map(|s| s.records).collect::<Vec<_>>()
                ),
            );
        }
        // Neither can overflow: shards in the text and records in a shard are bounded.
        let sum = full.len() * capacity + last.records;
        if sum != index.count {
            return wrong(
                &format!("{} records", index.count),
                format!("{sum} in shards"),
            );
        }
        let names = index.class_names.len();
        if names != 0 && names != index.layout.classes {
            return wrong(
                &format!("{} class_names, one a class", index.layout.classes),
                names.to_string(),
            );
        }
        Ok(index)
    }
}

struct Shard {
    path: PathBuf,
    /// Number of its first record.
    first: usize,
    records: usize,
    /// As the index has it.
    checksum: String,
    /// The records' labels, or the checksum of what is there if it is another; known once somebody has read of it.
    content: OnceLock<Result<Vec<u32>, String>>,
    /// Kept open, for one of the first shards that are read.
    file: OnceLock<File>,
}

impl Shard {
    /// Opens the file, which must have the size and the header that the index says.
    fn open(&self, layout: &Layout) -> Result<File, DataError> {
        let file = open_file(&self.path).map_err(DataError::io(&self.path))?;
        let length = file.metadata().map_err(DataError::io(&self.path))?.len();
        let bytes = layout.shard_bytes(self.records);
        if length != bytes as u64 {
            let expected = format!("{bytes} bytes for {} records", self.records);
            return Err(DataError::unexpected(
                &self.path,
                expected,
                length.to_string(),
            ));
        }
        let mut header = [0; HEADER];
        (&file)
            .read_exact(&mut header)
            .map_err(DataError::io(&self.path))?;
        layout.check_header(&self.path, &header, self.first, self.records)?;
        Ok(file)
    }
}

/// Files that stay open: a set may have more shards than a process may have files.
const MOST_OPEN: usize = 512;

thread_local! {
    /// What a thread reads a record into before it is decoded.
    static STORED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Records in shards, each read when it is asked for. They are not mapped into memory: of a mapped file that is cut
/// short, or on a disk that fails, the process would be killed where a read returns an error.
pub(super) struct Packed {
    index: Index,
    shards: Vec<Shard>,
    open: AtomicUsize,
}

impl Packed {
    pub(super) fn open(folder: &Path) -> Result<Self, DataError> {
        let index = Index::read(folder)?;
        let mut shards = Vec::with_capacity(index.shards.len());
        for (number, entry) in index.shards.iter().enumerate() {
            // Names are stated for people; another one would lead out of the folder.
            let name = shard_name(number);
            if entry.file != name {
                return Err(DataError::unexpected(
                    &folder.join(INDEX),
                    format!("the file name {name}"),
                    entry.file.clone(),
                ));
            }
            let shard = Shard {
                path: folder.join(name),
                first: number * index.layout.records_per_shard,
                records: entry.records,
                checksum: entry.checksum.clone(),
                content: OnceLock::new(),
                file: OnceLock::new(),
            };
            // What is not there, or of another form, is told before anything is learned.
            shard.open(&index.layout)?;
            shards.push(shard);
        }
        Ok(Self {
            index,
            shards,
            open: AtomicUsize::new(0),
        })
    }

    /// Fills `out` from the bytes at `start` of a shard.
    fn fill(&self, number: usize, start: usize, out: &mut [u8]) -> Result<(), DataError> {
        let shard = &self.shards[number];
        let cut_short = |error: io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                let bytes = self.index.layout.shard_bytes(shard.records);
                let found = "fewer: it was cut short since it was opened";
                DataError::unexpected(&shard.path, format!("{bytes} bytes"), found)
            }
            _ => DataError::io(&shard.path)(error),
        };
        if let Some(file) = shard.file.get() {
            return read_at(file, out, start as u64).map_err(cut_short);
        }
        let file = shard.open(&self.index.layout)?;
        read_at(&file, out, start as u64).map_err(cut_short)?;
        if self.open.fetch_add(1, Ordering::Relaxed) < MOST_OPEN {
            let _ = shard.file.set(file);
        }
        Ok(())
    }

    /// Compares a shard with its checksums, the first time of all: it is whole before anything of it is learned. Returns
    /// its labels.
    fn check(&self, number: usize) -> Result<&[u32], DataError> {
        let shard = &self.shards[number];
        let content = match shard.content.get() {
            Some(content) => content,
            None => {
                let content = self.content(number)?;
                shard.content.get_or_init(|| content)
            }
        };
        content.as_deref().map_err(|found| {
            let expected = format!("the checksum {}", shard.checksum);
            DataError::unexpected(&shard.path, expected, found)
        })
    }

    /// The labels of a shard, or the checksum of what it holds if that is not the one it should have.
    fn content(&self, number: usize) -> Result<Result<Vec<u32>, String>, DataError> {
        let shard = &self.shards[number];
        let layout = &self.index.layout;
        let stride = layout.stride();
        let mut crc32 = crc32fast::Hasher::new();
        let mut header = [0; HEADER];
        self.fill(number, 0, &mut header)?;
        crc32.update(&header);
        let mut labels = Vec::with_capacity(shard.records);
        let at_once = (PIECE / stride).clamp(1, shard.records);
        let mut buffer = vec![0; at_once * stride];
        for first in (0..shard.records).step_by(at_once) {
            let count = at_once.min(shard.records - first);
            let piece = &mut buffer[..count * stride];
            self.fill(number, HEADER + first * stride, piece)?;
            crc32.update(piece);
            for record in piece.chunks_exact(stride) {
                let label = record[layout.label_at()..].first_chunk();
                labels.push(label.map_or(u32::MAX, |label| u32::from_le_bytes(*label)));
            }
        }
        let computed = hexadecimal(crc32.finalize());
        let mut stored = [0; TRAILER];
        self.fill(number, HEADER + shard.records * stride, &mut stored)?;
        let whole =
            hexadecimal(u32::from_le_bytes(stored)) == computed && shard.checksum == computed;
        Ok(if whole { Ok(labels) } else { Err(computed) })
    }

    pub(super) fn count(&self) -> usize {
        self.index.count
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.index.layout
    }

    pub(super) fn class_names(&self) -> &[String] {
        &self.index.class_names
    }

    /// The shard of a record there is, and where it lies in there.
    fn place(&self, index: usize) -> (usize, usize) {
        let layout = &self.index.layout;
        let (number, record) = (
            index / layout.records_per_shard,
            index % layout.records_per_shard,
        );
        (number, HEADER + record * layout.stride())
    }

    pub(super) fn label(&self, index: usize) -> Result<usize, DataError> {
        let (number, start) = self.place(index);
        if let Some(Ok(labels)) = self.shards[number].content.get() {
            return self.label_of(number, labels[index % self.index.layout.records_per_shard]);
        }
        let mut bytes = [0; 4];
        self.fill(number, start + self.index.layout.label_at(), &mut bytes)?;
        self.label_of(number, u32::from_le_bytes(bytes))
    }

    fn label_of(&self, number: usize, label: u32) -> Result<usize, DataError> {
        let classes = self.index.layout.classes;
        let label = label as usize;
        if label < classes {
            return Ok(label);
        }
        let expected = format!("labels below {classes}");
        let path = &self.shards[number].path;
        Err(DataError::unexpected(path, expected, label.to_string()))
    }

    /// `view` is one there is.
    pub(super) fn read(
        &self,
        index: usize,
        view: usize,
        out: &mut Vec<f32>,
    ) -> Result<usize, DataError> {
        let layout = &self.index.layout;
        let (number, start) = self.place(index);
        let label = self.check(number)?[index % layout.records_per_shard];
        let bytes = layout.values() * layout.dtype.bytes();
        let start = start + view * bytes;
        let before = out.len();
        out.resize(before + layout.values(), 0.0);
        let values = &mut out[before..];
        if layout.dtype == Dtype::F32 {
            self.fill(number, start, bytemuck::cast_slice_mut(values))?;
            for value in values {
                *value = f32::from_bits(u32::from_le(value.to_bits()));
            }
            return self.label_of(number, label);
        }
        STORED.with_borrow_mut(|stored| {
            stored.resize(bytes, 0);
            self.fill(number, start, stored)?;
            match layout.dtype {
                Dtype::F16 => widen(stored.as_chunks().0, values),
                _ => (values.iter_mut().zip(&*stored))
                    .for_each(|(value, byte)| *value = level(*byte)),
            }
            self.label_of(number, label)
        })
    }

    pub(super) fn verify(&self) -> Result<(), DataError> {
        for number in 0..self.shards.len() {
            for label in self.check(number)? {
                self.label_of(number, *label)?;
            }
        }
        Ok(())
    }
}

/// Converts little-endian halves to as many floats. `half` looks for the processor's instruction anew for every eight
/// numbers, which takes longer than to convert them.
fn widen(halves: &[[u8; 2]], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx") && std::arch::is_x86_feature_detected!("f16c") {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { widen_by_eights(halves, out) };
    }
    widen_each(halves, out);
}

fn widen_each(halves: &[[u8; 2]], out: &mut [f32]) {
    for (out, half) in out.iter_mut().zip(halves) {
        *out = f16::from_le_bytes(*half).to_f32();
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
fn widen_by_eights(halves: &[[u8; 2]], out: &mut [f32]) {
    use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
    let (eights, rest) = halves.as_chunks::<8>();
    let (wide, last) = out.as_chunks_mut::<8>();
    for (eight, wide) in eights.iter().zip(wide) {
        // SAFETY: sixteen bytes are read and eight floats written, which the arrays have; neither need be aligned.
        unsafe {
            let eight = _mm_loadu_si128(eight.as_ptr().cast());
            _mm256_storeu_ps(wide.as_mut_ptr(), _mm256_cvtph_ps(eight));
        }
    }
    widen_each(rest, last);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_is_widened_as_half_does_it() {
        // An odd count, so that some are left over after the eights.
        let finite = (0..=u16::MAX).filter(|bits| f16::from_bits(*bits).is_finite());
        let halves: Vec<[u8; 2]> = finite.map(u16::to_le_bytes).skip(1).collect();
        let mut out = vec![f32::NAN; halves.len()];
        widen(&halves, &mut out);
        for (half, out) in halves.iter().zip(out) {
            let expected = f16::from_le_bytes(*half).to_f32();
            assert_eq!(out.to_bits(), expected.to_bits());
        }
    }
}
