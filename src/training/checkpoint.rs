//! Checkpoint files with everything needed to continue a training bit for bit.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::thread::{Builder, JoinHandle};

use crate::ops::TrainingBackend;
use burn::module::{AutodiffModule, ModuleVisitor, Param, ParamId};
use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::ema::Ema;
use super::optimizer::{AdamW, Moments};
use super::{Training, TrainingError};
use crate::data::{DataError, with_cause};
use crate::state::{Array, StateDict, Walk, collect, names, overlay, values};
use crate::weights::{
    Description, EMA, FIXED, MODEL, MOMENTS, TRAINING, read_safetensors, write_safetensors,
};
use crate::workers::Workers;

/// State of a training loop. Data order, noise and learning rate are functions of the step, so they
/// need no state but the step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Position {
    /// Number of steps done, which is the index of the next one.
    pub step: usize,
    /// Number of steps skipped for a non-finite loss.
    pub skipped: usize,
    /// How many of the last steps were skipped, one after the other.
    #[serde(default)]
    pub bad: usize,
    /// Losses since the last step that a checkpoint was due after.
    #[serde(default)]
    pub losses: Losses,
    /// Step and mean loss of the best checkpoint so far.
    pub best: Option<(usize, f64)>,
    /// Number of arrays of optimizer state that belong to it.
    pub moments: usize,
    /// Hash of what defines the training: configuration, data, parent.
    pub fingerprint: String,
}

/// Losses of some steps.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Losses {
    sum: f64,
    count: usize,
}

impl Losses {
    pub(super) fn add(&mut self, loss: f64) {
        self.sum += loss;
        self.count += 1;
    }

    /// None of no steps, or if all were skipped.
    pub(super) fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

/// Metadata key of the checksum over all else; checkpoints of earlier versions have none.
const CHECKSUM: &str = "tinyfusion.checksum";

/// The CRC-32 of all other metadata and of names, shapes and values. safetensors files have no
/// checksum, and continuing from a damaged checkpoint would give a different training.
fn checksum(state: &StateDict, metadata: &BTreeMap<String, String>) -> String {
    let mut crc32 = crc32fast::Hasher::new();
    for (key, value) in metadata.iter().filter(|(key, _)| *key != CHECKSUM) {
        crc32.update(key.as_bytes());
        crc32.update(value.as_bytes());
    }
    for (name, array) in state {
        crc32.update(name.as_bytes());
        for size in &array.shape {
            crc32.update(&(*size as u64).to_le_bytes());
        }
        crc32.update(bytemuck::cast_slice(&array.data));
    }
    format!("{:08x}", crc32.finalize())
}

/// Name of the folder of a stage's training checkpoints.
pub(crate) const CHECKPOINTS: &str = "checkpoints";

/// Folder of a stage's training checkpoints.
#[derive(Debug)]
pub(super) struct Store {
    directory: PathBuf,
    /// Writes the checkpoint that was saved last; the training goes on meanwhile.
    writing: Option<JoinHandle<Result<(), TrainingError>>>,
}

impl Store {
    pub(super) fn new(stage: &Path) -> Self {
        Self {
            directory: stage.join(CHECKPOINTS),
            writing: None,
        }
    }

    /// Fails where the checkpoint that was saved last could not be written, if that is known by
    /// now.
    pub(super) fn look(&mut self) -> Result<(), TrainingError> {
        match self.writing.as_ref().is_some_and(JoinHandle::is_finished) {
            true => self.finish(),
            false => Ok(()),
        }
    }

