"""A defence sees the merged model, the pretrained one and the shadow set; its model lies on the path at the lambda it reports."""
import inspect
import json
from dataclasses import asdict, replace

import pytest
import torch

from conftest import near
from lfpm_nb import defend as D
from lfpm_nb import experiment as E
from lfpm_nb.antibackdoor import Strengths, stage_one
from lfpm_nb.core import Stages, load_state
from lfpm_nb.defend import Defended, defences, defend
from lfpm_nb.experiment import Lab, MainParams
from lfpm_nb.path import lerp
from lfpm_nb.subspace import Shadow

S = Strengths(rank=4, rho=.1, prompt_length=3, prompt_steps=2, semantic=(1., 3.), epochs=1, batch=16, lr=1e-3, points=4)
METHODS = pytest.mark.parametrize("method", sorted(defences))


@pytest.fixture(scope="module")
def shadow(pico): return Shadow.of(pico, 64, 64, seed=0)


@pytest.fixture(scope="module")
def merged(pico): return near(pico, 1)


@pytest.fixture(scope="module")
def mined(pico, merged, shadow): return stage_one(pico, merged, shadow, S, 0)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@METHODS
@pytest.mark.parametrize("lam", ["rule", 0.3, 0, 1, "0.25"])
def test_the_model_lies_on_the_path_at_lam(pico, merged, shadow, mined, method, lam):
    before = {k: v.clone() for k, v in merged.items()}
    model, d = defend(method, merged, pico, shadow, lam=lam, strengths=S, mined=mined)
    assert isinstance(d, Defended) and 0 <= d.lam <= 1 and same(model, lerp(merged, d.end, d.lam)) and same(merged, before) and not same(d.end, merged)
    if lam == "rule": assert d.rule
    else: assert d.lam == float(lam) and d.rule == {}
    json.dumps([d.rule, d.log])                                         # what is kept with the stage
    if d.lam == 0: assert same(model, merged)
    if d.lam == 1: assert same(model, d.end)


@METHODS
def test_stage_one_is_made_when_it_is_not_given(pico, merged, shadow, mined, method):
    given, own = (defend(method, merged, pico, shadow, strengths=S, mined=m) for m in (mined, None))
    assert same(given[0], own[0]) and given[1].lam == own[1].lam and given[1].rule == own[1].rule


def test_methods_differ_and_fine_tuning_is_lfpm_without_worst_case_and_path(pico, merged, shadow, mined):
    run = lambda m, s: defend(m, merged, pico, shadow, lam=1., strengths=s, mined=mined)[1].end
    plain = run("fine-tuning", S)
    assert not same(plain, run("LFPM", S)) and same(plain, run("LFPM", replace(S, B=False, C=False)))
    assert same(plain, run("Fine-tuning on the shadow set", replace(S, gamma=3., rho=2., interval=(0., 1.)))), "long names work; LFPM's strengths do not reach it"


@pytest.mark.parametrize("lam", [-0.1, 1.5, "2", float("nan"), "often", None])
def test_lam_outside_is_refused_before_any_work(pico, merged, shadow, monkeypatch, lam):
    for f in ("stage_one", "choose_lam"): monkeypatch.setattr(D, f, None)
    with pytest.raises(ValueError, match=r"expected 'rule' or a number in \[0, 1\]"): defend("LFPM", merged, pico, shadow, lam=lam, strengths=S)


def test_bad_models_and_names_are_refused_before_any_work(pico, merged, shadow, monkeypatch):
    monkeypatch.setattr(D, "stage_one", None)
    for bad, message in (({**merged, "proj": merged["proj"] * float("nan")}, "this backbone and the merged model.*NaN"),
                         ({k: v for k, v in merged.items() if k != "proj"}, "proj only in the first")):
        with pytest.raises(ValueError, match=message): defend("LFPM", bad, pico, shadow, strengths=S)
    with pytest.raises(ValueError, match="unknown defence 'LFMP'; did you mean 'LFPM'"): defend("LFMP", merged, pico, shadow)


