"""A defence sees the merged model, the pretrained one and the shadow set.

Its model lies on the path at the lambda it reports."""

import inspect
import json
from dataclasses import asdict, replace

import pytest
import torch

from conftest import near
from lfpm_nb import baselines, defend as D
from lfpm_nb import experiment as E
from lfpm_nb.antibackdoor import Strengths, accuracy, stage_one, train_anti
from lfpm_nb.core import Stages, load_state
from lfpm_nb.defend import (
    Defended,
    check_strength,
    choose_strength,
    counting,
    defence,
    defences,
    defend,
    halved,
    knobs,
    prefer,
    train_defence,
)
from lfpm_nb.experiment import Lab
from lfpm_nb.settings import MainParams
from lfpm_nb.path import lam_rules, lerp
from lfpm_nb.subspace import Shadow

S = Strengths(
    rank=4,
    rho=0.1,
    prompt_length=3,
    prompt_steps=2,
    semantic=(1.0, 3.0),
    epochs=1,
    batch=16,
    lr=1e-3,
    points=4,
)
METHODS = pytest.mark.parametrize("method", sorted(defences))


@pytest.fixture(scope="module")
def shadow(pico):
    return Shadow.of(pico, 64, 64, seed=0)


@pytest.fixture(scope="module")
def merged(pico):
    return near(pico, 1)


@pytest.fixture(scope="module")
def mined(pico, merged, shadow):
    return stage_one(pico, merged, shadow, S, 0)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "method, lam",
    [("LFPM", lam) for lam in ("knee", "level", "calm", 0.3, 0, 1, "0.25")]
    + [(m, "knee") for m in sorted(defences) if m != "LFPM"],
)
def test_the_model_lies_on_the_path_at_lam(pico, merged, shadow, mined, method, lam):
    before = {k: v.clone() for k, v in merged.items()}
    model, d = defend(method, merged, pico, shadow, lam=lam, strengths=S, mined=mined)
    assert (
        isinstance(d, Defended)
        and 0 <= d.lam <= 1
        and same(model, lerp(merged, d.end, d.lam))
        and same(merged, before)
        and not same(d.end, merged)
    )
    if lam in lam_rules:
        assert d.rule["rule"] == lam and d.rule["lam"] == d.lam in [
            c["lam"] for c in d.rule["curve"]
        ]
    else:
        assert d.lam == float(lam) and d.rule == {}
    json.dumps([d.rule, d.log])  # what is kept with the stage
    if d.lam == 0:
        assert same(model, merged)
    if d.lam == 1:
        assert same(model, d.end)


@pytest.mark.parametrize("method", ["LFPM", "fine-tuning", "SAU"])
def test_stage_one_is_made_when_it_is_not_given(pico, merged, shadow, mined, method):
    given, own = (defend(method, merged, pico, shadow, strengths=S, mined=m) for m in (mined, None))
    assert same(given[0], own[0]) and given[1].lam == own[1].lam and given[1].rule == own[1].rule


def test_methods_differ_and_fine_tuning_is_lfpm_without_worst_case_and_path(
    pico, merged, shadow, mined
):
    run = lambda m, s: defend(m, merged, pico, shadow, lam=1.0, strengths=s, mined=mined)[1].end
    plain = run("fine-tuning", S)
    assert not same(plain, run("LFPM", S)) and same(
        plain, run("LFPM", replace(S, B=False, C=False))
    )
    assert same(
        plain,
        run("Fine-tuning on the shadow set", replace(S, gamma=3.0, rho=2.0, interval=(0.0, 1.0))),
    ), "long names work; LFPM's strengths do not reach it"


@pytest.mark.parametrize("lam", [-0.1, 1.5, "2", float("nan"), "often", None])
def test_lam_outside_is_refused_before_any_work(pico, merged, shadow, monkeypatch, lam):
    for f in ("stage_one", "Lookout"):
        monkeypatch.setattr(D, f, None)
    with pytest.raises(ValueError, match=r"a number in \[0, 1\]"):
        defend("LFPM", merged, pico, shadow, lam=lam, strengths=S)


