//! The parameters of single layers, of any network: a parameter keeps its id when the layers around
//! it go, and is called alike in every layer that is left alone.

use std::collections::{HashMap, HashSet};

use burn::module::ParamId;
use burn::tensor::backend::Backend;

use crate::models::Prunable;
use crate::state::{StateDict, WeightsError, collect, names, overlay};

/// The parameters of one layer alone, by id, with their names where it is the only layer.
pub(super) fn own_parameters<B: Backend, N: Prunable<B>>(
    network: &N,
    layer: usize,
) -> HashMap<ParamId, String> {
    let shared = names::<B, N>(&network.clone().keep(&[])).into_iter();
    let shared: HashSet<ParamId> = shared.map(|parameter| parameter.id).collect();
    let alone = names::<B, N>(&network.clone().keep(&[layer])).into_iter();
    let own = alone.filter(|parameter| !shared.contains(&parameter.id));
    own.map(|parameter| (parameter.id, parameter.name))
        .collect()
}

/// The names of one layer's parameters in the whole network, by those they have where it is the
/// only layer.
pub(super) fn own_names<B: Backend, N: Prunable<B>>(
    network: &N,
    layer: usize,
) -> HashMap<String, String> {
    let called = names::<B, N>(network).into_iter();
    let called: HashMap<ParamId, String> = called
        .map(|parameter| (parameter.id, parameter.name))
        .collect();
    let own = own_parameters(network, layer).into_iter();
    own.filter_map(|(id, local)| Some((local, called.get(&id)?.clone())))
        .collect()
}

/// `network` with the weights of layers of `other`: pairs of a layer and the other's.
pub(super) fn take_layers<B: Backend, N: Prunable<B>>(
    network: N,
    other: &N,
    pairs: &[(usize, usize)],
) -> Result<N, WeightsError> {
    let values = collect::<B, N>(other);
    let mut taken = StateDict::new();
    for (layer, from) in pairs {
        let from = own_names(other, *from);
        for (local, name) in own_names(&network, *layer) {
            let value = from.get(&local).and_then(|name| values.get(name));
            taken.extend(value.map(|value| (name, value.clone())));
        }
    }
    overlay::<B, N>(network, &taken)
}
