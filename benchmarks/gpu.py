"""What Stage II costs beside SAM and plain fine-tuning, and a path beside forward passes.

Ratios, on whatever device there is.

    python benchmarks/gpu.py [--model lfpm-lab] [--batch 64] [--rounds 9] [--threads N]
        [--parts stage2 path]

Weights, images and heads are random: time and memory do not depend on them. `--model` is a
shipped backbone or a name that open_clip knows (`ViT-B-32-quickgelu`, `ViT-L-14-quickgelu`). One
table: each goal beside what was measured, device, n (images), rounds; medians over rounds in
which all kinds of step take turns. The exit code is 1 when a goal is missed.

- LFPM / SAM: one Stage-II step (`antibackdoor.step_loss`, backward, accumulation, update) against
  one SAM step, same batch, same clean and prompted terms; and the same with `recompute` "towers"
  and "blocks" (`tune.Lean`). FLOPs: what the time ratio would be if only matrix products took
  time. Memory as in foundation.py: CUDA's allocator, or torch's profiler on a CPU, with weights,
  gradients and optimiser;
- share of matmul throughput: FLOPs a second of a Stage-II step over those of a fine-tuning step
  on the same images, each counted by FlopCounterMode; on a GPU also Stage II's share of the
  fastest bf16 product found;
- path: 21 models between two towers, each mixed (`path.Path`) and asked for the features and
  predictions of n images, over 21 times the features alone.
"""

import argparse
import os
import statistics
import sys
import time

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # or the profiler chats; read when torch is imported
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from foundation import Stage2, held_bytes, matmul_peak, peak_bytes, say, sync
from lfpm_nb.antibackdoor import Strengths
from lfpm_nb.clip import Clip, data_cards, features, load_clip, logits, untrained
from lfpm_nb.core import device, precision, versions
from lfpm_nb.path import Path, grid
from lfpm_nb.tune import Lean, Watch, clean_loss, gradients, optimiser

POINTS, CLASSES = 21, 100
GOALS = {
    "LFPM / SAM, time": ("<=", 1.4),
    "LFPM / SAM, memory": ("<=", 2.2),
    "towers: LFPM / SAM, time": ("<=", 2.2),
    "towers: LFPM / SAM, memory": ("<=", 1.3),
    "matmul throughput, Stage II / fine-tuning": (">=", 0.95),
    "Stage II, share of the bf16 peak": (">=", 0.3),
    "21-point path / pure forward": ("<=", 1.05),
}


def random_clip(name: str) -> Clip:
    "A shipped backbone, or open_clip's fresh model of that name."
    if name in data_cards():
        return load_clip(name)
    clip = untrained(name)
    clip.model.requires_grad_(False).to(device())
    return clip


class Steps(Stage2):
    "foundation.py's two steps on random images, and one of plain fine-tuning on the same."

    def __init__(self, clip: Clip, batch: int):
        torch.manual_seed(0)
        self.s, dev = Strengths(batch=batch, rho=0.1), device()
        pixels = torch.randint(256, (batch, 3, clip.size, clip.size), dtype=torch.uint8)
        self.x, self.y = clip.normalise(pixels.to(dev)), torch.randint(CLASSES, (batch,)).to(dev)
        self.W = 100 * torch.nn.functional.normalize(
            torch.randn(CLASSES, clip.visual.output_dim), dim=-1
        ).to(dev)
        self.mm, self.anti = (clip.with_state(clip.state()).requires_grad_(True) for _ in range(2))
        self.p = 0.5 * torch.randn(self.s.prompt_length, clip.visual.conv1.out_channels).to(dev)
        self.opt, self.index = (
            optimiser(self.anti.parameters(), 1e-6, self.s.weight_decay),
            torch.arange(batch),
        )
        self.clean = clean_loss(clip, pixels, self.y.cpu(), self.W)

    def lean(self, recompute: str):
        with Lean(self.mm, self.anti, recompute=recompute):
            self.lfpm()

    def tune(self):
        gradients(
            Watch(self.opt, self.anti, "benchmark"),
            list(self.anti.parameters()),
            self.clean(self.anti, self.index),
        )
        self.opt.step()


