#!/usr/bin/env python3
"""Times `tinyfusion bench` and the same work in eager PyTorch, in turn, on one machine.

    pip install torch==2.9.1
    cargo build --release
    python benches/against_pytorch.py                                # every workload at every size
    python benches/against_pytorch.py --size digits --workload infer # one of them
    python benches/against_pytorch.py --threads 1                    # both on one core
    python benches/against_pytorch.py --backend torch                # this program on PyTorch's own kernels
    python benches/against_pytorch.py --bf16 --compile               # products of bf16, PyTorch's code compiled
    python benches/against_pytorch.py --device cuda --backend cuda   # on a GPU

Each round starts each program once, one after the other, in alternating order; what is printed is the median of the
rounds' medians, and the ratio of the two (above 1: TinyFusion is faster). PyTorch gets what a careful user gives it:
`scaled_dot_product_attention`, inference mode, the fused AdamW and foreach EMA and clipping. The UNet is diffusers' own
(`pip install diffusers`), with the two workloads that it has in common; of MAR a drawing is timed alone
(`--size mar --rounds 3 --warmup 1 --repeats 3`).
"""

import argparse
import copy
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time

# name: (model, batch, image side, channels, patch, width, depth, heads, classes)
SIZES = {
    "digits": ("digits", 128, 8, 1, 2, 64, 12, 4, 10),
    "small": ("DiT-S/2", 4, 32, 4, 2, 384, 12, 6, 1000),
    "base": ("DiT-B/2", 1, 32, 4, 2, 768, 12, 12, 1000),
    "unet": ("UNet-CIFAR10", 8, 32, 3, 1, 128, 4, 1, 1),
    "mar": ("MAR-L", 1, 16, 16, 1, 1024, 32, 16, 1000),
}
WORKLOADS = ["infer", "finetune", "prune", "masked-kd", "sample", "importance"]


def workloads(size):
    return {"unet": ["infer", "finetune"], "mar": ["sample"]}.get(size, WORKLOADS)


def unet(torch):
    """google/ddpm-cifar10-32, called as the transformers below."""
    import diffusers

    class Unet(torch.nn.Module):
        def __init__(self, _):
            super().__init__()
            self.network = diffusers.UNet2DModel(
                sample_size=32,
                block_out_channels=(128, 256, 256, 256),
                down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=None,
                downsample_padding=0,
                flip_sin_to_cos=False,
                freq_shift=1,
                norm_eps=1e-6,
            )

        def forward(self, x, t, _):
            return self.network(x, t).sample, []

    return Unet


