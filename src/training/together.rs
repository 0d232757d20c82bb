//! What the workers of a training tell each other.

use std::collections::HashMap;
use std::iter::Peekable;
use std::vec::IntoIter;

use burn::module::{AutodiffModule, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{Tensor, TensorData};

use super::TrainingError;
use super::checkpoint::learning;
use super::metrics::StepReport;
use crate::ops::TrainingBackend;
use crate::state::values;
use crate::workers::{BUCKET, Devices, Workers, agree, sum, sum_on_devices};

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
    (workers, devices): (&dyn Workers, Option<&dyn Devices<B::InnerBackend>>),
    model: &M,
    reports: Vec<StepReport>,
    gradients: GradientsParams,
    stopping: bool,
) -> Result<Gathered, TrainingError> {
    if workers.size() == 1 && devices.is_none() {
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
        gradients: match devices {
            Some(devices) => summed_on_devices::<B, M>(devices, model, gradients, BUCKET),
            None => summed::<B, M>(workers, model, gradients),
        },
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

/// The same without the host: each bucket is a tensor.
fn summed_on_devices<B: TrainingBackend, M: AutodiffModule<B>>(
    devices: &dyn Devices<B::InnerBackend>,
    model: &M,
    gradients: GradientsParams,
    bucket: usize,
) -> GradientsParams {
    type Flat<B> = Tensor<<B as AutodiffBackend>::InnerBackend, 1>;
    struct Flatten<'a, B: TrainingBackend> {
        devices: &'a dyn Devices<B::InnerBackend>,
        bucket: usize,
        gradients: GradientsParams,
        /// Gradients that wait for their bucket to be full.
        waiting: Vec<Flat<B>>,
        summed: Vec<(ParamId, Option<Flat<B>>)>,
    }
    impl<B: TrainingBackend> Flatten<'_, B> {
        fn sum(&mut self) {
            let waiting = std::mem::take(&mut self.waiting);
            let lengths: Vec<usize> = waiting.iter().map(|flat| flat.dims()[0]).collect();
            if lengths.is_empty() {
                return;
            }
            let sums = sum_on_devices(self.devices, Tensor::cat(waiting, 0));
            let (first, mut begin) = (self.summed.len() - lengths.len(), 0);
            for ((_, summed), length) in self.summed[first..].iter_mut().zip(lengths) {
                *summed = Some(sums.clone().narrow(0, begin, length));
                begin += length;
            }
        }
    }
    impl<B: TrainingBackend> ModuleVisitor<B> for Flatten<'_, B> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let Some(gradient) = self.gradients.remove::<B::InnerBackend, D>(param.id) else {
                return;
            };
            self.summed.push((param.id, None));
            self.waiting.push(gradient.flatten(0, D - 1));
            let waiting = self.waiting.iter().map(|flat| flat.dims()[0]);
            if waiting.sum::<usize>() >= self.bucket {
                self.sum();
            }
        }
    }
    struct Unflatten<B: TrainingBackend> {
        summed: HashMap<ParamId, Flat<B>>,
        gradients: GradientsParams,
    }
    impl<B: TrainingBackend> ModuleVisitor<B> for Unflatten<B> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(summed) = self.summed.remove(&param.id) {
                let summed = summed.reshape(param.val().shape());
                self.gradients
                    .register::<B::InnerBackend, D>(param.id, summed);
            }
        }
    }
    let mut flatten = Flatten::<B> {
        devices,
        bucket,
        gradients,
        waiting: Vec::new(),
        summed: Vec::new(),
    };
    model.visit(&mut flatten);
    flatten.sum();
    let summed = flatten.summed.into_iter();
    let mut unflatten = Unflatten::<B> {
        summed: summed.filter_map(|(id, sum)| Some((id, sum?))).collect(),
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

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn_flex::Flex;

    use super::*;
    use crate::ops::Linear;
    use crate::workers::{ThroughHost, fake};

    type B = Autodiff<Flex>;

    #[test]
    fn weights_that_are_not_alike_are_told_of() {
        let device = Default::default();
        let told = |other: usize| {
            fake::group(3, |workers| {
                let mut linear = Linear::<B>::zeros(2, 3, &device);
                if workers.rank() == other {
                    linear.weight = linear.weight.map(|weight| weight + 1e-7);
                }
                same_weights::<B, _>(workers, &linear, 12).map_err(|error| error.to_string())
            })
        };
        // Of no one.
        assert_eq!(told(3), vec![Ok(()); 3]);
        for told in told(2) {
            let told = told.unwrap_err();
            let expected = "the weights after step 12: 2 differs from worker 0";
            assert!(told.contains(expected), "{told}");
        }
    }

    #[test]
    fn devices_sum_gradients_as_the_host_does() {
        // Fewer numbers than workers, several in a bucket, and one that is larger.
        let sizes = [[2, 3], [1, 4], [1, 1]];
        for size in [2, 3] {
            fake::shared(size, |workers| {
                let device = Default::default();
                let linear = |[input, output]: [usize; 2]| Linear::zeros(input, output, &device);
                let model: Vec<Linear<B>> = sizes.map(linear).to_vec();
                let gradients = || {
                    let mut gradients = GradientsParams::new();
                    let mut seed = workers.rank() as f32;
                    for linear in &model[..2] {
                        let shape = linear.weight.val().dims();
                        let count = shape.iter().product::<usize>();
                        let numbers: Vec<f32> = (0..count)
                            .map(|_| {
                                seed += 7.3;
                                1.0 / seed
                            })
                            .collect();
                        let numbers = Tensor::<Flex, 1>::from_floats(&numbers[..], &device);
                        gradients.register(linear.weight.id, numbers.reshape(shape));
                    }
                    gradients
                };
                let host = summed::<B, _>(&*workers, &model, gradients());
                let devices = ThroughHost(workers.clone());
                let devices = summed_on_devices::<B, _>(&devices, &model, gradients(), 5);
                assert_eq!((host.len(), devices.len()), (2, 2));
                for linear in &model[..2] {
                    let of = |sums: &GradientsParams| {
                        let sum = sums.get::<Flex, 2>(linear.weight.id).unwrap();
                        (sum.dims(), values(sum))
                    };
                    assert_eq!(of(&host), of(&devices));
                }
            });
        }
    }
}
