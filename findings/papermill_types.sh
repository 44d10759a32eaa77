#!/usr/bin/env bash
# papermill guesses a parameter's type: `-p A false` is a truthy text, a hash of digits and one "e"
# is infinity, 1e-4 in YAML is text.
#
# Guess, before the run: false is False as in YAML and JSON, a word that begins with a digit stays
#   text, 1e-4 in a YAML file is a number.
# Seen 2026-11-30, papermill 2.7.0: -p takes Python's True and False only, "false" and "no" stay
#   text, which is true in an `if`; -p config 4e714120 (eight digits of a hash) becomes
#   float('inf'), 1_000 becomes 1000, 007 becomes 7. From a YAML file lr: 1e-4 is the text "1e-4"
#   (PyYAML wants 1.0e-4); the notebook's own default beside it is a float, so `lr * 2` fails late,
#   or `lr > 0` at once.
# Hurts: an ablation that was switched off on the command line runs switched on; a run's folder or
#   seed is another one.
# Here: settings are classes; each value is read by its kind, however it comes, and what does not
#   fit is refused by name (nbs/17a_settings).
. "$(dirname "$0")/lib.sh"
packages papermill==2.7.0
cat > nb.ipynb <<'JSON'
{"cells": [{"cell_type": "code", "execution_count": null, "id": "a", "outputs": [],
            "metadata": {"tags": ["parameters"]}, "source": ["A = True\nconfig = ''\nlr = 0.1"]}],
 "metadata": {"kernelspec": {"display_name": "python", "language": "python", "name": "python3"},
              "language_info": {"name": "python"}},
 "nbformat": 4, "nbformat_minor": 5}
JSON
printf 'lr: 1e-4\n' > a.yaml
printf 'lr: 1.0e-4\n' > b.yaml
seen() {  # what papermill writes into the notebook; nothing is executed
  "$PY" -m papermill nb.ipynb out.ipynb --prepare-only "$@" >/dev/null 2>&1
  "$PY" - <<'PYTHON'
import json

for cell in json.load(open("out.ipynb"))["cells"]:
    if "injected-parameters" in cell["metadata"]["tags"]:
        print("; ".join(line.strip() for line in cell["source"] if "=" in line))
PYTHON
}
check() {  # expected, then papermill's arguments
  local want=$1; shift
  local got; got=$(seen "$@")
  printf '%-28s %s\n' "$*" "$got"
  [ "$got" = "$want" ] || { echo "CHANGED: expected $want"; exit 1; }
}
check 'A = "false"' -p A false
check 'A = "no"' -p A no
check 'A = False' -p A False
check "config = float('inf')" -p config 4e714120
check 'config = "4e71412f"' -p config 4e71412f
check 'config = 1000' -p config 1_000
check 'config = 7' -p config 007
check 'lr = "1e-4"' -f a.yaml
check 'lr = 0.0001' -f b.yaml
check 'lr = 0.0001' -p lr 1e-4
echo "as recorded"
