"""Merging six ViT-B/32 towers: our Task Arithmetic and TIES against fusion_bench's.

Seconds and peak memory, of the visual towers.

    python benchmarks/merge.py [TA TIES] [--pairs 5] [--threads 1] [--models 6]

Synthetic float32 weights of the real shapes (open_clip's fresh ViT-B-32 visual tower, and six
copies with noise), all in one process; ours and theirs alternate in order, times are medians over
`--pairs`, the ratio is the median of the pairs' ratios. Peak is resident memory above what was
held before the call, from the kernel's high-water mark (Linux). Theirs are run through their own
classes, on a model pool that hands out its models without copying them, and their base is
restored outside the timing. `merge()` also checks the inputs (keys, shapes, NaN), theirs do not;
both times are printed. fusion_bench's TIES holds several flat copies of all models (more than 17
GiB for six), so fewer --models give an idea where memory is short. Without fusion_bench only
ours: `pip install fusion-bench`, in an environment of its own, adds the comparison."""

import argparse
import contextlib
import copy
import importlib.util
import io
import resource
import statistics
import time

import open_clip
import torch

from lfpm_nb.core import check_same
from lfpm_nb.merge import merge, merges

OPTIONS = {"TA": dict(scale=0.3), "TIES": dict(density=0.2, scale=0.3)}
GOALS = {"TA": 3.5, "TIES": 5.0}


def towers(n: int):
    "(base, models): a fresh ViT-B/32 visual tower and n copies with noise, as modules."
    torch.manual_seed(0)
    base = open_clip.create_model("ViT-B-32", pretrained=None).visual.float()
    models = [copy.deepcopy(base) for _ in range(n)]
    with torch.no_grad():
        for m in models:
            for p in m.parameters():
                p.add_(torch.randn(p.shape), alpha=0.002)
    return base, models


def their_runs(base, models) -> dict:
    "{name: call} of fusion_bench's algorithms; each overwrites `base`."
    from fusion_bench.method import TaskArithmeticAlgorithm, TiesMergingAlgorithm
    from fusion_bench.modelpool import BaseModelPool

    class Pool(BaseModelPool):
        def load_model(self, name, *args, **kwargs):
            return self._models[name]

    pool = Pool({"_pretrained_": base, **{f"m{i}": m for i, m in enumerate(models)}})
    ta, ties = (
        TaskArithmeticAlgorithm(scaling_factor=0.3),
        TiesMergingAlgorithm(scaling_factor=0.3, threshold=20, remove_keys=[], merge_func="sum"),
    )
    return {"TA": lambda: ta.run(pool), "TIES": lambda: ties.run(pool)}


def resident() -> int:
    with open("/proc/self/statm", encoding="utf-8") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def run(call) -> tuple[float, float, object]:
    """(seconds, peak bytes above what is held now, result) of a call.

    Peak is NaN where the kernel keeps no high-water mark that can be reset."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as f:
            f.write("5")
        held = resident()
    except OSError:
        held = float("nan")
    t0 = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        out = call()
    seconds = time.perf_counter() - t0
    peak = float("nan")
    if held == held:
        with open("/proc/self/status", encoding="utf-8") as f:
            peak = (
                next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM")) - held
            )
    return seconds, peak, out


def compare(name: str, base, models, theirs, pairs: int) -> None:
    start, states = (
        {k: v.clone() for k, v in base.state_dict().items()},
        [m.state_dict() for m in models],
    )
    calls = {
        "ours": lambda: merges(name, start, states, **OPTIONS[name]),
        "merge()": lambda: merge(name, start, states, **OPTIONS[name]),
    }
    if theirs:
        calls["fusion_bench"] = theirs[name]
    took, peak, last = {k: [] for k in calls}, {k: [] for k in calls}, {}
    for i in range(pairs + 1):  # the first round warms up
        for who in list(calls)[:: 1 if i % 2 else -1]:
            s, p, out = run(calls[who])
            if i:
                took[who].append(s)
                peak[who].append(p)
            if i == pairs:
                last[who] = {
                    k: v.clone()
                    for k, v in (out.state_dict() if hasattr(out, "state_dict") else out).items()
                }
            del out
            base.load_state_dict(start)
    for who in calls:
        print(
            f"{name:5} {who:13} {statistics.median(took[who]):7.3f} s   "
            f"peak {max(peak[who]) / 2**30:5.2f} GiB above the inputs"
        )
    if theirs:
        ratios = {
            w: statistics.median(b / a for a, b in zip(took[w], took["fusion_bench"]))
            for w in ("ours", "merge()")
        }
        error = max(
            (last["ours"][k].double() - last["fusion_bench"][k].double()).abs().max().item()
            for k in start
        )
        print(
            f"{name:5} fusion_bench / ours = {ratios['ours']:.1f} (goal {GOALS[name]}), "
            f"/ merge() with its checks = {ratios['merge()']:.1f}; largest difference {error:.1e}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "methods", nargs="*", default=list(OPTIONS), help="TA, TIES or both (default)"
    )
    parser.add_argument("--pairs", type=int, default=5, help="timed rounds of each")
    parser.add_argument("--models", type=int, default=6, help="towers to merge")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base, models = towers(args.models)
    n = sum(v.numel() for v in base.state_dict().values())
    print(
        f"{args.models} towers of {n / 1e6:.1f} M weights, torch {torch.__version__}, "
        f"{args.threads} thread(s), {args.pairs} rounds",
        flush=True,
    )
    check = statistics.median(
        run(lambda: [check_same(base.state_dict(), m.state_dict()) for m in models])[0]
        for _ in range(3)
    )
    print(f"checking them takes {check:.3f} s", flush=True)
    theirs = their_runs(base, models) if importlib.util.find_spec("fusion_bench") else None
    if theirs is None:
        print(
            "fusion_bench is not here: pip install fusion-bench, "
            "and run this again for the comparison"
        )
    for name in args.methods:
        compare(name, base, models, theirs, args.pairs)


if __name__ == "__main__":
    main()
