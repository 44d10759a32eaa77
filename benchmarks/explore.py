"""The path explorer's budgets: a drag, one exact evaluation, and what 200 drags leave behind.

    python benchmarks/explore.py [--n 256] [--rounds 20]

The recorded lab, its own model, `n` pictures plain and with the trigger (2n images an
evaluation), torch's default number of threads. Times are medians; the exact evaluation is also
given as a ratio to its bare forward pass in the same run. On a GPU the same code keeps pictures
and models there."""

import argparse
import statistics
import threading
import time

import torch

from lfpm_nb.clip import features
from lfpm_nb.core import device
from lfpm_nb.explore import PathCore, PathExplorer
from lfpm_nb.recorded import load_recorded

LIMITS = dict(handler=16, exact=150)  # milliseconds


def clock(f) -> float:
    "Milliseconds of one call."
    t0 = time.perf_counter()
    f()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - t0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--n", type=int, default=256, help="pictures, each plain and with the trigger"
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed exact evaluations")
    args = parser.parse_args()
    core = PathCore.of(load_recorded(), n=args.n)
    explorer = PathExplorer(core, rest=60)  # drags only: no exact evaluation in between
    explorer.show()
    from ipywidgets.widgets.widget import _instances

    print(f"{2 * core.n} images, {torch.get_num_threads()} thread(s), {device()}")

    def drag(lam):
        explorer.slider.value = lam

    before, threads = len(_instances), threading.active_count()
    handler = [clock(lambda i=i: drag((i % 199 + 0.5) / 200)) for i in range(200)]
    explorer.timer.cancel()
    explorer.timer.join()
    time.sleep(0.2)
    print(
        f"handler  median {statistics.median(handler):6.1f} ms, "
        f"worst of 200 {max(handler):6.1f} ms (limit {LIMITS['handler']})"
    )
    widgets, running = len(_instances) - before, threading.active_count() - threads
    print(f"200 drags: {widgets} widgets and {running} threads more than before")

    lams = [(i + 0.37) / args.rounds for i in range(args.rounds)]
    features(core.clip, core.path.visual, core.x)  # warms up
    exact, bare = [], []
    for lam in lams:
        exact.append(clock(lambda: core.exact(min(lam, 1.0))))
        bare.append(clock(lambda: features(core.clip, core.path.visual, core.x)))
    ratio = statistics.median(a / b for a, b in zip(exact, bare))
    print(
        f"exact    median {statistics.median(exact):6.1f} ms (limit {LIMITS['exact']}), "
        f"{ratio:.2f} x its forward pass"
    )
    again = [clock(lambda: core.exact(min(lam, 1.0))) for lam in lams]
    print(f"again    median {statistics.median(again):6.3f} ms (cached)")
    explorer.close()


if __name__ == "__main__":
    main()
