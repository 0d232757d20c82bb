//! What layers, masks and models are measured with.

use super::context::Context;
use crate::data::{BatchPlan, BatchSource, Split};
use crate::models::Network;
use crate::ops::TrainingBackend;
use crate::process::{AnyProcess, Process as _};
use crate::pruning::ScoreBatch;
use crate::recipe::RecipeError;
use crate::training::TrainingError;
use crate::weights::Checkpoint;

/// A network, its process, and batches of pictures.
pub(super) struct Measuring<'a, B: TrainingBackend> {
    pub(super) network: Network<B::InnerBackend>,
    pub(super) process: AnyProcess,
    source: BatchSource,
    device: &'a B::Device,
}

impl<B: TrainingBackend> Context<'_, B> {
    /// For a model, and pictures drawn from a part of the data; at times below `timesteps`, or at
    /// all.
    pub(super) fn measuring(
        &self,
        model: &Checkpoint,
        part: Split,
        seed: u64,
        batch: usize,
        timesteps: Option<usize>,
    ) -> Result<Measuring<'_, B>, RecipeError> {
        let network = model.network::<B::InnerBackend>(self.device)?;
        let process = model.trained_by().process();
        let shape = model.denoiser()?.shape();
        let times = process.times();
        let plan = BatchPlan {
            batch,
            seed,
            channels: shape.channels,
            size: shape.side,
            classes: shape.classes,
            label_drop: 0.0,
            times: match timesteps {
                Some(timesteps) => times.within(timesteps),
                None => times,
            },
            candidates: Vec::new(),
        };
        Ok(Measuring {
            network: network.computing(self.recipe.compute),
            process,
            source: BatchSource::new(plan, self.part(part)?),
            device: self.device,
        })
    }
}

impl<B: TrainingBackend> Measuring<'_, B> {
    pub(super) fn batch(&self, step: usize) -> Result<ScoreBatch<B::InnerBackend>, RecipeError> {
        let batch = self
            .source
            .draw::<B::InnerBackend>(step, self.device)
            .map_err(TrainingError::from)?;
        Ok(ScoreBatch {
            x: batch.x,
            noise: batch.noise,
            y: batch.y,
            t: batch.t,
        })
    }
}
