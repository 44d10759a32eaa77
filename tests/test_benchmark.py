"""The benchmark's own parts: the SAM step it compares with, memory counting, and reading a run's stages."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from conftest import new_pico
from lfpm_nb.experiment import MainParams


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(): return load("foundation")


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))      # gpu.py imports foundation.py, as it does when run as a script
    try: return load("gpu")
    finally: sys.path.pop(0)


@pytest.fixture(scope="module")
def two(bench, pico): return bench.Stage2(pico, MainParams(anti_batch=8))


def test_both_steps_move_theta_anti_only(two):
    for step in (two.lfpm, two.sam):
        before = [[p.detach().clone() for p in m.parameters()] for m in (two.mm, two.anti)]
        step()
        assert all(torch.equal(p, b) for p, b in zip(two.mm.parameters(), before[0])) and any(not torch.equal(p, b) for p, b in zip(two.anti.parameters(), before[1]))


def test_sam_descends_with_the_gradient_found_uphill(two, fp32):
    params, rho, lr = list(two.anti.parameters()), 0.5, two.opt.param_groups[0]["lr"]
    theta = [p.detach().clone() for p in params]
    g = torch.autograd.grad(two.loss(), params)
    norm = torch.stack([v.norm() for v in g]).norm()
    with torch.no_grad():
        for p, v in zip(params, g): p.add_(rho * v / norm)
    uphill, want = two.loss().item(), torch.autograd.grad(two.loss(), params)
    with torch.no_grad():
        for p, t in zip(params, theta): p.copy_(t)
    assert uphill > two.loss().item()
    two.opt.param_groups[0]["lr"] = 0.
    two.sam(rho)
    two.opt.param_groups[0]["lr"] = lr
    scale = max(1., torch.stack([w.norm() for w in want]).norm().item())             # the update cuts the norm to 1
    assert all(torch.allclose(p.grad, w / scale, atol=1e-4) for p, w in zip(params, want)) and all(torch.allclose(p, t, atol=1e-6) for p, t in zip(params, theta))


def test_peak_memory_counts_what_lives_at_the_same_time(bench):
    def step(n=2 ** 20):
        for _ in range(3): a = torch.zeros(n); del a                                # 4 MiB, three times, one after the other
        b, c = torch.zeros(n), torch.zeros(n)                                       # 8 MiB together
    assert bench.peak_bytes(step, 100) == pytest.approx(8 * 2 ** 20 + 100, rel=.01)


def test_stage_seconds_of_a_run(bench, tmp_path):
    (tmp_path / "status.json").write_text(json.dumps(dict(state="done", seconds=9., preset="tiny", seed=0)), encoding="utf-8")
    stage = lambda n, s, r: dict(name=n, seconds=s, reused=r)
    (tmp_path / "params.json").write_text(json.dumps(dict(stages=[stage("a", 1., False), stage("b", 2., False), stage("a", 1., True), stage("a", 3., False)])), encoding="utf-8")
    assert [(r[0], r[1]) for r in bench.stage_rows(tmp_path)][:3] == [("stage: a", 4.), ("stage: b", 2.), ("stages together", 6.)]


# --- gpu.py ---------------------------------------------------------------------------------------------------------------

def test_ratios_are_of_medians_of_rounds_and_goals_have_a_side(gpu):
    assert gpu.ratio({"a": [2., 9., 4.], "b": [1., 3., 1.]}, "a", "b") == 3
    assert gpu.verdict("LFPM / SAM, time", 1.4) == ("<= 1.4", True) and gpu.verdict("LFPM / SAM, time", 1.5)[1] is False
    assert gpu.verdict("Stage II, share of the bf16 peak", .2)[1] is False and gpu.verdict("blocks: LFPM / SAM, time", 99.) == ("-", True)


def test_every_round_takes_each_kind_once_in_turns(gpu):
    seen = []
    took = gpu.in_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2)
    assert "".join(seen) == "baabba" and [len(v) for v in took.values()] == [2, 2]


@pytest.mark.parametrize("precision", ["0", "1"], ids=["float32", "bfloat16"])
def test_computing_again_costs_work_and_saves_memory(gpu, monkeypatch, precision):
    """Counted, not timed: FLOPs and peak tensor memory of a step. Four blocks, because of its last block a tower computes the class token alone: of two
    blocks "towers" has little more than one alive at its peak, "blocks" one and a further input for each pass, and the kernels' scratch decides between them."""
    monkeypatch.setenv("LFPM_AMP", precision)
    two = gpu.Steps(new_pico(layers=4), 32)
    two.lfpm(); two.sam()
    steps = {"nothing": two.lfpm, "towers": lambda: two.lean("towers"), "blocks": lambda: two.lean("blocks")}

    def peak(step, *towers):
        two.mm.zero_grad(); two.anti.zero_grad()
        return gpu.peak_bytes(step, gpu.held_bytes(two, towers))
    memory = {how: peak(step, two.mm, two.anti) for how, step in steps.items()}
    # by shapes alone 0.67 to 0.75 and 0.40 to 0.47; the rest is room for other kernels' scratch
    assert memory["blocks"] < 0.9 * memory["towers"] and memory["towers"] < 0.6 * memory["nothing"]
    assert memory["towers"] <= 1.3 * peak(two.sam, two.anti)
    work = {how: gpu.flops(step) for how, step in steps.items()}
    assert work["nothing"] < work["blocks"] < 1.5 * work["nothing"] and work["nothing"] < work["towers"] < 1.5 * work["nothing"], "one more forward pass at most"


def test_the_table_says_what_was_missed(gpu, pico, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "random_clip", lambda name: pico)
    for goal, code in ((1e9, 0), (0., 1)):
        monkeypatch.setitem(gpu.GOALS, "21-point path / pure forward", ("<=", goal))
        monkeypatch.setattr("sys.argv", ["gpu.py", "--parts", "path", "--images", "4", "--rounds", "1"])
        assert gpu.main() == code
        assert ("missed" in capsys.readouterr().out) == bool(code)
