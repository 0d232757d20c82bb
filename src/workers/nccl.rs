//! NVIDIA's cards as the workers' devices, over NCCL: the program's only user of it.

use std::any::Any;
use std::ffi::{c_char, c_void};
use std::panic::catch_unwind;
use std::sync::Arc;

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorPrimitive};
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::cuda::CudaRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_cuda::CudaDevice;
use cudarc::driver::result as driver;
use cudarc::driver::sys::{CUcontext, CUstream};
use cudarc::nccl::result::{self as nccl, NcclError, NcclStatus};
use cudarc::nccl::sys::{self, ncclDataType_t};

use super::devices::Devices;
use super::{Group, Workers};

/// The backend `cuda`, which stands above this room.
type Cuda = CubeBackend<CudaRuntime, f32, i32, u8>;

/// The cards of a group.
#[derive(Debug)]
struct Nccl {
    size: usize,
    communicator: sys::ncclComm_t,
    card: Card,
}

/// A card, as the driver names what is needed of it.
#[derive(Debug, Clone, Copy)]
struct Card {
    /// The card's primary one, which Burn works in too.
    context: CUcontext,
    stream: CUstream,
}

// SAFETY: the handles are of the process, not of a thread. A training makes its calls one after the
// other.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

/// The cards of all workers, where this backend's device is one. Of all workers at once.
pub(super) fn devices<B: Backend>(
    workers: &Group,
    device: &B::Device,
) -> Result<Arc<dyn Devices<B>>, String> {
    let device: &dyn Any = device;
    let Some(CudaDevice { index }) = device.downcast_ref() else {
        return Err("NCCL is for cards of NVIDIA: `--nccl` needs the backend `cuda`".into());
    };
    let cards: Arc<dyn Devices<Cuda>> = Arc::new(Nccl::join(&**workers, *index)?);
    let cards: Box<dyn Any> = Box::new(cards);
    let cards = cards.downcast().map(|cards| *cards);
    cards.map_err(|_| "NCCL is for the backend `cuda`".into())
}

impl Nccl {
    fn join(workers: &dyn Workers, card: usize) -> Result<Self, String> {
        // Each says whether it can, before one waits for another.
        let ready = Card::open(card);
        let said = ready.as_ref().err().cloned().unwrap_or_default();
        let all = workers.all_gather(said.as_bytes());
        if let Some(rank) = all.iter().position(|said| !said.is_empty()) {
            let said = String::from_utf8_lossy(&all[rank]);
            return Err(format!("NCCL can't be used: worker {rank}: {said}"));
        }
        let card = ready?;
        let id = match workers.leads() {
            true => nccl::get_uniqueid().map_err(told)?.internal.to_vec(),
            false => Vec::new(),
        };
        let id = workers.broadcast(id.into_iter().map(|byte| byte as u8).collect());
        let mut internal = [0; 128];
        for (to, from) in internal.iter_mut().zip(id) {
            *to = from as c_char;
        }
        let mut communicator = std::ptr::null_mut();
        // SAFETY: the card's context is this thread's, and the group is the one of the id.
        let joined = unsafe {
            nccl::comm_init_rank(
                &raw mut communicator,
                workers.size() as i32,
                sys::ncclUniqueId { internal },
                workers.rank() as i32,
            )
        };
        joined.map_err(told)?;
        Ok(Self {
            size: workers.size(),
            communicator,
            card,
        })
    }

    /// A call that reads one tensor and writes another, with their addresses.
    fn call(
        &self,
        source: &CubeTensor<CudaRuntime>,
        target: &CubeTensor<CudaRuntime>,
        call: impl FnOnce(*const f32, *mut f32) -> Result<NcclStatus, NcclError>,
    ) {
        let memory = |tensor: &CubeTensor<CudaRuntime>| {
            let memory = tensor.client.get_resource(tensor.handle.clone());
            memory.expect("the tensor is in the card's memory")
        };
        let (from, to) = (memory(source), memory(target));
        // Burn has written the one and no longer uses the other's memory.
        let done = burn_cubecl::cubecl::future::block_on(source.client.sync());
        done.expect("the card answers");
        self.card.enter().expect("the card answers");
        let (from, to) = (
            from.resource().ptr as *const f32,
            to.resource().ptr as *mut f32,
        );
        let called = call(from, to).map_err(told);
        called.expect("the other cards answer");
        // SAFETY: the stream is as old as the card.
        let done = unsafe { driver::stream::synchronize(self.card.stream) };
        done.expect("the other cards answer");
    }

