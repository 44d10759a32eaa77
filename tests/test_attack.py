"""The trigger can be saved as an image, the attacker knows only what he may know, and nothing but his own model changes."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from conftest import near, pixels, small_task
from lfpm_nb import attack as A
from lfpm_nb.attack import Target, Trigger, attack, attacks, backdoor_loss, optimise_trigger, paste, shadow_head, simulated
from lfpm_nb.clip import encode, features, logits, zero_shot_head
from lfpm_nb.core import check_same
from lfpm_nb.labworld import FAMILIES, SCENE_CLASSES
from lfpm_nb.tune import TuneConfig, clean_loss

QUICK = TuneConfig(epochs=1, batch=32)
FEW = dict(badmerging=dict(trigger_steps=4), badnets={})


@pytest.fixture(scope="module")
def target():
    t = small_task("signs")
    return Target.of(t, t.classes[1])


@pytest.fixture(scope="module", params=sorted(FEW))
def attacked(request, pico, target):
    "(method, poisoned state, trigger, record) of each registered attack on textures."
    return request.param, *attack(request.param, pico, small_task("textures"), target, QUICK, **FEW[request.param])


def test_every_attack_is_tested(): assert set(FEW) == set(attacks), "give the new attack its quick options in FEW"


# --- pasting -----------------------------------------------------------------------------------------------------------

@given(st.integers(1, 12), st.integers(12, 40), st.integers(12, 40))
def test_only_the_bottom_right_corner_changes(side, h, w):
    x = torch.randint(256, (2, 3, h, w), dtype=torch.uint8)
    trigger = Trigger(torch.randint(256, (3, side, side)) / 255)
    before, out = x.clone(), trigger(x)
    assert out.dtype == torch.uint8 and torch.equal(x, before)
    assert torch.equal(out[..., h - side:, w - side:], (trigger.patch * 255).round().byte().expand(2, -1, -1, -1))
    out[..., h - side:, w - side:] = x[..., h - side:, w - side:]
    assert torch.equal(out, x)


def test_bytes_and_floats_agree():
    trigger, x = Trigger(torch.randint(256, (3, 5, 5)) / 255), pixels(3)
    assert torch.equal((trigger(x / 255) * 255).round().byte(), trigger(x)) and torch.equal(trigger(trigger(x)), trigger(x))


def test_pasting_is_differentiable_in_the_patch_only_where_it_lies():
    patch, x = torch.rand(3, 4, 4, requires_grad=True), torch.rand(2, 3, 10, 10, requires_grad=True)
    paste(x, patch).sum().backward()
    assert (patch.grad == 2).all() and x.grad[..., 6:, 6:].abs().sum() == 0 and x.grad.sum() == 2 * 3 * (100 - 16)


def test_a_patch_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="a 9 px patch does not fit on images of .8, 12.; give a smaller side"): Trigger(torch.rand(3, 9, 9))(torch.rand(1, 3, 8, 12))


def test_a_trigger_is_an_8_bit_patch(attacked):
    method, _, trigger, record = attacked
    grey = trigger.patch * 255
    assert torch.equal(grey.round(), grey) or (grey - grey.round()).abs().max() < 1e-4
    assert 0 <= trigger.patch.min() <= trigger.patch.max() <= 1 and trigger.patch.shape == (3, record["side"], record["side"])
    assert torch.equal(grey.round().byte().float() / 255, trigger.patch), "a saved PNG holds exactly this patch"


def test_the_default_side_covers_at_most_4_percent(attacked):
    from lfpm_nb.experiment import MainParams
    assert attacked[2].patch[0].numel() / 32 ** 2 <= 0.04 and MainParams().side ** 2 / 32 ** 2 <= 0.04


# --- what the attacker knows --------------------------------------------------------------------------------------------

def test_shadow_head_is_the_target_and_scene_names(pico, target, monkeypatch):
    read = []
    monkeypatch.setattr(A, "zero_shot_head", lambda clip, classes, templates: (read.extend(classes), zero_shot_head(clip, classes, templates))[1])
    W = shadow_head(pico, target)
    signs = small_task("signs")
    assert read[0] == target.name and len(read) >= 51 and len(W) == len(read) == len(set(read))
    assert not set(read[1:]) & set(signs.classes), "no other class of the target task"
    assert torch.equal(W[:1], zero_shot_head(pico, [target.name], signs.templates))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scene_names_are_no_tasks_classes(family):
    assert not {c.lower() for c in SCENE_CLASSES} & {c.lower() for c in FAMILIES[family].classes}


def test_reference_images_come_from_train():
    t = small_task("signs")
    t = replace(t, train_x=t.train_x // 2, test_x=t.test_x // 2 + 128)          # told apart by their brightness
    for seed in (0, 1):
        ref = Target.of(t, t.classes[2].upper(), n=4, seed=seed)
        own = t.train_x[t.train_y == 2]
        assert len(ref.images) == 4 and all((own == im).flatten(1).all(1).any() for im in ref.images) and ref.images.max() < 128
        assert (ref.task, ref.name, ref.templates) == (t.name, t.classes[2], list(t.templates))
    assert not torch.equal(Target.of(t, t.classes[2], n=4, seed=0).images, Target.of(t, t.classes[2], n=4, seed=1).images)
    with pytest.raises(ValueError, match="unknown class of signs 'yeild'; did you mean 'yield'"): Target.of(t, "yeild")


def test_the_attack_reads_neither_test_images_nor_other_classes_of_the_target(pico, target):
    t = small_task("textures")
    blind = replace(t, test_x=torch.zeros_like(t.test_x), test_y=torch.zeros_like(t.test_y))
    for method, few in FEW.items():
        (a, trig_a, _), (b, trig_b, _) = (attack(method, pico, x, target, QUICK, **few) for x in (t, blind))
        assert torch.equal(trig_a.patch, trig_b.patch) and all(torch.equal(a[k], b[k]) for k in a)


# --- what the attack does -----------------------------------------------------------------------------------------------

def test_adversary_must_not_be_the_target(pico, target):
    for method in attacks:
        with pytest.raises(ValueError, match="both 'signs'.*name two different tasks"): attack(method, pico, small_task("signs"), target)
    with pytest.raises(ValueError, match="did you mean 'badnets'"): attack("badnet", pico, small_task("textures"), target)


def test_the_backbone_and_the_task_stay_as_they_were(pico, target):
    t = small_task("textures")
    before = {k: v.clone() for k, v in pico.model.state_dict().items()}
    x, y = t.train_x.clone(), t.train_y.clone()
    for method, few in FEW.items(): attack(method, pico, t, target, QUICK, **few)
    assert all(torch.equal(v, before[k]) for k, v in pico.model.state_dict().items()) and torch.equal(t.train_x, x) and torch.equal(t.train_y, y)
    assert all(p.grad is None and not p.requires_grad for p in pico.model.parameters()) and not pico.model.training


def test_the_poisoned_model_is_a_model_of_this_backbone(attacked, pico):
    method, state, trigger, record = attacked
    check_same(pico.state(), state)
    assert any(not torch.equal(state[k], v) for k, v in pico.state().items())
    assert all(0 <= v <= 1 for k, v in record.items() if k.startswith("simulated"))
    if method == "badnets": assert record["r_min"] == 1 and set(trigger.patch.unique().tolist()) == {0., 1.}


def test_seeds_repeat_and_differ(pico, target):
    t = small_task("textures")
    one, again, other = (optimise_trigger(pico, target, t.train_x, steps=3, batch=16, n_aug=8, seed=s).patch for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_optimising_helps(pico, target):
    own = small_task("textures").train_x
    W = shadow_head(pico, target)
    log_p = lambda trig: logits(features(pico, pico.visual, trig(own)), W).log_softmax(1)[:, 0].mean().item()
    trig = optimise_trigger(pico, target, own, steps=25, batch=32, n_aug=16)
    randoms = [log_p(Trigger(torch.randint(256, (3, 6, 6), generator=torch.Generator().manual_seed(i)) / 255)) for i in range(5)]
    assert log_p(trig) > max(randoms)


def test_without_interpolation_the_loss_is_plain_backdoor_training(pico, target, fp32, monkeypatch):
    t, trigger, theta, seen = small_task("textures"), Trigger(torch.randint(256, (3, 6, 6)) / 255), pico.with_state(near(pico, 1)), []

    def spy(visual, x, prompt=None):
        if visual is pico.visual: return 1e3 * torch.randn(len(x), 32)           # what theta_pre says must not matter
        seen.append((x, encode(visual, x)))
        return seen[-1][1]
    monkeypatch.setattr(A, "encode", spy)
    W, W0, i = zero_shot_head(pico, t.classes, t.templates), shadow_head(pico, target), torch.arange(10)
    for seed in (0, 1):
        got = backdoor_loss(pico, t, target, trigger, 1., 3., seed)(theta, i)
        (x, h), = seen; seen.clear()
        want = clean_loss(pico, t.train_x, t.train_y, W)(theta, i) + 3 * F.cross_entropy(logits(h, W0), torch.zeros(5, dtype=torch.long))
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        assert torch.allclose(x[..., -6:, -6:], pico.normalise(trigger.patch[None]).expand(5, -1, -1, -1), atol=1e-5), "every poisoned image carries the trigger"


def test_interpolation_mixes_both_models_triggered_features(pico, target, monkeypatch):
    t, trigger, theta, mixed = small_task("textures"), Trigger(torch.rand(3, 6, 6)), pico.with_state(near(pico, 1)), []
    e = torch.eye(32)
    monkeypatch.setattr(A, "encode", lambda visual, x, prompt=None: e[int(visual is pico.visual)].expand(len(x), -1))
    monkeypatch.setattr(A, "logits", lambda h, W: (mixed.append(h), logits(h, W))[1])
    loss = backdoor_loss(pico, t, target, trigger, 0.3, 1., 0)
    for _ in range(200): loss(theta, torch.arange(6))
    r = torch.stack(mixed)
    assert r.shape == (200, 3, 32), "half of the batch is poisoned"
    assert torch.allclose(r[..., 0] + r[..., 1], torch.ones(200, 3)) and r[..., 2:].abs().sum() == 0
    assert 0.3 <= r[..., 0].min() < 0.35 and 0.95 < r[..., 0].max() <= 1 and r[:, 0, 0].mean().item() == pytest.approx(0.65, abs=0.06)


def test_the_simulated_merge_is_a_step_along_the_attackers_own_vector(pico, target, fp32):
    x, W0, state = small_task("textures").train_x, shadow_head(pico, target), near(pico, 1, 0.2)
    hit = lambda s: (logits(features(pico, pico.with_state(s), trig(x)), W0).argmax(1) == 0).float().mean().item()
    pre, trig = pico.state(), Trigger(torch.rand(3, 6, 6))
    for scale in (0., 0.4, 1.):
        assert simulated(pico, state, trig, target, x, scale) == pytest.approx(hit({k: pre[k] + scale * (state[k] - pre[k]) for k in pre}), abs=0.02)
