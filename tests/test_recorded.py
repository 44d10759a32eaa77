"""The shipped lab.

What is read equals what was recorded, the rest is computed, and a broken folder is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from conftest import near
from lfpm_nb import path as P
from lfpm_nb import recorded as R
from lfpm_nb.core import Stages, proj_path
from lfpm_nb.experiment import Lab
from lfpm_nb.runs import settings_of
from lfpm_nb.recorded import Recorded, load_recorded, load_vector, record, save_vector

SHIPPED = proj_path("data", "recorded", "lab")


@pytest.fixture(scope="module")
def rec(tmp_path_factory):
    return Recorded(SHIPPED, tiny=True, stages=Stages(tmp_path_factory.mktemp("cache")))


def test_a_vector_survives_its_file(tmp_path, pico):
    base, theta = pico.state(), near(pico, 1)
    base["n"] = theta["n"] = torch.tensor(7)
    save_vector(tmp_path / "a.safetensors", theta, base, extra=torch.ones(2))
    back, also = load_vector(tmp_path / "a.safetensors", base)
    assert also.keys() == {"extra"} and back.keys() == theta.keys() and back["n"] == 7
    assert all(
        (back[k] - theta[k]).abs().max() <= (theta[k] - base[k]).abs().max() * 2**-11 + 1e-7
        for k in theta
        if k != "n"
    )


def test_a_vector_of_another_base_is_refused(tmp_path, pico, lab):
    save_vector(tmp_path / "a.safetensors", near(pico, 1), pico.state())
    with pytest.raises(ValueError, match="a.safetensors differ"):
        load_vector(tmp_path / "a.safetensors", lab.state())


def test_shipped_files_are_small_and_marked():
    files = list(SHIPPED.iterdir())
    assert sum(f.stat().st_size for f in files) <= 40e6
    from safetensors import safe_open

    for f in SHIPPED.glob("*.safetensors"):
        with safe_open(f, "pt") as s:
            assert (s.metadata() or {}).get("poisoned") in (None, str("poisoned" in f.stem))


def test_contributors_attack_and_merges(rec):
    bad, trigger, record = rec.poisoned["letters"]
    good = rec.contributor("letters")
    assert set(rec.models(True)) == set(rec.P.tasks) and any(
        not torch.equal(bad[k], good[k]) for k in good
    )
    assert trigger.patch.shape == (3, rec.P.side, rec.P.side) and record
    theta, _ = rec.merged("TA")
    by_hand = {
        k: b + rec.P.scale * sum(m[k] - b for m in rec.models(True).values())
        for k, b in rec.base.items()
    }
    assert all(torch.allclose(theta[k], by_hand[k], atol=1e-6) for k in theta)
    assert (
        rec.kind(theta) == "poisoned"
        and rec.kind(rec.merged("TA", False)[0]) == "clean"
        and rec.kind(rec.merged("SA")[0]) is None
    )


def test_recorded_defences_are_read_and_others_computed(rec, monkeypatch):
    asked = []
    monkeypatch.setattr(Lab, "defended", lambda self, name, theta: asked.append(name))
    monkeypatch.setattr(Lab, "mined", lambda self, theta: asked.append("stage1"))
    theta = rec.both["poisoned"]
    for name in ("LFPM", "fine-tuning", "SAM", "PAM"):
        state, d = rec.defended(name, theta)
        assert (
            0 < d.lam <= 1
            and d.rule["curve"]
            and all(
                torch.allclose(state[k], (1 - d.lam) * theta[k] + d.lam * d.end[k], atol=1e-6)
                for k in theta
            )
        )
    assert rec.mined(theta)[0]["p"].shape == (3, 10, 192) and asked == []
    rec.defended("IBVS", theta)
    rec.defended("LFPM", rec.base)
    rec.mined(rec.base)
    assert asked == ["IBVS", "LFPM", "stage1"]


def test_the_table_holds_every_recorded_method(rec):
    df = rec.recorded
    assert {
        "individual",
        "TA",
        "TA (clean)",
        "LFPM",
        "fine-tuning",
        "SAM",
        "PAM",
        "LFPM (clean)",
    } <= set(df.method)
    path = df[(df.kind == "path") & (df.task == "average") & (df.metric == "ASR_T")]
    assert (path.groupby("method").lam.nunique() == 21).all() and (path.n == 1050).all()
    at = lambda m, lam: path[(path.method == m) & (path.lam == lam)].value.item()
    model = (
        df[(df.kind == "model") & (df.task == "average") & (df.metric == "ASR_T")]
        .set_index("method")
        .value
    )
    assert at("LFPM", 0) == model["TA"] > 80 > 5 > model["TA (clean)"], (
        "the path starts at the merge"
    )


@pytest.mark.parametrize("name", ["LFPM", "PAM"])
def test_a_recorded_path_asked_where_it_bends_is_the_full_grid(rec, name, monkeypatch):
    asked, real = [], P.answer
    monkeypatch.setattr(
        P, "answer", lambda clip, v, x, W: asked.append(len(x)) or real(clip, v, x, W)
    )
    theta, few = rec.both["poisoned"], rec.suite.first(16)
    few = replace(
        few, tasks=[replace(t, test_x=t.test_x[:64], test_y=t.test_y[:64]) for t in few.tasks]
    )
    walk = lambda **given: (
        P.measure_path(rec.clip, theta, rec.defended(name, theta)[1].end, few, **given),
        sum(asked),
    )
    whole, full = walk(bend=torch.inf)
    rows, both = walk()
    assert rows == whole and both - full < 0.5 * full, (
        "the same table for less than half of the questions"
    )


def test_record_then_open(tmp_path, rec, monkeypatch):
    """A tiny lab is recorded, measured as written, and opens.

    The rounding changes no weight by more than fp16 of the step."""
    few = dict(
        n_train=64,
        n_test=24,
        n_target=48,
        shadow_n=64,
        held=24,
        prompt_steps=2,
        trigger_steps=2,
        lam_n=2,
        path_n=16,
    )
    P = settings_of("main", "tiny", dict(defences=["LFPM"], clean_defences=[], **few))
    lab = Lab(P, Stages(tmp_path / "cache"))
    folder = record(lab, tmp_path / "mine")
    mine = Recorded(folder, stages=lab.stages)
    theta, truth = mine.both["poisoned"], lab.merged("TA")[0]
    assert (
        all(torch.allclose(theta[k], truth[k], atol=1e-4) for k in theta)
        and mine.card["params"]["n_train"] == P.n_train
    )
    assert set(mine.recorded.method) >= {"TA", "LFPM"} and "seconds" not in set(mine.recorded.kind)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "mine"], (
        "no temporary folder stays"
    )

    monkeypatch.setattr(
        R, "_measure", lambda rec: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError):
        record(lab, tmp_path / "mine")
    assert Recorded(folder).card and sorted(p.name for p in tmp_path.iterdir()) == [
        "cache",
        "mine",
    ], "the old recording stays whole"


def test_broken_recordings(tmp_path):
    with pytest.raises(FileNotFoundError, match="lfpm record"):
        Recorded(tmp_path)
    with pytest.raises(ValueError, match="recorded lab"):
        load_recorded("labb2x")
    shutil.copytree(SHIPPED, tmp_path / "lab")
    card = json.loads((tmp_path / "lab" / "card.json").read_text(encoding="utf-8"))
    (tmp_path / "lab" / "card.json").write_text(
        json.dumps(card | dict(backbone="0" * 64)), encoding="utf-8"
    )
    with pytest.raises(ValueError, match="another backbone"):
        Recorded(tmp_path / "lab")