# --- what a defence may know -----------------------------------------------------------------------------------------------

FORBIDDEN = {"trigger", "target", "target_class", "suite", "task", "tasks", "adversary", "poisoned", "patch", "attack"}


def test_no_defence_is_given_anything_about_the_attack():
    from lfpm_nb.path import choose_lam
    for f in (defend, choose_lam, stage_one, *(m["f"] for m in defences.values())):
        assert not FORBIDDEN & {p.lower() for p in inspect.signature(f).parameters}, f.__name__
    names = {n for m in (D, __import__("lfpm_nb.antibackdoor").antibackdoor, __import__("lfpm_nb.subspace").subspace) for n in vars(m)}
    assert not {"Trigger", "Target", "Suite", "load_task", "attack", "measure"} & names, "the defence's modules do not import the attack or the tests"


TINY = dict(n_train=48, n_test=24, n_target=36, epochs=1, batch=32, trigger_steps=2, shadow_n=64, held=64, A=True, prompt_steps=2, semantic=[1., 3.], anti_epochs=1, anti_batch=32)
EVALUATORS = [{}, dict(target_class="stop"), dict(target="flags", target_class="Japan"), dict(adversary="land"), dict(side=4, attack="badnets"), dict(n_target=20, path_n=8, lam_n=3)]


def test_lam_and_strengths_do_not_depend_on_the_evaluator(pico, merged, tmp_path, monkeypatch):
    "The same merged model; other trigger, target, target class or poisoned task in the evaluator."
    monkeypatch.setattr(E, "load_clip", lambda name: pico)
    alone, shared = [], Stages(tmp_path / "shared")
    for i, change in enumerate(EVALUATORS):
        lab = Lab(MainParams(**{**TINY, **change}), Stages(tmp_path / str(i)))
        lab.poisoned, lab.suite                                          # the evaluator exists before the defence runs
        model, d = lab.defended("LFPM", merged)
        alone.append((d.lam, d.rule, asdict(lab.P.strengths), {k: v for k, v in d.log.items() if k != "seconds"}, model))
        assert [n for n, _, reused in lab.stages.log if not reused][-2:] == ["stage1", "defend-LFPM"], "computed anew"
        Lab(MainParams(**{**TINY, **change}), shared).defended("LFPM", merged)
    assert isinstance(alone[0][3]["rank"], int) and isinstance(alone[0][3]["rho"], float), "strengths are chosen by rule"
    for other in alone[1:]: assert other[:4] == alone[0][:4] and same(other[4], alone[0][4])
    assert [r for n, _, r in shared.log if n == "defend-LFPM"] == [False] + [True] * (len(EVALUATORS) - 1), "the cache key holds nothing of the evaluator either"


def test_the_rule_sees_held_out_images_and_the_merged_model(pico, merged, shadow, mined):
    "It is a function of its inputs: the same again, and nothing global."
    from lfpm_nb.path import choose_lam
    _, d = defend("LFPM", merged, pico, shadow, strengths=S, mined=mined)
    one, again = (choose_lam(pico, merged, d.end, shadow, mined[0]["p"]) for _ in range(2))
    assert one == again == d.rule and one["lam"] == d.lam
    flipped = Shadow(torch.cat([255 - shadow.train[0], shadow.check[0]]), torch.cat([shadow.train[1].flip(0), shadow.check[1]]), shadow.W, shadow.held)
    assert choose_lam(pico, merged, d.end, flipped, mined[0]["p"]) == one, "training images take no part in the choice"


def test_poisoned_checkpoints_say_so(pico, tmp_path, monkeypatch):
    monkeypatch.setattr(E, "load_clip", lambda name: pico)
    lab = Lab(MainParams(**TINY), Stages(tmp_path))
    lab.poisoned, lab.contributor("letters")
    files = list(tmp_path.rglob("*.safetensors"))
    poisoned = [p for p in files if "poisoned" in p.name]
    assert len(files) == 2 and len(poisoned) == 1 and {p: load_state(p)[1]["poisoned"] for p in files} == {p: str(p in poisoned) for p in files}
