//! What an extraction will do.

use super::known::{Known, Problem};
use super::missing::Role;
use super::{PlannedStage, Work};
use crate::data::ImageFolder;
use crate::recipe::schema::Stage;
use crate::recipe::schema::extract::Extract;

pub(super) fn plan(
    stage: &Stage,
    extract: &Extract,
    known: &mut Known<'_>,
) -> Result<PlannedStage, Problem> {
    let there = known.need(stage, &extract.images, Role::Images);
    known.need(stage, &extract.vae, Role::Vae);
    let images = match there {
        true => ImageFolder::open(&extract.images)?.images().len(),
        false => 0,
    };
    let views = if extract.mirror { 2 } else { 1 };
    Ok(PlannedStage {
        images: views * images,
        ..PlannedStage::new(stage, "extract latents", Work::Extract(extract.clone()))
    })
}
