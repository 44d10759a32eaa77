"""The benchmark's own parts.

The SAM step it compares with, memory counting, and reading a run's stages."""

import importlib.util
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from conftest import new_pico
from lfpm_nb.settings import MainParams


def load(name: str):
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    return load("foundation")


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(
        0, str(Path(__file__).parent.parent / "benchmarks")
    )  # gpu.py imports foundation.py, as it does when run as a script
    try:
        return load("gpu")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def two(bench, pico):
    return bench.Stage2(pico, MainParams(anti_batch=8))


def test_both_steps_move_theta_anti_only(two):
    for step in (two.lfpm, two.sam):
        before = [[p.detach().clone() for p in m.parameters()] for m in (two.mm, two.anti)]
        step()
        assert all(torch.equal(p, b) for p, b in zip(two.mm.parameters(), before[0])) and any(
            not torch.equal(p, b) for p, b in zip(two.anti.parameters(), before[1])
        )


def test_sam_descends_with_the_gradient_found_uphill(two, fp32):
    params, rho, lr = list(two.anti.parameters()), 0.5, two.opt.param_groups[0]["lr"]
    theta = [p.detach().clone() for p in params]
    g = torch.autograd.grad(two.loss(), params)
    norm = torch.stack([v.norm() for v in g]).norm()
    with torch.no_grad():
        for p, v in zip(params, g):
            p.add_(rho * v / norm)
    uphill, want = two.loss().item(), torch.autograd.grad(two.loss(), params)
    with torch.no_grad():
        for p, t in zip(params, theta):
            p.copy_(t)
    assert uphill > two.loss().item()
    two.opt.param_groups[0]["lr"] = 0.0
    two.sam(rho)
    two.opt.param_groups[0]["lr"] = lr
    scale = max(
        1.0, torch.stack([w.norm() for w in want]).norm().item()
    )  # the update cuts the norm to 1
    assert all(torch.allclose(p.grad, w / scale, atol=1e-4) for p, w in zip(params, want)) and all(
        torch.allclose(p, t, atol=1e-6) for p, t in zip(params, theta)
    )


def test_peak_memory_counts_what_lives_at_the_same_time(bench):
    def step(n=2**20):
        for _ in range(3):
            a = torch.zeros(n)
            del a  # 4 MiB, three times, one after the other
        b, c = torch.zeros(n), torch.zeros(n)  # 8 MiB together

    assert bench.peak_bytes(step, 100) == pytest.approx(8 * 2**20 + 100, rel=0.01)


def test_stage_seconds_of_a_run(bench, tmp_path):
    (tmp_path / "status.json").write_text(
        json.dumps(dict(state="done", seconds=9.0, preset="tiny", seed=0)), encoding="utf-8"
    )
    stage = lambda n, s, r: dict(name=n, seconds=s, reused=r)
    (tmp_path / "params.json").write_text(
        json.dumps(
            dict(
                stages=[
                    stage("a", 1.0, False),
                    stage("b", 2.0, False),
                    stage("a", 1.0, True),
                    stage("a", 3.0, False),
                ]
            )
        ),
        encoding="utf-8",
    )
    assert [(r[0], r[1]) for r in bench.stage_rows(tmp_path)][:3] == [
        ("stage: a", 4.0),
        ("stage: b", 2.0),
        ("stages together", 6.0),
    ]


# --- gpu.py -------------------------------------------------------------------------------------


def test_ratios_are_of_medians_of_rounds_and_goals_have_a_side(gpu):
    assert gpu.ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 1.0]}, "a", "b") == 3
    assert (
        gpu.verdict("LFPM / SAM, time", 1.4) == ("<= 1.4", True)
        and gpu.verdict("LFPM / SAM, time", 1.5)[1] is False
    )
    assert gpu.verdict("Stage II, share of the bf16 peak", 0.2)[1] is False and gpu.verdict(
        "blocks: LFPM / SAM, time", 99.0
    ) == ("-", True)


def test_every_round_takes_each_kind_once_in_turns(gpu):
    seen = []
    took = gpu.in_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2)
    assert "".join(seen) == "baabba" and [len(v) for v in took.values()] == [2, 2]


