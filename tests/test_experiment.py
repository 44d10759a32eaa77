"""Parameters, presets, cached parts of the main run, run folders and the table over seeds."""

import json
from dataclasses import asdict, replace

import numpy as np
import pandas as pd

import pytest
import torch

from lfpm_nb import clip as C
from lfpm_nb import experiment as E
from lfpm_nb.core import Stages
from lfpm_nb.experiment import Lab
from lfpm_nb.settings import MainParams
from lfpm_nb.results import path_lines, table

# --- parameters ---------------------------------------------------------------------------------


def test_stage_one_reads_no_other_strength_than_its_key_holds(pico):
    "A setting that Stage I reads but its cache key lacks would give stale prompts."
    from lfpm_nb.antibackdoor import Strengths, stage_one
    from lfpm_nb.subspace import Shadow

    read = set()

    class Seen(Strengths):
        def __getattribute__(self, k):
            if k in type(self).__dataclass_fields__:
                read.add(k)
            return super().__getattribute__(k)

    for A in (True, False):
        s = Seen(rank="rule", rho="rule", prompt_steps=1, semantic=(1.0,), A=A)
        read.clear()
        stage_one(pico, pico.state(), Shadow.of(pico, 64, 32, 0), s, 0)
        assert read <= set(E.STAGE_ONE) and {"rho", "semantic", "A"} <= read


# --- the lab: what is computed again, and what not ----------------------------------------------

TINY = dict(
    tasks=["letters", "signs"],
    n_train=48,
    n_test=24,
    n_target=36,
    epochs=1,
    batch=32,
    trigger_steps=2,
    shadow_n=64,
    held=32,
    rank=4,
    rho=0.1,
    prompt_steps=2,
    semantic=[1.0, 3.0],
    anti_epochs=1,
    anti_batch=32,
    lam_n=3,
    path_n=8,
)


def everything(lab) -> list:
    "All of the main run for the first merge and LFPM."
    for poisoned in (True, False):
        lab.measured(f"individual{'' if poisoned else ' (clean)'}", lab.models(poisoned))
        lab.measured(f"TA{'' if poisoned else ' (clean)'}", lab.merged("TA", poisoned)[0])
    lab.defend_and_measure("TA", "LFPM", lab.merged("TA")[0], True)
    return lab.rows