def in_turns(kinds: dict, rounds: int) -> dict:
    """{kind: [seconds]}; every round takes each kind once, forwards and backwards in turn.

    One round before them warms up."""
    took = {k: [] for k in kinds}
    for r in range(rounds + 1):
        for k in list(kinds)[:: 1 if r % 2 else -1]:
            sync()
            t0 = time.perf_counter()
            kinds[k]()
            sync()
            if r:
                took[k].append(time.perf_counter() - t0)
    return took


def ratio(took: dict, a: str, b: str) -> float:
    "Median over rounds of a's seconds over b's."
    return statistics.median(x / y for x, y in zip(took[a], took[b]))


def flops(step) -> int:
    "Of one call, attention as plain matrix products so that none is missed."
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
        step()
    return count.get_total_flops()


def stage2_rows(clip: Clip, batch: int, rounds: int):
    two = Steps(clip, batch)
    kinds = {
        "LFPM": two.lfpm,
        "SAM": two.sam,
        "towers: LFPM": lambda: two.lean("towers"),
        "blocks: LFPM": lambda: two.lean("blocks"),
        "fine-tuning": two.tune,
    }
    took, peak = in_turns(kinds, rounds), {}
    for k in list(kinds)[:4]:
        two.mm.zero_grad()
        two.anti.zero_grad()
        peak[k] = peak_bytes(
            kinds[k], held_bytes(two, (two.anti,) if k == "SAM" else (two.mm, two.anti))
        )
    for k in ("LFPM", "towers: LFPM", "blocks: LFPM"):
        yield f"{k} / SAM, time", ratio(took, k, "SAM"), batch
        yield f"{k} / SAM, memory", peak[k] / peak["SAM"], batch
    work = {k: flops(kinds[k]) for k in ("LFPM", "SAM", "fine-tuning")}
    yield "LFPM / SAM, FLOPs", work["LFPM"] / work["SAM"], batch
    yield (
        "matmul throughput, Stage II / fine-tuning",
        work["LFPM"] / work["fine-tuning"] / ratio(took, "LFPM", "fine-tuning"),
        batch,
    )
    if device().type == "cuda" and precision() == torch.bfloat16:
        peak_rate, _ = matmul_peak(torch.bfloat16, 20)
        yield (
            "Stage II, share of the bf16 peak",
            work["LFPM"] / statistics.median(took["LFPM"]) / peak_rate,
            batch,
        )


def path_rows(clip: Clip, n: int, rounds: int):
    a = clip.state()
    path, x = (
        Path(clip, a, {k: v + 0.01 * torch.randn_like(v) for k, v in a.items()}),
        torch.randint(256, (n, 3, clip.size, clip.size), dtype=torch.uint8),
    )
    W, fixed = torch.randn(CLASSES, clip.visual.output_dim, device=device()), clip.with_state(a)
    walk = lambda: [logits(features(clip, path.at(lam), x), W).argmax(1) for lam in grid(POINTS)]
    took = in_turns(
        {"path": walk, "forward": lambda: [features(clip, fixed, x) for _ in range(POINTS)]}, rounds
    )
    yield "21-point path / pure forward", ratio(took, "path", "forward"), n


def verdict(what: str, value: float) -> tuple[str, bool]:
    "(goal as text, whether it is met); no goal counts as met."
    sign, goal = GOALS.get(what, ("", 0))
    return f"{sign} {goal}" if sign else "-", not sign or (
        value <= goal if sign == "<=" else value >= goal
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        default="lfpm-lab",
        help="a shipped backbone or open_clip's name, e.g. ViT-B-32-quickgelu",
    )
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument(
        "--images", type=int, default=512, help="images that each model of the path is asked about"
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument(
        "--parts", nargs="+", choices=["stage2", "path"], default=["stage2", "path"]
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(", ".join(f"{k} {v}" for k, v in versions().items()), flush=True)
    clip, met = random_clip(args.model), []
    print(f"{args.model}, {args.rounds} rounds, medians")
    print(f"{'':42} {'goal':>8} {'measured':>9} {'n':>5}", flush=True)
    makers = dict(
        stage2=lambda: stage2_rows(clip, args.batch, args.rounds),
        path=lambda: path_rows(clip, args.images, max(3, args.rounds // 3)),
    )
    for part in args.parts:
        say(part)
        for what, value, n in makers[part]():
            goal, ok = verdict(what, value)
            met.append(ok)
            print(
                f"{what:42} {goal:>8} {value:9.3f} {n:5}  {'' if ok else 'missed'}".rstrip(),
                flush=True,
            )
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
