#!/usr/bin/env bash
# The same tensors and the same metadata make another file in every process, and load() of bytes
# returns the keys in another order each time.
#
# Guess, before the run: a format made for exact weights gives the same bytes for the same content,
#   and both readers the order of the file.
# Seen 2026-11-30, safetensors 0.8.0 (0.4.5, 0.5.3, 0.6.2 and 0.7.0 alike): six processes, five
#   or six SHA-256 of one file with four metadata entries; with one entry they agree. load_file()
#   always gives the file's order, load(bytes) a new one on each call.
# Hurts: a checkpoint named by its file's hash is "another model" after every save; whoever flattens
#   load(bytes).values() into a task vector subtracts tensors of other layers, without any error
#   where shapes agree.
# Here: content_hash() hashes tensors by name; tests/test_order.py shuffles the keys of everything
#   that is merged, converted or hashed.
. "$(dirname "$0")/lib.sh"
packages safetensors==0.8.0 numpy
cat > once.py <<'PYTHON'
import hashlib
import sys

import numpy as np
from safetensors.numpy import load, load_file, save_file

file, n = sys.argv[1], int(sys.argv[2])
state = {f"layer{i}": np.full(2, i, np.float32) for i in range(8)}
save_file(state, file, metadata={k: k for k in ("format", "layout", "made_from", "task")[:n]})
data = open(file, "rb").read()
names = lambda d: ",".join(k[-1] for k in d)
orders = {names(load(data)) for _ in range(20)}
print(
    hashlib.sha256(data).hexdigest()[:12],
    names(load_file(file)),
    "bytes:",
    *sorted(orders)[:2],
    f"({len(orders)} orders in 20 calls)",
)
PYTHON
for n in 1 4; do
  echo "metadata entries: $n"
  for i in 1 2 3 4 5 6; do "$PY" once.py "x$i.safetensors" "$n" | tee -a "seen$n"; done
done
distinct() { awk "{print \$$2}" "seen$1" | sort -u | wc -l; }
[ "$(distinct 1 1)" = 1 ] || { echo "CHANGED: one metadata entry, and the files differ"; exit 1; }
[ "$(distinct 4 1)" -gt 1 ] || { echo "CHANGED: six processes wrote the same bytes"; exit 1; }
[ "$(distinct 4 2)" = 1 ] || { echo "CHANGED: load_file's order differs"; exit 1; }
if grep -q "(1 orders" seen1 seen4; then echo "CHANGED: load(bytes) keeps one order"; exit 1; fi
echo "as recorded"