    /// A tensor in the place of `tensor`, of so many values, of which none is set.
    fn empty(tensor: &CubeTensor<CudaRuntime>, length: usize) -> CubeTensor<CudaRuntime> {
        let (client, device) = (tensor.client.clone(), tensor.device.clone());
        burn_cubecl::ops::numeric::empty_device_contiguous_dtype(
            client,
            device,
            [length].into(),
            tensor.dtype,
        )
    }
}

impl Devices<Cuda> for Nccl {
    fn size(&self) -> usize {
        self.size
    }

    fn exchange(&self, parts: Tensor<Cuda, 1>) -> Tensor<Cuda, 1> {
        let [length] = parts.dims();
        let part = length / self.size;
        let parts = into_contiguous(parts.into_primitive().tensor());
        let received = Self::empty(&parts, length);
        self.call(&parts, &received, |from, to| {
            nccl::group_start()?;
            for rank in 0..self.size {
                // SAFETY: there are as many parts as workers in both tensors.
                unsafe {
                    let (from, to) = (from.add(rank * part), to.add(rank * part));
                    let peer = rank as i32;
                    let (kind, stream) = (ncclDataType_t::ncclFloat32, self.card.stream.cast());
                    nccl::send(from.cast(), part, kind, peer, self.communicator, stream)?;
                    nccl::recv(to.cast(), part, kind, peer, self.communicator, stream)?;
                }
            }
            nccl::group_end()
        });
        Tensor::from_primitive(TensorPrimitive::Float(received))
    }

    fn collect(&self, part: Tensor<Cuda, 1>) -> Tensor<Cuda, 1> {
        let [length] = part.dims();
        let part = into_contiguous(part.into_primitive().tensor());
        let all = Self::empty(&part, length * self.size);
        self.call(&part, &all, |from, to| {
            let (from, to): (*const c_void, *mut c_void) = (from.cast(), to.cast());
            let (kind, stream) = (ncclDataType_t::ncclFloat32, self.card.stream.cast());
            // SAFETY: there is place for the values of as many workers as there are.
            unsafe { nccl::all_gather(from, to, length, kind, self.communicator, stream) }
        });
        Tensor::from_primitive(TensorPrimitive::Float(all))
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // What can't be given back goes with the process.
        let _ = self.card.enter();
        // SAFETY: both were made with this.
        unsafe {
            let _ = nccl::comm_destroy(self.communicator);
            let _ = driver::stream::destroy(self.card.stream);
        }
    }
}

impl Card {
    /// Opens a card by its number, for a process that can load NCCL.
    fn open(card: usize) -> Result<Self, String> {
        // Whoever loads a library that is not there panics.
        match catch_unwind(nccl::get_nccl_version) {
            Ok(version) => version.map_err(told)?,
            Err(_) => return Err("a library named libnccl.so can't be loaded; NVIDIA's libnccl-dev has it, or a link of that name to libnccl.so.2, in a folder that LD_LIBRARY_PATH names".into()),
        };
        let open = || {
            driver::init()?;
            let device = driver::device::get(card as i32)?;
            // SAFETY: the driver gave the device, and lives as long as the process.
            let context = unsafe { driver::primary_ctx::retain(device)? };
            // SAFETY: the context was given just now.
            unsafe { driver::ctx::set_current(context)? };
            let stream = driver::stream::create(driver::stream::StreamKind::NonBlocking)?;
            Ok(Self { context, stream })
        };
        let opened: Result<Self, driver::DriverError> = open();
        opened.map_err(|error| format!("card {card} can't be opened: {error}"))
    }

    /// Makes it the card of this thread.
    fn enter(&self) -> Result<(), driver::DriverError> {
        // SAFETY: the context is never given back.
        unsafe { driver::ctx::set_current(self.context) }
    }
}

fn told(NcclError(result): NcclError) -> String {
    format!("NCCL says {result:?}")
}