def mar_drawing(torch):
    """A guided drawing of MAR-L in 4 rounds, of 25 steps of each token, as its published code goes about it."""
    nn, F = torch.nn, torch.nn.functional
    _, batch, side, channels, _, width, depth, heads, classes = SIZES["mar"]
    tokens, buffer, rounds, steps, scale = side * side, 64, 4, 25, 1.5
    head_width, head_depth = 1280, 8

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x):
            b, n, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
            x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))
            return x + self.mlp(self.norm2(x))

    class HeadBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(head_width, eps=1e-6)
            self.mlp = nn.Sequential(nn.Linear(head_width, head_width), nn.SiLU(), nn.Linear(head_width, head_width))
            self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(head_width, 3 * head_width))

        def forward(self, x, c):
            shift, factor, gate = self.modulation(c).chunk(3, 1)
            return x + gate * self.mlp(self.norm(x) * (1 + factor) + shift)

    class Mar(nn.Module):
        def __init__(self):
            super().__init__()
            self.classes, self.null = nn.Embedding(classes, width), nn.Parameter(torch.zeros(1, width))
            self.mask = nn.Parameter(torch.zeros(1, 1, width))
            self.z_proj, self.z_norm = nn.Linear(channels, width), nn.LayerNorm(width, eps=1e-6)
            table = lambda places: nn.Parameter(0.02 * torch.randn(1, places, width))
            self.seen_at, self.said_at, self.drawn_at = table(buffer + tokens), table(buffer + tokens), table(tokens)
            self.encoder = nn.ModuleList(Block() for _ in range(depth // 2))
            self.decoder = nn.ModuleList(Block() for _ in range(depth // 2))
            self.encoder_norm, self.decoder_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            self.embed = nn.Linear(width, width)
            self.time = nn.Sequential(nn.Linear(256, head_width), nn.SiLU(), nn.Linear(head_width, head_width))
            self.condition, self.token = nn.Linear(width, head_width), nn.Linear(channels, head_width)
            self.head = nn.ModuleList(HeadBlock() for _ in range(head_depth))
            self.last_modulation = nn.Sequential(nn.SiLU(), nn.Linear(head_width, 2 * head_width))
            self.last = nn.Linear(head_width, 2 * channels)

        def trunks(self, x, known, y):
            b = x.shape[0]
            x = torch.cat([torch.zeros(b, buffer, width), self.z_proj(x)], 1)
            x[:, :buffer] = y.unsqueeze(1)
            x = self.z_norm(x + self.seen_at)
            everywhere = torch.cat([torch.ones(b, buffer, dtype=torch.bool), known], 1)
            x = x[everywhere].view(b, -1, width)
            for block in self.encoder:
                x = block(x)
            x = self.embed(self.encoder_norm(x))
            all = self.mask.repeat(b, buffer + tokens, 1)
            all[everywhere] = x.reshape(-1, width)
            x = all + self.said_at
            for block in self.decoder:
                x = block(x)
            return self.decoder_norm(x)[:, buffer:] + self.drawn_at

        def noise(self, x, t, z):
            frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
            angles = t[:, None].float() * frequencies
            c = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.condition(z)
            x = self.token(x)
            for block in self.head:
                x = block(x, c)
            shift, factor = self.last_modulation(c).chunk(2, 1)
            return self.last(F.layer_norm(x, (head_width,), eps=1e-6) * (1 + factor) + shift)

    torch.manual_seed(0)
    model = Mar().eval()
    share = torch.cos(torch.linspace(0, 1, 1001, dtype=torch.float64) * math.pi / 2 * 0.992 + 0.0125) ** 2
    kept = share[1 + torch.linspace(0, 999, steps).round().long()] / share[0]
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    betas = (1 - kept / before).clamp(max=0.999)
    low = (betas * (1 - before) / (1 - kept)).clamp(min=1e-20).log()

    @torch.inference_mode()
    def run():
        x = torch.zeros(batch, tokens, channels)
        order = torch.stack([torch.randperm(tokens) for _ in range(batch)])
        unknown = tokens
        y = torch.cat([model.classes(torch.zeros(batch, dtype=torch.long)), model.null.repeat(batch, 1)])
        for round in range(rounds):
            left = max(1, min(unknown - 1, math.floor(tokens * math.cos(math.pi / 2 * (round + 1) / rounds))))
            chosen = order[:, (0 if round + 1 == rounds else left):unknown]
            known = torch.ones(batch, tokens, dtype=torch.bool).scatter(1, order[:, :unknown], False)
            z = model.trunks(torch.cat([x, x]), torch.cat([known, known]), y)
            z = torch.cat([half.gather(1, chosen[..., None].expand(-1, -1, width)) for half in z.chunk(2)])
            z = z.reshape(-1, width)
            guidance = 1 + (scale - 1) * (tokens - left) / tokens
            drawn = torch.randn(z.shape[0] // 2, channels)
            for step in reversed(range(steps)):
                t = torch.full((z.shape[0],), step * 999 // (steps - 1))
                out = model.noise(torch.cat([drawn, drawn]), t, z)
                with_class, without = out[:, :channels].chunk(2)
                noise = without + guidance * (with_class - without)
                share = (out[: len(drawn), channels:] + 1) / 2
                log = share * betas[step].log() + (1 - share) * low[step]
                clean = drawn * kept[step].rsqrt() - noise * (1 / kept[step] - 1).sqrt()
                mean = clean * betas[step] * before[step].sqrt() / (1 - kept[step])
                mean = mean + drawn * (1 - before[step]) * (1 - betas[step]).sqrt() / (1 - kept[step])
                drawn = (mean + (step > 0) * (log / 2).exp() * torch.randn_like(drawn)).float()
            x = x.scatter(1, chosen[..., None].expand(-1, -1, channels), drawn.view(batch, -1, channels))
            unknown = left

    return run


def build(torch, size, lora):
    if size == "unet":
        return unet(torch)
    nn, F = torch.nn, torch.nn.functional
    _, batch, side, channels, patch, width, depth, heads, classes = SIZES[size]
    tokens = (side // patch) ** 2

    class Linear(nn.Linear):
        """Carries a low-rank update, its own weight frozen, where the workload has one."""

        def __init__(self, inputs, outputs, adapt=False):
            super().__init__(inputs, outputs)
            self.adapt = adapt and lora
            if self.adapt:
                self.weight.requires_grad_(False)
                self.bias.requires_grad_(False)
                self.a = nn.Parameter(0.02 * torch.randn(8, inputs))
                self.b = nn.Parameter(0.02 * torch.randn(outputs, 8))

        def forward(self, x):
            y = F.linear(x, self.weight, self.bias)
            return y + F.linear(F.linear(x, self.a), self.b) * 2.0 if self.adapt else y

    def modulated(x, shift, scale):
        return F.layer_norm(x, (width,), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = Linear(width, 3 * width, True)
            self.proj = Linear(width, width, True)
            self.fc1 = Linear(width, 4 * width, True)
            self.fc2 = Linear(4 * width, width, True)
            self.modulation = Linear(width, 6 * width, True)

        def forward(self, x, c):
            s1, g1, a1, s2, g2, a2 = self.modulation(c).chunk(6, 1)
            b, n, _ = x.shape
            q, k, v = self.qkv(modulated(x, s1, g1)).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width)
            x = x + a1.unsqueeze(1) * self.proj(y)
            return x + a2.unsqueeze(1) * self.fc2(F.gelu(self.fc1(modulated(x, s2, g2)), approximate="tanh"))

    class Dit(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.patches = nn.Conv2d(channels, width, patch, patch)
            self.position = nn.Parameter(torch.randn(1, tokens, width), requires_grad=False)
            self.t1, self.t2 = Linear(256, width, True), Linear(width, width, True)
            self.classes = nn.Embedding(classes + 1, width)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.final_modulation = Linear(width, 2 * width, True)
            self.final = Linear(width, patch * patch * 2 * channels, True)
            if lora:  # learned pruning trains gates and low-rank updates alone
                self.patches.requires_grad_(False)
                self.classes.requires_grad_(False)

        def forward(self, x, t, y, mask=None, taps=()):
            x = self.patches(x).flatten(2).transpose(1, 2) + self.position
            frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
            angles = t[:, None].float() * frequencies
            features = torch.cat([angles.cos(), angles.sin()], 1)
            c = F.silu(self.t2(F.silu(self.t1(features))) + self.classes(y))
            tapped = []
            for layer, block in enumerate(self.blocks):
                out = block(x, c)
                if mask is not None:
                    gate = mask[:, layer, None, None]
                    out = out * gate + x * (1 - gate)
                x = out
                if layer in taps:
                    tapped.append(x)
            shift, scale = self.final_modulation(c).chunk(2, 1)
            x = self.final(modulated(x, shift, scale))
            grid = side // patch
            x = x.view(-1, grid, grid, patch, patch, 2 * channels).permute(0, 5, 1, 3, 2, 4)
            return x.reshape(-1, 2 * channels, side, side), tapped

    return Dit


def workload(torch, name, size, compiled):
    """A function that does the work once."""
    if size == "mar":
        return mar_drawing(torch)
    F = torch.nn.functional
    _, batch, side, channels, _, _, depth, _, classes = SIZES[size]
    torch.manual_seed(0)
    Dit = build(torch, size, lora=name == "prune")
    x0, noise = torch.randn(2, batch, channels, side, side)
    t = torch.randint(1, 1000, (batch,))
    y = torch.randint(0, classes, (batch,))

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    variance = betas * (1 - before) / (1 - kept)
    log_variance = torch.log(torch.cat([variance[1:2], variance[1:]]))

    def at(table, t):
        return table[t].float()[:, None, None, None]

    def step_of(out, x, t):
        """Mean and log variance of the denoising step that a network's output says."""
        epsilon, v = out.chunk(2, 1)
        lower, upper = at(log_variance, t), at(torch.log(betas), t)
        log = (v + 1) / 2 * upper + (1 - (v + 1) / 2) * lower
        clean = at((1 / kept).sqrt(), t) * x - at((1 / kept - 1).sqrt(), t) * epsilon
        return posterior(clean, x, t), log, clean

    def posterior(clean, x, t):
        return at(betas * before.sqrt() / (1 - kept), t) * clean + at(
            (1 - before) * (1 - betas).sqrt() / (1 - kept), t
        ) * x

    def kl(mean1, log1, mean2, log2):
        return 0.5 * (log2 - log1 - 1 + torch.exp(log1 - log2) + (mean1 - mean2) ** 2 * torch.exp(-log2))

    def bound(mean, log, out, x):
        frozen = torch.cat([out[:, :channels].detach(), out[:, channels:]], 1)
        mean2, log2, _ = step_of(frozen, x, t)
        return kl(mean, log, mean2, log2).flatten(1).mean(1) / math.log(2)

    def noised():
        return at(kept.sqrt(), t) * x0 + at((1 - kept).sqrt(), t) * noise

    def plain_loss(out, x):
        mse = ((out[:, :channels] - noise) ** 2).flatten(1).mean(1)
        if out.shape[1] == channels:
            return mse
        return mse + bound(posterior(x0, x, t), at(log_variance, t), out, x)

    if name == "infer":
        model = compiled(Dit(depth))

        def run():
            with torch.inference_mode():
                model(x0, t, y)

        return run

    if name == "sample":
        model = compiled(Dit(depth))

        def run():
            with torch.inference_mode():
                both, labels = torch.cat([x0, x0]), torch.cat([y, torch.full_like(y, classes)])
                out, _ = model(both, torch.cat([t, t]), labels)
                conditional, unconditional = out.chunk(2)
                guided = unconditional + 1.5 * (conditional - unconditional)
                out = torch.cat([guided[:, :channels], conditional[:, channels:]], 1)
                mean, log, _ = step_of(out, x0, t)
                mean + torch.exp(0.5 * log) * noise

        return run

    gates, teacher = None, None
    if name == "masked-kd":
        teacher = Dit(depth).requires_grad_(False)
        model = Dit(depth // 2)
    else:
        model = Dit(depth)
    if name == "importance":

        def loss():
            x = noised()
            return plain_loss(model(x, t, y)[0], x).mean()

        return importance(torch, model, loss, (x0, t, y))
    learned = [p for p in model.parameters() if p.requires_grad]
    if name == "prune":
        gates = torch.nn.Parameter(0.01 * torch.randn(depth // 2, 2))
        gumbel = -torch.log(-torch.log(torch.rand(batch, depth // 2, 2)))
        learned = learned + [gates]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, weight_decay=0.0, fused=True)
    averages = [copy.deepcopy(p.data) for p in learned]
    model, teacher = compiled(model), teacher and compiled(teacher)

    def typical(x):
        flat = x.detach().flatten(1)
        deviation = (flat - flat.mean(1, keepdim=True)).abs()
        return (deviation < 2 * flat.std(1, keepdim=True)).view_as(x)

    def run():
        x = noised()
        if name == "prune":
            soft = F.softmax((100 * gates + gumbel) / 0.1, -1)
            hard = F.one_hot(soft.argmax(-1), 2).float()
            mask = (hard + soft - soft.detach()).flatten(1)
            loss = plain_loss(model(x, t, y, mask=mask)[0], x)
        elif name == "masked-kd":
            odd = tuple(range(1, depth, 2))
            with torch.no_grad():
                taught, teacher_features = teacher(x, t, y, taps=odd)
            out, features = model(x, t, y, taps=tuple(range(depth // 2)))
            mean, log, _ = step_of(taught, x, t)
            kd = ((out[:, :channels] - taught[:, :channels]) ** 2).flatten(1).mean(1) + bound(mean, log, out, x)
            masked = [
                ((s * typical(s) - u * typical(u)) ** 2).flatten(1).mean(1)
                for s, u in zip(features, teacher_features)
            ]
            loss = 0.9 * kd + 0.1 * plain_loss(out, x) + 0.01 * sum(masked) / len(masked)
        else:
            loss = plain_loss(model(x, t, y)[0], x)
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(averages, [p.data for p in learned], 0.001)

    return run


def importance(torch, model, loss, inputs):
    """Gradients of a batch, and Torch-Pruning's Taylor importance of every group by them. Its groups are found before."""
    import torch_pruning

    graph = torch_pruning.DependencyGraph()
    graph.build_dependency(model, tuple(values[:1] for values in inputs))
    taylor = torch_pruning.importance.TaylorImportance(multivariable=False)
    groups = list(graph.get_all_groups(ignored_layers=[model.final], root_module_types=[torch.nn.Linear]))

    def run():
        model.zero_grad(set_to_none=True)
        loss().backward()
        for group in groups:
            taylor(group)

    return run


def pytorch(args):
    import torch

    torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    work = workload(torch, args.workload, args.size, torch.compile if args.compile else lambda model: model)

    def run():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            work()
        if args.device == "cuda":
            torch.cuda.synchronize()

    for _ in range(args.warmup):
        run()
    times = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"median_ms": statistics.median(times), "peak_memory_mib": peak}))


def tinyfusion(args, size, workload):
    model, batch = SIZES[size][:2]
    command = [args.binary, "bench", "--json", "--workload", workload, "--model", model, "--batch", str(batch)]
    command += ["--warmup", str(args.warmup), "--repeats", str(args.repeats), "--threads", str(args.threads)]
    command += ["--backend", args.backend, "--compute", "bf16" if args.bf16 else "f32"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(args, size, workload):
    command = [sys.executable, __file__, "--pytorch", "--size", size, "--workload", workload]
    command += ["--warmup", str(args.warmup), "--repeats", str(args.repeats), "--threads", str(args.threads)]
    command += ["--device", args.device] + ["--bf16"] * args.bf16 + ["--compile"] * args.compile
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(args):
    print("| size | workload | PyTorch, ms | TinyFusion, ms | times as fast | peak memory, MiB |")
    print("|---|---|---|---|---|---|")
    for size in [args.size] if args.size else SIZES:
        for name in [name for name in workloads(size) if args.workload in (None, name)]:
            theirs, ours = [], []
            for round in range(args.rounds):
                for ours_now in [round % 2 == 0, round % 2 == 1]:
                    (ours if ours_now else theirs).append((tinyfusion if ours_now else child)(args, size, name))
            a, b = (statistics.median(run["median_ms"] for run in runs) for runs in (theirs, ours))
            memory = [max(run["peak_memory_mib"] for run in runs) for runs in (theirs, ours)]
            print(f"| {size} | {name} | {a:.1f} | {b:.1f} | {a / b:.2f} | {memory[0]:.0f} / {memory[1]:.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--workload", choices=WORKLOADS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--binary", default=os.path.join(os.path.dirname(__file__), "../target/release/tinyfusion"))
    parser.add_argument("--backend", default="ndarray", help="TinyFusion's")
    parser.add_argument("--device", default="cpu", help="PyTorch's")
    parser.add_argument("--bf16", action="store_true", help="products of bf16; of PyTorch by autocast")
    parser.add_argument("--compile", action="store_true", help="PyTorch's networks through torch.compile")
    parser.add_argument("--pytorch", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    pytorch(args) if args.pytorch else compare(args)


if __name__ == "__main__":
    main()
