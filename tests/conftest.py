"""Everything a test writes goes to a throw-away folder, and every test sees the same number of
threads."""

import os
import shutil
import tempfile
from pathlib import Path

# Set before torch or plotly are imported, and inherited by the kernels and commands that tests
# start.
SCRATCH = Path(tempfile.mkdtemp(prefix="lfpm-tests-"))
THREADS = (
    1
    if "PYTEST_XDIST_WORKER" in os.environ
    else min(
        2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
)
os.environ.update(
    LFPM_RUNS=str(SCRATCH / "runs"),
    LFPM_CACHE=str(SCRATCH / "cache"),
    LFPM_QUIET="1",
    LFPM_DEVICE="cpu",
    OMP_NUM_THREADS=str(THREADS),
    PLOTLY_RENDERER="plotly_mimetype",
    MPLBACKEND="agg",
)
os.environ.pop("LFPM_DATA", None)

import functools
import sys

import hypothesis
import pytest

import lfpm_nb  # before torch, which reads at its start how its threads shall wait
import torch

torch.set_num_threads(THREADS)
hypothesis.settings.register_profile(
    "lfpm", deadline=None, max_examples=40, derandomize=True, database=None
)
hypothesis.settings.load_profile("lfpm")


def pytest_unconfigure(config):
    shutil.rmtree(SCRATCH, ignore_errors=True)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; none here"))


@pytest.fixture
def dirs(tmp_path, monkeypatch):
    "Fresh `$LFPM_RUNS` and `$LFPM_CACHE` for one test; returns their parent folder."
    monkeypatch.setenv("LFPM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("LFPM_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def fp32(monkeypatch):
    "No bf16: for comparisons that must be exact."
    monkeypatch.setenv("LFPM_AMP", "0")


@pytest.fixture
def in_both(monkeypatch):
    """`in_both(f)` -> (f() where `amp` computes in bfloat16, f() where in float32), on any
    processor."""

    def call(f):
        out = []
        for wish in "10":
            monkeypatch.setenv("LFPM_AMP", wish)
            out.append(f())
        return out

    return call


def new_pico(name: str = "pico", layers: int = 2):
    """An untrained Clip, two blocks of width 64 on 32 x 32 images.

    Like the shipped one in everything but size and skill."""
    from lfpm_nb.clip import build_clip, lab_config, new_card
    from lfpm_nb.tasks import prompt_corpus

    torch.manual_seed(0)
    config = lab_config(width=64, layers=layers, embed=32, text_width=64, text_layers=1)
    clip = build_clip(new_card(name, config, prompt_corpus()))
    clip.model.requires_grad_(False)
    return clip


@pytest.fixture(scope="session")
def pico():
    return new_pico()


@pytest.fixture(scope="module")
def shadow(pico):
    "Few pictures of the defender."
    from lfpm_nb.subspace import Shadow

    return Shadow.of(pico, 64, 32, seed=0)


@pytest.fixture(scope="module")
def prompts():
    "Two prompts of three tokens, as wide as `pico`."
    from lfpm_nb.core import generator

    return 0.3 * torch.randn(2, 3, 64, generator=generator("p"))


@pytest.fixture(scope="session")
def lab():
    "The shipped backbone."
    from lfpm_nb.clip import load_clip

    return load_clip()


@functools.lru_cache(None)
def small_task(name: str, n_train: int = 96, n_test: int = 48):
    "A task small enough for a test; do not change its tensors."
    from lfpm_nb.tasks import load_task

    return load_task(name, seed=0, n_train=n_train, n_test=n_test)


def near(clip, seed: int, size: float = 0.02) -> dict:
    "theta_pre with noise: a stand-in for a fine-tuned tower."
    g = torch.Generator().manual_seed(seed)
    return {k: v + size * torch.randn(v.shape, generator=g) for k, v in clip.state().items()}


def pixels(n: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    "uint8 noise (n, 3, size, size)."
    return torch.randint(
        256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


@pytest.fixture
def lfpm(monkeypatch, capsys):
    "`lfpm('table', 'main')` -> (exit code, stdout, stderr) of the command, run in this process."
    from lfpm_nb.cli import main

    def call(*args: str):
        monkeypatch.setattr(sys, "argv", ["lfpm", *args])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        io = capsys.readouterr()
        return code, io.out, io.err

    return call


def fake(runs, folder, values, seed=0, preset="lab", config="aaaa", state="done", age=0.0, **more):
    "A results folder with CA of each method; started `age` seconds ago."
    import time
    import pandas as pd
    from lfpm_nb.core import write_json
    from lfpm_nb.runs import finish

    out = Path(runs) / "main" / folder
    out.mkdir(parents=True)
    rows = [
        dict(
            method=m,
            kind="model",
            task="average",
            metric="CA",
            lam=float("nan"),
            value=float(v),
            n=10,
            lo=None,
            hi=None,
            seed=seed,
        )
        for m, v in values.items()
    ]
    rows += [
        dict(
            method=m,
            kind="path",
            task="average",
            metric="CA",
            lam=0.5,
            value=999.0,
            n=10,
            lo=None,
            hi=None,
            seed=seed,
        )
        for m in values
    ]
    rows += [
        dict(
            method=m,
            kind="model",
            task="signs",
            metric="CA",
            lam=float("nan"),
            value=999.0,
            n=10,
            lo=1.0,
            hi=2.0,
            seed=seed,
        )
        for m in values
    ]
    pd.DataFrame(rows).to_parquet(out / "metrics.parquet")
    write_json(out / "params.json", {})
    started = time.strftime("%F %T", time.localtime(time.time() - age))
    said = (
        dict(run="main", preset=preset, config=config, seed=seed, started=started, seconds=1.0)
        | more
    )
    if state == "done":
        finish(out, **said)
    elif state:
        write_json(out / "status.json", dict(state=state, **said))
    return out


@pytest.fixture
def runs(dirs):
    return dirs / "runs"