    /// Waits until the checkpoint that was saved last is on disk.
    pub(super) fn finish(&mut self) -> Result<(), TrainingError> {
        match self.writing.take().map(JoinHandle::join) {
            Some(Ok(written)) => written,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }

    fn path(&self, step: usize) -> PathBuf {
        self.directory.join(format!("step-{step:08}.safetensors"))
    }

    /// Steps that have a checkpoint, ascending. A file still being written has another name.
    fn steps(&self) -> Result<Vec<usize>, TrainingError> {
        let entries = match std::fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(TrainingError::io(&self.directory)(error)),
        };
        let step = |name: String| {
            name.strip_prefix("step-")?
                .strip_suffix(".safetensors")?
                .parse()
                .ok()
        };
        let mut steps: Vec<usize> = entries
            .flatten()
            .filter_map(|entry| step(entry.file_name().into_string().ok()?))
            .collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Refuses a folder with checkpoints: they would count as those of the training that begins.
    pub(super) fn refuse_any(&self) -> Result<(), TrainingError> {
        match self.steps()?.last() {
            None => Ok(()),
            Some(step) => Err(TrainingError::Resume {
                path: self.path(*step),
                problem: "is of an earlier training; go on with that, or name another folder"
                    .into(),
            }),
        }
    }

    /// Saves a checkpoint, of all workers at once, of which the first writes, in a thread of its
    /// own; then deletes all but the best and the last few that the training keeps.
    /// If the training describes the model, the file does too and holds the whole model, including
    /// the parameters that don't learn.
    ///
    /// # Errors
    /// When the checkpoint before could not be written, or the system refuses a thread. What
    /// becomes of this one [`look`](Self::look) and [`finish`](Self::finish) tell.
    pub(super) fn save<B: TrainingBackend, M: AutodiffModule<B>>(
        &mut self,
        workers: &dyn Workers,
        position: &Position,
        model: &M,
        ema: &Ema<B::InnerBackend>,
        optimizer: &AdamW<B>,
        training: &Training,
    ) -> Result<(), TrainingError> {
        if !workers.leads() && !training.optimisation.shard_optimizer {
            return Ok(());
        }
        // One at a time: of the state there is one copy beside the training's own.
        self.finish()?;
        let broken = |error: serde_json::Error| TrainingError::Resume {
            path: self.directory.clone(),
            problem: error.to_string(),
        };
        // What the workers have divided comes together.
        let averaged = ema.apply(model.valid());
        let gathered = optimizer.gathered();
        if !workers.leads() {
            return Ok(());
        }
        let mut state = StateDict::new();
        let mut put = |prefix: &str, part: StateDict| {
            state.extend(
                part.into_iter()
                    .map(|(name, array)| (format!("{prefix}.{name}"), array)),
            )
        };
        let weights = learning::<B, M>(model);
        // A module of the inner backend has no gradient flags; the parameter names tell what
        // learns.
        let mut averages = collect::<B::InnerBackend, M::InnerModule>(&averaged);
        let fixed = match training.description {
            Some(_) => (averages.iter())
                .filter(|(name, _)| !weights.contains_key(*name))
                .map(|(name, array)| (name.clone(), array.clone()))
                .collect(),
            None => StateDict::new(),
        };
        averages.retain(|name, _| weights.contains_key(name));
        put(EMA, averages);
        put(MODEL, weights);
        put(FIXED, fixed);
        let moments = moments::<B, M>(model, gathered);
        let count = moments.len();
        put(MOMENTS, moments);
        let position = Position {
            moments: count,
            ..position.clone()
        };
        let mut metadata = match &training.description {
            Some(description) => at_step(description, training, position.step)
                .metadata()
                .map_err(broken)?,
            None => BTreeMap::new(),
        };
        let position_text = serde_json::to_string(&position).map_err(broken)?;
        metadata.insert(TRAINING.to_owned(), position_text);
        let folder = Self {
            directory: self.directory.clone(),
            writing: None,
        };
        let keep_last = training.optimisation.keep_last;
        let write = move || folder.write(state, metadata, &position, keep_last);
        let thread = Builder::new().name("checkpoint".into()).spawn(write);
        let refused = |source| DataError::Threads { count: 1, source };
        self.writing = Some(thread.map_err(refused).map_err(TrainingError::Data)?);
        Ok(())
    }

    /// Writes a checkpoint, and deletes those that are no longer kept.
    fn write(
        &self,
        state: StateDict,
        mut metadata: BTreeMap<String, String>,
        position: &Position,
        keep_last: usize,
    ) -> Result<(), TrainingError> {
        metadata.insert(CHECKSUM.to_owned(), checksum(&state, &metadata));
        write_safetensors(&self.path(position.step), &state.into(), metadata, None)?;
        // A later one is damaged, or this training would have gone on from there.
        let (mut kept, later): (Vec<_>, Vec<_>) =
            (self.steps()?.into_iter()).partition(|step| *step <= position.step);
        kept.truncate(kept.len().saturating_sub(keep_last));
        for step in kept.into_iter().chain(later) {
            if position.best.is_none_or(|(best, _)| best != step) {
                let path = self.path(step);
                std::fs::remove_file(&path).map_err(|source| TrainingError::Io { path, source })?;
            }
        }
        Ok(())
    }

    /// Restores the last checkpoint, if there is one.
    pub(super) fn restore<B: TrainingBackend, M: AutodiffModule<B>>(
        &self,
        training: &Training,
        model: M,
        ema: &mut Ema<B::InnerBackend>,
        optimizer: &AdamW<B>,
    ) -> Result<(M, Option<Position>), TrainingError> {
        let mut steps = self.steps()?;
        let (path, state, position) = loop {
            let Some(step) = steps.pop() else {
                return Ok((model, None));
            };
            let path = self.path(step);
            match read(&path) {
                Ok((state, position)) => break (path, state, position),
                // The previous checkpoint leads to the same results; the steps in between are
                // computed again.
                Err(error) if !steps.is_empty() => {
                    crate::say!(
                        "note: {}; going on from the checkpoint before",
                        with_cause(&error)
                    );
                }
                Err(error) => return Err(error),
            }
        };
        let resume = |problem: String| TrainingError::Resume {
            path: path.clone(),
            problem,
        };
        if position.fingerprint != training.fingerprint {
            return Err(resume("belongs to a run with other settings; start a new run, or restore the recipe it was made with".into()));
        }
        let mut parts = BTreeMap::<String, StateDict>::new();
        for (name, array) in state {
            if let Some((part, name)) = name.split_once('.') {
                let part = parts.entry(part.to_owned()).or_default();
                part.insert(name.to_owned(), array);
            }
        }
        let mut part = |part: &str| parts.remove(part).unwrap_or_default();
        let (weights, averages, moments) = (part(MODEL), part(EMA), part(MOMENTS));
        for parameter in names::<B, M>(&model) {
            for part in [&weights, &averages] {
                if part
                    .get(&parameter.name)
                    .is_some_and(|array| array.shape != parameter.shape)
                {
                    return Err(resume(format!(
                        "`{}` does not have the shape {:?}",
                        parameter.name, parameter.shape
                    )));
                }
            }
        }
        let expected = learning_names::<B, M>(&model);
        if let Some(missing) = expected
            .iter()
            .find(|name| !weights.contains_key(*name) || !averages.contains_key(*name))
        {
            return Err(resume(format!("`{missing}` is missing")));
        }
        // Adam creates a parameter's moments at its first gradient, so all three exist or none.
        for parameter in names::<B, M>(&model) {
            let part = |which: &str| moments.get(&format!("{which}.{}", parameter.name));
            let whole = match (part("first"), part("second"), part("time")) {
                (Some(first), Some(second), Some(time)) => {
                    first.shape == parameter.shape
                        && second.shape == parameter.shape
                        && time.data.len() == 1
                }
                (None, None, None) => true,
                _ => false,
            };
            if !whole {
                return Err(resume(format!(
                    "the moments of `{}` are damaged",
                    parameter.name
                )));
            }
        }
        if position.moments != moments.len() {
            return Err(resume(format!(
                "it holds {} moments, expected {}",
                moments.len(),
                position.moments
            )));
        }
        let model = overlay::<B, M>(model, &weights)?;
        drop(weights);
        ema.restore(&overlay::<B::InnerBackend, M::InnerModule>(
            model.valid(),
            &averages,
        )?);
        restore_moments::<B, M>(&model, optimizer, &moments);
        Ok((model, Some(position)))
    }
}

/// All arrays of a checkpoint, and the position of the training.
fn read(path: &Path) -> Result<(StateDict, Position), TrainingError> {
    let resume = |problem: String| TrainingError::Resume {
        path: path.to_owned(),
        problem,
    };
    let (state, metadata) = read_safetensors(path)?;
    let position = metadata.get(TRAINING);
    let position = position.ok_or_else(|| resume("is no training checkpoint".into()))?;
    let position: Position = serde_json::from_str(position)
        .map_err(|error| resume(format!("its position is not understood: {error}")))?;
    if let Some(stated) = metadata.get(CHECKSUM) {
        let found = checksum(&state, &metadata);
        if *stated != found {
            let problem = format!("is damaged: its checksum is {found}, and it states {stated}");
            return Err(resume(problem));
        }
    }
    Ok((state, position))
}

/// The description for a checkpoint within a training, with the steps done so far.
fn at_step(description: &Description, training: &Training, step: usize) -> Description {
    let mut description = description.clone();
    let provenance = &mut description.provenance;
    provenance.steps = step;
    provenance.images = step * training.optimisation.batch;
    let middle = format!(
        "in training: after step {step} of {}",
        training.optimisation.steps
    );
    provenance.note = match provenance.note.as_str() {
        "" => middle,
        note => format!("{middle}; {note}"),
    };
    description
}

/// A visitor of the learning parameters, by name.
struct Learning<F> {
    walk: Walk,
    each: F,
}

/// An action on each learning parameter.
trait Each<B: TrainingBackend> {
    fn each<const D: usize>(&mut self, name: String, param: &Param<Tensor<B, D>>);
}

impl<B: TrainingBackend, F: Each<B>> ModuleVisitor<B> for Learning<F> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.walk.enter(name, container);
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.walk.leave();
    }
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if param.val().is_require_grad() {
            self.each.each(self.walk.name(), param);
        }
    }
}

