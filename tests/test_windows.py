"""Picture prompts: windows, what they show, and that both stages and every rival take them."""

from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, strategies as st

from conftest import near
from lfpm_nb import baselines  # noqa: F401  it registers the rivals
from lfpm_nb.antibackdoor import Strengths, shadow_loop, stage_one, step_loss, worst_prompt
from lfpm_nb.clip import Windowed, encode, features, numbered, windows
from lfpm_nb.core import generator
from lfpm_nb.ctl import ctl_curve
from lfpm_nb.defend import defences, train_defence
from lfpm_nb.runs import experiments, settings_of
from lfpm_nb.subspace import mine_prompt, prompt_start

S = Strengths(
    rho=0.1,
    prompt_kind="picture",
    prompt_steps=3,
    semantic=(1.0, 3.0),
    epochs=1,
    batch=16,
    lr=1e-3,
    points=4,
)


@pytest.fixture(scope="module")
def theta(pico):
    return near(pico, 1)


@pytest.fixture(scope="module")
def picture(pico, shadow):
    return prompt_start(pico, "picture", shadow.x, 3, 1.0, seed=7)[0]


# --- windows ------------------------------------------------------------------------------------


@given(st.integers(8, 64), st.integers(8, 64), st.integers(0, 10**7))
def test_a_window_is_one_square_inside(height, width, first):
    number = torch.arange(first, first + 20)
    for mask in windows(number, (height, width))[:, 0]:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        assert len(rows) == len(columns)
        assert mask.sum() == len(rows) * len(columns)
        assert round(min(height, width) / 5) <= len(rows) <= round(min(height, width) * 3 / 8)


def test_a_window_is_a_matter_of_its_number_alone():
    number = torch.tensor([5, 900, 5])
    mask = windows(number, (32, 32))
    assert torch.equal(mask[0], mask[2])
    assert torch.equal(mask[1:2], windows(number[1:2], (32, 32)))


def test_all_sides_come_equally_often():
    side = windows(torch.arange(7000), (32, 32)).sum((1, 2, 3)).sqrt().int()
    count = side.bincount()[6:]
    assert len(count) == 7
    assert (count - 1000).abs().max() < 50


# --- what a model sees --------------------------------------------------------------------------


def test_only_the_window_changes(pico, shadow, picture):
    x, number = pico.normalise(shadow.x[:9]), torch.arange(40, 49)
    shown = Windowed(picture, number).on(x)
    mask = windows(number, tuple(x.shape[-2:])).expand_as(x)
    assert torch.equal(shown[~mask], x[~mask])
    assert torch.equal(shown[mask], picture.expand_as(x)[mask])


def test_encode_numbers_a_batch_from_nought(pico, theta, shadow, picture):
    v, x = pico.with_state(theta), pico.normalise(shadow.x[:6])
    own = encode(v, x, picture)
    assert torch.equal(own, encode(v, x, Windowed(picture, torch.arange(6))))
    assert not torch.equal(own, encode(v, x, Windowed(picture, torch.arange(1, 7))))


def test_features_do_not_depend_on_the_batch(pico, theta, shadow, picture, fp32):
    v = pico.with_state(theta)
    whole, parts = (features(pico, v, shadow.x[:30], picture, batch=b) for b in (30, 7))
    assert torch.allclose(whole, parts, atol=1e-5)


def test_a_picture_of_another_size_is_refused(pico, theta, shadow, picture):
    with pytest.raises(ValueError, match="the prompt is a picture .*; mine it anew at their size"):
        features(pico, pico.with_state(theta), shadow.x[:2], picture[:, :8, :8])


def test_tokens_are_not_numbered(prompts):
    p = prompts[0]
    assert numbered(p, torch.arange(4)) is p
    assert numbered(None, torch.arange(4)) is None


# --- Stage I ------------------------------------------------------------------------------------


