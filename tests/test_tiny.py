"""Preset tiny of every experiment, cell by cell in this process.

The main notebook's runs take the untrained `pico` for the backbone, a fraction of the shipped
one's work; the recorded lab's (ctl, curvature, efficiency) need the shipped one. All share their
stages, as runs do."""

import json
import math

import pytest
import pandas as pd

from conftest import new_pico
from lfpm_nb import experiment
from lfpm_nb.runs import experiments, notebooks, planned
from lfpm_nb.settings import MainParams
from test_sweep import OWN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture
def run(root, monkeypatch):
    """run(name) -> (the plan, its rows).

    Every code cell of the experiment's notebook, its parameters set where papermill would set
    them."""
    clip = new_pico("lfpm-lab")
    clip.card["sha256"] = "0" * 64
    for k in ("RUNS", "CACHE"):
        monkeypatch.setenv(f"LFPM_{k}", str(root / k.lower()))

    def call(name):
        plan, names = planned(name, "tiny"), {"__name__": "__main__"}
        if plan.notebook == "main":
            monkeypatch.setattr(experiment, "load_clip", lambda name: clip)
        for cell in json.loads(notebooks()[plan.notebook].read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "code":
                continue
            exec(compile("".join(cell["source"]), name, "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names |= plan.passed
        return plan, pd.read_parquet(plan.out / "metrics.parquet")

    return call


def promised(s: MainParams) -> set:
    "The rows that the main notebook's settings name."
    row = lambda m, d: d if m == s.merges[0] else f"{m} + {d}"
    return {
        "individual",
        "individual (clean)",
        *s.merges,
        *(f"{m} (clean)" for m in s.merges),
        *(row(m, d) for m in s.merges for d in s.defences),
        *(f"{row(m, d)} (clean)" for m in s.merges for d in s.clean_defences),
    }


@pytest.mark.parametrize("name", sorted(set(experiments()) - OWN))
def test_every_method_yields_numbers_that_vary(name, run):
    plan, df = run(name)
    numbers = df[(df.kind != "seconds") & (df.n > 0)]  # of no picture that counts there is no rate
    strange = numbers[~numbers.value.map(math.isfinite)]
    assert strange.empty, strange[["method", "kind", "task", "metric", "lam", "n"]].to_string()
    rates = (
        numbers[numbers.kind != "summary"] if plan.notebook == "main" else numbers
    )  # seconds and megabytes always vary
    if plan.notebook == "main":
        assert promised(plan.settings) <= set(rates.method), promised(plan.settings) - set(
            rates.method
        )
    for method, rows in rates.groupby("method"):
        assert rows.value.nunique() > 1, f"{method}: {rows.value.unique()}"
    if plan.notebook == "main" and "LFPM" in plan.settings.defences:
        curves = df[(df.kind == "path") & (df.method == "LFPM")].groupby(["task", "metric"]).value
        assert (curves.size() == plan.settings.lam_n).all() and curves.nunique().max() > 1, (
            "LFPM's path leads nowhere"
        )
