"""Stage II.

The path loss, one backward pass for two gradients, the worst prompt, and the exact switches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import near
from lfpm_nb import antibackdoor as B
from lfpm_nb.antibackdoor import (
    Strengths,
    accumulate,
    classify,
    path_loss,
    path_points,
    stage_one,
    step_loss,
    terms,
    train_anti,
    train_on_shadow,
    worst_prompt,
)
from lfpm_nb.clip import Clip, encode, logits, lr_at
from lfpm_nb.core import Diverged, generator
from lfpm_nb.defend import counting
from lfpm_nb.lora import dense, trainable
from lfpm_nb.subspace import Shadow
from lfpm_nb.tune import batches, optimiser

S = Strengths(
    A=True,
    rank=4,
    rho=0.1,
    prompt_length=3,
    prompt_steps=2,
    semantic=(1.0, 3.0),
    epochs=1,
    batch=16,
    lr=1e-3,
    points=5,
)


@pytest.fixture(scope="module")
def theta(pico):
    return near(pico, 1)


@pytest.fixture(scope="module")
def prompt(prompts):
    return prompts[0]


@pytest.fixture
def step(pico, theta, shadow):
    "Two different towers with gradients on, and a batch of normalised shadow images."
    mm, anti = (pico.with_state(s).requires_grad_(True) for s in (theta, near(pico, 2)))
    return mm, anti, pico.normalise(shadow.x[:8]), shadow.y[:8], shadow.W


def grads(v):
    return [None if p.grad is None else p.grad.clone() for p in v.parameters()]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


# --- the path loss ------------------------------------------------------------------------------


@given(st.integers(1, 20), st.data())
def test_points_are_evenly_spaced_with_both_ends(n, data):
    i, j = sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2)))
    assert path_points(i / n, j / n, n) == [k / n for k in range(i, j + 1)]


@given(st.integers(0, 999), st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(1, 4))
def test_path_loss_against_loops(seed, points, n):
    g = generator("path", seed)
    a, b, W, y = (
        torch.randn(n, 6, generator=g),
        torch.randn(n, 6, generator=g),
        5 * torch.randn(4, 6, generator=g),
        torch.randint(4, (n,), generator=g),
    )
    total = 0.0
    for s in points:
        for i in range(n):
            h = (1 - s) * a[i] + s * b[i]
            total -= (W @ h / h.norm()).log_softmax(0)[y[i]].item()
    assert path_loss(a, b, y, W, points).item() == pytest.approx(
        total / len(points) / n, rel=1e-3, abs=1e-4
    )


def test_path_loss_at_the_ends_ignores_the_other_model():
    a, b, y, W = torch.randn(3, 6), torch.randn(3, 6), torch.tensor([0, 1, 2]), torch.randn(4, 6)
    assert torch.equal(path_loss(a, b, y, W, [1.0]), path_loss(-a, b, y, W, [1.0])) and torch.equal(
        path_loss(a, b, y, W, [0.0]), path_loss(a, 2 - b, y, W, [0.0])
    )


# --- two gradients in one backward pass ---------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_accumulation_against_two_separate_passes(pico, step, prompt, fp32, gamma):
    mm, anti, x, y, W = step
    s, points = replace(S, B=False), path_points(*S.interval, S.points)
    want = []
    for model, other, order in ((anti, mm, lambda a, b: (b, a)), (mm, anti, lambda a, b: (a, b))):
        of = lambda q: path_loss(
            *order(encode(model, x, q), encode(other, x, q).detach()), y, W, points
        )
        loss = of(None) + s.prompted_weight * of(prompt)
        want.append(torch.autograd.grad(loss, list(model.parameters())))
    step_loss(mm, anti, x, y, W, prompt, s).backward()
    accumulate(anti, mm, gamma)
    assert all(
        torch.allclose(p.grad, a + gamma * m, atol=1e-5, rtol=1e-4)
        for p, a, m in zip(anti.parameters(), *want)
    )
    assert all(p.grad is None for p in mm.parameters()) and any(
        m.abs().max() > 1e-4 for m in want[1]
    ), "the merged model's gradient is not trivial"


def test_the_step_is_clean_plus_worst_prompt(pico, step, prompt, fp32):
    mm, anti, x, y, W = step
    points = path_points(*S.interval, S.points)
    loss = lambda q: path_loss(encode(mm, x, q), encode(anti, x, q), y, W, points)
    bad = worst_prompt(loss, prompt, S.rho)
    for v in (mm, anti):
        v.zero_grad()
    both = loss(None) + S.prompted_weight * loss(bad)
    want = torch.autograd.grad(both, list(anti.parameters()), retain_graph=True)
    got = step_loss(mm, anti, x, y, W, prompt, S)
    assert got.item() == pytest.approx(both.item(), rel=1e-5) and loss(bad) > loss(prompt)
    heavier = step_loss(mm, anti, x, y, W, prompt, replace(S, prompted_weight=3.0))
    assert heavier.item() == pytest.approx((loss(None) + 3 * loss(bad)).item(), rel=1e-5)
    got.backward()
    assert all(
        torch.allclose(p.grad, w, atol=1e-5, rtol=1e-4) for p, w in zip(anti.parameters(), want)
    ), "the search for the prompt leaves no gradient behind"


@given(st.integers(0, 999), st.floats(0, 2))
def test_worst_prompt_is_a_step_of_rho_norms_uphill(seed, rho):
    g = generator("worst", seed)
    p, w = torch.randn(3, 5, generator=g), torch.randn(3, 5, generator=g)
    before = p.clone()
    q = worst_prompt(lambda v: (v * w).sum().sigmoid(), p, rho)
    assert (
        (q - p).norm().item() == pytest.approx(rho * p.norm().item(), rel=1e-3, abs=1e-5)
        and torch.equal(p, before)
        and not q.requires_grad
    )
    if rho > 0.01:
        assert F.cosine_similarity((q - p).flatten(), w.flatten(), dim=0) > 0.99


def test_the_ascent_computes_no_gradient_of_weights(step, prompt):
    mm, anti, x, y, W = step

    def work():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
            worst_prompt(
                lambda q: path_loss(encode(mm, x, q), encode(anti, x, q), y, W, [0.5, 1.0]),
                prompt,
                0.1,
            )
        return count.get_total_flops()

    trainable = work()
    assert grads(mm) == grads(anti) == [None] * len(list(mm.parameters()))
    for v in (mm, anti):
        v.requires_grad_(False)
    frozen = work()
    assert trainable == frozen, f"{trainable / frozen:.2f} times the work of frozen towers"


# --- theta_mm, theta_pre and the prompt are inputs ----------------------------------------------


def test_the_merged_model_never_changes(pico, theta, shadow, prompts, monkeypatch):
    towers, before, pre, p = (
        [],
        {k: v.clone() for k, v in theta.items()},
        pico.state(),
        prompts.clone(),
    )
    make = Clip.with_state
    monkeypatch.setattr(
        Clip, "with_state", lambda self, s: towers.append(make(self, s)) or towers[-1]
    )
    end, log = train_anti(pico, theta, shadow, prompts, replace(S, epochs=2), 0, "x")
    assert (
        same(theta, before)
        and same(towers[0].state_dict(), before)
        and same(pico.state(), pre)
        and torch.equal(prompts, p)
    )
    assert (
        not same(end, before)
        and end.keys() == before.keys()
        and {v.dtype for v in end.values()} == {torch.float32}
        and len(log["loss"]) == 8
    )


def test_start(pico, theta, shadow, prompts):
    for start, state in (("merged", theta), ("pretrained", pico.state())):
        assert same(
            train_anti(pico, theta, shadow, prompts, replace(S, lr=0.0, start=start), 0, "x")[0],
            state,
        )


def test_training_is_seeded_and_uses_no_held_out_image(pico, theta, shadow, prompts):
    other = Shadow(
        torch.cat([shadow.train[0], 255 - shadow.check[0]]),
        torch.cat([shadow.train[1], shadow.check[1].flip(0)]),
        shadow.W,
        shadow.held,
    )
    one, again, seed = (
        train_anti(pico, theta, sh, prompts, S, s, "x")[0]
        for sh, s in ((shadow, 0), (other, 0), (shadow, 1))
    )
    assert same(one, again) and not same(one, seed)


def test_training_lowers_the_path_loss(pico, theta, shadow, prompts, fp32):
    x, y = shadow.train
    end, _ = train_anti(pico, theta, shadow, prompts, replace(S, epochs=4), 0, "x")
    mm = pico.with_state(theta)
    loss = lambda v: path_loss(
        encode(mm, pico.normalise(x)),
        encode(v, pico.normalise(x)),
        y,
        shadow.W,
        path_points(*S.interval, S.points),
    ).item()
    assert loss(pico.with_state(end)) < loss(mm)


def test_steps_take_the_prompts_in_turn(pico, theta, shadow, prompts, monkeypatch):
    seen, real = [], B.step_loss
    monkeypatch.setattr(
        B,
        "step_loss",
        lambda mm, anti, x, y, W, p, s: seen.append(p) or real(mm, anti, x, y, W, p, s),
    )
    train_anti(pico, theta, shadow, prompts, S, 0, "x")
    assert len(seen) == 4 and all(torch.equal(p, prompts[k % 2]) for k, p in enumerate(seen))


def test_a_loss_that_is_not_finite_stops(pico, theta, shadow):
    with pytest.raises(Diverged, match="LFPM, step 0: the loss is nan at lr .*; lower lr") as e:
        train_anti(pico, theta, shadow, torch.full((1, 3, 64), float("nan")), S, 0, "LFPM")
    assert same(e.value.state, theta), "the last good weights"


# --- the loop that all defences share, and adapters ---------------------------------------------


def stage_two_written_out(clip, theta_mm, shadow, prompts, s, seed):
    "LFPM's loop as it stood before it was shared."
    (x, y), losses = shadow.train, []
    mm, anti = (
        clip.with_state(theta_mm).requires_grad_(True),
        clip.with_state(theta_mm if s.start == "merged" else clip.state()).requires_grad_(True),
    )
    opt, steps = (
        optimiser(anti.parameters(), s.lr, s.weight_decay),
        list(batches(len(y), s.batch, s.epochs, "anti", seed)),
    )
    for k, i in enumerate(steps):
        for g in opt.param_groups:
            g["lr"] = lr_at(k, len(steps), s.lr, 10)
        loss = step_loss(
            mm, anti, clip.normalise(x[i]), y[i], shadow.W, prompts[k % len(prompts)], s
        )
        opt.zero_grad()
        loss.backward()
        for a, m in zip(anti.parameters(), mm.parameters()):
            if m.grad is not None and s.C and s.gamma:
                a.grad.add_(m.grad, alpha=s.gamma)
            m.grad = None
        torch.nn.utils.clip_grad_norm_(anti.parameters(), 1.0)
        opt.step()
        losses.append(loss.item())
    return {k: v.detach().float() for k, v in anti.state_dict().items()}, losses


@pytest.mark.parametrize(
    "change", [{}, dict(gamma=0.3), dict(B=False, C=False), dict(start="pretrained")], ids=str
)
def test_the_shared_loop_gives_lfpm_bit_for_bit(pico, theta, shadow, prompts, change):
    s = replace(S, **change)
    (want, losses), (got, log) = (
        stage_two_written_out(pico, theta, shadow, prompts, s, 0),
        train_anti(pico, theta, shadow, prompts, s, 0, "x"),
    )
    assert same(want, got) and log == dict(loss=losses)


def test_the_loop_gives_pixels_labels_and_prompts_in_order(pico, theta, shadow, prompts):
    seen, (x, y) = [], shadow.train

    def loss(visual, *batch):
        seen.append(batch)
        return visual.proj.square().sum()

    train_on_shadow(pico, theta, shadow, prompts, replace(S, epochs=2), 3, "x", loss)
    for k, ((a, b, p), i) in enumerate(zip(seen, batches(64, 16, 2, "anti", 3), strict=True)):
        assert (
            a.dtype == torch.uint8
            and torch.equal(a, x[i])
            and torch.equal(b, y[i])
            and torch.equal(p, prompts[k % 2])
        )


def test_terms_are_cross_entropies_of_what_is_asked_for(pico, theta, shadow, prompt, fp32):
    from functools import partial

    v, x, y = pico.with_state(theta), shadow.x[:6], shadow.y[:6]
    one = {
        q is None: F.cross_entropy(logits(encode(v, pico.normalise(x), q), shadow.W), y)
        for q in (None, prompt)
    }
    got = [
        terms(pico, partial(encode, v), shadow.W, x, y, i).item()
        for i in ((None,), (prompt,), (None, prompt))
    ]
    assert got == pytest.approx(
        [one[True].item(), one[False].item(), (one[True] + one[False]).item()], rel=1e-5
    )
    assert torch.equal(
        classify(pico, partial(encode, v), shadow.W, x),
        classify(pico, partial(encode, v), shadow.W, x.float() / 255),
    )


@pytest.mark.parametrize("change", [{}, dict(B=False, C=False)], ids=str)
def test_with_adapters_only_attention_moves_by_the_rank(pico, theta, shadow, prompts, change):
    end, _ = train_anti(pico, theta, shadow, prompts, replace(S, lora=2, **change), 0, "x")
    moved = {k for k in theta if not torch.equal(theta[k], end[k])}
    assert moved == {k for k in theta if k.endswith("attn.in_proj_weight")} and len(moved) == 2
    assert all(
        torch.linalg.matrix_rank(third, rtol=1e-3) == 2
        for k in moved
        for third in (end[k] - theta[k]).chunk(3)
    )


def test_accumulation_through_adapters_is_the_chain_rule(pico, theta, shadow, prompt, fp32):
    """Against a loss that reaches both models through the same adapters.

    Gamma = 1 sums the two gradients with respect to them."""
    anti, mm = pico.with_state(theta), pico.with_state(near(pico, 2)).requires_grad_(True)
    params = trainable(anti, 2, "x")
    for p in params:
        p.data.normal_(0, 0.1, generator=generator("adapters"))
    step_loss(mm, anti, pico.normalise(shadow.x[:8]), shadow.y[:8], shadow.W, prompt, S).backward()
    g_anti, g_mm = (
        [p.grad.clone() for p in params],
        {n: m.grad.clone() for n, m in mm.named_parameters()},
    )
    frozen = [
        m.requires_grad for n, m in anti.named_parameters() if n.endswith("proj") or "c_fc" in n
    ]
    accumulate(anti, mm, 1.0)
    at = dense(anti)
    for block in range(2):
        name = f"transformer.resblocks.{block}.attn"
        q = anti.get_submodule(name).parametrizations.in_proj_weight[0]
        for third, G in enumerate(g_mm[f"{name}.in_proj_weight"].chunk(3)):
            i, j = (next(n for n, p in enumerate(params) if p is v) for v in (q.A, q.B))
            assert torch.allclose(
                q.B.grad[third] - g_anti[j][third], q.s * G @ q.A[third].t(), atol=1e-5
            )
            assert torch.allclose(
                q.A.grad[third] - g_anti[i][third], q.s * q.B[third].t() @ G, atol=1e-5
            )
    assert (
        not any(frozen) and same(at, dense(anti)) and all(m.grad is None for m in mm.parameters())
    )


# --- A, B, C ------------------------------------------------------------------------------------


class Absent(torch.nn.Module):
    def forward(self, *_):
        raise AssertionError("the merged model was asked")

    _embeds = forward


@pytest.mark.parametrize("with_b", [True, False])
def test_c_off_leaves_the_merged_model_out(pico, step, prompt, fp32, with_b):
    _, anti, x, y, W = step
    s = replace(S, C=False, B=with_b)
    got = step_loss(Absent(), anti, x, y, W, prompt, s)
    own = lambda q: F.cross_entropy(logits(encode(anti, x, q), W), y)
    worst = worst_prompt(own, prompt, s.rho) if with_b else prompt
    assert got.item() == pytest.approx(
        (own(None) + s.prompted_weight * own(worst)).item(), rel=1e-5
    )


def test_c_off_ignores_gamma_interval_and_points(pico, theta, shadow, prompts):
    ends = [
        train_anti(pico, theta, shadow, prompts, replace(S, C=False, **k), 0, "x")[0]
        for k in ({}, dict(gamma=7.0), dict(interval=(0.0, 0.5)), dict(points=2))
    ]
    assert all(same(ends[0], e) for e in ends[1:])


def test_c_on_uses_gamma_and_interval(pico, theta, shadow, prompts):
    s = replace(S, epochs=2, start="pretrained")
    ends = [
        train_anti(pico, theta, shadow, prompts, replace(s, **k), 0, "x")[0]
        for k in ({}, dict(gamma=0.0), dict(interval=(0.0, 1.0)), dict(C=False))
    ]
    assert not any(same(a, b) for i, a in enumerate(ends) for b in ends[:i])


def test_b_off_leaves_the_prompt(pico, step, prompt, fp32, monkeypatch):
    mm, anti, x, y, W = step
    near_zero = step_loss(mm, anti, x, y, W, prompt, replace(S, rho=0.0))
    monkeypatch.setattr(B, "worst_prompt", None)  # calling it would fail
    got = step_loss(mm, anti, x, y, W, prompt, replace(S, B=False))
    points = path_points(*S.interval, S.points)
    plain, under = (
        path_loss(encode(mm, x, q), encode(anti, x, q), y, W, points) for q in (None, prompt)
    )
    want = plain + S.prompted_weight * under
    assert torch.equal(got, near_zero) and got.item() == pytest.approx(want.item(), rel=1e-5)


def test_b_off_ignores_rho_and_b_on_does_not(pico, theta, shadow, prompts):
    off, off2, on = (
        train_anti(pico, theta, shadow, prompts, replace(S, **k), 0, "x")[0]
        for k in (dict(B=False), dict(B=False, rho=9.0), dict(rho=0.5))
    )
    assert same(off, off2) and not same(off, on)


def test_a_off_makes_no_subspace(pico, theta, shadow, monkeypatch):
    with_a, log = stage_one(pico, theta, shadow, S, 0)
    assert (
        with_a.keys() == {"p", "U"}
        and with_a["U"].shape == (32, 4)
        and with_a["p"].shape == (2, 3, 64)
        and log["subspace"]
    )
    given_U, mine = [], B.mine_prompt
    monkeypatch.setattr(
        B,
        "mine_prompt",
        lambda clip, visual, shadow, U, *a, **k: (
            given_U.append(U) or mine(clip, visual, shadow, U, *a, **k)
        ),
    )
    monkeypatch.setattr(B, "learn_subspace", None)  # calling it would fail
    without, log = stage_one(pico, theta, shadow, replace(S, A=False), 0)
    assert (
        without.keys() == {"p"}
        and given_U == [None, None]
        and not log.get("subspace")
        and not torch.equal(without["p"], with_a["p"])
    )
    other, _ = stage_one(pico, theta, shadow, replace(S, A=False, rank=8), 0)
    assert torch.equal(without["p"], other["p"]), "the rank does not matter with A off"


def test_stage_one_is_seeded_and_asks_the_merged_model(pico, theta, shadow):
    one, again, other = (
        stage_one(pico, t, shadow, S, 0)[0] for t in (theta, theta, near(pico, 2, 0.1))
    )
    assert (
        torch.equal(one["U"], again["U"])
        and torch.equal(one["p"], again["p"])
        and not torch.equal(one["U"], other["U"])
        and not torch.equal(one["p"], other["p"])
    )


def test_every_semantic_weight_gives_one_prompt_and_says_how_far_it_moves(pico, theta, shadow):
    """Each from its own start.

    The log's shift is that of the prompt beside it, on held-out pictures of the merged model."""
    mined, log = stage_one(pico, theta, shadow, replace(S, semantic=(2.0, 2.0, 0.5)), 3)
    visual, x = pico.with_state(theta), shadow.check[0]
    for k, (p, said) in enumerate(zip(mined["p"], log["prompt"], strict=True)):
        alone, terms = B.mine_prompt(
            pico,
            visual,
            shadow,
            mined.get("U"),
            (2.0, 2.0, 0.5)[k],
            S.prompt_length,
            S.prompt_steps,
            S.batch,
            bound=S.prompt_bound,
            seed=(3, k),
        )
        assert (
            torch.equal(p, alone)
            and said["terms"] == terms
            and said["semantic"] == (2.0, 2.0, 0.5)[k]
        )
        assert (
            said["shift"]
            == B.shift(B.features(pico, visual, x), B.features(pico, visual, x, p))
            > 0
        )
    assert not torch.equal(mined["p"][0], mined["p"][1]), "the same weight, another start"