@pytest.mark.parametrize("precision", ["0", "1"], ids=["float32", "bfloat16"])
def test_computing_again_costs_work_and_saves_memory(gpu, monkeypatch, precision):
    """Counted, not timed: FLOPs and peak tensor memory of a step.

    Four blocks, because of its last block a tower computes the class token alone: of two blocks
    "towers" has little more than one alive at its peak, "blocks" one and a further input for
    each pass, and the kernels' scratch decides between them."""
    monkeypatch.setenv("LFPM_AMP", precision)
    two = gpu.Steps(new_pico(layers=4), 32)
    two.lfpm()
    two.sam()
    steps = {
        "nothing": two.lfpm,
        "towers": lambda: two.lean("towers"),
        "blocks": lambda: two.lean("blocks"),
    }

    def peak(step, *towers):
        two.mm.zero_grad()
        two.anti.zero_grad()
        return gpu.peak_bytes(step, gpu.held_bytes(two, towers))

    memory = {how: peak(step, two.mm, two.anti) for how, step in steps.items()}
    # by shapes alone 0.67 to 0.75 and 0.40 to 0.47; the rest is room for other kernels' scratch
    assert memory["blocks"] < 0.9 * memory["towers"] and memory["towers"] < 0.6 * memory["nothing"]
    assert memory["towers"] <= 1.3 * peak(two.sam, two.anti)
    work = {how: gpu.flops(step) for how, step in steps.items()}
    assert (
        work["nothing"] < work["blocks"] < 1.5 * work["nothing"]
        and work["nothing"] < work["towers"] < 1.5 * work["nothing"]
    ), "one more forward pass at most"


def test_the_table_says_what_was_missed(gpu, pico, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "random_clip", lambda name: pico)
    for goal, code in ((1e9, 0), (0.0, 1)):
        monkeypatch.setitem(gpu.GOALS, "21-point path / pure forward", ("<=", goal))
        monkeypatch.setattr(
            "sys.argv", ["gpu.py", "--parts", "path", "--images", "4", "--rounds", "1"]
        )
        assert gpu.main() == code
        assert ("missed" in capsys.readouterr().out) == bool(code)


# --- same_numbers.py ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compare():
    return load("same_numbers")


def table_file(path, **columns):
    "Two rows a method, with what every table has."
    rows = (
        dict(
            method=["TA", "LFPM"],
            kind="model",
            task="average",
            metric="CA",
            lam=float("nan"),
            value=[70.0, 74.0],
            seed=0,
        )
        | columns
    )
    pd.DataFrame(rows).to_parquet(path)
    return path


def test_equal_tables_are_equal_whatever_they_took(compare, tmp_path):
    a = table_file(tmp_path / "a", metric=["CA", "seconds"], value=[70.0, 1.0])
    d = compare.of_tables(
        a, table_file(tmp_path / "b", metric=["CA", "seconds"], value=[70.0, 2.0])
    )
    assert (d.numbers, d.different, d.largest, d.notes) == (2, 0, 0, set()), (
        "lam and value of one row; NaN is NaN"
    )
    d = compare.of_tables(
        a,
        table_file(
            tmp_path / "c", metric=["CA", "seconds"], value=[70.0, 1.0], precision="float32"
        ),
    )
    assert d.different == 0 and d.notes == {"column precision in one only"}


@pytest.mark.parametrize(
    "columns, different, largest",
    [
        (dict(value=[70.0, 74.0 + 2**-46]), 1, 2**-46),
        (dict(value=[-0.0, 74.0]), 1, 70.0),
        (dict(value=[70.0, float("nan")]), 1, float("inf")),
        (dict(lam=[0.5, float("nan")]), 1, float("inf")),
        (dict(method=["TA", "SAM"]), 4, float("inf")),
        (dict(seed=1), 8, float("inf")),
        (dict(value=[74.0, 70.0]), 2, 4.0),
    ],
)
def test_a_single_bit_of_a_table_counts(compare, tmp_path, columns, different, largest):
    d = compare.of_tables(table_file(tmp_path / "a"), table_file(tmp_path / "b", **columns))
    assert (d.different, d.largest) == (different, largest)


def test_zero_has_a_sign(compare):
    assert not compare.same(0.0, -0.0) and compare.same(float("nan"), float("nan"))


def test_a_single_bit_of_a_weight_counts(compare, tmp_path):
    from safetensors.torch import save_file

    w = dict(a=torch.tensor([1.0, 2.0]), h=torch.tensor([1.0, -0.0]).half(), n=torch.tensor(3))

    def against(**other):
        save_file(w, tmp_path / "a")
        save_file({k: v for k, v in (w | other).items() if v is not None}, tmp_path / "b")
        d = compare.of_weights(tmp_path / "a", tmp_path / "b")
        return d.weights, d.different, d.largest

    assert against() == (5, 0, 0.0) and against(a=torch.tensor([1.0, 2 + 2**-22])) == (5, 1, 2**-22)
    assert against(h=torch.zeros(2).half() + torch.tensor([1.0, 0.0]).half())[1] == 1, (
        "the sign of a zero"
    )
    assert (
        against(n=None) == (5, 1, float("inf"))
        and against(h=torch.ones(2))[1:] == (2, float("inf"))
        and against(z=torch.zeros(2))[:2] == (7, 2)
    )


