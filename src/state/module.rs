//! Conversion between a Burn module and a state dict.

use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Tensor, TensorData, backend::Backend};

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

/// Fields whose part of a checkpoint's name is not the field's: a Rust field can't be called
/// `mlp.0`, and a bare table has no `weight`. By the type that has the field, so that a field of
/// another type keeps its name.
const RENAMED: [(&str, &str, &str); 18] = [
    ("Struct:TimestepEmbedder", "hidden", "mlp.0"),
    ("Struct:TimestepEmbedder", "out", "mlp.2"),
    ("Struct:LabelEmbedder", "table", "embedding_table.weight"),
    ("Struct:DitBlock", "modulation", "adaLN_modulation.1"),
    ("Struct:FinalLayer", "modulation", "adaLN_modulation.1"),
    ("Struct:HeadBlock", "hidden", "mlp.0"),
    ("Struct:HeadBlock", "out", "mlp.2"),
    ("Struct:HeadBlock", "modulation", "adaLN_modulation.1"),
    ("Struct:HeadLast", "modulation", "adaLN_modulation.1"),
    // A branch of a block is no part of a name.
    ("Struct:MarBlock", "attention", ""),
    ("Struct:MarBlock", "hidden", ""),
    ("Struct:Lora", "a", "lora_a.weight"),
    ("Struct:Lora", "b", "lora_b.weight"),
    ("Struct:LearnedPruner", "gates", "gumbel_gates"),
    // The place of a low-rank update in its layer, and of a network in what trains it, are no part
    // of a name.
    ("Struct:Linear", "lora", ""),
    ("Struct:LearnedPruner", "network", ""),
    ("Struct:Student", "network", ""),
    ("Struct:Regression", "network", ""),
];

/// The place of a walk through a module, under a checkpoint's names.
#[derive(Default)]
pub(crate) struct Walk(Vec<String>);

impl Walk {
    /// Enters a field, as Burn names it and the type that has it.
    pub(crate) fn enter(&mut self, field: &str, container: &str) {
        let renamed = RENAMED
            .iter()
            .find(|(of, name, _)| (*of, *name) == (container, field));
        let part = match renamed {
            Some((_, _, part)) => part,
            // The variant of an enum of networks is no part of a name.
            None if container.starts_with("Enum:") => "",
            None => field,
        };
        self.0.push(part.to_owned());
    }

    /// Leaves the field that was entered last.
    pub(crate) fn leave(&mut self) {
        self.0.pop();
    }

    /// The name of the parameter here.
    pub(crate) fn name(&self) -> String {
        let parts: Vec<&str> = (self.0.iter().map(String::as_str))
            .filter(|part| !part.is_empty())
            .collect();
        parts.join(".")
    }
}

/// Every float parameter of a module, in the module's order.
pub fn names<B: Backend, M: Module<B>>(module: &M) -> Vec<ParameterName> {
    struct Names {
        walk: Walk,
        found: Vec<ParameterName>,
    }
    impl<B: Backend> ModuleVisitor<B> for Names {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.walk.enter(name, container);
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.walk.leave();
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
        fn enter_module(&mut self, name: &str, container: &str) {
            self.walk.enter(name, container);
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.walk.leave();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let tensor = param.val();
            let shape = tensor.dims().to_vec();
            let data = values(tensor);
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

/// The values of a tensor that others may hold as well, such as a parameter.
pub(crate) fn values<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    // burn-ndarray hands out the values of a shared tensor one by one, which takes many times as
    // long as those of a tensor of one's own. The product is such a copy, to the last bit.
    let shares = B::name(&tensor.device()).contains("ndarray");
    floats(if shares { tensor * 1.0 } else { tensor }.into_data())
}

/// Converts float tensor data to f32.
pub(crate) fn floats(data: TensorData) -> Vec<f32> {
    // All at once where they are f32, as nearly always; value by value takes many times as long.
    match data.dtype {
        DType::F32 => data.into_vec().expect("they are of f32"),
        _ => data.iter::<f32>().collect(),
    }
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
        fn enter_module(&mut self, name: &str, container: &str) {
            self.walk.enter(name, container);
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.walk.leave();
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

#[cfg(test)]
mod tests {
    use burn_ndarray::NdArray;

    use super::*;
    use crate::ops::Linear;

    /// A network of another's, with fields that are called as some of ours.
    #[derive(Module, Debug)]
    struct Own<B: Backend> {
        network: Linear<B>,
        modulation: Linear<B>,
    }

    #[test]
    fn only_the_fields_of_the_renamed_types_are_renamed() {
        let device = Default::default();
        let mut own = Own::<NdArray> {
            network: Linear::zeros(2, 3, &device),
            modulation: Linear::zeros(3, 2, &device),
        };
        own.modulation.attach_lora(1, 1.0);
        let found: Vec<String> = names(&own).into_iter().map(|found| found.name).collect();
        let expected = [
            "network.weight",
            "network.bias",
            "modulation.weight",
            "modulation.bias",
            "modulation.lora_a.weight",
            "modulation.lora_b.weight",
        ];
        assert_eq!(found, expected);
    }
}
