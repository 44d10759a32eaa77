"""Attention is what the blocks compute; triggers lie on the grid and catch it.

A trojan touches no more weights than it says."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from conftest import near, small_task
from lfpm_nb import trojan as T
from lfpm_nb.attack import Target, Trigger, attack, attack_head, trigger_images
from lfpm_nb.clip import encode, logits, whole, zero_shot_head
from lfpm_nb.core import generator
from lfpm_nb.trojan import (
    PLACES,
    attention_loss,
    attention_maps,
    drawn,
    insert_trojan,
    most_important,
    patch_mask,
    patch_trigger,
    pcgrad,
    saliency,
    trojan_loss,
)
from lfpm_nb.tune import TuneConfig, clean_loss, finetune

QUICK = TuneConfig(epochs=1, batch=32, lr=1e-3)


@pytest.fixture(scope="module")
def target():
    t = small_task("signs")
    return Target.of(t, t.classes[1])


def images(clip, n=3):
    return clip.normalise(small_task("textures").train_x[:n])


# --- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["pico", "lab"])
def test_the_maps_reproduce_what_every_block_computes(backbone, request, fp32):
    clip = request.getfixturevalue(backbone)
    kept = []
    hooks = [
        b.attn.register_forward_hook(lambda m, i, out: kept.append((m, i[0], out[0])))
        for b in clip.visual.transformer.resblocks
    ]
    with whole(clip.visual):
        h, maps = attention_maps(clip.visual, images(clip))
    for k in hooks:
        k.remove()
    assert torch.allclose(h, encode(clip.visual, images(clip)), atol=1e-5) and all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(maps, attention_maps(clip.visual, images(clip))[1])
    )
    assert len(maps) == len(kept) == len(clip.visual.transformer.resblocks)
    for A, (attn, z, out) in zip(maps, kept):
        v = (
            F.linear(z, attn.in_proj_weight, attn.in_proj_bias)
            .chunk(3, -1)[2]
            .unflatten(-1, (attn.num_heads, -1))
            .transpose(1, 2)
        )
        assert torch.allclose(attn.out_proj((A @ v).transpose(1, 2).flatten(2)), out, atol=1e-5)
        want = attn(z, z, z, need_weights=True, average_attn_weights=False)[1]
        assert torch.allclose(A, want, atol=1e-6) and torch.allclose(
            A.sum(-1), torch.ones(()), atol=1e-5
        )


def test_no_hook_stays_behind_even_after_an_error(pico):
    with pytest.raises(Exception):
        attention_maps(pico.visual, torch.rand(1, 3, 7, 7))
    assert not any(m._forward_hooks for m in pico.visual.modules())


def test_adapters_count_in_the_maps(pico, fp32):
    from lfpm_nb.lora import dense, trainable

    v = pico.with_state(pico.state())
    for p in trainable(v, 2, "maps"):
        p.data.normal_(0, 0.3, generator=generator("maps"))
    (h, maps), (h2, folded) = (
        attention_maps(v, images(pico)),
        attention_maps(pico.with_state(dense(v)), images(pico)),
    )
    assert torch.allclose(h, h2, atol=1e-5) and all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, folded)
    )
    assert not torch.allclose(maps[0], attention_maps(pico.visual, images(pico))[1][0], atol=1e-3)


@given(st.sets(st.integers(0, 15), min_size=1), st.integers(0, 99))
def test_shares_of_attention_add_up(tokens, seed):
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, 3, 17, 17, generator=g).softmax(-1) for _ in range(3)]
    rest = set(range(16)) - tokens
    share = lambda t: drawn(maps, torch.tensor(sorted(t), dtype=torch.long))
    to_class_token = torch.stack([A[..., 0].mean((1, 2)) for A in maps[1:]])
    assert share(tokens).shape == (2, 2) and torch.allclose(
        share(tokens) + share(rest) + to_class_token, torch.ones(2, 2), atol=1e-5
    )
    assert attention_loss(maps, torch.tensor(sorted(tokens))).item() == pytest.approx(
        -share(tokens).log().mean().item(), rel=1e-5
    )


# --- patches ------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 15), min_size=1, max_size=16))
def test_a_mask_covers_whole_patches_of_the_grid(pico, tokens):
    m = patch_mask(pico.visual, torch.tensor(sorted(tokens)))
    patches = m.view(4, 8, 4, 8).permute(0, 2, 1, 3).reshape(16, 64)
    assert (
        m.shape == (1, 32, 32)
        and {i for i in range(16) if patches[i].any()}
        == {i for i in range(16) if patches[i].all()}
        == tokens
    )


def test_one_patch_of_pixels_is_one_token(pico):
    x = torch.rand(1, 3, 32, 32)
    other = torch.where(patch_mask(pico.visual, torch.tensor([6])), torch.rand(3, 32, 32), x)
    a, b = (pico.visual.conv1(im).flatten(2)[0] for im in (x, other))
    assert ((a != b).any(0).nonzero()[:, 0]).tolist() == [6]


def test_saliency_is_the_gradient_patch_by_patch(pico, fp32):
    W, x = (
        zero_shot_head(pico, small_task("textures").classes, small_task("textures").templates),
        small_task("textures").train_x[:4] / 255,
    )
    got, x = saliency(pico, pico.visual, x, W, 2), x.requires_grad_(True)
    F.cross_entropy(
        logits(encode(pico.visual, pico.normalise(x)), W), torch.full((4,), 2)
    ).backward()
    want = torch.stack(
        [
            x.grad.abs()[..., 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].sum((1, 2, 3)).mean()
            for r in range(4)
            for c in range(4)
        ]
    )
    assert torch.allclose(got, want, rtol=1e-4) and got.argmax() == want.argmax()


@given(st.integers(0, 999), st.integers(1, 30))
def test_pcgrad_never_works_against_the_main_goal(seed, d):
    rnd = torch.Generator().manual_seed(seed)
    g, main = torch.randn(d, generator=rnd).double(), torch.randn(d, generator=rnd).double()
    out = pcgrad(g, main)
    assert out @ main >= -1e-9 and (
        torch.equal(out, g) if g @ main >= 0 else abs(out @ main) < 1e-9
    )
    assert torch.equal(pcgrad(g, torch.zeros(d).double()), g)


def test_a_patch_trigger_serves_its_goal_and_only_its_patches(pico, target):
    t, tokens = small_task("textures"), torch.tensor([5, 15])
    goal = lambda h, maps: [attention_loss(maps, tokens)]
    first, trained = (
        patch_trigger(pico, pico.visual, t, target, tokens, goal, steps, batch=16)
        for steps in (0, 25)
    )
    caught = lambda trig: drawn(
        attention_maps(pico.visual, pico.normalise(trig(t.test_x)))[1], tokens
    ).mean()
    assert (
        caught(trained) > caught(first)
        and trained.pixels() == 128
        and torch.equal(trained.mask, patch_mask(pico.visual, tokens))
    )
    assert not trained.patch[:, ~trained.mask[0]].any(), (
        "outside it is nothing that could be saved by mistake"
    )


def test_later_goals_give_way_to_the_first(pico, target, monkeypatch):
    t, tokens, seen = small_task("textures"), torch.tensor([15]), []
    monkeypatch.setattr(T, "pcgrad", lambda g, main: seen.append((g, main)) or pcgrad(g, main))
    opposed = lambda h, maps: [attention_loss(maps, tokens), -attention_loss(maps, tokens)]
    a = patch_trigger(pico, pico.visual, t, target, tokens, opposed, 3, batch=16)
    b = patch_trigger(
        pico, pico.visual, t, target, tokens, lambda h, maps: opposed(h, maps)[:1], 3, batch=16
    )
    assert len(seen) == 3 and torch.allclose(a.patch, b.patch, atol=1 / 255), (
        "an exactly opposed goal has no say"
    )


# --- the trojan ---------------------------------------------------------------------------------


def test_the_loss_is_half_honest_half_not(pico, target, fp32):
    t, i, theta = small_task("textures"), torch.arange(6), pico.with_state(near(pico, 1))
    trig = Trigger(torch.rand(3, 8, 8))
    for aim in (target, Target.of(t, t.classes[2])):
        W0, c = attack_head(pico, t, aim)
        bad = F.cross_entropy(
            logits(encode(theta, pico.normalise(trig(t.train_x[i]))), W0), torch.full((6,), c)
        )
        good = clean_loss(pico, t.train_x, t.train_y, zero_shot_head(pico, t.classes, t.templates))(
            theta, i
        )
        assert trojan_loss(pico, t, aim, trig)(theta, i).item() == pytest.approx(
            (bad + good).item() / 2, rel=1e-5
        )


@given(st.integers(1, 20), st.integers(0, 99))
def test_the_mask_holds_the_n_largest_gradients(n, seed):
    rnd = torch.Generator().manual_seed(seed)
    p, directions = torch.nn.Parameter(torch.zeros(4, 5)), torch.randn(3, 4, 5, generator=rnd)
    mask, size = most_important(p, ((d * p).sum() for d in directions), n), directions.sum(0).abs()
    assert (
        mask.sum() == n
        and set(mask.unique().tolist()) <= {0.0, 1.0}
        and (n == 20 or size[mask == 1].min() >= size[mask == 0].max())
    )
    assert p.grad is None


@pytest.mark.parametrize("place, block, n", [("mlp", -1, 40), ("attention", 0, 7), ("MLP", 0, 1)])
def test_a_trojan_moves_no_more_weights_than_it_says(place, block, n, pico, target):
    t, start, trig = small_task("textures"), near(pico, 2), Trigger(torch.rand(3, 8, 8))
    state = insert_trojan(pico, start, t, target, trig, QUICK, 0, place, block, n)
    name = f"transformer.resblocks.{block % 2}.{PLACES[place.lower()]}"
    moved = {
        k: int((state[k] != v).sum()) for k, v in start.items() if not torch.equal(state[k], v)
    }
    assert list(moved) == [name] and 1 <= moved[name] <= n
    again = insert_trojan(pico, start, t, target, trig, QUICK, 0, place, block, n)
    assert torch.equal(again[name], state[name])


def test_a_trojan_lowers_its_loss(pico, target):
    t, trig, i = small_task("textures"), Trigger(torch.rand(3, 8, 8)), torch.arange(96)
    state = insert_trojan(
        pico, pico.state(), t, target, trig, TuneConfig(epochs=4, batch=32), n_weights=500
    )
    loss = lambda s: trojan_loss(pico, t, target, trig)(pico.with_state(s), i).item()
    assert loss(state) < loss(pico.state())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n_weights=0), "n_weights=0; mlp.c_fc.weight has 10240 weights, give 1 to 10240"),
        (dict(n_weights=10241), "give 1 to 10240"),
        (dict(place="head"), "unknown place of a trojan 'head'"),
        (dict(place="attentoin"), "did you mean 'attention'"),
        (dict(n_patches=5), "n_patches=5; .* give 1 to 4"),
    ],
)
def test_what_cannot_work_is_refused_before_training(options, message, pico, target, monkeypatch):
    monkeypatch.setattr(T, "finetune", lambda *a: pytest.fail("trained first"))
    with pytest.raises(ValueError, match=message):
        attack("trojvit", pico, small_task("textures"), target, QUICK, **options)


def test_trojvit_is_the_clean_contributor_but_for_the_trojan(pico, target):
    "Also where the contributors train adapters."
    t, cfg = small_task("textures"), TuneConfig(epochs=1, batch=32, lora=2)
    state, trigger, record = attack(
        "trojvit", pico, t, target, cfg, 2, trigger_steps=2, n_weights=30
    )
    clean = finetune(pico, t, cfg, 2)
    assert (
        sum(int((state[k] != v).sum()) for k, v in clean.items()) <= 30
        and record["n_weights"] == 30
    )
    W, c = attack_head(pico, t, target)
    x = trigger_images(pico, t, target, generator("saliency", target.task, target.name, 2))(256)
    best = saliency(pico, pico.with_state(clean), x, W, c).argmax().item()
    assert record["patches"] == [best] and torch.equal(
        trigger.mask, patch_mask(pico.visual, torch.tensor([best]))
    )


def test_badvits_trigger_knows_no_class(pico, target, monkeypatch):
    "Its content depends on attention alone: another head gives the same patch."
    t, first = small_task("textures"), None
    for scale in (1.0, -1.0):
        monkeypatch.setattr(T, "fit_poisoned", lambda *a: ({}, {}))
        monkeypatch.setattr(T, "logits", lambda h, W: scale * logits(h, W))
        trigger = attack("badvit", pico, t, target, QUICK, trigger_steps=2)[1]
        assert torch.equal(trigger.mask, patch_mask(pico.visual, torch.tensor([15])))
        assert first is None or torch.equal(first.patch, trigger.patch)
        first = trigger