def test_bad_models_and_names_are_refused_before_any_work(pico, merged, shadow, monkeypatch):
    monkeypatch.setattr(D, "stage_one", None)
    for bad, message in (
        (
            {**merged, "proj": merged["proj"] * float("nan")},
            "this backbone and the merged model.*NaN",
        ),
        ({k: v for k, v in merged.items() if k != "proj"}, "proj only in the first"),
    ):
        with pytest.raises(ValueError, match=message):
            defend("LFPM", bad, pico, shadow, strengths=S)
    with pytest.raises(ValueError, match="unknown defence 'LFMP'; did you mean 'LFPM'"):
        defend("LFMP", merged, pico, shadow)


# --- strengths ----------------------------------------------------------------------------------


def run(pico, merged, shadow, mined, method, strength="default", s=S):
    return defend(method, merged, pico, shadow, strengths=s, mined=mined, strength=strength)


@METHODS
def test_default_is_the_number_in_the_signature(pico, merged, shadow, mined, method):
    k = knobs[method]
    assert (
        check_strength(method, "default")
        == k.default
        == inspect.signature(defences[method]["f"]).parameters["strength"].default
    )
    assert (
        len(k.grid) == 3
        and list(k.grid) == sorted(set(k.grid))
        and k.default in k.grid
        and all(k.within[0] < v <= k.within[1] for v in k.grid)
    )
    assert defences[method]["long"] and defences[method]["needs"]


def test_default_strength_is_that_of_before(pico, merged, shadow, mined):
    for method, switch in (("LFPM", {}), ("fine-tuning", dict(B=False, C=False))):
        train = lambda v, s=S: train_defence(method, merged, pico, shadow, mined[0]["p"], s, 0, v)[
            0
        ]
        assert same(
            train(None),
            train_anti(pico, merged, shadow, mined[0]["p"], replace(S, **switch), 0, "x")[0],
        ) and same(train(2), train(1, replace(S, lr=2 * S.lr)))
    d = run(pico, merged, shadow, mined, "fine-tuning")[1]
    assert (
        d.strength == 1
        and d.log["strength_rule"] == {}
        and d.log["knob"] == "learning-rate factor"
        and d.log["passes"] == 128
    )


@pytest.mark.parametrize(
    "method", ["LFPM", "fine-tuning", "fine-tuning-clean", "SAU", "IBVS", "ANP"]
)
def test_strength_0_is_the_merged_model(pico, merged, shadow, mined, method):
    "For SAM, ASAM and PAM it is fine-tuning: see test_baselines."
    assert same(
        train_defence(method, merged, pico, shadow, mined[0]["p"], S, strength=0)[0], merged
    )


@METHODS
@pytest.mark.parametrize("bad", [-0.1, 11, "much", float("nan"), None, [1]])
def test_a_strength_out_of_range_is_refused_before_any_work(
    pico, merged, shadow, monkeypatch, method, bad
):
    monkeypatch.setattr(D, "stage_one", None)
    k = knobs[method]
    with pytest.raises(ValueError, match="expected 'default', 'rule' or ") as e:
        defend(method, merged, pico, shadow, strengths=S, strength=bad)
    assert repr(bad) in str(
        e.value
    ) and f"{method}'s {k.name}, a number in {list(k.within)}" in str(e.value)


def test_a_defence_without_a_knob_runs_and_takes_no_strength(pico, merged, shadow, mined):
    try:

        @defences.register("shrink", long="x")
        def shrink(merged, clip, shadow, p, s, seed):
            return {k: 0.9 * v for k, v in merged.items()}, dict(loss=[])

        _, d = run(pico, merged, shadow, mined, "shrink")
        assert d.strength is None and d.log["knob"] is None and d.log["passes"] == 0
        for bad in (1.0, "rule"):
            with pytest.raises(ValueError, match="shrink has no strength, got .*; use 'default'"):
                run(pico, merged, shadow, mined, "shrink", bad)
    finally:
        defences.pop("shrink", None)


def test_a_defence_that_returns_a_broken_model_is_stopped(pico, merged, shadow, mined):
    try:

        @defence("bad", knob="x", grid=(1.0, 2.0, 3.0), within=(0.0, 5.0), long="x")
        def bad(merged, clip, shadow, p, s, seed, strength: float = 2.0):
            return {k: v * float("nan") for k, v in merged.items()}, {}

        with pytest.raises(ValueError, match="the merged model and bad's.*NaN"):
            run(pico, merged, shadow, mined, "bad")
    finally:
        defences.pop("bad", None)
        knobs.pop("bad", None)


