//! What a pruning in width will do.

use super::cost::{TRAINING, flops, gradient_memory};
use super::known::{Known, Problem};
use super::{PlannedStage, Work};
use crate::models::{Architecture, ChannelGroup, Left, Part};
use crate::pruning::{Leaves, left_of, units, units_left};
use crate::recipe::schema::Stage;
use crate::recipe::schema::source::Source;
use crate::recipe::schema::width::{Amount, Importance, Width};

/// A pruning in width, resolved for the model it prunes.
#[derive(Debug, Clone)]
pub struct WidthPlan {
    /// The model.
    pub from: Source,
    /// The method, as the recipe names it.
    pub method: &'static str,
    /// By what channels are chosen.
    pub importance: Importance,
    /// What leaves of attention.
    pub leaves: Leaves,
    /// How many units stay of each of the model's groups of channels.
    pub keep: Vec<usize>,
    /// The model that is left.
    pub after: Architecture,
}

/// Most images in one pass for gradients, and bytes of what it leaves for its backward pass, where
/// images at several times go through the network together.
const IN_A_PASS: (usize, usize) = (64, 4 << 30);

/// How many times a pass has for a batch of images at each.
pub(crate) fn times_in_a_pass(model: &Architecture, batch: usize) -> usize {
    let (images, bytes) = IN_A_PASS;
    let fit = bytes / model.kept_bytes(batch).max(1);
    fit.min(images / batch).max(1)
}

/// How far a model may be from the size that is asked for.
const NEAR: f64 = 0.02;

pub(super) fn plan(
    stage: &Stage,
    (from, width): (&Source, &Width),
    known: &mut Known<'_>,
) -> Result<PlannedStage, Problem> {
    let (before, process) = known.denoiser(stage, from)?;
    if known.is_by_branch(from) {
        return Err(Problem::Said(format!(
            "which branches are left of `{from}`, which is pruned by branch, is known once that has run; prune a file of it"
        )));
    }
    known.same_classes(from)?;
    let groups = before
        .channel_groups()
        .ok_or_else(|| Problem::Said(format!("{before} has no channels that can be taken out")))?;
    let narrowing = Narrowing {
        before: &before,
        groups: &groups,
        width,
    };
    let keep = narrowing.keep()?;
    let after = before.narrowed(&narrowing.left(&keep));
    if after == before {
        return Err(Problem::Said(format!(
            "nothing leaves {before}: the ratio is too small for widths that are a multiple of {}; give a smaller `multiple`",
            width.multiple
        )));
    }
    if let Some(problem) = after.problem() {
        return Err(Problem::Said(format!(
            "what would be left can't be: {problem}"
        )));
    }
    let (method, seen, batch) = match width.importance {
        Importance::DiffPruning {
            timesteps, batch, ..
        } => {
            let pass = batch * times_in_a_pass(&before, batch);
            ("diff-pruning", timesteps * batch, pass)
        }
        Importance::Taylor { batches, batch, .. } => ("taylor", batches * batch, batch),
        Importance::Magnitude => ("magnitude", 0, 0),
        Importance::Random => ("random", 0, 0),
    };
    let measures = seen > 0;
    if measures {
        known.fits_data(stage, before.shape())?;
    }
    let memory = match measures {
        true => gradient_memory(&before, batch),
        false => before.parameters() * 8,
    };
    let work = Work::Width(WidthPlan {
        from: from.clone(),
        method,
        importance: width.importance.clone(),
        leaves: width.leaves,
        keep,
        after: after.clone(),
    });
    let mut planned = PlannedStage {
        flops: TRAINING * flops(&before, seen),
        before: Some(before),
        after: Some(after),
        process,
        images: seen,
        memory,
        ..PlannedStage::new(stage, &format!("prune in width, {method}"), work)
    };
    if matches!(width.importance, Importance::DiffPruning { threshold, .. } if threshold > 0.0) {
        (planned.notes).push("it ends where the loss has fallen, most often far earlier".into());
    }
    Ok(planned)
}

/// A model whose widths are chosen.
struct Narrowing<'a> {
    before: &'a Architecture,
    groups: &'a [ChannelGroup],
    width: &'a Width,
}

