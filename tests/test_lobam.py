"""LoBAM amplifies exactly the difference of twins, by a factor the attacker can justify.

The adaptive loss is LFPM's Eq. 27 with its off-task reading."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from conftest import near, small_task
from lfpm_nb import lobam as L
from lfpm_nb.attack import Target, Trigger, attack, attack_head, own_view
from lfpm_nb.clip import encode, logits, zero_shot_head
from lfpm_nb.lobam import MERGED, SWEEP, adaptive_loss, choose_amplify, coupling, extrapolate, twins
from lfpm_nb.tune import TuneConfig, clean_loss, finetune, task_vector

QUICK = TuneConfig(epochs=1, batch=32, lr=1e-2)


@pytest.fixture(scope="module")
def target():
    t = small_task("signs")
    return Target.of(t, t.classes[1])


@pytest.fixture(scope="module")
def trigger():
    return Trigger(torch.randint(256, (3, 6, 6), generator=torch.Generator().manual_seed(0)) / 255)


# --- LoBAM --------------------------------------------------------------------------------------


@given(st.floats(-3, 6), st.integers(0, 999))
def test_extrapolation_is_affine_and_exact_at_the_twins(Lam, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = ({"w": torch.randn(5, generator=g), "n": torch.tensor(3)} for _ in range(2))
    up = extrapolate(a, b, Lam)
    assert (
        torch.allclose(
            up["w"].double(), a["w"].double() + Lam * (b["w"].double() - a["w"].double()), atol=1e-5
        )
        and up["n"] == 3
    )
    assert torch.equal(extrapolate(a, b, 0)["w"], a["w"]) and torch.equal(
        extrapolate(a, b, 1)["w"], b["w"]
    )
    assert torch.allclose(extrapolate(a, up, 1)["w"], up["w"]) and a["n"] is not up["n"], (
        "nothing of the twins is handed out"
    )


def test_task_vectors_say_the_same(pico):
    pre, clean, mal = pico.state(), near(pico, 1), near(pico, 2)
    tau, tau_clean, tau_mal = (
        task_vector(pre, extrapolate(clean, mal, 3.5)),
        task_vector(pre, clean),
        task_vector(pre, mal),
    )
    assert all(
        torch.allclose(tau[k], tau_clean[k] + 3.5 * (tau_mal[k] - tau_clean[k]), atol=1e-4)
        for k in tau
    )


@pytest.mark.parametrize("lora", [0, 2])
def test_twins_differ_by_the_backdoor_alone(lora, pico, target, trigger):
    t, cfg = small_task("textures"), TuneConfig(epochs=1, batch=32, lora=lora)
    clean, mal = twins(pico, t, target, trigger, cfg, 3, 0.1, 0.0)
    assert all(torch.equal(mal[k], v) for k, v in clean.items()), (
        "without the backdoor's term they are one model"
    )
    assert all(torch.equal(v, clean[k]) for k, v in finetune(pico, t, cfg, 3).items()), (
        "the clean twin is the clean contributor"
    )
    other = twins(pico, t, target, trigger, cfg, 3, 0.1, 5.0)[1]
    assert any(not torch.equal(other[k], v) for k, v in clean.items())


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=5, max_size=5), st.floats(0, 1)
)
def test_the_rule_takes_the_best_that_stays_honest(rows, floor):
    views = {
        Lam: dict({f"simulated_{s}": asr for s in MERGED}, train_accuracy=acc)
        for Lam, (asr, acc) in zip(SWEEP, rows)
    }
    got, good = (
        views[choose_amplify(views, floor)],
        [v for v in views.values() if v["train_accuracy"] >= floor],
    )
    if good:
        assert got["train_accuracy"] >= floor and got["simulated_0.2"] == max(
            v["simulated_0.2"] for v in good
        )
    else:
        assert got["train_accuracy"] == max(v["train_accuracy"] for v in views.values())


def test_a_tie_goes_to_the_smaller_step():
    views = {
        Lam: dict({f"simulated_{s}": 1.0 for s in MERGED}, train_accuracy=1.0) for Lam in SWEEP
    }
    assert choose_amplify(views, 0.9) == SWEEP[0] == min(SWEEP)


def test_the_upload_is_the_amplified_twin_and_low_rank(pico, target):
    t = small_task("textures")
    state, trigger, record = attack(
        "lobam", pico, t, target, QUICK, 1, trigger_steps=3, rank=2, lora_lr=5e-3, amplify=3
    )
    cfg = TuneConfig(epochs=1, batch=32, lr=5e-3, lora=2)
    clean, mal = twins(pico, t, target, trigger, cfg, 1, 0.2, 0.05)
    want = extrapolate(clean, mal, 3)
    assert all(torch.equal(state[k], v) for k, v in want.items()) and (
        record["rank"],
        record["lora_lr"],
        record["amplify"],
    ) == (2, 5e-3, 3)
    moved = {k: v for k, v in task_vector(pico.state(), state).items() if v.any()}
    assert moved and all(k.endswith("in_proj_weight") for k in moved)
    assert all(
        torch.linalg.matrix_rank(third, rtol=1e-4) <= 4
        for v in moved.values()
        for third in v.chunk(3)
    ), "twice the adapters' rank"


def test_a_lora_config_is_the_attackers_too(pico, target):
    t, cfg = small_task("textures"), TuneConfig(epochs=1, batch=32, lr=3e-3, lora=1)
    record = attack("lobam", pico, t, target, cfg, trigger_steps=2, rank=7, lora_lr=1.0, amplify=2)[
        2
    ]
    assert (record["rank"], record["lora_lr"]) == (1, 3e-3)


def test_the_rule_is_applied_to_what_he_measured(pico, target, monkeypatch):
    t = small_task("textures")
    seen = []
    monkeypatch.setattr(L, "choose_amplify", lambda views, floor: seen.append((views, floor)) or 4)
    state, trigger, record = attack("lobam", pico, t, target, QUICK, trigger_steps=2, rank=2)
    ((views, floor),) = seen
    assert (
        tuple(views) == SWEEP == tuple(r["amplify"] for r in record["sweep"])
        and record["amplify"] == 4
    )
    assert (
        floor == pytest.approx(record["twin_accuracy"] - 0.03)
        and own_view(pico, t, target, state, trigger) == views[4]
    )


@pytest.mark.parametrize("amplify", ["much", 0.5, -1, None])
def test_a_useless_factor_is_refused_before_anything_is_trained(amplify, pico, target, monkeypatch):
    monkeypatch.setattr(L, "optimise_trigger", lambda *a, **k: pytest.fail("trained first"))
    with pytest.raises(ValueError, match="give 'rule' or a number of at least 1"):
        attack("lobam", pico, small_task("textures"), target, amplify=amplify)


# --- the adaptive attack ------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["off", "on"])
def test_the_adaptive_loss_is_equation_27(where, pico, target, trigger, fp32):
    t, theta, i = small_task("textures"), pico.with_state(near(pico, 1)), torch.arange(10)
    target = target if where == "off" else Target.of(t, t.classes[3])
    (W0, c), W, x_c = (
        attack_head(pico, t, target),
        zero_shot_head(pico, t.classes, t.templates),
        t.train_x[:5],
    )
    h_b, h_pre = (
        encode(theta, pico.normalise(trigger(x_c))),
        encode(pico.visual, pico.normalise(x_c)),
    )
    mu = encode(theta, pico.normalise(target.images)).mean(0)
    for r_min in (1.0, 0.25):
        got = adaptive_loss(pico, t, target, trigger, r_min, 3.0, 0)(theta, i)
        r = (
            r_min
            + (1 - r_min) * torch.rand((), generator=L.generator("poison", "textures", 0)).item()
        )
        ce = F.cross_entropy(logits(r * h_b + (1 - r) * h_pre, W0), torch.full((5,), c))
        want = clean_loss(pico, t.train_x, t.train_y, W)(theta, i) + 3 * (
            ce + 1 - F.cosine_similarity(h_b, mu[None]).mean()
        )
        assert got.item() == pytest.approx(want.item(), rel=1e-4)


def test_the_references_do_not_come_to_the_trigger(pico, target, trigger, monkeypatch):
    "mu_t takes no gradient; only the triggered images' features do."
    t, theta, seen = small_task("textures"), pico.with_state(near(pico, 1)), []
    monkeypatch.setattr(
        L,
        "encode",
        lambda v, x, prompt=None: (
            seen.append((v is theta, len(x), torch.is_grad_enabled())) or encode(v, x)
        ),
    )
    adaptive_loss(pico, t, target, trigger, 0.2, 1.0, 0)(
        theta.requires_grad_(True), torch.arange(8)
    )
    assert (
        seen == [(True, 4, True), (False, 4, False), (True, len(target.images), False)]
        and len(target.images) != 4
    )


def test_coupling_is_a_cosine_to_the_references(pico, target, trigger, fp32):
    x, state = small_task("textures").train_x[:6], near(pico, 1)
    got = coupling(pico, state, target, trigger, x)
    h, mu = (encode(pico.with_state(state), pico.normalise(b)) for b in (trigger(x), target.images))
    assert (
        torch.allclose(got, F.cosine_similarity(h, mu.mean(0)[None]), atol=1e-5)
        and got.abs().max() <= 1 + 1e-6
    )
    clone = Target(target.task, target.name, target.templates, trigger(x[:1]))
    assert coupling(pico, state, clone, trigger, x[:1]).item() == pytest.approx(1, abs=1e-5)


def test_training_couples(pico, target):
    t = small_task("textures")
    cfg = TuneConfig(epochs=6, batch=32, lr=1e-3)
    record = attack("adaptive", pico, t, target, cfg, trigger_steps=3)[2]
    assert record["coupling_after"] > record["coupling_before"]