fn visit<B: TrainingBackend, M: AutodiffModule<B>, F: Each<B>>(model: &M, each: F) -> F {
    let mut visitor = Learning {
        walk: Walk::default(),
        each,
    };
    model.visit(&mut visitor);
    visitor.each
}

fn array<B: burn::tensor::backend::Backend, const D: usize>(tensor: Tensor<B, D>) -> Array {
    Array {
        shape: tensor.dims().to_vec(),
        data: values(tensor),
    }
}

pub(super) fn learning<B: TrainingBackend, M: AutodiffModule<B>>(model: &M) -> StateDict {
    struct Collect(StateDict);
    impl<B: TrainingBackend> Each<B> for Collect {
        fn each<const D: usize>(&mut self, name: String, param: &Param<Tensor<B, D>>) {
            self.0.insert(name, array(param.val().inner()));
        }
    }
    visit(model, Collect(StateDict::new())).0
}

fn learning_names<B: TrainingBackend, M: AutodiffModule<B>>(model: &M) -> Vec<String> {
    struct Names(Vec<String>);
    impl<B: TrainingBackend> Each<B> for Names {
        fn each<const D: usize>(&mut self, name: String, _: &Param<Tensor<B, D>>) {
            self.0.push(name);
        }
    }
    visit(model, Names(Vec::new())).0
}