@pytest.fixture(scope="module")
def tiny_lab(pico, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        clip = replace(pico, card=pico.card | dict(sha256="0" * 64))
        m.setattr(E, "load_clip", lambda name: clip)
        lab = Lab(MainParams(**TINY), Stages(tmp_path_factory.mktemp("stages")))
        everything(lab)
        yield lab


def again(lab, **change) -> set:
    "Names of the stages computed anew when the settings change."
    other = Lab(MainParams(**{**TINY, **change}), Stages(lab.stages.root))
    everything(other)
    return {n for n, _, reused in other.stages.log if not reused}


def test_nothing_is_computed_twice(tiny_lab):
    rows = Lab(MainParams(**TINY), Stages(tiny_lab.stages.root))
    assert repr(everything(rows)) == repr(tiny_lab.rows) and all(
        reused for *_, reused in rows.stages.log
    )


TRAINED = {"tune-letters", "tune-signs", "attack-badmerging"}


@pytest.mark.parametrize(
    "change, new",
    [
        (dict(lam_n=4), {"path"}),
        (dict(path_n=9), {"path"}),
        (dict(scale=0.4), {"merge-TA", "measure", "stage1", "defend-LFPM", "lam", "path"}),
        (dict(gamma=0.5), {"defend-LFPM", "lam", "measure", "path"}),
        (
            dict(options={"badmerging": {"alpha": 4.0}}),
            {"attack-badmerging", "merge-TA", "measure", "stage1", "defend-LFPM", "lam", "path"},
        ),
        (
            dict(options={"TA": {"scale": 0.45}}),
            {"merge-TA", "measure", "stage1", "defend-LFPM", "lam", "path"},
        ),
    ],
)
def test_only_what_depends_on_a_setting_is_computed_again(tiny_lab, change, new):
    got = again(tiny_lab, **change)
    assert got <= new and (got & {"path", "defend-LFPM"}), got


def test_test_images_do_not_train(tiny_lab):
    assert not again(tiny_lab, n_test=23) & (TRAINED | {"stage1", "defend-LFPM"}), (
        "contributors depend on their training images only"
    )


def test_another_lam_does_not_train_again(tiny_lab):
    assert not again(tiny_lab, lam=0.25) & (TRAINED | {"stage1", "defend-LFPM"}), (
        "theta_anti does not depend on lambda"
    )


def test_a_seed_changes_data_training_trigger_and_shadow(tiny_lab):
    other = Lab(MainParams(**TINY, seed=1), Stages(tiny_lab.stages.root))
    assert all(
        not torch.equal(other.tasks[n].train_x, t.train_x)
        and not torch.equal(other.tasks[n].test_x, t.test_x)
        for n, t in tiny_lab.tasks.items()
    )
    assert not torch.equal(other.shadow.x, tiny_lab.shadow.x) and not torch.equal(
        other.poisoned["letters"][1].patch, tiny_lab.poisoned["letters"][1].patch
    )
    assert other._pre == tiny_lab._pre, "only the backbone is fixed"


def test_models_hold_one_poisoned_contributor(tiny_lab):
    clean, bad = tiny_lab.models(False), tiny_lab.models(True)
    same = {n: all(torch.equal(clean[n][k], bad[n][k]) for k in clean[n]) for n in clean}
    assert same == {"letters": False, "signs": True} and list(bad) == ["letters", "signs"]


def test_rows_are_tidy(tiny_lab, tmp_path):
    df = tiny_lab.frame()
    assert (
        set(df.kind) == {"model", "path", "summary", "seconds"}
        and (df.seed == 0).all()
        and df[df.metric != "ASR_Nc"].value.notna().all()
    )
    rates = df[
        df.metric.isin(["CA", "ASR_T", "ASR_N", "floor_none", "floor_grey"])
    ]  # (an untrained model may be right nowhere: no ASR_Nc)
    assert rates.value.between(0, 100).all() and (rates.n > 0).all()
    single = rates[(rates.task != "average")]
    assert (single.lo <= single.value + 1e-9).all() and (single.value <= single.hi + 1e-9).all(), (
        "each rate has its interval"
    )
    assert (
        not df[df.kind == "model"].duplicated(["method", "task", "metric"]).any()
        and not df[df.kind == "path"].duplicated(["method", "task", "metric", "lam"]).any()
    )
    t = table(df).set_index("method")
    assert list(t.index) == ["individual", "TA", "individual (clean)", "TA (clean)", "LFPM"]
    line = (
        df[
            (df.kind == "path")
            & (df.method == "LFPM")
            & (df.task == "average")
            & (df.metric == "ASR_T")
        ]
        .sort_values("lam")
        .value.tolist()
    )
    assert (
        t.path_ASR["LFPM"] == pytest.approx(np.trapezoid(line, dx=1 / (len(line) - 1)))
        and pd.isna(t.path_ASR["TA"])
        and 0 <= t.lam["LFPM"] <= 1
    )


def test_saved_files(tiny_lab, tmp_path):
    tiny_lab.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "metrics.parquet",
        "params.json",
        "path.html",
        "path.png",
    ]
    assert pd.read_parquet(tmp_path / "out" / "metrics.parquet").equals(
        tiny_lab.frame().reset_index(drop=True)
    )
    p = json.loads((tmp_path / "out" / "params.json").read_text(encoding="utf-8"))
    assert (
        p["params"] == json.loads(json.dumps(asdict(tiny_lab.P)))
        and {"torch", "python", "lfpm_nb", "device", "threads"} <= p["versions"].keys()
    )
    assert p["backbone"] == "0" * 64 and p["cpu"] and {"config", "time"} <= p.keys()
    assert {
        "lam",
        "lam_rule",
        "strength",
        "knob",
        "passes",
        "seconds",
        "peak_mb",
        "stage1_peak_mb",
    } <= p["defences"]["LFPM"].keys()
    assert {s["name"] for s in p["stages"]} >= TRAINED and all(
        s["seconds"] >= 0 for s in p["stages"]
    )
    html = (tmp_path / "out" / "path.html").read_text(encoding="utf-8")
    assert (
        "LFPM" in html
        and "TA (clean), same trigger" in html
        and not any(f'src="http{s}:' in html for s in ("", "s"))
    ), "it needs no network"