def test_strengths_by_rule_are_taken_from_what_was_tried(pico, theta, shadow):
    mined, log = stage_one(pico, theta, shadow, replace(S, rank="rule", rho="rule"), 0)
    again, log2 = stage_one(pico, theta, shadow, replace(S, rank="rule", rho="rule"), 0)
    assert log == log2 and torch.equal(mined["p"], again["p"])
    assert (
        log["rank"] in log["ranks_tried"]
        and mined["U"].shape == (32, log["rank"])
        and log["rho"] in log["rhos_tried"]
        and log["rho"] > 0
    )
    assert all(0 <= a <= 1 for pair in log["ranks_tried"].values() for a in pair) and all(
        0 <= a <= 1 for a in log["rhos_tried"].values()
    )
    fixed, given = stage_one(pico, theta, shadow, replace(S, rank=log["rank"], rho=0.7), 0)
    assert (
        torch.equal(fixed["U"], mined["U"])
        and torch.equal(fixed["p"], mined["p"])
        and (given["rank"], given["rho"]) == (log["rank"], 0.7)
    )


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_slope_of_a_prompt_does_not_depend_on_how_many_images_are_taken_at_once(
    pico, shadow, prompts, fp32, monkeypatch, batch
):
    (x, y), q, asked, real = shadow.check, prompts[0].clone().requires_grad_(True), [], B.encode
    (want,) = torch.autograd.grad(
        F.cross_entropy(logits(encode(pico.visual, pico.normalise(x), q), shadow.W), y), q
    )
    monkeypatch.setattr(B, "encode", lambda v, xs, p: asked.append(len(xs)) or real(v, xs, p))
    got = B.prompted_slope(pico, shadow, prompts[0], batch)
    assert (
        torch.allclose(got, want, atol=1e-4 * want.abs().max().item())
        and max(asked) <= batch
        and sum(asked) == len(y)
    ), "a big held-out set must not fill a GPU"


