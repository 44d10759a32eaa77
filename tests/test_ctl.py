"""Cross-Task Linearity: the coefficient and the cosine of every block."""
import math

import pytest
import torch
from hypothesis import given, strategies as st

from conftest import near, pixels
from lfpm_nb.clip import encode
from lfpm_nb.ctl import ctl_curve, ctl_per_block, deviation, layers, linearity, sums
from lfpm_nb.path import lerp

BLOCKS = ["block 1", "block 2", "feature"]          # pico's


def arrays(seed, n=5, shape=(3, 4)):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, n, *shape, generator=g)


# --- the numbers ---------------------------------------------------------------------------------------------------------

@given(st.integers(0, 10**6))
def test_linearity_against_its_formulas(seed):
    A, B, C = arrays(seed)
    r = linearity(sums(A, B, C))
    a, b, c = (v.double().reshape(5, -1) for v in (A, B, C))
    dot = lambda u, v: float((u * v).sum())
    assert r["coefficient"] == pytest.approx(dot(a, b) / dot(b, b)) and r["cosine"] == pytest.approx(dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)))
    each = torch.tensor([dot(u, v) / dot(v, v) for u, v in zip(a, b)])
    assert r["coefficient_mean"] == pytest.approx(each.mean().item(), rel=1e-5, abs=1e-6)
    assert r["coefficient_std"] == pytest.approx(each.std(correction=0).item(), rel=1e-5)
    angles = torch.cosine_similarity(a, b)
    assert r["cosine_mean"] == pytest.approx(angles.mean().item()) and r["cosine_std"] == pytest.approx(angles.std(correction=0).item())
    assert r["relative"] == pytest.approx((a - b).norm().item() / c.norm().item()) and r["deviation"] == pytest.approx((a - b).norm().item() / 5 ** .5)
    assert r["n"] == 5


@given(st.integers(0, 10**6))
def test_the_coefficient_is_the_best_scale(seed):
    A, B, _ = arrays(seed)
    k = linearity(sums(A, B, B))["coefficient"]
    gap = lambda s: (A.double() - s * B.double()).norm()
    assert gap(k) <= min(gap(k + 1e-3), gap(k - 1e-3))


def test_the_two_conventions_differ():
    "One long sample of coefficient 2 beside a short one of 1: flattening follows the long one."
    B = torch.tensor([[10., 0.], [1., 0.]])
    r = linearity(sums(torch.tensor([[20., 0.], [1., 0.]]), B, B))
    assert r["coefficient_mean"] == 1.5 and r["coefficient"] == pytest.approx(201 / 101)


# --- layers ----------------------------------------------------------------------------------------------------------------

def test_layers_are_the_blocks_outputs(pico):
    x = pico.normalise(pixels(3))
    out = layers(pico.visual, x)
    assert list(out) == BLOCKS and out["feature"].shape == (3, 32) and out["block 1"].shape == (3, 17, 64)
    assert torch.allclose(out["feature"], encode(pico.visual, x), atol=1e-6)
    assert torch.allclose(pico.visual.transformer.resblocks[1](out["block 1"]), out["block 2"], atol=1e-5)
    assert layers(pico.visual, x, torch.zeros(4, 64))["block 2"].shape == (3, 21, 64)


def test_layers_leave_no_hooks_behind(pico):
    with pytest.raises(RuntimeError): layers(pico.visual, pico.normalise(pixels(2)), torch.zeros(4, 5))
    assert all(not b._forward_hooks for b in pico.visual.transformer.resblocks)


# --- along a path ----------------------------------------------------------------------------------------------------------

