//! What a pruning in width will do.

use super::cost::{flops, gradient_memory, passes};
use super::known::{Known, Problem, keeps_weights};
use super::{PlannedStage, Work};
use crate::models::{Architecture, ChannelGroup, Left, Part};
use crate::pruning::{Leaves, left_of, units, units_left, whole_heads};
use crate::recipe::schema::Stage;
use crate::recipe::schema::source::Source;
use crate::recipe::schema::width::{Amount, Importance, Width};

/// A pruning in width.
#[derive(Debug, Clone)]
pub struct WidthPlan {
    /// The model.
    pub from: Source,
    /// The method, as the recipe names it.
    pub method: &'static str,
    /// Its settings.
    pub width: Width,
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
/// How often a ratio is halved to meet a time: widths are multiples, and times noisy.
const HALVINGS: usize = 8;
/// Most steps of single groups towards that size.
const MOST_STEPS: usize = 8;

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
    if !keeps_weights(&stage.kind) {
        known.same_classes(from)?;
    }
    if known.is_divided(from) {
        known.divided.insert(stage.name.clone());
    }
    let groups = before
        .channel_groups()
        .ok_or_else(|| Problem::Said(format!("{before} has no channels that can be taken out")))?;
    let narrowed = narrow(&before, &groups, width, None).map_err(Problem::Said)?;
    let after = narrowed.after;
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
        true => gradient_memory(&before, batch, known),
        false => before.parameters() * 8,
    };
    let work = Work::Width(WidthPlan {
        from: from.clone(),
        method,
        width: width.clone(),
    });
    let mut planned = PlannedStage {
        flops: passes(&before, known, false) * flops(&before, seen),
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
    if let Amount::Latency(_) = width.amount {
        planned.notes.push(
            "how wide it stays is measured when it runs; planned as if time were multiply-accumulates"
                .into(),
        );
    }
    Ok(planned)
}

/// What is left of a model.
pub(crate) struct Narrowed {
    /// How many units stay of each group of channels.
    pub(crate) keep: Vec<usize>,
    /// The model.
    pub(crate) after: Architecture,
}

/// The time of a pass.
pub(crate) type PassTime<'a> = &'a dyn Fn(&Architecture) -> f64;