def test_a_card_is_compared_where_both_know_a_field(compare, tmp_path):
    def card(file, **more):
        (tmp_path / file).write_text(
            json.dumps(dict(lam=0.5, path=[dict(CA=70.0)], log=dict(seconds=3.0), name="x") | more),
            encoding="utf-8",
        )
        return tmp_path / file

    assert compare.of_cards(
        card("a"), card("b", log=dict(seconds=9.0), plugins=2, name="y")
    ) == compare.Difference(2, notes={"card's plugins in one only"})
    assert compare.of_cards(card("a"), card("c", path=[dict(CA=71.0)])).largest == 1


def test_jobs_at_lab_scale_are_added_up(compare, capsys):
    rows = [
        dict(job=compare.run_job(n, "lab"), took=took)
        for n, took in (
            ("main", [(10.0, 9.0), (8.0, 4.0)]),
            ("rivals", [(30.0, 11.0), (32.0, 6.0)]),
        )
    ]
    compare.say_sum(rows)
    assert capsys.readouterr().out == (
        "run main --preset lab + run rivals --preset lab: CPU s 40.0 old, 10.0 new, new / old "
        "0.38\n"
    )
    compare.say_sum([])
    assert capsys.readouterr().out == ""


@pytest.fixture
def shipped(compare, tmp_path, monkeypatch):
    "Shipped folders of our own making, and their alias file."
    from lfpm_nb import runs

    for name in (
        "main/lab-s0-aaaaaaaa",
        "main/lab-s1-aaaaaaaa",
        "main/small-real-s0-88888888",
        "rivals/lab-s0-99999999",
        "sequence2/lab-s0-bbbbbbbb",
        "backbone/lab-s0-77777777",
        "efficiency/lab-s0-cccccccc",
        "ctl/lab-s0-dddddddd",
    ):
        (tmp_path / name).mkdir(parents=True)
    for module in (compare, runs):
        monkeypatch.setattr(module, "aliases_file", lambda: tmp_path / "aliases.yaml")
    (tmp_path / "aliases.yaml").write_text("# kept\n[]\n", encoding="utf-8")
    return tmp_path


FIXED = dict(
    old="1" * 40,
    new="2" * 40,
    compared=["run main --preset tiny"],
    numbers=533,
    largest=0.0,
    machine="a processor",
    date="2026-01-01",
)
OLD = {
    "main lab": "aaaaaaaa",
    "main small-real": "88888888",
    "rivals lab": "66666666",
    "sequence2 lab": "bbbbbbbb",
    "backbone lab": "77777777",
    "efficiency lab": "cccccccc",
    "ctl lab": "dddddddd",
}
NEW = {k: "eeeeeeee" if k == "main lab" else "ffffffff" for k in OLD} | {"ctl lab": "dddddddd"}


def test_what_was_compared_gets_an_alias_and_nothing_else(compare, shipped):
    found, why = compare.new_aliases(OLD, NEW, dict(main=533, efficiency=0, ctl=9), True, [], FIXED)
    got = {(a.experiment, a.preset, a.was, a.now) for a in found}
    assert got == {
        ("main", "lab", "aaaaaaaa", "eeeeeeee"),
        ("sequence2", "lab", "bbbbbbbb", "ffffffff"),
    }
    reasons = (
        "ctl lab dddddddd: the hash has not changed",
        "efficiency lab: nothing but seconds",
        "rivals lab 99999999 is not OLD's",
        "main small-real is made of real pictures",
        "backbone lab is made of real pictures",
    )
    assert [len([w for w in why if w.startswith(r)]) for r in reasons] == [1] * 5 and len(why) == 5
    found, why = compare.new_aliases(OLD, NEW, dict(main=533), False, [], FIXED)
    assert [a.experiment for a in found] == ["main"]
    assert "sequence2 lab was not compared" in why


def test_aliases_are_added_and_form_chains(compare, shipped):
    from lfpm_nb.runs import latest, read_aliases

    first, _ = compare.new_aliases(OLD, NEW, dict(main=533), False, [], FIXED)
    compare.write_aliases(first)
    assert (
        (shipped / "aliases.yaml")
        .read_text(encoding="utf-8")
        .startswith("# kept\n- experiment: main\n")
    )
    second, _ = compare.new_aliases(
        NEW, NEW | {"main lab": "12345678"}, dict(main=533), False, read_aliases(), FIXED
    )
    compare.write_aliases(second)
    assert latest("main", "lab", "aaaaaaaa", read_aliases()) == "12345678", (
        "a name of digits alone stays a text"
    )
    before = (shipped / "aliases.yaml").read_text(encoding="utf-8")
    back, _ = compare.new_aliases(
        {"main lab": "12345678"},
        {"main lab": "aaaaaaaa"},
        dict(main=533),
        False,
        read_aliases(),
        FIXED,
    )
    with pytest.raises(ValueError, match="in a circle"):
        compare.write_aliases(back)
    assert (shipped / "aliases.yaml").read_text(encoding="utf-8") == before
