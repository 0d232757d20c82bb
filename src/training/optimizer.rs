//! AdamW over parameter groups, and clipping by the global norm.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use burn::module::{AutodiffModule, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::{GradientsParams, MultiGradientsParams, Optimizer};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorMetadata, TensorPrimitive};

use super::shards::Shards;
use crate::ops::{AdamWState, AdamWStep, FusedOps, TrainingBackend};
use crate::state;

/// Parameters with a learning rate of their own.
#[derive(Debug, Clone)]
pub struct ParameterGroup {
    /// The parameters.
    pub parameters: Vec<ParamId>,
    /// Factor of the schedule's rate.
    pub lr_factor: f64,
}

/// Adam's running moments of one parameter, on the inner backend.
#[derive(Debug, Clone)]
pub(super) struct Moments<B: Backend> {
    pub(super) first: FloatTensor<B>,
    pub(super) second: FloatTensor<B>,
    /// Number of updates so far.
    pub(super) time: i32,
}

/// AdamW (arXiv 1711.05101) in PyTorch's arithmetic, with parameter groups.
///
/// Burn's own has one rate for all parameters, and its state can be neither named nor shared.
/// Clones of this one share their moments, so that the strategy can checkpoint what the `Learner`'s
/// copy updates.
#[derive(Debug, Clone)]
pub struct AdamW<B: AutodiffBackend> {
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
    groups: Vec<ParameterGroup>,
    moments: Arc<Mutex<HashMap<ParamId, Moments<B::InnerBackend>>>>,
    /// Factor of the gradients in the next step.
    gradient_scale: Arc<Mutex<f64>>,
    /// Which moments are this worker's, where several divide them.
    shards: Option<Arc<Shards>>,
}

impl<B: TrainingBackend> AdamW<B> {
    /// An optimizer with betas (0.9, 0.999) and epsilon 1e-8.
    pub fn new(weight_decay: f64, groups: Vec<ParameterGroup>) -> Self {
        Self {
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay,
            groups,
            moments: Arc::default(),
            gradient_scale: Arc::new(Mutex::new(1.0)),
            shards: None,
        }
    }

    /// With moments that several workers divide among them. Each step is then one of all workers.
    pub(super) fn sharded(self, shards: Option<Arc<Shards>>) -> Self {
        Self { shards, ..self }
    }

    /// Whether the moments of a parameter are this worker's.
    pub(super) fn owns(&self, id: ParamId) -> bool {
        self.shards.as_ref().is_none_or(|shards| shards.owns(id))
    }

    /// Sets the factor of the next step's gradients, which are sums over `parts` batches: to their
    /// mean, and further so that its norm over all parameters of `module` is at most `bound`.
    /// Returns the norm of the mean before clipping.
    ///
    /// The step reads every gradient anyway; scaling them here would cost another pass over memory.
    pub fn clip_next<M: AutodiffModule<B>>(
        &self,
        module: &M,
        gradients: &GradientsParams,
        parts: usize,
        bound: f64,
    ) -> f64 {
        let share = 1.0 / parts as f64;
        let norm = share * global_norm::<B, M>(module, gradients);
        // PyTorch's rule, including its epsilon.
        let by = bound / (norm + 1e-6);
        // A step with a non-finite norm is not clipped; the training loop skips it.
        let bounded = by < 1.0 && norm.is_finite();
        *self.gradient_scale.lock() = if bounded { by * share } else { share };
        norm
    }

    /// Each parameter's number of updates, then its first moments and its second. Where several
    /// workers divide them, all of them call it at once, and the first one alone has them.
    pub(super) fn gathered(&self) -> HashMap<ParamId, Vec<f32>> {
        let values = |moment: &FloatTensor<B::InnerBackend>| {
            let flat = [moment.shape().num_elements()].into();
            let flat = B::InnerBackend::with_shape(moment.clone(), flat);
            let flat = TensorPrimitive::Float(flat);
            state::values(Tensor::<B::InnerBackend, 1>::from_primitive(flat))
        };
        let all = |moments: &Moments<B::InnerBackend>| {
            // Exact below 2^24 updates; beyond, Adam's corrections round to 1.
            let mut all = vec![moments.time as f32];
            all.extend(values(&moments.first));
            all.extend(values(&moments.second));
            all
        };
        let moments = self.moments();
        let Some(shards) = &self.shards else {
            let moments = moments.iter();
            return moments.map(|(id, moments)| (*id, all(moments))).collect();
        };
        let own = |id, size| (moments.get(&id)).map_or_else(|| vec![0.0; 1 + 2 * size], all);
        let mut gathered = shards.to_first(own, |size| 1 + 2 * size);
        // Those that never had a gradient have none.
        gathered.retain(|_, moments| moments[0] > 0.0);
        gathered
    }

