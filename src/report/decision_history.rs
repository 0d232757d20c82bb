//! The choices of the learnable masks over the course of training, and the bars that show them.

/// Most steps drawn: in a finer history a bar would be less than two pixels wide.
const MOST_STEPS: usize = 400;

/// Opacities are rounded to this many levels, so that a steady choice becomes one long bar.
const OPACITY_LEVELS: f64 = 50.0;

/// The scheme of a group: how many of its consecutive layers are kept, such as 1 of 2 or 2 of 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecisionGroup {
    /// Number of layers kept.
    pub keep: usize,
    /// Number of layers in the group.
    pub of: usize,
}

/// What one group would keep if training stopped now.
#[derive(Clone, Debug, PartialEq)]
pub struct KeptLayers {
    /// The kept layers, counted from the first layer of the *model*.
    pub kept: Vec<usize>,
    /// Probability of this choice under the learned distribution, in `[0, 1]`.
    pub probability: f64,
}

/// The choices of all groups at each logged training step.
#[derive(Clone, Debug, PartialEq)]
pub struct DecisionHistory {
    /// What a layer is called, and several of them: `layer` and `layers`, or `branch` and
    /// `branches`.
    pub names: [&'static str; 2],
    /// Number of layers of the model: the sum of [`DecisionGroup::of`].
    pub depth: usize,
    /// The groups in the order of their layers.
    pub groups: Vec<DecisionGroup>,
    /// The logged training steps, ascending.
    pub steps: Vec<usize>,
    /// For each logged step, one decision per group: `[steps][groups]`.
    pub choices: Vec<Vec<KeptLayers>>,
}

impl DecisionHistory {
    /// Describes a contradiction in the history, if there is one.
    pub(super) fn check(&self) -> Result<(), String> {
        let layers = self
            .groups
            .iter()
            .try_fold(0usize, |sum, group| sum.checked_add(group.of));
        if self.depth == 0 || layers != Some(self.depth) {
            return Err(format!(
                "the groups {:?} do not make up {} layers",
                self.groups, self.depth
            ));
        }
        // More than any model has, and than a picture can show.
        if self.depth > 1024 {
            return Err(format!("{} layers are too many to draw", self.depth));
        }
        if self.steps.is_empty() || self.steps.len() != self.choices.len() {
            let (steps, choices) = (self.steps.len(), self.choices.len());
            return Err(format!(
                "{steps} logged steps with {choices} choices cannot be drawn"
            ));
        }
        if !self.steps.is_sorted_by(|a, b| a < b) {
            return Err("the logged steps are not ascending".to_owned());
        }
        // Close to where an f64 no longer tells neighbouring integers apart.
        if let Some(last) = self.steps.last().filter(|&&last| last as u64 >= 1 << 52) {
            return Err(format!("step {last} is too large to draw"));
        }
        for (step, choices) in self.steps.iter().zip(&self.choices) {
            self.check_choices(choices)
                .map_err(|problem| format!("step {step}: {problem}"))?;
        }
        Ok(())
    }

    fn check_choices(&self, choices: &[KeptLayers]) -> Result<(), String> {
        if choices.len() != self.groups.len() {
            return Err(format!(
                "{} decisions for {} groups",
                choices.len(),
                self.groups.len()
            ));
        }
        for ((layers, group), decision) in self.bands().zip(&self.groups).zip(choices) {
            let KeptLayers { kept, probability } = decision;
            let mut distinct = kept.clone();
            distinct.sort_unstable();
            distinct.dedup();
            let inside = distinct.iter().all(|layer| layers.contains(layer));
            if !inside || distinct.len() != kept.len() || kept.len() != group.keep {
                return Err(format!(
                    "{kept:?} is not {} of the layers {layers:?}",
                    group.keep
                ));
            }
            if !(0.0..=1.0).contains(probability) {
                return Err(format!("{probability} is not a probability"));
            }
        }
        Ok(())
    }

    /// The range of layers of each group.
    pub(super) fn bands(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        self.groups.iter().scan(0, |first, group| {
            let band = *first..*first + group.of;
            *first = band.end;
            Some(band)
        })
    }

