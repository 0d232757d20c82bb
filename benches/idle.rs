//! For what share of a training does the device wait: for batches, for numbers that are logged, for
//! checkpoints?
//!
//! `cargo bench --bench idle`, or `cargo bench --no-default-features --features wgpu --bench idle`
//! (or `cuda`). Fine-tuning steps of DiT-S/2 one after the other on one batch, with nothing read
//! back before the last, against a training of as many, in turns; the training's loader, log and
//! checkpoints are all there, each step writes a line and every fifth a checkpoint. `-- 32 40`
//! takes another batch and number of steps.

// As in the program: memory freed by a step is reused by the next.
#[cfg(feature = "cli")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[cfg(any(feature = "ndarray", feature = "wgpu", feature = "cuda"))]
mod measured {
    use std::error::Error;
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Instant;

    use burn::optim::{GradientsParams, Optimizer};
    use burn_dataset::Dataset;
    use tinyfusion::data::{BatchPlan, BatchSource, Batches, DataError, Image, Samples};
    use tinyfusion::models::{Architecture, Denoiser, Network, initialise};
    use tinyfusion::ops::TrainingBackend;
    use tinyfusion::process::{AnyProcess, Process, ProcessKind};
    use tinyfusion::random::{self, Stream};
    use tinyfusion::recovery::Student;
    use tinyfusion::state::{assign, collect};
    use tinyfusion::training::{AdamW, Ema, Fit, Optimisation, Training};

    const ROUNDS: usize = 3;
    const CHECKPOINT_EVERY: usize = 5;
    const DECAY: f64 = 0.999;

    /// Random latents.
    struct Latents {
        values: usize,
        classes: usize,
    }

    impl Dataset<Image> for Latents {
        fn len(&self) -> usize {
            1024
        }

        fn get(&self, index: usize) -> Option<Image> {
            let mut pixels = Vec::new();
            let label = self.read(index, 0, &mut pixels).ok()?;
            Some(Image { pixels, label })
        }
    }

    impl Samples for Latents {
        fn views(&self) -> usize {
            1
        }

        fn read(&self, index: usize, _: usize, out: &mut Vec<f32>) -> Result<usize, DataError> {
            let values = random::normal(0, Stream::Bench, 1, index as u64, self.values);
            out.extend(values);
            Ok(index % self.classes)
        }
    }

    fn student<B: TrainingBackend>(process: AnyProcess, device: &B::Device) -> Student<B> {
        let architecture = Architecture::preset("DiT-S/2").expect("it is published");
        let zeros = Network::<B>::zeros(&architecture, device).expect("it is a diffusion network");
        let mut values = collect::<B, _>(&zeros);
        initialise(&mut values, 0);
        let network = assign::<B, _>(zeros, &values, Path::new(""), "DiT-S/2");
        Student::new(network.expect("they are its own"), None, process, 1)
    }

    /// Seconds of a step, of the steps after the first.
    struct Seconds {
        alone: f64,
        trained: f64,
    }

    fn measure<B: TrainingBackend>(batch: usize, steps: usize) -> Result<Seconds, Box<dyn Error>> {
        let device = B::Device::default();
        let process = ProcessKind::Gaussian.process();
        let student = student::<B>(process.clone(), &device);
        let shape = student.network.shape();
        let plan = BatchPlan {
            batch,
            seed: 0,
            channels: shape.channels,
            size: shape.side,
            classes: shape.classes,
            label_drop: 0.1,
            times: process.times(),
            masking: None,
            logits: Vec::new(),
        };
        let latents = Latents {
            values: shape.channels * shape.side.pow(2),
            classes: shape.classes,
        };
        let source = BatchSource::new(plan, Arc::new(latents));

        let one = source.draw::<B>(0, &device)?;
        let mut model = student.clone();
        let mut optimizer = AdamW::<B>::new(0.0, Vec::new());
        let mut ema = Ema::new(&model, DECAY);
        let mut begun = Instant::now();
        for step in 0..=steps {
            if step == 1 {
                B::sync(&device)?;
                begun = Instant::now();
            }
            let gradients = model.terms(&one).total.mean().backward();
            let gradients = GradientsParams::from_grads(gradients, &model);
            model = optimizer.step(1e-4, model, gradients);
            ema.update(&model);
        }
        B::sync(&device)?;
        let alone = begun.elapsed().as_secs_f64() / steps as f64;
        drop((model, optimizer, ema, one));

        let folder = tempfile::tempdir()?;
        let optimisation = Optimisation {
            batch,
            ema: DECAY,
            checkpoint_every: CHECKPOINT_EVERY,
            log_every: 1,
            ..Optimisation::new(steps + 1)
        };
        let training = Training::new("student", optimisation, folder.path());
        let at = device.clone();
        let batches =
            move |start| Arc::new(Batches::new(source, start, steps + 1, process, &at)) as _;
        let (ended, times) = std::sync::mpsc::channel();
        let observe = Box::new(move |_| {
            let after: tinyfusion::training::OnStep<B, Student<B>> = Box::new(move |_, _, _| {
                // The receiver lives as long as the training.
                let _ = ended.send(Instant::now());
                Ok(())
            });
            Ok(after)
        });
        let fit = Fit::new(training, batches).plain(true).observe(observe);
        fit.run(student)?;
        B::sync(&device)?;
        let end = Instant::now();
        let first = times.recv()?;
        let trained = (end - first).as_secs_f64() / steps as f64;
        Ok(Seconds { alone, trained })
    }

    fn median(mut values: Vec<f64>) -> f64 {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }

    pub fn run() -> Result<(), Box<dyn Error>> {
        #[cfg(feature = "cuda")]
        type On = tinyfusion::backend::Cuda;
        #[cfg(all(feature = "wgpu", not(feature = "cuda")))]
        type On = tinyfusion::backend::Wgpu;
        #[cfg(not(any(feature = "wgpu", feature = "cuda")))]
        type On = burn_ndarray::NdArray;

        let asked: Vec<usize> = std::env::args()
            .filter_map(|argument| argument.parse().ok())
            .collect();
        let (batch, steps) = match asked[..] {
            [batch, steps, ..] => (batch, steps),
            _ => (4, 20),
        };
        let (mut alone, mut trained) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let seconds = measure::<burn::backend::Autodiff<On>>(batch, steps)?;
            alone.push(seconds.alone);
            trained.push(seconds.trained);
        }
        let (alone, trained) = (median(alone), median(trained));
        let share = 1.0 - alone / trained;
        println!("steps alone: {:.1} ms each", 1e3 * alone);
        println!("in a training: {:.1} ms each", 1e3 * trained);
        println!("the device waits for {:.1}% of a training", 1e2 * share);
        Ok(())
    }
}

fn main() {
    #[cfg(any(feature = "ndarray", feature = "wgpu", feature = "cuda"))]
    measured::run().expect("a training can be run");
}