    pub(super) fn moments(&self) -> MutexGuard<'_, HashMap<ParamId, Moments<B::InnerBackend>>> {
        self.moments.lock()
    }

    fn lr_factor(&self, id: ParamId) -> f64 {
        self.groups
            .iter()
            .find(|group| group.parameters.contains(&id))
            .map_or(1.0, |group| group.lr_factor)
    }

    /// The updated values of one parameter.
    fn update<const D: usize>(
        &self,
        id: ParamId,
        (lr, gradient_scale): (f64, f64),
        value: Tensor<B::InnerBackend, D>,
        gradient: Tensor<B::InnerBackend, D>,
    ) -> Tensor<B::InnerBackend, D> {
        let mut moments = self.moments();
        let wrap = |primitive| {
            Tensor::<B::InnerBackend, D>::from_primitive(TensorPrimitive::Float(primitive))
        };
        let (first, second, time) = match moments.remove(&id) {
            Some(Moments {
                first,
                second,
                time,
            }) => (wrap(first), wrap(second), time),
            None => (gradient.zeros_like(), gradient.zeros_like(), 0),
        };
        let step = AdamWStep {
            gradient_scale,
            lr,
            betas: self.betas,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
            time: time + 1,
        };
        let state = AdamWState {
            value,
            first,
            second,
        };
        let state = B::InnerBackend::adamw(state, gradient, step);
        let after = Moments {
            first: state.first.into_primitive().tensor(),
            second: state.second.into_primitive().tensor(),
            time: step.time,
        };
        moments.insert(id, after);
        state.value
    }
}

impl<B: TrainingBackend, M: AutodiffModule<B>> Optimizer<M, B> for AdamW<B> {
    // The strategy saves the state, under parameter names; Burn's record of it is empty.
    type Record = ();

    fn step(&mut self, lr: f64, module: M, gradients: GradientsParams) -> M {
        struct Step<'a, B: TrainingBackend> {
            optimizer: &'a AdamW<B>,
            lr: f64,
            gradient_scale: f64,
            gradients: GradientsParams,
        }
        impl<B: TrainingBackend> ModuleMapper<B> for Step<'_, B> {
            fn map_float<const D: usize>(
                &mut self,
                param: Param<Tensor<B, D>>,
            ) -> Param<Tensor<B, D>> {
                let (id, tensor, mapper) = param.consume();
                let Some(gradient) = self.gradients.remove::<B::InnerBackend, D>(id) else {
                    return Param::from_mapped_value(id, tensor, mapper);
                };
                if !self.optimizer.owns(id) {
                    return Param::from_mapped_value(id, tensor, mapper);
                }
                let learns = tensor.is_require_grad();
                let lr = self.lr * self.optimizer.lr_factor(id);
                let rates = (lr, self.gradient_scale);
                let value = self.optimizer.update(id, rates, tensor.inner(), gradient);
                Param::from_mapped_value(
                    id,
                    Tensor::from_inner(value).set_require_grad(learns),
                    mapper,
                )
            }
        }
        let gradient_scale = std::mem::replace(&mut *self.gradient_scale.lock(), 1.0);
        let module = module.map(&mut Step {
            optimizer: self,
            lr,
            gradient_scale,
            gradients,
        });
        match &self.shards {
            Some(shards) => shards.together::<B, M>(module),
            None => module,
        }
    }

    fn step_multi(&mut self, lr: f64, module: M, mut gradients: MultiGradientsParams) -> M {
        // One device per process, so the list has one entry.
        match gradients.grads.pop() {
            Some((gradients, _)) => self.step(lr, module, gradients),
            None => module,
        }
    }

    fn to_record(&self) {}

    fn load_record(self, (): ()) -> Self {
        self
    }
}

/// The norm of the gradients of all parameters of `module` together.
fn global_norm<B: TrainingBackend, M: AutodiffModule<B>>(
    module: &M,
    gradients: &GradientsParams,
) -> f64 {
    struct Squares<'a, B: TrainingBackend> {
        gradients: &'a GradientsParams,
        squares: Vec<Tensor<B::InnerBackend, 1>>,
    }
    impl<B: TrainingBackend> ModuleVisitor<B> for Squares<'_, B> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(gradient) = self.gradients.get::<B::InnerBackend, D>(param.id) {
                self.squares.push(B::InnerBackend::sum_of_squares(gradient));
            }
        }
    }
    let mut visitor = Squares::<B> {
        gradients,
        squares: Vec::new(),
    };
    module.visit(&mut visitor);
    if visitor.squares.is_empty() {
        return 0.0;
    }
    // One transfer for all parameters; summed in f64.
    let squares = Tensor::cat(visitor.squares, 0).into_data();
    squares.iter::<f64>().sum::<f64>().sqrt()
}