    /// The bars of all layers: consecutive drawn steps with the same choice become one.
    pub(super) fn bars(&self) -> Vec<Bar> {
        let every = self.steps.len().div_ceil(MOST_STEPS);
        let drawn: Vec<usize> = (0..self.steps.len()).step_by(every).collect();
        let mut bars: Vec<Bar> = Vec::new();
        let mut growing: Vec<Option<usize>> = vec![None; self.depth];
        for (position, &index) in drawn.iter().enumerate() {
            // A step lasts until the next drawn step.
            let from = self.steps[index] as f64;
            let until = match drawn.get(position + 1) {
                Some(&next) => self.steps[next] as f64,
                None => self.end(),
            };
            let mut grown = vec![None; self.depth];
            for (group, decision) in self.choices[index].iter().enumerate() {
                let level = (decision.probability * OPACITY_LEVELS).round();
                let opacity = level / OPACITY_LEVELS;
                for &layer in &decision.kept {
                    let bar = match growing[layer] {
                        Some(bar) if bars[bar].opacity == opacity => bar,
                        _ => {
                            bars.push(Bar {
                                layer,
                                group,
                                from,
                                until,
                                opacity,
                            });
                            bars.len() - 1
                        }
                    };
                    bars[bar].until = until;
                    grown[layer] = Some(bar);
                }
            }
            growing = grown;
        }
        bars
    }

    /// End of the axis: the last step lasts as long as the mean of the others.
    pub(super) fn end(&self) -> f64 {
        let (first, last) = (
            self.steps[0] as f64,
            self.steps[self.steps.len() - 1] as f64,
        );
        last + ((last - first) / (self.steps.len() - 1).max(1) as f64).max(1.0)
    }
}

/// A range of steps during which a layer is chosen with the same probability.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Bar {
    pub(super) layer: usize,
    pub(super) group: usize,
    pub(super) from: f64,
    pub(super) until: f64,
    pub(super) opacity: f64,
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A group of 1 of 2 layers, with a choice every ten steps.
    pub(in crate::report) fn history(choices: &[([usize; 1], f64)]) -> DecisionHistory {
        let decision = |&([layer], probability): &([usize; 1], f64)| {
            vec![KeptLayers {
                kept: vec![layer],
                probability,
            }]
        };
        DecisionHistory {
            names: ["layer", "layers"],
            depth: 2,
            groups: vec![DecisionGroup { keep: 1, of: 2 }],
            steps: (0..choices.len()).map(|step| step * 10).collect(),
            choices: choices.iter().map(decision).collect(),
        }
    }

    #[test]
    fn equal_choices_become_one_bar() {
        let history = history(&[([0], 0.5), ([0], 0.5), ([1], 0.6), ([0], 0.5), ([0], 0.9)]);
        let bar = |layer, from, until, opacity| Bar {
            layer,
            group: 0,
            from,
            until,
            opacity,
        };
        let expected = [
            bar(0, 0.0, 20.0, 0.5),
            bar(1, 20.0, 30.0, 0.6),
            bar(0, 30.0, 40.0, 0.5),
            bar(0, 40.0, 50.0, 0.9),
        ];
        assert_eq!(history.bars(), expected);
    }

    #[test]
    fn long_histories_are_thinned() {
        let choices: Vec<_> = (0..4001).map(|step| ([step / 11 % 2], 1.0)).collect();
        let bars = history(&choices).bars();
        assert!(bars.len() <= MOST_STEPS, "{}", bars.len());
        assert_eq!((bars[0].from, bars[bars.len() - 1].until), (0.0, 40_010.0));
    }

    #[test]
    fn contradictions_are_errors() {
        let good = history(&[([0], 0.5), ([1], 0.5)]);
        let error = |change: &dyn Fn(&mut DecisionHistory)| {
            let mut history = good.clone();
            change(&mut history);
            history.check().unwrap_err()
        };
        assert!(error(&|h| h.depth = 3).contains("do not make up 3 layers"));
        assert!(error(&|h| h.groups[0].of = usize::MAX).contains("do not make up"));
        assert!(error(&|h| h.groups.push(DecisionGroup { keep: 0, of: 0 })).contains("2 groups"));
        assert!(error(&|h| h.steps = vec![]).contains("0 logged steps with 2 choices"));
        assert!(error(&|h| h.steps = vec![5, 5]).contains("not ascending"));
        assert!(error(&|h| h.choices[1][0].kept[0] = 2).contains("step 10: [2] is not 1 of"));
        assert!(error(&|h| h.steps[1] = usize::MAX).contains("too large"));
        let twice = error(&|h| {
            h.groups[0].keep = 2;
            h.choices[0][0].kept = vec![1, 1];
        });
        assert!(
            twice.contains("[1, 1] is not 2 of the layers 0..2"),
            "{twice}"
        );
        assert!(error(&|h| h.choices[0][0].kept.clear()).contains("step 0: [] is not 1 of"));
        let probability = error(&|h| h.choices[0][0].probability = f64::NAN);
        assert!(
            probability.contains("NaN is not a probability"),
            "{probability}"
        );
    }
}
