"""Lessons run top to bottom on few pictures, have the promised form, and their folded answers pass their checks; known mistakes get their own hints."""
import json
import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch

from lfpm_nb import checks
from lfpm_nb.checks import CHECKS, Case, Hint, judge, same

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "nbs" / "lessons").glob("[0-9]_*.ipynb"))


def text(path): return "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"])


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_form(path):
    words, cells = text(path), json.loads(path.read_text(encoding="utf-8"))["cells"]
    for need in ("**You will be able to**", "**Time:**", "**You need:**", "## Summary", "**Next:**", "recorded"): assert need in words, need
    assert len(re.findall(r"^## Exercise \d \(\w+, \d+ minutes\)", words, re.M)) >= 2 and words.count("<details>") >= 2
    assert sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) >= 2, "figures are committed"
    assert len(re.findall(r"^\d\. ", words[words.index("## Summary"):], re.M)) == 5, "a summary of five lines"


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_runs_on_few_pictures(path, tmp_path, monkeypatch):
    for k, v in dict(LFPM_LESSON="tiny", LFPM_RUNS=str(tmp_path), LFPM_CACHE=str(tmp_path / "cache"), PYTHONPATH=str(ROOT)).items(): monkeypatch.setenv(k, v)
    nb = nbformat.read(path, 4)
    nbclient.NotebookClient(nb, timeout=120, startup_timeout=120, kernel_name="python3", store_widget_state=False, resources=dict(metadata=dict(path=str(tmp_path)))).execute()


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_folded_answers_pass(path, capsys):
    answers = re.findall(r"<details>.*?```python\n(.*?)```", text(path), re.S)
    assert len(answers) >= 2
    for answer in answers: exec(answer, dict(torch=torch, checks=checks))
    assert capsys.readouterr().out.count("passed: ") == len(answers)


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_every_known_mistake_gets_its_own_hint(name):
    check, hints = CHECKS[name], set()
    for case in check.cases():
        judge(lambda *_: case.right, case)
        for hint, value in case.wrong.items():
            with pytest.raises(Hint) as e: judge(lambda *_: value, case)
            assert str(e.value) == next(h for h, v in case.wrong.items() if same(value, v, case.tol))
            hints.add(str(e.value))
    assert len(hints) >= 2, "two different mistakes, two different hints"


@pytest.mark.parametrize("name, wrong, why", [
    ("inside", lambda U, v: (v @ U).norm(dim=1) / v.norm(dim=1), "share of the length"),
    ("inside", lambda U, v: (v - v @ U @ U.T).square().sum(1) / v.square().sum(1), "lies outside"),
    ("worst_step", lambda p, g, rho: p - rho * p.norm() * g / g.norm(), "you went down"),
    ("worst_step", lambda p, g, rho: p + rho * g / g.norm(), "in units of the prompt's length")])
def test_wrong_functions_get_the_intended_hint(name, wrong, why):
    with pytest.raises(Hint, match=why): CHECKS[name](wrong)


def test_other_answers_are_told_what_was_expected():
    case = Case((torch.tensor([1., 2.]),), torch.tensor([2., 4.]), by_hand="1 + 1")
    for f, why in ((lambda x: None, "returns nothing"), (lambda x: x * 3, "by hand: 1 \\+ 1"), (lambda x: x[:1], "shape"), (lambda x: 1 / 0, "ZeroDivisionError"),
                   (lambda x: x.mul_(2), "in place")):
        with pytest.raises(Hint, match=why): judge(f, case)


def test_a_mistake_that_gives_the_right_result_is_refused():
    with pytest.raises(ValueError, match="choose inputs"): Case((1.,), 2., {"no mistake": 2.})
