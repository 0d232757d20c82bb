//! The format of packed shards: record, header and index.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::data::DataError;

/// The index file.
pub(in crate::data) const INDEX: &str = "latents.json";
pub(super) const FORMAT: &str = "tinyfusion latents";
pub(super) const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"TFLATENT";
/// Bytes of a shard's header, and alignment of records.
pub(super) const HEADER: usize = 64;
/// Bytes of the checksum at a shard's end.
pub(super) const TRAILER: usize = 4;
/// Most bytes of a shard by the estimate of [`Layout::check`]; far from overflow.
const MOST_BYTES: usize = 1 << 36;

/// The usual number of records in a shard: 33 MB for ImageNet's latents in half precision with two
/// views.
pub const RECORDS_PER_SHARD: usize = 2048;

/// Type of stored numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Half precision, rounded to nearest, at half the size. Latents lie far within its range, and
    /// the rounding (relative 2^-11) is small beside the noise of the posterior they were drawn
    /// from.
    F16,
    /// Single precision: the autoencoder's output, bit for bit.
    F32,
    /// Bytes of pictures: `b` represents `b / 127.5 - 1`.
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

/// Layout of a set's records.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// Views per sample: 1 (image) or 2 (image, mirror image).
    pub views: usize,
    /// Channels of a latent.
    pub channels: usize,
    /// Side of a latent.
    pub side: usize,
    /// Type of stored numbers.
    pub dtype: Dtype,
    /// Number of classes; labels are smaller.
    pub classes: usize,
    /// Records in every shard but the last; see [`RECORDS_PER_SHARD`].
    pub records_per_shard: usize,
    /// Factor applied to the autoencoder's latents: 0.18215 for Stable Diffusion's.
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

    /// Numbers in one view.
    pub(super) fn values(&self) -> usize {
        self.channels * self.side * self.side
    }

    /// Offset of the label in a record.
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

    /// Refuses layouts that can't be stored; `path` is for messages. After this, no product of the
    /// sizes overflows.
    pub(super) fn check(&self, path: &Path) -> Result<(), DataError> {
        let sizes = [
            2,
            self.channels,
            self.side,
            self.side,
            4,
            self.records_per_shard,
        ];
        // The factor 16 covers label and padding: at most 64 bytes of record for 4 bytes of
        // numbers.
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

    /// The header of a shard of `records` records, starting with number `first`.
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

    /// Compares the first bytes of a shard with the expected header.
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

/// Contents of `latents.json`.
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

/// One shard in the index.
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

/// A checksum in the format of the index.
pub(super) fn hexadecimal(checksum: u32) -> String {
    format!("{checksum:08x}")
}

impl Index {
    pub(super) fn read(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join(INDEX);
        let text = std::fs::read_to_string(&path).map_err(DataError::io(&path))?;
        let wrong =
            |expected: &str, found: String| Err(DataError::unexpected(&path, expected, found));
        // The version is read first: another one may have other keys.
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
        // No overflow: the number of shards in the text and of records in a shard are bounded.
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
