#!/usr/bin/env bash
# A task that never began fails with KilledWorker, because it waited behind another on a worker.
#
# Guess, before the run: when a worker's process goes away, Dask counts that against the task it was
#   doing; those that wait are handed out again and nothing is held against them.
# Seen 2026-12-01, distributed 2026.8.0, one local worker with one thread: the process is ended from
#   outside four times while it does the first task (as a system does that has no memory left).
#   The second task, which has never begun, fails with KilledWorker too.
# Hurts: parameter sweeps. One run that eats the memory takes its healthy neighbours along, and the
#   record says of them what it says of the culprit.
# Here: no more runs are handed out than workers have threads; notebook 22_sweep, tests/test_sweep.py.
. "$(dirname "$0")/lib.sh"
packages distributed==2026.8.0 dask==2026.8.0
cat > run.py <<'PYTHON'
import os
import signal
import time
from pathlib import Path

import dask
from distributed import Client, LocalCluster

BEGUN = Path("begun")


def first():
    Path("pid").write_text(str(os.getpid()))
    time.sleep(600)


def second():
    BEGUN.touch()


if __name__ == "__main__":
    dask.config.set({"distributed.deploy.lost-worker-timeout": "1000 days"})
    size = dict(n_workers=1, threads_per_worker=1, memory_limit=0, dashboard_address=None)
    with LocalCluster(**size, silence_logs=50) as cluster, Client(cluster) as client:
        one = client.submit(first, key="first", priority=1)
        two = client.submit(second, key="second", priority=0)
        for _ in range(4):
            while not Path("pid").exists():
                time.sleep(0.1)
            time.sleep(1)
            pid = int(Path("pid").read_text())
            Path("pid").unlink()
            os.kill(pid, signal.SIGKILL)
        found = {f.key: type(f.exception(timeout=120)).__name__ for f in (one, two)}
    print(found, "the second has begun:", BEGUN.exists())
    assert found == {"first": "KilledWorker", "second": "KilledWorker"}, "the behaviour changed"
    assert not BEGUN.exists()
    print("as recorded")
PYTHON
"$PY" run.py
