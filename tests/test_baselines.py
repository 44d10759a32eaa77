"""LFPM's rivals.

Each formula on a toy or against recorded values, and all of them behind one signature on one
small merge."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from conftest import near
from lfpm_nb import antibackdoor as B
from lfpm_nb import baselines as R
from lfpm_nb.antibackdoor import Strengths, classify, stage_one, terms, train_on_shadow
from lfpm_nb.baselines import (
    concrete,
    encode_at,
    js,
    length,
    masked_units,
    pam_offset,
    prune,
    sam_offset,
    shared_examples,
    shared_loss,
    stamped,
    train_at,
    worst_noise,
)
from lfpm_nb.clip import encode
from lfpm_nb.core import Diverged, check_same, generator
from lfpm_nb.defend import defences, knobs, train_defence
from lfpm_nb.subspace import Shadow
from lfpm_nb.tune import norm, task_vector

S = Strengths(
    rank=4,
    rho=0.1,
    prompt_length=3,
    prompt_steps=2,
    semantic=(1.0, 3.0),
    epochs=1,
    batch=16,
    lr=1e-3,
    points=4,
)
REFERENCE = Path(__file__).parent / "reference"
METHODS = pytest.mark.parametrize("method", sorted(defences))
# Image passes per shadow image and epoch. SAU asks the frozen model once about each of the 96
# images.
COST = {
    "LFPM": 6,
    "fine-tuning": 2,
    "fine-tuning-clean": 1,
    "SAM": 4,
    "SAM-prompt": 2,
    "ASAM": 4,
    "PAM": 2,
    "PAM-prompt": 1,
    "IBVS": 2,
    "SAU": 22 / 3 + 96 / 3 / 64,
    "ANP": 6,
    "AWM": 4,
}
TRAINED = pytest.mark.parametrize("method", sorted(set(defences) - {"ANP", "AWM"}))


@pytest.fixture(scope="module")
def merged(pico):
    return near(pico, 1)


@pytest.fixture(scope="module")
def prompts(pico, merged, shadow):
    return stage_one(pico, merged, shadow, S, 0)[0]["p"]


@pytest.fixture
def train(pico, merged, shadow, prompts):
    return lambda method, strength=None, s=S, seed=0, p=prompts: train_defence(
        method, merged, pico, shadow, p, s, seed, strength
    )


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a, b, **tol):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], **tol) for k in a)


def tensors(g, *shapes):
    return [torch.randn(s, generator=g) for s in shapes]


# --- another tower's weights --------------------------------------------------------------------


def test_encode_at_is_encode_with_those_weights(pico, prompts, shadow, fp32):
    v, other, x = pico.with_state(near(pico, 1)), near(pico, 2), pico.normalise(shadow.x[:4])
    for p in (None, prompts[0]):
        assert torch.equal(encode_at(v, {}, x, p), encode(v, x, p))
        assert torch.allclose(
            encode_at(v, other, x, p), encode(pico.with_state(other), x, p), atol=1e-6
        )
    w = {"proj": other["proj"].clone().requires_grad_(True)}
    encode_at(v, {"proj": 2 * w["proj"]}, x).sum().backward()
    assert (
        w["proj"].grad.abs().sum() > 0
        and same(v.state_dict(), near(pico, 1))
        and all(q.grad is None for q in v.parameters())
    )


# --- SAM and ASAM -------------------------------------------------------------------------------

RECORDED = json.loads((REFERENCE / "baselines_sam.json").read_text(encoding="utf-8"))["runs"]


@pytest.mark.parametrize("i", range(len(RECORDED)))
def test_sam_and_asam_step_by_step_against_recorded_values(i):
    """The same problem, steps and base optimisers as in tests/reference/baselines_sam.py, where
    pytorch_optimizer made them (its norm is float32)."""
    r, wave = (
        RECORDED[i],
        lambda n, *shape: torch.sin(torch.arange(n, dtype=torch.float64) * 1.7 + 0.3).reshape(
            shape
        ),
    )
    w = [torch.nn.Parameter(wave(30, 5, 6) * 0.6), torch.nn.Parameter(wave(18, 6, 3) * 0.8)]
    x, y = wave(80, 16, 5) * 2, torch.arange(16) * 7 % 3
    loss = lambda a, b: F.cross_entropy(torch.tanh(x @ a) @ b, y)
    opt = (
        torch.optim.SGD(w, 0.5, momentum=0.9)
        if r["base"] == "SGD"
        else torch.optim.AdamW(w, 0.05, weight_decay=0.01)
    )
    assert len(r["weights"]) == 6
    for want in r["weights"]:
        move = sam_offset(
            [v.detach() for v in w], torch.autograd.grad(loss(*w), w), r["rho"], r["adaptive"]
        )
        opt.zero_grad()
        loss(*(v + e for v, e in zip(w, move))).backward()
        opt.step()
        for v, a in zip(w, want):
            assert torch.allclose(
                v.flatten(), torch.tensor(a, dtype=torch.float64), rtol=0, atol=5e-7
            )


@given(st.integers(0, 999), st.floats(0.01, 5), st.floats(0.1, 10))
def test_offsets_have_the_length_asked_for(seed, rho, scale):
    g = generator("offset", seed)
    w, grad, w0 = (tensors(g, (3, 4), (5,)) for _ in range(3))
    sam, asam = (sam_offset(w, grad, rho, a) for a in (False, True))
    assert length(sam).item() == pytest.approx(rho, rel=1e-4) and length(
        [a / v.abs() for a, v in zip(asam, w)]
    ).item() == pytest.approx(rho, rel=1e-3)
    for e in (sam, asam):
        assert sum((a * b).sum() for a, b in zip(e, grad)) > 0, "uphill"
    big = sam_offset([scale * v for v in w], [v / scale for v in grad], rho, True)
    assert all(torch.allclose(a, scale * b, rtol=1e-3, atol=1e-5) for a, b in zip(big, asam)), (
        "ASAM does not care how weights are scaled"
    )


@given(st.integers(0, 999), st.floats(0.01, 20))
def test_pam_stays_between_the_current_and_the_backdoored_weights(seed, rho):
    g = generator("pam", seed)
    w, w0 = (tensors(g, (3, 4), (5,)) for _ in range(2))
    move, share = pam_offset(w, w0, rho)
    far = length([b - a for a, b in zip(w, w0)]).item()
    assert (
        length(move).item() == pytest.approx(min(rho, far), rel=1e-4)
        and share == pytest.approx(min(rho, far) / far, rel=1e-4)
        and share <= 1 + 1e-6
    )
    assert all(
        torch.allclose(a + m, a + share * (b - a), atol=1e-5) for a, m, b in zip(w, move, w0)
    )


def test_pam_has_no_direction_at_the_start():
    assert pam_offset([torch.ones(2)], [torch.ones(2)], 0.5)[1] == 0


@pytest.mark.parametrize("adaptive", [False, True])
def test_train_at_is_perturb_backward_restore_step(
    pico, merged, shadow, prompts, fp32, adaptive, monkeypatch
):
    """Against the usual way to write SAM: change the weights, take the gradient, put them back.

    With SGD, as Adam turns rounding into whole steps."""
    monkeypatch.setattr(B, "optimiser", lambda w, lr, _: torch.optim.SGD(w, 100 * lr))

    def by_hand(v, x, y, p):
        w, run = (
            list(v.parameters()),
            lambda: terms(pico, partial(encode, v), shadow.W, x, y, (None, p), S.prompted_weight),
        )
        move = sam_offset([q.detach() for q in w], torch.autograd.grad(run(), w), 0.3, adaptive)
        with torch.no_grad():
            [q.add_(e) for q, e in zip(w, move)]
        grads = torch.autograd.grad(run(), w)
        with torch.no_grad():
            [q.sub_(e) for q, e in zip(w, move)]
        return sum((q * a).sum() for q, a in zip(w, grads))

    want, _ = train_on_shadow(pico, merged, shadow, prompts, S, 0, "x", by_hand)
    got, _ = train_at(
        pico,
        merged,
        shadow,
        prompts,
        S,
        0,
        "x",
        lambda w, grad: sam_offset(w, grad(), 0.3, adaptive),
    )
    apart = lambda a, b: norm(task_vector(a, b))
    plain = train_on_shadow(
        pico,
        merged,
        shadow,
        prompts,
        S,
        0,
        "x",
        lambda v, x, y, p: terms(
            pico, partial(encode, v), shadow.W, x, y, (None, p), S.prompted_weight
        ),
    )[0]
    assert apart(got, want) < 1e-3 * apart(merged, want) and apart(got, plain) > 0.1 * apart(
        merged, want
    )


def test_no_radius_is_fine_tuning_and_a_radius_is_not(train, fp32):
    plain = train("fine-tuning")[0]
    for method in ("SAM", "ASAM", "PAM"):
        assert close(train(method, 0.0)[0], plain, atol=2e-4) and not close(
            train(method)[0], plain, atol=2e-4
        ), method


def test_prompt_only_rows_never_see_a_plain_image(train, monkeypatch):
    seen, real = [], R.terms
    monkeypatch.setattr(
        R,
        "terms",
        lambda clip, run, W, x, y, inputs, *weight: (
            seen.append(inputs) or real(clip, run, W, x, y, inputs, *weight)
        ),
    )
    for method in ("SAM-prompt", "PAM-prompt"):
        train(method)
    assert seen and all(len(i) == 1 and i[0] is not None for i in seen)
    seen.clear()
    for method in ("SAM", "PAM", "ASAM"):
        train(method)
    assert all(len(i) == 2 and i[0] is None and i[1] is not None for i in seen)


def test_pam_logs_how_far_back_it_went(train):
    log = train("PAM", 0.05)[1]
    assert (
        log["ratio"][0] == 0
        and all(0 <= r <= 1 + 1e-6 for r in log["ratio"])
        and log["ratio"][-1] < log["ratio"][1]
    )


# --- IBVS ---------------------------------------------------------------------------------------


def test_the_stamp_is_white_bottom_right_on_the_first_half():
    x, y = torch.zeros(5, 3, 32, 32, dtype=torch.uint8), torch.arange(5) + 3
    a, b = stamped(x, y)
    assert b.tolist() == [0, 0, 5, 6, 7] and y.tolist() == [3, 4, 5, 6, 7] and x.sum() == 0
    assert (a[:2, :, 28:, 28:] == 255).all() and a.sum() == 2 * 3 * 16 * 255


def test_ibvs_arithmetic(train, pico, merged, shadow, prompts):
    """Towards the clean twin and away from the poisoned one, by the strength.

    Both twins from theta_pre, on the same batches."""
    starts, twins, real = [], [], R.train_on_shadow

    def spy(clip, start, *a):
        starts.append(start)
        twins.append(real(clip, start, *a))
        return twins[-1]

    with pytest.MonkeyPatch.context() as m:
        m.setattr(R, "train_on_shadow", spy)
        ends = {a: train("IBVS", a)[0] for a in (0.0, 1.0, 2.5)}
    bd, cl = twins[0][0], twins[1][0]
    assert (
        all(same(s, pico.state()) for s in starts)
        and not same(bd, cl)
        and same(bd, twins[2][0])
        and same(ends[0.0], merged)
    )
    for a, end in ends.items():
        assert all(
            torch.allclose(
                end[k],
                merged[k] - a * (bd[k] - pico.state()[k]) + a * (cl[k] - pico.state()[k]),
                atol=1e-5,
            )
            for k in merged
        )


def test_the_poisoned_twin_learns_its_trigger(train, pico, shadow, monkeypatch):
    twins, real = [], R.train_on_shadow
    monkeypatch.setattr(R, "train_on_shadow", lambda *a: twins.append(real(*a)) or twins[-1])
    train("IBVS", s=replace(S, epochs=6))
    x, y = stamped(shadow.x[:64], shadow.y[:64])
    p = [
        classify(pico, partial(encode, pico.with_state(t)), shadow.W, x[:32])
        .softmax(1)[:, 0]
        .mean()
        .item()
        for t, _ in twins
    ]
    assert p[0] > 2 * p[1]


# --- SAU ----------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.floats(0.1, 30))
def test_js_against_its_definition(seed, scale):
    z, z0 = (scale * v for v in tensors(generator("js", seed), (4, 5), (4, 5)))
    p, q = z.double().softmax(1), z0.double().softmax(1)
    kl = lambda a, b: (a * ((a + 1e-300) / b).log()).sum(1)
    want = (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    assert torch.allclose(js(z, z0).double(), want, atol=1e-4) and torch.allclose(
        js(z, z0), js(z0, z), atol=1e-5
    )


def test_shared_loss_by_hand():
    """Four examples: misled to class 2; misled, but predicted so before; not misled.

    Misled to class 0."""
    z = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8], [0.6, 0.2, 0.2], [0.25, 0.5, 0.25]]).log()
    z0 = torch.eye(3)[[2, 2, 0, 0]] * 9
    y, own0 = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2, 0, 1])
    want = -(torch.tensor(0.5).log() + torch.tensor(0.75).log()) / 4
    assert shared_loss(z, z0, y, own0).item() == pytest.approx(want.item(), abs=1e-4)
    assert shared_loss(z, z0, z0.argmax(1), own0).item() == 0


def test_shared_loss_pushes_the_wrong_class_down_and_stays_finite():
    z = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    value = shared_loss(z, torch.eye(3)[[0]], torch.tensor([1]), torch.tensor([1]))
    assert value.isfinite() and value > 5
    (g,) = torch.autograd.grad(
        shared_loss(z / 60, torch.eye(3)[[0]], torch.tensor([1]), torch.tensor([1])), z
    )
    assert g[0, 0] > 0 > g[0, 1]


def test_shared_examples_find_the_class_both_take_for_right():
    """Two linear classifiers on one grey value.

    The only way to a class wrong for both is down, so the step from +eps goes down."""
    w = torch.tensor([4.0, 0.0])
    model, frozen = (
        lambda x, b=b: torch.stack([w[0] * x.mean((1, 2, 3)) - b, 0 * x.mean((1, 2, 3))], 1)
        for b in (1.0, 1.2)
    )
    x, y = torch.full((2, 3, 4, 4), 0.4), torch.zeros(2, dtype=torch.long)
    d = shared_examples(model, frozen, x, y, y, y, eps=0.3)
    assert (
        (d.abs() <= 0.3).all()
        and (model(x + d).argmax(1) == 1).all()
        and (frozen(x + d).argmax(1) == 1).all()
    )
    stop = shared_examples(model, frozen, x - 0.35, y, y, y, eps=0.05)
    assert torch.equal(stop, torch.full_like(x, 0.05)), "already shared: nothing moves"


@given(st.integers(0, 99), st.floats(0.01, 0.5))
def test_shared_examples_stay_in_the_box(seed, eps):
    g = generator("box", seed)
    a, b = (torch.randn(48, 5, generator=g) for _ in range(2))
    x, y = torch.rand(6, 3, 4, 4, generator=g), torch.randint(5, (6,), generator=g)
    m, f = (lambda x, w=w: x.flatten(1) @ w for w in (a, b))
    d = shared_examples(m, f, x, y, m(x).argmax(1), f(x).argmax(1), eps=eps, steps=3)
    assert d.shape == x.shape and d.abs().max() <= eps + 1e-6 and not d.requires_grad


def test_sau_perturbs_pixels_not_normalised_values(train, monkeypatch):
    seen, real = [], R.shared_examples
    monkeypatch.setattr(
        R,
        "shared_examples",
        lambda model, frozen, x, *a: seen.append((x, real(model, frozen, x, *a))) or seen[-1][1],
    )
    train("SAU")
    assert len(seen) == 4 and all(
        0 <= x.min() and 0.9 < x.max() <= 1 and d.abs().max() <= 0.2001 for x, d in seen
    )
    assert any((d[0] != d[1]).any() for _, d in seen), "each image has its own"


# --- ANP ----------------------------------------------------------------------------------------

TOY = {
    "a.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "a.bias": torch.tensor([5.0, 6.0]),
    "b.weight": torch.tensor([[7.0, 8.0]]),
    "b.bias": torch.tensor([9.0]),
}


def test_masked_units_by_hand():
    m = {"a": torch.tensor([1.0, 0.5]), "b": torch.tensor([0.0])}
    out = masked_units(TOY, m)
    assert (
        out["a.weight"].tolist() == [[1, 2], [1.5, 2]]
        and out["b.weight"].tolist() == [[0, 0]]
        and "a.bias" not in out
    )
    out = masked_units(
        TOY,
        m,
        {"a": torch.tensor([0.5, 0.5]), "b": torch.tensor([-1.0])},
        {"a": torch.tensor([0.0, -0.5]), "b": torch.tensor([1.0])},
    )
    assert (
        out["a.weight"].tolist() == [[1.5, 3], [3, 4]]
        and out["b.weight"].tolist() == [[-7, -8]]
        and out["a.bias"].tolist() == [5, 3]
        and out["b.bias"].tolist() == [18]
    )


def test_worst_noise_is_the_sign_of_the_gradient():
    m = {"a": torch.ones(2), "b": torch.ones(1)}
    loss = lambda d, xi: (
        (d["a"] * torch.tensor([3.0, -1.0])).sum()
        + 2 * d["b"].sum()
        - xi["a"].sum()
        + 0 * xi["b"].sum()
    )
    d, xi = worst_noise(loss, m, 0.4)
    assert (
        torch.allclose(d["a"], torch.tensor([0.4, -0.4]))
        and torch.allclose(d["b"], torch.tensor([0.4]))
        and torch.allclose(xi["a"], torch.tensor([-0.4, -0.4]))
        and xi["b"] == 0
    )


@given(st.integers(0, 99), st.floats(0, 1))
def test_pruning_takes_the_lowest_masks(seed, share):
    g = generator("prune", seed)
    state = {
        f"{k}.{p}": torch.randn(*s, generator=g)
        for k in "ab"
        for p, s in (("weight", (6, 3)), ("bias", (6,)))
    }
    m = {k: torch.rand(6, generator=g) for k in "ab"}
    end = prune(state, m, share)
    check_same(state, end)
    gone = torch.cat([(end[f"{k}.weight"] == 0).all(1) for k in "ab"])
    flat = torch.cat(list(m.values()))
    assert gone.sum() == round(share * 12) and (
        not gone.any() or gone.all() or flat[gone].max() < flat[~gone].min()
    )
    old, new = (torch.cat([s[f"{k}.weight"] for k in "ab"]) for s in (state, end))
    assert torch.equal(new[~gone], old[~gone]) and all(
        torch.equal(state[f"{k}.bias"], end[f"{k}.bias"]) for k in "ab"
    )


def test_anp_keeps_shapes_and_touches_hidden_units_only(train, merged):
    end, log = train("ANP", 0.25)
    changed = {k for k in merged if not torch.equal(merged[k], end[k])}
    units = {k: v for k, v in merged.items() if k.endswith("mlp.c_fc.weight")}
    assert (
        changed <= units.keys()
        and len(units) == 2
        and sum(log["masks"]) == sum(len(v) for v in units.values())
    )
    assert sum((end[k] == 0).all(1).sum().item() for k in units) == round(
        0.25 * sum(log["masks"])
    ) and same(train("ANP", 0.0)[0], merged)


def test_anp_masks_move_and_stay_in_the_unit_interval(train, monkeypatch):
    got = []
    monkeypatch.setattr(R, "prune", lambda state, m, share: got.append(m) or state)
    train("ANP", s=replace(S, epochs=2))
    m = torch.cat(list(got[0].values()))
    assert 0 <= m.min() < 0.99 and m.max() == 1


# --- AWM ----------------------------------------------------------------------------------------


def test_concrete_masks_by_hand():
    assert torch.equal(concrete(torch.zeros(3, 2)), torch.ones(3, 2))
    z = torch.tensor([0.0, torch.log(torch.tensor(3.0)).item() / 2])
    assert torch.allclose(concrete(z), torch.tensor([0.5, 0.75]) / 0.625)
    draw = torch.cat([concrete(torch.zeros(100), generator("concrete", i)) for i in range(50)])
    assert (
        draw.mean().item() == pytest.approx(1, abs=1e-4) and draw.min() < 0.05 and draw.max() > 1.8
    ), "T = 0.5 keeps close to 0 or 2"


@given(st.integers(0, 999), st.integers(1, 50))
def test_concrete_masks_have_mean_one_and_are_seeded(seed, n):
    z = torch.randn(n, generator=generator("z", seed))
    a, b = (concrete(z, generator("m", seed)) for _ in range(2))
    assert torch.equal(a, b) and (a >= 0).all() and a.mean().item() == pytest.approx(1, rel=1e-4)


def test_awm_is_a_mask_on_what_merging_added(train, pico, merged):
    end, _ = train("AWM")
    ratio = torch.cat(
        [
            ((end[k] - v) / (merged[k] - v)).flatten()
            for k, v in pico.state().items()
            if k.endswith("weight")
        ]
    )
    assert ratio.min() > -1e-2 and 0.99 < ratio.median() < 1.01 and ratio.std() > 1e-3
    assert not same(end, train("AWM", p=torch.zeros(1, 3, 64))[0]), "the prompts take part"


def test_awm_without_training_is_the_merged_model(pico, merged, shadow, prompts):
    end, _ = R.awm(merged, pico, shadow, prompts, S, 0, lr=0.0)
    assert close(end, merged, atol=1e-6)


# --- all of them --------------------------------------------------------------------------------


@METHODS
def test_every_defence_ends_in_a_sound_model_again_and_again(train, merged, method):
    before = {k: v.clone() for k, v in merged.items()}
    (end, log), (again, log2) = (train(method) for _ in range(2))
    check_same(merged, end)
    assert (
        same(end, again)
        and log == log2
        and same(merged, before)
        and not same(end, merged)
        and {v.device.type for v in end.values()} == {"cpu"}
    )
    assert (
        len(log["loss"]) == 4
        and all(v == v for v in log["loss"])
        and log["passes"] == pytest.approx(64 * COST[method], abs=1)
    )
    json.dumps(log)
    assert not same(end, train(method, max(knobs[method].grid))[0]) and not same(
        end, train(method, seed=1)[0]
    )


@TRAINED
def test_with_adapters_only_attention_moves(train, merged, method):
    end, _ = train(method, s=replace(S, lora=2))
    moved = {k for k in merged if not torch.equal(merged[k], end[k])}
    assert moved == {k for k in merged if k.endswith("attn.in_proj_weight")}
    limit = 4 if method == "IBVS" else 2  # a difference of two updates of rank 2
    assert all(
        torch.linalg.matrix_rank((end[k] - merged[k])[:64], rtol=1e-3) <= limit for k in moved
    )


@pytest.mark.parametrize("method", ["ANP", "AWM"])
def test_masks_know_no_adapters(train, method):
    assert same(train(method)[0], train(method, s=replace(S, lora=2))[0])


@METHODS
def test_a_loss_of_nan_stops_with_the_last_good_weights(train, merged, pico, shadow, method):
    broken = replace(shadow, W=shadow.W * float("nan"))
    with pytest.raises(
        Diverged, match=r"step 0: the (loss|gradient norm) is nan at lr .*; lower lr"
    ) as e:
        train_defence(method, merged, pico, broken, torch.zeros(1, 3, 64), S, 0)
    assert same(e.value.state, pico.state() if method == "IBVS" else merged)


def test_no_held_out_image_is_trained_on(train, pico, merged, shadow, prompts):
    other = Shadow(
        torch.cat([shadow.train[0], 255 - shadow.check[0]]),
        torch.cat([shadow.train[1], shadow.check[1].flip(0)]),
        shadow.W,
        shadow.held,
    )
    for method in ("SAM", "PAM", "IBVS", "SAU", "ANP", "AWM", "fine-tuning-clean"):
        assert same(
            train(method)[0], train_defence(method, merged, pico, other, prompts, S, 0)[0]
        ), method


def test_two_epochs_of_4000_images_cost_at_most_60000_passes():
    once = COST["SAU"] - 22 / 3
    assert COST["SAU"] == max(COST.values()) and 22 / 3 * 7936 + 4500 / 3 <= 60_000 and once > 0
