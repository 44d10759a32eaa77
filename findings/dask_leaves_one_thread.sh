#!/usr/bin/env bash
# A LocalCluster, used and closed, leaves the calling process with one thread for every numeric
# library that is imported later; and exporting OMP_NUM_THREADS does not help torch, neither there
# nor in the workers.
#
# Guess, before the run: an exported OMP_NUM_THREADS=2 is what a worker computes with, and a closed
#   cluster leaves the environment alone.
# Seen 2026-11-30, distributed 2026.8.0, torch 2.13.0 and 2.15.0, two cores: OMP_, MKL_ and
#   OPENBLAS_NUM_THREADS are 1 in the caller's environment after the `with` block; `import torch`
#   there has 1 thread instead of 2. With OMP_NUM_THREADS=2 exported that one is kept, but
#   MKL_NUM_THREADS=1 is added and torch takes it: worker and caller compute with 1. In a process
#   that had imported torch before: 2.
# Hurts: a training after a sweep in the same notebook, or a subprocess that it starts, runs on one
#   core; sums of one thread round otherwise than those of two, so "the same seed" gives other
#   weights depending on the order of imports.
# Here: sweep.using sets all three names for each run and puts them back
#   (tests/test_sweep.py::test_a_runs_process_is_told_its_threads_in_every_dialect).
. "$(dirname "$0")/lib.sh"
packages distributed==2026.8.0 "torch==$TORCH" numpy
[ "$(getconf _NPROCESSORS_ONLN)" -ge 2 ] || { echo "needs two cores"; exit 1; }
cat > cluster.py <<'PYTHON'
import os
import sys

if len(sys.argv) > 1:
    import torch
from distributed import Client, LocalCluster

NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def threads():
    import torch

    return torch.get_num_threads()


def env():
    return ",".join(str(os.environ.get(n)) for n in NAMES)


if __name__ == "__main__":
    before = env()
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster, Client(
        cluster
    ) as client:
        worker = client.submit(threads).result()
    print(f"before {before} after {env()} worker {worker} caller {threads()}")
PYTHON
check() {  # what is tried, what was seen, what is expected
  printf '%-30s %s\n' "$1" "$2"
  [ "$2" = "$3" ] || { echo "CHANGED: expected $3"; exit 1; }
}
check "nothing exported" "$("$PY" cluster.py)" \
  "before None,None,None after 1,1,1 worker 1 caller 1"
check "OMP_NUM_THREADS=2" "$(OMP_NUM_THREADS=2 "$PY" cluster.py)" \
  "before 2,None,None after 2,1,1 worker 1 caller 1"
check "the same, torch imported first" "$(OMP_NUM_THREADS=2 "$PY" cluster.py torch)" \
  "before 2,None,None after 2,1,1 worker 1 caller 2"
echo "as recorded"
