"""Gradients and curvature along the path.

The tight bound, the readings of Eq 24, Hessian-vector products, snapshots."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from conftest import near, pixels
from lfpm_nb.antibackdoor import Strengths, accumulate, step_loss, train_anti
from lfpm_nb.ctl import between, doubled, second, tower
from lfpm_nb.curvature import (
    along,
    bend,
    ce,
    check_gradients,
    curvature,
    hvp,
    loss_of,
    readings,
    snapshots,
    third,
)
from lfpm_nb.clip import logits
from lfpm_nb.subspace import Shadow

flat = lambda d: torch.cat([v.flatten() for v in d.values()])


def waves(seed, size=1.0):
    """(f, a, b, M, N).

    A random sum of sines in three variables with its bounds on |H| and on H's derivative."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g).double()
    c, phi, omega, a, d = draw(4), draw(4), draw(4, 3), draw(3), draw(3)
    f = lambda p: (c * torch.sin(omega @ p["w"] + phi)).sum()
    bound = lambda k: (c.abs() * omega.norm(dim=1) ** k).sum().item()
    return f, {"w": a}, {"w": a + size * d / d.norm()}, bound(2), bound(3)


def head(d, C=5):
    return 10 * torch.nn.functional.normalize(
        torch.randn(C, d, generator=torch.Generator().manual_seed(9)), dim=-1
    )


# --- derivatives --------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_hvp_and_third_against_full_tensors(seed):
    f, a, b, *_ = waves(seed)
    one, w = (lambda v: f({"w": v})), between(a, b, 0.3)["w"]
    H = torch.autograd.functional.hessian(one, w)
    d = b["w"] - a["w"]
    assert torch.allclose(hvp(f, {"w": w}, {"w": d})["w"], H @ d)
    assert along(f, a, b, 0.3) == pytest.approx((d @ H @ d).item(), abs=1e-10)
    quad = lambda v: d @ torch.autograd.functional.hessian(one, v, create_graph=True) @ d
    assert torch.allclose(third(f, a, b, 0.3)["w"], torch.autograd.functional.jacobian(quad, w))


def test_hvp_is_linear_and_a_function_without_curvature_has_none():
    f, a, b, *_ = waves(1)
    v = {"w": torch.tensor([1.0, 2.0, 3.0]).double()}
    assert torch.allclose(hvp(f, a, {"w": 2 * v["w"]})["w"], 2 * hvp(f, a, v)["w"])
    plane = lambda p: p["w"].sum() + 0 * (p["w"] ** 3).sum()
    assert flat(hvp(plane, a, v)).norm() == 0 == flat(third(plane, a, b, 0.5)).norm()


# --- Corollary 4.2 ------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.floats(0.05, 3))
def test_the_terms_that_cancel(seed, lam, size):
    """The identity without 2 H Delta holds, its bound with the true supremum too, and the
    paper's is never smaller."""
    f, a, b, M, N = waves(seed, size)
    (row,) = check_gradients(f, a, b, [lam], per=10)
    bound = lam * (1 - lam) / 2 * N * size**2
    assert row["error"] * row["measured"] <= 1e-5 * bound and row["measured"] <= bound * (1 + 1e-9)
    assert row["tight"] <= bound * (1 + 1e-9) and row["tight"] <= row["paper"] <= lam * (
        1 - lam
    ) * (2 * M * size + N * size**2 / 2) * (1 + 1e-9)


def test_gradient_of_a_quadratic_is_linear_and_the_paper_cannot_see_it():
    f, one = (lambda p: (p["w"] ** 2).sum()), {"w": torch.ones(1).double()}
    (row,) = check_gradients(f, one, {"w": 3 * one["w"]}, [0.5])
    assert row["measured"] == row["tight"] == 0 and row["paper"] == pytest.approx(2)


