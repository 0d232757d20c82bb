//! Pictures read by Inception, on one worker or several.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::images::Images;
use crate::models::Inception;
use crate::models::inception::{CLASSES, POOLED, SPATIAL, UnreadablePictures};
use crate::npz::{NpzError, SampleReader};
use crate::ops::FusedOps;
use crate::stop::Stop;
use crate::workers::{Workers, values_of};

/// Inception, and how pictures go through it.
pub struct Reading<'a, B: Backend> {
    /// The network.
    pub inception: &'a Inception<B>,
    /// Pictures at once: some 20 MiB each.
    pub batch: usize,
    /// Who reads: a batch each. The first one has the pictures, and the others
    /// [assist](Self::assist).
    pub workers: &'a dyn Workers,
    /// Ends the reading between two batches.
    pub stop: &'a Stop,
}

/// Activations of a batch, row after row: `[batch, 2048]`, `[batch, 2023]` and `[batch, 1008]`.
pub(super) type Activated = [Vec<f32>; 3];

/// Widths of the rows.
pub(super) const WIDTHS: [usize; 3] = [POOLED, SPATIAL, CLASSES];

impl<B: FusedOps> Reading<'_, B> {
    /// The next batches of a reader, at most one for each worker; none at the end.
    pub(super) fn next(&self, reader: &mut SampleReader) -> Result<Vec<Images>, NpzError> {
        let mut batches = Vec::new();
        while batches.len() < self.workers.size() {
            match reader.next_block(self.batch)? {
                Some(images) => batches.push(images),
                None => break,
            }
        }
        Ok(batches)
    }

    /// The activations of batches, of which there are at most as many as workers.
    pub(super) fn read(&self, batches: &[Images]) -> Result<Vec<Activated>, UnreadablePictures> {
        let Some(own) = batches.first() else {
            return Ok(Vec::new());
        };
        if self.workers.size() == 1 {
            return Ok(vec![self.activations(own)?]);
        }
        self.workers.broadcast(sent(batches));
        Ok(self
            .gathered(Some(own))?
            .into_iter()
            .take(batches.len())
            .collect())
    }

    /// Reads what the first worker gives to this one, until that one [ends](Self::end) it.
    ///
    /// # Errors
    /// When pictures are neither grey nor RGB.
    pub fn assist(&self) -> Result<(), UnreadablePictures> {
        loop {
            let bytes = self.workers.broadcast(Vec::new());
            if bytes.is_empty() {
                return Ok(());
            }
            self.gathered(received(&bytes, self.workers.rank()).as_ref())?;
        }
    }

    /// Lets the others go who assist.
    pub fn end(&self) {
        self.workers.broadcast(Vec::new());
    }

    /// All workers' activations; `own` is what this one reads.
    fn gathered(&self, own: Option<&Images>) -> Result<Vec<Activated>, UnreadablePictures> {
        let own = own.map(|images| self.activations(images)).transpose()?;
        let own = own.unwrap_or_default().concat();
        let all = self.workers.all_gather(bytemuck::cast_slice(&own));
        let split = |bytes: Vec<u8>| {
            let values: Vec<f32> = values_of(&bytes);
            let rows = values.len() / WIDTHS.iter().sum::<usize>();
            let mut rest = &values[..];
            WIDTHS.map(|width| rest.split_off(..rows * width).unwrap_or_default().to_vec())
        };
        Ok(all.into_iter().map(split).collect())
    }

    fn activations(&self, images: &Images) -> Result<Activated, UnreadablePictures> {
        let read = self.inception.read(images)?;
        let values = |rows: Tensor<B, 2>| rows.into_data().iter::<f32>().collect();
        Ok([read.pool, read.spatial, read.probabilities].map(values))
    }
}

/// Batches as bytes: how many there are, the shape of each, then their pixels.
fn sent(batches: &[Images]) -> Vec<u8> {
    let mut bytes = (batches.len() as u64).to_ne_bytes().to_vec();
    for images in batches {
        let shape = images.shape().map(|side| side as u64);
        bytes.extend(bytemuck::cast_slice(&shape));
    }
    for images in batches {
        bytes.extend(images.pixels());
    }
    bytes
}

/// Batch `index` of those [`sent`], if there are so many.
fn received(bytes: &[u8], index: usize) -> Option<Images> {
    let number = |at: usize| Some(values_of::<u64>(bytes.get(8 * at..8 * at + 8)?)[0] as usize);
    let count = number(0)?;
    let shape = |batch: usize| -> Option<[usize; 4]> {
        let [a, b, c, d] = [1, 2, 3, 4].map(|place| number(4 * batch + place));
        Some([a?, b?, c?, d?])
    };
    let mut first = 8 * (1 + 4 * count);
    for batch in 0..count {
        let shape = shape(batch)?;
        let end = first + shape.iter().product::<usize>();
        if batch == index {
            return Images::new(bytes.get(first..end)?.to_vec(), shape).ok();
        }
        first = end;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_of_unlike_sizes_arrive() {
        let of = |count: usize, side: usize| {
            let pixels = (0..count * side * side * 3).map(|i| (i * 7 + side) as u8);
            Images::new(pixels.collect(), [count, side, side, 3]).unwrap()
        };
        let batches = [of(2, 3), of(1, 5), of(0, 4)];
        let bytes = sent(&batches);
        for (index, images) in batches.iter().enumerate() {
            assert_eq!(received(&bytes, index).as_ref(), Some(images));
        }
        assert_eq!(received(&bytes, 3), None);
        assert_eq!(received(&bytes[..bytes.len() - 1], 1), None);
    }
}
