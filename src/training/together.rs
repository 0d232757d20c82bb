//! What the workers of a training tell each other.

use std::iter::Peekable;
use std::vec::IntoIter;

use burn::module::{AutodiffModule, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};

use super::TrainingError;
use super::checkpoint::learning;
use super::metrics::StepReport;
use crate::ops::TrainingBackend;
use crate::state::values;
use crate::workers::{Workers, agree, sum};

/// Numbers that are exchanged at once: 32 MiB of them.
pub(super) const BUCKET: usize = 8 << 20;

/// One step of all workers.
pub(super) struct Gathered {
    pub(super) report: StepReport,
    /// Sums over all groups.
    pub(super) gradients: GradientsParams,
    /// Whether one of them wants to stop after this step.
    pub(super) stopping: bool,
}

/// Sums the workers' gradients, and reports on all groups in their order.
pub(super) fn share<B: TrainingBackend, M: AutodiffModule<B>>(
    workers: &dyn Workers,
    model: &M,
    reports: Vec<StepReport>,
    gradients: GradientsParams,
    stopping: bool,
) -> Result<Gathered, TrainingError> {
    if workers.size() == 1 {
        return Ok(Gathered {
            report: StepReport::mean(&reports),
            gradients,
            stopping,
        });
    }
    let mut said = vec![u8::from(stopping)];
    said.extend((gradients.len() as u64).to_le_bytes());
    let head = said.len();
    said.extend(reports.iter().flat_map(StepReport::bytes));
    let all = workers.all_gather(&said);
    if all.iter().any(|other| other[1..head] != all[0][1..head]) {
        return Err(TrainingError::Workers(
            "the workers' gradients are not of the same parameters".into(),
        ));
    }
    let form = &reports[0];
    let reports: Vec<StepReport> = all
        .iter()
        .flat_map(|said| form.others(&said[head..]))
        .collect();
    Ok(Gathered {
        report: StepReport::mean(&reports),
        gradients: summed::<B, M>(workers, model, gradients),
        stopping: all.iter().any(|said| said[0] == 1),
    })
}

/// The gradients summed over all workers, in buckets, in the order of the module's parameters.
fn summed<B: TrainingBackend, M: AutodiffModule<B>>(
    workers: &dyn Workers,
    model: &M,
    gradients: GradientsParams,
) -> GradientsParams {
    struct Flatten<'a> {
        workers: &'a dyn Workers,
        gradients: GradientsParams,
        /// The parameters that have a gradient.
        which: Vec<ParamId>,
        /// Their values, of which the first are sums already.
        values: Vec<f32>,
        summed: usize,
    }
    impl<B: TrainingBackend> ModuleVisitor<B> for Flatten<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let Some(gradient) = self.gradients.remove::<B::InnerBackend, D>(param.id) else {
                return;
            };
            self.which.push(param.id);
            self.values.extend(values(gradient));
            while self.values.len() - self.summed >= BUCKET {
                let bucket = self.summed..self.summed + BUCKET;
                self.summed = bucket.end;
                sum(self.workers, &mut self.values[bucket]);
            }
        }
    }
    struct Unflatten {
        which: Peekable<IntoIter<ParamId>>,
        values: Vec<f32>,
        taken: usize,
        gradients: GradientsParams,
    }
    impl<B: TrainingBackend> ModuleVisitor<B> for Unflatten {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if self.which.next_if_eq(&param.id).is_none() {
                return;
            }
            let (shape, device) = (param.val().shape(), param.val().device());
            let values = self.values[self.taken..][..shape.num_elements()].to_vec();
            self.taken += values.len();
            let gradient = TensorData::new(values, shape);
            let gradient = Tensor::<B::InnerBackend, D>::from_data(gradient, &device);
            self.gradients.register(param.id, gradient);
        }
    }
    let mut flatten = Flatten {
        workers,
        gradients,
        which: Vec::new(),
        values: Vec::new(),
        summed: 0,
    };
    model.visit(&mut flatten);
    let Flatten {
        which,
        mut values,
        summed,
        ..
    } = flatten;
    sum(workers, &mut values[summed..]);
    let mut unflatten = Unflatten {
        which: which.into_iter().peekable(),
        values,
        taken: 0,
        gradients: GradientsParams::new(),
    };
    model.visit(&mut unflatten);
    unflatten.gradients
}

/// Compares the learning weights of all workers, by a hash.
pub(super) fn same_weights<B: TrainingBackend, M: AutodiffModule<B>>(
    workers: &dyn Workers,
    model: &M,
    step: usize,
) -> Result<(), TrainingError> {
    if workers.size() == 1 {
        return Ok(());
    }
    let mut hash = crc32fast::Hasher::new();
    for (name, array) in learning::<B, M>(model) {
        hash.update(name.as_bytes());
        hash.update(bytemuck::cast_slice(&array.data));
    }
    let what = format!("the weights after step {step}");
    agree(workers, &what, &hash.finalize().to_le_bytes()).map_err(TrainingError::Workers)
}
