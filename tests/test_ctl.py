"""Cross-Task Linearity.

The coefficient and cosine of every block, Theorem 3.1 by exact derivatives, where features move."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from conftest import near, pixels
from lfpm_nb.clip import encode
from lfpm_nb.core import amp
from lfpm_nb.ctl import (
    between,
    check_theorem,
    ctl_curve,
    ctl_per_block,
    deviation,
    doubled,
    exact,
    feature_span,
    layers,
    linearity,
    nodes,
    row_space,
    second,
    share,
    sums,
    tower,
    valid_range,
    weight_kernel,
)
from lfpm_nb.curvature import curvature
from lfpm_nb.path import lerp

BLOCKS = ["block 1", "block 2", "feature"]  # pico's


def arrays(seed, n=5, shape=(3, 4)):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, n, *shape, generator=g)


# --- the numbers --------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
def test_linearity_against_its_formulas(seed):
    A, B, C = arrays(seed)
    r = linearity(sums(A, B, C))
    a, b, c = (v.double().reshape(5, -1) for v in (A, B, C))
    dot = lambda u, v: float((u * v).sum())
    assert r["coefficient"] == pytest.approx(dot(a, b) / dot(b, b)) and r[
        "cosine"
    ] == pytest.approx(dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)))
    each = torch.tensor([dot(u, v) / dot(v, v) for u, v in zip(a, b)])
    assert r["coefficient_mean"] == pytest.approx(each.mean().item(), rel=1e-5, abs=1e-6)
    assert r["coefficient_std"] == pytest.approx(each.std(correction=0).item(), rel=1e-5)
    angles = torch.cosine_similarity(a, b)
    assert r["cosine_mean"] == pytest.approx(angles.mean().item()) and r[
        "cosine_std"
    ] == pytest.approx(angles.std(correction=0).item())
    assert r["relative"] == pytest.approx((a - b).norm().item() / c.norm().item()) and r[
        "deviation"
    ] == pytest.approx((a - b).norm().item() / 5**0.5)
    assert r["n"] == 5


@given(st.integers(0, 10**6))
def test_the_coefficient_is_the_best_scale(seed):
    A, B, _ = arrays(seed)
    k = linearity(sums(A, B, B))["coefficient"]
    gap = lambda s: (A.double() - s * B.double()).norm()
    assert gap(k) <= min(gap(k + 1e-3), gap(k - 1e-3))


def test_the_two_conventions_differ():
    "One long sample of coefficient 2 beside a short one of 1: flattening follows the long one."
    B = torch.tensor([[10.0, 0.0], [1.0, 0.0]])
    r = linearity(sums(torch.tensor([[20.0, 0.0], [1.0, 0.0]]), B, B))
    assert r["coefficient_mean"] == 1.5 and r["coefficient"] == pytest.approx(201 / 101)


# --- precision: every printed digit is float32's ------------------------------------------------


def test_ctl_and_theorem_are_the_same_in_any_precision(pico, in_both):
    a, b, x = near(pico, 1), near(pico, 2), pixels(6)

    def measure():
        with amp():  # whoever calls it
            rows = ctl_curve(pico, a, b, x, [0.0, 0.25, 0.5, 1.0]) + ctl_per_block(
                pico, a, b, x, 0.7
            )
            return (
                rows,
                check_theorem(tower(pico, x[:2]), *doubled(a, b), [0.5], 2),
                curvature(pico, a, b, x, torch.arange(6) % 3, torch.eye(3, 32), points=2),
            )

    rounded, full = in_both(measure)
    assert rounded[0] == full[0] and rounded[1] == full[1] and rounded[2] == full[2]


# --- layers -------------------------------------------------------------------------------------


def test_layers_are_the_blocks_outputs(pico):
    x = pico.normalise(pixels(3))
    out = layers(pico.visual, x)
    assert (
        list(out) == BLOCKS
        and out["feature"].shape == (3, 32)
        and out["block 1"].shape == (3, 17, 64)
    )
    assert torch.allclose(out["feature"], encode(pico.visual, x), atol=1e-6)
    assert torch.allclose(
        pico.visual.transformer.resblocks[1](out["block 1"]), out["block 2"], atol=1e-5
    )
    assert layers(pico.visual, x, torch.zeros(4, 64))["block 2"].shape == (3, 21, 64)


def test_layers_leave_no_hooks_behind(pico):
    with pytest.raises(RuntimeError):
        layers(pico.visual, pico.normalise(pixels(2)), torch.zeros(4, 5))
    assert all(not b._forward_hooks for b in pico.visual.transformer.resblocks)


# --- along a path -------------------------------------------------------------------------------


def test_rows_against_three_models(pico):
    a, b, x, lam = near(pico, 1), near(pico, 2), pixels(7), 0.3
    at = lambda s: layers(pico.with_state(s), pico.normalise(x))
    f1, f2, f = at(a), at(b), at(lerp(a, b, lam))
    for r in ctl_per_block(pico, a, b, x, lam):
        mix = (1 - lam) * f1[r["block"]] + lam * f2[r["block"]]
        want = linearity(sums(f[r["block"]], mix, f2[r["block"]] - f1[r["block"]]))
        assert (
            {k: r[k] for k in want} == pytest.approx(want, rel=1e-5)
            and r["lam"] == lam
            and r["n"] == 7
        )
        d = deviation(pico, a, b, x, lam)[r["block"]]
        assert torch.allclose(d, f[r["block"]] - mix, atol=1e-5) and r[
            "deviation"
        ] == pytest.approx(d.flatten(1).norm().item() / 7**0.5, rel=1e-4)
        assert r["relative"] > 0.01  # something to see


def test_rows_do_not_depend_on_the_batch_and_count_the_prompt(pico):
    a, b, x = near(pico, 1), near(pico, 2), pixels(6)
    key = lambda rows: [(r["lam"], r["block"]) for r in rows]
    whole, parts = (ctl_curve(pico, a, b, x, [0.0, 0.5], batch=n) for n in (6, 4))
    assert key(whole) == key(parts) == [(s, k) for s in (0.0, 0.5) for k in BLOCKS]
    for r, s in zip(whole, parts):
        assert {k: r[k] for k in r if k != "block"} == pytest.approx(
            {k: s[k] for k in s if k != "block"}, rel=1e-4, abs=1e-6
        )
    p = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert abs(ctl_per_block(pico, a, b, x, 0.5, p)[-1]["cosine"] - whole[-1]["cosine"]) > 1e-5


def test_ends_are_linear_and_the_middle_is_not(pico):
    rows = ctl_curve(pico, near(pico, 1), near(pico, 2), pixels(5), [0.0, 0.5, 1.0])
    for r in rows:
        if r["lam"] == 0.5:
            assert r["deviation"] > 0 and r["cosine"] < 1 - 1e-6
        else:
            assert (
                r["deviation"] == 0
                and r["coefficient"] == pytest.approx(1, abs=1e-12)
                and r["cosine_mean"] == pytest.approx(1, abs=1e-12)
            )


def test_a_linear_layer_is_exactly_linear(pico):
    """Only `proj` changes.

    Blocks stand still (no change to compare with), the feature is linear in it."""
    a = pico.state()
    b = {**a, "proj": torch.randn(a["proj"].shape, generator=torch.Generator().manual_seed(0))}
    *blocks, feature = ctl_per_block(pico, a, b, pixels(4), 0.4)
    assert feature["relative"] < 1e-6 and feature["coefficient"] == pytest.approx(1, abs=1e-6)
    assert all(r["deviation"] < 1e-5 and math.isnan(r["relative"]) for r in blocks)


def test_a_product_of_two_moving_layers_deviates_by_its_formula(pico):
    "feature = (u * s + t) P with s, t, P all linear in lam: delta = -lam (1-lam) (u ds + dt) dP."
    a, noise = pico.state(), near(pico, 3, 0.3)
    b = {
        k: noise[k] if k in ("proj", "ln_post.weight", "ln_post.bias") else v for k, v in a.items()
    }
    lam, x = 0.3, pixels(4)
    moved = deviation(pico, a, b, x, lam)["feature"]
    d = {k: b[k] - a[k] for k in ("proj", "ln_post.weight", "ln_post.bias")}
    only = lambda P: layers(
        pico.with_state(
            {
                **a,
                "ln_post.weight": d["ln_post.weight"],
                "ln_post.bias": d["ln_post.bias"],
                "proj": P,
            }
        ),
        pico.normalise(x),
    )["feature"]
    assert (
        torch.allclose(moved, -lam * (1 - lam) * only(d["proj"]), atol=1e-5) and moved.norm() > 0.1
    )


def test_bad_inputs(pico):
    a = near(pico, 1)
    with pytest.raises(ValueError, match="no images"):
        ctl_per_block(pico, a, a, pixels(0), 0.5)
    for f in (ctl_per_block, deviation):
        with pytest.raises(ValueError, match=r"expected a number in \[0, 1\]"):
            f(pico, a, a, pixels(2), 1.5)
        with pytest.raises(ValueError, match="the two ends of the path differ"):
            f(pico, a, {**a, "proj": torch.ones(2, 2)}, pixels(2), 0.5)


# --- Theorem 3.1 --------------------------------------------------------------------------------

lams = st.floats(0.01, 0.99)


@given(lams, st.floats(0, 1))
def test_kernel_is_its_two_pieces_and_integrates_to_half_its_peak(lam, t):
    assert float(weight_kernel(lam, t)) == pytest.approx(
        t * (1 - lam) if t <= lam else lam * (1 - t)
    )
    at, w = nodes([lam])
    assert (w * weight_kernel(lam, at)).sum() == pytest.approx(
        lam * (1 - lam) / 2, abs=1e-14
    ) and w.sum() == pytest.approx(1)
    assert ((at > 0) & (at < 1)).all() and (weight_kernel(lam, at) > 0).all()


@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan")])
def test_kernel_refuses_other_lams(lam):
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        weight_kernel(lam, 0.5)


def two_layer(seed):
    "(f, a, b): tanh network on 4 inputs with 3 outputs."
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g).double()
    x = draw(4, 5)
    a, b = ({"W1": draw(6, 5), "W2": draw(3, 6)} for _ in range(2))
    return lambda p: torch.tanh(x @ p["W1"].t()) @ p["W2"].t(), a, b


@settings(max_examples=5)
@given(st.integers(0, 10**6), lams)
def test_theorem_on_a_two_layer_network(seed, lam):
    f, a, b = two_layer(seed)
    (row,) = check_theorem(f, a, b, [lam], per=32)
    assert row["error"] <= 1e-6 and row["integral"] == pytest.approx(row["measured"])
    assert row["measured"] <= row["eq10"] * (1 + 1e-9) and row["eq10"] <= row["eq11"] * (1 + 1e-9)


def test_the_sign_is_minus():
    f, a, b = two_layer(1)
    t, w = nodes([0.5], 16)
    integral = sum(wi * weight_kernel(0.5, ti) * second(f, a, b, ti) for ti, wi in zip(t, w))
    delta = f(between(a, b, 0.5)) - (f(a) + f(b)) / 2
    assert torch.allclose(delta, -integral, atol=1e-8) and not torch.allclose(
        delta, integral, atol=1e-2
    )


def test_second_is_the_hessian_contracted_twice():
    f, a, b = two_layer(2)
    flat = lambda p: torch.cat([p["W1"].flatten(), p["W2"].flatten()])
    one = lambda v: f({"W1": v[:30].view(6, 5), "W2": v[30:].view(3, 6)})[1, 2]
    d = flat(b) - flat(a)
    H = torch.autograd.functional.hessian(one, flat(between(a, b, 0.3)))
    assert second(f, a, b, 0.3)[1, 2].item() == pytest.approx((d @ H @ d).item())


def test_theorem_on_a_tower(pico):
    a, b = doubled(near(pico, 1), near(pico, 2))
    for layer in ("block 1", "feature"):
        (r,) = check_theorem(tower(pico, pixels(1), layer=layer), a, b, [0.4], per=5)
        assert r["error"] < 1e-4 and 0 < r["measured"] <= r["eq10"] <= r["eq11"] * (1 + 1e-9)


def test_a_straight_function_has_no_deviation():
    a = {"w": torch.tensor([1.0, 2.0]).double()}
    (row,) = check_theorem(
        lambda p: 3 * p["w"] + p["w"].detach() * 0 + (p["w"] * 0).square(), a, {"w": -a["w"]}, [0.3]
    )
    assert row["measured"] < 1e-15 and row["eq11"] < 1e-15


# --- exact derivatives --------------------------------------------------------------------------


def test_elementary_layer_norm_has_the_same_values(pico):
    x, n = torch.randn(3, 5, 8), torch.nn.LayerNorm(8)
    torch.nn.init.normal_(n.weight)
    torch.nn.init.normal_(n.bias)
    want = n(x)
    with exact():
        assert torch.allclose(n(x), want, atol=1e-6)
        assert torch.allclose(
            torch.nn.functional.layer_norm(x, (5, 8)), torch.nn.LayerNorm((5, 8))(x), atol=1e-6
        )
        y = torch.randn(2, 4).bfloat16() @ torch.randn(4, 4).bfloat16()
        assert y.dtype == torch.bfloat16  # nothing is cast behind one's back
    assert torch.equal(n(x), want)  # and outside all is as before


def test_third_derivative_through_layer_norm():
    """The fused kernel gets this wrong.

    Ours agrees with central differences of the (right) second one."""
    g = torch.Generator().manual_seed(0)
    x, v, c = torch.randn(3, 2, 6, generator=g).double()

    def nth(t, n):
        t = torch.tensor(t, dtype=torch.double, requires_grad=True)
        with exact():
            y = (c * torch.nn.functional.layer_norm(x + t * v, (6,))).sum()
            for _ in range(n):
                (y,) = torch.autograd.grad(y, t, create_graph=True)
        return y.item()

    assert nth(0.3, 3) == pytest.approx((nth(0.3 + 1e-4, 2) - nth(0.3 - 1e-4, 2)) / 2e-4, rel=1e-5)


def test_tower_is_the_model_and_keeps_its_precision(pico):
    state, x = near(pico, 1), pixels(3)
    f = tower(pico, x)
    assert torch.allclose(
        f({k: v for k, v in state.items() if v.is_floating_point()}),
        encode(pico.with_state(state), pico.normalise(x)),
        atol=1e-5,
    )
    assert f(*doubled(state)).dtype == torch.float64 and f(state).dtype == torch.float32
    everything = tower(pico, x, layer=None)(*doubled(state))
    assert list(everything) == BLOCKS and torch.equal(everything["feature"], f(*doubled(state)))


# --- where CTL holds ----------------------------------------------------------------------------


def row(lam, coefficient, cosine=1.0):
    return dict(lam=lam, block="feature", coefficient=coefficient, cosine=cosine)


def test_valid_range():
    rows = [row(0, 1), row(0.25, 1.04), row(0.5, 1.2), row(0.75, 1.01), row(1, 1)]
    assert valid_range(rows) == (0.25, 0.75) and valid_range(reversed(rows)) == (0.25, 0.75)
    assert valid_range(rows, within=0.3) == (1, 0) and valid_range(rows, within=0.02) == (0, 0.75)
    assert valid_range([row(0, 1), row(0.5, 1, 0.9), row(1, 1)]) == (0, 1)
    with pytest.raises(ValueError, match="no rows of block 'x'"):
        valid_range(rows, "x")
    with pytest.raises(ValueError, match="from λ = 0 to 1"):
        valid_range(rows[2:3])


# --- Lemma 4.1 ----------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
def test_shares_of_a_space_and_its_complement_add_up(seed):
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(8, 8, generator=g).double())[0]
    d = torch.randn(5, 8, generator=g)
    s = share(d, Q[:, :3])
    assert (
        torch.allclose(s + share(d, Q[:, 3:]), torch.ones(5).double())
        and (0 <= s).all()
        and torch.allclose(share(3 * d, Q[:, :3]), s)
    )


def test_what_the_head_cannot_see_lies_outside_its_rows():
    g = torch.Generator().manual_seed(0)
    W, d = torch.randn(4, 9, generator=g).double(), torch.randn(6, 9, generator=g).double()
    B = row_space(W)
    unseen = d - d @ B @ B.t()
    assert (
        B.shape == (9, 4)
        and (unseen @ W.t()).abs().max() < 1e-12
        and share(unseen, B).max() < 1e-20
    )
    assert row_space(torch.cat([W, W[:2] + W[1:3]])).shape == (9, 4)


def test_feature_span_is_the_best_subspace():
    g = torch.Generator().manual_seed(1)
    h = torch.randn(40, 6, generator=g) * torch.tensor([5.0, 3.0, 1.0, 0.1, 0.1, 0.1])
    unit = torch.nn.functional.normalize(h, dim=-1)
    best = share(unit, feature_span(h, 2)).mean()
    other = torch.linalg.qr(torch.randn(6, 2, generator=g))[0]
    assert best > share(unit, other).mean() and share(
        unit, feature_span(h, 6)
    ).min() == pytest.approx(1)
    for k in (0, 7):
        with pytest.raises(ValueError, match="expected 1 .. 6"):
            feature_span(h, k)
