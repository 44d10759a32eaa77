"""Seeds and methods are named before they are used.

No shipped result on a seed that its register does not know, no experiment that grows by itself."""

import json
from pathlib import Path

import pytest
import yaml

from lfpm_nb.runs import experiments, presets

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
STATES = ("burnt", "reserved", "free")


def register() -> dict:
    "{preset: [{seeds, state, for, results}]}."
    return yaml.safe_load((ROOT / "data" / "seeds.yaml").read_text(encoding="utf-8"))


def problems(register: dict, shipped: list[tuple[str, str, int]]) -> list[str]:
    "What a register and the shipped (experiment, preset, seed) say against each other."
    bad, known = [], {}
    for preset, rows in register.items():
        for row in rows:
            if row["state"] not in STATES:
                bad.append(
                    f"{preset} {row['seeds']}: state {row['state']!r}; expected one of"
                    f" {', '.join(STATES)}"
                )
            if row["state"] != "burnt" and row["results"]:
                bad.append(
                    f"{preset} {row['seeds']} is {row['state']} and has results: it is burnt"
                )
            for seed in row["seeds"]:
                if (preset, seed) in known:
                    bad.append(f"{preset} seed {seed} is listed twice")
                known[preset, seed] = row
    for name, preset, seed in shipped:
        row = known.get((preset, seed))
        if row is None or name not in row["results"]:
            state = row["state"] if row else "not listed"
            bad.append(
                f"{name} has a result of {preset} seed {seed}, which is {state}: enter it in"
                " data/seeds.yaml before it is looked at"
            )
    for (preset, seed), row in known.items():
        bad += [
            f"{preset} seed {seed}: no result of {n} is shipped"
            for n in row["results"]
            if (n, preset, seed) not in shipped
        ]
    return bad


def shipped() -> list[tuple[str, str, int]]:
    found = [
        (f.parent.parent.name, json.loads(f.read_text(encoding="utf-8")))
        for f in sorted(RESULTS.glob("*/*/status.json"))
    ]
    return [(name, s["preset"], s["seed"]) for name, s in found]


def test_every_shipped_result_is_of_a_registered_seed():
    assert len(shipped()) > 40 and problems(register(), shipped()) == []


@pytest.mark.parametrize(
    "name, preset, seed, why",
    [
        ("main", "lab", 20, "which is reserved"),
        ("main", "lab", 99, "not listed"),
        ("rivals", "lab", 5, "which is burnt"),
        ("main", "tiny", 0, "not listed"),
    ],
)
def test_another_seed_is_found(name, preset, seed, why):
    assert any(
        why in p and f"seed {seed}" in p
        for p in problems(register(), [*shipped(), (name, preset, seed)])
    )


def test_a_register_contradicts_itself():
    r = register()
    r["lab"].append(dict(seeds=[20], state="fresh", results=["main"]))
    found = " | ".join(problems(r, shipped()))
    assert (
        "listed twice" in found
        and "state 'fresh'" in found
        and "no result of main is shipped" in found
        and "it is burnt" in found
    )


def test_the_notebook_shows_the_register():
    nb = json.loads((ROOT / "nbs" / "choices.ipynb").read_text(encoding="utf-8"))
    shown = "".join(
        "".join(o.get("data", {}).get("text/markdown", []))
        for c in nb["cells"]
        for o in c.get("outputs", [])
    )
    for rows in register().values():
        for row in rows:
            assert (
                f"| {', '.join(map(str, row['seeds']))} | {row['state']} | {row['for']} |" in shown
            ), "run nbs/choices.ipynb again"


# --- methods ------------------------------------------------------------------------------------


def test_no_shipped_experiment_says_all():
    "A method registered tomorrow must not enter old tables; `all` is for the command line."
    sweeps = [
        yaml.safe_load(f.read_text(encoding="utf-8"))
        for f in sorted((ROOT / "data" / "sweeps").glob("*.yaml"))
    ]
    named = {n: [e.parameters, *presets(e).values()] for n, e in experiments().items()} | {
        s["title"]: [r for r in s["runs"] if isinstance(r, dict)] for s in sweeps
    }
    for name, parts in named.items():
        assert "all" not in words(parts), (
            f"{name} says `all`: name its methods, in the order of the registry"
        )


def words(x) -> list:
    "Every value in nested lists and dicts."
    if isinstance(x, dict):
        return words(list(x.values()))
    return [w for v in x for w in words(v)] if isinstance(x, list) else [x]


def test_words():
    assert words([{"a": ["x", "all"]}, {"b": {"c": 1}}]) == ["x", "all", 1]
