"""Lessons run top to bottom on few pictures, have the promised form, and their folded answers pass
their checks; known mistakes get their own hints."""

import importlib
import json
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


def text(path):
    return "\n".join(
        "".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
    )


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_form(path):
    words, cells = text(path), json.loads(path.read_text(encoding="utf-8"))["cells"]
    for need in (
        "**You will be able to**",
        "**Time:**",
        "**You need:**",
        "## Summary",
        "**Next:**",
        "recorded",
    ):
        assert need in words, need
    assert (
        len(re.findall(r"^## Exercise \d \(\w+, \d+ minutes\)", words, re.M)) >= 2
        and words.count("<details>") >= 2
    )
    assert (
        sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) >= 2
    ), "figures are committed"
    assert len(re.findall(r"^\d\. ", words[words.index("## Summary") :], re.M)) == 5, (
        "a summary of five lines"
    )


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_runs_on_few_pictures(path, tmp_path, monkeypatch):
    for k, v in dict(
        LFPM_LESSON="tiny",
        LFPM_RUNS=str(tmp_path),
        LFPM_CACHE=str(tmp_path / "cache"),
        PYTHONPATH=str(ROOT),
    ).items():
        monkeypatch.setenv(k, v)
    nb = nbformat.read(path, 4)
    nbclient.NotebookClient(
        nb,
        timeout=120,
        startup_timeout=120,
        kernel_name="python3",
        store_widget_state=False,
        resources=dict(metadata=dict(path=str(tmp_path))),
    ).execute()


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_folded_answers_pass(path, capsys):
    answers = re.findall(r"<details>.*?```python\n(.*?)```", text(path), re.S)
    assert len(answers) >= 2
    for answer in answers:
        exec(answer, dict(torch=torch, checks=checks))
    assert capsys.readouterr().out.count("passed: ") == len(answers)


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_every_known_mistake_gets_its_own_hint(name):
    check, hints = CHECKS[name], set()
    for case in check.cases():
        judge(lambda *_: case.right, case)
        for hint, value in case.wrong.items():
            with pytest.raises(Hint) as e:
                judge(lambda *_: value, case)
            assert str(e.value) == next(
                h for h, v in case.wrong.items() if same(value, v, case.tol)
            )
            hints.add(str(e.value))
    assert len(hints) >= 2, "two different mistakes, two different hints"


@pytest.mark.parametrize(
    "name, wrong, why",
    [
        ("inside", lambda U, v: (v @ U).norm(dim=1) / v.norm(dim=1), "share of the length"),
        (
            "inside",
            lambda U, v: (v - v @ U @ U.T).square().sum(1) / v.square().sum(1),
            "lies outside",
        ),
        ("worst_step", lambda p, g, rho: p - rho * p.norm() * g / g.norm(), "you went down"),
        ("worst_step", lambda p, g, rho: p + rho * g / g.norm(), "in units of the prompt's length"),
    ],
)
def test_wrong_functions_get_the_intended_hint(name, wrong, why):
    with pytest.raises(Hint, match=why):
        CHECKS[name](wrong)


def test_other_answers_are_told_what_was_expected():
    case = Case((torch.tensor([1.0, 2.0]),), torch.tensor([2.0, 4.0]), by_hand="1 + 1")
    for f, why in (
        (lambda x: None, "returns nothing"),
        (lambda x: x * 3, "by hand: 1 \\+ 1"),
        (lambda x: x[:1], "shape"),
        (lambda x: 1 / 0, "ZeroDivisionError"),
        (lambda x: x.mul_(2), "in place"),
    ):
        with pytest.raises(Hint, match=why):
            judge(f, case)


def test_a_mistake_that_gives_the_right_result_is_refused():
    with pytest.raises(ValueError, match="choose inputs"):
        Case((1.0,), 2.0, {"no mistake": 2.0})


# --- lessons 6 to 8, notation -------------------------------------------------------------------

WRONG = {
    "the points' mean": (
        "path_asr",
        lambda lams, asr: sum(asr) / len(asr),
        "ends have a path on one side only",
    ),
    "lowest loss": (
        "lam_rule",
        lambda lams, loss, least: lams[loss.index(min(loss))],
        "you took the lowest loss",
    ),
    "never looks": ("defence_contract", lambda before, after, end: True, "a tensor is missing"),
    "only keys": (
        "defence_contract",
        lambda before, after, end: before.keys() == end.keys(),
        "changed its shape",
    ),
    "down": (
        "sam_point",
        lambda w, g, rho: {
            k: w[k] - rho * g[k] / torch.cat([v.flatten() for v in g.values()]).norm() for k in w
        },
        "you went down",
    ),
    "no angle": ("coupling", lambda h, refs: 1 - (h @ refs.mean(0)).mean(), "dot product"),
    "zeros": (
        "drop_largest",
        lambda merged, pre, share: {
            k: torch.where((merged[k] - pre[k]).abs() > 2.5, 0.0, merged[k]) for k in merged
        },
        "pretrained",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_function_gets_the_hint_that_fits(name):
    check, f, hint = WRONG[name]
    with pytest.raises(Hint, match=hint):
        CHECKS[check](f)


def rows_of(page, heading):
    return [
        [v.strip() for v in r.strip("| ").split(" | ")]
        for r in page[page.index(heading) :].split("\n\n")[1].splitlines()[2:]
        if r.startswith("| ")
    ]


def test_notation_and_glossary_name_what_exists():
    page = text(ROOT / "nbs" / "lessons" / "notation.ipynb")
    notation, glossary = rows_of(page, "## Notation"), rows_of(page, "## Glossary")
    assert (
        len(notation) >= 20
        and len(glossary) >= 40
        and len({r[0] for r in glossary}) == len(glossary)
    )
    for *_, library, lessons in notation + glossary:
        for name in re.findall(r"`([\w.]+)`", library):
            module, *parts = name.split(".")
            at = importlib.import_module(f"lfpm_nb.{module}")
            for p in parts:
                assert hasattr(at, p), f"{name} is not in the library"
                at = getattr(at, p)
        assert set(re.findall(r"\d+", lessons)) and set(re.findall(r"\d+", lessons)) <= set(
            "12345678"
        )
    for words, *_, lessons in glossary:
        said = [text(p).lower() for p in LESSONS if p.name[0] in lessons]
        for word in words.lower().split(", "):
            assert all(word in t for t in said), f"{word!r} is not in lesson {lessons}"


def test_lesson_8_leaves_the_registry_as_it_was():
    code = text(ROOT / "nbs" / "lessons" / "8_break_it.ipynb")
    assert (
        code.index("patch.dict")
        < code.index("@defence(")
        < code.rindex("@defence(")
        < code.index("scope.close()")
    )