def test_gradient_error_on_a_tower(pico):
    a, b = doubled(near(pico, 1), near(pico, 2))
    L = loss_of(tower(pico, pixels(1)), torch.tensor([2]), head(32))
    (r,) = check_gradients(L, a, b, [0.4], per=4)
    assert r["error"] < 1e-2 and 0 < r["measured"] <= r["tight"] * 1.01 <= r["paper"]


# --- Eq 24 --------------------------------------------------------------------------------------


def test_the_sum_that_stage_two_builds_is_the_first_reading(pico):
    """`accumulate` after `step_loss`'s backward gives G_anti + G_mm of the loss of interpolated
    features."""
    mm, anti, x, y, W, s = (
        near(pico, 1),
        near(pico, 2),
        pixels(4),
        torch.tensor([0, 1, 2, 3]),
        head(32),
        0.5,
    )
    with pytest.MonkeyPatch.context() as m:
        m.setenv("LFPM_AMP", "0")
        towers = [pico.with_state(v).requires_grad_(True) for v in (mm, anti)]
        p = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
        st2 = Strengths(interval=(s, s), points=2, B=False)
        step_loss(*towers, pico.normalise(x), y, W, p, st2).backward()
        accumulate(towers[1], towers[0], 1.0)
    got = torch.cat([v.grad.flatten() for v in towers[1].parameters()]).double()
    ends = doubled(mm, anti)
    want = 0
    for q in (None, p):
        f = tower(pico, x, q)
        e = [{k: v.detach().requires_grad_(True) for k, v in d.items()} for d in ends]
        ce((1 - s) * f(e[0]) + s * f(e[1]), y, W).backward()
        want = want + sum(torch.cat([v.grad.flatten() for v in d.values()]) for d in e)
    want = dict(zip(ends[0], want.split([v.numel() for v in ends[0].values()])))
    want = torch.cat([want[k] for k, _ in pico.visual.named_parameters()])
    assert (got - want).norm() / want.norm() < 1e-3


def test_readings(pico):
    a, b = doubled(near(pico, 1), near(pico, 1, 0.025))  # one direction of noise, two lengths
    f, y, W = tower(pico, pixels(6)), torch.tensor([0, 1, 2, 3, 4, 0]), head(32)
    r = readings(f, y, W, a, b, 0.5)
    assert (
        r["features"] < r["losses"]
        and r["features"] < r["twice"]
        and r["twice"] == pytest.approx(0.5, abs=0.1)
    )
    same = readings(f, y, W, a, a, 0.3)
    assert (
        same["features"] < 1e-12
        and same["losses"] < 1e-12
        and same["twice"] == pytest.approx(1 - 0.3**2 - 0.7**2)
    )
    for s, k in ((0.0, "features"), (1.0, "losses")):
        assert readings(f, y, W, a, b, s)[k] < 1e-12


# --- curvature ----------------------------------------------------------------------------------


def test_quotients_of_a_bowl():
    bowl, at = (lambda p: 1.5 * (p["w"] ** 2).sum()), lambda v: {"w": torch.tensor([v]).double()}
    for step, E in ((2.0, 12), (4.0, 48)):
        assert along(bowl, at(1.0), at(1 + step), 0.3) == pytest.approx(E) and along(
            bowl, at(1.0), at(1 + step), 0.7, 1e-3
        ) == pytest.approx(E)


