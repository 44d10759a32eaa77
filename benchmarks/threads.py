"""Do two threads pay off, on an idle machine and beside other work?

Wall seconds of a fresh tiny main run.

    python benchmarks/threads.py [--pairs 5] [--parts beside idle] [--spin N]

- beside: two threads against one, while N processes (default: one for each core) do nothing but
  spin;
- idle: two threads whose waiting is passive (what `lfpm_nb` sets) against two that spin for a
  while first (libgomp's own way), and against one thread.

Pairs alternate in order, caches and results are thrown away, medians are over pairs. What else
the machine does counts too: the load is printed before and after. `idle` says something only of a
machine that is. The exit code is 1 when two threads beside other work miss their goal."""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time

GOAL = 1.3  # two threads beside other work: at most so many times as long as one
SPIN = {
    "GOMP_SPINCOUNT": "300000"
}  # libgomp's default where no policy is set; it overrules OMP_WAIT_POLICY
COMMAND = [
    sys.executable,
    "-c",
    "from lfpm_nb.cli import main; main()",
    "run",
    "main",
    "--preset",
    "tiny",
]


@contextlib.contextmanager
def spinning(n: int):
    "n processes that only spin; none is left afterwards."
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for p in started:
            p.kill()
        for p in started:
            p.wait()


def seconds(threads: int, env: dict) -> float:
    "Wall time of one run from nothing."
    with tempfile.TemporaryDirectory(prefix="lfpm-benchmark-") as d:
        own = dict(
            LFPM_RUNS=f"{d}/runs",
            LFPM_CACHE=f"{d}/cache",
            LFPM_QUIET="1",
            OMP_NUM_THREADS=str(threads),
        )
        t0 = time.perf_counter()
        subprocess.run(COMMAND, env=os.environ | own | env, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - t0


def in_pairs(a: tuple, b: tuple, pairs: int) -> tuple[float, float, float]:
    "(median seconds of a, of b, median of a / b); each is (threads, environment)."
    first, second = [], []
    for k in range(pairs):
        turn = [(a, first), (b, second)]
        for what, into in turn[:: 1 if k % 2 else -1]:
            into.append(seconds(*what))
        print(
            f"  pair {k + 1}: {first[-1]:.1f} s and {second[-1]:.1f} s", file=sys.stderr, flush=True
        )
    return (
        statistics.median(first),
        statistics.median(second),
        statistics.median(x / y for x, y in zip(first, second)),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--parts", nargs="+", choices=("beside", "idle"), default=["beside", "idle"]
    )
    parser.add_argument(
        "--spin",
        type=int,
        default=os.cpu_count(),
        help="spinning processes beside the run (default: one for each core)",
    )
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load before: {os.getloadavg()[0]:.1f}", flush=True)
    beside = 0.0
    if "beside" in args.parts:
        with spinning(args.spin):
            two, one, beside = in_pairs((2, {}), (1, {}), args.pairs)
        print(
            f"beside {args.spin} spinning processes: two threads {two:.1f} s, "
            f"one {one:.1f} s, ratio {beside:.2f} (goal {GOAL})",
            flush=True,
        )
    if "idle" in args.parts:
        two, spun, cost = in_pairs((2, {}), (2, SPIN), args.pairs)
        print(
            f"nothing beside: two threads, passive {two:.1f} s, "
            f"spinning {spun:.1f} s, ratio {cost:.2f}",
            flush=True,
        )
        two, one, gain = in_pairs((2, {}), (1, {}), args.pairs)
        print(
            f"nothing beside: two threads {two:.1f} s, one {one:.1f} s, ratio {gain:.2f}",
            flush=True,
        )
    print(f"load after: {os.getloadavg()[0]:.1f}, {args.pairs} pairs")
    return int(beside > GOAL)


if __name__ == "__main__":
    sys.exit(main())