@pytest.mark.parametrize("epochs, half", [(1, 1), (2, 1), (3, 1), (5, 2)])
def test_half_length(epochs, half):
    assert halved(replace(S, epochs=epochs)) == replace(S, epochs=half)


@METHODS
def test_half_length_halves_the_steps_of_every_method(pico, merged, shadow, mined, method):
    few, s = Shadow(shadow.x[:48], shadow.y[:48], shadow.W, 16), replace(S, epochs=2)
    whole, half = (
        train_defence(method, merged, pico, few, mined[0]["p"], s, half=h)[1] for h in (False, True)
    )
    once = 16 if method == "SAU" else 0  # the frozen model is asked about 48 images once
    assert len(whole["loss"]) == 2 * len(half["loss"]) == 4 and whole[
        "passes"
    ] - once == pytest.approx(2 * (half["passes"] - once), abs=2)


def test_passes_are_counted_by_gradient(pico, shadow):
    v, x = pico.with_state(pico.state()), pico.normalise(shadow.x[:6])
    from lfpm_nb.clip import encode

    p = torch.zeros(2, 64, requires_grad=True)
    for x_, p_, want in ((x, None, 2), (x, p, 6), (x, p.detach(), 2)):
        with counting(pico) as n:
            encode(v, x_, p_)
        assert n["passes"] == pytest.approx(want)
    v.requires_grad_(True)
    with counting(pico) as n:
        encode(v, x)
        encode(v, x)
    encode(v, x)
    assert n["passes"] == 12, "each image once for each pass, none after the end"
    with counting(pico) as n, torch.no_grad():
        encode(v, x)
    assert n["passes"] == pytest.approx(2)


# --- the strength rule --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, floor, want",
    [
        ([(0.9, 2.0), (0.89, 1.0), (0.8, 0.5)], 0.88, 1),
        ([(0.9, 2.0), (0.8, 0.5)], 0.88, 0),
        ([(0.7, 2.0), (0.8, 9.0), (0.6, 0.1)], 0.88, 1),
        ([(0.9, 1.0), (0.95, 1.0)], 0.88, 0),
        ([(0.8, 1.0), (0.8, 0.5)], 0.9, 0),
        ([(0.5, 3.0)], 0.9, 0),
    ],
)
def test_prefer(rows, floor, want):
    tried = [dict(accuracy=a, prompted=l) for a, l in rows]
    assert prefer(tried, floor) is tried[want]


def test_the_rule_is_choose_lam_then_two_points_then_the_prompts(pico, merged, shadow, mined):
    "Every number it reports, computed again."
    from lfpm_nb.path import choose_lam

    p, ends = mined[0]["p"], {0.5: near(pico, 2), 1.0: near(pico, 3), 2.0: near(pico, 4)}
    got = choose_strength(pico, merged, ends, shadow, p)
    for t, (v, end) in zip(got["tried"], ends.items(), strict=True):
        rule = choose_lam(pico, merged, end, shadow, p)
        at = pico.with_state(lerp(merged, end, rule["lam"]))
        assert (t["strength"], t["lam"]) == (v, rule["lam"]) and t["accuracy"] == accuracy(
            pico, at, shadow
        )
        assert t["prompted"] == next(
            c["prompted"] for c in rule["curve"] if c["lam"] == rule["lam"]
        )
    assert got["floor"] == pytest.approx(
        accuracy(pico, pico.with_state(merged), shadow) - 0.02, abs=1e-6
    )
    assert got["strength"] == prefer(got["tried"], got["floor"])[
        "strength"
    ] and got == choose_strength(pico, merged, ends, shadow, p)
    flipped = Shadow(
        torch.cat([255 - shadow.train[0], shadow.check[0]]),
        torch.cat([shadow.train[1].flip(0), shadow.check[1]]),
        shadow.W,
        shadow.held,
    )
    assert choose_strength(pico, merged, ends, flipped, p) == got, (
        "training images take no part in the choice"
    )


class Still:
    def __init__(self, *_):
        pass

    def at(self, lam):
        return None


