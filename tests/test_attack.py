"""The trigger can be saved as an image, and nothing but the attacker's own model changes.

He knows only what he may know."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from conftest import near, pixels, small_task
from lfpm_nb import attack as A
import lfpm_nb.lobam, lfpm_nb.trojan  # they register their attacks
from lfpm_nb.attack import (
    Target,
    Trigger,
    attack,
    attack_head,
    attacks,
    backdoor_loss,
    check_scope,
    optimise_trigger,
    paste,
    scope_of,
    shadow_head,
    simulated,
    trigger_images,
)
from lfpm_nb.clip import encode, features, logits, zero_shot_head
from lfpm_nb.core import check_same, generator, load_state, save_state
from lfpm_nb.labworld import FAMILIES, SCENE_CLASSES
from lfpm_nb.tune import TuneConfig, clean_loss, fit

QUICK = TuneConfig(epochs=1, batch=32)
FEW = {
    "badmerging": dict(trigger_steps=4),
    "badmerging-on": dict(trigger_steps=4),
    "badnets": {},
    "lobam": dict(trigger_steps=4, amplify=2, rank=2),
    "adaptive": dict(trigger_steps=4),
    "trojvit": dict(trigger_steps=3, n_weights=50),
    "badvit": dict(trigger_steps=3),
}
CASES = [(m, where) for m in FEW for where in ("off", "on") if scope_of(m) in (where, "both")]


def aim(where: str) -> Target:
    "The target of an attack on textures."
    t = small_task("signs" if where == "off" else "textures")
    return Target.of(t, t.classes[1])


@pytest.fixture(scope="module")
def target():
    return aim("off")


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def attacked(request, pico):
    "(method, where, poisoned state, trigger, record) of each registered attack on textures."
    method, where = request.param
    return (
        method,
        where,
        *attack(method, pico, small_task("textures"), aim(where), QUICK, **FEW[method]),
    )


def test_every_attack_is_tested():
    assert set(FEW) == set(attacks), "give the new attack its quick options in FEW"


# --- pasting ------------------------------------------------------------------------------------


def random_mask(draw_seed: int, size: int = 8) -> torch.Tensor:
    return torch.rand(1, size, size, generator=torch.Generator().manual_seed(draw_seed)) < 0.4


@given(st.integers(0, 10**6))
def test_a_mask_says_which_pixels_change(seed):
    m, x = random_mask(seed), pixels(2, seed, 8)
    trigger, before = Trigger(pixels(1, seed + 1, 8)[0] / 255, m), x.clone()
    want = torch.where(m, (trigger.patch * 255).round().byte(), x)
    assert (
        torch.equal(trigger(x), want) and torch.equal(x, before) and trigger(x).dtype == torch.uint8
    )
    assert torch.equal((trigger(x / 255) * 255).round().byte(), want) and torch.equal(
        trigger(trigger(x)), want
    )
    assert trigger.pixels() == m.sum() and torch.equal(
        trigger.grey()(x), torch.where(m, torch.tensor(128, dtype=torch.uint8), x)
    )


def test_a_corner_mask_is_a_square_patch():
    patch, x = torch.rand(3, 5, 5), pixels(3)
    m = F.pad(torch.ones(1, 5, 5, dtype=torch.bool), (27, 0, 27, 0))
    square, masked = Trigger(patch), Trigger(F.pad(patch, (27, 0, 27, 0)), m)
    assert torch.equal(square(x), masked(x)) and square.pixels() == masked.pixels() == 25
    assert (
        torch.equal(square.grey()(x), masked.grey()(x))
        and (square.grey()(x)[..., -5:, -5:] == 128).all()
    )


@pytest.mark.parametrize("mask", [None, random_mask(1)])
def test_triggers_go_through_a_file(mask, tmp_path):
    trigger, x = Trigger(pixels(1, 3, 8)[0] / 255, mask), pixels(4, 5, 8)
    save_state(tmp_path / "t.safetensors", {"weights": torch.rand(2), **trigger.tensors()})
    back = Trigger.of(load_state(tmp_path / "t.safetensors")[0])
    assert torch.equal(back(x), trigger(x)) and (back.mask is None) == (mask is None)


@given(st.integers(1, 12), st.integers(12, 40), st.integers(12, 40))
def test_only_the_bottom_right_corner_changes(side, h, w):
    x = torch.randint(256, (2, 3, h, w), dtype=torch.uint8)
    trigger = Trigger(torch.randint(256, (3, side, side)) / 255)
    before, out = x.clone(), trigger(x)
    assert out.dtype == torch.uint8 and torch.equal(x, before)
    assert torch.equal(
        out[..., h - side :, w - side :], (trigger.patch * 255).round().byte().expand(2, -1, -1, -1)
    )
    out[..., h - side :, w - side :] = x[..., h - side :, w - side :]
    assert torch.equal(out, x)


def test_bytes_and_floats_agree():
    trigger, x = Trigger(torch.randint(256, (3, 5, 5)) / 255), pixels(3)
    assert torch.equal((trigger(x / 255) * 255).round().byte(), trigger(x)) and torch.equal(
        trigger(trigger(x)), trigger(x)
    )


def test_pasting_is_differentiable_in_the_patch_only_where_it_lies():
    patch, x = torch.rand(3, 4, 4, requires_grad=True), torch.rand(2, 3, 10, 10, requires_grad=True)
    paste(x, patch).sum().backward()
    assert (
        (patch.grad == 2).all()
        and x.grad[..., 6:, 6:].abs().sum() == 0
        and x.grad.sum() == 2 * 3 * (100 - 16)
    )
    picture, m = torch.rand(3, 8, 8, requires_grad=True), random_mask(2)
    paste(torch.rand(2, 3, 8, 8), picture, m).sum().backward()
    assert torch.equal(picture.grad, 2.0 * m.expand(3, -1, -1))


def test_a_patch_larger_than_the_image_is_refused():
    with pytest.raises(
        ValueError, match="a 9 px patch does not fit on images of .8, 12.; give a smaller side"
    ):
        Trigger(torch.rand(3, 9, 9))(torch.rand(1, 3, 8, 12))
    with pytest.raises(
        ValueError,
        match="mask .8, 8. and picture .8, 8. must have the images' size .16, 16.; "
        "make the trigger anew",
    ):
        Trigger(torch.rand(3, 8, 8), random_mask(0))(pixels(1, size=16))
    with pytest.raises(ValueError, match="picture .4, 4."):
        Trigger(torch.rand(3, 4, 4), random_mask(0))(pixels(1, size=8))


def test_a_trigger_is_an_8_bit_patch(attacked):
    _, _, _, trigger, record = attacked
    grey = trigger.patch * 255
    assert torch.equal(grey.round(), grey) or (grey - grey.round()).abs().max() < 1e-4
    assert (
        0 <= trigger.patch.min() <= trigger.patch.max() <= 1
        and trigger.pixels() == record["pixels"]
    )
    assert torch.equal(grey.round().byte().float() / 255, trigger.patch), (
        "a saved PNG holds exactly this patch"
    )


def test_the_default_trigger_is_small(attacked):
    from lfpm_nb.settings import MainParams

    _, _, _, trigger, _ = attacked
    assert (
        trigger.pixels() / 32**2 <= (0.04 if trigger.mask is None else 1 / 16)
        and MainParams().side ** 2 / 32**2 <= 0.04
    )


# --- what the attacker knows --------------------------------------------------------------------


def test_shadow_head_is_the_target_and_scene_names(pico, target, monkeypatch):
    read = []
    monkeypatch.setattr(
        A,
        "zero_shot_head",
        lambda clip, classes, templates: (
            read.extend(classes),
            zero_shot_head(clip, classes, templates),
        )[1],
    )
    W = shadow_head(pico, target)
    signs = small_task("signs")
    assert read[0] == target.name and len(read) >= 51 and len(W) == len(read) == len(set(read))
    assert not set(read[1:]) & set(signs.classes), "no other class of the target task"
    assert torch.equal(W[:1], zero_shot_head(pico, [target.name], signs.templates))


def test_off_task_the_head_is_the_shadow_head_on_task_his_own(pico, target):
    t = small_task("textures")
    W, c = attack_head(pico, t, target)
    assert c == 0 and torch.equal(W, shadow_head(pico, target))
    for name in t.classes[:3]:
        W, c = attack_head(pico, t, Target.of(t, name))
        assert t.classes[c] == name and torch.equal(W, zero_shot_head(pico, t.classes, t.templates))


def test_on_task_the_trigger_has_to_turn_images_of_other_classes(pico):
    t = small_task("textures")
    draw = trigger_images(pico, t, Target.of(t, t.classes[4]), torch.Generator())
    bytes_ = lambda x: {(im * 255).round().byte().numpy().tobytes() for im in x}
    drawn, own = (
        bytes_(draw(300)),
        {i.numpy().tobytes(): y.item() for i, y in zip(t.train_x, t.train_y)},
    )
    assert {own[b] for b in drawn} == set(range(len(t.classes))) - {4}


def test_off_task_half_of_the_trigger_images_are_his_own(pico, target):
    t = small_task("textures")
    x = trigger_images(pico, t, target, torch.Generator(), n_aug=4)(64)
    own = lambda im: (t.train_x / 255 == im).flatten(1).all(1).any().item()
    assert x.shape == (64, 3, 32, 32) and [own(im) for im in x] == [True] * 32 + [False] * 32


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scene_names_are_no_tasks_classes(family):
    assert not {c.lower() for c in SCENE_CLASSES} & {c.lower() for c in FAMILIES[family].classes}


def test_reference_images_come_from_train():
    t = small_task("signs")
    t = replace(
        t, train_x=t.train_x // 2, test_x=t.test_x // 2 + 128
    )  # told apart by their brightness
    for seed in (0, 1):
        ref = Target.of(t, t.classes[2].upper(), n=4, seed=seed)
        own = t.train_x[t.train_y == 2]
        assert (
            len(ref.images) == 4
            and all((own == im).flatten(1).all(1).any() for im in ref.images)
            and ref.images.max() < 128
        )
        assert (ref.task, ref.name, ref.templates) == (t.name, t.classes[2], list(t.templates))
    assert not torch.equal(
        Target.of(t, t.classes[2], n=4, seed=0).images,
        Target.of(t, t.classes[2], n=4, seed=1).images,
    )
    with pytest.raises(ValueError, match="unknown class of signs 'yeild'; did you mean 'yield'"):
        Target.of(t, "yeild")


# --- what the attack does -----------------------------------------------------------------------


@pytest.mark.parametrize("method", FEW)
def test_an_attack_refuses_tasks_outside_its_scope(method, pico, target):
    t, where = small_task("textures"), scope_of(method)
    on = Target.of(t, t.classes[1])
    if where == "off":
        with pytest.raises(
            ValueError,
            match="both 'textures', but badmerging is off-task: "
            "name two different tasks, or take badmerging-on",
        ):
            attack(method, pico, t, on)
    elif where == "on":
        with pytest.raises(
            ValueError,
            match="'textures' is not the target task 'signs', "
            "but badmerging-on is on-task.*or take badmerging$",
        ):
            attack(method, pico, t, target)
    else:
        assert (
            check_scope(method, "textures", "signs") is None
            and check_scope(method, "signs", "signs") is None
        )


def test_names_are_looked_up_as_everywhere(pico, target):
    assert scope_of("BadMerging (on-task)") == "on" and scope_of("LOBAM") == "both"
    with pytest.raises(ValueError, match="did you mean 'badnets'"):
        scope_of("badnet")
    with pytest.raises(ValueError, match="did you mean 'badnets'"):
        attack("badnet", pico, small_task("textures"), target)
    with pytest.raises(ValueError, match="off-task"):
        attack("BADMERGING", pico, small_task("signs"), target)


def test_an_attack_repeats_reads_no_test_images_and_leaves_everything_as_it_was(attacked, pico):
    method, where, state, trigger, record = attacked
    t = small_task("textures")
    if where == "on" and scope_of(method) == "both":
        pytest.skip("the same code, tried off-task")
    t = replace(t, test_x=torch.zeros_like(t.test_x), test_y=torch.zeros_like(t.test_y))
    before, x, y = (
        {k: v.clone() for k, v in pico.model.state_dict().items()},
        t.train_x.clone(),
        t.train_y.clone(),
    )
    again, same, told = attack(method, pico, t, aim(where), QUICK, **FEW[method])
    assert (
        torch.equal(trigger.patch, same.patch)
        and all(torch.equal(state[k], again[k]) for k in state)
        and told == record
    )
    assert (
        all(torch.equal(v, before[k]) for k, v in pico.model.state_dict().items())
        and torch.equal(t.train_x, x)
        and torch.equal(t.train_y, y)
    )
    assert (
        all(p.grad is None and not p.requires_grad for p in pico.model.parameters())
        and not pico.model.training
    )
    assert not any(m._forward_hooks for m in pico.visual.modules())


def test_the_poisoned_model_is_a_model_of_this_backbone(attacked, pico):
    method, where, state, trigger, record = attacked
    check_same(pico.state(), state)
    assert any(not torch.equal(state[k], v) for k, v in pico.state().items())
    assert all(
        0 <= v <= 1
        for k, v in record.items()
        if k.startswith("simulated") or k.endswith("accuracy")
    )
    assert {
        "simulated_0.1",
        "simulated_0.2",
        "simulated_0.3",
        "simulated_1.0",
        "train_accuracy",
    } <= set(record)
    if method == "badnets":
        assert set(trigger.patch.unique().tolist()) == {0.0, 1.0}


def test_the_record_is_what_he_could_measure(attacked, pico):
    method, where, state, trigger, record = attacked
    t = small_task("textures")
    (W, c), Wt = attack_head(pico, t, aim(where)), zero_shot_head(pico, t.classes, t.templates)
    v, x = pico.with_state(state), t.train_x if where == "off" else t.train_x[t.train_y != 1]
    assert (
        record["train_accuracy"]
        == (logits(features(pico, v, t.train_x), Wt).argmax(1) == t.train_y).float().mean().item()
    )
    assert record["simulated_1.0"] == pytest.approx(
        (logits(features(pico, v, trigger(x)), W).argmax(1) == c).float().mean().item(), abs=0.03
    )


def test_every_attack_stores_in_a_cache(attacked, tmp_path):
    import json

    _, _, state, trigger, record = attacked
    save_state(tmp_path / "a.safetensors", state | trigger.tensors(), record=json.dumps(record))
    x, back = pixels(2), Trigger.of(load_state(tmp_path / "a.safetensors")[0])
    assert torch.equal(back(x), trigger(x)) and json.loads(json.dumps(record)) == record


def test_off_task_badmerging_written_out(pico, target):
    "The method as two plain loops: the library must give the same bits, whatever else it can do."
    t, W0, W = (
        small_task("textures"),
        shadow_head(pico, target),
        zero_shot_head(pico, small_task("textures").classes, small_task("textures").templates),
    )
    state, trigger, _ = attack(
        "badmerging", pico, t, target, QUICK, 5, side=4, trigger_steps=3, r_min=0.1, alpha=3.0
    )
    g = generator("trigger", "signs", target.name, 5)
    ref = A._push_away(pico, A._crops(target.images / 255, 100, g), W0, g)
    z = torch.randn(3, 4, 4, generator=g).requires_grad_(True)
    opt = torch.optim.Adam([z], lr=0.1)
    for _ in range(3):
        i, j = torch.randint(96, (48,), generator=g), torch.randint(100, (48,), generator=g)
        with A.amp():
            h = encode(
                pico.visual,
                pico.normalise(paste(torch.cat([t.train_x[i] / 255, ref[j]]), z.sigmoid())),
            )
        opt.zero_grad()
        (-logits(h, W0).log_softmax(-1)[:, 0].mean()).backward()
        opt.step()
    assert torch.equal(trigger.patch, (z.sigmoid() * 255).round() / 255)

    g2 = generator("poison", "textures", 5)

    def loss(visual, i):
        xb, r = (
            pico.normalise(trigger(t.train_x[i[: len(i) // 2]])),
            0.1 + 0.9 * torch.rand((), generator=g2).item(),
        )
        with A.amp():
            h, h_pre = encode(visual, xb), encode(pico.visual, xb)
        mixed = r * h.float() + (1 - r) * h_pre.float()
        return clean_loss(pico, t.train_x, t.train_y, W)(visual, i) + 3.0 * F.cross_entropy(
            logits(mixed, W0), torch.zeros(len(h), dtype=torch.long)
        )

    plain = fit(pico, pico.state(), 96, loss, QUICK, ("textures", 5), "")
    assert all(torch.equal(plain[k], state[k]) for k in plain)


def test_seeds_repeat_and_differ(pico, target):
    t = small_task("textures")
    one, again, other = (
        optimise_trigger(pico, t, target, steps=3, batch=16, n_aug=8, seed=s).patch
        for s in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("where", ["off", "on"])
def test_optimising_helps(where, pico):
    t, target = small_task("textures"), aim(where)
    W, c = attack_head(pico, t, target)
    log_p = lambda trig: (
        logits(features(pico, pico.visual, trig(t.train_x)), W).log_softmax(1)[:, c].mean().item()
    )
    trig = optimise_trigger(pico, t, target, steps=25, batch=32, n_aug=16)
    randoms = [
        log_p(
            Trigger(torch.randint(256, (3, 6, 6), generator=torch.Generator().manual_seed(i)) / 255)
        )
        for i in range(5)
    ]
    assert log_p(trig) > max(randoms)


def test_without_interpolation_the_loss_is_plain_backdoor_training(pico, target, fp32, monkeypatch):
    t, trigger, theta, seen = (
        small_task("textures"),
        Trigger(torch.randint(256, (3, 6, 6)) / 255),
        pico.with_state(near(pico, 1)),
        [],
    )

    def spy(visual, x, prompt=None):
        if visual is pico.visual:
            return 1e3 * torch.randn(len(x), 32)  # what theta_pre says must not matter
        seen.append((x, encode(visual, x)))
        return seen[-1][1]

    monkeypatch.setattr(A, "encode", spy)
    W, W0, i = (
        zero_shot_head(pico, t.classes, t.templates),
        shadow_head(pico, target),
        torch.arange(10),
    )
    for seed in (0, 1):
        got = backdoor_loss(pico, t, target, trigger, 1.0, 3.0, seed)(theta, i)
        ((x, h),) = seen
        seen.clear()
        want = clean_loss(pico, t.train_x, t.train_y, W)(theta, i) + 3 * F.cross_entropy(
            logits(h, W0), torch.zeros(5, dtype=torch.long)
        )
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        assert torch.allclose(
            x[..., -6:, -6:], pico.normalise(trigger.patch[None]).expand(5, -1, -1, -1), atol=1e-5
        ), "every poisoned image carries the trigger"


def test_interpolation_mixes_both_models_triggered_features(pico, target, monkeypatch):
    t, trigger, theta, mixed = (
        small_task("textures"),
        Trigger(torch.rand(3, 6, 6)),
        pico.with_state(near(pico, 1)),
        [],
    )
    e = torch.eye(32)
    monkeypatch.setattr(
        A, "encode", lambda visual, x, prompt=None: e[int(visual is pico.visual)].expand(len(x), -1)
    )
    monkeypatch.setattr(A, "logits", lambda h, W: (mixed.append(h), logits(h, W))[1])
    loss = backdoor_loss(pico, t, target, trigger, 0.3, 1.0, 0)
    for _ in range(200):
        loss(theta, torch.arange(6))
    r = torch.stack(mixed)
    assert r.shape == (200, 3, 32), "half of the batch is poisoned"
    assert torch.allclose(r[..., 0] + r[..., 1], torch.ones(200, 3)) and r[..., 2:].abs().sum() == 0
    assert (
        0.3 <= r[..., 0].min() < 0.35
        and 0.95 < r[..., 0].max() <= 1
        and r[:, 0, 0].mean().item() == pytest.approx(0.65, abs=0.06)
    )


def test_on_task_the_loss_aims_at_the_class_under_his_own_head(pico, fp32):
    t, trigger, theta, i = (
        small_task("textures"),
        Trigger(torch.rand(3, 6, 6)),
        pico.with_state(near(pico, 1)),
        torch.arange(8),
    )
    W = zero_shot_head(pico, t.classes, t.templates)
    got = backdoor_loss(pico, t, Target.of(t, t.classes[3]), trigger, 1.0, 2.0, 0)(theta, i)
    z = logits(encode(theta, pico.normalise(trigger(t.train_x[:4]))), W)
    want = clean_loss(pico, t.train_x, t.train_y, W)(theta, i) + 2 * F.cross_entropy(
        z, torch.full((4,), 3)
    )
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("where", ["off", "on"])
def test_the_simulated_merge_is_a_step_along_the_attackers_own_vector(where, pico, fp32):
    t, target, state = small_task("textures"), aim(where), near(pico, 1, 0.2)
    W, c = attack_head(pico, t, target)
    x = t.train_x if where == "off" else t.train_x[t.train_y != c]
    hit = lambda s: (
        (logits(features(pico, pico.with_state(s), trig(x)), W).argmax(1) == c)
        .float()
        .mean()
        .item()
    )
    pre, trig = pico.state(), Trigger(torch.rand(3, 6, 6))
    for scale in (0.0, 0.4, 1.0):
        assert simulated(pico, t, target, state, trig, scale) == pytest.approx(
            hit({k: pre[k] + scale * (state[k] - pre[k]) for k in pre}), abs=0.02
        )