def test_stage_one_computes_plain_features_once(pico, theta, shadow, monkeypatch):
    asked, real = [], B.plain_features
    monkeypatch.setattr(B, "plain_features", lambda *a: asked.append(1) or real(*a))
    with counting(pico) as n:
        stage_one(pico, theta, shadow, replace(S, A=False, rho=0.1, semantic=(2.0, 2.0, 2.0)), 0)
    k, held, mined = (
        len(shadow.train[1]),
        len(shadow.check[1]),
        3 * S.prompt_steps * min(S.batch, len(shadow.train[1])),
    )
    assert asked == [1] and n["passes"] == pytest.approx((2 * k + 4 * held) / 3 + 2 * mined), (
        "both models plain once, both prompted in each step, the held-out ones for the log"
    )


def test_the_rules_are_judged_on_held_out_images_by_clean_models(pico, theta, shadow, prompts):
    """rho: what theta_pre bears, whatever the merged model is.

    And training images have no say in it."""
    other = Shadow(
        torch.cat([255 - shadow.train[0], shadow.check[0]]),
        torch.cat([shadow.train[1].flip(0), shadow.check[1]]),
        shadow.W,
        shadow.held,
    )
    assert B.choose_rho(pico, shadow, prompts) == B.choose_rho(pico, other, prompts)
    assert all(v.grad is None and not v.requires_grad for v in pico.visual.parameters())


def test_strengths_are_checked():
    assert Strengths(interval=[0.2, 0.4]).interval == (0.2, 0.4) and Strengths(
        interval=(0, 0)
    ).interval == (0, 0)
    for bad in ((-0.1, 0.5), (0.5, 1.1), (0.8, 0.2)):
        with pytest.raises(ValueError, match="expected 0 <= a <= b <= 1"):
            Strengths(interval=bad)
    with pytest.raises(ValueError, match="start is 'mergd'; expected 'merged' or 'pretrained'"):
        Strengths(start="mergd")