def test_figure_lines_are_the_rows(tiny_lab):
    df = tiny_lab.frame()
    lines, flat = path_lines(df)
    assert set(lines) == {("LFPM", "CA"), ("LFPM", "ASR_T")} and all(
        g.lam.tolist() == [0, 0.5, 1] for g in lines.values()
    )
    pick = lambda m, metric: df[
        (df.method == m) & (df.task == "average") & (df.metric == metric) & (df.kind == "model")
    ].value.item()
    assert flat == {
        "TA (clean), same trigger": pick("TA (clean)", "ASR_T"),
        "TA, no trigger": pick("TA", "floor_none"),
        "TA, grey patch": pick("TA", "floor_grey"),
    }


def test_a_variant_is_the_method_with_an_option_of_its_own(tiny_lab):
    assert MainParams(**TINY, merges=["ta:scale=0.45", "TA"]).merges == ["TA:scale=0.45", "TA"]
    by_option = Lab(
        MainParams(**TINY, options={"TA": {"scale": 0.45}}), Stages(tiny_lab.stages.root)
    ).merged("TA")[0]
    own, plain = tiny_lab.merged("TA:scale=0.45")[0], tiny_lab.merged("TA")[0]
    assert all(torch.equal(own[k], by_option[k]) for k in own) and any(
        not torch.equal(own[k], plain[k]) for k in own
    )
    for text, message in (
        ("TA:scal=1", "unknown option of TA 'scal'; did you mean 'scale'"),
        ("TA:scale=much", "expected float"),
        ("TB:scale=1", "unknown merge 'TB'"),
    ):
        with pytest.raises(ValueError, match=message):
            MainParams(**TINY, merges=[text])


def test_likeness_of_trigger_and_prompts(tiny_lab, monkeypatch, in_both):
    theta, n = tiny_lab.merged("TA")[0], 24
    got = tiny_lab.likeness("TA", n)
    x, y = (v[:n] for v in tiny_lab.shadow.check)
    for who, visual in (
        ("merged", tiny_lab.clip.with_state(theta)),
        ("pretrained", tiny_lab.clip.visual),
    ):
        right = (
            C.logits(C.features(tiny_lab.clip, visual, x, dtype=torch.float32), tiny_lab.shadow.W)
            .argmax(1)
            .cpu()
            == y
        )
        assert got[who]["accuracy"][0] == pytest.approx(100 * right.float().mean().item())
        assert (
            len(got[who]["accuracy"]) == 4
            and len(got[who]["shift"]) == 3
            and len(got[who]["cosine"]) == 2
        ), "plain, trigger, two prompts"
        assert all(s > 0 for s in got[who]["shift"]) and all(
            -1 <= c <= 1 for c in got[who]["cosine"]
        )
    found = tiny_lab.mined(theta)
    monkeypatch.setattr(tiny_lab, "merged", lambda name: (theta, {}))
    monkeypatch.setattr(tiny_lab, "mined", lambda theta: found)
    assert in_both(lambda: tiny_lab.likeness("TA", n)) == [got, got], (
        "whatever precision the models were trained in"
    )
    zero = {
        a: (s, trigger, r)
        for a, (s, _, r) in tiny_lab.poisoned.items()
        for trigger in [lambda x: x]
    }
    monkeypatch.setitem(tiny_lab.__dict__, "poisoned", zero)
    idle = tiny_lab.likeness("TA", n)["merged"]
    assert (
        idle["shift"][0] == 0
        and idle["accuracy"][1] == idle["accuracy"][0]
        and idle["shift"][1:] == got["merged"]["shift"][1:]
    ), "a trigger that does nothing moves nothing"
