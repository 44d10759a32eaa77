"""How fast is each part, on this machine, in one run.

    python benchmarks/foundation.py [--quick] [--run FOLDER] [--threads N]

Prints one aligned table:

- generator: images/s of every LabWorld family (task and pretrain style) and of scenes, on one
  thread, fonts and tiles drawn beforehand;
- peak: the fastest square bfloat16 and float32 matrix product found on this machine with these
  threads;
- fine-tuning: images/s of `tune.fit`'s step (clean loss, backward, gradient norm, AdamW; in
  `core.precision`), and its share of that precision's peak. The step's FLOPs are counted by
  torch's FlopCounterMode, with attention as plain matrix products so that none is missed;
  element-wise work counts nothing;
- evaluation: images/s of `clip.features` (in `core.precision`, no gradients);
- stages: seconds of each stage of a main run, from the newest finished one under $LFPM_RUNS or
  `--run`; stages that ran several times are added up. Without any run, the tiny preset is run in
  a throw-away folder;
- Stage II against SAM: one LFPM step (`antibackdoor.step_loss`, backward, accumulation, update)
  and one SAM step (Foret et al. 2021: ascent pass, descent pass) on theta_anti alone, with the
  same batches and the same clean and prompted terms. The time ratio is the median over pairs that
  alternate in order. The peak-memory ratio compares tensor memory: on CUDA
  `torch.cuda.max_memory_allocated`; on the CPU the highest sum of allocations minus releases that
  torch's profiler sees during a step, plus what the weights, gradients and optimiser held before
  it (the memory of a process would mostly show its libraries).

`--quick` repeats less and draws fewer images: about a minute instead of a few, with more noise.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # or the profiler chats; read when torch is imported
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lfpm_nb.antibackdoor import accumulate, step_loss
from lfpm_nb.clip import encode, features, load_clip, logits, zero_shot_head
from lfpm_nb.core import amp, device, generator, precision, runs_dir, versions
from lfpm_nb.settings import MainParams
from lfpm_nb.runs import run_notebook, status
from lfpm_nb.labworld import FAMILIES, draw, scenes
from lfpm_nb.subspace import Shadow
from lfpm_nb.tasks import load_task
from lfpm_nb.tune import clean_loss, optimiser


def say(what: str):
    print(f"{what} ...", file=sys.stderr, flush=True)


def sync():
    if device().type == "cuda":
        torch.cuda.synchronize()


def seconds(f, repeat: int) -> float:
    "Median seconds of f() over `repeat` calls, after one call to warm up."
    f()
    took = []
    for _ in range(repeat):
        sync()
        t0 = time.perf_counter()
        f()
        sync()
        took.append(time.perf_counter() - t0)
    return statistics.median(took)


# --- generator, peak, fine-tuning, evaluation -----------------------------------------------------


def generator_rows(n: int, repeat: int):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, family in FAMILIES.items():
        y = torch.arange(n) % len(family.classes)
        for style in ("task", "pretrain"):
            yield (
                f"generator: {name}, {style} style",
                n / seconds(lambda: draw(name, y, style, 0, "benchmark"), repeat),
                "images/s",
                "1 thread",
            )
    yield (
        "generator: scenes",
        n / seconds(lambda: scenes(n, 0, "benchmark"), repeat),
        "images/s",
        "1 thread",
    )
    torch.set_num_threads(threads)


def matmul_peak(kind: torch.dtype, repeat: int) -> tuple[float, int]:
    "(FLOP/s, size) of the fastest square product of this kind."
    found = []
    for n in (512, 1024, 2048) if device().type == "cpu" else (2048, 4096, 8192):
        a, b = (torch.randn(n, n, device=device()).to(kind) for _ in range(2))
        found.append((2 * n**3 / seconds(lambda: a @ b, repeat), n))
    return max(found)


def train_and_eval_rows(clip, P: MainParams, n: int, repeat: int):
    peaks = {kind: matmul_peak(kind, repeat) for kind in (torch.bfloat16, torch.float32)}
    for kind, (peak, size) in peaks.items():
        yield f"peak: {kind} matrix product", peak / 1e9, "GFLOP/s", f"{size} x {size}"
    task = load_task("textures", n_train=P.batch, n_test=n)
    visual = clip.with_state(clip.state()).train().requires_grad_(True)
    loss, opt = (
        clean_loss(
            clip, task.train_x, task.train_y, zero_shot_head(clip, task.classes, task.templates)
        ),
        optimiser(visual.parameters(), 1e-5, 0.001),
    )
    i = torch.arange(len(task.train_y))

    def step():
        opt.zero_grad()
        loss(visual, i).backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        opt.step()

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
        step()
    flops, took = count.get_total_flops(), seconds(step, 5 * repeat)
    yield "fine-tuning", len(i) / took, "images/s", f"batch {len(i)}"
    yield (
        f"fine-tuning: share of the {precision()} peak",
        100 * flops / took / peaks[precision()][0],
        "%",
        f"{flops / len(i) / 1e6:.0f} MFLOP an image and step",
    )
    took = seconds(lambda: features(clip, clip.visual, task.test_x), repeat)
    yield "evaluation", len(task.test_x) / took, "images/s", "batch 512, no gradients"


# --- stages of a main run -------------------------------------------------------------------------


def newest_run() -> Path | None:
    "The finished main run that ended last."
    done = [
        f.parent for f in (runs_dir() / "main").glob("*/status.json") if status(f.parent) == "done"
    ]
    return max(done, key=lambda d: (d / "status.json").stat().st_mtime, default=None)


def tiny_run() -> Path:
    "A fresh tiny run; its folder lasts as long as this process."
    root = tempfile.TemporaryDirectory(prefix="lfpm-benchmark-")
    tiny_run.keep = root
    os.environ |= dict(LFPM_RUNS=f"{root.name}/runs", LFPM_CACHE=f"{root.name}/cache")
    return run_notebook("main", "tiny")


def stage_rows(folder: Path):
    stages = {}
    for s in json.loads((folder / "params.json").read_text(encoding="utf-8"))["stages"]:
        if not s["reused"]:
            stages.setdefault(s["name"], []).append(s["seconds"])
    for name, took in stages.items():
        yield f"stage: {name}", sum(took), "s", f"{len(took)} times" * (len(took) > 1)
    run = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    yield (
        "stages together",
        sum(map(sum, stages.values())),
        "s",
        "what this run computed itself" if stages else "this run reused every stage",
    )
    yield (
        "main run, kernel start included",
        run["seconds"],
        "s",
        f"{run['preset']} preset, seed {run['seed']}, {folder.name}",
    )


# --- Stage II against SAM -------------------------------------------------------------------------


class Stage2:
    "One step of either kind on the same batch; weights move, shapes and work stay."

    def __init__(self, clip, P: MainParams):
        s, dev = replace(P.strengths, rho=0.1), device()  # its size does not change the work
        shadow = Shadow.of(clip, s.batch, 1, seed=0)
        self.clip, self.s, self.W, self.y = clip, s, shadow.W, shadow.train[1].to(dev)
        self.x = clip.normalise(shadow.train[0].to(dev))
        self.mm, self.anti = (clip.with_state(clip.state()).requires_grad_(True) for _ in range(2))
        self.p = 0.5 * torch.randn(
            s.prompt_length, clip.visual.conv1.out_channels, generator=generator("benchmark")
        ).to(dev)
        self.opt = optimiser(self.anti.parameters(), 1e-6, s.weight_decay)

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.anti.parameters(), 1.0)
        self.opt.step()

    def lfpm(self):
        loss = step_loss(self.mm, self.anti, self.x, self.y, self.W, self.p, self.s)
        self.opt.zero_grad()
        loss.backward()
        accumulate(self.anti, self.mm, self.s.gamma)
        self.update()

    def loss(self) -> torch.Tensor:
        "Clean and prompted cross-entropy of theta_anti alone."
        with amp():
            hs = [encode(self.anti, self.x, q) for q in (None, self.p)]
        return sum(F.cross_entropy(logits(h, self.W), self.y) for h in hs)

    def sam(self, rho: float = 0.05):
        "theta + rho g/||g||, gradient there, step from theta."
        params = list(self.anti.parameters())
        self.opt.zero_grad()
        self.loss().backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in params]).norm() + 1e-12
            up = [rho * p.grad / norm for p in params]
            for p, e in zip(params, up):
                p.add_(e)
        self.opt.zero_grad()
        self.loss().backward()
        with torch.no_grad():
            for p, e in zip(params, up):
                p.sub_(e)
        self.update()


def held_bytes(two: Stage2, models) -> int:
    "Weights, gradients and optimiser state of the models that a step needs."
    tensors = [t for m in models for p in m.parameters() for t in (p, p.grad) if t is not None]
    tensors += [t for state in two.opt.state.values() for t in state.values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors)


def peak_bytes(step, held: int) -> int:
    "Highest tensor memory during step(), `held` bytes being there before it."
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        sync()
        return torch.cuda.max_memory_allocated() - before + held
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        step()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = top = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        top = max(top, now)
    return top + held


def stage2_rows(clip, P: MainParams, pairs: int):
    two, took = Stage2(clip, P), {"lfpm": [], "sam": []}
    kinds = {"lfpm": (two.lfpm, (two.mm, two.anti)), "sam": (two.sam, (two.anti,))}
    for step, _ in kinds.values():
        step()
        step()
    for k in range(pairs):
        for name in ("lfpm", "sam")[:: 1 if k % 2 else -1]:
            sync()
            t0 = time.perf_counter()
            kinds[name][0]()
            sync()
            took[name].append(time.perf_counter() - t0)
    for name in took:
        yield (
            f"Stage II: one {name.upper()} step",
            1e3 * statistics.median(took[name]),
            "ms",
            f"batch {P.anti_batch}, {pairs} pairs",
        )
    yield (
        "Stage II: time, LFPM / SAM",
        statistics.median(a / b for a, b in zip(*took.values())),
        "x",
        "median of pairs",
    )
    peak = {}
    for name, (step, models) in kinds.items():
        two.mm.zero_grad()
        two.anti.zero_grad()
        peak[name] = peak_bytes(step, held_bytes(two, models))
        yield (
            f"Stage II: peak tensor memory, {name.upper()}",
            peak[name] / 2**20,
            "MiB",
            "CUDA allocator" if device().type == "cuda" else "torch profiler",
        )
    yield "Stage II: peak memory, LFPM / SAM", peak["lfpm"] / peak["sam"], "x", ""


# --- all of it ------------------------------------------------------------------------------------


def rows(args):
    P, clip = MainParams(), load_clip()
    n, repeat, pairs = (256, 2, 4) if args.quick else (1024, 5, 15)
    say("generator")
    yield from generator_rows(n, repeat)
    say("fine-tuning and evaluation")
    yield from train_and_eval_rows(clip, P, n, repeat)
    say("Stage II against SAM")
    yield from stage2_rows(clip, P, pairs)
    folder = args.run or newest_run()
    if folder is None:
        say("no finished main run: the tiny one, a minute")
    say("stages")
    yield from stage_rows(folder or tiny_run())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and repetitions")
    parser.add_argument(
        "--run", type=Path, help="results folder of a main run (default: the newest finished one)"
    )
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    args = parser.parse_args()
    if args.run and status(args.run) != "done":
        parser.error(
            f"{args.run} holds no finished run; give a folder with a status.json that says done"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("LFPM_QUIET", "1")
    print(", ".join(f"{k} {v}" for k, v in versions().items()), flush=True)
    table = [
        (what, f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}", unit, note)
        for what, value, unit, note in rows(args)
    ]
    wide = [max(len(r[k]) for r in table) for k in range(4)]
    for what, value, unit, note in table:
        print(f"{what:{wide[0]}}  {value:>{wide[1]}} {unit:{wide[2]}}  {note}".rstrip())


if __name__ == "__main__":
    main()