/// How narrow a model becomes; without `time`, multiply-accumulates stand for it.
///
/// # Errors
/// When nothing would be left of a part, nothing leaves, or no widths are as near as they must be.
pub(crate) fn narrow(
    before: &Architecture,
    groups: &[ChannelGroup],
    width: &Width,
    time: Option<PassTime<'_>>,
) -> Result<Narrowed, String> {
    let there = |part: Part| groups.iter().any(|group| group.part == part);
    for (part, key) in width.parts.said() {
        if !there(part) {
            return Err(format!(
                "`{key}` is given, and {before} has no such channels"
            ));
        }
    }
    if width.leaves == Leaves::Heads && !groups.iter().any(|group| group.heads > 1) {
        return Err(format!(
            "leaves = \"heads\", and no attention of {before} has several"
        ));
    }
    let narrowing = Narrowing {
        before,
        groups,
        width,
    };
    let keep = narrowing.keep(time)?;
    let after = before.narrowed(&narrowing.left(&keep));
    if after == *before {
        return Err(format!(
            "nothing leaves {before}: the ratio is too small for widths that are a multiple of {}; give a smaller `multiple`",
            width.multiple
        ));
    }
    match after.problem() {
        Some(problem) => Err(format!("what would be left can't be: {problem}")),
        None => Ok(Narrowed { keep, after }),
    }
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
    fn keep(&self, time: Option<PassTime<'_>>) -> Result<Vec<usize>, String> {
        let Width { amount, .. } = self.width;
        // Of ratios that are given, none may leave nothing.
        let given = match *amount {
            Amount::Ratio(ratio) => ratio,
            Amount::Parameters(_) | Amount::Macs(_) | Amount::Latency(_) => 0.0,
        };
        let empty = self.groups.iter().find(|group| {
            let (units, _) = units(group, self.width.leaves);
            units_left(
                units,
                group.slices,
                self.width.parts.share(group.part, given),
            ) == 0
        });
        if let Some(group) = empty {
            return Err(format!(
                "a share of {} leaves none of the {} of {}",
                self.width.parts.share(group.part, given),
                self.called(group),
                group.root
            ));
        }
        match *amount {
            Amount::Ratio(ratio) => Ok(self.at(ratio)),
            Amount::Parameters(share) => self.search(share, "parameters", Architecture::parameters),
            Amount::Macs(share) => self.search(share, "macs", Architecture::macs),
            Amount::Latency(share) => match time {
                Some(time) => Ok(self.by_time(share, time)),
                None => self.search(share, "latency", Architecture::macs),
            },
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
            let (units, _) = units(group, self.width.leaves);
            let share = self.width.parts.share(group.part, ratio);
            let left = units_left(units, group.slices, share).max(group.slices);
            if share == 0.0 || left == units {
                return left.min(units);
            }
            let multiple = self.multiple(group);
            let rounded = (left + multiple / 2) / multiple * multiple;
            rounded.max(multiple).min(units)
        };
        self.groups.iter().map(keep).collect()
    }

    /// What the width of a group is a multiple of, once it is cut: of a head's dimensions, of
    /// slices that keep equally many, and of the stream by 4, as tables of positions have it.
    fn multiple(&self, group: &ChannelGroup) -> usize {
        if whole_heads(group, self.width.leaves) {
            return 1;
        }
        let slices = match group.part {
            Part::Stream => 4,
            _ => group.slices,
        };
        let times = (1..=slices).map(|times| times * self.width.multiple);
        let mut fit = times.filter(|multiple| multiple.is_multiple_of(slices));
        // At the latest the product is one.
        fit.next().unwrap_or(slices * self.width.multiple)
    }

    /// How much narrower or wider a group can be made by one step; None of one whose width is said.
    fn step(&self, group: &ChannelGroup) -> Option<usize> {
        let said = |ratio| self.width.parts.share(group.part, ratio);
        (said(0.0) != said(1.0)).then(|| self.multiple(group))
    }

    /// Widths by which a pass takes nearest to a share of the model's time. Both are timed in turn,
    /// since a machine's speed changes.
    fn by_time(&self, share: f64, time: PassTime<'_>) -> Vec<usize> {
        let (mut low, mut high) = (0.0, 1.0);
        let mut best: Option<(Vec<usize>, f64)> = None;
        for _ in 0..HALVINGS {
            let middle = f64::midpoint(low, high);
            let keep = self.at(middle);
            let left = time(&self.before.narrowed(&self.left(&keep))) / time(self.before);
            match left >= share {
                true => low = middle,
                false => high = middle,
            }
            let off = (left - share).abs();
            if best.as_ref().is_none_or(|(_, nearest)| off < *nearest) {
                best = Some((keep, off));
            }
        }
        best.map_or_else(|| self.at(0.5), |(keep, _)| keep)
    }

    /// Widths whose size is near a share of the model's: those of one ratio, but for some groups
    /// that are a step narrower or wider.
    fn search(
        &self,
        share: f64,
        what: &str,
        size: impl Fn(&Architecture) -> usize,
    ) -> Result<Vec<usize>, String> {
        let whole = size(self.before) as f64;
        let left = |keep: &[usize]| size(&self.before.narrowed(&self.left(keep))) as f64 / whole;
        let near = |found: f64| (found / share - 1.0).abs() <= NEAR;
        let far = |found: f64| {
            format!(
                "`{what}` is {share}, and the nearest that can be left is {found:.3}; give a smaller `multiple`, or more that may leave"
            )
        };
        let [most, least] = [0.0, 1.0].map(|ratio| left(&self.at(ratio)));
        let end = if most < share { most } else { least };
        if (most < share || least > share) && !near(end) {
            return Err(far(end));
        }
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
        // So many of the first groups as narrow as the one, the others as wide as the other.
        let (wider, narrower) = (self.at(low), self.at(high));
        let mixed = |count: usize| [&narrower[..count], &wider[count..]].concat();
        let (mut few, mut many) = (0, wider.len());
        while few + 1 < many {
            let middle = usize::midpoint(few, many);
            match left(&mixed(middle)) >= share {
                true => few = middle,
                false => many = middle,
            }
        }
        let nearer = |found: f64, best: f64| (found - share).abs() < (best - share).abs();
        let [fewer, more] = [few, many].map(|count| {
            let keep = mixed(count);
            let found = left(&keep);
            (keep, found)
        });
        let mut best = if nearer(more.1, fewer.1) { more } else { fewer };
        let mut keep = best.0.clone();
        // Then the step that comes nearest, a few times.
        for _ in 0..MOST_STEPS {
            if near(best.1) {
                break;
            }
            keep.clone_from(&best.0);
            for (index, group) in self.groups.iter().enumerate() {
                let Some(step) = self.step(group) else {
                    continue;
                };
                let (units, _) = units(group, self.width.leaves);
                let now = keep[index];
                let narrower = now.saturating_sub(1) / step * step;
                let wider = (now / step + 1) * step;
                for other in [narrower, wider.min(units)] {
                    if other == 0 || other == now {
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
        }
        match near(best.1) {
            true => Ok(best.0),
            false => Err(far(best.1)),
        }
    }
}
