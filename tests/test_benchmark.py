"""The benchmark's own parts: the SAM step it compares with, memory counting, and reading a run's stages."""
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from lfpm_nb.experiment import MainParams


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("foundation", Path(__file__).parent.parent / "benchmarks" / "foundation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    (tmp_path / "status.json").write_text(json.dumps(dict(state="done", seconds=9., preset="tiny", seed=0)))
    stage = lambda n, s, r: dict(name=n, seconds=s, reused=r)
    (tmp_path / "params.json").write_text(json.dumps(dict(stages=[stage("a", 1., False), stage("b", 2., False), stage("a", 1., True), stage("a", 3., False)])))
    assert [(r[0], r[1]) for r in bench.stage_rows(tmp_path)][:3] == [("stage: a", 4.), ("stage: b", 2.), ("stages together", 6.)]
