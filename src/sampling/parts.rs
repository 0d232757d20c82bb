//! Samples on disk while they are being drawn. A part is always the same batch, whichever process
//! draws it, and when. The parts of a complete set become one archive and are deleted.

use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{Sampling, SamplingError};
use crate::files::write_atomic;
use crate::images::Images;
use crate::npz::SampleWriter;

/// Samples on disk, one file per batch.
pub(super) struct Parts<'a> {
    pub(super) folder: PathBuf,
    pub(super) sampling: &'a Sampling,
    /// `[height, width, channels]`
    pub(super) shape: [usize; 3],
}

impl Parts<'_> {
    pub(super) fn count(&self) -> usize {
        self.sampling.count.div_ceil(self.sampling.batch)
    }

    /// Samples of a part.
    pub(super) fn range(&self, part: usize) -> Range<usize> {
        let first = part * self.sampling.batch;
        first..self.sampling.count.min(first + self.sampling.batch)
    }

    fn path(&self, part: usize) -> PathBuf {
        self.folder.join(format!("part-{part:06}.u8"))
    }

    /// Whether a part is complete; a file cut off while being written has another name.
    pub(super) fn has(&self, part: usize) -> bool {
        let bytes = self.range(part).len() * self.shape.iter().product::<usize>();
        std::fs::metadata(self.path(part)).is_ok_and(|found| found.len() == bytes as u64)
    }

    pub(super) fn write(&self, part: usize, pixels: &[u8]) -> Result<(), SamplingError> {
        let path = self.path(part);
        write_atomic(&path, |file| file.write_all(pixels)).map_err(SamplingError::io(&path))
    }

    pub(super) fn assemble(&self, archive: &Path, labels: &[usize]) -> Result<(), SamplingError> {
        let [height, width, channels] = self.shape;
        let labels: Vec<i64> = labels.iter().map(|label| *label as i64).collect();
        let shape = [self.sampling.count, height, width, channels];
        let mut writer = SampleWriter::create(archive, shape)?;
        for part in 0..self.count() {
            let path = self.path(part);
            let pixels = std::fs::read(&path).map_err(SamplingError::io(&path))?;
            let images = Images::new(pixels, [self.range(part).len(), height, width, channels]);
            let broken = |error| SamplingError::place(&path, format!("{error}"));
            writer.push(&images.map_err(broken)?)?;
        }
        Ok(writer.finish(Some(&labels))?)
    }

    pub(super) fn delete(&self) {
        // Parts only serve to continue, so a failure to delete them is harmless.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
