//! Moments and averages that the workers of a training divide among them: stage 1 of ZeRO
//! (Rajbhandari et al., arXiv 1910.02054).
//!
//! Every worker has all weights and all gradients, but updates and averages its own parameters
//! alone, and then has the others' from them. The arithmetic on each parameter is that of one
//! worker, so the result is the same to the last bit.

use std::collections::HashMap;

use burn::module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

use crate::ops::TrainingBackend;
use crate::state::values;
use crate::workers::{BUCKET, Group};

/// Which worker has the moments and the average of which parameter.
#[derive(Debug, Clone)]
pub(super) struct Shards {
    workers: Group,
    /// The learning parameters in the module's order, each with its owner and its size. Their ids
    /// are this process's own.
    parameters: Vec<(ParamId, usize, usize)>,
    owners: HashMap<ParamId, usize>,
    /// Numbers that all workers together send at once.
    bucket: usize,
}

impl Shards {
    /// Divides the learning parameters of `module`: the largest first, each to whom has least.
    pub(super) fn new<B: TrainingBackend, M: AutodiffModule<B>>(
        workers: Group,
        module: &M,
    ) -> Self {
        struct Sizes(Vec<(ParamId, usize)>);
        impl<B: TrainingBackend> ModuleVisitor<B> for Sizes {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                let value = param.val();
                if value.is_require_grad() {
                    self.0.push((param.id, value.shape().num_elements()));
                }
            }
        }
        let mut sizes = Sizes(Vec::new());
        module.visit(&mut sizes);
        let counts: Vec<usize> = sizes.0.iter().map(|(_, size)| *size).collect();
        let owners = divided(&counts, workers.size());
        let parameters = (sizes.0.iter().zip(owners))
            .map(|((id, size), owner)| (*id, owner, *size))
            .collect::<Vec<_>>();
        Self {
            owners: parameters.iter().map(|(id, of, _)| (*id, *of)).collect(),
            workers,
            parameters,
            bucket: BUCKET,
        }
    }

    /// Whether a parameter is this worker's.
    pub(super) fn owns(&self, id: ParamId) -> bool {
        self.owners.get(&id) == Some(&self.workers.rank())
    }

    /// `module` with each learning parameter as its owner has it. Of all workers at once.
    pub(super) fn together<B: Backend, M: Module<B>>(&self, module: M) -> M {
        struct Own<'a>(&'a Shards, Vec<f32>);
        impl<B: Backend> ModuleVisitor<B> for Own<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                if self.0.owns(param.id) {
                    self.1.extend(values(param.val()));
                }
            }
        }
        struct Others<'a> {
            shards: &'a Shards,
            values: Parts,
        }
        impl<B: Backend> ModuleMapper<B> for Others<'_> {
            fn map_float<const D: usize>(
                &mut self,
                param: Param<Tensor<B, D>>,
            ) -> Param<Tensor<B, D>> {
                let (id, tensor, mapper) = param.consume();
                let Some(&owner) = self.shards.owners.get(&id) else {
                    return Param::from_mapped_value(id, tensor, mapper);
                };
                let values = self.values.next(owner, tensor.shape().num_elements());
                if owner == self.shards.workers.rank() {
                    return Param::from_mapped_value(id, tensor, mapper);
                }
                let learns = tensor.is_require_grad();
                let values = TensorData::new(values.to_vec(), tensor.shape());
                let tensor = Tensor::from_data(values, &tensor.device());
                Param::from_mapped_value(id, tensor.set_require_grad(learns), mapper)
            }
        }
        let mut own = Own(self, Vec::new());
        module.visit(&mut own);
        let values = self.gather(&own.1, |size| size, true);
        module.map(&mut Others {
            shards: self,
            values,
        })
    }

    /// What every worker has for its parameters, in their order, to the first worker; nothing to
    /// the others. `numbers` says how many a parameter of some size has. Of all workers at once.
    pub(super) fn to_first(
        &self,
        own: impl Fn(ParamId, usize) -> Vec<f32>,
        numbers: impl Fn(usize) -> usize,
    ) -> HashMap<ParamId, Vec<f32>> {
        let mine = (self.parameters.iter()).filter(|(id, _, _)| self.owns(*id));
        let mine: Vec<f32> = mine.flat_map(|(id, _, size)| own(*id, *size)).collect();
        let mut values = self.gather(&mine, &numbers, self.workers.leads());
        if !self.workers.leads() {
            return HashMap::new();
        }
        let parameters = self.parameters.iter();
        parameters
            .map(|(id, owner, size)| (*id, values.next(*owner, numbers(*size)).to_vec()))
            .collect()
    }

    /// Everyone's numbers, in buckets: workers that have fewer than others pad theirs.
    fn gather(&self, mine: &[f32], numbers: impl Fn(usize) -> usize, keep: bool) -> Parts {
        let size = self.workers.size();
        let mut lengths = vec![0; size];
        for (_, owner, size) in &self.parameters {
            lengths[*owner] += numbers(*size);
        }
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let bucket = self.bucket.div_ceil(size);
        let mut all = vec![0.0; size * bucket.min(longest)];
        let mut parts: Vec<Vec<f32>> = vec![Vec::new(); size];
        for begin in (0..longest).step_by(bucket) {
            let end = longest.min(begin + bucket);
            let of = |length: usize| begin.min(length)..end.min(length);
            let mut part = mine[of(mine.len())].to_vec();
            part.resize(end - begin, 0.0);
            let all = &mut all[..size * part.len()];
            self.workers.collect(&part, all);
            if keep {
                let all = all.chunks_exact(end - begin);
                for ((part, more), length) in parts.iter_mut().zip(all).zip(&lengths) {
                    part.extend(&more[..of(*length).len()]);
                }
            }
        }
        Parts {
            taken: vec![0; size],
            parts,
        }
    }
}