def test_at_most_two_points_includes_exactly_two(pico, merged, shadow, mined, monkeypatch):
    right = iter([0.88, 0.879, 0.9, 0.9])
    monkeypatch.setattr(D, "accuracy", lambda *a: next(right))
    monkeypatch.setattr(
        D.Lookout,
        "choose",
        lambda self, end, rule: dict(lam=0.5, curve=[dict(lam=0.5, prompted=end["loss"])]),
    )
    monkeypatch.setattr(D, "Path", Still)
    ends = {1.0: dict(loss=0.2), 2.0: dict(loss=0.1), 3.0: dict(loss=0.3)}
    assert choose_strength(pico, merged, ends, shadow, mined[0]["p"])["strength"] == 1.0


@METHODS
def test_the_rule_trains_three_halves_and_one_whole(
    pico, merged, shadow, mined, method, monkeypatch
):
    seen, real, s = [], D.train_defence, replace(S, epochs=2)
    few = Shadow(
        torch.cat([shadow.x[:32], shadow.check[0]]),
        torch.cat([shadow.y[:32], shadow.check[1]]),
        shadow.W,
        shadow.held,
    )
    monkeypatch.setattr(
        D, "train_defence", lambda *a, **k: seen.append((a[-1], k)) or real(*a, **k)
    )
    monkeypatch.setattr(
        D.Lookout,
        "choose",
        lambda *a: dict(lam=1.0, curve=[dict(lam=1.0, clean=1.0, prompted=1.0)]),
    )
    model, d = defend(method, merged, pico, few, strengths=s, mined=mined, strength="rule")
    r, grid = d.log["strength_rule"], knobs[method].grid
    assert seen == [(v, dict(half=True)) for v in grid] + [(d.strength, {})] and d.strength in grid
    assert (
        r["rule"] == "choose_strength"
        and r["epochs"] == 1
        and [t["strength"] for t in r["tried"]] == list(grid)
        and all(n > 0 for n in r["passes"])
    )
    assert (
        d.strength == r["strength"] == prefer(r["tried"], r["floor"])["strength"]
        and d.log["knob"] == knobs[method].name
        and d.log["passes"] > max(r["passes"])
    )
    assert same(d.end, real(method, merged, pico, few, mined[0]["p"], s, 0, d.strength)[0])
    json.dumps(d.log)


# --- what a defence may know --------------------------------------------------------------------

FORBIDDEN = {
    "trigger",
    "target",
    "target_class",
    "suite",
    "task",
    "tasks",
    "adversary",
    "poisoned",
    "patch",
    "attack",
}


def test_no_defence_is_given_anything_about_the_attack():
    from lfpm_nb.path import choose_lam

    assert (
        set(defences)
        == set(knobs)
        == {
            "LFPM",
            "fine-tuning",
            "fine-tuning-clean",
            "SAM",
            "ASAM",
            "PAM",
            "SAM-prompt",
            "PAM-prompt",
            "IBVS",
            "SAU",
            "ANP",
            "AWM",
        }
    )
    for f in (
        defend,
        train_defence,
        choose_strength,
        choose_lam,
        stage_one,
        *(m["f"] for m in defences.values()),
    ):
        assert not FORBIDDEN & {p.lower() for p in inspect.signature(f).parameters}, f.__name__
    names = {
        n
        for m in (
            D,
            baselines,
            __import__("lfpm_nb.antibackdoor").antibackdoor,
            __import__("lfpm_nb.subspace").subspace,
        )
        for n in vars(m)
    }
    assert not {"Trigger", "Target", "Suite", "load_task", "attack", "measure"} & names, (
        "the defence's modules do not import the attack or the tests"
    )


TINY = dict(
    n_train=48,
    n_test=24,
    n_target=36,
    epochs=1,
    batch=32,
    trigger_steps=2,
    shadow_n=64,
    held=64,
    A=True,
    prompt_steps=2,
    semantic=[1.0, 3.0],
    anti_epochs=1,
    anti_batch=32,
)
EVALUATORS = [
    {},
    dict(target_class="stop"),
    dict(target="flags", target_class="Japan"),
    dict(adversary="land"),
    dict(side=4, attack="badnets"),
    dict(n_target=20, path_n=8, lam_n=3),
]


