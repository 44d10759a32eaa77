"""Stage I: projections, the learned split, and the mined prompt."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from conftest import near, pixels
from lfpm_nb.clip import features, logits
from lfpm_nb.core import generator
from lfpm_nb.subspace import (
    Shadow,
    clip_rows,
    learn_subspace,
    mine_prompt,
    mining_loss,
    p_adv,
    p_clean,
    shift,
    token_norm,
)


@pytest.fixture(scope="module")
def shadow(pico):
    return Shadow.of(pico, 96, 32, seed=0)


def basis(d: int, r: int, seed: int):
    return torch.linalg.qr(
        torch.randn(d, r, generator=generator("basis", seed), dtype=torch.double)
    )[0]


# --- projections --------------------------------------------------------------------------------


@given(st.integers(2, 12), st.integers(0, 99), st.data())
def test_projections(d, seed, data):
    U, h = (
        basis(d, data.draw(st.integers(1, d)), seed),
        torch.randn(5, d, generator=generator("h", seed), dtype=torch.double),
    )
    a, c = p_adv(U, h), p_clean(U, h)
    close = lambda x, y: torch.allclose(x, y, atol=1e-10)
    assert close(p_adv(U, a), a) and close(p_clean(U, c), c) and close(a + c, h), (
        "idempotent and complementary"
    )
    assert close(p_adv(U, c), 0 * h) and close(
        (a * c).sum(-1), torch.zeros(5, dtype=torch.double)
    ), "orthogonal"
    assert close(a, h @ (U @ U.T)) and close(
        a.square().sum(-1) + c.square().sum(-1), h.square().sum(-1)
    )


def test_without_a_basis_both_projections_are_the_identity():
    h = torch.randn(3, 4)
    assert torch.equal(p_adv(None, h), h) and torch.equal(p_clean(None, h), h)


# --- the split ----------------------------------------------------------------------------------


def toy(n: int = 600, d: int = 8, classes: int = 3):
    "Features whose first three coordinates say the class under the head W, the others nothing."
    y = torch.randint(classes, (n,), generator=generator("toy y"))
    h = torch.cat(
        [2.0 * F.one_hot(y, classes), torch.zeros(n, d - classes)], 1
    ) + 0.7 * torch.randn(n, d, generator=generator("toy h"))
    return h, y, 10 * F.pad(torch.eye(classes), (0, d - classes))


def kl_from_uniform(z):
    return (-z.log_softmax(-1).mean(-1) - torch.tensor(float(z.shape[-1])).log()).mean().item()


@pytest.mark.parametrize("r", [1, 2, 4])
def test_basis_is_semi_orthogonal(r):
    U, log = learn_subspace(*toy(), r=r, epochs=2)
    assert U.shape == (8, r) and (U.T @ U - torch.eye(r)).abs().max() < 1e-5 and not U.requires_grad
    assert len(log) == 2 and all(len(row) == 2 and min(row) > -1e-4 for row in log)


def test_adversarial_part_says_nothing_and_clean_part_still_classifies():
    h, y, W = toy()
    U, log = learn_subspace(h, y, W, r=2, epochs=12, lr=0.03)
    U0 = torch.linalg.qr(torch.randn(8, 2, generator=generator("U", 0)))[0]
    before, after = (kl_from_uniform(logits(p_adv(V, h), W)) for V in (U0, U))
    assert after < 0.1 * before and after < 0.1, (before, after)
    acc = lambda z: (z.argmax(1) == y).float().mean().item()
    assert (
        acc(logits(p_clean(U, h), W)) >= acc(logits(h, W)) - 0.02 and log[-1][1] < 0.2 * log[0][1]
    )


def test_beta_zero_leaves_the_adversarial_part_talking():
    h, y, W = toy()
    kl = [
        kl_from_uniform(
            logits(p_adv(learn_subspace(h, y, W, r=2, beta=b, epochs=12, lr=0.03)[0], h), W)
        )
        for b in (0.0, 1.0)
    ]
    assert kl[1] < 0.5 * kl[0]


def test_split_is_seeded_and_blind_to_the_length_of_features():
    h, y, W = toy()
    one, again, longer, other = (
        learn_subspace(x, y, W, r=2, epochs=1, seed=s)[0]
        for x, s in ((h, 0), (h, 0), (7 * h, 0), (h, 1))
    )
    assert (
        torch.equal(one, again)
        and torch.allclose(one, longer, atol=1e-4)
        and not torch.allclose(one, other, atol=1e-2)
    )


# --- the prompt ---------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", [True, False])
@given(seed=st.integers(0, 99))
def test_mining_loss_against_loops_and_its_bounds(seed, partition):
    g = generator("mine", seed)
    ref, ref_p, h, h_p = (torch.randn(4, 5, generator=g) for _ in range(4))
    U = basis(5, 2, seed).float() if partition else None
    P, Q = (U @ U.T, torch.eye(5) - U @ U.T) if partition else (torch.eye(5), torch.eye(5))
    unit = lambda v: [x / x.norm() for x in v]
    mean = sum(P @ x for x in unit(h_p)) / 4
    want = [
        sum((Q @ (a - b)).square().sum() for a, b in zip(unit(ref), unit(ref_p))) / 4,
        sum((P @ (a - b)).square().sum() for a, b in zip(unit(h), unit(h_p))) / 4,
        sum((P @ b - mean).square().sum() for b in unit(h_p)) / 4,
    ]
    total, got = mining_loss(U, ref, ref_p, h, h_p, 2.0)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want)) and torch.allclose(
        total, 2 * want[0] - want[1] + want[2], atol=1e-5
    )
    assert all(0 <= t <= 4 + 1e-5 for t in got), "squared distances of parts of unit vectors"
    assert torch.allclose(total, mining_loss(U, 3 * ref, 2 * ref_p, h, 5 * h_p, 2.0)[0], atol=1e-5)


@given(st.floats(1e-3, 10), st.integers(0, 99))
def test_clip_rows(limit, seed):
    p = torch.randn(6, 4, generator=generator("rows", seed)) * torch.logspace(-3, 2, 6)[:, None]
    q = clip_rows(p, limit)
    assert (q.norm(dim=-1) <= limit * (1 + 1e-5)).all() and torch.allclose(
        F.cosine_similarity(p, q), torch.ones(6), atol=1e-4
    )
    short = p.norm(dim=-1) <= limit
    assert torch.equal(q[short], p[short]) and clip_rows(torch.zeros(1, 4), limit).abs().sum() == 0


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_shift_is_the_mean_distance_of_unit_vectors(n, d, seed):
    g = generator("shift", seed)
    h, h_p = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
    want = (
        sum(
            max(0.0, 2 - 2 * ((u @ v) / (u.norm() * v.norm())).item()) ** 0.5
            for u, v in zip(h, h_p)
        )
        / n
    )  # |u - v|² of unit vectors
    assert (
        shift(h, h_p) == pytest.approx(want, abs=1e-3)
        and shift(h, 3 * h) < 1e-6
        and shift(h, -h) == pytest.approx(2, abs=1e-6)
    )
    assert shift(2 * h, 5 * h_p) == pytest.approx(shift(h, h_p), abs=1e-5) and shift(
        h_p, h
    ) == pytest.approx(shift(h, h_p), abs=1e-6)


def test_token_norm_is_the_mean_after_ln_pre(pico):
    x = pixels(4)
    norms = [t.norm().item() for row in pico.visual._embeds(pico.normalise(x)) for t in row]
    assert token_norm(pico, x) == pytest.approx(sum(norms) / len(norms), rel=1e-5)


@pytest.mark.parametrize("bound", [0.05, 1.0])
def test_mined_prompt_stays_within_its_bound(pico, shadow, bound):
    visual = pico.with_state(near(pico, 1))
    U = basis(32, 4, 0).float()
    p, log = mine_prompt(
        pico, visual, shadow, U, 1.0, length=5, steps=9, batch=32, lr=0.5, bound=bound
    )
    limit = bound * token_norm(pico, shadow.train[0][:256])
    assert (
        p.shape == (5, 64)
        and (p.norm(dim=-1) <= limit * (1 + 1e-5)).all()
        and p.norm(dim=-1).max() > 0.9 * limit
    ), "a large step meets the bound"
    assert (
        log and all(len(t) == 3 for t in log) and all(w.grad is None for w in visual.parameters())
    )


@pytest.mark.parametrize("U", [basis(32, 4, 0).float(), None], ids=["U", "no U"])
def test_mining_lowers_its_own_loss(pico, shadow, fp32, U):
    visual, x = pico.with_state(near(pico, 1)), shadow.train[0]
    f = lambda v, p: features(pico, v, x, p)
    loss = lambda p: mining_loss(
        U, f(pico.visual, None), f(pico.visual, p), f(visual, None), f(visual, p), 1.0
    )[0].item()
    first = 0.02 * torch.randn(5, 64, generator=generator("prompt", 0))
    p, log = mine_prompt(pico, visual, shadow, U, 1.0, length=5, steps=20, batch=16, seed=0)
    again, _ = mine_prompt(pico, visual, shadow, U, 1.0, length=5, steps=20, batch=16, seed=0)
    assert loss(p) < loss(first) and torch.equal(p, again)


# --- shadow data --------------------------------------------------------------------------------


def test_shadow_parts_are_disjoint_and_complete(shadow, pico):
    (x, y), (cx, cy) = shadow.train, shadow.check
    assert (
        (len(x), len(y), len(cx), len(cy)) == (96, 96, 32, 32)
        and torch.equal(torch.cat([x, cx]), shadow.x)
        and torch.equal(torch.cat([y, cy]), shadow.y)
    )
    assert not (x[:, None].flatten(2) == cx[None].flatten(2)).all(-1).any(), (
        "no held-out image is trained on"
    )
    assert len(shadow.W) > int(shadow.y.max()) and shadow.W.shape[1] == 32
    assert torch.equal(Shadow.of(pico, 96, 32, 0).x, shadow.x) and not torch.equal(
        Shadow.of(pico, 96, 32, 1).x, shadow.x
    )


def test_nothing_trains_on_held_out_images(pico, shadow):
    other = Shadow(
        torch.cat([shadow.train[0], 255 - shadow.check[0]]),
        torch.cat([shadow.train[1], shadow.check[1].flip(0)]),
        shadow.W,
        shadow.held,
    )
    visual, U = pico.with_state(near(pico, 1)), basis(32, 4, 0).float()
    assert torch.equal(
        *(
            mine_prompt(pico, visual, s, U, 1.0, length=2, steps=4, batch=32)[0]
            for s in (shadow, other)
        )
    )
