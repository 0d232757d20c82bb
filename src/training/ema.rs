//! Exponential moving average of parameters.

use std::collections::HashMap;
use std::sync::Arc;

use burn::module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorMetadata, TensorPrimitive};

use super::shards::Shards;
use crate::ops::FusedOps;

/// The decay of the update after `step` earlier ones: at most `decay`, and
/// `(1 + step) / (10 + step)` at first, so that the average of a short training doesn't consist of
/// the initial weights. This is the rule of TensorFlow's `num_updates`, which common trainers use.
pub fn warmed_up(decay: f64, step: usize) -> f64 {
    decay.min((1.0 + step as f64) / (10.0 + step as f64))
}

/// The weight of the initial parameters in an average of constant decay after `steps` steps.
pub fn share_of_start(decay: f64, steps: usize) -> f64 {
    decay.powf(steps as f64)
}

/// `average <- decay average + (1 - decay) parameter`, starting as a copy, on the inner backend.
#[derive(Debug, Clone)]
pub struct Ema<B: Backend> {
    decay: f64,
    averages: HashMap<ParamId, FloatTensor<B>>,
    /// Which averages are this worker's, where several divide them.
    shards: Option<Arc<Shards>>,
}

impl<B: FusedOps> Ema<B> {
    /// An average that starts as a copy of the learning parameters of `module`.
    pub fn new<AB: AutodiffBackend<InnerBackend = B>, M: AutodiffModule<AB>>(
        module: &M,
        decay: f64,
    ) -> Self {
        let mut ema = Self {
            decay,
            averages: HashMap::new(),
            shards: None,
        };
        ema.visit(module, |_, value| value);
        ema
    }

    /// With averages that several workers divide among them.
    pub(super) fn sharded(mut self, shards: Option<Arc<Shards>>) -> Self {
        if let Some(shards) = &shards {
            self.averages.retain(|id, _| shards.owns(*id));
        }
        self.shards = shards;
        self
    }

    /// Moves the average towards the current parameters by its own decay, as the reference does.
    pub fn update<AB: AutodiffBackend<InnerBackend = B>, M: AutodiffModule<AB>>(
        &mut self,
        module: &M,
    ) {
        self.update_by(module, self.decay);
    }

    /// Moves the average towards the current parameters by `decay`, such as that of [`warmed_up`].
    pub fn update_by<AB: AutodiffBackend<InnerBackend = B>, M: AutodiffModule<AB>>(
        &mut self,
        module: &M,
        decay: f64,
    ) {
        // An average doesn't depend on the rank of a parameter: all are processed as vectors.
        let flat = |x: FloatTensor<B>| {
            let count = x.shape().num_elements();
            Tensor::<B, 1>::from_primitive(TensorPrimitive::Float(B::with_shape(x, [count].into())))
        };
        self.visit(module, |average, value| match average {
            Some(average) => {
                let shape = value.shape();
                let moved = B::moving_average(flat(average), flat(value), decay);
                B::with_shape(moved.into_primitive().tensor(), shape)
            }
            None => value,
        });
    }

    fn visit<AB: AutodiffBackend<InnerBackend = B>, M: AutodiffModule<AB>>(
        &mut self,
        module: &M,
        rule: impl Fn(Option<FloatTensor<B>>, FloatTensor<B>) -> FloatTensor<B>,
    ) {
        struct Visit<'a, B: Backend, F> {
            averages: &'a mut HashMap<ParamId, FloatTensor<B>>,
            shards: Option<&'a Shards>,
            rule: F,
        }
        impl<AB, F> ModuleVisitor<AB> for Visit<'_, AB::InnerBackend, F>
        where
            AB: AutodiffBackend,
            F: Fn(
                Option<FloatTensor<AB::InnerBackend>>,
                FloatTensor<AB::InnerBackend>,
            ) -> FloatTensor<AB::InnerBackend>,
        {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
                let tensor = param.val();
                let owns = self.shards.is_none_or(|shards| shards.owns(param.id));
                if tensor.is_require_grad() && owns {
                    let value = tensor.inner().into_primitive().tensor();
                    let average = (self.rule)(self.averages.remove(&param.id), value);
                    self.averages.insert(param.id, average);
                }
            }
        }
        module.visit(&mut Visit::<B, _> {
            averages: &mut self.averages,
            shards: self.shards.as_deref(),
            rule,
        });
    }

    /// `module` with its learning parameters replaced by their averages. Where several workers
    /// divide them (`shard_optimizer`), all of them call it at the same step.
    pub fn apply<M: Module<B>>(&self, module: M) -> M {
        struct Apply<'a, B: Backend>(&'a HashMap<ParamId, FloatTensor<B>>);
        impl<B: Backend> ModuleMapper<B> for Apply<'_, B> {
            fn map_float<const D: usize>(
                &mut self,
                param: Param<Tensor<B, D>>,
            ) -> Param<Tensor<B, D>> {
                let (id, tensor, mapper) = param.consume();
                let tensor = match self.0.get(&id) {
                    Some(average) => {
                        Tensor::from_primitive(TensorPrimitive::Float(average.clone()))
                    }
                    None => tensor,
                };
                Param::from_mapped_value(id, tensor, mapper)
            }
        }
        let module = module.map(&mut Apply::<B>(&self.averages));
        match &self.shards {
            Some(shards) => shards.together::<B, M>(module),
            None => module,
        }
    }

    /// Replaces the averages by the values in `module` of the same parameters.
    pub(super) fn restore<M: Module<B>>(&mut self, module: &M) {
        struct Restore<'a, B: Backend>(&'a mut HashMap<ParamId, FloatTensor<B>>);
        impl<B: Backend> ModuleVisitor<B> for Restore<'_, B> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                if let Some(average) = self.0.get_mut(&param.id) {
                    *average = param.val().into_primitive().tensor();
                }
            }
        }
        module.visit(&mut Restore::<B>(&mut self.averages));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warmed_up_average_of_a_short_run_forgets_where_it_began() {
        assert_eq!(warmed_up(0.999, 0), 0.1);
        assert_eq!(warmed_up(0.999, 90), 0.91);
        assert_eq!(warmed_up(0.999, 100_000), 0.999);
        assert_eq!(warmed_up(0.05, 0), 0.05);
        let left: f64 = (0..300).map(|step| warmed_up(0.999, step)).product();
        // 9! / (300 .. 309): the initial weight's remaining share is the product of all decays.
        assert!(left < 1e-16, "{left}");
        // 0.999^300: with constant decay, a run of 300 steps ended with three quarters of initial
        // noise.
        assert!((share_of_start(0.999, 300) - 0.7407).abs() < 1e-4);
    }
}
