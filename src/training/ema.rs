//! Exponential moving average of parameters.

use std::collections::HashMap;

use burn::module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorMetadata, TensorPrimitive};

use crate::ops::FusedOps;

/// `average <- decay average + (1 - decay) parameter`, kept as a copy from the start, on the inner backend.
#[derive(Debug, Clone)]
pub struct Ema<B: Backend> {
    decay: f64,
    averages: HashMap<ParamId, FloatTensor<B>>,
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
        };
        ema.visit(module, |_, value| value);
        ema
    }

    /// Moves the average towards the current parameters.
    pub fn update<AB: AutodiffBackend<InnerBackend = B>, M: AutodiffModule<AB>>(
        &mut self,
        module: &M,
    ) {
        let decay = self.decay;
        // The rank of a parameter says nothing to an average: all are passed over as vectors.
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
                if tensor.is_require_grad() {
                    let value = tensor.inner().into_primitive().tensor();
                    let average = (self.rule)(self.averages.remove(&param.id), value);
                    self.averages.insert(param.id, average);
                }
            }
        }
        module.visit(&mut Visit::<B, _> {
            averages: &mut self.averages,
            rule,
        });
    }

    /// `module` with its learning parameters replaced by their averages.
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
        module.map(&mut Apply::<B>(&self.averages))
    }

    /// Replaces the averages by those that `module` holds for the same parameters.
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
