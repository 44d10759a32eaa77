"""Fine-tuning the visual tower, and task vectors."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from conftest import near, small_task
from lfpm_nb.clip import encode, logits, zero_shot_head
from lfpm_nb.core import Diverged
from lfpm_nb.tune import TuneConfig, batches, clean_loss, finetune, fit, norm, task_vector

QUICK = TuneConfig(epochs=1, batch=32)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 3))
def test_batches_cover_each_epoch_once(n, batch, epochs):
    got = list(batches(n, batch, epochs, "x"))
    per = max(1, n // batch)
    assert len(got) == per * epochs and {len(b) for b in got} == {min(n, batch)}
    for e in range(epochs):
        seen = torch.cat(got[e * per:(e + 1) * per]).tolist()
        assert len(set(seen)) == len(seen) and all(0 <= i < n for i in seen)


def test_batches_are_reshuffled_and_seeded():
    one, again, other = (torch.cat(list(batches(40, 8, 2, *s))) for s in (("a", 0), ("a", 0), ("a", 1)))
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one[:40], one[40:])


def test_task_vector_and_norm(pico):
    pre, tuned = pico.state(), near(pico, 1)
    tau = task_vector(pre, tuned)
    assert all(torch.allclose(pre[k] + tau[k], tuned[k]) for k in pre)
    assert norm(tau) == pytest.approx(sum(float(v.double().square().sum()) for v in tau.values()) ** .5)
    assert task_vector({"n": torch.tensor(1)}, {"n": torch.tensor(2)}) == {}


def test_loss_is_cross_entropy_under_the_frozen_head(pico, fp32):
    t = small_task("signs")
    W, i = zero_shot_head(pico, t.classes, t.templates), torch.tensor([3, 1, 4])
    p = logits(encode(pico.visual, pico.normalise(t.train_x[i])), W).softmax(1)
    assert clean_loss(pico, t.train_x, t.train_y, W)(pico.visual, i).item() == pytest.approx(-p[range(3), t.train_y[i]].log().mean().item(), rel=1e-4)


def test_finetuning_is_seeded_and_changes_only_its_own_copy(pico):
    t, before = small_task("textures"), {k: v.clone() for k, v in pico.model.state_dict().items()}
    one, again, other = (finetune(pico, t, QUICK, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(one[k], again[k]) for k in one) and any(not torch.equal(one[k], other[k]) for k in one)
    assert all(torch.equal(v, before[k]) for k, v in pico.model.state_dict().items())
    assert one.keys() == pico.state().keys() and {v.dtype for v in one.values()} == {torch.float32} and norm(task_vector(pico.state(), one)) > 0


def test_finetuning_learns(pico):
    t = small_task("textures")
    W = zero_shot_head(pico, t.classes, t.templates)
    loss = lambda s: clean_loss(pico, t.train_x, t.train_y, W)(pico.with_state(s), torch.arange(len(t.train_y))).item()
    assert loss(finetune(pico, t, TuneConfig(epochs=6, batch=32, lr=1e-3, warmup=2))) < 0.9 * loss(pico.state())


def test_a_loss_that_is_not_finite_stops_with_advice(pico):
    with pytest.raises(Diverged, match="on fire, step 0: the loss is nan at lr .*; lower lr") as e:
        fit(pico, pico.state(), 32, lambda v, i: v.proj.sum() * float("nan"), QUICK, (), "on fire")
    assert all(torch.equal(v, e.value.state[k]) for k, v in pico.state().items()), "the weights before the step"


def test_a_gradient_that_is_not_finite_stops_too(pico):
    endless = lambda v, i: (v.proj.sum() * 0).sqrt()                  # 0 with an infinite slope
    with pytest.raises(Diverged, match="the gradient norm is"): fit(pico, pico.state(), 32, endless, QUICK, (), "on fire")


@pytest.mark.parametrize("rank", [1, 3])
def test_lora_moves_only_attention_by_matrices_of_its_rank(pico, rank):
    t = small_task("textures")
    tuned = finetune(pico, t, replace(QUICK, lora=rank, lr=1e-2))
    moved = {k: tuned[k] - v for k, v in pico.state().items() if not torch.equal(tuned[k], v)}
    assert moved and all(k.endswith("in_proj_weight") for k in moved) and tuned.keys() == pico.state().keys()
    assert all(torch.linalg.matrix_rank(third, rtol=1e-4) <= rank for m in moved.values() for third in m.chunk(3))


def test_fit_gives_the_loss_every_batch_in_order(pico):
    seen = []
    def loss(v, i): seen.append(i); return v.proj.square().sum()
    fit(pico, pico.state(), 70, loss, replace(QUICK, epochs=2), ("s",), "x")
    assert all(torch.equal(a, b) for a, b in zip(seen, batches(70, 32, 2, "s"), strict=True))
