"""Fine-tuning the visual tower, and task vectors."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from torch.utils._python_dispatch import TorchDispatchMode

from conftest import near, small_task
from lfpm_nb import baselines  # registers SAM
from lfpm_nb.antibackdoor import Strengths
from lfpm_nb.attack import Target, Trigger, backdoor_loss
from lfpm_nb.clip import encode, logits, zero_shot_head
from lfpm_nb.core import Diverged
from lfpm_nb.defend import train_defence
from lfpm_nb.subspace import mine_prompt
from lfpm_nb.tune import TuneConfig, batches, clean_loss, finetune, fit, norm, task_vector

QUICK = TuneConfig(epochs=1, batch=32)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 3))
def test_batches_cover_each_epoch_once(n, batch, epochs):
    got = list(batches(n, batch, epochs, "x"))
    per = max(1, n // batch)
    assert len(got) == per * epochs and {len(b) for b in got} == {min(n, batch)}
    for e in range(epochs):
        seen = torch.cat(got[e * per : (e + 1) * per]).tolist()
        assert len(set(seen)) == len(seen) and all(0 <= i < n for i in seen)


def test_batches_are_reshuffled_and_seeded():
    one, again, other = (
        torch.cat(list(batches(40, 8, 2, *s))) for s in (("a", 0), ("a", 0), ("a", 1))
    )
    assert (
        torch.equal(one, again)
        and not torch.equal(one, other)
        and not torch.equal(one[:40], one[40:])
    )


def test_task_vector_and_norm(pico):
    pre, tuned = pico.state(), near(pico, 1)
    tau = task_vector(pre, tuned)
    assert all(torch.allclose(pre[k] + tau[k], tuned[k]) for k in pre)
    assert norm(tau) == pytest.approx(
        sum(float(v.double().square().sum()) for v in tau.values()) ** 0.5
    )
    assert task_vector({"n": torch.tensor(1)}, {"n": torch.tensor(2)}) == {}


def test_loss_is_cross_entropy_under_the_frozen_head(pico, fp32):
    t = small_task("signs")
    W, i = zero_shot_head(pico, t.classes, t.templates), torch.tensor([3, 1, 4])
    p = logits(encode(pico.visual, pico.normalise(t.train_x[i])), W).softmax(1)
    assert clean_loss(pico, t.train_x, t.train_y, W)(pico.visual, i).item() == pytest.approx(
        -p[range(3), t.train_y[i]].log().mean().item(), rel=1e-4
    )


def test_finetuning_is_seeded_and_changes_only_its_own_copy(pico):
    t, before = small_task("textures"), {k: v.clone() for k, v in pico.model.state_dict().items()}
    one, again, other = (finetune(pico, t, QUICK, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(one[k], again[k]) for k in one) and any(
        not torch.equal(one[k], other[k]) for k in one
    )
    assert all(torch.equal(v, before[k]) for k, v in pico.model.state_dict().items())
    assert (
        one.keys() == pico.state().keys()
        and {v.dtype for v in one.values()} == {torch.float32}
        and norm(task_vector(pico.state(), one)) > 0
    )


def test_finetuning_learns(pico):
    t = small_task("textures")
    W = zero_shot_head(pico, t.classes, t.templates)
    loss = lambda s: clean_loss(pico, t.train_x, t.train_y, W)(
        pico.with_state(s), torch.arange(len(t.train_y))
    ).item()
    assert loss(finetune(pico, t, TuneConfig(epochs=6, batch=32, lr=1e-3, warmup=2))) < 0.9 * loss(
        pico.state()
    )


def test_a_loss_that_is_not_finite_stops_with_advice(pico):
    with pytest.raises(Diverged, match="on fire, step 0: the loss is nan at lr .*; lower lr") as e:
        fit(pico, pico.state(), 32, lambda v, i: v.proj.sum() * float("nan"), QUICK, (), "on fire")
    assert all(torch.equal(v, e.value.state[k]) for k, v in pico.state().items()), (
        "the weights before the step"
    )


def test_a_gradient_that_is_not_finite_stops_too(pico):
    endless = lambda v, i: (v.proj.sum() * 0).sqrt()  # 0 with an infinite slope
    with pytest.raises(Diverged, match="the gradient norm is"):
        fit(pico, pico.state(), 32, endless, QUICK, (), "on fire")


@pytest.mark.parametrize("broken", [0, 1, 7, 19])
def test_whenever_it_is_noticed_the_weights_are_those_before_the_bad_step(pico, broken):
    seen = []

    def loss(v, i):
        seen.append({k: t.clone() for k, t in v.state_dict().items()})
        return v.proj.square().sum() * (float("nan") if len(seen) == broken + 1 else 1)

    with pytest.raises(Diverged, match=f"on fire, step {broken}: the loss is nan") as e:
        fit(pico, pico.state(), 20, loss, TuneConfig(epochs=10, batch=10, lr=1e-2), (), "on fire")
    assert all(torch.equal(v, seen[broken][k]) for k, v in e.value.state.items())
    assert broken == 0 or not torch.equal(e.value.state["proj"], pico.state()["proj"]), (
        "the steps before it were taken"
    )


class Questions(TorchDispatchMode):
    """Counts how often Python asked for a number.

    On a GPU each waits until all the work given to it is done."""

    n = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.n += f is torch.ops.aten._local_scalar_dense.default
        return f(*args, **(kwargs or {}))


def test_questions_are_counted():
    with Questions() as asked:
        float(torch.ones(1)), bool(torch.ones(1) > 0), torch.ones(1).item()
    assert asked.n == 3


@pytest.mark.parametrize(
    "stage", ["finetune", "BadMerging", "prompt", "LFPM", "fine-tuning", "SAM"]
)
def test_no_step_asks_the_device_for_a_number(pico, shadow, prompts, stage):
    task, theta = small_task("textures"), near(pico, 1)
    W, bad = zero_shot_head(pico, task.classes, task.templates), Trigger(torch.rand(3, 6, 6))

    def train(epochs):
        cfg, s = (
            TuneConfig(epochs=epochs, batch=8),
            Strengths(rank=4, rho=0.1, prompt_length=3, epochs=epochs, batch=8, lr=1e-3, points=4),
        )
        if stage == "finetune":
            fit(pico, theta, 24, clean_loss(pico, task.train_x, task.train_y, W), cfg, (), "x")
        elif stage == "BadMerging":
            fit(
                pico,
                theta,
                24,
                backdoor_loss(
                    pico, task, Target.of(small_task("signs"), "yield", 4), bad, 1.0, 2.0, 0
                ),
                cfg,
                (),
                "x",
            )
        elif stage == "prompt":
            mine_prompt(
                pico, pico.with_state(theta), shadow, None, 2.0, 3, steps=3 * epochs, batch=8
            )
        else:
            train_defence(stage, theta, pico, shadow, prompts, s, 0)

    def asked(epochs):
        with Questions() as q:
            train(epochs)
        return q.n

    few, many = asked(1), asked(3)
    assert many - few == (
        6 if stage == "BadMerging" else 0
    )  # BadMerging's r is drawn on the CPU, wherever the training is


@pytest.mark.parametrize("rank", [1, 3])
def test_lora_moves_only_attention_by_matrices_of_its_rank(pico, rank):
    t = small_task("textures")
    tuned = finetune(pico, t, replace(QUICK, lora=rank, lr=1e-2))
    moved = {k: tuned[k] - v for k, v in pico.state().items() if not torch.equal(tuned[k], v)}
    assert (
        moved
        and all(k.endswith("in_proj_weight") for k in moved)
        and tuned.keys() == pico.state().keys()
    )
    assert all(
        torch.linalg.matrix_rank(third, rtol=1e-4) <= rank
        for m in moved.values()
        for third in m.chunk(3)
    )


def test_fit_gives_the_loss_every_batch_in_order(pico):
    seen = []

    def loss(v, i):
        seen.append(i)
        return v.proj.square().sum()

    fit(pico, pico.state(), 70, loss, replace(QUICK, epochs=2), ("s",), "x")
    assert all(torch.equal(a, b) for a, b in zip(seen, batches(70, 32, 2, "s"), strict=True))