def test_curvature_of_a_pair(pico):
    a, b, x, y, W = near(pico, 1), near(pico, 2), pixels(2), torch.tensor([0, 3]), head(32)
    exactly, nearly = (curvature(pico, a, b, x, y, W, points=3, difference=h) for h in (0.0, 1e-4))
    assert nearly == pytest.approx(exactly, rel=1e-4)
    A, B = doubled(a, b)
    L, f = loss_of(tower(pico, x), y, W), tower(pico, x)
    E = [second(L, A, B, t).item() for t in (0, 0.5, 1)]
    delta = (flat(B) - flat(A)).norm().item()
    assert (
        exactly["E"] == pytest.approx(sum(map(abs, E)) / 3)
        and exactly["E_signed"] == pytest.approx(sum(E) / 3)
        and exactly["delta"] == pytest.approx(delta)
    )
    assert exactly["E_over_delta"] == pytest.approx(exactly["E"] / delta) and exactly[
        "rayleigh"
    ] == pytest.approx(exactly["E"] / delta**2)
    d = {k: B[k] - A[k] for k in A}
    assert E[1] == pytest.approx(
        sum(
            (u * v).sum() for u, v in zip(hvp(L, between(A, B, 0.5), d).values(), d.values())
        ).item()
    )
    assert torch.allclose(bend(f, A, B, 0.5), second(f, A, B, 0.5), rtol=1e-4, atol=1e-4)
    assert curvature(pico, a, b, x, y, W, torch.randn(2, 64), points=2)["E"] != pytest.approx(
        curvature(pico, a, b, x, y, W, points=2)["E"], rel=1e-3
    )


def test_half_the_path_quarters_E_but_not_the_rayleigh_quotient(pico):
    a, x, y, W = near(pico, 1), pixels(4), torch.tensor([0, 1, 2, 3]), head(32)
    b = {k: v + 1e-3 * (w - v) for (k, v), w in zip(a.items(), near(pico, 2).values())}
    c = {k: v + 5e-4 * (w - v) for (k, v), w in zip(a.items(), near(pico, 2).values())}
    far, close = (curvature(pico, a, e, x, y, W, points=2) for e in (b, c))
    assert far["E"] == pytest.approx(4 * close["E"], rel=0.02) and far["rayleigh"] == pytest.approx(
        close["rayleigh"], rel=0.02
    )
    assert far["E_over_delta"] == pytest.approx(2 * close["E_over_delta"], rel=0.02)


def test_no_path_and_bad_inputs(pico):
    a, x, y, W = near(pico, 1), pixels(2), torch.tensor([0, 1]), head(32)
    r = curvature(pico, a, a, x, y, W, points=2)
    assert r["E"] == 0 == r["delta"] and math.isnan(r["rayleigh"]) and math.isnan(r["E_over_delta"])
    with pytest.raises(ValueError, match="both ends"):
        curvature(pico, a, a, x, y, W, points=1)


def test_ce_is_the_heads_loss():
    h, W, y = (
        torch.randn(6, 8, generator=torch.Generator().manual_seed(0)),
        head(8),
        torch.tensor([0, 1, 2, 3, 4, 0]),
    )
    assert (
        ce(h, y, W).item()
        == pytest.approx(torch.nn.functional.cross_entropy(logits(h, W), y).item(), rel=1e-5)
        and ce(h.double(), y, W).dtype == torch.float64
    )


# --- snapshots ----------------------------------------------------------------------------------


def test_snapshots_of_a_training(pico, fp32):
    shadow = Shadow(pixels(40), torch.arange(40) % 5, head(32), 8)
    s = Strengths(epochs=2, batch=16, B=False, C=False, lr=1e-3)
    p, mm = torch.zeros(1, 2, 64), near(pico, 1)
    with snapshots(pico, [1, 2, 4]) as taken:
        end, _ = train_anti(pico, mm, shadow, p, s, 0, "x")
    assert (
        list(taken) == [1, 2, 4]
        and all(torch.equal(taken[4][k], v) for k, v in end.items())
        and taken[1].keys() == mm.keys()
    )
    size = lambda m: sum((m[k] - v).square().sum() for k, v in mm.items()).item()
    assert 0 < size(taken[1]) < size(taken[4])
    train_anti(pico, mm, shadow, p, s, 0, "x")
    assert list(taken) == [1, 2, 4]  # the hook is gone


def test_snapshots_pass_over_other_optimisers(pico):
    w = torch.nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([w], 0.1)
    with snapshots(pico, [1]) as taken:
        w.sum().backward()
        opt.step()
    assert taken == {}