/// The workers' numbers, of which each parameter takes the next ones of its owner.
struct Parts {
    parts: Vec<Vec<f32>>,
    taken: Vec<usize>,
}

impl Parts {
    fn next(&mut self, owner: usize, count: usize) -> &[f32] {
        let begin = self.taken[owner];
        self.taken[owner] += count;
        &self.parts[owner][begin..][..count]
    }
}

/// An owner for each size: the largest first, each to whom has least, the earlier of equals first.
fn divided(sizes: &[usize], owners: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(sizes[index]));
    let (mut has, mut of) = (vec![0; owners], vec![0; sizes.len()]);
    for index in order {
        let least = (0..owners).min_by_key(|&owner| has[owner]).unwrap_or(0);
        has[least] += sizes[index];
        of[index] = least;
    }
    of
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn::optim::{GradientsParams, Optimizer};
    use burn_flex::Flex;

    use super::super::{AdamW, Ema};
    use super::*;
    use crate::ops::Linear;
    use crate::workers::{alone, fake};

    type B = Autodiff<Flex>;

    #[test]
    fn the_largest_parameters_are_divided_first() {
        assert_eq!(divided(&[1, 8, 4, 4, 1], 2), [0, 0, 1, 1, 1]);
        assert_eq!(divided(&[3, 2], 4), [0, 1]);
        assert_eq!(divided(&[3, 2], 1), [0, 0]);
        assert!(divided(&[], 3).is_empty());
    }

    /// Parameters of 6, 3, 4, 4, 1 and 1 numbers, all alike.
    fn module(value: f32) -> Vec<Linear<B>> {
        let filled = |[input, output]: [usize; 2]| {
            let device = Default::default();
            let mut linear = Linear::zeros(input, output, &device);
            linear.weight = Param::from_tensor(Tensor::full([output, input], value, &device));
            linear.bias = Param::from_tensor(Tensor::full([output], value, &device));
            linear
        };
        [[2, 3], [1, 4], [1, 1]].map(filled).to_vec()
    }

    fn numbers<B: Backend>(module: &[Linear<B>]) -> Vec<Vec<f32>> {
        let of = |linear: &Linear<B>| [values(linear.weight.val()), values(linear.bias.val())];
        module.iter().flat_map(of).collect()
    }

    fn shards(workers: Group, module: &Vec<Linear<B>>) -> Shards {
        Shards {
            // The parts that are sent don't end where parameters do.
            bucket: 5,
            ..Shards::new::<B, _>(workers, module)
        }
    }

    #[test]
    fn every_parameter_comes_from_its_owner() {
        const OWNERS: [usize; 6] = [0, 1, 1, 2, 2, 2];
        fake::shared(3, |workers| {
            let module = module(workers.rank() as f32);
            let shards = shards(workers.clone(), &module);
            let owners: Vec<usize> = shards.parameters.iter().map(|(_, of, _)| *of).collect();
            assert_eq!(owners, OWNERS);
            let first = shards.to_first(|_, size| vec![workers.rank() as f32; size], |size| size);
            let ids = shards.parameters.iter().map(|(id, _, _)| id);
            let first: Vec<_> = ids.filter_map(|id| first.get(id).cloned()).collect();
            let together = shards.together::<B, _>(module);
            let expected = [6, 3, 4, 4, 1, 1].into_iter().zip(OWNERS);
            let expected: Vec<Vec<f32>> = expected
                .map(|(size, owner)| vec![owner as f32; size])
                .collect();
            assert_eq!(numbers(&together), expected);
            assert!(
                together
                    .iter()
                    .all(|linear| linear.weight.val().is_require_grad())
            );
            match workers.leads() {
                true => assert_eq!(first, expected),
                false => assert!(first.is_empty()),
            }
        });
    }

    /// Weights, averages and moments after three steps, and for how many parameters this worker
    /// has moments.
    fn trained(workers: Group) -> ([Vec<Vec<f32>>; 3], usize) {
        let mut module = module(0.5);
        let shards = (workers.size() > 1).then(|| shards(workers, &module).into());
        let mut optimizer = AdamW::<B>::new(0.01, Vec::new()).sharded(shards.clone());
        let mut ema = Ema::new(&module, 0.5).sharded(shards);
        for step in 1..=3 {
            let terms = module.iter().map(|linear| {
                let weight = linear.weight.val().powi_scalar(2).sum();
                weight * step + linear.bias.val().sum()
            });
            let loss = terms.reduce(|a, b| a + b).unwrap();
            let gradients = GradientsParams::from_grads(loss.backward(), &module);
            module = optimizer.step(0.1, module, gradients);
            ema.update(&module);
        }
        use burn::module::AutodiffModule;
        let averages = numbers(&ema.apply(module.valid()));
        let held = optimizer.moments().len();
        let gathered = optimizer.gathered();
        let of = |linear: &Linear<B>| [linear.weight.id, linear.bias.id];
        let ids = module.iter().flat_map(of);
        let moments = ids.filter_map(|id| gathered.get(&id).cloned()).collect();
        ([numbers(&module), averages, moments], held)
    }

    #[test]
    fn divided_moments_and_averages_are_those_of_one_worker() {
        let ([weights, averages, moments], held) = trained(alone());
        assert_eq!((moments.len(), held), (6, 6));
        let all = fake::shared(3, trained);
        for (rank, (theirs, held)) in all.into_iter().enumerate() {
            assert_eq!(held, [1, 2, 3][rank], "each keeps its own alone");
            assert_eq!(theirs[0], weights);
            assert_eq!(theirs[1], averages);
            match rank {
                0 => assert_eq!(theirs[2], moments),
                _ => assert!(theirs[2].is_empty()),
            }
        }
    }
}