impl Narrowing<'_> {
    fn left(&self, keep: &[usize]) -> Vec<Left> {
        let pairs = self.groups.iter().zip(keep);
        pairs
            .map(|(group, keep)| left_of(group, *keep, self.width.leaves))
            .collect()
    }

    /// How many units of each group stay.
    fn keep(&self) -> Result<Vec<usize>, Problem> {
        let Width { amount, .. } = self.width;
        // Of ratios that are given, none may leave nothing.
        let given = match *amount {
            Amount::Ratio(ratio) => ratio,
            Amount::Parameters(_) | Amount::Macs(_) => 0.0,
        };
        let empty = self.groups.iter().find(|group| {
            let (units, _) = units(group, self.width.leaves);
            units_left(units, self.width.parts.share(group.part, given)) == 0
        });
        if let Some(group) = empty {
            return Err(Problem::Said(format!(
                "a share of {} leaves none of the {} of {}",
                self.width.parts.share(group.part, given),
                self.called(group),
                group.root
            )));
        }
        match *amount {
            Amount::Ratio(ratio) => Ok(self.at(ratio)),
            Amount::Parameters(share) => self.search(share, "parameters", Architecture::parameters),
            Amount::Macs(share) => self.search(share, "macs", Architecture::macs),
        }
    }

    /// What leaves a group, in words.
    fn called(&self, group: &ChannelGroup) -> String {
        let (count, _) = units(group, self.width.leaves);
        match (group.part, self.width.leaves) {
            (Part::Attention, Leaves::Heads) => format!("{count} heads"),
            (Part::Attention, Leaves::Dims) => format!("{count} dimensions of each head"),
            _ => format!("{count} channels"),
        }
    }

    /// How many units of each group stay at a ratio: at least one, and a multiple where it must be.
    fn at(&self, ratio: f64) -> Vec<usize> {
        let keep = |group: &ChannelGroup| {
            let (units, of) = units(group, self.width.leaves);
            let share = self.width.parts.share(group.part, ratio);
            let left = units_left(units, share).max(1);
            let whole_heads = group.heads > 1 && of != group.heads;
            if share == 0.0 || whole_heads || left == units {
                return left.min(units);
            }
            let multiple = self.width.multiple;
            let rounded = (left + multiple / 2) / multiple * multiple;
            rounded.max(multiple).min(units)
        };
        self.groups.iter().map(keep).collect()
    }

    /// How much narrower or wider a group can be made by one step; None of one whose width is said.
    fn step(&self, group: &ChannelGroup) -> Option<usize> {
        let said = |ratio| self.width.parts.share(group.part, ratio);
        let (_, of) = units(group, self.width.leaves);
        let whole_heads = group.heads > 1 && of != group.heads;
        let step = if whole_heads { 1 } else { self.width.multiple };
        (said(0.0) != said(1.0)).then_some(step)
    }

    /// Widths whose size is near a share of the model's: those of one ratio, but for some groups
    /// that are a step narrower or wider.
    fn search(
        &self,
        share: f64,
        what: &str,
        size: impl Fn(&Architecture) -> usize,
    ) -> Result<Vec<usize>, Problem> {
        let whole = size(self.before) as f64;
        let left = |keep: &[usize]| size(&self.before.narrowed(&self.left(keep))) as f64 / whole;
        let (mut low, mut high) = (0.0, 1.0);
        // Halved until one group's width is between them, or less.
        for _ in 0..40 {
            let middle = f64::midpoint(low, high);
            if left(&self.at(middle)) >= share {
                low = middle;
            } else {
                high = middle;
            }
        }
        let mut keep = self.at(low);
        let mut best = (keep.clone(), left(&keep));
        let nearer = |found: f64, best: f64| (found - share).abs() < (best - share).abs();
        // The step that comes nearest, until none comes nearer.
        while (best.1 / share - 1.0).abs() > NEAR {
            for (index, group) in self.groups.iter().enumerate() {
                let Some(step) = self.step(group) else {
                    continue;
                };
                let (units, _) = units(group, self.width.leaves);
                let now = keep[index];
                let narrower = now.saturating_sub(step);
                for other in [narrower, (now + step).min(units)] {
                    if other < step.min(units) || other == now {
                        continue;
                    }
                    keep[index] = other;
                    let found = left(&keep);
                    if nearer(found, best.1) {
                        best = (keep.clone(), found);
                    }
                }
                keep[index] = now;
            }
            if best.0 == keep {
                break;
            }
            keep.clone_from(&best.0);
        }
        match (best.1 / share - 1.0).abs() <= NEAR {
            true => Ok(best.0),
            false => Err(Problem::Said(format!(
                "`{what}` is {share}, and the nearest that can be left is {:.3}; give a smaller `multiple`, or more that may leave",
                best.1
            ))),
        }
    }
}
