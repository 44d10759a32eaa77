"""Everything a test writes goes to a throw-away folder, and every test sees the same number of threads."""
import os
import shutil
import tempfile
from pathlib import Path

# Set before torch or plotly are imported, and inherited by the kernels and commands that tests start.
SCRATCH = Path(tempfile.mkdtemp(prefix="lfpm-tests-"))
THREADS = min(2, os.cpu_count() or 1)
os.environ.update(LFPM_RUNS=str(SCRATCH / "runs"), LFPM_CACHE=str(SCRATCH / "cache"), LFPM_QUIET="1", LFPM_DEVICE="cpu",
                  OMP_NUM_THREADS=str(THREADS), PLOTLY_RENDERER="plotly_mimetype", MPLBACKEND="agg")
os.environ.pop("LFPM_DATA", None)

import pytest
import torch

torch.set_num_threads(THREADS)


def pytest_unconfigure(config):
    shutil.rmtree(SCRATCH, ignore_errors=True)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for item in items:
        if "cuda" in item.keywords: item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; none here"))


@pytest.fixture
def dirs(tmp_path, monkeypatch):
    "Fresh `$LFPM_RUNS` and `$LFPM_CACHE` for one test; returns their parent folder."
    monkeypatch.setenv("LFPM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("LFPM_CACHE", str(tmp_path / "cache"))
    return tmp_path
