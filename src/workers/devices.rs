//! Exchange between the devices of the workers, past the host's memory.

use std::fmt::Debug;
use std::sync::Arc;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::{Group, Tree};

/// The devices of a group. Every call is made by all of its workers, in the same order.
pub trait Devices<B: Backend>: Debug + Send + Sync {
    /// How many there are.
    fn size(&self) -> usize;

    /// Sends part `i` of as many equal parts as there are workers, `[workers * part]`, to worker
    /// `i`. Returns what all sent to this one, in the order of their numbers.
    fn exchange(&self, parts: Tensor<B, 1>) -> Tensor<B, 1>;

    /// Everyone's values, equally many of each, in the order of their numbers.
    fn collect(&self, part: Tensor<B, 1>) -> Tensor<B, 1>;
}

/// The sums of values over all workers, as [`sum`](super::sum) has them: to the last bit, where
/// devices add as the host does.
pub fn sum_on_devices<B: Backend>(devices: &dyn Devices<B>, values: Tensor<B, 1>) -> Tensor<B, 1> {
    let (size, [length]) = (devices.size(), values.dims());
    let slice = length.div_ceil(size);
    // Slices are equally long.
    let parts = match slice * size - length {
        0 => values,
        missing => {
            let padding = Tensor::zeros([missing], &values.device());
            Tensor::cat(vec![values, padding], 0)
        }
    };
    let received = devices.exchange(parts);
    let mut tree = Tree::new(|sum: Tensor<B, 1>, term| sum + term);
    for rank in 0..size {
        tree.push(received.clone().narrow(0, rank * slice, slice));
    }
    // Of no workers there is no sum.
    let own = tree.finish().unwrap_or(received);
    devices.collect(own).narrow(0, 0, length)
}

/// The devices of all workers, where they have a way to each other; None where values go through
/// the host. Of all workers at once. (One that has no others may take the way too, to try it.)
///
/// # Errors
/// When there is a way, and one of them can't take it.
pub fn devices<B: Backend>(
    workers: &Group,
    device: &B::Device,
) -> Result<Option<Arc<dyn Devices<B>>>, String> {
    #[cfg(all(feature = "cuda", feature = "mpi"))]
    if workers.have_nccl() {
        return super::nccl::devices::<B>(workers, device).map(Some);
    }
    let _ = (workers, device);
    Ok(None)
}

#[cfg(test)]
pub(crate) mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::state::values;
    use crate::workers::{fake, sum};

    /// Devices whose values go through the host.
    #[derive(Debug)]
    pub(crate) struct ThroughHost(pub(crate) Group);

    impl<B: Backend> Devices<B> for ThroughHost {
        fn size(&self) -> usize {
            self.0.size()
        }

        fn exchange(&self, parts: Tensor<B, 1>) -> Tensor<B, 1> {
            let device = parts.device();
            Tensor::from_floats(&self.0.exchange(&values(parts))[..], &device)
        }

        fn collect(&self, part: Tensor<B, 1>) -> Tensor<B, 1> {
            let device = part.device();
            let part = values(part);
            let mut all = vec![0.0; part.len() * self.0.size()];
            self.0.collect(&part, &mut all);
            Tensor::from_floats(&all[..], &device)
        }
    }

    #[test]
    fn sums_on_devices_are_those_of_the_host() {
        for size in 1..=4 {
            for length in [1, 3, 8, 13] {
                let sums = fake::shared(size, |workers| {
                    let seed = workers.rank() as f32 * 7.3 + 0.37;
                    let own: Vec<f32> = (0..length).map(|at| 1.0 / (seed + at as f32)).collect();
                    let mut host = own.clone();
                    sum(&*workers, &mut host);
                    let own = Tensor::<Flex, 1>::from_floats(&own[..], &Default::default());
                    (host, values(sum_on_devices(&ThroughHost(workers), own)))
                });
                for (host, devices) in sums {
                    assert_eq!(host, devices, "{length} over {size}");
                }
            }
        }
    }
}
