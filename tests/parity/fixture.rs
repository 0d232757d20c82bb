//! Golden vectors on disk.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::{AutodiffModule, ModuleVisitor, Param, ParamId};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Int, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tinyfusion::models::{DitConfig, Network};
use tinyfusion::state::{Array, StateDict, assign, names};
use tinyfusion::weights::{open_torch, read_safetensors};

/// A tensor of a fixture: values as f64, whatever their stored type.
#[derive(Debug, Clone)]
pub struct Values {
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

/// One safetensors file.
pub struct File {
    pub name: String,
    tensors: BTreeMap<String, Values>,
}

/// A folder with its `case.json`.
pub struct Group {
    pub path: PathBuf,
    pub case: Value,
}

impl Group {
    pub fn open(name: &str) -> Self {
        let root = std::env::var_os("TINYFUSION_FIXTURES").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"),
            PathBuf::from,
        );
        let path = root.join(name);
        let text = std::fs::read_to_string(path.join("case.json"))
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self {
            case: serde_json::from_str(&text).unwrap(),
            path,
        }
    }

    pub fn file(&self, name: &str) -> File {
        let bytes =
            std::fs::read(self.path.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = tensors
            .tensors()
            .into_iter()
            .map(|(name, view)| {
                (
                    name,
                    Values {
                        shape: view.shape().to_vec(),
                        data: decode(view.dtype(), view.data()),
                    },
                )
            })
            .collect();
        File {
            name: name.to_owned(),
            tensors,
        }
    }

    /// A state dict in any format.
    pub fn state(&self, name: &str) -> StateDict {
        let path = self.path.join(name);
        if name.ends_with(".safetensors") {
            return read_safetensors(&path).unwrap().0;
        }
        open_torch(&path, None).unwrap().read_all().unwrap()
    }

    pub fn steps(&self) -> usize {
        usize_of(&self.case["steps"])
    }
}

fn decode(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    match dtype {
        Dtype::F32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f64::from(f32::from_le_bytes(*b)))
            .collect(),
        Dtype::F64 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f64::from_le_bytes(*b))
            .collect(),
        Dtype::I64 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b) as f64)
            .collect(),
        Dtype::U8 => bytes.iter().map(|b| f64::from(*b)).collect(),
        other => panic!("unexpected type {other:?}"),
    }
}

impl File {
    pub fn get(&self, name: &str) -> &Values {
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("{} has no `{name}`", self.name))
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensors under a prefix, as a state dict.
    pub fn state(&self, prefix: &str) -> StateDict {
        let array = |values: &Values| Array {
            shape: values.shape.clone(),
            data: values.data.iter().map(|v| *v as f32).collect(),
        };
        self.tensors
            .iter()
            .filter_map(|(name, values)| {
                Some((name.strip_prefix(prefix)?.to_owned(), array(values)))
            })
            .collect()
    }
}

impl Values {
    pub fn tensor<B: Backend, const D: usize>(&self) -> Tensor<B, D> {
        let data: Vec<f32> = self.data.iter().map(|value| *value as f32).collect();
        Tensor::from_data(
            TensorData::new(data, self.shape.clone()),
            &B::Device::default(),
        )
    }

    pub fn labels<B: Backend>(&self) -> Tensor<B, 1, Int> {
        let data: Vec<i64> = self.data.iter().map(|value| *value as i64).collect();
        Tensor::from_data(
            TensorData::new(data, self.shape.clone()),
            &B::Device::default(),
        )
    }

    pub fn indices(&self) -> Vec<usize> {
        self.data.iter().map(|value| *value as usize).collect()
    }

    /// Times in a batch's form.
    pub fn times(&self) -> Vec<f32> {
        self.data.iter().map(|value| *value as f32).collect()
    }

    /// Entry `index` of the first dimension.
    pub fn row(&self, index: usize) -> Values {
        let size: usize = self.shape[1..].iter().product();
        Values {
            shape: self.shape[1..].to_vec(),
            data: self.data[index * size..(index + 1) * size].to_vec(),
        }
    }

    /// A scalar, as a single value.
    pub fn scalar(self) -> Values {
        assert_eq!(self.data.len(), 1);
        Values {
            shape: vec![1],
            data: self.data,
        }
    }

    /// Some entries of the first dimension.
    pub fn rows(&self, rows: &[usize]) -> Values {
        let size = self.data.len() / self.shape[0];
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        let data = rows
            .iter()
            .flat_map(|row| &self.data[row * size..(row + 1) * size]);
        Values {
            shape,
            data: data.copied().collect(),
        }
    }

    /// The first `count` entries of the first dimension.
    pub fn first(&self, count: usize) -> Values {
        let size: usize = self.shape[1..].iter().product();
        let shape = std::iter::once(count)
            .chain(self.shape[1..].iter().copied())
            .collect();
        Values {
            shape,
            data: self.data[..count * size].to_vec(),
        }
    }
}

/// Labels with dropped ones replaced by the null class.
pub fn dropped(y: &Values, drop: &Values, classes: usize) -> Values {
    let data = y
        .data
        .iter()
        .zip(&drop.data)
        .map(|(y, drop)| if *drop == 1.0 { classes as f64 } else { *y })
        .collect();
    Values {
        shape: y.shape.clone(),
        data,
    }
}

pub fn usize_of(value: &Value) -> usize {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is not a size")) as usize
}

pub fn usizes_of(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(usize_of).collect()
}

pub fn f64_of(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is not a number"))
}

pub fn config(value: &Value) -> DitConfig {
    DitConfig {
        input_size: usize_of(&value["input_size"]),
        patch_size: usize_of(&value["patch_size"]),
        channels: usize_of(&value["in_channels"]),
        width: usize_of(&value["hidden_size"]),
        depth: usize_of(&value["depth"]),
        heads: usize_of(&value["num_heads"]),
        mlp_ratio: f64_of(&value["mlp_ratio"]),
        classes: usize_of(&value["num_classes"]),
        learn_sigma: value["learn_sigma"].as_bool().unwrap(),
        blocks: Vec::new(),
        widths: None,
    }
}

pub fn network<B: Backend>(config: &DitConfig, state: &StateDict) -> Network<B> {
    assign(
        Network::zeros(&config.clone().into(), &B::Device::default()).unwrap(),
        state,
        Path::new("fixture"),
        "the fixture's model",
    )
    .unwrap()
}

/// Gradients by parameter name.
pub fn gradients<B: AutodiffBackend, M: AutodiffModule<B>>(
    module: &M,
    gradients: &B::Gradients,
) -> BTreeMap<String, Values> {
    struct Collect<'a, B: AutodiffBackend> {
        gradients: &'a B::Gradients,
        found: BTreeMap<ParamId, Values>,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Collect<'_, B> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(gradient) = param.val().grad(self.gradients) {
                let shape = gradient.dims().to_vec();
                self.found.insert(
                    param.id,
                    Values {
                        shape,
                        data: gradient.into_data().iter::<f64>().collect(),
                    },
                );
            }
        }
    }
    let mut visitor = Collect::<B> {
        gradients,
        found: BTreeMap::new(),
    };
    module.visit(&mut visitor);
    names::<B, M>(module)
        .into_iter()
        .filter_map(|parameter| Some((parameter.name, visitor.found.remove(&parameter.id)?)))
        .collect()
}