def test_rows_against_three_models(pico):
    a, b, x, lam = near(pico, 1), near(pico, 2), pixels(7), .3
    at = lambda s: layers(pico.with_state(s), pico.normalise(x))
    f1, f2, f = at(a), at(b), at(lerp(a, b, lam))
    for r in ctl_per_block(pico, a, b, x, lam):
        mix = (1 - lam) * f1[r["block"]] + lam * f2[r["block"]]
        want = linearity(sums(f[r["block"]], mix, f2[r["block"]] - f1[r["block"]]))
        assert {k: r[k] for k in want} == pytest.approx(want, rel=1e-5) and r["lam"] == lam and r["n"] == 7
        d = deviation(pico, a, b, x, lam)[r["block"]]
        assert torch.allclose(d, f[r["block"]] - mix, atol=1e-5) and r["deviation"] == pytest.approx(d.flatten(1).norm().item() / 7 ** .5, rel=1e-4)
        assert r["relative"] > .01          # something to see


def test_rows_do_not_depend_on_the_batch_and_count_the_prompt(pico):
    a, b, x = near(pico, 1), near(pico, 2), pixels(6)
    key = lambda rows: [(r["lam"], r["block"]) for r in rows]
    whole, parts = (ctl_curve(pico, a, b, x, [0., .5], batch=n) for n in (6, 4))
    assert key(whole) == key(parts) == [(s, k) for s in (0., .5) for k in BLOCKS]
    for r, s in zip(whole, parts):
        assert {k: r[k] for k in r if k != "block"} == pytest.approx({k: s[k] for k in s if k != "block"}, rel=1e-4, abs=1e-6)
    p = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert abs(ctl_per_block(pico, a, b, x, .5, p)[-1]["cosine"] - whole[-1]["cosine"]) > 1e-5


def test_ends_are_linear_and_the_middle_is_not(pico):
    rows = ctl_curve(pico, near(pico, 1), near(pico, 2), pixels(5), [0., .5, 1.])
    for r in rows:
        if r["lam"] == .5: assert r["deviation"] > 0 and r["cosine"] < 1 - 1e-6
        else: assert r["deviation"] == 0 and r["coefficient"] == pytest.approx(1, abs=1e-12) and r["cosine_mean"] == pytest.approx(1, abs=1e-12)


def test_a_linear_layer_is_exactly_linear(pico):
    "Only `proj` changes: blocks stand still (no change to compare with), the feature is linear in it."
    a = pico.state()
    b = {**a, "proj": torch.randn(a["proj"].shape, generator=torch.Generator().manual_seed(0))}
    *blocks, feature = ctl_per_block(pico, a, b, pixels(4), .4)
    assert feature["relative"] < 1e-6 and feature["coefficient"] == pytest.approx(1, abs=1e-6)
    assert all(r["deviation"] < 1e-5 and math.isnan(r["relative"]) for r in blocks)


def test_a_product_of_two_moving_layers_deviates_by_its_formula(pico):
    "feature = (u * s + t) P with s, t, P all linear in lam: delta = -lam (1-lam) (u ds + dt) dP."
    a, noise = pico.state(), near(pico, 3, .3)
    b = {k: noise[k] if k in ("proj", "ln_post.weight", "ln_post.bias") else v for k, v in a.items()}
    lam, x = .3, pixels(4)
    moved = deviation(pico, a, b, x, lam)["feature"]
    d = {k: b[k] - a[k] for k in ("proj", "ln_post.weight", "ln_post.bias")}
    only = lambda P: layers(pico.with_state({**a, "ln_post.weight": d["ln_post.weight"], "ln_post.bias": d["ln_post.bias"], "proj": P}), pico.normalise(x))["feature"]
    assert torch.allclose(moved, -lam * (1 - lam) * only(d["proj"]), atol=1e-5) and moved.norm() > .1


def test_bad_inputs(pico):
    a = near(pico, 1)
    with pytest.raises(ValueError, match="no images"): ctl_per_block(pico, a, a, pixels(0), .5)
    for f in (ctl_per_block, deviation):
        with pytest.raises(ValueError, match=r"expected a number in \[0, 1\]"): f(pico, a, a, pixels(2), 1.5)
        with pytest.raises(ValueError, match="the two ends of the path differ"): f(pico, a, {**a, "proj": torch.ones(2, 2)}, pixels(2), .5)