fn moments<B: TrainingBackend, M: AutodiffModule<B>>(
    model: &M,
    gathered: HashMap<ParamId, Vec<f32>>,
) -> StateDict {
    struct Collect(HashMap<ParamId, Vec<f32>>, StateDict);
    impl<B: TrainingBackend> Each<B> for Collect {
        fn each<const D: usize>(&mut self, name: String, param: &Param<Tensor<B, D>>) {
            let Some(mut first) = self.0.remove(&param.id) else {
                return;
            };
            let shape = param.val().dims();
            let second = first.split_off(1 + shape.iter().product::<usize>());
            let time = first.remove(0);
            first.shrink_to_fit();
            for (which, array) in [
                ("first", Array::new(shape, first)),
                ("second", Array::new(shape, second)),
                ("time", Array::new([1], vec![time])),
            ] {
                self.1.insert(format!("{which}.{name}"), array);
            }
        }
    }
    visit(model, Collect(gathered, StateDict::new())).1
}

fn restore_moments<B: TrainingBackend, M: AutodiffModule<B>>(
    model: &M,
    optimizer: &AdamW<B>,
    state: &StateDict,
) {
    struct Restore<'a, B: TrainingBackend>(&'a AdamW<B>, &'a StateDict);
    impl<B: TrainingBackend> Each<B> for Restore<'_, B> {
        fn each<const D: usize>(&mut self, name: String, param: &Param<Tensor<B, D>>) {
            let part = |which: &str| self.1.get(&format!("{which}.{name}"));
            let (Some(first), Some(second), Some(time)) =
                (part("first"), part("second"), part("time"))
            else {
                return;
            };
            if !self.0.owns(param.id) {
                return;
            }
            let device = param.val().device();
            let primitive = |array: &Array| {
                let data = TensorData::new(array.data.clone(), array.shape.clone());
                Tensor::<B::InnerBackend, D>::from_data(data, &device)
                    .into_primitive()
                    .tensor()
            };
            let moments = Moments {
                first: primitive(first),
                second: primitive(second),
                time: time.data.first().map_or(0, |time| *time as i32),
            };
            self.0.moments().insert(param.id, moments);
        }
    }
    visit(model, Restore(optimizer, state));
}
