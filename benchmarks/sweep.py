"""What a sweep gains from workers.

The same grid on one one-thread worker, on two, and on one worker with two threads.

    python benchmarks/sweep.py [--seeds 4]

A small main run a seed, nothing shared between seeds, caches and results in a throw-away folder.
Wall seconds of the whole command and ratios in the same process conditions; the overhead of a run
is its wall time less the stages it computed (imports, kernel, papermill, figures). Wants two idle
cores."""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import yaml

from lfpm_nb.sweep import Point, cluster, sweep, using

GRID = dict(
    run="main",
    grid=dict(
        tasks=[["letters", "signs", "textures"]],
        n_train=[256],
        n_test=[48],
        n_target=[90],
        trigger_steps=[10],
        shadow_n=[512],
        held=[64],
        lam_n=[5],
        path_n=[24],
        clean_defences=[[]],
    ),
)
LIMITS = dict(
    two=1.7, threads=1.0
)  # goals: speed-up of two workers, and two workers against one with two threads


def timed(root: Path, file: Path, workers: int, threads: int) -> tuple[float, float]:
    "(wall seconds of a sweep, seconds of overhead a run)."
    os.environ |= dict(LFPM_RUNS=str(root / "runs"), LFPM_CACHE=str(root / "cache"), LFPM_QUIET="1")
    t0 = time.time()
    t = sweep(file, workers=workers, threads=threads)
    wall = time.time() - t0
    if set(t.state) != {"done"}:
        raise SystemExit(t.to_string())
    computed = [
        sum(
            s["seconds"]
            for s in json.loads((Path(f) / "params.json").read_text(encoding="utf-8"))["stages"]
            if not s["reused"]
        )
        for f in t.folder
    ]
    return wall, (t.seconds - computed).mean()


def driver(n: int = 200) -> tuple[float, float]:
    """What the driver does one by one: (seconds to plan a run, seconds to hand one out).

    The second is from handing out n empty tasks to two workers until all answers are in, each."""
    with using(1, {}):
        Point("main", "tiny", 0).plan()  # files are read once
        t0 = time.time()
        for i in range(n):
            Point("main", "tiny", i).plan()
        plan = (time.time() - t0) / n
    with cluster(2, None) as client:
        client.gather(client.map(abs, range(n), pure=False))
        t0 = time.time()
        client.gather(client.map(abs, range(n), pure=False))
        return plan, (time.time() - t0) / n


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4, help="runs of the grid")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        file = Path(d, "grid.yaml")
        file.write_text(
            yaml.safe_dump(dict(preset="tiny", seeds=list(range(args.seeds)), runs=[GRID])),
            encoding="utf-8",
        )
        wall = {}
        for name, workers, threads in (
            ("one worker", 1, 1),
            ("two workers", 2, 1),
            ("one worker, two threads", 1, 2),
        ):
            wall[name], over = timed(Path(d, name), file, workers, threads)
            print(
                f"{name:24s} {wall[name]:7.1f} s for {args.seeds} runs, "
                f"{over:5.1f} s overhead a run",
                flush=True,
            )
    one, two, threads = wall.values()
    print(
        f"two workers: {one / two:.2f} x one (goal {LIMITS['two']}), "
        f"{threads / two:.2f} x one with two threads (goal {LIMITS['threads']})"
    )
    plan, dispatch = driver()
    print(
        f"driver, a run: {1000 * plan:.0f} ms to plan, "
        f"{1000 * dispatch:.1f} ms to hand out and take back"
    )


if __name__ == "__main__":
    main()
