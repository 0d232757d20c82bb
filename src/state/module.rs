//! Conversion between a Burn module and a state dict.

use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Tensor, TensorData, backend::Backend};

use super::{Array, Misfits, StateDict, TensorSource, WeightsError};

/// A parameter and its checkpoint name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterName {
    /// Burn's id of the parameter.
    pub id: ParamId,
    /// Its name in a checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// The checkpoint's name for a parameter at a module path.
///
/// A Rust field can't be called `mlp.0`, and a bare table has no `weight`; these few names differ
/// from PyTorch's. The network's place in the trained module, and its family, are not part of a
/// name.
pub fn reference_name(path: &str) -> String {
    let path = path.strip_prefix("network.").unwrap_or(path);
    // The variant of an enum of networks is written as Rust names it.
    let path = match path.split_once('.') {
        Some((variant, rest)) if variant.starts_with(char::is_uppercase) => rest,
        _ => path,
    };
    const RENAMED: [(&str, &str); 7] = [
        ("t_embedder.hidden.", "t_embedder.mlp.0."),
        ("t_embedder.out.", "t_embedder.mlp.2."),
        (".modulation.", ".adaLN_modulation.1."),
        ("y_embedder.table", "y_embedder.embedding_table.weight"),
        (".lora.a", ".lora_a.weight"),
        (".lora.b", ".lora_b.weight"),
        ("gates.", "gumbel_gates."),
    ];
    RENAMED
        .iter()
        .fold(path.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// The path during a walk through a module, joined by dots.
#[derive(Default)]
struct Walk(Vec<String>);

impl Walk {
    fn name(&self) -> String {
        reference_name(&self.0.join("."))
    }
}

/// Every float parameter of a module, in the module's order.
pub fn names<B: Backend, M: Module<B>>(module: &M) -> Vec<ParameterName> {
    struct Names {
        walk: Walk,
        found: Vec<ParameterName>,
    }
    impl<B: Backend> ModuleVisitor<B> for Names {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.walk.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.walk.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.found.push(ParameterName {
                id: param.id,
                name: self.walk.name(),
                shape: param.lazy_shape().to_vec(),
            });
        }
    }
    let mut visitor = Names {
        walk: Walk::default(),
        found: Vec::new(),
    };
    module.visit(&mut visitor);
    visitor.found
}

/// Reads every float parameter of a module.
pub fn collect<B: Backend, M: Module<B>>(module: &M) -> StateDict {
    struct Collect {
        walk: Walk,
        state: StateDict,
    }
    impl<B: Backend> ModuleVisitor<B> for Collect {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.walk.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.walk.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let tensor = param.val();
            let shape = tensor.dims().to_vec();
            let data = floats(tensor.into_data());
            self.state.insert(self.walk.name(), Array { shape, data });
        }
    }
    let mut visitor = Collect {
        walk: Walk::default(),
        state: StateDict::new(),
    };
    module.visit(&mut visitor);
    visitor.state
}

/// Converts float tensor data to f32.
pub(crate) fn floats(data: TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

/// Fills every float parameter of `module` from `source`, one at a time.
///
/// # Errors
/// [`WeightsError::Mismatch`], listing every parameter that is missing from `source`, that the
/// module does not have, or whose shape differs; `path` and `model` are for that message. Also when
/// values can't be read.
pub fn assign<B: Backend, M: Module<B>>(
    module: M,
    source: &impl TensorSource,
    path: &Path,
    model: &str,
) -> Result<M, WeightsError> {
    let wanted = names::<B, M>(&module);
    let mut misfits = Misfits::default();
    let expected = wanted
        .iter()
        .map(|wanted| (wanted.name.as_str(), wanted.shape.as_slice()));
    misfits.compare(source, expected);
    misfits.into_result(path, model)?;
    overlay(module, source)
}

/// Replaces the parameters of `module` that `source` has; shapes must agree.
///
/// # Errors
/// When values can't be read.
pub(crate) fn overlay<B: Backend, M: Module<B>>(
    module: M,
    source: &impl TensorSource,
) -> Result<M, WeightsError> {
    struct Overlay<'a, S> {
        walk: Walk,
        source: &'a S,
        failed: Option<WeightsError>,
    }
    impl<B: Backend, S: TensorSource> ModuleMapper<B> for Overlay<'_, S> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.walk.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.walk.0.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            let found = self.source.tensor(&self.walk.name());
            let array = found.unwrap_or_else(|error| {
                self.failed.get_or_insert(error);
                None
            });
            let Some(array) = array else {
                return param;
            };
            let data = TensorData::new(array.data, array.shape);
            if !param.is_initialized() {
                // A lazy weight is set without being allocated first. Lazy weights require
                // gradients.
                let tensor = Tensor::from_data(data, &param.lazy_device()).require_grad();
                return Param::initialized(param.id, tensor);
            }
            let (id, old, mapper) = param.consume();
            let tensor = Tensor::from_data(data, &old.device());
            let tensor = tensor.set_require_grad(old.is_require_grad());
            Param::from_mapped_value(id, tensor, mapper)
        }
    }
    let mut overlay = Overlay {
        walk: Walk::default(),
        source,
        failed: None,
    };
    let module = module.map(&mut overlay);
    match overlay.failed {
        None => Ok(module),
        Some(error) => Err(error),
    }
}
