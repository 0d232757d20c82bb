#!/usr/bin/env python3
"""Says where the time of a workload goes, by kind of work, from a profile (Linux, `perf`, `addr2line`).

    export CARGO_PROFILE_RELEASE_DEBUG=line-tables-only
    cargo build --release --target-dir target/profile
    python benches/where.py --workload finetune --model DiT-S/2 --batch 4

The core-time of the timed steps is sorted by the function that each sample's instruction was written in (inlined ones
included, which the line tables name). What is left of the cores' time is idle: waiting for the other core, or for a
part of the step that only one works on.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import tempfile

# Kinds of work, by the functions of `src/ops/cpu` that do it. An instruction is of the first kind that any function it
# is inlined into belongs to.
KINDS = [
    ("arithmetic: products", r"^tile(_of)?<|product::Block|linear::few"),
    ("arithmetic: activations, softmax", r"^(exp|sigmoid|gelu_\w+|silu\w*|softmax)$"),
    (
        "memory: copies for products",
        r"^(merged|copy|activate_row|add_rows|pack_\w+<|dot_all<)|panels::|linear::|product::Multiply",
    ),
    ("arithmetic: rest of attention", r"attention::"),
    ("memory: norms, residuals, gates", r"elementwise::(modulated|gated|blend|over_tokens|moments|by_row|activate)"),
    ("memory: optimizer, average, clip", r"cpu::optimizer::"),
    ("overhead: threads", r"rayon|crossbeam|ops::cpu::threads|sched_yield|__schedule|finish_task|do_syscall|spin_unlock"),
    ("overhead: graph, other operators", r"burn|ndarray|tinyfusion|alloc|^_?mi_|memmove|memset|hashbrown|core::"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("--binary", default=os.path.join(here, "../target/profile/release/tinyfusion"))
    parser.add_argument("--workload", default="finetune")
    parser.add_argument("--model", default="digits")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=6.0, help="about how long to profile")
    args = parser.parse_args()
    command = [args.binary, "bench", "--workload", args.workload, "--model", args.model, "--batch", str(args.batch)]

    def run(repeats, before=()):
        done = subprocess.run([*before, *command, "--repeats", str(repeats), "--json"], check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    step = run(3)["median_ms"]
    repeats = max(3, int(1000 * args.seconds / step))
    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, "perf.data")
        # With call graphs `perf script` prints places in the file; only the innermost is looked at.
        measured = run(repeats, ["perf", "record", "-q", "-g", "-e", "cpu-clock", "-F", "1999", "-o", data])
        script = ["perf", "script", "--no-inline", "-i", data, "-F", "time,ip,sym,dso"]
        lines = subprocess.run(script, check=True, capture_output=True, text=True).stdout.splitlines()
    samples, time = [], None
    for line in lines:
        if match := re.match(r"\s*([\d.]+):\s*$", line):
            time = float(match[1])
        elif time is not None and (match := re.match(r"\s*([0-9a-f]+)\s+(.*) \((.*)\)$", line)):
            samples.append((time, match[1], match[2], match[3]))
            time = None
    # The timed steps are the last of the process.
    wall = measured["median_ms"] * repeats / 1000
    end = max(sample[0] for sample in samples)
    samples = [sample for sample in samples if sample[0] > end - wall]

    own = os.path.realpath(args.binary)
    addresses = sorted({ip for _, ip, _, dso in samples if os.path.realpath(dso) == own})
    chains = functions(own, addresses)
    counts = collections.Counter()
    for _, ip, symbol, dso in samples:
        chain = chains.get(ip, [symbol]) if os.path.realpath(dso) == own else [f"kernel {symbol}" if "kernel" in dso else symbol]
        counts[kind(chain)] += 1
    cores = wall * 1999 * measured["threads"]
    print(f"{args.workload} of {args.model}, batch {args.batch}: {measured['median_ms']:.1f} ms a step, {measured['threads']} threads")
    print("\n| work | share of the cores' time | ms a step and core |\n|---|---:|---:|")
    names = [name for name, _ in KINDS] + ["overhead: system"]
    shares = [(name, counts[name] / cores) for name in names]
    shares.append(("idle", max(0.0, 1 - sum(share for _, share in shares))))
    for name, share in shares:
        print(f"| {name} | {100 * share:.1f}% | {share * measured['median_ms']:.2f} |")


def kind(chain):
    """The kind of work of an instruction; the functions it is inlined into come after its own."""
    for name, pattern in KINDS:
        if any(re.search(pattern, function) for function in chain):
            return name
    return "overhead: system"


def functions(binary, addresses):
    """Place in the file: the functions an instruction was written in, from within."""
    # A linker may load code elsewhere than where the file has it.
    segments = subprocess.run(["readelf", "-lW", binary], check=True, capture_output=True, text=True).stdout
    offset, address = re.search(r"LOAD\s+(0x\w+)\s+(0x\w+).* R E ", segments).groups()
    shift = int(address, 16) - int(offset, 16)
    listing = subprocess.run(
        ["addr2line", "-e", binary, "-a", "-f", "-i", "-C"],
        input="\n".join(f"{int(place, 16) + shift:#x}" for place in addresses), check=True, capture_output=True, text=True,
    ).stdout.splitlines()
    chains, current = {}, None
    for line in listing:
        if re.fullmatch(r"0x[0-9a-f]+", line):
            current = chains.setdefault(f"{int(line, 16) - shift:x}", [])
        elif current is not None and not re.search(r":(\d+|\?)( \(.*\))?$", line):
            current.append(line)
    return chains


if __name__ == "__main__":
    main()
