# Shared by the scripts beside it: `. "$(dirname "$0")/lib.sh"`, then `packages NAME==VERSION ...`,
# then "$PY". Everything lies in one temporary folder that is removed at the end. PYTHON names
# another interpreter than python3, TORCH another torch.
set -euo pipefail
HERE=$(mktemp -d)
trap 'rm -rf "$HERE"' EXIT
cd "$HERE"
unset PYTHONPATH OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS
export CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
PY=$HERE/venv/bin/python
TORCH=${TORCH:-2.13.0}

packages() {  # a fresh environment with these public packages, and nothing of this project
  "${PYTHON:-python3}" -m venv "$HERE/venv"
  "$PY" -m pip install --quiet --no-compile --disable-pip-version-check "$@"
  local names
  names=$(printf '%s\n' "$@" | sed 's/=.*//' | paste -sd'|')
  "$PY" -m pip list --format=freeze --disable-pip-version-check 2>/dev/null | grep -iE "^($names)=="
}
