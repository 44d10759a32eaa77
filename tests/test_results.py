"""The table over seeds, whole paths compared, pictures."""

import numpy as np
import pandas as pd
import pytest

from conftest import fake
from lfpm_nb.results import table, to_markdown, versus
from lfpm_nb.runs import load_runs


def test_table_is_mean_and_std_over_seeds(runs):
    for seed, ca in enumerate((70, 72, 77)):
        fake(runs, f"s{seed}", {"TA": ca, "LFPM": ca - 1}, seed=seed)
    df, info = load_runs("main", "lab")
    t = table(df)
    assert (
        t.method.tolist() == ["TA", "LFPM"] and t.n_seeds.tolist() == [3, 3] and info["others"] == 0
    )
    assert (
        t.CA.tolist() == [73, 72]
        and t.CA_std[0] == pytest.approx(np.std([70, 72, 77], ddof=1))
        and t.ASR_T.isna().all()
    )
    assert "| TA | 73.0 ± 3.6 | 3 |" in to_markdown(t) and "ASR" not in to_markdown(t), (
        "a column without a number is left out"
    )
    assert "| TA | 73.0 ± 3.6 | – | 3 |" in to_markdown(t.assign(ASR_T=[np.nan, 5.0]))


def paths(curves, lams, seeds=(0,)):
    "Path rows from {method: (CA, ASR_T) along lam} and the methods' chosen lam."
    grid = np.linspace(0, 1, len(next(iter(curves.values()))[0]))
    at = lambda m, kind, metric, value, lam, seed: dict(
        method=m,
        kind=kind,
        task="average",
        metric=metric,
        lam=lam,
        value=float(value),
        n=10,
        seed=seed,
    )
    rows = [
        at(m, "path", k, v + seed, l, seed)
        for seed in seeds
        for m, c in curves.items()
        for k, vs in zip(("CA", "ASR_T"), c)
        for l, v in zip(grid, vs)
    ]
    return pd.DataFrame(
        rows + [at(m, "summary", "lam", l, l, seed) for seed in seeds for m, l in lams.items()]
    )


def test_versus_reads_whole_paths_at_the_same_price():
    curves = {
        "LFPM": ((70, 69, 60), (90, 2, 0)),
        "near": ((70, 68, 67.5), (90, 50, 9)),
        "cheap": ((70, 90, 90), (90, 1, 1)),
        "never": ((70, 69, 69), (90, 90, 90)),
    }
    t = versus(
        paths(curves, {"LFPM": 0.5, "near": 1.0, "cheap": 1.0, "never": 1.0}, seeds=(0, 1))
    ).set_index("method")
    assert t.ASR_same_CA["near"] == 9.5 and t.dASR["near"] == 7 and t.dASR_std["near"] == 0, (
        "the lowest within 2 points, mean of two seeds"
    )
    assert t.n_CA["near"] == 0 and np.isnan(t.CA_same_ASR["near"]), (
        "its attack success never falls to LFPM's"
    )
    assert t.CA_same_ASR["cheap"] == 90.5 and t.dCA["cheap"] == 21 and t.dASR["never"] == 88
    assert (
        t.dASR["LFPM"] == t.dCA["LFPM"] == 0 and (t.n_seeds == 2).all() and t.n_ASR["cheap"] == 2
    ), "its start costs as much"
    assert (
        versus(paths(curves, {"LFPM": 0.5}), ca=1.2).set_index("method").dASR["near"] == 48
        and versus(paths(curves, {"LFPM": 0.5}), asr=7).set_index("method").dCA["near"] == -1.5
    )
