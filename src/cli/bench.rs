//! The command that times a workload.

use super::error::CliError;
use super::supports;
use crate::backend::{BackendKind, Compute};
use crate::bench::{self, BenchPlan, Workload};
use crate::models::Architecture;
use crate::pruning::Groups;
use crate::trunk::Granularity;

#[derive(Debug, clap::Args)]
pub(super) struct BenchArguments {
    /// What to time
    #[arg(long, default_value = "infer")]
    workload: Workload,
    /// `digits`, or a published model such as DiT-S/2
    #[arg(long, default_value = "digits")]
    model: String,
    /// Layers, instead of the model's
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    depth: Option<u32>,
    /// Width, instead of the model's
    #[arg(long, value_parser = clap::value_parser!(u32).range(4..=65_536))]
    width: Option<u32>,
    /// Attention heads, instead of the model's
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    heads: Option<u32>,
    /// Tokens, a square number, instead of the model's
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    tokens: Option<u32>,
    /// Samples of a batch
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: u32,
    /// Where to compute
    #[arg(long, default_value = "ndarray")]
    backend: BackendKind,
    /// Type of matrix products
    #[arg(long, default_value = "f32")]
    compute: Compute,
    /// Compute the branches of blocks again in backward passes, to keep less for them
    #[arg(long)]
    recompute: bool,
    /// Runs before timing
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Timed runs
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    repeats: u32,
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

/// Times a workload and prints the measurement.
pub(super) fn benchmark(arguments: &BenchArguments) -> Result<(), CliError> {
    let usage = |problem: String| CliError::Usage(problem);
    if let Some(problem) = arguments.backend.missing() {
        return Err(usage(problem));
    }
    let mut model = bench::model(&arguments.model).ok_or_else(|| {
        let names: Vec<&str> = Architecture::presets().collect();
        usage(format!(
            "no model is called `{}`; there are digits, {}",
            arguments.model,
            names.join(", ")
        ))
    })?;
    let size = |value: Option<u32>| value.map(|value| value as usize);
    let sizes = [
        arguments.depth,
        arguments.width,
        arguments.heads,
        arguments.tokens,
    ];
    if model.depth() == 0 && sizes.iter().any(Option::is_some) {
        return Err(usage(format!(
            "`{}` has no layers of one width: --depth, --width, --heads and --tokens are of transformers",
            arguments.model
        )));
    }
    if let Some(depth) = size(arguments.depth) {
        model = model.with_depth(depth);
    }
    model = model.with_width(size(arguments.width), size(arguments.heads));
    if let Some(tokens) = size(arguments.tokens) {
        model = (model.with_tokens(tokens))
            .ok_or_else(|| usage(format!("--tokens {tokens} is not a square number")))?;
    }
    if let Some(problem) = model.problem() {
        return Err(usage(problem));
    }
    if arguments.workload == Workload::Prune && (model.depth() == 0 || model.depth() % 2 == 1) {
        return Err(usage(format!(
            "the prune workload has groups 1:2, and {} layers are no pairs",
            model.depth()
        )));
    }
    if let (Workload::Prune, Some(trunk)) = (arguments.workload, model.trunk(Granularity::Block)) {
        Groups::parse_ratio("1:2", model.depth())
            .and_then(|groups| groups.fit(&trunk))
            .map_err(|error| usage(error.to_string()))?;
    }
    if arguments.workload == Workload::Importance && model.channel_groups().is_none() {
        return Err(usage(format!(
            "the importance workload weighs channels that can be taken out, and {model} has none"
        )));
    }
    if arguments.workload == Workload::MaskedKd && model.depth() < 2 {
        return Err(usage(
            "the masked-kd workload keeps every other layer of at least 2".into(),
        ));
    }
    if arguments.recompute && !model.recomputes() {
        return Err(usage(format!(
            "--recompute is of transformers whose blocks have branches; this is {model}"
        )));
    }
    if arguments.recompute && matches!(arguments.workload, Workload::Infer | Workload::Sample) {
        return Err(usage(
            "--recompute is of workloads with a backward pass, which infer and sample have not"
                .into(),
        ));
    }
    let plan = BenchPlan {
        workload: arguments.workload,
        model,
        batch: arguments.batch as usize,
        compute: arguments.compute,
        recompute: arguments.recompute,
        warmup: arguments.warmup,
        repeats: arguments.repeats as usize,
    };
    let measured = crate::with_backend!(arguments.backend, B, device => {
        supports::<B>(arguments.compute, device)?;
        Some(bench::bench::<B>(&plan, device))
    }, else None);
    let Some(measured) = measured else {
        return Ok(());
    };
    if arguments.json {
        crate::tell!(
            "{}",
            serde_json::to_string(&measured).map_err(|error| usage(error.to_string()))?
        );
        return Ok(());
    }
    let memory = measured
        .peak_memory_mib
        .map_or("unknown".into(), |mib| format!("{mib:.0} MiB"));
    crate::tell!(
        "{}: {}\nbatch {}, backend {}, {} threads",
        arguments.model,
        measured.model,
        measured.batch,
        measured.backend,
        measured.threads
    );
    // As its flag names it.
    let name = clap::ValueEnum::to_possible_value(&measured.workload);
    let name = name.as_ref().map_or("", |name| name.get_name());
    crate::tell!(
        "{}: median {:.2} ms (± {:.2}) of {}, {:.1} images/s, peak memory {memory}",
        name,
        measured.median_ms,
        measured.spread_ms,
        measured.runs_ms.len(),
        measured.images_per_second
    );
    Ok(())
}