def test_lam_and_strengths_do_not_depend_on_the_evaluator(pico, merged, tmp_path, monkeypatch):
    "The same merged model; other trigger, target, target class or poisoned task in the evaluator."
    monkeypatch.setattr(E, "load_clip", lambda name: pico)
    alone, shared = [], Stages(tmp_path / "shared")
    for i, change in enumerate(EVALUATORS):
        lab = Lab(MainParams(**{**TINY, **change}), Stages(tmp_path / str(i)))
        lab.poisoned, lab.suite  # the evaluator exists before the defence runs
        model, d = lab.defended("LFPM", merged)
        alone.append(
            (
                d.lam,
                d.rule,
                asdict(lab.P.strengths),
                {
                    k: v
                    for k, v in d.log.items()
                    if k not in ("seconds", "cpu_seconds", "peak_mb", "stage1_peak_mb")
                },
                model,
            )
        )
        assert [n for n, _, reused in lab.stages.log if not reused][-3:] == [
            "stage1",
            "defend-LFPM",
            "lam",
        ], "computed anew"
        Lab(MainParams(**{**TINY, **change}), shared).defended("LFPM", merged)
    assert isinstance(alone[0][3]["rank"], int) and isinstance(alone[0][3]["rho"], float), (
        "strengths are chosen by rule"
    )
    for other in alone[1:]:
        assert other[:4] == alone[0][:4] and same(other[4], alone[0][4])
    for stage in ("defend-LFPM", "lam"):
        assert [r for n, _, r in shared.log if n == stage] == [False] + [True] * (
            len(EVALUATORS) - 1
        ), "the cache key holds nothing of the evaluator either"


@pytest.mark.parametrize("strength, trained", [("default", set()), ("rule", {"defend-LFPM"})])
def test_another_rule_for_lam_trains_nothing_unless_candidates_were_judged_by_it(
    pico, merged, tmp_path, monkeypatch, strength, trained
):
    monkeypatch.setattr(E, "load_clip", lambda name: pico)
    got, stages = {}, Stages(tmp_path)
    for lam in ("knee", "level", "0.5"):
        lab, done = Lab(MainParams(**TINY, strength=strength, lam=lam), stages), len(stages.log)
        got[lam] = lab.defended("LFPM", merged)[1]
        anew = {n for n, _, reused in stages.log[done:] if not reused}
        assert anew - {"lam"} == {
            "knee": {"stage1", "defend-LFPM"},
            "level": trained,
            "0.5": set(),
        }[lam] and ("lam" in anew) <= (lam != "0.5"), (lam, anew)
    assert (
        got["knee"].rule["rule"] == "knee"
        and got["level"].rule["rule"] == "level"
        and (got["0.5"].lam, got["0.5"].rule) == (0.5, {})
    )
    for d in got.values():
        assert (
            d.log["rank"] == got["knee"].log["rank"]
            and d.strength is not None
            and d.log["seconds"] > 0
        )
    if strength == "default":
        curves = [got[by].rule["curve"] for by in ("knee", "level")]
        assert same(got["knee"].end, got["level"].end) and all(a == b for a, b in zip(*curves)), (
            "each as far as its rule reads"
        )


def test_the_rule_sees_held_out_images_and_the_merged_model(pico, merged, shadow, mined):
    "It is a function of its inputs: the same again, and nothing global."
    from lfpm_nb.path import choose_lam

    _, d = defend("LFPM", merged, pico, shadow, strengths=S, mined=mined)
    one, again = (choose_lam(pico, merged, d.end, shadow, mined[0]["p"]) for _ in range(2))
    assert one == again == d.rule and one["lam"] == d.lam
    flipped = Shadow(
        torch.cat([255 - shadow.train[0], shadow.check[0]]),
        torch.cat([shadow.train[1].flip(0), shadow.check[1]]),
        shadow.W,
        shadow.held,
    )
    assert choose_lam(pico, merged, d.end, flipped, mined[0]["p"]) == one, (
        "training images take no part in the choice"
    )


def test_poisoned_checkpoints_say_so(pico, tmp_path, monkeypatch):
    monkeypatch.setattr(E, "load_clip", lambda name: pico)
    lab = Lab(MainParams(**TINY), Stages(tmp_path))
    lab.poisoned, lab.contributor("letters")
    files = list(tmp_path.rglob("*.safetensors"))
    poisoned = [p for p in files if "poisoned" in p.name]
    assert (
        len(files) == 2
        and len(poisoned) == 1
        and {p: load_state(p)[1]["poisoned"] for p in files}
        == {p: str(p in poisoned) for p in files}
    )