def test_a_picture_stays_between_black_and_white(pico, theta, shadow):
    p, log = mine_prompt(
        pico, pico.with_state(theta), shadow, None, 1.0, steps=12, lr=5.0, kind="picture"
    )
    black, white = (pico.normalise(torch.full_like(shadow.x[:1], v))[0] for v in (0, 255))
    assert p.shape == shadow.x.shape[1:]
    assert (p >= black).all()
    assert (p <= white).all()
    assert (p == white).any(), "at this rate some pixels reach the end"
    assert len(log) == 12


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown prompt_kind 'pictures'; did you mean 'picture'"):
        Strengths(prompt_kind="pictures")


def test_stage_one_mines_a_picture_for_each_weight(pico, theta, shadow):
    mined, log = stage_one(pico, theta, shadow, replace(S, rho="rule"), 0)
    assert mined["p"].shape == (2, *shadow.x.shape[1:])
    assert [p["semantic"] for p in log["prompt"]] == [1.0, 3.0]
    assert log["rho"] in log["rhos_tried"]


# --- Stage II -----------------------------------------------------------------------------------


def test_the_worst_picture_keeps_its_windows(picture):
    number, w = torch.arange(5), torch.randn(picture.shape, generator=generator("w"))
    worse = worst_prompt(lambda q: (q.picture * w).sum(), Windowed(picture, number), 0.1)
    assert torch.equal(worse.number, number)
    step = worse.picture - picture
    assert torch.allclose(step.norm(), 0.1 * picture.norm(), rtol=1e-4)
    assert torch.allclose(step / step.norm(), w / w.norm(), atol=1e-4)


def test_the_worst_picture_raises_the_loss(pico, theta, shadow, picture, fp32):
    mm, anti = (pico.with_state(s).requires_grad_(True) for s in (theta, near(pico, 2)))
    x, y = pico.normalise(shadow.x[:16]), shadow.y[:16]
    see = Windowed(picture, torch.arange(16))
    calm, bad = (
        step_loss(mm, anti, x, y, shadow.W, see, replace(S, rho=rho)).item() for rho in (0.0, 0.05)
    )
    assert bad > calm


def test_an_image_sees_another_window_in_each_epoch(pico, theta, shadow, picture, monkeypatch):
    from lfpm_nb import antibackdoor

    seen = []

    def train(visual, params, opt, steps, warmup, name, loss, *rest):
        for k, i in enumerate(steps):
            loss(k, i)

    monkeypatch.setattr(antibackdoor, "train", train)
    note = lambda x, y, p: seen.append(p.number)
    shadow_loop(None, [], None, shadow, picture[None], replace(S, epochs=2), 0, "x", note)
    number = torch.cat(seen)
    assert len(number) == 2 * len(shadow.train[1])
    assert len(number.unique()) == len(number)


@pytest.mark.parametrize("method", sorted(defences))
def test_every_defence_takes_pictures(pico, theta, shadow, picture, method):
    end, _ = train_defence(method, theta, pico, shadow, picture[None], S, 0)
    moved = [k for k in end if not torch.equal(end[k], theta[k])]
    assert moved
    assert all(torch.isfinite(v).all() for v in end.values())


def feature_row(pico, theta, shadow, picture, lam, batch):
    rows = ctl_curve(pico, theta, near(pico, 2), shadow.x[:9], [lam], picture, batch)
    return next(r for r in rows if r["block"] == "feature")


def test_linearity_under_a_picture(pico, theta, shadow, picture):
    end = feature_row(pico, theta, shadow, picture, 1.0, 9)
    assert end["coefficient"] == pytest.approx(1, abs=1e-4)
    whole, parts = (feature_row(pico, theta, shadow, picture, 0.5, b) for b in (9, 4))
    assert whole["deviation"] == pytest.approx(parts["deviation"], rel=1e-3)


# --- where it can be asked for ------------------------------------------------------------------


def test_purify_and_the_experiment_mean_the_same_picture():
    "A stranger's model is no lab: as on real pictures."
    own = asdict(settings_of("purify", "picture"))
    real = asdict(settings_of("pictures", "small-real"))
    same = {*experiments()["pictures"].parameters} - {"defences"}
    assert {"prompt_kind", "semantic", "prompted_weight", "anti_lr", "lam"} <= same
    assert {k: own[k] for k in same} == {k: real[k] for k in same}
