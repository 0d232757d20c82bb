//! Reading packed shards.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;

use super::form::{Dtype, HEADER, INDEX, Index, Layout, TRAILER, hexadecimal, shard_name};
use crate::data::{DataError, level};
use crate::files::{open_file, read_at};

/// Bytes read at a time to compute a shard's checksum.
const PIECE: usize = 1 << 20;

struct Shard {
    path: PathBuf,
    /// Number of the first record.
    first: usize,
    records: usize,
    /// Checksum in the index.
    checksum: String,
    /// The records' labels, or the actual checksum if it is wrong; known after the first read.
    content: OnceLock<Result<Vec<u32>, String>>,
    /// Kept open for the first [`MOST_OPEN`] shards that are read.
    file: OnceLock<File>,
}

impl Shard {
    /// Opens the file, whose size and header must be as in the index.
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

/// Number of files that stay open: a set may have more shards than a process may open files.
const MOST_OPEN: usize = 512;

thread_local! {
    /// This thread's buffer for a record before it is decoded.
    static STORED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Records in shards, each read on demand. Shards are not mapped into memory: if a mapped file is
/// cut short or its disk fails, the process is killed where a read returns an error.
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
            // The names in the index are for people; any other name could lead out of the folder.
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
            // Missing or unsuitable shards are reported before training starts.
            shard.open(&index.layout)?;
            shards.push(shard);
        }
        Ok(Self {
            index,
            shards,
            open: AtomicUsize::new(0),
        })
    }

    /// Fills `out` from offset `start` of a shard.
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

    /// Returns a shard's labels. The first call compares the shard with its checksum, so that it is
    /// whole before anything is learned from it.
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

    /// The labels of a shard, or its actual checksum if that is wrong.
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

    /// The shard of an existing record, and the offset of the record in it.
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

    /// `view` must exist.
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

/// Converts little-endian halves to floats. `half` tests for the processor's instruction again for
/// every eight numbers, which takes longer than the conversion.
fn widen(halves: &[[u8; 2]], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx") && std::arch::is_x86_feature_detected!("f16c") {
        // SAFETY: the processor has the features that the function is compiled for.
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
        // SAFETY: sixteen bytes are read and eight floats written, as the arrays hold; neither must
        // be aligned.
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
        // An odd count, so that some are left over after the groups of eight.
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
